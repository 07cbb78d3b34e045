//! A resumed run repeats the bits of one that was never interrupted: weights, moments, log lines.

use std::path::Path;

use ringtune::commands::jobs::SftJob;
use ringtune::commands::train::run_sft;
use ringtune::optim::Warmup;
use ringtune::settings::{EarlyStopping, Every, Resume};
use ringtune::tensor::DType;
use serde_json::Value;

use crate::runs::{copy_dir, metrics, same_file, sft, trainer_state};

/// Runs once without a break, then from each checkpoint of that run on its own, and compares everything at the end.
fn check(change: impl Fn(&mut SftJob), weights: &str, steps: &[u64]) {
    let dir = tempfile::tempdir().unwrap();
    let whole = {
        let mut job = sft(dir.path(), "whole");
        change(&mut job);
        run_sft(&job).unwrap();
        job.output_dir
    };
    for step in steps {
        let mut job = sft(dir.path(), &format!("from-{step}"));
        change(&mut job);
        // Checkpoints up to this step, and a log that ran on after it: what a killed run leaves.
        for (at, path) in ringtune::checkpoint::manifest::list(&whole).unwrap() {
            if at <= *step {
                copy_dir(&path, &job.output_dir.join(path.file_name().unwrap()));
            }
        }
        std::fs::copy(whole.join("metrics.jsonl"), job.output_dir.join("metrics.jsonl")).unwrap();
        job.settings.resume = Resume::Auto;
        run_sft(&job).unwrap();
        let resumed = &job.output_dir;
        same_file(&whole.join(weights), &resumed.join(weights));
        let last = format!("checkpoint-{}", job.settings.max_steps.unwrap());
        for file in [weights, "optimizer.safetensors"] {
            same_file(&whole.join(&last).join(file), &resumed.join(&last).join(file));
        }
        assert_eq!(metrics(&whole), metrics(resumed), "log of the run resumed after step {step}");
        assert_eq!(without_paths(&whole), without_paths(resumed), "state of the run resumed after step {step}");
    }
}

/// The state without the output folder's name in it.
fn without_paths(dir: &Path) -> Value {
    let mut v = trainer_state(dir);
    v["best_model_checkpoint"].take();
    v
}

#[test]
fn lora_with_dropout_and_new_rows() {
    check(|_| {}, "adapter_model.safetensors", &[5, 10]);
}

#[test]
fn lora_bf16_over_epoch_ends_with_evaluations_and_a_log_window() {
    let change = |job: &mut SftJob| {
        job.settings.dtype = DType::Bf16;
        job.settings.save_every = Every::Steps(3);
        job.settings.eval_every = Every::Steps(4);
        job.settings.logging_steps = 5;
        job.settings.grad_accum = 3;
        job.settings.early_stopping = Some(EarlyStopping { patience: 9, threshold: 0.0 });
        job.data.packing = false;
        job.settings.max_steps = Some(21);
    };
    check(change, "adapter_model.safetensors", &[3, 9, 18]);
}

#[test]
fn full_f32() {
    let change = |job: &mut SftJob| {
        job.settings.lora = None;
        job.settings.learning_rate = Some(1e-3);
    };
    check(change, "model.safetensors", &[5]);
}

#[test]
fn full_bf16_keeps_its_masters() {
    let change = |job: &mut SftJob| {
        job.settings.lora = None;
        job.settings.dtype = DType::Bf16;
        job.settings.learning_rate = Some(1e-3);
    };
    check(change, "model.safetensors", &[5]);
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let job = sft(dir.path(), "out");
    run_sft(&job).unwrap();
    let weights = job.output_dir.join("adapter_model.safetensors");
    let expected = std::fs::read(&weights).unwrap();
    let newest = job.output_dir.join("checkpoint-12/optimizer.safetensors");
    let mut bytes = std::fs::read(&newest).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&newest, bytes).unwrap();
    std::fs::remove_file(job.output_dir.join("checkpoint-10/trainer_state.json")).unwrap();
    let mut again = job.clone();
    again.settings.resume = Resume::Auto;
    run_sft(&again).unwrap();
    assert!(std::fs::read(&weights).unwrap() == expected, "resumed from step 5, the weights differ");
    again.settings.resume = Resume::Path(job.output_dir.join("checkpoint-99"));
    assert!(run_sft(&again).unwrap_err().to_string().contains("checkpoint-99"));
}

#[test]
fn what_changed_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let job = sft(dir.path(), "out");
    run_sft(&job).unwrap();
    let refused = |change: &dyn Fn(&mut SftJob), name: &str| {
        let mut again = job.clone();
        again.settings.resume = Resume::Path(job.output_dir.join("checkpoint-5"));
        change(&mut again);
        let e = run_sft(&again).unwrap_err().to_string();
        assert!(e.contains(&format!("{name} differs")), "{e}");
        again.settings.allow_changed = vec![name.into()];
        again.output_dir = dir.path().join(format!("other-{name}"));
        run_sft(&again).unwrap();
    };
    refused(&|j| j.settings.weight_decay = 0.1, "config");
    refused(&|j| j.data.val_fraction = 0.2, "data");
}

