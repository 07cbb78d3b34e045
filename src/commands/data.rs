//! From settings to tokenizer, template and data: what `sft`, `pretrain`, `pack` and `inspect` share.

use std::path::{Path, PathBuf};

use super::jobs::{PretrainJob, SftJob};
use super::open::{self, DEFAULT_SEQ_LEN, TemplateArgs};
use crate::data::cache;
use crate::data::columns::Columns;
use crate::data::jsonl::{BadRows, RowOptions};
use crate::data::named::files_of;
use crate::data::pretrain::PretrainDataSpec;
use crate::data::progress::Progress;
use crate::data::sft::{RowSpec, SftDataSpec};
use crate::data::template::Template;
use crate::data::tokenizer::{SpecialIds, Tokenizer};
use crate::error::{Error, Result};
use crate::files::may_write;
use crate::hf;
use crate::say;
use crate::settings::{Resolved, Settings, find_config};

/// The tokenizer of `tokenizer_path`, or the one in the model's folder.
///
/// # Errors
/// If none is named or found, or it is not one that can be trained with.
pub fn tokenizer(resolved: &Resolved) -> Result<Tokenizer> {
    let s = &resolved.settings.model;
    let folders: Vec<&Path> = s.path.as_deref().into_iter().collect();
    if s.tokenizer.is_none() && folders.iter().all(|d| Tokenizer::in_folder(d).is_none()) {
        return Err(resolved.missing("tokenizer_path"));
    }
    open::tokenizer(s.tokenizer.as_deref(), &folders, SpecialIds::parse(&s.special_ids)?)
}

/// The template; see [`open::template`].
///
/// # Errors
/// As [`open::template`].
pub fn template(settings: &Settings, tokenizer: &mut Tokenizer) -> Result<Template> {
    let folders: Vec<&Path> = settings.model.path.as_deref().into_iter().collect();
    open::template(&TemplateArgs::of(settings)?, &folders, "chatml", tokenizer)
}

/// Longest row in tokens: see [`open::row_length`]; without a model the setting counts alone.
///
/// # Errors
/// As [`open::row_length`]; or if the model's config.json is missing or wrong.
pub fn max_seq_len_of_model(resolved: &Resolved) -> Result<usize> {
    let asked = resolved.settings.train.max_seq_len;
    match &resolved.settings.model.path {
        Some(path) => open::row_length(asked, hf::config::read(path)?.model.max_position),
        None => Ok(asked.unwrap_or(DEFAULT_SEQ_LEN)),
    }
}

/// Whether progress is shown.
pub fn progress(settings: &Settings) -> Progress {
    if settings.train.quiet { Progress::Hide } else { Progress::Show }
}

/// What decides the tokens of rows. `skip_log` is where skipped rows are named.
///
/// # Errors
/// As [`row_options`].
pub fn row_spec(settings: &Settings, max_seq_len: usize, skip_log: Option<PathBuf>) -> Result<RowSpec> {
    Ok(RowSpec {
        max_seq_len,
        overflow: settings.data.overflow,
        rows: row_options(settings)?,
        skip_log,
        cache_dir: cache_dir(settings),
    })
}

/// How rows are read.
///
/// # Errors
/// A usage error for columns that are none.
pub fn row_options(settings: &Settings) -> Result<RowOptions> {
    let bad_rows = if settings.data.skip_bad_rows { BadRows::Skip } else { BadRows::Fail };
    Ok(RowOptions { bad_rows, columns: Columns::parse(&settings.data.columns)?, ..RowOptions::default() })
}

/// What decides the data of `sft`.
///
/// # Errors
/// A usage error without data sets.
pub fn sft_spec(resolved: &Resolved, max_seq_len: usize, skip_log: Option<PathBuf>) -> Result<SftDataSpec> {
    let settings = &resolved.settings;
    Ok(SftDataSpec {
        paths: paths(resolved)?,
        val_paths: named(&settings.data.val_paths)?,
        weights: settings.data.weights.clone(),
        weight_unit: settings.data.weight_unit,
        epoch_samples: settings.data.epoch_samples,
        val_fraction: settings.data.val_fraction,
        packing: settings.data.packing,
        seed: settings.train.seed,
        row: row_spec(settings, max_seq_len, skip_log)?,
    })
}

/// What decides the data of `pretrain`.
///
/// # Errors
/// A usage error without data sets.
pub fn pretrain_spec(resolved: &Resolved, max_seq_len: usize) -> Result<PretrainDataSpec> {
    let settings = &resolved.settings;
    Ok(PretrainDataSpec {
        paths: paths(resolved)?,
        val_paths: named(&settings.data.val_paths)?,
        weights: settings.data.weights.clone(),
        weight_unit: settings.data.weight_unit,
        epoch_samples: settings.data.epoch_samples,
        val_fraction: settings.data.val_fraction,
        max_seq_len,
        packing: settings.data.packing,
        seed: settings.train.seed,
        columns: text_columns(settings)?,
        raw_width: settings.data.raw_width,
        cache_dir: cache_dir(settings),
    })
}

