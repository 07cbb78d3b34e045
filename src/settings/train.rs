//! Every setting of a training run as plain values. The command line and the config file fill it; defaults follow TRL where
//! its users expect them.

use crate::error::{Error, Result};

/// Storage type of weights and activations (`--mixed_precision`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// `no`: everything in f32.
    F32,
    /// `bf16`: weights and activations bf16; sums, gradients, masters and moments f32.
    Bf16,
}

/// What is computed again in backward instead of being kept (`--recompute`); the bits of the result do not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Keep every activation.
    None,
    /// Recompute what lies inside the attention and feed-forward blocks.
    Attention,
    /// Keep only each layer's input.
    Layer,
}

/// Shape of the learning rate over the run (`--lr_scheduler_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LrSchedule {
    /// Half a cosine from the peak to `min_lr_ratio` of it.
    Cosine,
    /// A straight line from the peak to `min_lr_ratio` of it.
    Linear,
    /// The peak after warmup.
    Constant,
    /// Warmup, stable, decay: the peak, then a straight line to `min_lr_ratio` over the last `wsd_decay_ratio` of the steps.
    Wsd,
}

/// Length of the warmup.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// A share of all steps, rounded up (`warmup_ratio`).
    Ratio(f64),
    /// A number of steps (`warmup_steps`).
    Steps(u64),
}

/// Low-rank adaptation as PEFT does it; names of the targets as in Hugging Face files, with or without `_proj`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSettings {
    /// Rank (`--lora_r`).
    pub r: usize,
    /// `s = alpha / r` (`--lora_alpha`).
    pub alpha: f64,
    /// Probability of dropping an input of A (`--lora_dropout`).
    pub dropout: f64,
    /// `s = alpha / sqrt(r)` instead (`--use_rslora`).
    pub rslora: bool,
    /// Any of q, k, v, o, gate, up, down (`--lora_targets`); default all seven.
    pub targets: Vec<String>,
    /// LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns with this multiple of the learning rate (`--loraplus_lr_ratio`).
    pub plus_ratio: Option<f64>,
}

impl Default for LoraSettings {
    fn default() -> Self {
        let targets = ["q", "k", "v", "o", "gate", "up", "down"].map(String::from).to_vec();
        Self { r: 16, alpha: 32.0, dropout: 0.05, rslora: false, targets, plus_ratio: None }
    }
}

/// When and how often things happen: every so many optimiser steps, or once an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Every {
    /// Every n steps (n > 0), and at the end.
    Steps(u64),
    /// At the end of each epoch.
    Epoch,
    /// Never.
    Never,
}

impl Every {
    /// Whether it is due after `step` steps, where `epoch_end` says that the step closed an epoch.
    pub fn due(self, step: u64, epoch_end: bool) -> bool {
        match self {
            Every::Steps(n) => step.is_multiple_of(n),
            Every::Epoch => epoch_end,
            Every::Never => false,
        }
    }
}

/// Stop when eval_loss no longer improves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EarlyStopping {
    /// Evaluations without improvement before the run stops (`--early_stopping_patience`).
    pub patience: u32,
    /// An improvement counts when the loss falls by more than this (`--early_stopping_threshold`).
    pub threshold: f64,
}

/// The generation test at the end of a run (`--do_gen_test`).
#[derive(Clone, Debug, PartialEq)]
pub struct GenTest {
    /// Held-out prompts (`--num_gen_samples`).
    pub num_samples: usize,
    /// Longest output in tokens (`--max_new_tokens`).
    pub max_new_tokens: usize,
    /// Temperature of the sampled outputs; each prompt is also decoded greedily (`--gen_temperature`).
    pub temperature: f32,
    /// Nucleus of the sampled outputs (`--gen_top_p`).
    pub top_p: f32,
}

impl Default for GenTest {
    fn default() -> Self {
        Self { num_samples: 5, max_new_tokens: 64, temperature: 0.7, top_p: 0.9 }
    }
}

/// Where to resume from (`--resume_from_checkpoint`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// Start at step 0.
    No,
    /// The newest valid checkpoint in the output folder; start at step 0 where there is none.
    Auto,
    /// This checkpoint folder.
    Path(std::path::PathBuf),
}

