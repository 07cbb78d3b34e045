//! A `tokenizer.json` behind a tokenizer: byte-level BPE (Llama-3, Qwen), and BPE or Unigram with byte fallback (Llama-2,
//! Mistral).
//!
//! Two things are done to what the file says. Special tokens are never found in text: the library is told to take their names
//! as text, and whatever the model makes of them all the same is cut apart by [`super::Tokenizer::encode_cut`]. And what the
//! file adds around a text (its post-processor, truncation, padding) is left out: templates say what stands where.

use std::collections::HashMap;
use std::path::Path;

use sentencepiece_model::{ModelType, Type};
use serde_json::Value;
use tokenizers::{DecoderWrapper, PostProcessorWrapper, Tokenizer as Library};

use super::hf_special::{Beside, special_tokens, unknown};
use super::{Opened, SpecialIds, Token, VocabPiece};
use crate::error::{Error, Result};
use crate::panics::caught;
use crate::{bail, ensure};

/// Longest file taken: the largest in use have about 30 MB.
const MAX_BYTES: usize = 512 << 20;
/// Largest id taken: a hostile file must not make the table of pieces huge.
const MAX_ID: u32 = 1 << 24;

/// The library's tokenizers of one file.
pub(super) struct HuggingFace {
    whole: Library,
    /// Without a prefix before the text, where the file adds one: for text that continues a stretch.
    continuing: Option<Library>,
}

impl HuggingFace {
    /// Opens the bytes of a file called `name` in messages. Special tokens come from the files in `folders`, first found first,
    /// unless `special` names other ids than the default ones.
    ///
    /// # Errors
    /// If the file is no tokenizer of a kind that is known, its vocabulary contradicts itself, or no end token is named.
    pub fn open(name: &str, bytes: &[u8], special: SpecialIds, folders: &[&Path]) -> Result<(Self, Opened)> {
        let wrong = |what: &str| Error::new(format!("tokenizer {name}: expected a tokenizer.json, found {what}"));
        ensure!(
            bytes.len() <= MAX_BYTES,
            "tokenizer {name}: expected at most {MAX_BYTES} bytes, found {}",
            bytes.len()
        );
        let mut file: Value = serde_json::from_slice(bytes).map_err(|e| wrong(&format!("invalid JSON ({e})")))?;
        let dropout = without_dropout(&mut file);
        let model_type = match file["model"]["type"].as_str() {
            Some("BPE") => ModelType::Bpe,
            Some("Unigram") => ModelType::Unigram,
            // Files of before 2020 leave the type out; merges tell a BPE.
            None if file["model"]["merges"].is_array() => ModelType::Bpe,
            Some(other) => {
                return Err(wrong(&format!("a model of type {other}; BPE and Unigram are supported")));
            }
            None => return Err(wrong("no model in it")),
        };
        let whole = load(&file).map_err(|e| wrong(&e))?;
        let without = without_prefix(&file);
        let continuing = match &without {
            Some(other) => Some(load(other).map_err(|e| wrong(&e))?),
            None => None,
        };
        let added = added_tokens(&file, &whole).map_err(|e| wrong(&e))?;
        let pieces = pieces(&file, &whole, &added).map_err(|e| wrong(&e))?;
        let beside = Beside::read(folders)?;
        let (special, more_stops) = special_tokens(name, &whole, &file, &beside, special)?;
        let (byte_ids, missing_bytes) = match byte_ids(&file, &whole) {
            Ok(ids) => (Some(ids), Vec::new()),
            Err(missing) => (None, missing),
        };
        let flags = |id: u32, token: &Value| (id, [token["lstrip"] == true, token["rstrip"] == true]);
        let entries = file["added_tokens"].as_array().into_iter().flatten().filter(|t| t["special"] == true);
        let opened = Opened {
            byte_ids,
            missing_bytes,
            unknown: unknown(&file).and_then(|text| whole.token_to_id(&text)),
            dropout,
            strips: entries.filter_map(|t| Some(flags(whole.token_to_id(t["content"].as_str()?)?, t))).collect(),
            pieces,
            model_type,
            special,
            more_stops,
            prefix_once: prefix_once(&file),
            config: beside.config,
        };
        Ok((Self { whole, continuing }, opened))
    }

    /// The library's `encode` without what its post-processor adds.
    pub fn encode(&self, text: &str, continuing: bool) -> Result<Vec<Token>, String> {
        let library = match &self.continuing {
            Some(other) if continuing => other,
            _ => &self.whole,
        };
        let encoding = guarded(|| library.encode(text, false))?;
        let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(tokens.map(|(&id, &(begin, end))| Token { id, begin, end }).collect())
    }

