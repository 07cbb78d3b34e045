//! Training checkpoints: folders `checkpoint-N` that appear only when every byte of them is on disk.
//!
//! A folder is written under a temporary name, each file is fsynced by who writes it and the folder here, `manifest.json` with sizes and hashes comes
//! last, then the folder is renamed and its parent fsynced. A crash at any instant leaves either the finished folder or a
//! temporary one, which is never chosen and is cleaned up by the next run.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::{At, create_dir_all, nearby, parent, publish_dir, read_text, sync_dir, write_json, write_synced};
use crate::{bail, ensure};

/// Name of the manifest in a checkpoint.
pub const MANIFEST: &str = "manifest.json";
const FORMAT: &str = "ringtune checkpoint";
const VERSION: u32 = 1;
const PREFIX: &str = "checkpoint-";

/// Where the checkpoint of a step lies: `output_dir/checkpoint-STEP`.
pub fn path_of(output_dir: &Path, step: u64) -> PathBuf {
    output_dir.join(format!("{PREFIX}{step}"))
}

/// The list of a checkpoint's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    version: u32,
    /// Optimiser steps done.
    pub step: u64,
    /// Files by name.
    pub files: BTreeMap<String, FileRecord>,
}

/// What a manifest says about a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Size.
    pub bytes: u64,
    /// Hash of the content, hex.
    pub blake3: String,
}

impl FileRecord {
    /// The record of a file as it lies on the disk.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn of(path: &Path) -> Result<Self> {
        let bytes = fs::metadata(path).at(path)?.len();
        Ok(Self { bytes, blake3: hash_file(path)? })
    }
}

/// blake3 of a file's content, in hex.
///
/// # Errors
/// If the file cannot be read.
pub fn hash_file(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    File::open(path).and_then(|f| hasher.update_reader(f).map(drop)).at(path)?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// A checkpoint that is being written. Dropped before [`CheckpointWriter::finish`], it removes what it wrote.
pub struct CheckpointWriter {
    output_dir: PathBuf,
    temp: PathBuf,
    step: u64,
    finished: bool,
    /// Other ranks write into it too.
    shared: bool,
}

impl CheckpointWriter {
    /// Begins `output_dir/checkpoint-STEP` under its temporary name.
    ///
    /// # Errors
    /// If the folder cannot be created.
    pub fn begin(output_dir: &Path, step: u64) -> Result<Self> {
        create_dir_all(output_dir)?;
        let temp = output_dir.join(format!(".{PREFIX}{step}.tmp"));
        if temp.exists() {
            fs::remove_dir_all(&temp).at(&temp)?;
        }
        fs::create_dir(&temp).at(&temp)?;
        Ok(Self { output_dir: output_dir.to_path_buf(), temp, step, finished: false, shared: false })
    }

    /// As [`CheckpointWriter::begin`], of a folder into which other ranks write too. What is not finished stays for the next run to remove:
    /// their errors would hide the first one.
    ///
    /// # Errors
    /// If the folder cannot be created.
    pub fn shared(output_dir: &Path, step: u64) -> Result<Self> {
        let mut writer = Self::begin(output_dir, step)?;
        writer.shared = true;
        sync_dir(output_dir)?;
        Ok(writer)
    }

    /// The temporary folder, for functions that write files into a folder.
    pub fn dir(&self) -> &Path {
        &self.temp
    }

    /// Writes one file of the checkpoint.
    ///
    /// # Errors
    /// If it cannot be written; on a full disk the message says so.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        write_synced(&self.temp.join(name), |out| Ok(out.write_all(bytes)?))
    }

    /// Hashes every file, each fsynced by who wrote it, then writes the manifest: the folder is complete, but still under its temporary
    /// name.
    ///
    /// # Errors
    /// If a file cannot be read back, or the manifest cannot be written.
    pub fn seal(&self) -> Result<Manifest> {
        self.seal_with(&BTreeMap::new())
    }

    /// As [`CheckpointWriter::seal`]; files that others wrote are as their records say, who hashed them while they had them.
    fn seal_with(&self, records: &BTreeMap<String, FileRecord>) -> Result<Manifest> {
        let mut files = records.clone();
        for (name, record) in records {
            let path = self.temp.join(name);
            let found = fs::metadata(&path).at(&path)?.len();
            ensure!(found == record.bytes, "{}: expected {} bytes, found {found}", path.display(), record.bytes);
        }
        list_files(&self.temp, "", &mut files)?;
        ensure!(!files.is_empty(), "{}: a checkpoint without files", self.temp.display());
        let manifest = Manifest { format: FORMAT.to_string(), version: VERSION, step: self.step, files };
        let value = serde_json::to_value(&manifest).expect("a manifest always prints");
        write_json(&self.temp.join(MANIFEST), &value)?;
        Ok(manifest)
    }

    /// Seals the folder and gives it its name. Returns its path.
    ///
    /// # Errors
    /// As [`CheckpointWriter::seal`]; or if the folder cannot be renamed.
    pub fn finish(self) -> Result<PathBuf> {
        self.finish_with(&BTreeMap::new())
    }

    /// As [`CheckpointWriter::finish`], with the records of files that other ranks wrote.
    ///
    /// # Errors
    /// As [`CheckpointWriter::finish`]; or if such a file is not there in its size.
    pub fn finish_with(mut self, records: &BTreeMap<String, FileRecord>) -> Result<PathBuf> {
        self.seal_with(records).map_err(|e| self.explain(e))?;
        let path = path_of(&self.output_dir, self.step);
        let aside = self.output_dir.join(format!(".{PREFIX}{}.old", self.step));
        // A folder of this name may exist: a damaged one that the run fell back from, or one of an earlier run. It goes aside
        // first, and `clean_up` puts it back should we die before the new one has the name.
        publish_dir(&self.temp, &path, &aside)?;
        self.finished = true;
        Ok(path)
    }

    fn explain(&self, e: Error) -> Error {
        e.context(format!("checkpoint at step {} was not written, earlier ones are untouched", self.step))
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        if !self.finished && !self.shared {
            let _ = fs::remove_dir_all(&self.temp); // The error that led here is reported by the caller.
        }
    }
}

