//! Whether a run goes on. A run that was killed leaves its lock file: on its own machine its process is looked for, elsewhere the age of
//! its last line says what can be said.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::log::metrics::METRICS;
use crate::text::date;
use crate::train::holder::{Holder, LOCK};

/// A run elsewhere has fallen silent after so many of its usual steps, and not before this time: an evaluation or a checkpoint comes between.
const STEPS: f64 = 20.0;
const LEAST: Duration = Duration::from_secs(5 * 60);
/// The same before its first steps, while it reads weights and data.
const START: Duration = Duration::from_secs(15 * 60);
/// Whether a run goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Pulse {
    /// It has said that it ended, or nobody holds its folder.
    #[default]
    Over,
    /// It goes on.
    Going,
    /// It has not said that it ended, and its process is no longer there.
    Gone {
        /// When it wrote last.
        since: SystemTime,
        /// The process.
        who: Holder,
    },
    /// It has been silent for longer than is usual, and its process cannot be seen from here.
    Silent {
        /// When it wrote last.
        since: SystemTime,
        /// The process.
        who: Holder,
    },
}

impl Pulse {
    /// Of the run in a folder; `usual`: milliseconds that its steps take, where it has taken any.
    pub fn of(dir: &Path, usual: Option<f64>) -> Self {
        Self::at(dir, usual, SystemTime::now())
    }

    fn at(dir: &Path, usual: Option<f64>, now: SystemTime) -> Self {
        let lock = dir.join(LOCK);
        // One without a text is being taken at this moment.
        let Some(who) = Holder::of(dir) else { return if lock.exists() { Self::Going } else { Self::Over } };
        let written = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified()).ok();
        let since = [dir.join(METRICS), lock].iter().filter_map(|path| written(path)).max().unwrap_or(now);
        match who.is_there() {
            Some(true) => Self::Going,
            // Its last act may have been to give the folder back, between the two looks.
            Some(false) if Holder::of(dir).as_ref() != Some(&who) => Self::at(dir, usual, now),
            Some(false) => Self::Gone { since, who },
            None if now.duration_since(since).unwrap_or_default() > patience(usual) => Self::Silent { since, who },
            None => Self::Going,
        }
    }

    /// Of several runs together: while one goes on, that; else the last one that fell silent.
    pub fn of_all<'a>(all: impl Iterator<Item = &'a Self> + Clone) -> Self {
        if all.clone().any(|pulse| *pulse == Self::Going) {
            return Self::Going;
        }
        all.max_by_key(|pulse| pulse.since()).cloned().unwrap_or_default()
    }

    fn since(&self) -> Option<SystemTime> {
        match self {
            Self::Gone { since, .. } | Self::Silent { since, .. } => Some(*since),
            Self::Over | Self::Going => None,
        }
    }

    /// For a page's script: `over`, `going`, or `gone` and `silent` with the time of the last word, in seconds since 1970.
    pub fn word(&self) -> String {
        let seconds = self.since().and_then(|at| at.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_secs());
        match self {
            Self::Over => "over".into(),
            Self::Going => "going".into(),
            Self::Gone { .. } => format!("gone {seconds}"),
            Self::Silent { .. } => format!("silent {seconds}"),
        }
    }

    /// What is to be said of a run that neither goes on nor has ended.
    pub fn said(&self) -> Option<String> {
        let since = date(self.since()?.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()));
        Some(match self {
            Self::Gone { who, .. } => format!(
                "no news since {since}, the process is gone ({who}): the run was killed or its machine failed; the same command with \
                 --resume-from-checkpoint auto goes on from its newest checkpoint"
            ),
            Self::Silent { who, .. } => {
                format!("no news since {since}, which is longer than its steps take; {who} cannot be seen from here")
            }
            Self::Over | Self::Going => return None,
        })
    }
}

/// How long a run may be silent whose steps take so many milliseconds.
fn patience(usual: Option<f64>) -> Duration {
    match usual {
        Some(usual) => Duration::try_from_secs_f64(STEPS * usual / 1e3).unwrap_or(Duration::MAX).max(LEAST),
        None => START,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_nobody_holds_is_over_and_one_that_is_being_taken_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Pulse::of(dir.path(), None), Pulse::Over);
        std::fs::write(dir.path().join(LOCK), "").unwrap();
        assert_eq!(Pulse::of(dir.path(), None), Pulse::Going);
        std::fs::write(dir.path().join(LOCK), Holder::me().record()).unwrap();
        assert_eq!(Pulse::of(dir.path(), None), Pulse::Going);
    }

    #[test]
    fn a_process_that_is_gone_is_said_with_the_time_of_its_last_line() {
        let dir = tempfile::tempdir().unwrap();
        let metrics = dir.path().join(METRICS);
        std::fs::write(&metrics, "").unwrap();
        // This process, as it would be after another one has got its number.
        let record = Holder::me().record();
        let ticks = record.split(' ').nth(4).unwrap();
        assert!(ticks.parse::<u64>().is_ok(), "{record}");
        std::fs::write(dir.path().join(LOCK), record.replacen(ticks, "1", 1)).unwrap();
        let at = UNIX_EPOCH + Duration::from_secs(1_795_500_060);
        for path in [&metrics, &dir.path().join(LOCK)] {
            std::fs::File::options().append(true).open(path).unwrap().set_modified(at).unwrap();
        }
        let pulse = Pulse::of(dir.path(), Some(100.0));
        assert_eq!(pulse.word(), "gone 1795500060");
        let said = pulse.said().unwrap();
        assert!(said.starts_with("no news since 2026-11-24 06:01 UTC, the process is gone (process "), "{said}");
    }

    #[test]
    fn a_run_elsewhere_is_judged_by_its_usual_step() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(METRICS), "").unwrap();
        std::fs::write(dir.path().join(LOCK), "process 7 on another\nsince 12 in some boot\n").unwrap();
        let after = |usual: Option<f64>, seconds: u64| {
            Pulse::at(dir.path(), usual, SystemTime::now() + Duration::from_secs(seconds)).word()
        };
        for (usual, longest) in [(Some(100.0), 5 * 60), (Some(60_000.0), 20 * 60), (None, 15 * 60)] {
            assert_eq!(after(usual, longest - 30), "going", "{longest}");
            assert!(after(usual, longest + 30).starts_with("silent "), "{longest}");
        }
        let said = Pulse::at(dir.path(), None, SystemTime::now() + Duration::from_secs(3600)).said().unwrap();
        assert!(said.ends_with("process 7 on another cannot be seen from here"), "{said}");
    }

    #[test]
    fn of_several_runs_the_one_that_goes_on_counts() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let gone = |seconds| Pulse::Gone { since: at(seconds), who: Holder::me() };
        let all = [gone(5), Pulse::Over, gone(9)];
        assert_eq!(Pulse::of_all(all.iter()), gone(9));
        assert_eq!(Pulse::of_all([Pulse::Over, Pulse::Going, gone(3)].iter()), Pulse::Going);
        assert_eq!(Pulse::of_all([Pulse::Over, Pulse::Over].iter()), Pulse::Over);
    }
}
