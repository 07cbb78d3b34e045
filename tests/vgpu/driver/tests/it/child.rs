//! Runs a test in a child process that finds our libcuda: the loader reads its path when a process starts.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

const INSIDE: &str = "VGPU_TEST_INSIDE";

/// A folder that holds libcuda.so and libcuda.so.1 and nothing else.
pub fn library_folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let built = std::env::current_exe().unwrap().with_file_name("libvgpu_cuda.so");
        assert!(built.exists(), "{} is missing: cargo builds it with the tests", built.display());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lib");
        std::fs::create_dir_all(&folder).unwrap();
        for name in ["libcuda.so", "libcuda.so.1"] {
            // Tests run at the same time: a link is made under its own name and moved into place.
            let own = folder.join(format!("{name}.{}", std::process::id()));
            let _ = std::fs::remove_file(&own);
            std::os::unix::fs::symlink(&built, &own).unwrap();
            std::fs::rename(&own, folder.join(name)).unwrap();
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
/// In the child itself this runs `body` and gives `None`, so what follows checks in the parent only.
pub fn inside(env: &[(&str, &str)], body: impl FnOnce()) -> Option<Ran> {
    if std::env::var_os(INSIDE).is_some() {
        body();
        return None;
    }
    let thread = std::thread::current();
    let name = thread.name().expect("tests have named threads").to_owned();
    let mut c = Command::new(std::env::current_exe().unwrap());
    c.args([&name, "--exact", "--nocapture", "--test-threads=1"]);
    for (key, _) in std::env::vars().filter(|(k, _)| k.starts_with("VGPU_")) {
        c.env_remove(key);
    }
    c.env(INSIDE, "1").env("LD_LIBRARY_PATH", library_folder()).envs(env.iter().copied());
    let Output { status, stdout, stderr } = c.output().unwrap();
    let ran = Ran { err: String::from_utf8_lossy(&stderr).into(), out: String::from_utf8_lossy(&stdout).into() };
    assert!(status.success(), "{name} in a child with {env:?}: {status}\n{}\n{}", ran.out, ran.err);
    assert!(ran.out.contains("1 passed"), "{name}: no test ran in the child\n{}", ran.out);
    Some(ran)
}

/// Runs `body` in a child for each of twelve seeds.
pub fn under_seeds(body: fn()) {
    for seed in 0..12 {
        if inside(&[("VGPU_SEED", &seed.to_string())], body).is_none() {
            return;
        }
    }
}
