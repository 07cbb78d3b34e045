//! A SentencePiece model as `tokenizer.json`, the form that the `tokenizers` library of Hugging Face reads.
//!
//! The export gives ringtune's ids on any text: each stretch between control tokens is normalised and encoded on its own, so
//! the dummy prefix `▁` stands at the start of each of them, and control tokens are found before anything else.

use std::collections::HashMap;

use sentencepiece_model::{ModelType, NormalizerSpec, SentencePieceModel, Type};
use serde_json::{Map, Value, json};

use crate::bail;
use crate::error::{Error, Result};

/// SentencePiece's mark of a blank, U+2581.
const BLANK: &str = "\u{2581}";

/// A control token on top of, or inside, the SentencePiece vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlToken {
    /// Its text, for example `<|im_end|>`.
    pub text: String,
    /// Its id; may lie beyond the SentencePiece vocabulary.
    pub id: u32,
}

/// The content of `tokenizer.json` for a SentencePiece model of type BPE or Unigram.
///
/// `control` are the tokens that templates insert besides the model's own control pieces (pad, bos, eos).
///
/// # Errors
/// If the bytes are not a SentencePiece model, or its type or normaliser has no counterpart in `tokenizer.json`.
pub fn tokenizer_json(model: &[u8], control: &[ControlToken]) -> Result<Value> {
    let proto = SentencePieceModel::from_slice(model)
        .map_err(|e| Error::new(format!("tokenizer: not a SentencePiece model: {e}; expected a .model file")))?;
    let pieces = proto.pieces();
    if u32::try_from(pieces.len()).is_err() || pieces.is_empty() {
        bail!("tokenizer: {} pieces; expected at least one", pieces.len());
    }
    let trainer = proto.trainer().cloned().unwrap_or_default();
    let normalizer = proto.normalizer().cloned().unwrap_or_default();
    if trainer.treat_whitespace_as_suffix() {
        bail!("tokenizer: treat_whitespace_as_suffix has no counterpart in tokenizer.json");
    }
    if !normalizer.escape_whitespaces() {
        bail!("tokenizer: escape_whitespaces = false has no counterpart in tokenizer.json");
    }
    let unk = pieces.iter().position(|p| p.r#type() == Type::Unknown);
    let byte_fallback = pieces.iter().any(|p| p.r#type() == Type::Byte);
    let (core, split) = match trainer.model_type() {
        ModelType::Bpe => (bpe(&proto, unk, byte_fallback), Value::Null),
        ModelType::Unigram => (unigram(&proto, unk, byte_fallback), unigram_split(&proto)),
        other => bail!("tokenizer: SentencePiece models of type {other:?} cannot be exported; expected BPE or UNIGRAM"),
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(&proto, control),
        "normalizer": normalizer_json(&normalizer),
        "pre_tokenizer": split,
        "post_processor": null,
        "decoder": decoder_json(normalizer.add_dummy_prefix()),
        "model": core,
    }))
}

/// Unknown, control and user-defined pieces, and the control tokens of the template, in order of id.
fn added_tokens(proto: &SentencePieceModel, control: &[ControlToken]) -> Value {
    let mut tokens: Vec<(u32, &str, bool)> = Vec::new();
    for (id, piece) in (0u32..).zip(proto.pieces()) {
        match piece.r#type() {
            Type::Unknown | Type::Control => tokens.push((id, piece.piece(), true)),
            Type::UserDefined => tokens.push((id, piece.piece(), control.iter().any(|c| c.id == id))),
            Type::Normal | Type::Byte | Type::Unused => {}
        }
    }
    for c in control {
        if !tokens.iter().any(|&(id, _, _)| id == c.id) {
            // A byte is printed when the text is read back, as other tokens of a text.
            let byte = proto.pieces().get(c.id as usize).is_some_and(|p| p.r#type() == Type::Byte);
            tokens.push((c.id, &c.text, !byte));
        }
    }
    tokens.sort_unstable();
    let entry = |&(id, content, special): &(u32, &str, bool)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": special})
    };
    Value::Array(tokens.iter().map(entry).collect())
}

