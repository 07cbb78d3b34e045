//! What only the main rank does: it cleans the run's folders, writes records, figures, checkpoints and final files, and prints.
//! The other ranks hold no [`Outputs`] and touch no file.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use serde_json::json;

use super::checkpoints::{Checkpoints, RESIZED_BASE};
use super::part::Part;
use super::record;
use super::saver::Saver;
use super::spec::RunSpec;
use super::state::{RunState, split};
use super::step::Workload;
use crate::backend::Backend;
use crate::checkpoint::manifest::{self, CheckpointWriter, FileRecord};
use crate::checkpoint::state::{OPTIMIZER, state_entry, write_state_tensors};
use crate::comm::control::{finish_writing, saved};
use crate::data::loader::StepShape;
use crate::error::Result;
use crate::files::{create_dir_all, remove_torn, write_json};
use crate::hf::HostTensor;
use crate::hf::artifact::{HostParams, Trained, find};
use crate::hf::device::download;
use crate::hf::save::{Entry, write_tensors};
use crate::log::metrics::{Metrics, round3};
use crate::log::mlflow::{About, Mlflow, Status};
use crate::machine::available_memory;
use crate::model::weights::Place;
use crate::settings::Reporter;

/// Folder of the merged model, in the output folder.
pub const MERGED: &str = "merged";

/// Where a run's files and lines go.
pub struct Outputs<'a> {
    spec: &'a RunSpec<'a>,
    checkpoints: &'a Checkpoints,
    saver: Saver,
    /// Figures and lines.
    pub metrics: Metrics,
}

/// Creates the run's folder and removes what a crash or a kill left unfinished in its folders.
///
/// # Errors
/// If a folder cannot be created, read or cleaned.
pub fn clean_up(spec: &RunSpec) -> Result<()> {
    create_dir_all(&spec.run_dir)?;
    manifest::clean_up(&spec.run_dir)?;
    for dir in [&spec.run_dir, &spec.final_dir, &spec.run_dir.join(RESIZED_BASE), &spec.run_dir.join(MERGED)] {
        remove_torn(dir)?;
    }
    Ok(())
}