/// Every setting of the training loop. Data and model paths are arguments of the commands, not of the loop.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainSettings {
    /// Peak learning rate; `None`: 2e-4 with LoRA, 2e-5 in full fine-tuning, 1e-3 in pretraining.
    pub learning_rate: Option<f64>,
    /// Passes over the epoch's rows (`--num_train_epochs`).
    pub epochs: u64,
    /// Optimiser steps; overrides `epochs` where given (`--max_steps`).
    pub max_steps: Option<u64>,
    /// Packed rows (or documents, without packing) of a micro-batch (`--per_device_train_batch_size`).
    pub micro_batch_size: usize,
    /// Micro-batches per optimiser step (`--gradient_accumulation_steps`).
    pub grad_accum: usize,
    /// Rows of a micro-batch in evaluation (`--per_device_eval_batch_size`).
    pub eval_batch_size: usize,
    /// Longest row in tokens (`--max_seq_len`); `None`: the model's maximum, at most 1024.
    pub max_seq_len: Option<usize>,
    /// Shape of the learning rate (`--lr_scheduler_type`).
    pub lr_schedule: LrSchedule,
    /// The schedule ends at this share of the peak (`--min_lr_ratio`).
    pub min_lr_ratio: f64,
    /// Share of the steps in which `wsd` decays (`--wsd_decay_ratio`).
    pub wsd_decay_ratio: f64,
    /// Length of the warmup.
    pub warmup: Warmup,
    /// transformers' warmup, whose step 0 runs at learning rate 0 (`--warmup_from_zero`).
    pub warmup_from_zero: bool,
    /// Decoupled decay of matrices (`--weight_decay`).
    pub weight_decay: f64,
    /// Clip the global gradient norm here; `None`: no clipping (`--max_grad_norm`, 0 switches it off).
    pub max_grad_norm: Option<f64>,
    /// Decay of the first moment (`--adam_beta1`).
    pub adam_beta1: f64,
    /// Decay of the second moment (`--adam_beta2`).
    pub adam_beta2: f64,
    /// Added to the root (`--adam_epsilon`).
    pub adam_eps: f64,
    /// Seed of everything random (`--seed`).
    pub seed: u64,
    /// Storage type (`--mixed_precision`).
    pub precision: Precision,
    /// Activation memory against time (`--recompute`).
    pub recompute: Recompute,
    /// `None`: full fine-tuning (`--no_lora`).
    pub lora: Option<LoraSettings>,
    /// Evaluate on the validation rows (`--eval_steps`), and at the end of the run unless never.
    pub eval_every: Every,
    /// Evaluate before the first step too, to have the base model's figures (`--eval_on_start`).
    pub eval_on_start: bool,
    /// Save a checkpoint (`--save_steps`).
    pub save_every: Every,
    /// Checkpoints kept besides the best; `None`: all (`--save_total_limit`).
    pub save_total_limit: Option<usize>,
    /// Steps between log lines (`--logging_steps`).
    pub logging_steps: u64,
    /// Stop when the validation loss no longer improves.
    pub early_stopping: Option<EarlyStopping>,
    /// Load the best checkpoint before writing the final output (`--load_best_model_at_end`).
    pub load_best_at_end: bool,
    /// Steps in a row that may fail with a loss or gradient that is not finite (`--max_bad_steps`).
    pub max_bad_steps: u32,
    /// The generation test at the end; `None`: not asked for (`--do_gen_test`).
    pub gen_test: Option<GenTest>,
    /// Write the merged model too (`--merge_adapters`).
    pub merge_adapters: bool,
    /// Where to resume from.
    pub resume: Resume,
    /// Names of hashes that may differ on resume: data, tokenizer, base_model, config (`--allow_changed`).
    pub allow_changed: Vec<String>,
    /// Worker threads of the CPU backend; `None`: one per core (`--threads`).
    pub threads: Option<usize>,
    /// Write TensorBoard event files to `output_dir/runs` (`--no_tensorboard` switches them off).
    pub tensorboard: bool,
    /// Print less: no tables, no sample rows, no progress bar (`--quiet`).
    pub quiet: bool,
}

