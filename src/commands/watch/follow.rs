//! Runs that go on: of `metrics.jsonl` only what was appended is read; what else a run writes is looked at by size and time.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::checkpoint::manifest;
use crate::commands::report::{Lines, PageKind, Pulse, Run, body, page, run_folders, tell_apart};
use crate::error::Result;
use crate::eval::gen_test::SAMPLES;
use crate::log::metrics::METRICS;
use crate::train::holder::LOCK;
use crate::train::record::RUN;
use crate::train::state::TRAINER_STATE;

/// Bytes before the place read up to that have to be the same for the rest to be what was appended.
const TAIL: usize = 256;
/// Bytes read at once.
const PIECE: u64 = 1 << 20;

/// What of a run's folder, its figures apart, the page shows: names with size and time.
type Stamp = Vec<(PathBuf, u64, Option<SystemTime>)>;

/// A run that is followed.
struct Follow {
    dir: PathBuf,
    lines: Lines,
    /// Bytes read into `lines`.
    read: u64,
    /// The last of them.
    tail: Vec<u8>,
    /// Bytes after them that are no whole line.
    cut: usize,
    stamp: Stamp,
    pulse: Pulse,
}

impl Follow {
    fn new(dir: &Path) -> Self {
        let (lines, tail, stamp) = (Lines::default(), Vec::new(), Stamp::new());
        Self { dir: dir.to_path_buf(), lines, read: 0, tail, cut: 0, stamp, pulse: Pulse::Over }
    }

    /// Reads what is new; whether anything is. A file that cannot be read now is looked at again the next time.
    fn look(&mut self) -> bool {
        let figures = self.read_on().unwrap_or(false);
        let (stamp, pulse) = (self.stamp_now(), Pulse::of(&self.dir, self.lines.usual_step()));
        let others = stamp != self.stamp || pulse != self.pulse;
        (self.stamp, self.pulse) = (stamp, pulse);
        figures || others
    }

    fn read_on(&mut self) -> std::io::Result<bool> {
        let mut file = File::open(self.dir.join(METRICS))?;
        let length = file.metadata()?.len();
        let mut changed = false;
        // A run that is resumed takes lines away and writes others in their place; another run writes all of them anew.
        if length < self.read || !self.continues(&mut file)? {
            let (stamp, pulse) = (std::mem::take(&mut self.stamp), self.pulse.clone());
            *self = Self { stamp, pulse, ..Self::new(&self.dir) };
            changed = true;
        }
        file.seek(SeekFrom::Start(self.read))?;
        let mut bytes = Vec::new();
        loop {
            let got = (&file).take(PIECE).read_to_end(&mut bytes)?;
            let read = self.lines.take(&bytes);
            if read > 0 {
                changed = true;
                self.read += read as u64;
                self.tail.extend(&bytes[..read]);
                self.tail.drain(..self.tail.len().saturating_sub(TAIL));
                bytes.drain(..read);
            }
            if got == 0 {
                break;
            }
        }
        self.cut = bytes.len();
        Ok(changed)
    }

    /// Whether the file still has what was read last where it was read.
    fn continues(&self, file: &mut File) -> std::io::Result<bool> {
        let mut found = vec![0; self.tail.len()];
        file.seek(SeekFrom::Start(self.read - self.tail.len() as u64))?;
        file.read_exact(&mut found)?;
        Ok(found == self.tail)
    }

    fn stamp_now(&self) -> Stamp {
        let files = [RUN, TRAINER_STATE, SAMPLES, LOCK].map(|name| self.dir.join(name));
        let folders = manifest::list(&self.dir).unwrap_or_default().into_iter().map(|(_, path)| path);
        let of = |path: PathBuf| {
            let found = std::fs::metadata(&path).ok()?;
            Some((path, found.len(), found.modified().ok()))
        };
        files.into_iter().chain(folders).filter_map(of).collect()
    }

    fn run(&self) -> Run {
        // While it goes on, a line that is being written is nothing to be said.
        let going = self.pulse == Pulse::Going;
        Run::of(&self.dir, self.lines.metrics(if going { 0 } else { self.cut }), self.pulse.clone())
    }
}

/// What viewers are told of.
struct State {
    version: u64,
    pulse: Pulse,
    /// The sections as of a version.
    body: Option<(u64, Arc<String>)>,
}

