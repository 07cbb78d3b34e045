//! Resuming: what a run reads from its checkpoints, on every rank; [`super::outputs`] writes them.
//!
//! `checkpoint-N/` is itself a folder other tools load (adapter or model, tokenizer), with the optimiser's state (one file, or one of
//! each rank), `trainer_state.json`, `ringtune_state.json` and the manifest beside it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::state::{RunFacts, RunState, TRAINER_STATE, read_document};
use super::step::Workload;
use crate::backend::Backend;
use crate::checkpoint::manifest;
use crate::checkpoint::shards::StateFiles;
use crate::checkpoint::state::Fingerprints;
use crate::error::{Context, Error, Result};
use crate::hf::artifact::{Artifact, HostParams};
use crate::optim::Schedule;
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

    /// Which micro-batches and ranks have steps like those of a checkpoint, where this run's differ: only their product decides.
    fn restoring(&self, path: &Path) -> Option<String> {
        const STEP: &str = "config.gradient_accumulation_steps";
        let value = read_document(path).ok()?;
        let then = Fingerprints::from_json(&value["ringtune"]["fingerprints"]).ok()?;
        let of = |f: &Fingerprints| f.0.get(STEP)?.parse::<usize>().ok();
        let (then, now) = (of(&then)?, of(&self.fingerprints)?);
        restoring(then, now, self.settings.grad_accum)
    }

    /// Restores weights, moments and state from a checkpoint that verified, and checks what the run depends on. Returns the
    /// names of fingerprints that differ and are allowed to.
    ///
    /// # Errors
    /// If a file is damaged, or something the run depends on has changed.
    pub fn resume<B: Backend>(&self, dev: &B, work: &mut Workload<B>, path: &Path) -> Result<Resumed> {
        let saved = read_state(path, &self.fingerprints, &self.settings, self.max_steps);
        let saved = saved.map_err(|e| match self.restoring(path) {
            Some(what) if !self.settings.allow_changed.iter().any(|a| a == "config") => {
                Error::new(format!("{e}; {what} goes on with the steps of the checkpoint"))
            }
            _ => e,
        })?;
        let Saved { state, changed, arithmetic, longer } = saved;
        work.import_params(dev, &self.artifact.read(path, &work.trained())?)?;
        let tensors = StateFiles::open(path)?.read(&work.optimizer.parts())?;
        work.optimizer.import(dev, &crate::optim::OptimizerState { updates: state.updates, tensors })?;
        if let Some(then) = arithmetic.filter(|then| *then != self.arithmetic) {
            let now = &self.arithmetic;
            say::warning(&format!("the checkpoint was computed by {then}, this run by {now}: their last bits differ"));
        }
        Ok(Resumed { state, changed, longer })
    }
}

/// What a run goes on from.
#[derive(Debug)]
pub struct Resumed {
    /// Where it stands.
    pub state: RunState,
    /// Names of fingerprints that differ and are allowed to.
    pub changed: Vec<String>,
    /// Steps that the checkpoint's run was planned for, where this one takes more.
    pub longer: Option<u64>,
}

/// What to start for steps of `then` micro-batches over all ranks, where this run's have `now` of them, `own` on each rank.
fn restoring(then: usize, now: usize, own: usize) -> Option<String> {
    if then == now {
        return None;
    }
    let ranks = now / own.max(1);
    if ranks > 0 && then.is_multiple_of(ranks) {
        return Some(format!("--gradient-accumulation-steps {} on {ranks} ranks", then / ranks));
    }
    let fits: Vec<String> = (1..=then).filter(|n| then.is_multiple_of(*n)).map(|n| n.to_string()).collect();
    Some(format!(
        "a number of ranks among {}, with --gradient-accumulation-steps {then} divided by it,",
        fits.join(", ")
    ))
}

/// What a checkpoint's state file says, once what the run depends on was compared with it.
#[derive(Debug)]
pub struct Saved {
    /// Where the run stood.
    pub state: RunState,
    /// Names of fingerprints that differ and are allowed to.
    pub changed: Vec<String>,
    /// Steps that its run was planned for, where this one takes more.
    pub longer: Option<u64>,
    /// [`crate::tensor::Device::arithmetic`] of the device that computed it; checkpoints of earlier versions do not say.
    pub arithmetic: Option<String>,
}

/// Reads where a checkpoint stands, and compares what the run depends on.
///
/// # Errors
/// If the file is damaged, something that is not allowed to differ does, or the run is shorter than the checkpoint.
pub fn read_state(checkpoint: &Path, now: &Fingerprints, settings: &TrainSettings, max_steps: u64) -> Result<Saved> {
    let value = read_document(checkpoint)?;
    let at = || checkpoint.join(TRAINER_STATE).display().to_string();
    let state = RunState::from_json(&value).context(at)?;
    let mut old = Fingerprints::from_json(&value["ringtune"]["fingerprints"]).context(at)?;
    let longer = made_longer(&mut old, settings, max_steps);
    let changed = old.check(now, &settings.allow_changed).context(|| checkpoint.display().to_string())?;
    ensure!(state.step <= max_steps, "{}: step {} is beyond max_steps {max_steps}", checkpoint.display(), state.step);
    let arithmetic = value["ringtune"]["arithmetic"].as_str().map(String::from);
    Ok(Saved { state, changed, longer, arithmetic })
}

/// Takes what may differ where a run is made longer out of a checkpoint's settings: the steps, and the warmup where it is a share of them.
/// The steps that it was planned for.
fn made_longer(old: &mut Fingerprints, settings: &TrainSettings, max_steps: u64) -> Option<u64> {
    const STEPS: &str = "config.max_steps";
    const WARMUP: &str = "config.warmup_steps";
    let was: u64 = old.0.get(STEPS)?.parse().ok()?;
    if was >= max_steps {
        return None;
    }
    let warmup = Schedule::new(settings.schedule, 1.0, was).warmup_steps().to_string();
    if old.0.get(WARMUP) == Some(&warmup) {
        old.0.remove(WARMUP);
    }
    old.0.remove(STEPS);
    Some(was)
}

/// What taking more steps than were planned does to the schedule.
pub fn longer_line(settings: &TrainSettings, peak: f64, was: u64, is: u64, step: u64) -> String {
    let rate = |steps: u64| Schedule::new(settings.schedule, peak, steps).lr(step);
    let next = step + 1;
    format!(
        "max_steps was {was}, is {is}: from here on the learning rate follows the schedule of {is} steps; that of step {next} is {:.1e}, {}",
        rate(is),
        match step < was {
            true => format!("was to be {:.1e}", rate(was)),
            false => "which the run before did not have".into(),
        }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_restores_the_steps_of_a_checkpoint_is_said() {
        assert_eq!(restoring(4, 4, 2), None);
        assert_eq!(restoring(8, 4, 2).unwrap(), "--gradient-accumulation-steps 4 on 2 ranks");
        let said = restoring(4, 3, 1).unwrap();
        assert_eq!(said, "a number of ranks among 1, 2, 4, with --gradient-accumulation-steps 4 divided by it,");
    }
}
