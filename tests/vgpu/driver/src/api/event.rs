//! Events.

use std::sync::{Arc, Mutex};

use crate::code::Code;
use crate::driver::{Event, driver};
use crate::ffi::{Handle, Out, api};
use crate::op::Op;

const DISABLE_TIMING: u32 = 2;

/// Milliseconds between two events that have happened.
fn elapsed(ms: Out<f32>, start: Handle, end: Handle) -> crate::code::Result {
    let st = driver().state();
    st.healthy()?;
    let (a, b) = (st.events.get(start)?, st.events.get(end)?);
    if a.no_timing || b.no_timing {
        return Err(Code::INVALID_HANDLE);
    }
    let (Some((ia, ta)), Some((ib, tb))) = (&a.recorded, &b.recorded) else {
        return Err(Code::INVALID_HANDLE);
    };
    if !st.queue.done(*ia) || !st.queue.done(*ib) {
        return Err(Code::NOT_READY);
    }
    let time = |t: &Mutex<Option<std::time::Instant>>| *t.lock().unwrap_or_else(|e| e.into_inner());
    match (time(ta), time(tb)) {
        (Some(a), Some(b)) if b >= a => ms.set((b - a).as_secs_f32() * 1e3),
        (Some(a), Some(b)) => ms.set(-((a - b).as_secs_f32() * 1e3)),
        _ => Err(Code::NOT_READY),
    }
}

api! {
    /// An event.
    fn cuEventCreate(out: Out<Handle>, flags: u32) {
        out.check()?;
        let mut st = driver().state();
        let context = st.healthy()?;
        if flags & !7 != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let no_timing = flags & DISABLE_TIMING != 0;
        out.set(st.events.insert(Event { context, no_timing, recorded: None }))
    }

    /// Ends an event.
    fn cuEventDestroy_v2(event: Handle) {
        let mut st = driver().state();
        st.current()?;
        st.events.remove(event)?;
        Ok(())
    }

    /// The event happens when the stream comes to this point.
    fn cuEventRecord(event: Handle, stream: Handle) {
        let mut st = driver().state();
        st.healthy()?;
        let stream = st.stream(stream)?;
        if st.events.get(event)?.context != st.streams.get(stream)?.context {
            return Err(Code::INVALID_HANDLE);
        }
        let stamp = Arc::new(Mutex::new(None));
        let id = st.submit(stream, Op::Record(stamp.clone()))?;
        st.events.get_mut(event)?.recorded = Some((id, stamp));
        drop(driver().queued(st));
        Ok(())
    }

    /// Waits until the event has happened; an event never recorded has.
    fn cuEventSynchronize(event: Handle) {
        let st = driver().state();
        st.healthy()?;
        let e = st.events.get(event)?;
        let context = e.context;
        let target: Vec<_> = e.recorded.iter().map(|(id, _)| *id).collect();
        driver().force(st, &target).check(context)
    }

    /// Whether the event has happened.
    fn cuEventQuery(event: Handle) {
        let st = driver().state();
        st.healthy()?;
        let e = st.events.get(event)?;
        let context = e.context;
        let target: Vec<_> = e.recorded.iter().map(|(id, _)| *id).collect();
        let (st, happened) = driver().poll(st, &target);
        st.check(context)?;
        if happened { Ok(()) } else { Err(Code::NOT_READY) }
    }

    /// Milliseconds between two events, in host time.
    fn cuEventElapsedTime(ms: Out<f32>, start: Handle, end: Handle) {
        elapsed(ms, start, end)
    }

    /// As `cuEventElapsedTime`.
    fn cuEventElapsedTime_v2(ms: Out<f32>, start: Handle, end: Handle) {
        elapsed(ms, start, end)
    }
}
