//! Kernels compiled on one machine and run on another that has no NVRTC.

use std::path::Path;
use std::process::{Command, Output};

use ringtune::cuda::compile::Target;

use crate::skip::{device, nvrtc, program, root};

/// Runs the program where no NVRTC can be found, with the kernels of a folder.
fn without_nvrtc(kernels: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(program());
    let nothing = kernels.join("nothing");
    command.current_dir(root()).args(words).env("RINGTUNE_KERNELS", kernels);
    command.env("RINGTUNE_CACHE", &nothing).env("XDG_CACHE_HOME", &nothing).env("HOME", &nothing).env("PATH", &nothing);
    for name in ["CUDA_HOME", "CUDA_PATH", "RINGTUNE_NVRTC", "VIRTUAL_ENV", "CONDA_PREFIX"] {
        command.env_remove(name);
    }
    command.output().unwrap()
}

#[test]
fn kernels_are_compiled_on_one_machine_and_run_on_another() {
    let (Some(nvrtc), Some(dev)) = (nvrtc(), device()) else { return };
    let dir = tempfile::tempdir().unwrap();
    let kernels = dir.path().join("kernels");
    // What this device runs: machine code, or on the emulator PTX.
    let target = dev.target();
    let arch = target.to_string();
    let make = |arch: &str, to: &Path| {
        let mut command = Command::new(program());
        command.args(["kernels", "--arch", arch, "--output", to.to_str().unwrap()]);
        command.env("RINGTUNE_NVRTC", nvrtc.path()).output().unwrap()
    };
    let made = make(&arch, &kernels);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let said = String::from_utf8_lossy(&made.stdout).into_owned();
    assert!(said.contains(&format!("modules for {arch}")) && said.contains("RINGTUNE_KERNELS="), "{said}");

    let trained = |name: &str, output: Output| {
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        std::fs::read(dir.path().join(name).join("adapter_model.safetensors")).unwrap()
    };
    let rows = dir.path().join("rows.jsonl");
    let text = std::fs::read_to_string(root().join("data/demo/chat.jsonl")).unwrap();
    std::fs::write(&rows, text.lines().take(8).collect::<Vec<_>>().join("\n")).unwrap();
    let words = |name: &str| -> Vec<String> {
        let line = format!(
            "sft --model-path tests/data/model/tiny-llama-tied --lora-r 4 --prompt-template chatml --dataset-paths {} --max-seq-len 64 --max-steps 2 --val-fraction 0 --quiet --no-tensorboard \
             --per-device-train-batch-size 2 --device cuda --output-dir {}",
            rows.display(),
            dir.path().join(name).display()
        );
        line.split_whitespace().map(String::from).collect()
    };
    let refs = |all: &'static [String]| all.iter().map(String::as_str).collect::<Vec<_>>();
    let leak = |name: &str| refs(Vec::leak(words(name)));
    let ours =
        Command::new(program()).current_dir(root()).args(leak("compiled")).env("RINGTUNE_CACHE", dir.path()).output();
    let compiled = trained("compiled", ours.unwrap());
    assert!(trained("prebuilt", without_nvrtc(&kernels, &leak("prebuilt"))) == compiled, "other bits");
    let doctor = without_nvrtc(&kernels, &["doctor", "--require", "cuda"]);
    let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(
        doctor.status.success() && said.contains(&format!("kernels for {arch} are taken from RINGTUNE_KERNELS")),
        "{said}"
    );

    // One that is damaged, one of another architecture, no folder of kernels.
    let image = std::fs::read_dir(&kernels)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension() == Some("image".as_ref()));
    for path in image {
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let error = |kernels: &Path, name: &str| {
        let output = without_nvrtc(kernels, &leak(name));
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).lines().last().unwrap().to_string()
    };
    let said = error(&kernels, "damaged");
    assert!(said.contains("kernels/") && said.contains("or damaged there, and there is no NVRTC"), "{said}");
    let other = dir.path().join("other");
    let beyond = if target == Target::Ptx(80) { "compute_90" } else { "sm_80" };
    assert!(make(beyond, &other).status.success());
    let said = error(&other, "other-arch");
    assert!(
        said.contains(&format!("made for {beyond}, this device is")) && said.contains("ringtune kernels --arch"),
        "{said}"
    );
    assert!(error(dir.path(), "no-kernels").contains("kernels.json"));
    for bad in ["sm_70", "90a", "sm_90b", "compute_"] {
        let output = make(bad, &other);
        assert_eq!(output.status.code(), Some(2), "{bad}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("such as sm_80, sm_90a or compute_80"));
    }
}
