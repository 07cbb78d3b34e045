//! Files written so that a crash or a full disk leaves the old one or the new one, never half of one.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use crate::error::{Context, Error, Result, in_words};
use crate::{bail, ensure};

pub mod nearby;

/// Turns an input/output error at `path` into a message that says what to do where the disk is full.
pub fn explain(path: &Path, e: &std::io::Error) -> Error {
    let full = matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG));
    let hint = match e.raw_os_error() {
        Some(libc::EFBIG) => {
            "; the limit on the size of a file (ulimit -f) is reached, or the disk or quota is full: write to another place"
        }
        _ if full => "; the disk or quota is full: free some space or write to another place",
        Some(libc::EACCES | libc::EROFS | libc::EPERM) => "; choose a folder that can be written to",
        _ => "",
    };
    Error::new(format!("{}: {}{hint}", path.display(), in_words(e)))
}

/// Attaches the path, and advice where there is some, to an input/output result.
pub(crate) trait At<T> {
    /// See [`explain`].
    fn at(self, path: &Path) -> Result<T>;
}

impl<T> At<T> for std::io::Result<T> {
    fn at(self, path: &Path) -> Result<T> {
        self.map_err(|e| explain(path, &e))
    }
}

/// Whether something has this name, of whatever kind, even a link that leads nowhere: who opens it says what it is.
pub fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// What lies at a path, in words; `a file` where it can be read again and again.
pub fn kind_of(path: &Path) -> std::io::Result<&'static str> {
    use std::os::unix::fs::FileTypeExt;
    let kind = fs::metadata(path)?.file_type();
    Ok(match kind {
        _ if kind.is_file() => "a file",
        _ if kind.is_dir() => "a folder",
        _ if kind.is_fifo() => "a pipe",
        _ if kind.is_socket() => "a socket",
        _ => "a device",
    })
}

/// A file's path as it is where its content is not packed: `a/b.jsonl` of `a/b.jsonl.gz`.
pub fn unpacked(path: &Path) -> PathBuf {
    let is_packed = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gz"));
    if is_packed { path.with_extension("") } else { path.to_path_buf() }
}

/// Opens a file to read it. A pipe is refused: opening one waits for a writer, and it can be read but once.
///
/// # Errors
/// If it is not there, no file, or cannot be read.
pub fn open_file(path: &Path) -> Result<File> {
    let name = || path.display().to_string();
    let kind = match kind_of(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            if let Ok(target) = fs::read_link(path) {
                bail!("{}: a link to {}, where nothing is; fetch or copy that file", name(), target.display());
            }
            return Err(Error::new(format!("{}: {}{}", name(), in_words(&e), nearby::hint(path))));
        }
        kind => kind.context(name)?,
    };
    let hint = if kind == "a folder" { "" } else { "; write what it gives to a file" };
    ensure!(kind == "a file", "{}: expected a file that can be read again, found {kind}{hint}", name());
    File::open(path).context(name)
}

/// Reads what a user names: a file, or a pipe (`<(…)` of a shell), of at most `limit` bytes.
///
/// # Errors
/// If it is a folder, cannot be read, or is longer.
pub fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>> {
    // One that a shell opened has somebody who writes into it.
    let opened = path.starts_with("/dev/fd") || path == Path::new("/dev/stdin");
    let file = if opened { File::open(path).at(path)? } else { open_file(path)? };
    up_to(file, path, limit)
}

/// As `std::fs::read`, of a file that may not end: `/dev/zero` has no last byte.
fn up_to(file: File, path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).at(path)?;
    ensure!(
        bytes.len() as u64 <= limit,
        "{}: longer than {limit} bytes, which is not expected of this file",
        path.display()
    );
    Ok(bytes)
}

/// Reads a UTF-8 file of at most `limit` bytes.
///
/// # Errors
/// If it cannot be read, is longer, or is not UTF-8.
pub fn read_text(path: &Path, limit: u64) -> Result<String> {
    text_of(path, up_to(open_file(path)?, path, limit)?)
}

/// The text of a file's bytes, without its byte order mark.
///
/// # Errors
/// If it is not UTF-8.
pub fn text_of(path: &Path, bytes: Vec<u8>) -> Result<String> {
    if let Some(name) = wide(&bytes) {
        bail!("{}: this is {name} text, expected UTF-8; convert it with iconv -f {name} -t UTF-8", path.display());
    }
    match String::from_utf8(without_mark(bytes)) {
        Ok(text) => Ok(text),
        Err(e) => bail!("{}: byte {} is not UTF-8", path.display(), e.utf8_error().valid_up_to()),
    }
}

