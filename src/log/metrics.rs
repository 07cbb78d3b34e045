//! Where figures go: step lines, the progress bar, `metrics.jsonl`, TensorBoard, MLflow.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::mlflow::{Mlflow, Status};
use super::tensorboard::EventFile;
use crate::error::{Context, Error, Result};
use crate::files::{At, write_bytes};
use crate::say;
use crate::settings::Reporter;
use crate::text::fitted;

/// The file with one JSON object a step and one an evaluation.
pub const METRICS: &str = "metrics.jsonl";

/// One optimiser step, or the steps since the last line.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepFigures {
    /// Steps taken after this one.
    pub step: u64,
    /// Steps planned.
    pub max_steps: u64,
    /// Place in epochs.
    pub epoch: f64,
    /// Mean negative log-likelihood of a supervised token, in nats.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Tokens processed.
    pub tokens: u64,
    /// Supervised targets among them.
    pub supervised: u64,
    /// Wall time in milliseconds.
    pub ms: f64,
    /// Floating-point operations of the model's arithmetic.
    pub flops: f64,
    /// Peak of the device in FLOP/s, where it is known.
    pub peak: Option<f64>,
}

impl StepFigures {
    /// The step line:
    /// `step 120/2400 | loss  1.8321 | norm  0.94 | lr 1.9e-4 | 212 ms |  77k tok/s |  41.2% mfu | 61% valid`.
    ///
    /// Without a known peak the column of the utilisation shows the achieved arithmetic, `131 GFLOP/s`. Where the line is longer than
    /// `width`, columns are left out: first these two, then the rate and norm; the loss never.
    pub fn line(&self, steps: u64, width: Option<usize>) -> String {
        let seconds = (self.ms / 1e3).max(1e-9);
        let arithmetic = match self.peak {
            Some(peak) => format!("{:>5.1}% mfu", 100.0 * self.flops / seconds / peak),
            None => format!("{:>4} GFLOP/s", three_digits(self.flops / seconds / 1e9)),
        };
        let digits = self.max_steps.to_string().len();
        let parts = |of_all: String| {
            [
                (0, format!("step {:>digits$}{of_all}", self.step)),
                (0, format!("loss {:>7.4}", self.loss)),
                (3, format!("norm {:>5.2}", self.grad_norm)),
                (4, format!("lr {:.1e}", self.lr)),
                (2, format!("{:>6}", duration(self.ms / steps.max(1) as f64))),
                (1, format!("{:>4} tok/s", thousands(self.tokens as f64 / seconds))),
                (6, arithmetic.clone()),
                (5, format!("{:>3.0}% valid", 100.0 * self.supervised as f64 / self.tokens.max(1) as f64)),
            ]
        };
        let line = fitted(&parts(format!("/{}", self.max_steps)), width);
        match width.is_some_and(|w| !line.contains("loss") || line.contains('…') && line.chars().count() >= w) {
            // Of a very long run on a very narrow screen.
            true => fitted(&parts(String::new()), width),
            false => line,
        }
    }
}

/// `212 ms`, `3.4 s`.
fn duration(ms: f64) -> String {
    if ms < 9999.5 { format!("{ms:.0} ms") } else { format!("{:.1} s", ms / 1e3) }
}

/// `770`, `7.7k`, `77k`, `1.2M`.
pub fn thousands(v: f64) -> String {
    match v {
        v if v < 999.5 => format!("{v:.0}"),
        v if v < 9_950.0 => format!("{:.1}k", v / 1e3),
        v if v < 999_500.0 => format!("{:.0}k", v / 1e3),
        v if v < 9_950_000.0 => format!("{:.1}M", v / 1e6),
        v => format!("{:.0}M", v / 1e6),
    }
}

