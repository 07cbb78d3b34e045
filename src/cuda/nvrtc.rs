//! NVRTC, the run-time compiler for CUDA C++: where it is, and one function that compiles.
//!
//! Its functions are called through our own table and not through cudarc, which looks for a library by bare names alone: it would
//! take a `libnvrtc.so` of the system although the user named another, and panics where there is none.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::OnceLock;

use super::library::{Library, names, pip_folders};
use crate::dirs;
use crate::error::{Error, Result};

/// The folder of the user's cache that `make bootstrap` fills.
pub const CACHED: &str = "nvrtc-12.9.86";

/// What to do where there is none.
pub const HOW_TO_GET: &str = "`make bootstrap` fetches it in a checkout; or install the CUDA toolkit, or with pip the package \
                              nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12; or set RINGTUNE_NVRTC to the file libnvrtc.so.13 \
                              or libnvrtc.so.12 or its folder; or give kernels compiled elsewhere by `ringtune kernels` in RINGTUNE_KERNELS";

type Program = *mut c_void;

macro_rules! functions {
    ($($name:ident = $symbol:literal: fn($($arg:ty),*);)+) => {
        /// The functions in use, with the signatures of nvrtc.h; each returns a code, 0 for success.
        struct Functions { $($name: unsafe extern "C" fn($($arg),*) -> c_int,)+ }

        impl Functions {
            fn of(library: &Library) -> Result<Self, String> {
                $(
                    let symbol = library
                        .symbol($symbol)
                        .ok_or_else(|| format!("it has no function {}", $symbol.to_string_lossy()))?;
                    // SAFETY: the library is NVRTC (it has nvrtcVersion), whose header gives this function this signature.
                    let $name = unsafe {
                        std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn($($arg),*) -> c_int>(symbol)
                    };
                )+
                Ok(Self { $($name),+ })
            }
        }
    };
}

functions! {
    version = c"nvrtcVersion": fn(*mut c_int, *mut c_int);
    n_archs = c"nvrtcGetNumSupportedArchs": fn(*mut c_int);
    archs = c"nvrtcGetSupportedArchs": fn(*mut c_int);
    create = c"nvrtcCreateProgram": fn(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char);
    destroy = c"nvrtcDestroyProgram": fn(*mut Program);
    compile = c"nvrtcCompileProgram": fn(Program, c_int, *const *const c_char);
    log_size = c"nvrtcGetProgramLogSize": fn(Program, *mut usize);
    log = c"nvrtcGetProgramLog": fn(Program, *mut c_char);
    ptx_size = c"nvrtcGetPTXSize": fn(Program, *mut usize);
    ptx = c"nvrtcGetPTX": fn(Program, *mut c_char);
    cubin_size = c"nvrtcGetCUBINSize": fn(Program, *mut usize);
    cubin = c"nvrtcGetCUBIN": fn(Program, *mut c_char);
}

/// The loaded compiler.
pub struct Nvrtc {
    library: Library,
    functions: Functions,
    version: (i32, i32),
    archs: Vec<u32>,
    origin: String,
}

/// What a compilation gave.
pub struct Compiled {
    /// PTX text, without its final zero.
    pub ptx: Vec<u8>,
    /// Machine code; empty where the architecture was a virtual one.
    pub cubin: Vec<u8>,
    /// Warnings, and what ptxas reports.
    pub log: String,
}

