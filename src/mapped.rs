//! A file mapped into memory. It may lie anywhere, and another program can cut it while it is read: a read behind the end of a file
//! raises SIGBUS, which would end the process and what it has not saved yet.
//!
//! So the signal is taken: where the address lies in a file mapped here, the missing pages become zeros and the file is marked;
//! whoever read from it asks [`Mapped::check`] before it uses what it read. Elsewhere the signal does what it did before.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use memmap2::{Mmap, UncheckedAdvice};

use crate::ensure;
use crate::error::{Context, Result};
use crate::files::{At, open_file};
use crate::machine::page;

/// The bytes of a file.
#[derive(Debug)]
pub struct Mapped {
    map: Mmap,
    file: File,
    path: PathBuf,
    /// When it was last written to, where the system says it.
    modified: Option<SystemTime>,
    guard: Option<Guard>,
}

impl Mapped {
    /// Maps a file.
    ///
    /// # Errors
    /// If it is not there, no file, or cannot be mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_file(path)?;
        // SAFETY: the mapping is only read and every access is bounds-checked. ringtune replaces files by rename and never changes
        // one in place; what another program changes in a file gives other values, none of which is trusted unchecked, and pages
        // that it cuts off are noticed by `check`.
        let map = unsafe { Mmap::map(&file) }.at(path)?;
        let guard = Guard::over(&map);
        let modified = file.metadata().and_then(|m| m.modified()).ok();
        Ok(Self { map, file, path: path.to_path_buf(), modified, guard })
    }

    /// Whether the file still holds what was mapped, and all that was read so far came from it.
    ///
    /// # Errors
    /// If it became shorter.
    pub fn check(&self) -> Result<()> {
        let (name, expected) = (|| self.path.display().to_string(), self.map.len() as u64);
        let found = self.file.metadata().context(name)?.len();
        // A file may be cut and grow again: the mark stays.
        let cut = self.guard.as_ref().is_some_and(Guard::is_cut);
        ensure!(
            found >= expected && !cut,
            "{}: the file was cut while it was read, expected {expected} bytes, found {found}; restore it and resume, or train \
             from a copy",
            name()
        );
        Ok(())
    }

    /// As [`Mapped::check`], for who goes on reading: nobody wrote to the file since it was mapped.
    ///
    /// # Errors
    /// If somebody did.
    pub fn check_unchanged(&self) -> Result<()> {
        self.check()?;
        let now = self.file.metadata().and_then(|m| m.modified()).ok();
        ensure!(
            now == self.modified,
            "{}: the file was written to while it is in use; leave it alone until the run ends and resume, or train from a copy",
            self.path.display()
        );
        Ok(())
    }

    /// Lets pages of the process go that nobody reads for now; they come again from the file.
    pub fn release(&self, bytes: Range<usize>) {
        let (first, end) = (bytes.start.next_multiple_of(page()), bytes.end.min(self.map.len()) / page() * page());
        // Zeros that stand in the place of what was cut off must stay.
        if first < end && !self.guard.as_ref().is_some_and(Guard::is_cut) {
            // SAFETY: the mapping is shared with the file and only read: a page that is read again has what the file has.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, first, end - first) };
        }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Deref for Mapped {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// A part of a mapped file, whose pages leave the process with it.
#[derive(Debug)]
pub struct FilePart {
    map: Arc<Mapped>,
    range: Range<usize>,
}

impl FilePart {
    /// Bytes of a file.
    ///
    /// # Panics
    /// If it has not so many.
    pub fn new(map: &Arc<Mapped>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= map.len(), "bytes {range:?} of {}", map.len());
        Self { map: Arc::clone(map), range }
    }

    /// The file.
    pub fn file(&self) -> &Mapped {
        &self.map
    }
}

impl Deref for FilePart {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

impl Drop for FilePart {
    fn drop(&mut self) {
        self.map.release(self.range.clone());
    }
}

/// Files that can be watched at a time; those beyond are read unwatched.
const SLOTS: usize = 1024;

/// A watched mapping: its first address, 0 where the slot is free, and one past its last page. A handler may read nothing but atomics.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    cut: AtomicBool,
}

static WATCHED: [Slot; SLOTS] =
    [const { Slot { start: AtomicUsize::new(0), end: AtomicUsize::new(0), cut: AtomicBool::new(false) } }; SLOTS];

/// A slot in use.
#[derive(Debug)]
struct Guard(usize);

impl Guard {
    fn over(map: &Mmap) -> Option<Self> {
        if map.is_empty() || !install() {
            return None;
        }
        let start = map.as_ptr() as usize;
        let end = (start + map.len()).next_multiple_of(page());
        let free = |s: &Slot| s.start.compare_exchange(0, usize::MAX, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        let at = WATCHED.iter().position(free)?;
        let slot = &WATCHED[at];
        slot.cut.store(false, Ordering::SeqCst);
        slot.end.store(end, Ordering::SeqCst);
        slot.start.store(start, Ordering::SeqCst);
        Some(Self(at))
    }

    fn is_cut(&self) -> bool {
        WATCHED[self.0].cut.load(Ordering::SeqCst)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        WATCHED[self.0].end.store(0, Ordering::SeqCst);
        WATCHED[self.0].start.store(0, Ordering::SeqCst);
    }
}

/// What SIGBUS did before.
static BEFORE: OnceLock<Before> = OnceLock::new();

struct Before(libc::sigaction);

// SAFETY: plain data, written once.
unsafe impl Sync for Before {}
// SAFETY: the same.
unsafe impl Send for Before {}

/// Takes SIGBUS, once; `false` where the system refuses.
fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        page();
        // SAFETY: all-zero is a valid `sigaction`; both pointers are to locals, and the handler keeps to what a handler may do.
        unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut before) != 0 {
                return false;
            }
            // Known before the handler can run.
            if BEFORE.set(Before(before)).is_err() {
                return false;
            }
            let mut ours: libc::sigaction = std::mem::zeroed();
            ours.sa_sigaction = on_bus_error as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &ours, std::ptr::null_mut()) == 0
        }
    })
}

