//! `ringtune sft` and `ringtune pretrain`: from paths and settings to a run.
//!
//! Folders. `sft` writes checkpoints, logs and the final adapter or model into `output_dir` itself, so that the folder can be
//! given to `--model_path`; `merged/` holds the merged model and `resized_base/` the base with a grown vocabulary. `pretrain`
//! writes into `output_dir/<name of the model config>`, the model into its `final/`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::device::{self, OnDevice};
use super::fetch::Lookup;
use super::jobs::{PretrainJob, SftJob};
use super::preview::preview;
use super::start::{self, Start, StopAtFirst, fingerprints, hash_model, model_artifact};
use crate::backend::Backend;
use crate::batch::MicroBatch;
use crate::checkpoint::state::Fingerprints;
use crate::comm::{self, Comm, Communicator, Phase, Position, Sums, Ways};
use crate::error::Result;
use crate::eval::gen_test::{GenRun, SAMPLES, generation_test, held_out_rows};
use crate::files::write_json;
use crate::hf::artifact::Artifact;
use crate::hf::companions::Companions;
use crate::hf::peft::AdapterConfig;
use crate::hf::resize::Resized;
use crate::hf::safetensors::ModelFiles;
use crate::hf::save::SaveOptions;
use crate::hf::{Told, WithConfig, merged};
use crate::hub::{self, Repo};
use crate::model::weights::Place;
use crate::settings::{ResolvedSetting, TrainSettings, Zero};
use crate::text::{shortened, table};
use crate::train::checkpoints::RESIZED_BASE;
use crate::train::folder::from_root;
use crate::train::init::RandomModel;
use crate::train::outputs::MERGED;
use crate::train::run;
use crate::train::signals::StopFlag;
use crate::train::spec::RunSpec;
use crate::{bail, ensure, say};

/// Every part of a start that stops at the first error is there once it is through.
const WHOLE: &str = "the start went through all steps";

/// Fine-tunes a model.
///
/// # Errors
/// Whatever stops the run; see [`run::run`].
pub fn run_sft(job: &SftJob) -> Result<()> {
    on_ranks(job, &job.settings, &job.device)
}

/// Trains a new model on text.
///
/// # Errors
/// Whatever stops the run; see [`run::run`].
pub fn run_pretrain(job: &PretrainJob) -> Result<()> {
    on_ranks(job, &job.settings, &job.device)
}

/// Meets the other ranks, and trains on the device.
fn on_ranks<J: 'static>(job: &J, settings: &TrainSettings, device: &str) -> Result<()>
where
    for<'a> Training<'a, J>: OnDevice,
{
    // Before the others are met, which may take minutes: what asks this rank for its state must not kill it.
    let stop = StopFlag::on_signals()?;
    let comm = comm::start(Ways { transport: settings.transport, fold: settings.fold, bucket: None })?;
    let threads = settings.threads.or(comm.threads());
    let training = Training { job, comm: &comm, stop, no_gpu: None };
    comm.finish(device::run_as(comm.world(), device, threads, training))
}

/// A run of `sft` or `pretrain`, by its job.
struct Training<'a, J> {
    job: &'a J,
    comm: &'a Comm,
    stop: StopFlag,
    no_gpu: Option<String>,
}

