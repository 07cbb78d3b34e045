//! Several ranks as processes: the bits of one, and what becomes of a run when one of them fails.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ringtune::checkpoint::manifest;

use crate::ringrun_program::{Training, processes, ringrun, run, succeed, wait_for_lines, wait_until};
use crate::runs::{losses, metrics, rows, same_file};

pub const ADAPTER: &str = "adapter_model.safetensors";

/// Two runs ended in the same place: weights, moments, log lines.
pub fn same(a: &Path, b: &Path, weights: &str, steps: u64) {
    same_file(&a.join(weights), &b.join(weights));
    let last = format!("checkpoint-{steps}/optimizer.safetensors");
    same_file(&a.join(&last), &b.join(&last));
    assert_eq!(metrics(a), metrics(b), "{}", b.display());
}

#[test]
fn two_and_four_ranks_give_the_bits_of_one() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training { flags: vec!["--lora_dropout", "0.1", "--lora_r", "4"], ..Training::new(dir.path(), 8) };
    succeed(t.alone("one"));
    for n in [1, 2, 4] {
        let out = format!("ranks-{n}");
        succeed(t.ranks(&out, n, &[]));
        same(&dir.path().join("one"), &dir.path().join(&out), ADAPTER, 8);
    }
    assert_eq!(processes(&dir.path().display().to_string()), []);
}

/// Rows that are not packed, all weights, the tied embedding among them; six micro-batches, and four of the last step are empty.
#[test]
fn three_ranks_train_all_weights_to_the_bits_of_one() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 34);
    let flags = vec!["--no_lora", "--no_packing"];
    let t = Training { flags, micro_batches: 6, ..Training::new(dir.path(), 6) };
    succeed(t.alone("one"));
    succeed(t.ranks("three", 3, &[]));
    same(&dir.path().join("one"), &dir.path().join("three"), "model.safetensors", 6);
}

/// The state on two ranks, each with a file of its own, is the state of one; whoever goes on from either comes to the same end.
#[test]
fn state_that_lies_on_ranks_gives_the_bits_of_one_and_is_resumed_by_any_number() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let at = |name: &str| dir.path().join(name);
    let with = |flags: &[&'static str]| {
        let flags = [&["--lora_dropout", "0.1", "--mixed_precision", "bf16"][..], flags].concat();
        Training { flags, ..Training::new(dir.path(), 8) }
    };
    let ends_alike = |out: &str| {
        same_file(&at("one").join(ADAPTER), &at(out).join(ADAPTER));
        let (one, other) = (metrics(&at("one")), metrics(&at(out)));
        assert_eq!(one[one.len() - other.len()..], other, "{out}");
    };
    succeed(with(&[]).alone("one"));
    succeed(with(&["--zero", "1"]).ranks("two", 2, &[]));
    ends_alike("two");
    let files = |n: u64| manifest::verify(&manifest::path_of(&at("two"), n)).unwrap().files;
    let of_ranks: Vec<String> = files(6).into_keys().filter(|name| name.starts_with("optimizer")).collect();
    assert_eq!(of_ranks, ["optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"]);
    let from = |out: &str, n: u64| manifest::path_of(&at(out), n).display().to_string();
    for (out, ranks, from, zero) in
        [("four", 4, from("two", 6), "1"), ("alone", 1, from("two", 3), "0"), ("again", 2, from("one", 3), "1")]
    {
        let t = with(&["--zero", zero]);
        let mut command = t.ranks(out, ranks, &[]);
        command.args(["--resume_from_checkpoint", &from]);
        succeed(command);
        ends_alike(out);
    }
    let moments = "checkpoint-8/optimizer.safetensors";
    same_file(&at("one").join(moments), &at("alone").join(moments));
}

/// The last step that a run has logged.
pub fn logged(out: &Path) -> u32 {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
    let steps = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_u64());
    steps.max().unwrap_or(0) as u32
}

