//! Memory of devices and pinned memory of the host.

use crate::code::{Code, Result};
use crate::driver::{Allocation, State, driver};
use crate::ffi::{Handle, Out, api};
use crate::op::Op;

/// Allocates on the device of a context.
fn allocate(context: Handle, bytes: usize) -> Result<u64> {
    if bytes == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let mut st = driver().state();
    let device = st.device(context)?;
    let limit = driver().config.memory;
    if st.used[device] + bytes as u64 > limit {
        return Err(Code::OUT_OF_MEMORY);
    }
    st.used[device] += bytes as u64;
    drop(st);
    // Without the lock: a running launch holds the memory, and it may take the lock when it ends.
    let made = driver().devices[device].change(|m| m.alloc(bytes));
    let mut st = driver().state();
    match made {
        Ok(address) => {
            st.allocations.insert(
                address,
                Allocation {
                    len: bytes,
                    context,
                    device,
                },
            );
            Ok(address)
        }
        Err(_) => {
            st.used[device] -= bytes as u64;
            Err(Code::OUT_OF_MEMORY)
        }
    }
}

/// Takes an allocation out of the table: from now on no call may name it.
fn forget(st: &mut State, address: u64) -> Result {
    let a = st.allocations.remove(&address).ok_or(Code::INVALID_VALUE)?;
    st.used[a.device] -= a.len as u64;
    Ok(())
}

/// Pages of the host that hold `bytes`.
fn pages(bytes: usize) -> Result<std::alloc::Layout> {
    std::alloc::Layout::from_size_align(bytes, 4096).map_err(|_| Code::INVALID_VALUE)
}

fn allocate_pinned(bytes: usize) -> Result<usize> {
    let mut st = driver().state();
    st.healthy()?;
    st.safe_call()?;
    if bytes == 0 || bytes > 1 << 40 {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: the layout has a size above zero.
    let p = unsafe { std::alloc::alloc(pages(bytes)?) };
    if p.is_null() {
        return Err(Code::OUT_OF_MEMORY);
    }
    // SAFETY: just allocated with this size. NaNs, so that reading before writing shows.
    unsafe { p.write_bytes(vgpu::memory::FILL, bytes) };
    st.pinned.insert(p as usize, (bytes, true));
    Ok(p as usize)
}

api! {
    /// Allocates memory of the current context's device.
    fn cuMemAlloc_v2(out: Out<u64>, bytes: usize) {
        out.check()?;
        let mut st = driver().state();
        let context = st.healthy()?;
        st.safe_call()?;
        drop(st);
        out.set(allocate(context, bytes)?)
    }

    /// Frees memory after everything queued in the context has ended; null is nothing to free.
    fn cuMemFree_v2(address: u64) {
        let mut st = driver().state();
        let context = st.healthy()?;
        if address == 0 {
            return Ok(());
        }
        st.safe_call()?;
        forget(&mut st, address)?;
        let tail = st.context_tail(context);
        drop(driver().force(st, &tail));
        driver().release(address).map_err(|_| Code::INVALID_VALUE)
    }

    /// Allocates in stream order.
    fn cuMemAllocAsync(out: Out<u64>, bytes: usize, stream: Handle) {
        out.check()?;
        let mut st = driver().state();
        st.healthy()?;
        let stream = st.stream(stream)?;
        let context = st.streams.get(stream)?.context;
        drop(st);
        out.set(allocate(context, bytes)?)
    }

    /// Frees in stream order.
    fn cuMemFreeAsync(address: u64, stream: Handle) {
        let mut st = driver().state();
        st.healthy()?;
        let stream = st.stream(stream)?;
        if address == 0 {
            return Ok(());
        }
        forget(&mut st, address)?;
        st.submit(stream, Op::Free(address))?;
        drop(driver().queued(st));
        Ok(())
    }

    /// Free and total bytes of the current device.
    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) {
        let st = driver().state();
        let device = st.device(st.healthy()?)?;
        let all = driver().config.memory;
        free.set((all - st.used[device]) as usize)?;
        total.set(all as usize)
    }

    /// Pinned host memory.
    fn cuMemHostAlloc(out: Out<usize>, bytes: usize, flags: u32) {
        out.check()?;
        if flags & !7 != 0 {
            return Err(Code::INVALID_VALUE);
        }
        out.set(allocate_pinned(bytes)?)
    }

    /// Pinned host memory.
    fn cuMemAllocHost_v2(out: Out<usize>, bytes: usize) {
        out.check()?;
        out.set(allocate_pinned(bytes)?)
    }

    /// Frees pinned host memory after everything queued in the context has ended.
    fn cuMemFreeHost(address: usize) {
        let mut st = driver().state();
        let context = st.current()?;
        let Some((bytes, true)) = st.pinned.get(&address).copied() else {
            return Err(Code::INVALID_VALUE);
        };
        st.pinned.remove(&address);
        let tail = st.context_tail(context);
        drop(driver().force(st, &tail));
        // SAFETY: the table says that this library allocated these bytes; nothing queued names them any more.
        unsafe { std::alloc::dealloc(address as *mut u8, pages(bytes)?) };
        Ok(())
    }
}
