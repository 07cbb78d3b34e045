//! Writing a token file, document by document.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::{DocInfo, HEADER, MAGIC, Meta, VERSION};
use crate::data::encode::Encoded;
use crate::ensure;
use crate::error::{Context, Error, Result};
use crate::files::{At, create_dir_all, explain, nameless_beside, parent, write_atomic};

fn hash_bytes(hex: &str, what: &str) -> Result<[u8; 32]> {
    Ok(*blake3::Hash::from_hex(hex).map_err(|e| Error::new(format!("{what} hash {hex:?}: {e}")))?.as_bytes())
}

/// A token file being written, document by document. Of what it was given it holds about 40 bytes a document and one bit a token;
/// the tokens wait in a file without a name in the same folder, which goes with the process.
pub struct Writer {
    path: PathBuf,
    vocab_size: usize,
    token_bytes: usize,
    spool: BufWriter<File>,
    ends: Vec<u8>,
    infos: Vec<u8>,
    bits: Vec<u8>,
    n_docs: u64,
    n_tokens: u64,
    n_supervised: u64,
    longest: u64,
}

impl Writer {
    /// An empty one that becomes `path` when it is finished, for a vocabulary with its added tokens.
    ///
    /// # Errors
    /// If the folder cannot be written to.
    pub fn new(path: &Path, vocab_size: usize) -> Result<Self> {
        create_dir_all(&parent(path))?;
        Ok(Self {
            path: path.to_path_buf(),
            vocab_size,
            token_bytes: if vocab_size <= 1 << 16 { 2 } else { 4 },
            spool: BufWriter::with_capacity(1 << 20, nameless_beside(path)?),
            ends: Vec::new(),
            infos: Vec::new(),
            bits: Vec::new(),
            n_docs: 0,
            n_tokens: 0,
            n_supervised: 0,
            longest: 0,
        })
    }

    /// Adds a document.
    ///
    /// # Errors
    /// If a token is outside the vocabulary, or the disk is full.
    pub fn push(&mut self, info: &DocInfo, doc: &Encoded) -> Result<()> {
        for (i, &token) in doc.tokens.iter().enumerate() {
            ensure!(
                (token as usize) < self.vocab_size,
                "token {token}, expected one below the vocabulary's {}",
                self.vocab_size
            );
            let bytes = token.to_le_bytes();
            self.spool.write_all(&bytes[..self.token_bytes]).at(&self.path).context(|| {
                format!("writing a token file, {} bytes of tokens so far", self.n_tokens * self.token_bytes as u64)
            })?;
            if self.n_tokens.is_multiple_of(8) {
                self.bits.push(0);
            }
            if doc.supervised.get(i) == Some(&true) {
                *self.bits.last_mut().expect("one was pushed") |= 1 << (self.n_tokens % 8);
                self.n_supervised += 1;
            }
            self.n_tokens += 1;
        }
        self.n_docs += 1;
        self.longest = self.longest.max(doc.tokens.len() as u64);
        self.ends.extend(self.n_tokens.to_le_bytes());
        self.infos.extend(info.line.to_le_bytes());
        self.infos.extend(info.n_targets.to_le_bytes());
        self.infos.extend(info.prompt_hash.to_le_bytes());
        self.infos.extend(info.source.to_le_bytes());
        self.infos.extend(0u32.to_le_bytes());
        Ok(())
    }

    /// Documents so far.
    pub fn n_docs(&self) -> u64 {
        self.n_docs
    }

    /// Tokens of the longest document so far.
    pub fn longest(&self) -> u64 {
        self.longest
    }

    /// Writes the file: temporary name, sync, rename. `hashes`: the tokenizer's file, and the key of all that decided the tokens.
    ///
    /// # Errors
    /// If it cannot be written; no partial file is left.
    pub fn finish(self, meta: &Meta, [tokenizer, settings]: [&str; 2]) -> Result<()> {
        let Self { path, vocab_size, token_bytes, ends, infos, mut bits, n_docs, n_tokens, n_supervised, .. } = self;
        let mut index = serde_json::to_vec(meta).map_err(|e| Error::new(format!("metadata: {e}")))?;
        let mut header = Vec::with_capacity(HEADER);
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend((token_bytes as u32).to_le_bytes());
        for n in [vocab_size as u64, n_docs, n_tokens, n_supervised, index.len() as u64] {
            header.extend(n.to_le_bytes());
        }
        header.extend(hash_bytes(tokenizer, "tokenizer")?);
        header.extend(hash_bytes(settings, "settings")?);
        let pad = |bytes: &mut Vec<u8>| bytes.resize(bytes.len().next_multiple_of(8), 0);
        pad(&mut index);
        pad(&mut bits);
        let what = || format!("writing a token file of {n_tokens} tokens, {token_bytes} bytes each");
        let mut spool = self.spool.into_inner().map_err(|e| explain(&path, e.error()).context(what()))?;
        // What follows the header: the index in memory, then the tokens and what fills them up to 8 bytes.
        let mut body = |each: &mut dyn FnMut(&[u8]) -> std::io::Result<()>| -> std::io::Result<()> {
            [&index, &ends, &infos, &bits].into_iter().try_for_each(|part| each(part))?;
            spool.seek(SeekFrom::Start(0))?;
            let (mut left, mut chunk) = (n_tokens * token_bytes as u64, vec![0; 1 << 20]);
            while left > 0 {
                let n = chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                spool.read_exact(&mut chunk[..n])?;
                each(&chunk[..n])?;
                left -= n as u64;
            }
            let tokens = n_tokens * token_bytes as u64;
            each(&[0; 8][..(tokens.next_multiple_of(8) - tokens) as usize])
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update(&header);
        body(&mut |bytes| {
            hasher.update(bytes);
            Ok(())
        })
        .at(&path)?;
        header.extend(hasher.finalize().as_bytes());
        let bytes = header.len() + index.len() + ends.len() + infos.len() + bits.len();
        let bytes = bytes as u64 + (n_tokens * token_bytes as u64).next_multiple_of(8);
        write_atomic(&path, |out| {
            out.write_all(&header)?;
            Ok(body(&mut |bytes| out.write_all(bytes))?)
        })
        .context(|| format!("token file of {bytes} bytes"))
    }
}
