//! SentencePiece model files as bytes: everything the C++ library takes for granted is checked before it sees them.

use std::collections::HashSet;

use sentencepiece_model::{ModelType, SentencePieceModel, Type};

use crate::error::{Error, Result};
use crate::{bail, ensure};

/// Longest `.model` file taken: the largest in use are a few megabytes.
const MAX_BYTES: usize = 256 << 20;

/// Parses and checks a model.
///
/// # Errors
/// If the bytes are no SentencePiece model, or one that the library could not load or use safely.
pub fn parse(bytes: &[u8]) -> Result<SentencePieceModel> {
    ensure!(!bytes.is_empty(), "expected a SentencePiece model, found an empty file");
    ensure!(
        bytes.len() <= MAX_BYTES,
        "expected a SentencePiece model of at most {MAX_BYTES} bytes, found {}",
        bytes.len()
    );
    let model = SentencePieceModel::from_slice(bytes)
        .map_err(|e| Error::new(format!("expected a SentencePiece model, found {} bytes that do not parse ({e}); the file is damaged, truncated or of another kind", bytes.len())))?;
    ensure!(!model.pieces.is_empty(), "expected a SentencePiece model, found no pieces in it");
    ensure!(
        model.trainer().is_some(),
        "expected a SentencePiece model with its trainer settings, found none; the file is truncated or of another kind"
    );
    ensure!(
        model.normalizer().is_some(),
        "expected a SentencePiece model with its normaliser settings, found none; the file is truncated or of another kind"
    );
    let kind = model.trainer().map_or(ModelType::Unigram, |t| t.model_type());
    ensure!(matches!(kind, ModelType::Unigram | ModelType::Bpe), "expected a unigram or BPE model, found {kind:?}");
    let mut seen = HashSet::with_capacity(model.pieces.len());
    let mut n_unknown = 0;
    for (id, piece) in model.pieces.iter().enumerate() {
        let text = piece.piece();
        ensure!(!text.is_empty() && !text.contains('\0'), "expected text in piece {id}, found {text:?}");
        ensure!(seen.insert(text), "expected distinct pieces, found {text:?} again at id {id}");
        ensure!(piece.score().is_finite(), "expected a finite score of piece {id} ({text:?}), found {}", piece.score());
        n_unknown += usize::from(piece.r#type() == Type::Unknown);
        if piece.r#type() == Type::Byte {
            ensure!(byte_of(text).is_some(), "expected a byte piece such as <0x0A> at id {id}, found {text:?}");
        }
    }
    ensure!(n_unknown == 1, "expected one unknown piece, found {n_unknown}");
    let byte_fallback = model.trainer().is_some_and(|t| t.byte_fallback());
    let n_bytes = model.pieces.iter().filter(|p| p.r#type() == Type::Byte).count();
    ensure!(
        n_bytes == if byte_fallback { 256 } else { 0 },
        "expected {} byte pieces (byte_fallback {byte_fallback}), found {n_bytes}",
        if byte_fallback { 256 } else { 0 }
    );
    for spec in [model.normalizer(), model.denormalizer()].into_iter().flatten() {
        let map = spec.precompiled_charsmap();
        if !map.is_empty() {
            check_charsmap(map)?;
        }
    }
    Ok(model)
}

/// The byte of a piece such as `<0x0A>`.
fn byte_of(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 || hex.bytes().any(|b| b.is_ascii_lowercase()) {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}

/// The ids of the 256 byte pieces, in order of the bytes.
pub fn byte_ids(model: &SentencePieceModel) -> Option<Vec<u32>> {
    let mut ids = vec![None; 256];
    for (id, piece) in model.pieces.iter().enumerate().filter(|(_, p)| p.r#type() == Type::Byte) {
        ids[usize::from(byte_of(piece.piece())?)] = Some(id as u32);
    }
    ids.into_iter().collect()
}

/// The same model with `add_dummy_prefix` off. A field that comes again in a protobuf message is merged into the first,
/// so appending `normalizer_spec { add_dummy_prefix: false }` (field 3, of it field 3) is enough and touches nothing else.
pub fn without_dummy_prefix(bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    out.extend([0x1a, 2, 0x18, 0]);
    out
}

/// Walks the normaliser's double-array trie (a u32 byte length, the units, then zero-terminated replacements) over every
/// reachable node, so that no text can lead the library out of its bounds.
fn check_charsmap(map: &[u8]) -> Result<()> {
    let damaged = "expected a well-formed normalisation table";
    let Some((head, rest)) = map.split_first_chunk::<4>() else { bail!("{damaged}, found {} bytes", map.len()) };
    let n_bytes = u32::from_le_bytes(*head) as usize;
    ensure!(
        n_bytes.is_multiple_of(4) && n_bytes >= 1024 && n_bytes < rest.len(),
        "{damaged}, found a trie of {n_bytes} in {} bytes",
        rest.len()
    );
    let (trie, replacements) = rest.split_at(n_bytes);
    ensure!(replacements.last() == Some(&0), "{damaged}, found replacements without an end");
    ensure!(std::str::from_utf8(replacements).is_ok(), "{damaged}, found replacements that are not UTF-8");
    let units: Vec<u32> = trie.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
    // Unit layout (darts-clone): bit 8 = has a leaf; offset = (u >> 10) << ((u & 512) >> 6); label = u & (1 << 31 | 255).
    let offset = |u: u32| ((u >> 10) << ((u & (1 << 9)) >> 6)) as usize;
    let mut seen = vec![false; units.len()];
    let mut stack = vec![0usize];
    while let Some(at) = stack.pop() {
        let base = at ^ offset(units[at]);
        if at != 0 && units[at] >> 8 & 1 == 1 {
            ensure!(base < units.len(), "{damaged}, found a leaf out of range");
            let value = (units[base] & 0x7fff_ffff) as usize;
            ensure!(value < replacements.len(), "{damaged}, found a replacement out of range");
        }
        for label in 0..256usize {
            let child = base ^ label;
            ensure!(child < units.len(), "{damaged}, found a node out of range");
            if units[child] & (1 << 31 | 255) == label as u32 && !seen[child] {
                seen[child] = true;
                stack.push(child);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_pieces_are_read() {
        assert_eq!(byte_of("<0x0A>"), Some(10));
        assert_eq!(byte_of("<0x0a>"), None);
        assert_eq!(byte_of("<0xA>"), None);
    }

    #[test]
    fn the_default_normaliser_is_well_formed_and_a_damaged_one_is_refused() {
        let bytes = std::fs::read("tests/data/tokenizer/spm4k_unigram.model").unwrap();
        let model = SentencePieceModel::from_slice(&bytes).unwrap();
        let map = model.normalizer().unwrap().precompiled_charsmap().to_vec();
        check_charsmap(&map).unwrap();
        assert!(check_charsmap(&map[..map.len() / 2]).is_err());
        let mut wild = map.clone();
        wild[4..8].copy_from_slice(&0x7fff_fc00u32.to_le_bytes());
        assert!(check_charsmap(&wild).is_err());
    }
}
