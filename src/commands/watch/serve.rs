//! Who asks for what: the page, its sections, news of them, and files of the runs by name. Nothing is written, whatever is asked.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::follow::Followed;
use super::http::{Answer, Request, head, is_ours, read};
use crate::error::Result;
use crate::eval::gen_test::SAMPLES;
use crate::log::metrics::METRICS;
use crate::machine;
use crate::train::record::RUN;
use crate::train::state::TRAINER_STATE;

/// Connections at once; more are turned away.
const MOST: usize = 64;
/// How long a request may take to arrive, and an answer to be taken.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a viewer waits without a word.
const SILENCE: Duration = Duration::from_secs(10);
/// Files of a run that are given away, with their types.
const FILES: [(&str, &str); 7] = [
    (METRICS, "application/jsonl; charset=utf-8"),
    (RUN, "application/json"),
    (TRAINER_STATE, "application/json"),
    (SAMPLES, "application/json"),
    ("loss.svg", "image/svg+xml"),
    ("loss.png", "image/png"),
    ("loss-dark.png", "image/png"),
];

/// One connection among those counted.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Answers connections, each in a thread of its own, until the process ends.
///
/// # Errors
/// If no connection can be taken any more.
pub fn serve(listener: &TcpListener, followed: &Arc<Followed>, host: &str) -> Result<()> {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // Of a connection that has gone meanwhile, or for want of files: the next one may do.
            Err(_) => {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let counted = Counted(Arc::clone(&open));
        let full = open.fetch_add(1, Ordering::SeqCst) >= MOST;
        let (followed, host) = (Arc::clone(followed), host.to_string());
        let answer = move || {
            let _counted = counted;
            // A viewer who goes away is none of our business.
            let _ = answer(stream, &followed, &host, full);
        };
        let _ = std::thread::Builder::new().spawn(answer); // Where no thread can be had the connection is closed.
    }
}

fn answer(mut stream: TcpStream, followed: &Followed, host: &str, full: bool) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let request = match read(&mut stream) {
        Ok(request) => request,
        Err(refusal) => return refusal.write(&mut stream),
    };
    if full {
        let refusal = Answer::refusal("503 Service Unavailable", "too many viewers");
        return refusal.write(&mut stream);
    }
    if let Some(refusal) = refused(&request, host) {
        return refusal.write(&mut stream);
    }
    match request.path.as_str() {
        "/" => Answer::html(followed.page()).write(&mut stream),
        "/main" => Answer::html(followed.body().to_string()).write(&mut stream),
        // Browsers ask for it unasked.
        "/favicon.ico" => {
            Answer { status: "204 No Content", kind: "image/x-icon", body: Vec::new() }.write(&mut stream)
        }
        "/events" => news(&mut stream, followed),
        path => file(path, followed).write(&mut stream),
    }
}

/// Why a request is not answered, whatever it asks for.
fn refused(request: &Request, host: &str) -> Option<Answer> {
    if request.method != "GET" {
        return Some(Answer::refusal("405 Method Not Allowed", "only GET is answered: nothing here can be changed"));
    }
    match &request.host {
        None => Some(Answer::refusal("400 Bad Request", "no header Host")),
        Some(name) if !is_ours(name, host, &machine::host()) => {
            Some(Answer::refusal("403 Forbidden", "Host is no name of this machine; use localhost or its address"))
        }
        Some(_) => None,
    }
}

/// Server-sent events (html.spec.whatwg.org, 9.2): the number of the newest version, each time there is one.
fn news(stream: &mut TcpStream, followed: &Followed) -> std::io::Result<()> {
    write!(stream, "{}\r\nretry: 2000\n\n", head("200 OK", "text/event-stream"))?;
    let mut seen = 0;
    loop {
        let (version, pulse) = followed.wait(seen, SILENCE);
        match version > seen {
            true => write!(stream, "data: {version} {}\n\n", pulse.word())?,
            // Without a word now and then a viewer who has gone would never be noticed.
            false => write!(stream, ": still here\n\n")?,
        }
        stream.flush()?;
        seen = version;
    }
}

/// A file of a run: `/run/0/metrics.jsonl`.
fn file(path: &str, followed: &Followed) -> Answer {
    let leaves = path.split('/').any(|part| part == ".." || part.contains(['\\', '\0']));
    if leaves {
        return Answer::refusal("403 Forbidden", "this path leaves the folder of the run");
    }
    let missing = || Answer::refusal("404 Not Found", "nothing is here");
    let Some((number, name)) = path.strip_prefix("/run/").and_then(|rest| rest.split_once('/')) else {
        return missing();
    };
    let known = FILES.iter().find(|(known, _)| *known == name);
    let dir = number.parse::<usize>().ok().and_then(|i| followed.dirs().get(i));
    let (Some(&(name, kind)), Some(dir)) = (known, dir) else { return missing() };
    match within(dir, name) {
        Ok(Some(path)) => match std::fs::read(path) {
            Ok(body) => Answer { status: "200 OK", kind, body },
            Err(_) => missing(),
        },
        Ok(None) => Answer::refusal("403 Forbidden", "this file lies elsewhere"),
        Err(_) => missing(),
    }
}

/// The real path of a file of the folder; none where a link leads out of it.
fn within(dir: &Path, name: &str) -> std::io::Result<Option<std::path::PathBuf>> {
    let (dir, path) = (std::fs::canonicalize(dir)?, std::fs::canonicalize(dir.join(name))?);
    Ok(Some(path).filter(|p| p.starts_with(&dir) && p.is_file()))
}
