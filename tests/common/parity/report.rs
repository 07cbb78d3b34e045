//! Comparison with what was recorded: tolerances, the table of results.

use std::fmt::Write as _;

use serde_json::Value;

use super::case::{Array, Arrays};
use ringtune::tensor::DType;

/// Largest accepted differences from the recorded float64 values: [`FACTOR`] times the noise that the case records of the
/// recording library's own run at that precision. The fallbacks, where a case records none, are of that size too.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerances {
    /// Relative, all logits together.
    pub logits: f64,
    /// Absolute, the logsumexp of each token.
    pub logsumexp: f64,
    /// Absolute, each token.
    pub token_loss: f64,
    /// Absolute.
    pub loss: f64,
    /// Relative, each tensor; also norms of gradients.
    pub gradient: f64,
    /// Absolute, each loss of the AdamW steps.
    pub step_loss: f64,
    /// Relative, each norm of the AdamW steps.
    pub step_norm: f64,
    /// Relative, update of each tensor over all steps.
    pub update: f64,
}

/// Accepted share of the recorded noise: our sums run in another order, and one draw of noise is not its bound.
const FACTOR: f64 = 4.0;

impl Tolerances {
    /// Those of a precision where a case records no noise.
    pub fn of(dtype: DType) -> Self {
        match dtype {
            DType::Bf16 => Self {
                logits: 6e-2,
                logsumexp: 1.0,
                token_loss: 0.6,
                loss: 5e-2,
                gradient: 0.25,
                step_loss: 0.2,
                step_norm: 0.25,
                update: 0.4,
            },
            _ => Self {
                logits: 4e-6,
                logsumexp: 5e-5,
                token_loss: 2e-5,
                loss: 5e-6,
                gradient: 1e-5,
                step_loss: 1e-5,
                step_norm: 2e-5,
                update: 7e-4,
            },
        }
    }

    /// The same with the noise that a part of the case (`noise.PART` of `golden.json`) records for the precision; the larger one
    /// where the library ran in several modes of it.
    pub fn recorded(self, noise: &Value, dtype: DType) -> Self {
        let modes: &[&str] = if dtype == DType::Bf16 { &["bf16", "bf16_autocast"] } else { &["fp32"] };
        let of = |path: &[&str]| -> Option<f64> {
            let values = modes.iter().filter_map(|&mode| path.iter().fold(&noise[mode], |v, &key| &v[key]).as_f64());
            values.reduce(f64::max).map(|x| FACTOR * x)
        };
        let mean = of(&["token_loss", "mean_abs"]);
        Self {
            logits: of(&["logits", "rel_fro"]).unwrap_or(self.logits),
            // Never further than the furthest logit of its row.
            logsumexp: of(&["logits", "max_abs"]).unwrap_or(self.logsumexp),
            token_loss: of(&["token_loss", "max_abs"]).unwrap_or(self.token_loss),
            // Errors of tokens may cancel by chance in one run and not in another.
            loss: of(&["loss_abs"]).map(|x| x.max(mean.unwrap_or(0.0))).unwrap_or(self.loss),
            gradient: of(&["grad_rel_fro_max"]).unwrap_or(self.gradient),
            step_loss: of(&["loss_max_abs"]).unwrap_or(self.step_loss),
            step_norm: of(&["grad_norm_max_rel"]).unwrap_or(self.step_norm),
            update: of(&["update_rel_fro_max"]).unwrap_or(self.update),
        }
    }
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq)]
struct Line {
    what: String,
    error: f64,
    allowed: f64,
    /// The tensor, token or step with the largest share of its tolerance.
    worst: String,
}

/// All comparisons of a case.
#[derive(Debug, Default)]
pub struct Report {
    lines: Vec<Line>,
    notes: Vec<String>,
}

impl Report {
    /// Records a difference; of those with one `what` the worst is kept. A NaN fails.
    pub fn compare(&mut self, what: &str, worst: impl Into<String>, error: f64, allowed: f64) {
        let error = if error.is_nan() { f64::INFINITY } else { error };
        let worst = worst.into();
        match self.lines.iter_mut().find(|l| l.what == what) {
            Some(l) if error / allowed <= l.error / l.allowed => {}
            Some(l) => *l = Line { what: what.to_string(), error, allowed, worst },
            None => self.lines.push(Line { what: what.to_string(), error, allowed, worst }),
        }
    }

    /// Records whether two numbers that allow no difference are equal.
    pub fn equal(&mut self, what: &str, worst: impl Into<String>, ours: u64, want: u64) {
        self.compare(what, worst, ours.abs_diff(want) as f64, 0.5);
    }

    /// Records something of the case that nothing here compares: it fails, for a difference in it would go unseen.
    pub fn uncompared(&mut self, what: &str, name: impl Into<String>) {
        self.compare(what, name, f64::INFINITY, 0.5);
    }

