//! Ranks are started with lines of their own: settings that differ are named before anything is read, and nothing is trained.

use std::process::Child;

use crate::rank_failures::{free_port, started};
use crate::ringrun_program::Training;
use crate::runs::rows;

/// Each pair trained another model in silence, or ended as a fault of a machine.
#[test]
fn settings_that_differ_between_ranks_are_named() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 20);
    for (main, other, said) in [
        ("", "--max_grad_norm 0.5", "--max-grad-norm is 1 on rank 0, 0.5 on rank 1"),
        (
            "--weight_decay 0.1 --seed 1",
            "--weight_decay 0.2 --seed 2",
            "--seed is 1 on rank 0, 2 on rank 1; --weight-decay is 0.1 on rank 0, 0.2 on rank 1",
        ),
        ("--zero 1", "", "--zero is 1 on rank 0, 0 on rank 1"),
        ("--warmup_steps 2", "", "--warmup-steps is 2 on rank 0, "),
        ("--max_bad_steps 3", "", "--max-bad-steps is 3 on rank 0, "),
        ("--recompute layer", "", "--recompute is layer on rank 0, "),
        ("--mixed_precision bf16", "", "--mixed-precision is bf16 on rank 0, no on rank 1"),
    ] {
        let words = |flags: &'static str| flags.split_whitespace().collect::<Vec<_>>();
        let [ours, theirs] =
            [main, other].map(|flags| Training { flags: words(flags), ..Training::new(dir.path(), 3) });
        let children =
            started([&ours, &theirs], ["out", "out"], &free_port(), "a", true).map(|mut c| c.spawn().unwrap());
        let outputs = children.map(|child: Child| child.wait_with_output().unwrap());
        let all: String = outputs.iter().map(|o| String::from_utf8_lossy(&o.stderr).into_owned()).collect();
        assert!(outputs.iter().all(|o| !o.status.success()), "{all}");
        assert!(all.contains("settings differ between ranks: ") && all.contains(said), "{said}: {all}");
        assert!(!dir.path().join("out/metrics.jsonl").exists());
    }
    // What each machine may have for itself.
    let [ours, theirs] = ["--logging_steps 5", "--logging_steps 7"]
        .map(|flags| Training { flags: flags.split(' ').collect(), ..Training::new(dir.path(), 3) });
    let children = started([&ours, &theirs], ["out", "out"], &free_port(), "a", true).map(|mut c| c.spawn().unwrap());
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
