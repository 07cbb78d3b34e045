//! Collectives between GPUs, on a stream of their own beside the one that computes.
//!
//! ```text
//! compute   backward … ─ event ─┐ … backward of the layers below …        ┌─ wait ─ update
//! transfer                      └─ wait ─ NCCL (or pack ─ NCCL ─ unpack) ─ event ───┘
//!
//! compute   update ─ event ─┐ … next step ─ wait ─ first layers ─ wait ─ layers above …
//! transfer                  └─ wait ─ gather ─ event ─┘ gather ─ event ──┘
//! ```
//! `ncclReduceScatter` and `ncclAllGather` ask for one slot for each rank with what that rank owns, all of one length. A bucket whose tensors lie
//! so in their piece of memory ([`crate::comm::bucket::rooms`]) is summed and gathered where it is; another one goes through the staging buffer. The
//! stream orders the buckets, so one buffer serves them all.

mod ordered;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, result};

use self::ordered::Folding;
use super::device::Cuda;
use super::error::DriverResult;
use super::memory::CudaBuf;
use super::nccl::{Collective, Comm, Nccl, UniqueId};
pub use super::pieces::{Piece, Slots};
pub use super::timings::Tell;
use super::timings::{Timings, timed};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// How often the communicator is asked whether something failed.
const POLL: Duration = Duration::from_millis(200);

/// Elements of a slot that an ordered fold sends at once, from those of the longest slot and the number of ranks.
pub type AtOnce = fn(usize, usize) -> usize;

/// What becomes of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Its f32 values are summed, and all ranks get all sums.
    Sum,
    /// Its f32 values are summed, and each rank gets the sums of its own.
    SumOwned,
    /// Every rank's own are given to all.
    Gather,
}

/// A rank of the GPUs that sum their gradients.
pub struct Collectives {
    context: Arc<CudaContext>,
    /// The stream that computes.
    compute: Arc<CudaStream>,
    transfer: Arc<CudaStream>,
    comm: Arc<Comm>,
    rank: usize,
    size: usize,
    staging: RefCell<Option<CudaSlice<u8>>>,
    /// The sums of ordered folds, and how much of a slot they send at once.
    folding: RefCell<Folding>,
    at_once: AtOnce,
    /// After the last bucket of gradients that was started.
    last: RefCell<Option<CudaEvent>>,
    /// After each bucket of weights that nobody has waited for yet.
    gathers: RefCell<VecDeque<(usize, CudaEvent)>>,
    /// Where somebody wants to know.
    timings: RefCell<Option<Timings>>,
    /// Set when nobody needs to look for errors any more.
    ended: Arc<AtomicBool>,
    watch: RefCell<Option<JoinHandle<()>>>,
}

impl Collectives {
    /// Joins the other ranks on a device. `failed` is called, in a thread of its own, with the first error of something that was queued.
    ///
    /// # Errors
    /// If NCCL refuses, the ranks do not come, or the device fails.
    pub fn join(
        dev: &Cuda,
        nccl: &'static Nccl,
        id: UniqueId,
        (rank, size): (usize, usize),
        at_once: AtOnce,
        failed: impl FnOnce(Error) + Send + 'static,
    ) -> Result<Self> {
        let context = dev.stream().context().clone();
        context.bind_to_thread().doing(|| "binding the device".into())?;
        let transfer = context.new_stream().doing(|| "creating a stream".into())?;
        let comm = Arc::new(Comm::join(nccl, id, rank, size)?);
        let ended = Arc::new(AtomicBool::new(false));
        let (watched, stop) = (Arc::clone(&comm), Arc::clone(&ended));
        let watch = move || {
            while !stop.load(Relaxed) {
                if let Some(e) = watched.error() {
                    return failed(e);
                }
                std::thread::park_timeout(POLL);
            }
        };
        let thread = std::thread::Builder::new().name("nccl-watch".into()).spawn(watch);
        let thread = thread.map_err(|e| Error::new(format!("cannot start the thread that watches NCCL: {e}")))?;
        Ok(Self {
            context,
            compute: dev.stream().clone(),
            transfer,
            comm,
            rank,
            size,
            staging: RefCell::default(),
            folding: RefCell::default(),
            at_once,
            last: RefCell::default(),
            gathers: RefCell::default(),
            timings: RefCell::default(),
            ended,
            watch: RefCell::new(Some(thread)),
        })
    }

