//! Resuming: what a run reads from its checkpoints, on every rank; [`super::outputs`] writes them.
//!
//! `checkpoint-N/` is itself a folder other tools load (adapter or model, tokenizer), with the optimiser's state (one file, or one of
//! each rank), `trainer_state.json` and the manifest beside it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::state::{RunFacts, RunState, TRAINER_STATE};
use super::step::Workload;
use crate::backend::Backend;
use crate::checkpoint::manifest;
use crate::checkpoint::shards::StateFiles;
use crate::checkpoint::state::{Fingerprints, read_json};
use crate::error::{Context, Result};
use crate::hf::artifact::{Artifact, HostParams};
use crate::settings::TrainSettings;
use crate::{ensure, say};

pub use crate::hf::peft::RESIZED_BASE;

/// Where a run's checkpoints go.
pub struct Checkpoints {
    output_dir: PathBuf,
    artifact: Arc<Artifact>,
    fingerprints: Fingerprints,
    settings: TrainSettings,
    max_steps: u64,
    arithmetic: String,
}

impl Checkpoints {
    /// Checkpoints in `output_dir`.
    pub fn new(
        output_dir: &Path,
        settings: &TrainSettings,
        max_steps: u64,
        artifact: Arc<Artifact>,
        fingerprints: Fingerprints,
        arithmetic: String,
    ) -> Self {
        let (output_dir, settings) = (output_dir.to_path_buf(), settings.clone());
        Self { output_dir, artifact, fingerprints, settings, max_steps, arithmetic }
    }

    /// Steps the run is planned for.
    pub fn max_steps(&self) -> u64 {
        self.max_steps
    }

    /// What `trainer_state.json` holds for a state.
    pub fn trainer_state(&self, state: &RunState) -> Value {
        let facts = RunFacts { settings: &self.settings, output_dir: &self.output_dir, max_steps: self.max_steps };
        let mut value = state.to_json(facts);
        value["ringtune"]["fingerprints"] = self.fingerprints.to_json();
        value["ringtune"]["arithmetic"] = self.arithmetic.as_str().into();
        value
    }

    /// Loads weights alone from the checkpoint of `step`: the best model at the end. Returns them as they are in the files, and the folder.
    ///
    /// # Errors
    /// If the checkpoint is missing or damaged.
    pub fn load_weights<B: Backend>(
        &self,
        dev: &B,
        work: &mut Workload<B>,
        step: u64,
    ) -> Result<(HostParams, PathBuf)> {
        let path = manifest::path_of(&self.output_dir, step);
        manifest::verify(&path)?;
        let params = self.artifact.read(&path, &work.trained())?;
        work.import_params(dev, &params)?;
        Ok((params, path))
    }

    /// Restores weights, moments and state from a checkpoint that verified, and checks what the run depends on. Returns the
    /// names of fingerprints that differ and are allowed to.
    ///
    /// # Errors
    /// If a file is damaged, or something the run depends on has changed.
    pub fn resume<B: Backend>(&self, dev: &B, work: &mut Workload<B>, path: &Path) -> Result<(RunState, Vec<String>)> {
        let saved = read_state(path, &self.fingerprints, &self.settings.allow_changed, self.max_steps)?;
        let Saved { state, changed, arithmetic } = saved;
        work.import_params(dev, &self.artifact.read(path, &work.trained())?)?;
        let tensors = StateFiles::open(path)?.read(&work.optimizer.parts())?;
        work.optimizer.import(dev, &crate::optim::OptimizerState { updates: state.updates, tensors })?;
        if let Some(then) = arithmetic.filter(|then| *then != self.arithmetic) {
            let now = &self.arithmetic;
            say::warning(&format!("the checkpoint was computed by {then}, this run by {now}: their last bits differ"));
        }
        Ok((state, changed))
    }
}

/// What a checkpoint's state file says, once what the run depends on was compared with it.
#[derive(Debug)]
pub struct Saved {
    /// Where the run stood.
    pub state: RunState,
    /// Names of fingerprints that differ and are allowed to.
    pub changed: Vec<String>,
    /// [`crate::tensor::Device::arithmetic`] of the device that computed it; checkpoints of earlier versions do not say.
    pub arithmetic: Option<String>,
}

/// Reads where a checkpoint stands, and compares what the run depends on.
///
/// # Errors
/// If the file is damaged, something that is not allowed to differ does, or the run is shorter than the checkpoint.
pub fn read_state(checkpoint: &Path, now: &Fingerprints, allowed: &[String], max_steps: u64) -> Result<Saved> {
    let value = read_json(&checkpoint.join(TRAINER_STATE))?;
    let at = || checkpoint.join(TRAINER_STATE).display().to_string();
    let state = RunState::from_json(&value).context(at)?;
    let old = Fingerprints::from_json(&value["ringtune"]["fingerprints"]).context(at)?;
    let changed = old.check(now, allowed).context(|| checkpoint.display().to_string())?;
    ensure!(state.step <= max_steps, "{}: step {} is beyond max_steps {max_steps}", checkpoint.display(), state.step);
    let arithmetic = value["ringtune"]["arithmetic"].as_str().map(String::from);
    Ok(Saved { state, changed, arithmetic })
}
