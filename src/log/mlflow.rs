//! Figures for an MLflow server, by its REST API (mlflow.org/docs/latest/api_reference/rest-api.html): `experiments/get-by-name` and
//! `create`, `runs/create`, `log-batch` and `update`.
//!
//! A thread of its own sends them, so that a server that is slow or gone never keeps a training waiting: the queue is bounded, what does
//! not fit is counted, the first failure is said once, and at the end in one line how much was not sent. A run that is resumed goes on in
//! the same run of MLflow, whose id is in `mlflow.json`. A run that is killed says nothing any more: there it stays `RUNNING`.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde_json::{Value, json};

use super::mlflow_server::{Failure, Server};
use crate::error::Result;
use crate::files::{read_text, write_json};
use crate::text::plural;

/// The file with the id of the run, in the run's folder.
pub const MLFLOW: &str = "mlflow.json";
/// Limits of a request, as the REST API names them.
const METRICS_OF_A_BATCH: usize = 1000;
const PARAMETERS_OF_A_BATCH: usize = 100;
const LONGEST_KEY: usize = 250;
const LONGEST_VALUE: usize = 6000;
/// Calls of [`Mlflow::scalars`] that wait for the thread.
const QUEUE: usize = 1024;
/// Values that wait for a server that does not answer.
const KEPT: usize = 20_000;
/// How long values are gathered before they are sent.
const GATHERED: Duration = Duration::from_secs(2);
/// How long the end of a run waits for an answer, and for all of them.
const PATIENCE: Duration = Duration::from_secs(5);
const LONGEST_END: Duration = Duration::from_secs(30);
/// Pauses after a failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How a run ended, in MLflow's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// All of it was done.
    Finished,
    /// An error ended it.
    Failed,
    /// A signal ended it; it can be resumed.
    Killed,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Status::Finished => "FINISHED",
            Status::Failed => "FAILED",
            Status::Killed => "KILLED",
        }
    }
}

/// What is said of the run at its start.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// Its name.
    pub name: String,
    /// Settings and their values.
    pub parameters: Vec<(String, String)>,
}

enum Entry {
    Metrics(Vec<Value>),
    End(Status),
}

/// What both threads know.
#[derive(Default)]
struct Shared {
    /// The server has the run's end.
    ended: AtomicBool,
    /// Requests that were answered.
    answers: AtomicU64,
    /// Values that were to be sent, and those that were.
    given: AtomicU64,
    sent: AtomicU64,
    /// What is to be said, by the thread that may print.
    said: Mutex<Vec<String>>,
    /// Why the run's end could not be sent.
    why: Mutex<Option<String>>,
}

impl Shared {
    fn say(&self, what: String) {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }
}

/// The way to a server.
pub struct Mlflow {
    queue: Sender<Entry>,
    done: Receiver<()>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    uri: String,
}

impl Mlflow {
    /// Starts the thread that sends. `dir` is the run's folder; a run that goes on after step `resumed_at` goes on in MLflow too.
    ///
    /// # Errors
    /// A usage error where the environment names no server.
    pub fn start(dir: &Path, resumed_at: u64, about: About) -> Result<Self> {
        let server = Server::from_env()?;
        let (record, uri) = (dir.join(MLFLOW), server.uri.clone());
        let (given, continued) = (server.run_of_env(), earlier(&record, &server.uri).filter(|_| resumed_at > 0));
        let (queue, entries) = bounded(QUEUE);
        let (finished, done) = bounded(1);
        let shared = Arc::new(Shared::default());
        let worker = Worker {
            server,
            record,
            given,
            continued,
            about,
            shared: Arc::clone(&shared),
            run: None,
            waiting: Vec::new(),
            pause: FIRST_PAUSE,
            not_before: Instant::now(),
            dead: false,
            ending: false,
            warned: false,
        };
        let thread = std::thread::Builder::new().name("mlflow".into()).spawn(move || {
            worker.work(&entries);
            let _ = finished.send(()); // Whoever waited may have gone on.
        })?;
        Ok(Self { queue, done, thread: Some(thread), shared, uri })
    }

    /// Values at a step; those that are not finite are left out.
    pub fn scalars(&self, step: u64, values: &[(&str, f64)]) {
        let now = milliseconds();
        let finite = values.iter().filter(|(_, v)| v.is_finite());
        let metrics: Vec<Value> =
            finite.map(|(name, v)| json!({"key": key(name), "value": v, "timestamp": now, "step": step})).collect();
        self.shared.given.fetch_add(metrics.len() as u64, Ordering::SeqCst);
        let _ = self.queue.try_send(Entry::Metrics(metrics)); // What finds no room was given and is not sent: it is counted so.
    }

