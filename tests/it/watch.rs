//! `ringtune watch`: what it answers, to whom, and how it ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::program::Workplace;
use crate::report::place;

/// Longest that an event is waited for; machines that run tests may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// The program, watching.
pub struct Watch {
    child: Child,
    /// What it says is to be opened.
    pub url: String,
}

impl Watch {
    /// Starts it, and waits until it listens.
    pub fn start(w: &Workplace, words: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ringtune"))
            .arg("watch")
            .args(words)
            .current_dir(w.path("."))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut url = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut url).unwrap();
        assert!(url.starts_with("http://"), "{url:?}");
        Self { child, url: url.trim().to_string() }
    }

    fn address(&self) -> &str {
        self.url.trim_start_matches("http://").trim_end_matches('/')
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// The answer to a request as it stands.
    fn raw(&self, request: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn get(&self, path: &str) -> String {
        self.raw(&format!("GET {path} HTTP/1.1\r\nhost: {}\r\n\r\n", self.address()))
    }

    fn events(&self) -> BufReader<TcpStream> {
        let mut stream = self.connect();
        write!(stream, "GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        BufReader::new(stream)
    }

    /// Ctrl-C, and how it ended.
    pub fn interrupt(mut self) -> Option<i32> {
        // SAFETY: a signal to our own child, which has not been waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGINT) };
        self.child.wait().unwrap().code()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn line(step: u64) -> String {
    format!("{}\n", json!({"step": step, "loss": 2.0, "lr": 1e-4, "tokens": 10, "supervised": 5}))
}

fn lines(n: u64) -> String {
    (1..=n).map(line).collect()
}

/// Waits on the events of a viewer for the next version; gives it and the state of the runs.
fn next_event(events: &mut BufReader<TcpStream>) -> (u64, String) {
    let begun = Instant::now();
    loop {
        // Lines that keep the connection alive are no events.
        assert!(begun.elapsed() < PATIENCE, "no event came");
        let mut line = String::new();
        assert!(events.read_line(&mut line).unwrap() > 0, "the events ended");
        if let Some((version, state)) = line.strip_prefix("data: ").and_then(|data| data.trim().split_once(' ')) {
            return (version.parse().unwrap(), state.to_string());
        }
    }
}

fn next_version(events: &mut BufReader<TcpStream>) -> u64 {
    next_event(events).0
}

#[test]
fn viewers_see_a_new_step_and_nothing_is_written() {
    let w = Workplace::new();
    w.write("run/metrics.jsonl", lines(4));
    let watch = Watch::start(&w, &["run", "--port", "0"]);
    let names = || {
        let mut names: Vec<_> = std::fs::read_dir(w.path("run")).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    let page = watch.get("/");
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n") && page.contains("new EventSource(\"/events\")"), "{page}");
    assert!(page.contains("connect-src 'self'") && page.contains("<dd>4</dd>"));
    let mut viewers: Vec<BufReader<TcpStream>> = (0..3).map(|_| watch.events()).collect();
    let first: Vec<u64> = viewers.iter_mut().map(next_version).collect();
    assert!(first.iter().all(|&v| v == first[0]));
    let append = std::fs::OpenOptions::new().append(true).open(w.path("run/metrics.jsonl"));
    append.unwrap().write_all(line(5).as_bytes()).unwrap();
    for viewer in &mut viewers {
        assert_eq!(next_version(viewer), first[0] + 1);
    }
    let body = watch.get("/main");
    assert!(body.contains("<dd>5</dd>") && !body.contains("<html"), "{body}");
    assert!(watch.get("/run/0/metrics.jsonl").ends_with(&lines(5)));
    assert_eq!(names(), before);
    assert_eq!(watch.interrupt(), Some(0));
}

/// A run is live, then killed, then goes on and ends: each is said, in the report too.
#[test]
fn a_run_that_was_killed_is_not_live() {
    let w = place();
    let words = [
        "sft",
        "--model_path",
        "model",
        "--tokenizer_path",
        "spm.model",
        "--dataset_paths",
        "rows.jsonl",
        "--output_dir",
        "run",
        "--max_seq_len",
        "64",
        "--save_steps",
        "4",
        "--per_device_train_batch_size",
        "2",
        "--quiet",
        "--resume_from_checkpoint",
        "auto",
        "--lr_scheduler_type",
        "constant",
    ];
    let train = |steps: &str| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_ringtune"));
        program
            .args(words)
            // A run that is cut shorter needs a word.
            .args(["--max_steps", steps, "--allow_changed", "config"])
            .current_dir(w.path("."))
            .env("RINGTUNE_CACHE", w.path("cache"));
        program.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let logged = || std::fs::read_to_string(w.path("run/metrics.jsonl")).map_or(0, |text| text.lines().count());
    let mut child = train("1000000");
    while logged() < 6 {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before its sixth step");
        std::thread::sleep(Duration::from_millis(5));
    }
    let watch = Watch::start(&w, &["run", "--port", "0"]);
    let mut events = watch.events();
    assert_eq!(next_event(&mut events).1, "going");
    let pid = child.id();
    child.kill().unwrap();
    // Nobody has asked how it ended: its number is still there. Lines may have come before it was killed.
    let state = loop {
        let (_, state) = next_event(&mut events);
        if state != "going" {
            break state;
        }
    };
    let since: u64 = state.strip_prefix("gone ").unwrap_or_else(|| panic!("{state}")).parse().unwrap();
    let written = std::fs::metadata(w.path("run/metrics.jsonl")).unwrap().modified().unwrap();
    assert_eq!(since, written.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs());
    child.wait().unwrap();
    let said = format!("the process is gone (process {pid} on ");
    let body = watch.get("/main");
    assert!(body.contains("no news since 2") && body.contains(&said), "{body}");
    let report = w.run(&["report", "run"]);
    assert!(report.code == Some(0) && report.stderr.contains(&said), "{}", report.stderr);
    // As many steps as it had, and some.
    let more = (logged() + 3).to_string();
    assert!(train(&more).wait().unwrap().success());
    let state = loop {
        let (_, state) = next_event(&mut events);
        if state == "over" || !(state == "going" || state.starts_with("gone ")) {
            break state;
        }
    };
    assert_eq!(state, "over");
    assert!(!watch.get("/main").contains("no news since"));
}

#[test]
fn strangers_are_refused() {
    let w = Workplace::new();
    w.write("secret.json", "{\"secret\": 1}");
    w.write("run/metrics.jsonl", lines(2));
    w.write("run/other.json", "{\"secret\": 1}");
    std::os::unix::fs::symlink(w.path("secret.json"), w.path("run/run.json")).unwrap();
    let watch = Watch::start(&w, &["run", "--port", "0"]);
    let status = |request: &str| watch.raw(request).split(' ').nth(1).unwrap_or_default().to_string();
    let of =
        |method: &str, path: &str, host: &str| status(&format!("{method} {path} HTTP/1.1\r\nhost: {host}\r\n\r\n"));
    // A page whose name was turned to this machine still sends its name.
    assert_eq!(of("GET", "/", "rebound.example:7070"), "403");
    assert_eq!(of("GET", "/", "127.0.0.1.example"), "403");
    assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), "400");
    for host in ["localhost:1", "127.0.0.1", "[::1]:7070"] {
        assert_eq!(of("GET", "/", host), "200", "{host}");
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "get"] {
        assert_eq!(of(method, "/", "localhost"), "405", "{method}");
    }
    for (path, expected) in [
        ("/run/0/../../secret.json", "403"),
        ("/run/0/%2e%2e/secret.json", "403"),
        ("/run/0/..%2fsecret.json", "403"),
        ("/../secret.json", "403"),
        ("/run/0/run.json", "403"),
        ("/run/0/other.json", "404"),
        ("/run/1/metrics.jsonl", "404"),
        ("/run/0//etc/passwd", "404"),
        ("//etc/passwd", "404"),
        ("/run/0/metrics.jsonl", "200"),
    ] {
        let answer = watch.get(path);
        assert_eq!(answer.split(' ').nth(1), Some(expected), "{path}: {answer}");
        assert!(!answer.contains("secret\""), "{path}: {answer}");
    }
    assert_eq!(status("nonsense\r\n\r\n"), "400");
    // It is still there.
    assert_eq!(of("GET", "/main", "localhost"), "200");
}

#[test]
fn a_port_that_is_taken_is_said_with_one_that_is_free() {
    let w = Workplace::new();
    w.write("run/metrics.jsonl", lines(2));
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let outcome = w.run(&["watch", "run", "--port", &port.to_string()]);
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    let said = outcome.error();
    assert!(said.contains(&format!("--port {port}: another program listens on 127.0.0.1:{port}")), "{said}");
    let next: u16 = said.split("--port ").nth(2).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(next == 0 || next > port, "{said}");
    assert!(said.ends_with("--port 0 takes any"), "{said}");
    let outcome = w.run(&["watch", "nothing"]);
    assert_eq!(outcome.code, Some(1));
    assert!(outcome.error().contains("no run is here"), "{}", outcome.stderr);
    let outcome = w.run(&["watch", "run", "--host", "no such host"]);
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.error().starts_with("--host no such host: "), "{}", outcome.stderr);
}
