//! Two ranks of which one fails: its exit code, the last line, no checkpoint lost, and the next run ends where an undisturbed one does.

use std::time::{Duration, Instant};

use crate::ringrun::{ADAPTER, logged, same};
use crate::ringrun_program::{Training, processes, succeed, wait_until};
use crate::runs::rows;

/// What a fault does to a run of two ranks: its exit code and words of its last line. The next run ends where an undisturbed one does.
fn fault(fault: &str, flags: &[&str], code: i32, words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training { flags: vec!["--resume_from_checkpoint", "auto"], ..Training::new(dir.path(), 9) };
    let mut first = t.ranks("out", 2, &[]);
    first.args(flags).env("RINGTUNE_FAULT", fault);
    let step = fault.split_whitespace().find_map(|word| word.strip_prefix("step=")?.parse::<u32>().ok()).unwrap();
    let begun = Instant::now();
    let mut child = first.spawn().unwrap();
    // The clock starts with the step before the fault; what one takes on this machine now is known by then.
    let out = dir.path().join("out");
    wait_until("the run comes to its fault", || logged(&out) + 1 >= step || child.try_wait().unwrap().is_some());
    let (since, pace) = (Instant::now(), begun.elapsed() / step);
    let output = child.wait_with_output().unwrap();
    let took = since.elapsed();
    let (ended, stderr) = (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned());
    let last = stderr.lines().last().unwrap_or_default().to_string();
    assert_eq!(ended, Some(code), "{fault}:\n{stderr}");
    for word in words {
        assert!(
            last.starts_with("ringrun: ") && last.contains(word),
            "{fault}: no {word:?} in the last line of\n{stderr}"
        );
    }
    assert!(took < Duration::from_secs(10) + 2 * pace, "{fault}: {took:?}, and {pace:?} a step");
    assert_eq!(processes(&dir.path().display().to_string()), [], "{fault}");
    succeed(t.ranks("out", 2, &[]));
    succeed(t.alone("one"));
    same(&dir.path().join("one"), &dir.path().join("out"), ADAPTER, 9);
    let left =
        std::fs::read_dir(dir.path().join("out")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = left.filter(|name| name.ends_with(".tmp")).collect();
    assert!(left.is_empty(), "{fault}: left behind: {left:?}");
}

#[test]
fn a_killed_rank_is_named_with_step_phase_and_layer() {
    fault(
        "rank=1 step=4 at=backward:1 do=kill",
        &[],
        137,
        &["rank 1 on host ", ": step 4, backward, layer 1: killed by SIGKILL"],
    );
}

/// Ranks that call different collectives are told apart by name, with the number of the exchange.
#[test]
fn ranks_that_call_different_exchanges_are_named_with_both() {
    let strays = "calls \"an exchange that RINGTUNE_FAULT asked for\"";
    // Whichever rank comes second is the one that is named first.
    fault(
        "rank=1 step=4 at=update do=stray",
        &[],
        1,
        &["step 4, update: ", strays, "calls \"sum of ", " as exchange ", "they have lost each other"],
    );
}

#[test]
fn a_stopped_rank_is_found_by_its_silence() {
    fault(
        "rank=1 step=4 at=forward do=stop",
        &[],
        124,
        &["rank 1 ", "step 4, forward: no sign of life for 5 s (stopped by a signal)"],
    );
}

#[test]
fn a_panic_says_where_and_why() {
    fault(
        "rank=0 step=5 at=reduce do=panic",
        &[],
        1,
        &["rank 0 ", "step 5, reduce: panicked at src/comm/fault.rs:", "asked for"],
    );
}

#[test]
fn a_gradient_that_is_not_finite_ends_all_ranks() {
    let words = ["step 4, ", "not finite", ", on rank 1; look at "];
    fault("rank=1 step=4 do=nan", &["--max_bad_steps", "1"], 1, &words);
}

#[test]
fn a_full_disk_under_rank_0_is_said() {
    fault("rank=0 step=6 at=save do=enospc", &[], 1, &["rank 0 ", "disk or quota is full"]);
}

/// The other ranks have their parts on the disk by then; without this one there is no checkpoint.
#[test]
fn a_full_disk_under_another_rank_is_said() {
    fault("rank=1 step=6 at=save do=enospc", &["--zero", "1"], 1, &["rank 1 ", "optimizer-00002-of", "quota is full"]);
}

#[test]
fn a_rank_that_dies_while_all_save_is_named() {
    fault("rank=1 step=6 at=save do=kill", &["--zero", "1"], 137, &["rank 1 ", "step 6, save: killed by SIGKILL"]);
}

#[test]
fn a_gradient_that_is_not_finite_is_named_where_each_rank_has_a_part() {
    let words = ["step 4, ", "not finite", "tensors from ", ", on rank 1; look at "];
    fault("rank=1 step=4 do=nan", &["--zero", "1", "--max_bad_steps", "1"], 1, &words);
}

#[test]
fn a_rank_that_leaves_without_a_word_is_named() {
    fault("rank=1 step=4 at=update do=exit:3", &[], 3, &["rank 1 ", "step 4, update: ended with exit code 3"]);
}
