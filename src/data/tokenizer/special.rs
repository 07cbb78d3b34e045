//! Ids of special tokens: those a SentencePiece model has to have, and those a tokenizer has.

use std::collections::HashMap;

use sentencepiece_model::{SentencePieceModel, Type};

use crate::ensure;
use crate::error::{Error, Result};

/// The map of special ids that a SentencePiece model has to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpecialIds {
    /// Padding; never equal to `eos`.
    pub pad: u32,
    /// Unknown text.
    pub unk: u32,
    /// Begin of sequence.
    pub bos: u32,
    /// End of sequence.
    pub eos: u32,
}

/// The special tokens of an opened tokenizer. A SentencePiece model has all of them; many byte-level vocabularies have no
/// unknown, begin or padding token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Padding; never equal to `eos`.
    pub pad: Option<u32>,
    /// Unknown text.
    pub unk: Option<u32>,
    /// Begin of sequence.
    pub bos: Option<u32>,
    /// End of sequence.
    pub eos: u32,
}

impl From<SpecialIds> for SpecialTokens {
    fn from(ids: SpecialIds) -> Self {
        Self { pad: Some(ids.pad), unk: Some(ids.unk), bos: Some(ids.bos), eos: ids.eos }
    }
}

impl Default for SpecialIds {
    fn default() -> Self {
        Self { pad: 0, unk: 1, bos: 2, eos: 3 }
    }
}

impl SpecialIds {
    /// Reads `pad,unk,bos,eos`, four distinct ids; `pad` may equal `unk`, as users of Llama-2's vocabulary choose.
    ///
    /// # Errors
    /// A usage error if it is anything else.
    pub fn parse(text: &str) -> Result<Self> {
        let ids: Result<Vec<u32>, _> = text.split(',').map(|s| s.trim().parse::<u32>()).collect();
        let Ok(&[pad, unk, bos, eos]) = ids.as_deref() else {
            return Err(Error::usage(format!(
                "special ids \"{text}\", expected four ids pad,unk,bos,eos such as 0,1,2,3"
            )));
        };
        let this = Self { pad, unk, bos, eos };
        if pad == eos || bos == eos || unk == bos || unk == eos || pad == bos {
            return Err(Error::usage(format!(
                "special ids \"{text}\" are not distinct, expected four ids of which only pad and unk may agree"
            )));
        }
        Ok(this)
    }
}

/// Checks the special ids of a SentencePiece model called `name`.
///
/// # Errors
/// If they differ from `expected`, or BOS or EOS is no control piece.
pub(super) fn check_special_ids(name: &str, model: &SentencePieceModel, expected: SpecialIds) -> Result<()> {
    let n = model.pieces.len();
    let asked = [("pad", expected.pad), ("unk", expected.unk), ("bos", expected.bos), ("eos", expected.eos)];
    let default = SpecialIds::default() == expected;
    let trainer = model.trainer();
    let found = [
        trainer.map_or(-1, |t| t.pad_id()),
        trainer.map_or(0, |t| t.unk_id()),
        trainer.map_or(1, |t| t.bos_id()),
        trainer.map_or(2, |t| t.eos_id()),
    ];
    let show = |id: i32| if id < 0 { "none".to_string() } else { id.to_string() };
    // A map given by hand may name any piece as padding, since many models have none.
    let differs = asked
        .iter()
        .zip(found)
        .any(|((what, id), found)| i64::from(found) != i64::from(*id) && (default || *what != "pad" || found >= 0));
    let list = |ids: [String; 4]| format!("pad {}, unk {}, bos {}, eos {}", ids[0], ids[1], ids[2], ids[3]);
    ensure!(
        !differs,
        "tokenizer {name}: wrong special ids, expected {}, found {}; pass --special-ids pad,unk,bos,eos to accept another map",
        list(asked.map(|(_, id)| id.to_string())),
        list(found.map(show))
    );
    for (what, id) in asked {
        ensure!((id as usize) < n, "tokenizer {name}: expected the id of {what} below {n}, found {id}");
    }
    let kinds: HashMap<u32, Type> = asked.iter().map(|&(_, id)| (id, model.pieces[id as usize].r#type())).collect();
    for (what, id) in [("bos", expected.bos), ("eos", expected.eos)] {
        let kind = kinds[&id];
        ensure!(
            matches!(kind, Type::Control | Type::UserDefined),
            "tokenizer {name}: expected {what} (id {id}) to be a control piece, found {:?} of kind {kind:?}",
            model.pieces[id as usize].piece()
        );
    }
    Ok(())
}