    /// Whether something that was queued failed, as a rank that is gone makes it: `Some` with the error.
    pub fn error(&self) -> Option<Error> {
        self.comm.error()
    }

    /// For a thread that asks whether something failed.
    pub fn comm(&self) -> Arc<Comm> {
        Arc::clone(&self.comm)
    }

    /// Queues a bucket behind what the computing stream has so far: `slots` has what each rank owns of it. Until [`Collectives::wait`], or
    /// [`Collectives::wait_for`] of weights, the memory is this stream's; its owner keeps it alive, and lets nothing else write there.
    ///
    /// # Errors
    /// If the device or NCCL refuses.
    pub fn start(&self, what: What, bucket: usize, slots: &Slots) -> Result<()> {
        assert_eq!(slots.pieces.len(), self.size, "a slot for each rank");
        if slots.pieces.iter().all(Vec::is_empty) {
            return Ok(());
        }
        self.bind()?;
        self.transfer.join(&self.compute).doing(|| "waiting for gradients".into())?;
        let begun = self.begins()?;
        match slots.whole() {
            // SAFETY: the range holds the bucket and what is nobody's, and is this stream's until the end of the bucket.
            Some(whole) => unsafe { self.queue(what, whole.base, whole.share, whole.bytes)? },
            None => self.through_staging(what, &slots.pieces)?,
        }
        let gathers = what == What::Gather;
        self.ends(begun, if gathers { "gather" } else { "reduce" }, Some(bucket))?;
        match gathers {
            true => self.gathers.borrow_mut().push_back((bucket, self.mark()?)),
            false => *self.last.borrow_mut() = Some(self.mark()?),
        }
        Ok(())
    }

    /// Queues NCCL's part for slots of `share` bytes from `base` on, of which `bytes` are used.
    ///
    /// # Safety
    /// The slots are device memory that this stream alone uses until it is past this.
    unsafe fn queue(&self, what: What, base: u64, share: usize, bytes: usize) -> Result<()> {
        let what = match what {
            What::Sum => Collective::Sum { n: bytes / size_of::<f32>() },
            What::SumOwned => Collective::SumSlots { n: share / size_of::<f32>() },
            What::Gather => Collective::Gather { bytes: share },
        };
        // SAFETY: the caller's.
        unsafe { self.comm.collective(what, base, self.transfer.cu_stream().cast()) }
    }

    /// Queues a bucket whose tensors lie anywhere.
    fn through_staging(&self, what: What, slots: &[Vec<Piece>]) -> Result<()> {
        let bytes_of = |slot: &Vec<Piece>| slot.iter().map(Piece::bytes).sum::<usize>();
        let slot = slots.iter().map(bytes_of).max().unwrap_or(0).next_multiple_of(CudaBuf::ALIGNMENT as usize);
        let staging = self.staging(slot * self.size)?;
        let own = self.rank..self.rank + 1;
        let (sent, received) = match what {
            What::Sum => (0..self.size, 0..self.size),
            What::SumOwned => (0..self.size, own),
            What::Gather => (own, 0..self.size),
        };
        for r in sent {
            self.copy(&slots[r], staging + (r * slot) as u64, true)?;
        }
        // SAFETY: the staging buffer has a slot for each rank, and this stream alone uses it.
        unsafe { self.queue(what, staging, slot, slot * self.size)? };
        for r in received.filter(|&r| what != What::Gather || r != self.rank) {
            self.copy(&slots[r], staging + (r * slot) as u64, false)?;
        }
        Ok(())
    }