/// SIGTERM reaches the ranks at different moments; all save and stop after the same step.
#[test]
fn a_signal_saves_on_all_ranks_after_the_same_step() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    for signal in [libc::SIGTERM, libc::SIGUSR1] {
        let out = format!("out-{signal}");
        let t = Training { flags: vec!["--resume_from_checkpoint", "auto"], ..Training::new(dir.path(), 200) };
        let mut child = t.ranks(&out, 2, &[]).spawn().unwrap();
        wait_for_lines(&mut child, &dir.path().join(&out), 4);
        // SAFETY: the child is ours and not yet waited for, so its id is not reused.
        assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(75), "{stderr}");
        assert!(stderr.lines().last().unwrap().contains("all ranks stopped with their state saved"), "{stderr}");
        let (step, path) = manifest::list(&dir.path().join(&out)).unwrap().pop().unwrap();
        manifest::verify(&path).unwrap();
        assert!(step < 200 && stderr.contains(&format!("after step {step}, state saved")), "{stderr}");
        assert_eq!(processes(&dir.path().display().to_string()), []);
    }
}

/// SIGUSR2 reaches the ranks at different moments too; all save after the same step and go on.
#[test]
fn a_signal_saves_and_the_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let (out, t) = (dir.path().join("out"), Training::new(dir.path(), 100_000));
    let mut child = t.ranks("out", 2, &[]).spawn().unwrap();
    wait_for_lines(&mut child, &out, 2);
    let kill = |signal| {
        // SAFETY: the child is ours and not yet waited for, so its id is not reused.
        assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
    };
    let logged = || std::fs::read_to_string(out.join("metrics.jsonl")).unwrap().lines().count();
    let mut asked = 0;
    let mut saved = 0;
    // One in three falls on a step that is saved anyway.
    wait_until("a checkpoint between those that are due", || {
        if logged() > asked + 1 {
            asked = logged();
            kill(libc::SIGUSR2);
        }
        let between = manifest::list(&out).unwrap().into_iter().find(|(step, _)| step % 3 != 0);
        saved = between.as_ref().map_or(0, |(step, _)| *step);
        between.is_some_and(|(_, path)| manifest::verify(&path).is_ok())
    });
    let steps = logged();
    wait_until("the run goes on", || logged() > steps + 3);
    kill(libc::SIGTERM);
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(75), "{stderr}");
    assert!(saved > 0 && stderr.contains("SIGUSR2: saving after this step, then going on"), "{stderr}");
}

/// The spans of all ranks in one file, a process each.
#[test]
fn a_trace_has_all_ranks() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let path = dir.path().join("trace.json").display().to_string();
    let t = Training { flags: vec!["--trace", &path], ..Training::new(dir.path(), 3) };
    succeed(t.ranks("out", 2, &[]));
    let text = std::fs::read_to_string(&path).unwrap();
    let events: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    for rank in [0, 1] {
        for step in 1..=3 {
            let of = |e: &&serde_json::Value| e["pid"] == rank && e["args"]["step"] == step && e["name"] == "backward";
            assert!(events.iter().any(|e| of(&e)), "no backward of rank {rank} in step {step}");
            // What the thread of the collectives did lies in a row of its own, by buckets.
            let own = |name: &str| -> Vec<f64> {
                let of = |e: &&serde_json::Value| {
                    e["pid"] == rank && e["tid"] == 2 && e["name"] == name && e["args"]["step"] == step
                };
                events.iter().filter(of).map(|e| e["args"]["bucket"].as_f64().unwrap()).collect()
            };
            let mut reduced = own("reduce");
            reduced.sort_by(f64::total_cmp);
            reduced.dedup();
            assert!(!reduced.is_empty(), "no reduction of rank {rank} in step {step}");
            assert_eq!(own("collect"), reduced, "sums of rank {rank} in step {step}");
        }
        let spans = events.iter().filter(|e| e["pid"] == rank && e["tid"] == 2);
        let times: Vec<(f64, f64)> = spans.map(|e| (e["ts"].as_f64().unwrap(), e["dur"].as_f64().unwrap())).collect();
        // One thread does one thing after the other.
        assert!(times.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0 + 0.01), "{times:?}");
    }
    assert!(!dir.path().join("trace.json.1").exists());
}

