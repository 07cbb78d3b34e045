//! Where the table's rows write: the settings of every command.

use std::path::PathBuf;

use super::{Command, TrainSettings};
use crate::data::encode::Overflow;
use crate::data::mix::WeightUnit;
use crate::data::raw_tokens::RawWidth;
use crate::datasets::{Dataset, Paths};
use crate::generate::Sampling;
use crate::hf::SaveDType;
use crate::words::words;

/// What a command was told. A command reads what it has rows for; the rest is empty.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Which model, tokenizer and template.
    pub model: ModelSettings,
    /// Which rows.
    pub data: DataSettings,
    /// The training loop, and what other commands share with it: seed, storage type, threads.
    pub train: TrainSettings,
    /// `eval` alone.
    pub eval: EvalSettings,
    /// `generate` alone.
    pub generate: GenerateSettings,
    /// `merge` alone.
    pub merge: MergeSettings,
    /// `prepare` alone.
    pub prepare: PrepareSettings,
    /// Device to compute on: `auto`, `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// Folder of results.
    pub output_dir: Option<PathBuf>,
    /// File of a result.
    pub output: Option<PathBuf>,
}

impl Settings {
    /// Nothing written yet.
    pub(super) fn blank() -> Self {
        Self {
            model: ModelSettings::default(),
            data: DataSettings::default(),
            train: TrainSettings::blank(),
            eval: EvalSettings::default(),
            generate: GenerateSettings::default(),
            merge: MergeSettings::default(),
            prepare: PrepareSettings::default(),
            device: String::new(),
            output_dir: None,
            output: None,
        }
    }

    /// The command's settings where nobody set any: its rows applied.
    pub fn defaults(command: Command) -> Self {
        let mut settings = Self::blank();
        for row in command.rows() {
            (row.to)(&mut settings, &row.default_value());
        }
        settings
    }
}

/// Which model, tokenizer and template.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelSettings {
    /// Folder of a model or adapter.
    pub path: Option<PathBuf>,
    /// Shape of a new model: a file, or the name of a built-in one.
    pub config: Option<PathBuf>,
    /// Base of the adapter, instead of the one that its configuration names.
    pub base: Option<PathBuf>,
    /// Take the merged or whole model where an adapter lies too.
    pub no_lora: bool,
    /// The tokenizer; `None`: the one in the model's folder.
    pub tokenizer: Option<PathBuf>,
    /// Ids that a SentencePiece model has to have, as pad,unk,bos,eos.
    pub special_ids: String,
    /// Rows that embedding and head are padded to.
    pub pad_vocab_to: Option<usize>,
    /// Name of a template or path of a Jinja file.
    pub template: Option<String>,
    /// The day that a template may ask for, as YYYY-MM-DD.
    pub template_date: Option<String>,
    /// Train (or count) the newline after a turn too.
    pub supervise_turn_newline: bool,
}

/// What the files of `pack` hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Prompts and responses.
    Rows,
    /// Text to pretrain on.
    Text,
}
words!(Content { Rows = "rows", Text = "text" });

/// Which rows, and how they are made of data sets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DataSettings {
    /// Data sets.
    pub paths: Vec<PathBuf>,
    /// Relative share of each in an epoch.
    pub weights: Option<Vec<f64>>,
    /// What the weights share out.
    pub weight_unit: WeightUnit,
    /// Rows of an epoch; `None`: all.
    pub epoch_samples: Option<u64>,
    /// Share kept for validation.
    pub val_fraction: f64,
    /// Columns read as fields of other names, as `FIELD=COLUMN`.
    pub columns: Vec<String>,
    /// Validation data, instead of a share.
    pub val_paths: Vec<PathBuf>,
    /// Several documents share a row.
    pub packing: bool,
    /// What happens to a row that is too long.
    pub overflow: Overflow,
    /// Skip malformed rows instead of stopping.
    pub skip_bad_rows: bool,
    /// Size of a token in files without a header.
    pub raw_width: Option<RawWidth>,
    /// What the files hold; `None`: their names say.
    pub content: Option<Content>,
    /// Where token files and downloads are kept; `None`: the user's cache folder.
    pub cache_dir: Option<PathBuf>,
}

/// `eval` alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EvalSettings {
    /// Evaluate at most this many rows of each data set.
    pub max_samples: Option<usize>,
    /// Answer prompts only; no loss.
    pub gen_only: bool,
}

/// `generate` alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerateSettings {
    /// File with the prompt.
    pub prompt_file: Option<PathBuf>,
    /// Each line is a prompt.
    pub batch: bool,
    /// A conversation.
    pub chat: bool,
    /// System turn before the prompt.
    pub system: Option<String>,
    /// No template: the text is continued.
    pub raw: bool,
    /// Longest answer in tokens.
    pub max_new_tokens: Option<usize>,
    /// Always the likeliest token.
    pub greedy: bool,
    /// How the next token is chosen; its seed is the command's.
    pub sampling: Sampling,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Tokens that do.
    pub stop_ids: Vec<u32>,
    /// Likeliest tokens to print with each new one; 0: none.
    pub logprobs: usize,
    /// Print JSON.
    pub json: bool,
}

/// `merge` alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MergeSettings {
    /// Element type of the weights; `None`: that of the base.
    pub dtype: Option<SaveDType>,
    /// Largest weight file, as typed.
    pub max_shard_size: String,
    /// Replace a model in the output folder.
    pub overwrite: bool,
}

/// `prepare` alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PrepareSettings {
    /// Which data sets.
    pub datasets: Vec<Dataset>,
    /// Folder with copies of the upstream files.
    pub source_dir: Option<PathBuf>,
    /// OASST1 as whole conversations.
    pub multi_turn: bool,
    /// Which branches of OASST1's trees.
    pub paths: Paths,
}

impl Default for TrainSettings {
    /// What the table says for `sft`.
    fn default() -> Self {
        Settings::defaults(Command::Sft).train
    }
}
