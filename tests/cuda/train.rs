//! Whole trainings through the program with `--device cuda`: recorded cases of every architecture, loss curves beside the CPU's, the
//! same bits whatever the order in which the device works, resuming, generation, merging.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ringtune::backend::Backend;
use ringtune::batch::MicroBatch;
use ringtune::comm::Solo;
use ringtune::cuda::{Cuda, Properties};
use ringtune::data::loader::Step;
use ringtune::hf::TensorSource;
use ringtune::hf::safetensors::ModelFiles;
use ringtune::model::Recompute;
use ringtune::settings::TrainSettings;
use ringtune::tensor::{DType, Device};
use ringtune::train::memory::{Demand, estimate};
use ringtune::train::setup;
use serde_json::Value;

use crate::skip::device;

/// The reference model; ChatML grows its vocabulary.
const MODEL: &str = "tests/data/model/tiny-llama-tied";

/// Runs the program from the root of the repository. Kernels that it compiles are kept beside the test programs.
pub fn ringtune(words: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(crate::skip::program());
    command.current_dir(crate::skip::root()).args(words).env("RINGTUNE_CACHE", crate::skip::scratch());
    command.envs(env.iter().copied()).output().unwrap()
}

/// Its standard output and error, after success.
pub fn ok(output: Output) -> (String, String) {
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{out}\n{err}");
    (out, err)
}

/// A folder of rows and runs.
pub struct Place(tempfile::TempDir);

impl Place {
    /// With sixty conversations.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text = fs::read_to_string(crate::skip::root().join("data/demo/chat.jsonl")).unwrap();
        let rows: Vec<&str> = text.lines().take(60).collect();
        fs::write(dir.path().join("rows.jsonl"), rows.join("\n") + "\n").unwrap();
        Self(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Fine-tunes into the folder `name`, two packed rows a micro-batch, of 64 tokens where the flags say nothing else.
    pub fn sft(&self, name: &str, device: &str, flags: &str, env: &[(&str, &str)]) -> PathBuf {
        ok(self.start(name, device, flags, env));
        self.path(name)
    }

    /// The same, whatever comes of it.
    pub fn start(&self, name: &str, device: &str, flags: &str, env: &[(&str, &str)]) -> Output {
        let (rows, out) = (self.path("rows.jsonl"), self.path(name));
        let common = "--prompt-template chatml --per-device-train-batch-size 2 --quiet --no-tensorboard --seed 7";
        let mut words = vec!["sft", "--model-path", MODEL, "--dataset-paths", rows.to_str().unwrap()];
        words.extend(["--output-dir", out.to_str().unwrap(), "--device", device]);
        words.extend(common.split(' ').chain(flags.split(' ')));
        if !flags.contains("--max-seq-len") {
            words.extend(["--max-seq-len", "64"]);
        }
        ringtune(&words, env)
    }
}

/// The losses of all steps of a run.
pub fn losses(run: &Path) -> Vec<f64> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|v| v["loss"].as_f64()).collect()
}

/// Largest relative difference of losses in f32, where both compute the same sums in other orders.
pub const F32: f64 = 1e-4;
/// And in bf16, where roundings fall to either side.
pub const BF16: f64 = 5e-3;

pub fn assert_close(what: &str, ours: &[f64], cpu: &[f64], allowed: f64) {
    assert_eq!(ours.len(), cpu.len(), "{what}");
    let worst = ours.iter().zip(cpu).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
    println!(
        "{what}: {} steps, losses {:.4} to {:.4}, at most {worst:.1e} from the CPU's",
        cpu.len(),
        cpu[0],
        cpu[cpu.len() - 1]
    );
    assert!(worst < allowed, "{what}: {ours:?} and on the CPU {cpu:?}");
    // Something was learnt, or curves would agree whatever the gradients are.
    assert!(cpu[cpu.len() - 1] < cpu[0] - 0.5, "{what}: {cpu:?}");
}

