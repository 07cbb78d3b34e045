//! One run from prepared data to final files: the tables at its start, the loop, the best model, the outputs.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::batches::{EvalBatches, TrainBatches};
use super::checkpoints::{Checkpoints, Resumed, longer_line};
use super::folder::{RunFolder, refuse_overwriting};
use super::outputs::{self, Outputs};
use super::saver::Saver;
use super::setup;
use super::shared_folder::{apart, same_checkpoint};
use super::signals::StopFlag;
use super::spec::RunSpec;
use super::state::RunState;
use super::step::Workload;
use super::trainer::{Finished, Trainer};
use crate::backend::Backend;
use crate::checkpoint::manifest;
use crate::comm::{Communicator, Fold, Phase, Position, Timing, is_restarted};
use crate::data::loader::{StepShape, steps_until};
use crate::data::train_set::Cursor;
use crate::error::{Context, Error, Result};
use crate::files::{check_replaces, check_writable, is_there, parent};
use crate::hf::artifact::{HostParams, find};
use crate::log::tables::{memory_table, settings_table};
use crate::log::trace::{self, Trace};
use crate::machine::available_memory;
use crate::model::weights::Place;
use crate::optim::Schedule;
use crate::settings::{Reporter, Resume, TrainSettings};
use crate::text::Style;
use crate::{ensure, say};

/// A run that has ended, with its model still on the device.
pub struct Ended<B: Backend> {
    /// Why the loop ended.
    pub finished: Finished,
    /// The model: the best one where that was asked for.
    pub work: Workload<B>,
    /// Where the run stood at its end.
    pub state: RunState,
}

/// The main rank takes the output folder for all, and proves that it can be written, and that of the trace, before anything expensive. `inputs` are what
/// the run reads, with a name each.
///
/// # Errors
/// Those of [`refuse_overwriting`] and [`RunFolder::take`]; or if the trace cannot be written.
pub fn take_output_dir<B: Backend>(
    comm: &dyn Communicator<B>,
    dir: &Path,
    settings: &TrainSettings,
    inputs: &[(&str, &Path)],
) -> Result<Option<RunFolder>> {
    let take = || {
        refuse_overwriting(dir, inputs)?;
        if settings.resume == Resume::No && !is_restarted() && dir.is_dir() {
            check_no_earlier_run(dir)?;
        }
        let folder = RunFolder::take(dir)?;
        // It may lie in the folder that was just made.
        if let Some(path) = &settings.trace {
            check_replaces("--trace", path, "trace", Trace::begins)?;
            check_writable(&parent(path)).context(|| "the trace cannot be written".into())?;
        }
        Ok(folder)
    };
    of_main(comm, "output folder", comm.is_main().then(take))
}

/// Refuses a folder in which another run left what it had trained: starting at step 0 there would mix two runs, or write over a result.
///
/// # Errors
/// A usage error that names the newest checkpoint, or the weights.
pub fn check_no_earlier_run(run_dir: &Path) -> Result<()> {
    let Some((step, path)) = manifest::list(run_dir)?.pop() else {
        return check_no_result(run_dir);
    };
    Err(Error::usage(format!(
        "{}: an earlier run left checkpoints up to step {step} here ({}); continue it with \
         --resume-from-checkpoint auto, or choose another --output-dir",
        run_dir.display(),
        path.display()
    )))
}

/// Refuses a folder with the final weights of a run that left no checkpoint.
fn check_no_result(run_dir: &Path) -> Result<()> {
    const WEIGHTS: [&str; 3] = ["adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"];
    let places = [run_dir.to_path_buf(), run_dir.join("final")];
    let found = places.iter().flat_map(|dir| WEIGHTS.map(|name| dir.join(name))).find(|path| is_there(path));
    match found {
        None => Ok(()),
        Some(path) => Err(Error::usage(format!(
            "{}: an earlier run finished here ({}), and would be written over; choose another --output-dir, or move that one away",
            run_dir.display(),
            path.display()
        ))),
    }
}

