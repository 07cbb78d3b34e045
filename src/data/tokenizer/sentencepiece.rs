//! A SentencePiece model behind a tokenizer.

use std::collections::HashMap;

use sentencepiece::SentencePieceProcessor;
use sentencepiece_model::ModelType;

use super::special::check_special_ids;
use super::{Opened, SpecialIds, Token, VocabPiece};
use crate::data::sp_model;
use crate::ensure;
use crate::error::{Context, Error, Result};

/// The library's processors of one model.
pub(super) struct SentencePiece {
    sp: SentencePieceProcessor,
    /// The same model without a dummy prefix: for text that continues a stretch.
    continuing: SentencePieceProcessor,
}

// SAFETY: encoding and decoding are `const` methods of a `SentencePieceProcessor` that keeps no hidden state; the library
// documents them as safe to call from several threads once the model is loaded, and nothing here changes it afterwards.
unsafe impl Sync for SentencePiece {}
// SAFETY: the processor owns its memory and uses no thread-local state.
unsafe impl Send for SentencePiece {}

impl SentencePiece {
    /// Opens the bytes of a model called `name` in messages.
    ///
    /// # Errors
    /// If they are no SentencePiece model, or have other special ids than `special`.
    pub fn open(name: &str, bytes: &[u8], special: SpecialIds) -> Result<(Self, Opened)> {
        let model = sp_model::parse(bytes).context(|| format!("tokenizer {name}"))?;
        check_special_ids(name, &model, special)?;
        let load = |bytes: &[u8]| {
            SentencePieceProcessor::from_serialized_proto(bytes).map_err(|e| {
                Error::new(format!(
                    "tokenizer {name}: expected a SentencePiece model, found one that does not load ({e})"
                ))
            })
        };
        let sp = load(bytes)?;
        ensure!(
            sp.len() == model.pieces.len(),
            "tokenizer {name}: expected {} pieces, found {} after loading",
            model.pieces.len(),
            sp.len()
        );
        let continuing = load(&sp_model::without_dummy_prefix(bytes))?;
        let piece = |p: &sentencepiece_model::SentencePiece| VocabPiece {
            text: p.piece().to_string(),
            score: p.score(),
            kind: p.r#type(),
        };
        let opened = Opened {
            pieces: model.pieces.iter().map(piece).collect(),
            model_type: model.trainer().map_or(ModelType::Unigram, |t| t.model_type()),
            special: special.into(),
            byte_ids: sp_model::byte_ids(&model),
            missing_bytes: Vec::new(),
            unknown: Some(special.unk),
            dropout: None,
            strips: HashMap::new(),
            more_stops: Vec::new(),
            prefix_once: false,
            config: None,
        };
        Ok((Self { sp, continuing }, opened))
    }

    /// The library's own `encode`.
    pub fn encode(&self, text: &str, continuing: bool) -> Result<Vec<Token>, String> {
        let sp = if continuing { &self.continuing } else { &self.sp };
        let pieces = sp.encode(text).map_err(|e| e.to_string())?;
        let token =
            |p: sentencepiece::PieceWithId| Token { id: p.id, begin: p.span.0 as usize, end: p.span.1 as usize };
        Ok(pieces.into_iter().map(token).collect())
    }

    /// The library's own `decode`; every id is one of the model.
    pub fn decode(&self, ids: &[u32]) -> Result<String, String> {
        self.sp.decode_piece_ids(ids).map_err(|e| e.to_string())
    }
}
