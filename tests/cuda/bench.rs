//! `ringtune bench` on a GPU: on the emulated one counters and a projection, and no time.

use std::process::Command;

use serde_json::Value;

use crate::skip::device;

fn bench(words: &str, env: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let mut command = Command::new(crate::skip::program());
    command.arg("bench").args(words.split(' ')).env("RINGTUNE_CACHE", crate::skip::scratch());
    let output = command.envs(env.iter().copied()).output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    (output.status.code(), out, err)
}

fn json(words: &str) -> Value {
    let (code, out, err) = bench(&format!("{words} --device cuda --json"), &[]);
    assert_eq!(code, Some(0), "{out}\n{err}");
    serde_json::from_str(&out).unwrap()
}

/// Every case gives the right result. What is emulated is counted and projected; nothing of it looks measured.
#[test]
fn kernels_are_verified_and_on_the_emulator_counted() {
    let Some(dev) = device() else { return };
    let v = json("kernels --model tiny --tokens 40 --document 24 --seconds 0");
    let cases = v["cases"].as_array().unwrap();
    assert!(cases.len() > 20, "{v:#}");
    let emulated = dev.properties().emulated;
    assert_eq!((&v["device"]["emulated"], &v["measured"]), (&emulated.into(), &(!emulated).into()));
    for case in cases {
        assert!(case["error"].as_f64().unwrap() < 6e-3 && case["launches"].as_u64().unwrap() > 0, "{case:#}");
        for key in ["seconds", "flops_per_second", "bytes_per_second", "share"] {
            assert_eq!(case.get(key).is_none(), emulated, "{key}: {case:#}");
        }
    }
    if !emulated {
        return;
    }
    assert_eq!(v["ceilings"]["source"], "data sheet");
    let of = |name: &str| cases.iter().find(|c| c["name"] == name).unwrap();
    // On tensor cores, whole tiles: as many operations as the product has, or up to the tile's edges more.
    let product = of("matmul nt gate, up");
    let flops = product["counted"]["tensor_flops"].as_f64().unwrap() / product["flop"].as_f64().unwrap();
    assert!((1.0..3.0).contains(&flops), "{product:#}");
    for case in cases {
        let requested = case["counted"]["requested_bytes"].as_f64().unwrap();
        assert!(requested > 0.0 && case["counted"]["warp_instructions"].as_u64().unwrap() > 0, "{case:#}");
        // What a case says that it has to do, the device did: no less, and no more than tiles, passes over a row and a second look take.
        let (flop, bytes) = (case["flop"].as_f64().unwrap(), case["bytes"].as_f64().unwrap());
        assert!((0.99..10.0).contains(&(requested / bytes)), "{requested} bytes: {case:#}");
        // A decoded token fills 2 of 16 rows and 24 of 128 keys, and its probabilities are two terms: 64 times the product.
        let products = case["counted"]["tensor_flops"].as_f64().unwrap();
        assert!(products == 0.0 || (0.99..=64.0).contains(&(products / flop)), "{products} operations: {case:#}");
        let projected = case["projection"]["seconds_at_least"].as_f64().unwrap();
        let least = (case["flop"].as_f64().unwrap() / 312e12).max(case["bytes"].as_f64().unwrap() / 2.03904e12);
        assert!((projected / least - 1.0).abs() < 1e-3, "{case:#}");
    }
    let (code, table, err) =
        bench("kernels --device cuda --model tiny --tokens 16 --only rope --compare cublaslt", &[]);
    assert!(code == Some(0) && err.contains("--compare: cuBLASLt: an emulated device"), "{err}");
    assert!(table.contains("nothing was timed") && table.contains("projected us, at least"), "{table}");
    assert!(!table.contains("FLOP/s\n") && !table.contains("us median"), "{table}");
}

/// Steps wait once; what `check` estimates is what they take.
#[test]
fn steps_are_counted_and_take_the_memory_that_is_estimated() {
    let Some(dev) = device() else { return };
    let v = json("step --model tiny --tokens 64 --layers 2 --seconds 0");
    for case in v["cases"].as_array().unwrap() {
        let bytes = |key: &str| case[key].as_f64().unwrap_or_else(|| panic!("{key} in {case:#}"));
        assert!((bytes("peak_bytes") / bytes("estimated_bytes") - 1.0).abs() < 0.05, "{case:#}");
        assert_eq!(case["waits"], 1, "{case:#}");
        assert!(case["launches"].as_u64().unwrap() > 40, "{case:#}");
        assert!(case["loss"]["last"].as_f64() < case["loss"]["first"].as_f64(), "{case:#}");
        if dev.properties().emulated {
            assert!(case.get("tokens_per_second").is_none() && case["counted"]["tensor_flops"].as_f64().unwrap() > 0.0);
        }
    }
    if !dev.properties().emulated {
        return;
    }
    let (code, _, err) = bench("step --device cuda --model tiny", &[("VGPU_MEMORY", "64M")]);
    assert!(code == Some(1) && err.contains("bench: full needs ") && err.contains(" are free; "), "{err}");
}
