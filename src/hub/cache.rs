//! The cache that Python's huggingface_hub shares: `models--org--name/{blobs,refs,snapshots}`.
//!
//! A blob is named by its content (sha256 of a large file, git hash of another); `snapshots/COMMIT/PATH` is a relative link to it;
//! `refs/main` says which commit a branch was last. Beside them `.ringtune/COMMIT.json` keeps what files there are at a commit, so that
//! a snapshot of which only a part was fetched is not taken for all of it.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::name::{Repo, is_commit};
use crate::error::{Error, Result};
use crate::files::{At, create_dir_all, write_bytes};
use crate::{ensure, say};

/// A file of a repository at a commit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Path inside the repository.
    pub path: String,
    /// Length in bytes.
    pub size: Option<u64>,
    /// Name of its content, of its blob too.
    pub etag: Option<String>,
    /// Checksum, of a large file.
    pub sha256: Option<String>,
}

/// What a repository has at a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The commit.
    pub commit: String,
    /// Its files, in order of path.
    pub entries: Vec<Entry>,
    /// All of them are known, not only those that are here.
    pub whole: bool,
}

/// The folder of one repository in the cache.
#[derive(Clone, Debug)]
pub struct Store {
    cache: PathBuf,
    folder: String,
}

/// Held while a blob is fetched or linked.
pub struct Lock {
    /// The lock file; `None` where the file system has no locks.
    held: Option<File>,
}

impl Lock {
    /// Whether nobody else can hold it.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }
}

impl Listing {
    /// From the hub's answer about a revision.
    ///
    /// # Errors
    /// If it is no such answer, or names files outside the repository.
    pub fn from_api(text: &str) -> Result<Self> {
        let wrong = |what: &str| Error::new(format!("expected the hub's description of a repository, found {what}"));
        let value: Value = serde_json::from_str(text).map_err(|e| wrong(&format!("no JSON: {e}")))?;
        let commit = value["sha"].as_str().ok_or_else(|| wrong("no commit (sha)"))?.to_string();
        ensure!(is_plain(&commit), "expected a commit, found {commit:?}");
        let files = value["siblings"].as_array().ok_or_else(|| wrong("no files (siblings)"))?;
        let text = |v: &Value| v.as_str().map(str::to_ascii_lowercase);
        let mut entries = Vec::with_capacity(files.len());
        for file in files {
            let path = file["rfilename"].as_str().ok_or_else(|| wrong("a file without rfilename"))?.to_string();
            let lfs = &file["lfs"];
            let sha256 = text(&lfs["sha256"]).or_else(|| text(&lfs["oid"]));
            entries.push(Entry {
                path,
                size: lfs["size"].as_u64().or(file["size"].as_u64()),
                etag: sha256.clone().or_else(|| text(&file["blobId"])),
                sha256,
            });
        }
        Self { commit, entries, whole: true }.checked()
    }

    /// Nothing of it may lie outside the folder it belongs to.
    fn checked(mut self) -> Result<Self> {
        for entry in &self.entries {
            let inside = Path::new(&entry.path).components().all(|c| matches!(c, Component::Normal(_)));
            ensure!(
                inside && !entry.path.is_empty() && !entry.path.contains(['\\', '\0']),
                "a file called {:?}: expected a path inside the repository",
                entry.path
            );
            ensure!(entry.etag.as_deref().is_none_or(is_plain), "{}: its tag is no name of a file", entry.path);
            let sum = entry.sha256.as_deref();
            ensure!(sum.is_none_or(super::checksum::is_sha256), "{}: its checksum is no sha256", entry.path);
        }
        self.entries.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(self)
    }

    /// As it is kept, in the form of Python's `trees/COMMIT.json`.
    fn to_json(&self) -> Value {
        let of = |e: &Entry| {
            let mut map = Map::new();
            map.insert("size".into(), json!(e.size));
            map.insert("blob_id".into(), json!(e.etag));
            if let Some(sha256) = &e.sha256 {
                map.insert("lfs_sha256".into(), json!(sha256));
                map.insert("lfs_size".into(), json!(e.size));
            }
            Value::Object(map)
        };
        let files: Map<String, Value> = self.entries.iter().map(|e| (e.path.clone(), of(e))).collect();
        json!({"format_version": 1, "files": files})
    }

    /// Reads what [`Listing::to_json`] or Python wrote; `None` where it is neither.
    fn from_json(commit: &str, text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text).ok()?;
        if value["format_version"] != 1 {
            return None;
        }
        let of = |(path, v): (&String, &Value)| {
            let text = |key: &str| v[key].as_str().map(String::from);
            let sha256 = text("lfs_sha256");
            let size = v["lfs_size"].as_u64().or(v["size"].as_u64());
            Entry { path: path.clone(), size, etag: sha256.clone().or_else(|| text("blob_id")), sha256 }
        };
        let entries = value["files"].as_object()?.iter().map(of).collect();
        Self { commit: commit.into(), entries, whole: true }.checked().ok()
    }
}

