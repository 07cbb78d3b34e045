//! A kernel that fails and a GPU that is lost while a run trains: what is said, and what is left of it. The emulator loses its devices with
//! the launch that `VGPU_LOST` counts.

use std::fs;
use std::process::Output;

use serde_json::Value;

use crate::train::{Place, is_emulated, same_file};

const RUN: &str = "--max-steps 5 --lora-r 4 --val-fraction 0 --save-steps 2";

/// Each launch waited for, so that the n-th is that of the run's own order.
const BLOCKING: (&str, &str) = ("CUDA_LAUNCH_BLOCKING", "1");

/// The error of a run that ended by one.
fn error(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    text.lines().rfind(|line| line.starts_with("error: ")).unwrap_or_else(|| panic!("{text}")).to_string()
}

/// An undisturbed run; then one that loses its GPU in the backward pass of the fourth step, by itself and with each launch waited for. Both
/// name step, phase and kernel, the first those that it may have been; the checkpoint of step 2 is whole, and a run that goes on from it ends
/// with the bits of the undisturbed one.
#[test]
fn a_lost_gpu_is_named_and_costs_no_finished_checkpoint() {
    if !is_emulated() {
        return;
    }
    let place = Place::new();
    let trace = place.path("trace");
    let whole = place.sft("whole", "cuda", RUN, &[BLOCKING, ("VGPU_TRACE", trace.to_str().unwrap())]);
    let text = fs::read_to_string(&trace).unwrap();
    let kernels: Vec<String> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["kernel"].as_str().unwrap().to_string())
        .collect();
    let updates: Vec<usize> = (0..kernels.len()).filter(|&i| kernels[i] == "adamw").collect();
    assert_eq!(updates.len(), 5, "{kernels:?}");
    let behind = kernels[updates[2]..].iter().position(|k| k.ends_with("dkdv")).expect("a backward pass");
    let kernel = &kernels[updates[2] + behind];
    let lost = (updates[2] + behind + 1).to_string();
    let lost = ("VGPU_LOST", lost.as_str());

    let said = error(&place.start("named", "cuda", RUN, &[lost, BLOCKING]));
    assert!(said.starts_with("error: step 4, backward"), "{said}");
    assert!(
        said.contains(&format!("running {kernel} with ")) && said.contains("CUDA_ERROR_ECC_UNCORRECTABLE"),
        "{said}"
    );

    let said = error(&place.start("lost", "cuda", RUN, &[lost]));
    assert!(said.starts_with("error: step 4, update: cuda: ") && said.contains(kernel.as_str()), "{said}");
    assert!(said.contains("CUDA_LAUNCH_BLOCKING=1 names") && said.contains("has lost the GPU"), "{said}");
    let left = place.path("lost");
    assert!(left.join("checkpoint-2/trainer_state.json").is_file() && !left.join("checkpoint-4").exists());

    let again = place.sft("lost", "cuda", &format!("{RUN} --resume-from-checkpoint auto"), &[]);
    same_file(&again.join("adapter_model.safetensors"), &whole.join("adapter_model.safetensors"));
}

/// The watchdog of the emulator stops a kernel as a GPU's own does: its words, with the kernel, stand in the error of the step.
#[test]
fn a_kernel_that_is_stopped_is_named() {
    if !is_emulated() {
        return;
    }
    let place = Place::new();
    let said = error(&place.start("stopped", "cuda", RUN, &[("VGPU_BUDGET", "20000")]));
    assert!(said.starts_with("error: step 1, ") && said.contains("CUDA_ERROR_LAUNCH_TIMEOUT"), "{said}");
    assert!(said.contains("kernel ") && said.contains("block "), "{said}");
}