/// Sums between ranks are verified and timed; bandwidths are those of nccl-tests.
#[test]
fn collectives_are_measured_between_ranks() {
    let mut c = Command::new(ringrun());
    c.args(["-n", "3", "--oversubscribe", "ringtune", "bench", "collectives", "--json", "--seconds", "0"]);
    let output = c.args(["--max-bytes", "1MiB", "--factor", "32"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let v: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&v["ranks"], &v["transport"]), (&3.into(), &"Unix sockets".into()));
    let cases = v["cases"].as_array().unwrap();
    let bytes: Vec<u64> = cases.iter().map(|s| s["bytes"].as_u64().unwrap()).collect();
    assert_eq!(bytes, [1 << 10, 1 << 15, 1 << 20].repeat(3));
    for s in cases {
        let of = |key: &str| s[key].as_f64().unwrap();
        let algbw = of("bytes") / of("seconds");
        assert!((of("algbw_bytes_per_second") / algbw - 1.0).abs() < 1e-9, "{s}");
        let passes = if s["collective"] == "all_reduce" { 4.0 / 3.0 } else { 2.0 / 3.0 };
        assert!((of("busbw_bytes_per_second") / algbw - passes).abs() < 1e-9 && s["wrong"] == 0, "{s}");
        assert!(of("seconds_min") <= of("seconds_quartile1") && of("seconds_quartile3") <= of("seconds_max"), "{s}");
    }
    // The same again beside it, for one of the sizes; the file is read on the main rank.
    let dir = tempfile::tempdir().unwrap();
    let before = dir.path().join("before.json");
    std::fs::write(&before, &output.stdout).unwrap();
    let mut c = Command::new(ringrun());
    c.args(["-n", "2", "--oversubscribe", "ringtune", "bench", "collectives", "--json", "--seconds", "0"]);
    let again = c.args(["--max-bytes", "1KiB", "--baseline"]).arg(&before).output().unwrap();
    assert_eq!(again.status.code(), Some(0), "{}", String::from_utf8_lossy(&again.stderr));
    let v: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    let ratios: Vec<f64> =
        v["cases"].as_array().unwrap().iter().filter_map(|c| c["baseline"]["ratio"].as_f64()).collect();
    assert!(ratios.len() == 3 && ratios.iter().all(|r| *r > 0.0), "{v:#}");
    assert_eq!(v["baseline"]["missing"].as_array().unwrap().len(), 6, "{v:#}");
    // One rank has nobody to sum with.
    let alone = Command::new(env!("CARGO_BIN_EXE_ringtune")).args(["bench", "collectives"]).output().unwrap();
    assert_eq!(alone.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&alone.stderr).contains("ringrun -n 4 ringtune bench collectives"));
}

/// Rows of a step over all ranks: micro-batches follow from them, or contradict them.
#[test]
fn rows_of_a_step_over_all_ranks_are_dealt() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let with =
        |rows: &'static str| Training { flags: vec!["--global_batch_size", rows], ..Training::new(dir.path(), 4) };
    succeed(with("8").alone("one"));
    succeed(with("8").ranks("two", 2, &[]));
    same(&dir.path().join("one"), &dir.path().join("two"), ADAPTER, 4);
    for (rows, words) in [
        (
            "12",
            "--global-batch-size 12, which micro-batches of 2 rows on 2 ranks make with 3; leave one of the two out",
        ),
        ("10", "micro-batches of 2 rows on 2 ranks make no step of so many rows; expected 8 or 12"),
    ] {
        let (code, stderr) = run(with(rows).ranks("refused", 2, &[]));
        assert!(code == Some(2) && stderr.contains(words), "{stderr}");
    }
    // Another batch is refused, and what has the one of the checkpoint is named.
    let mut other = Training { micro_batches: 6, ..Training::new(dir.path(), 4) }.ranks("two", 3, &[]);
    other.args(["--resume_from_checkpoint", "auto"]);
    let (code, stderr) = run(other);
    let words = "gradient_accumulation_steps was 4, is 6";
    assert!(code == Some(1) && stderr.contains(words) && stderr.contains("ranks among 1, 2, 4"), "{stderr}");
}

