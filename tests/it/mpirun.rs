//! Ranks that mpirun starts, with gradients over MPI: the bits of one rank, and what becomes of a run when one of them fails.
//!
//! The mpirun is the one on `PATH`, Open MPI's or Hydra's (MPICH): it has to be that of the MPI which was built in. For the one that is not the
//! default, `MPICC=mpicc.mpich` when mpi-sys is built, in a target folder of its own, and a folder first on `PATH` whose `mpirun` executes
//! `mpirun.mpich`.
//!
//! Where the program was built without MPI each says `skipped: …`. That is a failure with `RINGTUNE_NO_SKIP=1` where it could have been
//! built with one: a machine without MPI lacks nothing that it needs.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::ringrun_program::{Training, processes, ringrun, run, succeed, wait_until};
use crate::runs::{metrics, rows, same_file};
use crate::skip::skipped;

const ADAPTER: &str = "adapter_model.safetensors";

/// Whether MPI is there, or a line that it is not.
pub fn is_there() -> bool {
    let there = |program: &str| Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success());
    let built = ringtune::comm::mpi::library().is_some();
    if built && there("mpirun") {
        return true;
    }
    let why = if built { "there is no mpirun" } else { "the program was built without MPI" };
    let features = Command::new("scripts/features.sh").env_remove("MPI").output().unwrap();
    skipped(why, !built && !features.stdout.is_empty());
    false
}

/// As root, with more ranks than cores, without the copies between processes that containers forbid.
fn prepared(c: &mut Command) {
    c.env("RINGTUNE_TRANSPORT", "mpi");
    c.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    c.env("OMPI_MCA_btl_vader_single_copy_mechanism", "none");
    c.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
}

pub fn mpirun(t: &Training, out: &str, ranks: usize) -> Command {
    let mut c = started(ranks);
    c.args(t.words(out, ranks));
    prepared(&mut c);
    c
}

/// Whether the mpirun is Hydra.
pub fn is_hydra() -> bool {
    let version = Command::new("mpirun").arg("--version").output().unwrap().stdout;
    String::from_utf8_lossy(&version).contains("HYDRA")
}

/// mpirun with the program, without its words. Hydra knows no slots.
fn started(ranks: usize) -> Command {
    let mut c = Command::new("mpirun");
    if !is_hydra() {
        c.arg("--oversubscribe");
    }
    c.args(["-np", &ranks.to_string(), env!("CARGO_BIN_EXE_ringtune")]);
    c
}

#[test]
fn four_ranks_give_the_bits_of_one() {
    if !is_there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training { flags: vec!["--lora_dropout", "0.1", "--lora_r", "4"], ..Training::new(dir.path(), 8) };
    succeed(t.alone("one"));
    succeed(mpirun(&t, "four", 4));
    let (one, four) = (dir.path().join("one"), dir.path().join("four"));
    same_file(&one.join(ADAPTER), &four.join(ADAPTER));
    let moments = "checkpoint-8/optimizer.safetensors";
    same_file(&one.join(moments), &four.join(moments));
    assert_eq!(metrics(&one), metrics(&four));
    // ringrun composes the command and watches over each rank; all weights, and steps with empty micro-batches.
    let t = Training { flags: vec!["--no_lora", "--no_packing"], micro_batches: 6, ..Training::new(dir.path(), 6) };
    succeed(t.alone("one-full"));
    let mut c = Command::new(ringrun());
    c.args(["--engine", "mpirun", "-n", "3", "--oversubscribe", "--allow-run-as-root", "ringtune"])
        .args(t.words("three", 3));
    prepared(&mut c);
    succeed(c);
    same_file(&dir.path().join("one-full/model.safetensors"), &dir.path().join("three/model.safetensors"));
    wait_until("no process is left", || processes(&dir.path().display().to_string()).is_empty());
}

