//! A file mapped into memory. It may lie anywhere: another program can cut it while it is read, and a read behind the end of a
//! file ends the process. So its length is looked at before each step's rows are taken.

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::ensure;
use crate::error::{Context, Result};
use crate::files::open_file;

/// The bytes of a file.
#[derive(Debug)]
pub(super) struct Mapped {
    map: Mmap,
    file: File,
    path: PathBuf,
}

impl Mapped {
    /// Maps a file.
    ///
    /// # Errors
    /// If it is not there, no file, or cannot be mapped.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = open_file(path)?;
        // SAFETY: the mapping is only read and every access is bounds-checked. Files of the cache are replaced by rename, never
        // changed in place; what else changes in a file gives other ids, and a cut one is noticed by `check_length`.
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Self { map, file, path: path.to_path_buf() })
    }

    /// Whether the file still holds what was mapped.
    ///
    /// # Errors
    /// If it became shorter.
    pub(super) fn check_length(&self) -> Result<()> {
        let (name, expected) = (|| self.path.display().to_string(), self.map.len() as u64);
        let found = self.file.metadata().context(name)?.len();
        ensure!(
            found >= expected,
            "{}: the file was cut while it was read, expected {expected} bytes, found {found}; restore it and resume, or train \
             from a copy",
            name()
        );
        Ok(())
    }

    /// Where it lies.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Deref for Mapped {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map
    }
}
