//! Runs `ringrun` with the program under test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use crate::runs::MODEL;

/// The launcher, beside the program under test. It is another package's: cargo builds it first where it is missing or older than its
/// sources.
pub fn ringrun() -> PathBuf {
    let beside = Path::new(env!("CARGO_BIN_EXE_ringtune")).parent().unwrap();
    let path = beside.join("ringrun");
    let files = ["launcher/src", "launcher/src/hub"].into_iter().flat_map(|dir| std::fs::read_dir(dir).unwrap());
    let sources = files.map(|e| e.unwrap().metadata().unwrap().modified().unwrap());
    let newest = sources.max().unwrap();
    // What cargo finds fresh keeps its time, so a file beside it says when cargo was asked last.
    let asked = beside.join("ringrun.asked");
    let modified = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    let built = if path.is_file() { modified(&path).max(modified(&asked)) } else { SystemTime::UNIX_EPOCH };
    if built < newest {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--release", "--package", "ringtune", "--package", "launcher", "--bin", "ringrun"]);
        if cfg!(feature = "mpi") {
            // As the tests were built: other features would build every dependency again.
            cargo.args(["--features", "ringtune/mpi"]);
        }
        let status = cargo.arg("--target-dir").arg(beside.parent().unwrap()).status().unwrap();
        assert!(status.success(), "cargo cannot build ringrun");
        std::fs::write(asked, "").unwrap();
    }
    path
}

/// A fine-tuning of `steps` steps with a step of four micro-batches, in a folder with `rows.jsonl`.
pub struct Training<'a> {
    /// The folder.
    pub dir: &'a Path,
    /// Its steps.
    pub steps: u64,
    /// Micro-batches of a step over all ranks.
    pub micro_batches: usize,
    /// More flags.
    pub flags: Vec<&'a str>,
    /// What is trained.
    pub model: &'a str,
    /// Rows of a micro-batch.
    pub micro_batch: usize,
}

impl<'a> Training<'a> {
    /// LoRA with dropout, packed rows, evaluations, checkpoints; the rows make steps at an epoch's end that are not full.
    pub fn new(dir: &'a Path, steps: u64) -> Self {
        Self { dir, steps, micro_batches: 4, flags: Vec::new(), model: MODEL, micro_batch: 2 }
    }

    /// The words after `ringtune`, for this number of ranks.
    pub fn words(&self, out: &str, ranks: usize) -> Vec<String> {
        let accumulation = (self.micro_batches / ranks).to_string();
        let (steps, micro_batch) = (self.steps.to_string(), self.micro_batch.to_string());
        let at = |name: &str| self.dir.join(name).display().to_string();
        let (rows, cache, out) = (at("rows.jsonl"), at("cache"), at(out));
        let words = [
            ["--model_path", self.model],
            ["--max_steps", &steps],
            ["--save_steps", "3"],
            ["--eval_steps", "4"],
            ["--max_seq_len", "64"],
            ["--per_device_train_batch_size", &micro_batch],
            ["--gradient_accumulation_steps", &accumulation],
            ["--learning_rate", "5e-3"],
            ["--threads", "1"],
            ["--dataset_paths", &rows],
            ["--cache_dir", &cache],
            ["--output_dir", &out],
        ];
        let words =
            words.iter().flatten().copied().chain(["--quiet", "--no-tensorboard"]).chain(self.flags.iter().copied());
        ["sft"].into_iter().chain(words).map(String::from).collect()
    }

    /// The program alone.
    pub fn alone(&self, out: &str) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_ringtune"));
        c.args(self.words(out, 1));
        piped(c)
    }

    /// The program alone, as one of two ranks.
    pub fn two(&self, out: &str) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_ringtune"));
        c.args(self.words(out, 2));
        piped(c)
    }

    /// On several ranks, with more words for ringrun.
    pub fn ranks(&self, out: &str, ranks: usize, words: &[&str]) -> Command {
        let mut c = Command::new(ringrun());
        c.args(["-n", &ranks.to_string(), "--oversubscribe"]).args(words);
        c.arg("ringtune").args(self.words(out, ranks));
        piped(c)
    }
}

fn piped(mut c: Command) -> Command {
    c.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    c
}

/// Runs it to its end.
pub fn run(mut command: Command) -> (Option<i32>, String) {
    let output: Output = command.output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Runs it and asks for success.
pub fn succeed(command: Command) {
    let (code, stderr) = run(command);
    assert_eq!(code, Some(0), "{stderr}");
}

/// Processes whose command line has this text; our own is not among them.
pub fn processes(text: &str) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(text) && pid != std::process::id() {
            found.push((pid, line));
        }
    }
    found
}

/// Waits until something is so, for a minute at most.
pub fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until the run has logged so many lines.
pub fn wait_for_lines(child: &mut Child, out: &Path, lines: usize) {
    let logged = || std::fs::read_to_string(out.join("metrics.jsonl")).map_or(0, |t| t.lines().count());
    wait_until("the run logs its steps", || {
        assert!(child.try_wait().unwrap().is_none(), "the run ended early");
        logged() >= lines
    });
}