/// Hashes every file under `dir` that is not yet among `files`, and fsyncs the folders, which have the entries; the files were when they were written. Names of nested
/// files have slashes.
fn list_files(dir: &Path, prefix: &str, files: &mut BTreeMap<String, FileRecord>) -> Result<()> {
    for entry in fs::read_dir(dir).at(dir)? {
        let entry = entry.at(dir)?;
        let path = entry.path();
        let Some(name) = entry.file_name().to_str().map(|n| format!("{prefix}{n}")) else {
            bail!("{}: the name is not UTF-8", path.display());
        };
        let kind = entry.file_type().at(&path)?;
        if kind.is_dir() {
            list_files(&path, &format!("{name}/"), files)?;
            continue;
        }
        ensure!(kind.is_file(), "{}: neither a file nor a folder", path.display());
        if let Entry::Vacant(place) = files.entry(name) {
            place.insert(FileRecord::of(&path)?);
        }
    }
    sync_dir(dir)
}

/// Checks a checkpoint against its manifest: every file there, of its size, with its hash.
///
/// # Errors
/// If the manifest is missing or damaged, or a file differs from it; the message names the file.
pub fn verify(checkpoint: &Path) -> Result<Manifest> {
    let at = |e: Error| e.context(checkpoint.display().to_string());
    let manifest = read_manifest(checkpoint).map_err(at)?;
    check_files(checkpoint, &manifest).map_err(at)?;
    Ok(manifest)
}

