//! Events.

use std::sync::{Arc, Mutex};

use crate::code::{Code, Result};
use crate::driver::{Event, Recorded, State, driver};
use crate::ffi::{Handle, Out, api};
use crate::op::Op;
use crate::queue::OpId;

const DISABLE_TIMING: u32 = 2;

/// What to wait for so that an event has happened, with its context.
fn target(st: &mut State, event: Handle) -> Result<(Handle, Vec<OpId>)> {
    let e = st.events.get(event)?;
    let context = e.context;
    match e.recorded.clone() {
        Recorded::Never => Ok((context, Vec::new())),
        Recorded::Queued(id, _) => Ok((context, vec![id])),
        Recorded::Captured(part) => {
            st.invalidate(part.capture);
            Err(Code::CAPTURED_EVENT)
        }
    }
}

/// Milliseconds between two events that have happened.
fn elapsed(ms: Out<f32>, start: Handle, end: Handle) -> Result {
    let st = driver().state();
    st.healthy()?;
    let (a, b) = (st.events.get(start)?, st.events.get(end)?);
    if a.no_timing || b.no_timing {
        return Err(Code::INVALID_HANDLE);
    }
    let (ia, ta, ib, tb) = match (&a.recorded, &b.recorded) {
        (Recorded::Queued(ia, ta), Recorded::Queued(ib, tb)) => (ia, ta, ib, tb),
        (Recorded::Captured(_), _) | (_, Recorded::Captured(_)) => return Err(Code::CAPTURED_EVENT),
        _ => return Err(Code::INVALID_HANDLE),
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

/// Records an event at the end of a stream.
fn record(event: Handle, stream: Handle, flags: u32) -> Result {
    let mut st = driver().state();
    st.healthy()?;
    if flags > 1 {
        return Err(Code::INVALID_VALUE);
    }
    let stream = st.stream(stream)?;
    if st.events.get(event)?.context != st.streams.get(stream)?.context {
        return Err(Code::INVALID_HANDLE);
    }
    if let Some(part) = st.streams.get(stream)?.captured.clone() {
        if !st.captures.get(part.capture)?.valid {
            return Err(Code::STREAM_CAPTURE_INVALIDATED);
        }
        if flags == 1 {
            // CU_EVENT_RECORD_EXTERNAL: a node that records an event for the world outside of the graph.
            return Err(Code::NOT_SUPPORTED);
        }
        st.events.get_mut(event)?.recorded = Recorded::Captured(part);
        return Ok(());
    }
    let stamp = Arc::new(Mutex::new(None));
    if let Some(id) = st.submit(stream, Op::Record(stamp.clone()))? {
        st.events.get_mut(event)?.recorded = Recorded::Queued(id, stamp);
    }
    drop(driver().queued(st));
    Ok(())
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
        out.set(st.events.insert(Event { context, no_timing, recorded: Recorded::Never }))
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
        record(event, stream, 0)
    }

    /// As `cuEventRecord`; outside of a capture the flag changes nothing.
    fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: u32) {
        record(event, stream, flags)
    }

    /// Waits until the event has happened; an event never recorded has.
    fn cuEventSynchronize(event: Handle) {
        let mut st = driver().state();
        st.healthy()?;
        let (context, target) = target(&mut st, event)?;
        driver().force(st, &target).check(context)
    }

    /// Whether the event has happened.
    fn cuEventQuery(event: Handle) {
        let mut st = driver().state();
        st.healthy()?;
        let (context, target) = target(&mut st, event)?;
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
