//! The memory that `ringtune check` and a run predict: to the byte what is allocated, and a remedy that works.

use std::path::Path;

use ringtune::backend::{Backend, Footprint};
use ringtune::cpu::Cpu;
use ringtune::hf::TensorSource;
use ringtune::hf::resize::{NewToken, Resize, Resized};
use ringtune::hf::safetensors::ModelFiles;
use ringtune::model::Recompute;
use ringtune::settings::TrainSettings;
use ringtune::tensor::DType;
use ringtune::train::memory::{Demand, estimate, estimate_within, remedy, sum};
use ringtune::train::setup;

use crate::check::{MODEL, check, flags, good, problem};

#[test]
fn too_little_memory_is_a_problem_with_a_remedy_that_works() {
    let w = good();
    let base = check(&w, &["--no_lora"]);
    // A run that has not the memory writes its checkpoints without a copy.
    let memory = &base["memory_per_device"];
    let of = |value: &serde_json::Value| value.as_u64().unwrap_or_else(|| panic!("{memory:#}"));
    let total = of(&memory["total"]) - of(&memory["bytes"]["copy_for_a_checkpoint"]);
    let fits = check(&w, &["--no_lora", "--device-memory", &total.to_string()]);
    assert_eq!(fits["memory_per_device"]["total"], total, "{fits:#}");
    for part in [0.9, 0.6, 0.4] {
        let size = format!("{}", (total as f64 * part) as u64);
        let more = ["--no_lora", "--device-memory", &size];
        let report = check(&w, &more);
        let found = problem(&report, "memory", "--device-memory");
        let remedy = report["memory_per_device"]["remedy"]["flags"].as_str().unwrap();
        assert!(found["do"].as_str().unwrap().starts_with(remedy));
        let words: Vec<&str> = remedy.split(' ').chain(["--device-memory", &size]).collect();
        let words: Vec<&str> =
            if remedy.contains("--use-lora") { words } else { [&["--no_lora"], &words[..]].concat() };
        let fixed = check(&w, &words);
        assert_eq!(fixed["memory_per_device"]["fits"], true, "{remedy}: {:#}", fixed["problems"]);
        assert_eq!(fixed["memory_per_device"]["total"], report["memory_per_device"]["remedy"]["bytes"], "{remedy}");
    }
    let report = check(&w, &["--device-memory", "1KB"]);
    assert!(report["memory_per_device"]["remedy"].is_null());
}

/// The estimate is what is allocated, to the byte, for every family, precision, recomputation and kind of training.
#[test]
fn memory_is_estimated_to_the_byte() {
    let dev = Cpu::new(Some(1)).unwrap();
    for name in ["tiny-llama-tied", "tiny-llama-untied", "qwen2-untied", "qwen3-tied", "mistral-window", "llama3-rope"]
    {
        let base = ModelFiles::open(Path::new(&format!("tests/data/model/{name}"))).unwrap();
        let vocabulary = base.config().vocab_size;
        let grow = Resize {
            tokens: vec![NewToken { id: vocabulary, like: 2 }, NewToken { id: vocabulary + 1, like: 3 }],
            ..Resize::default()
        };
        for (case, how) in [Resize::default(), grow].into_iter().enumerate() {
            let grown = Resized::new(&base, how).unwrap();
            for dtype in [DType::F32, DType::Bf16] {
                for recompute in [Recompute::None, Recompute::Attention, Recompute::Layer] {
                    for lora in [0.0, 0.1, -1.0] {
                        let mut s = TrainSettings {
                            dtype,
                            recompute,
                            micro_batch_size: 2,
                            eval_batch_size: 1,
                            grad_accum: 1 + case,
                            ..TrainSettings::default()
                        };
                        match s.lora.as_mut().filter(|_| lora >= 0.0) {
                            Some(l) => (l.r, l.dropout) = (3, lora),
                            None => s.lora = None,
                        }
                        if lora == 0.1 {
                            s.lora_targets = vec!["q".into(), "o".into(), "up".into()];
                        }
                        let spec = setup::lora_spec(&s).unwrap();
                        let new_rows = (case == 1 && spec.is_some()).then_some((vocabulary, 2));
                        let work = setup::workload(&dev, &grown, &s, new_rows, 2 * 24).unwrap();
                        let demand = Demand {
                            config: grown.config(),
                            settings: &s,
                            lora: spec.as_ref(),
                            new_rows: new_rows.map(|(_, n)| n),
                            max_seq_len: 24,
                            saves: false,
                            device: Cpu::footprint(grown.config().n_classes),
                        };
                        let found = estimate(&demand);
                        let now = setup::memory(&work);
                        assert_eq!(found[..now.len()], now, "{name} {case} {dtype:?} {recompute:?} {lora}");
                        let trained = format!("{} trained", ringtune::text::grouped(demand.trained_weights()));
                        assert!(setup::parameters_line(&work).contains(&trained), "{trained}");
                    }
                }
            }
        }
    }
}

