//! Settings that are numbers no computation can hold, epochs that no plan can, null, paths that begin at home, and validation rows that
//! are trained on.

use std::fs;

use crate::program::{Workplace, first_rows};
use crate::tuned::fails;

const MODEL: &str = "tests/data/model/tiny-llama-tied";
const FLAGS: [&str; 9] =
    ["--model_path", "model", "--tokenizer_path", "spm.model", "--max_steps", "1", "--max_seq_len", "32", "--quiet"];

fn good() -> Workplace {
    let w = Workplace::new();
    for file in ["config.json", "model.safetensors"] {
        w.copy(&format!("{MODEL}/{file}"), &format!("model/{file}"));
    }
    w.copy("tests/data/tokenizer/spm4k.model", "spm.model");
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 20));
    w
}

#[test]
fn numbers_that_no_computation_holds_are_refused_at_once() {
    let w = good();
    for (flag, number, what) in [
        ("--global_batch_size", "3000000000", "make it with 375000000 a step, expected at most 65536"),
        ("--epoch_samples", "3000000000", "more than 1000 times, expected at most 1000000"),
        ("--learning_rate", "1e-320", "which is 0 in single precision"),
        ("--adam_epsilon", "1e-320", "which is 0 in single precision"),
        ("--adam_beta1", "0.9999999999", "which is 1 in single precision"),
        ("--lora_alpha", "1e308", "which is infinite in single precision"),
    ] {
        let words =
            [&["sft", "--dataset_paths", "rows.jsonl", "--output_dir", "out", flag, number], &FLAGS[..]].concat();
        fails(&w.run(&words), 2, &[number, what]);
    }
}

/// Shells leave `~` in `--output-dir=~/out`, and no shell reads a config file. Null is a setting that nobody set, whatever its default.
#[test]
fn a_path_in_the_home_folder_is_found_there_and_null_is_the_default() {
    let w = good();
    fs::create_dir(w.path("home")).unwrap();
    fs::rename(w.path("rows.jsonl"), w.path("home/rows.jsonl")).unwrap();
    w.write(
        "c.json",
        r#"{"dataset_paths": ["~/rows.jsonl"], "lora_r": null, "learning_rate": null, "use_lora": null}"#,
    );
    let line = format!("HOME=$PWD/home ringtune sft --config_path c.json '--output_dir=~/out' {}", FLAGS.join(" "));
    let outcome = w.shell(&line);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let adapter = fs::read_to_string(w.path("home/out/adapter_config.json")).unwrap();
    assert!(adapter.contains("\"r\": 16"), "{adapter}");
    assert!(!w.path("~").exists());
}

#[test]
fn validation_rows_that_are_trained_on_are_said() {
    let w = good();
    let validate = |rows: &str| {
        let words = ["sft", "--dataset_paths", "rows.jsonl", "--output_dir", "out", "--val_paths", rows];
        let outcome = w.run(&[&words[..], &FLAGS[..]].concat());
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        fs::remove_dir_all(w.path("out")).unwrap();
        outcome.stderr
    };
    w.write("same", first_rows("data/demo/chat.jsonl", 3) + &first_rows("data/demo/eval.jsonl", 2));
    w.write("other", first_rows("data/demo/eval.jsonl", 4));
    let said = validate("same");
    assert!(said.contains("same: 3 of 5 validation rows ask what the training data ask too"), "{said}");
    assert!(!validate("other").contains("validation rows ask"));
}
