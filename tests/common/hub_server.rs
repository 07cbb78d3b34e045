//! A hub on the loopback interface: its API, redirects to a storage on another port, ranges, tokens, refusals, and faults on request.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The commit of every repository here.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a repository demands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    #[default]
    Open,
    /// Described to all, given to those whose licence was accepted: with the token `good`.
    Gated,
}

/// What the storage does with a request, once.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Closes the connection after so many bytes.
    Cut(usize),
    /// Sends so many bytes and then nothing.
    Stall(usize),
    /// Sends other bytes of the same number.
    Wrong,
    /// Sends so many bytes as if they were all.
    Short(usize),
    /// Answers this status.
    Status(u16),
    /// Sends all, whatever range was asked for.
    NoRange,
}

/// How the hub tags files that are not large.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tags {
    #[default]
    Strong,
    /// `W/"…"`.
    Weak,
    /// In a manner of its own.
    Odd,
    None,
}

#[derive(Default)]
struct State {
    repos: BTreeMap<String, (Access, BTreeMap<String, Vec<u8>>)>,
    faults: VecDeque<Fault>,
    small_faults: VecDeque<Fault>,
    tags: Tags,
    busy: usize,
    limited: usize,
    /// Where the storage is said to be.
    storage: Option<String>,
    names_only: bool,
    huge: bool,
    seen: Vec<String>,
    stored: Vec<String>,
}

/// The hub and its storage; both end with it.
pub struct HubServer {
    state: Arc<Mutex<State>>,
    hub: SocketAddr,
    storage: SocketAddr,
    gone: Arc<AtomicBool>,
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// The name of a file's content: sha256 of large files, else git's hash.
pub fn etag(path: &str, bytes: &[u8]) -> String {
    if is_large(path) { sha256(bytes) } else { git_hash(bytes) }
}

/// What git itself says; for what is asked for again and again, once.
fn git_hash(bytes: &[u8]) -> String {
    static KNOWN: Mutex<BTreeMap<Vec<u8>, String>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap();
    let ask = || {
        let mut git = Command::new("git")
            .args(["hash-object", "--stdin"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        git.stdin.take().unwrap().write_all(bytes).unwrap();
        let hash = String::from_utf8(git.wait_with_output().unwrap().stdout).unwrap().trim().to_string();
        assert_eq!(hash.len(), 40, "git hash-object gave {hash:?}");
        hash
    };
    known.entry(bytes.to_vec()).or_insert_with(ask).clone()
}

fn is_large(path: &str) -> bool {
    [".safetensors", ".parquet", ".model", ".bin"].iter().any(|e| path.ends_with(e))
}

impl HubServer {
    /// An empty one.
    pub fn start() -> Self {
        let bind = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, storage) = (bind(), bind());
        let server = Self {
            state: Arc::default(),
            hub: hub.local_addr().unwrap(),
            storage: storage.local_addr().unwrap(),
            gone: Arc::default(),
        };
        let to = server.storage;
        server.serve(hub, move |state, stream, head| hub_answers(state, stream, head, to));
        server.serve(storage, storage_answers);
        server
    }

    fn serve(&self, listener: TcpListener, answer: impl Fn(&Mutex<State>, TcpStream, &str) + Send + Sync + 'static) {
        let (state, gone, answer) = (Arc::clone(&self.state), Arc::clone(&self.gone), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if gone.load(Ordering::SeqCst) {
                    return;
                }
                let (state, answer, mut stream) = (Arc::clone(&state), Arc::clone(&answer), stream.unwrap());
                std::thread::spawn(move || {
                    let mut head = Vec::new();
                    let mut byte = [0u8; 1];
                    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
                        head.push(byte[0]);
                    }
                    let head = String::from_utf8_lossy(&head).into_owned();
                    if !head.is_empty() {
                        answer(&state, stream, &head);
                    }
                });
            }
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Its address.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.hub)
    }

    /// Adds files to `models/org/name` or `datasets/org/name`.
    pub fn put(&self, repo: &str, files: &[(&str, Vec<u8>)]) {
        let mut state = self.state();
        let known = &mut state.repos.entry(repo.into()).or_default().1;
        known.extend(files.iter().map(|(path, bytes)| (path.to_string(), bytes.clone())));
    }

    /// Who may have it.
    pub fn close(&self, repo: &str, access: Access) {
        self.state().repos.get_mut(repo).unwrap().0 = access;
    }

