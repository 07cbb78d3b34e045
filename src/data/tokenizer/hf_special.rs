//! Special tokens of a `tokenizer.json`: it does not say which of its tokens begin, end or pad; the files beside it do.

use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer as Library;

use super::{SpecialIds, SpecialTokens};
use crate::error::{Context, Error, Result};
use crate::files::is_there;
use crate::{bail, ensure};

/// Longest of these files taken.
const MAX_BYTES: u64 = 64 << 20;
/// Tokens that stand for padding in published vocabularies, likeliest first.
const PADDING: [&str; 8] = [
    "<|finetune_right_pad_id|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|endoftext|>",
    "<|vision_pad|>",
    "<|fim_pad|>",
    "<|reserved_special_token_0|>",
];

/// Reads a JSON object; `None` where there is no such file.
///
/// # Errors
/// If it cannot be read or is no JSON object.
pub(super) fn read_object(path: &Path) -> Result<Option<Value>> {
    if !is_there(path) {
        return Ok(None);
    }
    let shown = || path.display().to_string();
    let size = std::fs::metadata(path).context(shown)?.len();
    ensure!(size <= MAX_BYTES, "{}: longer than {MAX_BYTES} bytes", path.display());
    let bytes = crate::files::without_mark(std::fs::read(path).context(shown)?);
    let value: Value =
        serde_json::from_slice(&bytes).map_err(|e| Error::new(format!("invalid JSON: {e}"))).context(shown)?;
    ensure!(value.is_object(), "{}: expected a JSON object", path.display());
    Ok(Some(value))
}

/// The files that speak of special tokens, each from the first folder that has it.
#[derive(Default)]
pub(super) struct Beside {
    /// tokenizer_config.json
    pub config: Option<Value>,
    map: Option<Value>,
    model: Option<Value>,
    generation: Option<Value>,
}

impl Beside {
    /// Reads what there is.
    ///
    /// # Errors
    /// If a file is there but cannot be read or is no JSON object.
    pub fn read(folders: &[&Path]) -> Result<Self> {
        let read = |name: &str| match folders.iter().map(|d| d.join(name)).find(|p| p.is_file()) {
            Some(path) => read_object(&path),
            None => Ok(None),
        };
        Ok(Self {
            config: read("tokenizer_config.json")?,
            map: read("special_tokens_map.json")?,
            model: read("config.json")?,
            generation: read("generation_config.json")?,
        })
    }

    /// The text under `key` (`eos_token`), from the tokenizer's own files.
    fn text(&self, key: &str) -> Option<&str> {
        [&self.config, &self.map].into_iter().flatten().find_map(|v| {
            let token = &v[key];
            token.as_str().or_else(|| token["content"].as_str())
        })
    }

    /// The ids under `key` (`eos_token_id`), from the model's files: a number or a list.
    fn ids(&self, key: &str) -> Vec<u32> {
        let mut out = Vec::new();
        for v in [&self.model, &self.generation].into_iter().flatten() {
            let one = v[key].as_u64();
            let list = v[key].as_array().into_iter().flatten().filter_map(Value::as_u64);
            out.extend(one.into_iter().chain(list).filter_map(|id| u32::try_from(id).ok()));
        }
        out
    }
}

/// The special tokens, and ids besides `eos` at which an answer ends. Ids that a user named (other than the default map, which is
/// that of SentencePiece models) win over what the files say.
///
/// # Errors
/// If a named token is not in the vocabulary, or nothing says which token ends a text.
pub(super) fn special_tokens(
    name: &str,
    library: &Library,
    file: &Value,
    beside: &Beside,
    asked: SpecialIds,
) -> Result<(SpecialTokens, Vec<u32>)> {
    let known = |id: u32| library.id_to_token(id).is_some();
    if asked != SpecialIds::default() {
        for (what, id) in [("pad", asked.pad), ("unk", asked.unk), ("bos", asked.bos), ("eos", asked.eos)] {
            ensure!(known(id), "tokenizer {name}: --special-ids: {what} {id} is no token of the vocabulary");
        }
        return Ok((asked.into(), Vec::new()));
    }
    let named = |key: &str| -> Result<Option<u32>> {
        let Some(text) = beside.text(key).filter(|t| !t.is_empty()) else {
            return Ok(None);
        };
        match library.token_to_id(text) {
            Some(id) => Ok(Some(id)),
            None => bail!(
                "tokenizer {name}: {key} is {text:?}, which is not in the vocabulary; are the files of one model?"
            ),
        }
    };
    // Ids beyond the vocabulary are rows that only pad the model's.
    let ids = |key: &str| -> Vec<u32> { beside.ids(key).into_iter().filter(|&id| known(id)).collect() };
    let ends = ids("eos_token_id");
    let Some(eos) = named("eos_token")?.or(ends.first().copied()) else {
        bail!(
            "tokenizer {name}: nothing says which token ends a text; expected eos_token in tokenizer_config.json or eos_token_id \
             in config.json beside it, or pass --special-ids pad,unk,bos,eos"
        )
    };
    let mut more: Vec<u32> = ends.into_iter().filter(|&id| id != eos).collect();
    more.sort_unstable();
    more.dedup();
    // Where the tokenizer's own file names no begin token, the model's id is a leftover (Qwen's config.json has one).
    let bos = match &beside.config {
        Some(_) => named("bos_token")?,
        None => named("bos_token")?.or(ids("bos_token_id").first().copied()),
    };
    let unk = match named("unk_token")? {
        Some(id) => Some(id),
        None => unknown(file).and_then(|text| library.token_to_id(&text)),
    };
    let usable = |id: &u32| *id != eos && Some(*id) != bos;
    let pad = named("pad_token")?
        .into_iter()
        .chain(ids("pad_token_id"))
        .chain(PADDING.iter().filter_map(|text| library.token_to_id(text)))
        .chain(unk)
        .find(usable);
    let special = SpecialTokens {
        pad,
        // A token that ends or begins a text is more than unknown text (GPT-2's one token is all three).
        unk: unk.filter(|&id| id != eos && Some(id) != bos),
        bos: bos.filter(|&id| id != eos),
        eos,
    };
    Ok((special, more))
}

/// The text of the model's unknown token.
pub(super) fn unknown(file: &Value) -> Option<String> {
    let model = &file["model"];
    if let Some(text) = model["unk_token"].as_str() {
        return Some(text.to_string());
    }
    let id = model["unk_id"].as_u64()?;
    Some(model["vocab"].get(id as usize)?.get(0)?.as_str()?.to_string())
}
