//! Memory of devices and pinned memory of the host.

use crate::code::{Code, Result};
use crate::driver::{Allocation, Origin, Pinned, State, driver};
use crate::ffi::{Handle, Out, api};
use crate::op::Op;
use crate::report::say;

/// Takes `bytes` of a device's memory, and of a pool's.
fn claim(st: &mut State, device: usize, bytes: usize, pool: Option<Handle>) -> Result {
    if bytes == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let limit = driver().config.memory;
    if bytes as u64 > limit - st.used[device] {
        let used = st.used[device];
        say(&format!("device {device}: {bytes} bytes asked for, {used} of {limit} are in use (VGPU_MEMORY)"));
        return Err(Code::OUT_OF_MEMORY);
    }
    if let Some(p) = pool {
        let held = st.allocations.values().filter(|a| a.pool == pool).map(|a| a.len as u64).sum::<u64>() + bytes as u64;
        let p = st.pools.get_mut(p).map_err(|_| Code::INVALID_VALUE)?;
        if p.max > 0 && held > p.max {
            return Err(Code::OUT_OF_MEMORY);
        }
        p.high = p.high.max(held);
    }
    st.used[device] += bytes as u64;
    Ok(())
}

/// Allocates at once on the device of a context.
fn allocate(context: Handle, bytes: usize) -> Result<u64> {
    let mut st = driver().state();
    let device = st.device(context)?;
    claim(&mut st, device, bytes, None)?;
    drop(st);
    // Without the lock: a running launch holds the memory, and it may take the lock when it ends.
    let made = driver().devices[device].change(|m| m.alloc(bytes));
    let mut st = driver().state();
    match made {
        Ok(address) => {
            st.allocations
                .insert(address, Allocation { len: bytes, context, device, pool: None, origin: Origin::Call });
            Ok(address)
        }
        Err(_) => {
            st.used[device] -= bytes as u64;
            Err(Code::OUT_OF_MEMORY)
        }
    }
}

/// Allocates in stream order, from the current pool of the stream's device unless one is named. While the stream captures, the
/// allocation becomes a node of the graph; its memory stays with the context.
pub fn allocate_async(out: Out<u64>, bytes: usize, stream: Handle, pool: Option<Handle>) -> Result {
    out.check()?;
    let mut st = driver().state();
    st.healthy()?;
    let stream = st.stream(stream)?;
    let context = st.streams.get(stream)?.context;
    let mut device = st.device(context)?;
    let pool = match pool {
        Some(p) => {
            device = st.pools.get(p).map_err(|_| Code::INVALID_VALUE)?.device;
            Some(p)
        }
        None => Some(driver().current_pool(&mut st, device)),
    };
    claim(&mut st, device, bytes, pool)?;
    drop(st);
    let reserved = driver().devices[device].change(|m| m.reserve(bytes));
    let mut st = driver().state();
    let queued = match reserved {
        Ok(address) => st.submit(stream, Op::Commit(address)).map(|id| (address, id)),
        Err(_) => Err(Code::OUT_OF_MEMORY),
    };
    let (address, id) = match queued {
        Ok(done) => done,
        Err(code) => {
            st.used[device] -= bytes as u64;
            return Err(code);
        }
    };
    let origin = id.map_or(Origin::Graph { live: false }, Origin::Stream);
    st.allocations.insert(address, Allocation { len: bytes, context, device, pool, origin });
    drop(driver().queued(st));
    out.set(address)
}

/// Takes an allocation out of the table: from now on no call may name it.
fn forget(st: &mut State, address: u64) -> Result<Allocation> {
    let a = st.allocations.remove(&address).ok_or(Code::INVALID_VALUE)?;
    st.used[a.device] -= a.len as u64;
    Ok(a)
}

/// Notes whether an allocation of a graph is allocated, in the order of calls.
pub fn set_live(st: &mut State, address: u64, live: bool) -> Result {
    st.allocations.get_mut(&address).ok_or(Code::INVALID_VALUE)?.origin = Origin::Graph { live };
    Ok(())
}

/// Pages of the host that hold `bytes`.
fn pages(bytes: usize) -> Result<std::alloc::Layout> {
    std::alloc::Layout::from_size_align(bytes, 4096).map_err(|_| Code::INVALID_VALUE)
}

