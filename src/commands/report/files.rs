//! What a run's folder says: figures, settings, samples, checkpoints. Whatever is missing or cut off is left out and said.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::pulse::Pulse;
use crate::checkpoint::manifest;
use crate::checkpoint::state::read_json;
use crate::ensure;
use crate::error::{Context, Result};
use crate::eval::gen_test::SAMPLES;
use crate::log::metrics::METRICS;
use crate::train::record::RUN;
use crate::train::state::TRAINER_STATE;

/// Longest file read whole; a report of more would not open in a browser.
const LONGEST: u64 = 1 << 30;

/// Steps that say what is usual.
const LAST: usize = 50;

/// One optimiser step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepPoint {
    /// Steps taken after it.
    pub step: f64,
    /// Tokens processed after it.
    pub tokens: f64,
    /// Loss, gradient norm, learning rate, tokens a second, share of supervised tokens; NaN where the line lacks it.
    pub loss: f64,
    /// Global norm before clipping.
    pub norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens a second.
    pub rate: f64,
    /// Share of tokens that carry loss, in percent.
    pub share: f64,
    /// Milliseconds.
    pub ms: f64,
    /// Place in epochs.
    pub epoch: f64,
}

/// One evaluation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EvalPoint {
    /// Steps taken before it.
    pub step: f64,
    /// Tokens processed before it.
    pub tokens: f64,
    /// Loss, perplexity and token accuracy (percent) over all data sets; NaN where the line lacks it.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Share of right arg maxes, in percent.
    pub accuracy: f64,
    /// Loss of each data set, where there are several.
    pub sets: Vec<(String, f64)>,
}

/// The lines of `metrics.jsonl`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Steps in the order of the file.
    pub steps: Vec<StepPoint>,
    /// Evaluations in the order of the file.
    pub evals: Vec<EvalPoint>,
    /// What else the lines say: steps that were skipped.
    pub warnings: Vec<String>,
    /// What could not be read.
    pub notes: Vec<String>,
}

/// Reads the lines of a run's figures. A last line without its end is one that is being written, or that a crash cut off.
pub fn parse_metrics(bytes: &[u8]) -> Metrics {
    let mut lines = Lines::default();
    let read = lines.take(bytes);
    lines.metrics(bytes.len() - read)
}

/// The lines of `metrics.jsonl`, as far as they were read.
#[derive(Clone, Debug, Default)]
pub struct Lines {
    metrics: Metrics,
    tokens: f64,
    unreadable: u64,
}

impl Lines {
    /// Reads what follows, up to the last end of a line; gives how many bytes that is.
    pub fn take(&mut self, bytes: &[u8]) -> usize {
        let Some(end) = bytes.iter().rposition(|&b| b == b'\n') else { return 0 };
        for line in bytes[..end].split(|&b| b == b'\n').filter(|l| !l.iter().all(u8::is_ascii_whitespace)) {
            match serde_json::from_slice::<Value>(line) {
                Ok(v) if v.is_object() => self.metrics.line(&v, &mut self.tokens),
                _ => self.unreadable += 1,
            }
        }
        end + 1
    }

    /// See [`Metrics::usual_step`].
    pub fn usual_step(&self) -> Option<f64> {
        self.metrics.usual_step()
    }

    /// The figures; `cut` bytes follow that are no whole line.
    pub fn metrics(&self, cut: usize) -> Metrics {
        let mut out = self.metrics.clone();
        if cut > 0 {
            out.notes.push(format!(
                "the last line of {METRICS} is not complete ({cut} bytes): the run is still going, or it was cut off; read up to the line before"
            ));
        }
        if self.unreadable > 0 {
            out.notes.push(format!("{} lines of {METRICS} are no JSON objects and left out", self.unreadable));
        }
        out
    }
}

impl Metrics {
    /// Milliseconds that a step takes: the median of the last ones.
    pub fn usual_step(&self) -> Option<f64> {
        let mut last: Vec<f64> = self.steps.iter().rev().take(LAST).map(|s| s.ms).filter(|ms| ms.is_finite()).collect();
        last.sort_by(f64::total_cmp);
        last.get(last.len() / 2).copied()
    }

