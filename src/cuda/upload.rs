//! How a micro-batch comes to the device: one block of page-locked words, one copy in a stream of its own, while the one before is still
//! computed. Two slots take turns.
//!
//! ```text
//! host      waits until the slot's copy has run, two micro-batches ago · fills its words
//! copies    waits until all that reads the slot's last words has run · copies · event `copied`
//! compute   waits for `copied` · the micro-batch … · event `consumed`, when the next one comes
//! ```

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaEvent, CudaStream, result};

use super::device::{Counts, Cuda};
use super::error::DriverResult;
use super::memory::Memory;
use super::pinned::Pinned;
use crate::error::Result;

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
        let host = Pinned::new(dev.context(), words * size_of::<i32>())?;
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
        let n = fill(slot.host.values());
        wait(copies, &slot.consumed)?;
        let words = &slot.host.values::<i32>()[..n];
        // SAFETY: the device's memory holds as many words; those of the host stay as they are until `copied` has happened, which is waited
        // for before they are written or given back.
        let copied = unsafe { result::memcpy_htod_async(slot.device.address(), words, copies.cu_stream()) };
        copied.doing(|| format!("copying a micro-batch of {n} words to the device"))?;
        record(&slot.copied, copies)?;
        wait(compute, &slot.copied)?;
        Ok(slot.device.clone())
    }
}
