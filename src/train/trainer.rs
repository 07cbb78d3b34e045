//! The training loop: steps, log lines, evaluations, checkpoints, in this order and nowhere else.
//!
//! **Invariant:** whatever influences a later step or log line is in [`RunState`] or in the tensors of a checkpoint, so a
//! resumed run repeats the bits of one that was never interrupted.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Map, json};

use super::batches::{EvalBatches, TrainBatches};
use super::divergence::Divergence;
use super::drift;
use super::outputs::Outputs;
use super::part::Part;
use super::saver::Saver;
use super::set_losses::set_losses;
use super::signals::StopFlag;
use super::state::RunState;
use super::step::{Problem, Stepped, Workload};
use crate::backend::Backend;
use crate::bail;
use crate::comm::{Communicator, Phase, Position, fold};
use crate::data::loader::Step;
use crate::error::{Error, Result};
use crate::eval::{Evaluation, SetSums};
use crate::log::metrics::StepFigures;
use crate::log::mlflow::Status;
use crate::log::trace;
use crate::optim::schedule::Schedule;
use crate::say;
use crate::settings::{Every, TrainSettings};
use crate::text::plural;

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// All steps were taken.
    Completed,
    /// The patience of early stopping was used up.
    EarlyStopped,
    /// A signal asked to stop; the state is saved.
    Interrupted,
}

/// Everything a run needs, joined.
pub struct Trainer<'a, B: Backend> {
    /// The device.
    pub dev: &'a B,
    /// The ranks.
    pub comm: &'a dyn Communicator<B>,
    /// Settings of the loop.
    pub settings: &'a TrainSettings,
    /// Model, gradients, activations, optimiser.
    pub work: Workload<B>,
    /// Training data, started at the state's cursor.
    pub batches: TrainBatches,
    /// Validation data, where there is any.
    pub eval_batches: Option<EvalBatches>,
    /// Learning rate by step.
    pub schedule: Schedule,
    /// Steps planned.
    pub max_steps: u64,
    /// Peak of the devices of all ranks together in FLOP/s, where it is known.
    pub peak_flops: Option<f64>,
    /// Where the run stands.
    pub state: RunState,
    /// Where figures, lines and checkpoints go; ranks other than the main one have none.
    pub outputs: Option<Outputs<'a>>,
    /// Writes this rank's part of checkpoints on ranks other than the main one.
    pub saver: Saver,
    /// Not all ranks see the output folder: the main one writes what the others hold too.
    pub apart: bool,
    /// Set by a signal.
    pub stop: StopFlag,
    /// Whether the losses of several data sets are wanted one by one.
    pub reports_sets: bool,
}

/// Figures since the last log line that are for the eye only, so they are no part of the state.
#[derive(Default)]
struct Window {
    steps: u64,
    tokens: u64,
    supervised: u64,
    ms: f64,
    flops: f64,
    divergence: Divergence,
}

