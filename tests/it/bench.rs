//! `ringtune bench` on the CPU: what it prints and writes as JSON, and what it refuses.

use serde_json::Value;

use crate::program::{Outcome, Workplace};

fn bench(words: &str) -> Outcome {
    let words: Vec<&str> = ["bench"].into_iter().chain(words.split_whitespace()).collect();
    Workplace::new().run(&words)
}

fn json(words: &str) -> Value {
    let outcome = bench(&format!("{words} --json"));
    assert_eq!(outcome.code, Some(0), "{words}: {}", outcome.stderr);
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("{e}:\n{}", outcome.stdout))
}

/// A field that has to be a number above 0.
fn positive(v: &Value, path: &str) -> f64 {
    let found = path.split('.').fold(v, |v, key| &v[key]);
    let x = found.as_f64().unwrap_or_else(|| panic!("{path} is {found} in {v:#}"));
    assert!(x.is_finite() && x > 0.0, "{path} is {x} in {v:#}");
    x
}

const TINY: &str = "--device cpu --model tiny --tokens 24 --document 10 --seconds 0 --threads 1";

#[test]
fn kernels_are_verified_timed_and_held_to_ceilings() {
    for dtype in ["bf16", "f32"] {
        let v = json(&format!(
            "kernels {TINY} --dtype {dtype} --only nt,project,attention,rmsnorm,rope,bias,scatter,cast,adamw --label here"
        ));
        assert_eq!(
            (&v["command"], &v["measured"], &v["label"]),
            (&"bench kernels".into(), &true.into(), &"here".into())
        );
        assert_eq!((&v["device"]["emulated"], &v["version"]), (&false.into(), &env!("CARGO_PKG_VERSION").into()));
        assert!(v["device"]["description"].as_str().unwrap().starts_with("cpu, 1 thread"), "{v:#}");
        let flags = v["flags"].as_str().unwrap();
        assert!(flags.contains("--model tiny --tokens 24 --document 10") && flags.contains(dtype), "{flags}");
        assert_eq!(v["ceilings"]["source"], "measured");
        let (flops, copy) = (positive(&v, "ceilings.flops_per_second"), positive(&v, "ceilings.bytes_per_second"));
        let cases = v["cases"].as_array().unwrap();
        let names: Vec<&str> = cases.iter().map(|c| c["name"].as_str().unwrap()).collect();
        for name in [
            "matmul nt q, o",
            "matmul nt down",
            "project q, k, v LoRA",
            "project dx gate, up",
            "project dw gate, up",
            "project da, db down",
            "attention backward",
            "attention backward, rotated",
            "attention decode",
            "rmsnorm backward",
            "rope",
            "bias",
            "bias backward",
            "scatter",
            "cast",
            "adamw",
        ] {
            assert!(names.contains(&name), "{name} in {names:?}");
        }
        for case in cases {
            assert_eq!(case["dtype"], dtype);
            let error = case["error"].as_f64().unwrap();
            // A cast of f32 is rounded to bf16.
            let rounded = dtype == "bf16" || case["name"] == "cast";
            assert!((0.0..if rounded { 6e-3 } else { 1e-5 }).contains(&error), "{case:#}");
            let median = positive(case, "seconds.median");
            assert!(positive(case, "seconds.min") <= median && median <= positive(case, "seconds.max"), "{case:#}");
            assert!(positive(case, "seconds.quartile1") <= positive(case, "seconds.quartile3"), "{case:#}");
            assert!(positive(case, "seconds.rounds") >= 3.0 && positive(case, "sets") >= 1.0, "{case:#}");
            // The rates and the share are those of the median.
            let (flop, bytes) = (case["flop"].as_f64().unwrap(), positive(case, "bytes"));
            let close = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-9;
            assert!(close(positive(case, "bytes_per_second"), bytes / median), "{case:#}");
            assert!(close(positive(case, "share"), (flop / flops).max(bytes / copy) / median), "{case:#}");
            assert_eq!(case["bound"] == "product", flop / flops >= bytes / copy, "{case:#}");
            // Nobody counts launches on a CPU, and nothing is projected.
            assert!(case["launches"].is_null() && case.get("counted").is_none() && case.get("projection").is_none());
        }
        // No product is above the ceiling that the best of them is.
        assert!(cases.iter().all(|c| c["kernel"] != "matmul" || c["flops_per_second"].as_f64().unwrap() <= flops));
    }
}

