//! Text that a tokenizer loses: SentencePiece's default normaliser blanks newlines and folds runs of blanks; some byte-level
//! vocabularies lack bytes and have no unknown token.

use std::collections::HashSet;

use crate::data::row::Row;
use crate::data::tokenizer::{Specials, Tokenizer};
use crate::error::Result;

/// What a tokenizer does to text. Found by trying: models say it in ways that depend on their trainer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TextLoss {
    newlines: bool,
    blanks: bool,
    /// Whether some characters have no token at all.
    drops: bool,
}

/// What became of the text of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// A newline is gone.
    pub newlines: bool,
    /// Other white space has changed.
    pub blanks: bool,
    /// A character has vanished.
    pub characters: bool,
}

impl TextLoss {
    /// Tries a newline, a run of blanks and a tabulator.
    ///
    /// # Errors
    /// If the library fails.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let survives = |text: &str| Ok::<bool, crate::error::Error>(round_trip(tokenizer, text)? == text);
        Ok(Self {
            newlines: !survives("a\nb")?,
            blanks: !(survives("a  b")? && survives("a\tb")?),
            drops: tokenizer.byte_ids().is_none() && tokenizer.unknown().is_none(),
        })
    }

    /// Whether nothing is lost, so that rows need not be looked at.
    pub fn is_none(self) -> bool {
        !self.newlines && !self.blanks && !self.drops
    }

    /// What a row loses: its texts are encoded and decoded where they hold white space that could go.
    ///
    /// # Errors
    /// If the library fails.
    pub fn in_row(self, tokenizer: &Tokenizer, row: &Row) -> Result<Lost> {
        let mut lost = Lost::default();
        if self.is_none() {
            return Ok(lost);
        }
        for message in &row.messages {
            let text = message.content.as_str();
            if self.drops && !lost.characters {
                let characters: HashSet<char> = text.chars().collect();
                for c in characters {
                    lost.characters |= tokenizer.drops(c)?;
                }
            }
            let at_risk = (self.newlines && text.contains('\n'))
                || (self.blanks && (text.contains("  ") || text.contains('\t') || text.trim() != text));
            if !at_risk {
                continue;
            }
            let back = round_trip(tokenizer, text)?;
            let newlines = |s: &str| s.bytes().filter(|&b| b == b'\n').count();
            lost.newlines |= newlines(&back) < newlines(text);
            let blanks = |s: &str| s.chars().filter(|c| c.is_whitespace() && *c != '\n').count();
            // A lost newline often comes back as a blank, so only fewer blanks are certain to be a loss.
            lost.blanks |= blanks(&back) < blanks(text);
        }
        Ok(lost)
    }
}

fn round_trip(tokenizer: &Tokenizer, text: &str) -> Result<String> {
    Ok(tokenizer.decode(&tokenizer.encode(text)?, Specials::Show))
}
