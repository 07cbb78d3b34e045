//! Bad input through the command line: each mistake gives its message and its exit code, never a panic.

use std::fs;

use crate::program::{Outcome, Workplace, first_rows, repository};

const MODEL: &str = "tests/data/model/tiny-llama-tied";

/// A folder with a model, a tokenizer and rows that train.
pub fn good() -> Workplace {
    let w = Workplace::new();
    for file in ["config.json", "model.safetensors"] {
        w.copy(&format!("{MODEL}/{file}"), &format!("model/{file}"));
    }
    w.copy("tests/data/tokenizer/spm4k.model", "spm.model");
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 20));
    w
}

fn sft(w: &Workplace, more: &[&str]) -> Outcome {
    let mut words = vec!["sft", "--output_dir", "out", "--max_steps", "1", "--quiet"];
    let default = |flag: &'static str, value: &'static str, words: &mut Vec<&str>| {
        if !more.contains(&flag) {
            words.extend([flag, value]);
        }
    };
    default("--model_path", "model", &mut words);
    default("--tokenizer_path", "spm.model", &mut words);
    default("--dataset_paths", "rows.jsonl", &mut words);
    words.retain(|w| *w != "--output_dir" || !more.contains(&"--output_dir"));
    if more.contains(&"--output_dir") {
        words.retain(|w| *w != "out");
    }
    words.extend(more);
    w.run(&words)
}

/// The command fails with `code` and a message that holds every part; nothing panics.
pub fn fails(outcome: &Outcome, code: i32, parts: &[&str]) {
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    assert_eq!(outcome.code, Some(code), "{}", outcome.stderr);
    for part in parts {
        assert!(outcome.error().contains(part), "{part:?} is not in: {}", outcome.error());
    }
    assert!(!outcome.error().ends_with('.'), "{}", outcome.error());
}

