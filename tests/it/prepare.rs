//! `prepare`: conversions of real upstream forms, and downloads from a server that misbehaves.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ringtune::datasets::{Dataset, Downloader, Paths, PrepareSpec, RemoteFile, run};
use serde_json::{Value, json};

/// What the test server does with one connection.
#[derive(Clone)]
enum Act {
    /// Serves what was asked for, honouring a range.
    Serve,
    /// Announces the whole and closes the connection after this many bytes.
    CutAfter(usize),
    /// Answers a status with these headers and no body.
    Status(u16, &'static str),
    /// Names a checksum that is not that of the body.
    WrongChecksum,
    /// Redirects to another address.
    Redirect(String),
    /// Sends this many bytes and then nothing, the connection left open.
    SilentAfter(usize),
    /// Serves another version of the file, of the same length and under another tag, honouring a range.
    Changed,
}

struct Server {
    endpoint: String,
    /// Heads of the requests, in order.
    seen: Arc<Mutex<Vec<String>>>,
}

/// Serves `body` on the loopback interface, one action a connection; the last action repeats. Ends with the process.
fn serve(body: Vec<u8>, acts: Vec<Act>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let heads = seen.clone();
    std::thread::spawn(move || {
        for (turn, stream) in listener.incoming().take(40).enumerate() {
            let act = acts[turn.min(acts.len() - 1)].clone();
            answer(stream.unwrap(), &body, act, &heads);
        }
    });
    Server { endpoint, seen }
}

fn answer(mut stream: TcpStream, body: &[u8], act: Act, heads: &Mutex<Vec<String>>) {
    let mut head = Vec::new();
    let mut byte = [0u8; 1];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    heads.lock().unwrap().push(head.clone());
    let range = head.split("range: bytes=").nth(1).and_then(|r| r.split('-').next());
    let from: usize = range.map_or(0, |n| n.parse().unwrap());
    let (status, range) = match from {
        0 => ("200 OK", String::new()),
        _ => ("206 Partial Content", format!("content-range: bytes {from}-{}/{}\r\n", body.len() - 1, body.len())),
    };
    let length = body.len() - from;
    let (tag, other) = (if matches!(act, Act::Changed) { "v2" } else { "v1" }, changed(body));
    let head = |extra: &str| {
        format!(
            "HTTP/1.1 {status}\r\netag: \"{tag}\"\r\n{extra}{range}content-length: {length}\r\nconnection: close\r\n\r\n"
        )
    };
    let bare = |status: &str, extra: &str| {
        format!("HTTP/1.1 {status}\r\n{extra}content-length: 0\r\nconnection: close\r\n\r\n")
    };
    let silent = matches!(act, Act::SilentAfter(_));
    let (front, sent) = match act {
        Act::Serve => (head(""), &body[from..]),
        Act::Changed => (head(""), &other[from..]),
        Act::CutAfter(n) | Act::SilentAfter(n) => (head(""), &body[from..(from + n).min(body.len())]),
        Act::WrongChecksum => (head(&format!("x-linked-etag: \"{}\"\r\n", "0".repeat(64))), &body[from..]),
        Act::Status(code, headers) => (bare(&format!("{code} x"), headers), &body[..0]),
        Act::Redirect(to) => (bare("302 Found", &format!("location: {to}\r\n")), &body[..0]),
    };
    // The client may hang up first; that is its right.
    let _ = stream.write_all(front.as_bytes()).and_then(|()| stream.write_all(sent));
    if silent {
        // The next connection is answered while this one is still open.
        std::thread::spawn(move || (std::thread::sleep(Duration::from_secs(60)), stream));
    }
}

const FILE: RemoteFile = RemoteFile { repo: "owner/set", path: "sub/file.jsonl" };

fn downloader(server: &Server, cache: &Path) -> Downloader {
    Downloader {
        endpoint: server.endpoint.clone(),
        token: None,
        cache: cache.to_path_buf(),
        attempts: 4,
        backoff: Duration::from_millis(5),
        stall: Duration::from_millis(300),
    }
}

fn body() -> Vec<u8> {
    (0..100_000u32).flat_map(u32::to_le_bytes).collect()
}

#[test]
fn a_cut_connection_is_resumed_where_it_broke() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(body(), vec![Act::CutAfter(150_000), Act::CutAfter(100_000), Act::Serve]);
    let path = downloader(&server, dir.path()).fetch(FILE).unwrap();
    assert!(fs::read(&path).unwrap() == body(), "the file differs from what the server has");
    let seen = server.seen.lock().unwrap().clone();
    assert_eq!(seen.len(), 3);
    assert!(seen[0].starts_with("get /datasets/owner/set/resolve/main/sub/file.jsonl "), "{}", seen[0]);
    assert!(seen[1].contains("range: bytes=150000-") && seen[2].contains("range: bytes=250000-"), "{seen:?}");
    // A second fetch takes the cached copy.
    downloader(&server, dir.path()).fetch(FILE).unwrap();
    assert_eq!(server.seen.lock().unwrap().len(), 3);
    let left: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["file.jsonl"], "partial files are left");
}

