//! What this library asks of vgpu's `libcuda`: four private symbols and a few public ones, found by name at run time.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use crate::error::{Code, Failure, Result};

/// `CUstream`, never followed here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Stream(pub *mut c_void);

// SAFETY: the value is a handle that only the driver interprets, and the driver takes it from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// Runs an operation: 0 done, 1 not ready (ask again), more: a `CUresult`.
pub type Run = unsafe extern "C" fn(data: *mut c_void, forced: c_int) -> c_int;
/// Releases an operation's data.
pub type Release = unsafe extern "C" fn(data: *mut c_void);

type Enqueue = unsafe extern "C" fn(*mut c_void, Run, Release, *mut c_void, *const c_char) -> c_int;
type Read = unsafe extern "C" fn(u64, *mut c_void, usize) -> c_int;
type Write = unsafe extern "C" fn(u64, *const c_void, usize) -> c_int;
type Check = unsafe extern "C" fn(u64, usize, c_int) -> c_int;
type Synchronize = unsafe extern "C" fn(*mut c_void) -> c_int;
type Device = unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int;
type Retain = unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int;
type ReleasePrimary = unsafe extern "C" fn(c_int) -> c_int;
type GetContext = unsafe extern "C" fn(*mut *mut c_void) -> c_int;
type SetContext = unsafe extern "C" fn(*mut c_void) -> c_int;
type Uuid = unsafe extern "C" fn(*mut [u8; 16], c_int) -> c_int;
type Alloc = unsafe extern "C" fn(*mut u64, usize) -> c_int;
type Free = unsafe extern "C" fn(u64) -> c_int;
type Capturing = unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int;

/// The functions of the driver.
#[derive(Clone, Copy)]
pub struct Table {
    /// `vgpuEnqueue(stream, run, drop, data, name)`.
    pub enqueue: Enqueue,
    /// `vgpuMemoryRead(address, to, bytes)`.
    pub read: Read,
    /// `vgpuMemoryWrite(address, from, bytes)`.
    pub write: Write,
    /// `vgpuMemoryCheck(address, bytes, initialised)`.
    pub check: Check,
    /// `cuStreamSynchronize`.
    pub synchronize: Synchronize,
    /// `cuStreamIsCapturing`; without it the driver records no graphs.
    pub capturing: Option<Capturing>,
    /// `vgpuStreamDevice`.
    pub device: Device,
    /// `cuDevicePrimaryCtxRetain`.
    pub retain: Retain,
    /// `cuDevicePrimaryCtxRelease_v2`.
    pub release: ReleasePrimary,
    /// `cuCtxGetCurrent`.
    pub context: GetContext,
    /// `cuCtxSetCurrent`.
    pub set_context: SetContext,
    /// `cuDeviceGetUuid_v2`.
    pub uuid: Uuid,
    /// `cuMemAlloc_v2`.
    pub alloc: Alloc,
    /// `cuMemFree_v2`.
    pub free: Free,
}

static TABLE: OnceLock<std::result::Result<Table, String>> = OnceLock::new();

/// The functions, from `libcuda.so.1`.
///
/// # Errors
/// If the library is missing or is not vgpu's.
pub fn table() -> Result<&'static Table> {
    match TABLE.get_or_init(load) {
        Ok(t) => Ok(t),
        Err(text) => Err(Failure::new(Code::UnhandledCudaError, text.clone())),
    }
}

