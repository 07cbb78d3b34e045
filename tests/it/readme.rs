//! Every command of the README runs as it stands there: the five training examples on small data, in a folder with the
//! files where the commands look for them.

use std::fs;

use crate::program::{Workplace, code_blocks, first_rows, repository};
use crate::ringrun_program::ringrun;

/// A model small enough for 500 steps in seconds.
const SHAPE: &str = r#"{"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": true}"#;

/// A budget of few steps; the commands themselves stay as they are.
fn budget(steps: usize) -> String {
    format!(
        r#"{{"max_steps": {steps}, "save_steps": 500, "eval_steps": 500, "max_seq_len": 64, "val_fraction": 0.2,
            "per_device_train_batch_size": 1, "max_new_tokens": 4, "num_gen_samples": 1, "tensorboard": false, "quiet": true,
            "logging_steps": 1000, "lora_r": 2}}"#
    )
}

/// The files that the examples name.
fn with_data() -> Workplace {
    let w = Workplace::new();
    w.copy("data/demo/spm4k.model", "data/tokenizer/spm32k.model");
    for (name, file) in [
        ("dolly15k", "data/demo/define.jsonl"),
        ("oasst1_en", "data/demo/chat.jsonl"),
        ("alpaca", "data/demo/eval.jsonl"),
    ] {
        w.write(&format!("data/sft/{name}.jsonl"), first_rows(file, 30));
    }
    w
}

fn pretrain(w: &Workplace, name: &str, folder: &str) {
    w.write(&format!("{name}.json"), SHAPE);
    let text = fs::read_to_string(repository().join("data/demo/pretrain_valid.txt")).unwrap();
    w.write("text.txt", text.chars().take(4000).collect::<String>());
    let line = format!(
        "ringtune pretrain --model_config {name}.json --tokenizer_path data/tokenizer/spm32k.model --dataset_paths text.txt \
         --output_dir checkpoints/{folder} --max_steps 2 --per_device_train_batch_size 1 --quiet"
    );
    let outcome = w.shell(&line);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(w.path(&format!("checkpoints/{folder}/{name}/final/model.safetensors")).is_file());
}

fn readme_blocks() -> Vec<String> {
    code_blocks(&fs::read_to_string(repository().join("README.md")).unwrap(), "bash")
}

/// Makes the other files that the examples name, as the README says, of fewer rows.
fn convert(w: &Workplace) {
    let block = readme_blocks().into_iter().find(|b| b.contains("ringtune convert")).unwrap();
    for line in block.lines() {
        let outcome = w.shell(&fewer(line));
        assert_eq!(outcome.code, Some(0), "{line}\n{}", outcome.stderr);
    }
}

fn fewer(line: &str) -> String {
    line.replace("--take 200", "--take 12").replace("--skip 200", "--skip 12")
}

fn sft_examples() -> Vec<String> {
    readme_blocks().into_iter().filter(|b| b.contains("checkpoints/mix-")).collect()
}

#[test]
fn the_five_training_examples_run_verbatim() {
    let examples = sft_examples();
    assert_eq!(examples.len(), 5, "the README shows the five examples");
    let w = with_data();
    pretrain(&w, "tiny", "mix-tiny-fa2-75k");
    pretrain(&w, "small", "mix-small-fa2-150k");
    w.write("config/sft_tiny.json", budget(3));
    w.write("config/sft_small.json", budget(3));
    convert(&w);
    for example in &examples {
        let output = example.split("--output_dir ").nth(1).unwrap().split_whitespace().next().unwrap();
        let resumes = example.contains("--resume_from_checkpoint");
        if resumes {
            // The run that the checkpoint comes from: the same command without the last flag.
            w.write("config/sft_tiny.json", budget(503));
            let first = example.split("--resume_from_checkpoint").next().unwrap();
            let outcome = w.shell(first.trim_end().trim_end_matches('\\'));
            assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
            assert!(w.path(output).join("checkpoint-500").is_dir(), "{}", outcome.stderr);
            fs::remove_file(w.path(output).join("adapter_model.safetensors")).unwrap();
        }
        let outcome = w.shell(example);
        assert_eq!(outcome.code, Some(0), "{example}\n{}", outcome.stderr);
        let written = |name: &str| w.path(output).join(name).is_file();
        let full = example.contains("--no_lora");
        assert_eq!(written("adapter_model.safetensors"), !full, "{example}");
        assert_eq!(written("model.safetensors"), full, "{example}");
        let merges = example.contains("--merge_adapters");
        assert_eq!(written("merged/model.safetensors"), merges, "{example}");
        let metrics = fs::read_to_string(w.path(output).join("metrics.jsonl")).unwrap();
        let steps: Vec<u64> = metrics
            .lines()
            .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap())
            .filter(|v| v.get("loss").is_some())
            .map(|v| v["step"].as_u64().unwrap())
            .collect();
        let expected: Vec<u64> = (1..=if resumes { 503 } else { 3 }).collect();
        assert_eq!(steps, expected, "{example}");
        if example.contains("--do_gen_test") {
            assert!(outcome.stdout.contains("reference"), "{}", outcome.stdout);
        }
        if resumes {
            w.write("config/sft_tiny.json", budget(3));
        }
    }
    // What the resumed run wrote is what the README evaluates, merges and talks to.
    let block = readme_blocks().into_iter().find(|b| b.contains("ringtune eval")).unwrap();
    let lines = block.replace("\\\n", " ");
    assert_eq!(lines.lines().count(), 5);
    for line in lines.lines().map(|l| l.split(" #").next().unwrap()) {
        let outcome = w.shell(line);
        assert_eq!(outcome.code, Some(0), "{line}\n{}", outcome.stderr);
        let expected = match line {
            _ if line.contains("--gen_only") => "generation test on 10",
            _ if line.contains("--no_lora") => "perplexity",
            _ if line.contains("ringtune merge") => "merged model",
            _ if line.contains("ringtune eval") => "perplexity",
            _ => "",
        };
        assert!(outcome.stdout.contains(expected), "{line}\n{}", outcome.stdout);
    }
}