/// A place where NVRTC may be, and why it is looked at.
fn places() -> Result<Vec<(String, PathBuf)>> {
    let file_names = names("nvrtc", &[13, 12, 11]);
    let inside = |origin: &str, folder: &Path| -> Vec<(String, PathBuf)> {
        file_names.iter().map(|n| (origin.to_string(), folder.join(n))).collect()
    };
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(path) = var("RINGTUNE_NVRTC") {
        // Named by the user: nothing else will do.
        if !path.exists() {
            return Err(Error::new(format!("RINGTUNE_NVRTC={}: no such file or folder; {HOW_TO_GET}", path.display())));
        }
        return Ok(match path.is_dir() {
            true => inside("RINGTUNE_NVRTC", &path),
            false => vec![("RINGTUNE_NVRTC".into(), path)],
        });
    }
    let mut places: Vec<(String, PathBuf)> =
        file_names.iter().map(|n| ("the loader's path".to_string(), PathBuf::from(n))).collect();
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(root) = var(name) {
            for folder in ["lib64", "lib"] {
                places.extend(inside(name, &root.join(folder)));
            }
        }
    }
    // NVIDIA's name for servers of Arm is sbsa.
    let own = if cfg!(target_arch = "aarch64") { "targets/sbsa-linux/lib" } else { "targets/x86_64-linux/lib" };
    for folder in ["lib64", "lib", own] {
        places.extend(inside("/usr/local/cuda", &Path::new("/usr/local/cuda").join(folder)));
    }
    for (origin, folder) in pip_folders(&["cu13/lib", "cuda_nvrtc/lib"]) {
        places.extend(inside(&origin, &folder));
    }
    if let Some(cache) = dirs::user_cache() {
        places.extend(inside("the user's cache", &cache.join(CACHED).join("lib")));
    }
    Ok(places)
}

