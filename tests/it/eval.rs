//! `ringtune eval`: adapters, merged and plain models; figures that no batch size changes; every mistake has its message.

use std::fs;

use serde_json::Value;

use crate::program::{Workplace, first_rows, repository};
use crate::tuned::{fails, json, ok, tuned, untuned};

/// Runs `eval` with `words` on rows.jsonl and gives its report.
fn report(w: &Workplace, words: &str) -> Value {
    let line = format!("ringtune eval --dataset_paths rows.jsonl --output report.json --quiet {words}");
    ok(w.shell(&line));
    json(w, "report.json")
}

fn loss(v: &Value) -> f64 {
    v["all"]["loss"].as_f64().unwrap()
}

#[test]
fn adapter_merged_and_base_are_found_in_an_output_folder() {
    let w = tuned(&["--merge_adapters"]);
    let adapter = report(&w, "--model_path out --tokenizer_path spm.model --prompt_template chatml");
    assert!(adapter["model"].as_str().unwrap().ends_with("resized_base"), "{adapter}");
    assert_eq!(adapter["adapter"], "out");
    // Tokenizer and template come from the folder where no flag names them.
    let same = report(&w, "--model_path out");
    assert_eq!((&same["all"], &same["prompt_template"]), (&adapter["all"], &adapter["prompt_template"]));
    assert_eq!(same["tokenizer"], "out/tokenizer.model");
    let merged = report(&w, "--model_path out --no_lora");
    assert_eq!(merged["model"], "out/merged");
    assert!(merged["adapter"].is_null());
    // The base is f32, so the merged model is not rounded.
    assert!((loss(&merged) - loss(&adapter)).abs() < 1e-5, "{} {}", loss(&merged), loss(&adapter));
    // Where nothing was merged it is made in memory: the same figures, bit for bit.
    fs::rename(w.path("out/merged"), w.path("elsewhere")).unwrap();
    let made = ok(w.shell(
        "ringtune eval --model_path out --no_lora --dataset_paths rows.jsonl --max_eval_samples 40 --num_gen_samples 0 --output made.json",
    ));
    assert!(
        made.stderr.contains("no merged model is here") && made.stderr.contains("ringtune merge --model-path out"),
        "{}",
        made.stderr
    );
    let of = |v: &Value| v["all"].clone();
    assert_eq!(of(&json(&w, "made.json")), of(&report(&w, "--model_path elsewhere --max_eval_samples 40")));
    let other = ok(w.shell(
        "ringtune eval --model_path out --dataset_paths rows.jsonl --max_eval_samples 9 --prompt_template plain",
    ));
    assert!(other.stderr.contains("the model has another chat template"), "{}", other.stderr);
    fs::rename(w.path("elsewhere"), w.path("out/merged")).unwrap();
    assert_eq!(report(&w, "--model_path out/merged")["all"], merged["all"]);
    let base = report(&w, "--model_path out/resized_base --tokenizer_path spm.model");
    assert!(loss(&base) > loss(&adapter) + 1.0, "{} {}", loss(&base), loss(&adapter));
    // A base that was never grown starts as sft starts it.
    let plain = ok(w.shell(
        "ringtune eval --model_path base --tokenizer_path spm.model --dataset_paths rows.jsonl --output r.json",
    ));
    assert!(plain.stderr.contains("not trained with <|im_start|> and <|im_end|>"), "{}", plain.stderr);
    assert!((loss(&json(&w, "r.json")) - loss(&base)).abs() < 1e-6);
    // The adapter in a checkpoint, and an output folder that was moved away from the path in its configuration.
    let checkpoint = report(&w, "--model_path out/checkpoint-12");
    assert_eq!(checkpoint["all"], adapter["all"]);
    fs::create_dir(w.path("elsewhere")).unwrap();
    fs::rename(w.path("out"), w.path("elsewhere/moved")).unwrap();
    assert_eq!(report(&w, "--model_path elsewhere/moved")["all"], adapter["all"]);
    assert_eq!(report(&w, "--model_path elsewhere/moved/checkpoint-12")["all"], adapter["all"]);
    fs::rename(w.path("elsewhere/moved/resized_base"), w.path("grown")).unwrap();
    fails(
        &w.shell("ringtune eval --model_path elsewhere/moved --dataset_paths rows.jsonl"),
        1,
        &["out/resized_base\" is no model folder", "--base-model"],
    );
    assert_eq!(report(&w, "--model_path elsewhere/moved --base-model grown")["all"], adapter["all"]);
    // The base before it grew does as well: the adapter carries the whole embedding.
    assert_eq!(report(&w, "--model_path elsewhere/moved --base_model base")["all"], adapter["all"]);
}

