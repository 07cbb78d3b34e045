//! Whether every rank sees the folder that the main one writes: where machines have no file system in common, the main rank writes for all.

use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::comm::Communicator;
use crate::error::{Error, Result};
use crate::files::{At, parent, temporary_beside};
use crate::{ensure, machine};

/// How long a file of another machine may take to be seen. A name that nobody has asked for before is seen at once on most file systems.
const SEEN: Duration = Duration::from_secs(2);

/// A rank that does not see the folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Apart {
    /// The first one.
    pub rank: usize,
    /// Its machine.
    pub host: String,
}

impl Apart {
    /// What that means, in words.
    pub fn warning(&self, dir: &Path) -> String {
        let Self { rank, host } = self;
        format!(
            "rank {rank} on host {host} does not see {}, where rank 0 writes: rank 0 gets what the other ranks hold and writes the checkpoints for \
             all, from a copy of the whole state in its memory; to go on from one, every machine needs it at this path: a file system that all \
             of them share, or a copy",
            dir.display()
        )
    }
}

/// Finds out, on every rank: the main one writes a file with a new name into `dir`, which is there, and the others look for it.
///
/// # Errors
/// If the file cannot be written, or a peer is gone.
pub fn apart<B: Backend>(comm: &dyn Communicator<B>, dir: &Path) -> Result<Option<Apart>> {
    if comm.world_size() == 1 {
        return Ok(None);
    }
    let write = || {
        let word = temporary_beside(&std::path::absolute(dir).unwrap_or_else(|_| dir.into()).join("seen"))?;
        fs::write(&word, b"x").at(&word).map(|()| word)
    };
    let own = comm.is_main().then(write).transpose();
    let said = match &own {
        Ok(word) => Ok(word.iter().flat_map(|word| word.as_os_str().as_bytes().to_vec()).collect()),
        Err(_) => Err(Error::bystander()),
    };
    let said = comm.main_says("word in the output folder", said);
    let (own, said) = (own?, said?);
    let sees = comm.is_main() || is_seen(&own_path(dir, &PathBuf::from(std::ffi::OsString::from_vec(said))));
    let all = comm.gather("who sees the output folder", if sees { &[] } else { b"-" })?;
    let hosts = match all.iter().any(|said| !said.is_empty()) {
        true => comm.gather("machines", machine::host().as_bytes())?,
        false => Vec::new(),
    };
    if let Some(word) = own {
        fs::remove_file(&word).at(&word)?;
    }
    let first = all.iter().position(|said| !said.is_empty());
    Ok(first.map(|rank| Apart { rank, host: String::from_utf8_lossy(&hosts[rank]).into_owned() }))
}

/// The same file by this rank's own name of the folder: a path may be relative, and mean another folder here.
fn own_path(dir: &Path, word: &Path) -> PathBuf {
    word.file_name().map_or_else(|| dir.to_path_buf(), |name| dir.join(name))
}

/// Waits a little until a file is seen.
fn is_seen(path: &Path) -> bool {
    let until = Instant::now() + SEEN;
    while !path.exists() {
        if Instant::now() > until {
            return false;
        }
        // Asking for the entries of the folder makes a network file system look again.
        let _ = fs::read_dir(parent(path)).map(Iterator::count);
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Whether all ranks find the same checkpoint at this path, by its manifest.
///
/// # Errors
/// On a rank that has none there, or another one: what to do.
pub fn same_checkpoint<B: Backend>(comm: &dyn Communicator<B>, checkpoint: &Path, manifest: &str) -> Result<()> {
    let path = checkpoint.join(manifest);
    ensure!(
        comm.is_main() || is_seen(&path),
        "{}: rank 0 goes on from this checkpoint, and it is not on host {}; give all machines one output folder, or copy it to the same path there",
        checkpoint.display(),
        machine::host()
    );
    let hash = blake3::hash(&fs::read(&path).at(&path)?).to_hex().to_string();
    comm.agree("the manifest of the checkpoint to go on from", &hash)
}
