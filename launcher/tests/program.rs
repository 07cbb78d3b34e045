//! Runs `ringrun` in a folder of its own.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What it printed and how it ended.
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// The last line of stderr.
    pub fn last(&self) -> &str {
        self.stderr.lines().last().unwrap_or_default()
    }
}

/// `ringrun` with these words.
pub fn ringrun(words: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_ringrun"));
    // What other launchers left in the environment of the tests must not matter.
    for (name, _) in std::env::vars() {
        if ["SLURM_", "OMPI_", "PMI", "RINGTUNE_"].iter().any(|p| name.starts_with(p)) {
            c.env_remove(name);
        }
    }
    c.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    c
}

pub fn outcome(child: Child) -> Outcome {
    let output = child.wait_with_output().unwrap();
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs it with a shell as the program of each rank.
pub fn shell(words: &[&str], script: &str) -> Outcome {
    outcome(ringrun(&[words, &["sh", "-c", script]].concat()).spawn().unwrap())
}

pub fn signal(pid: u32, signal: i32) {
    // SAFETY: the process is one that the test started and has not waited for.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

/// Waits until something is so, for a minute at most.
pub fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether so many files with these names are in a folder.
pub fn files(dir: &Path, prefix: &str) -> usize {
    let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|n| n.starts_with(prefix)).count()
}

/// Processes whose command line has this text.
pub fn processes(text: &str) -> usize {
    let lines =
        std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| std::fs::read(e.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).contains(text)).count()
}
