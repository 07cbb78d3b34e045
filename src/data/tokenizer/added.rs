//! Tokens that the files beside a SentencePiece model add to it: `added_tokens.json` and `tokenizer_config.json`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::VocabPiece;
use super::hf_special::read_object;
use crate::ensure;
use crate::error::{Error, Result};

/// Ids beyond the model's that are taken: a hostile file must not make the table of tokens huge.
const MOST: usize = 1 << 16;

/// The tokens that a folder's files name, by id.
///
/// # Errors
/// If a file cannot be read or is of another form, or the files contradict each other.
pub fn named_tokens(dir: &Path) -> Result<BTreeMap<u32, String>> {
    let mut out = BTreeMap::new();
    let mut add = |path: &Path, text: &str, id: Option<u64>| {
        let shown = path.display();
        let id = id.and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| Error::new(format!("{shown}: {text:?}: expected a token id")))?;
        let other = out.insert(id, text.to_string()).filter(|other| other != text);
        ensure!(other.is_none(), "{shown}: id {id} is {text:?}, and {:?} as well", other.unwrap_or_default());
        Ok::<(), Error>(())
    };
    let path = dir.join("added_tokens.json");
    for (text, id) in read_object(&path)?.iter().filter_map(Value::as_object).flatten() {
        add(&path, text, id.as_u64())?;
    }
    let path = dir.join("tokenizer_config.json");
    for (id, token) in read_object(&path)?.iter().filter_map(|v| v["added_tokens_decoder"].as_object()).flatten() {
        if let Some(text) = token["content"].as_str() {
            add(&path, text, id.parse().ok())?;
        }
    }
    Ok(out)
}

/// The text of `eos_token` in a folder's tokenizer_config.json.
///
/// # Errors
/// If the file cannot be read or is no JSON object.
pub(super) fn end_token(dir: &Path) -> Result<Option<String>> {
    let config = read_object(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    let token = &config["eos_token"];
    Ok(token.as_str().or_else(|| token["content"].as_str()).map(String::from))
}

/// The tokens behind a model's pieces, in order of their ids; an id that no file names gets a name that no text has.
///
/// # Errors
/// If the files contradict the model: one id for two texts, or one text with two ids.
pub(super) fn behind(name: &str, pieces: &[VocabPiece], dir: &Path) -> Result<Vec<String>> {
    let mut out: Vec<String> = Vec::new();
    for (id, text) in named_tokens(dir)? {
        let files = || format!("tokenizer {name}: the files beside it say that {text:?} has the id {id}");
        let at = pieces
            .iter()
            .position(|p| p.text == text)
            .or(out.iter().position(|t| *t == text).map(|i| i + pieces.len()));
        if let Some(piece) = pieces.get(id as usize) {
            // White space is written otherwise in pieces.
            let same = piece.text == text || text.trim().is_empty();
            ensure!(same, "{}, which is {:?} in the model; give files of one tokenizer", files(), piece.text);
            continue;
        }
        ensure!(at.is_none(), "{}, and it has {} too; give files of one tokenizer", files(), at.unwrap_or_default());
        let place = id as usize - pieces.len();
        ensure!(place < MOST, "{}, expected an id soon behind the model's {}", files(), pieces.len());
        let first = out.len() + pieces.len();
        out.extend((first..id as usize).map(|i| format!("<|unused_{i}|>")));
        out.push(text);
    }
    Ok(out)
}
