//! A folder with a base model, rows, and what `ringtune sft --merge_adapters` made of them.

use serde_json::Value;

use crate::program::{Outcome, Workplace, first_rows};

/// The reference model; ChatML grows its vocabulary.
const MODEL: &str = "tests/data/model/tiny-llama-tied";

/// `base/`, `spm.model`, `rows.jsonl`, `more.jsonl`; no training yet.
pub fn untuned() -> Workplace {
    let w = Workplace::new();
    for file in ["config.json", "model.safetensors", "generation_config.json"] {
        w.copy(&format!("{MODEL}/{file}"), &format!("base/{file}"));
    }
    w.copy("tests/data/tokenizer/spm4k.model", "spm.model");
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 24));
    w.write("more.jsonl", first_rows("data/demo/define.jsonl", 9));
    w
}

/// As [`untuned`], with an adapter in `out/`, its grown base in `out/resized_base/` and the merged model in `out/merged/`.
pub fn tuned(more: &[&str]) -> Workplace {
    let w = untuned();
    let line = "sft --model_path base --tokenizer_path spm.model --dataset_paths rows.jsonl --output_dir out --max_steps 12 \
                --max_seq_len 128 --learning_rate 5e-3 --lora_r 4 --per_device_train_batch_size 2 --quiet --no_tensorboard";
    let mut words: Vec<&str> = line.split_whitespace().collect();
    words.extend(more);
    ok(w.run(&words));
    w
}

/// The outcome of a command that succeeded.
pub fn ok(outcome: Outcome) -> Outcome {
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    outcome
}

/// The command fails with `code` and a message that holds every part; nothing panics.
pub fn fails(outcome: &Outcome, code: i32, parts: &[&str]) {
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    assert_eq!(outcome.code, Some(code), "{}\n{}", outcome.stdout, outcome.stderr);
    for part in parts {
        assert!(outcome.error().contains(part), "{part:?} is not in: {}", outcome.error());
    }
    assert!(!outcome.error().ends_with('.'), "{}", outcome.error());
}

/// A JSON file of the folder.
pub fn json(w: &Workplace, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(w.path(name)).unwrap()).unwrap()
}
