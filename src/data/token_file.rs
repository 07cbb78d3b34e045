//! Token files: documents as ids with a loss bit each, memory-mapped, checked before the first byte is used.
//!
//! Little-endian, every section padded with zeros to a multiple of 8 bytes:
//!
//! ```text
//!   0  magic "RINGTOKS"        8  version u32       12  token bytes u32 (2 or 4)
//!  16  vocabulary u64         24  documents u64     32  tokens u64          40  supervised tokens u64
//!  48  metadata bytes u64     56  tokenizer hash, 32 bytes                  88  settings hash, 32 bytes
//! 120  checksum, 32 bytes: blake3 of bytes 0..120 and of everything from 152 on
//! 152  metadata (JSON) | document ends u64 each | documents 24 bytes each | loss bits | tokens
//! ```
//!
//! A document entry: line u32, targets u32, hash of the prompt u64, source u32, zero u32. Tokens take 2 bytes where the
//! vocabulary allows it. The file is written under a temporary name, synced and renamed, so a name always
//! stands for a whole file; sizes are compared with the file's length before anything is allocated.

use std::path::Path;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::data::encode::Encoded;
use crate::error::{Error, Result};
use crate::mapped::Mapped;
use crate::{bail, ensure};

mod writer;

pub use writer::Writer;

const MAGIC: &[u8; 8] = b"RINGTOKS";
/// Version of the format; a file of another one is refused.
pub const VERSION: u32 = 1;
const CHECKSUM_AT: usize = 120;
const HEADER: usize = 152;
const DOC_BYTES: u64 = 24;

/// What is known of a document besides its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DocInfo {
    /// Line of its row in the source, from 1; for plain text the line where it starts.
    pub line: u32,
    /// Supervised tokens that something predicts (all but a supervised first one).
    pub n_targets: u32,
    /// First 8 bytes of the blake3 hash of all turns before the last answer; equal ones have equal hashes.
    pub prompt_hash: u64,
    /// Which of the sources in the metadata it came from.
    pub source: u32,
}

/// What became of the rows of a source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Rows read, bad ones left out.
    pub rows: u64,
    /// Documents kept.
    pub kept: u64,
    /// Of these, cut to the row length.
    pub truncated: u64,
    /// Left out: longer than a row with `--overflow drop`.
    pub too_long: u64,
    /// Left out: the whole response would have been cut away.
    pub response_cut: u64,
    /// Left out: nothing in it is supervised.
    pub unsupervised: u64,
    /// Left out with `--skip-bad-rows`.
    pub bad: u64,
    /// Lines of white space alone.
    pub blank_lines: u64,
}

/// What the rows showed while they were encoded; lines are those of the first source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    /// Tokens of the longest row before it was cut or left out, and its line; 0 tokens without rows.
    pub longest_row: (u64, u32),
    /// Rows with a newline that the tokenizer loses: how many, and the first one's line.
    pub newlines_lost: (u64, u32),
    /// Rows with other white space that it changes.
    pub blanks_lost: (u64, u32),
    /// Rows with text that became `<unk>`.
    pub unknown: (u64, u32),
}

impl Findings {
    /// Counts one row at `line`.
    pub fn count(what: &mut (u64, u32), line: u32) {
        if what.0 == 0 {
            what.1 = line;
        }
        what.0 += 1;
    }
}

/// The JSON part of a token file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Where the documents came from.
    pub sources: Vec<String>,
    /// Name of the template; empty for plain text.
    pub template: String,
    /// The settings that decided the tokens, by name.
    pub settings: serde_json::Value,
    /// The forms of the rows, and what the file was besides JSON Lines; empty in files of earlier builds.
    #[serde(default)]
    pub form: String,
    /// Keys that say something and were not read, in how many rows, and the first one's line.
    #[serde(default)]
    pub ignored: Vec<(String, u64, u32)>,
    /// What became of the rows.
    pub counts: Counts,
    /// Bad lines that were skipped: line and what is wrong.
    pub bad: Vec<(u32, String)>,
    /// Length of the longest document.
    pub longest: u64,
    /// What the rows showed; `None` for text, and in files of earlier builds.
    #[serde(default)]
    pub findings: Option<Findings>,
}

fn padded(n: u64) -> Option<u64> {
    n.checked_next_multiple_of(8)
}

/// An open token file.
#[derive(Debug)]
pub struct TokenFile {
    map: Mapped,
    meta: Meta,
    vocab_size: usize,
    token_bytes: usize,
    n_docs: usize,
    n_tokens: u64,
    n_supervised: u64,
    /// Byte offsets of the sections.
    ends_at: usize,
    docs_at: usize,
    bits_at: usize,
    tokens_at: usize,
    /// [`TokenFile::content_hash`], once it was asked for: it reads the whole file, and training and validation rows share one.
    content: OnceLock<String>,
}