    fn line(&mut self, v: &Value, tokens: &mut f64) {
        let number = |key: &str| v[key].as_f64().filter(|x| x.is_finite()).unwrap_or(f64::NAN);
        let step = number("step");
        if step.is_nan() || step < 0.0 {
            return;
        }
        if let Some(kind) = v.get("skipped") {
            let why = v["why"].as_str().or(kind.as_str()).unwrap_or("no reason is given");
            let samples = v["samples"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let samples: Vec<&str> = samples.take(8).collect();
            let at = if samples.is_empty() { String::new() } else { format!(" ({})", samples.join(", ")) };
            self.warnings.push(format!("step {step}: no update, {why}{at}"));
        }
        if v.get("eval_loss").is_some() {
            let sets = v.as_object().into_iter().flatten().filter_map(|(key, value)| {
                let name = key.strip_prefix("eval_")?.strip_suffix("_loss")?;
                Some((name.to_string(), value.as_f64()?))
            });
            self.evals.push(EvalPoint {
                step,
                tokens: *tokens,
                loss: number("eval_loss"),
                perplexity: number("eval_perplexity"),
                accuracy: 100.0 * number("eval_mean_token_accuracy"),
                sets: sets.collect(),
            });
        }
        if v.get("loss").is_some() {
            let of_step = number("tokens").max(0.0);
            *tokens += if of_step.is_finite() { of_step } else { 0.0 };
            self.steps.push(StepPoint {
                step,
                tokens: *tokens,
                loss: number("loss"),
                norm: number("grad_norm"),
                lr: number("lr"),
                rate: number("tokens_per_second"),
                share: 100.0 * number("supervised") / of_step,
                ms: number("ms"),
                epoch: number("epoch"),
            });
        }
    }
}

/// A checkpoint of the run.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Its step.
    pub step: u64,
    /// Bytes of its files.
    pub bytes: u64,
    /// Whether it is the best one.
    pub best: bool,
}

/// A run.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// How it is called in the report.
    pub name: String,
    /// Its folder.
    pub dir: PathBuf,
    /// Its figures.
    pub metrics: Metrics,
    /// `run.json`; null where there is none.
    pub record: Value,
    /// `trainer_state.json`; null where there is none.
    pub state: Value,
    /// Whether it goes on.
    pub pulse: Pulse,
    /// What the generation test found; null where there was none.
    pub samples: Value,
    /// Checkpoints, oldest first.
    pub checkpoints: Vec<Checkpoint>,
}

impl Run {
    /// Reads a run's folder.
    ///
    /// # Errors
    /// If it has no `metrics.jsonl`, or that cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(METRICS);
        ensure!(
            path.is_file(),
            "{}: no run is here, expected {METRICS} in the folder that --output-dir named (pretrain: in its folder NAME), found {}",
            dir.display(),
            if dir.is_dir() { "a folder without it" } else { "no folder" }
        );
        let size = std::fs::metadata(&path).context(|| path.display().to_string())?.len();
        ensure!(size <= LONGEST, "{}: {size} bytes, expected at most {LONGEST}", path.display());
        let metrics = parse_metrics(&std::fs::read(&path).context(|| path.display().to_string())?);
        let pulse = Pulse::of(dir, metrics.usual_step());
        Ok(Self::of(dir, metrics, pulse))
    }

    /// A run whose figures were read; its other files are read now.
    pub fn of(dir: &Path, mut metrics: Metrics, pulse: Pulse) -> Self {
        let mut json = |name: &str, what: &str| match read_json(&dir.join(name)) {
            Ok(value) => value,
            Err(e) if dir.join(name).exists() => {
                metrics.notes.push(e.to_string());
                Value::Null
            }
            Err(_) => {
                if !what.is_empty() {
                    metrics.notes.push(format!("{name} is not there: {what}"));
                }
                Value::Null
            }
        };
        let record = json(RUN, "no settings, mix and machine are shown");
        // A run that goes on has none yet; of one that does not, the pulse says more.
        let over = pulse == Pulse::Over;
        let state = json(TRAINER_STATE, if over { "the run has not ended, or was cut off" } else { "" });
        let samples = json(SAMPLES, "");
        metrics.notes.extend(pulse.said());
        let best = state["best_global_step"].as_u64();
        let checkpoints = manifest::list(dir).unwrap_or_default().into_iter().map(|(step, path)| Checkpoint {
            step,
            bytes: folder_bytes(&path),
            best: best == Some(step),
        });
        Self {
            name: name_of(dir),
            dir: dir.to_path_buf(),
            metrics,
            record,
            state,
            pulse,
            samples,
            checkpoints: checkpoints.collect(),
        }
    }

    /// A setting as it was used, and its origin.
    pub fn settings(&self) -> BTreeMap<String, (String, String)> {
        let list = self.record["settings"].as_array().into_iter().flatten();
        let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), String::from);
        list.filter_map(|s| Some((s["name"].as_str()?.to_string(), (text(&s["value"]), text(&s["origin"]))))).collect()
    }
}

