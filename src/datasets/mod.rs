//! `ringtune prepare`: Dolly 15k, OASST1 and Alpaca to JSONL rows, from the hub or from a folder.

mod download;
mod instruction;
mod oasst;
mod records;
mod rows;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

pub use download::{Downloader, RemoteFile};
pub use oasst::Paths;
use serde_json::Value;

use crate::error::{Context, Error, Result};
use crate::files::{create_dir_all, write_atomic};
use crate::words::{Words, words};
use crate::{bail, say};

/// A data set that `prepare` knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dataset {
    /// databricks-dolly-15k: about 15 k instructions written by people. CC BY-SA 3.0.
    Dolly15k,
    /// OpenAssistant conversations, English. Apache-2.0.
    Oasst1,
    /// Stanford Alpaca: 52 k instructions made by a model. CC BY-NC 4.0.
    Alpaca,
}

words!(Dataset { Dolly15k = "dolly15k", Oasst1 = "oasst1", Alpaca = "alpaca" });

impl Dataset {
    /// All of them, in the order of `--dataset all`.
    pub const ALL: [Self; 3] = [Self::Dolly15k, Self::Oasst1, Self::Alpaca];

    /// File name of the result.
    pub fn output(self) -> &'static str {
        match self {
            Self::Dolly15k => "dolly15k.jsonl",
            Self::Oasst1 => "oasst1_en.jsonl",
            Self::Alpaca => "alpaca.jsonl",
        }
    }

    /// The upstream file.
    fn remote(self) -> RemoteFile {
        match self {
            Self::Dolly15k => {
                RemoteFile { repo: "databricks/databricks-dolly-15k", path: "databricks-dolly-15k.jsonl" }
            }
            Self::Oasst1 => RemoteFile { repo: "OpenAssistant/oasst1", path: "2023-04-12_oasst_ready.trees.jsonl.gz" },
            Self::Alpaca => {
                RemoteFile { repo: "tatsu-lab/alpaca", path: "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet" }
            }
        }
    }

    /// What the name of a local copy contains, and the keys its records have.
    fn marks(self) -> (&'static str, &'static [&'static [&'static str]]) {
        match self {
            Self::Dolly15k => ("dolly", &[&["instruction", "context", "response"]]),
            Self::Oasst1 => ("oasst", &[&["message_tree_id", "prompt"], &["message_id", "role", "text"]]),
            Self::Alpaca => ("alpaca", &[&["instruction", "output"]]),
        }
    }
}

/// What to prepare.
#[derive(Clone, Debug)]
pub struct PrepareSpec {
    /// Which data sets.
    pub datasets: Vec<Dataset>,
    /// Where the JSONL files go.
    pub output_dir: PathBuf,
    /// A folder with copies of the upstream files instead of the hub.
    pub source_dir: Option<PathBuf>,
    /// Where downloads are kept; `None`: the user's cache folder.
    pub cache_dir: Option<PathBuf>,
    /// OASST1 as whole conversations.
    pub multi_turn: bool,
    /// OASST1: which branches.
    pub paths: Paths,
}

/// What became of one data set.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Which one.
    pub dataset: Dataset,
    /// The file that was read.
    pub source: PathBuf,
    /// The file that was written.
    pub output: PathBuf,
    /// Records in the upstream file.
    pub records: usize,
    /// Rows written.
    pub kept: usize,
    /// Reason and count of what was dropped.
    pub dropped: BTreeMap<&'static str, usize>,
}

/// Prepares every data set of the spec.
///
/// # Errors
/// If a file cannot be downloaded, read, converted or written; files finished before stay, none is left half written.
pub fn run(spec: &PrepareSpec) -> Result<Vec<Prepared>> {
    create_dir_all(&spec.output_dir)?;
    spec.datasets.iter().map(|&d| prepare(spec, d).map_err(|e| e.context(d.word()))).collect()
}

fn prepare(spec: &PrepareSpec, dataset: Dataset) -> Result<Prepared> {
    let source = match &spec.source_dir {
        Some(dir) => find(dir, dataset)?,
        None => Downloader::from_env(spec.cache_dir.clone())?.fetch(dataset.remote())?,
    };
    let records = records::read(&source)?;
    let converted = match dataset {
        Dataset::Dolly15k => instruction::convert(&records, instruction::DOLLY),
        Dataset::Alpaca => instruction::convert(&records, instruction::ALPACA),
        Dataset::Oasst1 => oasst::convert(&records, oasst::Options { paths: spec.paths, multi_turn: spec.multi_turn }),
    };
    let collected = converted.map_err(|e| Error::new(format!("{}: {e}", source.display())))?;
    if collected.rows.is_empty() {
        bail!("{}: no usable row in {} records; is it the right file?", source.display(), records.len());
    }
    let output = spec.output_dir.join(dataset.output());
    write_atomic(&output, |out| Ok(collected.rows.iter().try_for_each(|row| writeln!(out, "{}", row.to_json()))?))?;
    let kept = collected.rows.len();
    Ok(Prepared { dataset, source, output, records: records.len(), kept, dropped: collected.dropped })
}

/// The copy of a data set in a folder: under its upstream name, else the one file whose name and first record fit.
fn find(dir: &Path, dataset: Dataset) -> Result<PathBuf> {
    let upstream = dataset.remote().path;
    for name in [upstream, upstream.rsplit('/').next().unwrap_or(upstream)] {
        let path = dir.join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    let (mark, shapes) = dataset.marks();
    let mut names: Vec<PathBuf> = fs::read_dir(dir)
        .context(|| format!("--source-dir {}", dir.display()))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|p| p.is_file() && p.file_name().is_some_and(|n| n.to_string_lossy().to_lowercase().contains(mark)))
        .collect();
    names.sort();
    let fits = |p: &PathBuf| {
        let first = records::read(p).ok().and_then(|r| r.into_iter().next());
        first.is_some_and(|r: Value| shapes.iter().any(|keys| keys.iter().all(|k| r.get(k).is_some())))
    };
    let mut found: Vec<PathBuf> = names.iter().filter(|p| fits(p)).cloned().collect();
    if found.is_empty() {
        let seen: Vec<String> = names.iter().map(|p| p.display().to_string()).collect();
        bail!(
            "--source-dir {}: no file for {}; expected {} or a JSONL, JSON or Parquet file (gzip too) with \"{mark}\" in its \
             name; found {}",
            dir.display(),
            dataset.word(),
            upstream,
            if seen.is_empty() { "none".to_string() } else { seen.join(", ") }
        );
    }
    // Trees carry the order of replies, so they come first; the rest in order of name.
    found.sort_by_key(|p| !p.to_string_lossy().contains("tree"));
    if found.len() > 1 {
        let others: Vec<String> = found[1..].iter().map(|p| p.display().to_string()).collect();
        let (name, chosen) = (dataset.word(), found[0].display());
        say::note(&format!("note: {name} is read from {chosen}; left alone: {}", others.join(", ")));
    }
    Ok(found.swap_remove(0))
}
