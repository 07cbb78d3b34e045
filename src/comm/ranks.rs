//! Several ranks: the ordered fold of gradients, and small values over the control channel.
//!
//! ```text
//! micro-batch k = i·w + r on rank r:   copy m_k, set it to zero, go on computing
//!     thread: exchange blocks with their owners;  owner: for r in 0..w: acc += block of rank r        in order of k
//! end of the step:                     every owner sends its blocks to all; with sharded state it keeps them
//! next step, sharded state:            the thread gives the weights that owners made of them to all, those of the first layers first, while
//!                                      the main thread computes those layers
//! ```
//! One order of sums defines a step, `((0 + m₀) + m₁) + …` with each term formed from zero, so that only the product of ranks and
//! accumulation matters: 1 × 4, 2 × 2 and 4 × 1 give the same bits.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use half::bf16;

use super::bucket::{cuts, pieces};
use super::control::{Aside, Control};
use super::transport::{Incoming, Outgoing, Transport, call};
use super::{Communicator, Fold, Listener, Position, Span, Sums, Timing, World};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// One rank of several.
pub struct Ranks {
    world: World,
    control: Box<dyn Control>,
    worker: Option<Worker>,
    bucket: usize,
    fold: Fold,
}

/// Elements of a bucket: less than 1 MiB is not worth a call of its own.
pub const BUCKET: usize = 1 << 18;

/// What the thread of the collectives is asked to do.
enum Job {
    /// Adds this rank's values of a bucket, or nothing, and what the others send.
    Add { bucket: usize, lengths: Vec<usize>, values: Option<Vec<f32>> },
    /// Gives the sums of a bucket to everyone, or its own part of them back to this rank alone.
    Collect { bucket: usize, lengths: Vec<usize>, wanted: Sums },
    /// Gives `own` to everyone or to the main rank, who expect `counts[r]` values of rank r.
    Share { call: u32, counts: Vec<usize>, own: Vec<f32>, to_main: bool },
    /// Gives owners' weights to everyone, bucket after bucket, beside what the main thread computes.
    Gather(Vec<Given>),
    /// Tells what was done and when from now on, or no more.
    Listen(Option<Listener>),
    /// Ends the transport, and the thread with it.
    End,
}

/// What a rank owns of a bucket of weights, and how many values each rank has.
struct Given {
    call: u32,
    counts: Vec<usize>,
    own: Vec<f32>,
}

struct Worker {
    jobs: Sender<Job>,
    /// What was asked for, in that order: the sums, or the values of each rank.
    results: Receiver<Vec<Vec<f32>>>,
    /// Weights of all ranks, in the order in which they were given.
    gathered: Receiver<Vec<Vec<f32>>>,
    /// Buffers that were read and can be filled again.
    free: (Sender<Vec<f32>>, Receiver<Vec<f32>>),
    /// Why the thread ended.
    failed: Arc<Mutex<Option<Error>>>,
    thread: Option<JoinHandle<()>>,
}

/// Buckets that may wait for the transport: more would only take memory.
const AHEAD: usize = 4;

/// Gathered buckets of weights that may wait for the main thread: the memory of the machine holds so many twice.
const GATHERED: usize = 2;

impl Ranks {
    /// Ranks that move gradients over a transport; a single one has none.
    ///
    /// # Errors
    /// If no thread can be started, or the transport cannot be opened.
    pub fn new(world: World, control: Box<dyn Control>, transport: Option<Box<dyn Transport>>) -> Result<Self> {
        let (rank, size) = (world.rank, world.size);
        let worker =
            transport.map(|t| Worker::start(Owner { rank, size, sums: Vec::new(), transport: t })).transpose()?;
        Ok(Self { world, control, worker, bucket: BUCKET, fold: Fold::MicroBatch })
    }

    /// The same ranks with buckets of so many elements: another layout has to give the same bits.
    pub fn with_buckets(self, elements: usize) -> Self {
        Self { bucket: elements, ..self }
    }

    /// The same ranks, which sum gradients when they are told to.
    pub fn with_fold(self, fold: Fold) -> Self {
        Self { fold, ..self }
    }

