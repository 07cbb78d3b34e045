//! Shared libraries looked for at run time, so that the program starts where they are missing, and says which file it found.

use std::ffi::{CStr, CString, OsStr, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

/// A shared library that stays loaded until the process ends.
pub struct Library {
    handle: NonNull<c_void>,
    path: PathBuf,
}

// SAFETY: a handle of the dynamic loader may be used from any thread, and it is never closed.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// Loads a file by path, or by a bare name that the loader looks for. `probe` is a function the library must have.
    ///
    /// # Errors
    /// The loader's own words.
    pub fn open(name: &Path, probe: &CStr) -> Result<Self, String> {
        let c_name = CString::new(name.as_os_str().as_bytes())
            .map_err(|_| format!("{}: zero byte in a path", name.display()))?;
        // SAFETY: the name is a C string. Code that runs when a library is loaded is that of the user's system.
        let handle = unsafe { libc::dlopen(c_name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        let handle = NonNull::new(handle).ok_or_else(last_error)?;
        let mut library = Self { handle, path: name.into() };
        let symbol = library
            .symbol(probe)
            .ok_or_else(|| format!("{}: it has no function {}", name.display(), probe.to_string_lossy()))?;
        library.path = file_of(symbol).unwrap_or_else(|| name.into());
        Ok(library)
    }

    /// The first of several names that loads.
    pub fn open_any<S: AsRef<OsStr>>(names: &[S], probe: &CStr) -> Option<Self> {
        names.iter().find_map(|n| Self::open(Path::new(n), probe).ok())
    }

    /// The file it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The address of a function.
    pub fn symbol(&self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: the handle is of a library that stays loaded, the name a C string.
        NonNull::new(unsafe { libc::dlsym(self.handle.as_ptr(), name.as_ptr()) })
    }
}

/// What the loader says about its last failure.
fn last_error() -> String {
    // SAFETY: `dlerror` gives null or a C string of this thread that is valid until the next call.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            return "the loader gives no reason".into();
        }
        CStr::from_ptr(text).to_string_lossy().into_owned()
    }
}

/// The file that holds a function, links resolved.
fn file_of(symbol: NonNull<c_void>) -> Option<PathBuf> {
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: `info` is writable memory of the right type.
    let found = unsafe { libc::dladdr(symbol.as_ptr(), info.as_mut_ptr()) };
    // SAFETY: all zeros is a valid `Dl_info`, and `dladdr` may have filled it.
    let info = unsafe { info.assume_init() };
    if found == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the loader's name of a loaded file: a C string that lives as long as the library.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    let path = Path::new(OsStr::from_bytes(name.to_bytes()));
    Some(path.canonicalize().unwrap_or_else(|_| path.into()))
}

/// Names under which a library is looked for: its development link first, then with version numbers, as cudarc does.
pub fn names(stem: &str, versions: &[u32]) -> Vec<String> {
    let mut names = vec![format!("lib{stem}.so")];
    names.extend(versions.iter().map(|v| format!("lib{stem}.so.{v}")));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_found_with_its_file_and_a_missing_one_says_why() {
        let c = Library::open(Path::new("libc.so.6"), c"malloc").unwrap();
        assert!(c.path().is_absolute() && c.path().is_file(), "{}", c.path().display());
        assert!(c.symbol(c"free").is_some() && c.symbol(c"no_such_function").is_none());
        let e = Library::open(Path::new("libno_such.so.9"), c"f").err().unwrap();
        assert!(e.contains("libno_such.so.9"), "{e}");
        let e = Library::open(Path::new("libc.so.6"), c"no_such_function").err().unwrap();
        assert!(e.contains("no_such_function"), "{e}");
        assert!(Library::open_any(&["libno_such.so", "libc.so.6"], c"malloc").is_some());
        assert_eq!(names("cuda", &[1]), ["libcuda.so", "libcuda.so.1"]);
    }
}