/// Sums once a step are those of one rank where each has one micro-batch.
#[test]
fn sums_once_a_step_train_as_well() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = |flags: &[&'static str]| Training { flags: flags.to_vec(), ..Training::new(dir.path(), 5) };
    succeed(t(&[]).alone("one"));
    succeed(t(&["--fold", "step"]).ranks("four", 4, &[]));
    same(&dir.path().join("one"), &dir.path().join("four"), ADAPTER, 5);
    succeed(t(&["--fold", "step", "--zero", "1"]).ranks("two", 2, &[]));
    let [one, two] = ["one", "two"].map(|out| losses(&dir.path().join(out)));
    assert!(one.iter().zip(&two).all(|(a, b)| (a / b - 1.0).abs() < 1e-4), "{one:?} {two:?}");
    let (code, stderr) = run(t(&["--transport", "nccl"]).ranks("nccl", 2, &[]));
    assert!(code == Some(1) && stderr.contains("--transport nccl: "), "{stderr}");
}

/// Pretraining of a model with a head of its own: evaluations, an epoch's end, ZeRO-1.
#[test]
fn ranks_pretrain_to_the_bits_of_one() {
    let dir = tempfile::tempdir().unwrap();
    let text: Vec<String> =
        (0..90).map(|i| format!("Line {i} of a text that is pretrained on, {} words.", i * 7)).collect();
    let path = dir.path().join("text.txt");
    std::fs::write(&path, text.join("\n\n")).unwrap();
    let config = dir.path().join("small.json");
    std::fs::copy("tests/data/model/tiny-llama-untied/config.json", &config).unwrap();
    let train = |out: &str, ranks: usize, zero: &str| {
        let at = |name: &str| dir.path().join(name).display().to_string();
        let accumulation = (4 / ranks).to_string();
        let (config, path, out, cache) =
            (config.display().to_string(), path.display().to_string(), at(out), at("cache"));
        let words = [
            ["--model_config", &config],
            ["--tokenizer_path", "tests/data/model/tiny-llama-untied"],
            ["--dataset_paths", &path],
            ["--output_dir", &out],
            ["--cache_dir", &cache],
            ["--max_seq_len", "32"],
            ["--per_device_train_batch_size", "2"],
            ["--gradient_accumulation_steps", &accumulation],
            ["--num_train_epochs", "1"],
            ["--eval_steps", "3"],
            ["--threads", "1"],
            ["--zero", zero],
        ];
        let mut command = Command::new(ringrun());
        command.args(["-n", &ranks.to_string(), "--oversubscribe", "ringtune", "pretrain"]);
        command.args(words.iter().flatten()).args(["--quiet", "--no-tensorboard"]);
        let (code, stderr) = run(command);
        assert_eq!(code, Some(0), "{stderr}");
    };
    train("one", 1, "0");
    train("two", 2, "1");
    train("four", 4, "0");
    let at = |out: &str| dir.path().join(out).join("small");
    for out in ["two", "four"] {
        same_file(&at("one").join("final/model.safetensors"), &at(out).join("final/model.safetensors"));
        assert_eq!(metrics(&at("one")), metrics(&at(out)), "{out}");
    }
    assert!(metrics(&at("one")).iter().any(|v| v["eval_loss"].is_number()), "{:?}", metrics(&at("one")));
}

#[test]
fn no_rank_outlives_a_killed_launcher() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let mut child = Training::new(dir.path(), 100_000).ranks("out", 2, &[]).spawn().unwrap();
    wait_for_lines(&mut child, &dir.path().join("out"), 2);
    assert_eq!(processes(&dir.path().display().to_string()).len(), 3);
    let since = Instant::now();
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("the ranks go with their launcher", || processes(&dir.path().display().to_string()).is_empty());
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
}

