//! What depends on the device and on the cache of compiled kernels: `ringtune doctor`, ranks that race, damaged files, dumps.

use std::path::Path;
use std::process::{Command, Output};

use ringtune::backend::Device;
use ringtune::cuda::Cuda;
use ringtune::tensor::DType;
use serde_json::Value;

use crate::close::{tensor, values};
use crate::skip::device;

fn doctor(cache: &Path, words: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringtune"));
    command.arg("doctor").args(words).env("RINGTUNE_CACHE", cache);
    command.envs(env.iter().copied()).output().unwrap()
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}:\n{text}\n{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn doctor_proves_each_device_with_a_kernel() {
    let Some(dev) = device() else { return };
    let cache = tempfile::tempdir().unwrap();
    let output = doctor(cache.path(), &["--json", "--require", "cuda"], &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = json(&output);
    let gpus = report["gpu"].as_array().unwrap();
    assert_eq!(gpus.len(), Cuda::count().unwrap());
    assert_eq!(gpus[0]["name"], dev.properties().name.as_str());
    for gpu in gpus {
        assert!(
            gpu["works"] == true && gpu["kernel"].as_str().unwrap().contains("gave the right results"),
            "{gpu}"
        );
    }
    // The kernel is in the cache, and found there the next time.
    let report = json(&doctor(cache.path(), &["--json"], &[]));
    assert_eq!(report["cache"]["kernels"], 1, "{report:#}");
}

#[test]
fn doctor_tells_a_driver_without_devices_from_no_driver() {
    let Some(dev) = device() else { return };
    let cache = tempfile::tempdir().unwrap();
    // The emulator's way and the real driver's to have none.
    let none = if dev.properties().emulated {
        ("VGPU_DEVICES", "0")
    } else {
        ("CUDA_VISIBLE_DEVICES", "")
    };
    let output = doctor(cache.path(), &["--json", "--require", "cuda"], &[none]);
    assert_eq!(output.status.code(), Some(1));
    let report = json(&output);
    assert!(
        report["driver"]["works"] == true && report["gpu"][0]["works"] == false,
        "{report:#}"
    );
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("cuda is required: gpu: the driver sees none"), "{error}");
}

/// Processes that start together on an empty cache all work, and one file is left for each kernel.
#[test]
fn ranks_may_race_for_the_cache() {
    if device().is_none() {
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringtune"));
        command
            .args(["doctor", "--require", "cuda"])
            .env("RINGTUNE_CACHE", cache.path());
        command.stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    let ranks: Vec<_> = (0..4).map(|_| start()).collect();
    for mut rank in ranks {
        assert!(rank.wait().unwrap().success());
    }
    let files: Vec<_> = std::fs::read_dir(cache.path().join("kernels"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(files.len(), 1, "{files:?}");
}

#[test]
fn a_damaged_kernel_in_the_cache_is_made_again() {
    if device().is_none() {
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let cast = || {
        let dev = Cuda::with_cache(0, Some(cache.path())).unwrap();
        let t = tensor(&dev, 1, 3, DType::F32, &[1.0, 2.0, 3.0]);
        let mut copy = dev.alloc(1, 3, DType::Bf16).unwrap();
        dev.copy(&mut copy, &t).unwrap();
        assert_eq!(values(&dev, &copy), [1.0, 2.0, 3.0]);
    };
    cast();
    let file = std::fs::read_dir(cache.path().join("kernels"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let good = std::fs::read(&file).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 0x40;
    std::fs::write(&file, &bad).unwrap();
    cast();
    assert_eq!(
        std::fs::read(&file).unwrap(),
        good,
        "the same compiler gives the same bytes"
    );
    std::fs::write(&file, b"").unwrap();
    cast();
    assert_eq!(std::fs::read(&file).unwrap(), good);
}

#[test]
fn ptx_is_dumped_where_it_is_asked_for() {
    if device().is_none() {
        return;
    }
    let (cache, dump) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let folder = dump.path().join("ptx");
    // Also when the cache has the kernel already.
    for _ in 0..2 {
        let _ = std::fs::remove_dir_all(&folder);
        let output = doctor(cache.path(), &[], &[("RINGTUNE_DUMP_PTX", folder.to_str().unwrap())]);
        assert!(output.status.success());
        let file = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
        let text = std::fs::read_to_string(file).unwrap();
        assert!(
            text.starts_with("// kernels/cast.cu [DST_T=bf16 SRC_T=float]\n") && text.contains(".entry cast("),
            "{text}"
        );
    }
}
