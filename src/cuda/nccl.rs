//! NCCL, the library of collectives between GPUs: whether it is there and which.

use std::ffi::c_int;
use std::path::PathBuf;

use super::library::{Library, names, pip_folders};

/// What to do where there is none.
pub const HOW_TO_GET: &str = "needed for several GPUs only; install libnccl2 and libnccl-dev, or put the folder of libnccl.so (the packages \
                              nvidia-nccl-cu13 and nvidia-nccl-cu12 of PyPI have libnccl.so.2; link it as libnccl.so) into LD_LIBRARY_PATH";

/// What was found.
pub enum Found {
    /// A library that can be used, and its version.
    Usable(PathBuf, Option<String>),
    /// Only `libnccl.so.2`, a name that cudarc never tries: runtime packages come without the link `libnccl.so`.
    WithoutLink(PathBuf),
    /// Nothing.
    Missing,
}

/// Looks for NCCL under the names that cudarc tries, then under the one it does not, on the loader's path and in packages of pip.
pub fn find() -> Found {
    if let Some(library) = Library::open_any(&names("nccl", &[12, 11, 10, 9, 1]), c"ncclGetVersion") {
        return Found::Usable(library.path().into(), version(&library));
    }
    let mut runtime = vec![PathBuf::from("libnccl.so.2")];
    runtime.extend(pip_folders(&["nccl/lib"]).into_iter().map(|(_, folder)| folder.join("libnccl.so.2")));
    match Library::open_any(&runtime, c"ncclGetVersion") {
        Some(library) => Found::WithoutLink(library.path().into()),
        None => Found::Missing,
    }
}

/// `major.minor.patch`.
fn version(library: &Library) -> Option<String> {
    let symbol = library.symbol(c"ncclGetVersion")?;
    let mut code: c_int = 0;
    // SAFETY: nccl.h gives this function this signature; it needs no initialisation.
    let status = unsafe {
        let f = std::mem::transmute::<std::ptr::NonNull<std::ffi::c_void>, extern "C" fn(*mut c_int) -> c_int>(symbol);
        f(&raw mut code)
    };
    // NCCL_VERSION of nccl.h: major * 10000 + minor * 100 + patch from 2.9 on, before that major * 1000.
    let unit = if code >= 10_000 { 10_000 } else { 1000 };
    (status == 0).then(|| format!("{}.{}.{}", code / unit, code % unit / 100, code % 100))
}
