//! What the driver is asked for in the first step, in one with an evaluation before it, and in generation, once a run has begun: no
//! memory, no module; one copy to the device for each micro-batch, and one wait. The emulator writes down each call; a child process of this program marks where steps begin.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;

use ringtune::batch::MicroBatch;
use ringtune::comm::Solo;
use ringtune::data::loader::Step;
use ringtune::generate::{GenerateOptions, Sampling, generate};
use ringtune::hf::safetensors::ModelFiles;
use ringtune::model::{LoraSpec, Recompute};
use ringtune::settings::TrainSettings;
use ringtune::tensor::{DType, Device};
use ringtune::train::setup;

use crate::skip::device;

const MODEL: &str = "tests/data/model/tiny-llama-tied";

/// Tokens of the largest micro-batch.
const MOST: usize = 200;

/// A micro-batch of documents of so many tokens.
fn batch(documents: &[usize]) -> MicroBatch {
    let mut b = MicroBatch::default();
    for (i, &n) in documents.iter().enumerate() {
        let start = b.tokens.len();
        b.tokens.extend((0..n).map(|t| ((7 * start + 3 * t + i) % 200) as i32));
        b.targets.extend((0..n).map(|t| if t % 4 == 1 { ringtune::batch::IGNORE } else { (t % 50) as i32 }));
        b.doc_start.extend(vec![start as i32; n]);
        b.samples.push(i as u32);
    }
    b.n_valid = b.targets.iter().filter(|&&t| t >= 0).count();
    b
}

/// What the child of [`the_first_step_allocates_and_compiles_nothing`] does; on a GPU it runs without anybody counting.
#[test]
fn steps_and_evaluations() {
    let Some(dev) = device() else { return };
    if dev.properties().emulated && std::env::var_os("RINGTUNE_TEST_ROLE").is_none() {
        return;
    }
    let base = ModelFiles::open(&crate::skip::root().join(MODEL)).unwrap();
    let settings = TrainSettings { grad_accum: 2, ..TrainSettings::default() };
    let lora = |r, dropout| Some(LoraSpec { r, dropout, ..settings.lora.clone().unwrap() });
    for (dtype, recompute, lora) in [
        (DType::Bf16, Recompute::None, None),
        (DType::F32, Recompute::Attention, lora(4, 0.1)),
        // Updates so wide that three of them take more shared memory than one may have without asking.
        (DType::Bf16, Recompute::Layer, lora(64, 0.1)),
    ] {
        let name = format!("{dtype:?} {recompute:?} LoRA {}", lora.is_some());
        let s = TrainSettings { dtype, recompute, lora, ..settings.clone() };
        // A device of its own: what another made ready is not there.
        let dev = ringtune::cuda::Cuda::with_cache(dev.properties().ordinal, Some(&crate::skip::scratch())).unwrap();
        let mut work = setup::workload(&dev, &base, &s, None, MOST).unwrap();
        dev.synchronize().unwrap();
        let sizes: [[&[usize]; 2]; 2] = [[&[30, 9], &[70, 1, 40]], [&[MOST], &[130, 70]]];
        for (i, sizes) in sizes.into_iter().enumerate() {
            if i == 1 {
                eprintln!("mark {name}: evaluation");
                let [nll, _, _] = work.evaluate(&dev, &batch(&[100, 64])).unwrap();
                assert!(nll.is_finite() && nll > 0.0, "{nll}");
            }
            let step = Step { micro_batches: sizes.map(batch).to_vec(), ..Default::default() };
            eprintln!("mark {name}: step {i}");
            let stepped = work.step(&dev, &Solo, &step, i as u64, 1e-3).unwrap();
            eprintln!("mark end");
            assert!(stepped.problem.is_none() && stepped.loss > 1.0, "{stepped:?}");
        }
        eprintln!("mark {name}: generation");
        let options = GenerateOptions { max_new_tokens: 4, stop_ids: vec![], batch: 2, sampling: Sampling::default() };
        let prompts = [vec![1; 3], vec![2; 70], vec![3; 20]];
        let mut tokens = 0;
        generate(&dev, &work.model, &prompts, &options, |_, _, _| {
            if tokens == 0 {
                eprintln!("mark {name}: tokens");
            }
            tokens += 1;
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(tokens, 12);
        eprintln!("mark end");
    }
}

/// Calls of the driver by name, in each part that was marked.
fn counted(text: &str) -> BTreeMap<String, BTreeMap<String, usize>> {
    let (mut all, mut part) = (BTreeMap::<String, BTreeMap<String, usize>>::new(), "end".to_string());
    for line in text.lines() {
        if let Some(mark) = line.strip_prefix("mark ") {
            part = mark.into();
            all.entry(part.clone()).or_default();
        }
        let Some(call) = line.strip_prefix("vgpu: ").and_then(|l| l.split(' ').next()) else { continue };
        *all.entry(part.clone()).or_default().entry(call.into()).or_default() += 1;
    }
    all.remove("end");
    all
}

/// The parts of a child on a device of this capability.
fn parts(cc: &str) -> BTreeMap<String, BTreeMap<String, usize>> {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "prepared::steps_and_evaluations", "--nocapture"]).env("VGPU_CALLS", "1").env("VGPU_CC", cc);
    child.env("RINGTUNE_TEST_ROLE", "counted");
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    counted(&text)
}

