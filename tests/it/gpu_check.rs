//! `scripts/gpu_check.sh` from end to end, so that minutes on a GPU are not lost to a mistake in it: the program under test on the CPU, and
//! stand-ins of `tests/data/gpu_check` for what a machine with a GPU has. Held are its steps, verdicts, limits, and what it does without.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::program::{Workplace, repository};
use crate::skip::skipped;

/// What the machine has beside the driver.
const TOOLS: [(&str, &str); 3] = [
    ("nvidia-smi", "[ \"$1\" = dmon ] && exec sleep 100\necho 'NVIDIA-SMI 580.82, NVIDIA H200'\n"),
    ("nvcc", "echo 'Cuda compilation tools, release 13.0'\n"),
    (
        "compute-sanitizer",
        "case ${STAND_IN-} in *sanitizer_finds*) echo '========= Invalid __global__ write of size 4'; exit 9 ;; esac\n\
         [ \"$1 $2\" = '--error-exitcode 9' ] && shift 2 && \"$@\" && echo '========= ERROR SUMMARY: 0 errors'\n",
    ),
];

/// Tests of the stand-in for the CUDA tests, of which all pass.
const TESTS: [&str; 6] = ["device::a", "matmul::b", "norm::c", "operations::d", "prebuilt::e", "train::f"];

fn program(path: &Path, text: &str) {
    fs::write(path, format!("#!/bin/sh\n{text}")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A pack with stand-ins, in a folder of its own.
struct Pack(Workplace);

impl Pack {
    /// What `gpu_check.sh pack` makes of the program under test, whose losses on the CPU are those that runs are held to.
    fn new() -> Self {
        let w = Workplace::new();
        let programs = w.path("programs");
        fs::create_dir_all(programs.join("kernels")).unwrap();
        fs::write(programs.join("kernels/kernels.json"), "{\"target\": \"sm_90a\"}\n").unwrap();
        let own = env!("CARGO_BIN_EXE_ringtune");
        std::os::unix::fs::symlink(own, programs.join("ringtune")).unwrap();
        // Any program: the stand-in takes its place.
        std::os::unix::fs::symlink("/bin/true", programs.join("cuda-tests")).unwrap();
        let mut script = Command::new("sh");
        script.arg(repository().join("scripts/gpu_check.sh")).arg("pack").arg(w.path("pack"));
        script.env("PROGRAMS", &programs).env("STEPS", "12").env("XZ_OPT", "-0").env("RINGTUNE_CACHE", w.path("cache"));
        let output = script.output().unwrap();
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        assert!(output.status.success(), "{said:?}");
        assert!(said[0].contains("pack.tar.xz") && said[0].contains("needs GLIBC_2."), "{said:?}");
        let pack = Self(w);
        fs::rename(pack.path("bin/ringtune"), pack.path("bin/real")).unwrap();
        for (name, folder) in [("ringtune", "bin"), ("cuda-tests", "bin"), ("torch.py", "python")] {
            fs::create_dir_all(pack.path(folder)).unwrap();
            let _ = fs::remove_file(pack.path(folder).join(name));
            fs::copy(repository().join("tests/data/gpu_check").join(name), pack.path(folder).join(name)).unwrap();
        }
        fs::create_dir_all(pack.path("tools")).unwrap();
        TOOLS.iter().for_each(|(name, text)| program(&pack.path("tools").join(name), text));
        pack
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path("pack").join(name)
    }

    /// Runs the script into the folder `name` with a word for what is wrong.
    fn run(&self, name: &str, words: &str, stand_in: &str, env: &[(&str, &str)]) -> Ran {
        let tests: String = TESTS.iter().map(|test| format!("{test} passes\n")).collect();
        let file = self.path("bin/tests.txt");
        if !file.exists() {
            fs::write(&file, tests).unwrap();
        }
        let out = self.0.path(name);
        let mut script = Command::new("sh");
        script.arg(self.path("gpu_check.sh")).arg("run").arg(&out).args(words.split_whitespace());
        let path = format!("{}:{}", self.path("tools").display(), std::env::var("PATH").unwrap());
        script.env("PATH", path).env("PYTHONPATH", self.path("python")).env("STAND_IN", stand_in);
        // Limits are for what hangs, however slow this machine is.
        script.env("TRAIN_LIMIT", "300").env("BUDGET", "3000");
        script.env("STEPS", "12").env("TEST_THREADS", "2").env_remove("RINGTUNE_KERNELS").envs(env.iter().copied());
        let output = script.output().unwrap();
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        let summary = fs::read_to_string(out.join("summary.md")).unwrap_or_else(|e| panic!("{e}: {said:?}"));
        let rows = summary.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |")).skip(2);
        let rows = rows.map(|row| row.splitn(3, " | ").map(String::from).collect::<Vec<_>>());
        let rows = rows.map(|row| row.try_into().unwrap_or_else(|row| panic!("{row:?} in {summary}"))).collect();
        Ran { out, code: output.status.code(), rows, said: said.concat() }
    }
}

/// What a run left.
struct Ran {
    out: PathBuf,
    code: Option<i32>,
    /// Step, result, what.
    rows: Vec<[String; 3]>,
    said: String,
}

impl Ran {
    fn results(&self) -> Vec<(&str, &str)> {
        self.rows.iter().map(|[step, result, _]| (step.as_str(), result.as_str())).collect()
    }

    /// What is said of a step that has this result.
    fn what(&self, step: &str, result: &str) -> &str {
        let row = self.rows.iter().find(|[name, found, _]| name == step && found == result);
        &row.unwrap_or_else(|| panic!("no {step:?} that {result} in {:#?}\n{}", self.rows, self.said))[2]
    }

    fn json(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.out.join(name)).unwrap();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name}: {e}: {text}"))
    }
}

