//! Runs of `sft` and `pretrain` from files to files on a small model.

use std::path::Path;

use ringtune::checkpoint::manifest;
use ringtune::commands::jobs::{PretrainJob, SftJob};
use ringtune::commands::train::{run_pretrain, run_sft};
use ringtune::data::pretrain::PretrainDataSpec;
use ringtune::data::tokenizer::{SpecialIds, Tokenizer};
use ringtune::hf::SaveDType;
use ringtune::hf::peft::Adapter;
use ringtune::hf::safetensors::ModelFiles;
use ringtune::hf::save::{SaveOptions, save_model};
use ringtune::settings::{EarlyStopping, Every, TrainSettings};
use ringtune::tensor::DType;

use crate::runs::{MODEL, losses, metrics, same_file, sft, trainer_state};

fn run(change: impl Fn(&mut SftJob)) -> (tempfile::TempDir, SftJob) {
    let dir = tempfile::tempdir().unwrap();
    let mut job = sft(dir.path(), "out");
    change(&mut job);
    run_sft(&job).unwrap();
    (dir, job)
}

fn refused(change: impl Fn(&mut SftJob, &Path), exit_code: u8, expected: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let mut job = sft(dir.path(), "out");
    change(&mut job, dir.path());
    let e = run_sft(&job).unwrap_err();
    assert_eq!(e.exit_code(), exit_code, "{e}");
    for part in expected {
        assert!(e.to_string().contains(part), "expected {part:?} in: {e}");
    }
}

#[test]
fn lora_learns_and_writes_what_other_tools_load() {
    let (_dir, job) = run(|j| {
        j.settings.max_steps = Some(30);
        j.settings.eval_every = Every::Steps(10);
        j.settings.eval_on_start = true;
        j.settings.merge_adapters = true;
    });
    let out = &job.output_dir;
    let eval: Vec<f64> = metrics(out).iter().filter_map(|v| v["eval_loss"].as_f64()).collect();
    assert_eq!(eval.len(), 4);
    assert!(eval[3] < eval[0] - 1.0, "the validation loss goes from {} to {}", eval[0], eval[3]);
    for file in ["adapter_config.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"] {
        assert!(out.join(file).is_file(), "{file} is missing");
    }
    // The adapter fits the base with the grown vocabulary that its config names, and the merged model is one of its own.
    let adapter = Adapter::open(out).unwrap();
    let base = ModelFiles::open(&adapter.find_base(None).unwrap()).unwrap();
    assert_eq!(base.hf_config().model.vocab_size, 4098);
    assert_eq!(adapter.fit(&base.hf_config().model).unwrap().vocab_size, 4098);
    assert_eq!(base.hf_config().model.eos_token_ids, [4097]);
    let merged = ModelFiles::open(&out.join("merged")).unwrap();
    assert_eq!(merged.hf_config().model, base.hf_config().model);
    let state = trainer_state(out);
    assert_eq!(state["global_step"], 30);
    assert_eq!(state["log_history"].as_array().unwrap().len(), 30 + 4 + 1);
    let events = std::fs::read_dir(out.join("runs")).unwrap().count();
    assert_eq!(events, 1);
}

#[test]
fn full_training_learns_and_saves_a_model() {
    let (_dir, job) = run(|j| {
        j.settings.lora = None;
        j.settings.learning_rate = Some(2e-3);
        j.settings.max_steps = Some(20);
    });
    let losses = losses(&job.output_dir);
    assert!(losses[19] < losses[0] - 1.0, "{losses:?}");
    let model = ModelFiles::open(&job.output_dir).unwrap();
    assert_eq!(model.hf_config().model.vocab_size, 4098);
    assert!(!job.output_dir.join("resized_base").exists());
}

#[test]
fn accumulating_does_not_change_the_mean() {
    let run = |micro_batch_size, grad_accum| {
        let (dir, job) = run(|j| {
            (j.settings.micro_batch_size, j.settings.grad_accum) = (micro_batch_size, grad_accum);
            j.settings.lora.as_mut().unwrap().dropout = 0.0;
            j.settings.max_steps = Some(4);
        });
        let figures: Vec<(f64, f64)> = metrics(&job.output_dir)
            .iter()
            .map(|v| (v["loss"].as_f64().unwrap(), v["grad_norm"].as_f64().unwrap()))
            .collect();
        drop(dir);
        figures
    };
    let (one, many) = (run(8, 1), run(1, 8));
    // The same targets in sums of another order: f32 rounding, 2^-24 a term, some thousand terms.
    let close = |a: f64, b: f64| (a / b - 1.0).abs() < 2048.0 * 2f64.powi(-24);
    for (a, b) in one.iter().zip(&many) {
        assert!(close(a.0, b.0) && close(a.1, b.1), "{one:?} against {many:?}");
    }
    assert_eq!((one.len(), many.len()), (4, 4));
}