/// Runs that are followed, for several viewers.
pub struct Followed {
    dirs: Vec<PathBuf>,
    runs: Mutex<Vec<Follow>>,
    state: Mutex<State>,
    news: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Followed {
    /// Begins to follow the runs of some folders, as `report` takes them; nothing is read before the first [`Followed::look`].
    ///
    /// # Errors
    /// If a folder holds no run.
    pub fn open(dirs: &[PathBuf]) -> Result<Self> {
        let dirs = run_folders(dirs);
        // Refused here as `report` would.
        dirs.iter().try_for_each(|dir| Run::read(dir).map(drop))?;
        let runs = Mutex::new(dirs.iter().map(|dir| Follow::new(dir)).collect());
        let state = Mutex::new(State { version: 0, pulse: Pulse::Going, body: None });
        Ok(Self { dirs, runs, state, news: Condvar::new() })
    }

    /// The folders of the runs.
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Reads what is new, and tells who waits. Gives what is to be said of runs that have just fallen silent, with their folders.
    pub fn look(&self) -> Vec<String> {
        let mut runs = lock(&self.runs);
        let before: Vec<Pulse> = runs.iter().map(|run| run.pulse.clone()).collect();
        let changed: Vec<bool> = runs.iter_mut().map(Follow::look).collect();
        if changed.contains(&true) {
            let mut state = lock(&self.state);
            (state.version, state.pulse) = (state.version + 1, Pulse::of_all(runs.iter().map(|run| &run.pulse)));
            self.news.notify_all();
        }
        let fell = runs.iter().zip(before).filter(|(run, before)| run.pulse != *before);
        fell.filter_map(|(run, _)| Some(format!("{}: {}", run.dir.display(), run.pulse.said()?))).collect()
    }

    /// Waits for a version after `seen`, at most so long; the newest, and whether the runs go on.
    pub fn wait(&self, seen: u64, most: Duration) -> (u64, Pulse) {
        let state = lock(&self.state);
        let waited = self.news.wait_timeout_while(state, most, |s| s.version <= seen);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (state.version, state.pulse.clone())
    }

    fn read(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = lock(&self.runs).iter().map(Follow::run).collect();
        tell_apart(&mut runs);
        runs
    }

    /// The whole page.
    pub fn page(&self) -> String {
        page(&self.read(), PageKind::Live)
    }

    /// What of the page changes; made once for all viewers of a version.
    pub fn body(&self) -> Arc<String> {
        let version = {
            let state = lock(&self.state);
            if let Some((_, body)) = state.body.as_ref().filter(|b| b.0 == state.version) {
                return Arc::clone(body);
            }
            state.version
        };
        let made = Arc::new(body(&self.read()));
        lock(&self.state).body = Some((version, Arc::clone(&made)));
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64, loss: f64) -> String {
        format!("{{\"step\": {step}, \"loss\": {loss}, \"tokens\": 10}}\n")
    }

    fn losses(f: &Follow) -> Vec<f64> {
        f.lines.metrics(0).steps.iter().map(|s| s.loss).collect()
    }

    #[test]
    fn appended_lines_are_read_and_a_rewritten_file_is_read_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS);
        let append = |text: &str| {
            use std::io::Write;
            let open = std::fs::OpenOptions::new().append(true).create(true).open(&path);
            open.unwrap().write_all(text.as_bytes()).unwrap();
        };
        append(&line(1, 5.0));
        let mut f = Follow::new(dir.path());
        assert!(f.look() && !f.look());
        // Half a line is nothing yet.
        append("{\"step\": 2, \"lo");
        assert!(!f.look());
        assert_eq!(f.cut, 15);
        append("ss\": 4.0}\n");
        assert!(f.look());
        assert_eq!(losses(&f), [5.0, 4.0]);
        // What was read is not read again: a change there, before the tail, stays unseen.
        append(&(3..60).map(|i| line(i, 3.0)).collect::<String>());
        assert!(f.look());
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replacen("5.0", "9.0", 1)).unwrap();
        append(&line(60, 2.0));
        assert!(f.look());
        let seen = losses(&f);
        assert_eq!((seen[0], seen.len(), seen[59]), (5.0, 60, 2.0));
        // A resumed run leaves fewer lines, and writes others in their place.
        std::fs::write(&path, line(1, 5.0)).unwrap();
        assert!(f.look());
        assert_eq!(losses(&f), [5.0]);
        // Another file that is longer.
        std::fs::write(&path, (1..=9).map(|i| line(i, f64::from(i as u32))).collect::<String>()).unwrap();
        assert!(f.look());
        assert_eq!(losses(&f).len(), 9);
        assert_eq!(losses(&f)[0], 1.0);
        // For a moment it is not there.
        std::fs::remove_file(&path).unwrap();
        assert!(!f.look());
        append(&line(1, 0.5));
        assert!(f.look());
        assert_eq!(losses(&f), [0.5]);
    }

    #[test]
    fn viewers_wait_for_the_next_version() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(METRICS), line(1, 5.0)).unwrap();
        let followed = Followed::open(&[dir.path().to_path_buf()]).unwrap();
        followed.look();
        assert_eq!(followed.wait(0, Duration::ZERO), (1, Pulse::Over));
        let first = 1;
        assert_eq!(followed.wait(first, Duration::from_millis(1)).0, first);
        std::thread::scope(|scope| {
            let waiting: Vec<_> =
                (0..3).map(|_| scope.spawn(|| followed.wait(first, Duration::from_secs(60)))).collect();
            std::fs::write(dir.path().join(METRICS), line(1, 5.0) + &line(2, 4.0)).unwrap();
            followed.look();
            for viewer in waiting {
                assert_eq!(viewer.join().unwrap().0, 2);
            }
        });
        let body = followed.body();
        assert!(Arc::ptr_eq(&body, &followed.body()), "made once for all viewers");
    }
}