    /// What went wrong since this was asked last.
    pub fn warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.said.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends what is left and how the run ended, as long as the server answers and for half a minute at most.
    pub fn end(&mut self, status: Status) {
        let Some(thread) = self.thread.take() else { return };
        let start = Instant::now();
        let mut silent = self.queue.send_timeout(Entry::End(status), PATIENCE).is_err();
        while !silent {
            let before = self.shared.answers.load(Ordering::SeqCst);
            match self.done.recv_timeout(PATIENCE) {
                Ok(()) => {
                    let _ = thread.join(); // A panic of it was said by itself.
                    break;
                }
                // The thread is left to its request; the process ends with the run.
                Err(_) => {
                    silent = self.shared.answers.load(Ordering::SeqCst) == before || start.elapsed() > LONGEST_END;
                }
            }
        }
        let of = |count: &AtomicU64| count.load(Ordering::SeqCst);
        let lost = of(&self.shared.given).saturating_sub(of(&self.shared.sent));
        let lost = (lost > 0).then(|| plural(lost as usize, "value"));
        let end = (!self.shared.ended.load(Ordering::SeqCst)).then(|| "the end of the run".to_string());
        let unsent: Vec<String> = lost.into_iter().chain(end).collect();
        if !unsent.is_empty() {
            let why = self.shared.why.lock().unwrap_or_else(PoisonError::into_inner).take();
            let why = if silent { Some(format!("no answer for {} s", PATIENCE.as_secs())) } else { why };
            let why = why.map_or(String::new(), |why| format!(" ({why})"));
            self.shared.say(format!("not sent to MLflow at {}{why}: {}", self.uri, unsent.join(", ")));
        }
    }
}

impl Drop for Mlflow {
    fn drop(&mut self) {
        self.end(Status::Failed);
    }
}

fn milliseconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// A name as MLflow allows it: letters, digits, `_-. :` and parts between slashes that are no `.` or `..`.
fn key(name: &str) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "_-. ".contains(c) { c } else { '_' };
    let part = |part: &str| match part.chars().all(|c| c == '.') {
        true => "_".to_string(),
        false => part.chars().map(allowed).collect(),
    };
    let parts: Vec<String> = name.split('/').map(part).collect();
    parts.join("/").chars().take(LONGEST_KEY).collect()
}

/// The run of MLflow that an earlier part of this run wrote to, on the same server.
fn earlier(record: &Path, uri: &str) -> Option<String> {
    let value: Value = serde_json::from_str(&read_text(record, 1 << 20).ok()?).ok()?;
    (value["tracking_uri"].as_str()? == uri).then(|| value["run_id"].as_str().map(String::from))?
}

/// What sends.
struct Worker {
    server: Server,
    record: PathBuf,
    /// The run that the environment names.
    given: Option<String>,
    /// The run that goes on.
    continued: Option<String>,
    about: About,
    shared: Arc<Shared>,
    /// The run, once it is there.
    run: Option<String>,
    waiting: Vec<Value>,
    pause: Duration,
    not_before: Instant,
    /// Nothing will be sent any more.
    dead: bool,
    /// What fails now is said with what was not sent.
    ending: bool,
    warned: bool,
}

impl Worker {
    fn work(mut self, entries: &Receiver<Entry>) {
        let mut sent = Instant::now();
        // The run is there before its first value.
        self.flush();
        loop {
            let end = match entries.recv_timeout(GATHERED) {
                Ok(Entry::Metrics(values)) => {
                    self.keep(values);
                    None
                }
                Ok(Entry::End(status)) => Some(status),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => Some(Status::Failed),
            };
            if let Some(status) = end {
                return self.finish(status);
            }
            if sent.elapsed() >= GATHERED || self.waiting.len() >= METRICS_OF_A_BATCH {
                self.flush();
                sent = Instant::now();
            }
        }
    }

    fn keep(&mut self, values: Vec<Value>) {
        let room = if self.dead { 0 } else { KEPT.saturating_sub(self.waiting.len()) };
        self.waiting.extend(values.into_iter().take(room));
    }

    fn finish(mut self, status: Status) {
        (self.ending, self.not_before) = (true, Instant::now());
        self.flush();
        if let Some(run) = self.run.clone().filter(|_| !self.dead) {
            let end = json!({"run_id": run, "status": status.word(), "end_time": milliseconds()});
            let ended = self.post("runs/update", &end).map(drop);
            self.shared.ended.store(ended.is_ok(), Ordering::SeqCst);
            self.note(ended);
        }
    }

    /// Sends what waits, unless a failure was a moment ago.
    fn flush(&mut self) {
        if self.dead || Instant::now() < self.not_before {
            return;
        }
        let sent = self.send();
        self.note(sent);
    }