impl<'a> Outputs<'a> {
    /// Writes what is known before the first step, `run.json` and the base with a grown vocabulary, and opens the figures.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn open<B: Backend>(
        dev: &B,
        spec: &'a RunSpec<'a>,
        checkpoints: &'a Checkpoints,
        work: &Workload<B>,
        first_step: u64,
        shape: StepShape,
    ) -> Result<Self> {
        let (s, max_steps) = (spec.settings, checkpoints.max_steps());
        let mut saver = Saver::default();
        let grown = spec.run_dir.join(RESIZED_BASE);
        // PEFT cannot load an adapter that carries more rows than its base has. A resumed run keeps the folder that is there.
        if spec.new_rows.is_some() && !(first_step > 0 && grown.join("config.json").is_file()) {
            let (artifact, companions) = (Arc::clone(&spec.artifact), spec.companions.clone());
            saver.start(move || {
                artifact.write_base(&grown)?;
                companions.write(&grown)
            })?;
        }
        record::write(dev, spec, work, (first_step, max_steps), shape)?;
        let mut metrics = Metrics::open(&spec.run_dir, first_step, max_steps, &s.report_to, !s.quiet)?;
        if s.report_to.contains(&Reporter::Mlflow) {
            let name = spec.run_dir.file_name().map_or(String::new(), |n| n.to_string_lossy().into_owned());
            let parameters = spec.resolved_settings().into_iter().map(|s| (s.name, s.value)).collect();
            metrics.send_to(Mlflow::start(&spec.run_dir, first_step, About { name, parameters })?);
        }
        Ok(Self { spec, checkpoints, saver, metrics })
    }

    /// Writes `checkpoint-STEP` and rotates: in the background from a copy on the host where the training goes on meanwhile and there is memory for
    /// one, else at once, one tensor after the other.
    ///
    /// # Errors
    /// If the device refuses a copy, a file cannot be written, or the error of the save before.
    pub fn save<B: Backend>(&mut self, dev: &B, work: &Workload<B>, state: &RunState, goes_on: bool) -> Result<()> {
        // Two host copies would double the memory: the one before has to be on disk first.
        self.saver.wait()?;
        let output_dir = self.spec.run_dir.clone();
        let (step, finish) = (state.step, self.finish_of(state));
        let write = self.written_of(state);
        let has_masters = work.optimizer.has_masters();
        let held = work.optimizer.held();
        // Without masters there are two moments a weight, and the weights beside them.
        let all: usize = held.iter().map(|(_, t)| t.len()).sum();
        let copy = size_of::<f32>() * if has_masters { all } else { all / 2 * 3 };
        if !goes_on || available_memory().is_some_and(|free| free < copy as u64) {
            let _finished = finish_writing();
            let writer = CheckpointWriter::begin(&output_dir, step)?;
            write(&writer, &|at| work.exported(dev, at))?;
            let entries: Vec<Entry> = held.iter().map(|(name, t)| state_entry(name, t.shape())).collect();
            write_tensors(&writer.dir().join(OPTIMIZER), &entries, |i, _| download(dev, held[i].1))?;
            return finish(writer, &BTreeMap::new());
        }
        // Masters are the trained values: nothing else of the weights is needed.
        let params = if has_masters { HostParams::new() } else { work.export_params(dev)? };
        let tensors = work.optimizer.export(dev)?.tensors;
        self.saver.start(move || {
            let writer = CheckpointWriter::begin(&output_dir, step)?;
            let trained = |at: Place| {
                let master = tensors.iter().find(|(name, _)| has_masters && *name == format!("master.{at}"));
                master.map_or_else(|| find(&params, at).cloned(), |(_, t)| Ok(t.clone()))
            };
            write(&writer, &trained)?;
            write_state_tensors(&writer.dir().join(OPTIMIZER), &tensors)?;
            finish(writer, &BTreeMap::new())
        })
    }

    /// As [`Outputs::save`], of copies of weights and of the whole state, which other ranks gave.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn save_copies(
        &mut self,
        params: HostParams,
        tensors: Vec<(String, HostTensor)>,
        state: &RunState,
    ) -> Result<()> {
        let (output_dir, step) = (self.spec.run_dir.clone(), state.step);
        let (write, finish) = (self.written_of(state), self.finish_of(state));
        self.saver.start(move || {
            let writer = CheckpointWriter::begin(&output_dir, step)?;
            write(&writer, &|at| find(&params, at).cloned())?;
            write_state_tensors(&writer.dir().join(OPTIMIZER), &tensors)?;
            finish(writer, &BTreeMap::new())
        })
    }

    /// Begins the folder of a checkpoint that ranks write together, once the one before is on the disk.
    ///
    /// # Errors
    /// The error of the save before, or if the folder cannot be created.
    pub fn begin_shared(&mut self, step: u64) -> Result<CheckpointWriter> {
        self.saver.wait()?;
        CheckpointWriter::shared(&self.spec.run_dir, step)
    }

    /// As [`Outputs::save`], with the other ranks: `part` is what this one holds of the optimiser's state.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn save_shared(
        &mut self,
        writer: CheckpointWriter,
        params: HostParams,
        part: impl FnOnce(Arc<AtomicBool>) -> Part,
        state: &RunState,
    ) -> Result<()> {
        let (step, finish) = (state.step, self.finish_of(state));
        let (write, part) = (self.written_of(state), part(self.saver.given_up()));
        self.saver.start_with_others(move || {
            write(&writer, &|at| find(&params, at).cloned())?;
            let records = part.write(writer.dir(), step)?;
            // From here on nobody else is needed.
            let _finished = finish_writing();
            finish(writer, &records)
        })
    }

    /// Writes what is the main rank's alone: weights, tokenizer, where the run stands.
    fn written_of(
        &self,
        state: &RunState,
    ) -> impl FnOnce(&CheckpointWriter, &Trained<'_>) -> Result<()> + Send + use<> {
        let trainer_state = self.checkpoints.trainer_state(state);
        let (artifact, companions) = (Arc::clone(&self.spec.artifact), self.spec.companions.clone());
        move |writer, trained| {
            artifact.write(writer.dir(), trained)?;
            companions.write(writer.dir())?;
            let mut files = split(trainer_state).into_iter();
            files.try_for_each(|(name, value)| writer.write(name, format!("{value:#}\n").as_bytes()))
        }
    }

    /// Gives the checkpoint its name, and rotates.
    fn finish_of(
        &self,
        state: &RunState,
    ) -> impl FnOnce(CheckpointWriter, &BTreeMap<String, FileRecord>) -> Result<()> + Send + use<> {
        let (output_dir, keep) = (self.spec.run_dir.clone(), self.spec.settings.save_total_limit);
        let (step, best, healthy) = (state.step, state.best.best, state.bad_in_row == 0);
        move |writer, records| {
            let written = writer.finish_with(records)?;
            saved(step);
            if let Some(keep) = keep.filter(|_| healthy) {
                let best = best.map(|(_, step)| manifest::path_of(&output_dir, step));
                manifest::rotate(&output_dir, keep, best.as_deref(), Some(&written))?;
            }
            Ok(())
        }
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

    /// Writes the final weights with their companions, and `trainer_state.json` with a summary of the run since
    /// `start`, when it stood at `first_step`.
    ///
    /// # Errors
    /// If a weight is not finite or a file cannot be written.
    pub fn finish(&mut self, trained: &Trained<'_>, state: &RunState, first_step: u64, start: Instant) -> Result<()> {
        let spec = self.spec;
        spec.artifact.write(&spec.final_dir, trained)?;
        spec.companions.write(&spec.final_dir)?;
        let mut trainer_state = self.checkpoints.trainer_state(state);
        let seconds = start.elapsed().as_secs_f64();
        let summary = json!({
            "epoch": state.epoch_fraction,
            "step": state.step,
            "total_flos": state.flops,
            "train_loss": state.loss_sum / state.updates.max(1) as f64,
            "train_runtime": round3(seconds),
            "train_steps_per_second": round3((state.step - first_step) as f64 / seconds),
        });
        trainer_state["log_history"].as_array_mut().expect("the history is a list").push(summary);
        split(trainer_state).into_iter().try_for_each(|(name, value)| write_json(&spec.run_dir.join(name), &value))?;
        self.metrics.end(Status::Finished);
        Ok(())
    }
}
