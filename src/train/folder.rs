//! The folder of a run: whose it is while the run goes on, and what of a user's must not be overwritten there.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use super::checkpoints::RESIZED_BASE;
use super::holder::{Holder, LOCK};
use super::outputs::MERGED;
use super::record::RUN;
use super::state::{OWN_STATE, TRAINER_STATE};
use crate::checkpoint::manifest::step_of;
use crate::error::{Context, Error, Result};
use crate::eval::gen_test::SAMPLES;
use crate::files::{At, check_writable, create_dir_all};
use crate::hf::peft;
use crate::log::metrics::METRICS;
use crate::log::mlflow::MLFLOW;
use crate::say;

/// What a run writes in its folder, checkpoints and weight files apart.
const WRITTEN: [&str; 23] = [
    METRICS,
    RUN,
    TRAINER_STATE,
    OWN_STATE,
    MLFLOW,
    SAMPLES,
    MERGED,
    RESIZED_BASE,
    LOCK,
    "final",
    "runs",
    "loss.svg",
    "loss.png",
    "loss-dark.png",
    "config.json",
    "generation_config.json",
    peft::CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];

/// The right to write a run's folder. It ends when it is dropped; when the process dies, the system ends it.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    file: File,
}

impl RunFolder {
    /// Creates the folder, takes it, and proves that it can be written.
    ///
    /// # Errors
    /// A usage error where another run holds it, and then nothing in the folder was changed; or if it cannot be created or written.
    pub fn take(dir: &Path) -> Result<Self> {
        create_dir_all(dir)?;
        let path = dir.join(LOCK);
        loop {
            let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
            let mut file = open.at(&path).context(|| "the output folder cannot be written".into())?;
            let mut holder = String::new();
            match file.try_lock() {
                // Between the opening and the locking the run before may have ended and taken its file along.
                Ok(()) if !is_at(&file, &path) => continue,
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let _ = file.read_to_string(&mut holder); // It is for the message alone.
                    let who = first_line(&holder).unwrap_or("another process");
                    return Err(Error::usage(format!(
                        "{}: another run is writing to this folder ({who}); wait for its end, or choose another --output-dir",
                        dir.display()
                    )));
                }
                Err(TryLockError::Error(e)) => {
                    say::warning(&format!(
                        "{}: no lock on this file system ({e}): start no second run here",
                        path.display()
                    ));
                }
            }
            let _ = file.read_to_string(&mut holder);
            if let Some(holder) = first_line(&holder) {
                say::note(&format!("{}: taken over from {holder}, which ended without its end", dir.display()));
            }
            let me = Holder::me().record();
            file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(me.as_bytes())).at(&path)?;
            check_writable(dir).context(|| "the output folder cannot be written".into())?;
            return Ok(Self { path, file });
        }
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        // While it is locked, so that nobody takes a file that is about to go.
        if is_at(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// What the file says for people.
fn first_line(holder: &str) -> Option<&str> {
    holder.lines().next().map(str::trim).filter(|line| !line.is_empty())
}

/// Whether the open file is the one that has this name.
fn is_at(file: &File, path: &Path) -> bool {
    let id = |m: &std::fs::Metadata| (m.dev(), m.ino());
    matches!((file.metadata(), std::fs::metadata(path)), (Ok(a), Ok(b)) if id(&a) == id(&b))
}

/// Refuses an output folder in which the run would write over what it reads. `inputs` are what each is called, and its path.
///
/// # Errors
/// A usage error that names both.
pub fn refuse_overwriting(run_dir: &Path, inputs: &[(&str, &Path)]) -> Result<()> {
    let dir = absolute(run_dir);
    for (what, path) in inputs {
        let Ok(below) = absolute(path).strip_prefix(&dir).map(Path::to_path_buf) else { continue };
        let first = below.iter().next().map(|name| name.to_string_lossy().into_owned());
        let written = first.is_none_or(|name| {
            let weights = [".safetensors", ".safetensors.index.json"].iter().any(|end| name.ends_with(end));
            weights || WRITTEN.contains(&name.as_str()) || step_of(Path::new(&name)).is_some()
        });
        if written {
            return Err(Error::usage(format!(
                "{}: the run would write over {what} {}; choose another --output-dir",
                run_dir.display(),
                path.display()
            )));
        }
    }
    Ok(())
}

/// The path from the root, without `..`: names of links stay, but for those before a `..`, which leads out of what they point to.
pub fn from_root(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let parts: Vec<Component> = path.components().collect();
    let Some(last) = parts.iter().rposition(|part| *part == Component::ParentDir) else { return path };
    let (before, behind): (PathBuf, PathBuf) = (parts[..=last].iter().collect(), parts[last + 1..].iter().collect());
    std::fs::canonicalize(before).map_or(path, |real| real.join(behind))
}

/// The path without links and dots, as far as it exists.
fn absolute(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let found = path.ancestors().find_map(|above| Some((above, std::fs::canonicalize(above).ok()?)));
    found.map_or_else(|| path.clone(), |(above, real)| real.join(path.strip_prefix(above).unwrap_or(Path::new(""))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_belongs_to_one_run_until_that_ends() {
        let dir = tempfile::tempdir().unwrap();
        let first = RunFolder::take(dir.path()).unwrap();
        let before: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        let e = RunFolder::take(dir.path()).unwrap_err();
        assert_eq!(e.exit_code(), 2);
        assert!(e.to_string().contains(&format!("(process {} on ", std::process::id())), "{e}");
        let after: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(before, after, "the refused start changed nothing");
        drop(first);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left of a run that ended");
        // A run that was killed leaves its file, and nobody holds it.
        std::fs::write(dir.path().join(LOCK), "process 1 on elsewhere\n").unwrap();
        drop(RunFolder::take(dir.path()).unwrap());
    }

    #[test]
    fn a_path_from_the_root_has_no_dots() {
        let dir = tempfile::tempdir().unwrap();
        let real = std::fs::canonicalize(dir.path()).unwrap();
        std::fs::create_dir_all(real.join("a/b")).unwrap();
        std::fs::create_dir_all(real.join("c")).unwrap();
        std::os::unix::fs::symlink(real.join("a/b"), real.join("c/link")).unwrap();
        assert_eq!(from_root(&real.join("a/../c/./link")), real.join("c/link"));
        assert_eq!(from_root(&real.join("c/link/../b")), real.join("a/b"));
        assert_eq!(from_root(&real.join("c/link")), real.join("c/link"));
        assert_eq!(from_root(Path::new("x")), std::env::current_dir().unwrap().join("x"));
    }

    #[test]
    fn what_a_run_reads_is_not_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("out/merged")).unwrap();
        std::fs::create_dir_all(at("model")).unwrap();
        std::os::unix::fs::symlink(at("model"), at("link")).unwrap();
        let refused = |out: &str, input: &str| match refuse_overwriting(&at(out), &[("the model", &at(input))]) {
            Ok(()) => false,
            Err(e) => {
                assert!(e.exit_code() == 2 && e.to_string().contains("would write over the model"), "{e}");
                true
            }
        };
        for (out, input) in [
            ("model", "model"),
            ("link", "model"),
            ("model", "link"),
            ("model/../model/", "model"),
            ("out", "out/merged"),
            ("out", "out/checkpoint-20"),
            ("out", "out/metrics.jsonl"),
            ("out", "out/model-00001-of-00002.safetensors"),
        ] {
            assert!(refused(out, input), "{out} {input}");
        }
        for (out, input) in [("out", "model"), ("model/out", "model"), ("out", "out/rows.jsonl"), ("out2", "out")] {
            assert!(!refused(out, input), "{out} {input}");
        }
    }
}
