//! Ranks on this machine: what they get, what they print, how the run ends, and that nothing is left of it.

use crate::program::{files, outcome, processes, ringrun, shell, signal, wait_until};

#[test]
fn ranks_find_what_programs_of_torchrun_know() {
    let dir = tempfile::tempdir().unwrap();
    let script =
        "echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $GROUP_RANK $MASTER_ADDR $A $PWD; [ $MASTER_PORT -gt 0 ]";
    let d = dir.path().canonicalize().unwrap().display().to_string();
    let o = shell(&["-n", "3", "--oversubscribe", "-x", "A=b c", "--wdir", &d], script);
    assert_eq!((o.code, o.stderr.as_str()), (Some(0), ""));
    let mut lines: Vec<&str> = o.stdout.lines().collect();
    lines.sort_unstable();
    let line = |r: usize| format!("{r}/3 {r}/3 0 127.0.0.1 b c {d}");
    assert_eq!(lines, [line(0), format!("[1] {}", line(1)), format!("[2] {}", line(2))]);
}

#[test]
fn the_exit_code_is_that_of_the_first_rank_that_failed() {
    for (script, code, last) in [
        ("exit 0", 0, ""),
        ("[ $RANK = 0 ] || exit 3; sleep 100", 3, "rank 1 on host H: ended with exit code 3"),
        ("[ $RANK = 0 ] || kill -9 $$; sleep 100", 137, "rank 1 on host H: killed by SIGKILL"),
        ("[ $RANK = 1 ] || kill -SEGV $$; sleep 100", 139, "rank 0 on host H: killed by SIGSEGV"),
        // A bystander is never to blame.
        ("[ $RANK = 0 ] || exit 76; sleep 0.2; exit 4", 4, "rank 0 on host H: ended with exit code 4"),
        // A program that the terminating signal does not end.
        ("[ $RANK = 0 ] || exit 5; trap '' TERM; sleep 100", 5, "rank 1 on host H: ended with exit code 5"),
    ] {
        let o = shell(&["-n", "2", "--oversubscribe", "--grace", "0.5"], script);
        assert_eq!(o.code, Some(code), "{script}: {}", o.stderr);
        let host = launcher::supervise::host_name();
        let expected = if last.is_empty() { String::new() } else { format!("ringrun: {}", last.replace('H', &host)) };
        assert_eq!(o.last(), expected, "{script}");
    }
    let o = outcome(ringrun(&["-n", "2", "/surely/missing"]).spawn().unwrap());
    assert_eq!(o.code, Some(127));
    assert!(o.last().starts_with("ringrun: /surely/missing: No such file"), "{}", o.stderr);
    assert_eq!(outcome(ringrun(&["--surely-wrong", "x"]).spawn().unwrap()).code, Some(2));
}

#[test]
fn lines_of_the_guilty_rank_are_logged_and_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path().display().to_string();
    // Rank 1 fails once the line of rank 0 is logged.
    let script = format!(
        "[ $RANK = 0 ] && {{ echo out of 0; sleep 100; }}; while ! grep -q . {d}/attempt-0/rank-0000.log; do sleep 0.01; done; \
         seq 1 30 >&2; exit 1"
    );
    let o = shell(&["-n", "2", "--oversubscribe", "--log-dir", &d], &script);
    assert_eq!(o.code, Some(1), "{}", o.stderr);
    let log = |rank| std::fs::read_to_string(dir.path().join(format!("attempt-0/rank-000{rank}.log"))).unwrap();
    assert_eq!(log(0), "out of 0\n");
    assert_eq!(log(1).lines().count(), 30);
    let repeated = o.stderr.split("last lines of rank 1:\n").nth(1).unwrap();
    assert_eq!(repeated.lines().take(20).collect::<Vec<_>>(), (11..=30).map(|n| n.to_string()).collect::<Vec<_>>());
    let outcome = std::fs::read_to_string(dir.path().join("attempt-0/outcome.json")).unwrap();
    assert!(outcome.contains("\"code\": 1") && outcome.contains("\"rank\": 1"), "{outcome}");
}

#[test]
fn what_a_rank_leaves_behind_is_ended() {
    // Out of the group, and twice removed from ringrun.
    let mark = format!("86400.{}", std::process::id());
    let script =
        format!("(setsid sh -c 'sleep {mark} & sleep {mark}' >/dev/null 2>&1 &) ; sleep {mark}.5 & sleep 0.1; exit 0");
    let o = shell(&["-n", "2", "--oversubscribe"], &script);
    assert_eq!(o.code, Some(0), "{}", o.stderr);
    assert_eq!(processes(&mark), 0);
}

