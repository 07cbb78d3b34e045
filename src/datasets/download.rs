//! Downloads an upstream file: retries with backoff, resumes where the connection broke, checks length and checksum, caches.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crossbeam::channel::bounded;
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use ureq::http::{HeaderMap, Response};
use ureq::{Agent, Body};

use crate::error::{Context, Error, Result};
use crate::files::create_dir_all;
use crate::{bail, ensure, say};

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

/// Longest time for a body; the next attempt resumes it.
const LONGEST: Duration = Duration::from_secs(6 * 3600);

/// What went wrong in one attempt.
enum Failure {
    /// Another attempt may succeed; after this long, if the server said so.
    Retry(String, Option<Duration>),
    /// It will not get better.
    Fatal(Error),
}

impl Downloader {
    /// Settings from the environment: `HF_ENDPOINT`, `HF_TOKEN`; the cache is `cache` or the user's cache folder.
    /// Proxies (`HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY`) are honoured by the HTTP client.
    ///
    /// # Errors
    /// If no cache folder is given and neither `XDG_CACHE_HOME` nor `HOME` is set.
    pub fn from_env(cache: Option<PathBuf>) -> Result<Self> {
        let var = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
        let cache = match cache {
            Some(dir) => dir,
            None => var("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(|| var("HOME").map(|h| Path::new(&h).join(".cache")))
                .map(|base| base.join("ringtune/datasets"))
                .ok_or_else(|| {
                    Error::usage("no cache folder: neither XDG_CACHE_HOME nor HOME is set; pass --cache-dir")
                })?,
        };
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_string(),
            token: var("HF_TOKEN"),
            cache,
            attempts: 6,
            backoff: Duration::from_millis(500),
            stall: Duration::from_secs(60),
        })
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
        let folder = target.parent().expect("a cached file has a folder");
        create_dir_all(folder).context(|| "the cache of data sets".to_string())?;
        let url = format!("{}/datasets/{}/resolve/main/{}", self.endpoint, file.repo, file.path);
        let part = target.with_file_name(format!(
            "{}.part",
            target.file_name().expect("a cached file has a name").to_string_lossy()
        ));
        let mut pause = self.backoff;
        for attempt in 1..=self.attempts {
            let (message, after) = match self.attempt(&url, &part) {
                Ok(()) => {
                    fs::rename(&part, &target).context(|| target.display().to_string())?;
                    let _ = fs::remove_file(tag_path(&part));
                    return Ok(target);
                }
                Err(Failure::Fatal(e)) => return Err(e.context(format!("download of {url}"))),
                Err(Failure::Retry(message, after)) => (message, after),
            };
            if attempt == self.attempts {
                bail!(
                    "download of {url}: {message}; gave up after {attempt} attempts; run the command again to go on where it \
                     stopped, or pass --source-dir with a copy of the file"
                );
            }
            let wait = after.unwrap_or(pause).min(Duration::from_secs(60));
            say::warning(&format!(
                "download of {url}: {message}; attempt {} of {} in {wait:.1?}",
                attempt + 1,
                self.attempts
            ));
            std::thread::sleep(wait);
            pause *= 2;
        }
        bail!("download of {url}: no attempt was allowed; expected at least 1")
    }

    /// One attempt: asks for what is missing of `part`, appends it, and checks the whole.
    fn attempt(&self, url: &str, part: &Path) -> std::result::Result<(), Failure> {
        let agent: Agent = Agent::config_builder()
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(self.stall))
            .timeout_recv_body(Some(LONGEST))
            .user_agent(concat!("ringtune/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        let local = |e: std::io::Error| Failure::Fatal(Error::new(format!("{}: {e}", part.display())));
        let have = fs::metadata(part).map_or(0, |m| m.len());
        let tag = fs::read_to_string(tag_path(part)).unwrap_or_default();
        // Without the tag of what the first bytes belong to, they are worth nothing.
        let have = if tag.is_empty() { 0 } else { have };
        let (response, sha256) = self.follow(&agent, url, have, &tag)?;
        let status = response.status().as_u16();
        let new_tag = header(response.headers(), "etag").unwrap_or_default();
        let start = match status {
            200 => 0,
            206 if new_tag == tag && range_start(response.headers()) == Some(have) => have,
            // Everything was there already, or the upstream file changed: start over unless the length says it is whole.
            _ => {
                let _ = fs::remove_file(part);
                return Err(Failure::Retry(format!("cannot resume (status {status})"), Some(Duration::ZERO)));
            }
        };
        let length: Option<u64> = header(response.headers(), "content-length").and_then(|v| v.parse().ok());
        fs::write(tag_path(part), &new_tag).map_err(local)?;
        let mut file = OpenOptions::new().create(true).write(true).truncate(start == 0).open(part).map_err(local)?;
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(start)).map_err(local)?;
        let got = receive(response, &mut file, start, length, url, self.stall).map_err(|e| match e {
            Receive::Remote(m) => Failure::Retry(m, None),
            Receive::Local(e) => local(e),
        })?;
        if length.is_some_and(|want| got != want) {
            let want = start + length.unwrap_or(0);
            return Err(Failure::Retry(format!("the connection ended after {} of {want} bytes", start + got), None));
        }
        file.sync_all().map_err(local)?;
        if let Some(want) = sha256 {
            let found = hash(part).map_err(local)?;
            if found != want {
                let _ = fs::remove_file(part);
                return Err(Failure::Retry(format!("checksum mismatch: expected sha256 {want}, found {found}"), None));
            }
        }
        Ok(())
    }

    /// Sends the request and follows redirects by hand: the token must not leave the endpoint, and the checksum comes with the
    /// first answer. Gives the final answer (200, 206 or 416) and the sha256 the endpoint named.
    fn follow(
        &self,
        agent: &Agent,
        url: &str,
        have: u64,
        tag: &str,
    ) -> std::result::Result<(Response<Body>, Option<String>), Failure> {
        let mut url = url.to_string();
        let mut sha256 = None;
        for _ in 0..8 {
            let mut request = agent.get(&url);
            if let Some(token) = self.token.as_ref().filter(|_| same_origin(&url, &self.endpoint)) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            if have > 0 {
                request = request.header("range", format!("bytes={have}-")).header("if-range", tag);
            }
            let response = request.call().map_err(|e| Failure::Retry(e.to_string(), None))?;
            let status = response.status().as_u16();
            let linked = header(response.headers(), "x-linked-etag").map(|v| v.trim_matches('"').to_ascii_lowercase());
            sha256 = sha256.or(linked.filter(|v| v.len() == 64 && v.bytes().all(|b| b.is_ascii_hexdigit())));
            match status {
                200 | 206 | 416 => return Ok((response, sha256)),
                301 | 302 | 303 | 307 | 308 => {
                    let to = header(response.headers(), "location")
                        .ok_or_else(|| Failure::Fatal(Error::new(format!("status {status} without a location"))))?;
                    url = redirected(&url, to).map_err(Failure::Fatal)?;
                }
                429 | 500..=599 => {
                    let after =
                        header(response.headers(), "retry-after").and_then(|v| v.parse().ok()).map(Duration::from_secs);
                    return Err(Failure::Retry(format!("the server answered {status}"), after));
                }
                401 | 403 => {
                    return Err(Failure::Fatal(Error::new(format!(
                        "access denied (status {status}); set HF_TOKEN to a token that may read it, or pass --source-dir"
                    ))));
                }
                _ => {
                    return Err(Failure::Fatal(Error::new(format!("the server answered {status}; expected 200"))));
                }
            }
        }
        Err(Failure::Fatal(Error::new("more than 8 redirects")))
    }
}