#[test]
fn the_first_step_allocates_and_compiles_nothing() {
    if !device().is_some_and(|dev| dev.properties().emulated) {
        return;
    }
    for cc in ["8.0", "9.0"] {
        let parts = parts(cc);
        let ran = |what: &str| parts.keys().filter(|part| part.contains(what)).count();
        assert_eq!((ran("step 0"), ran("step 1"), ran("evaluation"), ran("tokens")), (3, 3, 3, 3), "{parts:?}");
        for (part, calls) in parts.iter().filter(|(part, _)| !part.contains("generation")) {
            let count = |name: &str| calls.get(name).copied().unwrap_or(0);
            assert!(count("cuLaunchKernel") + count("cuLaunchKernelEx") > 20, "{cc} {part}: {calls:?}");
            for name in
                ["cuMemAllocAsync", "cuMemFreeAsync", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"]
            {
                // What decoding holds is given back at its end.
                let ends = part.contains("tokens") && name == "cuMemFreeAsync";
                assert!(ends || count(name) == 0, "{cc} {part}: {name}: {calls:?}");
            }
            if part.contains("step") || part.contains("evaluation") {
                let micro_batches = if part.contains("step") { 2 } else { 1 };
                let waits = (count("cuStreamSynchronize"), count("cuEventSynchronize"));
                assert_eq!((waits, count("cuMemcpyHtoDAsync_v2")), ((1, 0), micro_batches), "{cc} {part}: {calls:?}");
            }
        }
    }
}

/// Which flags would help is said before the first step, and before what is known not to fit is loaded.
#[test]
fn a_run_that_does_not_fit_says_what_would() {
    if !device().is_some_and(|dev| dev.properties().emulated) {
        return;
    }
    let rows = Path::new("data/demo/chat.jsonl");
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, memory: &str, extra: &str| {
        let out = dir.path().join(name);
        let mut words = vec!["sft", "--model-path", MODEL, "--dataset-paths", rows.to_str().unwrap(), "--output-dir"];
        let rest = "--device cuda --prompt-template chatml --no-lora --max-steps 1 --max-seq-len 128 --no-tensorboard --save-strategy no \
                    --val-fraction 0";
        words.push(out.to_str().unwrap());
        words.extend(rest.split_whitespace().chain(extra.split_whitespace()));
        crate::train::ringtune(&words, &[("VGPU_MEMORY", memory)])
    };
    let failed = run("small", "14M", "");
    let text = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert_eq!(failed.status.code(), Some(1), "{text}");
    let line = text.lines().find(|l| l.contains("error: ")).unwrap_or_else(|| panic!("{text}"));
    assert!(line.contains("error: the run does not fit into the device's memory: it takes "), "{line}");
    let advice =
        line.split("were free; ").nth(1).and_then(|l| l.split(" takes ").next()).unwrap_or_else(|| panic!("{line}"));
    assert!(advice.starts_with("--"), "{line}");
    // It is true.
    let done = run("fits", "14M", advice);
    assert!(done.status.success(), "{advice}: {}", String::from_utf8_lossy(&done.stderr));
}