fn allocate_pinned(bytes: usize, flags: u32) -> Result<usize> {
    let mut st = driver().state();
    let context = st.healthy()?;
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
    st.pinned.insert(p as usize, Pinned { len: bytes, own: true, context, flags });
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

    /// Allocates rows whose pitch suits copies: 512 bytes.
    fn cuMemAllocPitch_v2(out: Out<u64>, pitch: Out<usize>, width: usize, height: usize, element: u32) {
        out.check()?;
        pitch.check()?;
        let mut st = driver().state();
        let context = st.healthy()?;
        st.safe_call()?;
        drop(st);
        if ![4, 8, 16].contains(&element) || width == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let row = width.checked_next_multiple_of(512).ok_or(Code::INVALID_VALUE)?;
        let bytes = row.checked_mul(height).ok_or(Code::INVALID_VALUE)?;
        out.set(allocate(context, bytes)?)?;
        pitch.set(row)
    }

    /// Frees memory. Waits for what is queued in the context, but not for memory that was allocated in stream order.
    fn cuMemFree_v2(address: u64) {
        let mut st = driver().state();
        let context = st.healthy()?;
        if address == 0 {
            return Ok(());
        }
        st.safe_call()?;
        let tail = match st.allocations.get(&address).ok_or(Code::INVALID_VALUE)?.origin {
            Origin::Call => st.context_tail(context),
            Origin::Stream(id) => vec![id],
            Origin::Graph { live: false } => return Err(Code::INVALID_VALUE),
            Origin::Graph { live: true } => {
                set_live(&mut st, address, false)?;
                let tail = st.context_tail(context);
                drop(driver().force(st, &tail));
                return driver().release(address).map_err(|_| Code::INVALID_VALUE);
            }
        };
        forget(&mut st, address)?;
        drop(driver().force(st, &tail));
        driver().release(address).map_err(|_| Code::INVALID_VALUE)
    }

    /// Allocates in stream order.
    fn cuMemAllocAsync(out: Out<u64>, bytes: usize, stream: Handle) {
        allocate_async(out, bytes, stream, None)
    }

    /// Frees in stream order.
    fn cuMemFreeAsync(address: u64, stream: Handle) {
        let mut st = driver().state();
        st.healthy()?;
        let stream = st.stream(stream)?;
        if address == 0 {
            return Ok(());
        }
        let capturing = st.streams.get(stream)?.captured.is_some();
        match (st.allocations.get(&address).ok_or(Code::INVALID_VALUE)?.origin, capturing) {
            (Origin::Graph { live: true }, false) => set_live(&mut st, address, false)?,
            // A free node; what it does to the allocation is known at the launch.
            (Origin::Graph { .. }, true) => {}
            (Origin::Graph { live: false }, false) | (_, true) => return Err(Code::INVALID_VALUE),
            (_, false) => {
                forget(&mut st, address)?;
            }
        }
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
        out.set(allocate_pinned(bytes, flags)?)
    }

    /// Pinned host memory.
    fn cuMemAllocHost_v2(out: Out<usize>, bytes: usize) {
        out.check()?;
        out.set(allocate_pinned(bytes, 0)?)
    }

    /// Frees pinned host memory after everything queued in the context has ended.
    fn cuMemFreeHost(address: usize) {
        let mut st = driver().state();
        let context = st.current()?;
        let Some(Pinned { len: bytes, own: true, .. }) = st.pinned.get(&address).copied() else {
            return Err(Code::INVALID_VALUE);
        };
        st.pinned.remove(&address);
        let tail = st.context_tail(context);
        drop(driver().force(st, &tail));
        // SAFETY: the table says that this library allocated these bytes; nothing queued names them any more.
        unsafe { std::alloc::dealloc(address as *mut u8, pages(bytes)?) };
        Ok(())
    }

    /// Flags that pinned memory was allocated with.
    fn cuMemHostGetFlags(flags: Out<u32>, address: usize) {
        let st = driver().state();
        st.current()?;
        let found = st.pinned.range(..=address).next_back().filter(|(start, p)| address - **start < p.len);
        flags.set(found.ok_or(Code::INVALID_VALUE)?.1.flags)
    }

    /// Makes host memory pinned.
    fn cuMemHostRegister_v2(address: usize, bytes: usize, flags: u32) {
        let mut st = driver().state();
        let context = st.healthy()?;
        st.safe_call()?;
        if address == 0 || bytes == 0 || flags & !0xf != 0 {
            return Err(Code::INVALID_VALUE);
        }
        if flags & 8 != 0 {
            return Err(Code::NOT_SUPPORTED);
        }
        let end = address.checked_add(bytes).ok_or(Code::INVALID_VALUE)?;
        if st.pinned.range(..end).next_back().is_some_and(|(start, p)| start + p.len > address) {
            return Err(Code::HOST_MEMORY_ALREADY_REGISTERED);
        }
        st.pinned.insert(address, Pinned { len: bytes, own: false, context, flags });
        Ok(())
    }

    /// Makes registered memory pageable again, after everything queued in the context has ended.
    fn cuMemHostUnregister(address: usize) {
        let mut st = driver().state();
        let context = st.current()?;
        match st.pinned.get(&address) {
            Some(Pinned { own: false, .. }) => {}
            Some(_) => return Err(Code::INVALID_VALUE),
            None => return Err(Code::HOST_MEMORY_NOT_REGISTERED),
        }
        st.pinned.remove(&address);
        let tail = st.context_tail(context);
        drop(driver().force(st, &tail));
        Ok(())
    }
}
