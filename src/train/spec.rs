//! What a run is made of: settings, weights, data, folders.

use std::path::PathBuf;
use std::sync::Arc;

use crate::checkpoint::state::Fingerprints;
use crate::data::train_set::{PieceSet, TrainSet};
use crate::hf::TensorSource;
use crate::hf::artifact::Artifact;
use crate::hf::companions::Companions;
use crate::settings::{ResolvedSetting, TrainSettings};

/// What a run is made of.
pub struct RunSpec<'a> {
    /// Settings of the loop.
    pub settings: &'a TrainSettings,
    /// The table printed at start.
    pub resolved: &'a [ResolvedSetting],
    /// Checkpoints, logs.
    pub run_dir: PathBuf,
    /// Final weights.
    pub final_dir: PathBuf,
    /// Peak learning rate.
    pub peak_lr: f64,
    /// Weights at step 0, vocabulary grown.
    pub source: &'a dyn TensorSource,
    /// With LoRA on a grown vocabulary: first trained row of embedding and head, and their number.
    pub new_rows: Option<(usize, usize)>,
    /// The form in which weights are saved.
    pub artifact: Arc<Artifact>,
    /// Files that go with the weights.
    pub companions: Companions,
    /// Training data.
    pub train: Arc<TrainSet>,
    /// Validation data, per data set.
    pub val: Vec<PieceSet>,
    /// Whether several documents share a row.
    pub packing: bool,
    /// Hashes of what the run depends on, besides the settings.
    pub fingerprints: Fingerprints,
    /// Lines to print after the tables: the first rows with their mask.
    pub preview: Vec<String>,
    /// What the user was warned of before the run began.
    pub warnings: Vec<String>,
    /// Why no GPU is used, where one was looked for.
    pub no_gpu: Option<String>,
}

impl RunSpec<'_> {
    /// The table with the values that follow from the model and from other settings in the place of their description.
    pub(super) fn resolved_settings(&self) -> Vec<ResolvedSetting> {
        let value = |r: &ResolvedSetting| match r.name.as_str() {
            "learning_rate" => format!("{:e}", self.peak_lr),
            "max_seq_len" => self.train.max_seq_len().to_string(),
            _ => r.value.clone(),
        };
        self.resolved.iter().map(|r| ResolvedSetting { value: value(r), ..r.clone() }).collect()
    }
}