#[test]
fn eval_loss_does_not_depend_on_batch_or_packing() {
    let eval = |batch, packing| {
        let (dir, job) = run(|j| {
            j.settings.eval_batch_size = batch;
            j.data.packing = packing;
            j.data.val_fraction = 0.3;
            j.settings.eval_every = Every::Steps(100);
            j.settings.eval_on_start = true;
            j.settings.max_steps = Some(1);
        });
        let first = metrics(&job.output_dir).into_iter().find(|v| v.get("eval_loss").is_some()).unwrap();
        drop(dir);
        (first["eval_loss"].as_f64().unwrap(), first["eval_num_tokens"].as_u64().unwrap())
    };
    let (loss, tokens) = eval(8, true);
    for (batch, packing) in [(1, true), (3, true), (1, false), (8, false)] {
        let (other, n) = eval(batch, packing);
        assert_eq!(tokens, n);
        // The losses of the tokens have the same bits; only their f64 sum runs in another order.
        assert!((loss / other - 1.0).abs() < 1e-13, "{loss} against {other} at batch {batch}, packing {packing}");
    }
}

#[test]
fn same_seed_same_bits_whatever_the_threads() {
    let weights = |threads, seed| {
        let (dir, job) = run(|j| {
            j.settings.threads = Some(threads);
            j.settings.seed = seed;
            j.settings.max_steps = Some(4);
        });
        let bytes = std::fs::read(job.output_dir.join("adapter_model.safetensors")).unwrap();
        drop(dir);
        bytes
    };
    let one = weights(1, 1);
    assert!(one == weights(2, 1), "another number of threads changed the weights");
    assert!(one != weights(1, 2), "another seed did not change the weights");
}

#[test]
fn early_stopping_ends_the_run_and_the_best_model_is_kept() {
    let (_dir, job) = run(|j| {
        // So large a rate that the validation loss gets worse after a while.
        j.settings.learning_rate = Some(0.1);
        j.settings.max_steps = Some(60);
        j.settings.eval_every = Every::Steps(2);
        j.settings.save_every = Every::Steps(4);
        j.settings.save_total_limit = Some(1);
        j.settings.early_stopping = Some(EarlyStopping { patience: 3, threshold: 0.0 });
    });
    let state = trainer_state(&job.output_dir);
    let (last, best) = (state["global_step"].as_u64().unwrap(), state["best_global_step"].as_u64().unwrap());
    assert!(last < 60 && last == best + 6, "stopped after step {last}, best at {best}");
    let kept: Vec<u64> = manifest::list(&job.output_dir).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(kept, [best, last], "the best one and the newest");
    let best_dir = job.output_dir.join(format!("checkpoint-{best}"));
    same_file(&best_dir.join("adapter_model.safetensors"), &job.output_dir.join("adapter_model.safetensors"));
    let lowest = metrics(&job.output_dir).iter().filter_map(|v| v["eval_loss"].as_f64()).fold(f64::MAX, f64::min);
    assert_eq!(state["best_metric"].as_f64().unwrap(), lowest);
}

#[test]
fn what_is_not_finite_is_named_and_stops_the_run() {
    let overflow = |j: &mut SftJob, _: &Path| {
        j.settings.learning_rate = Some(1e30);
        j.settings.max_bad_steps = 3;
    };
    refused(overflow, 1, &["3 steps in a row", "not finite", "rows.jsonl:"]);
    let dir = tempfile::tempdir().unwrap();
    let mut job = sft(dir.path(), "out");
    overflow(&mut job, dir.path());
    run_sft(&job).unwrap_err();
    let bad: Vec<_> = metrics(&job.output_dir).into_iter().filter(|v| v.get("skipped").is_some()).collect();
    assert_eq!(bad.len(), 3);
    assert!(bad[0]["samples"].as_array().is_some_and(|s| !s.is_empty()), "{}", bad[0]);
}

