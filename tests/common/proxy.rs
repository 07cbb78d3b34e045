//! A proxy on the loopback interface that tunnels (CONNECT), knows the names it is told, and refuses as it is told; and TLS in front of a
//! server that speaks none.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// A proxy; it ends with it.
pub struct Proxy {
    at: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
    refusals: Arc<Mutex<VecDeque<u16>>>,
    gone: Arc<AtomicBool>,
}

impl Proxy {
    /// Leads to these ports of this machine under these names, for who sends this `Proxy-Authorization`, where there is one.
    pub fn start(names: &[(&str, u16)], wanted: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Self {
            at: listener.local_addr().unwrap(),
            seen: Arc::default(),
            refusals: Arc::default(),
            gone: Arc::default(),
        };
        let names: Vec<(String, u16)> = names.iter().map(|(name, port)| (name.to_string(), *port)).collect();
        let (seen, refusals, gone) = (Arc::clone(&proxy.seen), Arc::clone(&proxy.refusals), Arc::clone(&proxy.gone));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if gone.load(Ordering::SeqCst) {
                    return;
                }
                let (names, seen, refusals, stream) =
                    (names.clone(), Arc::clone(&seen), Arc::clone(&refusals), stream.unwrap());
                std::thread::spawn(move || tunnel(stream, &names, wanted, &seen, &refusals));
            }
        });
        proxy
    }

    /// Host and port.
    pub fn address(&self) -> String {
        self.at.to_string()
    }

    /// Answers the next requests with these statuses.
    pub fn refuse(&self, statuses: &[u16]) {
        self.refusals.lock().unwrap().extend(statuses);
    }

    /// Heads of the requests since the last call.
    pub fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.at);
    }
}

fn tunnel(
    mut client: TcpStream,
    names: &[(String, u16)],
    wanted: Option<&str>,
    seen: &Mutex<Vec<String>>,
    refusals: &Mutex<VecDeque<u16>>,
) {
    let mut head = Vec::new();
    let mut byte = [0u8; 1];
    while !head.ends_with(b"\r\n\r\n") && client.read(&mut byte).is_ok_and(|n| n == 1) {
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    if head.is_empty() {
        return;
    }
    seen.lock().unwrap().push(head.clone());
    let host = head.strip_prefix("CONNECT ").and_then(|rest| rest.split(':').next()).unwrap_or_default();
    let port = names.iter().find(|(name, _)| name == host).map(|(_, port)| *port);
    let known = wanted.is_none_or(|wanted| head.lines().any(|l| l == format!("Proxy-Authorization: Basic {wanted}")));
    let status = match refusals.lock().unwrap().pop_front() {
        Some(status) => status,
        None if !known => 407,
        None if port.is_none() => 502,
        None => 200,
    };
    // Who was refused hangs up.
    let _ = client.write_all(format!("HTTP/1.1 {status} it\r\n\r\n").as_bytes());
    if let (200, Some(port)) = (status, port) {
        let server = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        std::thread::spawn(move || pump(from, to));
        pump(server, client);
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream) {
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

/// TLS with a certificate of tests/data/tls in front of a port of this machine; it ends with it.
pub struct TlsFront {
    /// Its port.
    pub port: u16,
    program: Child,
}

impl TlsFront {
    /// `None` without Python.
    pub fn start(tls: &Path, certificate: &str, port: u16) -> Option<Self> {
        let mut program = Command::new("python3")
            .arg(tls.join("front.py"))
            .arg(tls.join(certificate))
            .arg(port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut line = String::new();
        BufReader::new(program.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Some(Self { port: line.trim().parse().ok()?, program })
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        // Its input ends: so does it.
        drop(self.program.stdin.take());
        let _ = self.program.wait();
    }
}