/// Of several ranks the memory is that of one, with its part of the state, and a step has the rows of all.
#[test]
fn several_ranks_have_a_part_each() {
    let w = good();
    let of = |more: &[&'static str]| {
        let flags = ["--no_lora", "--per_device_train_batch_size", "2"];
        let report = check(&w, &[&flags[..], more].concat());
        let memory = &report["memory_per_device"];
        let state = memory["bytes"]["moments_and_masters"].as_u64().unwrap_or_else(|| panic!("{memory:#}"));
        (state, report["steps"]["rows_per_step"].as_u64().unwrap())
    };
    let (whole, rows) = of(&[]);
    assert_eq!(of(&["--ranks", "4"]), (whole, 4 * rows));
    let (part, all) = of(&["--ranks", "4", "--zero", "1"]);
    assert!(all == 4 * rows && part * 2 < whole && part * 4 >= whole, "{part} of {whole}");
    assert_eq!(of(&["--ranks", "2", "--global_batch_size", "16"]).1, 16);
    // Those of --ranks are judged, whoever this process is one of.
    let words = flags(&["--no_lora", "--per_device_train_batch_size", "2", "--json"]).join(" ");
    let on = |ranks: &str, rows: &str| {
        w.shell(&format!("WORLD_SIZE=8 RANK=0 LOCAL_RANK=0 LOCAL_WORLD_SIZE=8 ringtune check {words} --ranks {ranks} --global_batch_size {rows}"))
    };
    let fits = on("3", "12");
    assert!(fits.code == Some(0) && fits.stdout.contains("\"rows_per_step\": 12"), "{}{}", fits.stdout, fits.stderr);
    let not = on("3", "16");
    assert_eq!(not.code, Some(2), "{}", not.stdout);
    assert!(
        not.error().contains("micro-batches of 2 rows on 3 ranks make no step of so many rows; expected 12 or 18"),
        "{}",
        not.stderr
    );
}

#[test]
fn a_remedy_is_the_mildest_change() {
    let base = ModelFiles::open(Path::new(MODEL)).unwrap();
    let s = TrainSettings { lora: None, ..TrainSettings::default() };
    let lora = setup::lora_spec(&TrainSettings::default()).unwrap().unwrap();
    let device = Footprint { logits_rows: 1, ..Cpu::footprint(base.config().n_classes) };
    let demand = Demand {
        config: base.config(),
        settings: &s,
        lora: None,
        new_rows: None,
        max_seq_len: 256,
        saves: false,
        device,
    };
    let total = sum(&estimate_within(&demand, 1, None));
    let flags = |n: u64| remedy(&demand, &lora, n).unwrap().flags;
    assert_eq!(flags(total - 1), "--recompute attention");
    assert!(flags(total / 2).starts_with("--recompute layer"));
    assert!(flags(total / 6).contains("--per-device-train-batch-size"), "{}", flags(total / 6));
    assert_eq!(remedy(&demand, &lora, 1000), None);
}
