//! Ranks on GPUs: buckets of gradients are summed by NCCL once a step, or folded in order after every micro-batch, while the layers below are
//! still computed; small values, heartbeats and causes travel over the control channel, as everywhere.

use std::any::Any;
use std::net::IpAddr;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::bucket::{BLOCK, BlockCounts, GPU_BUCKET, at_once, cuts, pieces, share};
use super::control::{Aside, Channel, Control, end_here, suspect};
use super::{Choice, Communicator, Fold, Listener, Position, Span, Sums, Timing, Ways, World};
use crate::backend::Backend;
use crate::cuda::collectives::{Collectives, Piece, Slots, What};
use crate::cuda::nccl::{HOW_TO_GET, Nccl, UniqueId};
use crate::cuda::{Cuda, CudaStats, stats};
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::{bail, ensure, say};

/// How long a failure of NCCL waits for the cause that the control channel has: a rank that is gone is known there first.
const CAUSE: Duration = Duration::from_secs(5);

/// Shared memory that NCCL wants for each rank of a machine.
const SHARED: u64 = 16 << 20;

/// One rank of several on GPUs.
pub struct GpuRanks {
    world: World,
    control: Rc<Channel>,
    collectives: Collectives,
    sums: Sums,
    fold: Fold,
    bucket: usize,
}

/// Joins the ranks of a run on this device, where it is a GPU and every rank has NCCL; `None` where it is another device, or, unless NCCL is
/// asked for by name, where a rank has none.
///
/// # Errors
/// If the ranks' versions differ, two of them share a GPU, or NCCL cannot connect them.
pub fn join<B: Backend + 'static>(
    dev: &B,
    world: &World,
    control: &Rc<Channel>,
    sums: Sums,
    ways: Ways,
) -> Result<Option<Box<dyn Communicator<B>>>> {
    let dev = (dev as &dyn Any).downcast_ref::<Cuda>();
    // A rank without a GPU would wait elsewhere than the others.
    let own = if dev.is_some() { "a GPU" } else { "the CPU" };
    let on = texts(control.gather("what ranks compute on", own.as_bytes())?);
    if let Some(other) = on.iter().position(|said| *said != on[0]) {
        bail!(
            "what ranks compute on differs: rank 0 has {}, rank {other} {}; pass --device cuda or --device cpu, and --device auto says why \
             it takes no GPU",
            on[0],
            on[other]
        );
    }
    let Some(dev) = dev else {
        ensure!(
            ways.transport != Choice::Nccl,
            "--transport nccl: it moves gradients of GPUs alone, and this device is none"
        );
        return Ok(None);
    };
    let Some(ranks) = GpuRanks::join(dev, world, control, sums, ways)? else { return Ok(None) };
    let ranks: Box<dyn Communicator<Cuda>> = Box::new(ranks);
    // Where the device is a `Cuda`, B is that type.
    let ranks = (Box::new(ranks) as Box<dyn Any>).downcast::<Box<dyn Communicator<B>>>();
    Ok(ranks.ok().map(|ranks| *ranks))
}