#[test]
fn the_table_has_units_and_the_machine() {
    let outcome = bench(&format!("kernels {TINY} --only swiglu,embedding,norm,dropout"));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert!(
        lines[0].starts_with("device: cpu, 1 thread") && lines[1].starts_with("build: ringtune "),
        "{}",
        outcome.stdout
    );
    assert!(lines[2].starts_with("flags: --model tiny ") && lines[3].contains("copy ") && lines[3].contains(" GB/s"));
    let header = lines.iter().position(|l| l.starts_with("kernel ")).unwrap();
    assert!(lines[header].contains("us median") && lines[header].contains("GFLOP/s") && lines[header].contains("GB/s"));
    // Aligned: rows are as wide as the header or narrower only by their last column.
    let ends: Vec<usize> = lines[header..].iter().map(|l| l.chars().count()).collect();
    assert!(ends.iter().all(|&n| n == ends[0]), "{}", outcome.stdout);
    for name in ["matmul nt square", "swiglu backward", "embedding backward", "norm2 of the gradient", "dropout"] {
        assert!(outcome.stdout.contains(&format!("\n{name} ")), "{name}:\n{}", outcome.stdout);
    }
}

#[test]
fn steps_have_speed_memory_and_losses_that_fall() {
    let v = json(&format!("step {TINY} --layers 2"));
    assert_eq!((&v["command"], &v["measured"]), (&"bench step".into(), &true.into()));
    positive(&v, "peak_flops_per_second");
    let cases = v["cases"].as_array().unwrap();
    assert_eq!(
        cases.iter().map(|c| c["name"].as_str().unwrap()).collect::<Vec<_>>(),
        ["full", "LoRA r 16, dropout 0.05"]
    );
    for case in cases {
        let median = positive(case, "seconds.median");
        assert!((positive(case, "tokens_per_second") * median - 24.0).abs() < 1e-6, "{case:#}");
        assert!((positive(case, "flops_per_second") * median / positive(case, "flop") - 1.0).abs() < 1e-9, "{case:#}");
        assert!(positive(case, "loss.first") > positive(case, "loss.last"), "{case:#}");
        assert!(positive(case, "mfu") < 1.0, "{case:#}");
        positive(case, "estimated_bytes");
    }
    // Every weight trained takes more memory than a few.
    assert!(positive(&cases[0], "estimated_bytes") > 2.0 * positive(&cases[1], "estimated_bytes"));
}