impl Default for TrainSettings {
    fn default() -> Self {
        Self {
            learning_rate: None,
            epochs: 3,
            max_steps: None,
            micro_batch_size: 8,
            grad_accum: 1,
            eval_batch_size: 8,
            max_seq_len: None,
            lr_schedule: LrSchedule::Cosine,
            min_lr_ratio: 0.0,
            wsd_decay_ratio: 0.2,
            warmup: Warmup::Ratio(0.03),
            warmup_from_zero: false,
            weight_decay: 0.0,
            max_grad_norm: Some(1.0),
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_eps: 1e-8,
            seed: 42,
            precision: Precision::F32,
            recompute: Recompute::None,
            lora: Some(LoraSettings::default()),
            eval_every: Every::Epoch,
            eval_on_start: false,
            save_every: Every::Steps(500),
            save_total_limit: None,
            logging_steps: 1,
            early_stopping: None,
            load_best_at_end: true,
            max_bad_steps: 10,
            gen_test: None,
            merge_adapters: false,
            resume: Resume::No,
            allow_changed: Vec::new(),
            threads: None,
            tensorboard: true,
            quiet: false,
        }
    }
}

/// One line of the table printed at the start of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedSetting {
    /// Name as in the config file.
    pub name: String,
    /// Value as the run uses it.
    pub value: String,
    /// Where it came from: `default`, `config/sft_tiny.json`, `--lora_r`.
    pub origin: String,
}

impl TrainSettings {
    /// Default peak learning rate of fine-tuning: LoRA tolerates ten times that of full fine-tuning.
    pub fn sft_learning_rate(&self) -> f64 {
        self.learning_rate.unwrap_or(if self.lora.is_some() { 2e-4 } else { 2e-5 })
    }