#[test]
fn a_signal_asks_once_and_kills_the_second_time() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path().display().to_string();
    let mark = format!("86401.{}", std::process::id());
    let script =
        format!("trap 'touch {d}/asked-$RANK' TERM; touch {d}/up-$RANK; while :; do sleep {mark} & wait; done");
    let child = ringrun(&["-n", "2", "--oversubscribe", "sh", "-c", &script]).spawn().unwrap();
    wait_until("the ranks are up", || files(dir.path(), "up-") == 2);
    signal(child.id(), libc::SIGINT);
    wait_until("the ranks were asked", || files(dir.path(), "asked-") == 2);
    signal(child.id(), libc::SIGINT);
    let o = outcome(child);
    assert_eq!(o.code, Some(137), "{}", o.stderr);
    assert!(o.stderr.contains("SIGINT: the ranks were asked to end; once more kills them"), "{}", o.stderr);
    assert_eq!(processes(&mark), 0);
}

/// The kernel kills what ringrun can no longer end.
#[test]
fn ranks_die_with_a_killed_ringrun() {
    let dir = tempfile::tempdir().unwrap();
    let mark = format!("86402.{}", std::process::id());
    let script = format!("touch {}/up-$RANK; exec sleep {mark}", dir.path().display());
    let mut child = ringrun(&["-n", "2", "--oversubscribe", "sh", "-c", &script]).spawn().unwrap();
    wait_until("the ranks are up", || files(dir.path(), "up-") == 2);
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("the ranks die", || processes(&mark) == 0);
}

#[test]
fn time_is_up() {
    let o = shell(&["-n", "2", "--oversubscribe", "--timeout", "0.2"], "sleep 100");
    assert_eq!(o.code, Some(124), "{}", o.stderr);
    assert!(o.last().ends_with("ended by --timeout after 0.2 s"), "{}", o.stderr);
}

#[test]
fn lines_have_their_rank_and_the_time_where_that_is_wanted() {
    let lines = |words: &[&str]| -> [Vec<String>; 2] {
        let o = shell(&[&["-n", "2", "--oversubscribe"], words].concat(), "echo out; echo err >&2");
        assert_eq!(o.code, Some(0), "{}", o.stderr);
        [o.stdout, o.stderr].map(|text| {
            let mut lines: Vec<String> = text.lines().map(String::from).collect();
            lines.sort_unstable();
            lines
        })
    };
    assert_eq!(lines(&[]), [["[1] out", "out"], ["[1] err", "err"]]);
    assert_eq!(lines(&["--tag-output"]), [["[0] out", "[1] out"], ["[0] err", "[1] err"]]);
    let [out, err] = lines(&["--timestamp-output", "--tag-output"]);
    for line in out.iter().chain(&err) {
        let (time, rest) = line.split_at(12);
        let digits = time.chars().enumerate().all(|(i, c)| match i {
            2 | 5 => c == ':',
            8 => c == '.',
            _ => c.is_ascii_digit(),
        });
        assert!(digits && [" [0] out", " [1] out", " [0] err", " [1] err"].contains(&rest), "{line}");
    }
}

#[test]
fn ranks_are_tied_to_cores_of_their_own() {
    let cores = launcher::spawn::own_cores();
    if cores.len() < 2 {
        return;
    }
    let script = "echo $RANK $(grep Cpus_allowed_list /proc/$$/status | cut -f 2)";
    let ties = |words: &[&str]| {
        let o = shell(&[&["-n", "2"], words].concat(), script);
        let mut lines: Vec<String> = o.stdout.lines().map(|line| line.trim_start_matches("[1] ").to_string()).collect();
        lines.sort_unstable();
        lines
    };
    let expected = |shares: Vec<Vec<usize>>| -> Vec<String> {
        shares.iter().enumerate().map(|(rank, own)| format!("{rank} {}", launcher::spawn::ranges(own))).collect()
    };
    assert_eq!(ties(&["--bind-to", "core"]), expected(launcher::spawn::shares(&cores, 2)));
    assert_eq!(ties(&["--bind-to", "none"]), expected(vec![cores.clone(), cores.clone()]));
}

#[test]
fn a_quiet_ringrun_says_the_last_line_alone() {
    let n = (launcher::spawn::own_cores().len() + 1).to_string();
    let o = shell(&["-n", &n], "exit 0");
    assert!(o.stderr.contains("none is faster for it"), "{}", o.stderr);
    for words in [vec!["-n", &n, "-q"], vec!["-n", &n, "--oversubscribe"]] {
        assert_eq!(shell(&words, "exit 0").stderr, "");
    }
    let o = shell(&["-n", &n, "--quiet"], "[ $RANK = 0 ] || exit 3; echo a line >&2; sleep 100");
    assert_eq!(
        (o.code, o.stderr.lines().filter(|line| line.starts_with("ringrun: ")).count()),
        (Some(3), 1),
        "{}",
        o.stderr
    );
}