enum Receive {
    Remote(String),
    Local(std::io::Error),
}

/// Copies the body into the file; gives the number of bytes received.
fn receive(
    response: Response<Body>,
    file: &mut File,
    start: u64,
    length: Option<u64>,
    url: &str,
    stall: Duration,
) -> std::result::Result<u64, Receive> {
    let bar = ProgressBar::new(start + length.unwrap_or(0));
    let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}";
    bar.set_style(ProgressStyle::with_template(style).expect("the progress template is valid"));
    bar.set_message(url.rsplit('/').next().unwrap_or(url).to_string());
    bar.set_position(start);
    let mut reader = response.into_body().into_reader();
    // The client limits the time of the whole body alone: a thread reads, so that silence is noticed here.
    let (sender, chunks) = bounded(4);
    std::thread::spawn(move || {
        loop {
            let mut buf = vec![0u8; 1 << 17];
            let read = reader.read(&mut buf).map(|n| buf[..n].to_vec());
            let ends = !matches!(&read, Ok(chunk) if !chunk.is_empty());
            if sender.send(read).is_err() || ends {
                return;
            }
        }
    });
    let mut got = 0u64;
    let result = loop {
        let Ok(read) = chunks.recv_timeout(stall) else {
            break Err(Receive::Remote(format!("no byte came for {stall:.0?} after {} bytes", start + got)));
        };
        match read {
            Ok(chunk) if chunk.is_empty() => break Ok(got),
            Ok(chunk) => {
                if let Err(e) = file.write_all(&chunk) {
                    break Err(Receive::Local(e));
                }
                got += chunk.len() as u64;
                bar.inc(chunk.len() as u64);
            }
            Err(e) if length.is_some_and(|want| got < want) || length.is_none() => {
                break Err(Receive::Remote(format!("the connection broke after {} bytes: {e}", start + got)));
            }
            Err(_) => break Ok(got),
        }
    };
    bar.finish_and_clear();
    result
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_string)
}

/// First byte of a `content-range: bytes A-B/N` header.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    header(headers, "content-range")?.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// `scheme://host:port` of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |i| i + 3);
    url[host..].find('/').map_or(url, |i| &url[..host + i])
}

/// Where a redirect leads; what came by https goes on by https.
fn redirected(from: &str, to: String) -> Result<String> {
    let to = if to.starts_with('/') { format!("{}{to}", origin(from)) } else { to };
    let secure = |url: &str| url.get(..8).is_some_and(|s| s.eq_ignore_ascii_case("https://"));
    ensure!(secure(&to) || !secure(from), "redirected from {from}, expected https, found {to}");
    Ok(to)
}

fn same_origin(a: &str, b: &str) -> bool {
    origin(a).eq_ignore_ascii_case(origin(b))
}

/// Where the tag of a partial file is kept.
fn tag_path(part: &Path) -> PathBuf {
    part.with_extension("part-tag")
}

fn hash(path: &Path) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path)?;
    let mut buf = vec![0u8; 1 << 17];
    loop {
        let n = file.read(&mut buf)?;
        if n == 0 {
            return Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect());
        }
        hasher.update(&buf[..n]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn https_leads_to_https_alone() {
        let to = |from: &str, to: &str| redirected(from, to.into()).map_err(|e| e.to_string());
        assert_eq!(to("https://a.b/c", "/d").unwrap(), "https://a.b/d");
        assert_eq!(to("https://a.b/c", "HTTPS://e/d").unwrap(), "HTTPS://e/d");
        assert_eq!(to("http://a.b/c", "http://e/d").unwrap(), "http://e/d");
        for bad in ["http://e/d", "ftp://e", "//e/d"] {
            assert_eq!(to("https://a.b/c", bad).is_err(), bad != "//e/d", "{bad}");
        }
    }
}
