//! Several ranks on GPUs, one process each, over NCCL: the curve of one rank, the same weights on all, and a rank that is lost.
//!
//! On the emulator `VGPU_DEVICES` says how many GPUs a rank sees; on a real machine the tests take as many as there are.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ringtune::cuda::Cuda;
use ringtune::cuda::nccl::Nccl;

use crate::skip::{device, skipped};
use crate::train::{F32, assert_close, losses};

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

/// A fine-tuning with a step of four micro-batches.
struct Training<'a> {
    dir: &'a Path,
    flags: &'a str,
}

impl Training<'_> {
    fn command(&self, out: &str, ranks: usize) -> Command {
        let (rows, out) = (self.dir.join("rows.jsonl"), self.dir.join(out));
        let mut command = Command::new(crate::skip::program());
        command.current_dir(crate::skip::root()).env("RINGTUNE_CACHE", crate::skip::scratch());
        command.args(["sft", "--model-path", "tests/data/model/tiny-llama-tied", "--device", "cuda", "--seed", "7"]);
        command.arg("--dataset-paths").arg(rows).arg("--output-dir").arg(out);
        let common =
            "--prompt-template chatml --per-device-train-batch-size 2 --max-seq-len 64 --no-tensorboard --quiet";
        command.args(common.split(' ')).args(["--gradient-accumulation-steps", &(4 / ranks).to_string()]);
        command.args(self.flags.split(' ')).env("VGPU_DEVICES", ranks.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// As another launcher starts ranks: rank 0 holds the hub.
    fn ranks(&self, out: &str, ranks: usize, more: impl Fn(&mut Command, usize)) -> Vec<Child> {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
        let start = |rank: usize| {
            let mut c = self.command(out, ranks);
            let [own, all] = [rank, ranks].map(|n| n.to_string());
            c.envs([("RANK", &own), ("WORLD_SIZE", &all), ("LOCAL_RANK", &own), ("LOCAL_WORLD_SIZE", &all)]);
            c.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port), ("TORCHELASTIC_RUN_ID", "none")]);
            more(&mut c, rank);
            c.spawn().unwrap()
        };
        (0..ranks).map(start).collect()
    }

    fn succeed(&self, out: &str, ranks: usize) -> PathBuf {
        let outputs = ended(self.ranks(out, ranks, |_, _| ()));
        for (rank, output) in outputs.iter().enumerate() {
            assert!(output.status.success(), "rank {rank} of {out}: {}", text(output));
        }
        self.dir.join(out)
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

/// The ranks compare the bits of their weights at the start and with every checkpoint: a run that ends had the same ones everywhere.
#[test]
fn ranks_over_nccl_follow_one_rank() {
    if !can_run(4) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path());
    let flags = "--no-lora --learning-rate 2e-3 --max-steps 6 --save-steps 3";
    let one = Training { dir: dir.path(), flags }.succeed("one", 1);
    for (ranks, zero) in [(2, "0"), (2, "1"), (4, "1")] {
        let flags = format!("{flags} --transport nccl --zero {zero}");
        let out = Training { dir: dir.path(), flags: &flags }.succeed(&format!("{ranks}-{zero}"), ranks);
        assert_close(&format!("{ranks} ranks, ZeRO {zero}"), &losses(&out), &losses(&one), F32);
    }
    // Sharded state of GPUs goes on with any number of them.
    let resume = format!("{flags} --resume-from-checkpoint {}", dir.path().join("4-1/checkpoint-3").display());
    let again = Training { dir: dir.path(), flags: &resume }.succeed("again", 2);
    let whole = [&losses(&dir.path().join("4-1"))[..3], &losses(&again)].concat();
    assert_close("resumed on two ranks", &whole, &losses(&one), F32);
}

#[test]
fn a_lost_rank_is_named_on_the_others() {
    if !can_run(2) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path());
    let training = Training { dir: dir.path(), flags: "--no-lora --max-steps 500 --transport nccl" };
    let mut children = training.ranks("out", 2, |c, _| {
        c.env("RINGTUNE_FAULT", "rank=1 step=3 at=backward:1 do=kill");
    });
    let (lost, mut main) = (children.pop().unwrap(), children.pop().unwrap());
    // The time counts from the death, whatever the machine takes to come so far.
    lost.wait_with_output().unwrap();
    let since = Instant::now();
    let code = loop {
        match main.try_wait().unwrap() {
            Some(status) => break status.code(),
            None => assert!(since.elapsed() < Duration::from_secs(10), "the other rank is still there"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let said = text(&main.wait_with_output().unwrap());
    assert_eq!(code, Some(76), "{said}");
    // Where it was the hub knows from its last heartbeat; ringrun reads it from the page of the dead one.
    assert!(said.contains("rank 1 on host ") && said.contains("connection closed: killed or crashed"), "{said}");
}

#[test]
fn ranks_that_share_a_gpu_are_refused_by_name() {
    if !can_run(2) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path());
    let training = Training { dir: dir.path(), flags: "--max-steps 2" };
    let outputs = ended(training.ranks("out", 2, |c, _| {
        c.env("VGPU_DEVICES", "1").env("CUDA_VISIBLE_DEVICES", "0");
    }));
    let said: String = outputs.iter().map(text).collect();
    assert!(outputs.iter().all(|o| !o.status.success()), "{said}");
    assert!(said.contains("ranks 0 and 1 share a GPU, GPU-"), "{said}");
}