    /// The library's `decode`.
    pub fn decode(&self, ids: &[u32]) -> Result<String, String> {
        // Some decoders of the library take the last token before they know that there is one.
        if ids.is_empty() {
            return Ok(String::new());
        }
        guarded(|| self.whole.decode(ids, false))
    }
}

/// Calls the library; a panic in it is an error about the file that led to it.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match caught(call) {
        Some(done) => done.map_err(|e| e.to_string()),
        None => Err("the library cannot work with what this file says".to_string()),
    }
}

/// Loads a file; a file that makes the library panic is a damaged one.
fn load(file: &Value) -> Result<Library, String> {
    let text = file.to_string();
    let mut library = match caught(|| Library::from_bytes(text.as_bytes())) {
        Some(Ok(library)) => library,
        Some(Err(e)) => return Err(format!("one that does not load ({e})")),
        None => return Err("one that is damaged".to_string()),
    };
    library.with_post_processor(None::<PostProcessorWrapper>);
    library.with_truncation(None).map_err(|e| e.to_string())?;
    library.with_padding(None);
    library.set_encode_special_tokens(true);
    if library.get_decoder().is_none() {
        // Without one the library joins pieces with blanks. Fuse joins them with nothing.
        library.with_decoder(Some(DecoderWrapper::Fuse(tokenizers::decoders::fuse::Fuse::new())));
    }
    Ok(library)
}

/// Turns off what leaves merges out by chance: the same text has the same ids always. The share that the file asks for.
fn without_dropout(file: &mut Value) -> Option<f64> {
    let share = file["model"]["dropout"].as_f64().filter(|&share| share > 0.0)?;
    file["model"]["dropout"] = Value::Null;
    Some(share)
}

/// Calls `each` on a step and on the steps of a sequence, at any depth.
fn steps<'a>(step: &'a Value, each: &mut dyn FnMut(&'a Value)) {
    each(step);
    for list in ["normalizers", "pretokenizers", "decoders"] {
        for inner in step[list].as_array().into_iter().flatten() {
            steps(inner, each);
        }
    }
}

/// The file without anything that puts a blank before a text; `None` where there is no such thing.
fn without_prefix(file: &Value) -> Option<Value> {
    let mut out = file.clone();
    let mut changed = false;
    for part in ["normalizer", "pre_tokenizer"] {
        if let Some(step) = out.get_mut(part) {
            remove_prefix(step, &mut changed);
        }
    }
    changed.then_some(out)
}

fn remove_prefix(step: &mut Value, changed: &mut bool) {
    for list in ["normalizers", "pretokenizers"] {
        if let Some(inner) = step.get_mut(list).and_then(Value::as_array_mut) {
            inner.iter_mut().for_each(|s| remove_prefix(s, changed));
            inner.retain(|s| !s.is_null());
        }
    }
    match step["type"].as_str() {
        Some("Prepend") => {
            *step = Value::Null;
            *changed = true;
        }
        Some("Metaspace") if step["prepend_scheme"] != "never" && step["add_prefix_space"] != false => {
            step["prepend_scheme"] = "never".into();
            step["add_prefix_space"] = false.into();
            *changed = true;
        }
        Some("ByteLevel") if step["add_prefix_space"] == true => {
            step["add_prefix_space"] = false.into();
            *changed = true;
        }
        _ => {}
    }
}

/// Whether the prefix stands before the first stretch of a text alone, not after every special token.
fn prefix_once(file: &Value) -> bool {
    let mut found = false;
    steps(&file["pre_tokenizer"], &mut |s| {
        found |= s["type"] == "Metaspace" && s["prepend_scheme"] == "first";
    });
    found
}

/// Id and whether it is special, by text.
type Added = HashMap<String, (u32, bool)>;

/// The tokens of `added_tokens`, each under the id that the library gives it.
fn added_tokens(file: &Value, library: &Library) -> Result<Added, String> {
    let mut out = Added::new();
    for token in file["added_tokens"].as_array().into_iter().flatten() {
        let (Some(text), Some(id)) = (token["content"].as_str(), token["id"].as_u64()) else {
            return Err(format!("an added token without content or id: {token}"));
        };
        if text.is_empty() {
            continue;
        }
        let got = library.token_to_id(text);
        if got.map(u64::from) != Some(id) {
            let got = got.map_or("none".to_string(), |id| id.to_string());
            return Err(format!(
                "the added token {text:?} with id {id}, which loads with id {got}; ids have to follow the vocabulary"
            ));
        }
        out.insert(text.to_string(), (id as u32, token["special"] == true));
    }
    Ok(out)
}

