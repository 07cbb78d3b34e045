//! How a micro-batch comes to the device: one block of page-locked words, one copy in a stream of its own, while the one before is still
//! computed. Two slots take turns.
//!
//! ```text
//! host      waits until the slot's copy has run, two micro-batches ago · fills its words
//! copies    waits until all that reads the slot's last words has run · copies · event `copied`
//! compute   waits for `copied` · the micro-batch … · event `consumed`, when the next one comes
//! ```

use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result};

use super::device::{Counts, Cuda};
use super::error::DriverResult;
use super::memory::Memory;
use crate::error::Result;

/// Page-locked words of the host: a copy from them needs no wait.
struct Pinned {
    context: Arc<CudaContext>,
    words: NonNull<i32>,
    len: usize,
}

// SAFETY: the words belong to this value alone, as those of a `Vec` do.
unsafe impl Send for Pinned {}
// SAFETY: they are written through `&mut` alone.
unsafe impl Sync for Pinned {}

impl Pinned {
    fn new(dev: &Cuda, len: usize) -> Result<Self> {
        let bytes = len * size_of::<i32>();
        let what = || format!("allocating {bytes} bytes of page-locked memory");
        dev.bind()?;
        // SAFETY: the size is not 0, and the words are set below before anything reads them.
        let words = unsafe { result::malloc_host(bytes, 0) }.doing(what)?.cast::<i32>();
        let words = NonNull::new(words).expect("the driver gives memory or an error");
        // SAFETY: the driver gave as many bytes, aligned to a page.
        unsafe { words.write_bytes(0, len) };
        Ok(Self { context: dev.context().clone(), words, len })
    }

    fn words(&mut self) -> &mut [i32] {
        // SAFETY: `len` words that were set, borrowed as this value is.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_ptr(), self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: it comes from `malloc_host`, and goes once. The slot has waited for the copy that read it.
        let _ = unsafe { result::free_host(self.words.as_ptr().cast()) };
    }
}

/// Words of a micro-batch on both sides.
struct Slot {
    host: Pinned,
    device: Memory,
    /// The copy has run.
    copied: CudaEvent,
    /// What reads the device's words has run.
    consumed: CudaEvent,
}

impl Slot {
    fn new(dev: &Cuda, words: usize) -> Result<Self> {
        let event = || dev.context().new_event(Some(CUevent_flags::CU_EVENT_DISABLE_TIMING));
        let event = || event().doing(|| "creating an event".into());
        let host = Pinned::new(dev, words)?;
        let slot = Self { host, device: dev.take(words * size_of::<i32>())?, copied: event()?, consumed: event()? };
        // The device's words are there once the compute stream comes to this point.
        record(&slot.consumed, dev.stream())?;
        Ok(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // The words of the host may still be read.
        let _ = self.copied.synchronize();
    }
}

fn record(event: &CudaEvent, stream: &CudaStream) -> Result<()> {
    event.record(stream).doing(|| "recording an event".into())
}

fn wait(stream: &CudaStream, event: &CudaEvent) -> Result<()> {
    stream.wait(event).doing(|| "having a stream wait for an event".into())
}

/// The slots of a micro-batch.
pub(super) struct Uploads {
    slots: [Slot; 2],
    /// The one whose words are in use.
    current: usize,
}

impl Uploads {
    /// Slots of so many words.
    pub fn new(dev: &Cuda, words: usize) -> Result<Self> {
        Ok(Self { slots: [Slot::new(dev, words)?, Slot::new(dev, words)?], current: 0 })
    }

    /// Brings words to the device: `fill` writes them from the first on and says how many. What is queued from here on finds them in the
    /// memory that comes back; nothing that is queued later may read the words before them.
    pub fn bring(&mut self, dev: &Cuda, fill: impl FnOnce(&mut [i32]) -> usize) -> Result<Memory> {
        let (compute, copies) = (dev.stream(), dev.copies());
        if dev.rehearsal.is_on() {
            return Ok(self.slots[self.current].device.clone());
        }
        record(&self.slots[self.current].consumed, compute)?;
        self.current = 1 - self.current;
        let slot = &mut self.slots[self.current];
        let late = || "asking for the last copy of a micro-batch".to_string();
        if !slot.copied.try_is_complete().doing(late)? {
            Counts::add(&dev.counts.waits);
            slot.copied.synchronize().doing(late)?;
        }
        let n = fill(slot.host.words());
        wait(copies, &slot.consumed)?;
        let words = &slot.host.words()[..n];
        // SAFETY: the device's memory holds as many words; those of the host stay as they are until `copied` has happened, which is waited
        // for before they are written or given back.
        let copied = unsafe { result::memcpy_htod_async(slot.device.address(), words, copies.cu_stream()) };
        copied.doing(|| format!("copying a micro-batch of {n} words to the device"))?;
        record(&slot.copied, copies)?;
        wait(compute, &slot.copied)?;
        Ok(slot.device.clone())
    }
}