/// Trains, loads the best model, and writes the final weights with their companions to `final_dir`.
///
/// # Errors
/// Whatever stops the run; [`Error::interrupted`] when a signal did and the state is saved.
pub fn run<B: Backend>(dev: &B, comm: &dyn Communicator<B>, spec: &RunSpec, stop: StopFlag) -> Result<Ended<B>> {
    let s = spec.settings;
    let start = std::time::Instant::now();
    let shape = StepShape { micro_batch: s.micro_batch_size, grad_accum: s.grad_accum, world_size: comm.world_size() };
    let at = |phase| comm.at(Position { step: 0, phase, layer: None });
    at(Phase::Load);
    // Every rank makes the whole update itself: other last bits would take their weights apart in silence.
    comm.agree("what computes", &dev.arithmetic())?;
    let max_steps = s.max_steps.unwrap_or_else(|| steps_until(&spec.train, Cursor::default(), s.epochs, shape));
    ensure!(max_steps > 0, "the data give no optimiser step");
    say::set_quiet(s.quiet);
    say::detail(&settings_table(&spec.resolved_settings(), s.verbose, Style::stdout(), say::width()));
    let available = dev.free_memory().or_else(available_memory);
    let max_tokens = s.micro_batch_size.max(s.eval_batch_size) * spec.train.max_seq_len();
    let trace = match &s.trace {
        Some(path) => {
            // Their clocks begin together.
            comm.barrier()?;
            let trace = Trace::create(&trace::file_of(path, comm.rank()), comm.rank())?;
            let row = trace.clone();
            comm.listen(Some(Box::new(move |Timing { what, bucket, begun, ended }| {
                row.record(what, trace::COLLECTIVES, (begun, ended), bucket);
            })))?;
            trace
        }
        None => Trace::default(),
    };
    let mut work = Workload { trace, ..setup::workload_of(dev, comm, spec.source, s, spec.new_rows, max_tokens)? };
    let mut fingerprints = spec.fingerprints.clone();
    let accumulated = s.grad_accum * comm.world_size();
    let deciding = TrainSettings { grad_accum: accumulated, ..s.clone() };
    fingerprints.0.insert("config".into(), setup::fingerprint(&deciding, spec.peak_lr, max_steps));
    fingerprints.add_settings(setup::deciding(&deciding, spec.peak_lr, max_steps, spec.packing));
    let (artifact, arithmetic) = (Arc::clone(&spec.artifact), dev.arithmetic());
    let checkpoints = Checkpoints::new(&spec.run_dir, s, max_steps, artifact, fingerprints, arithmetic);
    let apart = apart(comm, &spec.run_dir)?;
    if let Some(apart) = &apart {
        say::warning(&apart.warning(&spec.run_dir));
    }
    let state = resume(dev, comm, &mut work, &checkpoints, spec)?;
    let no_gpu = spec.no_gpu.as_ref().map_or(String::new(), |why| format!("; no GPU: {why}"));
    say::detail(&format!("device: {}{no_gpu}", dev.describe()));
    say::detail(&setup::parameters_line(&work));
    say::detail(&memory_table(&setup::memory(&work), available));
    if comm.world_size() > 1 {
        let (each, ranks) = (s.grad_accum, comm.world_size());
        say::detail(&match comm.fold() {
            Fold::Step => format!(
                "gradients are summed once a step: the last bits depend on {each} micro-batches on each of {ranks} ranks, not on their \
                 product alone"
            ),
            Fold::MicroBatch => format!(
                "gradients are folded in order after every micro-batch: the bits are those of one rank with {} micro-batches in a step",
                each * ranks
            ),
        });
    }
    let rows = spec.train.plan(state.epoch).n_rows();
    say::detail(&format!(
        "steps: {max_steps} of up to {} rows ({rows} rows of at most {} tokens in epoch {})\n",
        shape.rows(),
        spec.train.max_seq_len(),
        state.epoch + 1
    ));
    spec.preview.iter().for_each(|line| say::detail(line));
    let first_step = state.step;
    let outputs = comm.is_main().then(|| Outputs::open(dev, spec, &checkpoints, &work, first_step, shape));
    let outputs = of_main(comm, "outputs", outputs)?;
    let cursor = Cursor { epoch: state.epoch, rows: state.rows };
    let eval_batches = EvalBatches::new(
        spec.val.clone(),
        spec.train.max_seq_len(),
        spec.packing,
        s.eval_batch_size,
        (comm.rank(), comm.world_size()),
    );
    let mut trainer = Trainer {
        dev,
        comm,
        settings: s,
        work,
        batches: TrainBatches::start(&spec.train, cursor, shape, comm.rank())?,
        eval_batches,
        schedule: Schedule::new(s.schedule, spec.peak_lr, max_steps),
        max_steps,
        peak_flops: dev.peak_flops(s.dtype).map(|peak| peak * comm.world_size() as f64),
        state,
        outputs,
        saver: Saver::default(),
        apart: apart.is_some(),
        stop,
        reports_sets: spec.train.sets().len() > 1
            && s.report_to.iter().any(|r| matches!(r, Reporter::TensorBoard | Reporter::Mlflow)),
    };
    let finished = trainer.run()?;
    let Trainer { mut work, state, outputs, stop, .. } = trainer;
    // Of a state that lies on several ranks each gives its part; all else that follows is the main rank's.
    let last = match work.optimizer.is_sharded() && finished != Finished::Interrupted {
        true => work.collect_params(dev, comm)?,
        false => None,
    };
    comm.end_reductions()?;
    if finished == Finished::Interrupted {
        let at = manifest::path_of(&spec.run_dir, state.step);
        return Err(Error::interrupted(format!(
            "stopped by {} after step {}, state saved in {}; run again with --resume-from-checkpoint auto",
            stop.reason(),
            state.step,
            at.display()
        )));
    }
    at(Phase::Finish);
    // Final weights are the main rank's to write.
    let Some(mut outputs) = outputs else { return Ok(Ended { finished, work, state }) };
    let best = load_best(dev, &mut work, &state, &checkpoints, s).unwrap_or_else(|e| {
        say::warning(&format!("the best model cannot be loaded, the final weights are those of the last step: {e}"));
        None
    });
    let params = best.or(last);
    let trained = |place: Place| {
        // Files of a large model take minutes, in which this rank does not hang.
        at(Phase::Finish);
        params.as_ref().map_or_else(|| work.exported(dev, place), |params| find(params, place).cloned())
    };
    outputs.finish(&trained, &state, first_step, start)?;
    Ok(Ended { finished, work, state })
}