/// The encoding with units of several bytes that a text begins in.
fn wide(bytes: &[u8]) -> Option<&'static str> {
    const MARKS: [(&[u8], &str); 4] =
        [(b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")];
    MARKS.iter().find(|(mark, _)| bytes.starts_with(mark)).map(|(_, name)| *name)
}

/// The byte order mark that editors of some systems put before a text.
pub const MARK: &str = "\u{feff}";

/// The bytes of a text without its byte order mark.
pub fn without_mark(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.starts_with(MARK.as_bytes()) {
        bytes.drain(..MARK.len());
    }
    bytes
}

/// A text without its byte order mark.
pub fn unmarked(text: &str) -> &str {
    text.strip_prefix(MARK).unwrap_or(text)
}

/// Refuses a file that only says where Git LFS has the real one.
///
/// # Errors
/// If `start`, its first bytes, are those of such a pointer.
pub fn refuse_pointer(path: &Path, start: &[u8]) -> Result<()> {
    let pointer = start.starts_with(b"version https://git-lfs.github.com/spec/");
    ensure!(!pointer, "{}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder", path.display());
    Ok(())
}

/// Makes the entries of a folder durable.
///
/// # Errors
/// If the folder cannot be opened or synced.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|f| f.sync_all()).at(dir)
}

/// The folder a path lies in.
pub(crate) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// Creates a folder and those above it, with the path in the error. The entry of each new one is made durable, so that what is
/// synced in it later can be found after a crash.
///
/// # Errors
/// If one of them cannot be created, or the folder it lies in cannot be synced.
pub fn create_dir_all(dir: &Path) -> Result<()> {
    let there = dir.ancestors().find(|above| is_there(above));
    if let Some(wrong) = there.filter(|path| !path.is_dir()) {
        let found = match (kind_of(wrong), fs::read_link(wrong)) {
            (Ok(kind), _) => kind.to_string(),
            (Err(_), Ok(target)) => format!("a link to {}, where nothing is", target.display()),
            (Err(e), Err(_)) => in_words(&e),
        };
        bail!("{}: cannot create the folder: {} is {found}; name another one", dir.display(), wrong.display());
    }
    let missing: Vec<&Path> =
        dir.ancestors().take_while(|above| !above.as_os_str().is_empty() && !above.exists()).collect();
    naming(|| fs::create_dir_all(dir)).at(dir).context(|| "cannot create the folder".to_string())?;
    missing.iter().rev().try_for_each(|new| sync_dir(&parent(new)))
}

