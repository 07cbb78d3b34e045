//! Learning rate over the steps of a run: warmup, then cosine, linear, constant or warmup-stable-decay.

use crate::error::{Error, Result};

/// What follows the warmup.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// Half a cosine from the peak down to `min_lr_ratio` of it (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5).
    Cosine,
    /// A straight line from the peak down to `min_lr_ratio` of it.
    Linear,
    /// The peak.
    Constant,
    /// The peak, then a straight line down to `min_lr_ratio` over the last `decay_ratio` of all steps (Hu et al. 2024,
    /// arXiv:2404.06395, section 4.2).
    Wsd {
        /// Share of all steps that decay, in (0, 1].
        decay_ratio: f64,
    },
}

/// Length of the warmup.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// A share of all steps, rounded up as transformers does.
    Ratio(f64),
    /// A number of steps.
    Steps(u64),
}

/// What a schedule is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScheduleSettings {
    /// Highest learning rate.
    pub peak: f64,
    /// What follows the warmup.
    pub shape: Shape,
    /// Length of the warmup.
    pub warmup: Warmup,
    /// Lowest learning rate as a share of the peak.
    pub min_lr_ratio: f64,
    /// transformers' warmup, `t / warmup`, whose step 0 runs at 0; else `(t + 1) / warmup`.
    pub warmup_from_zero: bool,
}

/// The learning rate of every step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    settings: ScheduleSettings,
    warmup_steps: u64,
    total_steps: u64,
}

impl Schedule {
    /// The schedule over `total_steps` optimiser steps.
    ///
    /// # Errors
    /// If a setting is outside its range.
    pub fn new(settings: ScheduleSettings, total_steps: u64) -> Result<Self> {
        let usage = |message: String| Err(Error::usage(message));
        let ScheduleSettings { peak, min_lr_ratio, .. } = settings;
        if !(peak > 0.0 && peak.is_finite()) {
            return usage(format!("learning_rate: expected a positive number, found {peak}"));
        }
        if !(0.0..=1.0).contains(&min_lr_ratio) {
            return usage(format!("min_lr_ratio: expected 0 to 1, found {min_lr_ratio}"));
        }
        if let Shape::Wsd { decay_ratio } = settings.shape
            && !(decay_ratio > 0.0 && decay_ratio <= 1.0)
        {
            return usage(format!("wsd_decay_ratio: expected above 0 and at most 1, found {decay_ratio}"));
        }
        let warmup_steps = match settings.warmup {
            Warmup::Steps(n) => n,
            Warmup::Ratio(r) if (0.0..=1.0).contains(&r) => (total_steps as f64 * r).ceil() as u64,
            Warmup::Ratio(r) => return usage(format!("warmup_ratio: expected 0 to 1, found {r}")),
        };
        Ok(Self { settings, warmup_steps, total_steps })
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
        self.settings.peak * self.factor(step)
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
            Shape::Wsd { decay_ratio } => {
                let span = ((total as f64 * decay_ratio).round() as u64).clamp(1, after_warmup.max(1));
                left_of(span).clamp(0.0, 1.0)
            }
        };
        decayed * (1.0 - floor) + floor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape, warmup: Warmup, from_zero: bool, total: u64) -> Schedule {
        let settings = ScheduleSettings { peak: 1.0, shape, warmup, min_lr_ratio: 0.1, warmup_from_zero: from_zero };
        Schedule::new(settings, total).unwrap()
    }

    #[test]
    fn warmup_never_runs_at_zero_and_ends_at_the_peak() {
        for shape in [Shape::Cosine, Shape::Linear, Shape::Constant, Shape::Wsd { decay_ratio: 0.2 }] {
            let s = schedule(shape, Warmup::Steps(4), false, 20);
            assert_eq!((0..5).map(|t| s.lr(t)).collect::<Vec<_>>(), [0.25, 0.5, 0.75, 1.0, 1.0], "{shape:?}");
            let z = schedule(shape, Warmup::Steps(4), true, 20);
            assert_eq!((0..5).map(|t| z.lr(t)).collect::<Vec<_>>(), [0.0, 0.25, 0.5, 0.75, 1.0], "{shape:?}");
        }
    }

    #[test]
    fn every_shape_falls_to_its_floor() {
        for shape in [Shape::Cosine, Shape::Linear, Shape::Wsd { decay_ratio: 0.25 }] {
            let s = schedule(shape, Warmup::Ratio(0.0), false, 40);
            assert_eq!(s.lr(0), 1.0);
            assert!((s.lr(40) - 0.1).abs() < 1e-15, "{shape:?}: {}", s.lr(40));
            assert_eq!(s.lr(1000), s.lr(40));
            assert!((1..=40).all(|t| s.lr(t) <= s.lr(t - 1)), "{shape:?}");
        }
        let wsd = schedule(Shape::Wsd { decay_ratio: 0.25 }, Warmup::Steps(2), false, 40);
        assert_eq!(wsd.lr(30), 1.0);
        assert!((wsd.lr(35) - 0.55).abs() < 1e-15);
        assert_eq!(schedule(Shape::Constant, Warmup::Steps(2), false, 40).lr(39), 1.0);
    }

    #[test]
    fn ratio_is_rounded_up_and_extremes_are_harmless() {
        assert_eq!(schedule(Shape::Cosine, Warmup::Ratio(0.03), false, 101).warmup_steps(), 4);
        let all = schedule(Shape::Cosine, Warmup::Steps(50), false, 10);
        assert_eq!(all.lr(9), 0.2);
        let none = schedule(Shape::Wsd { decay_ratio: 1.0 }, Warmup::Steps(0), false, 0);
        assert!(none.lr(0).is_finite());
    }
}
