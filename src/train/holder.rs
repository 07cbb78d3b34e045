//! Who writes a run's folder, as its lock file says it, and whether that process is still there.

use std::fmt;
use std::path::Path;

use crate::machine::{self, Process};

/// The file that a run holds locked.
pub const LOCK: &str = ".lock";

/// A process that holds, or held, a run's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pid: u32,
    host: String,
    /// When it began, and among which processes its number counts; none where the system does not say.
    began: Option<(u64, String)>,
}

impl Holder {
    /// This process.
    pub fn me() -> Self {
        let pid = std::process::id();
        let began = match machine::process(pid) {
            Process::Began(ticks) => machine::process_space().map(|space| (ticks, space)),
            _ => None,
        };
        Self { pid, host: machine::host(), began }
    }

    /// Whoever the lock file in a run's folder names; `None` where there is none, or it is being written.
    pub fn of(dir: &Path) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(dir.join(LOCK)).ok()?)
    }

    /// Reads what [`Holder::record`] gave.
    pub fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let (pid, host) = lines.next()?.strip_prefix("process ")?.split_once(" on ")?;
        let mut began = || {
            let (ticks, space) = lines.next()?.strip_prefix("since ")?.split_once(" in ")?;
            Some((ticks.parse().ok()?, space.to_string()))
        };
        Some(Self { pid: pid.parse().ok()?, host: host.to_string(), began: began() })
    }

    /// The text of the lock file: the first line is for people.
    pub fn record(&self) -> String {
        let began = self.began.as_ref().map(|(ticks, space)| format!("since {ticks} in {space}\n"));
        format!("{self}\n{}", began.unwrap_or_default())
    }

    /// Whether the process is still there; `None` where that cannot be seen from here: it is on another machine, or in another container.
    pub fn is_there(&self) -> Option<bool> {
        let (ticks, space) = self.began.as_ref()?;
        if machine::process_space()? != *space {
            return None;
        }
        match machine::process(self.pid) {
            // The number may be another process's by now.
            Process::Began(now) => Some(now == *ticks),
            Process::Ended => Some(false),
            Process::Unseen => None,
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} on {}", self.pid, self.host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_there_until_it_ends() {
        let me = Holder::me();
        assert_eq!(Holder::parse(&me.record()), Some(me.clone()));
        assert_eq!(me.is_there(), Some(true));
        // Another process has its number now.
        let (ticks, space) = me.began.clone().unwrap();
        assert_eq!(Holder { began: Some((ticks + 1, space.clone())), ..me.clone() }.is_there(), Some(false));
        // Of another machine, of another container, and of a build that wrote no more than a line.
        assert_eq!(Holder { began: Some((ticks, format!("{space}0"))), ..me.clone() }.is_there(), None);
        assert_eq!(
            Holder::parse("process 12 on a b\n").map(|h| (h.to_string(), h.is_there())),
            Some(("process 12 on a b".into(), None))
        );
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let Process::Began(ticks) = machine::process(child.id()) else { panic!("a child is not there") };
        let holder = Holder { pid: child.id(), began: Some((ticks, space)), ..me };
        assert_eq!(holder.is_there(), Some(true));
        child.kill().unwrap();
        // Until somebody asks how it ended, its number is still there.
        let start = std::time::Instant::now();
        while holder.is_there() == Some(true) {
            assert!(start.elapsed().as_secs() < 60, "a killed process is still there");
            std::thread::yield_now();
        }
        assert_eq!(holder.is_there(), Some(false));
        child.wait().unwrap();
        assert_eq!(holder.is_there(), Some(false));
        for text in ["", "process x on y\n", "process 1\n", "something"] {
            assert_eq!(Holder::parse(text), None, "{text:?}");
        }
    }
}
