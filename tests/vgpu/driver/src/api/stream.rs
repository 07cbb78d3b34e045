//! Streams: made, waited for, asked whether they are idle.

use std::ffi::c_int;

use crate::code::Code;
use crate::driver::driver;
use crate::ffi::{Handle, HostFn, Out, api};
use crate::op::{Op, StreamCallback};

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
        let tail = st.tail(stream)?;
        let gone = st.streams.remove(stream)?;
        if let Some(part) = gone.captured {
            st.invalidate(part.capture);
        }
        if !gone.non_blocking {
            // The null stream still waits for what is queued.
            let null = st.contexts.get(gone.context)?.null_stream;
            st.streams.get_mut(null)?.waits.extend(tail);
        }
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
        let mut st = driver().state();
        st.healthy()?;
        if flags & !1 != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let stream = st.stream(stream)?;
        if flags == 1 && st.streams.get(stream)?.captured.is_some() {
            // CU_EVENT_WAIT_EXTERNAL: a node that waits for an event outside of the graph.
            return Err(Code::NOT_SUPPORTED);
        }
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

    /// Flags of a stream.
    fn cuStreamGetFlags(stream: Handle, flags: Out<u32>) {
        let mut st = driver().state();
        let stream = st.stream(stream)?;
        flags.set(u32::from(st.streams.get(stream)?.non_blocking))
    }

    /// Priority of a stream.
    fn cuStreamGetPriority(stream: Handle, priority: Out<c_int>) {
        let mut st = driver().state();
        let stream = st.stream(stream)?;
        priority.set(st.streams.get(stream)?.priority)
    }

    /// Context of a stream.
    fn cuStreamGetCtx(stream: Handle, out: Out<Handle>) {
        let mut st = driver().state();
        let stream = st.stream(stream)?;
        out.set(st.streams.get(stream)?.context)
    }

    /// Device of a stream.
    fn cuStreamGetDevice(stream: Handle, out: Out<c_int>) {
        let mut st = driver().state();
        let stream = st.stream(stream)?;
        let context = st.streams.get(stream)?.context;
        out.set(st.device(context)? as c_int)
    }

    /// A number that no other stream has.
    fn cuStreamGetId(stream: Handle, id: Out<u64>) {
        let mut st = driver().state();
        id.set(st.stream(stream)?.0 as u64)
    }

    /// Calls a function of the host in stream order with the status of the stream.
    fn cuStreamAddCallback(stream: Handle, callback: StreamCallback, data: usize, flags: u32) {
        let mut st = driver().state();
        st.healthy()?;
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let f = callback.ok_or(Code::INVALID_VALUE)?;
        let handle = stream;
        let stream = st.stream(stream)?;
        st.not_capturing(stream)?;
        st.submit(stream, Op::Callback(f, handle, data))?;
        drop(driver().queued(st));
        Ok(())
    }
}
