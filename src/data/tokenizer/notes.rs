//! What a user should know about a tokenizer before training with it.

use super::{Format, Newline, Tokenizer};
use crate::error::Result;

impl Tokenizer {
    /// What a user should know about this model, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let mut out = Vec::new();
        let name = self.name();
        match self.newline() {
            Newline::Lost(id) => out.push(format!(
                "tokenizer {name}: newlines inside prompts and responses are lost (the model's normaliser removes or blanks them); those of the template are inserted as <0x0A> (id {id})"
            )),
            Newline::Text(_) => out.push(format!(
                "tokenizer {name}: newlines at the ends of a turn or everywhere are lost or changed (its normalizer or pre_tokenizer strips, replaces or splits at white space), those of the template too; the ids are those of transformers"
            )),
            Newline::Kept(_) | Newline::Missing => {}
        }
        out.extend(self.choice.clone());
        out.extend(self.unknown_characters().map(|what| format!("tokenizer {}: {what}", self.name())));
        if let Some(share) = self.opened.dropout {
            out.push(format!(
                "tokenizer {}: BPE dropout {share} is taken as 0, so that the same text has the same tokens always",
                self.name()
            ));
        }
        out
    }

    /// What becomes of characters that the vocabulary cannot spell; `None` where it can spell everything.
    pub fn unknown_characters(&self) -> Option<String> {
        if self.byte_ids().is_some() {
            return None;
        }
        let fate = match self.opened.unknown {
            Some(id) => format!("become {} (id {id})", self.piece(id).unwrap_or("<unk>")),
            None => "are dropped without a token".to_string(),
        };
        let missing = &self.opened.missing_bytes;
        Some(match missing.is_empty() {
            true => format!("no byte fallback, so unknown characters {fate}"),
            false => format!("no token for {}, so characters with them {fate}", bytes(missing)),
        })
    }

    /// Advice to whoever can train the tokenizer anew.
    pub fn unknown_advice(&self) -> &'static str {
        match self.format() {
            Format::SentencePiece => "train the tokenizer with --byte_fallback",
            Format::Json => "if the data has such characters, take a model whose tokenizer has them",
        }
    }

    /// The id of unknown text; `None` where such text is dropped.
    pub fn unknown(&self) -> Option<u32> {
        self.opened.unknown
    }

    /// Whether the character leaves no trace among the tokens, or only a part of it does.
    ///
    /// # Errors
    /// If the library fails.
    pub fn drops(&self, c: char) -> Result<bool> {
        let mut buffer = [0; 4];
        let missing = c.encode_utf8(&mut buffer).bytes().any(|b| self.opened.missing_bytes.contains(&b));
        let bytes = !self.opened.missing_bytes.is_empty();
        Ok(self.opened.unknown.is_none()
            && self.byte_ids().is_none()
            && (missing || !bytes && self.encode(&format!("a{c}a"))? == self.encode("aa")?))
    }
}

/// `the bytes 0x00 to 0x1F and 0x7F`.
fn bytes(list: &[u8]) -> String {
    let runs: Vec<String> = list
        .chunk_by(|a, b| a + 1 == *b)
        .map(|run| match *run {
            [one] => format!("0x{one:02X}"),
            [first, .., last] => format!("0x{first:02X} to 0x{last:02X}"),
            [] => unreachable!("chunks hold something"),
        })
        .collect();
    let (last, others) = runs.split_last().expect("a byte is missing");
    let what = if list.len() == 1 { "the byte" } else { "the bytes" };
    if others.is_empty() { format!("{what} {last}") } else { format!("{what} {} and {last}", others.join(", ")) }
}
