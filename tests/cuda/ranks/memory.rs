//! What a rank takes of its device, beside what `check` and `plan` count.

use std::process::{Command, Stdio};

use ringtune::backend::Backend;
use ringtune::batch::MicroBatch;
use ringtune::comm::{self, Choice, Fold, Sums, Ways};
use ringtune::cuda::Cuda;
use ringtune::data::loader::Step;
use ringtune::hf::TensorSource;
use ringtune::hf::safetensors::ModelFiles;
use ringtune::settings::{TrainSettings, Zero};
use ringtune::tensor::{DType, Device};
use ringtune::train::memory::{Demand, estimate_on};
use ringtune::train::setup;
use ringtune::words::Words;

use super::{as_rank, can_run, ended, free_port, text};
use crate::skip::device;

/// What a child of [`the_estimate_of_a_ranks_memory_is_what_it_takes`] does.
#[test]
fn memory_of_a_rank() {
    let role = std::env::var("RINGTUNE_TEST_ROLE").unwrap_or_default();
    let Some(fold) = role.strip_prefix("memory of a rank, ").and_then(Fold::of_word) else { return };
    let comm = comm::start(Ways { transport: Choice::Nccl, fold: Some(fold), bucket: None }).unwrap();
    let base = ModelFiles::open(&crate::skip::root().join("tests/data/model/tiny-llama-untied")).unwrap();
    for (dtype, lora, zero) in [
        (DType::F32, false, Zero::None),
        (DType::Bf16, false, Zero::Moments),
        (DType::F32, true, Zero::None),
        (DType::Bf16, true, Zero::Moments),
    ] {
        let mut s = TrainSettings { dtype, zero, fold: Some(fold), ..TrainSettings::default() };
        (s.micro_batch_size, s.eval_batch_size, s.grad_accum) = (2, 1, 2);
        s.lora = s.lora.filter(|_| lora);
        let spec = setup::lora_spec(&s).unwrap();
        let (config, max_seq_len) = (base.config(), 64);
        let device = Cuda::footprint(config.n_classes);
        let demand =
            Demand { config, settings: &s, lora: spec.as_ref(), new_rows: None, max_seq_len, saves: false, device };
        let expected: u64 = estimate_on(&demand, 2).iter().map(|c| c.bytes).sum();
        let dev = Cuda::with_cache(comm.world().rank, Some(&crate::skip::scratch())).unwrap();
        assert!(dev.forget_peak());
        let held = dev.memory_use().unwrap().now;
        let sums = if zero == Zero::Moments { Sums::Owned } else { Sums::Whole };
        let on = comm.on(&dev, sums).unwrap();
        let ranks = on.get();
        let n = 2 * max_seq_len;
        let mut work = setup::workload_of(&dev, ranks, &base, &s, None, n).unwrap();
        let batch = || MicroBatch {
            tokens: vec![7; n],
            targets: vec![5; n],
            doc_start: vec![0; n],
            n_valid: n,
            samples: vec![0],
        };
        let step = Step { micro_batches: vec![batch(), batch()], ..Default::default() };
        assert_eq!(work.step(&dev, ranks, &step, 0, 1e-4).unwrap().problem, None);
        let peak = dev.memory_use().unwrap().peak - held;
        ranks.end_reductions().unwrap();
        let what = format!("{dtype:?}, LoRA {lora}, {zero:?}, {fold:?}: {peak} bytes, estimated {expected}");
        println!("{what}");
        assert!((peak as f64 / expected as f64 - 1.0).abs() < 0.05, "{what}");
    }
    comm.finish(Ok(())).unwrap();
}

/// What `check` and `plan` count for a rank is what the device gives out: with sharded state, low-rank updates, and folds in order.
#[test]
fn the_estimate_of_a_ranks_memory_is_what_it_takes() {
    if !can_run(2) || !device().is_some_and(|dev| dev.properties().emulated) {
        return;
    }
    for fold in Fold::WORDS {
        let port = free_port();
        let start = |rank: usize| {
            let mut c = Command::new(std::env::current_exe().unwrap());
            c.args(["--exact", "ranks::memory::memory_of_a_rank", "--nocapture"]);
            c.env("RINGTUNE_TEST_ROLE", format!("memory of a rank, {fold}")).env("VGPU_DEVICES", "2");
            as_rank(&mut c, rank, 2, &port).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            c.spawn().unwrap()
        };
        for output in ended((0..2).map(start).collect()) {
            let said = text(&output);
            assert!(output.status.success() && said.contains("1 passed"), "{said}");
            said.lines().filter(|line| line.contains("estimated")).for_each(|line| println!("{fold}: {line}"));
        }
    }
}
