//! Downloads an upstream file of `prepare` into a cache of its own: resumed where the connection broke, length and checksum checked.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::files::create_dir_all;
use crate::hub::{Client, Failure, Transfer, endpoint, is_offline, token};
use crate::{ensure, say};

/// A file of a data set repository on the hub.
#[derive(Clone, Copy, Debug)]
pub struct RemoteFile {
    /// `owner/name` of the data set.
    pub repo: &'static str,
    /// Path inside the repository.
    pub path: &'static str,
}

/// Where and how to download.
#[derive(Clone, Debug)]
pub struct Downloader {
    /// Base address of the hub, without a final slash.
    pub endpoint: String,
    /// Access token, sent to the endpoint only and never to where it redirects.
    pub token: Option<String>,
    /// Folder of finished and partial downloads.
    pub cache: PathBuf,
    /// Attempts in all before giving up.
    pub attempts: u32,
    /// Pause after the first failure; doubled after each further one.
    pub backoff: Duration,
    /// Longest wait for the next byte; the next attempt resumes where a connection fell silent.
    pub stall: Duration,
}

impl Downloader {
    /// Settings from the environment: `HF_ENDPOINT`, `HF_TOKEN`; the cache is `cache` or the user's cache folder.
    /// Proxies (`HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY`) are honoured by the HTTP client.
    ///
    /// # Errors
    /// If no cache folder is given and neither `XDG_CACHE_HOME` nor `HOME` is set.
    pub fn from_env(cache: Option<PathBuf>) -> Result<Self> {
        let cache = match cache {
            Some(dir) => dir,
            None => crate::dirs::user_cache().map(|dir| dir.join("datasets")).ok_or_else(|| {
                Error::usage("no cache folder: neither XDG_CACHE_HOME nor HOME is set; pass --cache-dir")
            })?,
        };
        let (attempts, backoff, stall) = (6, Duration::from_millis(500), Duration::from_secs(60));
        Ok(Self { endpoint: endpoint(), token: token(), cache, attempts, backoff, stall })
    }

    /// The local copy of `file`, downloaded unless the cache has it.
    ///
    /// # Errors
    /// If the file does not exist upstream, access is denied, or every attempt failed; nothing partial is ever returned.
    pub fn fetch(&self, file: RemoteFile) -> Result<PathBuf> {
        let target = self.cache.join(file.repo.replace('/', "--")).join(file.path);
        if target.is_file() {
            say::note(&format!("using cached {}", target.display()));
            return Ok(target);
        }
        let url = format!("{}/datasets/{}/resolve/main/{}", self.endpoint, file.repo, file.path);
        let copy = Path::new(file.path).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let instead = format!("or pass --source-dir with a folder that has {copy}");
        ensure!(!is_offline(), "download of {url}: HF_HUB_OFFLINE is set; unset it, {instead}");
        let folder = target.parent().expect("a cached file has a folder");
        create_dir_all(folder).context(|| "the cache of data sets".to_string())?;
        let part = target.with_file_name(format!("{copy}.part"));
        let client = Client::new(&self.endpoint, self.token.clone(), Duration::from_secs(20), self.stall);
        let transfer = Transfer { url: &url, name: &copy, part: &part, tagged: true, size: None, checksum: None };
        let attempt = || transfer.attempt(&client, &|_| {});
        client
            .insist(&format!("download of {url}"), (self.attempts, self.backoff), || transfer.have(), attempt)
            .map_err(|failure| match failure {
                Failure::Fatal(e) => e,
                Failure::Retry(why, _) | Failure::Unreachable(why) => {
                    Error::new(format!("{why}; run the command again to go on where it stopped, {instead}"))
                }
                Failure::Refused(r) if matches!(r.status, 401 | 403) => Error::new(format!(
                    "access denied (status {}); set HF_TOKEN to a token that may read it, {instead}",
                    r.status
                )),
                Failure::Refused(r) => Error::new(format!("the server answered {}; expected 200; {instead}", r.status)),
            })
            .map_err(|e| e.context(format!("download of {url}")))?;
        fs::rename(&part, &target).context(|| target.display().to_string())?;
        let _ = fs::remove_file(transfer.tag_path());
        Ok(target)
    }
}
