//! The program against kill -9, signals and a full disk: no finished checkpoint is lost, and the resumed run ends in the same bits.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ringtune::checkpoint::manifest;
use ringtune::rng::Stream;

use crate::runs::{MODEL, copy_dir, metrics, rows, same_file};

const WEIGHTS: &str = "adapter_model.safetensors";

fn sft(dir: &Path, out: &Path, steps: u64) -> Command {
    sft_at(dir, out, steps, "5e-3")
}

fn sft_at(dir: &Path, out: &Path, steps: u64, rate: &str) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_ringtune"));
    c.arg("sft")
        .args(["--model_path", MODEL, "--max_steps", &steps.to_string(), "--save_steps", "5", "--eval_steps", "10"])
        .args(["--max_seq_len", "64", "--per_device_train_batch_size", "2", "--lora_r", "4", "--learning_rate", rate])
        .args(["--threads", "1", "--quiet", "--no-tensorboard", "--resume_from_checkpoint", "auto"])
        .arg("--dataset_paths")
        .arg(dir.join("rows.jsonl"))
        .arg("--cache_dir")
        .arg(dir.join("cache"))
        .arg("--output_dir")
        .arg(out)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    c
}

fn run(mut command: Command) -> Output {
    command.output().unwrap()
}

fn succeed(command: Command) {
    let output = run(command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A run that nothing interrupts, and how long it took.
fn reference(dir: &Path, steps: u64) -> (PathBuf, Duration) {
    rows(dir, 60);
    let out = dir.join("reference");
    // Token files are made once, so that the time is that of the later runs.
    succeed(sft(dir, &dir.join("first"), steps));
    let start = Instant::now();
    succeed(sft(dir, &out, steps));
    (out, start.elapsed())
}

#[test]
fn kill_at_20_instants() {
    const STEPS: u64 = 40;
    let dir = tempfile::tempdir().unwrap();
    let (reference, time) = reference(dir.path(), STEPS);
    let seed = 20;
    let at = |i: u64| time.mul_f64(Stream::new(&[seed]).f64_at(i));
    let once = |i: u64| {
        let out = dir.path().join(format!("killed-{i}"));
        let mut child = sft(dir.path(), &out, STEPS).spawn().unwrap();
        std::thread::sleep(at(i));
        child.kill().unwrap();
        child.wait().unwrap();
        // Whatever has a checkpoint's name is whole.
        for (step, path) in manifest::list(&out).unwrap() {
            manifest::verify(&path).unwrap_or_else(|e| panic!("kill {i} of seed {seed}, step {step}: {e}"));
        }
        succeed(sft(dir.path(), &out, STEPS));
        same_file(&reference.join(WEIGHTS), &out.join(WEIGHTS));
        assert_eq!(metrics(&reference), metrics(&out), "kill {i} of seed {seed}, after {:?}", at(i));
        let left: Vec<_> = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!left.iter().any(|n| n.to_string_lossy().ends_with(".tmp")), "left behind: {left:?}");
        std::fs::remove_dir_all(&out).unwrap();
    };
    let once = &once;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2).map(|w| scope.spawn(move || (w..20).step_by(2).for_each(once))).collect();
        workers.into_iter().for_each(|w| w.join().unwrap());
    });
}

/// Waits until the run has logged `steps` steps.
fn wait_for_steps(child: &mut Child, out: &Path, steps: usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let logged = || std::fs::read_to_string(out.join("metrics.jsonl")).map_or(0, |t| t.lines().count());
    while logged() < steps {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before step {steps}");
        assert!(Instant::now() < deadline, "step {steps} was not reached");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: the child is ours and not yet waited for, so its id is not reused.
    let result = unsafe { libc::kill(child.id() as i32, signal) };
    assert_eq!(result, 0);
}

#[test]
fn sigterm_saves_and_a_full_disk_loses_nothing() {
    // Long enough that a busy machine cannot finish it before the signal.
    const STEPS: u64 = 200;
    let dir = tempfile::tempdir().unwrap();
    let (reference, _) = reference(dir.path(), STEPS);
    let out = dir.path().join("out");
    let mut child = sft(dir.path(), &out, STEPS).spawn().unwrap();
    wait_for_steps(&mut child, &out, 7);
    signal(&child, libc::SIGTERM);
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(75), "{stderr}");
    assert!(stderr.contains("SIGTERM") && stderr.contains("--resume-from-checkpoint auto"), "{stderr}");
    let saved = manifest::list(&out).unwrap();
    let (step, newest) = saved.last().unwrap().clone();
    assert!((7..STEPS).contains(&step), "saved at step {step}");

    // No file may grow beyond 100 KiB: the next checkpoint cannot be written.
    let line = sft(dir.path(), &out, STEPS);
    let mut full = Command::new("bash");
    full.args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$0\" \"$@\""]).arg(line.get_program()).args(line.get_args());
    let output = run(full);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("full"), "{stderr}");
    assert_eq!(manifest::list(&out).unwrap(), saved);
    manifest::verify(&newest).unwrap();

    succeed(sft(dir.path(), &out, STEPS));
    same_file(&reference.join(WEIGHTS), &out.join(WEIGHTS));
    assert_eq!(metrics(&reference), metrics(&out));
}

