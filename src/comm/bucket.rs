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

/// Where the shares of `size` ranks begin in each tensor of a bucket: of tensor t rank r owns `all[t][r]..all[t][r + 1]`.
pub fn tensor_cuts(lengths: &[usize], size: usize) -> Vec<Vec<usize>> {
    let all = cuts(lengths, size);
    let mut at = 0;
    let of = |&len: &usize| {
        let own = all.iter().map(|cut| (*cut).clamp(at, at + len) - at).collect();
        at += len;
        own
    };
    lengths.iter().map(of).collect()
}

/// Elements of a bucket's tensors that a rank owns: the tensor's place in the bucket, and which of its elements.
pub fn pieces(lengths: &[usize], rank: usize, size: usize) -> Vec<(usize, Range<usize>)> {
    let own = tensor_cuts(lengths, size).into_iter().map(|cuts| cuts[rank]..cuts[rank + 1]);
    own.enumerate().filter(|(_, range)| !range.is_empty()).collect()
}

/// Where a part of what is wanted lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Which of the ranges that are held.
    pub holder: usize,
    /// Elements of that range, counted from its first.
    pub range: Range<usize>,
}

/// Where the elements of a range of a tensor lie among ranges that others held, in order: state that w ranks wrote is read by any
/// other number of them.
///
/// # Errors
/// If an element is held by nobody, or by two: the message has the elements.
pub fn sources(want: &Range<usize>, held: &[Range<usize>]) -> Result<Vec<Source>> {
    let mut found = Vec::new();
    for (holder, range) in held.iter().enumerate() {
        let overlap = range.start.max(want.start)..range.end.min(want.end);
        if !overlap.is_empty() {
            found.push((
                overlap.clone(),
                Source { holder, range: overlap.start - range.start..overlap.end - range.start },
            ));
        }
    }
    found.sort_by_key(|(overlap, _)| overlap.start);
    let mut at = want.start;
    for (overlap, _) in &found {
        ensure!(overlap.start <= at, "elements {at}..{} are held by nobody", overlap.start);
        ensure!(overlap.start == at, "elements {}..{} are held twice", overlap.start, at.min(overlap.end));
        at = overlap.end;
    }
    ensure!(at == want.end, "elements {at}..{} are held by nobody", want.end);
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
                let all: Vec<_> = (0..size).flat_map(|r| pieces(lengths, r, size)).collect();
                assert_eq!(all.iter().map(|(_, range)| range.len()).sum::<usize>(), total, "{lengths:?} on {size}");
                assert!(all.iter().all(|(_, range)| range.start.is_multiple_of(BLOCK)), "a block has two owners");
                let most =
                    (0..size).map(|r| pieces(lengths, r, size).iter().map(|(_, p)| p.len().div_ceil(BLOCK)).sum());
                assert!(most.max() <= Some(blocks.div_ceil(size)), "shares are equal but for the last ones");
            }
        }
    }

    #[test]
    fn what_w_ranks_hold_any_other_number_finds_once() {
        for lengths in BUCKETS {
            for (w, v) in (1..=9).flat_map(|w| (1..=9).map(move |v| (w, v))) {
                for (old, new) in tensor_cuts(lengths, w).iter().zip(tensor_cuts(lengths, v)) {
                    let held: Vec<Range<usize>> = old.windows(2).map(|c| c[0]..c[1]).collect();
                    for want in new.windows(2).map(|c| c[0]..c[1]) {
                        let mut at = want.start;
                        for Source { holder, range } in sources(&want, &held).unwrap() {
                            assert_eq!(held[holder].start + range.start, at);
                            assert!(!range.is_empty() && range.end <= held[holder].len());
                            at += range.len();
                        }
                        assert_eq!(at, want.end, "{lengths:?} from {w} to {v} ranks");
                    }
                }
            }
        }
    }

    #[test]
    fn gaps_and_overlaps_are_named() {
        let error = |held: &[Range<usize>]| sources(&(0..10), held).unwrap_err().to_string();
        assert_eq!(error(&[0..4, 5..10]), "elements 4..5 are held by nobody");
        assert_eq!(error(&[0..6, 5..10]), "elements 5..6 are held twice");
        assert_eq!(error(&[0..4, 4..9]), "elements 9..10 are held by nobody");
        assert_eq!(error(&[]), "elements 0..10 are held by nobody");
    }
}