/// Merges in the order in which SentencePiece would make them: by the score of the merged piece, best first.
///
/// SentencePiece's BPE joins the neighbours whose union has the best score. Every split of a piece into two pieces is thus a
/// merge, with the rank of the piece (Kudo & Richardson 2018, arXiv:1808.06226, section 3.2).
fn bpe(proto: &SentencePieceModel, unk: Option<usize>, byte_fallback: bool) -> Value {
    let pieces = proto.pieces();
    let index: HashMap<&str, u32> =
        (0u32..).zip(pieces).filter(|(_, p)| matches_text(p.r#type())).map(|(id, p)| (p.piece(), id)).collect();
    let mut merges: Vec<(f32, u32, u32, u32)> = Vec::new();
    for (id, piece) in (0u32..).zip(pieces).filter(|(_, p)| p.r#type() == Type::Normal) {
        let text = piece.piece();
        for (at, _) in text.char_indices().skip(1) {
            if let (Some(&left), Some(&right)) = (index.get(&text[..at]), index.get(&text[at..])) {
                merges.push((piece.score(), id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    let merges: Vec<Value> =
        merges.iter().map(|m| json!([pieces[m.2 as usize].piece(), pieces[m.3 as usize].piece()])).collect();
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": unk.map(|i| pieces[i].piece()),
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": true,
        "byte_fallback": byte_fallback,
        "ignore_merges": false,
        "vocab": vocabulary(proto),
        "merges": merges,
    })
}

/// Piece to id. A text that appears twice keeps its first id, as SentencePiece does.
fn vocabulary(proto: &SentencePieceModel) -> Value {
    let mut map = Map::new();
    for (id, piece) in (0u32..).zip(proto.pieces()) {
        map.entry(piece.piece()).or_insert_with(|| json!(id));
    }
    Value::Object(map)
}

/// Whether SentencePiece ever finds a piece of this type in text.
fn matches_text(kind: Type) -> bool {
    matches!(kind, Type::Normal | Type::UserDefined)
}

/// Cuts text that spells a byte or control piece behind its first character. The library's Unigram would take it for the piece.
fn unigram_split(proto: &SentencePieceModel) -> Value {
    let mut spelled = Vec::new();
    let mut bytes = false;
    for piece in proto.pieces().iter().filter(|p| !matches_text(p.r#type())) {
        bytes |= piece.r#type() == Type::Byte;
        let mut rest = piece.piece().chars();
        if let (Some(first), false) = (rest.next(), piece.r#type() == Type::Byte) {
            spelled.push(format!("{}(?={})", escape(first.encode_utf8(&mut [0; 4])), escape(rest.as_str())));
        }
    }
    if bytes {
        spelled.push("<(?=0x[0-9A-F]{2}>)".to_string());
    }
    json!({"type": "Split", "pattern": {"Regex": spelled.join("|")}, "behavior": "MergedWithPrevious", "invert": false})
}

/// The text as a regular expression that matches just it.
fn escape(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || !c.is_ascii() || c == '_';
    text.chars().flat_map(|c| (!plain(c)).then_some('\\').into_iter().chain([c])).collect()
}

fn unigram(proto: &SentencePieceModel, unk: Option<usize>, byte_fallback: bool) -> Value {
    let lowest = proto.pieces().iter().filter(|p| p.r#type() == Type::Normal).map(|p| p.score()).fold(0.0, f32::min);
    let vocab: Vec<Value> = proto
        .pieces()
        .iter()
        .map(|p| {
            // Pieces that never match text get a score below every path, so that text which spells one is not turned into it.
            let never = !matches!(p.r#type(), Type::Normal | Type::UserDefined);
            let score = if never { f64::from(lowest) - 1000.0 } else { f64::from(p.score()) };
            json!([p.piece(), score])
        })
        .collect();
    json!({"type": "Unigram", "unk_id": unk, "vocab": vocab, "byte_fallback": byte_fallback})
}

fn normalizer_json(spec: &NormalizerSpec) -> Value {
    let mut steps = Vec::new();
    if !spec.precompiled_charsmap().is_empty() {
        steps.extend(unicode_steps(spec.name()));
        steps.push(json!({"type": "Precompiled", "precompiled_charsmap": base64(spec.precompiled_charsmap())}));
    }
    if spec.remove_extra_whitespaces() {
        // Blanks only: the normaliser has turned every other white space into one, or kept it on purpose.
        for (pattern, content) in [("^ +", ""), (" +$", ""), (" {2,}", " ")] {
            steps.push(json!({"type": "Replace", "pattern": {"Regex": pattern}, "content": content}));
        }
    }
    if spec.add_dummy_prefix() {
        steps.push(json!({"type": "Prepend", "prepend": BLANK}));
    }
    steps.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": BLANK}));
    json!({"type": "Sequence", "normalizers": steps})
}

/// What the tables of these names do, in steps of the library's own. Its reading of a table drops marks that follow a character
/// of the table (`①` and an accent); after these steps few such characters are left. Two are not of the table: they wait under
/// characters that are never text.
fn unicode_steps(name: &str) -> Vec<Value> {
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let step = |name: &str| json!({"type": name});
    let kept = [("\u{200d}", "\u{fdd0}"), ("\u{ff5e}", "\u{fdd1}")];
    let (nmt, folds) = (name.starts_with("nmt_"), name.ends_with("_cf"));
    if !matches!(name, "nmt_nfkc" | "nmt_nfkc_cf" | "nfkc" | "nfkc_cf") {
        return Vec::new();
    }
    let mut steps = Vec::new();
    if nmt {
        steps.extend(kept.map(|(from, to)| replace(from, to)));
        steps.push(step("Nmt"));
    }
    steps.push(step("NFKC"));
    if folds {
        steps.push(step("Lowercase"));
    }
    if nmt {
        steps.extend(kept.map(|(from, to)| replace(to, from)));
    }
    steps
}

fn decoder_json(dummy_prefix: bool) -> Value {
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": BLANK}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if dummy_prefix {
        steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": steps})
}

/// RFC 4648 base64 with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, &b| w << 8 | u32::from(b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = ALPHABET[(word >> (18 - 6 * i) & 63) as usize];
            out.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_known_answers() {
        let cases =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE=")];
        for (plain, coded) in cases {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn rubbish_is_refused() {
        assert!(tokenizer_json(b"not a model", &[]).unwrap_err().to_string().contains("not a SentencePiece model"));
        assert!(tokenizer_json(b"", &[]).is_err());
    }
}