/// All settings that differ are named; where other tensors would be trained, no word allows it.
#[test]
fn what_decides_the_tensors_cannot_change_on_resume() {
    let dir = tempfile::tempdir().unwrap();
    let job = sft(dir.path(), "out");
    run_sft(&job).unwrap();
    for allowed in [vec![], vec!["config".to_string()]] {
        let said = |change: &dyn Fn(&mut SftJob)| {
            let mut again = job.clone();
            again.settings.resume = Resume::Path(job.output_dir.join("checkpoint-5"));
            (again.settings.allow_changed, again.output_dir) = (allowed.clone(), dir.path().join("other"));
            change(&mut again);
            run_sft(&again).unwrap_err().to_string()
        };
        let e = said(&|j| {
            let lora = j.settings.lora.as_mut().unwrap();
            (lora.r, lora.alpha) = (lora.r * 2, lora.alpha * 4.0);
        });
        for part in [
            "checkpoint-5: config differs",
            "lora_r was ",
            "lora_alpha was ",
            "another lora_r: resume with the same ones",
        ] {
            assert!(e.contains(part), "{part}: {e}");
        }
        assert!(!e.contains("--allow-changed"), "{e}");
        let e = said(&|j| j.settings.lora = None);
        assert!(e.contains("another use_lora") && !e.contains("--allow-changed"), "{e}");
    }
}

#[test]
fn a_used_folder_needs_a_word() {
    let dir = tempfile::tempdir().unwrap();
    let job = sft(dir.path(), "out");
    run_sft(&job).unwrap();
    let e = run_sft(&job).unwrap_err();
    assert_eq!(e.exit_code(), 2);
    assert!(e.to_string().contains("--resume-from-checkpoint auto"), "{e}");
}

#[test]
fn going_back_keeps_the_line_that_is_left_apart() {
    let dir = tempfile::tempdir().unwrap();
    let job = sft(dir.path(), "out");
    run_sft(&job).unwrap();
    let weights = job.output_dir.join("adapter_model.safetensors");
    let expected = std::fs::read(&weights).unwrap();
    let mut again = job.clone();
    again.settings.resume = Resume::Path(job.output_dir.join("checkpoint-5"));
    again.settings.max_bad_steps = 3; // Changes no bit.
    again.settings.save_total_limit = Some(1);
    run_sft(&again).unwrap();
    assert!(std::fs::read(&weights).unwrap() == expected, "the same steps again, the weights differ");
    let names = |dir: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut found: Vec<_> =
            entries.filter(|n| n.starts_with("checkpoint-") || n.starts_with("abandoned-")).collect();
        found.sort();
        found
    };
    // What was written last on this line stays, and what the other line had is neither counted nor lost.
    assert_eq!(names(&job.output_dir), ["abandoned-10", "abandoned-12", "checkpoint-12"]);
    again.settings.resume = Resume::Path(job.output_dir.join("abandoned-10"));
    run_sft(&again).unwrap();
    assert_eq!(names(&job.output_dir), ["abandoned-10", "abandoned-12", "abandoned-12.2", "checkpoint-12"]);
    // Into another folder nothing moves there but what lay in its way.
    let other = dir.path().join("other");
    again.output_dir = other.clone();
    again.settings.resume = Resume::Path(job.output_dir.join("abandoned-10"));
    run_sft(&again).unwrap();
    assert_eq!(names(&other), ["checkpoint-12"]);
}

/// The weights of the best evaluation were deleted: that is said, and the next evaluation sets a new best, however much worse.
#[test]
fn a_best_model_that_is_gone_is_no_longer_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let mut job = sft(dir.path(), "out");
    // A rate that grows without end: the first evaluation stays the best.
    job.settings.learning_rate = Some(5.0);
    job.settings.schedule.warmup = Warmup::Steps(8);
    (job.settings.eval_every, job.settings.save_every) = (Every::Steps(2), Every::Steps(2));
    job.settings.max_steps = Some(8);
    run_sft(&job).unwrap();
    let best = |out: &Path| trainer_state(out)["best_global_step"].as_u64();
    let first = best(&job.output_dir).unwrap();
    assert!(first < 6, "the best step is {first}");
    for gone in [false, true] {
        let out = dir.path().join(format!("gone-{gone}"));
        for (_, path) in ringtune::checkpoint::manifest::list(&job.output_dir).unwrap() {
            copy_dir(&path, &out.join(path.file_name().unwrap()));
        }
        let mut again = job.clone();
        again.output_dir = out.clone();
        again.settings.resume = Resume::Path(out.join("checkpoint-6"));
        if gone {
            std::fs::remove_dir_all(out.join(format!("checkpoint-{first}"))).unwrap();
        }
        run_sft(&again).unwrap();
        let now = best(&out).unwrap();
        assert_eq!(now, if gone { 8 } else { first });
        let from = out.join(format!("checkpoint-{now}"));
        same_file(&from.join("adapter_model.safetensors"), &out.join("adapter_model.safetensors"));
    }
}
