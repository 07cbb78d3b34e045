//! Several ranks on GPUs, one process each, over NCCL: the curve of one rank, with the ordered fold its bits; the same weights on all, and a
//! rank that is lost.
//!
//! On the emulator `VGPU_DEVICES` says how many GPUs a rank sees; on a real machine the tests take as many as there are.

mod gathering;
mod memory;
mod plan;
mod refused;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use ringtune::cuda::Cuda;
use ringtune::cuda::nccl::Nccl;
use serde_json::Value;

use crate::skip::{device, skipped};
use crate::train::{BF16, F32, assert_close, losses};

/// Whether this machine can run so many ranks on a GPU each.
fn can_run(ranks: usize) -> bool {
    let Some(dev) = device() else { return false };
    if let Err(e) = Nccl::get() {
        skipped(&e.to_string());
        return false;
    }
    if !dev.properties().emulated && Cuda::count().unwrap() < ranks {
        skipped(&format!("fewer than {ranks} GPUs"));
        return false;
    }
    true
}

fn free_port() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

/// As another launcher starts a rank.
fn as_rank<'a>(c: &'a mut Command, rank: usize, ranks: usize, port: &str) -> &'a mut Command {
    let [own, all] = [rank, ranks].map(|n| n.to_string());
    c.envs([("RANK", &own), ("WORLD_SIZE", &all), ("LOCAL_RANK", &own), ("LOCAL_WORLD_SIZE", &all)]);
    c.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("TORCHELASTIC_RUN_ID", "none")])
}

/// A fine-tuning with so many micro-batches in a step, whatever the number of ranks.
struct Training<'a> {
    dir: &'a Path,
    flags: &'a str,
    /// Of even and odd ranks.
    devices: [&'a str; 2],
    micro_batches: usize,
    /// ChatML, whose control tokens grow the vocabulary, or another one.
    template: &'a str,
}

impl<'a> Training<'a> {
    /// Of four, on GPUs.
    fn of(dir: &'a Path, flags: &'a str) -> Self {
        Self { dir, flags, devices: ["cuda"; 2], micro_batches: 4, template: "chatml" }
    }

