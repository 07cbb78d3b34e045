//! `ringtune merge`: an adapter and its base become a Hugging Face model, proven against base + adapter before it gets its name.

use std::fs;
use std::path::Path;

use clap::Command;

use super::device::{self, OnDevice};
use super::model_folder::ModelFolder;
use crate::backend::Backend;
use crate::batch::MicroBatch;
use crate::checkpoint::state::read_json;
use crate::error::{Context, Error, Result};
use crate::files::At;
use crate::hf::merged::merge;
use crate::hf::save::{SaveOptions, parse_size};
use crate::hf::tokenizer_files::copy_tokenizer;
use crate::hf::{TensorSource, WithConfig};
use crate::model::config::ModelConfig;
use crate::rng::Stream;
use crate::settings::Settings;
use crate::text::bytes;
use crate::{bail, ensure, say};

/// Tokens on which merged model and base + adapter are compared.
const CHECK_TOKENS: usize = 64;

/// What its help says besides its flags.
pub fn about(clap: Command) -> Command {
    clap.about("Merge an adapter into its base: a Hugging Face model, checked against base + adapter")
}

/// Runs the command.
///
/// # Errors
/// If the folder holds no adapter or its base is not found, the output exists, a weight is not finite after merging, the
/// merged model differs from base + adapter, or a file cannot be written; nothing is left under the output's name then.
pub fn run(settings: &Settings) -> Result<()> {
    device::run(&settings.device, settings.train.threads, Job { settings })
}

struct Job<'a> {
    settings: &'a Settings,
}

impl OnDevice for Job<'_> {
    fn run<B: Backend>(self, dev: &B) -> Result<()> {
        let s = self.settings;
        let model_path = s.model.path.as_deref().expect("clap requires it");
        let output = s.output_dir.clone().expect("clap requires it");
        let max_shard_bytes = parse_size(&s.merge.max_shard_size).context(|| "--max-shard-size".to_string())?;
        let folder = ModelFolder::open(model_path, s.model.base.as_deref(), false)?;
        let Some(adapter) = &folder.adapter else {
            bail!(
                "{}: expected an adapter folder (adapter_config.json), found a whole model; there is nothing to merge",
                folder.dir.display()
            )
        };
        folder.files.hf_config().warnings.iter().for_each(|w| say::warning(w));
        check_output(&output, s.merge.overwrite, &[adapter.dir(), folder.files.dir()])?;
        let dtype = s.merge.dtype.unwrap_or(folder.files.dtype());
        let base =
            WithConfig { source: &folder.files, config: with_end_of(adapter.dir(), folder.files.config().clone())? };
        let options = SaveOptions { dtype, max_shard_bytes };
        let batch = sample(&base.config);
        let mut size = 0;
        let check = merge(dev, &base, adapter.dir(), &output, options, &batch, |dir| {
            if copy_tokenizer(&[adapter.dir(), folder.files.dir()], dir)?.is_none() {
                say::warning(&format!(
                    "{}: neither the adapter nor the base has a tokenizer; the merged model gets none",
                    output.display()
                ));
            }
            size = folder_size(dir)?;
            Ok(())
        })?;
        say::note(&format!("{} + {}", folder.files.dir().display(), adapter.dir().display()));
        say::result(
            &format!("{}: merged model, {} in {}; {check}", output.display(), bytes(size), dtype.torch_name(),),
        );
        Ok(())
    }
}

/// Refuses an output that would destroy something.
fn check_output(output: &Path, overwrite: bool, sources: &[&Path]) -> Result<()> {
    let shown = output.display();
    let named = output.file_name().is_some();
    let nameless = || Error::usage(format!("--output-dir {shown}: expected the name of a folder, such as merged"));
    if !output.exists() {
        return if named { Ok(()) } else { Err(nameless()) };
    }
    ensure!(output.is_dir(), "{shown}: expected a folder to write to, found a file");
    let real = fs::canonicalize(output).at(output)?;
    for source in sources {
        let source_real = fs::canonicalize(source).at(source)?;
        ensure!(
            !source_real.starts_with(&real),
            "{shown}: this folder holds what is merged ({}); choose another --output-dir",
            source.display()
        );
    }
    if !named {
        return Err(nameless());
    }
    if fs::read_dir(output).at(output)?.next().is_none() {
        return Ok(());
    }
    if !overwrite {
        return Err(Error::usage(format!(
            "{shown}: exists and is not empty; pass --overwrite to replace the model in it, or choose another --output-dir"
        )));
    }
    ensure!(
        output.join("config.json").is_file(),
        "{shown}: --overwrite replaces a model folder, found no config.json in it; choose another --output-dir"
    );
    Ok(())
}

/// The base's configuration with the tokens that the adapter was trained to begin and end with, where its folder says them.
fn with_end_of(adapter: &Path, mut config: ModelConfig) -> Result<ModelConfig> {
    let path = adapter.join("generation_config.json");
    if !path.is_file() {
        return Ok(config);
    }
    let said = read_json(&path)?;
    let id = |v: &serde_json::Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    let eos = &said["eos_token_id"];
    if let Some(end) = id(eos).or_else(|| eos.as_array().and_then(|list| id(list.first()?))) {
        config.eos_token_ids = vec![end];
    }
    config.bos_token_id = id(&said["bos_token_id"]).or(config.bos_token_id);
    config.pad_token_id = id(&said["pad_token_id"]).or(config.pad_token_id);
    Ok(config)
}

/// Some document over the whole vocabulary, the same for every merge of a model.
fn sample(config: &ModelConfig) -> MicroBatch {
    let n = CHECK_TOKENS.min(config.max_position);
    let stream = Stream::new(&[u64::from_le_bytes(*b"mergetst")]);
    let token = |i: usize| ((stream.f64_at(i as u64) * config.n_classes as f64) as usize).min(config.n_classes - 1);
    MicroBatch {
        tokens: (0..n).map(|i| token(i) as i32).collect(),
        targets: vec![crate::batch::IGNORE; n],
        doc_start: vec![0; n],
        n_valid: 0,
        samples: vec![0],
    }
}

fn folder_size(dir: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in fs::read_dir(dir).at(dir)? {
        total += entry.and_then(|e| e.metadata()).at(dir)?.len();
    }
    Ok(total)
}
