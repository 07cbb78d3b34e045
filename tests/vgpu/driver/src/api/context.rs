//! Contexts: primary ones, made ones, and which is current.

use std::ffi::c_int;

use crate::code::{Code, Result};
use crate::driver::{CURRENT, State, driver};
use crate::ffi::{Handle, Out, api};

fn primary(st: &State, device: usize) -> Option<Handle> {
    st.contexts.iter().find(|(_, c)| c.primary && c.device == device).map(|(h, _)| h)
}

fn checked_device(st: &State, ordinal: c_int) -> Result<usize> {
    if !st.initialised {
        return Err(Code::NOT_INITIALIZED);
    }
    let d = usize::try_from(ordinal).ok().filter(|d| *d < driver().devices.len());
    d.ok_or(Code::INVALID_DEVICE)
}

/// Scheduling, mapping of host memory, local memory, core dumps, synchronous copies: known and without effect.
fn check_flags(flags: u32) -> Result {
    let schedule = flags & 7;
    if flags & !0xff != 0 || ![0, 1, 2, 4].contains(&schedule) {
        return Err(Code::INVALID_VALUE);
    }
    Ok(())
}

/// The value of a `CUlimit` that nobody set.
fn limit_default(limit: u32) -> Result<usize> {
    const DEFAULTS: [usize; 7] = [1 << 10, 1 << 20, 8 << 20, 2, 2048, 64, 0];
    let known = DEFAULTS.get(limit as usize).copied();
    known.ok_or(if limit < 10 { Code::UNSUPPORTED_LIMIT } else { Code::INVALID_VALUE })
}

fn create(out: Out<Handle>, flags: u32, ordinal: c_int) -> Result {
    out.check()?;
    check_flags(flags)?;
    let mut st = driver().state();
    let device = checked_device(&st, ordinal)?;
    let made = st.new_context(device, false, flags);
    CURRENT.with_borrow_mut(|c| c.push(made));
    out.set(made)
}

