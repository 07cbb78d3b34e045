//! Twenty AdamW steps through the trainer's step against transformers and PEFT: losses, rates, norms, and the weights at the end.
//!
//! Tolerances are those that were measured when the results were recorded (f32): losses 1e-4, gradients 5e-5 relative, the
//! update of a tensor over 20 steps 5e-4 relative.

use std::path::Path;

use ringtune::batch::MicroBatch;
use ringtune::comm::Solo;
use ringtune::cpu::Cpu;
use ringtune::data::loader::Step;
use ringtune::hf::TensorSource;
use ringtune::hf::device::download;
use ringtune::hf::peft::Adapter;
use ringtune::hf::safetensors::{ModelFiles, TensorFile};
use ringtune::model::LoraSpec;
use ringtune::model::trained;
use ringtune::model::weights::{Part, Place};
use ringtune::optim::{Schedule, ScheduleSettings, Warmup};
use ringtune::settings::TrainSettings;
use ringtune::tensor::DType;
use ringtune::train::setup;
use ringtune::train::step::{Problem, Workload};
use serde_json::Value;

pub const MODEL: &str = "tests/data/model/tiny-llama-tied";
pub const GOLDEN: &str = "tests/data/golden/tiny-llama-tied";

/// Rows of a padded batch as documents; `labels[t]` is the target of position `t - 1`.
pub fn micro_batch(v: &Value) -> MicroBatch {
    let rows = |key: &str| -> Vec<Vec<i64>> { serde_json::from_value(v[key].clone()).unwrap() };
    let mut b = MicroBatch::default();
    for ((ids, labels), mask) in rows("input_ids").iter().zip(&rows("labels")).zip(&rows("attention_mask")) {
        let n = mask.iter().filter(|&&m| m == 1).count();
        assert!(mask[..n].iter().all(|&m| m == 1), "padding stands at the end");
        let start = b.tokens.len() as i32;
        for t in 0..n {
            b.tokens.push(ids[t] as i32);
            b.targets.push(if t + 1 < n { labels[t + 1] as i32 } else { -100 });
            b.doc_start.push(start);
        }
    }
    b.n_valid = b.targets.iter().filter(|&&t| t != -100).count();
    b
}

fn settings(v: &Value, lora: Option<LoraSpec>) -> TrainSettings {
    let h = &v["hyperparameters"];
    TrainSettings {
        learning_rate: h["lr"].as_f64(),
        max_steps: h["steps"].as_u64(),
        weight_decay: h["weight_decay"].as_f64().unwrap(),
        max_grad_norm: h["clip"].as_f64(),
        adam_eps: h["eps"].as_f64().unwrap(),
        schedule: ScheduleSettings {
            warmup: Warmup::Steps(h["warmup"].as_u64().unwrap()),
            warmup_from_zero: true,
            ..TrainSettings::default().schedule
        },
        lora,
        grad_accum: 8,
        ..Default::default()
    }
}

/// Runs the recorded batches and compares every step.
fn run_steps(dev: &Cpu, work: &mut Workload<Cpu>, s: &TrainSettings, golden: &Value, batches: &Value) {
    let schedule = Schedule::new(s.schedule, s.learning_rate.unwrap(), s.max_steps.unwrap());
    for (i, batches) in batches.as_array().unwrap().iter().enumerate() {
        let micro_batches = batches.as_array().unwrap().iter().map(micro_batch).collect();
        let batch = Step { micro_batches, ..Default::default() };
        let lr = schedule.lr(i as u64);
        let got = work.step(dev, &Solo, &batch, i as u64, lr).unwrap();
        let want = |key: &str| golden[key][i].as_f64().unwrap();
        assert!((lr - want("lr")).abs() < 1e-15, "rate of step {i}: {lr} against {}", want("lr"));
        let (loss, norm) = (want("loss"), want("grad_norm_before_clip"));
        assert!((got.loss - loss).abs() < 1e-4, "loss of step {i}: {} against {loss}", got.loss);
        assert!((got.grad_norm / norm - 1.0).abs() < 5e-5, "norm of step {i}: {} against {norm}", got.grad_norm);
        assert_eq!(got.problem, None);
    }
}

/// `|(got - start) - (want - start)| / |want - start|`.
fn update_error(got: &[f32], want: &[f32], start: &[f32]) -> f64 {
    let norm = |a: &[f32], b: &[f32]| {
        a.iter().zip(b).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum::<f64>().sqrt()
    };
    norm(got, want) / norm(want, start)
}

#[test]
fn full_training() {
    let dev = Cpu::new(Some(2)).unwrap();
    let golden: Value = serde_json::from_slice(&std::fs::read(format!("{GOLDEN}/golden.json")).unwrap()).unwrap();
    let golden = &golden["adamw"];
    let s = settings(golden, None);
    let base = ModelFiles::open(Path::new(MODEL)).unwrap();
    let mut work = setup::workload(&dev, &base, &s, None, 512).unwrap();
    run_steps(&dev, &mut work, &s, golden, &golden["batches"]);
    let last = TensorFile::open(Path::new(&format!("{GOLDEN}/adamw_final.safetensors"))).unwrap();
    let mut compared = 0;
    for (at, got) in work.export_params(&dev).unwrap() {
        // Of the embedding only some rows are recorded.
        let name = at.to_string();
        if last.info(&name).is_none() {
            continue;
        }
        let error = update_error(&got.data, &last.load(&name).unwrap().data, &base.load(at).unwrap().data);
        assert!(error < 5e-4, "update of {name}: {error:.1e}");
        compared += 1;
    }
    assert_eq!(compared, 19);
}