/// Puts zeros where a watched file has no more bytes, from the fault to the end of its mapping; else lets the signal do what it did.
extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid `siginfo_t` to a handler with SA_SIGINFO.
    let at = unsafe { (*info).si_addr() } as usize;
    for slot in &WATCHED {
        let (start, end) = (slot.start.load(Ordering::SeqCst), slot.end.load(Ordering::SeqCst));
        if (start..end).contains(&at) {
            slot.cut.store(true, Ordering::SeqCst);
            let from = at & !(page() - 1);
            // SAFETY: these pages are within a mapping that is alive, since it was being read, and only read; unmapping the
            // whole of it later covers the new pages too. mmap is a bare system call.
            let zeros = unsafe {
                libc::mmap(
                    from as *mut libc::c_void,
                    end - from,
                    libc::PROT_READ,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                    -1,
                    0,
                )
            };
            if zeros != libc::MAP_FAILED {
                return;
            }
        }
    }
    // The read happens again when this returns, and then the signal goes where it would have gone.
    if let Some(Before(before)) = BEFORE.get() {
        // SAFETY: a valid action that the system gave.
        unsafe { libc::sigaction(signal, before, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_cut_reads_as_zeros_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let bytes = vec![7u8; 5 * page()];
        std::fs::write(&path, &bytes).unwrap();
        let (mapped, other) = (Mapped::open(&path).unwrap(), Mapped::open(&path).unwrap());
        assert_eq!(mapped[4 * page()], 7);
        mapped.check().unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(page() as u64 + 10).unwrap();
        assert_eq!((mapped[3], mapped[page() + 5], mapped[page() + 20], mapped[3 * page()]), (7, 7, 0, 0));
        let said = mapped.check().unwrap_err().to_string();
        assert!(said.contains("the file was cut while it was read, expected"), "{said}");
        // Whole again: what was read meanwhile is still not what the file held.
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!((mapped[2 * page()], other[4 * page()]), (7, 7));
        mapped.check().unwrap_err();
        other.check().unwrap();
        drop(mapped);
        drop(other);
        let again = Mapped::open(&path).unwrap();
        again.check().unwrap();
        assert_eq!(again[4 * page()], 7);
    }
}