/// Another version of the file.
fn changed(body: &[u8]) -> Vec<u8> {
    body.iter().map(|b| b ^ 1).collect()
}

#[test]
fn nothing_is_appended_to_the_first_part_of_another_version() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(body(), vec![Act::CutAfter(150_000), Act::Changed]);
    let path = downloader(&server, dir.path()).fetch(FILE).unwrap();
    assert!(fs::read(&path).unwrap() == changed(&body()), "the file is not the one version that the server has");
}

#[test]
fn a_silent_connection_is_left_and_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(body(), vec![Act::SilentAfter(150_000), Act::Serve]);
    let start = std::time::Instant::now();
    let path = downloader(&server, dir.path()).fetch(FILE).unwrap();
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert!(fs::read(&path).unwrap() == body());
    assert!(server.seen.lock().unwrap()[1].contains("range: bytes=150000-"), "{:?}", server.seen.lock().unwrap());
}

#[test]
fn busy_and_broken_servers_are_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let acts = vec![Act::Status(429, "retry-after: 0\r\n"), Act::Status(500, ""), Act::Status(503, ""), Act::Serve];
    let server = serve(body(), acts);
    let path = downloader(&server, dir.path()).fetch(FILE).unwrap();
    assert!(fs::read(path).unwrap() == body());
}

