//! Which rank owns which elements of a bucket: pure functions of lengths and number of ranks. Sharded moments follow the same cut.
//!
//! A bucket is the tensors that are final together, one after the other. Each tensor is cut into blocks of [`BLOCK`] elements, its last one
//! perhaps shorter; of n blocks rank r owns `r·s .. (r+1)·s` with s = n / w rounded up: ranges follow from the lengths alone. The squared
//! norm of a gradient is summed by blocks of the same size, so owners can sum their own without changing a bit.

use std::ops::Range;

use crate::ensure;
use crate::error::Result;

/// Elements of a block: those that the sum of squares of a gradient takes together.
pub const BLOCK: usize = 16 * 1024;

/// Where the shares of `size` ranks begin in a bucket of tensors of these lengths, and its end: rank r owns `cuts[r]..cuts[r + 1]` of
/// the elements, one tensor after the other; nothing where there are more ranks than blocks.
///
/// # Panics
/// If there is no rank.
pub fn cuts(lengths: &[usize], size: usize) -> Vec<usize> {
    let blocks = |len: &usize| len.div_ceil(BLOCK);
    let share = lengths.iter().map(blocks).sum::<usize>().div_ceil(size);
    let begin = |mut block: usize| {
        let mut at = 0;
        for len in lengths {
            if block < blocks(len) {
                return at + block * BLOCK;
            }
            block -= blocks(len);
            at += len;
        }
        at
    };
    (0..=size).map(|r| begin(r * share)).collect()
}

/// A part of a tensor that a rank holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The tensor's place in its bucket.
    pub tensor: usize,
    /// Elements of the tensor.
    pub range: Range<usize>,
}

/// The parts of a bucket's tensors that a rank owns, in their order.
pub fn pieces(lengths: &[usize], rank: usize, size: usize) -> Vec<Piece> {
    let all = cuts(lengths, size);
    let (own, mut at) = (all[rank]..all[rank + 1], 0);
    let mut pieces = Vec::new();
    for (tensor, len) in lengths.iter().enumerate() {
        let range = own.start.clamp(at, at + len) - at..own.end.clamp(at, at + len) - at;
        if !range.is_empty() {
            pieces.push(Piece { tensor, range });
        }
        at += len;
    }
    pieces
}

/// Where a part of what is wanted lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Who holds it.
    pub holder: usize,
    /// Which of the holder's pieces.
    pub piece: usize,
    /// Elements of that piece.
    pub range: Range<usize>,
}

/// Where the elements of a piece lie among those that the ranks of another run held, in order: state that w ranks wrote is read by any
/// other number of them.
///
/// # Errors
/// If an element is held by nobody, or by two.
pub fn sources(want: &Piece, held: &[Vec<Piece>]) -> Result<Vec<Source>> {
    let mut found = Vec::new();
    for (holder, pieces) in held.iter().enumerate() {
        for (piece, Piece { range, .. }) in pieces.iter().enumerate().filter(|(_, p)| p.tensor == want.tensor) {
            let overlap = range.start.max(want.range.start)..range.end.min(want.range.end);
            if !overlap.is_empty() {
                found.push((
                    overlap.start,
                    Source { holder, piece, range: overlap.start - range.start..overlap.end - range.start },
                ));
            }
        }
    }
    found.sort_by_key(|(start, _)| *start);
    let mut at = want.range.start;
    for (start, source) in &found {
        ensure!(
            *start == at,
            "tensor {}: elements from {} on are held {}",
            want.tensor,
            at.min(*start),
            if *start > at { "by nobody" } else { "twice" }
        );
        at += source.range.len();
    }
    ensure!(at == want.range.end, "tensor {}: elements from {at} on are held by nobody", want.tensor);
    Ok(found.into_iter().map(|(_, source)| source).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUCKETS: [&[usize]; 7] =
        [&[], &[1], &[BLOCK], &[BLOCK + 1, 3], &[5, 7 * BLOCK + 3, BLOCK - 1], &[64 * BLOCK], &[0, 1_000_003, 0, 2]];

    #[test]
    fn every_element_has_one_owner_and_no_block_has_two() {
        for lengths in BUCKETS {
            let (total, blocks): (usize, usize) =
                (lengths.iter().sum(), lengths.iter().map(|l| l.div_ceil(BLOCK)).sum());
            for size in 1..=64 {
                let cuts = cuts(lengths, size);
                assert_eq!((cuts[0], cuts[size], cuts.len()), (0, total, size + 1));
                assert!(cuts.is_sorted());
                let all: Vec<Piece> = (0..size).flat_map(|r| pieces(lengths, r, size)).collect();
                assert_eq!(all.iter().map(|p| p.range.len()).sum::<usize>(), total, "{lengths:?} on {size}");
                assert!(all.iter().all(|p| p.range.start.is_multiple_of(BLOCK)), "a block has two owners");
                let most =
                    (0..size).map(|r| pieces(lengths, r, size).iter().map(|p| p.range.len().div_ceil(BLOCK)).sum());
                assert!(most.max() <= Some(blocks.div_ceil(size)), "shares are equal but for the last ones");
            }
        }
    }

    #[test]
    fn what_w_ranks_hold_any_other_number_finds_once() {
        for lengths in BUCKETS {
            for (w, v) in (1..=9).flat_map(|w| (1..=9).map(move |v| (w, v))) {
                let held: Vec<_> = (0..w).map(|r| pieces(lengths, r, w)).collect();
                for want in (0..v).flat_map(|r| pieces(lengths, r, v)) {
                    let mut at = want.range.start;
                    for Source { holder, piece, range } in sources(&want, &held).unwrap() {
                        let from = &held[holder][piece];
                        assert_eq!((from.tensor, from.range.start + range.start), (want.tensor, at));
                        assert!(range.end <= from.range.len());
                        at += range.len();
                    }
                    assert_eq!(at, want.range.end, "{lengths:?} from {w} to {v} ranks");
                }
            }
        }
    }

    #[test]
    fn gaps_and_overlaps_are_named() {
        let piece = |range| Piece { tensor: 2, range };
        let error = |held: &[Range<usize>]| {
            let held: Vec<Vec<Piece>> = held.iter().cloned().map(|r| vec![piece(r)]).collect();
            sources(&piece(0..10), &held).unwrap_err().to_string()
        };
        assert_eq!(error(&[0..4, 5..10]), "tensor 2: elements from 4 on are held by nobody");
        assert_eq!(error(&[0..6, 5..10]), "tensor 2: elements from 5 on are held twice");
        assert_eq!(error(&[0..4, 4..9]), "tensor 2: elements from 9 on are held by nobody");
        assert_eq!(error(&[]), "tensor 2: elements from 0 on are held by nobody");
    }
}
