//! Token files by content: a file's name is the hash of everything that decided its tokens, so a cached one is never stale.

use std::path::{Path, PathBuf};

use crate::data::token_file::{self, Meta, TokenFile, Writer};
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;

/// Where token files are kept unless a folder is named.
pub use crate::dirs::cache as default_dir;

/// A key over named parts; lengths are hashed too, so no two lists of parts collide by running together.
pub fn key(parts: &[&[u8]]) -> String {
    let mut h = blake3::Hasher::new();
    h.update(&token_file::VERSION.to_le_bytes());
    for part in parts {
        h.update(&(part.len() as u64).to_le_bytes());
        h.update(part);
    }
    h.finalize().to_hex().to_string()
}

/// The file of a data set with a key.
pub fn path(dir: &Path, source: &Path, key: &str) -> PathBuf {
    let stem = source.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let stem: String = stem.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).take(60).collect();
    dir.join(format!("{stem}.{}.tok", &key[..16]))
}

/// Opens the token file of a key, or makes it: `make` adds the documents. Says which; a damaged file is made again.
///
/// # Errors
/// If the documents cannot be made, written or read back.
pub fn open_or_make(
    path: &Path,
    tokenizer: &Tokenizer,
    key: &str,
    log: &mut dyn FnMut(String),
    make: impl FnOnce(&mut Writer) -> Result<Meta>,
) -> Result<TokenFile> {
    if path.exists() {
        match TokenFile::open(path).and_then(|f| f.expect(tokenizer.hash(), Some(key)).map(|()| f)) {
            Ok(file) => {
                log(format!("reusing {} ({} documents, {} tokens)", path.display(), file.n_docs(), file.n_tokens()));
                return Ok(file);
            }
            Err(e) => log(format!("{e}; making it again")),
        }
    }
    let mut to = Writer::new(path, tokenizer.vocab_size())?;
    let meta = make(&mut to)?;
    to.finish(&meta, [tokenizer.hash(), key])?;
    let file = TokenFile::open(path)?;
    log(format!("wrote {} ({} documents, {} tokens)", path.display(), file.n_docs(), file.n_tokens()));
    Ok(file)
}
