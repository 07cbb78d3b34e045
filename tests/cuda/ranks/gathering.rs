//! Weights that other ranks updated, on their way beside the next forward pass.

use std::process::{Command, Stdio};

use ringtune::batch::MicroBatch;
use ringtune::comm::{self, Choice, Sums, Ways};
use ringtune::cuda::Cuda;
use ringtune::data::loader::Step;
use ringtune::hf::safetensors::ModelFiles;
use ringtune::settings::{TrainSettings, Zero};
use ringtune::train::{drift, setup};

use super::{as_rank, can_run, ended, free_port, text};
use crate::skip::device;

/// What a child of [`weights_are_gathered_behind_the_next_forward_pass`] does: three steps, and a sum over the bits of its weights.
#[test]
fn steps_ahead() {
    let role = std::env::var("RINGTUNE_TEST_ROLE").unwrap_or_default();
    let Some(ahead) = role.strip_prefix("steps ahead: ").map(|ahead| ahead == "true") else { return };
    let comm = comm::start(Ways { transport: Choice::Nccl, fold: None, bucket: Some(20_000) }).unwrap();
    let base = ModelFiles::open(&crate::skip::root().join("tests/data/model/tiny-llama-untied")).unwrap();
    let settings = TrainSettings { zero: Zero::Moments, lora: None, micro_batch_size: 1, ..TrainSettings::default() };
    let dev = Cuda::with_cache(comm.world().rank, Some(&crate::skip::scratch())).unwrap();
    let on = comm.on(&dev, Sums::Owned).unwrap();
    let (ranks, n) = (on.get(), 32);
    let mut work = setup::workload_of(&dev, ranks, &base, &settings, None, n).unwrap();
    let batch = MicroBatch {
        tokens: (0..n).map(|i| (7 * i + ranks.rank()) as i32 % 250).collect(),
        targets: (0..n).map(|i| (5 * i + 3) as i32 % 250).collect(),
        doc_start: vec![0; n],
        n_valid: n,
        samples: vec![0],
    };
    let step = Step { micro_batches: vec![batch], ..Default::default() };
    for i in 0..3 {
        eprintln!("step {i}");
        let done = match ahead {
            true => work.step_ahead(&dev, ranks, &step, i, 1e-2),
            false => work.step(&dev, ranks, &step, i, 1e-2),
        };
        assert_eq!(done.unwrap().problem, None);
    }
    work.settle(&dev, ranks).unwrap();
    drift::compare(&dev, ranks, &mut work, 3).unwrap();
    let weights = work.export_params(&dev).unwrap();
    let sum =
        weights.iter().flat_map(|(_, t)| &t.data).fold(0u64, |sum, x| sum.rotate_left(5) ^ u64::from(x.to_bits()));
    eprintln!("weights {sum:x}");
    ranks.end_reductions().unwrap();
    comm.finish(Ok(())).unwrap();
}

/// The computing stream waits for each bucket of weights when its layers come, not for all of them after the update; the bits stay.
#[test]
fn weights_are_gathered_behind_the_next_forward_pass() {
    if !can_run(2) || !device().is_some_and(|dev| dev.properties().emulated) {
        return;
    }
    let run = |ahead: bool, seed: usize| {
        let port = free_port();
        let start = |rank: usize| {
            let mut c = Command::new(std::env::current_exe().unwrap());
            c.args(["--exact", "ranks::gathering::steps_ahead", "--nocapture"])
                .env("VGPU_SEED", (seed + rank).to_string());
            c.env("RINGTUNE_TEST_ROLE", format!("steps ahead: {ahead}")).env("VGPU_DEVICES", "2");
            if rank == 0 {
                c.env("VGPU_CALLS", "1");
            }
            as_rank(&mut c, rank, 2, &port).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            c.spawn().unwrap()
        };
        let outputs = ended((0..2).map(start).collect());
        for output in &outputs {
            assert!(output.status.success() && text(output).contains("1 passed"), "{}", text(output));
        }
        String::from_utf8_lossy(&outputs[0].stderr).into_owned()
    };
    let weights = |said: &str| said.lines().find(|l| l.starts_with("weights ")).unwrap().to_string();
    // What the main rank asks for from the last gather of the second step to the first sum of the third: waits and launches in turn.
    let turns = |said: &str| {
        let calls: Vec<&str> = said.lines().collect();
        let third = calls.iter().position(|l| *l == "step 2").unwrap();
        let from = calls[..third].iter().rposition(|l| l.contains("ncclAllGather")).unwrap();
        let until = third + calls[third..].iter().position(|l| l.contains("ncclReduceScatter")).unwrap();
        let of = |l: &&str| match l {
            l if l.contains("cuStreamWaitEvent") => Some("wait"),
            l if l.contains("cuLaunchKernel") => Some("launch"),
            _ => None,
        };
        let mut turns: Vec<&str> = calls[from..until].iter().filter_map(of).collect();
        turns.dedup();
        turns.iter().filter(|turn| **turn == "wait").count()
    };
    let (settled, ahead) = (run(false, 1), run(true, 1));
    let gathers = settled.lines().filter(|l| l.contains("ncclAllGather")).count() / 3;
    // One more gathers sums of squares; the first wait of a pass may follow another one.
    let buckets = gathers - 1;
    assert!(buckets > 3, "{buckets} buckets");
    assert!(turns(&ahead) >= turns(&settled) + buckets - 2, "{} and {} turns", turns(&ahead), turns(&settled));
    assert_eq!(weights(&ahead), weights(&settled));
    assert_eq!(weights(&run(true, 5)), weights(&settled), "another order of work");
}
