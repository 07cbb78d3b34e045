//! When the collectives of a device ran, by its own clock, for a trace: events around each, read once they are past.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaEvent, CudaStream};

use super::error::DriverResult;
use crate::error::Result;

/// Hears what ran: its name, its bucket, when it began and ended.
pub type Tell = Box<dyn Fn(&'static str, Option<usize>, Instant, Instant) + Send>;

/// Something that was queued, between two events.
struct Open {
    what: &'static str,
    bucket: Option<usize>,
    begun: CudaEvent,
    ended: CudaEvent,
}

/// What was queued and is not told yet.
pub(super) struct Timings {
    /// An event, and the time of the host at which it was past.
    zero: (CudaEvent, Instant),
    open: VecDeque<Open>,
    tell: Tell,
}

/// An event that has a time.
pub(super) fn timed(stream: &CudaStream) -> Result<CudaEvent> {
    stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).doing(|| "recording an event".into())
}

impl Timings {
    /// Of a stream, which the host waits for once.
    ///
    /// # Errors
    /// If the device fails.
    pub fn new(stream: &Arc<CudaStream>, tell: Tell) -> Result<Self> {
        let zero = timed(stream)?;
        stream.synchronize().doing(|| "waiting for other ranks".into())?;
        Ok(Self { zero: (zero, Instant::now()), open: VecDeque::new(), tell })
    }

    /// Something that began at an event and ends with what the stream has by now.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn queued(
        &mut self,
        stream: &CudaStream,
        what: &'static str,
        bucket: Option<usize>,
        begun: CudaEvent,
    ) -> Result<()> {
        self.open.push_back(Open { what, bucket, begun, ended: timed(stream)? });
        Ok(())
    }

    /// Tells what is past.
    ///
    /// # Errors
    /// If the device failed.
    pub fn tell_past(&mut self) -> Result<()> {
        while let Some(Open { what, bucket, begun, ended }) = self.open.pop_front_if(|open| open.ended.is_complete()) {
            let (zero, at) = &self.zero;
            let since = |event: &CudaEvent| -> Result<Instant> {
                let ms = zero.elapsed_ms(event).doing(|| "asking for the time between two events".into())?;
                Ok(*at + Duration::from_secs_f64(f64::from(ms.max(0.0)) * 1e-3))
            };
            (self.tell)(what, bucket, since(&begun)?, since(&ended)?);
        }
        Ok(())
    }
}
