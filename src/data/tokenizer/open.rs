//! Opening a tokenizer: which file of a folder, what the files beside it add, how it treats newlines.

use std::path::Path;

use super::hugging_face::HuggingFace;
use super::sentencepiece::SentencePiece;
use super::{Engine, Newline, SpecialIds, Tokenizer, added};
use crate::bail;
use crate::data::sp_model;
use crate::data::template::{IM_END, IM_START, NEWLINE};
use crate::error::{Error, Result};
use crate::files::{is_there, read_bytes};

/// Bytes of a tokenizer at most.
const LONGEST: u64 = 1 << 30;

impl Tokenizer {
    /// Opens a `.model` or `tokenizer.json` file, or the one in a folder, and checks its special ids.
    ///
    /// # Errors
    /// If the file cannot be read, is no tokenizer, or has other special ids than `special`.
    pub fn open(path: &Path, special: SpecialIds) -> Result<Self> {
        Self::open_beside(path, special, None)
    }

    /// As [`Tokenizer::open`]; where the files beside a `tokenizer.json` say nothing about its special tokens, those of
    /// the folder `model` are asked.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn open_beside(path: &Path, special: SpecialIds, model: Option<&Path>) -> Result<Self> {
        let inside = Self::in_folder(path);
        if path.is_dir() && inside.is_none() {
            bail!(
                "tokenizer {}: expected tokenizer.model or tokenizer.json in this folder, found neither",
                path.display()
            );
        }
        let (mut path, mut choice) = (inside.as_deref().unwrap_or(path).to_path_buf(), None);
        let read = |path: &Path| {
            let bytes = read_bytes(path, LONGEST).map_err(|e| Error::new(format!("tokenizer {e}")))?;
            crate::files::refuse_pointer(path, &bytes).map(|()| crate::files::without_mark(bytes))
        };
        let mut bytes = read(&path);
        // A tokenizer.model may be of another kind (Llama-3's is a list of ranks); the file beside it is then the one to take.
        let beside = path.with_file_name("tokenizer.json");
        if inside.is_some() && beside.is_file() && beside != path {
            let wrong = match &bytes {
                Ok(bytes) => sp_model::parse(bytes).err(),
                Err(e) => Some(Error::new(e.to_string())),
            };
            if let Some(e) = wrong {
                choice = Some(format!("tokenizer {}: taken, for {}: {e}", beside.display(), path.display()));
                (bytes, path) = (read(&beside), beside);
            }
        }
        let name = path.display().to_string();
        let above = path.parent().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p });
        let folders: Vec<&Path> = above.into_iter().chain(model).collect();
        Ok(Self { choice, ..Self::from_bytes_beside(&name, bytes?, special, &folders)? })
    }

    /// The tokenizer's file in a folder: the SentencePiece model where there is one, else `tokenizer.json`.
    pub fn in_folder(dir: &Path) -> Option<std::path::PathBuf> {
        ["tokenizer.model", "tokenizer.json"].map(|n| dir.join(n)).into_iter().find(|p| is_there(p))
    }

    /// As [`Tokenizer::open`], from the bytes of a file called `name` in messages.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn from_bytes(name: &str, bytes: Vec<u8>, special: SpecialIds) -> Result<Self> {
        Self::from_bytes_beside(name, bytes, special, &[])
    }

    fn from_bytes_beside(name: &str, bytes: Vec<u8>, special: SpecialIds, folders: &[&Path]) -> Result<Self> {
        // No SentencePiece model begins with a brace: a protobuf's first byte is a field's number.
        let json = bytes.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'{');
        let (engine, opened) = match json {
            true => {
                let (engine, opened) = HuggingFace::open(name, &bytes, special, folders)?;
                (Engine::HuggingFace(Box::new(engine)), opened)
            }
            false => {
                let (engine, opened) = SentencePiece::open(name, &bytes, special)?;
                (Engine::SentencePiece(Box::new(engine)), opened)
            }
        };
        let mut this = Self {
            name: name.to_string(),
            engine,
            opened,
            newline: Newline::Missing,
            im: None,
            added: Vec::new(),
            named: 0,
            said_eos: None,
            choice: None,
            reserved: Vec::new(),
            hash: blake3::hash(&bytes).to_hex().to_string(),
            bytes,
        };
        if !json {
            for (i, dir) in folders.iter().enumerate() {
                // The files of the model's folder count where they belong to this very tokenizer.
                let same = || std::fs::read(dir.join("tokenizer.model")).is_ok_and(|other| other == this.bytes);
                if this.added.is_empty() && (i == 0 || Self::in_folder(dir).is_none() || same()) {
                    this.added = added::behind(name, this.pieces(), dir)?;
                    let said = added::end_token(dir)?;
                    this.said_eos = said.filter(|text| this.id_of(text).is_some_and(|id| id != this.special().eos));
                }
            }
            this.named = this.added.len();
        }
        this.im = this.id_of(IM_START).zip(this.id_of(IM_END)).map(|(s, e)| [s, e]);
        this.newline = this.find_newline()?;
        Ok(this)
    }

    fn find_newline(&self) -> Result<Newline> {
        let ids = self.encode_raw("\n")?;
        if let Some(&last) = ids.last().filter(|&&id| Some(id) != self.opened.special.unk)
            && self.decode_raw(&ids)?.ends_with('\n')
        {
            return Ok(Newline::Kept(last));
        }
        Ok(match self.byte_ids().map(|bytes| bytes[usize::from(b'\n')]) {
            Some(id) if self.piece(id) == Some(NEWLINE) => Newline::Lost(id),
            Some(id) => Newline::Text(id),
            None => Newline::Missing,
        })
    }
}
