//! What depends on the device and on the cache of compiled kernels: `ringtune doctor`, ranks that race, damaged files, dumps.

use std::path::Path;
use std::process::{Command, Output};

use ringtune::cuda::Cuda;
use ringtune::tensor::{DType, Device};
use serde_json::Value;

use crate::close::{tensor, values};
use crate::skip::device;

fn doctor(cache: &Path, words: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(crate::skip::program());
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
        assert!(gpu["works"] == true && gpu["kernel"].as_str().unwrap().contains("gave the right results"), "{gpu}");
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
    let none = if dev.properties().emulated { ("VGPU_DEVICES", "0") } else { ("CUDA_VISIBLE_DEVICES", "") };
    let output = doctor(cache.path(), &["--json", "--require", "cuda"], &[none]);
    assert_eq!(output.status.code(), Some(1));
    let report = json(&output);
    assert!(report["driver"]["works"] == true && report["gpu"][0]["works"] == false, "{report:#}");
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
        let mut command = Command::new(crate::skip::program());
        command.args(["doctor", "--require", "cuda"]).env("RINGTUNE_CACHE", cache.path());
        command.stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    let ranks: Vec<_> = (0..4).map(|_| start()).collect();
    for mut rank in ranks {
        assert!(rank.wait().unwrap().success());
    }
    let files: Vec<_> =
        std::fs::read_dir(cache.path().join("kernels")).unwrap().map(|e| e.unwrap().file_name()).collect();
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
    let file = std::fs::read_dir(cache.path().join("kernels")).unwrap().next().unwrap().unwrap().path();
    let good = std::fs::read(&file).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 0x40;
    std::fs::write(&file, &bad).unwrap();
    cast();
    assert_eq!(std::fs::read(&file).unwrap(), good, "the same compiler gives the same bytes");
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

/// `RINGTUNE_NVRTC` before the loader's path, that before `CUDA_HOME`, that before the user's cache; none is an error with words.
#[test]
fn nvrtc_is_looked_for_in_the_documented_order() {
    let Some(nvrtc) = crate::skip::nvrtc() else { return };
    let root = tempfile::tempdir().unwrap();
    let toolkit = root.path().join("toolkit");
    let lib = toolkit.join("lib64");
    std::fs::create_dir_all(&lib).unwrap();
    std::os::unix::fs::symlink(nvrtc.path(), lib.join("libnvrtc.so.12")).unwrap();
    let cached = root.path().join("cache/ringtune").join(ringtune::cuda::nvrtc::CACHED);
    std::fs::create_dir_all(&cached).unwrap();
    std::os::unix::fs::symlink(&lib, cached.join("lib")).unwrap();
    let (empty, lib) = (root.path().join("none"), lib.to_str().unwrap());
    let run = |env: &[(&str, &str)]| {
        let mut command = Command::new(crate::skip::program());
        command.args(["doctor", "--json"]).env("XDG_CACHE_HOME", &empty).env("RINGTUNE_CACHE", root.path());
        for name in ["LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "RINGTUNE_NVRTC", "VIRTUAL_ENV", "CONDA_PREFIX"] {
            command.env_remove(name);
        }
        json(&command.envs(env.iter().copied()).output().unwrap())["nvrtc"].clone()
    };
    let bare = run(&[]);
    // A system with a compiler of its own in the loader's path shows less of the order.
    let system = bare["works"] == true;
    if !system {
        let error = bare["error"].as_str().unwrap();
        assert!(error.starts_with("NVRTC, the compiler for CUDA kernels, was not found"), "{error}");
        let cache = root.path().join("cache");
        let cache = ("XDG_CACHE_HOME", cache.to_str().unwrap());
        assert_eq!(run(&[cache])["origin"], "the user's cache");
        // Packages of pip, as CUDA 12 and 13 lay them out.
        for (layout, python) in [("cuda_nvrtc", "3.9"), ("cu13", "3.12")] {
            let environment = root.path().join(layout);
            let package = environment.join(format!("lib/python{python}/site-packages/nvidia/{layout}"));
            std::fs::create_dir_all(&package).unwrap();
            std::os::unix::fs::symlink(lib, package.join("lib")).unwrap();
            let found = run(&[cache, ("VIRTUAL_ENV", environment.to_str().unwrap())]);
            assert_eq!(found["origin"], "packages of VIRTUAL_ENV", "{found}");
        }
        assert_eq!(run(&[cache, ("CUDA_HOME", toolkit.to_str().unwrap())])["origin"], "CUDA_HOME");
        let path = [cache, ("CUDA_HOME", toolkit.to_str().unwrap()), ("LD_LIBRARY_PATH", lib)];
        assert_eq!(run(&path)["origin"], "the loader's path");
    }
    let file = format!("{lib}/libnvrtc.so.12");
    for named in [lib, file.as_str()] {
        let found = run(&[("RINGTUNE_NVRTC", named), ("LD_LIBRARY_PATH", lib)]);
        assert_eq!((&found["origin"], &found["works"]), (&"RINGTUNE_NVRTC".into(), &true.into()), "{found}");
    }
    // What it names is not a compiler: no other is taken.
    std::fs::write(root.path().join("text"), "not a library").unwrap();
    let text = root.path().join("text");
    let found = run(&[("RINGTUNE_NVRTC", text.to_str().unwrap()), ("LD_LIBRARY_PATH", lib)]);
    assert!(found["works"] == false && found["error"].as_str().unwrap().contains("/text"), "{found}");
}