fn name_of(dir: &Path) -> String {
    let absolute = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_path_buf());
    absolute.file_name().map_or_else(|| dir.display().to_string(), |n| n.to_string_lossy().into_owned())
}

fn folder_bytes(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|e| e.metadata().ok()).filter(|m| m.is_file()).map(|m| m.len()).sum()
}

/// The folders of runs that some folders stand for: one that holds only folders of runs (as `pretrain` writes) stands for these.
pub fn run_folders(dirs: &[PathBuf]) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for dir in dirs {
        if dir.join(METRICS).is_file() {
            all.push(dir.clone());
            continue;
        }
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let mut below: Vec<PathBuf> = entries.map(|e| e.path()).filter(|p| p.join(METRICS).is_file()).collect();
        below.sort();
        // What is wrong with it is said when it is read.
        if below.is_empty() {
            below.push(dir.clone());
        }
        all.extend(below);
    }
    all
}

/// Two runs of one name are told apart by their paths.
pub fn tell_apart(runs: &mut [Run]) {
    let names: Vec<String> = runs.iter().map(|r| r.name.clone()).collect();
    for run in runs {
        if names.iter().filter(|n| **n == run.name).count() > 1 {
            run.name = run.dir.display().to_string();
        }
    }
}

/// The runs of the folders named.
///
/// # Errors
/// If a folder holds no run.
pub fn read_all(dirs: &[PathBuf]) -> Result<Vec<Run>> {
    let mut runs = run_folders(dirs).iter().map(|dir| Run::read(dir)).collect::<Result<Vec<_>>>()?;
    tell_apart(&mut runs);
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_are_read_and_the_rest_is_said() {
        let text = b"{\"step\": 1, \"loss\": 2.5, \"tokens\": 100, \"supervised\": 40, \"lr\": 1e-4}\n\
            not json\n{\"step\": 1, \"eval_loss\": 2.25, \"eval_a_loss\": 2.0, \"eval_b_loss\": 3.0, \"eval_perplexity\": 9.5}\n\
            {\"step\": 2, \"skipped\": \"loss\"}\n{\"step\": 2, \"loss\": 2.0, \"tokens\": 50}\n{\"step\": 3, \"lo";
        let m = parse_metrics(text);
        assert_eq!(m.steps.iter().map(|p| (p.step, p.tokens)).collect::<Vec<_>>(), [(1.0, 100.0), (2.0, 150.0)]);
        assert_eq!((m.steps[0].share, m.steps[0].lr), (40.0, 1e-4));
        assert!(m.steps[0].norm.is_nan());
        assert_eq!((m.evals[0].loss, m.evals[0].tokens), (2.25, 100.0));
        assert_eq!(m.evals[0].sets, [("a".to_string(), 2.0), ("b".to_string(), 3.0)]);
        assert_eq!(m.warnings, ["step 2: no update, loss"]);
        assert_eq!(m.notes.len(), 2);
        assert!(m.notes[0].contains("not complete (15 bytes)"), "{:?}", m.notes);
        assert_eq!(parse_metrics(b""), Metrics::default());
        // The first step is slow; one line in the midst was written on a busy machine.
        let ms = |i: u64| if i == 1 || i == 90 { 60_000 } else { 100 + i };
        let text: String = (1..=99).map(|i| format!("{{\"step\": {i}, \"loss\": 1, \"ms\": {}}}\n", ms(i))).collect();
        assert_eq!(parse_metrics(text.as_bytes()).usual_step(), Some(175.0));
    }
}
