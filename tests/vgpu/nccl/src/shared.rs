//! The memory that the ranks of a communicator share: a file in /dev/shm with a versioned header, one [`Member`] and
//! four slots of 1 MiB per rank, and a mailbox for each pair.
//!
//! All fields are atomics; what they guard (slots) is written by one rank only, between two counters:
//! chunk `k` of rank `r` may be read while `produced[r] > k` and until the reader's own `consumed` passes `k`.

use std::ffi::CString;
use std::fs;
use std::mem::size_of;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};
use std::time::Duration;

use crate::error::{Code, Failure, Result};
use crate::member::{Mail, Member, NOBODY, started, state, thread_id};

/// Bytes of a slot.
pub const SLOT: usize = 1 << 20;
/// Slots of a rank: it may be that many chunks ahead of the slowest reader.
pub const SLOTS: usize = 4;
/// Bytes of a mailbox slot.
pub const MAIL: usize = 128 << 10;
/// Slots of a mailbox.
pub const MAILS: usize = 2;
/// Most ranks of a communicator.
pub const MAX_RANKS: usize = 64;
const PAGE: usize = 4096;
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"vgpunccl");
pub(crate) const VERSION: u32 = 1;
pub(crate) const FOLDER: &str = "/dev/shm";
const PREFIX: &str = "vgpu-nccl-";

#[repr(C, align(4096))]
struct Header {
    magic: AtomicU64,
    version: AtomicU32,
    ranks: AtomicU32,
    joined: AtomicU32,
    /// Counts everything published; waiters sleep on it.
    bell: AtomicU32,
    sleepers: AtomicU32,
}

/// The mapped memory of a communicator.
pub struct Shared {
    base: *mut u8,
    len: usize,
    n: usize,
    name: String,
}

// SAFETY: everything behind `base` is atomics, or slots that the counters hand from one writer to its readers.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

pub(crate) const fn members_at() -> usize {
    size_of::<Header>()
}

fn mails_at(n: usize) -> usize {
    members_at() + n * size_of::<Member>()
}

fn slots_at(n: usize) -> usize {
    (mails_at(n) + n * n * size_of::<Mail>()).next_multiple_of(PAGE)
}

fn length(n: usize) -> usize {
    slots_at(n) + n * SLOTS * SLOT + n * n * MAILS * MAIL
}

/// What [`Shared::open`] found.
pub enum Opened {
    /// The memory, ready to join.
    Ready(Shared),
    /// Another rank is making it.
    NotYet,
}

fn system(what: &str, path: &str, e: std::io::Error) -> Failure {
    Failure::new(Code::SystemError, format!("{what} {path}: {e}; /dev/shm must have room for the slots of all ranks"))
}

impl Shared {
    /// Makes or opens the file `name` for `n` ranks; the first to come makes it.
    ///
    /// # Errors
    /// If the system refuses, or the file was made for another number of ranks or by another version.
    pub fn open(name: &str, n: usize) -> Result<Opened> {
        let path = format!("{FOLDER}/{name}");
        let c_path = CString::new(path.clone()).map_err(|_| Failure::argument("the unique id is not text"))?;
        let flags = libc::O_RDWR | libc::O_CLOEXEC;
        // SAFETY: `c_path` is a C string; both calls only give a descriptor or -1.
        let made = unsafe { libc::open(c_path.as_ptr(), flags | libc::O_CREAT | libc::O_EXCL, 0o600) };
        if made >= 0 {
            let shared = Shared::make(made, &path, name, n);
            if shared.is_err() {
                let _ = fs::remove_file(&path);
            }
            return shared.map(Opened::Ready);
        }
        // SAFETY: as above.
        let fd = unsafe { libc::open(c_path.as_ptr(), flags) };
        if fd < 0 {
            // Taken away between the two calls: its ranks are complete, or its maker failed.
            return Ok(Opened::NotYet);
        }
        let found = Shared::attach(fd, &path, name, n);
        // SAFETY: `fd` was opened above and is closed once; the mapping outlives it.
        unsafe { libc::close(fd) };
        found
    }