/// Losses that transformers and PEFT computed on the same rows; see tests/python/record_eval.py.
#[test]
fn losses_are_those_of_transformers() {
    let w = Workplace::new();
    for file in ["eval", "chat"] {
        w.write(&format!("{file}.jsonl"), first_rows(&format!("data/demo/{file}.jsonl"), 60));
    }
    let golden: Value = serde_json::from_slice(&fs::read("tests/data/golden/eval.json").unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let text = |key: &str| case[key].as_str().unwrap();
        let data = repository().join("tests/data");
        let base = data.join("model").join(text("model"));
        let adapter = data.join("golden").join(text("model")).join("adapter_all");
        let model = match case["adapter"] == true {
            true => format!("--model_path {} --base-model {}", adapter.display(), base.display()),
            false => format!("--model_path {}", base.display()),
        };
        let line = format!(
            "ringtune eval {model} --prompt_template {} --dataset_paths {}.jsonl --tokenizer_path {} --output r.json --quiet",
            text("template"),
            text("file"),
            base.join("tokenizer.model").display()
        );
        ok(w.shell(&line));
        let found = &json(&w, "r.json")["all"];
        assert_eq!(found["supervised_tokens"], case["supervised_tokens"], "{case}");
        assert_eq!(found["rows"], case["rows"]);
        let error = |key: &str| (found[key].as_f64().unwrap() - case[key].as_f64().unwrap()).abs();
        assert!(error("loss") < 1e-5, "{case}: {found}");
        assert!(error("token_accuracy") < 1e-9, "{case}: {found}");
    }
}

#[test]
fn no_batch_size_changes_a_figure() {
    let w = untuned();
    let run = |words: &str| {
        let line = format!(
            "ringtune eval --model_path base --tokenizer_path spm.model --prompt_template plain --dataset_paths rows.jsonl \
             more.jsonl --output report.json --quiet {words}"
        );
        let outcome = ok(w.shell(&line));
        let mut v = json(&w, "report.json");
        v.as_object_mut().unwrap().remove("seconds");
        (outcome.stdout, v)
    };
    let (table, one) = run("--batch_size 1");
    for size in [2, 7, 100] {
        assert_eq!(run(&format!("--batch_size {size} --threads 2")), (table.clone(), one.clone()));
    }
    let sets = one["data_sets"].as_array().unwrap();
    assert_eq!((sets.len(), sets[0]["rows"].as_u64(), sets[1]["rows"].as_u64()), (2, Some(24), Some(9)));
    // The whole is the mean over tokens, not over data sets.
    let sum = |key: &str| sets.iter().map(|s| s[key].as_f64().unwrap()).sum::<f64>();
    let nll: f64 = sets.iter().map(|s| s["loss"].as_f64().unwrap() * s["supervised_tokens"].as_f64().unwrap()).sum();
    assert!((loss(&one) - nll / sum("supervised_tokens")).abs() < 1e-12);
    assert!((one["all"]["perplexity"].as_f64().unwrap() - loss(&one).exp()).abs() < 1e-6 * loss(&one).exp());
    for part in ["data set", "rows.jsonl", "more.jsonl", "together", "perplexity", "accuracy"] {
        assert!(table.contains(part), "{part}: {table}");
    }
}

#[test]
fn a_limit_takes_a_seeded_choice_of_each_data_set() {
    let w = untuned();
    let run = |words: &str| {
        report(&w, &format!("--model_path base --tokenizer_path spm.model --prompt_template instruct {words}"))
    };
    let (a, b) = (run("--max_eval_samples 5"), run("--max-eval-samples 5 --batch-size 1"));
    assert_eq!(a["all"], b["all"]);
    assert_eq!((&a["all"]["rows"], &a["data_sets"][0]["rows_usable"]), (&5.into(), &24.into()));
    assert_ne!(run("--max_eval_samples 5 --seed 7")["all"], a["all"]);
    assert_eq!(run("--max_eval_samples 1000")["all"], run("")["all"]);
    assert_ne!(loss(&run("--mixed_precision bf16")), loss(&run("")));
    assert!((loss(&run("--mixed_precision bf16")) - loss(&run(""))).abs() < 0.2);
    // The flag before the command is the flag after it.
    let line = "ringtune --mixed_precision bf16 eval --dataset_paths rows.jsonl --output before.json --quiet --model_path base";
    ok(w.shell(&format!("{line} --tokenizer_path spm.model --prompt_template instruct")));
    let before = json(&w, "before.json");
    assert_eq!((&before["all"], &before["mixed_precision"]), (&run("--mixed_precision bf16")["all"], &"bf16".into()));
}

