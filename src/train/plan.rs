//! From settings to the constants of a run: schedule, optimiser, and the fingerprint of what decides its arithmetic.

use crate::error::Result;
use crate::optim::groups::GroupSettings;
use crate::optim::{self, AdamWSettings, Schedule, ScheduleSettings, Shape};
use crate::settings::{LrSchedule, TrainSettings, Warmup};

/// The learning rate of every step.
///
/// # Errors
/// If a setting is outside its range.
pub fn schedule(s: &TrainSettings, peak: f64, max_steps: u64) -> Result<Schedule> {
    let shape = match s.lr_schedule {
        LrSchedule::Cosine => Shape::Cosine,
        LrSchedule::Linear => Shape::Linear,
        LrSchedule::Constant => Shape::Constant,
        LrSchedule::Wsd => Shape::Wsd { decay_ratio: s.wsd_decay_ratio },
    };
    let warmup = match s.warmup {
        Warmup::Ratio(r) => optim::Warmup::Ratio(r),
        Warmup::Steps(n) => optim::Warmup::Steps(n),
    };
    let (min_lr_ratio, warmup_from_zero) = (s.min_lr_ratio, s.warmup_from_zero);
    Schedule::new(ScheduleSettings { peak, shape, warmup, min_lr_ratio, warmup_from_zero }, max_steps)
}

/// Constants of AdamW. `new_rows`: with LoRA, the first row that the vocabulary was grown by.
pub fn adamw(s: &TrainSettings, new_rows: Option<usize>) -> AdamWSettings {
    AdamWSettings {
        beta1: s.adam_beta1,
        beta2: s.adam_beta2,
        eps: s.adam_eps,
        weight_decay: s.weight_decay,
        max_grad_norm: s.max_grad_norm,
        groups: GroupSettings { lora_plus: s.lora.as_ref().and_then(|l| l.plus_ratio), new_rows },
    }
}

/// Hash of every setting that decides a step's arithmetic; what only decides when to look, save or print is left out.
pub fn fingerprint(s: &TrainSettings, peak: f64, max_steps: u64) -> String {
    let rate = (peak, s.lr_schedule, s.min_lr_ratio, s.wsd_decay_ratio, s.warmup, s.warmup_from_zero, max_steps);
    let steps = (s.micro_batch_size, s.grad_accum, s.max_seq_len, s.seed, s.precision);
    let update = (s.weight_decay, s.max_grad_norm, s.adam_beta1, s.adam_beta2, s.adam_eps, s.max_bad_steps);
    let text = format!("{rate:?} {steps:?} {update:?} {:?}", s.lora);
    blake3::hash(text.as_bytes()).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Every, Resume};

    #[test]
    fn the_fingerprint_follows_arithmetic_alone() {
        let base = TrainSettings::default();
        let of = |change: fn(&mut TrainSettings)| {
            let mut s = base.clone();
            change(&mut s);
            fingerprint(&s, 1e-4, 100)
        };
        let same = fingerprint(&base, 1e-4, 100);
        assert_eq!(of(|s| s.save_every = Every::Steps(3)), same);
        assert_eq!(of(|s| s.logging_steps = 7), same);
        assert_eq!(of(|s| s.resume = Resume::Auto), same);
        assert_eq!(of(|s| s.threads = Some(1)), same);
        assert_ne!(of(|s| s.seed = 43), same);
        assert_ne!(of(|s| s.grad_accum = 2), same);
        assert_ne!(of(|s| s.lora.as_mut().unwrap().dropout = 0.1), same);
        assert_ne!(fingerprint(&base, 1e-4, 101), same);
        assert_ne!(fingerprint(&base, 2e-4, 100), same);
    }

    #[test]
    fn settings_reach_schedule_and_optimiser() {
        let s = TrainSettings {
            lr_schedule: LrSchedule::Linear,
            warmup: Warmup::Steps(2),
            min_lr_ratio: 0.5,
            max_grad_norm: None,
            ..Default::default()
        };
        let lr = schedule(&s, 1.0, 10).unwrap();
        assert_eq!((lr.lr(0), lr.lr(1), lr.lr(2), lr.lr(10)), (0.5, 1.0, 1.0, 0.5));
        let a = adamw(&s, Some(4096));
        assert_eq!((a.max_grad_norm, a.groups.new_rows, a.beta2), (None, Some(4096), 0.999));
    }
}