fn three_digits(v: f64) -> String {
    match v {
        v if v < 9.95 => format!("{v:.2}"),
        v if v < 99.95 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// Writes every figure to every place that wants it. A place that cannot be written, a full disk for one, is left out from then on
/// and said once: it never ends a run whose weights are fine.
pub struct Metrics {
    jsonl: Option<(File, PathBuf)>,
    events: Option<EventFile>,
    mlflow: Option<Mlflow>,
    bar: Option<ProgressBar>,
}

impl Metrics {
    /// Opens what `places` name of `dir/metrics.jsonl` and an event file in `dir/runs`. Lines of steps after `resumed_at`,
    /// which a killed run wrote and this one takes again, are removed; a new run (0) starts an empty file.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn open(dir: &Path, resumed_at: u64, max_steps: u64, places: &[Reporter], progress: bool) -> Result<Self> {
        let path = dir.join(METRICS);
        keep_until(&path, resumed_at).context(|| path.display().to_string())?;
        let jsonl = match places.contains(&Reporter::Json) {
            true => {
                let open = OpenOptions::new().create(true).append(true).open(&path);
                Some((open.context(|| format!("{}: cannot write", path.display()))?, path))
            }
            false => {
                // Figures of an earlier run would be taken for this one's.
                if resumed_at == 0 && path.exists() {
                    std::fs::remove_file(&path).at(&path)?;
                }
                None
            }
        };
        let events = match places.contains(&Reporter::TensorBoard) {
            true => Some(EventFile::create(&dir.join("runs"), resumed_at + 1)?),
            false => None,
        };
        // Before the first step is done there is no rate to estimate from; only a terminal gets a bar.
        let bar = (progress && say::stderr_is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(Some(max_steps), ProgressDrawTarget::stderr_with_hz(5));
            let template = "{wide_bar} {pos}/{len} steps  {elapsed_precise} < {eta_precise}  {msg}";
            bar.set_style(ProgressStyle::with_template(template).expect("the template is valid"));
            bar.set_position(resumed_at);
            bar.reset_eta();
            bar
        });
        Ok(Self { jsonl, events, mlflow: None, bar })
    }

    /// From now on scalars go to a server of MLflow too.
    pub fn send_to(&mut self, mlflow: Mlflow) {
        self.mlflow = Some(mlflow);
    }

    /// Says what went wrong on the way to the server.
    fn said_by_mlflow(&self) {
        let said = self.mlflow.as_ref().map_or(Vec::new(), Mlflow::warnings);
        said.iter().for_each(|what| self.beside_bar(|| say::warning(what)));
    }

    /// The run has come to its end; the first call counts.
    pub fn end(&mut self, status: Status) {
        if let Some(mlflow) = &mut self.mlflow {
            mlflow.end(status);
        }
        self.said_by_mlflow();
    }

    /// A line on standard output that does not tear the progress bar.
    pub fn print(&self, line: &str) {
        self.beside_bar(|| say::result(line));
    }

    /// A warning that does not tear the progress bar.
    pub fn warn(&self, text: &str) {
        self.beside_bar(|| say::warning(text));
    }

    fn beside_bar(&self, say: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(say),
            None => say(),
        }
    }

    /// One JSON object, as one write: a crash leaves at most one incomplete line, at the end.
    pub fn json(&mut self, value: &Value) {
        let written = self.jsonl.as_mut().map(|(file, path)| file.write_all(format!("{value}\n").as_bytes()).at(path));
        if let Some(Err(e)) = written {
            self.jsonl = None;
            self.left_out(&e);
        }
    }

    /// Whether anybody takes scalars.
    pub fn wants_scalars(&self) -> bool {
        self.events.is_some() || self.mlflow.is_some()
    }

    /// Scalars for TensorBoard and MLflow.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) {
        if let Some(mlflow) = &self.mlflow {
            mlflow.scalars(step, values);
            self.said_by_mlflow();
        }
        if let Some(Err(e)) = self.events.as_mut().map(|events| events.scalars(step, values)) {
            self.events = None;
            self.left_out(&e);
        }
    }

    fn left_out(&self, e: &Error) {
        self.beside_bar(|| say::warning(&format!("{e}; the run goes on without this file")));
    }

    /// One optimiser step for `metrics.jsonl` and the progress bar.
    pub fn step(&mut self, f: &StepFigures) {
        if let Some(bar) = &self.bar {
            bar.set_position(f.step);
            bar.set_message(format!("loss {:.4}", f.loss));
        }
        let rate = f.tokens as f64 / (f.ms / 1e3).max(1e-9);
        self.json(&json!({
            "step": f.step, "epoch": f.epoch, "loss": f.loss, "grad_norm": f.grad_norm, "lr": f.lr,
            "tokens": f.tokens, "supervised": f.supervised, "ms": round3(f.ms), "tokens_per_second": round3(rate),
        }));
    }

    /// Ends the progress bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Three decimals are enough for times.
pub fn round3(v: f64) -> f64 {
    (v * 1e3).round() / 1e3
}

