//! Runs of several ranks that fail in any phase, on any rank, at any instant: the last line, the exit code, no process left, and the bits of an
//! undisturbed run in the end. What a rank has for itself (folder, data, secret, files of others) is named where it is wrong.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use ringtune::checkpoint::manifest;
use ringtune::rng::Stream;

use crate::ringrun_program::{Training, processes, run, succeed, wait_for_lines, wait_until};
use crate::runs::{metrics, rows, same_file};
use crate::skip::skipped;

const ADAPTER: &str = "adapter_model.safetensors";

/// Runs with a fault on `ranks` ranks: the exit code and words of the last line.
pub fn fails(fault: &str, ranks: usize, more: &[&str], flags: &[&str], code: i32, words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training { micro_batches: 6, flags: flags.to_vec(), ..Training::new(dir.path(), 7) };
    let mut command = t.ranks("out", ranks, more);
    command.env("RINGTUNE_FAULT", fault);
    let (ended, stderr) = run(command);
    let last = stderr.lines().last().unwrap_or_default();
    assert_eq!(ended, Some(code), "{fault}:\n{stderr}");
    for word in words {
        assert!(
            last.starts_with("ringrun: ") && last.contains(word),
            "{fault}: no {word:?} in the last line of\n{stderr}"
        );
    }
    assert_eq!(processes(&dir.path().display().to_string()), [], "{fault}");
    for (step, path) in manifest::list(&dir.path().join("out")).unwrap_or_default() {
        manifest::verify(&path).unwrap_or_else(|e| panic!("{fault}, step {step}: {e}"));
    }
}

const ZERO: &[&str] = &["--zero", "1"];

#[test]
fn a_rank_that_dies_before_the_first_step_is_named_with_its_phase() {
    for (fault, code, words) in [
        ("rank=1 step=0 at=tokenise do=kill", 137, ["rank 1 on host ", ": tokenise: killed by SIGKILL"]),
        ("rank=0 step=0 at=tokenise do=panic", 1, ["rank 0 on host ", ": tokenise: panicked at "]),
        (
            "rank=2 step=0 at=load do=exit:3",
            3,
            ["rank 2 on host ", ": load: ended with exit code 3 and did not say why"],
        ),
        ("rank=0 step=0 at=load do=kill", 137, ["rank 0 on host ", ": load: killed by SIGKILL"]),
    ] {
        fails(fault, 3, &[], &[], code, &words);
    }
}

#[test]
fn a_rank_that_dies_in_an_evaluation_or_at_the_end_is_named_with_its_phase() {
    for (fault, flags, code, words) in [
        (
            "rank=0 step=4 at=evaluate do=kill",
            &[][..],
            137,
            ["rank 0 on host ", ": step 4, evaluate: killed by SIGKILL"],
        ),
        ("rank=2 step=4 at=evaluate do=panic", ZERO, 1, ["rank 2 on host ", ": step 4, evaluate: panicked at "]),
        // The others have said goodbye by then.
        ("rank=0 step=0 at=finish do=kill", &[], 137, ["rank 0 on host ", ": finish: killed by SIGKILL"]),
        ("rank=0 step=0 at=finish do=enospc", ZERO, 1, ["rank 0 on host ", "disk or quota is full"]),
    ] {
        fails(fault, 3, &[], flags, code, &words);
    }
}

/// Weights of other ranks are on their way between an update and the next forward pass.
#[test]
fn a_rank_that_dies_while_weights_are_on_their_way_is_named() {
    let words = ["rank 1 on host ", ": step 6, gather"];
    fails("rank=1 step=6 at=gather do=kill", 3, &[], ZERO, 137, &[words[0], words[1], "killed by SIGKILL"]);
    fails("rank=1 step=6 at=gather do=exit:5", 2, &[], ZERO, 5, &[words[0], words[1], "exit code 5"]);
}

