//! Tokens to text as they come: a piece of text is given out once no later token can change it.
//!
//! A character may be spread over several tokens (byte fallback, byte-level BPE), and a decoder looks at neighbours (the blank
//! before a word, runs of bytes). So a window of tokens is decoded with and without the newest ones, and the difference is
//! given out unless it ends in U+FFFD, the mark of a character that is not whole yet.

use crate::data::tokenizer::{Specials, Tokenizer};

/// The text of one sequence, in pieces.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// First token of the window.
    window: usize,
    /// Tokens whose text was given out.
    done: usize,
}

impl<'a> TextStream<'a> {
    /// Nothing decoded yet.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), window: 0, done: 0 }
    }

    /// Takes the next token and gives the text that is certain now; empty while a character is not whole.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        let text = self.ahead();
        if text.ends_with('\u{fffd}') {
            return String::new();
        }
        if !text.is_empty() {
            self.window = self.done;
            self.done = self.ids.len();
        }
        text
    }

    /// The text of what is left when no more tokens come: characters that never became whole.
    pub fn finish(&mut self) -> String {
        let text = self.ahead();
        self.window = self.done;
        self.done = self.ids.len();
        text
    }

    /// The text of the tokens that were not given out.
    fn ahead(&self) -> String {
        let decode = |to: usize| self.tokenizer.decode(&self.ids[self.window..to], Specials::Show);
        let (before, all) = (decode(self.done), decode(self.ids.len()));
        // A run of bytes that turns out to be no text may change what stood before it; that was given out already.
        all.strip_prefix(before.as_str()).map(String::from).unwrap_or_else(|| {
            let common = before.bytes().zip(all.bytes()).take_while(|(a, b)| a == b).count();
            all[all.floor_char_boundary(common)..].to_string()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer::SpecialIds;

    fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
        let mut stream = TextStream::new(tokenizer);
        let mut out: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
        out.push(stream.finish());
        out
    }

    #[test]
    fn characters_come_whole() {
        let t = Tokenizer::open("tests/data/tokenizer/spm4k.model".as_ref(), SpecialIds::default()).unwrap();
        let bytes = t.byte_ids().unwrap().to_vec();
        let id = |b: u8| bytes[usize::from(b)];
        let euro: Vec<u32> = "€".bytes().map(id).collect();
        assert_eq!(pieces(&t, &euro), ["", "", "€", ""]);
        // Half a character stays half: one mark for each byte.
        assert_eq!(pieces(&t, &euro[..2]).concat(), "\u{fffd}\u{fffd}");
        let mut broken = euro[..2].to_vec();
        broken.push(id(b'a'));
        assert_eq!(pieces(&t, &broken).concat(), t.decode(&broken, Specials::Show));
        for text in ["The meaning of life", "naïve café, 日本語\n\n  two blanks", "🙂🙂 x", ""] {
            let ids = t.encode(text).unwrap();
            assert_eq!(pieces(&t, &ids).concat(), text);
        }
    }
}