/// Removes lines of later steps and a torn last line; the file is replaced by rename.
fn keep_until(path: &Path, step: u64) -> Result<()> {
    let text = match std::fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let keep = |line: &&[u8]| {
        let parsed = serde_json::from_slice::<Value>(line).ok();
        step > 0 && parsed.and_then(|v| v["step"].as_u64()).is_some_and(|s| s <= step)
    };
    let kept: Vec<u8> = text.split_inclusive(|&b| b == b'\n').filter(keep).flatten().copied().collect();
    if kept.len() < text.len() {
        write_bytes(path, &kept)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_step_line_has_its_columns() {
        let mut f = StepFigures {
            step: 120,
            max_steps: 2400,
            loss: 1.83214,
            grad_norm: 0.944,
            lr: 1.9e-4,
            tokens: 16_324,
            supervised: 9_958,
            ms: 212.0,
            flops: 412e9 * 0.212,
            peak: Some(1e12),
            ..Default::default()
        };
        let expected =
            "step  120/2400 | loss  1.8321 | norm  0.94 | lr 1.9e-4 | 212 ms |  77k tok/s |  41.2% mfu |  61% valid";
        assert_eq!(f.line(1, None), expected);
        f.peak = None;
        assert!(f.line(1, None).contains(" |  412 GFLOP/s | "), "{}", f.line(1, None));
        assert!(f.line(2, None).contains(" | 106 ms |  77k tok/s | "), "{}", f.line(2, None));
        f.ms = 21_200.0;
        assert!(f.line(1, None).contains(" | 21.2 s |  770 tok/s | 4.12 GFLOP/s | "), "{}", f.line(1, None));
        f.loss = f64::NAN;
        assert!(f.line(1, None).contains("loss     NaN"), "{}", f.line(1, None));
    }

    /// A screen of 80 columns holds a step line with all that is read in passing; the loss is on every screen.
    #[test]
    fn a_step_line_fits_every_width() {
        for (max_steps, loss) in [(3, 11.2035), (2_400, 0.0123), (1_000_000_000, 123.4567), (99, f64::NAN)] {
            for (ms, peak) in [(2.0, None), (9_999.0, Some(1e12)), (123_456.0, None)] {
                let (tokens, supervised, grad_norm, lr) = (16_384, 16_384, 1234.5, 1.25e-10);
                let step = max_steps;
                let f = StepFigures {
                    step,
                    max_steps,
                    loss,
                    grad_norm,
                    lr,
                    tokens,
                    supervised,
                    ms,
                    peak,
                    ..Default::default()
                };
                for width in 40..=200 {
                    let line = f.line(1, Some(width));
                    assert!(line.chars().count() <= width, "{width}: {line}");
                    assert!(
                        line.contains(&format!("loss {loss:>7.4}")) && line.contains(&step.to_string()),
                        "{width}: {line}"
                    );
                }
                let line = f.line(1, Some(80));
                assert!(["norm", "lr ", "tok/s"].iter().all(|c| line.contains(c)) || max_steps > 1_000_000, "{line}");
                assert_eq!(f.line(1, Some(200)), f.line(1, None));
            }
        }
    }

    #[test]
    fn thousands_keep_two_digits() {
        let check = |v: f64, expected: &str| assert_eq!(thousands(v), expected);
        check(0.0, "0");
        check(999.4, "999");
        check(999.6, "1.0k");
        check(9_960.0, "10k");
        check(999_600.0, "1.0M");
        check(12_345_678.0, "12M");
    }

    #[test]
    fn a_file_that_fills_up_is_left_out_and_the_others_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut m = Metrics::open(dir.path(), 0, 9, &[Reporter::Json, Reporter::TensorBoard], false).unwrap();
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        m.jsonl = Some((full, dir.path().join(METRICS)));
        for step in 1..=3 {
            m.step(&StepFigures { step, ..Default::default() });
            m.scalars(step, &[("train/loss", 0.5)]);
        }
        assert!(m.jsonl.is_none() && m.events.is_some());
    }

    #[test]
    fn resuming_drops_later_and_torn_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS);
        let write = |m: &mut Metrics, steps: std::ops::RangeInclusive<u64>| {
            steps.for_each(|step| m.step(&StepFigures { step, loss: 0.5, ms: 1.0, ..Default::default() }));
        };
        let mut m = Metrics::open(dir.path(), 0, 9, &[Reporter::Json], false).unwrap();
        write(&mut m, 1..=7);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\": 3, \"lo").unwrap();
        let mut m = Metrics::open(dir.path(), 5, 9, &[Reporter::Json], false).unwrap();
        write(&mut m, 6..=6);
        let text = std::fs::read_to_string(&path).unwrap();
        let steps: Vec<u64> =
            text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
        drop(Metrics::open(dir.path(), 0, 9, &[Reporter::Json], false).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
        // A new run that keeps none takes those of an earlier one away.
        drop(Metrics::open(dir.path(), 0, 9, &[], false).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
