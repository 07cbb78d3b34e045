//! What a layer costs the host in a training step: launches, read from what the emulator records of two runs that differ in a layer; and
//! what the driver is asked for besides.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::skip::device;
use crate::train::{ok, ringtune};

/// Counts by name, of steps, or of what a layer adds to them.
type Counts = BTreeMap<String, f64>;

fn less(many: &Counts, few: &Counts, over: f64) -> Counts {
    let rest = |(name, n): (&String, &f64)| (name.clone(), (n - few.get(name).unwrap_or(&0.0)) / over);
    many.iter().map(rest).filter(|(_, n)| *n != 0.0).collect()
}

/// Runs of models of several depths, in bf16.
struct Runs(tempfile::TempDir);

impl Runs {
    fn config(&self, layers: usize) -> PathBuf {
        let path = self.0.path().join(format!("deep{layers}.json"));
        let text = format!(
            r#"{{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": {layers},
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": true}}"#
        );
        fs::write(&path, text).unwrap();
        path
    }

    /// Launches and calls of the driver of a run.
    fn counts(&self, words: &[&str]) -> [Counts; 2] {
        let trace = self.0.path().join("trace");
        let _ = fs::remove_file(&trace);
        let (_, text) = ok(ringtune(words, &[("VGPU_TRACE", trace.to_str().unwrap()), ("VGPU_CALLS", "1")]));
        let count = |names: &mut dyn Iterator<Item = String>| {
            let mut counts = Counts::new();
            names.for_each(|name| *counts.entry(name).or_insert(0.0) += 1.0);
            counts
        };
        let launches = fs::read_to_string(&trace).unwrap();
        let kernels =
            launches.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["kernel"].as_str().unwrap().to_string());
        let calls = text.lines().filter_map(|l| l.strip_prefix("vgpu: ")).filter_map(|l| l.split(' ').next());
        [count(&mut { kernels }), count(&mut calls.map(String::from))]
    }

    /// Pretrains a model; its folder is left behind.
    fn pretrain(&self, layers: usize, steps: usize) -> [Counts; 2] {
        let (config, out) = (self.config(layers), self.0.path().join(format!("pretrain{steps}")));
        let steps = steps.to_string();
        let mut words =
            vec!["pretrain", "--model-config", config.to_str().unwrap(), "--output-dir", out.to_str().unwrap()];
        let rest = "--device cuda --mixed-precision bf16 --tokenizer-path tests/data/tokenizer/spm4k.model \
                    --dataset-paths data/demo/pretrain_valid.txt --per-device-train-batch-size 1 --max-seq-len 64 --no-tensorboard \
                    --save-strategy no --max-steps";
        words.extend(rest.split_whitespace().chain([steps.as_str()]));
        self.counts(&words)
    }

    /// Fine-tunes what [`Runs::pretrain`] left, with low-rank updates of every product and dropout.
    fn lora(&self, layers: usize, steps: usize) -> [Counts; 2] {
        let model = self.0.path().join(format!("pretrain{steps}/deep{layers}/final"));
        let (out, steps) = (self.0.path().join(format!("lora{layers}of{steps}")), steps.to_string());
        let mut words = vec!["sft", "--model-path", model.to_str().unwrap(), "--output-dir", out.to_str().unwrap()];
        let rest = "--device cuda --mixed-precision bf16 --dataset-paths data/demo/chat.jsonl --prompt-template chatml --lora-r 16 \
                    --lora-dropout 0.1 --per-device-train-batch-size 1 --max-seq-len 64 --no-tensorboard --val-fraction 0 \
                    --save-strategy no --max-steps";
        words.extend(rest.split_whitespace().chain([steps.as_str()]));
        self.counts(&words)
    }
}