/// While rows are tokenised there is nothing to save: the first signal ends the program.
#[test]
fn a_signal_before_the_first_step_ends_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let row =
        |i: u32| format!("{{\"prompt\": \"what is {i}?\", \"response\": \"{}\"}}\n", "a word and another ".repeat(20));
    std::fs::write(dir.path().join("rows.jsonl"), (0..200_000).map(row).collect::<String>()).unwrap();
    for (name, number, bit) in [("SIGINT", libc::SIGINT, 1), ("SIGTERM", libc::SIGTERM, 14)] {
        let mut child = sft(dir.path(), &dir.path().join("out"), 2).spawn().unwrap();
        let status = format!("/proc/{}/status", child.id());
        let caught = || {
            let text = std::fs::read_to_string(&status).unwrap_or_default();
            let mask = text
                .lines()
                .find_map(|l| l.strip_prefix("SigCgt:").map(|m| u64::from_str_radix(m.trim(), 16).unwrap()));
            mask.unwrap_or(0) >> bit & 1 == 1
        };
        while !caught() {
            assert!(child.try_wait().unwrap().is_none(), "the run ended at once");
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(200));
        let sent = Instant::now();
        signal(&child, number);
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(sent.elapsed() < Duration::from_secs(2), "{:?}: {stderr}", sent.elapsed());
        assert_eq!(output.status.code(), Some(75), "{stderr}");
        assert!(stderr.contains(&format!("stopped by {name} before the first step")), "{stderr}");
        assert!(!dir.path().join("out/checkpoint-1").exists());
        assert_eq!(names(&dir.path().join("cache")), Vec::<String>::new());
    }
}

/// Names in a folder, in order; none where there is no folder.
fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut all: Vec<String> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    all.sort();
    all
}

/// A signal in the middle of a file that is being written leaves what was there, and nothing under a temporary name.
#[test]
fn a_signal_leaves_no_temporary_file() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("base")).unwrap();
    copy_dir(Path::new(MODEL), &dir.path().join("base"));
    copy_dir(Path::new("tests/data/golden/tiny-llama-tied/adapter_all"), &dir.path().join("adapter"));
    let merge = || {
        let mut merge = Command::new(env!("CARGO_BIN_EXE_ringtune"));
        merge.current_dir(dir.path()).args(["merge", "--model-path", "adapter", "--base-model", "base"]);
        merge.args(["--output-dir", "out/merged", "--overwrite", "--threads", "1"]);
        merge.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let start = Instant::now();
    assert!(merge().wait().unwrap().success());
    let time = start.elapsed();
    // Merging again and again: the signal comes somewhere in it, most often while files are written or proven.
    let (mut ended, stream) = (0, Stream::new(&[27]));
    for i in 0..12 {
        let mut child = merge();
        std::thread::sleep(time.mul_f64(0.1 + 0.8 * stream.f64_at(i)));
        signal(&child, libc::SIGTERM);
        use std::os::unix::process::ExitStatusExt;
        let status = child.wait().unwrap();
        ended += usize::from(status.signal() == Some(libc::SIGTERM));
        let left = names(&dir.path().join("out"));
        assert!(left.iter().all(|n| n == "merged"), "signal {i}: {status}, {left:?}");
    }
    assert!(ended > 3, "only {ended} of 12 signals came in time");
}

#[test]
fn a_second_signal_ends_the_run_at_once() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let out = dir.path().join("out");
    let mut child = sft(dir.path(), &out, 2000).spawn().unwrap();
    wait_for_steps(&mut child, &out, 1);
    signal(&child, libc::SIGTERM);
    signal(&child, libc::SIGINT);
    let code = child.wait().unwrap().code();
    assert!(matches!(code, Some(130 | 143)), "exit code {code:?}");
    // What it was writing is not taken for a checkpoint.
    let copy = dir.path().join("copy");
    copy_dir(&out, &copy);
    for (_, path) in manifest::list(&copy).unwrap() {
        manifest::verify(&path).unwrap();
    }
}

#[test]
fn a_reader_that_goes_away_or_a_full_disk_behind_it_costs_no_file() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let wordy = |out: &Path| {
        let mut c = sft(dir.path(), out, 3);
        c.args(["--logging_steps", "1"]);
        c
    };
    let ended = |mut child: Child, out: &Path| {
        let mut said = String::new();
        std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1), "{said}");
        assert!(said.contains("standard output could not be written to its end"), "{said}");
        assert!(out.join(WEIGHTS).is_file() && out.join("checkpoint-3/manifest.json").is_file(), "{said}");
        assert_eq!(metrics(out).iter().filter(|m| m.get("loss").is_some()).count(), 3);
    };
    let out = dir.path().join("no reader");
    let mut child = wordy(&out).spawn().unwrap();
    drop(child.stdout.take());
    ended(child, &out);
    let out = dir.path().join("full");
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    ended(wordy(&out).stdout(full).spawn().unwrap(), &out);
}

