//! One file over HTTP: resumed where the connection broke, its length and checksum verified while it comes.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crossbeam::channel::bounded;
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use ureq::Body;
use ureq::http::{HeaderMap, Response};

use super::checksum::{Checksum, hex};
use super::client::{Client, Failure, header};
use crate::error::Error;
use crate::say;

/// What is fetched, and where to.
#[derive(Clone, Copy, Debug)]
pub struct Transfer<'a> {
    /// Where it is.
    pub url: &'a str,
    /// What it is called while it comes.
    pub name: &'a str,
    /// The file that grows; it keeps what came when an attempt ends.
    pub part: &'a Path,
    /// The name of `part` does not say which content it is the beginning of: the server's tag is kept beside it, and has to be the same.
    pub tagged: bool,
    /// The length, where it is known.
    pub size: Option<u64>,
    /// The checksum, where it is known before the server names one. A sha256 that the server names goes before git's hash, which is that of a
    /// pointer where a list does not say that a file is large.
    pub checksum: Option<&'a Checksum>,
}

enum Receive {
    Remote(String),
    Local(std::io::Error),
}

impl Transfer<'_> {
    /// How many bytes of it are here.
    pub fn have(&self) -> u64 {
        fs::metadata(self.part).map_or(0, |m| m.len())
    }

    /// One attempt: asks for what is missing of `part`, appends it, and checks the whole. `moved` is told of each piece.
    ///
    /// # Errors
    /// [`Failure::Retry`] where the connection broke or what came is wrong (then nothing of it is kept); the server's refusal; if
    /// `part` cannot be written.
    pub fn attempt(&self, client: &Client, moved: &dyn Fn(u64)) -> Result<(), Failure> {
        let local = |e: std::io::Error| Failure::Fatal(explain(self.part, &e));
        let tag = if self.tagged { fs::read_to_string(self.tag_path()).unwrap_or_default() } else { String::new() };
        // Without the tag of what the first bytes belong to, they are worth nothing.
        let mut have = if self.tagged && tag.is_empty() { 0 } else { self.have() };
        if self.size.is_some_and(|size| have > size) {
            have = 0;
        }
        if self.size == Some(have) && have > 0 {
            return self.finish(self.checksum, have, None);
        }
        let mut headers = Vec::new();
        if have > 0 {
            headers.push(("range", format!("bytes={have}-")));
            if self.tagged {
                headers.push(("if-range", tag.clone()));
            }
        }
        let answer = client.get(self.url, &headers)?;
        let named = answer.sha256.map(Checksum::Sha256);
        let (response, checksum) = match self.checksum {
            Some(known @ Checksum::Sha256(_)) => (answer.response, Some(known)),
            known => (answer.response, named.as_ref().or(known)),
        };
        let status = response.status().as_u16();
        let new_tag = header(response.headers(), "etag").unwrap_or_default();
        let start = match status {
            200 => 0,
            206 if range_start(response.headers()) == Some(have) && (!self.tagged || new_tag == tag) => have,
            // Everything was there already, or the upstream file changed: start over.
            _ => {
                let _ = fs::remove_file(self.part);
                return Err(Failure::Retry(format!("cannot resume (status {status})"), Some(Duration::ZERO)));
            }
        };
        let length: Option<u64> = header(response.headers(), "content-length").and_then(|v| v.parse().ok());
        if let (Some(size), Some(length)) = (self.size, length)
            && start + length != size
        {
            return Err(Failure::Retry(format!("expected {size} bytes, the server offers {}", start + length), None));
        }
        if self.tagged {
            fs::write(self.tag_path(), &new_tag).map_err(local)?;
        }
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .read(true)
            .truncate(start == 0)
            .open(self.part)
            .map_err(local)?;
        // Git's hash begins with the length; it is of small files alone, which are read again.
        let mut hasher = matches!(checksum, Some(Checksum::Sha256(_))).then(Sha256::new);
        if let Some(hasher) = &mut hasher {
            hash_up_to(&mut file, start, hasher).map_err(local)?;
        }
        file.seek(SeekFrom::Start(start)).map_err(local)?;
        let got = self.receive(response, &mut file, start, length, client.stall(), &mut hasher, moved);
        let got = got.map_err(|e| match e {
            Receive::Remote(message) => Failure::Retry(message, None),
            Receive::Local(e) => local(e),
        })?;
        if let Some(want) = length.or(self.size.map(|size| size - start)).filter(|&want| want != got) {
            let (have, want) = (start + got, start + want);
            return Err(Failure::Retry(format!("the connection ended after {have} of {want} bytes"), None));
        }
        file.sync_all().map_err(local)?;
        self.finish(checksum, start + got, hasher)
    }

    /// Compares the checksum, of what was hashed on the way or of the file.
    fn finish(&self, checksum: Option<&Checksum>, length: u64, hasher: Option<Sha256>) -> Result<(), Failure> {
        let Some(checksum) = checksum else { return Ok(()) };
        let wrong = match hasher {
            Some(hasher) => Ok(checksum.compared(&hex(&hasher.finalize()))),
            None => File::open(self.part).and_then(|file| checksum.differs(file, length)),
        };
        match wrong {
            Ok(None) => Ok(()),
            Ok(Some(wrong)) => {
                let _ = fs::remove_file(self.part);
                Err(Failure::Retry(wrong, None))
            }
            Err(e) => Err(Failure::Fatal(explain(self.part, &e))),
        }
    }

    /// Where the tag of a partial file is kept.
    pub fn tag_path(&self) -> PathBuf {
        self.part.with_extension("part-tag")
    }

    /// Copies the body into the file; gives the number of bytes received.
    #[allow(clippy::too_many_arguments, reason = "one call, each of another kind")]
    fn receive(
        &self,
        response: Response<Body>,
        file: &mut File,
        start: u64,
        length: Option<u64>,
        stall: Duration,
        hasher: &mut Option<Sha256>,
        moved: &dyn Fn(u64),
    ) -> Result<u64, Receive> {
        let bar = if say::is_main() { ProgressBar::new(start + length.unwrap_or(0)) } else { ProgressBar::hidden() };
        let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}";
        bar.set_style(ProgressStyle::with_template(style).expect("the progress template is valid"));
        bar.set_message(self.name.to_string());
        bar.set_position(start);
        bar.reset_eta();
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
                    if let Some(hasher) = hasher {
                        hasher.update(&chunk);
                    }
                    got += chunk.len() as u64;
                    bar.inc(chunk.len() as u64);
                    moved(start + got);
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
}

/// What a full disk means here.
fn explain(path: &Path, e: &std::io::Error) -> Error {
    let full = matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG));
    let hint = match full {
        true => {
            "; the disk or quota is full: free some space, or keep downloads elsewhere (HF_HOME; prepare: --cache-dir); what came is kept"
        }
        false => "",
    };
    Error::new(format!("{}: {e}{hint}", path.display()))
}

/// First byte of a `content-range: bytes A-B/N` header.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    header(headers, "content-range")?.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// Feeds the first `n` bytes of a file to `hasher`.
fn hash_up_to(file: &mut File, n: u64, hasher: &mut Sha256) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(0))?;
    let mut front = file.take(n);
    let mut buf = vec![0u8; 1 << 17];
    loop {
        match front.read(&mut buf)? {
            0 => return Ok(()),
            n => hasher.update(&buf[..n]),
        }
    }
}