/// Holds what a layer launches in a step to a bound. `run(layers, steps)` trains.
fn bounded(what: &str, most: f64, run: impl Fn(usize, usize) -> [Counts; 2]) {
    let (few, many) = (1, 3);
    let [two, three] = [2, 3].map(|layers| {
        let ([launches_few, calls_few], [launches, calls]) = (run(layers, few), run(layers, many));
        let steps = (many - few) as f64;
        (less(&launches, &launches_few, steps), less(&calls, &calls_few, steps))
    });
    let a_layer = less(&three.0, &two.0, 1.0);
    let sum: f64 = a_layer.values().sum();
    println!("{what}: {sum} launches a layer: {a_layer:?}; {} a step of 2", two.0.values().sum::<f64>());
    assert!(sum > 10.0 && sum <= most, "{what}: {sum} launches a layer: {a_layer:?}");
    // All gradients are set to zero at once.
    let zeros = [&two, &three].map(|(_, calls)| calls["cuMemsetD8Async"]);
    assert_eq!(zeros[0], zeros[1], "{what}: fills with zeros of 2 and 3 layers");
    for (_, calls) in [two, three] {
        let count = |name: &str| calls.get(name).copied().unwrap_or(0.0);
        assert_eq!(count("cuStreamSynchronize"), 1.0, "{what}: waits a step: {calls:?}");
        for name in ["pageable:", "cuMemAllocAsync", "cuMemHostAlloc", "cuModuleLoadData", "cuModuleGetFunction"] {
            assert_eq!(count(name), 0.0, "{what}: {name} in a step: {calls:?}");
        }
    }
}

/// 25 launches a layer where every weight is trained, 31 with low-rank updates of every product and dropout, so that one more is noticed; one
/// wait a step, nothing allocated, compiled or loaded.
#[test]
fn a_layer_takes_few_launches() {
    if !device().is_some_and(|dev| dev.properties().emulated) {
        return;
    }
    let runs = Runs(tempfile::tempdir().unwrap());
    bounded("full", 25.0, |layers, steps| runs.pretrain(layers, steps));
    bounded("LoRA with dropout", 31.0, |layers, steps| runs.lora(layers, steps));
}

/// A token that is decoded costs one copy of page-locked memory, one back and one wait; nothing is allocated, compiled or loaded.
#[test]
fn a_token_takes_a_copy_each_way_and_one_wait() {
    if !device().is_some_and(|dev| dev.properties().emulated) {
        return;
    }
    let runs = Runs(tempfile::tempdir().unwrap());
    runs.pretrain(2, 1);
    let model = runs.0.path().join("pretrain1/deep2/final");
    let (few, many) = (4, 12);
    let run = |tokens: usize| {
        let tokens = tokens.to_string();
        let words = ["generate", "--model-path", model.to_str().unwrap(), "--raw", "--greedy", "--device", "cuda"];
        runs.counts(&[&words[..], &["--max-new-tokens", &tokens, "A river"]].concat())
    };
    let ([launches_few, calls_few], [launches, calls]) = (run(few), run(many));
    let (tokens, all_few) = ((many - few) as f64, &calls_few);
    let (launches, calls) = (less(&launches, &launches_few, tokens), less(&calls, &calls_few, tokens));
    println!("{} launches a token of 2 layers: {launches:?}; {calls:?}", launches.values().sum::<f64>());
    let count = |name: &str| calls.get(name).copied().unwrap_or(0.0);
    let copies = |way: &str| calls.iter().filter(|(name, _)| name.starts_with(way)).map(|(_, n)| n).sum::<f64>();
    assert_eq!([copies("cuMemcpyHtoD"), copies("cuMemcpyDtoH")], [1.0, 1.0], "{calls:?}");
    assert_eq!(count("cuStreamSynchronize"), 1.0, "{calls:?}");
    for name in [
        "pageable:",
        "cuMemAllocAsync",
        "cuMemHostAlloc",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuEventSynchronize",
    ] {
        assert_eq!(count(name), 0.0, "{name}: {calls:?}");
    }
    // Prompts and weights do take such copies: the emulator says so.
    assert!(all_few["pageable:"] > 0.0, "{all_few:?}");
}