    /// The storage's next answers.
    pub fn fault(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state().faults.extend(faults);
    }

    /// The hub's next answers with files that are not large.
    pub fn fault_small(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state().small_faults.extend(faults);
    }

    /// How files that are not large are tagged.
    pub fn tags(&self, tags: Tags) {
        self.state().tags = tags;
    }

    /// The hub is busy for the next `n` requests.
    pub fn busy(&self, n: usize) {
        self.state().busy = n;
    }

    /// So many requests of the hub are too many.
    pub fn limited(&self, n: usize) {
        self.state().limited = n;
    }

    /// The hub leads to the storage under this address, without a final slash.
    pub fn storage_at(&self, address: &str) {
        self.state().storage = Some(address.into());
    }

    /// Ports of this machine: the hub's.
    pub fn port(&self) -> u16 {
        self.hub.port()
    }

    /// The storage's.
    pub fn storage_port(&self) -> u16 {
        self.storage.port()
    }

    /// Lists names without sizes and tags, as some mirrors do.
    pub fn names_only(&self) {
        self.state().names_only = true;
    }

    /// Says that every file is larger than any disk.
    pub fn huge(&self) {
        self.state().huge = true;
    }

    /// Heads of the requests to the hub since the last call, in small letters.
    pub fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.state().seen)
    }

    /// As [`HubServer::seen`], of the storage.
    pub fn stored(&self) -> Vec<String> {
        std::mem::take(&mut self.state().stored)
    }
}

impl Drop for HubServer {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::SeqCst);
        for address in [self.hub, self.storage] {
            let _ = TcpStream::connect(address);
        }
    }
}

fn send(mut stream: TcpStream, status: &str, headers: &[(&str, String)], body: &[u8], length: usize) {
    let mut head = format!("HTTP/1.1 {status}\r\n");
    headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    head += &format!("content-length: {length}\r\nconnection: close\r\n\r\n");
    // The client may hang up first; that is its right.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
}

fn refuse(stream: TcpStream, status: u16, code: &str) {
    send(stream, &format!("{status} no"), &[("x-error-code", code.into())], b"", 0);
}

