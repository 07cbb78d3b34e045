//! Learning rate over the steps of a run: warmup, then cosine, linear, constant or warmup-stable-decay.

use crate::words::words;

/// What follows the warmup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shape {
    /// Half a cosine from the peak down to `min_lr_ratio` of it (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5).
    #[default]
    Cosine,
    /// A straight line from the peak down to `min_lr_ratio` of it.
    Linear,
    /// The peak.
    Constant,
    /// Warmup, stable, decay: the peak, then a straight line down to `min_lr_ratio` over the last `wsd_decay_ratio` of all steps
    /// (Hu et al. 2024, arXiv:2404.06395, section 4.2).
    Wsd,
}
words!(Shape { Cosine = "cosine", Linear = "linear", Constant = "constant", Wsd = "wsd" });

/// Length of the warmup.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// A share of all steps, rounded up as transformers does.
    Ratio(f64),
    /// A number of steps.
    Steps(u64),
}

impl Default for Warmup {
    /// None.
    fn default() -> Self {
        Warmup::Steps(0)
    }
}

/// What a schedule is made of, besides its peak. The ranges are those of the settings.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ScheduleSettings {
    /// What follows the warmup.
    pub shape: Shape,
    /// Length of the warmup.
    pub warmup: Warmup,
    /// Lowest learning rate as a share of the peak.
    pub min_lr_ratio: f64,
    /// Share of all steps in which `wsd` decays, in (0, 1].
    pub wsd_decay_ratio: f64,
    /// transformers' warmup, `t / warmup`, whose step 0 runs at 0; else `(t + 1) / warmup`.
    pub warmup_from_zero: bool,
}

/// The learning rate of every step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    settings: ScheduleSettings,
    peak: f64,
    warmup_steps: u64,
    total_steps: u64,
}

impl Schedule {
    /// The schedule over `total_steps` optimiser steps that rises to `peak`.
    pub fn new(settings: ScheduleSettings, peak: f64, total_steps: u64) -> Self {
        let warmup_steps = match settings.warmup {
            Warmup::Steps(n) => n,
            Warmup::Ratio(r) => (total_steps as f64 * r).ceil() as u64,
        };
        Self { settings, peak, warmup_steps, total_steps }
    }

    /// The rate that the warmup rises to.
    pub fn peak(&self) -> f64 {
        self.peak
    }

    /// Steps of the warmup.
    pub fn warmup_steps(&self) -> u64 {
        self.warmup_steps
    }

    /// Steps of the run.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Learning rate of `step`, counted from 0.
    pub fn lr(&self, step: u64) -> f64 {
        self.peak * self.factor(step)
    }

    /// Share of the peak at `step`. In the order of transformers' operations, so that its values come out bit for bit.
    fn factor(&self, step: u64) -> f64 {
        let (warmup, total) = (self.warmup_steps, self.total_steps);
        if step < warmup {
            let t = if self.settings.warmup_from_zero { step } else { step + 1 };
            return t as f64 / warmup as f64;
        }
        let step = step.min(total);
        let floor = self.settings.min_lr_ratio;
        let left_of = |span: u64| total.saturating_sub(step) as f64 / span.max(1) as f64;
        let after_warmup = total.saturating_sub(warmup);
        let decayed = match self.settings.shape {
            Shape::Constant => return 1.0,
            Shape::Cosine => {
                let progress = step.saturating_sub(warmup) as f64 / after_warmup.max(1) as f64;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
            Shape::Linear => left_of(after_warmup).clamp(0.0, 1.0),
            Shape::Wsd => {
                let span =
                    ((total as f64 * self.settings.wsd_decay_ratio).round() as u64).clamp(1, after_warmup.max(1));
                left_of(span).clamp(0.0, 1.0)
            }
        };
        decayed * (1.0 - floor) + floor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape, warmup: Warmup, warmup_from_zero: bool, total: u64) -> Schedule {
        decaying(shape, 0.25, warmup, warmup_from_zero, total)
    }

    fn decaying(shape: Shape, wsd_decay_ratio: f64, warmup: Warmup, warmup_from_zero: bool, total: u64) -> Schedule {
        let settings = ScheduleSettings { shape, warmup, min_lr_ratio: 0.1, wsd_decay_ratio, warmup_from_zero };
        Schedule::new(settings, 1.0, total)
    }

    #[test]
    fn warmup_never_runs_at_zero_and_ends_at_the_peak() {
        for shape in [Shape::Cosine, Shape::Linear, Shape::Constant, Shape::Wsd] {
            let s = decaying(shape, 0.2, Warmup::Steps(4), false, 20);
            assert_eq!((0..5).map(|t| s.lr(t)).collect::<Vec<_>>(), [0.25, 0.5, 0.75, 1.0, 1.0], "{shape:?}");
            let z = decaying(shape, 0.2, Warmup::Steps(4), true, 20);
            assert_eq!((0..5).map(|t| z.lr(t)).collect::<Vec<_>>(), [0.0, 0.25, 0.5, 0.75, 1.0], "{shape:?}");
        }
    }

    #[test]
    fn every_shape_falls_to_its_floor() {
        for shape in [Shape::Cosine, Shape::Linear, Shape::Wsd] {
            let s = schedule(shape, Warmup::Ratio(0.0), false, 40);
            assert_eq!(s.lr(0), 1.0);
            assert!((s.lr(40) - 0.1).abs() < 1e-15, "{shape:?}: {}", s.lr(40));
            assert_eq!(s.lr(1000), s.lr(40));
            assert!((1..=40).all(|t| s.lr(t) <= s.lr(t - 1)), "{shape:?}");
        }
        let wsd = schedule(Shape::Wsd, Warmup::Steps(2), false, 40);
        assert_eq!(wsd.lr(30), 1.0);
        assert!((wsd.lr(35) - 0.55).abs() < 1e-15);
        assert_eq!(schedule(Shape::Constant, Warmup::Steps(2), false, 40).lr(39), 1.0);
    }

    #[test]
    fn ratio_is_rounded_up_and_extremes_are_harmless() {
        assert_eq!(schedule(Shape::Cosine, Warmup::Ratio(0.03), false, 101).warmup_steps(), 4);
        let all = schedule(Shape::Cosine, Warmup::Steps(50), false, 10);
        assert_eq!(all.lr(9), 0.2);
        let none = decaying(Shape::Wsd, 1.0, Warmup::Steps(0), false, 0);
        assert!(none.lr(0).is_finite());
    }
}
