//! What `ringtune plan` says that ranks ask of NCCL in a step, beside what the emulated one was asked for.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

use super::{Training, can_run, ended, rows, text};
use crate::skip::device;

/// What `ringtune plan` says of a step: calls of NCCL, and the bytes that the main rank sends.
fn planned(words: &str) -> Value {
    let mut c = Command::new(crate::skip::program());
    c.current_dir(crate::skip::root()).args(["plan", "--model-path", "tests/data/model/tiny-llama-tied", "--json"]);
    let output = c.args("--max-seq-len 64 --per-device-train-batch-size 2".split(' ')).args(words.split_whitespace());
    let output = output.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_slice::<Value>(&output.stdout).unwrap()["nccl_per_step"].clone()
}

/// The calls of the emulated NCCL in what a rank said, by name: how many, and the bytes that they send from a rank.
fn asked_of_nccl(said: &str, ranks: usize) -> (BTreeMap<String, f64>, f64) {
    let (mut count, mut sent) = (BTreeMap::<String, f64>::new(), 0.0);
    for line in said.lines().filter_map(|l| l.strip_prefix("vgpu: nccl")) {
        let (name, rest) = line.split_once("(count ").unwrap();
        let fields: Vec<&str> = rest.split(", ").collect();
        let size = if fields[1].starts_with("f32") { 4.0 } else { 1.0 };
        let (bytes, others) = (fields[0].parse::<f64>().unwrap() * size, (ranks - 1) as f64);
        *count.entry(format!("nccl{name}")).or_default() += 1.0;
        sent += match name {
            "AllReduce" => 2.0 * others / ranks as f64 * bytes,
            "ReduceScatter" | "AllGather" => others * bytes,
            "Send" => bytes,
            _ => 0.0,
        };
    }
    (count, sent)
}

/// Once a step and in order, whole and sharded, all weights and low-rank updates.
#[test]
fn a_plan_counts_what_nccl_is_asked_for() {
    if !can_run(4) || !device().is_some_and(|dev| dev.properties().emulated) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path());
    for (ranks, trained, planned_as, form) in [
        (2, "--no-lora", "", "--zero 0 --fold step"),
        (4, "--no-lora --mixed-precision bf16", "--dtype bf16", "--zero 1 --fold step"),
        (3, "--no-lora", "", "--zero 0 --fold micro_batch"),
        (2, "--no-lora --mixed-precision bf16", "--dtype bf16", "--zero 1 --fold micro_batch"),
        (3, "--lora-r 8", "--use-lora --lora-r 8", "--zero 1 --fold micro_batch"),
    ] {
        let run = |steps: u64| {
            let flags = format!("{trained} --val-fraction 0 --save-strategy no --max-steps {steps} --quiet {form}");
            let training =
                Training { micro_batches: 2 * ranks, template: "instruct", ..Training::of(dir.path(), &flags) };
            let outputs =
                ended(training.ranks(&format!("{trained} {form} {steps}").replace(' ', "_"), ranks, |c, rank| {
                    if rank == 0 {
                        c.env("VGPU_CALLS", "1");
                    }
                }));
            let said = text(&outputs[0]);
            assert!(outputs.iter().all(|o| o.status.success()), "{said}");
            asked_of_nccl(&said, ranks)
        };
        let ((few, sent_few), (many, sent_many)) = (run(1), run(3));
        let dtype = if planned_as.contains("bf16") { "" } else { "--dtype f32" };
        let plan = planned(&format!("--gpus {ranks} --gradient-accumulation-steps 2 {planned_as} {dtype} {form}"));
        let what = format!("{ranks} ranks, {trained}, {form}: {plan}");
        for name in ["ncclAllReduce", "ncclReduceScatter", "ncclAllGather", "ncclSend", "ncclRecv"] {
            let of = |calls: &BTreeMap<String, f64>| calls.get(name).copied().unwrap_or(0.0);
            assert_eq!(plan[name].as_f64().unwrap(), (of(&many) - of(&few)) / 2.0, "{what}: {name}");
        }
        assert_eq!(plan["sent_bytes"].as_f64().unwrap(), (sent_many - sent_few) / 2.0, "{what}");
    }
}