impl OnDevice for Training<'_, SftJob> {
    fn without_gpu(&mut self, why: String) {
        self.no_gpu = Some(why);
    }

    fn run<B: Backend + 'static>(self, dev: &B) -> Result<()> {
        let Self { job, comm, stop, no_gpu } = self;
        let settings = &job.settings;
        let on = comm.on(dev, sums(settings))?;
        let comm = on.get();
        let mut guide = StopAtFirst::new(settings.quiet || !comm.is_main());
        same_settings(comm, &job.resolved)?;
        let lora = start::settings(&mut guide, settings)?;
        let (job, hub_name) = comm::in_turn(comm, || looked_up(comm, |names| names.sft(job)))?;
        let job = &job;
        let rows = job.data.paths.iter().chain(&job.data.val_paths).map(|path| ("the data set", path.as_path()));
        let inputs: Vec<_> = rows.chain([("the model", job.model_path.as_path())]).collect();
        let _folder = run::take_output_dir(comm, &job.output_dir, settings, &inputs)?;
        comm.at(Position { phase: Phase::Tokenise, ..Position::default() });
        let start = comm::in_turn(comm, || start::of_sft(&mut guide, job, lora))?;
        let Start { base, config, resize, tokenizer, template, data, lora, new_rows, .. } = start;
        let (base, config, resize) = (base.expect(WHOLE), config.expect(WHOLE), resize.expect(WHOLE));
        let (tokenizer, template, prepared) = (tokenizer.expect(WHOLE), template.expect(WHOLE), data.expect(WHOLE));
        let preview = preview(&prepared, &tokenizer);
        let new_rows = new_rows.filter(|_| lora.is_some());

        let resized = Resized::new(&base, resize.clone())?;
        let source = WithConfig { source: &resized, config: config.clone() };
        let tokenizer = Arc::new(tokenizer);
        let companions =
            Companions::new(Arc::clone(&tokenizer), Some(&template), config.max_position).of(config.architecture);
        let artifact = match &lora {
            None => model_artifact(&config, settings),
            Some(lora) => {
                // Other tools look for a folder from wherever they run.
                let whole = |path: &Path| from_root(path).display().to_string();
                let (base, revision) = match (new_rows, hub_name) {
                    (Some(_), _) => (whole(&job.output_dir.join(RESIZED_BASE)), None),
                    (None, Some(Repo { id, revision, .. })) => (id, Some(revision).filter(|r| r != hub::MAIN)),
                    (None, None) => (whole(&job.model_path), None),
                };
                let adapter = AdapterConfig { lora: lora.clone(), base, revision };
                let base = Box::new(ModelFiles::open(&job.model_path)?);
                Artifact::Adapter { config: adapter, base, resize, model: config.clone(), new_rows }
            }
        };
        let mut fingerprints = fingerprints(&prepared, &tokenizer);
        fingerprints.0.insert("base_model".into(), hash_model(&job.model_path)?);
        agree(comm, &fingerprints)?;
        let (val, held_out) = (prepared.val.clone(), prepared.val);
        let spec = RunSpec {
            settings,
            resolved: &job.resolved,
            run_dir: job.output_dir.clone(),
            final_dir: job.output_dir.clone(),
            peak_lr: start.peak_lr,
            source: &source,
            new_rows,
            artifact: Arc::new(artifact),
            companions,
            train: prepared.train,
            val,
            packing: start.packing,
            fingerprints,
            preview,
            warnings: guide.warnings,
            no_gpu,
        };
        let ended = run::run(dev, comm, &spec, stop)?;
        if !comm.is_main() {
            return Ok(());
        }
        let mut written = vec![match settings.lora {
            Some(_) => ("adapter", job.output_dir.clone()),
            None => ("model", job.output_dir.clone()),
        }];
        if new_rows.is_some() {
            written.push(("base with the grown vocabulary", job.output_dir.join(RESIZED_BASE)));
        }
        if settings.merge_adapters {
            let to = job.output_dir.join(MERGED);
            let mut batch = MicroBatch::default();
            spec.train.append_row(&spec.train.plan(0), 0, &mut batch);
            let options = SaveOptions { dtype: base.dtype(), ..Default::default() };
            let companions = |dir: &Path| spec.companions.write(dir);
            let at = |phase, place: Option<Place>| {
                let layer = place.and_then(|place| place.layer()).map(|layer| layer as u16);
                comm.at(Position { phase, layer, ..Position::default() });
            };
            at(Phase::Merge, None);
            let told = Told { source: &source, to: &|place| at(Phase::Merge, Some(place)) };
            let check = merged::merge(dev, &told, &job.output_dir, &to, options, &batch, companions)?;
            say::result(&format!("merged model: {check}"));
            written.push(("merged model", to));
        }
        if let Some(test) = &settings.gen_test {
            let prompts = held_out_rows(&held_out, test.num_samples, &job.data.row.rows)?;
            let run = GenRun {
                tokenizer: &tokenizer,
                template: &template,
                test,
                seed: settings.seed,
                batch: settings.eval_batch_size,
                moved: &|| comm.at(Position { phase: Phase::Generate, ..Position::default() }),
            };
            let report = generation_test(dev, &ended.work.model, &run, &prompts)?;
            say::result(&format!("\n{}", report.text(test.max_new_tokens).trim_end()));
            write_json(&job.output_dir.join(SAMPLES), &report.to_json())?;
        }
        report_written(&written);
        Ok(())
    }
}

/// Which sums of gradients a rank wants.
fn sums(s: &TrainSettings) -> Sums {
    if s.zero == Zero::Moments { Sums::Owned } else { Sums::Whole }
}

/// Looks names of the hub up. Of the ranks of a machine the first one asks the hub, the others find what it fetched. While bytes come,
/// this rank moves: nobody takes it for one that hangs.
fn looked_up<B: Backend, T>(comm: &dyn Communicator<B>, work: impl FnOnce(&Lookup) -> Result<T>) -> Result<T> {
    let moved = |bytes: u64| {
        let phase = if (bytes >> 23).is_multiple_of(2) { Phase::Start } else { Phase::Load };
        comm.at(Position { phase, ..Position::default() });
    };
    let names = Lookup { settled: comm.world().local_rank != 0, moved: &moved };
    let done = work(&names);
    comm.at(Position::default());
    done
}

/// Settings that may be others on each machine: where things lie, what computes, and what is shown. Data, tokenizer and model are compared by
/// what is in them.
const OWN: [&str; 17] = [
    "model_path",
    "model_config",
    "tokenizer_path",
    "dataset_paths",
    "val_paths",
    "cache_dir",
    "output_dir",
    "resume_from_checkpoint",
    "device",
    "transport",
    "threads",
    "trace",
    "report_to",
    "tensorboard",
    "logging_steps",
    "verbose",
    "quiet",
];

