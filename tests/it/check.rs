//! `ringtune check`: its figures are those of the training, each problem is named with its code, and nothing is written.

use std::fs;

use ringtune::commands::check::CODES;
use serde_json::Value;

use crate::program::{Outcome, Workplace, first_rows, repository};

pub const MODEL: &str = "tests/data/model/tiny-llama-tied";

/// A folder with a model, a tokenizer and rows that train.
pub fn good() -> Workplace {
    let w = Workplace::new();
    for file in ["config.json", "model.safetensors"] {
        w.copy(&format!("{MODEL}/{file}"), &format!("model/{file}"));
    }
    w.copy("tests/data/tokenizer/spm4k.model", "spm.model");
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 60));
    w
}

/// The flags of a training in such a folder; `more` wins.
pub fn flags<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let defaults = [
        ("--model_path", "model"),
        ("--tokenizer_path", "spm.model"),
        ("--dataset_paths", "rows.jsonl"),
        ("--output_dir", "out"),
        ("--max_seq_len", "128"),
    ];
    let mut words = Vec::new();
    for (flag, value) in defaults.into_iter().filter(|(f, _)| !more.contains(f)) {
        words.extend([flag, value]);
    }
    words.extend(more);
    words
}

fn run(w: &Workplace, command: &str, more: &[&str]) -> Outcome {
    let words: Vec<&str> = std::iter::once(command).chain(flags(more)).collect();
    let outcome = w.run(&words);
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    outcome
}

/// The report as data, after checking that the exit code is that of `ok`.
pub fn check(w: &Workplace, more: &[&str]) -> Value {
    let words: Vec<&str> = more.iter().copied().chain(["--json"]).collect();
    let outcome = run(w, "check", &words);
    let report: Value = serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("{e}: {}", outcome.stderr));
    let code = if report["ok"] == true { 0 } else { 1 };
    assert_eq!(outcome.code, Some(code), "{}", outcome.stderr);
    assert_eq!(report["ok"] == true, report["problems"].as_array().unwrap().is_empty());
    report
}

pub fn codes(report: &Value, severity: &str) -> Vec<String> {
    let list = report[severity].as_array().unwrap();
    let codes: Vec<String> = list.iter().map(|f| f["code"].as_str().unwrap().to_string()).collect();
    for code in &codes {
        let listed = CODES.split([' ', ',', '\n']).any(|word| word == code);
        assert!(listed, "{code} is not in the help");
    }
    codes
}

/// The one problem of a report, which has this code and place.
pub fn problem(report: &Value, code: &str, place: &str) -> Value {
    assert_eq!(codes(report, "problems"), [code], "{:#}", report["problems"]);
    let found = report["problems"][0].clone();
    assert!(found["place"].as_str().unwrap().contains(place), "{found:#}");
    assert!(!found["what"].as_str().unwrap().is_empty());
    found
}

#[test]
fn the_figures_are_those_of_the_training() {
    let w = good();
    let more = ["--num_train_epochs", "2", "--per_device_train_batch_size", "2", "--eval_strategy", "no"];
    let report = check(&w, &more);
    assert_eq!(report["ok"], true, "{report:#}");
    assert!(!w.path("out").exists(), "check wrote the output folder");
    let outcome = run(&w, "sft", &more);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let state: Value = serde_json::from_slice(&fs::read(w.path("out/trainer_state.json")).unwrap()).unwrap();
    assert_eq!(report["steps"]["total"], state["max_steps"]);
    assert_eq!(report["time"]["tokens"], state["num_input_tokens_seen"]);
    let (ours, real) = (report["time"]["flops"].as_f64().unwrap(), state["total_flos"].as_f64().unwrap());
    assert!((ours / real - 1.0).abs() < 1e-9, "{ours} {real}");
    // The line of parameters, the memory table and the mix are the ones that are printed at the start.
    for class in ["weights", "gradients", "moments_and_masters", "activations"] {
        let bytes = report["memory_per_device"]["bytes"][class].as_u64().unwrap();
        let printed = format!("{}  {}", class.replace('_', " "), ringtune::text::bytes(bytes));
        let line = |l: &str| l.split_whitespace().collect::<Vec<_>>().join(" ");
        let wanted = line(&printed);
        assert!(outcome.stdout.lines().any(|l| line(l) == wanted), "{wanted} is not in:\n{}", outcome.stdout);
    }
    let share = report["mix"]["sets"][0]["shares"]["tokens"]["achieved"].as_f64();
    assert_eq!(share, Some(1.0));
    let size: u64 = fs::read_dir(w.path(&format!("out/checkpoint-{}", state["max_steps"])))
        .unwrap()
        .map(|e| e.unwrap().metadata().unwrap().len())
        .sum();
    let guess = report["output_folder"]["checkpoint_bytes"].as_u64().unwrap();
    assert!(guess >= size / 2 && guess < size * 2, "a checkpoint takes {size}, {guess} were estimated");
}

