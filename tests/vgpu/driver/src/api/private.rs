//! Symbols for the other libraries of vgpu (libnccl), which find them with dlsym on libcuda.so.1. Not part of CUDA.
//!
//! ```c
//! // Queues an operation in stream order (recorded when the stream is capturing). `run` returns 0 done, 1 not ready (others run, and
//! // it is called again), else a CUresult; `forced` says whether something waits for it. It is called without any lock, from any
//! // thread, and must not block. `drop` is called once, when it will not run again. The name is copied.
//! int vgpuEnqueue(CUstream stream, int (*run)(void *data, int forced), void (*drop)(void *data), void *data, const char *name);
//! // Reads and writes device memory at once; CUDA_ERROR_INVALID_VALUE for a range in no living allocation.
//! int vgpuMemoryRead(CUdeviceptr from, void *to, size_t bytes);
//! int vgpuMemoryWrite(CUdeviceptr to, const void *from, size_t bytes);
//! // CUDA_ERROR_ILLEGAL_ADDRESS where the range is in no living allocation; with `initialised`, CUDA_ERROR_INVALID_VALUE where some
//! // byte was never written. The reason goes to stderr.
//! int vgpuMemoryCheck(CUdeviceptr at, size_t bytes, int initialised);
//! // The device of a stream.
//! int vgpuStreamDevice(CUstream stream, int *device);
//! // Every exported function as lines "name bytes-of-argument ...", for the test that compares prototypes with cuda.h.
//! int vgpuSymbols(const char **text);
//! ```

use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;

use crate::code::Code;
use crate::driver::driver;
use crate::ffi::{Handle, HostAddress, In, Out, Symbol, api, host_bytes};
use crate::op::{External, Op};
use crate::report::say;

/// Runs an external operation.
pub type Run = Option<unsafe extern "C" fn(*mut c_void, c_int) -> c_int>;
/// Ends an external operation.
pub type Drop = Option<unsafe extern "C" fn(*mut c_void)>;

api! {
    /// Queues another library's operation; see the head of this file.
    fn vgpuEnqueue(stream: Handle, run: Run, drop_data: Drop, data: usize, name: In<c_char>) {
        let run = run.ok_or(Code::INVALID_VALUE)?;
        let name = name.text().unwrap_or_else(|_| "operation".into());
        let mut st = driver().state();
        st.healthy()?;
        let stream = st.stream(stream)?;
        st.submit(stream, Op::External(Arc::new(External { run, drop: drop_data, data, name })))?;
        drop(driver().queued(st));
        Ok(())
    }

    /// Reads device memory.
    fn vgpuMemoryRead(from: u64, to: HostAddress, bytes: usize) {
        let d = driver().device_of(from).ok_or(Code::INVALID_VALUE)?;
        let mut v = vec![0; bytes];
        d.memory().read(from, &mut v).map_err(|e| {
            say(&format!("read: {e}"));
            Code::INVALID_VALUE
        })?;
        if to == 0 && bytes > 0 {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, and the caller promises a place for the bytes.
        unsafe { std::ptr::copy_nonoverlapping(v.as_ptr(), to as *mut u8, bytes) };
        Ok(())
    }

    /// Writes device memory.
    fn vgpuMemoryWrite(to: u64, from: HostAddress, bytes: usize) {
        if from == 0 && bytes > 0 {
            return Err(Code::INVALID_VALUE);
        }
        let d = driver().device_of(to).ok_or(Code::INVALID_VALUE)?;
        // SAFETY: not null, and the caller promises the bytes.
        let v = unsafe { host_bytes(from, bytes) };
        d.memory().write(to, &v).map_err(|e| {
            say(&format!("write: {e}"));
            Code::INVALID_VALUE
        })
    }

    /// The sanitizer's checks of a range.
    fn vgpuMemoryCheck(at: u64, bytes: usize, initialised: c_int) {
        let Some(d) = driver().device_of(at) else {
            say(&format!("{bytes} bytes at {at:#x}, which is no address of a device"));
            return Err(Code::ILLEGAL_ADDRESS);
        };
        match d.memory().first_unwritten(at, bytes) {
            Err(e) => {
                say(&e.to_string());
                Err(Code::ILLEGAL_ADDRESS)
            }
            Ok(Some(n)) if initialised != 0 => {
                say(&format!("byte {n} of {bytes} bytes at {at:#x} was never written"));
                Err(Code::INVALID_VALUE)
            }
            Ok(_) => Ok(()),
        }
    }

    /// The device of a stream.
    fn vgpuStreamDevice(stream: Handle, device: Out<c_int>) {
        let mut st = driver().state();
        let stream = st.stream(stream)?;
        let context = st.streams.get(stream)?.context;
        device.set(st.device(context)? as c_int)
    }

    /// Every exported function with the sizes of its arguments.
    fn vgpuSymbols(out: Out<*const c_char>) {
        let sizes = |s: &Symbol| s.sizes.iter().map(|n| format!(" {n}")).collect::<String>();
        let text: String = super::symbols().map(|s| format!("{}{}\n", s.name, sizes(s))).collect();
        let kept = driver().state().keep(&text)?;
        out.set(kept.as_ptr())
    }
}
