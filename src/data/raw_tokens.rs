//! Flat files of token ids made by other programs: raw u16 or u32 (`.bin` of nanoGPT), and llm.c's form with a header.
//!
//! llm.c: 256 little-endian i32 first: magic 20240520 (version 1, u16 tokens) or 20240801 (version 7, u32 tokens), the version, the
//! number of tokens. Documents end after each EOS id; a file without one is a single document.

use std::path::Path;

use crate::error::Result;
use crate::mapped::Mapped;
use crate::words::words;
use crate::{bail, ensure};

const LLMC_HEADER: usize = 1024;
const LLMC_U16: i32 = 20_240_520;
const LLMC_U32: i32 = 20_240_801;

/// Bytes of a raw token where no header says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawWidth {
    /// 2 bytes.
    U16,
    /// 4 bytes.
    U32,
}
words!(RawWidth { U16 = "u16", U32 = "u32" });

/// A mapped file of ids.
#[derive(Debug)]
pub struct RawTokens {
    map: Mapped,
    at: usize,
    width: usize,
    /// One past the last token of each document.
    ends: Vec<u64>,
    checksum: String,
}

impl RawTokens {
    /// Maps a file and checks every id against the vocabulary. `width` is for files without a header: `None` takes two bytes
    /// where the vocabulary allows it.
    ///
    /// # Errors
    /// If the file cannot be read, its length is no whole number of tokens or not what its header says, or an id is
    /// outside the vocabulary.
    pub fn open(path: &Path, vocab_size: usize, eos: u32, width: Option<RawWidth>) -> Result<Self> {
        let context = || format!("token file {}", path.display());
        let checked = Mapped::open(path).and_then(|map| Self::check(map, vocab_size, eos, width));
        checked.map_err(|e| e.context(context()))
    }

    fn check(map: Mapped, vocab_size: usize, eos: u32, asked: Option<RawWidth>) -> Result<Self> {
        ensure!(!map.is_empty(), "expected token ids, found an empty file");
        let i32_at = |i: usize| map.get(4 * i..4 * i + 4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let magic = i32_at(0).filter(|m| [LLMC_U16, LLMC_U32].contains(m));
        let (at, width) = match magic {
            Some(magic) => {
                let (bytes, version) = if magic == LLMC_U16 { (2, 1) } else { (4, 7) };
                ensure!(
                    map.len() >= LLMC_HEADER,
                    "truncated, expected a header of {LLMC_HEADER} bytes, found {}",
                    map.len()
                );
                let (found, n) = (i32_at(1).unwrap_or(0), i32_at(2).unwrap_or(0));
                ensure!(found == version, "wrong version, expected {version} with magic {magic}, found {found}");
                let expected = LLMC_HEADER as i64 + i64::from(n) * bytes;
                ensure!(
                    n > 0 && expected == map.len() as i64,
                    "expected {expected} bytes for {n} tokens, found {}",
                    map.len()
                );
                (LLMC_HEADER, bytes as usize)
            }
            None => {
                let narrow = asked.map_or(vocab_size <= 1 << 16, |w| w == RawWidth::U16);
                (0, if narrow { 2 } else { 4 })
            }
        };
        let body = &map[at..];
        let wide = likely_width(body);
        if at == 0 && (width == 2 && asked.is_none() || width == 4) && wide > width {
            let advice = match wide {
                4 => "pass --raw-width u32 (or u16 to read it as it is)",
                _ => "write it as uint16 or uint32",
            };
            bail!(
                "the high bytes of every token are 0: the file looks like {wide} bytes a token, read as {width}; {advice}"
            );
        }
        ensure!(
            body.len().is_multiple_of(width),
            "expected a whole number of {width}-byte tokens, found {} bytes",
            body.len()
        );
        let checksum = blake3::hash(&map).to_hex().to_string();
        let mut this = Self { at, width, ends: Vec::new(), checksum, map };
        let n = (this.map.len() - at) / width;
        for i in 0..n {
            let token = this.token(i as u64);
            if token as usize >= vocab_size {
                let other = if width == 2 { "4" } else { "2" };
                bail!(
                    "token {i} is {token}, expected one below the vocabulary's {vocab_size}; the file is of another tokenizer or has {other} bytes a token"
                );
            }
            if token == eos || i + 1 == n {
                this.ends.push(i as u64 + 1);
            }
        }
        ensure!(u32::try_from(this.ends.len()).is_ok(), "{} documents, expected fewer than 2^32", this.ends.len());
        this.check_whole()?;
        Ok(this)
    }

    fn token(&self, i: u64) -> u32 {
        let at = self.at + i as usize * self.width;
        let b = &self.map[at..at + self.width];
        if self.width == 2 {
            u32::from(u16::from_le_bytes([b[0], b[1]]))
        } else {
            u32::from_le_bytes([b[0], b[1], b[2], b[3]])
        }
    }

    /// What the file is, in words.
    pub fn form(&self) -> String {
        format!("raw tokens, u{}", 8 * self.width)
    }

    /// Number of documents.
    pub fn n_docs(&self) -> usize {
        self.ends.len()
    }

    fn start_of(&self, doc: usize) -> u64 {
        if doc == 0 { 0 } else { self.ends[doc - 1] }
    }

    /// Tokens of a document.
    pub fn doc_len(&self, doc: usize) -> usize {
        (self.ends[doc] - self.start_of(doc)) as usize
    }

    /// Calls `each(token, true)` for a part of a document: every token is supervised.
    pub fn visit(&self, doc: usize, start: usize, len: usize, mut each: impl FnMut(u32, bool)) {
        let from = self.start_of(doc) + start as u64;
        (from..from + len as u64).for_each(|i| each(self.token(i), true));
    }

    /// Whether what was read so far came from the file as it was opened.
    ///
    /// # Errors
    /// If another program cut it.
    pub fn check_whole(&self) -> Result<()> {
        self.map.check()
    }

    /// blake3 of the file, hex.
    pub fn checksum(&self) -> &str {
        &self.checksum
    }
}

/// Bytes of a token as far as its high bytes show it: nobody's text has id 0 in every second place.
fn likely_width(body: &[u8]) -> usize {
    let parts = || body.chunks_exact(8).take(1 << 15);
    let empty = |bytes: &[usize]| parts().all(|part| bytes.iter().all(|&i| part[i] == 0));
    match () {
        () if parts().count() < 8 || empty(&[0, 1]) => 2,
        () if empty(&[2, 3, 4, 5, 6, 7]) => 8,
        () if empty(&[2, 3, 6, 7]) => 4,
        () => 2,
    }
}