    /// Says the first failure, and waits longer after each.
    fn note(&mut self, result: Result<(), Failure>) {
        let Err(failure) = result else {
            self.pause = FIRST_PAUSE;
            return;
        };
        let (why, again) = match failure {
            Failure::Later(why) => (why, true),
            Failure::Never(why) => (why, self.run.is_some()),
        };
        if !again {
            self.dead = true;
            self.waiting.clear();
        }
        self.not_before = Instant::now() + self.pause;
        self.pause = (2 * self.pause).min(LONGEST_PAUSE);
        if self.ending {
            self.shared.why.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        } else if !std::mem::replace(&mut self.warned, true) {
            let then = if again { "the run goes on, and it is tried again" } else { "the run goes on without it" };
            self.shared.say(format!("MLflow at {}: {why}; {then}", self.server.uri));
        }
    }

    fn send(&mut self) -> Result<(), Failure> {
        let run = match &self.run {
            Some(run) => run.clone(),
            None => self.begin()?,
        };
        while !self.waiting.is_empty() {
            let n = self.waiting.len().min(METRICS_OF_A_BATCH);
            let batch = json!({"run_id": run, "metrics": self.waiting[..n]});
            match self.post("runs/log-batch", &batch) {
                Ok(_) => {
                    self.waiting.drain(..n);
                    self.shared.sent.fetch_add(n as u64, Ordering::SeqCst);
                }
                Err(Failure::Never(why)) => {
                    // These will not be taken the next time either.
                    self.waiting.drain(..n);
                    return Err(Failure::Never(why));
                }
                Err(later) => return Err(later),
            }
        }
        Ok(())
    }

    fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let answer = self.server.post(path, body);
        if answer.is_ok() {
            self.shared.answers.fetch_add(1, Ordering::SeqCst);
        }
        answer
    }

    /// Finds or makes the run, and says its settings.
    fn begin(&mut self) -> Result<String, Failure> {
        if let Some(run) = self.given.clone().or(self.continued.clone()) {
            match self.post("runs/update", &json!({"run_id": run, "status": "RUNNING"})) {
                Ok(_) => {
                    let is_new = self.continued.as_ref() != Some(&run);
                    return self.begun(run, is_new);
                }
                // Somebody removed it; the one that was asked for by name has to be there.
                Err(Failure::Never(_)) if self.given.is_none() => self.continued = None,
                Err(e) => return Err(e),
            }
        }
        let experiment = self.experiment()?;
        let made = self.post(
            "runs/create",
            &json!({
                "experiment_id": experiment, "run_name": self.about.name, "start_time": milliseconds(),
                "tags": [{"key": "mlflow.source.name", "value": format!("ringtune {}", env!("CARGO_PKG_VERSION"))}],
            }),
        )?;
        let id = made.pointer("/run/info/run_id").and_then(Value::as_str);
        let id = id.ok_or_else(|| Failure::Never("runs/create gave no run_id".into()))?;
        self.begun(id.to_string(), true)
    }

    fn begun(&mut self, run: String, is_new: bool) -> Result<String, Failure> {
        self.run = Some(run.clone());
        let record = json!({"tracking_uri": self.server.uri, "run_id": run});
        if let Err(e) = write_json(&self.record, &record) {
            self.shared.say(format!("{e}; a resume begins a new run in MLflow"));
        }
        // A setting can be said once: of a run that goes on they stand there.
        if is_new {
            let value = |v: &str| v.chars().take(LONGEST_VALUE).collect::<String>();
            let all: Vec<Value> =
                self.about.parameters.iter().map(|(k, v)| json!({"key": key(k), "value": value(v)})).collect();
            for batch in all.chunks(PARAMETERS_OF_A_BATCH) {
                self.post("runs/log-batch", &json!({"run_id": run, "params": batch}))?;
            }
        }
        Ok(run)
    }

    fn experiment(&self) -> Result<String, Failure> {
        let name = &self.server.experiment;
        if let Some(found) = self.server.experiment_by_name(name)? {
            self.shared.answers.fetch_add(1, Ordering::SeqCst);
            return Ok(found);
        }
        let made = self.post("experiments/create", &json!({"name": name}))?;
        let id = made["experiment_id"].as_str().map(String::from);
        id.ok_or_else(|| Failure::Never("experiments/create gave no experiment_id".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_mlflow_takes() {
        assert_eq!(key("train/loss"), "train/loss");
        assert_eq!(key("eval/a b-c.jsonl_loss"), "eval/a b-c.jsonl_loss");
        assert_eq!(key("eval/../x"), "eval/_/x");
        assert_eq!(key("eval//é#"), "eval/_/__");
        assert_eq!(key(&"x".repeat(400)).len(), 250);
    }

    #[test]
    fn a_run_goes_on_at_the_server_where_it_began() {
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join(MLFLOW);
        assert_eq!(earlier(&record, "http://a"), None);
        write_json(&record, &json!({"tracking_uri": "http://a", "run_id": "r1"})).unwrap();
        assert_eq!(earlier(&record, "http://a").as_deref(), Some("r1"));
        assert_eq!(earlier(&record, "http://b"), None);
        std::fs::write(&record, "{").unwrap();
        assert_eq!(earlier(&record, "http://a"), None);
    }
}