    /// Queues that all ranks get the slots of `bytes` bytes of all, one after the other in a tensor; what the computing stream is given
    /// afterwards finds them there.
    ///
    /// # Errors
    /// If the device or NCCL refuses.
    pub fn gather_in_place(&self, slots: &Tensor<Cuda>, bytes: usize) -> Result<()> {
        let all = Piece::of(slots, 0, slots.len());
        assert!(bytes * self.size <= all.bytes(), "{} slots of {bytes} bytes in {}", self.size, all.bytes());
        self.bind()?;
        self.transfer.join(&self.compute).doing(|| "waiting for values of this rank".into())?;
        let begun = self.begins()?;
        // SAFETY: the slots lie in the tensor; the computing stream does not go on before this is through.
        unsafe { self.comm.collective(Collective::Gather { bytes }, all.address(), self.transfer.cu_stream().cast())? };
        self.ends(begun, "share", None)?;
        self.compute.join(&self.transfer).doing(|| "waiting for values of other ranks".into())
    }

    /// From now on `tell` hears when collectives ran; `None`: nobody, and the host waits for those under way to be told.
    ///
    /// # Errors
    /// If the device fails.
    pub fn listen(&self, tell: Option<Tell>) -> Result<()> {
        self.bind()?;
        self.transfer.synchronize().doing(|| "waiting for other ranks".into())?;
        let mut timings = self.timings.borrow_mut();
        if let Some(timings) = &mut *timings {
            timings.tell_past()?;
        }
        *timings = tell.map(|tell| Timings::new(&self.transfer, tell)).transpose()?;
        Ok(())
    }

    /// An event where something begins, if somebody listens.
    fn begins(&self) -> Result<Option<CudaEvent>> {
        self.timings.borrow().as_ref().map(|_| timed(&self.transfer)).transpose()
    }

    /// What began there ends here.
    fn ends(&self, begun: Option<CudaEvent>, what: &'static str, bucket: Option<usize>) -> Result<()> {
        match (&mut *self.timings.borrow_mut(), begun) {
            (Some(timings), Some(begun)) => timings.queued(&self.transfer, what, bucket, begun),
            _ => Ok(()),
        }
    }