impl Store {
    /// Of `repo` in the cache folder `cache`; nothing is touched.
    pub fn of(cache: &Path, repo: &Repo) -> Self {
        Self { cache: cache.to_path_buf(), folder: repo.folder() }
    }

    /// Its folder.
    pub fn dir(&self) -> PathBuf {
        self.cache.join(&self.folder)
    }

    /// The folder of a commit's files.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.dir().join("snapshots").join(commit)
    }

    /// Where a blob lies.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.dir().join("blobs").join(etag)
    }

    /// Which commit a revision is, as far as the cache knows.
    pub fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.into());
        }
        let text = fs::read_to_string(self.dir().join("refs").join(revision)).ok()?;
        Some(text.trim().to_string()).filter(|commit| is_plain(commit))
    }

    /// Remembers which commit a revision is. What cannot be written is done without: the cache may be shared and read-only.
    pub fn remember(&self, revision: &str, listing: &Listing) {
        let reference = self.dir().join("refs").join(revision);
        let known = self.commit_of(revision);
        let write = |path: &Path, bytes: &[u8]| {
            path.parent().map(create_dir_all).transpose().and_then(|_| write_bytes(path, bytes))
        };
        if known.as_deref() != Some(&listing.commit) {
            let _ = write(&reference, listing.commit.as_bytes());
        }
        let kept = self.kept(&listing.commit);
        if !kept.is_file() {
            let _ = write(&kept, listing.to_json().to_string().as_bytes());
        }
    }

    fn kept(&self, commit: &str) -> PathBuf {
        self.dir().join(".ringtune").join(format!("{commit}.json"))
    }

    /// What the cache knows of a commit: its listing, or else the files that are here. `None`: nothing.
    pub fn listing(&self, commit: &str) -> Option<Listing> {
        let kept = [self.kept(commit), self.dir().join("trees").join(format!("{commit}.json"))];
        if let Some(listing) = kept.iter().find_map(|p| Listing::from_json(commit, &fs::read_to_string(p).ok()?)) {
            return Some(listing);
        }
        let root = self.snapshot(commit);
        let mut paths = Vec::new();
        walk(&root, "", &mut paths);
        if paths.is_empty() {
            return None;
        }
        let entry = |path| Entry { path, ..Entry::default() };
        Listing { commit: commit.into(), entries: paths.into_iter().map(entry).collect(), whole: false }.checked().ok()
    }

    /// Where a file of a commit is, if it is here and whole.
    pub fn find(&self, commit: &str, entry: &Entry) -> Option<PathBuf> {
        let path = self.snapshot(commit).join(&entry.path);
        fits(&path, entry.size).then_some(path)
    }

    /// Takes the lock of a blob; `waits` is said where another process has it for longer than a second.
    ///
    /// # Errors
    /// If the lock file cannot be made.
    pub fn lock(&self, etag: &str, waits: &str) -> Result<Lock> {
        let path = self.cache.join(".locks").join(&self.folder).join(format!("{etag}.lock"));
        create_dir_all(path.parent().expect("a lock lies in a folder"))?;
        let (start, mut said) = (Instant::now(), false);
        loop {
            let file = File::options().create(true).truncate(false).write(true).open(&path).at(&path)?;
            match file.try_lock() {
                Ok(()) => {
                    // Who held it may have removed it: then it locks nothing.
                    let here = fs::metadata(&path).ok().map(|m| m.ino());
                    if here == Some(file.metadata().at(&path)?.ino()) {
                        return Ok(Lock { held: Some(file) });
                    }
                }
                Err(fs::TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(50)),
                Err(fs::TryLockError::Error(e)) if e.kind() == ErrorKind::Interrupted => {}
                // Some network file systems have no locks: then each downloads for itself.
                Err(fs::TryLockError::Error(_)) => return Ok(Lock { held: None }),
            }
            if !said && start.elapsed() > Duration::from_secs(1) {
                said = true;
                say::note(waits);
            }
        }
    }

    /// Makes the link of a file to its blob, where it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn link(&self, commit: &str, entry: &Entry, etag: &str) -> Result<PathBuf> {
        let link = self.snapshot(commit).join(&entry.path);
        if fits(&link, entry.size) {
            return Ok(link);
        }
        create_dir_all(link.parent().expect("a file lies in a folder"))?;
        let above = "../".repeat(2 + entry.path.matches('/').count());
        let _ = fs::remove_file(&link);
        match symlink(format!("{above}blobs/{etag}"), &link) {
            Ok(()) => {}
            Err(_) if fits(&link, entry.size) => {} // Another process was first.
            // A file system without links: the file itself, as Python does it.
            Err(_) => fs::rename(self.blob(etag), &link).at(&link)?,
        }
        Ok(link)
    }
}