fn load() -> std::result::Result<Table, String> {
    // SAFETY: the name is a constant C string; the library is the one the program itself loaded, or vgpu's.
    let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
    if library.is_null() {
        return Err("libcuda.so.1 is not there; put vgpu's library folder into LD_LIBRARY_PATH".to_owned());
    }
    let find = |name: &CStr| -> std::result::Result<*mut c_void, String> {
        // SAFETY: `library` is an open handle, the name a constant C string.
        let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
        if symbol.is_null() {
            let name = name.to_string_lossy();
            return Err(format!("libcuda.so.1 has no {name}; this libnccl works with vgpu's libcuda alone"));
        }
        Ok(symbol)
    };
    macro_rules! symbol {
        ($name:literal, $prototype:ty) => {{
            let found = find($name)?;
            // SAFETY: the driver exports this name with the prototype of the table's field (driver/src/private.rs for
            // the vgpu names, cuda.h for the others); a test of the driver compares them.
            unsafe { std::mem::transmute::<*mut c_void, $prototype>(found) }
        }};
    }
    Ok(Table {
        enqueue: symbol!(c"vgpuEnqueue", Enqueue),
        read: symbol!(c"vgpuMemoryRead", Read),
        write: symbol!(c"vgpuMemoryWrite", Write),
        check: symbol!(c"vgpuMemoryCheck", Check),
        synchronize: symbol!(c"cuStreamSynchronize", Synchronize),
        capturing: match find(c"cuStreamIsCapturing") {
            // SAFETY: as in the macro above.
            Ok(found) => Some(unsafe { std::mem::transmute::<*mut c_void, Capturing>(found) }),
            Err(_) => None,
        },
        device: symbol!(c"vgpuStreamDevice", Device),
        retain: symbol!(c"cuDevicePrimaryCtxRetain", Retain),
        release: symbol!(c"cuDevicePrimaryCtxRelease_v2", ReleasePrimary),
        context: symbol!(c"cuCtxGetCurrent", GetContext),
        set_context: symbol!(c"cuCtxSetCurrent", SetContext),
        uuid: symbol!(c"cuDeviceGetUuid_v2", Uuid),
        alloc: symbol!(c"cuMemAlloc_v2", Alloc),
        free: symbol!(c"cuMemFree_v2", Free),
    })
}

impl Table {
    /// Device of the current context, and the context; none without one.
    pub fn current(&self) -> Option<(c_int, Context)> {
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: both pointers lead to locals; the null stream is that of the current context.
        let found = unsafe {
            (self.context)(&mut context) == 0
                && !context.is_null()
                && (self.device)(std::ptr::null_mut(), &mut device) == 0
        };
        found.then_some((device, Context(context)))
    }

    /// Retains a device's primary context.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn primary(&self, device: c_int) -> Result<Context> {
        let mut context = std::ptr::null_mut();
        // SAFETY: the pointer leads to a local.
        match unsafe { (self.retain)(&mut context, device) } {
            0 => Ok(Context(context)),
            e => Err(Failure::argument(format!("device {device}: cuDevicePrimaryCtxRetain gives error {e}"))),
        }
    }

    /// Makes `context` current while the result lives.
    pub fn within(&self, context: Context) -> Within<'_> {
        let mut before = std::ptr::null_mut();
        // SAFETY: the pointer leads to a local; the driver validates the context.
        unsafe {
            (self.context)(&mut before);
            (self.set_context)(context.0);
        }
        Within { table: self, before: Context(before) }
    }

    /// Identity of a device; zero if the driver gives none.
    pub fn uuid_of(&self, device: c_int) -> [u8; 16] {
        let mut uuid = [0; 16];
        // SAFETY: the pointer leads to a local of the right type.
        if unsafe { (self.uuid)(&mut uuid, device) } != 0 {
            return [0; 16];
        }
        uuid
    }

    /// Whether the stream records a graph.
    pub fn is_capturing(&self, stream: Stream) -> Result<bool> {
        let Some(capturing) = self.capturing else {
            return Ok(false);
        };
        let mut status = 0;
        // SAFETY: the pointer leads to a local; the driver validates the stream by its table.
        match unsafe { capturing(stream.0, &mut status) } {
            0 => Ok(status != 0),
            e => Err(Failure::new(
                Code::UnhandledCudaError,
                format!("stream {:p}: cuStreamIsCapturing gives error {e}; is the handle valid?", stream.0),
            )),
        }
    }
}

/// `CUcontext`, never followed here.
#[derive(Clone, Copy, Debug)]
pub struct Context(pub *mut c_void);

// SAFETY: the value is a handle that only the driver interprets, and the driver takes it from any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// Gives the thread its context back.
pub struct Within<'a> {
    table: &'a Table,
    before: Context,
}

impl Drop for Within<'_> {
    fn drop(&mut self) {
        // SAFETY: the driver validates the context, which was current before.
        unsafe { (self.table.set_context)(self.before.0) };
    }
}
