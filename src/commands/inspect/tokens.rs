//! `ringtune inspect tokens`: what a tokenizer makes of strings.

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use crate::data::tokenizer::{SpecialIds, Tokenizer};
use crate::error::{Context, Error, Result};
use crate::files::read_bytes;
use crate::say::Out;

/// Prints ids and decoded text of each string, in order.
///
/// `strings` is a JSON file: a list of strings or of objects with `text`, or an object with such a list under `cases` or
/// `strings`. The ids are SentencePiece's own for the whole string. Where text of a data set is encoded otherwise, because
/// control tokens may never come from data, those ids are shown too.
///
/// # Errors
/// If a file is missing or of another form, or the tokenizer is refused.
pub fn run(tokenizer: &Path, special_ids: &str, strings: &Path, json: bool) -> Result<()> {
    let tokenizer = Tokenizer::open(tokenizer, SpecialIds::parse(special_ids)?)?;
    let name = || strings.display().to_string();
    let bytes = crate::files::without_mark(read_bytes(strings, 256 << 20)?);
    let file: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Error::new(format!("invalid JSON, expected strings, found {e}")))
        .context(name)?;
    let mut out = Out::new();
    for text in texts(&file).context(name)? {
        let ids = tokenizer.encode_raw(text)?;
        let decoded = tokenizer.decode_raw(&ids)?;
        let in_data = tokenizer.encode(text)?;
        let differs = in_data != ids;
        if json {
            let mut line = json!({"text": text, "ids": ids, "decoded": decoded});
            if differs {
                line["ids_in_data"] = json!(in_data);
            }
            writeln!(out, "{line}")?;
            continue;
        }
        writeln!(out, "{text:?}: {} tokens", ids.len())?;
        let pieces = |ids: &[u32]| {
            let piece = |&id: &u32| format!("{id} {:?}", tokenizer.piece(id).unwrap_or("?"));
            ids.iter().map(piece).collect::<Vec<_>>().join(", ")
        };
        writeln!(out, "  {}", pieces(&ids))?;
        if differs {
            writeln!(out, "  in data: {}", pieces(&in_data))?;
        }
        if decoded != text {
            writeln!(out, "  decodes to {decoded:?}")?;
        }
    }
    out.flush()?;
    Ok(())
}

fn texts(file: &Value) -> Result<Vec<&str>> {
    let list = file.as_array().or_else(|| file["cases"].as_array()).or_else(|| file["strings"].as_array());
    let list = list.ok_or_else(|| {
        Error::new("expected a list of strings, or an object with such a list under \"cases\" or \"strings\"")
    })?;
    list.iter()
        .enumerate()
        .map(|(i, v)| {
            v.as_str()
                .or_else(|| v["text"].as_str())
                .ok_or_else(|| Error::new(format!("item {i}: expected a string or an object with \"text\", found {v}")))
        })
        .collect()
}