pub fn same_file(a: &Path, b: &Path) {
    assert!(fs::read(a).unwrap() == fs::read(b).unwrap(), "{} and {} differ", a.display(), b.display());
}

pub fn is_emulated() -> bool {
    device().is_some_and(|dev| dev.properties().emulated)
}

/// Runs a recorded case in both precisions.
fn golden(case: &str) {
    if device().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for precision in ["no", "bf16"] {
        let (recorded, model) = (format!("tests/data/golden/{case}"), format!("tests/data/model/{case}"));
        let out = dir.path().join(precision);
        let words = ["parity", &recorded, "--model", &model, "--out", out.to_str().unwrap(), "--device", "cuda"];
        let words = [&words[..], &["--mixed-precision", precision]].concat();
        let (table, _) = ok(ringtune(&words, &[]));
        println!("{case} {precision}\n{table}");
        assert!(table.contains("comparisons are within their tolerances"), "{table}");
    }
}

#[test]
fn recorded_llama_tied() {
    golden("tiny-llama-tied");
}

#[test]
fn recorded_llama_untied() {
    golden("tiny-llama-untied");
}

#[test]
fn recorded_qwen2() {
    golden("qwen2-untied");
}

#[test]
fn recorded_qwen3() {
    golden("qwen3-tied");
}

#[test]
fn recorded_mistral_with_a_window() {
    golden("mistral-window");
}

#[test]
fn recorded_llama3() {
    golden("llama3-rope");
}

/// Every weight trained, in f32.
#[test]
fn full_training_follows_the_cpu() {
    if device().is_none() {
        return;
    }
    let place = Place::new();
    let flags = "--no-lora --learning-rate 2e-3 --max-steps 20";
    let [ours, cpu] = ["cuda", "cpu"].map(|device| losses(&place.sft(device, device, flags, &[])));
    assert_close("full f32", &ours, &cpu, F32);
}

/// Every weight trained in bf16, with masters; two micro-batches a step, layers recomputed.
#[test]
fn full_bf16_training_follows_the_cpu() {
    if device().is_none() {
        return;
    }
    let place = Place::new();
    let flags = "--no-lora --learning-rate 2e-3 --max-steps 20 --mixed-precision bf16 --gradient-accumulation-steps 2";
    let recompute = format!("{flags} --recompute layer");
    let cuda = place.sft("cuda", "cuda", flags, &[]);
    assert_close("full bf16", &losses(&cuda), &losses(&place.sft("cpu", "cpu", flags, &[])), BF16);
    let again = place.sft("recompute", "cuda", &recompute, &[]);
    same_file(&cuda.join("model.safetensors"), &again.join("model.safetensors"));
}

