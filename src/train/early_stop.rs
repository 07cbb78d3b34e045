//! Best evaluation so far, and when to give up. The state is part of every checkpoint.

use crate::settings::EarlyStopping;

/// What the evaluations have shown so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BestSoFar {
    /// Lowest eval_loss and the step it was measured at.
    pub best: Option<(f64, u64)>,
    /// Loss that the patience compares with: falls only by more than the threshold.
    pub reference: Option<f64>,
    /// Evaluations in a row that did not lower `reference` by more than the threshold.
    pub misses: u32,
}

/// What follows from one evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The lowest loss so far: this model is the best.
    pub is_best: bool,
    /// The patience is used up.
    pub stop: bool,
}

impl BestSoFar {
    /// Takes in the eval_loss of `step`. A loss that is not finite never improves anything.
    ///
    /// "Best" is any new minimum; the patience, as in transformers' callback, asks for an improvement beyond the threshold.
    /// The reference moves only then, so a slow drift that adds up to the threshold counts as an improvement.
    pub fn observe(&mut self, loss: f64, step: u64, rule: Option<EarlyStopping>) -> Verdict {
        let is_best = loss.is_finite() && self.best.is_none_or(|(best, _)| loss < best);
        if is_best {
            self.best = Some((loss, step));
        }
        let Some(rule) = rule else {
            return Verdict { is_best, stop: false };
        };
        if loss.is_finite() && self.reference.is_none_or(|r| loss < r - rule.threshold) {
            (self.reference, self.misses) = (Some(loss), 0);
        } else {
            self.misses += 1;
        }
        Verdict { is_best, stop: self.misses >= rule.patience }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(losses: &[f64], patience: u32, threshold: f64, stops_at: Option<usize>, best: Option<(f64, u64)>) {
        let mut state = BestSoFar::default();
        let rule = Some(EarlyStopping { patience, threshold });
        let stopped = losses.iter().enumerate().position(|(i, &l)| state.observe(l, i as u64, rule).stop);
        assert_eq!((stopped, state.best), (stops_at, best), "{losses:?}");
    }

    #[test]
    fn patience_counts_misses_in_a_row() {
        check(&[3.0, 2.0, 2.5, 2.4], 2, 0.0, Some(3), Some((2.0, 1)));
        check(&[3.0, 2.0, 2.5, 1.9, 2.0], 2, 0.0, None, Some((1.9, 3)));
        check(&[3.0, 3.0], 1, 0.0, Some(1), Some((3.0, 0)));
    }

    #[test]
    fn threshold_delays_the_reference_but_not_the_best() {
        // Each step improves by less than the threshold, but two of them together by more.
        check(&[3.0, 2.96, 2.89], 2, 0.1, None, Some((2.89, 2)));
        check(&[3.0, 2.96, 2.93], 2, 0.1, Some(2), Some((2.93, 2)));
    }

    #[test]
    fn nan_never_is_the_best() {
        check(&[f64::NAN, 2.0, f64::NAN, f64::INFINITY], 2, 0.0, Some(3), Some((2.0, 1)));
    }

    #[test]
    fn without_a_rule_only_the_best_is_kept() {
        let mut state = BestSoFar::default();
        assert_eq!(state.observe(2.0, 1, None), Verdict { is_best: true, stop: false });
        assert_eq!(state.observe(3.0, 2, None), Verdict { is_best: false, stop: false });
        assert_eq!(state.misses, 0);
    }
}