    fn make(fd: i32, path: &str, name: &str, n: usize) -> Result<Shared> {
        let len = length(n);
        // Reserves the pages: a full /dev/shm is an error here, not a bus error at the first chunk.
        // SAFETY: `fd` is open for writing.
        let refused = unsafe { libc::posix_fallocate(fd, 0, len as libc::off_t) };
        let mapped = match refused {
            0 => map(fd, len),
            e => Err(std::io::Error::from_raw_os_error(e)),
        };
        // SAFETY: `fd` was opened by the caller for this function, and is closed once.
        unsafe { libc::close(fd) };
        let base = mapped.map_err(|e| system("cannot reserve shared memory in", path, e))?;
        let shared = Shared { base, len, n, name: name.to_owned() };
        for r in 0..n {
            shared.member(r).waits_for.store(NOBODY, Relaxed);
            shared.member(r).set_current(None);
        }
        let header = shared.header();
        header.version.store(VERSION, Relaxed);
        header.ranks.store(n as u32, Relaxed);
        header.magic.store(MAGIC, Release);
        Ok(shared)
    }

    fn attach(fd: i32, path: &str, name: &str, n: usize) -> Result<Opened> {
        let size = file_size(fd);
        if size < PAGE {
            return Ok(Opened::NotYet);
        }
        let first = map(fd, PAGE).map_err(|e| system("cannot map", path, e))?;
        // SAFETY: the page holds a header (atomics only) and stays mapped until the munmap below.
        let (magic, version, ranks) = unsafe {
            let header = &*first.cast::<Header>();
            let seen = (header.magic.load(Acquire), header.version.load(Relaxed), header.ranks.load(Relaxed) as usize);
            libc::munmap(first.cast(), PAGE);
            seen
        };
        if magic == 0 {
            return Ok(Opened::NotYet);
        }
        if magic != MAGIC || version != VERSION {
            return Err(Failure::usage(format!(
                "{path}: version {version} of the shared memory, this library has {VERSION}; use one build for all ranks"
            )));
        }
        if ranks != n {
            return Err(Failure::argument(format!(
                "communicator of {n} ranks here, of {ranks} on the rank that came first"
            )));
        }
        if size != length(n) {
            return Err(Failure::usage(format!("{path}: {size} bytes, not the {} of {n} ranks", length(n))));
        }
        let base = map(fd, size).map_err(|e| system("cannot map", path, e))?;
        Ok(Opened::Ready(Shared { base, len: size, n, name: name.to_owned() }))
    }