/// A name beside `path` for what is to get that name: `.NAME.RANDOM.tmp`. [`remove_torn`] knows it. Processes of two containers or
/// machines have the same number, so none is in it.
pub(crate) fn temporary_beside(path: &Path) -> Result<PathBuf> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    ensure!(!name.is_empty(), "{}: not a file name", path.display());
    // The standard library draws the keys of its hash tables from the system's random numbers.
    let random = RandomState::new().hash_one((std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    Ok(parent(path).join(format!(".{name}.{random:016x}.tmp")))
}

/// What is under a temporary name now, to be removed by [`remove_pending`].
static PENDING: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// A temporary name in use; what still has it is removed when this is dropped.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Temporary {
    fn beside(path: &Path) -> Result<Self> {
        let temp = temporary_beside(path)?;
        PENDING.lock().unwrap_or_else(PoisonError::into_inner).insert(temp.clone());
        Ok(Self(temp))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        remove_any(&self.0); // Nothing is left of that name where all went well, and a first error is the one that counts.
        PENDING.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

fn remove_any(path: &Path) {
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

/// Held while a name is made or changed; held for good once the process is about to end, so that no thread makes another.
static NAMES: RwLock<()> = RwLock::new(());

fn naming<T>(f: impl FnOnce() -> T) -> T {
    let _held = NAMES.read().unwrap_or_else(PoisonError::into_inner);
    f()
}

/// Removes what this process is writing under temporary names, and lets it make no more: for a signal that ends it.
pub fn remove_pending() {
    std::mem::forget(NAMES.write().unwrap_or_else(PoisonError::into_inner));
    let pending = PENDING.lock().unwrap_or_else(PoisonError::into_inner);
    pending.iter().for_each(|path| remove_any(path));
}

/// A file in the folder of `path` to write to and read from, without a name: it goes with the process, whatever ends that.
///
/// # Errors
/// If no file can be made there.
pub(crate) fn nameless_beside(path: &Path) -> Result<File> {
    let temp = Temporary::beside(path)?;
    OpenOptions::new().read(true).write(true).create_new(true).open(&temp.0).at(path)
}

/// A folder of this process alone, for what is to move into `dir`; what is left in it goes with the value.
#[derive(Debug)]
pub(crate) struct Scratch(Temporary);

impl Scratch {
    /// # Errors
    /// If it cannot be made.
    pub fn within(dir: &Path) -> Result<Self> {
        let temp = Temporary::beside(&dir.join("scratch"))?;
        create_dir_all(&temp.0)?;
        Ok(Self(temp))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0.0
    }
}

/// Whether a name is one that [`temporary_beside`] gives.
fn is_temporary(name: &str) -> bool {
    let random = name.strip_prefix('.').and_then(|n| n.strip_suffix(".tmp")).and_then(|n| n.rsplit_once('.'));
    random.is_some_and(|(_, hex)| hex.len() == 16 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Removes the files and folders that a kill in the middle of a write left in `dir`; without the folder there are none.
///
/// # Errors
/// If the folder cannot be read or something in it cannot be removed.
pub fn remove_torn(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.at(dir)?,
    };
    for entry in entries {
        let path = entry.at(dir)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if is_temporary(&name) && path.is_dir() {
            fs::remove_dir_all(&path).at(&path)?;
        } else if name.starts_with('.') && name.ends_with(".tmp") && path.is_file() {
            fs::remove_file(&path).at(&path)?;
        }
    }
    Ok(())
}

/// Proves that files can be written to `dir`.
///
/// # Errors
/// If they cannot.
pub fn check_writable(dir: &Path) -> Result<()> {
    let probe = temporary_beside(&dir.join("write-test"))?;
    fs::write(&probe, b"x").and_then(|()| fs::remove_file(&probe)).at(&probe)
}

/// Whether a folder, or the one it would be made in, can be written to as far as its rights and its file system say.
pub fn may_write(dir: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let there = dir.ancestors().find(|above| is_there(above)).unwrap_or(Path::new("."));
    let there = if there.as_os_str().is_empty() { Path::new(".") } else { there };
    std::ffi::CString::new(there.as_os_str().as_bytes()).is_ok_and(|path| {
        // SAFETY: the text lives, and ends in a zero.
        there.is_dir() && unsafe { libc::access(path.as_ptr(), libc::W_OK) } == 0
    })
}

/// Writes `path` through a temporary file beside it: content, flush, fsync, rename, fsync of the folder. A link stays, and what it names is
/// replaced. A pipe or device is written to.
///
/// # Errors
/// If anything of it fails; then `path` is as it was and the temporary file is removed.
pub fn write_atomic(path: &Path, content: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    if takes_a_stream(path) {
        let file = OpenOptions::new().write(true).open(path).at(path)?;
        return write_into(file, path, content).map(drop);
    }
    let path = &behind_links(path);
    let temp = Temporary::beside(path)?;
    write_synced(&temp.0, content).map_err(|e| e.context(format!("writing {}", path.display())))?;
    naming(|| fs::rename(&temp.0, path)).at(path)?;
    sync_dir(&parent(path))
}

/// Refuses to write over a file of another kind, which was named by mistake: `is_own` says by its first bytes whether it is `what`.
///
/// # Errors
/// A usage error that names the flag and the file.
pub fn check_replaces(flag: &str, path: &Path, what: &str, is_own: impl Fn(&[u8]) -> bool) -> Result<()> {
    if !path.is_file() {
        return Ok(());
    }
    let mut head = Vec::new();
    File::open(path).at(path)?.take(1 << 16).read_to_end(&mut head).at(path)?;
    if head.is_empty() || is_own(&head) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{flag}: {} is there and is no {what}; it would be lost: name another file, or remove it",
        path.display()
    )))
}

/// Whether what is written to a path goes to a reader or device there, and replaces nothing.
pub fn takes_a_stream(path: &Path) -> bool {
    kind_of(path).is_ok_and(|kind| !["a file", "a folder"].contains(&kind))
}

/// The file or folder that a path stands for.
fn behind_links(path: &Path) -> PathBuf {
    let named = if path.is_symlink() { path.canonicalize().ok() } else { None };
    named.unwrap_or_else(|| path.to_path_buf())
}

/// Gives a finished folder its name: what lies there goes to `aside` first and is removed last.
///
/// # Errors
/// If a folder cannot be renamed, synced or removed; where `to` did not get the new folder it is as it was.
pub(crate) fn publish_dir(from: &Path, to: &Path, aside: &Path) -> Result<()> {
    let replaces = to.exists();
    if replaces && aside.exists() {
        fs::remove_dir_all(aside).at(aside)?;
    }
    // Both or neither: a signal between them would leave the name to nothing.
    naming(|| -> Result<()> {
        if replaces {
            fs::rename(to, aside).at(to)?;
        }
        fs::rename(from, to).at(to).inspect_err(|_| {
            if replaces {
                let _ = fs::rename(aside, to); // The first error is the one to report.
            }
        })
    })?;
    sync_dir(&parent(to))?;
    if replaces {
        fs::remove_dir_all(aside).at(aside)?;
    }
    Ok(())
}

/// A folder beside another that gets its name once everything in it is written and proven; removed on any error.
pub struct StagedDir {
    dir: Temporary,
    to: PathBuf,
}

impl StagedDir {
    /// An empty one for `to`, which is touched by [`StagedDir::publish`] alone.
    ///
    /// # Errors
    /// If `to` is no name of a folder, or the folder cannot be created.
    pub fn new(to: &Path) -> Result<Self> {
        ensure!(to.file_name().is_some(), "{}: expected the name of a folder, such as merged", to.display());
        let to = behind_links(to);
        let dir = Temporary::beside(&to)?;
        create_dir_all(&dir.0)?;
        Ok(Self { dir, to })
    }

    /// Fills it, then renames it; what lies at the name is moved aside first and removed last. `fill` writes by the functions of this
    /// file, each of which syncs the entry of what it wrote: the folder is whole on the disk when it gets its name.
    ///
    /// # Errors
    /// Those of `fill`, with the name that the user knows in place of the temporary one; if a folder cannot be synced or renamed.
    pub fn publish<T>(self, fill: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let dir = &self.dir.0;
        let known = |e: Error| Error::new(e.to_string().replace(&*dir.to_string_lossy(), &self.to.to_string_lossy()));
        let filled = fill(dir).map_err(known)?;
        publish_dir(dir, &self.to, &Temporary::beside(&self.to)?.0)?;
        Ok(filled)
    }
}

/// Writes a new file, flushes and fsyncs it.
///
/// # Errors
/// If it cannot be created or written; `content` reports errors without the path, it is added here.
pub fn write_synced(path: &Path, content: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let open = || OpenOptions::new().write(true).create(true).truncate(true).open(path);
    write_into(naming(open).at(path)?, path, content)?.sync_all().at(path)
}

/// Writes to an open file, which is that of `path`, and flushes.
fn write_into(file: File, path: &Path, content: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<File> {
    let mut out = Checked { inner: BufWriter::with_capacity(1 << 20, file), path, failed: None };
    let result = content(&mut out);
    if let Some(e) = out.failed.take() {
        return Err(e);
    }
    result?;
    out.inner.into_inner().map_err(|e| explain(path, e.error()))
}

/// Remembers the first write error with its advice, which a caller that sees only `io::Error` would lose.
struct Checked<'a> {
    inner: BufWriter<File>,
    path: &'a Path,
    failed: Option<Error>,
}

impl Write for Checked<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let result = self.inner.write(bytes);
        if let Err(e) = &result
            && e.kind() != ErrorKind::Interrupted
        {
            self.failed.get_or_insert_with(|| explain(self.path, e));
        }
        result
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// Writes bytes atomically; see [`write_atomic`].
///
/// # Errors
/// As [`write_atomic`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic(path, |out| Ok(out.write_all(bytes)?))
}

/// Writes a JSON value, indented, atomically; see [`write_atomic`].
///
/// # Errors
/// As [`write_atomic`].
pub fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).expect("a JSON value always prints");
    text.push('\n');
    write_bytes(path, text.as_bytes())
}