/// Too few bad steps to stop the run, and all at its end: what they leave is no result.
#[test]
fn a_run_that_ends_with_weights_of_no_use_says_so_and_writes_none() {
    for (val_fraction, words) in
        [(0.2, "validation rows is NaN after the last step, and the last "), (0.0, "the last ")]
    {
        let dir = tempfile::tempdir().unwrap();
        let mut job = sft(dir.path(), "out");
        (job.settings.learning_rate, job.settings.max_steps, job.data.val_fraction) =
            (Some(1e30), Some(5), val_fraction);
        job.settings.eval_every = Every::Steps(10);
        let said = run_sft(&job).unwrap_err();
        assert_eq!(said.exit_code(), 1);
        let said = said.to_string();
        for word in ["weights of no use", words, "--learning-rate (1e30)"] {
            assert!(said.contains(word), "{said}");
        }
        assert!(!job.output_dir.join("adapter_model.safetensors").exists());
        assert!(manifest::list(&job.output_dir).unwrap().is_empty(), "a checkpoint of weights that give no loss");
    }
}

/// Steps that are not finite count only in a row: sound ones between them begin anew.
#[test]
fn a_sound_step_ends_a_row_of_bad_ones() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    let files = ModelFiles::open(Path::new("tests/data/model/tiny-llama-untied")).unwrap();
    save_model(&base, &files, SaveOptions { dtype: SaveDType::F32, ..SaveOptions::default() }).unwrap();
    // A token whose embedding is finite in f32 and infinite in bf16.
    let spm = Path::new("tests/data/tokenizer/spm4k.model");
    let tokenizer = Tokenizer::open(spm, SpecialIds::default()).unwrap();
    let marks = tokenizer.pieces().iter().enumerate().filter(|(_, p)| p.text.contains('@')).map(|(id, _)| id);
    crate::runs::change_tensor(&base.join("model.safetensors"), "model.embed_tokens.weight", |shape, bytes| {
        let row = bytes.len() / shape[0];
        for id in marks {
            bytes[id * row..(id + 1) * row]
                .chunks_exact_mut(4)
                .for_each(|b| b.copy_from_slice(&f32::MAX.to_le_bytes()));
        }
    });
    let row = |i: usize| {
        let mark = if i.is_multiple_of(4) { "@" } else { "a" };
        format!("{{\"prompt\": \"{mark} question {i}\", \"response\": \"an answer\"}}\n")
    };
    std::fs::write(dir.path().join("some.jsonl"), (0..24).map(row).collect::<String>()).unwrap();
    let run = |name: &str, max_bad_steps: u32| {
        let mut job = sft(dir.path(), name);
        (job.model_path, job.tokenizer_path) = (base.clone(), Some(spm.into()));
        job.template.name = Some("instruct".into());
        job.data.paths = vec![dir.path().join("some.jsonl")];
        (job.data.val_fraction, job.data.packing, job.data.seed) = (0.0, false, SEED);
        (job.settings.micro_batch_size, job.settings.grad_accum, job.settings.max_steps) = (1, 1, Some(24));
        (job.settings.max_bad_steps, job.settings.dtype) = (max_bad_steps, DType::Bf16);
        let bad = |out: &Path| -> Vec<u64> {
            metrics(out).iter().filter(|m| m.get("skipped").is_some()).map(|m| m["step"].as_u64().unwrap()).collect()
        };
        (run_sft(&job), bad(&job.output_dir))
    };
    const SEED: u64 = 3;
    let (all, bad) = run("all", 100);
    all.unwrap();
    let longest = bad.chunk_by(|a, b| a + 1 == *b).map(<[u64]>::len).max().unwrap();
    assert_eq!(bad.len(), 6);
    assert!(longest < 4, "{bad:?}");
    // One more than ever stood in a row, fewer than there are.
    let (through, again) = run("through", longest as u32 + 1);
    through.unwrap();
    assert_eq!(again, bad);
    let (stopped, _) = run("stopped", longest as u32);
    assert!(stopped.unwrap_err().to_string().contains(&format!("{longest} steps in a row")));
}

