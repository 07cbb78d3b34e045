//! Files as they are read: pipes, files that are cut under a run, files larger than the memory.

use std::fs;

use crate::bad_input::{fails, good};

#[test]
fn a_pipe_as_data_set_is_refused_at_once() {
    let w = good();
    let sft = "--model_path model --tokenizer_path spm.model --output_dir out --max_steps 1";
    let eval = "--model_path model --tokenizer_path spm.model";
    for line in [
        format!("mkfifo p; timeout 20 ringtune sft {sft} --dataset_paths rows.jsonl p"),
        format!("cat rows.jsonl | timeout 20 ringtune sft {sft} --dataset_paths /dev/stdin"),
        format!("cat rows.jsonl | timeout 20 ringtune eval {eval} --dataset_paths /dev/stdin"),
        "timeout 20 ringtune pack --tokenizer_path spm.model --dataset_paths p --output x.tok".to_string(),
        "timeout 20 ringtune inspect file p".to_string(),
        "mkfifo p.bin; timeout 20 ringtune pretrain --model_config tiny --tokenizer_path spm.model --dataset_paths p.bin --output_dir out".to_string(),
        "mkfifo p.tok; timeout 20 ringtune pretrain --model_config tiny --tokenizer_path spm.model --dataset_paths p.tok --output_dir out".to_string(),
    ] {
        let outcome = w.shell(&line);
        fails(&outcome, 1, &["expected a file that can be read again, found a pipe; write what it gives to a file"]);
    }
}

/// A mapped file that another program cuts under the run: a named error, and what was trained is saved.
#[test]
fn a_token_file_that_is_cut_while_it_is_read_is_named() {
    let w = good();
    let tokens: Vec<u8> = (0..2_000_000u64).flat_map(|i| (4 + (i * 7919 % 4000) as u16).to_le_bytes()).collect();
    w.write("text.bin", tokens);
    w.copy("configs/demo_model.json", "tiny.json");
    // A run that does not notice would go on for long.
    let line = "timeout 120 ringtune pretrain --model_config tiny.json --tokenizer_path spm.model --dataset_paths text.bin --output_dir out \
        --max_seq_len 32 --per_device_train_batch_size 1 --max_steps 100000 --val_fraction 0 --save_strategy no --quiet & \
        while ! grep -qs '\"step\"' out/*/metrics.jsonl; do sleep 0.05; kill -0 $! || exit 9; done; truncate -s 100 text.bin; wait $!";
    let outcome = w.shell(line);
    fails(&outcome, 1, &["text.bin: the file was cut while it was read, expected 4000000 bytes, found 100"]);
    let saved = || {
        let mut names = fs::read_dir(w.path("out/tiny")).unwrap().map(|e| e.unwrap().file_name());
        names.any(|n| n.to_string_lossy().starts_with("checkpoint-"))
    };
    assert!(saved(), "no checkpoint was saved");

    // The same of text that is only evaluated on.
    fs::remove_dir_all(w.path("out")).unwrap();
    let tokens = |n: u64| (0..n).flat_map(|i| (4 + (i * 7919 % 4000) as u16).to_le_bytes()).collect::<Vec<u8>>();
    w.write("text.bin", tokens(200_000));
    w.write("val.bin", tokens(20_000));
    let line = line
        .replace("--val_fraction 0", "--val_paths val.bin --eval_steps 3")
        .replace("truncate -s 100 text.bin", "truncate -s 100 val.bin");
    fails(&w.shell(&line), 1, &["val.bin: the file was cut while it was read, expected 40000 bytes, found 100"]);
    assert!(saved(), "no checkpoint was saved");
}

/// A file of rows is never in memory whole: this one is many times what the program may take besides what it starts with.
#[test]
fn rows_are_prepared_in_bounded_memory() {
    let w = good();
    let row = |i: u32| format!("{{\"prompt\": \"{i}\", \"response\": \"{}\"}}\n", "eins zwei drei vier ".repeat(120));
    w.write("rows.jsonl", (0..10_000).map(row).collect::<String>());
    w.write(
        "text.txt",
        (0..10_000).map(|i| format!("{i} {}\n\n\n", "eins zwei drei vier ".repeat(120))).collect::<String>(),
    );
    // Data that is private to the process, in KiB. The file alone has 24 MB; held whole, with its rows, their tokens and the file
    // to be written, it took more than 150.
    for words in ["--dataset_paths rows.jsonl", "--dataset_paths text.txt"] {
        let line = format!(
            "ulimit -d 65536; RAYON_NUM_THREADS=2 RUST_BACKTRACE=0 timeout 60 ringtune pack --tokenizer_path spm.model \
             --max_seq_len 2048 --output x.tok --quiet {words}"
        );
        let outcome = w.shell(&line);
        assert_eq!(outcome.code, Some(0), "{words}: {}", outcome.stderr);
        assert!(outcome.stdout.contains("10,000 documents"), "{}", outcome.stdout);
    }
}
