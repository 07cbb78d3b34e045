//! What ranks print: whole lines, each with its rank, to the terminal and to a log; the last ones are kept for the end.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A line is cut here: whoever prints without an end must not fill memory.
const LONGEST: u64 = 64 << 10;
/// Lines of the guilty rank that are repeated at the end.
const KEPT: usize = 20;

/// Where a line was printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// How lines are shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Style {
    /// With the rank in front.
    pub tag: bool,
    /// With the time in front.
    pub timestamp: bool,
}

/// The lines of one rank.
#[derive(Clone)]
pub struct Lines {
    rank: usize,
    style: Style,
    log: Option<Arc<Mutex<File>>>,
    last: Arc<Mutex<VecDeque<String>>>,
}

impl Lines {
    /// Lines of a rank, to a log too.
    pub fn new(rank: usize, style: Style, log: Option<File>) -> Self {
        Self { rank, style, log: log.map(|f| Arc::new(Mutex::new(f))), last: Arc::default() }
    }

    /// Reads to the end in a thread of its own; the receiver hangs up when that is reached.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn follow(&self, from: impl Read + Send + 'static, stream: Stream) -> io::Result<Receiver<()>> {
        let (lines, (ends, end)) = (self.clone(), channel());
        let read = move || {
            let _ends: Sender<()> = ends;
            let mut from = BufReader::new(from);
            loop {
                let mut line = Vec::new();
                match from.by_ref().take(LONGEST).read_until(b'\n', &mut line) {
                    Ok(0) | Err(_) => return,
                    Ok(_) => lines.line(stream, &line),
                }
            }
        };
        std::thread::Builder::new().name("lines".into()).spawn(read)?;
        Ok(end)
    }

    fn line(&self, stream: Stream, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let time = if self.style.timestamp { format!("{} ", clock(SystemTime::now())) } else { String::new() };
        let tag = if self.style.tag { format!("[{}] ", self.rank) } else { String::new() };
        let shown = format!("{time}{tag}{text}\n");
        // A terminal that has gone ends nothing; the log has the line.
        let _ = match stream {
            Stream::Out => io::stdout().write_all(shown.as_bytes()),
            Stream::Err => io::stderr().write_all(shown.as_bytes()),
        };
        if let Some(log) = &self.log {
            let _ = log.lock().unwrap_or_else(PoisonError::into_inner).write_all(format!("{time}{text}\n").as_bytes());
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() == KEPT {
            last.pop_front();
        }
        last.push_back(text.into());
    }

    /// The last lines.
    pub fn last(&self) -> Vec<String> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// Waits until all have been read to the end; a process that holds a pipe open though its rank is gone is not waited for.
pub fn drain(ends: Vec<Receiver<()>>) {
    let until = Instant::now() + Duration::from_secs(1);
    for end in ends {
        let _ = end.recv_timeout(until.saturating_duration_since(Instant::now()));
    }
}

/// `12:34:56.789`, in UTC.
fn clock(now: SystemTime) -> String {
    let ms = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis()) % 86_400_000;
    format!("{:02}:{:02}:{:02}.{:03}", ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60, ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_logged_cut_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let lines = Lines::new(3, Style { tag: true, timestamp: false }, Some(File::create(&path).unwrap()));
        let long = "x".repeat(LONGEST as usize + 5);
        let text = format!("first\n{long}\n{}last without an end", "line\n".repeat(30));
        let end = lines.follow(io::Cursor::new(text), Stream::Out).unwrap();
        drain(vec![end]);
        let log = std::fs::read_to_string(&path).unwrap();
        let logged: Vec<&str> = log.lines().collect();
        assert_eq!(logged.len(), 34);
        assert_eq!((logged[1].len(), logged[2]), (LONGEST as usize, "xxxxx"));
        assert_eq!(lines.last().len(), KEPT);
        assert_eq!(lines.last().last().unwrap(), "last without an end");
        assert_eq!(clock(UNIX_EPOCH + Duration::from_millis(45_296_789)), "12:34:56.789");
    }
}