    /// Takes the staging buffer that a bucket of [`Collectives::start`] will need, where it does.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn prepare(&self, slots: &Slots) -> Result<()> {
        let longest = slots.pieces.iter().map(|slot| slot.iter().map(Piece::bytes).sum()).max().unwrap_or(0usize);
        if longest > 0 && slots.whole().is_none() {
            self.bind()?;
            self.staging(longest.next_multiple_of(CudaBuf::ALIGNMENT as usize) * self.size)?;
        }
        Ok(())
    }

    /// Makes the device this thread's.
    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().doing(|| "binding the device".into())
    }

    /// What happens once all that was queued for the others is through.
    fn mark(&self) -> Result<CudaEvent> {
        self.transfer.record_event(None).doing(|| "marking the end of a bucket".into())
    }

    /// From here on the computing stream goes on once all buckets that were started are through. The host does not wait.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn wait(&self) -> Result<()> {
        if let Some(timings) = &mut *self.timings.borrow_mut() {
            timings.tell_past()?;
        }
        match self.last.borrow_mut().take() {
            Some(event) => self.compute.wait(&event).doing(|| "waiting for sums".into()),
            None => Ok(()),
        }
    }

    /// From here on the computing stream goes on once the weights of a bucket are there; they are waited for in the order in which their
    /// buckets were started. The host does not wait.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn wait_for(&self, bucket: usize) -> Result<()> {
        // A bucket without weights was never queued.
        match self.gathers.borrow_mut().pop_front_if(|(next, _)| *next == bucket) {
            Some((_, event)) => self.compute.wait(&event).doing(|| "waiting for weights".into()),
            None => Ok(()),
        }
    }

    /// Everyone's bytes, `counts[r]` of them from rank r, by rank. The host waits.
    ///
    /// # Errors
    /// If the device or NCCL refuses, or a peer is gone.
    pub fn exchange(&self, own: &[u8], counts: &[usize]) -> Result<Vec<Vec<u8>>> {
        let slot = counts.iter().copied().max().unwrap_or(0).next_multiple_of(CudaBuf::ALIGNMENT as usize);
        if slot == 0 {
            return Ok(vec![Vec::new(); counts.len()]);
        }
        self.bind()?;
        let staging = self.staging(slot * self.size)?;
        let mut all = vec![0u8; slot * self.size];
        all[..own.len()].copy_from_slice(own);
        let at = staging + (self.rank * slot) as u64;
        let stream = self.transfer.cu_stream();
        // SAFETY: the buffer has a slot for each rank; the driver has taken the bytes when the call returns, since they are not page-locked.
        unsafe { result::memcpy_htod_async(at, &all[..slot], stream) }.doing(|| "copying to the device".into())?;
        // SAFETY: as in `start`.
        unsafe { self.comm.collective(Collective::Gather { bytes: slot }, staging, stream.cast())? };
        // SAFETY: the host waits below, before anybody reads the bytes.
        unsafe { result::memcpy_dtoh_async(&mut all, staging, stream) }.doing(|| "copying from the device".into())?;
        self.transfer.synchronize().doing(|| "waiting for other ranks".into())?;
        Ok(counts.iter().enumerate().map(|(r, &n)| all[r * slot..r * slot + n].to_vec()).collect())
    }

    /// The staging buffer, at least so long: kept, and made anew where it is too short.
    fn staging(&self, bytes: usize) -> Result<u64> {
        let mut staging = self.staging.borrow_mut();
        if staging.as_ref().is_none_or(|s| s.len() < bytes) {
            // What is too short goes back before more is asked for.
            *staging = None;
            let what = || format!("allocating {bytes} bytes for the sums of a bucket");
            *staging = Some(self.transfer.alloc_zeros(bytes).doing(what)?);
        }
        let buffer = staging.as_ref().expect("made above");
        Ok(buffer.device_ptr(&self.transfer).0)
    }

    /// Copies pieces into the staging buffer from `at` on, or back.
    fn copy(&self, pieces: &[Piece], at: u64, pack: bool) -> Result<()> {
        Self::copy_on(&self.transfer, pieces, at, pack)
    }

    /// Copies pieces into a buffer from `at` on, or back, in a stream.
    fn copy_on(stream: &CudaStream, pieces: &[Piece], mut at: u64, pack: bool) -> Result<()> {
        for (address, bytes) in pieces.iter().map(|piece| (piece.address(), piece.bytes())) {
            let (to, from) = if pack { (at, address) } else { (address, at) };
            // SAFETY: both lie in device memory that lives until the stream is past this: the buffer is kept, the pieces are kept by who
            // started the bucket.
            let copied = unsafe { result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) };
            copied.doing(|| "copying a bucket".into())?;
            at += bytes as u64;
        }
        Ok(())
    }

    /// Ends the communicator, on all ranks, after everything that was queued.
    ///
    /// # Errors
    /// If a peer is gone or NCCL cannot.
    pub fn close(&self) -> Result<()> {
        self.transfer.synchronize().doing(|| "waiting for other ranks".into())?;
        self.ended.store(true, Relaxed);
        // Who watches must not ask a communicator that is gone.
        if let Some(watch) = self.watch.borrow_mut().take() {
            watch.thread().unpark();
            let _ = watch.join();
        }
        self.comm.close()
    }
}

impl Drop for Collectives {
    fn drop(&mut self) {
        self.ended.store(true, Relaxed);
    }
}
