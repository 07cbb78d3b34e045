//! What the training commands are asked to do, as plain values; the command line and the config file fill them.

use std::path::PathBuf;

use super::open::TemplateArgs;
use crate::data::pretrain::PretrainDataSpec;
use crate::data::sft::SftDataSpec;
use crate::data::tokenizer::SpecialIds;
use crate::settings::{ResolvedSetting, TrainSettings};

/// What `ringtune sft` is asked to do.
#[derive(Clone, Debug)]
pub struct SftJob {
    /// The model to fine-tune.
    pub model_path: PathBuf,
    /// The tokenizer: a SentencePiece model, a `tokenizer.json` or a folder; `None`: the one in the model's folder.
    pub tokenizer_path: Option<PathBuf>,
    /// Ids the tokenizer has to have.
    pub special_ids: SpecialIds,
    /// Which template, and how it is used.
    pub template: TemplateArgs,
    /// Rows that embedding and head are padded to.
    pub pad_vocab_to: Option<usize>,
    /// Data sets; `row.max_seq_len` is set from the settings and the model.
    pub data: SftDataSpec,
    /// What to compute on.
    pub device: String,
    /// Where everything goes.
    pub output_dir: PathBuf,
    /// Settings of the loop.
    pub settings: TrainSettings,
    /// The table printed at start.
    pub resolved: Vec<ResolvedSetting>,
}

/// What `ringtune pretrain` is asked to do.
#[derive(Clone, Debug)]
pub struct PretrainJob {
    /// Name of the model config without folder and extension, `tiny`: the run's folder in `output_dir`.
    pub config_name: String,
    /// The config's text: a `config.json`, in which the vocabulary may be left to the tokenizer.
    pub config_text: String,
    /// The SentencePiece model.
    pub tokenizer_path: PathBuf,
    /// Ids the tokenizer has to have.
    pub special_ids: SpecialIds,
    /// Texts; `max_seq_len` is set from the settings and the model.
    pub data: PretrainDataSpec,
    /// What to compute on.
    pub device: String,
    /// Where everything goes.
    pub output_dir: PathBuf,
    /// Settings of the loop.
    pub settings: TrainSettings,
    /// The table printed at start.
    pub resolved: Vec<ResolvedSetting>,
}