/// Whichever rank comes second to the exchange is named first; both calls are. Where the others are in a sum instead: `rank_ends.rs`.
#[test]
fn an_exchange_that_others_do_not_make_is_named_wherever_it_is_made() {
    let stray = "calls \"an exchange that RINGTUNE_FAULT asked for\"";
    for (fault, flags) in [("rank=0 step=0 at=load do=stray", &[][..]), ("rank=2 step=4 at=evaluate do=stray", ZERO)] {
        fails(fault, 3, &[], flags, 1, &[stray, " as exchange ", "they have lost each other"]);
    }
}

/// Nobody moves: the one is to blame that the others wait for, in sums, in weights and in exchanges.
#[test]
fn a_rank_that_hangs_is_named() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let begun = Instant::now();
    succeed(Training { micro_batches: 6, ..Training::new(dir.path(), 7) }.ranks("out", 2, &[]));
    // Longer than anything takes on this machine now.
    let patience = (3.0 * begun.elapsed().as_secs_f64()).max(3.0).ceil().to_string();
    let limit = ["--hang-timeout", &patience];
    let hangs = |fault: &str, flags: &[&str], place: &str| {
        let said = format!("hangs since {patience} s; another rank waits for it");
        fails(fault, 2, &limit, flags, 124, &["rank 1 on host ", place, &said]);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| hangs("rank=1 step=4 at=backward:1 do=hang", &[], ": step 4, backward, layer 1: "));
        scope.spawn(|| hangs("rank=1 step=4 at=evaluate do=hang", &[], ": step 4, evaluate: "));
        scope.spawn(|| hangs("rank=1 step=6 at=forward:1 do=hang", ZERO, ": step 6, forward, layer 1: "));
    });
}

/// Where a rank of ringrun on these files is, by its number.
fn process_of(dir: &Path, rank: usize) -> Option<i32> {
    let own = |pid: u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|b| *b == 0).any(|variable| variable == format!("RANK={rank}").as_bytes())
    };
    let found =
        processes(&dir.display().to_string()).into_iter().find(|(pid, line)| !line.contains("ringrun ") && own(*pid));
    found.map(|(pid, _)| pid as i32)
}

fn signal(pid: i32, signal: i32) {
    // SAFETY: a signal to a process of this test; one that is gone meanwhile is an error that does not matter.
    unsafe { libc::kill(pid, signal) };
}