impl TokenFile {
    /// Whether the bytes start like a token file.
    pub fn is_token_file(head: &[u8]) -> bool {
        head.starts_with(MAGIC)
    }

    /// Maps a token file and checks all of it: magic, version, sizes against the file's length, checksum, document index, and
    /// every token against the vocabulary.
    ///
    /// # Errors
    /// If anything is wrong, with what was expected and found.
    pub fn open(path: &Path) -> Result<Self> {
        let context = || format!("token file {}", path.display());
        Mapped::open(path).and_then(Self::check).map_err(|e| e.context(context()))
    }

    fn check(map: Mapped) -> Result<Self> {
        let bytes: &[u8] = &map;
        ensure!(bytes.len() >= HEADER, "truncated, expected at least {HEADER} bytes, found {}", bytes.len());
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        ensure!(&bytes[..8] == MAGIC, "wrong magic, expected {MAGIC:?}, found {:?}", &bytes[..8]);
        ensure!(u32_at(8) == VERSION, "wrong version, expected {VERSION}, found {}; make it again", u32_at(8));
        let (token_bytes, vocab) = (u64::from(u32_at(12)), u64_at(16));
        let (n_docs, n_tokens, n_supervised, n_meta) = (u64_at(24), u64_at(32), u64_at(40), u64_at(48));
        let wanted = if vocab <= 1 << 16 { 2 } else { 4 };
        ensure!(
            vocab <= 1 << 32 && token_bytes == wanted,
            "expected {wanted} bytes a token for a vocabulary of {vocab}, found {token_bytes}"
        );
        // Offsets in checked arithmetic: the counts are untrusted until they agree with the file's length.
        let layout = || -> Option<[u64; 5]> {
            let ends_at = (HEADER as u64).checked_add(padded(n_meta)?)?;
            let docs_at = ends_at.checked_add(n_docs.checked_mul(8)?)?;
            let bits_at = docs_at.checked_add(n_docs.checked_mul(DOC_BYTES)?)?;
            let tokens_at = bits_at.checked_add(padded(n_tokens.div_ceil(8))?)?;
            let end = tokens_at.checked_add(padded(n_tokens.checked_mul(token_bytes)?)?)?;
            Some([ends_at, docs_at, bits_at, tokens_at, end])
        };
        let found = bytes.len() as u64;
        let Some([ends_at, docs_at, bits_at, tokens_at, end]) = layout() else {
            bail!(
                "damaged header: {n_docs} documents, {n_tokens} tokens and {n_meta} bytes of metadata exceed any file"
            )
        };
        ensure!(
            end == found,
            "{}, expected {end} bytes for {n_docs} documents and {n_tokens} tokens, found {found}",
            if found < end { "truncated" } else { "too long" }
        );
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes[..CHECKSUM_AT]).update(&bytes[HEADER..]);
        let (expected, found) = (&bytes[CHECKSUM_AT..HEADER], hasher.finalize());
        ensure!(
            expected == found.as_bytes(),
            "wrong checksum, expected {}, found {found}; the file is damaged, make it again",
            hex(expected)
        );
        let meta_end = HEADER + n_meta as usize;
        let meta: Meta = serde_json::from_slice(&bytes[HEADER..meta_end])
            .map_err(|e| Error::new(format!("damaged metadata: {e}")))?;
        let this = Self {
            meta,
            vocab_size: vocab as usize,
            token_bytes: token_bytes as usize,
            n_docs: n_docs as usize,
            n_tokens,
            n_supervised,
            ends_at: ends_at as usize,
            docs_at: docs_at as usize,
            bits_at: bits_at as usize,
            tokens_at: tokens_at as usize,
            map,
            content: OnceLock::new(),
        };
        let mut last = 0;
        for doc in 0..this.n_docs {
            let end = this.end_of(doc);
            ensure!(
                end >= last && end - last <= u64::from(u32::MAX),
                "damaged index: document {doc} ends at token {end} after {last}"
            );
            last = end;
        }
        ensure!(last == n_tokens, "damaged index: documents end at token {last}, expected {n_tokens}");
        let beyond = (0..n_tokens).map(|at| this.token(at)).find(|&t| t as usize >= this.vocab_size);
        if let Some(token) = beyond {
            bail!("token {token}, expected one below the vocabulary's {vocab}");
        }
        this.check_whole()?;
        Ok(this)
    }

    /// Refuses a file that was made with another tokenizer or other settings.
    ///
    /// # Errors
    /// If a hash differs, with both.
    pub fn expect(&self, tokenizer_hash: &str, settings_hash: Option<&str>) -> Result<()> {
        let pairs = [
            ("tokenizer", Some(tokenizer_hash), self.tokenizer_hash()),
            ("settings", settings_hash, self.settings_hash()),
        ];
        for (what, expected, found) in pairs {
            if let Some(expected) = expected.filter(|e| *e != found) {
                bail!(
                    "token file {}: made with another {what}, expected hash {expected}, found {found}; make it again",
                    self.path().display()
                );
            }
        }
        Ok(())
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        self.map.path()
    }

    /// Whether what was read so far came from the file as it was opened.
    ///
    /// # Errors
    /// If another program cut it.
    pub fn check_whole(&self) -> Result<()> {
        self.map.check()
    }

    /// The JSON part.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Size of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Bytes of a token: 2 or 4.
    pub fn token_bytes(&self) -> usize {
        self.token_bytes
    }

    /// Number of documents.
    pub fn n_docs(&self) -> usize {
        self.n_docs
    }

    /// Number of tokens.
    pub fn n_tokens(&self) -> u64 {
        self.n_tokens
    }

    /// Number of supervised tokens.
    pub fn n_supervised(&self) -> u64 {
        self.n_supervised
    }

    /// blake3 of the tokenizer's file, hex.
    pub fn tokenizer_hash(&self) -> String {
        hex(&self.map[56..88])
    }

    /// Key of what decided the tokens, hex.
    pub fn settings_hash(&self) -> String {
        hex(&self.map[88..CHECKSUM_AT])
    }

    /// The file's checksum, hex.
    pub fn checksum(&self) -> String {
        hex(&self.map[CHECKSUM_AT..HEADER])
    }

    /// blake3 of the documents alone, hex: what is trained on, wherever the rows and the token file lay.
    pub fn content_hash(&self) -> String {
        let hash = || {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&self.map[self.ends_at..self.docs_at]).update(&self.map[self.bits_at..]);
            hasher.finalize().to_hex().to_string()
        };
        self.content.get_or_init(hash).clone()
    }

    fn end_of(&self, doc: usize) -> u64 {
        let at = self.ends_at + 8 * doc;
        u64::from_le_bytes(self.map[at..at + 8].try_into().expect("8 bytes"))
    }

    fn start_of(&self, doc: usize) -> u64 {
        if doc == 0 { 0 } else { self.end_of(doc - 1) }
    }

    /// Tokens of a document.
    ///
    /// # Panics
    /// If there is no such document.
    pub fn doc_len(&self, doc: usize) -> usize {
        assert!(doc < self.n_docs, "document {doc} of {}", self.n_docs);
        (self.end_of(doc) - self.start_of(doc)) as usize
    }

    /// What is known of a document.
    ///
    /// # Panics
    /// If there is no such document.
    pub fn info(&self, doc: usize) -> DocInfo {
        assert!(doc < self.n_docs, "document {doc} of {}", self.n_docs);
        let at = self.docs_at + DOC_BYTES as usize * doc;
        let u32_at = |o: usize| u32::from_le_bytes(self.map[at + o..at + o + 4].try_into().expect("4 bytes"));
        DocInfo {
            line: u32_at(0),
            n_targets: u32_at(4),
            prompt_hash: u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32,
            source: u32_at(16),
        }
    }

    fn token(&self, at: u64) -> u32 {
        let at = self.tokens_at + at as usize * self.token_bytes;
        match self.token_bytes {
            2 => u32::from(u16::from_le_bytes([self.map[at], self.map[at + 1]])),
            _ => u32::from_le_bytes(self.map[at..at + 4].try_into().expect("4 bytes")),
        }
    }

    /// Calls `each(token, supervised)` for `len` tokens of a document from `start` on.
    ///
    /// # Panics
    /// If the document has no such tokens.
    pub fn visit(&self, doc: usize, start: usize, len: usize, mut each: impl FnMut(u32, bool)) {
        assert!(
            start + len <= self.doc_len(doc),
            "tokens {start}..{} of document {doc} with {}",
            start + len,
            self.doc_len(doc)
        );
        let from = self.start_of(doc) + start as u64;
        for at in from..from + len as u64 {
            let bit = self.map[self.bits_at + (at / 8) as usize] >> (at % 8) & 1;
            each(self.token(at), bit == 1);
        }
    }

    /// A document as it was encoded.
    pub fn doc(&self, doc: usize) -> Encoded {
        let mut out = Encoded::default();
        self.visit(doc, 0, self.doc_len(doc), |token, supervised| {
            out.tokens.push(token);
            out.supervised.push(supervised);
        });
        out
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