/// The vocabulary by id; ids without a token have no text.
fn pieces(file: &Value, library: &Library, added: &Added) -> Result<Vec<VocabPiece>, String> {
    let vocab = library.get_vocab(true);
    let Some(&most) = vocab.values().max() else {
        return Err("an empty vocabulary".to_string());
    };
    if most > MAX_ID {
        return Err(format!("the token id {most}, beyond {MAX_ID}"));
    }
    let unknown = unknown(file);
    let fallback = file["model"]["byte_fallback"] == true;
    let none = VocabPiece { text: String::new(), score: 0.0, kind: Type::Unused };
    let mut out = vec![none; most as usize + 1];
    for (text, id) in vocab {
        let kind = match added.get(&text) {
            _ if unknown.as_deref() == Some(text.as_str()) => Type::Unknown,
            Some((_, true)) => Type::Control,
            Some((_, false)) => Type::UserDefined,
            None if fallback && is_byte(&text) => Type::Byte,
            None => Type::Normal,
        };
        out[id as usize] = VocabPiece { text, score: 0.0, kind };
    }
    Ok(out)
}

fn is_byte(text: &str) -> bool {
    text.len() == 6 && text.starts_with("<0x") && text.ends_with('>')
}

/// The ids of the 256 bytes, of a byte-level vocabulary or of a byte fallback; or else the bytes that have none, which are not
/// told where the vocabulary spells no bytes at all.
fn byte_ids(file: &Value, library: &Library) -> Result<Vec<u32>, Vec<u8>> {
    let mut byte_level = false;
    for part in ["normalizer", "pre_tokenizer", "decoder"] {
        steps(&file[part], &mut |s| byte_level |= s["type"] == "ByteLevel");
    }
    if !byte_level && file["model"]["byte_fallback"] != true {
        return Err(Vec::new());
    }
    let id = |b: u8| match byte_level {
        true => library.token_to_id(&byte_char(b).to_string()),
        false => library.token_to_id(&format!("<0x{b:02X}>")),
    };
    let missing: Vec<u8> = (0..=255).filter(|&b| id(b).is_none()).collect();
    if missing.is_empty() { Ok((0..=255).filter_map(id).collect()) } else { Err(missing) }
}

/// How byte-level vocabularies write a byte: printable Latin-1 as itself, the others as characters from U+0100 on, in order
/// (Radford et al. 2019, GPT-2's `bytes_to_unicode`).
fn byte_char(byte: u8) -> char {
    let itself = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if itself(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !itself(b)).count() as u32;
    char::from_u32(0x100 + before).expect("68 characters from U+0100 on")
}

/// The file with control tokens as ringtune knows them: those that are new are added, all are found as they are spelled, and
/// nothing is cut, padded or left to chance.
///
/// # Errors
/// If the result does not load, or gives a control token another id.
pub fn with_control_tokens(name: &str, bytes: &[u8], control: &[(String, u32)]) -> Result<Vec<u8>> {
    let damaged = |e: String| Error::new(format!("tokenizer {name}: {e}"));
    let mut file: Value = serde_json::from_slice(bytes).map_err(|e| damaged(e.to_string()))?;
    without_dropout(&mut file);
    file["truncation"] = Value::Null;
    file["padding"] = Value::Null;
    if !file["added_tokens"].is_array() {
        file["added_tokens"] = Value::Array(Vec::new());
    }
    let list = file["added_tokens"].as_array_mut().expect("it was made a list");
    for (text, id) in control {
        if list.iter().all(|t| t["content"] != text.as_str()) {
            list.push(serde_json::json!({"id": id, "content": text, "lstrip": false, "rstrip": false}));
        }
    }
    for token in list {
        if token["special"] == true || control.iter().any(|(text, _)| token["content"] == text.as_str()) {
            token["special"] = true.into();
            token["normalized"] = false.into();
            token["single_word"] = false.into();
        }
    }
    let library = load(&file).map_err(damaged)?;
    for (text, id) in control {
        let got = library.token_to_id(text);
        if got != Some(*id) {
            let got = got.map_or("none".to_string(), |id| id.to_string());
            bail!("tokenizer {name}: {text} has the id {id} in training and {got} in the file to be written");
        }
    }
    Ok(file.to_string().into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_as_gpt2_writes_them() {
        assert_eq!((byte_char(b'A'), byte_char(b' '), byte_char(b'\n')), ('A', 'Ġ', 'Ċ'));
        assert_eq!((byte_char(0), byte_char(0x7f), byte_char(0xad)), ('\u{100}', '\u{121}', '\u{143}'));
        let mut all: Vec<char> = (0..=255).map(byte_char).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 256);
    }
}
