//! Collectives between GPUs: buckets go through a staging buffer on a stream of their own, beside the one that computes.
//!
//! ```text
//! compute   backward … ─ event ─┐ … backward of the layers below …        ┌─ wait ─ update
//! transfer                      └─ wait ─ pack ─ NCCL ─ unpack ─ event ───┘
//! ```
//! A bucket lies in the staging buffer as one slot for each rank with what that rank owns, all of one length: what
//! `ncclReduceScatter` and `ncclAllGather` ask for. The stream orders the buckets, so one buffer serves them all.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, result};

use super::device::Cuda;
use super::error::DriverResult;
use super::fold::{Folding, STAGE};
use super::memory::CudaBuf;
use super::nccl::{Comm, Nccl, UniqueId};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// How often the communicator is asked whether something failed.
const POLL: Duration = Duration::from_millis(200);

/// Bytes of a tensor in device memory: where they begin, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    address: u64,
    bytes: usize,
}

impl Piece {
    /// Elements `first..first + len` of a tensor.
    ///
    /// # Panics
    /// If it has fewer.
    pub fn of(t: &Tensor<Cuda>, first: usize, len: usize) -> Self {
        assert!(first + len <= t.len(), "elements {first}..{} of {:?}", first + len, t.shape());
        let size = t.dtype().bytes();
        Self { address: t.buf.address() + (first * size) as u64, bytes: len * size }
    }

    /// Bytes at an address.
    #[cfg(test)]
    pub(super) fn at(address: u64, bytes: usize) -> Self {
        Self { address, bytes }
    }

    /// Where they begin.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// How many there are.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// `bytes` of them from byte `first` on.
    pub(super) fn part(&self, first: usize, bytes: usize) -> Self {
        assert!(first + bytes <= self.bytes, "bytes {first}..{} of {}", first + bytes, self.bytes);
        Self { address: self.address + first as u64, bytes }
    }
}

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
    pub(super) compute: Arc<CudaStream>,
    pub(super) transfer: Arc<CudaStream>,
    pub(super) comm: Arc<Comm>,
    pub(super) rank: usize,
    pub(super) size: usize,
    staging: RefCell<Option<CudaSlice<u8>>>,
    /// The sums of ordered folds, and elements that a stage of theirs holds.
    pub(super) folding: RefCell<Folding>,
    pub(super) stage: usize,
    /// After the last bucket that was started.
    pub(super) last: RefCell<Option<CudaEvent>>,
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
            stage: STAGE,
            last: RefCell::default(),
            ended,
            watch: RefCell::new(Some(thread)),
        })
    }

    /// The same, with stages of so many elements: another number has to give the same bits.
    pub fn with_stages(mut self, elements: usize) -> Self {
        self.stage = elements;
        self
    }

    /// Whether something that was queued failed, as a rank that is gone makes it: `Some` with the error.
    pub fn error(&self) -> Option<Error> {
        self.comm.error()
    }

    /// For a thread that asks whether something failed.
    pub fn comm(&self) -> Arc<Comm> {
        Arc::clone(&self.comm)
    }

    /// Queues a bucket behind what the computing stream has so far: `slots[r]` is what rank r owns of it. Until [`Collectives::wait`] the
    /// memory is this stream's; its owner keeps it alive, and lets nothing else write there.
    ///
    /// # Errors
    /// If the device or NCCL refuses.
    pub fn start(&self, what: What, slots: &[Vec<Piece>]) -> Result<()> {
        assert_eq!(slots.len(), self.size, "a slot for each rank");
        let bytes_of = |slot: &Vec<Piece>| slot.iter().map(|piece| piece.bytes).sum::<usize>();
        let slot = slots.iter().map(bytes_of).max().unwrap_or(0).next_multiple_of(CudaBuf::ALIGNMENT as usize);
        if slot == 0 {
            return Ok(());
        }
        self.bind()?;
        self.transfer.join(&self.compute).doing(|| "waiting for gradients".into())?;
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
        let stream = self.transfer.cu_stream().cast();
        // SAFETY: the staging buffer has a slot for each rank, and this stream alone uses it.
        unsafe {
            match what {
                What::Sum => self.comm.all_reduce(staging, slot / 4 * self.size, stream)?,
                What::SumOwned => self.comm.reduce_scatter(staging, slot / 4, self.rank, stream)?,
                What::Gather => self.comm.all_gather(staging, slot, self.rank, stream)?,
            }
        }
        for r in received.filter(|&r| what != What::Gather || r != self.rank) {
            self.copy(&slots[r], staging + (r * slot) as u64, false)?;
        }
        *self.last.borrow_mut() = Some(self.mark()?);
        Ok(())
    }

    /// Takes the staging buffer that buckets of [`Collectives::start`] will need: `buckets` has for each the elements that every rank owns.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn prepare(&self, buckets: &[Vec<usize>]) -> Result<()> {
        let longest = buckets.iter().flatten().copied().max().unwrap_or(0) * size_of::<f32>();
        if longest > 0 {
            self.bind()?;
            self.staging(longest.next_multiple_of(CudaBuf::ALIGNMENT as usize) * self.size)?;
        }
        Ok(())
    }

    /// Makes the device this thread's.
    pub(super) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().doing(|| "binding the device".into())
    }

    /// What happens once all that was queued for the others is through.
    pub(super) fn mark(&self) -> Result<CudaEvent> {
        self.transfer.record_event(None).doing(|| "marking the end of a bucket".into())
    }

    /// From here on the computing stream goes on once all buckets that were started are through. The host does not wait.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn wait(&self) -> Result<()> {
        match self.last.borrow_mut().take() {
            Some(event) => self.compute.wait(&event).doing(|| "waiting for sums".into()),
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
        unsafe { self.comm.all_gather(staging, slot, self.rank, stream.cast())? };
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
    pub(super) fn copy_on(stream: &CudaStream, pieces: &[Piece], mut at: u64, pack: bool) -> Result<()> {
        for &Piece { address, bytes } in pieces {
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