impl<B: Backend> Trainer<'_, B> {
    /// Runs to the end, to the end of patience, or to a signal.
    ///
    /// # Errors
    /// If data, device, peers or files fail, or `max_bad_steps` steps in a row were not finite.
    pub fn run(&mut self) -> Result<Finished> {
        let finished = self.run_steps().and_then(|finished| {
            self.work.settle(self.dev, self.comm)?;
            Ok(finished)
        });
        if let Err(e) = self.end_trace(finished.is_ok()) {
            say::warning(&e.to_string());
        }
        let Some(outputs) = &mut self.outputs else {
            let finished = finished?;
            self.saver.wait()?;
            return Ok(finished);
        };
        outputs.metrics.finish();
        match &finished {
            Err(_) => outputs.metrics.end(Status::Failed),
            Ok(Finished::Interrupted) => outputs.metrics.end(Status::Killed),
            Ok(_) => {}
        }
        let finished = finished?;
        outputs.wait()?;
        Ok(finished)
    }

    fn run_steps(&mut self) -> Result<Finished> {
        let settings = self.settings;
        if settings.early_stopping.is_some_and(|rule| self.state.best.misses >= rule.patience) {
            self.stop.begin();
            return Ok(Finished::EarlyStopped);
        }
        drift::compare(self.dev, self.comm, &mut self.work, self.state.step)?;
        if self.state.step == 0 && settings.eval_on_start && settings.eval_every != Every::Never {
            self.evaluate_and_log()?;
        }
        self.stop.begin();
        let mut window = Window::default();
        let mut saved_for = None;
        let mut validated = None;
        while self.state.step < self.max_steps {
            let start = Instant::now();
            self.work.trace.at_step(self.state.step + 1);
            self.stop.at_step(self.state.step + 1);
            let data = self.work.trace.span("data");
            let batch = self.batches.next_step();
            drop(data);
            let batch = self.kept_if_failed(batch)?;
            self.step(&batch, start, &mut window)?;
            let last = self.state.step == self.max_steps;
            let (interrupted, wanted) = self.asked()?;
            // It reaches the ranks in moments of their own, which may lie on both sides of a step's end: once is enough.
            let wanted = wanted && saved_for.is_none_or(|step| step + 1 < self.state.step);
            if wanted {
                saved_for = Some(self.state.step);
            }
            let mut save = settings.save_every.due(self.state.step, batch.epoch_end);
            let mut out_of_patience = false;
            let evaluate = settings.eval_every.due(self.state.step, batch.epoch_end)
                || (last && settings.eval_every != Every::Never);
            let evaluated = if evaluate { self.evaluate_and_log() } else { Ok(None) };
            validated = self.kept_if_failed(evaluated)?;
            if let Some(loss) = validated {
                let verdict = self.state.best.observe(loss, self.state.step, settings.early_stopping);
                save |= verdict.is_best;
                out_of_patience = verdict.stop;
            }
            save |= last || out_of_patience;
            // While nothing is finite the weights are those of a step that went wrong: they take no healthy checkpoint's place.
            let healthy = self.state.bad_in_row == 0 && validated.is_none_or(f64::is_finite);
            let save = save && settings.save_every != Every::Never;
            if ((save || wanted) && healthy) || interrupted {
                self.save(!(last || out_of_patience || interrupted))?;
            }
            if out_of_patience {
                if let Some(outputs) = &self.outputs {
                    outputs.metrics.print(&format!(
                        "early stopping after step {}: no better eval_loss in {} evaluations",
                        self.state.step, self.state.best.misses
                    ));
                }
                return Ok(Finished::EarlyStopped);
            }
            if interrupted && !last {
                return Ok(Finished::Interrupted);
            }
            match &mut self.outputs {
                Some(outputs) => outputs.poll()?,
                None => self.saver.poll()?,
            }
        }
        self.sound_at_the_end(validated)?;
        Ok(Finished::Completed)
    }

    /// Weights that give no finite loss any more become no final files: `validated` is the loss of the validation rows after the last step.
    fn sound_at_the_end(&self, validated: Option<f64>) -> Result<()> {
        let (bad, rate) = (self.state.bad_in_row, self.schedule.peak());
        let skipped = match bad {
            0 => String::new(),
            1 => ", and the last step was skipped".into(),
            _ => format!(", and the last {bad} steps were skipped"),
        };
        let what = match validated {
            Some(loss) if loss.is_finite() => return Ok(()),
            Some(loss) => format!("the loss of the validation rows is {loss} after the last step{skipped}"),
            // One may be a sample's fault.
            None if bad < 2 => return Ok(()),
            None => format!("the last {bad} steps had a loss or gradient that is not finite and were skipped"),
        };
        bail!(
            "the training ended with weights of no use: {what}; no final weights are written, and checkpoints that are there are from before; \
             lower --learning-rate ({rate:e})"
        );
    }

    /// Writes a checkpoint: the main rank alone, or all of them where each holds a part of the state. `goes_on`: training does, meanwhile.
    fn save(&mut self, goes_on: bool) -> Result<()> {
        let sharded = self.work.optimizer.is_sharded();
        drift::compare(self.dev, self.comm, &mut self.work, self.state.step)?;
        if self.outputs.is_none() && !sharded {
            return Ok(());
        }
        let trace = self.work.trace.clone();
        let _span = trace.span("save");
        self.comm.at(Position { step: self.state.step, phase: Phase::Save, layer: None });
        match &mut self.outputs {
            Some(outputs) if !sharded => outputs.save(self.dev, &self.work, &self.state, goes_on),
            _ if self.apart => self.save_for_all(),
            _ => self.save_together(),
        }
    }

    /// The main rank writes what the others hold, who do not see its folder: the files are those of one rank.
    fn save_for_all(&mut self) -> Result<()> {
        let Self { dev, comm, work, state, outputs, .. } = self;
        // Two copies would double the memory: the one before has to be on disk first.
        outputs.as_mut().map_or(Ok(()), Outputs::wait)?;
        let params = work.collect_params(*dev, *comm)?;
        let tensors = work.collect_state(*dev, *comm)?;
        match (outputs, params, tensors) {
            (Some(outputs), Some(params), Some(tensors)) => outputs.save_copies(params, tensors, state),
            _ => Ok(()),
        }
    }

    fn save_together(&mut self) -> Result<()> {
        let Self { dev, comm, work, state, outputs, saver, .. } = self;
        saver.wait()?;
        let writer = outputs.as_mut().map(|outputs| outputs.begin_shared(state.step)).transpose();
        let said = match &writer {
            Ok(writer) => Ok(writer.as_ref().map_or(Vec::new(), |w| w.dir().as_os_str().as_bytes().to_vec())),
            Err(_) => Err(Error::bystander()),
        };
        let said = comm.main_says("folder of a checkpoint", said);
        let (writer, dir) = (writer?, PathBuf::from(OsString::from_vec(said?)));
        let params = work.collect_params(*dev, *comm)?;
        let tensors = work.optimizer.export(*dev)?.tensors;
        let (world, aside) = (comm.world().clone(), comm.aside());
        let aside = aside.ok_or_else(|| Error::new("these ranks cannot write a checkpoint together"))?;
        let part = |given_up| Part { world, tensors, aside, given_up };
        if let (Some(outputs), Some(writer), Some(params)) = (outputs, writer, params) {
            return outputs.save_shared(writer, params, part, state);
        }
        let (part, step) = (part(saver.given_up()), state.step);
        saver.start_with_others(move || part.write(&dir, step).map(drop))
    }

    /// What signals to any of the ranks ask for, the same on all of them: an end, and the state saved.
    fn asked(&self) -> Result<(bool, bool)> {
        let own = [self.stop.is_requested(), self.stop.take_save()].map(u8::from);
        let all = self.comm.gather("signals", &own)?;
        let any = |i: usize| all.iter().any(|rank| rank.get(i) == Some(&1));
        Ok((any(0), any(1)))
    }

    /// Ends the trace; the main rank's gets the spans of all.
    fn end_trace(&self, ended_well: bool) -> Result<()> {
        let trace = &self.work.trace;
        let Some(path) = self.settings.trace.as_ref().filter(|_| ended_well && self.comm.world_size() > 1) else {
            return trace.finish();
        };
        self.comm.listen(None)?;
        if !self.comm.is_main() {
            let finished = trace.finish();
            self.comm.barrier()?;
            return finished;
        }
        self.comm.barrier()?;
        let others: Vec<_> = (1..self.comm.world_size()).map(|rank| trace::file_of(path, rank)).collect();
        trace.finish_with(&others)
    }

    /// What was trained is kept where the data fail under the run.
    fn kept_if_failed<T>(&mut self, result: Result<T>) -> Result<T> {
        // Where the state lies on several ranks, one alone cannot.
        if result.is_err()
            && self.state.step > 0
            && !self.work.optimizer.is_sharded()
            && let Some(outputs) = &mut self.outputs
            && let Err(e) = outputs.save(self.dev, &self.work, &self.state, false)
        {
            say::warning(&format!("what was trained since the last checkpoint cannot be saved: {e}"));
        }
        result
    }

    /// One optimiser step with its bookkeeping and log line.
    fn step(&mut self, batch: &Step, start: Instant, window: &mut Window) -> Result<()> {
        let lr = self.schedule.lr(self.state.step);
        let stepped = self.work.step_ahead(self.dev, self.comm, batch, self.state.step, lr)?;
        let s = &mut self.state;
        s.step += 1;
        (s.epoch, s.rows) = (batch.cursor.epoch, batch.cursor.rows);
        s.epoch_fraction = batch.epoch_fraction;
        s.tokens_seen += stepped.tokens;
        s.flops += stepped.flops;
        window.steps += 1;
        window.tokens += stepped.tokens;
        window.supervised += stepped.supervised;
        window.flops += stepped.flops;
        window.ms += start.elapsed().as_secs_f64() * 1e3;
        if let Some(problem) = &stepped.problem {
            return self.skipped(batch, &stepped, problem);
        }
        s.updates += 1;
        s.bad_in_row = 0;
        s.loss_sum += stepped.loss;
        s.window = (s.window.0 + stepped.loss, s.window.1 + 1);
        let mut figures = StepFigures {
            step: s.step,
            max_steps: self.max_steps,
            epoch: s.epoch_fraction,
            loss: stepped.loss,
            grad_norm: stepped.grad_norm,
            lr,
            tokens: stepped.tokens,
            supervised: stepped.supervised,
            ms: start.elapsed().as_secs_f64() * 1e3,
            flops: stepped.flops,
            peak: self.peak_flops,
        };
        let mut metrics = self.outputs.as_mut().map(|o| &mut o.metrics);
        if let Some(metrics) = &mut metrics {
            metrics.step(&figures);
            if let Some(warning) = window.divergence.observe(stepped.loss, self.schedule.peak()) {
                metrics.warn(&warning);
            }
        }
        if !s.step.is_multiple_of(self.settings.logging_steps) && s.step != self.max_steps {
            return Ok(());
        }
        // The history holds what transformers logs: the mean loss since the last line, and no times.
        let loss = s.window.0 / s.window.1 as f64;
        s.window = (0.0, 0);
        s.log_history.push(json!({
            "epoch": s.epoch_fraction, "grad_norm": stepped.grad_norm, "learning_rate": lr, "loss": loss, "step": s.step,
        }));
        let divergence = window.divergence;
        let Window { steps, tokens, supervised, ms, flops, .. } =
            std::mem::replace(window, Window { divergence, ..Window::default() });
        figures = StepFigures { loss, tokens, supervised, ms, flops, ..figures };
        let of_sets = match self.reports_sets {
            true => set_losses(self.dev, self.comm, &self.work, &self.batches, batch)?,
            false => Vec::new(),
        };
        let scalars: Vec<(&str, f64)> = [
            ("train/loss", loss),
            ("train/grad_norm", stepped.grad_norm),
            ("train/learning_rate", lr),
            ("train/epoch", s.epoch_fraction),
            ("train/tokens_per_second", tokens as f64 / (ms / 1e3).max(1e-9)),
        ]
        .into_iter()
        .chain(of_sets.iter().map(|(name, loss)| (name.as_str(), *loss)))
        .collect();
        if let Some(metrics) = &mut metrics {
            metrics.scalars(s.step, &scalars);
            metrics.print(&figures.line(steps, say::width()));
        }
        Ok(())
    }

    /// A step whose update was left out: said on the console, in the metrics and in the history.
    fn skipped(&mut self, batch: &Step, stepped: &Stepped, problem: &Problem) -> Result<()> {
        let (kind, what) = problem.describe(stepped);
        let s = &mut self.state;
        let mut line = format!("step {:>5}/{} | skipped: {what}", s.step, self.max_steps);
        let mut record = Map::new();
        record.insert("step".into(), json!(s.step));
        record.insert("epoch".into(), json!(batch.epoch_fraction));
        record.insert("skipped".into(), json!(kind));
        record.insert("why".into(), json!(what));
        let names: Vec<String> = problem.samples().iter().map(|&i| self.batches.sample_name(i)).collect();
        if *problem != Problem::NoTarget {
            line += &format!(" | {}: {}", plural(names.len(), "sample"), list(&names));
            record.insert("samples".into(), json!(names));
            s.bad_in_row += 1;
        }
        s.log_history.push(record.clone().into());
        if let Some(outputs) = &mut self.outputs {
            outputs.metrics.json(&record.into());
            outputs.metrics.print(&line);
        }
        if s.bad_in_row >= self.settings.max_bad_steps {
            bail!(
                "{} steps in a row had a loss or gradient that is not finite, the last one at step {}: {what}; look at {}, \
                 lower the learning rate, or raise max_bad_steps",
                s.bad_in_row,
                s.step,
                list(&names)
            );
        }
        Ok(())
    }

    /// Evaluates, logs, and returns eval_loss over all data sets.
    fn evaluate_and_log(&mut self) -> Result<Option<f64>> {
        let trace = self.work.trace.clone();
        let _span = trace.span("evaluate");
        let at = Position { step: self.state.step, phase: Phase::Evaluate, layer: None };
        self.comm.at(at);
        let Some(evaluation) = self.evaluate().map_err(|e| e.stood(&at))? else {
            return Ok(None);
        };
        let Some(all) = evaluation.together() else {
            return Ok(None);
        };
        let s = &mut self.state;
        let record = evaluation.to_json(s.step, s.epoch_fraction);
        if let Some(outputs) = &mut self.outputs {
            let sets = if evaluation.sets.len() > 1 { &evaluation.sets[..] } else { &[] };
            let of_sets: Vec<(String, f64)> =
                sets.iter().map(|set| (format!("eval/{}_loss", set.name), set.loss())).collect();
            let scalars: Vec<(&str, f64)> = [
                ("eval/loss", all.loss()),
                ("eval/perplexity", all.perplexity()),
                ("eval/mean_token_accuracy", all.accuracy()),
            ]
            .into_iter()
            .chain(of_sets.iter().map(|(name, loss)| (name.as_str(), *loss)))
            .collect();
            outputs.metrics.json(&record);
            outputs.metrics.scalars(s.step, &scalars);
            outputs.metrics.print(&evaluation.text(s.step, self.max_steps));
        }
        s.log_history.push(record);
        Ok(Some(all.loss()))
    }

    /// Evaluates the model as it stands; `None` without validation data.
    ///
    /// # Errors
    /// If data, device or peers fail.
    pub fn evaluate(&mut self) -> Result<Option<Evaluation>> {
        self.work.settle(self.dev, self.comm)?;
        let Some(batches) = &self.eval_batches else {
            return Ok(None);
        };
        let start = Instant::now();
        let mut sets = Vec::new();
        for (i, name) in batches.names().into_iter().enumerate() {
            let mut own = Vec::new();
            batches.visit(i, |k, micro_batch| {
                own.push((k, self.work.evaluate(self.dev, micro_batch)?));
                Ok(())
            })?;
            let [nll, supervised, correct] = fold(self.comm, batches.count(i), own)?;
            if supervised > 0.0 {
                sets.push(SetSums { name, nll, supervised, correct });
            }
        }
        Ok(Some(Evaluation { sets, seconds: start.elapsed().as_secs_f64() }))
    }
}

/// At most eight of them, and how many more there are.
fn list(names: &[String]) -> String {
    match names {
        [] => "the data".into(),
        _ if names.len() <= 8 => names.join(", "),
        _ => format!("{} and {} more", names[..8].join(", "), names.len() - 8),
    }
}
