//! What a test needs of the machine, or a visible line that it was skipped and why.

use std::io::Write;
use std::path::PathBuf;

use ringtune::cuda::nvrtc::Nvrtc;
use ringtune::cuda::{Cuda, device_library};

use crate::sums::Sums;

/// Says that a test is skipped: on stderr, and in the file that `RINGTUNE_SKIP_LOG` names, from which `make test` counts.
///
/// # Panics
/// With `RINGTUNE_NO_SKIP=1`.
pub fn skipped(reason: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_string();
    let line = format!("skipped: cuda {name}: {reason}");
    assert!(!std::env::var("RINGTUNE_NO_SKIP").is_ok_and(|v| v == "1"), "RINGTUNE_NO_SKIP=1 and {line}");
    eprintln!("{line}");
    if let Some(path) = std::env::var_os("RINGTUNE_SKIP_LOG") {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        let _ = file.unwrap().write_all(format!("{line}\n").as_bytes());
    }
}

/// NVRTC, or `None` after a line.
pub fn nvrtc() -> Option<&'static Nvrtc> {
    Nvrtc::get().map_err(|e| skipped(&e.to_string())).ok()
}

/// The program under test: that of cargo, or `RINGTUNE_TEST_PROGRAM` where the tests run on a machine they were not built on.
pub fn program() -> PathBuf {
    std::env::var_os("RINGTUNE_TEST_PROGRAM").map_or_else(|| env!("CARGO_BIN_EXE_ringtune").into(), PathBuf::from)
}

/// Where the tests keep what they compile: `RINGTUNE_TEST_DIR`, or a folder of cargo's.
pub fn scratch() -> PathBuf {
    std::env::var_os("RINGTUNE_TEST_DIR").map_or_else(|| env!("CARGO_TARGET_TMPDIR").into(), PathBuf::from)
}

/// The folder that `tests/data` and `data/demo` lie in: the repository, or the current one where that is not there.
pub fn root() -> PathBuf {
    let built = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    if built.join("tests/data").is_dir() { built } else { std::env::current_dir().unwrap() }
}

/// Device 0, or `None` after a line. Its compiled kernels are kept beside the test programs.
pub fn device() -> Option<Cuda> {
    if let Err(e) = device_library::require() {
        skipped(&e.to_string());
        return None;
    }
    // Kernels that were compiled ahead need none.
    if std::env::var_os("RINGTUNE_KERNELS").is_none() {
        nvrtc()?;
    }
    match Cuda::count().unwrap() {
        0 => {
            skipped("the driver sees no GPU");
            None
        }
        // From here on a failure is one.
        _ => Some(Cuda::with_cache(0, Some(&scratch())).unwrap()),
    }
}

/// How the device adds products of bf16 up: the emulator as `VGPU_MMA` says, a GPU as was measured on others of its architecture.
pub fn sums(dev: &Cuda) -> Sums {
    let p = dev.properties();
    let named = std::env::var("VGPU_MMA").ok().filter(|_| p.emulated);
    match named.as_deref() {
        Some("ampere") => Sums::Cut { group: 8, extra: 1 },
        Some("hopper") => Sums::Cut { group: 16, extra: 2 },
        _ if p.emulated => Sums::Rounded,
        _ if p.cc < 90 => Sums::Cut { group: 8, extra: 1 },
        _ => Sums::Cut { group: 16, extra: 2 },
    }
}
