//! Saving and resuming: which tensors a checkpoint holds, written by a thread from a host copy.
//!
//! `checkpoint-N/` is itself a folder other tools load (adapter or model, tokenizer), with `optimizer.safetensors`,
//! `trainer_state.json` and the manifest beside it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::saver::Saver;
use super::state::{RunFacts, RunState, TRAINER_STATE};
use super::step::Workload;
use crate::backend::Backend;
use crate::checkpoint::manifest::{self, CheckpointWriter};
use crate::checkpoint::state::{Fingerprints, OPTIMIZER, read_json, read_state_tensors, write_state_tensors};
use crate::ensure;
use crate::error::{Context, Result};
use crate::hf::artifact::Artifact;
use crate::hf::companions::Companions;
use crate::settings::TrainSettings;

pub use crate::hf::peft::RESIZED_BASE;

/// Where a run's checkpoints go.
pub struct Checkpoints {
    output_dir: PathBuf,
    keep: Option<usize>,
    artifact: Arc<Artifact>,
    companions: Companions,
    fingerprints: Fingerprints,
    settings: TrainSettings,
    max_steps: u64,
    saver: Saver,
}

impl Checkpoints {
    /// Checkpoints in `output_dir`, from which what a crash left unfinished is removed.
    ///
    /// # Errors
    /// If the folder cannot be created or cleaned.
    pub fn new(
        output_dir: &Path,
        settings: &TrainSettings,
        max_steps: u64,
        artifact: Arc<Artifact>,
        companions: Companions,
        fingerprints: Fingerprints,
    ) -> Result<Self> {
        crate::files::create_dir_all(output_dir)?;
        manifest::clean_up(output_dir)?;
        Ok(Self {
            output_dir: output_dir.to_path_buf(),
            keep: settings.save_total_limit,
            artifact,
            companions,
            fingerprints,
            settings: settings.clone(),
            max_steps,
            saver: Saver::default(),
        })
    }

    /// What `trainer_state.json` holds for a state.
    pub fn trainer_state(&self, state: &RunState) -> Value {
        let facts = RunFacts { settings: &self.settings, output_dir: &self.output_dir, max_steps: self.max_steps };
        let mut value = state.to_json(facts);
        value["ringtune"]["fingerprints"] = self.fingerprints.to_json();
        value
    }

    /// Copies weights and moments to the host, then writes `checkpoint-STEP` in the background and rotates.
    ///
    /// # Errors
    /// If the device refuses a copy, or the error of the save before.
    pub fn save<B: Backend>(&mut self, dev: &B, work: &mut Workload<B>, state: &RunState) -> Result<()> {
        // Two host copies would double the memory: the one before has to be on disk first.
        self.saver.wait()?;
        let params = work.export_params(dev)?;
        let optimizer = work.optimizer.export(dev)?;
        let trainer_state = self.trainer_state(state);
        let (output_dir, keep) = (self.output_dir.clone(), self.keep);
        let (artifact, companions) = (Arc::clone(&self.artifact), self.companions.clone());
        let (step, best) = (state.step, state.best.best);
        self.saver.start(move || {
            let writer = CheckpointWriter::begin(&output_dir, step)?;
            artifact.write(writer.dir(), &params)?;
            companions.write(writer.dir())?;
            write_state_tensors(&writer.dir().join(OPTIMIZER), &optimizer.tensors)?;
            writer.write(TRAINER_STATE, format!("{trainer_state:#}\n").as_bytes())?;
            let written = writer.finish()?;
            if let Some(keep) = keep {
                let best = best.map(|(_, step)| manifest::path_of(&output_dir, step));
                manifest::rotate(&output_dir, keep, best.as_deref(), Some(&written))?;
            }
            Ok(())
        })
    }

    /// Writes the base model with the grown vocabulary beside the checkpoints, in the background: PEFT cannot load an adapter that
    /// carries more rows than its base has. A resumed run keeps the folder that is there.
    ///
    /// # Errors
    /// The error of the write before.
    pub fn write_resized_base(&mut self, resumed: bool) -> Result<()> {
        let dir = self.output_dir.join(RESIZED_BASE);
        if resumed && dir.join("config.json").is_file() {
            return Ok(());
        }
        let (artifact, companions) = (Arc::clone(&self.artifact), self.companions.clone());
        self.saver.start(move || {
            artifact.write_base(&dir)?;
            companions.write(&dir)
        })
    }

    /// Error of a save that ended meanwhile.
    ///
    /// # Errors
    /// The save's error.
    pub fn poll(&mut self) -> Result<()> {
        self.saver.poll()
    }

    /// Waits for the last save.
    ///
    /// # Errors
    /// The save's error.
    pub fn wait(&mut self) -> Result<()> {
        self.saver.wait()
    }

    /// Loads weights alone from the checkpoint of `step`: the best model at the end.
    ///
    /// # Errors
    /// If the checkpoint is missing or damaged.
    pub fn load_weights<B: Backend>(&self, dev: &B, work: &mut Workload<B>, step: u64) -> Result<PathBuf> {
        let path = manifest::path_of(&self.output_dir, step);
        manifest::verify(&path)?;
        work.import_params(dev, &self.artifact.read(&path, &work.trained())?)?;
        Ok(path)
    }

    /// Restores weights, moments and state from a checkpoint that verified, and checks what the run depends on. Returns the
    /// names of fingerprints that differ and are allowed to.
    ///
    /// # Errors
    /// If a file is damaged, or something the run depends on has changed.
    pub fn resume<B: Backend>(&self, dev: &B, work: &mut Workload<B>, path: &Path) -> Result<(RunState, Vec<String>)> {
        let (mut state, changed) = read_state(path, &self.fingerprints, &self.settings.allow_changed, self.max_steps)?;
        work.import_params(dev, &self.artifact.read(path, &work.trained())?)?;
        let tensors = read_state_tensors(&path.join(OPTIMIZER))?;
        work.optimizer.import(dev, &crate::optim::OptimizerState { updates: state.updates, tensors })?;
        if let Some((_, step)) = state.best.best
            && manifest::verify(&manifest::path_of(&self.output_dir, step)).is_err()
        {
            // Without its weights the best is only a number; the next evaluation sets a new one.
            state.best.best = None;
        }
        Ok((state, changed))
    }
}

/// Where a checkpoint stands, once what the run depends on was compared with it. Returns the names of fingerprints that differ
/// and are allowed to.
///
/// # Errors
/// If the file is damaged, something that is not allowed to differ does, or the run is shorter than the checkpoint.
pub fn read_state(
    checkpoint: &Path,
    now: &Fingerprints,
    allowed: &[String],
    max_steps: u64,
) -> Result<(RunState, Vec<String>)> {
    let value = read_json(&checkpoint.join(TRAINER_STATE))?;
    let at = || checkpoint.join(TRAINER_STATE).display().to_string();
    let state = RunState::from_json(&value).context(at)?;
    let old = Fingerprints::from_json(&value["ringtune"]["fingerprints"]).context(at)?;
    let changed = old.check(now, allowed).context(|| checkpoint.display().to_string())?;
    ensure!(state.step <= max_steps, "{}: step {} is beyond max_steps {max_steps}", checkpoint.display(), state.step);
    Ok((state, changed))
}
