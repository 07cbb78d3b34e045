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

/// Folders of NVIDIA's packages from PyPI that are there, such as `nvidia/cu13/lib`: in the site-packages of the virtual environment,
/// of conda's, and of the `python3` on the path. Each with where it comes from.
pub fn pip_folders(parts: &[&str]) -> Vec<(String, PathBuf)> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let mut roots: Vec<(String, PathBuf)> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(|n| Some((n.to_string(), var(n)?))).collect();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let python = std::env::split_paths(&path).map(|dir| dir.join("python3")).find(|p| p.is_file());
    // bin/python3 of an installation, as it is called and as it really lies.
    for python in [python.clone(), python.and_then(|p| p.canonicalize().ok())].into_iter().flatten() {
        roots.extend(python.ancestors().nth(2).map(|root| ("python3".to_string(), root.to_path_buf())));
    }
    roots.extend(var("HOME").map(|home| ("python3".to_string(), home.join(".local"))));
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    for (origin, root) in roots {
        for site in site_packages(&root) {
            for dir in parts.iter().map(|part| site.join("nvidia").join(part)).filter(|dir| dir.is_dir()) {
                if !found.iter().any(|(_, other)| *other == dir) {
                    found.push((format!("packages of {origin}"), dir));
                }
            }
        }
    }
    found
}

/// `lib/python3*/site-packages` and Debian's `dist-packages` of an installation, the newest first.
fn site_packages(root: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for lib in ["lib", "lib64", "local/lib"] {
        let Ok(entries) = std::fs::read_dir(root.join(lib)) else { continue };
        let mut versions: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        versions.retain(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3")));
        let number = |p: &PathBuf| {
            let name = p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            name.rsplit('.').next().and_then(|n| n.parse::<u32>().ok()).unwrap_or(0)
        };
        versions.sort_by_key(|p| std::cmp::Reverse(number(p)));
        all.extend(versions.iter().flat_map(|v| ["site-packages", "dist-packages"].map(|d| v.join(d))));
    }
    all
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

    #[test]
    fn packages_of_an_installation_are_found_newest_first() {
        let root = tempfile::tempdir().unwrap();
        for dir in
            ["lib/python3.9/site-packages", "lib/python3.11/site-packages", "lib/python3/dist-packages", "lib/other"]
        {
            std::fs::create_dir_all(root.path().join(dir).join("nvidia/cu13/lib")).unwrap();
        }
        let found: Vec<PathBuf> = site_packages(root.path()).into_iter().filter(|p| p.is_dir()).collect();
        let expected = ["lib/python3.11/site-packages", "lib/python3.9/site-packages", "lib/python3/dist-packages"];
        assert_eq!(found, expected.map(|p| root.path().join(p)));
    }
}