/// Whether the library of builtins, which NVRTC loads by itself, lies beside it, links resolved.
fn has_builtins(nvrtc: &Path) -> bool {
    let real = nvrtc.canonicalize().unwrap_or_else(|_| nvrtc.to_path_buf());
    [nvrtc, &real]
        .into_iter()
        .filter_map(|p| std::fs::read_dir(p.parent()?).ok())
        .flatten()
        .any(|entry| entry.is_ok_and(|e| e.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so")))
}

impl Nvrtc {
    /// The compiler of this process: the first that loads of `RINGTUNE_NVRTC` (a file or folder, and then nothing else), the
    /// loader's path, `CUDA_HOME` and `CUDA_PATH`, `/usr/local/cuda`, the packages of pip and conda, and the user's cache.
    ///
    /// # Errors
    /// If there is none, or the one that `RINGTUNE_NVRTC` names does not load.
    pub fn get() -> Result<&'static Self> {
        static FOUND: OnceLock<Result<Nvrtc, String>> = OnceLock::new();
        let found = FOUND.get_or_init(|| Self::find().map_err(|e| e.to_string()));
        found.as_ref().map_err(|e| Error::new(e.clone()))
    }

    fn find() -> Result<Self> {
        let mut why = Vec::new();
        for (origin, path) in places()? {
            // A path that does not exist is not worth a line; a bare name is the loader's business.
            if path.components().count() > 1 && !path.exists() {
                continue;
            }
            // Without its builtins beside it NVRTC loads and then compiles nothing.
            if origin != "RINGTUNE_NVRTC" && path.components().count() > 1 && !has_builtins(&path) {
                why.push(format!("{}: no libnvrtc-builtins beside it", path.display()));
                continue;
            }
            match Library::open(&path, c"nvrtcVersion").and_then(|library| Self::of(library, origin)) {
                Ok(nvrtc) => return Ok(nvrtc),
                Err(e) if path.components().count() > 1 => why.push(e),
                Err(_) => {}
            }
        }
        let why = if why.is_empty() { String::new() } else { format!(" ({})", why.join("; ")) };
        Err(Error::new(format!("NVRTC, the compiler for CUDA kernels, was not found{why}; {HOW_TO_GET}")))
    }

    fn of(library: Library, origin: String) -> Result<Self, String> {
        let functions = Functions::of(&library)?;
        let (mut major, mut minor, mut n) = (0, 0, 0);
        // SAFETY: both point to integers.
        let code = unsafe { (functions.version)(&raw mut major, &raw mut minor) };
        // SAFETY: it points to an integer.
        let archs_code = unsafe { (functions.n_archs)(&raw mut n) };
        if code != 0 || archs_code != 0 || n <= 0 {
            return Err(format!("{}: it gives no version", library.path().display()));
        }
        let mut archs = vec![0; n as usize];
        // SAFETY: the array has as many integers as the library says it will write.
        if unsafe { (functions.archs)(archs.as_mut_ptr()) } != 0 {
            return Err(format!("{}: it gives no architectures", library.path().display()));
        }
        Ok(Self {
            library,
            functions,
            version: (major, minor),
            archs: archs.into_iter().map(|a| a as u32).collect(),
            origin,
        })
    }

    /// The file it was loaded from.
    pub fn path(&self) -> &Path {
        self.library.path()
    }

    /// Which of the places it was found in.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// (major, minor).
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compute capabilities it compiles for, as major · 10 + minor, ascending.
    pub fn archs(&self) -> &[u32] {
        &self.archs
    }

    /// Compiles one source text. `name` stands in messages.
    ///
    /// # Errors
    /// The compiler's log, as it is.
    pub fn compile(&self, name: &str, source: &str, options: &[String]) -> Result<Compiled, String> {
        let text = |s: &str| CString::new(s).map_err(|_| "a zero byte in source or options".to_string());
        let (name, source) = (text(name)?, text(source)?);
        let mut options: Vec<CString> = options.iter().map(|o| text(o)).collect::<Result<_, _>>()?;
        // From 12.9 on NVRTC keeps a cache of its own and asks the driver for it; ours knows more about what decides a result.
        if self.version >= (12, 9) {
            options.push(c"--no-cache".into());
        }
        let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program = ProgramGuard(self, std::ptr::null_mut());
        // SAFETY: all strings are C strings that live until the program is destroyed; there are no headers.
        let code = unsafe {
            (self.functions.create)(
                &raw mut program.1,
                source.as_ptr(),
                name.as_ptr(),
                0,
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        if code != 0 {
            return Err(format!("nvrtcCreateProgram gives code {code}"));
        }
        // SAFETY: a live program, and as many C strings as the count says.
        let code = unsafe { (self.functions.compile)(program.1, options.len() as c_int, options.as_ptr()) };
        let log = self.bytes(program.1, self.functions.log_size, self.functions.log)?;
        let log = String::from_utf8_lossy(without_zero(&log)).trim_end().to_string();
        if code != 0 {
            return Err(match log.is_empty() {
                true => format!("nvrtcCompileProgram gives code {code}"),
                false => log,
            });
        }
        let ptx = self.bytes(program.1, self.functions.ptx_size, self.functions.ptx)?;
        Ok(Compiled {
            ptx: without_zero(&ptx).to_vec(),
            cubin: self.bytes(program.1, self.functions.cubin_size, self.functions.cubin)?,
            log,
        })
    }

    /// A result of a program: its size, then its bytes.
    fn bytes(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, String> {
        let mut n = 0;
        // SAFETY: a live program and a pointer to an integer.
        if unsafe { size(program, &raw mut n) } != 0 {
            return Err("NVRTC gives no size of a result".into());
        }
        let mut bytes = vec![0u8; n];
        // SAFETY: the buffer has as many bytes as the library asked for.
        if n > 0 && unsafe { get(program, bytes.as_mut_ptr().cast()) } != 0 {
            return Err("NVRTC gives no result".into());
        }
        Ok(bytes)
    }
}

fn without_zero(bytes: &[u8]) -> &[u8] {
    bytes.strip_suffix(&[0]).unwrap_or(bytes)
}

/// A program that is destroyed when it goes out of use.
struct ProgramGuard<'a>(&'a Nvrtc, Program);

impl Drop for ProgramGuard<'_> {
    fn drop(&mut self) {
        if !self.1.is_null() {
            // SAFETY: a live program that nothing uses any more. A failure would leave memory behind, no more.
            let _ = unsafe { (self.0.functions.destroy)(&raw mut self.1) };
        }
    }
}
