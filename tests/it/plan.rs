//! `ringtune plan`: what it prints, and that the folder of a model is read.

use serde_json::Value;

use crate::program::{Outcome, Workplace};

fn plan(words: &str) -> Outcome {
    let words: Vec<&str> = ["plan"].into_iter().chain(words.split_whitespace()).collect();
    Workplace::new().run(&words)
}

fn json(words: &str) -> Value {
    let outcome = plan(&format!("{words} --json"));
    assert_eq!(outcome.code, Some(0), "{words}: {}", outcome.stderr);
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("{e}:\n{}", outcome.stdout))
}

#[test]
fn a_plan_is_a_range_with_two_digits() {
    let v = json("--model 8b --gpus 64 --network 8x400 --zero 1 --per-device-train-batch-size 8");
    assert_eq!((&v["gpus"], &v["hosts"], &v["zero"]), (&64.into(), &8.into(), &1.into()));
    assert_eq!(v["tokens_per_step"], 64 * 8 * 2048);
    let of = |side: &str| v[side]["tokens_per_second"].as_f64().unwrap();
    assert!(of("worst") < of("best") && of("worst") > 1e5, "{v:#}");
    for side in ["worst", "best"] {
        let digits = format!("{:e}", of(side));
        assert!(digits.split('e').next().unwrap().len() <= 3, "{digits} has more than two digits");
        let seconds = |key: &str| v[side]["seconds"][key].as_f64().unwrap();
        assert!(seconds("exposed") <= seconds("communication") && seconds("compute") < seconds("step"), "{v:#}");
    }
    // A measured bandwidth and efficiency leave no range.
    let v = json("--model 8b --gpus 8 --mfu 0.4 --bus-bandwidth 300");
    assert_eq!(v["worst"], v["best"]);
    assert_eq!(v["best"]["bus_bytes_per_second"], 3e11);
    // More accumulation hides more; sharded state takes less.
    let slow = |a: u32| json(&format!("--model 8b --gpus 64 --network 25 --zero 1 --gradient-accumulation-steps {a}"));
    assert!(slow(8)["best"]["computing"].as_f64() > slow(1)["best"]["computing"].as_f64());
    let held = |zero: u32| json(&format!("--model 8b --zero {zero}"))["memory_bytes"]["total"].as_f64().unwrap();
    assert!(held(0) > 1.5 * held(1));
    assert_eq!(json("--model 8b")["fits"], false);
    assert_eq!(json("--model 135m --gpus 1")["fits"], true);
}

#[test]
fn the_shape_of_a_folder_is_read_and_formulas_have_their_sources() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/model/tiny-llama-tied");
    let v = json(&format!("--model-path {model} --max-seq-len 64 --gpus 2"));
    assert_eq!(v["weights"], 354_624);
    let text = plan(&format!("--model-path {model} --gpus 2 --use-lora"));
    assert_eq!(text.code, Some(0), "{}", text.stderr);
    for words in ["memory per GPU", "tokens/s", "LoRA of rank 16", "2(w-1)/w", "src/graph/tuning.cc", "bus bandwidth"] {
        assert!(text.stdout.contains(words), "no {words:?} in:\n{}", text.stdout);
    }
    let refused = plan("--model 8b --gpus 16");
    assert_eq!(refused.code, Some(2));
    assert!(refused.error().contains("--network: 2 hosts need one"), "{}", refused.stderr);
}
