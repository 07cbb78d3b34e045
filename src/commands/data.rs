//! From settings to tokenizer, template and data: what `sft`, `pretrain`, `pack` and `inspect` share.

use std::path::{Path, PathBuf};

use super::jobs::{PretrainJob, SftJob};
use super::startup::DEFAULT_SEQ_LEN;
use crate::data::cache;
use crate::data::encode::Overflow;
use crate::data::jsonl::{BadRows, RowOptions};
use crate::data::mix::WeightUnit;
use crate::data::pretrain::PretrainDataSpec;
use crate::data::progress::Progress;
use crate::data::raw_tokens::RawWidth;
use crate::data::sft::{RowSpec, SftDataSpec};
use crate::data::template::{Template, TemplateOptions};
use crate::data::tokenizer::{SpecialIds, Tokenizer};
use crate::error::{Error, Result};
use crate::hf;
use crate::settings::{Resolved, find_config};

/// The tokenizer of `tokenizer_path`, or the one in the model's folder.
///
/// # Errors
/// If none is named or found, or it is not one that can be trained with.
pub fn tokenizer(settings: &Resolved) -> Result<Tokenizer> {
    let special = special_ids(settings)?;
    let model = settings.opt_path("model_path");
    let path = match settings.path("tokenizer_path") {
        Some(path) => path,
        None => {
            let beside = model.as_deref().and_then(Tokenizer::in_folder);
            beside.ok_or_else(|| settings.missing("tokenizer_path"))?
        }
    };
    Tokenizer::open_beside(&path, special, model.as_deref())
}

fn special_ids(settings: &Resolved) -> Result<SpecialIds> {
    SpecialIds::parse(settings.text("special_ids").expect("the setting has a default"))
}

/// The template, with the tokenizer's names of BOS and EOS; adds ChatML's tokens to a tokenizer that lacks them.
///
/// # Errors
/// If the template is unknown or does not parse.
pub fn template(settings: &Resolved, tokenizer: &mut Tokenizer) -> Result<Template> {
    let options = TemplateOptions {
        supervise_turn_newline: settings.bool("supervise_turn_newline"),
        names: tokenizer.control_names(),
    };
    let template = Template::load(settings.text("prompt_template").expect("the setting has a default"), options)?;
    if template.needs_chatml() {
        tokenizer.add_chatml();
    }
    Ok(template)
}

/// Longest row in tokens: the setting, which must not exceed the model's maximum, or that maximum up to 1024.
///
/// # Errors
/// A usage error when the setting is longer than the model's maximum.
pub fn max_seq_len(settings: &Resolved, model: Option<(&Path, usize)>) -> Result<usize> {
    let Some(asked) = settings.int("max_seq_len") else {
        return Ok(model.map_or(DEFAULT_SEQ_LEN, |m| m.1.min(DEFAULT_SEQ_LEN)));
    };
    match model {
        Some((path, max)) if asked > max as u64 => Err(Error::usage(format!(
            "{}: {asked} is longer than the model's maximum; expected at most {max} (max_position_embeddings of {})",
            settings.named("max_seq_len"),
            path.display()
        ))),
        _ => usize::try_from(asked).map_err(|_| Error::usage(format!("max_seq_len: {asked} is too long"))),
    }
}

/// As [`max_seq_len`], for the model of `model_path`; without one the setting counts alone.
///
/// # Errors
/// As [`max_seq_len`]; or if the model's config.json is missing or wrong.
pub fn max_seq_len_of_model(settings: &Resolved) -> Result<usize> {
    match settings.opt_path("model_path") {
        Some(path) => {
            let max = hf::config::read(&path)?.model.max_position;
            max_seq_len(settings, Some((&path, max)))
        }
        None => max_seq_len(settings, None),
    }
}

/// Whether progress is shown.
pub fn progress(settings: &Resolved) -> Progress {
    if settings.bool("quiet") { Progress::Hide } else { Progress::Show }
}

/// What decides the tokens of rows. `skip_log` is where skipped rows are named.
pub fn row_spec(settings: &Resolved, max_seq_len: usize, skip_log: Option<PathBuf>) -> RowSpec {
    RowSpec {
        max_seq_len,
        overflow: match settings.text("overflow") {
            Some("drop") => Overflow::Drop,
            _ => Overflow::Truncate,
        },
        rows: RowOptions {
            bad_rows: if settings.bool("skip_bad_rows") { BadRows::Skip } else { BadRows::Fail },
            ..RowOptions::default()
        },
        skip_log,
        cache_dir: cache_dir(settings),
    }
}