/// The last step that a run has logged.
fn last_step(out: &Path) -> u64 {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
    let steps = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_u64());
    steps.max().unwrap_or(0)
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// One training, disturbed until it is done: by SIGKILL, SIGSTOP, a pause, a panic or NaN of a rank, each time gone on with from its newest
/// checkpoint.
#[test]
fn a_run_that_is_disturbed_at_20_instants_ends_in_the_same_bits() {
    const STEPS: u64 = 240;
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let flags =
        vec!["--zero", "1", "--lora_dropout", "0.1", "--max_bad_steps", "1", "--resume_from_checkpoint", "auto"];
    let t = Training { micro_batches: 6, flags, ..Training::new(dir.path(), STEPS) };
    succeed(t.alone("one"));
    let (out, seed) = (dir.path().join("out"), 20);
    let deeds = ["kill", "panic", "kill", "nan", "pause", "kill", "kill", "panic", "kill", "stop"];
    for i in 0..20u64 {
        let draw = |what: u64, below: u64| (Stream::new(&[seed, i, what]).f64_at(0) * below as f64) as u64;
        let (deed, rank, more) = (deeds[i as usize % deeds.len()], draw(1, 3) as usize, draw(2, 5));
        let saved = manifest::list(&out).unwrap_or_default().last().map_or(0, |(step, _)| *step);
        let what = format!("{i} of seed {seed}: {deed} of rank {rank} after step {saved} and {more}");
        let mut command = t.ranks("out", 3, &[]);
        if ["panic", "nan"].contains(&deed) {
            let phase = ["forward", "backward:0", "reduce", "update"][draw(3, 4) as usize];
            command.env("RINGTUNE_FAULT", format!("rank={rank} step={} at={phase} do={deed}", saved + 1 + more));
        }
        let stale = last_step(&out);
        let mut child = command.spawn().unwrap();
        if ["pause", "stop"].contains(&deed) {
            wait_until(&what, || last_step(&out) > stale || child.try_wait().unwrap().is_some());
        } else if deed == "kill" {
            // What an earlier attempt has logged is cut off by and by: some die before their first step.
            wait_until(&what, || last_step(&out) > saved + more || child.try_wait().unwrap().is_some());
            wait_until(&what, || process_of(dir.path(), rank).is_some() || child.try_wait().unwrap().is_some());
            std::thread::sleep(Duration::from_micros(draw(4, 30_000)));
        }
        let pids: Vec<i32> = (0..3).filter_map(|rank| process_of(dir.path(), rank)).collect();
        let victim = process_of(dir.path(), rank);
        let (code, words): (i32, &[&str]) = match (deed, victim) {
            ("kill", Some(pid)) => {
                signal(pid, libc::SIGKILL);
                (137, &["killed by SIGKILL"])
            }
            ("stop", Some(pid)) => {
                signal(pid, libc::SIGSTOP);
                (124, &["no sign of life for 5 s (stopped by a signal)"])
            }
            ("pause", Some(pid)) => {
                // The whole machine, which harms nobody; then one of them dies.
                pids.iter().for_each(|pid| signal(*pid, libc::SIGSTOP));
                std::thread::sleep(Duration::from_millis(100 + draw(5, 1500)));
                pids.iter().for_each(|pid| signal(*pid, libc::SIGCONT));
                let step = last_step(&out);
                wait_until(&what, || last_step(&out) > step || child.try_wait().unwrap().is_some());
                signal(pid, libc::SIGKILL);
                (137, &["killed by SIGKILL"])
            }
            ("panic", _) => (1, &["panicked at"]),
            ("nan", _) => (1, &["not finite"]),
            _ => panic!("{what}: the run has ended: {}", text(&child.wait_with_output().unwrap())),
        };
        let output = child.wait_with_output().unwrap();
        let stderr = text(&output);
        let last = stderr.lines().last().unwrap_or_default();
        assert_eq!(output.status.code(), Some(code), "{what}:\n{stderr}");
        // Every rank finds what is not finite in the sums; whoever says it first names the one it came from.
        let (who, where_from) = match deed {
            "nan" => ("ringrun: rank ".into(), format!(" on rank {rank};")),
            _ => (format!("ringrun: rank {rank} on host "), String::new()),
        };
        assert!(
            last.starts_with(&who) && last.contains(&where_from) && words.iter().all(|word| last.contains(word)),
            "{what}:\n{stderr}"
        );
        assert_eq!(processes(&dir.path().display().to_string()), [], "{what}");
        for (step, path) in manifest::list(&out).unwrap_or_default() {
            manifest::verify(&path).unwrap_or_else(|e| panic!("{what}, step {step}: {e}"));
        }
    }
    succeed(t.ranks("out", 3, &[]));
    same_file(&dir.path().join("one").join(ADAPTER), &out.join(ADAPTER));
    assert_eq!(metrics(&dir.path().join("one")), metrics(&out));
}

/// A rank that is stopped for a moment and continued is no failure.
#[test]
fn a_pause_of_one_rank_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training { micro_batches: 6, ..Training::new(dir.path(), 40) };
    succeed(t.alone("one"));
    for (rank, name) in [(0, "main"), (1, "other")] {
        let mut child = t.ranks(name, 2, &[]).spawn().unwrap();
        wait_for_lines(&mut child, &dir.path().join(name), 3);
        let pid = process_of(dir.path(), rank).unwrap();
        signal(pid, libc::SIGSTOP);
        std::thread::sleep(Duration::from_secs(2));
        signal(pid, libc::SIGCONT);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        same_file(&dir.path().join("one").join(ADAPTER), &dir.path().join(name).join(ADAPTER));
    }
}

/// Whether a signal has stopped a process.
fn is_stopped(pid: i32) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    text.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}