/// In the words of a training: one case, so many steps, short documents of which half has targets.
#[test]
fn a_step_can_be_asked_for_as_a_training_is() {
    let words = "step --device cpu --shape tiny --layers 1 --threads 1 --lora --mixed_precision no --micro_batch 3 --seq_len 16 \
                 --documents 6 --supervised 0.5 --steps 4 --warmup 2";
    let v = json(words);
    let flags = v["flags"].as_str().unwrap();
    for part in ["--model tiny --tokens 48 --document 8 --dtype f32", "--warmup 2 --supervised 0.5 --steps 4"] {
        assert!(flags.contains(part), "{flags}");
    }
    let cases = v["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 1, "{v:#}");
    assert_eq!((positive(&cases[0], "seconds.rounds"), positive(&cases[0], "tokens")), (4.0, 48.0));
    positive(&cases[0], "first_step_seconds");
    assert!(cases[0]["tokens_per_second_spread"].as_f64().unwrap() >= 0.0, "{v:#}");
    // Rows without a target never reach the head: less is to be done.
    // Several micro-batches make a step of as many tokens.
    let more = json(&words.replace("--warmup 2", "--warmup 2 --grad_accum 2"));
    assert!(more["flags"].as_str().unwrap().contains("--grad_accum 2") && !flags.contains("--grad_accum"), "{more:#}");
    assert_eq!(positive(&more["cases"][0], "tokens"), 96.0);
    assert_eq!(positive(&more["cases"][0], "flop"), 2.0 * positive(&cases[0], "flop"));
    let all = json(&words.replace("--supervised 0.5", ""));
    assert!(positive(&all["cases"][0], "flop") > positive(&cases[0], "flop"), "{v:#}");
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/model/qwen3-tied");
    let file = json(&format!("step --device cpu --shape {model} --threads 1 --seq_len 16 --steps 3 --lora"));
    assert!(file["flags"].as_str().unwrap().contains(&format!("--model {model} --tokens 16")), "{file:#}");
}

#[test]
fn what_makes_no_sense_is_a_usage_error() {
    for (words, part) in [
        (
            "kernels --only matmul,nosuch",
            "--only: no case has \"nosuch\" in its name; expected some of matmul, project, attention",
        ),
        ("step --device cpu --only matmul", "--only: no case has \"matmul\""),
        ("kernels --seconds -1", "--seconds: expected 0 to 3600, found -1"),
        ("kernels --seconds 1e9", "--seconds: expected 0 to 3600"),
        ("kernels --device gpu", "--device: expected auto, cpu or cuda[:N]"),
        ("kernels --model 70b", "--model: expected tiny, 135m, 1b, 8b, small or a config.json, found 70b"),
        ("step --micro_batch 2", "--micro_batch: it counts rows of --seq_len tokens"),
        ("step --seq_len 8 --tokens 8", "--seq_len"),
        ("step --dtype bf16 --mixed_precision no", "--mixed_precision"),
        ("step --supervised 0", "--supervised: expected a share above 0 and at most 1, found 0"),
        ("kernels --tokens 0", "0"),
        ("kernels --layers 2", "--layers"),
        ("kernels --dtype f16", "f16"),
        ("step --recompute all", "all"),
        ("", "bench"),
        (
            "kernels --device cpu atention,rmsnorn",
            "--only: no case has \"atention\" in its name; near are attention; expected",
        ),
        ("kernels --sed 3", "--sed: no flag of ringtune bench kernels"),
        ("kernels --fail-below 0.9", "--baseline"),
        ("collectives --fail_below 2", "--baseline"),
        ("step --baseline x --fail-below 0", "--fail-below: expected a ratio of speeds above 0, such as 0.9, found 0"),
    ] {
        let outcome = bench(words);
        assert_eq!(outcome.code, Some(2), "{words}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(part) && outcome.stdout.is_empty(), "{words}: {}", outcome.stderr);
    }
}

/// Nothing is allocated that will not fit, and the message says what does.
#[test]
fn too_little_memory_names_flags_that_fit() {
    let outcome = bench("kernels --device cpu --model 8b --tokens 1048576 --only swiglu");
    assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
    let error = outcome.error();
    assert!(error.starts_with("bench: the largest case needs ") && error.contains(" are free; --tokens "), "{error}");
    assert!(error.ends_with(" fits"), "{error}");
    let outcome = bench("step --device cpu --model 1b --tokens 1048576 --only full");
    assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
    let error = outcome.error();
    assert!(error.starts_with("bench: full needs ") && error.contains(" are free; "), "{error}");
    assert!(error.contains("--tokens ") && error.contains(" takes "), "{error}");
}

/// Figures of another time stand beside those of now; only `--fail-below` makes them an error.
#[test]
fn figures_are_compared_with_those_of_another_time() {
    let at = Workplace::new();
    let run = |words: &str| {
        let words: Vec<&str> = ["bench"].into_iter().chain(words.split_whitespace()).collect();
        at.run(&words)
    };
    let document = |o: &Outcome| -> Value {
        assert_eq!(o.code, Some(0), "{}", o.stderr);
        serde_json::from_str(&o.stdout).unwrap()
    };
    let mut before = document(&run(&format!("kernels {TINY} --json --label before add dropout")));
    let cases = before["cases"].as_array_mut().unwrap();
    assert!(cases.iter().skip(1).all(|c| ["add", "dropout"].contains(&c["kernel"].as_str().unwrap())), "{cases:?}");
    // A machine a thousand times as slow, but at one of the cases, which had no equal there.
    for case in cases.iter_mut() {
        for field in ["median", "quartile1", "quartile3"] {
            case["seconds"][field] = (1000.0 * positive(case, &format!("seconds.{field}"))).into();
        }
    }
    let dropout = cases.iter().position(|c| c["name"] == "dropout").unwrap();
    cases[dropout]["shape"] = "another".into();
    at.write("slow.json", before.to_string());
    let now = document(&run(&format!("kernels {TINY} --json --baseline slow.json --fail-below 2 add dropout")));
    let of =
        |name: &str| now["cases"].as_array().unwrap().iter().find(|c| c["name"] == name).unwrap()["baseline"].clone();
    assert!(positive(&of("add"), "ratio") > 10.0 && of("add")["beyond_spread"] == true, "{now:#}");
    assert!(of("dropout").is_null() && now["baseline"]["missing"][0] == "dropout, another, bf16", "{now:#}");
    assert_eq!((&now["baseline"]["file"], &now["baseline"]["label"]), (&"slow.json".into(), &"before".into()));
    let text = run(&format!("kernels {TINY} --baseline slow.json --tokens 24 add dropout --label x"));
    assert_eq!(text.code, Some(2), "a flag twice: {}", text.stderr);
    let text = run(&format!("kernels {TINY} --baseline slow.json add dropout,swiglu"));
    assert_eq!(text.code, Some(0), "{}", text.stderr);
    let row = |name: &str| text.stdout.lines().find(|l| l.starts_with(name)).unwrap().to_string();
    assert!(row("add ").ends_with("x faster") && row("dropout ").ends_with(" new"), "{}", text.stdout);
    assert!(
        text.stdout.contains("baseline: slow.json, ringtune ") && text.stdout.contains(", before; "),
        "{}",
        text.stdout
    );
    assert!(text.stdout.contains("baseline: another line of flags then: --model tiny "), "{}", text.stdout);

    // The other way round it is too slow, which is an error where one is asked for, after the figures.
    let mut fast = before.clone();
    for case in fast["cases"].as_array_mut().unwrap() {
        for field in ["median", "quartile1", "quartile3"] {
            case["seconds"][field] = (1e-9 * positive(case, &format!("seconds.{field}"))).into();
        }
    }
    at.write("fast.json", fast.to_string());
    let slower = run(&format!("kernels {TINY} --baseline fast.json add"));
    assert_eq!(slower.code, Some(0), "{}", slower.stderr);
    assert!(slower.stdout.contains("x slower"), "{}", slower.stdout);
    let fails = run(&format!("kernels {TINY} --baseline fast.json --fail-below 0.9 add"));
    assert_eq!(fails.code, Some(1), "{}", fails.stderr);
    assert!(fails.stdout.contains("x slower") && fails.error().starts_with("--fail-below 0.9: "), "{}", fails.stderr);

    let step = run("step --device cpu --baseline slow.json");
    assert_eq!(step.code, Some(1), "{}", step.stderr);
    assert!(step.error().contains("`ringtune bench step --json` prints, found what `ringtune bench kernels` prints"));
    let steps = format!("step {TINY} --layers 1 --lora --json");
    at.write("steps.json", document(&run(&steps)).to_string());
    let again = document(&run(&format!("{steps} --baseline steps.json")));
    positive(&again["cases"][0]["baseline"], "ratio");
}

/// What people type first, and what a table of documented fields promises.
#[test]
fn help_has_the_flags_and_the_readme_the_fields() {
    for which in ["kernels", "step", "collectives"] {
        let help = bench(&format!("{which} --help"));
        assert_eq!(help.code, Some(0), "{}", help.stderr);
        for flag in ["--seconds", "--device", "--json", "--baseline", "--fail-below"] {
            assert!(help.stdout.contains(flag), "{which}: {flag}");
        }
    }
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/README.md")).unwrap();
    let kernels = json(&format!("kernels {TINY} add"));
    let steps = json(&format!("step {TINY} --layers 1 --lora"));
    let mut fields: Vec<&String> = Vec::new();
    for document in [&kernels, &steps] {
        fields.extend(document.as_object().unwrap().keys());
        fields.extend(document["cases"][0].as_object().unwrap().keys());
    }
    for field in fields {
        assert!(readme.contains(&format!("`{field}`")), "{field} is not in benches/README.md");
    }
}