    /// Checks every value on its own and the values against each other.
    ///
    /// # Errors
    /// A usage error that names the setting, what is allowed and what was given.
    pub fn check(&self) -> Result<()> {
        let positive = |name: &str, v: f64| match v > 0.0 && v.is_finite() {
            true => Ok(()),
            false => Err(Error::usage(format!("{name}: expected a positive number, found {v}"))),
        };
        let share = |name: &str, v: f64| match (0.0..1.0).contains(&v) {
            true => Ok(()),
            false => Err(Error::usage(format!("{name}: expected a number from 0 to below 1, found {v}"))),
        };
        let at_least_one = |name: &str, v: u64| match v {
            0 => Err(Error::usage(format!("{name}: expected at least 1, found 0"))),
            _ => Ok(()),
        };
        if let Some(lr) = self.learning_rate {
            positive("learning_rate", lr)?;
        }
        at_least_one("num_train_epochs", self.epochs)?;
        at_least_one("max_steps", self.max_steps.unwrap_or(1))?;
        at_least_one("per_device_train_batch_size", self.micro_batch_size as u64)?;
        at_least_one("gradient_accumulation_steps", self.grad_accum as u64)?;
        at_least_one("per_device_eval_batch_size", self.eval_batch_size as u64)?;
        at_least_one("logging_steps", self.logging_steps)?;
        at_least_one("save_total_limit", self.save_total_limit.unwrap_or(1) as u64)?;
        at_least_one("threads", self.threads.unwrap_or(1) as u64)?;
        at_least_one("max_bad_steps", self.max_bad_steps.into())?;
        for (name, every) in [("eval_steps", self.eval_every), ("save_steps", self.save_every)] {
            if every == Every::Steps(0) {
                return Err(Error::usage(format!("{name}: expected at least 1, found 0")));
            }
        }
        if let Some(n) = self.max_seq_len.filter(|&n| n < 2) {
            return Err(Error::usage(format!("max_seq_len: expected at least 2 tokens, found {n}")));
        }
        if !(0.0..=1.0).contains(&self.min_lr_ratio) {
            return Err(Error::usage(format!("min_lr_ratio: expected 0 to 1, found {}", self.min_lr_ratio)));
        }
        if !(self.wsd_decay_ratio > 0.0 && self.wsd_decay_ratio <= 1.0) {
            let found = self.wsd_decay_ratio;
            return Err(Error::usage(format!("wsd_decay_ratio: expected above 0 and at most 1, found {found}")));
        }
        if let Warmup::Ratio(r) = self.warmup {
            share("warmup_ratio", r)?;
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return Err(Error::usage(format!("weight_decay: expected 0 or more, found {}", self.weight_decay)));
        }
        if let Some(clip) = self.max_grad_norm {
            positive("max_grad_norm", clip)?;
        }
        share("adam_beta1", self.adam_beta1)?;
        share("adam_beta2", self.adam_beta2)?;
        positive("adam_epsilon", self.adam_eps)?;
        if let Some(lora) = &self.lora {
            at_least_one("lora_r", lora.r as u64)?;
            positive("lora_alpha", lora.alpha)?;
            share("lora_dropout", lora.dropout)?;
            if let Some(ratio) = lora.plus_ratio {
                positive("loraplus_lr_ratio", ratio)?;
            }
            if lora.targets.is_empty() {
                return Err(Error::usage("lora_targets: expected at least one of q, k, v, o, gate, up, down"));
            }
        } else if self.merge_adapters {
            return Err(Error::usage(
                "merge_adapters: there is no adapter to merge without LoRA; leave one of the two out",
            ));
        }
        if let Some(stop) = self.early_stopping {
            at_least_one("early_stopping_patience", stop.patience.into())?;
            if !(stop.threshold >= 0.0 && stop.threshold.is_finite()) {
                let found = stop.threshold;
                return Err(Error::usage(format!("early_stopping_threshold: expected 0 or more, found {found}")));
            }
            if self.eval_every == Every::Never {
                return Err(Error::usage(
                    "early_stopping_patience: nothing is evaluated; give eval_steps or eval_strategy",
                ));
            }
        }
        if let Some(generation) = &self.gen_test {
            at_least_one("num_gen_samples", generation.num_samples as u64)?;
            at_least_one("max_new_tokens", generation.max_new_tokens as u64)?;
            positive("gen_temperature", generation.temperature.into())?;
            if !(generation.top_p > 0.0 && generation.top_p <= 1.0) {
                let found = generation.top_p;
                return Err(Error::usage(format!("gen_top_p: expected above 0 and at most 1, found {found}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        TrainSettings::default().check().unwrap();
        assert_eq!(TrainSettings::default().sft_learning_rate(), 2e-4);
        assert_eq!(TrainSettings { lora: None, ..Default::default() }.sft_learning_rate(), 2e-5);
    }

    #[test]
    fn bad_values_are_named() {
        let bad = |change: fn(&mut TrainSettings), expected: &str| {
            let mut s = TrainSettings::default();
            change(&mut s);
            let e = s.check().unwrap_err();
            assert_eq!(e.exit_code(), 2);
            assert!(e.to_string().starts_with(expected), "{e}");
        };
        bad(|s| s.learning_rate = Some(-1.0), "learning_rate: expected a positive number, found -1");
        bad(|s| s.learning_rate = Some(f64::NAN), "learning_rate");
        bad(|s| s.grad_accum = 0, "gradient_accumulation_steps: expected at least 1");
        bad(|s| s.warmup = Warmup::Ratio(1.5), "warmup_ratio");
        bad(|s| s.max_grad_norm = Some(0.0), "max_grad_norm");
        bad(|s| s.adam_beta2 = 1.0, "adam_beta2");
        bad(|s| s.lora.as_mut().unwrap().dropout = 1.0, "lora_dropout");
        bad(|s| s.save_every = Every::Steps(0), "save_steps");
        bad(|s| s.max_seq_len = Some(1), "max_seq_len");
        bad(|s| (s.lora, s.merge_adapters) = (None, true), "merge_adapters");
    }

    #[test]
    fn due_at_multiples_or_epoch_ends() {
        assert!(Every::Steps(5).due(10, false) && !Every::Steps(5).due(11, true));
        assert!(Every::Epoch.due(11, true) && !Every::Epoch.due(10, false) && !Every::Never.due(10, true));
    }
}