fn hub_answers(state: &Mutex<State>, stream: TcpStream, head: &str, storage: SocketAddr) {
    let mut state = state.lock().unwrap();
    state.seen.push(head.to_lowercase());
    if state.busy > 0 {
        state.busy -= 1;
        return send(stream, "503 busy", &[("retry-after", "0".into())], b"", 0);
    }
    if state.limited > 0 {
        state.limited -= 1;
        return send(stream, "429 slowly", &[("ratelimit", "\"api\";r=0;t=0".into())], b"", 0);
    }
    let path = head.split(' ').nth(1).unwrap_or_default().split('?').next().unwrap_or_default().trim_start_matches('/');
    let path = path.strip_prefix("mirror/hf/").unwrap_or(path);
    let token =
        head.to_lowercase().split("authorization: bearer ").nth(1).and_then(|t| t.lines().next()).map(String::from);
    if let Some(rest) = path.strip_prefix("api/resolve-cache/") {
        let (repo, file) = rest.split_once("//").unwrap();
        let bytes = state.repos[repo].1[file].clone();
        let headers: Vec<(&str, String)> = match state.tags {
            Tags::Strong => vec![("etag", format!("\"{}\"", etag(file, &bytes)))],
            Tags::Weak => vec![("etag", format!("W/\"{}\"", etag(file, &bytes)))],
            Tags::Odd => vec![("etag", format!("\"{:x}:gzip\"", bytes.len()))],
            Tags::None => Vec::new(),
        };
        if head.starts_with("HEAD") {
            return send(stream, "200 OK", &headers, b"", bytes.len());
        }
        let fault = state.small_faults.pop_front();
        drop(state);
        return send_with(fault, stream, "200 OK", &headers, &bytes);
    }
    if let Some(rest) = path.strip_prefix("api/") {
        let (repo, revision) = rest.split_once("/revision/").unwrap();
        let Some((_, files)) = state.repos.get(repo) else {
            return refuse(stream, if token.is_some() { 404 } else { 401 }, "RepoNotFound");
        };
        if ![COMMIT, "main", "v1"].contains(&revision) {
            return refuse(stream, 404, "RevisionNotFound");
        }
        let of = |(path, bytes): (&String, &Vec<u8>)| {
            let size = if state.huge { 1 << 60 } else { bytes.len() as u64 };
            let mut file = json!({"rfilename": path});
            if !state.names_only {
                file["size"] = json!(size);
                // Of a large file that is the hash of its pointer.
                file["blobId"] = json!(if is_large(path) { git_hash(b"a pointer") } else { git_hash(bytes) });
                if is_large(path) {
                    file["lfs"] = json!({"sha256": sha256(bytes), "size": size, "pointerSize": 130});
                }
            }
            file
        };
        let body = json!({"sha": COMMIT, "siblings": files.iter().map(of).collect::<Vec<Value>>()}).to_string();
        return send(stream, "200 OK", &[], body.as_bytes(), body.len());
    }
    let (repo, rest) = path.split_once("/resolve/").unwrap();
    let repo = if repo.starts_with("datasets/") { repo.to_string() } else { format!("models/{repo}") };
    let (commit, file) = rest.split_once('/').unwrap();
    assert_eq!(commit, COMMIT, "files are asked for by commit");
    let Some((access, files)) = state.repos.get(&repo) else { return refuse(stream, 404, "RepoNotFound") };
    if *access == Access::Gated && token.as_deref() != Some("good") {
        return refuse(stream, if token.is_some() { 403 } else { 401 }, "GatedRepo");
    }
    let Some(bytes) = files.get(file) else { return refuse(stream, 404, "EntryNotFound") };
    let mut headers = vec![("x-repo-commit", COMMIT.to_string())];
    if is_large(file) {
        headers.push(("x-linked-etag", format!("\"{}\"", sha256(bytes))));
        headers.push(("x-linked-size", bytes.len().to_string()));
        let storage = state.storage.clone().unwrap_or_else(|| format!("http://{storage}"));
        headers.push(("location", format!("{storage}/{repo}//{file}")));
        // Of who takes pieces of files; the whole is had without.
        headers.push(("x-xet-hash", sha256(bytes)));
        headers.push(("link", format!("<{storage}/xet>; rel=\"xet-auth\"")));
    } else {
        headers.push(("location", format!("/api/resolve-cache/{repo}//{file}")));
    }
    send(stream, "302 Found", &headers, b"", 0);
}

fn storage_answers(state: &Mutex<State>, stream: TcpStream, head: &str) {
    let mut state = state.lock().unwrap();
    state.stored.push(head.to_lowercase());
    let path = head.split(' ').nth(1).unwrap_or_default().trim_start_matches('/');
    let (repo, file) = path.split_once("//").unwrap();
    let fault = state.faults.pop_front();
    let bytes = state.repos[repo].1[file].clone();
    drop(state);
    let (fault, whole) = match fault {
        Some(Fault::NoRange) => (None, true),
        fault => (fault, false),
    };
    let range = head.to_lowercase().split("range: bytes=").nth(1).and_then(|r| r.split('-').next()?.parse().ok());
    let from: usize = range.filter(|_| !whole).unwrap_or(0);
    let rest = &bytes[from.min(bytes.len())..];
    let headers = [("content-range", format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len()))];
    let (status, headers) = if from == 0 { ("200 OK", &headers[..0]) } else { ("206 Partial Content", &headers[..]) };
    send_with(fault, stream, status, headers, rest);
}

/// Sends bytes, or what a fault makes of them.
fn send_with(fault: Option<Fault>, stream: TcpStream, status: &str, headers: &[(&str, String)], rest: &[u8]) {
    match fault {
        None | Some(Fault::NoRange) => send(stream, status, headers, rest, rest.len()),
        Some(Fault::Status(code)) => send(stream, &format!("{code} x"), &[], b"", 0),
        Some(Fault::Cut(n)) => send(stream, status, headers, &rest[..n.min(rest.len())], rest.len()),
        Some(Fault::Short(n)) => send(stream, status, headers, &rest[..n], n),
        Some(Fault::Wrong) => {
            let other: Vec<u8> = rest.iter().map(|b| b ^ 1).collect();
            send(stream, status, headers, &other, rest.len());
        }
        Some(Fault::Stall(n)) => {
            let open = stream.try_clone().unwrap();
            send(stream, status, headers, &rest[..n.min(rest.len())], rest.len());
            std::thread::sleep(Duration::from_secs(120));
            drop(open);
        }
    }
}
