//! The recorded results of transformers and PEFT, reproduced: every case, both precisions.

use std::path::Path;

use crate::levels::{Support, cpu, levels};
use crate::parity::{ParityArgs, compare};
use crate::runs::{change_tensor, copy_dir};
use ringtune::cpu::{Cpu, Level};
use ringtune::rng::Stream;
use ringtune::tensor::DType;
use serde_json::Value;

const CASES: [&str; 6] =
    ["tiny-llama-tied", "tiny-llama-untied", "qwen2-untied", "qwen3-tied", "mistral-window", "llama3-rope"];

fn check(case: &str, dtype: DType) {
    check_on(&Cpu::new(Some(2)).unwrap(), case, dtype);
}

fn check_on(dev: &Cpu, case: &str, dtype: DType) {
    let out = tempfile::tempdir().unwrap();
    let args = ParityArgs {
        case: Path::new("tests/data/golden").join(case),
        model: Path::new("tests/data/model").join(case),
        out: out.path().to_path_buf(),
        dtype,
    };
    let report = compare(dev, &args).unwrap();
    let name = format!("{case} {dtype:?} {}", dev.level().name());
    println!("{name}\n{}", report.table());
    assert!(report.len() >= 12, "{name}: only {} comparisons", report.len());
    assert_eq!(report.failures(), 0, "{name}\n{}", report.table());
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

/// Each level sums in an order of its own, and all stay within the same noise.
#[test]
fn the_smallest_case_at_every_level_that_runs_here() {
    for level in Level::ALL {
        println!("level {}: {}", level.name(), Support::of(level).word());
    }
    for level in levels() {
        check_on(&cpu(2, level), SMALL, DType::Bf16);
        // Tiles are for bf16 alone; what is emulated takes its time.
        if Support::of(level) == Support::Native {
            check_on(&cpu(2, level), SMALL, DType::F32);
        }
    }
}

/// A copy of the smallest case, to be changed.
fn copy_of_a_case() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&Path::new("tests/data/golden").join(SMALL), dir.path());
    dir
}

const SMALL: &str = "qwen3-tied";

/// The failing lines of the table of a changed case.
fn failing(case: &Path, dtype: DType) -> String {
    let out = tempfile::tempdir().unwrap();
    let args = ParityArgs {
        case: case.to_path_buf(),
        model: Path::new("tests/data/model").join(SMALL),
        out: out.path().to_path_buf(),
        dtype,
    };
    let report = compare(&Cpu::new(Some(2)).unwrap(), &args).unwrap();
    let table = report.table();
    let lines: Vec<&str> = table.lines().filter(|l| l.contains("  FAIL  ")).collect();
    assert_eq!(lines.len(), report.failures());
    lines.join("\n")
}

