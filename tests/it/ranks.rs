//! A step on several ranks is the step of one rank with as many micro-batches, bit for bit.

use std::path::Path;

use ringtune::batch::MicroBatch;
use ringtune::comm::{Communicator, Solo, fold};
use ringtune::cpu::Cpu;
use ringtune::data::loader::{Step, dealt};
use ringtune::hf::safetensors::ModelFiles;
use ringtune::model::LoraSpec;
use ringtune::settings::TrainSettings;
use ringtune::train::step::{Problem, Stepped, Workload};
use ringtune::train::{drift, setup};
use serde_json::Value;

use crate::golden_steps::{GOLDEN, MODEL, micro_batch};
use crate::ranks_as_threads::on_ranks;

/// Six micro-batches of recorded rows, one of them without a target and one without a token.
pub fn micro_batches() -> Vec<MicroBatch> {
    let golden: Value = serde_json::from_slice(&std::fs::read(format!("{GOLDEN}/golden.json")).unwrap()).unwrap();
    let steps = golden["adamw"]["batches"].as_array().unwrap();
    let mut all: Vec<MicroBatch> = steps.iter().flat_map(|s| s.as_array().unwrap()).take(5).map(micro_batch).collect();
    all[2].targets.fill(-100);
    all[2].n_valid = 0;
    all.push(MicroBatch::default());
    all
}

/// The same rows, each a micro-batch by itself.
fn single_rows() -> Vec<MicroBatch> {
    let rows = |b: &MicroBatch| -> Vec<MicroBatch> {
        let begins: Vec<usize> = (0..b.tokens.len()).filter(|&i| b.doc_start[i] as usize == i).collect();
        let ends = begins.iter().skip(1).copied().chain([b.tokens.len()]);
        let row = |(begin, end): (&usize, usize)| {
            let (tokens, targets) = (b.tokens[*begin..end].to_vec(), b.targets[*begin..end].to_vec());
            let n_valid = targets.iter().filter(|&&t| t != -100).count();
            MicroBatch { tokens, targets, doc_start: vec![0; end - begin], n_valid, ..Default::default() }
        };
        begins.iter().zip(ends).map(row).collect()
    };
    micro_batches().iter().flat_map(rows).take(6).collect()
}

/// Two steps of LoRA with dropout over micro-batches on this rank: figures, and the bits of the weights.
fn train(comm: &dyn Communicator<Cpu>, all: &[MicroBatch]) -> (Vec<Stepped>, Vec<u32>) {
    let dev = Cpu::new(Some(1)).unwrap();
    let defaults = TrainSettings::default();
    let lora = LoraSpec { r: 4, alpha: 8.0, dropout: 0.2, ..defaults.lora.clone().unwrap() };
    let grad_accum = all.len().div_ceil(comm.world_size());
    let settings = TrainSettings { lora: Some(lora), grad_accum, ..defaults };
    let base = ModelFiles::open(Path::new(MODEL)).unwrap();
    let mut work: Workload<Cpu> = setup::workload(&dev, &base, &settings, None, 512).unwrap();
    let own = dealt(comm.rank(), comm.world_size()).take(grad_accum);
    let micro_batches = own.map(|k| all.get(k).cloned().unwrap_or_default()).collect();
    let batch = Step { micro_batches, ..Default::default() };
    let stepped = (0..2).map(|i| work.step(&dev, comm, &batch, i, 1e-2).unwrap()).collect();
    let weights = work.export_params(&dev).unwrap();
    (stepped, weights.into_iter().flat_map(|(_, t)| t.data).map(f32::to_bits).collect())
}

#[test]
fn ranks_and_accumulation_are_one() {
    for all in [micro_batches(), single_rows()] {
        assert_eq!(all.len(), 6);
        let one = train(&Solo, &all);
        assert!(one.0.iter().all(|s| s.problem.is_none() && s.loss > 0.0), "{:?}", one.0);
        for size in [2, 3, 4, 6] {
            let ranks = on_ranks(size, |rank| train(rank, &all));
            assert!(ranks.iter().all(|rank| *rank == one), "{size} ranks");
        }
    }
}

/// Ranks that no longer hold the same weights are told so, with the rank and the first tensor.
#[test]
fn weights_that_drifted_apart_are_named() {
    let said = on_ranks(3, |rank| {
        let dev = Cpu::new(Some(1)).unwrap();
        let settings = TrainSettings::default();
        let base = ModelFiles::open(Path::new(MODEL)).unwrap();
        let mut work: Workload<Cpu> = setup::workload(&dev, &base, &settings, None, 512).unwrap();
        drift::compare(&dev, rank, &mut work, 7).unwrap();
        if rank.rank() == 2 {
            let mut params = work.export_params(&dev).unwrap();
            let last = params[4].1.data.last_mut().unwrap();
            *last = f32::from_bits(last.to_bits() ^ 1);
            work.import_params(&dev, &params).unwrap();
        }
        let fourth = work.trained()[4];
        (drift::compare(&dev, rank, &mut work, 7).unwrap_err().to_string(), fourth)
    });
    for (said, fourth) in said {
        let expected = "after step 7 the weights of rank 2 differ from those of rank 0 in 1 of ";
        assert!(said.starts_with(expected) && said.contains(&format!("from {fourth} on")), "{said}");
    }
}

#[test]
fn figures_are_summed_in_the_order_of_micro_batches() {
    let figures: Vec<[f64; 2]> = (0..7).map(|k| [1e16 / f64::from(3 * k + 1), f64::from(k) * 0.1 - 1e15]).collect();
    let own = |comm: &dyn Communicator<Cpu>| {
        let mine: Vec<_> =
            dealt(comm.rank(), comm.world_size()).take_while(|&k| k < 7).map(|k| (k, figures[k])).collect();
        fold(comm, 7, mine).unwrap().map(f64::to_bits)
    };
    let mut expected = [0.0; 2];
    figures.iter().for_each(|f| (0..2).for_each(|i| expected[i] += f[i]));
    for size in 1..=4 {
        assert!(on_ranks(size, |rank| own(rank)).iter().all(|got| *got == expected.map(f64::to_bits)));
    }
    assert_eq!(own(&Solo), expected.map(f64::to_bits));
}

#[test]
fn one_rank_that_is_asked_to_stop_stops_all() {
    for asked in 0..3 {
        assert_eq!(on_ranks(3, |rank| rank.any(rank.rank() == asked).unwrap()), [true; 3]);
    }
    assert_eq!(on_ranks(3, |rank| rank.any(false).unwrap()), [false; 3]);
}

/// Whether a step is finite is decided on summed values: the rank with sound rows skips with the others.
#[test]
fn a_loss_that_is_not_finite_skips_the_step_on_every_rank() {
    let skipped = on_ranks(2, |rank| {
        let dev = Cpu::new(Some(1)).unwrap();
        let settings = TrainSettings::default();
        let base = ModelFiles::open(Path::new(MODEL)).unwrap();
        let mut work: Workload<Cpu> = setup::workload(&dev, &base, &settings, None, 512).unwrap();
        if rank.rank() == 1 {
            let mut bad = work.export_params(&dev).unwrap();
            bad[0].1.data[0] = f32::NAN;
            work.import_params(&dev, &bad).unwrap();
        }
        let all = micro_batches();
        let batch = Step { micro_batches: vec![all[rank.rank()].clone()], ..Default::default() };
        work.step(&dev, rank, &batch, 0, 1e-2).unwrap().problem
    });
    assert!(skipped.iter().all(|p| matches!(p, Some(Problem::Loss { .. }))), "{skipped:?}");
}