#[test]
fn the_text_shows_the_mask_and_every_section() {
    let w = good();
    let outcome = run(&w, "check", &["--time", "--flops-rate", "1e12"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let text = &outcome.stdout;
    for part in [
        "\ntokenizer\n",
        "special ids   pad <pad> (0), unk <unk> (1), bos <s> (2), eos </s> (3)",
        "newlines      kept as id",
        "byte fallback yes",
        "a response ends with <|im_end|>",
        "\nmodel\n",
        "354,752",
        "\ndata\n",
        "\nmix\n",
        "% full",
        "<|im_start|>assistant\n«",
        "<|im_end|>»",
        "steps an epoch",
        "moments and masters",
        "logits chunk",
        "tokens/s",
        "at 1.00 TFLOP/s",
        "\noutput folder\n",
        "no problem found",
    ] {
        assert!(format!("\n{text}").contains(part), "{part:?} is not in:\n{text}");
    }
}

#[test]
fn every_problem_of_one_call_is_named() {
    let w = good();
    w.write("bad.jsonl", "{\"prompt\": \"a\", \"response\": \"b\"}\nnot json\n{\"prompt\": 5, \"response\": \"b\"}\n");
    let more = [
        "--model_path",
        "nowhere",
        "--dataset_paths",
        "bad.jsonl",
        "--lora_targets",
        "q,query",
        "--resume_from_checkpoint",
        "none",
    ];
    let report = check(&w, &more);
    let found = codes(&report, "problems");
    for code in ["model", "lora", "bad-row", "resume"] {
        assert!(found.iter().any(|c| c == code), "{code} is not in {found:?}");
    }
    let rows: Vec<&str> = report["problems"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|p| p["code"] == "bad-row")
        .map(|p| p["place"].as_str().unwrap())
        .collect();
    assert_eq!(rows, ["bad.jsonl:2", "bad.jsonl:3"]);
    let text = run(&w, "check", &more);
    assert!(text.error().ends_with("would make this training fail or be wrong"), "{}", text.stderr);
    assert!(text.stdout.contains("problem [bad-row] bad.jsonl:2: invalid JSON"), "{}", text.stdout);
    // Bad rows that may be skipped are warnings.
    let report = check(&w, &["--dataset_paths", "rows.jsonl", "bad.jsonl", "--skip_bad_rows"]);
    assert_eq!(codes(&report, "problems"), Vec::<String>::new());
    assert_eq!(codes(&report, "warnings").iter().filter(|c| *c == "bad-row").count(), 2);
}

#[test]
fn models_tokenizers_and_data_that_do_not_fit_are_named() {
    let w = good();
    let missing = problem(&check(&w, &["--dataset_paths", "none.jsonl"]), "data-missing", "none.jsonl").clone();
    assert_eq!((missing["expected"].as_str(), missing["found"].as_str()), (Some("a file"), Some("nothing")));
    let spm = |name: &str| repository().join("tests/data/tokenizer").join(name).display().to_string();
    let large = spm("spm32k.model");
    problem(&check(&w, &["--tokenizer_path", &large]), "vocabulary", "spm32k");
    let no_bytes = spm("spm600_nobyte.model");
    let report = check(&w, &["--tokenizer_path", &no_bytes]);
    problem(&report, "newline", "spm600_nobyte");
    assert!(codes(&report, "warnings").contains(&"byte-fallback".to_string()));
    let llama = spm("bad/llama_ids_unk0_bos1_eos2.model");
    let found = problem(&check(&w, &["--tokenizer_path", &llama]), "tokenizer", "llama_ids");
    assert!(found["do"].as_str().unwrap().contains("--special-ids"), "{found:#}");
    problem(&check(&w, &["--prompt_template", "chatlm"]), "template", "chatlm");
    problem(&check(&w, &["--max_seq_len", "100000"]), "row-length", "max_seq_len");
    problem(&check(&w, &["--early_stopping_patience", "3", "--eval_strategy", "no"]), "settings", "");
}

#[test]
fn what_is_lost_or_never_trained_is_counted() {
    let w = good();
    w.copy("tests/data/tokenizer/spm4k_unigram.model", "unigram.model");
    w.write(
        "rows.jsonl",
        "{\"prompt\": \"one\\ntwo\", \"response\": \"x\"}\n{\"prompt\": \"a   b\", \"response\": \"y\"}\n\
         {\"prompt\": \"a   b\", \"response\": \"y\"}\n{\"prompt\": \"plain\", \"response\": \"z\"}\n",
    );
    let report = check(&w, &["--tokenizer_path", "unigram.model", "--val_fraction", "0"]);
    let warnings = codes(&report, "warnings");
    for code in ["newlines-lost", "blanks-lost", "duplicate-rows", "no-validation"] {
        assert!(warnings.contains(&code.to_string()), "{code} is not in {warnings:?}");
    }
    let lost = &report["data"]["lost"][0];
    assert_eq!((&lost["newlines_lost"], &lost["blanks_lost"]), (&Value::from(1), &Value::from(2)));
    assert_eq!(report["data"]["duplicate_rows"], 1);
    // With a tokenizer that keeps them nothing is lost.
    let report = check(&w, &["--val_fraction", "0"]);
    let lost = &report["data"]["lost"][0];
    assert_eq!((&lost["newlines_lost"], &lost["blanks_lost"]), (&Value::from(0), &Value::from(0)));
    // A template that never trains an end token.
    w.write(
        "endless.jinja",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}\
         {% else %}{{ m.content }}{% endif %}{% endfor %}",
    );
    problem(&check(&w, &["--prompt_template", "endless.jinja"]), "end-not-trained", "rows.jsonl:");
}

#[test]
fn a_file_without_one_usable_row_has_its_bad_lines_named() {
    let w = good();
    w.write("rows.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}\n".repeat(7));
    let report = check(&w, &[]);
    let bad = report["problems"].as_array().unwrap();
    assert_eq!(
        (bad.len(), &bad[0]["code"], &bad[4]["place"]),
        (5, &Value::from("bad-row"), &Value::from("rows.jsonl:5"))
    );
    assert!(bad[0]["do"].as_str().unwrap().contains("--columns prompt=question"), "{report:#}");
    assert!(bad[4]["do"].as_str().unwrap().ends_with("(2 more in this file)"), "{report:#}");
    let skipped = check(&w, &["--skip_bad_rows"]);
    let why = problem(&skipped, "data", "");
    assert!(why["found"].as_str().unwrap().contains("7 bad and skipped"), "{why:#}");
    assert!(codes(&skipped, "warnings").contains(&"bad-row".to_string()));
    // Other kinds of files, and pipes, are named as by `sft`.
    w.write("rows.jsonl", b"\xff\xfe{\0");
    assert!(problem(&check(&w, &[]), "data", "rows.jsonl")["what"].as_str().unwrap().contains("UTF-16"));
    let outcome = w.shell("mkfifo p; timeout 20 ringtune check --model_path model --tokenizer_path spm.model --dataset_paths p --output_dir out");
    assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
    assert!(outcome.stdout.contains("found a pipe; write what it gives to a file"), "{}", outcome.stdout);
}

#[test]
fn forms_and_keys_that_are_not_read_are_named() {
    let w = good();
    let row = |i: u32| {
        format!(
            "{{\"conversations\": [{{\"from\": \"human\", \"value\": \"q{i}\"}}, {{\"from\": \"gpt\", \"value\": \"a{i}\", \"tool_calls\": [1]}}], \"id\": {i}}}\n"
        )
    };
    w.write("rows.jsonl", (0..40).map(row).collect::<String>());
    let report = check(&w, &[]);
    assert_eq!(report["data"]["sets"][0]["form"], "ShareGPT");
    let warnings = report["warnings"].as_array().unwrap();
    let unread: Vec<&Value> = warnings.iter().filter(|f| f["code"] == "unread-keys").collect();
    assert_eq!(unread.len(), 1);
    assert_eq!(unread[0]["place"], "rows.jsonl:1");
    assert!(unread[0]["what"].as_str().unwrap().contains("\"conversations[].tool_calls\" is not read"), "{report:#}");
    assert!(run(&w, "check", &[]).stdout.contains("keys that are not read: \"id\" (40 rows)"));
    let outcome = run(&w, "sft", &["--max_steps", "1", "--lora_r", "2"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stdout.contains("ShareGPT"), "{}", outcome.stdout);
    assert!(
        outcome.stderr.contains("warning: rows.jsonl:1: \"conversations[].tool_calls\" is not read"),
        "{}",
        outcome.stderr
    );
}

#[test]
fn over_long_rows_are_counted_and_the_worst_is_named() {
    let w = good();
    let long = format!("{{\"prompt\": \"long\", \"response\": \"{}\"}}\n", "word ".repeat(300));
    w.write("rows.jsonl", first_rows("data/demo/define.jsonl", 20) + &long);
    for (overflow, dropped) in [("truncate", 0), ("drop", 1)] {
        let report = check(&w, &["--overflow", overflow, "--val_fraction", "0"]);
        let over = &report["data"]["sets"][0]["over_long"];
        assert_eq!((&over["rows"], &over["line"]), (&Value::from(1), &Value::from(21)), "{over:#}");
        assert!(over["longest"].as_u64().unwrap() > 300);
        assert_eq!(report["data"]["sets"][0]["dropped"]["too_long"], dropped);
        let list = report["warnings"].as_array().unwrap();
        let warning = list.iter().find(|f| f["code"] == "over-long").unwrap();
        assert_eq!(warning["place"], "rows.jsonl:21");
    }
}

#[test]
fn the_output_folder_and_resuming_are_looked_at() {
    let w = good();
    w.write("file", "x");
    problem(&check(&w, &["--output_dir", "file"]), "output-folder", "file");
    let more = ["--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "2", "--eval_strategy", "no"];
    let with =
        |extra: &[&'static str]| -> Vec<&'static str> { more.iter().copied().chain(extra.iter().copied()).collect() };
    assert_eq!(run(&w, "sft", &with(&[])).code, Some(0));
    let report = check(&w, &with(&[]));
    let found = problem(&report, "resume", "out");
    assert!(found["do"].as_str().unwrap().contains("--resume-from-checkpoint auto"));
    assert!(codes(&report, "warnings").contains(&"output-folder".to_string()));
    let report = check(&w, &with(&["--resume_from_checkpoint", "out/checkpoint-2"]));
    assert_eq!(report["ok"], true, "{:#}", report["problems"]);
    assert_eq!(
        (&report["output_folder"]["resume"]["step"], &report["output_folder"]["resume"]["steps_left"]),
        (&Value::from(2), &Value::from(2))
    );
    // Another seed is other data and another configuration.
    let other = ["--resume_from_checkpoint", "auto", "--seed", "5"];
    let found = problem(&check(&w, &with(&other)), "resume", "checkpoint-4");
    assert!(found["what"].as_str().unwrap().contains("differs from the checkpoint's"), "{found:#}");
    let report = check(&w, &[&with(&other)[..], &["--allow_changed", "data", "config"]].concat());
    assert_eq!(report["ok"], true, "{:#}", report["problems"]);
    assert_eq!(codes(&report, "warnings").iter().filter(|c| *c == "resume").count(), 2);
    // A damaged checkpoint is passed over.
    fs::write(w.path("out/checkpoint-4/optimizer.safetensors"), "x").unwrap();
    let report = check(&w, &with(&["--resume_from_checkpoint", "auto"]));
    assert_eq!(report["output_folder"]["resume"]["step"], 2);
    assert!(codes(&report, "warnings").contains(&"resume".to_string()));
}

#[test]
fn pretraining_is_checked_with_a_switch() {
    let w = good();
    let text = fs::read_to_string(repository().join("data/demo/pretrain_valid.txt")).unwrap();
    let text: String = text.chars().take(20_000).collect();
    w.write("text.txt", &text);
    let words = |more: &[&'static str]| -> Vec<&'static str> {
        let mut all = vec![
            "check",
            "--pretrain",
            "--model_config",
            "tiny",
            "--tokenizer_path",
            "spm.model",
            "--dataset_paths",
            "text.txt",
        ];
        all.extend(["--output_dir", "out", "--max_seq_len", "64", "--json"]);
        all.extend(more);
        all
    };
    let outcome = w.run(&words(&[]));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let report: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!((&report["command"], &report["model"]["hidden_size"]), (&Value::from("pretrain"), &Value::from(256)));
    assert!(report["steps"]["total"].as_u64().unwrap() > 10);
    assert!(!w.path("out").exists());
    // The same text for training and validation.
    w.write("valid.txt", &text);
    let outcome = w.run(&words(&["--val_paths", "valid.txt"]));
    let report: Value = serde_json::from_str(&outcome.stdout).unwrap();
    problem(&report, "validation-leak", "valid.txt");
    // Flags of the other training are refused.
    let outcome = w.run(&words(&["--lora_r", "4"]));
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.error().contains("--lora-r: has no effect on this training"), "{}", outcome.stderr);
    let outcome = run(&w, "check", &["--model_config", "tiny"]);
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.error().contains("add --pretrain"), "{}", outcome.stderr);
}

#[test]
fn flags_that_are_wrong_end_with_two() {
    let w = good();
    for (more, part) in [
        (&["--device-memory", "much"][..], "--device-memory"),
        (&["--flops-rate", "0"], "--flops-rate"),
        (&["--config_path", "none.json"], "none.json"),
        (&["--lora_rr", "4"], "--lora_rr"),
    ] {
        let outcome = run(&w, "check", more);
        assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
        assert!(outcome.stderr.contains(part), "{}", outcome.stderr);
    }
}