/// LoRA with dropout: the curve, the same bits in every order of work, resumed, and what the other commands make of it.
#[test]
fn lora_training_follows_the_cpu_and_repeats_its_bits() {
    if device().is_none() {
        return;
    }
    let place = Place::new();
    let flags = "--learning-rate 5e-3 --max-steps 24 --lora-r 4 --lora-dropout 0.1 --save-strategy steps --save-steps 10 --merge-adapters";
    let cuda = place.sft("cuda", "cuda", flags, &[("VGPU_SEED", "1")]);
    let cpu = place.sft("cpu", "cpu", flags, &[]);
    assert_close("LoRA with dropout", &losses(&cuda), &losses(&cpu), F32);
    for file in ["adapter_model.safetensors", "adapter_config.json", "merged/model.safetensors"] {
        assert!(cuda.join(file).is_file(), "{file} is missing");
    }
    let adapter = "adapter_model.safetensors";
    if is_emulated() {
        let other = place.sft("other", "cuda", flags, &[("VGPU_SEED", "5")]);
        same_file(&cuda.join(adapter), &other.join(adapter));
        assert_eq!(losses(&cuda), losses(&other));
    }
    // As if it had been killed after step 20.
    let resumed = place.path("resumed");
    copy_dir(&cuda.join("checkpoint-20"), &resumed.join("checkpoint-20"));
    let resume = format!("{flags} --resume-from-checkpoint auto");
    place.sft("resumed", "cuda", &resume, &[("VGPU_SEED", "2")]);
    same_file(&cuda.join(adapter), &resumed.join(adapter));

    // What it learnt is the same wherever it is asked.
    let run = cuda.to_str().unwrap();
    let rows = place.path("rows.jsonl");
    // Merged afterwards, which compares with base + adapter, too.
    let merged = place.path("merged");
    ok(ringtune(&["merge", "--model-path", run, "--output-dir", merged.to_str().unwrap(), "--device", "cuda"], &[]));
    same_file(&merged.join("model.safetensors"), &cuda.join("merged/model.safetensors"));

    // Prompts of several lengths side by side, so that some end before others.
    let prompts = ["What is a river?", "Hello", "Name three colours, and say of each where it is found."];
    let answers = ["cuda", "cpu"].map(|device| {
        let words = ["generate", "--model-path", run, "--greedy", "--max-new-tokens", "24", "--device", device];
        ok(ringtune(&[&words[..], &prompts].concat(), &[])).0
    });
    assert_eq!(answers[0], answers[1]);
    assert!(answers[0].trim().lines().count() >= 3, "{}", answers[0]);
    let [ours, cpu] = ["cuda", "cpu"].map(|device| {
        let report = place.path(&format!("eval.{device}.json"));
        let words = ["eval", "--model-path", run, "--dataset-paths", rows.to_str().unwrap(), "--max-seq-len", "64"];
        ok(ringtune(&[&words[..], &["--device", device, "--output", report.to_str().unwrap()]].concat(), &[]));
        serde_json::from_slice::<Value>(&fs::read(report).unwrap()).unwrap()["all"].clone()
    });
    let loss = |v: &Value| v["loss"].as_f64().unwrap();
    assert!((loss(&ours) / loss(&cpu) - 1.0).abs() < 1e-5, "{ours} and on the CPU {cpu}");
    assert_eq!(ours["token_accuracy"], cpu["token_accuracy"]);
    assert!(ours["token_accuracy"].as_f64().unwrap() > 0.0, "{ours}");
}

/// The same in bf16, where updates are part of fused products: other orders of work and layers computed again give the same bits.
#[test]
fn lora_bf16_training_follows_the_cpu_and_repeats_its_bits() {
    if device().is_none() {
        return;
    }
    let place = Place::new();
    let flags = "--learning-rate 5e-3 --max-steps 20 --lora-r 16 --lora-dropout 0.1 --mixed-precision bf16";
    let cuda = place.sft("cuda", "cuda", flags, &[("VGPU_SEED", "1")]);
    assert_close("LoRA bf16", &losses(&cuda), &losses(&place.sft("cpu", "cpu", flags, &[])), BF16);
    let again = place.sft("again", "cuda", &format!("{flags} --recompute layer"), &[("VGPU_SEED", "5")]);
    same_file(&cuda.join("adapter_model.safetensors"), &again.join("adapter_model.safetensors"));
}

