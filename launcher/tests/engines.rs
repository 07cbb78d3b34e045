//! Engines of other tools: the commands that are composed, and what becomes of ranks that another program starts.

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::program::{Outcome, outcome, ringrun, shell};

/// A program of this name in a folder, for `PATH`.
fn fake(dir: &Path, name: &str, script: &str) {
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// What is composed where this mpirun is found, without the lines that differ from machine to machine.
fn dry_run(version: &str, words: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    fake(dir.path(), "mpirun", &format!("echo '{version}'"));
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let all = [words, &["--dry-run", "prog", "-x", "a b"]].concat();
    let o = outcome(ringrun(&all).env("PATH", path).spawn().unwrap());
    assert_eq!(o.code, Some(0), "{}", o.stderr);
    let own = env!("CARGO_BIN_EXE_ringrun");
    o.stdout.replace(own, "RINGRUN").replace("RINGTUNE_SECRET='…' RINGTUNE_RESTART=0", "…")
}

#[test]
fn composed_commands() {
    let hosts = ["-H", "a:4,b:4", "-x", "V=1"];
    assert_eq!(
        dry_run("mpirun (Open MPI) 4.1.4", &hosts),
        "V=1 RINGTUNE_CONTROL=127.0.0.1:0 … mpirun --host a:4,b:4 -np 8 --map-by slot --bind-to none -x V -x RINGTUNE_CONTROL \
         -x RINGTUNE_SECRET -x RINGTUNE_RESTART RINGRUN --wrap -- prog -x 'a b'\n"
    );
    let more = [
        "-H",
        "a:1,b:1",
        "-n",
        "4",
        "--oversubscribe",
        "--allow-run-as-root",
        "--bind-to",
        "core",
        "--wdir",
        "/w",
        "--grace",
        "7.5",
    ];
    assert_eq!(
        dry_run("mpirun (Open MPI) 5.0.3", &more),
        "cd /w && RINGTUNE_CONTROL=127.0.0.1:0 … OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 mpirun --host a:2,b:2 \
         -np 4 --map-by slot:OVERSUBSCRIBE --bind-to core -x RINGTUNE_CONTROL -x RINGTUNE_SECRET -x RINGTUNE_RESTART RINGRUN \
         --wrap --grace 7.5 -- prog -x 'a b'\n"
    );
    assert_eq!(
        dry_run("HYDRA build details:", &["--engine", "mpirun", "-n", "2", "--bind-to", "numa"]),
        "RINGTUNE_CONTROL=127.0.0.1:0 … mpirun -n 2 -bind-to numa -genvlist RINGTUNE_CONTROL,RINGTUNE_SECRET,RINGTUNE_RESTART \
         RINGRUN --wrap -- prog -x 'a b'\n"
    );
    assert_eq!(
        dry_run("", &["--engine", "srun", "-n", "16", "--bind-to", "numa"]),
        "RINGTUNE_CONTROL=127.0.0.1:0 … srun --ntasks 16 --kill-on-bad-exit=1 --mpi=none --export=ALL --cpu-bind=ldoms RINGRUN \
         --wrap -- prog -x 'a b'\n"
    );
    let node =
        ["--nnodes", "2", "--node-rank", "1", "--master-addr", "a", "--master-port", "77", "--nproc-per-node", "2"];
    assert_eq!(
        dry_run("", &node).lines().next().unwrap(),
        "RANK=2 WORLD_SIZE=4 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 MASTER_ADDR=a MASTER_PORT=0 RINGTUNE_CONTROL=a:77 … prog \
         -x 'a b'"
    );
    let none = outcome(ringrun(&["-H", "a,b", "prog"]).env("PATH", "/surely/missing").spawn().unwrap());
    assert_eq!(none.code, Some(2));
    assert!(none.last().contains("install Open MPI or MPICH, or use --engine node"), "{}", none.stderr);
}

/// An mpirun that starts its ranks here, as Open MPI's does: `-np N … PROGRAM`.
const MPIRUN: &str = r#"
[ "$1" = --version ] && { echo "mpirun (Open MPI) 4.1.4"; exit 0; }
while [ $# -gt 0 ]; do
    case $1 in
    -np) n=$2; shift 2 ;;
    --host | --map-by | --bind-to | -x) shift 2 ;;
    *) break ;;
    esac
done
rank=0
while [ $rank -lt $n ]; do
    OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_SIZE=$n OMPI_COMM_WORLD_LOCAL_RANK=$rank OMPI_COMM_WORLD_LOCAL_SIZE=$n "$@" &
    pids="$pids $!"
    rank=$((rank + 1))
done
code=0
for pid in $pids; do wait $pid || code=$?; done
exit $code
"#;

fn under_mpirun(script: &str) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    fake(dir.path(), "mpirun", MPIRUN);
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let words = ["--engine", "mpirun", "-n", "2", "--grace", "2", "sh", "-c", script];
    outcome(ringrun(&words).env("PATH", path).spawn().unwrap())
}

