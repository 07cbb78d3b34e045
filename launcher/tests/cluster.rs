//! The examples of configs/cluster: each is read, and what it starts is a command line of ringrun.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use launcher::hosts::{Host, parse_file};
use launcher::options::{Engine, Options, try_parse};
use serde_json::Value;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/cluster").join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(file(name)).unwrap()
}

/// The command in a line of shell, with these values for its variables.
fn command(line: &str, values: &[(&str, &str)]) -> Options {
    let line = values.iter().fold(line.replace("\\\n", " "), |l, (name, value)| l.replace(name, value));
    let words = line.trim_start_matches("exec ").split_whitespace().map(|w| OsString::from(w.trim_matches('"')));
    try_parse(words).unwrap_or_else(|e| panic!("{line}: {e}"))
}

fn json(name: &str) -> Value {
    serde_json::from_str(&text(name)).unwrap()
}

#[test]
fn the_slurm_script_requeues_what_was_saved() {
    assert!(Command::new("sh").arg("-n").arg(file("slurm.sh")).status().unwrap().success());
    let text = text("slurm.sh");
    let line = &text[text.find("\nringrun ").unwrap() + 1..text.find("\ncode=$?").unwrap()];
    let o = command(line, &[("$SLURM_NTASKS", "8")]);
    assert_eq!((o.engine, o.ranks, o.max_restarts), (Engine::Srun, 8, 3));
    assert_eq!(o.program[..2], ["ringtune", "sft"]);
    // What follows the run, with the run's exit code: 75 alone goes back to the queue.
    let after = &text[text.find("\ncode=$?").unwrap()..];
    for (code, requeued) in [(75, true), (0, false), (1, false), (137, false)] {
        let script = format!("scontrol() {{ echo \"$@\"; }}; SLURM_JOB_ID=7; (exit {code}){after}");
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(output.status.code(), Some(code));
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim() == "requeue 7", requeued, "{code}");
    }
}

#[test]
fn the_hostfile_is_read() {
    let host = |name: &str| Host { name: name.into(), slots: 4 };
    assert_eq!(parse_file("hostfile", &text("hostfile")).unwrap(), [host("node1"), host("node2")]);
}

#[test]
fn the_indexed_job_starts_a_ringrun_on_each_machine() {
    let list = json("indexed_job.json");
    let (service, job) = (&list["items"][0], &list["items"][1]["spec"]);
    let pod = &job["template"]["spec"];
    let o = command(pod["containers"][0]["args"][0].as_str().unwrap(), &[("$JOB_COMPLETION_INDEX", "1")]);
    let node = o.node.unwrap();
    assert_eq!((o.engine, o.ranks, node.rank), (Engine::Node, 4, 1));
    assert_eq!((job["completions"].as_u64(), job["parallelism"].as_u64()), (Some(2), Some(node.count as u64)));
    // Pods of a Job answer to NAME-INDEX.SUBDOMAIN where a headless service has the subdomain's name.
    let name = |v: &Value| v["metadata"]["name"].as_str().unwrap().to_string();
    assert_eq!(node.master.0, format!("{}-0.{}", name(&list["items"][1]), pod["subdomain"].as_str().unwrap()));
    assert_eq!((name(service), service["spec"]["clusterIP"].as_str()), ("ringtune".into(), Some("None")));
    assert_eq!(service["spec"]["selector"]["job-name"].as_str().unwrap(), name(&list["items"][1]));
}

#[test]
fn the_mpi_job_starts_mpirun() {
    let spec = json("mpi_job.json");
    let of = |role: &str| spec["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]["containers"][0].clone();
    let line = of("Launcher")["args"][0].as_str().unwrap().to_string();
    let o = command(&line, &[("/etc/mpi/hostfile", &file("hostfile").display().to_string())]);
    assert_eq!((o.engine, o.ranks, o.root, o.max_restarts), (Engine::Mpirun, 8, true, 3));
    assert_eq!(of("Worker")["image"], of("Launcher")["image"], "ranks need the same programs");
}
