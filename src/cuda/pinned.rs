//! Page-locked memory of the host: the device reads and writes it by itself, so a copy needs neither a wait nor the driver's own buffers.

use std::ptr::NonNull;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaContext, result};

use super::error::DriverResult;
use crate::error::Result;

/// Page-locked bytes. Whoever queues a copy from or to them waits for it before they are used otherwise, or given back.
pub(super) struct Pinned {
    context: Arc<CudaContext>,
    bytes: NonNull<u8>,
    len: usize,
}

// SAFETY: the bytes belong to this value alone, as those of a `Vec` do.
unsafe impl Send for Pinned {}
// SAFETY: they are written through `&mut` alone.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// `len` bytes, at least one, all 0, of a device that is named by its context.
    pub fn new(context: &Arc<CudaContext>, len: usize) -> Result<Self> {
        assert!(len > 0, "page-locked memory of no byte");
        let what = || format!("allocating {len} bytes of page-locked memory");
        context.bind_to_thread().doing(what)?;
        // SAFETY: the size is not 0, and the bytes are set below before anything reads them.
        let bytes = unsafe { result::malloc_host(len, 0) }.doing(what)?.cast::<u8>();
        let bytes = NonNull::new(bytes).expect("the driver gives memory or an error");
        // SAFETY: the driver gave as many bytes.
        unsafe { bytes.write_bytes(0, len) };
        Ok(Self { context: context.clone(), bytes, len })
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The bytes, as values; the driver aligns them to a page.
    pub fn values<T: Pod>(&mut self) -> &mut [T] {
        // SAFETY: `len` bytes that were set, borrowed as this value is.
        bytemuck::cast_slice_mut(unsafe { std::slice::from_raw_parts_mut(self.bytes.as_ptr(), self.len) })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: it comes from `malloc_host`, and goes once. Its owner has waited for the copies that use it.
        let _ = unsafe { result::free_host(self.bytes.as_ptr().cast()) };
    }
}