#[test]
fn nan_weights_are_refused() {
    let spoil = |j: &mut SftJob, dir: &Path| {
        crate::runs::copy_dir(Path::new(MODEL), &dir.join("model"));
        let path = dir.join("model/model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() - 4;
        bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        j.model_path = dir.join("model");
    };
    refused(spoil, 1, &["model.safetensors", "NaN"]);
}

#[test]
fn bad_requests_name_what_is_wrong() {
    refused(|j, d| j.output_dir = d.join("rows.jsonl/out"), 1, &["rows.jsonl/out"]);
    refused(|j, _| j.settings.max_seq_len = Some(100_000), 2, &["max_seq_len 100000", "maximum"]);
    refused(|j, _| j.settings.lora_targets = vec!["w".into()], 2, &["lora_targets", "\"w\""]);
    refused(|j, _| j.model_path = "nowhere".into(), 1, &["nowhere"]);
    refused(|j, _| j.tokenizer_path = Some("tests/data/tokenizer/spm32k.model".into()), 1, &["vocabulary mismatch"]);
    refused(|j, _| j.data.weights = Some(vec![0.5, 0.5]), 2, &["weight"]);
}

#[test]
fn pretraining_makes_a_model_that_sft_takes() {
    let dir = tempfile::tempdir().unwrap();
    let config = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true}"#;
    let job = PretrainJob {
        config_name: "mini".into(),
        config_text: config.into(),
        tokenizer_path: "tests/data/tokenizer/spm4k.model".into(),
        special_ids: Default::default(),
        data: PretrainDataSpec {
            paths: vec!["data/demo/pretrain_valid.txt".into()],
            val_paths: Vec::new(),
            weights: None,
            weight_unit: Default::default(),
            epoch_samples: None,
            val_fraction: 0.05,
            max_seq_len: 0,
            packing: true,
            seed: 1,
            columns: Default::default(),
            raw_width: None,
            cache_dir: dir.path().join("cache"),
        },
        device: "cpu".into(),
        output_dir: dir.path().join("mix"),
        settings: TrainSettings {
            lora: None,
            max_steps: Some(10),
            learning_rate: Some(1e-2),
            micro_batch_size: 2,
            quiet: true,
            ..Default::default()
        },
        resolved: Vec::new(),
    };
    run_pretrain(&job).unwrap();
    let run_dir = dir.path().join("mix/mini");
    let losses = losses(&run_dir);
    // A new model knows nothing: ln 4096 = 8.318.
    assert!((losses[0] - 8.318).abs() < 0.05, "{}", losses[0]);
    assert!(losses[9] < losses[0] - 0.5, "{losses:?}");
    let mut tune = sft(dir.path(), "sft");
    tune.model_path = run_dir.join("final");
    tune.settings.max_steps = Some(2);
    run_sft(&tune).unwrap();
    // And what sft wrote in full is a base again, whose tokens are not made anew.
    tune.settings.lora = None;
    tune.output_dir = dir.path().join("full");
    run_sft(&tune).unwrap();
    tune.model_path = tune.output_dir.clone();
    tune.output_dir = dir.path().join("again");
    run_sft(&tune).unwrap();
    assert_eq!(ModelFiles::open(&tune.output_dir).unwrap().hf_config().model.vocab_size, 4098);
}

#[test]
fn a_trace_that_cannot_be_written_is_said_before_anything_is_read() {
    let late = |j: &mut SftJob, dir: &Path| {
        j.model_path = dir.join("no such model");
        j.settings.trace = Some(dir.join("no such folder/trace.json"));
    };
    refused(late, 1, &["the trace cannot be written: "]);
}

#[test]
fn a_trace_has_every_phase_of_every_step() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    let (_run, job) = run(|j| {
        j.settings.max_steps = Some(3);
        j.settings.eval_every = Every::Steps(2);
        j.settings.save_every = Every::Steps(2);
        j.settings.trace = Some(path.clone());
    });
    let events: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let of = |step: u64| -> Vec<&str> {
        let own = events.iter().filter(|e| e["args"]["step"] == step);
        own.map(|e| e["name"].as_str().unwrap()).collect()
    };
    // Two micro-batches a step. Spans are written as they end; the evaluation and the checkpoint come after step 2 and the last one.
    let step = ["data", "forward", "backward", "forward", "backward", "reduce", "update"];
    assert_eq!(of(1), step);
    for n in [2, 3] {
        assert_eq!(of(n), [&step[..], &["evaluate", "save"]].concat(), "step {n}");
    }
    // Nothing of it changes a result.
    let (_other, plain) = run(|j| {
        j.settings.max_steps = Some(3);
        j.settings.eval_every = Every::Steps(2);
        j.settings.save_every = Every::Steps(2);
    });
    assert_eq!(losses(&job.output_dir), losses(&plain.output_dir));
}

#[test]
fn the_last_step_is_evaluated_and_the_summary_has_the_mean_of_all_losses() {
    let (_dir, job) = run(|j| {
        j.settings.eval_every = Every::Steps(5);
        j.settings.logging_steps = 3;
    });
    let evaluated: Vec<u64> = metrics(&job.output_dir)
        .iter()
        .filter(|m| m.get("eval_loss").is_some())
        .map(|m| m["step"].as_u64().unwrap())
        .collect();
    assert_eq!(evaluated, [5, 10, 12]);
    let all = losses(&job.output_dir);
    let state = trainer_state(&job.output_dir);
    let summary = state["log_history"].as_array().unwrap().last().unwrap();
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    assert!((summary["train_loss"].as_f64().unwrap() - mean).abs() < 1e-9, "{summary} for a mean of {mean}");
}