/// The whole job, its launcher too: somebody stops every process of it for less than three seconds, or Ctrl-Z does for longer than a rank
/// may be silent.
#[test]
fn a_pause_of_the_whole_job_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training { micro_batches: 6, flags: ZERO.to_vec(), ..Training::new(dir.path(), 40) };
    succeed(t.alone("one"));
    let paused = |out: &str, pause: &dyn Fn(i32, &[i32])| {
        let mut child = t.ranks(out, 3, &[]).spawn().unwrap();
        let at = dir.path().join(out);
        wait_for_lines(&mut child, &at, 3);
        let all: Vec<i32> = processes(&at.display().to_string()).iter().map(|(pid, _)| *pid as i32).collect();
        assert_eq!(all.len(), 4);
        let before = last_step(&at);
        pause(child.id() as i32, &all);
        assert!(last_step(&at) <= before + 2, "it has stood still");
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        same_file(&dir.path().join("one").join(ADAPTER), &at.join(ADAPTER));
        assert_eq!(metrics(&dir.path().join("one")), metrics(&at));
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            paused("stopped", &|_, all| {
                all.iter().for_each(|pid| signal(*pid, libc::SIGSTOP));
                std::thread::sleep(Duration::from_millis(2900));
                all.iter().for_each(|pid| signal(*pid, libc::SIGCONT));
            })
        });
        scope.spawn(|| {
            paused("ctrl-z", &|ringrun, all| {
                signal(ringrun, libc::SIGTSTP);
                wait_until("all are stopped", || all.iter().all(|pid| is_stopped(*pid)));
                std::thread::sleep(Duration::from_secs(6));
                signal(ringrun, libc::SIGCONT);
            })
        });
    });
}

/// Two ranks without ringrun, as torchrun starts them, or a pod of Kubernetes, which knows of no others on its machine.
pub fn started(of: [&Training; 2], outs: [&str; 2], port: &str, run: &str, local: bool) -> [Command; 2] {
    [0, 1].map(|rank: usize| {
        let mut c = of[rank].two(outs[rank]);
        let number = rank.to_string();
        c.envs([("RANK", number.as_str()), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)]);
        if local {
            c.envs([("LOCAL_RANK", number.as_str()), ("LOCAL_WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", run)]);
        }
        c
    })
}

fn ended(commands: [Command; 2]) -> [Output; 2] {
    commands.map(|mut c| c.spawn().unwrap()).map(|child: Child| child.wait_with_output().unwrap())
}

pub fn free_port() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

/// Who holds the hub dies: the others say so, and leave.
#[test]
fn the_death_of_rank_0_without_ringrun_is_said_by_the_others() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training::new(dir.path(), 9);
    let mut commands = started([&t, &t], ["out", "out"], &free_port(), "a", true);
    for c in &mut commands {
        c.env("RINGTUNE_FAULT", "rank=0 step=4 at=reduce do=kill");
    }
    let [main, other] = ended(commands);
    assert_eq!((main.status.code(), other.status.code()), (None, Some(76)), "{}", text(&other));
    assert!(text(&other).contains("rank 0 is gone: connection closed"), "{}", text(&other));
}

/// Another job's hub has the port, and strangers knock: both trainings come to their end.
#[test]
fn two_jobs_with_one_port_and_strangers_keep_apart() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training::new(dir.path(), 6);
    succeed(t.alone("one"));
    let port = free_port();
    let jobs =
        ["first", "second"].map(|out| started([&t, &t], [out, out], &port, out, true).map(|mut c| c.spawn().unwrap()));
    for i in 0..8u16 {
        let at = port.parse::<u16>().unwrap().saturating_add(i % 3);
        if let Ok(mut stranger) = TcpStream::connect(("127.0.0.1", at)) {
            let _ = std::io::Write::write_all(&mut stranger, b"GET / HTTP/1.1\r\n\r\n");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    for (out, job) in ["first", "second"].into_iter().zip(jobs) {
        for child in job {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{out}: {}", text(&output));
        }
        same_file(&dir.path().join("one").join(ADAPTER), &dir.path().join(out).join(ADAPTER));
    }
}

/// Kubernetes gives no local numbers: ranks count themselves once they have met.
#[test]
fn ranks_without_local_numbers_find_each_other() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training::new(dir.path(), 6);
    succeed(t.alone("one"));
    for output in ended(started([&t, &t], ["pods", "pods"], &free_port(), "", false)) {
        assert!(output.status.success(), "{}", text(&output));
    }
    same_file(&dir.path().join("one").join(ADAPTER), &dir.path().join("pods").join(ADAPTER));
}