/// Pretraining from random weights, then `auto`, which leaves an emulated GPU alone and says so.
#[test]
fn pretraining_follows_the_cpu_and_auto_says_what_it_takes() {
    let Some(dev) = device() else { return };
    let dir = tempfile::tempdir().unwrap();
    let config = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true}"#;
    let path = dir.path().join("mini.json");
    fs::write(&path, config).unwrap();
    let run = |device: &str| {
        let out = dir.path().join(device);
        let mut words =
            vec!["pretrain", "--model-config", path.to_str().unwrap(), "--output-dir", out.to_str().unwrap()];
        words.extend(["--device", device]);
        let rest = "--tokenizer-path tests/data/tokenizer/spm4k.model --dataset-paths data/demo/pretrain_valid.txt --max-steps 12 \
                    --learning-rate 1e-2 --per-device-train-batch-size 2 --max-seq-len 64 --no-tensorboard --save-strategy no";
        words.extend(rest.split_whitespace());
        let (text, _) = ok(ringtune(&words, &[]));
        let line = text.lines().find(|l| l.starts_with("device: ")).unwrap_or_else(|| panic!("no line in {text}"));
        (losses(&out.join("mini")), line.to_string())
    };
    let [(ours, cuda_line), (cpu, _)] = ["cuda", "cpu"].map(run);
    assert_close("pretraining", &ours, &cpu, F32);
    assert_eq!(cuda_line, format!("device: {}", dev.describe()));
    let (_, line) = run("auto");
    let expected = if dev.properties().emulated { "device: cpu, " } else { "device: cuda:0, " };
    assert!(line.starts_with(expected), "{line}");
    assert_eq!(line.contains("; no GPU: cuda:0 is emulated (vgpu "), dev.properties().emulated, "{line}");
}

/// No block of any kernel of a step races with another, nor a warp with those beside it.
#[test]
fn a_step_has_no_race() {
    if !is_emulated() {
        return;
    }
    let flags = "--max-seq-len 40 --max-steps 1 --no-lora --mixed-precision bf16 --val-fraction 0 --save-strategy no";
    ok(Place::new().start("out", "cuda", flags, &[("VGPU_CHECK", "races")]));
}

/// What the driver is asked for by one step: a wait, a copy to the host, a copy to the device for its micro-batch; no memory, no module.
#[test]
fn a_step_waits_once_and_allocates_nothing() {
    if !is_emulated() {
        return;
    }
    let place = Place::new();
    let calls = |steps: usize| {
        let flags = format!("--max-steps {steps} --lora-r 4 --val-fraction 0 --save-strategy no");
        let output = place.start(&format!("{steps}"), "cuda", &flags, &[("VGPU_CALLS", "1")]);
        let (_, text) = ok(output);
        let names = text.lines().filter_map(|l| l.strip_prefix("vgpu: ")).filter_map(|l| l.split(' ').next());
        let mut count = std::collections::BTreeMap::new();
        names.for_each(|name| *count.entry(name.to_string()).or_insert(0usize) += 1);
        count
    };
    // Everything was taken before the first step, so that the second is as cheap as any.
    let (few, many) = (calls(1), calls(5));
    let each = |name: &str| (many[name] - few[name]) as f64 / 4.0;
    assert_eq!((each("cuStreamSynchronize"), each("cuMemcpyDtoHAsync_v2")), (1.0, 1.0));
    assert_eq!((each("cuMemcpyHtoDAsync_v2"), each("cuEventSynchronize")), (1.0, 0.0));
    for name in ["cuMemAllocAsync", "cuModuleLoadData", "cuModuleGetFunction"] {
        assert_eq!(each(name), 0.0, "{name}");
    }
    println!("{} launches a step of 2 layers with LoRA", each("cuLaunchKernel"));
}

/// What `check` counts is what the device gives out, the loaded kernels left out, which the emulator does not count.
#[test]
fn the_estimate_of_memory_is_what_a_step_takes() {
    let Some(dev) = device() else { return };
    let base = ModelFiles::open(Path::new(MODEL)).unwrap();
    for recompute in [Recompute::None, Recompute::Attention, Recompute::Layer] {
        for (dtype, lora) in [(DType::F32, true), (DType::F32, false), (DType::Bf16, true), (DType::Bf16, false)] {
            estimated_and_taken(dev.properties(), &base, dtype, lora, recompute);
        }
    }
}