fn read_manifest(checkpoint: &Path) -> Result<Manifest> {
    ensure!(checkpoint.is_dir(), "no such checkpoint folder{}", nearby::hint(checkpoint));
    let path = checkpoint.join(MANIFEST);
    if let (false, Some((_, newest))) = (path.is_file(), list(checkpoint)?.pop()) {
        bail!("a folder of checkpoints, not one; did you mean {}? (auto takes the newest)", newest.display());
    }
    ensure!(path.is_file(), "{MANIFEST} is missing; the checkpoint was not finished or is not one of ringtune");
    let text = read_text(&path, 64 << 20)?;
    let m: Manifest = serde_json::from_str(&text).map_err(|e| Error::new(format!("{MANIFEST} is damaged: {e}")))?;
    ensure!(m.format == FORMAT, "{MANIFEST}: expected format {FORMAT:?}, found {:?}", m.format);
    ensure!(m.version == VERSION, "{MANIFEST}: expected version {VERSION}, found {}", m.version);
    if let Some(step) = step_of(checkpoint) {
        ensure!(m.step == step, "{MANIFEST} is of step {}, the folder's name says {step}", m.step);
    }
    ensure!(!m.files.is_empty(), "{MANIFEST} lists no file");
    Ok(m)
}

fn check_files(checkpoint: &Path, manifest: &Manifest) -> Result<()> {
    for (name, record) in &manifest.files {
        let plain = Path::new(name).components().all(|c| matches!(c, std::path::Component::Normal(_)));
        ensure!(plain, "{MANIFEST}: {name:?} is not the name of a file in the checkpoint");
        let path = checkpoint.join(name);
        let Ok(meta) = fs::metadata(&path) else { bail!("{name} is missing") };
        let (want, got) = (record.bytes, meta.len());
        ensure!(want == got, "{name}: expected {want} bytes, found {got}");
    }
    // Sizes first: they are cheap and catch most damage before gigabytes are hashed.
    for (name, record) in &manifest.files {
        let found = hash_file(&checkpoint.join(name))?;
        ensure!(found == record.blake3, "{name}: its content differs from the hash in {MANIFEST}");
    }
    Ok(())
}

/// The step in the folder's name, where it has the form `checkpoint-N`.
pub fn step_of(checkpoint: &Path) -> Option<u64> {
    let digits = checkpoint.file_name()?.to_str()?.strip_prefix(PREFIX)?;
    let step = digits.parse().ok()?;
    (format!("{step}") == digits).then_some(step)
}

/// Finished checkpoints of a run, oldest first. A folder that does not exist has none.
///
/// # Errors
/// If the folder cannot be read.
pub fn list(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in entries(output_dir)? {
        if let Some(step) = step_of(&entry).filter(|_| entry.is_dir()) {
            found.push((step, entry));
        }
    }
    found.sort();
    Ok(found)
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.and_then(|r| r.map(|e| e.map(|e| e.path())).collect()).at(dir),
    }
}

/// What `--resume-from-checkpoint auto` found.
#[derive(Debug, Default)]
pub struct AutoResume {
    /// The newest checkpoint whose manifest verifies.
    pub chosen: Option<PathBuf>,
    /// Newer ones that were passed over, with the reason.
    pub passed_over: Vec<(PathBuf, Error)>,
}

/// Finds the newest checkpoint that verifies.
///
/// # Errors
/// If the folder cannot be read, or holds checkpoints of which none verifies: then starting at step 0 has to be the user's own
/// decision.
pub fn find_newest(output_dir: &Path) -> Result<AutoResume> {
    let mut result = AutoResume::default();
    for (_, path) in list(output_dir)?.into_iter().rev() {
        match verify(&path) {
            Ok(_) => {
                result.chosen = Some(path);
                return Ok(result);
            }
            Err(e) => result.passed_over.push((path, e)),
        }
    }
    if let Some((_, e)) = result.passed_over.pop() {
        let n = result.passed_over.len() + 1;
        let message = format!("none of the {n} checkpoints in {} can be resumed", output_dir.display());
        return Err(e.context(message));
    }
    Ok(result)
}

/// Removes what a crash left behind: unfinished and half-removed folders. A checkpoint that was being replaced gets its name back.
///
/// # Errors
/// If a folder cannot be removed.
pub fn clean_up(output_dir: &Path) -> Result<()> {
    for path in entries(output_dir)? {
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
            continue;
        };
        let Some((base, kind)) = name.strip_prefix('.').and_then(|n| n.rsplit_once('.')) else {
            continue;
        };
        let original = output_dir.join(base);
        if step_of(&original).is_none() || !path.is_dir() {
            continue;
        }
        match kind {
            "old" if !original.exists() => fs::rename(&path, &original).at(&path)?,
            "tmp" | "old" | "del" => fs::remove_dir_all(&path).at(&path)?,
            _ => {}
        }
    }
    Ok(())
}