/// The snapshot that a folder of the cache stands for: of `models--org--name`, or of its `snapshots`, that of the main branch where it
/// is here, else the newest. `None`: `dir` is no such folder, or holds none.
pub fn snapshot_in(dir: &Path) -> Option<PathBuf> {
    let snapshots = if dir.file_name()? == "snapshots" { dir.to_path_buf() } else { dir.join("snapshots") };
    let root = snapshots.parent()?;
    if !root.join("blobs").is_dir() && !root.join("refs").is_dir() {
        return None;
    }
    let main = fs::read_to_string(root.join("refs/main")).ok().map(|commit| snapshots.join(commit.trim()));
    let newest = || {
        let entries = fs::read_dir(&snapshots).ok()?.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| p.is_dir());
        entries.max_by_key(|p| (fs::metadata(p).and_then(|m| m.modified()).ok(), p.clone()))
    };
    main.filter(|p| p.is_dir()).or_else(newest)
}

/// Whether a file is there, as long as it should be.
pub(super) fn fits(path: &Path, size: Option<u64>) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && size.is_none_or(|size| size == m.len()))
}

/// Whether it can be the name of a file in a folder that others share.
fn is_plain(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && !text.starts_with('.')
}

fn walk(dir: &Path, prefix: &str, out: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Some(name) = entry.file_name().to_str().map(|n| format!("{prefix}{n}")) else { continue };
        let path = entry.path();
        if path.is_dir() {
            walk(&path, &format!("{name}/"), out);
        } else if path.is_file() {
            out.push(name);
        }
    }
}

/// Bytes that may still be written to the file system of a folder, which need not exist yet; `None` where nobody says.
pub fn free_space(dir: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let there = dir.ancestors().find(|d| d.exists())?;
    let path = std::ffi::CString::new(there.as_os_str().as_bytes()).ok()?;
    let mut stats = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: the path ends with a zero, and the other pointer is to a local of the type.
    let ok = unsafe { libc::statvfs(path.as_ptr(), stats.as_mut_ptr()) } == 0;
    // SAFETY: all zeros is a valid `statvfs`, and the call filled it where it succeeded.
    let stats = unsafe { stats.assume_init() };
    #[allow(clippy::unnecessary_cast, reason = "other systems have other widths")]
    ok.then(|| (stats.f_bavail as u64).saturating_mul(stats.f_frsize as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_are_read_written_and_checked() {
        let api = r#"{"sha": "abc", "siblings": [
            {"rfilename": "m.safetensors", "size": 130, "blobId": "b1", "lfs": {"sha256": "AA", "size": 9, "pointerSize": 130}},
            {"rfilename": "a/config.json", "size": 5, "blobId": "b2"}]}"#;
        let bad = Listing::from_api(api).unwrap_err().to_string();
        assert!(bad.contains("checksum is no sha256"), "{bad}");
        let listing = Listing::from_api(&api.replace("AA", &"A".repeat(64))).unwrap();
        let [config, weights] = &listing.entries[..] else { panic!("{listing:?}") };
        assert_eq!((config.path.as_str(), config.size, config.etag.as_deref()), ("a/config.json", Some(5), Some("b2")));
        assert_eq!((weights.size, weights.etag.clone()), (Some(9), Some("a".repeat(64))));
        assert_eq!(Listing::from_json("abc", &listing.to_json().to_string()), Some(listing));
        for path in ["../x", "/x", "a/../b", "", "a\\b"] {
            let text = json!({"sha": "abc", "siblings": [{"rfilename": path}]}).to_string();
            assert!(Listing::from_api(&text).unwrap_err().to_string().contains("inside the repository"), "{path:?}");
        }
        for text in [
            "",
            "{}",
            "[]",
            r#"{"sha": "abc"}"#,
            r#"{"sha": "../x", "siblings": []}"#,
            r#"{"sha": "a", "siblings": [{}]}"#,
        ] {
            Listing::from_api(text).unwrap_err();
        }
    }

    #[test]
    fn a_folder_of_the_cache_stands_for_its_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("models--a--b");
        fs::create_dir_all(root.join("snapshots/c1")).unwrap();
        assert_eq!(snapshot_in(&root), None, "no blobs, no refs: some folder");
        fs::create_dir_all(root.join("refs")).unwrap();
        assert_eq!(snapshot_in(&root), Some(root.join("snapshots/c1")));
        fs::create_dir_all(root.join("snapshots/c0")).unwrap();
        fs::write(root.join("refs/main"), "c0\n").unwrap();
        assert_eq!(snapshot_in(&root.join("snapshots")), Some(root.join("snapshots/c0")));
        fs::write(root.join("refs/main"), "gone").unwrap();
        assert!(snapshot_in(&root).is_some());
        assert_eq!(snapshot_in(dir.path()), None);
    }

    #[test]
    fn free_space_of_what_is_not_there_yet() {
        assert!(free_space(Path::new("/tmp/surely/not/there")).unwrap() > 0);
    }
}