/// The column that holds text.
///
/// # Errors
/// A usage error where another field is named.
pub fn text_columns(settings: &Settings) -> Result<Columns> {
    let pairs = &settings.data.columns;
    match pairs.iter().find(|p| !p.starts_with("text=")) {
        Some(other) => {
            Err(Error::usage(format!("columns: expected text=COLUMN for text to pretrain on, found {other:?}")))
        }
        None => Columns::parse(pairs),
    }
}

/// The data sets' files.
///
/// # Errors
/// A usage error without any, or with another number of weights; as [`files_of`].
pub fn paths(resolved: &Resolved) -> Result<Vec<PathBuf>> {
    let data = &resolved.settings.data;
    if data.paths.is_empty() {
        return Err(resolved.missing("dataset_paths"));
    }
    let files = named(&data.paths)?;
    match &data.weights {
        Some(weights) if weights.len() != files.len() => Err(Error::usage(format!(
            "dataset_weights: expected one for each of the {} files that dataset_paths stand for, found {}: {}",
            files.len(),
            weights.len(),
            files.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
        ))),
        _ => Ok(files),
    }
}

/// The files of names; what a folder holds besides is said.
///
/// # Errors
/// As [`files_of`].
pub fn named(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        let found = files_of(path)?;
        let left_out: Vec<_> = found.left_out.iter().map(|p| p.display().to_string()).collect();
        if !left_out.is_empty() {
            say::note(&format!(
                "{}: left out, by their names no training data: {}",
                path.display(),
                left_out.join(", ")
            ));
        }
        files.extend(found.files);
    }
    Ok(files)
}

/// Where token files are kept.
pub fn cache_dir(settings: &Settings) -> PathBuf {
    let usual = || {
        let dir = cache::default_dir();
        if may_write(&dir) || std::env::var_os("RINGTUNE_CACHE").is_some() {
            return dir;
        }
        // A home that is read-only, as in containers: nobody asked for this folder by name.
        // SAFETY: it cannot fail.
        let instead = std::env::temp_dir().join(format!("ringtune-{}", unsafe { libc::getuid() }));
        say::note(&format!(
            "{}: cannot be written to; token files go to {} (--cache-dir and RINGTUNE_CACHE name another folder)",
            dir.display(),
            instead.display()
        ));
        instead
    };
    settings.data.cache_dir.clone().unwrap_or_else(usual)
}

/// What `sft` is asked to do.
///
/// # Errors
/// Usage errors for settings that are missing or contradict each other.
pub fn sft_job(resolved: &Resolved) -> Result<SftJob> {
    let s = &resolved.settings;
    resolved.require_all(&["model_path", "dataset_paths", "output_dir"])?;
    let model_path = resolved.required(&s.model.path, "model_path")?;
    let output_dir = resolved.required(&s.output_dir, "output_dir")?;
    let skip_log = Some(output_dir.join("skipped_rows.txt"));
    Ok(SftJob {
        // The row length waits for the model: the command sets it.
        data: sft_spec(resolved, DEFAULT_SEQ_LEN, skip_log)?,
        model_path,
        tokenizer_path: s.model.tokenizer.clone(),
        special_ids: SpecialIds::parse(&s.model.special_ids)?,
        template: TemplateArgs::of(s)?,
        pad_vocab_to: s.model.pad_vocab_to,
        device: s.device.clone(),
        output_dir,
        settings: s.train.clone(),
        resolved: resolved.lines(),
    })
}

/// What `pretrain` is asked to do.
///
/// # Errors
/// Usage errors for settings that are missing, or a model config that is not found.
pub fn pretrain_job(resolved: &Resolved) -> Result<PretrainJob> {
    let s = &resolved.settings;
    resolved.require_all(&["model_config", "tokenizer_path", "dataset_paths", "output_dir"])?;
    let config = resolved.required(&s.model.config, "model_config")?;
    let source = find_config(&config.to_string_lossy())?;
    Ok(PretrainJob {
        config_name: config.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        config_text: source.text,
        tokenizer_path: resolved.required(&s.model.tokenizer, "tokenizer_path")?,
        special_ids: SpecialIds::parse(&s.model.special_ids)?,
        data: pretrain_spec(resolved, DEFAULT_SEQ_LEN)?,
        device: s.device.clone(),
        output_dir: resolved.required(&s.output_dir, "output_dir")?,
        settings: s.train.clone(),
        resolved: resolved.lines(),
    })
}