    /// Which rank this is, whatever the backend.
    pub fn own_world(&self) -> &World {
        &self.world
    }

    fn job(&self, job: Job) -> Result<()> {
        let Some(worker) = &self.worker else { return Ok(()) };
        // Whether somebody listens is each rank's own affair.
        if !matches!(job, Job::Listen(_) | Job::End) {
            self.control.asks();
        }
        worker.jobs.send(job).map_err(|_| self.why(worker))
    }

    /// The answer of the thread of the collectives to a job.
    fn ask(&self, worker: &Worker, job: Job) -> Result<Vec<Vec<f32>>> {
        self.job(job)?;
        worker.results.recv().map_err(|_| self.why(worker))
    }

    /// Everyone's values, by rank; on the others nothing where they go `to_main` alone.
    fn share(&self, call: u32, counts: Vec<usize>, own: Vec<f32>, to_main: bool) -> Result<Vec<Vec<f32>>> {
        match &self.worker {
            Some(worker) => self.ask(worker, Job::Share { call, counts, own, to_main }),
            None => Ok(vec![own]),
        }
    }

    /// The error of the thread of the collectives; who is really to blame the control channel may know better.
    fn why(&self, worker: &Worker) -> Error {
        let failed = worker.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.control.lost(failed.unwrap_or_else(|| Error::new("the collectives ended early")))
    }
}

impl<B: Backend> Communicator<B> for Ranks {
    fn world(&self) -> &World {
        &self.world
    }

    fn fold(&self) -> Fold {
        if self.worker.is_some() { self.fold } else { Fold::Step }
    }

    fn bucket_elements(&self) -> usize {
        self.bucket
    }

    fn reduce_start(&self, dev: &B, bucket: usize, tensors: &[&Tensor<B>]) -> Result<()> {
        let Some(worker) = &self.worker else { return Ok(()) };
        let lengths: Vec<usize> = tensors.iter().map(|t| t.len()).collect();
        let mut values = worker.free.1.try_recv().unwrap_or_default();
        values.resize(lengths.iter().sum(), 0.0);
        let mut rest = &mut values[..];
        for t in tensors {
            let (own, more) = rest.split_at_mut(t.len());
            dev.download(own, t)?;
            rest = more;
        }
        self.job(Job::Add { bucket, lengths, values: Some(values) })
    }

    fn reduce_skip(&self, _dev: &B, bucket: usize, tensors: &[&Tensor<B>]) -> Result<()> {
        let lengths = tensors.iter().map(|t| t.len()).collect();
        self.job(Job::Add { bucket, lengths, values: None })
    }

    fn reduce_finish(&self, dev: &B, bucket: usize, tensors: &mut [&mut Tensor<B>], wanted: Sums) -> Result<()> {
        let Some(worker) = &self.worker else { return Ok(()) };
        let lengths: Vec<usize> = tensors.iter().map(|t| t.len()).collect();
        let owned = match wanted {
            Sums::Whole => lengths.iter().enumerate().map(|(i, &len)| (i, 0..len)).collect(),
            Sums::Owned => pieces(&lengths, self.world.rank, self.world.size),
        };
        let sums = self.ask(worker, Job::Collect { bucket, lengths, wanted })?.swap_remove(0);
        let mut rest = &sums[..];
        for (i, range) in owned {
            let (own, more) = rest.split_at(range.len());
            dev.upload_at(tensors[i], range.start, own)?;
            rest = more;
        }
        // Nobody waits for it.
        let _ = worker.free.0.try_send(sums);
        Ok(())
    }