/// What only the main rank makes, `own`; its error ends all ranks.
fn of_main<B: Backend, T>(comm: &dyn Communicator<B>, what: &str, own: Option<Result<T>>) -> Result<Option<T>> {
    let own = own.transpose();
    let outcome = own.as_ref().map(|_| Vec::new()).map_err(|_| Error::bystander());
    let outcome = comm.main_says(what, outcome);
    // The main rank's own error has its words.
    own.and_then(|own| outcome.map(|_| own))
}

/// Cleans up, and decides where the run goes on: the main rank alone, so that all go on from the same place.
fn choose_checkpoint(spec: &RunSpec) -> Result<Option<PathBuf>> {
    outputs::clean_up(spec)?;
    // Started again after a failure it goes on from what it wrote itself, if it came so far.
    let wrote = is_restarted() && !manifest::list(&spec.run_dir)?.is_empty();
    match if wrote { &Resume::Auto } else { &spec.settings.resume } {
        Resume::No => check_no_earlier_run(&spec.run_dir).map(|()| None),
        Resume::Path(path) => manifest::verify(path).map(|_| Some(path.clone())),
        Resume::Auto => {
            let found = manifest::find_newest(&spec.run_dir)?;
            for (path, why) in &found.passed_over {
                say::warning(&format!("{}: passed over: {why}", path.display()));
            }
            if found.chosen.is_none() {
                if !is_restarted() {
                    check_no_result(&spec.run_dir)?;
                }
                say::result(&format!("no checkpoint in {} yet; starting at step 0", spec.run_dir.display()));
            }
            Ok(found.chosen)
        }
    }
}

