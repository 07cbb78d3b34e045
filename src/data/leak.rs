//! Validation rows that the training data have too: their loss looks better than that of text nobody has seen.

use std::collections::HashSet;
use std::fmt;

use super::train_set::{PieceSet, Tokens};

/// Rows of a validation set that are trained on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leak {
    /// The validation set.
    pub name: String,
    /// How many of its rows.
    pub rows: usize,
    /// Rows that it has.
    pub of: usize,
    /// Where the first of them stands, `file:line`.
    pub first: String,
}

impl fmt::Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, rows, of, first } = self;
        write!(
            f,
            "{name}: {rows} of {of} validation rows ask what the training data ask too, {first} is the first; the validation loss looks \
             better than it is"
        )
    }
}

/// Which rows are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Same {
    /// Those with one context, as the split of held-out rows has it (see [`super::split`]).
    Context,
    /// Those with the same tokens: text has no context.
    Content,
}

impl Same {
    fn key(self, set: &PieceSet, piece: usize, buffer: &mut Vec<u8>) -> u64 {
        match (self, set.tokens.as_ref()) {
            (Self::Context, Tokens::File(file)) => file.info(set.pieces[piece].doc as usize).prompt_hash,
            _ => content(set, piece, buffer),
        }
    }
}

/// The validation sets that have rows of the training sets.
pub fn leaks(train: &[PieceSet], val: &[PieceSet], same: Same) -> Vec<Leak> {
    let mut buffer = Vec::new();
    let mut trained = HashSet::new();
    for set in train.iter().filter(|_| !val.is_empty()) {
        trained.extend((0..set.pieces.len()).map(|piece| same.key(set, piece, &mut buffer)));
    }
    let of_set = |set: &PieceSet| {
        let mut seen = (0..set.pieces.len()).filter(|&piece| trained.contains(&same.key(set, piece, &mut buffer)));
        let first = seen.next()?;
        let rows = 1 + seen.count();
        let place = format!("{}:{}", set.name, set.line(first));
        Some(Leak { name: set.name.clone(), rows, of: set.pieces.len(), first: place })
    };
    val.iter().filter_map(of_set).collect()
}

/// A document's tokens with their loss bits, as a number. `buffer` is kept from one to the next.
pub fn content(set: &PieceSet, piece: usize, buffer: &mut Vec<u8>) -> u64 {
    let p = set.pieces[piece];
    buffer.clear();
    set.tokens.visit(p.doc as usize, p.start as usize, p.len as usize, |token, supervised| {
        // Ids stay far below 2^31: the loss bit has room beside them.
        buffer.extend((token << 1 | u32::from(supervised)).to_le_bytes());
    });
    u64::from_le_bytes(blake3::hash(buffer).as_bytes()[..8].try_into().expect("8 bytes"))
}