/// Removes the oldest checkpoints so that `keep` remain besides `best`. Neither `best` nor the newest one that verifies is ever
/// removed. Returns what was removed. `known_good` (the one just written) is taken to verify without reading it again.
///
/// # Errors
/// If a folder cannot be removed.
pub fn rotate(output_dir: &Path, keep: usize, best: Option<&Path>, known_good: Option<&Path>) -> Result<Vec<PathBuf>> {
    assert!(keep > 0, "rotation that keeps nothing");
    let same = |a: &Path, b: Option<&Path>| b.is_some_and(|b| a.file_name() == b.file_name());
    let all = list(output_dir)?;
    let others: Vec<&PathBuf> = all.iter().map(|(_, p)| p).filter(|p| !same(p, best)).collect();
    let Some(excess) = others.len().checked_sub(keep).filter(|&n| n > 0) else {
        return Ok(Vec::new());
    };
    let newest_valid = all.iter().rev().map(|(_, p)| p).find(|p| same(p, known_good) || verify(p).is_ok());
    let mut removed = Vec::new();
    for path in others.into_iter().take(excess).filter(|p| Some(*p) != newest_valid) {
        remove(path)?;
        removed.push(path.clone());
    }
    Ok(removed)
}

/// Copies a checkpoint that verifies into another run's folder. Returns its path there.
///
/// # Errors
/// If it does not verify or cannot be written.
pub fn copy(checkpoint: &Path, output_dir: &Path) -> Result<PathBuf> {
    let manifest = verify(checkpoint)?;
    let writer = CheckpointWriter::begin(output_dir, manifest.step)?;
    for name in manifest.files.keys() {
        let (from, to) = (checkpoint.join(name), writer.dir().join(name));
        create_dir_all(&parent(&to))?;
        fs::copy(&from, &to).at(&to)?;
    }
    writer.finish()
}

/// Gives the checkpoints that a run leaves behind when it goes back to `resumed`, after `step` steps, other names, so that none of
/// them is taken for its own: all of later steps, and all where `resumed` lies in another folder. Returns the old and new paths.
///
/// # Errors
/// If a folder cannot be renamed.
pub fn set_aside(output_dir: &Path, resumed: &Path, step: u64) -> Result<Vec<(PathBuf, PathBuf)>> {
    let real = |path: &Path| fs::canonicalize(path).at(path);
    let here = output_dir.is_dir() && real(&parent(&real(resumed)?))? == real(output_dir)?;
    let mut moved = Vec::new();
    for (n, from) in list(output_dir)?.into_iter().filter(|(n, _)| *n > step || !here) {
        let names = (1..)
            .map(|k| output_dir.join(if k == 1 { format!("abandoned-{n}") } else { format!("abandoned-{n}.{k}") }));
        let to = names.into_iter().find(|path| !path.exists()).expect("some number is free");
        fs::rename(&from, &to).at(&from)?;
        moved.push((from, to));
    }
    if !moved.is_empty() {
        sync_dir(output_dir)?;
    }
    Ok(moved)
}

/// Removes a checkpoint so that no half of it can be taken for one: it loses its name first.
///
/// # Errors
/// If the folder cannot be renamed or removed.
pub fn remove(checkpoint: &Path) -> Result<()> {
    let Some(name) = checkpoint.file_name().and_then(|n| n.to_str()) else {
        bail!("{}: not a checkpoint folder", checkpoint.display());
    };
    let doomed = parent(checkpoint).join(format!(".{name}.del"));
    if doomed.exists() {
        fs::remove_dir_all(&doomed).at(&doomed)?;
    }
    fs::rename(checkpoint, &doomed).at(checkpoint)?;
    fs::remove_dir_all(&doomed).at(&doomed)
}