/// `ringtune sft --mixed_precision bf16 …` and `ringtune --mixed_precision bf16 sft …` are the same run.
#[test]
fn mixed_precision_before_and_after_the_command() {
    let w = with_data();
    pretrain(&w, "tiny", "m");
    let sft = "sft --model_path checkpoints/m/tiny/final --dataset_paths data/sft/alpaca.jsonl --max_steps 2 --max_seq_len 64 \
               --tokenizer_path data/tokenizer/spm32k.model --per_device_train_batch_size 1";
    let run = |line: String| {
        let outcome = w.shell(&line);
        assert_eq!(outcome.code, Some(0), "{line}\n{}", outcome.stderr);
        outcome
    };
    run(format!("ringtune --mixed_precision bf16 {sft} --output_dir before"));
    run(format!("ringtune {sft} --mixed_precision bf16 --output_dir after"));
    run(format!("ringtune {sft} --output_dir f32"));
    let weights = |dir: &str| fs::read(w.path(dir).join("adapter_model.safetensors")).unwrap();
    assert_eq!(weights("before"), weights("after"));
    assert_ne!(weights("before"), weights("f32"), "the flag has an effect");
}

/// What is not a training example: `make` targets exist, and other `ringtune` commands run.
#[test]
fn other_commands_of_the_readme_exist() {
    let readme = fs::read_to_string(repository().join("README.md")).unwrap();
    let makefile = fs::read_to_string(repository().join("Makefile")).unwrap();
    let w = with_data();
    for name in ["define", "chat", "jargon"] {
        w.write(&format!("data/demo/{name}.jsonl"), first_rows(&format!("data/demo/{name}.jsonl"), 40));
    }
    w.copy("data/demo/spm4k.model", "data/demo/spm4k.model");
    w.copy("data/demo/pretrain_valid.txt", "data/demo/pretrain_train.txt");
    w.copy("tests/data/templates.json", "conversations.json");
    ringrun();
    let mut ran = 0;
    for block in code_blocks(&readme, "bash").iter().filter(|b| !b.contains("checkpoints/")) {
        let commands = block.replace("\\\n", " ");
        for line in commands.lines().map(|l| l.split(" #").next().unwrap().trim()) {
            if let Some(target) = line.strip_prefix("make ") {
                let target = target.split_whitespace().next().unwrap();
                assert!(makefile.contains(&format!("\n{target}:")), "make {target}");
            } else if line.starts_with("ringtune") || line.starts_with("ringrun ") {
                // One step instead of a minute of them.
                let trains = line.contains("ringtune pretrain") || line.contains("ringtune sft");
                let (before, after) = line.split_once("--max-steps ").unwrap_or((line, ""));
                let after = after.split_once(' ').map_or("", |a| a.1);
                let line = match trains {
                    true => format!("{before} --max-steps 1 {after}"),
                    false => fewer(line),
                };
                let outcome = w.shell(&line);
                assert_eq!(outcome.code, Some(0), "{line}\n{}", outcome.stderr);
                ran += 1;
            } else {
                assert!(line.is_empty(), "unknown: {line}");
            }
        }
    }
    assert!(ran >= 5, "only {ran} commands were found");
}
