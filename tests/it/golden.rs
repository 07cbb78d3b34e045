//! The recorded results of transformers and PEFT, reproduced: every case, both precisions.

use std::path::Path;

use crate::parity::{ParityArgs, compare};
use ringtune::cpu::Cpu;
use ringtune::tensor::DType;

const CASES: [&str; 6] =
    ["tiny-llama-tied", "tiny-llama-untied", "qwen2-untied", "qwen3-tied", "mistral-window", "llama3-rope"];

fn check(case: &str, dtype: DType) {
    let out = tempfile::tempdir().unwrap();
    let args = ParityArgs {
        case: Path::new("tests/data/golden").join(case),
        model: Path::new("tests/data/model").join(case),
        out: out.path().to_path_buf(),
        dtype,
    };
    let report = compare(&Cpu::new(Some(2)).unwrap(), &args).unwrap();
    println!("{case} {dtype:?}\n{}", report.table());
    assert!(report.len() >= 12, "{case}: only {} comparisons", report.len());
    assert_eq!(report.failures(), 0, "{case} {dtype:?}\n{}", report.table());
    let written = [
        "dump.safetensors",
        "lora.all.safetensors",
        "adamw/metrics.jsonl",
        "lora.all/metrics.jsonl",
        "generation.jsonl",
    ];
    for file in written.iter().chain(&["adamw/final/model.safetensors", "lora.all/final/adapter_model.safetensors"]) {
        assert!(out.path().join(file).is_file(), "{file} is missing");
    }
}

#[test]
fn f32_within_the_noise_of_the_recording_library() {
    CASES.into_iter().for_each(|c| check(c, DType::F32));
}

#[test]
fn bf16_within_the_noise_of_the_recording_library() {
    CASES.into_iter().for_each(|c| check(c, DType::Bf16));
}