    fn gather_start(&self, dev: &B, buckets: &[(usize, Vec<Span<'_, B>>)]) -> Result<()> {
        if self.worker.is_none() {
            return Ok(());
        }
        let given = |(bucket, spans): &(usize, Vec<Span<'_, B>>)| -> Result<Given> {
            let Weights { owned, counts, narrow } = Weights::of(spans, self.world.size);
            let rank = self.world.rank;
            let mut values = vec![0.0; counts[rank]];
            let mut rest = &mut values[..];
            for (i, range) in &owned[rank] {
                let (own, more) = rest.split_at_mut(range.len());
                dev.download_at(own, spans[*i].tensor, spans[*i].first + range.start)?;
                rest = more;
            }
            let words = counts.iter().map(|&n| if narrow { n.div_ceil(2) } else { n }).collect();
            let own = if narrow { packed(&values) } else { values };
            Ok(Given { call: call::WEIGHTS | *bucket as u32, counts: words, own })
        };
        self.job(Job::Gather(buckets.iter().map(given).collect::<Result<_>>()?))
    }

    fn gather_finish(&self, dev: &B, _bucket: usize, spans: &mut [Span<'_, B>]) -> Result<()> {
        let Some(worker) = &self.worker else { return Ok(()) };
        let all = worker.gathered.recv().map_err(|_| self.why(worker))?;
        let Weights { owned, counts, narrow } = Weights::of(spans, self.world.size);
        for (r, theirs) in all.into_iter().enumerate().filter(|(r, _)| *r != self.world.rank) {
            let theirs = if narrow { unpacked(&theirs, counts[r]) } else { theirs };
            let mut rest = &theirs[..];
            for (i, range) in &owned[r] {
                let (own, more) = rest.split_at(range.len());
                let Span { tensor, first, .. } = &mut spans[*i];
                dev.upload_at(tensor, *first + range.start, own)?;
                rest = more;
            }
        }
        Ok(())
    }

    fn collect(&self, bucket: usize, lengths: &[usize], own: Vec<f32>) -> Result<Option<Vec<f32>>> {
        let counts = cuts(lengths, self.world.size).windows(2).map(|cut| cut[1] - cut[0]).collect();
        let all = self.share(call::HELD | bucket as u32, counts, own, true)?;
        Ok(self.world.is_main().then(|| all.concat()))
    }

    fn all_squares(&self, counts: &[usize], own: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        // An f64 is two words of the transport, which looks at none of them.
        let words = own.iter().flat_map(|x| [x.to_bits() as u32, (x.to_bits() >> 32) as u32]);
        let words = words.map(f32::from_bits).collect();
        let all = self.share(call::SQUARES, counts.iter().map(|n| 2 * n).collect(), words, false)?;
        let joined = |pair: &[f32]| f64::from_bits(u64::from(pair[0].to_bits()) | u64::from(pair[1].to_bits()) << 32);
        Ok(all.iter().map(|theirs| theirs.chunks_exact(2).map(joined).collect()).collect())
    }

    fn listen(&self, listener: Option<Listener>) -> Result<()> {
        self.job(Job::Listen(listener))
    }

    fn aside(&self) -> Option<Arc<dyn Aside>> {
        self.control.aside()
    }

    fn gather(&self, what: &str, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.control.gather(what, own)
    }

    fn end_reductions(&self) -> Result<()> {
        let Some(worker) = &self.worker else { return Ok(()) };
        self.job(Job::End)?;
        // The thread hangs up when it has ended; it sends nothing any more.
        let _ = worker.results.recv();
        match worker.failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(e) => Err(self.control.lost(e)),
            None => Ok(()),
        }
    }

    fn at(&self, position: Position) {
        self.control.at(position);
    }

    fn gain(&self) -> f32 {
        self.control.gain()
    }
}

/// How the weights of a bucket lie on ranks.
struct Weights {
    /// By rank: places in the bucket, and elements of each.
    owned: Vec<Vec<(usize, Range<usize>)>>,
    /// Values of each rank.
    counts: Vec<usize>,
    /// They are bf16 and travel as such.
    narrow: bool,
}

impl Weights {
    fn of<B: Backend>(spans: &[Span<'_, B>], size: usize) -> Self {
        let lengths: Vec<usize> = spans.iter().map(|span| span.len).collect();
        let owned: Vec<_> = (0..size).map(|r| pieces(&lengths, r, size)).collect();
        let counts = owned.iter().map(|own| own.iter().map(|(_, range)| range.len()).sum()).collect();
        Self { owned, counts, narrow: spans.first().is_some_and(|span| span.tensor.dtype() == DType::Bf16) }
    }
}

impl Worker {
    fn start(mut owner: Owner) -> Result<Self> {
        let (jobs, todo) = bounded::<Job>(AHEAD);
        let (done, results) = unbounded();
        let (gather, gathered) = bounded(GATHERED);
        let free = bounded(AHEAD);
        let failed = Arc::new(Mutex::new(None));
        let (back, why) = (free.0.clone(), Arc::clone(&failed));
        let (opened, is_open) = bounded(1);
        let work = move || {
            let open = owner.transport.open();
            let failed = open.is_err();
            if opened.send(open).is_err() || failed {
                return;
            }
            let mut listener: Option<Listener> = None;
            let tell = |listener: &Option<Listener>, what, bucket, begun| {
                if let Some(tell) = listener {
                    tell(Timing { what, bucket, begun, ended: Instant::now() });
                }
            };
            let end = |e: Error| *why.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
            for job in todo {
                let begun = Instant::now();
                let (what, bucket, result) = match job {
                    Job::Add { bucket, lengths, values } => {
                        let result = owner.add(bucket, &lengths, values.as_deref());
                        // A full channel holds enough of them.
                        let _ = values.map(|v| back.try_send(v));
                        ("reduce", Some(bucket), result.map(|()| None))
                    }
                    Job::Collect { bucket, lengths, wanted } => {
                        let sums = owner.collect(bucket, &lengths, wanted);
                        ("collect", Some(bucket), sums.map(|sums| Some(vec![sums])))
                    }
                    Job::Share { call, counts, own, to_main } => {
                        let (what, bucket) = call::described(call);
                        (what, bucket, owner.share(call, &counts, own, to_main).map(Some))
                    }
                    Job::Gather(all) => {
                        for Given { call, counts, own } in all {
                            let begun = Instant::now();
                            let weights = match owner.share(call, &counts, own, false) {
                                Ok(weights) => weights,
                                Err(e) => return end(e),
                            };
                            let (what, bucket) = call::described(call);
                            tell(&listener, what, bucket, begun);
                            // Nobody waits for it where the main thread has ended.
                            let _ = gather.send(weights);
                        }
                        continue;
                    }
                    Job::Listen(to) => {
                        listener = to;
                        continue;
                    }
                    Job::End => {
                        if let Err(e) = owner.transport.close() {
                            end(e);
                        }
                        return;
                    }
                };
                tell(&listener, what, bucket, begun);
                let result = result.map(|values| {
                    if let Some(values) = values {
                        // Whoever asked is gone where nobody listens.
                        let _ = done.send(values);
                    }
                });
                if let Err(e) = result {
                    return end(e);
                }
            }
        };
        let thread = std::thread::Builder::new().name("collectives".into()).spawn(work);
        let thread = Some(thread.map_err(|e| Error::new(format!("cannot start the thread of the collectives: {e}")))?);
        is_open.recv().map_err(|_| Error::new("the thread of the collectives ended early"))??;
        Ok(Self { jobs, results, gathered, free, failed, thread })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The thread ends when nobody can ask it any more.
        self.jobs = bounded(0).0;
        if let Some(thread) = self.thread.take().filter(JoinHandle::is_finished) {
            let _ = thread.join();
        }
    }
}

/// The sums that this rank owns.
struct Owner {
    rank: usize,
    size: usize,
    /// By bucket; whether it was collected, so that the next term begins it anew.
    sums: Vec<(bool, Vec<f32>)>,
    transport: Box<dyn Transport>,
}

impl Owner {
    /// The sum of a bucket of which this rank owns `own` elements.
    fn sum(&mut self, bucket: usize, own: usize) -> &mut (bool, Vec<f32>) {
        if self.sums.len() <= bucket {
            self.sums.resize_with(bucket + 1, Default::default);
        }
        let sum = &mut self.sums[bucket];
        sum.1.resize(own, 0.0);
        sum
    }

    fn add(&mut self, bucket: usize, lengths: &[usize], values: Option<&[f32]>) -> Result<()> {
        let (rank, size, cuts) = (self.rank, self.size, cuts(lengths, self.size));
        let own = cuts[rank]..cuts[rank + 1];
        let to: Vec<Outgoing> = (0..size)
            .map(|r| match values {
                _ if r == rank || cuts[r] == cuts[r + 1] => Outgoing::Nothing,
                None => Outgoing::Skip,
                Some(values) => Outgoing::Data(&values[cuts[r]..cuts[r + 1]]),
            })
            .collect();
        let expected = |r: usize| if r == rank { 0 } else { own.len() };
        let mut from: Vec<Incoming> = (0..size).map(|r| Incoming { len: expected(r), data: Vec::new() }).collect();
        self.transport.exchange(bucket as u32, &to, &mut from)?;
        let (collected, sum) = self.sum(bucket, own.len());
        if std::mem::take(collected) {
            sum.fill(0.0);
        }
        for (r, theirs) in from.iter().enumerate() {
            let term = if r == rank { values.map_or(&[][..], |v| &v[own.clone()]) } else { &theirs.data };
            sum.iter_mut().zip(term).for_each(|(sum, x)| *sum += x);
        }
        Ok(())
    }

    fn collect(&mut self, bucket: usize, lengths: &[usize], wanted: Sums) -> Result<Vec<f32>> {
        let cuts = cuts(lengths, self.size);
        let share = cuts[self.rank + 1] - cuts[self.rank];
        let (collected, own) = std::mem::take(self.sum(bucket, share));
        // Without a term since it was collected last it is zero.
        let own = if collected { vec![0.0; own.len()] } else { own };
        let all = match wanted {
            Sums::Owned => own.clone(),
            Sums::Whole => {
                let counts: Vec<usize> = cuts.windows(2).map(|cut| cut[1] - cut[0]).collect();
                self.share(call::SUMS | bucket as u32, &counts, own.clone(), false)?.concat()
            }
        };
        *self.sum(bucket, share) = (true, own);
        Ok(all)
    }

    /// Everyone's values, by rank.
    fn share(&mut self, call: u32, counts: &[usize], own: Vec<f32>, to_main: bool) -> Result<Vec<Vec<f32>>> {
        let (rank, wanted) = (self.rank, |r: usize| !to_main || r == 0);
        assert_eq!(own.len(), counts[rank], "values of this rank");
        let data = |r: usize| match own.is_empty() || r == rank || !wanted(r) {
            true => Outgoing::Nothing,
            false => Outgoing::Data(&own),
        };
        let to: Vec<Outgoing> = (0..self.size).map(data).collect();
        let expected = |r: usize| if r == rank || !wanted(rank) { 0 } else { counts[r] };
        let mut from: Vec<Incoming> = (0..self.size).map(|r| Incoming { len: expected(r), data: Vec::new() }).collect();
        self.transport.exchange(call, &to, &mut from)?;
        let mut all: Vec<Vec<f32>> = from.into_iter().map(|theirs| theirs.data).collect();
        all[rank] = own;
        Ok(all)
    }
}

/// Values that bf16 holds, two in a word.
fn packed(values: &[f32]) -> Vec<f32> {
    let half = |x: Option<&f32>| x.map_or(0, |x| u32::from(bf16::from_f32(*x).to_bits()));
    values.chunks(2).map(|pair| f32::from_bits(half(pair.first()) | half(pair.get(1)) << 16)).collect()
}

/// The first `n` of them.
fn unpacked(words: &[f32], n: usize) -> Vec<f32> {
    let halves = words.iter().flat_map(|word| [word.to_bits() << 16, word.to_bits() & 0xffff_0000]);
    halves.map(f32::from_bits).take(n).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_bf16_survive_in_pairs() {
        let values: Vec<f32> = (0..7).map(|i| bf16::from_f32(0.1 * i as f32 - 0.3).to_f32()).collect();
        for n in 0..=7 {
            assert_eq!(packed(&values[..n]).len(), n.div_ceil(2));
            assert_eq!(unpacked(&packed(&values[..n]), n), values[..n]);
        }
    }
}
