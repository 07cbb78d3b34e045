//! The driver's library: whether it is there, which file it is, and what it says about itself. cudarc panics where a library or a
//! function is missing, so this is asked first.

use std::ffi::{CStr, c_char, c_int};
use std::path::Path;
use std::sync::OnceLock;

use super::library::{Library, names};
use crate::error::{Error, Result};

/// CUDA version that the driver has to support: cubins of NVRTC 12.x run from here on.
pub const MIN_CUDA: (i32, i32) = (12, 0);

/// What to do where there is no driver.
pub const HOW_TO_GET: &str =
    "install NVIDIA's driver (525 or newer); in a container, start it with the GPUs (`docker run --gpus all`)";

/// The driver's library of this process, found under the names that cudarc tries, in its order.
pub fn get() -> Option<&'static Library> {
    static FOUND: OnceLock<Option<Library>> = OnceLock::new();
    let open = || Library::open_any(&names("cuda", &[12, 11, 10, 9, 1]), c"cuInit");
    FOUND.get_or_init(open).as_ref()
}

/// The CUDA version the driver supports.
pub fn version() -> Option<(i32, i32)> {
    let symbol = get()?.symbol(c"cuDriverGetVersion")?;
    let mut version = 0;
    // SAFETY: the driver's documentation gives this function this signature; it may be called before cuInit.
    let code = unsafe {
        let f = std::mem::transmute::<std::ptr::NonNull<std::ffi::c_void>, extern "C" fn(*mut c_int) -> c_int>(symbol);
        f(&raw mut version)
    };
    (code == 0).then_some((version / 1000, version % 1000 / 10))
}

/// The driver's library, or why CUDA cannot be used.
///
/// # Errors
/// If there is no driver or it is too old.
pub fn require() -> Result<&'static Path> {
    let library = get()
        .ok_or_else(|| Error::new(format!("cuda: the driver's library libcuda.so.1 was not found; {HOW_TO_GET}")))?;
    if let Some(found) = version().filter(|v| *v < MIN_CUDA) {
        return Err(Error::new(format!(
            "cuda: {}: the driver supports CUDA {}.{}, expected {}.{} or newer; install driver 525 or newer",
            library.path().display(),
            found.0,
            found.1,
            MIN_CUDA.0,
            MIN_CUDA.1
        )));
    }
    Ok(library.path())
}

/// Name and text of an error code as the driver gives them.
pub fn describe(code: u32) -> Option<String> {
    let text = |function: &CStr| -> Option<String> {
        let symbol = get()?.symbol(function)?;
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: the driver's documentation gives both functions this signature; they write a pointer to a string of the library.
        unsafe {
            let f = std::mem::transmute::<
                std::ptr::NonNull<std::ffi::c_void>,
                extern "C" fn(u32, *mut *const c_char) -> c_int,
            >(symbol);
            if f(code, &raw mut text) != 0 || text.is_null() {
                return None;
            }
            Some(CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    match (text(c"cuGetErrorName"), text(c"cuGetErrorString")) {
        (Some(name), Some(words)) => Some(format!("{name} ({words})")),
        (name, words) => name.or(words),
    }
}
