//! `ringtune pack`: data sets to token files, which `sft` and `pretrain` take in place of the data sets.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::data;
use super::open::DEFAULT_SEQ_LEN;
use crate::data::pretrain;
use crate::data::pretrain::PretrainDataSpec;
use crate::data::sft::token_file_of;
use crate::data::token_file::TokenFile;
use crate::data::train_set::Tokens;
use crate::error::{Error, Result};
use crate::files::{At, Scratch, check_replaces, create_dir_all, parent, sync_dir, takes_a_stream};
use crate::say;
use crate::say::Out;
use crate::settings::{Content, Resolved, Settings};
use crate::text::{grouped, short_names};

/// Writes `output`: one token file for one data set; a folder with `NAME.tok` for each of several, with names apart.
///
/// # Errors
/// As the preparation of `sft` and `pretrain`; usage errors for missing settings or mixed content.
pub fn run(resolved: &Resolved) -> Result<()> {
    let settings = &resolved.settings;
    let paths = data::paths(resolved)?;
    let output = resolved.required(&settings.output, "output")?;
    let targets = targets(&paths, &output)?;
    let folder = match output.parent().filter(|p| !p.as_os_str().is_empty()) {
        Some(parent) if paths.len() == 1 && !output.is_dir() => parent.to_path_buf(),
        _ if paths.len() > 1 || output.is_dir() => output.clone(),
        _ => PathBuf::from("."),
    };
    if let Some(target) = targets.iter().find(|target| takes_a_stream(target)) {
        return Err(Error::usage(format!(
            "--output: expected the name of a file, found a pipe or device: {}",
            target.display()
        )));
    }
    for target in &targets {
        check_replaces("--output", target, "token file", TokenFile::is_token_file)?;
    }
    create_dir_all(&folder)?;
    // Others may pack the same data into this folder at the same time.
    let scratch = Scratch::within(&folder)?;
    let mut tokenizer = data::tokenizer(resolved)?;
    let texts: Vec<bool> = paths.iter().map(|p| is_text(settings, p)).collect();
    if texts.contains(&true) && texts.contains(&false) {
        return Err(Error::usage("dataset_paths: expected rows alone or text alone, found both; pack them one by one"));
    }
    let mut out = Out::new();
    if texts[0] {
        let spec = PretrainDataSpec {
            paths: paths.clone(),
            val_paths: Vec::new(),
            weights: None,
            weight_unit: crate::data::mix::WeightUnit::Samples,
            epoch_samples: None,
            val_fraction: 0.0,
            max_seq_len: settings.train.max_seq_len.unwrap_or(DEFAULT_SEQ_LEN),
            packing: true,
            seed: 0,
            columns: data::text_columns(settings)?,
            raw_width: settings.data.raw_width,
            cache_dir: scratch.path().to_path_buf(),
        };
        for (path, target) in paths.iter().zip(&targets) {
            let progress = data::progress(settings);
            match pretrain::tokens_of(path, &spec, &tokenizer, progress, &mut note)? {
                Tokens::File(file) => finish(&mut out, &file, path, target)?,
                Tokens::Raw(_) => {
                    return Err(Error::usage(format!(
                        "{}: these are tokens already; give the file to pretrain as it is",
                        path.display()
                    )));
                }
            }
        }
    } else {
        let template = data::template(settings, &mut tokenizer)?;
        let mut spec = data::row_spec(settings, settings.train.max_seq_len.unwrap_or(DEFAULT_SEQ_LEN), None)?;
        spec.cache_dir = scratch.path().to_path_buf();
        for (path, target) in paths.iter().zip(&targets) {
            let progress = data::progress(settings);
            let file = token_file_of(path, &spec, &tokenizer, &template, progress, &mut note)?;
            finish(&mut out, &file, path, target)?;
        }
    }
    out.flush()?;
    Ok(())
}

/// What the preparation says, but for the names of files that are about to move.
fn note(line: String) {
    if !line.starts_with("wrote ") {
        say::note(&line);
    }
}

/// `.bin` and `.txt` hold text to pretrain on, anything else rows, unless the setting says otherwise.
fn is_text(settings: &Settings, path: &Path) -> bool {
    match settings.data.content {
        Some(content) => content == Content::Text,
        None => path.extension().is_some_and(|e| e == "txt" || e == "bin"),
    }
}

/// Where each token file goes.
fn targets(paths: &[PathBuf], output: &Path) -> Result<Vec<PathBuf>> {
    if paths.len() == 1 && !output.is_dir() {
        return Ok(vec![output.to_path_buf()]);
    }
    if output.is_file() {
        let n = paths.len();
        return Err(Error::usage(format!(
            "--output: expected a folder for {n} data sets, found the file {}",
            output.display()
        )));
    }
    let names: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
    Ok(short_names(&names).into_iter().map(|name| output.join(format!("{name}.tok"))).collect())
}

/// Moves a token file to its name and prints what is in it.
fn finish(out: &mut Out, file: &TokenFile, source: &Path, target: &Path) -> Result<()> {
    if file.path() == source {
        return Err(Error::usage(format!("{}: this is a token file already", source.display())));
    }
    std::fs::rename(file.path(), target).at(target)?;
    sync_dir(&parent(target))?;
    writeln!(
        out,
        "{}: {} documents, {} tokens, {} supervised, from {}",
        target.display(),
        grouped(file.n_docs() as u64),
        grouped(file.n_tokens()),
        grouped(file.n_supervised()),
        source.display()
    )?;
    Ok(())
}