#[test]
fn a_killed_rank_is_named() {
    if !is_there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training::new(dir.path(), 9);
    let begun = Instant::now();
    let mut c = mpirun(&t, "out", 4);
    c.env("RINGTUNE_FAULT", "rank=2 step=4 at=backward:1 do=kill");
    let (code, stderr) = run(c);
    assert!(code.is_some_and(|c| c != 0), "{stderr}");
    // Hydra kills the others before they have heard of it, and says itself which process it was.
    let named = stderr.contains("rank 2 on host ") && stderr.contains("connection closed: killed or crashed");
    assert!(named || is_hydra(), "{stderr}");
    // With a parent of its own for each rank it is known where it was, and how it ended.
    let mut c = Command::new(ringrun());
    c.args(["--engine", "mpirun", "-n", "2", "--oversubscribe", "--allow-run-as-root", "ringtune"])
        .args(t.words("out", 2));
    c.args(["--resume_from_checkpoint", "auto"]).env("RINGTUNE_FAULT", "rank=1 step=4 at=backward:1 do=kill");
    prepared(&mut c);
    let (code, stderr) = run(c);
    let last = stderr.lines().last().unwrap_or_default();
    assert_eq!(code, Some(137), "{stderr}");
    assert!(
        last.contains("rank 1 on host ") && last.ends_with("step 4, backward, layer 1: killed by SIGKILL"),
        "{stderr}"
    );
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    wait_until("no process is left", || processes(&dir.path().display().to_string()).is_empty());
}

#[test]
fn sums_over_mpi_are_measured() {
    if !is_there() {
        return;
    }
    let mut c = started(2);
    c.args(["bench", "collectives", "--json"]);
    prepared(c.args(["--seconds", "0", "--min-bytes", "64KiB", "--max-bytes", "64MiB", "--factor", "1024"]));
    let output = c.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let v: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let transport = v["transport"].as_str().unwrap();
    assert!(transport.starts_with("MPI (") && transport.contains(&ringtune::comm::mpi::library().unwrap()), "{v:#}");
    assert_eq!(v["cases"].as_array().unwrap().len(), 6, "{v:#}");
}

/// As srun starts them without a plug-in for MPI: each finds itself alone.
#[test]
fn ranks_that_mpi_does_not_know_are_refused() {
    if !is_there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let t = Training::new(dir.path(), 2);
    let children = ["0", "1"].map(|rank| {
        let mut c = t.two("out");
        prepared(&mut c);
        c.envs([("SLURM_PROCID", rank), ("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_LOCALID", rank), ("PMIX_RANK", rank)]);
        c.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port)]);
        c.spawn().unwrap()
    });
    let outputs = children.map(|c| c.wait_with_output().unwrap());
    let stderr: String = outputs.iter().map(|o| String::from_utf8_lossy(&o.stderr).into_owned()).collect();
    assert!(outputs.iter().all(|o| !o.status.success()), "{stderr}");
    assert!(stderr.contains("MPI sees 1 rank where 2 were started") && stderr.contains("srun --mpi=pmix"), "{stderr}");
}

/// What another MPI's mpirun sets in the environment of its ranks, who are alone as far as the MPI in the program knows: without a word about
/// what carries gradients they take sockets and say so, and train together; none trains alone and writes what another one writes too.
#[test]
fn ranks_of_another_mpi_s_launcher_take_sockets() {
    if !is_there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training::new(dir.path(), 3);
    succeed(t.alone("one"));
    let open_mpi = ringtune::comm::mpi::library().unwrap().starts_with("Open MPI");
    let other = match open_mpi {
        true => ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
        false => {
            ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"]
        }
    };
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    for (transport, out) in [("auto", "auto"), ("mpi", "asked")] {
        let children = ["0", "1"].map(|rank| {
            let mut c = t.two(out);
            prepared(&mut c);
            c.env("RINGTUNE_TRANSPORT", transport).envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port)]);
            c.envs(other.into_iter().zip([rank, "2", rank, "2"])).spawn().unwrap()
        });
        let outputs = children.map(|c| c.wait_with_output().unwrap());
        let stderr: String = outputs.iter().map(|o| String::from_utf8_lossy(&o.stderr).into_owned()).collect();
        if transport == "mpi" {
            assert!(outputs.iter().all(|o| !o.status.success()), "{stderr}");
            assert!(stderr.contains("MPI sees 1 rank where 2 were started"), "{stderr}");
            assert!(!dir.path().join(out).join(ADAPTER).exists());
        } else {
            assert!(outputs.iter().all(|o| o.status.success()), "{stderr}");
            assert_eq!(stderr.matches("does not speak to that: gradients travel over sockets").count(), 1, "{stderr}");
            same_file(&dir.path().join("one").join(ADAPTER), &dir.path().join(out).join(ADAPTER));
        }
    }
}