/// Whether all ranks were started with the same settings: each has a line of its own, and what differs would train another model in silence.
fn same_settings<B: Backend>(comm: &dyn Communicator<B>, resolved: &[ResolvedSetting]) -> Result<()> {
    let own: BTreeMap<&str, &str> = resolved
        .iter()
        .filter(|s| !OWN.contains(&s.name.as_str()))
        .map(|s| (s.name.as_str(), s.value.as_str()))
        .chain([(
            "trace",
            if resolved.iter().any(|s| s.name == "trace" && !s.value.starts_with('(')) { "given" } else { "none" },
        )])
        .collect();
    let all = comm.gather("settings", &serde_json::to_vec(&own).expect("texts print"))?;
    let Some(rank) = all.iter().position(|said| *said != all[0]) else { return Ok(()) };
    let read = |rank: usize| serde_json::from_slice::<BTreeMap<String, String>>(&all[rank]).unwrap_or_default();
    let (main, other) = (read(0), read(rank));
    let names: BTreeSet<&String> =
        main.keys().chain(other.keys()).filter(|name| main.get(*name) != other.get(*name)).collect();
    let text = |value: Option<&String>| value.map_or_else(|| "none".into(), |v| shortened(v, 60));
    let what: Vec<String> = names
        .into_iter()
        .map(|name| {
            format!(
                "--{} is {} on rank 0, {} on rank {rank}",
                name.replace('_', "-"),
                text(main.get(name)),
                text(other.get(name))
            )
        })
        .collect();
    bail!("settings differ between ranks: {}; start every rank with the same flags and config file", what.join("; "))
}

/// Whether all ranks train the same: the same program on the same kind of processor, from the same data, tokenizer and model.
fn agree<B: Backend>(comm: &dyn Communicator<B>, fingerprints: &Fingerprints) -> Result<()> {
    comm.agree("the version of the program", env!("CARGO_PKG_VERSION"))?;
    fingerprints.0.iter().try_for_each(|(name, value)| comm.agree(name, value))
}

impl OnDevice for Training<'_, PretrainJob> {
    fn without_gpu(&mut self, why: String) {
        self.no_gpu = Some(why);
    }

    fn run<B: Backend + 'static>(self, dev: &B) -> Result<()> {
        let Self { job, comm, stop, no_gpu } = self;
        let settings = &job.settings;
        let on = comm.on(dev, sums(settings))?;
        let comm = on.get();
        let mut guide = StopAtFirst::new(settings.quiet || !comm.is_main());
        same_settings(comm, &job.resolved)?;
        start::settings(&mut guide, settings)?;
        ensure!(settings.lora.is_none(), "pretraining has no LoRA");
        let job = &comm::in_turn(comm, || looked_up(comm, |names| names.pretrain(job)))?;
        let texts = job.data.paths.iter().chain(&job.data.val_paths).map(|path| ("the data set", path.as_path()));
        let run_dir = job.output_dir.join(&job.config_name);
        let _folder = run::take_output_dir(comm, &run_dir, settings, &texts.collect::<Vec<_>>())?;
        comm.at(Position { phase: Phase::Tokenise, ..Position::default() });
        let start = comm::in_turn(comm, || start::of_pretrain(&mut guide, job))?;
        let Start { config, tokenizer, data, run_dir, .. } = start;
        let (config, tokenizer, prepared) = (config.expect(WHOLE), tokenizer.expect(WHOLE), data.expect(WHOLE));
        let preview = preview(&prepared, &tokenizer);
        let tokenizer = Arc::new(tokenizer);
        let final_dir = run_dir.join("final");
        let source = RandomModel::new(config.clone(), settings.seed);
        let spec = RunSpec {
            settings,
            resolved: &job.resolved,
            run_dir,
            final_dir: final_dir.clone(),
            peak_lr: start.peak_lr,
            source: &source,
            new_rows: None,
            artifact: Arc::new(model_artifact(&config, settings)),
            companions: Companions::new(Arc::clone(&tokenizer), None, config.max_position).of(config.architecture),
            fingerprints: fingerprints(&prepared, &tokenizer),
            train: prepared.train,
            val: prepared.val,
            packing: start.packing,
            preview,
            warnings: guide.warnings,
            no_gpu,
        };
        agree(comm, &spec.fingerprints)?;
        run::run(dev, comm, &spec, stop)?;
        if !comm.is_main() {
            return Ok(());
        }
        report_written(&[("model", final_dir)]);
        Ok(())
    }
}

fn report_written(written: &[(&str, PathBuf)]) {
    let row = |(what, path): &(&str, PathBuf)| vec![what.to_string(), path.display().to_string()];
    let rows: Vec<Vec<String>> = written.iter().map(row).collect();
    say::detail(&format!("\nwritten:\n{}", table(&rows).trim_end()));
}