impl GpuRanks {
    fn join(dev: &Cuda, world: &World, control: &Rc<Channel>, sums: Sums, ways: Ways) -> Result<Option<Self>> {
        let own = Nccl::get().and_then(|nccl| Ok((nccl, nccl.version()?)));
        let said = own.as_ref().map_or_else(|e| format!("-{e}"), |(_, version)| format!("+{version}"));
        let all = texts(control.gather("nccl", said.as_bytes())?);
        if let Some((rank, why)) = all.iter().enumerate().find_map(|(r, said)| Some((r, said.strip_prefix('-')?))) {
            ensure!(ways.transport != Choice::Nccl, "--transport nccl: rank {rank}: {why}; {}", HOW_TO_GET);
            say::warning(&format!("gradients of the GPUs go through the host: rank {rank}: {why}; {}", HOW_TO_GET));
            return Ok(None);
        }
        let (nccl, _) = own?;
        if let Some(other) = all.iter().position(|said| *said != all[0]) {
            let version = |r: usize| all[r].trim_start_matches('+').to_string();
            bail!("NCCL differs between ranks: rank 0 has {}, rank {other} has {}", version(0), version(other));
        }
        let gpu = format!("{} on host {}", dev.uuid()?, crate::machine::host());
        one_gpu_each(&texts(control.gather("gpu", gpu.as_bytes())?))?;
        shared_memory(world)?;
        // The main rank's error has its words there; the others learn of it from the control channel.
        let id = if world.is_main() { nccl.unique_id().map(|id| id.0.to_vec()) } else { Ok(Vec::new()) };
        let said = id.as_ref().map_or(Vec::new(), Clone::clone);
        let mut all = control.gather("the name of the communicator", &said)?;
        id?;
        let id: [u8; 128] = all.swap_remove(0).try_into().map_err(|_| Error::bystander())?;
        let failed = |e: Error| {
            std::thread::sleep(CAUSE);
            end_here(&e.to_string());
        };
        let collectives = Collectives::join(dev, nccl, UniqueId(id), (world.rank, world.size), at_once, failed)?;
        let comm = collectives.comm();
        suspect(move || comm.error().is_some());
        let (fold, bucket) = (ways.fold.unwrap_or(Fold::Step), ways.bucket.unwrap_or(GPU_BUCKET));
        Ok(Some(Self { world: world.clone(), control: Rc::clone(control), collectives, sums, fold, bucket }))
    }

    /// What each rank owns of a bucket of tensors of these lengths, with elements of so many bytes.
    fn slots(&self, lengths: &[usize], bytes: usize, of: impl Fn(usize, Range<usize>) -> Piece) -> Slots {
        let size = self.world.size;
        let own = |r: usize| pieces(lengths, r, size).into_iter().map(|(i, range)| of(i, range)).collect();
        Slots { pieces: (0..size).map(own).collect(), share: share(lengths, size) * BLOCK * bytes }
    }

    /// Of gradients.
    fn of_tensors(&self, tensors: &[&Tensor<Cuda>]) -> Slots {
        let lengths: Vec<usize> = tensors.iter().map(|t| t.len()).collect();
        self.slots(&lengths, size_of::<f32>(), |i, range| Piece::of(tensors[i], range.start, range.len()))
    }

    /// Of weights.
    fn of_spans(&self, spans: &[Span<'_, Cuda>]) -> Slots {
        let lengths: Vec<usize> = spans.iter().map(|span| span.len).collect();
        let bytes = spans.first().map_or(0, |span| span.tensor.dtype().bytes());
        self.slots(&lengths, bytes, |i, range| {
            let Span { tensor, first, .. } = &spans[i];
            Piece::of(tensor, first + range.start, range.len())
        })
    }
}

impl Communicator<Cuda> for GpuRanks {
    fn world(&self) -> &World {
        &self.world
    }

    fn fold(&self) -> Fold {
        self.fold
    }

    fn bucket_elements(&self) -> usize {
        self.bucket
    }

    fn reduce_start(&self, dev: &Cuda, bucket: usize, tensors: &[&Tensor<Cuda>]) -> Result<()> {
        self.control.asks();
        let slots = self.of_tensors(tensors);
        match (self.fold, self.sums) {
            (Fold::MicroBatch, _) => self.collectives.add(dev, bucket, &slots),
            (Fold::Step, Sums::Owned) => self.collectives.start(What::SumOwned, bucket, &slots),
            (Fold::Step, Sums::Whole) => self.collectives.start(What::Sum, bucket, &slots),
        }
    }

    fn reduce_skip(&self, dev: &Cuda, bucket: usize, tensors: &[&Tensor<Cuda>]) -> Result<()> {
        // Zeros change no bit of a sum, and who sends what need not be known.
        self.reduce_start(dev, bucket, tensors)
    }