/// Restores what the settings ask for, and says what was passed over.
fn resume<B: Backend>(
    dev: &B,
    comm: &dyn Communicator<B>,
    work: &mut Workload<B>,
    checkpoints: &Checkpoints,
    spec: &RunSpec,
) -> Result<RunState> {
    let run_dir = &spec.run_dir;
    let chosen = match comm.is_main() {
        true => {
            choose_checkpoint(spec).map(|path| path.map_or(Vec::new(), |p| p.into_os_string().into_encoded_bytes()))
        }
        false => Ok(Vec::new()),
    };
    let chosen = comm.main_says("checkpoint", chosen)?;
    if chosen.is_empty() {
        return Ok(RunState::default());
    }
    let path = PathBuf::from(OsString::from_vec(chosen));
    same_checkpoint(comm, &path, manifest::MANIFEST)?;
    let Resumed { mut state, changed, longer } = checkpoints.resume(dev, work, &path)?;
    for name in changed {
        say::warning(&format!("{name} differs from the checkpoint's, as --allow-changed permits"));
    }
    say::result(&format!("resuming from {} after step {}", path.display(), state.step));
    if let Some(was) = longer {
        say::result(&longer_line(spec.settings, spec.peak_lr, was, checkpoints.max_steps(), state.step));
    }
    let had_best = state.best.best.is_some();
    if comm.is_main() {
        for (from, to) in manifest::set_aside(run_dir, &path, state.step)? {
            let (from, to) = (from.display(), to.display());
            say::warning(&format!("{from} is of the line of steps that this run leaves; kept as {to}"));
        }
        bring_best(&mut state, run_dir, &path);
    }
    if comm.any(had_best && state.best.best.is_none())? {
        state.best.best = None;
    }
    Ok(state)
}

/// The best model so far comes along from the folder of the checkpoint that the run goes on from. Without its weights the best is only a
/// number: then that is said, and the next evaluation sets a new one.
fn bring_best(state: &mut RunState, run_dir: &Path, resumed: &Path) {
    let Some((loss, step)) = state.best.best else { return };
    if manifest::verify(&manifest::path_of(run_dir, step)).is_ok() {
        return;
    }
    let from = manifest::path_of(&parent(resumed), step);
    match manifest::copy(&from, run_dir) {
        Ok(to) => say::result(&format!(
            "best model so far, eval_loss {loss:.4}: {} copied to {}",
            from.display(),
            to.display()
        )),
        Err(e) => {
            say::warning(&format!("the best model so far, eval_loss {loss:.4} at step {step}, is lost: {e}"));
            state.best.best = None;
        }
    }
}

/// Loads the best checkpoint's weights, and gives them as they are in its files, where they were asked for and are not those of the last step.
fn load_best<B: Backend>(
    dev: &B,
    work: &mut Workload<B>,
    state: &RunState,
    checkpoints: &Checkpoints,
    s: &TrainSettings,
) -> Result<Option<HostParams>> {
    let Some((loss, step)) = state.best.best else {
        return Ok(None);
    };
    if !s.load_best_at_end {
        return Ok(None);
    }
    if s.save_every == crate::settings::Every::Never {
        say::detail("save_strategy is no: the final weights are those of the last step, not of the best evaluation");
        return Ok(None);
    }
    if step == state.step {
        say::detail(&format!("best model: eval_loss {loss:.4} at step {step}, the last one"));
        return Ok(None);
    }
    let (params, path) = checkpoints.load_weights(dev, work, step)?;
    say::detail(&format!("best model: eval_loss {loss:.4} at step {step}, loaded from {}", path.display()));
    Ok(Some(params))
}