    /// Adds a sentence below the table.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// Comparisons beyond their tolerance.
    pub fn failures(&self) -> usize {
        self.lines.iter().filter(|l| l.error > l.allowed).count()
    }

    /// Number of comparisons.
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// The table as text.
    pub fn table(&self) -> String {
        let wide = self.lines.iter().map(|l| l.what.len()).max().unwrap_or(0).max(4);
        let mut out = format!("{:wide$}  {:>9}  {:>9}        worst\n", "what", "error", "allowed");
        for l in &self.lines {
            let verdict = if l.error > l.allowed { "FAIL" } else { "ok" };
            let _ = writeln!(out, "{:wide$}  {:>9.2e}  {:>9.1e}  {verdict:4}  {}", l.what, l.error, l.allowed, l.worst);
        }
        for n in &self.notes {
            let _ = writeln!(out, "note: {n}");
        }
        out
    }
}

/// Relative Frobenius error of `ours` against `reference`; infinite where one is longer than the other.
pub fn relative(ours: impl IntoIterator<Item = f64>, reference: impl IntoIterator<Item = f64>) -> f64 {
    let (mut ours, mut reference) = (ours.into_iter(), reference.into_iter());
    let (mut diff, mut norm) = (0.0, 0.0);
    loop {
        match (ours.next(), reference.next()) {
            (Some(a), Some(b)) => {
                diff += (a - b) * (a - b);
                norm += b * b;
            }
            (None, None) => break,
            _ => return f64::INFINITY,
        }
    }
    if norm == 0.0 { f64::sqrt(diff) } else { f64::sqrt(diff / norm) }
}

/// Largest absolute difference and where it is; infinite, at the end of the shorter one, where the lengths differ.
pub fn largest(ours: &[f32], reference: &[f64]) -> (f64, usize) {
    if ours.len() != reference.len() {
        return (f64::INFINITY, ours.len().min(reference.len()));
    }
    let mut worst = (0.0, 0);
    for (i, (&a, &b)) in ours.iter().zip(reference).enumerate() {
        let d = (f64::from(a) - b).abs();
        if d > worst.0 || d.is_nan() {
            worst = (d, i);
        }
    }
    worst
}

/// The step between recorded columns: recorded is every n-th of `width`, from 0.
pub fn stride(text: Option<&str>, width: usize, recorded: usize) -> usize {
    let digits: String = text.unwrap_or("").chars().filter(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| width.div_ceil(recorded.max(1)))
}

/// Our values at the columns that were recorded.
pub fn columns(values: &[f32], width: usize, stride: usize) -> impl Iterator<Item = f64> + '_ {
    values.chunks(width).flat_map(move |row| row.iter().step_by(stride).map(|&x| f64::from(x)))
}

/// A recorded matrix: whole, or as `NAME.rows` at `NAME.row_ids`. Gives our values (of `ours`, rows of width `cols`) and the
/// recorded ones; ours are empty where a row beyond them was recorded. `None` if it was not recorded.
pub fn recorded<'a>(all: &'a Arrays, name: &str, ours: &[f32], cols: usize) -> Option<(Vec<f64>, &'a Array)> {
    let wide = |x: &[f32]| x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    if let Some(whole) = all.get(name) {
        return Some((wide(ours), whole));
    }
    let (rows, ids) = (all.get(&format!("{name}.rows"))?, all.get(&format!("{name}.row_ids"))?.ints());
    let row = |id: i64| {
        let at = usize::try_from(id).ok()?.checked_mul(cols)?;
        ours.get(at..at.checked_add(cols)?)
    };
    let at: Option<Vec<&[f32]>> = ids.into_iter().map(row).collect();
    Some((wide(&at.unwrap_or_default().concat()), rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_of_a_kind_is_kept_and_nan_fails() {
        let mut r = Report::default();
        r.compare("gradient", "a", 1e-6, 1e-5);
        r.compare("gradient", "b", 5e-6, 1e-5);
        r.compare("gradient", "c", 2e-6, 1e-5);
        assert_eq!((r.len(), r.failures()), (1, 0));
        assert!(r.table().contains(" b\n"));
        r.compare("gradient", "d", f64::NAN, 1e-5);
        assert_eq!(r.failures(), 1);
    }

    #[test]
    fn relative_error_and_stride() {
        assert_eq!(relative([3.0, 4.0], [3.0, 4.0]), 0.0);
        assert!((relative([3.0, 4.5], [3.0, 4.0]) - 0.1).abs() < 1e-12);
        assert_eq!(relative([3.0], [3.0, 4.0]), f64::INFINITY);
        assert_eq!(relative([3.0, 4.0], [3.0]), f64::INFINITY);
        assert_eq!(largest(&[1.0, 2.0], &[1.0]), (f64::INFINITY, 1));
        assert_eq!(stride(Some("every 16th"), 4096, 256), 16);
        assert_eq!(stride(Some("all"), 640, 640), 1);
    }
}
