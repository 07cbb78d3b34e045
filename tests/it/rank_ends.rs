//! Ends of runs of several ranks that were not looked at elsewhere: while the adapter is merged, in an exchange that the others do not make,
//! with another secret, and where a request to stop comes twice.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ringtune::checkpoint::manifest;

use crate::rank_failures::{fails, free_port, started};
use crate::ringrun_program::{Training, processes, ringrun, run, succeed, wait_for_lines, wait_until};
use crate::runs::{rows, same_file};
use crate::skip::skipped;

const MERGED: &str = "merged/model.safetensors";

fn merging<'a>(dir: &'a Path, more: &[&'a str]) -> Training<'a> {
    let flags = [&["--merge_adapters", "--zero", "1", "--resume_from_checkpoint", "auto"], more].concat();
    Training { micro_batches: 6, flags, ..Training::new(dir, 6) }
}

/// What a failed merge leaves: whole checkpoints, the adapter, and no folder that only looks merged.
fn only_the_merge_is_missing(out: &Path, what: &str) {
    let checkpoints = manifest::list(out).unwrap();
    assert_eq!(checkpoints.last().map(|(step, _)| *step), Some(6), "{what}");
    for (step, path) in checkpoints {
        manifest::verify(&path).unwrap_or_else(|e| panic!("{what}, step {step}: {e}"));
    }
    assert!(out.join("adapter_model.safetensors").is_file() && !out.join("merged").exists(), "{what}");
}

#[test]
fn a_merge_that_fails_at_the_end_is_named_and_made_by_the_next_run() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = merging(dir.path(), &[]);
    succeed(t.alone("one"));
    for (i, (fault, code, words)) in [
        ("rank=0 step=0 at=merge do=kill", 137, ["rank 0 on host ", ": merge: killed by SIGKILL"]),
        ("rank=0 step=0 at=merge:1 do=kill", 137, ["rank 0 on host ", ": merge, layer 1: killed by SIGKILL"]),
        ("rank=0 step=0 at=merge:1 do=panic", 1, ["rank 0 on host ", ": merge, layer 1: panicked at "]),
        ("rank=0 step=0 at=merge do=enospc", 1, ["rank 0 on host ", "disk or quota is full"]),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("out-{i}");
        let out = dir.path().join(&name);
        let mut command = t.ranks(&name, 3, &[]);
        command.env("RINGTUNE_FAULT", fault);
        let (ended, stderr) = run(command);
        let last = stderr.lines().last().unwrap_or_default();
        assert_eq!(ended, Some(code), "{fault}:\n{stderr}");
        assert!(last.starts_with("ringrun: ") && words.iter().all(|word| last.contains(word)), "{fault}:\n{stderr}");
        assert_eq!(processes(&dir.path().display().to_string()), [], "{fault}");
        only_the_merge_is_missing(&out, fault);
        succeed(t.ranks(&name, 3, &[]));
        same_file(&dir.path().join("one").join(MERGED), &out.join(MERGED));
        let left = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let left: Vec<String> = left.filter(|name| name.ends_with(".tmp")).collect();
        assert!(left.is_empty(), "{fault}: left behind: {left:?}");
    }
    // ringrun starts such a run again by itself.
    let mut command = t.ranks("again", 3, &["--max-restarts", "1", "--restart-backoff", "0"]);
    command.env("RINGTUNE_FAULT", "rank=0 step=0 at=merge:0 do=kill");
    let (code, stderr) = run(command);
    assert!(code == Some(0) && stderr.contains(": merge, layer 0: killed by SIGKILL"), "{code:?}:\n{stderr}");
    same_file(&dir.path().join("one").join(MERGED), &dir.path().join("again").join(MERGED));
}

/// A real file system that holds the checkpoints and the adapter, and not the merged model.
#[test]
fn a_disk_that_is_too_small_for_the_merge_is_said() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = merging(dir.path(), &["--save_total_limit", "1"]);
    succeed(t.alone("one"));
    let size = |path: &Path| walk(path).iter().map(|(_, bytes)| bytes.div_ceil(4096) * 4096).sum::<u64>();
    // While it saves there are two checkpoints; half of the merged model is room for them and too little for it.
    let merged = size(&dir.path().join("one/merged"));
    let room = size(&dir.path().join("one")) - merged + merged / 2;
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let words = t.words("out", 2).iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    let command = format!("{} -n 2 --oversubscribe ringtune {words}", ringrun().display());
    let (at, kept) = (out.display(), dir.path().display());
    let script = format!(
        "mount -t tmpfs -o size={room} none {at} || exit 77
         {command} 2>{kept}/first.log; echo $? >{kept}/first
         ls {at} >{kept}/left
         mount -o remount,size={} {at} && {command} 2>{kept}/second.log && cp {at}/{MERGED} {kept}/merged.safetensors",
        room + 4 * merged
    );
    let mut c = Command::new("unshare");
    let status = c.args(["--mount", "sh", "-c", &script]).stdin(Stdio::null()).stdout(Stdio::null()).status();
    if status
        .as_ref()
        .map_or(true, |s| s.code() == Some(77) || s.code() == Some(1) && !dir.path().join("first").exists())
    {
        return skipped("no file system can be mounted for one process", false);
    }
    let text = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap_or_default();
    let (first, last) = (text("first.log"), text("first.log").lines().last().unwrap_or_default().to_string());
    assert_eq!(text("first").trim(), "1", "{first}");
    assert!(
        last.contains("rank 0 on host ") && last.contains(": merge") && last.contains("disk or quota is full"),
        "{first}"
    );
    assert!(last.contains("merged"), "the file is named: {last}");
    let left = text("left");
    assert!(left.lines().any(|l| l == "checkpoint-6") && !left.contains("merged"), "{left}");
    assert!(status.unwrap().success(), "{}", text("second.log"));
    same_file(&dir.path().join("one").join(MERGED), &dir.path().join("merged.safetensors"));
}

