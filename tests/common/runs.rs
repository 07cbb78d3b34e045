//! Small training runs: the reference model of 354,624 weights on a few dozen real rows.

use std::path::{Path, PathBuf};

use ringtune::commands::jobs::SftJob;
use ringtune::commands::open::TemplateArgs;
use ringtune::data::encode::Overflow;
use ringtune::data::sft::{RowSpec, SftDataSpec};
use ringtune::model::LoraSpec;
use ringtune::settings::{Every, TrainSettings};
use serde_json::Value;

/// The reference model; it has no `<|im_start|>` and `<|im_end|>`, so ChatML grows its vocabulary.
pub const MODEL: &str = "tests/data/model/tiny-llama-tied";

/// Writes the first `n` rows of the demo's chat data to `dir/rows.jsonl`.
pub fn rows(dir: &Path, n: usize) -> PathBuf {
    let text = std::fs::read_to_string("data/demo/chat.jsonl").unwrap();
    let path = dir.join("rows.jsonl");
    let lines: Vec<&str> = text.lines().take(n).collect();
    std::fs::write(&path, lines.join("\n") + "\n").unwrap();
    path
}

/// LoRA with dropout on ChatML rows, packed, two micro-batches a step; everything below `dir`.
pub fn sft(dir: &Path, name: &str) -> SftJob {
    SftJob {
        model_path: MODEL.into(),
        tokenizer_path: None,
        special_ids: Default::default(),
        template: TemplateArgs { name: Some("chatml".into()), ..Default::default() },
        pad_vocab_to: None,
        data: SftDataSpec {
            paths: vec![rows(dir, 60)],
            val_paths: Vec::new(),
            weights: None,
            weight_unit: Default::default(),
            epoch_samples: None,
            val_fraction: 0.1,
            packing: true,
            seed: 7,
            row: RowSpec {
                max_seq_len: 0,
                overflow: Overflow::Truncate,
                rows: Default::default(),
                skip_log: None,
                cache_dir: dir.join("cache"),
            },
        },
        device: "cpu".into(),
        output_dir: dir.join(name),
        settings: TrainSettings {
            learning_rate: Some(5e-3),
            max_steps: Some(12),
            micro_batch_size: 2,
            eval_batch_size: 2,
            grad_accum: 2,
            max_seq_len: Some(64),
            lora: Some(LoraSpec { r: 4, alpha: 8.0, dropout: 0.1, ..TrainSettings::default().lora.unwrap() }),
            eval_every: Every::Never,
            save_every: Every::Steps(5),
            quiet: true,
            threads: Some(1),
            ..Default::default()
        },
        resolved: Vec::new(),
    }
}

/// The objects of `metrics.jsonl`, times left out.
pub fn metrics(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let parse = |line: &str| {
        let mut v: Value = serde_json::from_str(line).unwrap();
        let object = v.as_object_mut().unwrap();
        object.remove("ms");
        object.remove("tokens_per_second");
        v
    };
    text.lines().map(parse).collect()
}

/// The losses of all steps.
pub fn losses(dir: &Path) -> Vec<f64> {
    metrics(dir).iter().filter_map(|v| v["loss"].as_f64()).collect()
}

/// `trainer_state.json` without the times of its last entry, and `ringtune_state.json` as one of its fields.
pub fn trainer_state(dir: &Path) -> Value {
    let mut v: Value = serde_json::from_slice(&std::fs::read(dir.join("trainer_state.json")).unwrap()).unwrap();
    v["ringtune"] = serde_json::from_slice(&std::fs::read(dir.join("ringtune_state.json")).unwrap()).unwrap();
    for entry in v["log_history"].as_array_mut().unwrap() {
        let entry = entry.as_object_mut().unwrap();
        entry.remove("train_runtime");
        entry.remove("train_steps_per_second");
    }
    v
}

/// Asserts that two files have the same bytes.
pub fn same_file(a: &Path, b: &Path) {
    let (x, y) = (std::fs::read(a).unwrap(), std::fs::read(b).unwrap());
    assert!(x == y, "{} and {} differ", a.display(), b.display());
}

/// Copies a folder.
pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Rewrites one tensor of a safetensors file: `change` gets its shape and its bytes.
pub fn change_tensor(path: &Path, name: &str, change: impl FnOnce(&mut Vec<usize>, &mut Vec<u8>)) {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)> =
        file.iter().map(|(n, t)| (n.to_string(), t.dtype(), t.shape().to_vec(), t.data().to_vec())).collect();
    let found = all.iter_mut().find(|t| t.0 == name).unwrap();
    change(&mut found.2, &mut found.3);
    let views: Vec<_> = all
        .iter()
        .map(|(n, d, s, b)| (n.as_str(), safetensors::tensor::TensorView::new(*d, s.clone(), b).unwrap()))
        .collect();
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}
