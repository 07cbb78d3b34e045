//! Comparison with what was recorded: tolerances, the table of results.

use std::fmt::Write as _;

use super::case::{Array, Arrays};
use ringtune::tensor::DType;

/// Largest accepted differences from the recorded float64 values; 4 to 18 times the noise of the recording library's own run at
/// that precision, and below the effect of the smallest mistake.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerances {
    /// Relative, all logits together.
    pub logits: f64,
    /// Absolute, each token; `None` where single tokens say nothing.
    pub token_loss: Option<f64>,
    /// Absolute.
    pub loss: f64,
    /// Relative, each tensor; also norms of gradients.
    pub gradient: f64,
    /// Absolute, each loss of the AdamW steps.
    pub step_loss: f64,
    /// Relative, update of each tensor over all steps.
    pub update: f64,
    /// The same of k_proj.bias, whose gradient nearly vanishes in the slow rotary dimensions; `None`: not compared.
    pub update_k_bias: Option<f64>,
}

impl Tolerances {
    /// Those of a precision.
    pub fn of(dtype: DType) -> Self {
        match dtype {
            DType::Bf16 => Self {
                logits: 6e-2,
                token_loss: None,
                loss: 5e-2,
                gradient: 0.25,
                step_loss: 0.2,
                update: 0.2,
                update_k_bias: None,
            },
            _ => Self {
                logits: 2e-5,
                token_loss: Some(1e-4),
                loss: 2e-5,
                gradient: 5e-5,
                step_loss: 1e-4,
                update: 5e-4,
                update_k_bias: Some(2e-3),
            },
        }
    }

    /// Tolerance of the update of a tensor.
    pub fn update_of(&self, name: &str) -> Option<f64> {
        if name.ends_with("k_proj.bias") { self.update_k_bias } else { Some(self.update) }
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

/// Relative Frobenius error of `ours` against `reference`.
pub fn relative(ours: impl IntoIterator<Item = f64>, reference: impl IntoIterator<Item = f64>) -> f64 {
    let (mut diff, mut norm) = (0.0, 0.0);
    for (a, b) in ours.into_iter().zip(reference) {
        diff += (a - b) * (a - b);
        norm += b * b;
    }
    if norm == 0.0 { diff.sqrt() } else { (diff / norm).sqrt() }
}

/// Largest absolute difference and where it is.
pub fn largest(ours: &[f32], reference: &[f64]) -> (f64, usize) {
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

/// A recorded matrix: whole, or as `NAME.rows` at `NAME.row_ids`. Gives our rows (taken from `ours`, of width `cols`) and the
/// recorded ones; `None` if it was not recorded.
pub fn recorded<'a>(all: &'a Arrays, name: &str, ours: &[f32], cols: usize) -> Option<(Vec<f64>, &'a Array)> {
    let wide = |x: &[f32]| x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    if let Some(whole) = all.get(name) {
        return Some((wide(ours), whole));
    }
    let rows = all.get(&format!("{name}.rows"))?;
    let ids = all.get(&format!("{name}.row_ids"))?.ints();
    let mut at = Vec::with_capacity(rows.data.len());
    for id in ids {
        at.extend(wide(ours.get(id as usize * cols..(id as usize + 1) * cols)?));
    }
    Some((at, rows))
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
        assert_eq!(stride(Some("every 16th"), 4096, 256), 16);
        assert_eq!(stride(Some("all"), 640, 640), 1);
    }
}
