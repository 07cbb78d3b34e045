//! Streams: made, waited for, asked whether they are idle.

use std::ffi::c_int;

use crate::code::Code;
use crate::driver::driver;
use crate::ffi::{Handle, HostFn, Out, api};
use crate::op::Op;

const NON_BLOCKING: u32 = 1;

api! {
    /// A stream.
    fn cuStreamCreate(out: Out<Handle>, flags: u32) {
        out.check()?;
        let mut st = driver().state();
        let context = st.healthy()?;
        if flags & !NON_BLOCKING != 0 {
            return Err(Code::INVALID_VALUE);
        }
        out.set(st.new_stream(context, flags & NON_BLOCKING != 0, 0))
    }

    /// A stream with a priority, which is brought into range and changes nothing here.
    fn cuStreamCreateWithPriority(out: Out<Handle>, flags: u32, priority: c_int) {
        out.check()?;
        let mut st = driver().state();
        let context = st.healthy()?;
        if flags & !NON_BLOCKING != 0 {
            return Err(Code::INVALID_VALUE);
        }
        out.set(st.new_stream(context, flags & NON_BLOCKING != 0, priority.clamp(-5, 0)))
    }

    /// Ends a stream; what is queued on it still runs.
    fn cuStreamDestroy_v2(stream: Handle) {
        let mut st = driver().state();
        st.current()?;
        if stream.0 <= 2 {
            return Err(Code::INVALID_HANDLE);
        }
        let stream = st.stream(stream)?;
        st.streams.remove(stream)?;
        Ok(())
    }

    /// Waits until a stream is idle.
    fn cuStreamSynchronize(stream: Handle) {
        let mut st = driver().state();
        st.healthy()?;
        let stream = st.stream(stream)?;
        let context = st.streams.get(stream)?.context;
        st.not_capturing(stream)?;
        let tail = st.tail(stream)?;
        driver().force(st, &tail).check(context)
    }

    /// Whether a stream is idle.
    fn cuStreamQuery(stream: Handle) {
        let mut st = driver().state();
        st.healthy()?;
        let stream = st.stream(stream)?;
        let context = st.streams.get(stream)?.context;
        st.not_capturing(stream)?;
        let tail = st.tail(stream)?;
        let (st, idle) = driver().poll(st, &tail);
        st.check(context)?;
        if idle { Ok(()) } else { Err(Code::NOT_READY) }
    }

    /// What follows on the stream waits for the event as it was recorded last.
    fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32) {
        let _ = flags;
        let mut st = driver().state();
        st.healthy()?;
        let stream = st.stream(stream)?;
        st.wait_event(stream, event)
    }

    /// Calls a function of the host in stream order.
    fn cuLaunchHostFunc(stream: Handle, function: HostFn, data: usize) {
        let mut st = driver().state();
        st.healthy()?;
        let stream = st.stream(stream)?;
        let f = function.ok_or(Code::INVALID_VALUE)?;
        st.submit(stream, Op::Host(f, data))?;
        drop(driver().queued(st));
        Ok(())
    }
}
