//! Where a step's time goes, as spans in a Chrome trace (`--trace FILE`), for chrome://tracing, Perfetto and the like.
//!
//! One complete event (`"ph": "X"`) a line, times in microseconds since the trace began. The closing bracket is written at the end; a
//! run that dies leaves the array open, which the viewers accept. Each of several ranks writes a file, which the main one joins into its own
//! at the end: a rank is a process of the trace, and times count from a moment in which all were together. On a device that works on its own, a span is the
//! host's time, but for those of the collectives (row 2), which are the device's: how much of them lies beside backward is what overlaps.
//! With ZeRO-1 a forward pass has spans `weights` in row 0, one for each part of the model that it waited for, with the bucket whose `gather`
//! in row 2 brought it: a part's computation begins where its span ends.
//! Format: Trace Event Format, Google, "JSON Array Format".

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde_json::json;

use crate::error::{Context, Result};
use crate::files::At;

/// Writes spans to a file, or does nothing. Clones write to the same file, from any thread.
#[derive(Clone, Default)]
pub struct Trace(Option<Arc<Inner>>);

struct Inner {
    path: PathBuf,
    begun: Instant,
    rank: usize,
    step: AtomicU64,
    /// `None` after the first failure: a trace never ends a run.
    out: Mutex<Option<Output>>,
}

struct Output {
    file: BufWriter<File>,
    any: bool,
}

/// The row of what ranks do together: the thread of the collectives, or the stream of NCCL on a GPU.
pub const COLLECTIVES: u32 = 2;

/// Runs from its making to its end of life.
#[must_use = "a span ends when it is dropped"]
pub struct Span<'a> {
    inner: Option<&'a Inner>,
    name: &'static str,
    thread: u32,
    step: u64,
    begun: Instant,
}

impl Trace {
    /// A trace of rank `rank` in a new file.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn create(path: &Path, rank: usize) -> Result<Self> {
        let file = BufWriter::new(File::create(path).at(path)?);
        Ok(Self(Some(Arc::new(Inner {
            path: path.to_path_buf(),
            begun: Instant::now(),
            rank,
            step: AtomicU64::new(0),
            out: Mutex::new(Some(Output { file, any: false })),
        }))))
    }

    /// Whether a file that begins so is a trace.
    pub fn begins(head: &[u8]) -> bool {
        let text = String::from_utf8_lossy(head);
        text.starts_with('[') && ["\"ph\":\"X\"", "\"ts\":", "\"tid\":"].iter().all(|key| text.contains(key))
    }

    /// Names the optimiser step that the next spans belong to.
    pub fn at_step(&self, step: u64) {
        if let Some(inner) = &self.0 {
            inner.step.store(step, Ordering::Relaxed);
        }
    }

    /// A span of the main thread.
    pub fn span(&self, name: &'static str) -> Span<'_> {
        self.span_of(name, 0)
    }

    /// A span of a thread beside it: 1 is the one that writes checkpoints, [`COLLECTIVES`] what sums gradients.
    pub fn span_of(&self, name: &'static str, thread: u32) -> Span<'_> {
        let inner = self.0.as_deref();
        let step = inner.map_or(0, |i| i.step.load(Ordering::Relaxed));
        Span { inner, name, thread, step, begun: Instant::now() }
    }

    /// Writes down what ended meanwhile in a thread, in its row; `bucket`: of which bucket of gradients or weights it was.
    pub fn record(&self, name: &'static str, thread: u32, (begun, ended): (Instant, Instant), bucket: Option<usize>) {
        let Some(inner) = self.0.as_deref() else { return };
        let mut args = json!({"step": inner.step.load(Ordering::Relaxed)});
        if let Some(bucket) = bucket {
            args["bucket"] = bucket.into();
        }
        inner.write(name, thread, (begun, ended), &args);
    }

    /// Closes the array and flushes the file.
    ///
    /// # Errors
    /// If the trace could not be written, now or before; the message names the file.
    pub fn finish(&self) -> Result<()> {
        self.finish_with(&[])
    }

    /// As [`Trace::finish`], with the events of other ranks' files, which are removed.
    ///
    /// # Errors
    /// Those of [`Trace::finish`]; or if one of the files cannot be read: the others are in the trace all the same.
    pub fn finish_with(&self, others: &[PathBuf]) -> Result<()> {
        let Some(inner) = &self.0 else { return Ok(()) };
        let mut out = inner.out.lock().unwrap_or_else(|e| e.into_inner());
        let Some(mut output) = out.take() else {
            crate::bail!("{}: the trace could not be written to its end", inner.path.display());
        };
        let mut unread = Ok(());
        for other in others {
            match File::open(other) {
                Ok(file) => {
                    for line in BufReader::new(file).lines() {
                        let line = line.at(other)?;
                        if line.starts_with('{') {
                            output.event(line.trim_end_matches(',')).at(&inner.path)?;
                        }
                    }
                    std::fs::remove_file(other).at(other)?;
                }
                Err(e) => unread = unread.and(Err::<(), _>(e).at(other)),
            }
        }
        let open = if output.any { "\n" } else { "[" };
        writeln!(output.file, "{open}]").and_then(|()| output.file.flush()).at(&inner.path)?;
        unread.context(|| "the trace lacks a rank".into())
    }
}

/// The file of a rank's trace: the main one's is the one that was asked for, `FILE.1` that of rank 1.
pub fn file_of(path: &Path, rank: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    if rank > 0 {
        name.push(format!(".{rank}"));
    }
    name.into()
}

impl Output {
    fn event(&mut self, event: &str) -> std::io::Result<()> {
        let before = if self.any { ",\n" } else { "[\n" };
        self.any = true;
        write!(self.file, "{before}{event}")
    }
}

impl Drop for Span<'_> {
    fn drop(&mut self) {
        let Some(inner) = self.inner else { return };
        inner.write(self.name, self.thread, (self.begun, Instant::now()), &json!({"step": self.step}));
    }
}

