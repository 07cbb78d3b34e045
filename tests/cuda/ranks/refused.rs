//! Ranks that cannot work together, and those that are lost: each is named.

use std::time::{Duration, Instant};

use super::{Training, can_run, ended, rows, text};
use crate::skip::device;

/// `auto` takes GPUs on every rank or on none.
#[test]
fn ranks_on_different_devices_are_refused_by_name() {
    if !can_run(2) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path());
    let flags = "--max-steps 2 --val-fraction 0 --save-strategy no";
    let training = |devices| Training { devices, ..Training::of(dir.path(), flags) };
    let (_, said) = training(["auto"; 2]).succeed_saying("auto", 2, "");
    let on = if device().is_some_and(|dev| dev.properties().emulated) { "device: cpu" } else { "device: cuda:0" };
    assert!(said.contains(on), "{said}");
    let one_of_two = ended(training(["cuda", "cpu"]).ranks("mixed", 2, |_, _| ()));
    let said: String = one_of_two.iter().map(text).collect();
    assert!(one_of_two.iter().all(|o| !o.status.success()), "{said}");
    assert!(said.contains("what ranks compute on differs: rank 0 has a GPU, rank 1 the CPU"), "{said}");
}

/// Ends a run of two ranks by the death of one of them: the other one ends too, and says who it was.
fn lose_a_rank(flags: &str) {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path());
    let training = Training::of(dir.path(), flags);
    let mut children = training.ranks("out", 2, |c, _| {
        c.env("RINGTUNE_FAULT", "rank=1 step=3 at=backward:1 do=kill");
    });
    let (lost, mut main) = (children.pop().unwrap(), children.pop().unwrap());
    // The time counts from the death, whatever the machine takes to come so far.
    lost.wait_with_output().unwrap();
    let since = Instant::now();
    let code = loop {
        match main.try_wait().unwrap() {
            Some(status) => break status.code(),
            None => assert!(since.elapsed() < Duration::from_secs(10), "the other rank is still there"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let said = text(&main.wait_with_output().unwrap());
    assert_eq!(code, Some(76), "{said}");
    // Where it was the hub knows from its last heartbeat; ringrun reads it from the page of the dead one.
    assert!(said.contains("rank 1 on host ") && said.contains("connection closed: killed or crashed"), "{said}");
}

#[test]
fn a_lost_rank_is_named_on_the_others() {
    if can_run(2) {
        lose_a_rank("--no-lora --max-steps 500 --transport nccl --quiet");
    }
}

#[test]
fn a_rank_that_is_lost_in_an_ordered_fold_is_named_on_the_others() {
    if can_run(2) {
        lose_a_rank("--no-lora --max-steps 500 --transport nccl --fold micro_batch --zero 1 --quiet");
    }
}

/// The rank that strays waits in an exchange, and the other one has asked NCCL for sums: the hub sees it from what both say they have asked for,
/// and nobody waits for `--hang-timeout`.
#[test]
fn a_rank_that_strays_from_sums_of_nccl_is_named_at_once() {
    if !can_run(2) {
        return;
    }
    let stray = "waits in \"an exchange that RINGTUNE_FAULT asked for\", exchange ";
    for (fault, flags) in [
        ("rank=1 step=3 at=forward do=stray", "--zero 0 --fold step"),
        ("rank=1 step=3 at=backward:0 do=stray", "--zero 1 --fold micro_batch"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        rows(dir.path());
        let flags = format!("--no-lora --max-steps 500 --transport nccl --quiet {flags}");
        let begun = Instant::now();
        let outputs = ended(Training::of(dir.path(), &flags).ranks("out", 2, |c, _| {
            c.env("RINGTUNE_FAULT", fault);
        }));
        let said: String = outputs.iter().map(text).collect();
        assert!(outputs.iter().all(|o| o.status.code() == Some(76)), "{fault}: {said}");
        let why = " and rank 0 for sums or weights that come before it: they have lost each other";
        assert!(said.contains("rank 1 on host ") && said.contains(stray) && said.contains(why), "{fault}: {said}");
        assert!(begun.elapsed() < Duration::from_secs(60), "{fault}: {:?}", begun.elapsed());
    }
}

#[test]
fn ranks_that_share_a_gpu_are_refused_by_name() {
    if !can_run(2) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path());
    let training = Training::of(dir.path(), "--max-steps 2");
    let outputs = ended(training.ranks("out", 2, |c, _| {
        c.env("VGPU_DEVICES", "1").env("CUDA_VISIBLE_DEVICES", "0");
    }));
    let said: String = outputs.iter().map(text).collect();
    assert!(outputs.iter().all(|o| !o.status.success()), "{said}");
    assert!(said.contains("ranks 0 and 1 share a GPU, GPU-"), "{said}");
}