    fn command(&self, out: &str, rank: usize, ranks: usize) -> Command {
        let (rows, out) = (self.dir.join("rows.jsonl"), self.dir.join(out));
        let mut command = Command::new(crate::skip::program());
        command.current_dir(crate::skip::root()).env("RINGTUNE_CACHE", crate::skip::scratch());
        command.args(["sft", "--model-path", "tests/data/model/tiny-llama-tied", "--seed", "7"]);
        command.args(["--device", self.devices[rank % 2]]);
        command.arg("--dataset-paths").arg(rows).arg("--output-dir").arg(out);
        command.args(["--prompt-template", self.template]);
        let common = "--per-device-train-batch-size 2 --max-seq-len 64 --no-tensorboard";
        command
            .args(common.split(' '))
            .args(["--gradient-accumulation-steps", &(self.micro_batches / ranks).to_string()]);
        command.args(self.flags.split(' ')).env("VGPU_DEVICES", ranks.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// As another launcher starts ranks: rank 0 holds the hub.
    fn ranks(&self, out: &str, ranks: usize, more: impl Fn(&mut Command, usize)) -> Vec<Child> {
        let port = free_port();
        let start = |rank: usize| {
            let mut c = self.command(out, rank, ranks);
            as_rank(&mut c, rank, ranks, &port);
            more(&mut c, rank);
            c.spawn().unwrap()
        };
        (0..ranks).map(start).collect()
    }

    fn succeed(&self, out: &str, ranks: usize) -> PathBuf {
        self.succeed_saying(out, ranks, "").0
    }

    /// Every rank works in another order. Also what the main rank says.
    fn succeed_saying(&self, out: &str, ranks: usize, more: &str) -> (PathBuf, String) {
        let outputs = ended(self.ranks(out, ranks, |c, rank| {
            c.args(more.split_whitespace()).env("VGPU_SEED", (10 * ranks + rank).to_string());
        }));
        for (rank, output) in outputs.iter().enumerate() {
            assert!(output.status.success(), "rank {rank} of {out}: {}", text(output));
        }
        (self.dir.join(out), text(&outputs[0]))
    }
}

fn ended(children: Vec<Child>) -> Vec<Output> {
    children.into_iter().map(|c| c.wait_with_output().unwrap()).collect()
}

fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

fn rows(dir: &Path) {
    let all = std::fs::read_to_string(crate::skip::root().join("data/demo/chat.jsonl")).unwrap();
    let rows: Vec<&str> = all.lines().take(60).collect();
    std::fs::write(dir.join("rows.jsonl"), rows.join("\n") + "\n").unwrap();
}

/// What a run has written of its losses, norms and evaluations, times left out.
fn figures(run: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let of = |v: Value| {
        let named = ["step", "loss", "grad_norm", "eval_loss", "eval_mean_token_accuracy"]
            .map(|name| format!("{name} {}", v[name]));
        named.join(", ")
    };
    lines.map(of).collect()
}

/// That a run wrote what another did, to the bit.
fn same(what: &str, ours: &Path, one: &Path) {
    assert_eq!(figures(ours), figures(one), "{what}");
    let weights = |run: &Path| {
        let names = ["model.safetensors", "adapter_model.safetensors"].map(|name| run.join(name));
        std::fs::read(names.iter().find(|path| path.is_file()).unwrap()).unwrap()
    };
    assert!(weights(ours) == weights(one), "{what}: other weights");
}

/// A trace has what NCCL did on every rank in every step, in a row of its own, one thing after the other and within the step.
fn traced(path: &Path, ranks: usize, steps: u64, expected: &[&str]) {
    let events: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let time = |e: &Value| (e["ts"].as_f64().unwrap(), e["ts"].as_f64().unwrap() + e["dur"].as_f64().unwrap());
    for rank in 0..ranks {
        let of = |row: u64| events.iter().filter(move |e| e["pid"] == rank && e["tid"] == row);
        let times: Vec<(f64, f64)> = of(2).map(time).collect();
        assert!(times.windows(2).all(|w| w[0].1 <= w[1].0 + 2.0), "rank {rank}: {times:?}");
        for name in expected {
            let n = of(2).filter(|e| e["name"] == *name).count() as u64;
            assert!(n >= steps && n.is_multiple_of(steps), "rank {rank}: {n} of {name} in {steps} steps");
        }
        // Weights are gathered while the host is on its way to the next step; sums are there before the update.
        let all = |row: u64, name: &str| of(row).filter(|e| e["name"] == name).map(time).collect::<Vec<_>>();
        let (reduced, begun, ended) = (all(2, "reduce"), all(0, "backward")[0].0, all(0, "update").last().unwrap().1);
        let (first, last) = (reduced[0].0, reduced[reduced.len() - 1].1);
        assert!(begun <= first + 2000.0 && last <= ended + 2000.0, "{begun} {first} to {last} {ended}");
    }
}

/// The ranks compare the bits of their weights at the start and with every checkpoint: a run that ends had the same ones everywhere.
#[test]
fn ranks_over_nccl_follow_one_rank() {
    if !can_run(4) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path());
    let flags = "--no-lora --learning-rate 2e-3 --max-steps 6 --save-steps 3 --val-fraction 0";
    let one = Training::of(dir.path(), flags).succeed("one", 1);
    for (ranks, zero) in [(2, "0"), (4, "1")] {
        let flags = format!("{flags} --transport nccl --zero {zero}");
        let trace = dir.path().join(format!("trace-{zero}"));
        let more = format!("--trace {}", trace.display());
        let (out, said) = Training::of(dir.path(), &flags).succeed_saying(&format!("{ranks}-{zero}"), ranks, &more);
        let expected: &[&str] = if zero == "1" { &["reduce", "share", "gather"] } else { &["reduce"] };
        traced(&trace, ranks, 6, expected);
        assert_close(&format!("{ranks} ranks, ZeRO {zero}"), &losses(&out), &losses(&one), F32);
        assert!(said.contains("gradients are summed once a step: the last bits depend on"), "{said}");
    }
    // Sharded state of GPUs goes on with any number of them.
    let resume = format!("{flags} --resume-from-checkpoint {}", dir.path().join("4-1/checkpoint-3").display());
    let again = Training::of(dir.path(), &resume).succeed("again", 2);
    let whole = [&losses(&dir.path().join("4-1"))[..3], &losses(&again)].concat();
    assert_close("resumed on two ranks", &whole, &losses(&one), F32);
}

/// Low-rank updates with dropout in bf16, with evaluations, summed once a step.
#[test]
fn updates_in_bf16_over_nccl_follow_one_rank() {
    if !can_run(2) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path());
    let flags = "--learning-rate 2e-2 --max-steps 4 --lora-r 8 --lora-dropout 0.1 --mixed-precision bf16 --val-fraction 0.2 \
                 --eval-strategy steps --eval-steps 2";
    let one = Training::of(dir.path(), flags).succeed("one", 1);
    for zero in ["0", "1"] {
        let out = Training::of(dir.path(), flags).succeed_saying(zero, 2, &format!("--zero {zero}")).0;
        let all = [&out, &one].map(|run| {
            let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
            let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            let each = lines.filter_map(|v| v["loss"].as_f64().or(v["eval_loss"].as_f64()));
            each.collect::<Vec<f64>>()
        });
        assert!(all[0].len() == 6 && all[1].len() == 6, "{all:?}");
        assert_close(&format!("bf16, ZeRO {zero}"), &all[0], &all[1], BF16);
    }
}