#[test]
fn lora() {
    let dev = Cpu::new(Some(2)).unwrap();
    let golden: Value = serde_json::from_slice(&std::fs::read(format!("{GOLDEN}/golden.json")).unwrap()).unwrap();
    let batches = &golden["adamw"]["batches"];
    let golden = &golden["lora"]["all"]["adamw"];
    let s =
        settings(golden, Some(LoraSpec { r: 8, alpha: 16.0, dropout: 0.0, ..TrainSettings::default().lora.unwrap() }));
    let base = ModelFiles::open(Path::new(MODEL)).unwrap();
    let mut work = setup::workload(&dev, &base, &s, None, 512).unwrap();
    let adapter = Adapter::open(Path::new(&format!("{GOLDEN}/adapter_all"))).unwrap();
    let start: Vec<_> = work
        .trained()
        .into_iter()
        .map(|at| match at {
            Place::Layer(i, Part::LoraA(p)) => (at, adapter.lora(i, p).unwrap().unwrap().0),
            Place::Layer(i, Part::LoraB(p)) => (at, adapter.lora(i, p).unwrap().unwrap().1),
            _ => panic!("{at} is trained"),
        })
        .collect();
    work.import_params(&dev, &start).unwrap();
    run_steps(&dev, &mut work, &s, golden, batches);
    let last = TensorFile::open(Path::new(&format!("{GOLDEN}/lora_all.safetensors"))).unwrap();
    let got = work.export_params(&dev).unwrap();
    assert_eq!(got.len(), 28);
    for ((name, got), (_, start)) in got.iter().zip(&start) {
        let want = last.load(&format!("final.base_model.model.{name}")).unwrap();
        let error = update_error(&got.data, &want.data, &start.data);
        assert!(error < 5e-4, "update of {name}: {error:.1e}");
    }
}

/// Low-rank updates of a bf16 run are bf16 with f32 masters: what is saved is the masters, and what is read goes into them.
#[test]
fn masters_are_saved_and_read() {
    let dev = Cpu::new(Some(1)).unwrap();
    let base = ModelFiles::open(Path::new(MODEL)).unwrap();
    let s = TrainSettings { dtype: DType::Bf16, ..Default::default() };
    let golden: Value = serde_json::from_slice(&std::fs::read(format!("{GOLDEN}/golden.json")).unwrap()).unwrap();
    let micro_batches: Vec<_> = golden["adamw"]["batches"][0].as_array().unwrap().iter().map(micro_batch).collect();
    let s = TrainSettings { grad_accum: micro_batches.len(), ..s };
    let mut work = setup::workload(&dev, &base, &s, None, 512).unwrap();
    let drawn = work.export_params(&dev).unwrap();
    let f32s = TrainSettings { dtype: DType::F32, ..s.clone() };
    assert!(drawn == setup::workload(&dev, &base, &f32s, None, 512).unwrap().export_params(&dev).unwrap());

    let batch = Step { micro_batches, ..Default::default() };
    for step in 0..2 {
        assert_eq!(work.step(&dev, &Solo, &batch, step, 1e-3).unwrap().problem, None);
    }
    let saved = work.export_params(&dev).unwrap();
    let round = |x: f32| half::bf16::from_f32(x).to_f32();
    for ((at, master), (_, param, _)) in saved.iter().zip(trained(&mut work.model.params, &work.grads)) {
        assert_eq!(param.dtype(), DType::Bf16, "{at}");
        let rounded: Vec<f32> = master.data.iter().map(|&x| round(x)).collect();
        assert_eq!(download(&dev, param).unwrap().data, rounded, "{at} is its master, rounded");
        assert_ne!(master.data, rounded, "the master of {at} holds more than bf16");
    }
    let mut other = setup::workload(&dev, &base, &s, None, 512).unwrap();
    other.import_params(&dev, &saved).unwrap();
    assert!(other.export_params(&dev).unwrap() == saved);
}

/// A step without a target changes nothing, and Adam's count of updates does not move.
#[test]
fn a_step_without_targets_is_left_out() {
    let dev = Cpu::new(Some(1)).unwrap();
    let base = ModelFiles::open(Path::new(MODEL)).unwrap();
    let s = TrainSettings { grad_accum: 2, ..Default::default() };
    let mut work = setup::workload(&dev, &base, &s, None, 8).unwrap();
    let batch = |targets: Vec<i32>| {
        let n_valid = targets.iter().filter(|&&t| t >= 0).count();
        let (tokens, doc_start) = (vec![5, 6, 7], vec![0; 3]);
        MicroBatch { tokens, targets, doc_start, n_valid, samples: vec![0] }
    };
    let none = batch(vec![-100; 3]);
    let before = work.export_params(&dev).unwrap();
    let step = |micro_batches| Step { micro_batches, ..Default::default() };
    let got = work.step(&dev, &Solo, &step(vec![none.clone(), MicroBatch::default()]), 0, 1e-3).unwrap();
    assert_eq!((got.supervised, got.tokens, got.problem), (0, 3, Some(Problem::NoTarget)));
    assert_eq!((work.export_params(&dev).unwrap() == before, work.optimizer.updates()), (true, 0));
    // Beside one with targets it only adds its tokens.
    let some = batch(vec![6, -100, -100]);
    let got = work.step(&dev, &Solo, &step(vec![none, some]), 0, 1e-3).unwrap();
    assert_eq!((got.supervised, got.tokens, got.problem), (1, 6, None));
    assert_eq!((work.export_params(&dev).unwrap() == before, work.optimizer.updates()), (false, 1));
}
