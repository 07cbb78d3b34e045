//! Runs a test in a child process that finds our libraries: the loader reads its path when a process starts.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Says to a child which call of [`inside`] in its test is meant.
const INSIDE: &str = "VGPU_TEST_INSIDE";

thread_local! {
    static TURN: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// A folder that holds libcuda and libnccl under the names that programs look for, and nothing else.
fn library_folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nccl-lib");
        std::fs::create_dir_all(&folder).unwrap();
        for (built, names) in
            [("libvgpu_cuda.so", ["libcuda.so", "libcuda.so.1"]), ("libvgpu_nccl.so", ["libnccl.so", "libnccl.so.2"])]
        {
            let built = std::env::current_exe().unwrap().with_file_name(built);
            assert!(built.exists(), "{} is missing: cargo builds it with the tests", built.display());
            for name in names {
                // Tests run at the same time: a link is made under its own name and moved into place.
                let own = folder.join(format!("{name}.{}", std::process::id()));
                let _ = std::fs::remove_file(&own);
                std::os::unix::fs::symlink(&built, &own).unwrap();
                std::fs::rename(&own, folder.join(name)).unwrap();
            }
        }
        folder
    })
}

/// What a child process did.
pub struct Ran {
    /// Standard error.
    pub err: String,
    /// Standard output.
    pub out: String,
}

/// Runs `body` in a child with this environment and gives back what it wrote; the test's name is that of the current thread.
/// In the child itself this runs `body`, if it is the same call, and gives `None`, so what follows checks in the parent only.
pub fn inside(env: &[(&str, &str)], body: impl FnOnce()) -> Option<Ran> {
    let turn = TURN.with(|t| t.replace(t.get() + 1)).to_string();
    if let Ok(mine) = std::env::var(INSIDE) {
        if mine == turn {
            body();
        }
        return None;
    }
    let thread = std::thread::current();
    let name = thread.name().expect("tests have named threads").to_owned();
    let mut c = Command::new(std::env::current_exe().unwrap());
    c.args([&name, "--exact", "--nocapture", "--test-threads=1"]);
    for (key, _) in std::env::vars().filter(|(k, _)| k.starts_with("VGPU_")) {
        c.env_remove(key);
    }
    c.env(INSIDE, turn).env("LD_LIBRARY_PATH", library_folder()).envs(env.iter().copied());
    let Output { status, stdout, stderr } = c.output().unwrap();
    let ran = Ran { err: String::from_utf8_lossy(&stderr).into(), out: String::from_utf8_lossy(&stdout).into() };
    assert!(status.success(), "{name} in a child with {env:?}: {status}\n{}\n{}", ran.out, ran.err);
    assert!(ran.out.contains("1 passed"), "{name}: no test ran in the child\n{}", ran.out);
    Some(ran)
}