#[test]
fn every_step_says_what_came_of_it() {
    if Command::new("python3").arg("--version").output().is_err() {
        return skipped("no python3 to stand in for that of the machine with a GPU", false);
    }
    let pack = Pack::new();
    everything_works(&pack);
    what_is_missing_is_said(&pack);
    what_hangs_is_cut_off(&pack);
    what_fails_is_named(&pack);
    older_libraries(&pack);
}

fn everything_works(pack: &Pack) {
    let ran = pack.run("works", "", "", &[]);
    let rest = "kernels 8b --only norm,rope,swiglu,embedding,bias,scatter,cast,head,adamw";
    assert_eq!(
        ran.results(),
        [
            ("doctor", "passed"),
            ("kernels 8b --compare cublaslt --only matmul", "measured"),
            ("products beside cuBLASLt", "measured"),
            ("kernels 8b --only attention", "measured"),
            ("kernels 8b --only project", "measured"),
            (rest, "measured"),
            ("kernels 135m --compare cublaslt", "measured"),
            ("products beside cuBLASLt", "measured"),
            ("beside PyTorch", "measured"),
            ("tests-numerics", "passed"),
            ("tests-rest", "passed"),
            ("train pretrain", "passed"),
            ("train full", "passed"),
            ("train lora", "passed"),
            ("resume", "passed"),
            ("step 8b --layers 8 --tokens 2048", "measured"),
            ("step 8b --layers 8 --tokens 8192", "measured"),
            ("step 135m", "measured"),
            ("prebuilt", "passed"),
            ("speed pretrain", "measured"),
            ("speed lora", "measured"),
            ("sanitizer", "passed"),
        ],
        "{:#?}\n{}",
        ran.rows,
        ran.said
    );
    assert_eq!(ran.code, Some(0), "{}", ran.said);
    assert_eq!(ran.what("doctor", "passed"), "NVIDIA H200");
    for run in ["pretrain", "full", "lora"] {
        let what = ran.what(&format!("train {run}"), "passed");
        assert_eq!(what, "loss within 0.000 % of the CPU's; the same bits twice");
    }
    assert!(ran.what("resume", "passed").starts_with("killed after step "), "{:?}", ran.rows);
    assert_eq!((ran.what("tests-numerics", "passed"), ran.what("tests-rest", "passed")), ("4 tests", "2 tests"));
    assert!(ran.what("sanitizer", "passed").contains("0 errors"));
    assert!(ran.what("speed lora", "measured").contains(" tokens/s"), "{:?}", ran.rows);
    assert!(ran.what("step 135m", "measured").contains("tokens/s, full then LoRA"), "{:?}", ran.rows);
    // Packed kernels are used where they are meant to be.
    let tests = fs::read_to_string(pack.path("bin/tests.txt.ran")).unwrap();
    let packed: Vec<&str> = tests.lines().filter_map(|line| line.strip_suffix(" with packed kernels")).collect();
    assert_eq!((packed.len(), tests.lines().count()), (3, 9), "{tests}");

    // The stand-in for cuBLASLt is twice as fast as each product: a row that met another's figure would show.
    let (kernels, products) = (ran.json("kernels.json"), fs::read_to_string(ran.out.join("products.md")).unwrap());
    assert_eq!((kernels.len(), ran.json("step.json").len()), (5, 3));
    let ours = |documents: &[usize]| -> Vec<&Value> {
        let cases = documents.iter().flat_map(|&i| kernels[i]["cases"].as_array().unwrap());
        cases.filter(|case| case["name"].as_str().unwrap().starts_with("matmul ")).collect()
    };
    let (all, ours) = (ours(&[0, 1, 2, 3, 4]), ours(&[0, 4]));
    let rows: Vec<&str> = products.lines().skip(2).collect();
    assert!(rows.len() > 20 && rows.len() == ours.len(), "{} of {}: {products}", rows.len(), ours.len());
    for (row, case) in rows.iter().zip(&ours) {
        let name = case["name"].as_str().unwrap().strip_prefix("matmul ").unwrap();
        let rate = case["flops_per_second"].as_f64().unwrap() / 1e12;
        let begin = format!("| {name} | {} | {rate:.1} | ", case["shape"].as_str().unwrap());
        assert!(row.starts_with(&begin) && row.ends_with(" | 0.50 |"), "{row}, expected {begin}");
    }
    let peer = fs::read_to_string(ran.out.join("peer.md")).unwrap();
    // Each takes a millisecond there.
    assert!(peer.starts_with("PyTorch 2.11.0+stand.in, CUDA 13.0, NVIDIA H200\n"), "{peer}");
    assert_eq!(peer.matches("| matmul ").count(), all.len(), "{peer}");
    assert!(peer.contains("| attention forward |") && peer.contains("| attention backward |"), "{peer}");
    assert!(peer.lines().skip(4).all(|line| line.contains(" | 1000.0 | ")), "{peer}");
    assert!(!ran.what("beside PyTorch", "measured").contains("failed"), "{:?}", ran.rows);
    let machine = fs::read_to_string(ran.out.join("machine.txt")).unwrap();
    assert!(machine.contains("NVIDIA-SMI 580.82") && machine.contains("release 13.0"), "{machine}");
    assert_eq!(fs::read_to_string(ran.out.join("times.txt")).unwrap().lines().count(), 9);
}