/// One step of low-rank updates or of every weight, in a mode of recomputation: bytes taken against bytes estimated.
fn estimated_and_taken(of: &Properties, base: &ModelFiles, dtype: DType, lora: bool, recompute: Recompute) {
    let mut s = TrainSettings { dtype, recompute, micro_batch_size: 2, eval_batch_size: 1, ..TrainSettings::default() };
    s.lora = s.lora.filter(|_| lora);
    let spec = setup::lora_spec(&s).unwrap();
    let (config, max_seq_len) = (base.config(), 64);
    let n = 2 * max_seq_len;
    let device = Cuda::footprint(config.n_classes);
    let demand =
        Demand { config, settings: &s, lora: spec.as_ref(), new_rows: None, max_seq_len, saves: false, device };
    let expected: u64 = estimate(&demand).iter().map(|c| c.bytes).sum();

    // A device of its own: scratch is kept.
    let dev = Cuda::with_cache(of.ordinal, Some(&crate::skip::scratch())).unwrap();
    let before = dev.free_memory().unwrap();
    assert!(dev.forget_peak());
    let held = dev.memory_use().unwrap().now;
    let mut work = setup::workload(&dev, base, &s, None, n).unwrap();
    let targets = vec![5; n];
    let b = MicroBatch { tokens: vec![7; n], targets, doc_start: vec![0; n], n_valid: n, samples: vec![0] };
    let step = Step { micro_batches: vec![b], ..Default::default() };
    assert_eq!(work.step(&dev, &Solo, &step, 0, 1e-4).unwrap().problem, None);
    let taken = before - dev.free_memory().unwrap();
    // The driver's own count of the most there was, which is what `bench step` prints.
    let peak = dev.memory_use().unwrap().peak - held;
    let what = format!("{dtype:?} LoRA {lora} {recompute:?}: {taken} bytes, {peak} at most, estimated {expected}");
    println!("{what}");
    if of.emulated {
        for bytes in [taken, peak] {
            assert!((bytes as f64 / expected as f64 - 1.0).abs() < 0.05, "{what}");
        }
    }
}

/// The device makes no update by itself where figures are not finite; the run says which samples it was, and ends.
#[test]
fn what_is_not_finite_is_named_and_stops_the_run() {
    if device().is_none() {
        return;
    }
    let place = Place::new();
    let flags = "--learning-rate 1e30 --max-steps 12 --lora-r 4 --max-bad-steps 3";
    let output = place.start("out", "cuda", flags, &[]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("3 steps in a row") && text.contains("not finite") && text.contains("rows.jsonl:"), "{text}");
}

/// `check` counts against the memory of the device, and a run that does not fit says what was asked for.
#[test]
fn memory_is_that_of_the_device() {
    let Some(dev) = device() else { return };
    let place = Place::new();
    let (rows, out) = (place.path("rows.jsonl"), place.path("out"));
    let check = |env: &[(&str, &str)]| {
        let words =
            ["check", "--model-path", MODEL, "--dataset-paths", rows.to_str().unwrap(), "--json", "--device", "cuda"];
        let words = [&words[..], &["--output-dir", out.to_str().unwrap(), "--max-seq-len", "64"]].concat();
        let output = ringtune(&words, env);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        serde_json::from_str::<Value>(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    };
    let memory = |v: &Value| v["memory_per_device"]["available"].as_u64().unwrap_or_else(|| panic!("{v:#}"));
    let total = dev.properties().memory as u64;
    assert!((total / 2..=total).contains(&memory(&check(&[]))));
    if !dev.properties().emulated {
        return;
    }
    let small = ("VGPU_MEMORY", "8M");
    let report = check(&[small]);
    assert!(memory(&report) <= 8 << 20, "{report:#}");
    let findings = report["problems"].to_string();
    assert!(findings.contains("does not fit into memory") && findings.contains("free on the device"), "{report:#}");
    let output = place.start("out", "cuda", "--no-lora --max-steps 2", &[small]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("error: ") && text.contains("cuda: allocating ") && text.contains("--micro-batch-size"),
        "{text}"
    );
}

#[test]
fn a_device_that_is_not_there_ends_a_command() {
    if device().is_none() {
        return;
    }
    let output = ringtune(&["generate", "--model-path", MODEL, "x", "--raw", "--device", "cuda:77"], &[]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("error: cuda: ") && text.contains("77"), "{text}");
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