/// Files below a folder, with their sizes.
fn walk(dir: &Path) -> Vec<(std::path::PathBuf, u64)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => all.extend(walk(&entry.path())),
            false => all.push((entry.path(), entry.metadata().unwrap().len())),
        }
    }
    all
}

/// The other rank is in sums, and shows there that it has asked for more of them than the one that strays: nobody waits for `--hang-timeout`,
/// which is ten minutes.
#[test]
fn an_exchange_that_a_rank_in_a_sum_does_not_make_is_named_at_once() {
    let stray = "waits in \"an exchange that RINGTUNE_FAULT asked for\", exchange ";
    for (fault, flags, at) in [
        ("rank=1 step=4 at=forward do=stray", &[][..], "rank 1 on host "),
        ("rank=0 step=4 at=backward:0 do=stray", &["--zero", "1"], "rank 0 on host "),
    ] {
        fails(
            fault,
            2,
            &[],
            flags,
            1,
            &[at, stray, " for sums or weights that come before it: they have lost each other"],
        );
    }
}

/// One of two ranks that nothing but the environment joins has another secret: both say so and end within seconds.
#[test]
fn a_wrong_secret_without_ringrun_is_said_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training::new(dir.path(), 3);
    let [mut main, mut other] = started([&t, &t], ["out", "out"], &free_port(), "a", true);
    main.env("RINGTUNE_SECRET", "one");
    other.env("RINGTUNE_SECRET", "another");
    let log = dir.path().join("main.log");
    main.stderr(std::fs::File::create(&log).unwrap());
    let mut main = main.spawn().unwrap();
    let begun = Instant::now();
    let (code, stderr) = run(other);
    let took = begun.elapsed();
    let said = "does not know the secret of this run: RINGTUNE_SECRET has to be the same on all machines";
    assert!(code == Some(1) && stderr.contains("rank 1 of 2") && stderr.contains(said), "{code:?}: {stderr}");
    assert!(took < Duration::from_secs(60), "{took:?}");
    // It has said so at once, and does not wait for a rank that cannot come.
    wait_until("the main rank ends too", || main.try_wait().unwrap().is_some());
    let log = std::fs::read_to_string(&log).unwrap();
    assert!(log.contains(&format!("a rank at 127.0.0.1 {said}")), "{log}");
    let last = log.lines().last().unwrap_or_default();
    assert!(
        last.contains("rank 1 on host unknown: did not come; a rank at 127.0.0.1 does not know the secret"),
        "{log}"
    );
    assert_eq!(main.wait().unwrap().code(), Some(76), "{log}");
}

/// Slurm and systemd signal every process of a job, and ringrun hands on what it gets: each rank hears of one request twice, and saves.
#[test]
fn a_request_that_comes_twice_at_once_is_one() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    for signal in [libc::SIGTERM, libc::SIGUSR1] {
        let out = format!("out-{signal}");
        let t = Training::new(dir.path(), 100_000);
        let mut child = t.ranks(&out, 2, &[]).spawn().unwrap();
        wait_for_lines(&mut child, &dir.path().join(&out), 2);
        for (pid, _) in processes(&dir.path().display().to_string()) {
            // SAFETY: processes of this test; one that has gone meanwhile is an error that does not matter.
            unsafe { libc::kill(pid as i32, signal) };
        }
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(75), "{stderr}");
        assert_eq!(stderr.matches("then saving").count(), 1, "{stderr}");
        let (_, path) = manifest::list(&dir.path().join(&out)).unwrap().pop().unwrap();
        manifest::verify(&path).unwrap();
    }
}

/// A second request that somebody sends later ends the process, and so does Ctrl-C pressed twice.
#[test]
fn a_second_request_ends_a_rank_at_once() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    for (signal, pause) in [(libc::SIGINT, 0), (libc::SIGTERM, 3100)] {
        let out = format!("out-{signal}");
        // It hangs in its step, so that it does not stop by itself.
        let t = Training::new(dir.path(), 100_000);
        let mut c = t.ranks(&out, 1, &["-q"]);
        c.env("RINGTUNE_FAULT", "rank=0 step=3 at=forward do=hang");
        let mut child = c.spawn().unwrap();
        wait_for_lines(&mut child, &dir.path().join(&out), 2);
        let all = processes(&dir.path().display().to_string());
        let (pid, _) = all.iter().find(|(_, line)| !line.contains("ringrun")).unwrap();
        let send = || {
            // SAFETY: a process of this test that its parent has not waited for.
            unsafe { libc::kill(*pid as i32, signal) }
        };
        send();
        std::thread::sleep(Duration::from_millis(pause + 100));
        send();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(128 + signal), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