fn what_is_missing_is_said(pack: &Pack) {
    let ran = pack.run("no_gpu", "--only doctor kernels peer train step speed", "no_gpu", &[]);
    assert_eq!(ran.code, Some(1), "{}", ran.said);
    assert!(ran.what("doctor", "FAILED").contains("the driver sees none"), "{:?}", ran.rows);
    assert!(ran.what("train lora", "FAILED").contains("the driver sees no GPU"), "{:?}", ran.rows);
    assert_eq!(ran.what("resume", "left out"), "there is no undisturbed run");
    assert!(ran.what("beside PyTorch", "left out").starts_with("no measured kernels: "), "{:?}", ran.rows);
    assert_eq!(ran.rows.len(), 1 + 5 + 1 + 4 + 3 + 2, "{:?}", ran.rows);

    let _ = fs::remove_file(pack.path("bin/tests.txt.ran"));
    let ran = pack.run("no_nvrtc", "--only doctor tests", "no_nvrtc", &[]);
    assert_eq!(ran.code, Some(0), "{:?}", ran.rows);
    let why = "NVIDIA H200, with the kernels of the pack: error: cuda is required: NVRTC was not found";
    assert_eq!(ran.what("doctor", "passed"), why);
    assert!(ran.what("tests that compile", "left out").contains("no NVRTC"), "{:?}", ran.rows);
    let tests = fs::read_to_string(pack.path("bin/tests.txt.ran")).unwrap();
    assert!(tests.lines().count() == 5 && tests.lines().all(|l| l.ends_with("packed kernels")), "{tests}");

    // PyTorch that sees no GPU, that does not start, that is not there.
    let peer = |name, stand_in, env: &[(&str, &str)]| {
        let ran = pack.run(name, "--only doctor peer", stand_in, env);
        assert_eq!(ran.code, Some(0), "{:?}", ran.rows);
        ran.what("beside PyTorch", "left out").to_string()
    };
    for name in ["blind", "broken"] {
        fs::create_dir_all(pack.0.path(name)).unwrap();
        fs::copy(pack.0.path("works/kernels.json"), pack.0.path(name).join("kernels.json")).unwrap();
    }
    assert_eq!(peer("blind", "blind", &[]), "PyTorch 2.11.0+stand.in sees no GPU");
    pack.0.write("without/torch.py", "raise OSError('libcudart.so.13: not found')\n");
    let without = pack.0.path("without");
    let found = peer("broken", "", &[("PYTHONPATH", without.to_str().unwrap())]);
    assert_eq!(found, "no PyTorch in python3: libcudart.so.13: not found");
}

