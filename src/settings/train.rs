//! The settings of the training loop. Data and model paths are arguments of the commands, not of the loop.

use std::path::PathBuf;

use crate::comm::{Choice, Fold};
use crate::error::{Error, Result};
use crate::model::{LoraSpec, Recompute};
use crate::optim::ScheduleSettings;
use crate::tensor::DType;
use crate::words::words;

/// Declares a struct with `blank()`, what the table's rows write on: each field the empty value of its type. It is no default:
/// every row of a command writes its field.
macro_rules! fields {
    ($(#[$about:meta])* pub struct $name:ident { $($(#[$what:meta])* pub $field:ident: $type:ty,)+ }) => {
        $(#[$about])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name { $($(#[$what])* pub $field: $type,)+ }

        impl $name {
            /// Nothing written yet.
            pub(super) fn blank() -> Self {
                Self { $($field: Default::default(),)+ }
            }
        }
    };
}

/// When and how often things happen: every so many optimiser steps, or once an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Every {
    /// Every n steps (n > 0), and at the end.
    Steps(u64),
    /// At the end of each epoch.
    Epoch,
    /// Never.
    #[default]
    Never,
}
// How many steps "steps" means is another setting.
words!(Every { Never = "no", Steps(0) = "steps", Epoch = "epoch" });

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

/// Where the figures of a run go (`--report_to`), beside the lines on the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reporter {
    /// Event files in `output_dir/runs`.
    TensorBoard,
    /// The server that `MLFLOW_TRACKING_URI` names.
    Mlflow,
    /// `output_dir/metrics.jsonl`.
    Json,
    /// Nowhere.
    Nowhere,
}
words!(Reporter { TensorBoard = "tensorboard", Mlflow = "mlflow", Json = "json", Nowhere = "none" });

/// What of a training's state lies on one rank alone (`--zero`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Zero {
    /// Nothing: every rank has all of it.
    #[default]
    None,
    /// Moments and masters: each rank has its part of them, and updates its part of the weights.
    Moments,
}
words!(Zero { None = "0", Moments = "1" });

/// Where to resume from (`--resume_from_checkpoint`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// Start at step 0.
    #[default]
    No,
    /// The newest valid checkpoint in the output folder; start at step 0 where there is none.
    Auto,
    /// This checkpoint folder.
    Path(PathBuf),
}

impl Resume {
    /// What the setting says: `auto` (or the words of transformers and Axolotl for it), or a folder.
    pub(super) fn of(path: PathBuf) -> Self {
        match path.to_str().map(str::to_ascii_lowercase).as_deref() {
            Some("auto" | "true" | "last" | "latest" | "newest") => Resume::Auto,
            Some("false") => Resume::No,
            _ => Resume::Path(path),
        }
    }
}

fields! {
    /// The generation test at the end of a run (`--do_gen_test`).
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
}

fields! {
    /// Every setting of the training loop.
    pub struct TrainSettings {
        /// Peak learning rate; `None`: the default of the command, see [`TrainSettings::sft_learning_rate`].
        pub learning_rate: Option<f64>,
        /// Passes over the epoch's rows (`--num_train_epochs`).
        pub epochs: f64,
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
        /// Learning rate over the run, as shares of its peak.
        pub schedule: ScheduleSettings,
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
        /// Storage type of weights and activations (`--mixed_precision`).
        pub dtype: DType,
        /// Rows of a step over all ranks (`--global_batch_size`): the micro-batches of a step on each follow.
        pub global_batch_size: Option<usize>,
        /// What carries gradients between ranks (`--transport`).
        pub transport: Choice,
        /// When ranks sum gradients (`--fold`); `None`: once a step over NCCL, else after every micro-batch.
        pub fold: Option<Fold>,
        /// What each rank holds a part of (`--zero`).
        pub zero: Zero,
        /// Activation memory against time (`--recompute`).
        pub recompute: Recompute,
        /// `None`: full fine-tuning (`--no_lora`). Its targets are still empty: [`crate::train::setup::lora_spec`] reads them.
        pub lora: Option<LoraSpec>,
        /// Targets as typed (`--lora_targets`): checkpoints compare them so, and `check` names a wrong one beside other problems.
        pub lora_targets: Vec<String>,
        /// LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns with this multiple of the learning rate (`--loraplus_lr_ratio`).
        pub lora_plus: Option<f64>,
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
        /// Where figures go (`--report_to`; `--no_tensorboard` takes TensorBoard out).
        pub report_to: Vec<Reporter>,
        /// Write the phases of every step to this file (`--trace`).
        pub trace: Option<PathBuf>,
        /// Print less: no tables, no sample rows, no progress bar (`--quiet`).
        pub quiet: bool,
        /// Show every setting at the start, defaults too (`--verbose`).
        pub verbose: bool,
    }
}

impl TrainSettings {
    /// Peak learning rate of fine-tuning: LoRA tolerates ten times that of full fine-tuning.
    pub fn sft_learning_rate(&self) -> f64 {
        self.learning_rate.unwrap_or(if self.lora.is_some() { 2e-4 } else { 2e-5 })
    }

    /// Peak learning rate of pretraining.
    pub fn pretrain_learning_rate(&self) -> f64 {
        self.learning_rate.unwrap_or(1e-3)
    }

    /// Checks the values against each other; each on its own was checked when it was read, by its [`super::Kind`].
    ///
    /// # Errors
    /// A usage error that names the settings that contradict each other.
    pub fn check(&self) -> Result<()> {
        if self.lora.is_none() && self.merge_adapters {
            return Err(Error::usage(
                "merge_adapters: there is no adapter to merge without LoRA; leave one of the two out",
            ));
        }
        if self.report_to.len() > 1 && self.report_to.contains(&Reporter::Nowhere) {
            return Err(Error::usage("report_to: none stands alone; leave it out, or the others"));
        }
        if self.early_stopping.is_some() && self.eval_every == Every::Never {
            return Err(Error::usage(
                "early_stopping_patience: nothing is evaluated; give eval_steps or eval_strategy",
            ));
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
        assert_eq!(TrainSettings::default().pretrain_learning_rate(), 1e-3);
    }

    #[test]
    fn contradictions_are_named() {
        let bad = |change: fn(&mut TrainSettings), expected: &str| {
            let mut s = TrainSettings::default();
            change(&mut s);
            let e = s.check().unwrap_err();
            assert_eq!(e.exit_code(), 2);
            assert!(e.to_string().starts_with(expected), "{e}");
        };
        bad(|s| (s.lora, s.merge_adapters) = (None, true), "merge_adapters");
        bad(
            |s| (s.early_stopping, s.eval_every) = (Some(EarlyStopping { patience: 1, threshold: 0.0 }), Every::Never),
            "early_stopping_patience",
        );
    }

    #[test]
    fn due_at_multiples_or_epoch_ends() {
        assert!(Every::Steps(5).due(10, false) && !Every::Steps(5).due(11, true));
        assert!(Every::Epoch.due(11, true) && !Every::Epoch.due(10, false) && !Every::Never.due(10, true));
    }
}
