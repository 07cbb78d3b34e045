//! Contexts: primary ones, made ones, and which is current.

use std::ffi::c_int;

use crate::code::{Code, Result};
use crate::driver::{CURRENT, State, driver};
use crate::ffi::{Handle, Out, api};

fn primary(st: &State, device: usize) -> Option<Handle> {
    st.contexts
        .iter()
        .find(|(_, c)| c.primary && c.device == device)
        .map(|(h, _)| h)
}

fn checked_device(st: &State, ordinal: c_int) -> Result<usize> {
    if !st.initialised {
        return Err(Code::NOT_INITIALIZED);
    }
    let d = usize::try_from(ordinal).ok().filter(|d| *d < driver().devices.len());
    d.ok_or(Code::INVALID_DEVICE)
}

/// Ends everything that belongs to a context.
fn destroy(context: Handle) -> Result {
    let st = driver().state();
    let tail = st.context_tail(context);
    let mut st = driver().force(st, &tail);
    let gone: Vec<u64> = st
        .allocations
        .iter()
        .filter(|(_, a)| a.context == context)
        .map(|(p, _)| *p)
        .collect();
    for address in gone {
        if let Some(a) = st.allocations.remove(&address) {
            st.used[a.device] -= a.len as u64;
            // The table said that the allocation lives.
            let _ = driver().release(address);
        }
    }
    st.streams.remove_if(|s| s.context == context);
    st.events.remove_if(|e| e.context == context);
    st.thread_streams.remove(&context);
    st.captures.remove_if(|c| c.context == context);
    let graphs = st.graphs.remove_if(|g| g.context == context);
    let executables = st.executables.remove_if(|e| e.context == context);
    st.functions.remove_if(|f| f.module.context == context);
    st.modules.remove_if(|m| m.context == context);
    st.contexts.remove(context)?;
    drop(st);
    // Operations of other libraries may call back when they go.
    drop((graphs, executables));
    Ok(())
}

api! {
    /// The primary context of a device, made when it is first asked for.
    fn cuDevicePrimaryCtxRetain(out: Out<Handle>, ordinal: c_int) {
        out.check()?;
        let mut st = driver().state();
        let device = checked_device(&st, ordinal)?;
        let handle = primary(&st, device).unwrap_or_else(|| st.new_context(device, true, 0));
        st.contexts.get_mut(handle)?.retained += 1;
        out.set(handle)
    }

    /// Gives a primary context back; the last one to do so destroys it.
    fn cuDevicePrimaryCtxRelease_v2(ordinal: c_int) {
        let mut st = driver().state();
        let device = checked_device(&st, ordinal)?;
        let handle = primary(&st, device).ok_or(Code::INVALID_CONTEXT)?;
        let c = st.contexts.get_mut(handle)?;
        c.retained -= 1;
        if c.retained > 0 {
            return Ok(());
        }
        drop(st);
        destroy(handle)
    }

    /// The context current to the thread.
    fn cuCtxGetCurrent(out: Out<Handle>) {
        if !driver().state().initialised {
            return Err(Code::NOT_INITIALIZED);
        }
        out.set(CURRENT.with_borrow(|c| c.last().copied()).unwrap_or_default())
    }

    /// Makes a context current to the thread; null leaves none.
    fn cuCtxSetCurrent(context: Handle) {
        let st = driver().state();
        if !st.initialised {
            return Err(Code::NOT_INITIALIZED);
        }
        if context != Handle::NULL {
            st.contexts.get(context).map_err(|_| Code::INVALID_CONTEXT)?;
        }
        CURRENT.with_borrow_mut(|c| {
            c.pop();
            if context != Handle::NULL {
                c.push(context);
            }
        });
        Ok(())
    }

    /// Waits for everything queued in the context.
    fn cuCtxSynchronize() {
        let mut st = driver().state();
        let context = st.healthy()?;
        st.context_not_capturing(context)?;
        let tail = st.context_tail(context);
        driver().force(st, &tail).check(context)
    }

    /// Least and greatest stream priority.
    fn cuCtxGetStreamPriorityRange(least: Out<c_int>, greatest: Out<c_int>) {
        driver().state().current()?;
        least.set_if(0);
        greatest.set_if(-5);
        Ok(())
    }
}
