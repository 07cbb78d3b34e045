//! Runs that are started again.

use crate::program::{outcome, ringrun, shell, signal, wait_until};

const AGAIN: [&str; 7] = ["-n", "2", "--oversubscribe", "--max-restarts", "2", "--restart-backoff", "0.01"];

#[test]
fn a_failed_run_is_started_again_and_told_so() {
    let o =
        shell(&AGAIN, "[ $RINGTUNE_RESTART = 2 ] || [ $RANK = 0 ] || exit 1; [ $RINGTUNE_RESTART = 2 ] || sleep 100");
    assert_eq!(o.code, Some(0), "{}", o.stderr);
    assert!(o.stderr.contains("ringrun: attempt 1: rank 1 on host"), "{}", o.stderr);
    assert!(o.stderr.contains("(failure 2 of 2 without a new checkpoint)"), "{}", o.stderr);
    let o = shell(&AGAIN, "[ $RANK = 0 ] || exit 1; sleep 100");
    assert_eq!(o.code, Some(1));
    assert!(o.last().starts_with("ringrun: attempt 2: rank 1 "), "{}", o.stderr);
}

/// Two machines that are one here: the first one's port is free again for the hub of the second attempt.
#[test]
fn every_machine_starts_again_and_they_meet_at_the_same_port() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let script = "[ $RINGTUNE_RESTART = 1 ] && exit 0; [ $RANK = 0 ] || exit 3; sleep 100";
    let start = |rank| {
        let node = ["--nnodes", "2", "--node-rank", rank, "--master-addr", "127.0.0.1", "--master-port", &port];
        let again = ["--nproc-per-node", "1", "--max-restarts", "1", "--restart-backoff", "0.05", "sh", "-c", script];
        ringrun(&[&node[..], &again].concat()).spawn().unwrap()
    };
    // The machine of the hub is the last one to start: what became of the other's rank is told when it is there.
    let other = start("1");
    std::thread::sleep(std::time::Duration::from_millis(500));
    let both = [start("0"), other].map(outcome);
    for o in &both {
        assert_eq!(o.code, Some(0), "{}", o.stderr);
        assert!(o.stderr.contains("starting again"), "{}", o.stderr);
    }
}

#[test]
fn nothing_helps_a_wrong_option_and_a_stop_was_meant() {
    let o = shell(&AGAIN, "[ $RANK = 0 ] || exit 2; sleep 100");
    assert_eq!((o.code, o.stderr.matches("starting again").count()), (Some(2), 0), "{}", o.stderr);
    let dir = tempfile::tempdir().unwrap();
    let up = dir.path().join("up");
    let script = format!("[ $RANK = 1 ] && touch {}; sleep 100", up.display());
    let child = ringrun(&[&AGAIN[..], &["sh", "-c", &script]].concat()).spawn().unwrap();
    wait_until("a rank is up", || up.exists());
    signal(child.id(), libc::SIGTERM);
    let o = outcome(child);
    assert_eq!((o.code, o.stderr.matches("starting again").count()), (Some(143), 0), "{}", o.stderr);
}