/// Ends everything that belongs to a context.
fn destroy(context: Handle) -> Result {
    let st = driver().state();
    let tail = st.context_tail(context);
    let mut st = driver().force(st, &tail);
    crate::leaks::report(&st, context);
    let modules = st.modules.remove_if(|m| m.context == context);
    let mut gone: Vec<u64> = modules.iter().flat_map(|m| m.image.variables()).map(|(address, _)| address).collect();
    for address in &gone {
        st.variables.remove(address);
    }
    let ours = st.allocations.iter().filter(|(_, a)| a.context == context);
    for (address, device, len) in ours.map(|(p, a)| (*p, a.device, a.len)).collect::<Vec<_>>() {
        st.allocations.remove(&address);
        st.used[device] -= len as u64;
        gone.push(address);
    }
    for p in st.pinned.values_mut().filter(|p| p.context == context) {
        // Pinned memory serves every context; it stays until it is freed.
        p.context = Handle::NULL;
    }
    st.streams.remove_if(|s| s.context == context);
    st.events.remove_if(|e| e.context == context);
    st.thread_streams.remove(&context);
    st.functions.remove_if(|f| f.module.context == context);
    let captures = st.captures.remove_if(|c| c.context == context);
    let graphs = st.graphs.remove_if(|g| g.context == context);
    let executables = st.executables.remove_if(|e| e.context == context);
    st.contexts.remove(context)?;
    drop(st);
    // Operations of other libraries may call back when they go: not under the lock.
    drop((captures, graphs, executables));
    for address in gone {
        // Allocations of graphs that never ran are known by address only.
        let _ = driver().release(address);
    }
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

    /// Flags and whether a device's primary context is there.
    fn cuDevicePrimaryCtxGetState(ordinal: c_int, flags: Out<u32>, active: Out<c_int>) {
        let st = driver().state();
        let device = checked_device(&st, ordinal)?;
        let found = primary(&st, device);
        flags.set(found.and_then(|h| st.contexts.get(h).ok()).map_or(0, |c| c.flags))?;
        active.set(c_int::from(found.is_some()))
    }

    /// Flags of a primary context; they change nothing here.
    fn cuDevicePrimaryCtxSetFlags_v2(ordinal: c_int, flags: u32) {
        let mut st = driver().state();
        let device = checked_device(&st, ordinal)?;
        check_flags(flags)?;
        if let Some(h) = primary(&st, device) {
            st.contexts.get_mut(h)?.flags = flags;
        }
        Ok(())
    }

    /// Destroys a primary context whoever holds it. Its errors go with it.
    fn cuDevicePrimaryCtxReset_v2(ordinal: c_int) {
        let st = driver().state();
        let device = checked_device(&st, ordinal)?;
        let found = primary(&st, device);
        drop(st);
        found.map_or(Ok(()), destroy)
    }

    /// A context of its own, which becomes current.
    fn cuCtxCreate_v2(out: Out<Handle>, flags: u32, ordinal: c_int) {
        create(out, flags, ordinal)
    }

    /// As `cuCtxCreate_v2`; affinity to a part of the multiprocessors is not offered.
    fn cuCtxCreate_v3(out: Out<Handle>, affinity: usize, n: c_int, flags: u32, ordinal: c_int) {
        if affinity != 0 || n != 0 {
            return Err(Code::NOT_SUPPORTED);
        }
        create(out, flags, ordinal)
    }

    /// As `cuCtxCreate_v2`; parameters about graphics and affinity are not offered.
    fn cuCtxCreate_v4(out: Out<Handle>, parameters: usize, flags: u32, ordinal: c_int) {
        if parameters != 0 {
            return Err(Code::NOT_SUPPORTED);
        }
        create(out, flags, ordinal)
    }

    /// Destroys a context that was made, and what belongs to it.
    fn cuCtxDestroy_v2(context: Handle) {
        let st = driver().state();
        if !st.initialised {
            return Err(Code::NOT_INITIALIZED);
        }
        if st.contexts.get(context).map_err(|_| Code::INVALID_CONTEXT)?.primary {
            return Err(Code::INVALID_CONTEXT);
        }
        drop(st);
        CURRENT.with_borrow_mut(|c| {
            if c.last() == Some(&context) {
                c.pop();
            }
        });
        destroy(context)
    }

    /// Makes a context current and keeps the one before.
    fn cuCtxPushCurrent_v2(context: Handle) {
        driver().state().contexts.get(context).map_err(|_| Code::INVALID_CONTEXT)?;
        CURRENT.with_borrow_mut(|c| c.push(context));
        Ok(())
    }

    /// Makes the context before current again.
    fn cuCtxPopCurrent_v2(out: Out<Handle>) {
        if !driver().state().initialised {
            return Err(Code::NOT_INITIALIZED);
        }
        let popped = CURRENT.with_borrow_mut(Vec::pop).ok_or(Code::INVALID_CONTEXT)?;
        out.set_if(popped);
        Ok(())
    }

    /// Device of the current context.
    fn cuCtxGetDevice(out: Out<c_int>) {
        let st = driver().state();
        out.set(st.device(st.current()?)? as c_int)
    }

    /// Flags of the current context.
    fn cuCtxGetFlags(out: Out<u32>) {
        let st = driver().state();
        out.set(st.contexts.get(st.current()?)?.flags)
    }

    /// Sets flags of the current context; they change nothing here.
    fn cuCtxSetFlags(flags: u32) {
        let mut st = driver().state();
        let context = st.current()?;
        check_flags(flags)?;
        st.contexts.get_mut(context)?.flags = flags;
        Ok(())
    }

    /// A number that no other context has.
    fn cuCtxGetId(context: Handle, id: Out<u64>) {
        let st = driver().state();
        let context = if context == Handle::NULL { st.current()? } else { context };
        st.contexts.get(context).map_err(|_| Code::CONTEXT_IS_DESTROYED)?;
        id.set(context.0 as u64)
    }

    /// Version of the interface that a context was made with.
    fn cuCtxGetApiVersion(context: Handle, version: Out<u32>) {
        let st = driver().state();
        let context = if context == Handle::NULL { st.current()? } else { context };
        st.contexts.get(context).map_err(|_| Code::INVALID_CONTEXT)?;
        version.set(3020)
    }

    /// A limit of the current context.
    fn cuCtxGetLimit(value: Out<usize>, limit: u32) {
        let st = driver().state();
        let context = st.current()?;
        let default = limit_default(limit)?;
        value.set(st.contexts.get(context)?.limits.get(&limit).copied().unwrap_or(default))
    }

    /// Sets a limit of the current context; limits are kept and change nothing here.
    fn cuCtxSetLimit(limit: u32, value: usize) {
        let mut st = driver().state();
        let context = st.current()?;
        limit_default(limit)?;
        st.contexts.get_mut(context)?.limits.insert(limit, value);
        Ok(())
    }

    /// Preference between cache and shared memory; kept and without effect.
    fn cuCtxGetCacheConfig(config: Out<u32>) {
        let st = driver().state();
        config.set(st.contexts.get(st.current()?)?.cache)
    }

    /// Sets the preference between cache and shared memory.
    fn cuCtxSetCacheConfig(config: u32) {
        let mut st = driver().state();
        let context = st.current()?;
        if config > 3 {
            return Err(Code::INVALID_VALUE);
        }
        st.contexts.get_mut(context)?.cache = config;
        Ok(())
    }

    /// Nothing is profiled here.
    fn cuProfilerStart() {
        driver().state().current()?;
        Ok(())
    }

    /// Nothing is profiled here.
    fn cuProfilerStop() {
        driver().state().current()?;
        Ok(())
    }
}