/// One order of sums: full, on any number of GPUs and orders of work, with sharded state and without.
#[test]
fn the_ordered_fold_gives_the_bits_of_one_rank() {
    if !can_run(3) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path());
    let flags = "--no-lora --learning-rate 2e-3 --max-steps 2 --val-fraction 0 --save-strategy no";
    let training = Training { micro_batches: 6, ..Training::of(dir.path(), flags) };
    let one = training.succeed("one", 1);
    for (ranks, zero) in [(2, "1"), (3, "0")] {
        let more = format!("--fold micro_batch --transport nccl --zero {zero}");
        let (out, said) = training.succeed_saying(&format!("{ranks}"), ranks, &more);
        same(&format!("{ranks} ranks, ZeRO {zero}"), &out, &one);
        assert!(said.contains("gradients are folded in order after every micro-batch"), "{said}");
    }
}

/// Low-rank updates with dropout in bf16, evaluated; interrupted on four ranks with sharded state, gone on with by two that hold it whole; the
/// last step of an epoch has micro-batches for some ranks alone.
#[test]
fn the_ordered_fold_keeps_the_bits_over_a_resume_on_fewer_ranks() {
    if !can_run(4) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path());
    let flags = "--learning-rate 2e-3 --num-train-epochs 1 --lora-r 8 --lora-dropout 0.1 --mixed-precision bf16 --val-fraction 0.1 \
                 --eval-strategy steps --eval-steps 2 --save-steps 2 --packing";
    let one = Training::of(dir.path(), flags).succeed("one", 1);
    let training = Training::of(dir.path(), flags);
    let four = training.succeed_saying("four", 4, "--fold micro_batch --zero 1").0;
    same("four ranks, ZeRO 1", &four, &one);
    let from = four.join("checkpoint-2");
    let more = format!("--fold micro_batch --zero 0 --resume-from-checkpoint {}", from.display());
    let two = training.succeed_saying("two", 2, &more).0;
    let all = figures(&one);
    let after = all.iter().position(|line| line.starts_with("step 3,")).unwrap();
    assert_eq!(figures(&two), all[after..]);
    let weights = [&two, &one].map(|run| std::fs::read(run.join("adapter_model.safetensors")).unwrap());
    assert!(weights[0] == weights[1], "other weights after the resume");
}

/// What the main one of so many ranks asks of the driver in a step, once all is ready.
fn calls_of_a_step(dir: &Path, ranks: usize, more: &str) -> impl Fn(&str) -> f64 {
    let run = |steps: u64| {
        let flags = format!("--no-lora --val-fraction 0 --save-strategy no --max-steps {steps} --quiet {more}");
        let training = Training { micro_batches: 2 * ranks, ..Training::of(dir, &flags) };
        let out = format!("{ranks} {more} {steps}").replace(' ', "_");
        let outputs = ended(training.ranks(&out, ranks, |c, rank| {
            if rank == 0 {
                c.env("VGPU_CALLS", "1");
            }
        }));
        let said = text(&outputs[0]);
        assert!(outputs.iter().all(|o| o.status.success()), "{said}");
        let names = said.lines().filter_map(|l| l.strip_prefix("vgpu: ")).filter_map(|l| l.split(' ').next());
        let mut count = BTreeMap::<String, usize>::new();
        names.for_each(|name| *count.entry(name.into()).or_default() += 1);
        count
    };
    let (few, many) = (run(1), run(3));
    move |name| {
        let of = |calls: &BTreeMap<String, usize>| calls.get(name).copied().unwrap_or(0) as f64;
        (of(&many) - of(&few)) / 2.0
    }
}

/// A step of ranks waits once and takes no memory, with sharded state too; once a step, buckets are summed and gathered where they lie.
#[test]
fn a_step_of_ranks_waits_once_and_moves_no_bucket() {
    if !can_run(2) || !device().is_some_and(|dev| dev.properties().emulated) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path());
    let alone = calls_of_a_step(dir.path(), 1, "--zero 0")("cuMemcpyDtoDAsync_v2");
    for more in ["--zero 0", "--zero 1", "--zero 1 --fold micro_batch"] {
        let each = calls_of_a_step(dir.path(), 2, more);
        // Each wait is for a copy to the host; the emulated NCCL waits for streams itself, to have them run.
        let waits = ["cuMemcpyDtoHAsync_v2", "cuEventSynchronize", "cuCtxSynchronize"].map(&each);
        assert_eq!((waits, each("cuMemcpyHtoDAsync_v2")), ([1.0, 0.0, 0.0], 2.0), "{more}");
        for name in ["cuMemAllocAsync", "cuMemFreeAsync", "cuModuleLoadData", "cuModuleGetFunction"] {
            assert_eq!(each(name), 0.0, "{more}: {name}");
        }
        let moved = each("cuMemcpyDtoDAsync_v2") - alone;
        // A fold has a bucket copied once, as two slots, for each of its two micro-batches, and the sums to the gradients.
        assert_eq!(moved, if more.contains("fold") { 2.0 * 2.0 + 1.0 } else { 0.0 }, "{more}");
    }
}