    fn prepare(&self, dev: &Cuda, grads: &[Vec<&Tensor<Cuda>>], weights: &[Vec<Span<'_, Cuda>>]) -> Result<()> {
        let grads: Vec<Slots> = grads.iter().map(|tensors| self.of_tensors(tensors)).collect();
        weights.iter().try_for_each(|spans| self.collectives.prepare(&self.of_spans(spans)))?;
        match self.fold {
            Fold::MicroBatch => self.collectives.prepare_folds(dev, &grads),
            Fold::Step => grads.iter().try_for_each(|slots| self.collectives.prepare(slots)),
        }
    }

    fn reduce_finish(&self, dev: &Cuda, bucket: usize, tensors: &mut [&mut Tensor<Cuda>], wanted: Sums) -> Result<()> {
        self.control.asks();
        assert_eq!(wanted, self.sums, "the sums that were started");
        if self.fold == Fold::MicroBatch {
            let tensors: Vec<&Tensor<Cuda>> = tensors.iter().map(|t| &**t).collect();
            self.collectives.collect(dev, bucket, &self.of_tensors(&tensors), wanted == Sums::Whole)?;
        }
        self.collectives.wait()
    }

    fn gather_start(&self, _dev: &Cuda, buckets: &[(usize, Vec<Span<'_, Cuda>>)]) -> Result<()> {
        self.control.asks();
        buckets.iter().try_for_each(|(b, spans)| self.collectives.start(What::Gather, *b, &self.of_spans(spans)))
    }

    fn gather_finish(&self, _dev: &Cuda, bucket: usize, _spans: &mut [Span<'_, Cuda>]) -> Result<()> {
        self.collectives.wait_for(bucket)
    }

    fn add_norm2(
        &self,
        dev: &Cuda,
        stats: &mut CudaStats,
        own: &[(&Tensor<Cuda>, Range<usize>)],
        blocks: &BlockCounts,
    ) -> Result<()> {
        self.control.asks();
        let most = blocks.totals().into_iter().max().unwrap_or(0);
        let order = blocks.places().map(|(rank, at)| (rank * most + at) as u64).collect();
        let slots = stats::Slots { rank: self.world.rank, size: self.world.size, most };
        dev.norm2_over_ranks(stats, own, slots, order, |parts, bytes| self.collectives.gather_in_place(parts, bytes))
    }

    fn listen(&self, listener: Option<Listener>) -> Result<()> {
        self.collectives.listen(listener.map(|tell| -> crate::cuda::collectives::Tell {
            Box::new(move |what, bucket, begun, ended| tell(Timing { what, bucket, begun, ended }))
        }))
    }

    fn collect(&self, _bucket: usize, lengths: &[usize], own: Vec<f32>) -> Result<Option<Vec<f32>>> {
        self.control.asks();
        let counts: Vec<usize> = cuts(lengths, self.world.size).windows(2).map(|cut| (cut[1] - cut[0]) * 4).collect();
        let all = self.collectives.exchange(bytemuck::cast_slice(&own), &counts)?;
        let values = |bytes: &Vec<u8>| bytemuck::pod_collect_to_vec::<u8, f32>(bytes);
        Ok(self.world.is_main().then(|| all.iter().flat_map(values).collect()))
    }

    fn all_squares(&self, counts: &[usize], own: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        self.control.asks();
        let bytes: Vec<usize> = counts.iter().map(|n| n * 8).collect();
        let all = self.collectives.exchange(bytemuck::cast_slice(&own), &bytes)?;
        Ok(all.iter().map(|bytes| bytemuck::pod_collect_to_vec(bytes)).collect())
    }

    fn aside(&self) -> Option<Arc<dyn Aside>> {
        self.control.aside()
    }

    fn gather(&self, what: &str, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.control.gather(what, own)
    }

    fn end_reductions(&self) -> Result<()> {
        self.collectives.close()
    }

    fn at(&self, position: Position) {
        self.control.at(position);
    }

    fn gain(&self) -> f32 {
        self.control.gain()
    }
}

fn texts(all: Vec<Vec<u8>>) -> Vec<String> {
    all.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
}

/// Two ranks on one GPU is what NCCL calls an invalid usage, without a name.
fn one_gpu_each(gpus: &[String]) -> Result<()> {
    for (r, gpu) in gpus.iter().enumerate() {
        if let Some(first) = gpus[..r].iter().position(|other| other == gpu) {
            return Err(Error::usage(format!(
                "ranks {first} and {r} share a GPU, {gpu}: start no more ranks on a machine than it has GPUs, show each rank its own \
                 (CUDA_VISIBLE_DEVICES), or pass --transport socket"
            )));
        }
    }
    Ok(())
}

/// Containers give little shared memory unless they are asked to, and NCCL says no more than "unhandled system error" then.
fn shared_memory(world: &World) -> Result<()> {
    enough_shared_memory(world, free_shared_memory())
}

/// What is free in /dev/shm, in bytes; `None` where there is no such file system.
fn free_shared_memory() -> Option<u64> {
    crate::machine::free_bytes(std::path::Path::new("/dev/shm"))
}

fn enough_shared_memory(world: &World, free: Option<u64>) -> Result<()> {
    let wanted = SHARED * world.local_size as u64;
    ensure!(
        world.local_size == 1 || free.is_none_or(|free| free >= wanted),
        "/dev/shm has {} MiB free, and NCCL wants {} for {} ranks: start the container with --shm-size=1g, or pass --transport socket",
        free.unwrap_or(0) >> 20,
        wanted >> 20,
        world.local_size
    );
    Ok(())
}

/// What NCCL is told unless the user has: no sums in the switches, which give other bits from call to call, and the network interface over
/// which this rank has reached the others.
///
/// Called before there is a thread that reads the environment.
pub fn set_environment(address: Option<IpAddr>) {
    let interface = address.and_then(interface_of);
    let settings = [("NCCL_NVLS_ENABLE", Some("0".into())), ("NCCL_SOCKET_IFNAME", interface)];
    for (name, value) in settings {
        let Some(value) = value.filter(|_| std::env::var_os(name).is_none()) else { continue };
        // SAFETY: the threads that there are by now wait for signals or hold the hub: none reads or writes the environment.
        unsafe { std::env::set_var(name, value) };
    }
}

/// The network interface that has this address.
fn interface_of(address: IpAddr) -> Option<String> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the pointer is to a local; the list is given back below.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return None;
    }
    let (mut found, mut at) = (None, first);
    while !at.is_null() && found.is_none() {
        // SAFETY: an entry of the list, whose name is a C string and whose address is null or of the family it says.
        unsafe {
            let entry = &*at;
            let own = match entry.ifa_addr.as_ref().map(|a| i32::from(a.sa_family)) {
                Some(libc::AF_INET) => {
                    let a = &*entry.ifa_addr.cast::<libc::sockaddr_in>();
                    Some(IpAddr::from(a.sin_addr.s_addr.to_ne_bytes()))
                }
                Some(libc::AF_INET6) => {
                    let a = &*entry.ifa_addr.cast::<libc::sockaddr_in6>();
                    Some(IpAddr::from(a.sin6_addr.s6_addr))
                }
                _ => None,
            };
            if own == Some(address) {
                found = Some(std::ffi::CStr::from_ptr(entry.ifa_name).to_string_lossy().into_owned());
            }
            at = entry.ifa_next;
        }
    }
    // SAFETY: what getifaddrs gave, once.
    unsafe { libc::freeifaddrs(first) };
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_share_a_gpu_are_both_named() {
        let gpus = |names: [&str; 3]| names.map(String::from);
        one_gpu_each(&gpus(["a on host x", "b on host x", "a on host y"])).unwrap();
        let e = one_gpu_each(&gpus(["a on host x", "b on host x", "a on host x"])).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("ranks 0 and 2 share a GPU, a on host x"), "{e}");
    }

    #[test]
    fn little_shared_memory_is_said() {
        let world = |local_size| World { rank: 0, size: 8, local_rank: 0, local_size };
        for (ranks, free) in [(1, Some(0)), (2, Some(64 << 20)), (8, Some(1 << 30)), (8, None)] {
            enough_shared_memory(&world(ranks), free).unwrap();
        }
        let e = enough_shared_memory(&world(8), Some(64 << 20)).unwrap_err().to_string();
        assert!(e.contains("64 MiB free, and NCCL wants 128 for 8 ranks") && e.contains("--shm-size=1g"), "{e}");
        assert!(free_shared_memory().is_none_or(|free| free < 1 << 50));
    }

    #[test]
    fn the_loopback_interface_has_a_name() {
        assert_eq!(interface_of(IpAddr::from([127, 0, 0, 1])).as_deref(), Some("lo"));
        assert_eq!(interface_of(IpAddr::from([192, 0, 2, 77])), None);
    }
}