/// Every host has its own copy of the data, and one of them is another version.
#[test]
fn other_data_on_one_host_are_named() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    rows(here.path(), 60);
    rows(there.path(), 59);
    let (ours, theirs) = (Training::new(here.path(), 3), Training::new(there.path(), 3));
    let outputs = ended(started([&ours, &theirs], ["out", "out"], &free_port(), "a", true));
    let said: String = outputs.iter().map(text).collect();
    assert!(outputs.iter().all(|o| !o.status.success()), "{said}");
    assert!(
        said.contains("data") && said.contains(" differs between ranks: rank 0 has ") && said.contains(", rank 1 has "),
        "{said}"
    );
}

/// The output folder of one host cannot be written: with sharded state its rank has a file to write there.
#[test]
fn an_output_folder_that_one_rank_cannot_write_is_named() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let at = dir.path().display().to_string();
    let script = format!("mount --bind {at} {at} && mount -o remount,bind,ro {at} && exec \"$0\" \"$@\"");
    let mounts = Command::new("unshare").args(["--mount", "sh", "-c", &script, "true"]).status();
    if !mounts.is_ok_and(|status| status.success()) {
        return skipped("a folder cannot be made read-only for one process", false);
    }
    let t = Training { flags: vec!["--zero", "1"], ..Training::new(dir.path(), 6) };
    let [main, other] = started([&t, &t], ["out", "out"], &free_port(), "a", true);
    let mut alone = Command::new("unshare");
    alone.args(["--mount", "sh", "-c", &script]).arg(other.get_program()).args(other.get_args());
    alone.envs(other.get_envs().filter_map(|(name, value)| Some((name, value?))));
    alone.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let outputs = ended([main, alone]);
    let said: String = outputs.iter().map(text).collect();
    assert!(outputs.iter().all(|o| !o.status.success()), "{said}");
    assert!(said.contains("rank 1 on host ") && said.contains("checkpoint at step 3 was not written"), "{said}");
    assert!(said.contains("optimizer-00002-of-00002.safetensors") && said.contains("Read-only file system"), "{said}");
    assert_eq!(manifest::list(&dir.path().join("out")).unwrap(), []);
}

/// A file of one rank is damaged or gone: said by name where that checkpoint was meant, passed over where any will do.
#[test]
fn a_damaged_part_of_a_checkpoint_is_named_or_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = |flags: &[&'static str]| Training { flags: [ZERO, flags].concat(), ..Training::new(dir.path(), 6) };
    succeed(t(&[]).ranks("out", 2, &[]));
    let newest = dir.path().join("out/checkpoint-6");
    let part = newest.join("optimizer-00002-of-00002.safetensors");
    let whole = std::fs::read(&part).unwrap();
    let mut damaged = whole.clone();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    for bytes in [Some(damaged), None] {
        match bytes {
            Some(bytes) => std::fs::write(&part, bytes).unwrap(),
            None => std::fs::remove_file(&part).unwrap(),
        }
        let from = newest.display().to_string();
        let mut meant = t(&[]).ranks("out", 2, &[]);
        meant.args(["--resume_from_checkpoint", &from]);
        let (code, stderr) = run(meant);
        let last = stderr.lines().last().unwrap_or_default();
        assert!(
            code == Some(1) && last.contains("rank 0 on host ") && last.contains("optimizer-00002-of-00002"),
            "{stderr}"
        );
        assert_eq!(stderr.matches("error: ").count(), 1, "{stderr}");
    }
    let (code, stderr) = run(t(&["--resume_from_checkpoint", "auto"]).ranks("out", 2, &[]));
    assert!(code == Some(0) && stderr.contains("checkpoint-6: passed over: "), "{code:?} {stderr}");
    assert!(std::fs::read(dir.path().join("out/checkpoint-6/optimizer-00002-of-00002.safetensors")).unwrap() == whole);
}