#[test]
fn a_run_that_is_started_again_goes_on_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training::new(dir.path(), 9);
    let mut command = t.ranks("out", 2, &["--max-restarts", "1", "--restart-backoff", "0.01"]);
    command.env("RINGTUNE_FAULT", "rank=1 step=8 at=forward do=kill");
    let (code, stderr) = run(command);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("step 8, forward: killed by SIGKILL") && stderr.contains("starting again"), "{stderr}");
    succeed(t.alone("one"));
    same(&dir.path().join("one"), &dir.path().join("out"), ADAPTER, 9);
}

/// Two ranks as torchrun starts them, and a port for rank 0's hub.
fn as_of_torchrun(t: &Training, out: &str) -> [Command; 2] {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    ["0", "1"].map(|rank| {
        let mut c = t.two(out);
        c.envs([("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", "2")]);
        c.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port), ("TORCHELASTIC_RUN_ID", "none")]);
        c
    })
}

/// Without ringrun rank 0 holds the hub; there is no page for its parent, and no parent that says what became of a rank.
#[test]
fn other_launchers_start_ranks_too() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training::new(dir.path(), 6);
    succeed(t.alone("one"));
    let children = as_of_torchrun(&t, "two").map(|mut c| c.spawn().unwrap());
    for output in children.map(|c| c.wait_with_output().unwrap()) {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    same(&dir.path().join("one"), &dir.path().join("two"), ADAPTER, 6);
    let [main, other] = as_of_torchrun(&t, "killed").map(|mut c| {
        c.env("RINGTUNE_FAULT", "rank=1 step=4 at=backward do=kill");
        c.spawn().unwrap()
    });
    let other = other.wait_with_output().unwrap();
    // From here on it is dead, and the other one has to notice.
    let since = Instant::now();
    let main = main.wait_with_output().unwrap();
    assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
    let stderr = String::from_utf8_lossy(&main.stderr).into_owned();
    assert_eq!((main.status.code(), other.status.code()), (Some(76), None), "{stderr}");
    assert!(stderr.contains("rank 1 on host ") && stderr.contains("connection closed: killed or crashed"), "{stderr}");
}

/// Weights of ranks that round differently would drift apart in silence.
#[test]
fn ranks_with_other_arithmetic_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let [main, mut other] = as_of_torchrun(&Training::new(dir.path(), 2), "out");
    other.env("RINGTUNE_CPU", "portable");
    let outputs = [main, other].map(|mut c| c.spawn().unwrap()).map(|c| c.wait_with_output().unwrap());
    let stderr: String = outputs.iter().map(|o| String::from_utf8_lossy(&o.stderr).into_owned()).collect();
    if ringtune::cpu::Level::detect().unwrap().name() == "portable" {
        return;
    }
    assert!(outputs.iter().all(|o| !o.status.success()), "{stderr}");
    assert!(stderr.contains("what computes differs between ranks: rank 0 has cpu, "), "{stderr}");
    assert!(stderr.contains(", rank 1 has cpu, portable"), "{stderr}");
}

/// Mistakes that every rank would find are said once, with the exit code of one rank.
#[test]
fn an_error_of_the_main_rank_is_said_once() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training::new(dir.path(), 4);
    succeed(t.ranks("out", 2, &[]));
    let (code, stderr) = run(t.ranks("out", 2, &[]));
    assert_eq!(code, Some(2), "{stderr}");
    assert_eq!(stderr.matches("error: ").count(), 1, "{stderr}");
    assert!(
        stderr.lines().last().unwrap().contains("rank 0 ") && stderr.contains("an earlier run left checkpoints"),
        "{stderr}"
    );
}

/// A batch script's variables make no ranks.
#[test]
fn a_program_in_a_batch_script_is_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let mut command: Command = Training::new(dir.path(), 1).alone("out");
    command.envs([("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0"), ("SLURM_JOB_ID", "5"), ("SLURM_LOCALID", "0")]);
    succeed(command);
}
