//! Ranks that an mpirun starts for ringrun, which has a stand-in here: one that ends nothing by itself.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::ringrun::{ADAPTER, logged, same};
use crate::ringrun_program::{Training, processes, succeed, wait_until};
use crate::runs::rows;

/// `-np N … PROGRAM`, as Open MPI's; where it is asked to it stays when its ranks have ended, whatever it is told.
const MPIRUN: &str = r#"#!/bin/sh
[ "$1" = --version ] && { echo "mpirun (Open MPI) 4.1.4"; exit 0; }
while [ $# -gt 0 ]; do
    case $1 in
    -np) n=$2; shift 2 ;;
    --host | --map-by | --bind-to | -x) shift 2 ;;
    *) break ;;
    esac
done
trap '' TERM
rank=0
while [ $rank -lt $n ]; do
    OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_SIZE=$n OMPI_COMM_WORLD_LOCAL_RANK=$rank OMPI_COMM_WORLD_LOCAL_SIZE=$n "$@" &
    pids="$pids $!"
    rank=$((rank + 1))
done
code=0
for pid in $pids; do wait $pid || code=$?; done
[ -z "$STAYS" ] || while :; do sleep 1; done
exit $code
"#;

fn under_mpirun(t: &Training, dir: &Path, out: &str) -> Command {
    let path = dir.join("mpirun");
    std::fs::write(&path, MPIRUN).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut c = t.ranks(out, 2, &["--engine", "mpirun"]);
    c.env("PATH", format!("{}:{}", dir.display(), std::env::var("PATH").unwrap())).env("RINGTUNE_TRANSPORT", "socket");
    c
}

/// Nobody continues a rank that is stopped, and an mpirun that lost a rank may wait for ever: both are ended in time, with the default grace
/// of a minute.
#[test]
fn a_run_under_mpirun_is_over_in_time_whatever_is_stopped_or_stays() {
    let ends = |fault: &str, stays: &str, code: i32, words: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        rows(dir.path(), 60);
        let t = Training { flags: vec!["--resume_from_checkpoint", "auto"], ..Training::new(dir.path(), 9) };
        let mut first = under_mpirun(&t, dir.path(), "out");
        first.env("RINGTUNE_FAULT", fault).env("STAYS", stays);
        let begun = Instant::now();
        let mut child = first.spawn().unwrap();
        let out = dir.path().join("out");
        wait_until("the run comes to its fault", || logged(&out) >= 3 || child.try_wait().unwrap().is_some());
        let (since, pace) = (Instant::now(), begun.elapsed() / 4);
        let output = child.wait_with_output().unwrap();
        let (took, stderr) = (since.elapsed(), String::from_utf8_lossy(&output.stderr).into_owned());
        let last = stderr.lines().last().unwrap_or_default();
        assert_eq!(output.status.code(), Some(code), "{fault}:\n{stderr}");
        assert!(last.starts_with("ringrun: rank 1 on host ") && words.iter().all(|w| last.contains(w)), "{stderr}");
        assert!(took < Duration::from_secs(10) + 2 * pace, "{fault}: {took:?}, and {pace:?} a step");
        wait_until("no process is left", || processes(&dir.path().display().to_string()).is_empty());
        succeed(under_mpirun(&t, dir.path(), "out"));
        succeed(t.alone("one"));
        same(&dir.path().join("one"), &out, ADAPTER, 9);
    };
    std::thread::scope(|scope| {
        let stopped = ["step 4, forward: no sign of life for 5 s"];
        scope.spawn(move || ends("rank=1 step=4 at=forward do=stop", "", 124, &stopped));
        let killed = ["step 4, backward, layer 1: killed by SIGKILL"];
        scope.spawn(move || ends("rank=1 step=4 at=backward:1 do=kill", "1", 137, &killed));
    });
}
