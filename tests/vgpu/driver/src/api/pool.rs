//! Memory pools. A pool says on which device to allocate and how much it may hold; memory is always given back at once.

use std::ffi::c_int;

use crate::abi::PoolProps;
use crate::api::memory::allocate_async;
use crate::code::{Code, Result};
use crate::driver::{Driver, Pool, State, driver};
use crate::ffi::{Handle, Out, api};

const RELEASE_THRESHOLD: u32 = 4;
const PINNED: u32 = 1;
const ON_DEVICE: u32 = 1;

fn device(st: &State, ordinal: c_int) -> Result<usize> {
    if !st.initialised {
        return Err(Code::NOT_INITIALIZED);
    }
    let d = usize::try_from(ordinal).ok().filter(|d| *d < driver().devices.len());
    d.ok_or(Code::INVALID_DEVICE)
}

impl Driver {
    /// The pool that allocations on a device come from where none is named.
    pub fn current_pool(&self, st: &mut State, device: usize) -> Handle {
        let own = self.default_pool(st, device);
        st.pools.iter().find(|(_, p)| p.current && p.device == device).map_or(own, |(h, _)| h)
    }

    /// The pool that a device has from the start.
    fn default_pool(&self, st: &mut State, device: usize) -> Handle {
        let known = st.pools.iter().find(|(_, p)| p.default && p.device == device).map(|(h, _)| h);
        known.unwrap_or_else(|| st.pools.insert(Pool::new(device, true, 0)))
    }
}

api! {
    /// A device's own pool.
    fn cuDeviceGetDefaultMemPool(out: Out<Handle>, ordinal: c_int) {
        let mut st = driver().state();
        let d = device(&st, ordinal)?;
        let pool = driver().default_pool(&mut st, d);
        out.set(pool)
    }

    /// The pool that allocations on a device come from.
    fn cuDeviceGetMemPool(out: Out<Handle>, ordinal: c_int) {
        let mut st = driver().state();
        let d = device(&st, ordinal)?;
        let current = driver().current_pool(&mut st, d);
        out.set(current)
    }

    /// Sets the pool that allocations on a device come from.
    fn cuDeviceSetMemPool(ordinal: c_int, pool: Handle) {
        let mut st = driver().state();
        let d = device(&st, ordinal)?;
        if st.pools.get(pool).map_err(|_| Code::INVALID_VALUE)?.device != d {
            return Err(Code::INVALID_VALUE);
        }
        for (h, p) in st.pools.iter_mut().filter(|(_, p)| p.device == d) {
            p.current = h == pool;
        }
        Ok(())
    }

    /// A pool on a device.
    fn cuMemPoolCreate(out: Out<Handle>, props: crate::ffi::In<PoolProps>) {
        out.check()?;
        let p = props.get()?;
        let mut st = driver().state();
        let d = device(&st, p.location.id).map_err(|c| if c == Code::INVALID_DEVICE { Code::INVALID_VALUE } else { c })?;
        if p.allocation != PINNED || p.location.kind != ON_DEVICE {
            return Err(Code::INVALID_VALUE);
        }
        if p.handles != 0 {
            return Err(Code::NOT_SUPPORTED);
        }
        out.set(st.pools.insert(Pool::new(d, false, p.max_size as u64)))
    }

    /// Ends a pool; its allocations live on.
    fn cuMemPoolDestroy(pool: Handle) {
        let mut st = driver().state();
        if st.pools.get(pool).map_err(|_| Code::INVALID_VALUE)?.default {
            return Err(Code::INVALID_VALUE);
        }
        st.pools.remove(pool)?;
        Ok(())
    }

    /// A setting or figure of a pool.
    fn cuMemPoolGetAttribute(pool: Handle, attribute: u32, value: usize) {
        let st = driver().state();
        let p = st.pools.get(pool).map_err(|_| Code::INVALID_VALUE)?;
        let used = || st.allocations.values().filter(|a| a.pool == Some(pool)).map(|a| a.len as u64).sum::<u64>();
        if value == 0 {
            return Err(Code::INVALID_VALUE);
        }
        match attribute {
            // SAFETY: the C caller promises an int for these attributes; not null.
            1..=3 => unsafe { (value as *mut c_int).write_unaligned(p.reuse[attribute as usize - 1]) },
            // SAFETY: the C caller promises a cuuint64_t for these attributes; not null.
            4..=8 => unsafe {
                (value as *mut u64).write_unaligned(match attribute {
                    RELEASE_THRESHOLD => p.threshold,
                    5 | 7 => used(),
                    _ => p.high,
                });
            },
            _ => return Err(Code::INVALID_VALUE),
        }
        Ok(())
    }

    /// Changes a setting of a pool; a high-water mark can only be set to zero.
    fn cuMemPoolSetAttribute(pool: Handle, attribute: u32, value: usize) {
        let mut st = driver().state();
        let used = st.allocations.values().filter(|a| a.pool == Some(pool)).map(|a| a.len as u64).sum::<u64>();
        let p = st.pools.get_mut(pool).map_err(|_| Code::INVALID_VALUE)?;
        if value == 0 {
            return Err(Code::INVALID_VALUE);
        }
        match attribute {
            // SAFETY: the C caller promises an int for these attributes; not null.
            1..=3 => p.reuse[attribute as usize - 1] = unsafe { (value as *const c_int).read_unaligned() },
            4 | 6 | 8 => {
                // SAFETY: the C caller promises a cuuint64_t for these attributes; not null.
                let v = unsafe { (value as *const u64).read_unaligned() };
                match attribute {
                    RELEASE_THRESHOLD => p.threshold = v,
                    _ if v == 0 => p.high = used,
                    _ => return Err(Code::INVALID_VALUE),
                }
            }
            _ => return Err(Code::INVALID_VALUE),
        }
        Ok(())
    }

    /// Nothing is kept, so there is nothing to give back.
    fn cuMemPoolTrimTo(pool: Handle, keep: usize) {
        let _ = keep;
        driver().state().pools.get(pool).map_err(|_| Code::INVALID_VALUE)?;
        Ok(())
    }

    /// Allocates from a pool in stream order.
    fn cuMemAllocFromPoolAsync(out: Out<u64>, bytes: usize, pool: Handle, stream: Handle) {
        driver().state().pools.get(pool).map_err(|_| Code::INVALID_VALUE)?;
        allocate_async(out, bytes, stream, Some(pool))
    }
}