#[test]
fn a_second_run_in_the_folder_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let out = dir.path().join("out");
    let mut first = sft(dir.path(), &out, 100_000).spawn().unwrap();
    wait_for_steps(&mut first, &out, 2);
    let second = run(sft(dir.path(), &out, 3));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(2), "{said}");
    assert!(said.contains(&format!("another run is writing to this folder (process {} on ", first.id())), "{said}");
    first.kill().unwrap();
    first.wait().unwrap();
    // Killed, it holds nothing any longer.
    let said = String::from_utf8_lossy(&run(sft(dir.path(), &out, 6)).stderr).into_owned();
    assert!(said.contains(&format!("taken over from process {} on ", first.id())), "{said}");
}

/// The best checkpoint goes while the run goes on: the last weights are written all the same, and the loss is said.
#[test]
fn a_best_checkpoint_that_is_gone_at_the_end_costs_no_weights() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let out = dir.path().join("out");
    // A rate that grows without end: the first evaluation, after step 10, stays the best.
    let mut command = sft_at(dir.path(), &out, 60, "5");
    command.args(["--val_fraction", "0.2", "--warmup_steps", "60"]);
    let mut child = command.spawn().unwrap();
    wait_for_steps(&mut child, &out, 22);
    let gone = out.join("checkpoint-10");
    while manifest::verify(&gone).is_err() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended without a checkpoint");
    }
    std::fs::remove_dir_all(&gone).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(
        stderr.contains("the best model cannot be loaded, the final weights are those of the last step"),
        "{stderr}"
    );
    same_file(&out.join("checkpoint-60").join(WEIGHTS), &out.join(WEIGHTS));
}

/// Another instruction level sums in another order: a resumed run says which two, and goes on.
#[test]
fn another_instruction_level_on_resume_is_said() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let out = dir.path().join("out");
    let mut first = sft(dir.path(), &out, 10);
    first.env("RINGTUNE_CPU", "portable");
    succeed(first);
    std::fs::remove_dir_all(out.join("checkpoint-10")).unwrap();
    let best = ringtune::cpu::Level::detect().unwrap();
    let output = run(sft(dir.path(), &out, 10));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let said = stderr.contains("their last bits differ");
    assert_eq!(said, best.name() != "portable", "{stderr}");
    let both = ["portable", best.name()].iter().all(|name| stderr.contains(name));
    assert!(!said || both, "{stderr}");
}

/// A terminal that closes and a scheduler that warns ask for the same as SIGTERM, and the program says at once what it does; what was
/// started with nohup lives on.
#[test]
fn hangup_and_warning_save_too() {
    const STEPS: u64 = 2000;
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    for (name, number) in [("SIGHUP", libc::SIGHUP), ("SIGUSR1", libc::SIGUSR1), ("SIGXCPU", libc::SIGXCPU)] {
        let out = dir.path().join(name);
        let mut child = sft(dir.path(), &out, STEPS).spawn().unwrap();
        wait_for_steps(&mut child, &out, 3);
        signal(&child, number);
        // A limit on processor time says so again and again.
        let limit = number == libc::SIGXCPU;
        (0..if limit { 3 } else { 0 }).for_each(|_| signal(&child, number));
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(75), "{stderr}");
        let (why, again) = match limit {
            true => ("the limit on processor time is reached; ", ""),
            false => ("", "; send it again to stop now"),
        };
        assert!(
            stderr.lines().any(|l| {
                let rest = l.strip_prefix(&format!("{name}: {why}finishing step ")).unwrap_or_default();
                rest.split_once(',').is_some_and(|(step, rest)| {
                    step.parse::<u64>().is_ok_and(|n| n >= 3) && rest == format!(" then saving{again}")
                })
            }),
            "{stderr}"
        );
        assert!(stderr.contains(&format!("stopped by {name} after step")), "{stderr}");
        assert!(!manifest::list(&out).unwrap().is_empty());
    }
    // `ulimit -t` of a shell sets the limit that asks and the one that kills alike.
    let out = dir.path().join("limit");
    let line = sft(dir.path(), &out, 100_000);
    let mut limited = Command::new("bash");
    limited.args(["-c", "ulimit -t 6; exec \"$@\"", "bash"]).arg(line.get_program()).args(line.get_args());
    let output = limited.stdin(Stdio::null()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{stderr}");
    assert!(stderr.contains("stopped by SIGXCPU after step") && !manifest::list(&out).unwrap().is_empty(), "{stderr}");
    let out = dir.path().join("nohup");
    let line = sft(dir.path(), &out, 30);
    let mut nohup = Command::new("nohup");
    nohup.arg(line.get_program()).args(line.get_args());
    let mut child = nohup.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for_steps(&mut child, &out, 3);
    signal(&child, libc::SIGHUP);
    assert!(child.wait().unwrap().success());
}
