//! Functions that are known by name and answer that what they do is not offered: managed memory, memory of other interfaces,
//! peer access and inter-process handles. The attributes of the devices say so too.

use std::ffi::{c_int, c_void};

use crate::code::{Code, Result};
use crate::driver::driver;
use crate::ffi::{Handle, Out, api};

fn refuse() -> Result {
    driver().state().current()?;
    Err(Code::NOT_SUPPORTED)
}

api! {
    /// Managed memory is not offered: the host cannot be watched.
    fn cuMemAllocManaged(out: Out<u64>, bytes: usize, flags: u32) {
        out.check()?;
        let _ = (bytes, flags);
        refuse()
    }

    /// About managed memory.
    fn cuMemAdvise_v2(at: u64, bytes: usize, advice: u32, location: crate::abi::Location) {
        let _ = (at, bytes, advice, location);
        refuse()
    }

    /// About managed memory.
    fn cuMemPrefetchAsync_v2(at: u64, bytes: usize, location: crate::abi::Location, flags: u32, stream: Handle) {
        let _ = (at, bytes, location, flags, stream);
        refuse()
    }

    /// About managed memory.
    fn cuMemAdvise(at: u64, bytes: usize, advice: u32, device: c_int) {
        let _ = (at, bytes, advice, device);
        refuse()
    }

    /// About managed memory.
    fn cuMemPrefetchAsync(at: u64, bytes: usize, device: c_int, stream: Handle) {
        let _ = (at, bytes, device, stream);
        refuse()
    }

    /// About managed memory.
    fn cuStreamAttachMemAsync(stream: Handle, at: u64, bytes: usize, flags: u32) {
        let _ = (stream, at, bytes, flags);
        refuse()
    }

    /// Memory of other interfaces is not offered.
    fn cuImportExternalMemory(out: Out<Handle>, description: *const c_void) {
        let _ = (out, description);
        refuse()
    }

    /// Memory of other interfaces is not offered.
    fn cuExternalMemoryGetMappedBuffer(out: Out<u64>, memory: Handle, description: *const c_void) {
        let _ = (out, memory, description);
        refuse()
    }

    /// Memory of other interfaces is not offered.
    fn cuDestroyExternalMemory(memory: Handle) {
        let _ = memory;
        refuse()
    }

    /// Kernels do not reach host memory.
    fn cuMemHostGetDevicePointer_v2(out: Out<u64>, host: usize, flags: u32) {
        let _ = (out, host, flags);
        refuse()
    }

    /// Kernels of one device do not reach the memory of another.
    fn cuCtxEnablePeerAccess(peer: Handle, flags: u32) {
        let st = driver().state();
        st.healthy()?;
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        st.contexts.get(peer).map_err(|_| Code::INVALID_CONTEXT)?;
        Err(Code::PEER_ACCESS_UNSUPPORTED)
    }

    /// There is no peer access to end.
    fn cuCtxDisablePeerAccess(peer: Handle) {
        let st = driver().state();
        st.healthy()?;
        st.contexts.get(peer).map_err(|_| Code::INVALID_CONTEXT)?;
        Err(Code::PEER_ACCESS_NOT_ENABLED)
    }

    /// No attribute of a pair of devices speaks for peer access.
    fn cuDeviceGetP2PAttribute(value: Out<c_int>, attribute: c_int, from: c_int, to: c_int) {
        let n = driver().devices.len() as c_int;
        if !(0..n).contains(&from) || !(0..n).contains(&to) {
            return Err(Code::INVALID_DEVICE);
        }
        if from == to || !(1..=5).contains(&attribute) {
            return Err(Code::INVALID_VALUE);
        }
        value.set(0)
    }

    /// Allocations do not go to other processes.
    fn cuIpcGetMemHandle(handle: *mut c_void, at: u64) {
        let _ = (handle, at);
        refuse()
    }
}