/// Each part has a limit of its own, and all together have one.
fn what_hangs_is_cut_off(pack: &Pack) {
    let limits = [("TRAIN_LIMIT", "1"), ("TEST_LIMIT", "1")];
    let ran = pack.run("hangs", "--only doctor kernels train step", "hanging_bench hanging_training", &limits);
    assert_eq!(ran.code, Some(1), "{}", ran.said);
    let cut = ran.results().iter().filter(|(_, result)| *result == "CUT OFF").count();
    assert_eq!((cut, ran.rows.len()), (5 + 3 + 3, 1 + 5 + 4 + 3), "{:#?}", ran.rows);

    let ran = pack.run("late", "--only doctor kernels tests train", "hanging_bench", &[("BUDGET", "18")]);
    assert_eq!(ran.code, Some(1), "{}", ran.said);
    assert_eq!(ran.what("tests", "left out"), "the 18 s are over");
    assert_eq!((ran.what("train", "left out"), ran.rows.len()), ("the 18 s are over", 1 + 5 + 2), "{:?}", ran.rows);
}

fn what_fails_is_named(pack: &Pack) {
    let file = pack.path("bin/tests.txt");
    fs::write(&file, "device::a passes\nmatmul::b fails\nnorm::c hangs\ntrain::f hangs\n").unwrap();
    let ran = pack.run("fails", "--only doctor tests prebuilt sanitizer", "sanitizer_finds", &[("TEST_LIMIT", "6")]);
    fs::remove_file(&file).unwrap();
    assert_eq!(ran.code, Some(1), "{}", ran.said);
    let what = ran.what("tests-numerics", "FAILED");
    assert!(what.starts_with("1 of 3 passed, 1 did not, 1 were cut off: ") && what.contains("matmul::b"), "{what}");
    assert_eq!(ran.what("tests-rest", "CUT OFF").trim(), "0 of 1 had passed, none failed: train::f");
    let log = fs::read_to_string(ran.out.join("tests-numerics.log")).unwrap();
    assert!(log.contains("FAILED matmul::b (101)") && log.contains("panicked: 1 != 2"), "{log}");
    assert!(ran.what("sanitizer", "FAILED").contains("Invalid __global__ write"), "{:?}", ran.rows);

    let ran = pack.run("bits", "--only doctor train", "wrong_bits", &[]);
    assert_eq!(ran.code, Some(1), "{}", ran.said);
    assert!(ran.what("train full", "FAILED").ends_with("; OTHER BITS the second time"), "{:?}", ran.rows);
    // Losses of another training are more than half a percent away.
    let curve = pack.path("curves/full.jsonl");
    let text = fs::read_to_string(&curve).unwrap();
    fs::write(&curve, fs::read_to_string(pack.path("curves/lora.jsonl")).unwrap()).unwrap();
    let ran = pack.run("curve", "--only doctor train", "", &[]);
    fs::write(&curve, text).unwrap();
    assert!(ran.what("train full", "FAILED").ends_with("of the CPU's; the same bits twice"), "{:?}", ran.rows);
}

/// Programs that this machine's loader does not take are started by that of the pack.
fn older_libraries(pack: &Pack) {
    let mut bytes = fs::read(pack.path("bin/real")).unwrap();
    let loader = b"/lib64/ld-linux-x86-64.so.2\0";
    let Some(at) = bytes.windows(loader.len()).position(|window| window == loader) else {
        return; // another architecture
    };
    bytes[at + loader.len() - 2] = b'9';
    fs::write(pack.path("bin/ringtune"), bytes).unwrap();
    let ran = pack.run("older", "--only doctor", "", &[]);
    let what = ran.what("programs", "passed");
    assert!(what.contains("started by the loader of the pack"), "{what}");
    // It is the real one, which finds no GPU here.
    assert_eq!(ran.results()[1].0, "doctor", "{:?}", ran.rows);
}