#[test]
fn good_input_trains() {
    let w = good();
    let outcome = sft(&w, &[]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(w.path("out/adapter_model.safetensors").is_file());
}

#[test]
fn broken_rows_name_file_and_line() {
    let w = good();
    let cases: [(&[u8], &str); 11] = [
        (b"{\"prompt\": \"a\"}\n", "rows.jsonl:2: "),
        (b"{\"prompt\": 5, \"response\": \"b\"}\n", "rows.jsonl:2: "),
        (b"{\"prompt\": \"\", \"response\": \"b\"}\n", "rows.jsonl:2: "),
        (b"{\"prompt\": \"a\", \"response\": \"\"}\n", "rows.jsonl:2: "),
        (b"not json\n", "rows.jsonl:2: invalid JSON"),
        (b"[1, 2]\n", "rows.jsonl:2: not a JSON object"),
        (b"{\"prompt\": \"a\", \"resp", "rows.jsonl:2: invalid JSON"),
        (b"{\"prompt\": \"caf\xe9\", \"response\": \"b\"}\n", "rows.jsonl:2: invalid UTF-8"),
        (b"{\"prompt\": \"a\", \"prompt\": \"b\", \"response\": \"c\"}\n", "appears twice"),
        (b"{\"messages\": []}\n", "rows.jsonl:2: "),
        (b"{\"messages\": [{\"role\": \"robot\", \"content\": \"x\"}]}\n", "rows.jsonl:2: "),
    ];
    for (line, part) in cases {
        let mut bytes = b"{\"prompt\": \"fine\", \"response\": \"fine\"}\n".to_vec();
        bytes.extend_from_slice(line);
        w.write("rows.jsonl", bytes);
        fails(&sft(&w, &[]), 1, &[part, "expected", "found"]);
    }
    w.write("rows.jsonl", "");
    fails(&sft(&w, &[]), 1, &["rows.jsonl: the file is empty"]);
    fails(&sft(&w, &["--dataset_paths", "nowhere.jsonl"]), 1, &["nowhere.jsonl"]);
}

#[test]
fn bad_rows_may_be_skipped_but_are_named() {
    let w = good();
    let mut rows = first_rows("data/demo/chat.jsonl", 20);
    rows.push_str("not json\n");
    w.write("rows.jsonl", rows);
    let outcome = sft(&w, &["--skip_bad_rows"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("1 bad and skipped"), "{}", outcome.stderr);
    let log = fs::read_to_string(w.path("out/skipped_rows.txt")).unwrap();
    assert!(log.starts_with("rows.jsonl:21: invalid JSON"), "{log}");
}

#[test]
fn tokenizers_that_cannot_be_trained_with_are_refused() {
    let w = good();
    let mut refused = 0;
    for entry in fs::read_dir(repository().join("tests/data/tokenizer/bad")).unwrap() {
        let path = entry.unwrap().path();
        let outcome = sft(&w, &["--tokenizer_path", path.to_str().unwrap()]);
        fails(&outcome, 1, &[path.file_name().unwrap().to_str().unwrap()]);
        refused += 1;
    }
    assert!(refused >= 7);
    let llama = "tests/data/tokenizer/bad/llama_ids_unk0_bos1_eos2.model";
    let outcome = sft(&w, &["--tokenizer_path", repository().join(llama).to_str().unwrap()]);
    fails(&outcome, 1, &["expected", "found", "--special-ids"]);
    let no_bytes = repository().join("tests/data/tokenizer/spm600_nobyte.model");
    fails(&sft(&w, &["--tokenizer_path", no_bytes.to_str().unwrap()]), 1, &["newline"]);
    fails(&sft(&w, &["--tokenizer_path", "none.model"]), 1, &["none.model"]);
    fails(&sft(&w, &["--special_ids", "0,1"]), 2, &["special ids", "pad,unk,bos,eos"]);
}

#[test]
fn damaged_models_are_refused() {
    let w = good();
    let weights = fs::read(w.path("model/model.safetensors")).unwrap();
    w.write("model/model.safetensors", &weights[..weights.len() / 2]);
    fails(&sft(&w, &[]), 1, &["model.safetensors", "cut short"]);
    w.write("model/model.safetensors", &weights[..4]);
    fails(&sft(&w, &[]), 1, &["model.safetensors"]);
    // The last four bytes are the last value of the last weight.
    let mut nan = weights.clone();
    let at = nan.len() - 4;
    nan[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    w.write("model/model.safetensors", nan);
    fails(&sft(&w, &[]), 1, &["model.safetensors", "not finite"]);
    w.write("model/model.safetensors", &weights);
    let config = fs::read_to_string(w.path("model/config.json")).unwrap();
    let changed = |from: &str, to: &str| {
        assert!(config.contains(from), "{from} in {config}");
        w.write("model/config.json", config.replace(from, to));
    };
    changed("\"intermediate_size\": 176", "\"intermediate_size\": 180");
    fails(&sft(&w, &[]), 1, &["176", "180"]);
    changed("\"vocab_size\": 4096", "\"vocab_size\": 4000");
    fails(&sft(&w, &[]), 1, &["4096", "4000"]);
    fs::remove_file(w.path("model/config.json")).unwrap();
    fails(&sft(&w, &[]), 1, &["config.json"]);
    fails(&sft(&w, &["--model_path", "nowhere"]), 1, &["nowhere"]);
}

#[test]
fn the_vocabulary_must_fit_the_model() {
    let w = good();
    let larger = repository().join("tests/data/tokenizer/spm32k.model");
    let outcome = sft(&w, &["--tokenizer_path", larger.to_str().unwrap()]);
    fails(&outcome, 1, &["vocabulary mismatch", "32000", "4096"]);
}

#[test]
fn damaged_token_files_are_refused() {
    let w = good();
    let packed =
        w.run(&["pack", "--tokenizer_path", "spm.model", "--dataset_paths", "rows.jsonl", "--output", "rows.tok"]);
    assert_eq!(packed.code, Some(0), "{}", packed.stderr);
    let outcome = sft(&w, &["--dataset_paths", "rows.tok"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    fs::remove_dir_all(w.path("out")).unwrap();
    let bytes = fs::read(w.path("rows.tok")).unwrap();
    w.write("rows.tok", &bytes[..bytes.len() - 100]);
    fails(&sft(&w, &["--dataset_paths", "rows.tok"]), 1, &["rows.tok", "truncated", "expected", "found"]);
    let mut flipped = bytes.clone();
    let at = flipped.len() - 20;
    flipped[at] ^= 1;
    w.write("rows.tok", flipped);
    fails(&sft(&w, &["--dataset_paths", "rows.tok"]), 1, &["rows.tok", "checksum"]);
    w.write("rows.tok", &bytes);
    let outcome = sft(&w, &["--dataset_paths", "rows.tok", "--prompt_template", "instruct"]);
    fails(&outcome, 1, &["rows.tok", "template"]);
    fails(&sft(&w, &["--dataset_paths", "rows.tok", "--max_seq_len", "8"]), 1, &["rows.tok", "at most 8"]);
}

#[test]
fn weights_must_be_one_positive_number_per_data_set() {
    let w = good();
    for bad in ["-0.5", "0", "nan", "inf", "much"] {
        fails(&sft(&w, &["--dataset_weights", bad]), 2, &["--dataset-weights", "above 0", bad]);
    }
    let outcome = sft(&w, &["--dataset_weights", "0.5", "0.5"]);
    fails(&outcome, 2, &["--dataset-weights", "1 data sets", "2 weights"]);
}

#[test]
fn an_output_folder_that_cannot_be_written_stops_the_run_at_once() {
    let w = good();
    w.write("file", "x");
    fails(&sft(&w, &["--output_dir", "file"]), 1, &["file"]);
    fails(&sft(&w, &["--output_dir", "file/below"]), 1, &["file/below"]);
    fails(&sft(&w, &["--output_dir", "/proc/none"]), 1, &["/proc/none"]);
    let outcome = w.run(&["sft", "--model_path", "model", "--dataset_paths", "rows.jsonl"]);
    fails(&outcome, 2, &["--output-dir is required"]);
}

#[test]
fn a_full_disk_is_said() {
    let w = good();
    // A limit on the size of files fails a write as a quota does; 100 kB hold the token file but no adapter with its rows.
    let line = "trap '' XFSZ; ulimit -f 200; ringtune sft --model_path model --tokenizer_path spm.model --dataset_paths rows.jsonl \
                --output_dir out --max_steps 1 --quiet --no_lora";
    fails(&w.shell(line), 1, &["disk or quota is full", "another place"]);
}

#[test]
fn rows_that_leave_nothing_to_train_are_an_error() {
    let w = good();
    let long = "word ".repeat(400);
    w.write("rows.jsonl", format!("{{\"prompt\": \"{long}\", \"response\": \"b\"}}\n"));
    let outcome = sft(&w, &["--max_seq_len", "32"]);
    fails(&outcome, 1, &["rows.jsonl: no usable training row", "response would be cut away"]);
    fails(&sft(&w, &["--max_seq_len", "32", "--overflow", "drop"]), 1, &["longer than a row"]);
}

#[test]
fn rows_longer_than_the_model_are_refused() {
    let w = good();
    fails(&sft(&w, &["--max_seq_len", "4096"]), 2, &["max_seq_len", "4096", "512"]);
}

#[test]
fn flags_that_are_wrong_name_the_nearest_or_what_is_expected() {
    let w = good();
    let clap = |words: &[&str], parts: &[&str]| {
        let outcome = w.run(words);
        assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
        for part in parts {
            assert!(outcome.stderr.contains(part), "{part:?} is not in: {}", outcome.stderr);
        }
    };
    clap(&["sft", "--dataset_weigths", "1"], &["--dataset_weigths", "--dataset_weights"]);
    clap(&["sft", "--use_lora", "--no_lora"], &["--use-lora", "--no-lora", "cannot be used"]);
    clap(&["inspct"], &["inspct", "inspect"]);
    clap(&["sft", "--lora_r", "4", "--lora-r", "8"], &["--lora-r"]);
    fails(&sft(&w, &["--mixed_precision", "fp16"]), 2, &["one of no, bf16", "float16"]);
    fails(&sft(&w, &["--lora_r", "0"]), 2, &["--lora-r: expected a whole number of at least 1, found \"0\""]);
    fails(&sft(&w, &["--learning_rate", "-1e-4"]), 2, &["--learning-rate", "above 0"]);
    fails(&sft(&w, &["--no_lora", "--lora_r", "4"]), 2, &["--lora-r", "--no-lora"]);
    fails(&sft(&w, &["--no_lora", "--merge_adapters"]), 2, &["--merge-adapters", "--no-lora"]);
    fails(&sft(&w, &["--max_new_tokens", "9"]), 2, &["--max-new-tokens", "--no-gen-test"]);
    fails(&sft(&w, &["--prompt_template", "chatlm"]), 2, &["chatlm", "chatml"]);
    let both = w.run(&["--mixed_precision", "bf16", "sft", "--mixed_precision", "no", "--output_dir", "out"]);
    fails(&both, 2, &["--mixed-precision", "bf16", "no"]);
    fails(&w.run(&["--mixed_precision", "bf16", "templates"]), 2, &["no effect"]);
}

#[test]
fn configs_that_are_wrong_name_key_expected_and_found() {
    let w = good();
    for (text, parts) in [
        ("{\"lora_rank\": 8}", ["c.json", "unknown key \"lora_rank\"; write \"lora_r\": 8"]),
        (
            "{\"learning_rate\": \"abc\"}",
            ["key \"learning_rate\"", "expected a number above 0, found the text \"abc\""],
        ),
        ("{\"lora_r\": 1.5}", ["key \"lora_r\"", "found the number 1.5"]),
        ("{\"seed\": 1, \"seed\": 2}", ["c.json", "twice"]),
        ("{\"seed\": ", ["c.json", "JSON"]),
    ] {
        w.write("c.json", text);
        fails(&sft(&w, &["--config_path", "c.json"]), 2, &parts);
    }
    fails(&sft(&w, &["--config_path", "none.json"]), 2, &["none.json", "configs/none.json"]);
    // A file's setting that a flag switches off is a warning: the seed's full fine-tuning uses a file with LoRA settings.
    w.write("c.json", "{\"lora_r\": 4, \"learning_rate\": 1e-3}");
    let outcome = sft(&w, &["--config_path", "c.json", "--no_lora"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("warning: c.json: no effect with --no-lora: lora_r"), "{}", outcome.stderr);
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let w = good();
    let rows = "ringtune inspect packs --tokenizer_path spm.model --dataset_paths rows.jsonl --json";
    for line in [
        format!("{rows} | head -c 10"),
        "ringtune templates | head -n 1".into(),
        "ringtune sft --help | head -n 1".into(),
    ] {
        let outcome = w.shell(&line);
        assert!(!outcome.stderr.contains("panicked"), "{line}: {}", outcome.stderr);
        assert!(!outcome.stdout.is_empty());
    }
}

#[test]
fn what_needs_validation_rows_says_that_there_are_none() {
    let w = good();
    fails(
        &sft(&w, &["--val_fraction", "0", "--early_stopping_patience", "1", "--eval_steps", "1"]),
        2,
        &["early_stopping_patience: no row is held out", "val_fraction is 0"],
    );
    assert!(!w.path("out/adapter_model.safetensors").exists());
    w.write("one.jsonl", "{\"prompt\": \"a\", \"response\": \"b\"}\n");
    let flags = ["--dataset_paths", "one.jsonl", "--do_gen_test", "--load_best_model_at_end", "--lora_r", "2"];
    let outcome = sft(&w, &flags);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    for name in ["do_gen_test", "load_best_model_at_end"] {
        let expected = format!("warning: {name} has no effect: no row is held out: there is but one row");
        assert!(outcome.stderr.contains(&expected), "{}", outcome.stderr);
    }
    assert!(outcome.stdout.contains("generation test: no prompt is held out"), "{}", outcome.stdout);
    let check = w.run(&[
        "check",
        "--model_path",
        "model",
        "--tokenizer_path",
        "spm.model",
        "--output_dir",
        "out2",
        "--dataset_paths",
        "one.jsonl",
        "--early_stopping_patience",
        "1",
        "--eval_steps",
        "1",
    ]);
    assert_eq!(check.code, Some(1), "{}", check.stderr);
    assert!(
        check.stdout.contains("problem [settings] early_stopping_patience: no row is held out"),
        "{}",
        check.stdout
    );
    assert!(check.stdout.contains("warning [no-effect] eval_steps: eval_steps has no effect"), "{}", check.stdout);
}

#[test]
fn whole_numbers_have_a_largest_value() {
    let w = good();
    for flag in [
        "--gradient_accumulation_steps",
        "--per_device_train_batch_size",
        "--per_device_eval_batch_size",
        "--lora_r",
        "--pad_vocab_to",
        "--save_total_limit",
        "--max_steps",
        "--num_train_epochs",
        "--threads",
        "--max_seq_len",
        "--epoch_samples",
        "--warmup_steps",
    ] {
        for number in ["2305843009213693952", "18446744073709551615", "99999999999999999999"] {
            let outcome = w.run(&[
                "sft",
                "--model_path",
                "model",
                "--dataset_paths",
                "rows.jsonl",
                "--output_dir",
                "out",
                flag,
                number,
            ]);
            fails(&outcome, 2, &[&flag.replace('_', "-")[2..], "more than the largest value, ", number]);
        }
    }
    fails(&sft(&w, &["--threads", "5000"]), 2, &["more than the largest value, 4096"]);
    w.write("c.json", "{\"seed\": 99999999999999999999}");
    fails(&sft(&w, &["--config_path", "c.json"]), 2, &["seed", "more than the largest value, 18446744073709551615"]);
    // Commands without a configuration file, and the largest values themselves.
    for words in [["eval", "--batch_size"], ["eval", "--max_eval_samples"], ["generate", "--max_new_tokens"]] {
        let outcome = w.run(&[words[0], "--model_path", "model", words[1], "99999999999999999999"]);
        assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("more than the largest value"), "{}", outcome.stderr);
    }
    let check = [
        "check",
        "--model_path",
        "model",
        "--tokenizer_path",
        "spm.model",
        "--output_dir",
        "out",
        "--dataset_paths",
        "rows.jsonl",
        "--gradient_accumulation_steps",
        "65536",
        "--per_device_train_batch_size",
        "65536",
        "--per_device_eval_batch_size",
        "65536",
        "--lora_r",
        "65536",
        "--pad_vocab_to",
        "67108864",
        "--save_total_limit",
        "1000000000",
        "--num_train_epochs",
        "100000",
        "--early_stopping_patience",
        "1000000000",
        "--save_steps",
        "1000000000",
        "--seed",
        "18446744073709551615",
    ];
    let outcome = w.run(&check);
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    assert_eq!(outcome.code, Some(1), "it does not fit into memory: {}", outcome.stdout);
}

#[test]
fn control_characters_of_data_never_reach_the_terminal() {
    let w = good();
    let hostile = "{\"prompt\": \"\\u001b[2Kq\\u0007\", \"response\": \"a\\rb\\u009b\\u202e\", \"\\u001bkey\": 1}\n";
    w.write("rows.jsonl", hostile.repeat(4) + "{\"prompt\": \"a\\u001b\", \"response\": 5, \"\\u001b\": 1}\n");
    let clean = |outcome: &Outcome, part: &str| {
        for text in [&outcome.stdout, &outcome.stderr] {
            let bad = text.chars().find(|c| c.is_control() && !['\n', '\t'].contains(c) || *c == '\u{202e}');
            assert!(bad.is_none(), "{bad:?} in {text}");
        }
        assert!(
            outcome.stdout.contains(part) || outcome.stderr.contains(part),
            "{part} is not in {}{}",
            outcome.stdout,
            outcome.stderr
        );
    };
    let data = ["--tokenizer_path", "spm.model", "--dataset_paths", "rows.jsonl"];
    let with = |words: &[&str]| w.run(&[words, &data].concat());
    let bad = "\\u001b";
    clean(&with(&["check", "--model_path", "model", "--output_dir", "out", "--preview", "3"]), bad);
    clean(&with(&["sft", "--model_path", "model", "--output_dir", "out", "--max_steps", "1"]), "rows.jsonl:5");
    let skip =
        ["sft", "--model_path", "model", "--output_dir", "out", "--max_steps", "1", "--skip_bad_rows", "--do_gen_test"];
    clean(&with(&skip), "\\u001b[2Kq\\u0007");
    clean(&with(&["inspect", "rows", "--skip_bad_rows"]), bad);
    clean(&with(&["inspect", "packs", "--skip_bad_rows"]), bad);
    w.write("good.jsonl", hostile);
    clean(&w.run(&["inspect", "file", "good.jsonl"]), bad);
    let json = w.run(&[
        "inspect",
        "rows",
        "--tokenizer_path",
        "spm.model",
        "--dataset_paths",
        "good.jsonl",
        "--val_fraction",
        "0",
        "--json",
    ]);
    assert!(json.stdout.contains("\u{9b}"), "JSON stays as it is: {}", json.stdout);
}