#[test]
fn ranks_that_mpirun_starts_are_watched_by_their_parents() {
    let o = under_mpirun("echo $RANK of $WORLD_SIZE on $LOCAL_RANK");
    let mut lines: Vec<&str> = o.stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!((o.code, lines), (Some(0), vec!["0 of 2 on 0", "1 of 2 on 1"]), "{}", o.stderr);
    let o = under_mpirun("[ $RANK = 0 ] || kill -9 $$; sleep 0.2");
    assert_eq!(o.code, Some(137), "{}", o.stderr);
    assert!(o.last().contains("rank 1 on host") && o.last().ends_with("killed by SIGKILL"), "{}", o.stderr);
}

/// Two machines that are one here, a ringrun each.
#[test]
fn one_ringrun_on_each_machine() {
    let run = |script: &str| -> Vec<Outcome> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port().to_string();
        let words =
            |rank| ["--nnodes", "2", "--node-rank", rank, "--rdzv-endpoint", "127.0.0.1:", "--nproc-per-node", "1"];
        let start = |rank| {
            let mut all = words(rank).map(String::from);
            all[5] += &port;
            let all: Vec<&str> = all.iter().map(String::as_str).chain(["sh", "-c", script]).collect();
            ringrun(&all).spawn().unwrap()
        };
        // Both at once: neither waits for the other.
        [start("0"), start("1")].map(outcome).into()
    };
    let both = run("echo $RANK of $WORLD_SIZE in $GROUP_RANK");
    assert!(both.iter().all(|o| o.code == Some(0)), "{}{}", both[0].stderr, both[1].stderr);
    assert!(both[0].stdout == "0 of 2 in 0\n" && both[1].stdout == "[1] 1 of 2 in 1\n", "{}", both[1].stdout);
    // The second waits for the first, whose hub then hears of it.
    let port = "while ! (exec 3<>/dev/tcp/127.0.0.1/${RINGTUNE_CONTROL##*:}) 2>/dev/null; do sleep 0.01; done";
    let both = run(&format!("[ $RANK = 0 ] && sleep 100; bash -c '{port}'; kill -9 $$"));
    for o in &both {
        assert_eq!(o.code, Some(137), "{}", o.stderr);
        assert!(o.last().contains("rank 1 on host") && o.last().ends_with("killed by SIGKILL"), "{}", o.stderr);
    }
}

/// The hub of the first machine tells the ranks of the others that the run has failed; one that is stopped does not hear it.
#[test]
fn a_machine_ends_what_has_not_heard_that_the_run_is_over() {
    let node = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", "9"];
    let script = "[ $RANK = 2 ] && exit 76; kill -STOP $$; sleep 100";
    let words = ["--nproc-per-node", "2", "--oversubscribe", "--grace", "0.2", "sh", "-c", script];
    let begun = std::time::Instant::now();
    let o = outcome(ringrun(&[&node[..], &words].concat()).spawn().unwrap());
    assert_eq!((o.code, o.stderr.contains("rank 3")), (Some(76), false), "{}", o.stderr);
    assert!(begun.elapsed() < std::time::Duration::from_secs(60));
}

/// The ringrun of the second machine ends as that of the first one does, with its cause, though its only rank hears nothing: it is
/// stopped, or a program that knows of no hub.
#[test]
fn every_machine_names_the_cause_and_none_waits_for_a_rank_that_is_stopped() {
    for stopped in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let up = dir.path().join("up").display().to_string();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port().to_string();
        let stop = if stopped { "kill -STOP $$; " } else { "" };
        let script = format!(
            "[ $RANK = 1 ] && {{ touch {up}; {stop}exec sleep 1000; }}; until [ -e {up} ]; do sleep 0.01; done; exit 3"
        );
        let start = |rank: &str| {
            let node = ["--nnodes", "2", "--node-rank", rank, "--master-addr", "127.0.0.1", "--master-port", &port];
            // Longer than this test waits.
            let words = ["--nproc-per-node", "1", "--grace", "1000", "sh", "-c", &script];
            ringrun(&[&node[..], &words].concat()).spawn().unwrap()
        };
        let begun = std::time::Instant::now();
        for o in [start("0"), start("1")].map(outcome) {
            assert_eq!(o.code, Some(3), "{}", o.stderr);
            assert!(
                o.last().contains("rank 0 on host ") && o.last().ends_with(": ended with exit code 3"),
                "{}",
                o.stderr
            );
        }
        assert!(begun.elapsed() < std::time::Duration::from_secs(60), "nobody waited for the rank that does nothing");
    }
}

#[test]
fn a_wrapper_without_a_launcher_says_so() {
    let o = shell(&["--wrap"], "exit 0");
    assert_eq!((o.code, o.last()), (Some(2), "ringrun: --wrap: no launcher says which rank this is"));
}