#[test]
fn samples_of_generation_are_printed_and_counted() {
    let w = tuned(&[]);
    let words = "--model_path out --gen_only --num_gen_samples 3 --max_new_tokens 6 --max_eval_samples 200";
    let line = format!("ringtune eval --dataset_paths rows.jsonl --output report.json {words}");
    let outcome = ok(w.shell(&line));
    for part in ["generation test on 3", "prompt: ", "reference: ", "greedy: ", "sampled: ", "stopped", "leaked"] {
        assert!(outcome.stdout.contains(part), "{part}: {}", outcome.stdout);
    }
    assert!(!outcome.stdout.contains("perplexity"), "--gen_only computes no loss");
    let v = json(&w, "report.json");
    assert!(v.get("all").is_none());
    let samples = v["generation"]["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 3);
    let first: Value =
        serde_json::from_str(fs::read_to_string(w.path("rows.jsonl")).unwrap().lines().next().unwrap()).unwrap();
    assert_eq!((&samples[0]["prompt"], &samples[0]["reference"]), (&first["prompt"], &first["response"]));
    for key in ["stop_rate", "mean_tokens", "longest", "control_tokens_leaked"] {
        assert!(v["generation"]["greedy"][key].is_number() && v["generation"]["sampled"][key].is_number(), "{key}");
    }
    assert!(v["generation"]["greedy"]["longest"].as_u64().unwrap() <= 6);
    // The same answers one by one, and the default number of prompts.
    let one = report(&w, &format!("{words} --batch_size 1"));
    assert_eq!(one["generation"]["samples"], v["generation"]["samples"]);
    let five = report(&w, "--model_path out --gen-only --max-new-tokens 2");
    assert_eq!(five["generation"]["samples"].as_array().unwrap().len(), 5);
}

#[test]
fn mistakes_are_named() {
    let w = tuned(&[]);
    let eval = |words: &str| w.shell(&format!("ringtune eval --tokenizer_path spm.model {words}"));
    let rows = "--dataset_paths rows.jsonl";
    fails(&eval(&format!("--model_path nowhere {rows}")), 1, &["nowhere: expected a model folder, found nothing"]);
    fails(&eval(&format!("--model_path spm.model {rows}")), 1, &["spm.model: expected a model folder, found a file"]);
    w.write("parent/inner/x", "");
    fs::rename(w.path("base"), w.path("parent/base")).unwrap();
    fails(&eval(&format!("--model_path parent {rows}")), 1, &["config.json", "did you mean parent/base?"]);
    let base = "--model_path parent/base";
    fails(&eval(&format!("{base} --base-model out {rows}")), 2, &["--base-model has no effect", "holds no adapter"]);
    fails(&eval(&format!("{base} --no_lora --base-model out {rows}")), 2, &["--base-model has no effect", "--no-lora"]);
    fails(&eval(&format!("--model_path out --base-model nowhere {rows}")), 1, &["nowhere: no such base model folder"]);
    fails(&eval(&format!("{base} --dataset_paths nowhere.jsonl")), 1, &["nowhere.jsonl"]);
    fails(&eval(&format!("{base} --prompt_template chatlm {rows}")), 2, &["unknown prompt template", "chatml"]);
    fails(&eval(&format!("{base} --gen_only --num_gen_samples 0 {rows}")), 2, &["does nothing"]);
    fails(&eval(&format!("{base} --max_seq_len 100000 {rows}")), 2, &["--max-seq-len", "at most 512"]);
    fails(&eval(&format!("{base} --special-ids 0,1 {rows}")), 2, &["expected four ids"]);
    fails(&eval(&format!("{base} {rows} --output nowhere/r.json")), 1, &["nowhere/r.json"]);
    fails(
        &eval(&format!("{base} {rows} --gen_only --max_new_tokens 2 --gen_top_p 7")),
        2,
        &["--gen-top-p: expected a number above 0 and at most 1, found \"7\""],
    );
    w.write("bad.jsonl", "{\"prompt\": \"a\", \"response\": \"b\"}\n{\"prompt\": 3}\n");
    fails(&eval(&format!("{base} --dataset_paths bad.jsonl")), 1, &["bad.jsonl:2"]);
    let said = ok(eval(&format!("{base} --dataset_paths bad.jsonl --skip_bad_rows"))).stderr;
    assert!(said.contains("1 bad and skipped") && said.contains("skipped bad.jsonl:2: field \"prompt\""), "{said}");
    fs::create_dir(w.path("reports")).unwrap();
    let said = ok(eval(&format!("{base} --dataset_paths bad.jsonl --skip_bad_rows --output reports/r.json"))).stderr;
    assert!(said.contains("skipped rows are named in reports/skipped_rows.txt"), "{said}");
    assert!(fs::read_to_string(w.path("reports/skipped_rows.txt")).unwrap().starts_with("bad.jsonl:2: field"));
    w.write("empty.jsonl", "");
    fails(&eval(&format!("{base} --dataset_paths empty.jsonl")), 1, &["empty.jsonl"]);
    // clap's own: a missing flag and a number that is none.
    for words in [rows, base, &format!("{base} {rows} --batch_size 0"), &format!("{base} {rows} --num_gen_samples x")] {
        assert_eq!(eval(words).code, Some(2), "{words}");
    }
    // A tokenizer that has more pieces than the model rows, and one without any.
    w.copy("tests/data/tokenizer/spm32k.model", "large.model");
    fails(
        &w.shell(&format!("ringtune eval {base} --tokenizer_path large.model {rows}")),
        1,
        &["vocabulary mismatch", "32000"],
    );
    fails(&w.shell(&format!("ringtune eval {base} {rows}")), 1, &["no tokenizer in parent/base", "--tokenizer-path"]);
    fails(
        &w.shell("ringtune --mixed_precision bf16 merge --model_path out --output_dir m"),
        2,
        &["has no effect on `merge`"],
    );
    let both = format!("ringtune --mixed_precision bf16 eval --mixed_precision no {base} {rows}");
    fails(&w.shell(&both), 2, &["--mixed-precision: bf16 before the command and no after it"]);
}