fn change_json(case: &Path, change: impl FnOnce(&mut Value)) {
    let path = case.join("golden.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

/// All values a twentieth larger: more than rounding to bf16 explains.
fn larger(bytes: &mut [u8]) {
    for b in bytes.chunks_exact_mut(4) {
        let x = f32::from_le_bytes(b.try_into().unwrap());
        b.copy_from_slice(&(x * 1.05).to_le_bytes());
    }
}

/// Every recorded tensor of the case's three files, each changed alone in f32, is noticed; some of them, a few at a time.
#[test]
fn a_change_of_any_recorded_tensor_is_noticed() {
    let names = |file: &str| -> Vec<String> {
        let bytes = std::fs::read(Path::new("tests/data/golden").join(SMALL).join(file)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        // Ids, labels and masks are what is run, not what is compared.
        file.iter().filter(|(_, t)| t.dtype() == safetensors::Dtype::F32).map(|(n, _)| n.to_string()).collect()
    };
    let all: Vec<(&str, String)> = ["golden.safetensors", "adamw_final.safetensors", "lora_all.safetensors"]
        .into_iter()
        .flat_map(|file| names(file).into_iter().map(move |n| (file, n)))
        .collect();
    assert!(all.len() > 80, "{}", all.len());
    let draws = Stream::new(&[u64::from_le_bytes(*b"tampered")]);
    for i in 0..8 {
        let (file, name) = &all[(draws.f64_at(i) * all.len() as f64) as usize];
        let dir = copy_of_a_case();
        change_tensor(&dir.path().join(file), name, |_, bytes| larger(bytes));
        assert_ne!(failing(dir.path(), DType::F32), "", "{file}: {name} was changed");
    }
    // And none is passed over: each is asked for in both precisions.
    for dtype in [DType::F32, DType::Bf16] {
        let dir = copy_of_a_case();
        for file in ["golden.safetensors", "adamw_final.safetensors", "lora_all.safetensors"] {
            let path = dir.path().join(file);
            let bytes = std::fs::read(&path).unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let extra = 1f32.to_le_bytes();
            let one = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &extra).unwrap();
            let views = tensors.iter().chain([("nobody.compares.me", one)]);
            std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
            let seen = failing(dir.path(), dtype);
            assert!(seen.contains(&format!("{file}: nobody.compares.me")), "{seen}");
            std::fs::write(&path, bytes).unwrap();
        }
    }
}

#[test]
fn what_a_case_lacks_or_has_too_much_of_is_noticed() {
    let noticed = |what: &str, change: &dyn Fn(&mut Value)| {
        let dir = copy_of_a_case();
        change_json(dir.path(), change);
        let seen = failing(dir.path(), DType::F32);
        assert!(seen.contains(what), "expected a failure of {what:?}, found:\n{seen}");
    };
    noticed("AdamW steps", &|v| drop(v["adamw"]["loss"].as_array_mut().unwrap().pop()));
    noticed("lora.all AdamW steps", &|v| v["lora"]["all"]["adamw"]["lr"].as_array_mut().unwrap().push(0.1.into()));
    noticed("batch gradient norms", &|v| {
        drop(v["batch"]["grad_norms"].as_object_mut().unwrap().remove("model.norm.weight"))
    });
    noticed("packed gradient norms", &|v| v["packed"]["grad_norms"]["model.layers.7.x"] = 1.0.into());
    noticed("batch gradient norms", &|v| v["batch"]["grad_global_norm"] = 1.0.into());
    noticed("packed supervised tokens", &|v| v["packed"]["supervised_tokens"] = 25.into());
    noticed("packed bounds of documents", &|v| v["packed"]["cu_seqlens"][1] = 12.into());
    noticed("AdamW updates", &|v| v["adamw"]["update_norms"]["model.norm.weight"] = 0.5.into());
    noticed("weight decay", &|v| v["adamw"]["decay"]["model.norm.weight"] = true.into());
    noticed("generation lengths", &|v| drop(v["generation"]["cases"][0]["new_ids"].as_array_mut().unwrap().pop()));

    // Lengths of tensors.
    let shorter = |file: &str, name: &str, what: &str| {
        let dir = copy_of_a_case();
        change_tensor(&dir.path().join(file), name, |shape, bytes| {
            let row: usize = bytes.len() / shape[0];
            bytes.truncate(bytes.len() - row);
            shape[0] -= 1;
        });
        let seen = failing(dir.path(), DType::F32);
        assert!(seen.contains(what), "expected a failure of {what:?}, found:\n{seen}");
    };
    shorter("golden.safetensors", "batch.logits", "batch logits");
    shorter("golden.safetensors", "batch.token_loss", "batch token losses");
    shorter("golden.safetensors", "grad.model.norm.weight", "batch gradients");
    shorter("adamw_final.safetensors", "model.norm.weight", "AdamW updates");
}

/// What a case records of its library's own noise is what is allowed, not a number of ours.
#[test]
fn the_recorded_noise_is_the_tolerance() {
    let dir = copy_of_a_case();
    change_json(dir.path(), |v| v["noise"]["batch"]["bf16"]["grad_rel_fro_max"] = 1e-5.into());
    change_json(dir.path(), |v| v["noise"]["batch"]["bf16_autocast"]["grad_rel_fro_max"] = 1e-5.into());
    assert!(failing(dir.path(), DType::Bf16).contains("batch gradients"));
    // The noisier the library, the more is allowed: a gradient that is off by a quarter passes where it is off by that much itself.
    let dir = copy_of_a_case();
    change_tensor(&dir.path().join("golden.safetensors"), "grad.model.norm.weight", |_, bytes| {
        for b in bytes.chunks_exact_mut(4) {
            let x = f32::from_le_bytes(b.try_into().unwrap());
            b.copy_from_slice(&(x * 1.3).to_le_bytes());
        }
    });
    assert!(failing(dir.path(), DType::Bf16).contains("batch gradients"));
    change_json(dir.path(), |v| v["noise"]["batch"]["bf16"]["grad_rel_fro_max"] = 0.37.into());
    assert_eq!(failing(dir.path(), DType::Bf16), "");
}