    pub fn ranks(&self) -> usize {
        self.n
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    fn header(&self) -> &Header {
        // SAFETY: the mapping starts with a page-aligned header of atomics and lives as long as `self`.
        unsafe { &*self.base.cast::<Header>() }
    }

    /// The page of rank `r`.
    pub fn member(&self, r: usize) -> &Member {
        assert!(r < self.n);
        // SAFETY: `r` is below the ranks the file is sized for; the pages hold atomics only and live as long as `self`.
        unsafe { &*self.base.add(members_at()).cast::<Member>().add(r) }
    }

    /// The mailbox from rank `from` to rank `to`.
    pub fn mail(&self, from: usize, to: usize) -> &Mail {
        assert!(from < self.n && to < self.n);
        // SAFETY: as for `member`.
        unsafe { &*self.base.add(mails_at(self.n)).cast::<Mail>().add(from * self.n + to) }
    }

    /// The slot of chunk `chunk` of rank `r`, [`SLOT`] bytes.
    pub fn slot(&self, r: usize, chunk: u64) -> *mut u8 {
        assert!(r < self.n);
        // SAFETY: rank and slot are below the numbers the file is sized for.
        unsafe { self.base.add(slots_at(self.n) + (r * SLOTS + chunk as usize % SLOTS) * SLOT) }
    }

    /// The slot of chunk `chunk` from `from` to `to`, [`MAIL`] bytes.
    pub fn mail_slot(&self, from: usize, to: usize, chunk: u64) -> *mut u8 {
        assert!(from < self.n && to < self.n);
        let at = slots_at(self.n) + self.n * SLOTS * SLOT;
        // SAFETY: pair and slot are below the numbers the file is sized for.
        unsafe { self.base.add(at + ((from * self.n + to) * MAILS + chunk as usize % MAILS) * MAIL) }
    }

    /// Takes the place of rank `r`; the last to come takes the file's name away, so that nothing stays behind.
    ///
    /// # Errors
    /// If the place is taken.
    pub fn join(&self, r: usize, device: i32, uuid: [u8; 16]) -> Result<()> {
        let (pid, m) = (std::process::id(), self.member(r));
        if let Err(other) = m.pid.compare_exchange(0, pid, AcqRel, Acquire) {
            return Err(Failure::usage(format!("rank {r} joins twice: as process {other}, and as process {pid}")));
        }
        m.started.store(started(pid).unwrap_or(0), Relaxed);
        m.tid.store(thread_id(), Relaxed);
        m.device.store(device as u32, Relaxed);
        let (low, high) = uuid.split_at(8);
        for (to, from) in m.uuid.iter().zip([low, high]) {
            to.store(u64::from_le_bytes(from.try_into().expect("eight bytes")), Relaxed);
        }
        m.state.store(state::JOINED, Release);
        if self.header().joined.fetch_add(1, AcqRel) + 1 == self.n as u32 {
            self.unlink();
        }
        self.ring();
        Ok(())
    }

    /// First rank that has not joined.
    pub fn missing(&self) -> Option<usize> {
        (0..self.n).find(|r| self.member(*r).state.load(Acquire) == state::EMPTY)
    }

    /// Takes the name away; mappings stay.
    pub fn unlink(&self) {
        let _ = fs::remove_file(format!("{FOLDER}/{}", self.name));
    }

    /// Tells sleepers that something was published.
    pub fn ring(&self) {
        let h = self.header();
        h.bell.fetch_add(1, SeqCst);
        if h.sleepers.load(SeqCst) > 0 {
            wake(&h.bell);
        }
    }

    /// The count to give to [`Shared::sleep`], taken before looking for what one waits for.
    pub fn bell(&self) -> u32 {
        self.header().bell.load(SeqCst)
    }

    /// Sleeps until something is published after `bell` was taken, or `limit` is over.
    pub fn sleep(&self, bell: u32, limit: Duration) {
        let h = self.header();
        h.sleepers.fetch_add(1, SeqCst);
        wait(&h.bell, bell, limit);
        h.sleepers.fetch_sub(1, SeqCst);
    }

    /// Asks the queue of rank `r` to run.
    pub fn want(&self, r: usize) {
        self.member(r).wanted.fetch_add(1, SeqCst);
        wake(&self.member(r).wanted);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: base and length are those of one mmap, and nothing borrows from a value being dropped.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

fn map(fd: i32, len: usize) -> std::io::Result<*mut u8> {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    // SAFETY: a new mapping at an address the kernel chooses touches no memory of ours.
    let base = unsafe { libc::mmap(ptr::null_mut(), len, access, kind, fd, 0) };
    if base == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    Ok(base.cast())
}

fn file_size(fd: i32) -> usize {
    // SAFETY: an all-zero `stat` is valid, and fstat writes into it alone.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        if libc::fstat(fd, &mut stat) == 0 { stat.st_size as usize } else { 0 }
    }
}

/// Sleeps while `word` holds `value`, at most `limit`; may wake early. Works between processes.
pub fn wait(word: &AtomicU32, value: u32, limit: Duration) {
    let time =
        libc::timespec { tv_sec: limit.as_secs() as libc::time_t, tv_nsec: limit.subsec_nanos() as libc::c_long };
    // SAFETY: the word is a live atomic and the time a local; the kernel only reads both.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &time) };
}

/// Wakes all who sleep on `word`.
pub fn wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE uses the address as a key and touches no memory.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// A name nobody else uses.
pub fn fresh_name() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let pid = std::process::id();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0, |d| d.as_nanos());
    format!("{PREFIX}{pid}-{now}-{}", COUNT.fetch_add(1, Relaxed))
}

/// Whether `name` may be a name of ours: nothing that leads out of the folder.
pub fn is_name(name: &str) -> bool {
    name.starts_with(PREFIX) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}
