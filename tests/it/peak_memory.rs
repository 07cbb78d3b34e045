//! What `check` says a run takes of the machine's memory is what its process holds at most, within 5 %.

use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::program::{Workplace, first_rows};
use crate::ringrun_program::ringrun;

/// A model of 14 million weights: what a run takes stands out against what the program does.
fn shape() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 512, "tie_word_embeddings": true,
    })
}

/// Bytes that a process and those that it started and waited for held at most, whichever held most.
#[expect(clippy::zombie_processes, reason = "wait4 waits for it, and says what it held")]
fn peak(w: &Workplace, words: &[&str]) -> u64 {
    let path = |word: &str| match word {
        "ringtune" => env!("CARGO_BIN_EXE_ringtune").into(),
        "ringrun" => ringrun().display().to_string(),
        _ => word.to_string(),
    };
    let mut command = Command::new(path(words[0]));
    command
        .args(words[1..].iter().map(|word| path(word)))
        .current_dir(w.path(""))
        .env("RINGTUNE_CACHE", w.path("cache"));
    let child = command.stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap();
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: both are there to be written, and the process is a child that nobody else waits for.
    let usage = unsafe {
        assert_eq!(libc::wait4(child.id() as i32, &mut status, 0, usage.as_mut_ptr()), child.id() as i32);
        usage.assume_init()
    };
    assert_eq!(status, 0, "{words:?}");
    // Linux counts in KiB, macOS in bytes.
    usage.ru_maxrss as u64 * if cfg!(target_os = "linux") { 1024 } else { 1 }
}

#[test]
fn a_run_holds_what_check_says() {
    let w = Workplace::new();
    w.copy("tests/data/tokenizer/spm4k.model", "spm.model");
    w.write("rows.jsonl", first_rows("data/demo/define.jsonl", 200));
    w.write("text.txt", first_rows("data/demo/pretrain_train.txt", 800));
    w.write("shape.json", shape().to_string());
    let common = "--tokenizer_path spm.model --max_seq_len 256 --val_fraction 0 --max_steps 2 --per_device_eval_batch_size 1 --threads 2";
    let new = "pretrain --model_config shape.json --dataset_paths text.txt";
    let old = "sft --model_path bf16/shape/final --dataset_paths rows.jsonl --mixed_precision bf16 --per_device_train_batch_size 4";
    let cases = [
        // Written at the end alone; then while the training goes on.
        ("bf16", new, "--mixed_precision bf16 --per_device_train_batch_size 2", 1),
        ("f32", new, "--per_device_train_batch_size 2 --save_steps 1", 1),
        ("layer", new, "--mixed_precision bf16 --per_device_train_batch_size 4 --recompute layer", 1),
        (
            "accumulated",
            new,
            "--mixed_precision bf16 --per_device_train_batch_size 1 --gradient_accumulation_steps 2",
            1,
        ),
        ("packed", old, "--no_lora --packing", 1),
        // The base is read where it stands, and written once more with the rows of new tokens.
        ("lora", old, "--use_lora --packing", 1),
        ("zero", new, "--mixed_precision bf16 --per_device_train_batch_size 2 --zero 1", 2),
    ];
    let mut wrong = Vec::new();
    for (name, command, more, ranks) in cases {
        let line = format!("{command} {common} {more} --output_dir {name}");
        let words: Vec<&str> = line.split(' ').collect();
        let of_check =
            [&["check"][..], if words[0] == "pretrain" { &["--pretrain"] } else { &[] }, &words[1..]].concat();
        let outcome = w.run(&[&of_check[..], &["--json", "--ranks", &ranks.to_string()]].concat());
        let report: Value = serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("{e}: {}", outcome.stderr));
        let memory = &report["memory_per_device"];
        let of = |key: &str| memory[key].as_u64().unwrap_or_else(|| panic!("{name}: {key}: {memory:#}"));
        let said = of("total") + of("program");
        let started: &[&str] = if ranks == 1 { &["ringtune"] } else { &["ringrun", "-n", "2", "ringtune"] };
        let held = peak(&w, &[started, &words].concat());
        let off = held as f64 / said as f64 - 1.0;
        eprintln!("{name}: {said} said, {held} held, {:+.1} %", 100.0 * off);
        if off.abs() > 0.05 {
            wrong.push(format!("{name}: {said} said, {held} held; {memory:#}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