impl Inner {
    fn write(&self, name: &str, thread: u32, (begun, ended): (Instant, Instant), args: &serde_json::Value) {
        let micros = |d: std::time::Duration| d.as_nanos() as f64 / 1e3;
        let event = json!({
            "name": name,
            "ph": "X",
            "ts": micros(begun.saturating_duration_since(self.begun)),
            "dur": micros(ended.saturating_duration_since(begun)),
            "pid": self.rank,
            "tid": thread,
            "args": args,
        });
        let mut out = self.out.lock().unwrap_or_else(|e| e.into_inner());
        if out.as_mut().is_some_and(|output| output.event(&event.to_string()).is_err()) {
            *out = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn events(path: &Path) -> Vec<Value> {
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn spans_nest_and_name_their_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        let trace = Trace::create(&path, 3).unwrap();
        trace.at_step(7);
        {
            let _outer = trace.span("step");
            drop(trace.clone().span_of("write", 1));
        }
        trace.finish().unwrap();
        let all = events(&path);
        let names: Vec<_> = all.iter().map(|e| (e["name"].as_str().unwrap(), e["tid"].as_u64().unwrap())).collect();
        assert_eq!(names, [("write", 1), ("step", 0)]);
        assert!(all.iter().all(|e| e["args"]["step"] == 7 && e["pid"] == 3 && e["ph"] == "X"));
        let times = |e: &Value| {
            let start = e["ts"].as_f64().unwrap();
            (start, start + e["dur"].as_f64().unwrap())
        };
        let (inner, outer) = (times(&all[0]), times(&all[1]));
        assert!(outer.0 <= inner.0 && inner.0 <= inner.1 && inner.1 <= outer.1, "{inner:?} in {outer:?}");
    }

    #[test]
    fn ranks_are_processes_of_one_trace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        let traces: Vec<Trace> = (0..3).map(|r| Trace::create(&file_of(&path, r), r).unwrap()).collect();
        for (rank, trace) in traces.iter().enumerate().filter(|(rank, _)| *rank != 1) {
            (0..=rank).for_each(|_| drop(trace.span("step")));
        }
        // A rank that died leaves its array open.
        traces[1].finish().unwrap();
        std::fs::write(file_of(&path, 1), "[\n{\"name\":\"cut\",\"pid\":1},\n").unwrap();
        traces[2].finish().unwrap();
        traces[0].finish_with(&[file_of(&path, 1), file_of(&path, 2)]).unwrap();
        let pids: Vec<u64> = events(&path).iter().map(|e| e["pid"].as_u64().unwrap()).collect();
        assert_eq!(pids, [0, 1, 2, 2, 2]);
        assert!(!file_of(&path, 1).exists() && !file_of(&path, 2).exists());
        let again = Trace::create(&path, 0).unwrap();
        let e = again.finish_with(&[dir.path().join("gone.1")]).unwrap_err().to_string();
        assert!(e.contains("gone.1") && e.contains("lacks a rank") && events(&path).is_empty(), "{e}");
    }

    #[test]
    fn a_trace_without_spans_is_an_empty_array_and_no_trace_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        Trace::create(&path, 0).unwrap().finish().unwrap();
        assert!(events(&path).is_empty());
        let off = Trace::default();
        drop(off.span("step"));
        off.finish().unwrap();
    }

    #[test]
    fn a_full_disk_is_said_at_the_end_and_harms_nothing_before() {
        let trace = Trace::create(Path::new("/dev/full"), 0).unwrap();
        for _ in 0..1000 {
            drop(trace.span("step"));
        }
        let e = trace.finish().unwrap_err().to_string();
        assert!(e.starts_with("/dev/full: "), "{e}");
    }
}