/// What decides the data of `sft`.
///
/// # Errors
/// A usage error without data sets.
pub fn sft_spec(settings: &Resolved, max_seq_len: usize, skip_log: Option<PathBuf>) -> Result<SftDataSpec> {
    Ok(SftDataSpec {
        paths: paths(settings)?,
        weights: settings.floats("dataset_weights"),
        weight_unit: weight_unit(settings),
        epoch_samples: settings.int("epoch_samples"),
        val_fraction: settings.float("val_fraction").expect("the setting has a default"),
        packing: settings.bool("packing"),
        seed: settings.int("seed").expect("the setting has a default"),
        row: row_spec(settings, max_seq_len, skip_log),
    })
}

/// What decides the data of `pretrain`.
///
/// # Errors
/// A usage error without data sets.
pub fn pretrain_spec(settings: &Resolved, max_seq_len: usize) -> Result<PretrainDataSpec> {
    Ok(PretrainDataSpec {
        paths: paths(settings)?,
        val_paths: settings.texts("val_paths").into_iter().map(PathBuf::from).collect(),
        weights: settings.floats("dataset_weights"),
        weight_unit: weight_unit(settings),
        epoch_samples: settings.int("epoch_samples"),
        val_fraction: settings.float("val_fraction").expect("the setting has a default"),
        max_seq_len,
        packing: settings.bool("packing"),
        seed: settings.int("seed").expect("the setting has a default"),
        raw_width: raw_width(settings),
        cache_dir: cache_dir(settings),
    })
}

/// The data sets.
///
/// # Errors
/// A usage error without any.
pub fn paths(settings: &Resolved) -> Result<Vec<PathBuf>> {
    let paths = settings.texts("dataset_paths");
    if paths.is_empty() {
        return Err(settings.missing("dataset_paths"));
    }
    Ok(paths.into_iter().map(PathBuf::from).collect())
}

/// Size of raw tokens, where a setting says it.
pub fn raw_width(settings: &Resolved) -> Option<RawWidth> {
    match settings.text("raw_width") {
        Some("u16") => Some(RawWidth::U16),
        Some(_) => Some(RawWidth::U32),
        None => None,
    }
}

fn weight_unit(settings: &Resolved) -> WeightUnit {
    let name = settings.text("weight_unit").expect("the setting has a default");
    WeightUnit::parse(name).expect("the table lists the units")
}

fn cache_dir(settings: &Resolved) -> PathBuf {
    settings.opt_path("cache_dir").unwrap_or_else(cache::default_dir)
}

/// What `sft` is asked to do.
///
/// # Errors
/// Usage errors for settings that are missing or contradict each other.
pub fn sft_job(settings: &Resolved) -> Result<SftJob> {
    let model_path = settings.required_path("model_path")?;
    let output_dir = settings.required_path("output_dir")?;
    let skip_log = Some(output_dir.join("skipped_rows.txt"));
    Ok(SftJob {
        // The row length waits for the model: the command sets it.
        data: sft_spec(settings, DEFAULT_SEQ_LEN, skip_log)?,
        model_path,
        tokenizer_path: settings.path("tokenizer_path"),
        special_ids: special_ids(settings)?,
        prompt_template: settings.text("prompt_template").expect("the setting has a default").into(),
        supervise_turn_newline: settings.bool("supervise_turn_newline"),
        pad_vocab_to: settings.int("pad_vocab_to").map(|n| n as usize),
        output_dir,
        settings: settings.train_settings(),
        resolved: settings.resolved_settings(),
    })
}

/// What `pretrain` is asked to do.
///
/// # Errors
/// Usage errors for settings that are missing, or a model config that is not found.
pub fn pretrain_job(settings: &Resolved) -> Result<PretrainJob> {
    let config = settings.required_path("model_config")?;
    let source = find_config(&config.to_string_lossy())?;
    Ok(PretrainJob {
        config_name: config.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        config_text: source.text,
        tokenizer_path: settings.required_path("tokenizer_path")?,
        special_ids: special_ids(settings)?,
        data: pretrain_spec(settings, DEFAULT_SEQ_LEN)?,
        output_dir: settings.required_path("output_dir")?,
        settings: settings.train_settings(),
        resolved: settings.resolved_settings(),
    })
}