#[test]
fn giving_up_names_the_cause_and_leaves_no_finished_file() {
    for (act, want) in [
        (Act::Status(500, ""), "the server answered 500; gave up after 4 attempts"),
        (Act::CutAfter(0), "gave up after 4 attempts"),
        (Act::Status(404, ""), "the server answered 404; expected 200"),
        (Act::Status(401, ""), "access denied (status 401); set HF_TOKEN"),
        (Act::WrongChecksum, "checksum mismatch: expected sha256 0000"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let server = serve(body(), vec![act]);
        let error = downloader(&server, dir.path()).fetch(FILE).unwrap_err().to_string();
        assert!(error.contains(want), "expected {want:?} in: {error}");
        assert!(!dir.path().join("owner--set/sub/file.jsonl").exists());
    }
}

#[test]
fn the_token_stays_with_the_endpoint() {
    let dir = tempfile::tempdir().unwrap();
    let storage = serve(body(), vec![Act::Serve]);
    let server = serve(body(), vec![Act::Redirect(format!("{}/blob", storage.endpoint))]);
    let mut d = downloader(&server, dir.path());
    d.token = Some("secret".to_string());
    let path = d.fetch(FILE).unwrap();
    assert!(fs::read(path).unwrap() == body());
    assert!(server.seen.lock().unwrap()[0].contains("authorization: bearer secret"));
    assert!(!storage.seen.lock().unwrap()[0].contains("authorization"));
}

fn spec(source: &Path, output: &Path, datasets: &[Dataset]) -> PrepareSpec {
    PrepareSpec {
        datasets: datasets.to_vec(),
        output_dir: output.to_path_buf(),
        source_dir: Some(source.to_path_buf()),
        cache_dir: None,
        multi_turn: false,
        paths: Paths::Best,
    }
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn handmade_edge_cases_of_all_three_sets() {
    let out = tempfile::tempdir().unwrap();
    let got = run(&spec(Path::new("tests/data/prepare"), out.path(), &Dataset::ALL)).unwrap();
    let dolly = lines(&out.path().join("dolly15k.jsonl"));
    assert_eq!(dolly[0], json!({"prompt": "Summarise the note.", "response": "There is nothing to summarise."}));
    assert_eq!(dolly[1]["prompt"], "Spaces around\n\nLine one\nLine two\ttabbed");
    assert_eq!((got[0].records, got[0].kept), (6, 4));
    let oasst = lines(&out.path().join("oasst1_en.jsonl"));
    let prompts: Vec<_> = oasst.iter().map(|r| r["prompt"].as_str().unwrap()).collect();
    assert_eq!(prompts, ["Name a prime number.", "And a bigger one?", "Rejected by review", "review_result is null"]);
    assert_eq!(oasst[0]["response"], "Seven is prime.");
    assert_eq!(oasst[2]["response"], "fine answer");
    let alpaca = lines(&out.path().join("alpaca.jsonl"));
    assert_eq!(alpaca.len(), 4);
    assert_eq!(alpaca[1]["prompt"], "Identify the odd one out.\n\nTwitter, Instagram, Telegram");
    assert_eq!(alpaca[2]["prompt"], "Count the words.");
    // The same bytes again.
    let again = tempfile::tempdir().unwrap();
    run(&spec(Path::new("tests/data/prepare"), again.path(), &Dataset::ALL)).unwrap();
    for d in Dataset::ALL {
        assert_eq!(fs::read(out.path().join(d.output())).unwrap(), fs::read(again.path().join(d.output())).unwrap());
    }
}

#[test]
fn conversations_keep_their_turns() {
    let out = tempfile::tempdir().unwrap();
    let mut s = spec(Path::new("tests/data/prepare"), out.path(), &[Dataset::Oasst1]);
    s.multi_turn = true;
    run(&s).unwrap();
    let first = &lines(&out.path().join("oasst1_en.jsonl"))[0]["messages"];
    let roles: Vec<_> = first.as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["user", "assistant", "user", "assistant"]);
    assert_eq!(first[3]["content"], "7919");
}

#[test]
fn gzip_gives_the_same_rows_and_damage_is_named() {
    let (src, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let plain = fs::read("tests/data/prepare/raw_dolly_edge.jsonl").unwrap();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gz.write_all(&plain).unwrap();
    let gz = gz.finish().unwrap();
    let path = src.path().join("databricks-dolly-15k.jsonl");
    fs::write(&path, &gz).unwrap();
    assert_eq!(run(&spec(src.path(), out.path(), &[Dataset::Dolly15k])).unwrap()[0].kept, 4);
    for (bytes, want) in [
        (&gz[..gz.len() / 2], "databricks-dolly-15k.jsonl"),
        (&plain[..plain.len() - 20], "databricks-dolly-15k.jsonl:6: expected one JSON object a line"),
        (&b""[..], "the file is empty"),
        (&b"PAR1 and nothing else PAR1"[..], "Parquet file"),
        (&b"[{\"instruction\": 3}]"[..], "record 1: field \"instruction\": expected a string, found a number"),
        (&b"{\"instruction\": \"x\", \"response\": \"\"}"[..], "no usable row in 1 records"),
    ] {
        fs::write(&path, bytes).unwrap();
        let error = run(&spec(src.path(), out.path(), &[Dataset::Dolly15k])).unwrap_err().to_string();
        assert!(error.contains(want) && error.starts_with("dolly15k: "), "expected {want:?} in: {error}");
        assert_eq!(lines(&out.path().join("dolly15k.jsonl")).len(), 4, "the finished file must stay");
    }
    let error = run(&spec(src.path(), out.path(), &[Dataset::Alpaca])).unwrap_err().to_string();
    assert!(error.contains("no file for alpaca") && error.contains("found none"), "{error}");
}

#[test]
fn the_command_writes_what_the_readme_promises() {
    let out = tempfile::tempdir().unwrap();
    let program = || std::process::Command::new(env!("CARGO_BIN_EXE_ringtune"));
    let run = |args: &[&str]| program().arg("prepare").args(args).arg("--output_dir").arg(out.path()).output().unwrap();
    let got = run(&["--dataset", "all", "--source-dir", "tests/data/prepare"]);
    let text = String::from_utf8_lossy(&got.stdout).into_owned();
    assert!(got.status.success(), "{}", String::from_utf8_lossy(&got.stderr));
    assert!(text.contains("dolly15k.jsonl: 4 rows of 6 records"), "{text}");
    assert!(String::from_utf8_lossy(&got.stderr).contains("dropped: 1 x empty instruction"));
    assert_eq!(lines(&out.path().join("oasst1_en.jsonl")).len(), 4);
    let got = run(&["--dataset", "dolly"]);
    assert_eq!(got.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&got.stderr).contains("dolly15k"), "the nearest names are shown");
    let got = run(&["--dataset", "alpaca", "--source-dir", "tests/data/handmade"]);
    assert_eq!(got.status.code(), Some(1));
}
