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

/// Elements of a bucket on GPUs: less than 8 MiB does not fill the links.
pub const GPU_BUCKET: usize = 1 << 21;

/// Elements that an ordered fold on GPUs sends, or receives, at once.
const STAGE: usize = 1 << 24;

/// Elements that the kernel of an ordered fold takes together.
const QUAD: usize = 4;

/// Elements of each of `size` ranks' slots that an ordered fold on GPUs sends at once, of a bucket whose longest slot has so many.
///
/// # Panics
/// If there is no rank.
pub fn at_once(longest: usize, size: usize) -> usize {
    longest.min(STAGE / size).max(1).next_multiple_of(QUAD)
}

fn blocks(len: &usize) -> usize {
    len.div_ceil(BLOCK)
}

/// Blocks that each of `size` ranks owns of a bucket of tensors of these lengths, the last ones fewer.
///
/// # Panics
/// If there is no rank.
pub fn share(lengths: &[usize], size: usize) -> usize {
    lengths.iter().map(blocks).sum::<usize>().div_ceil(size)
}

/// Elements that the tensors of a bucket take where they lie one after the other in one piece of memory, so that each rank's share is one
/// range of it, all of one length: each tensor is filled up to whole blocks, the last one to a share for each of `size` ranks.
///
/// # Panics
/// If there is no rank.
pub fn rooms(lengths: &[usize], size: usize) -> Vec<usize> {
    let mut all: Vec<usize> = lengths.iter().map(|len| len.next_multiple_of(BLOCK)).collect();
    let whole = share(lengths, size) * size * BLOCK;
    let so_far: usize = all.iter().sum();
    if let Some(last) = all.last_mut() {
        *last += whole - so_far;
    }
    all
}

/// How long a bucket is whose tensors lie in their [`rooms`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Elements of each rank's share, what lies between tensors among them.
    pub share: usize,
    /// Elements up to the end of the last tensor.
    pub len: usize,
}

impl Extent {
    /// Of a bucket of tensors of these lengths on `size` ranks.
    ///
    /// # Panics
    /// If there is no rank.
    pub fn of(lengths: &[usize], size: usize) -> Self {
        let before = lengths.len().saturating_sub(1);
        let begins: usize = rooms(lengths, size)[..before].iter().sum();
        Self { share: share(lengths, size) * BLOCK, len: begins + lengths.last().unwrap_or(&0) }
    }

    /// Elements of it that lie in the share of a rank.
    pub fn slot(&self, rank: usize) -> usize {
        self.len.saturating_sub(rank * self.share).min(self.share)
    }
}

/// Where the shares of `size` ranks begin in a bucket of tensors of these lengths, and its end: rank r owns `cuts[r]..cuts[r + 1]` of
/// the elements, one tensor after the other; nothing where there are more ranks than blocks.
///
/// # Panics
/// If there is no rank.
pub fn cuts(lengths: &[usize], size: usize) -> Vec<usize> {
    let share = share(lengths, size);
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

/// How many blocks of each tensor every rank owns: what puts values of blocks that lie on several ranks into one order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockCounts {
    /// By tensor and rank.
    by_tensor: Vec<Vec<usize>>,
}

impl BlockCounts {
    /// Of tensors of which rank r owns `cuts[t][r]..cuts[t][r + 1]`.
    pub fn new(cuts: &[Vec<usize>]) -> Self {
        let of = |cuts: &Vec<usize>| cuts.windows(2).map(|cut| blocks(&(cut[1] - cut[0]))).collect();
        Self { by_tensor: cuts.iter().map(of).collect() }
    }

    /// Blocks that each rank owns of all tensors.
    pub fn totals(&self) -> Vec<usize> {
        let size = self.by_tensor.first().map_or(0, Vec::len);
        (0..size).map(|r| self.by_tensor.iter().map(|counts| counts[r]).sum()).collect()
    }

    /// Blocks of each tensor.
    pub fn of_tensors(&self) -> Vec<usize> {
        self.by_tensor.iter().map(|counts| counts.iter().sum()).collect()
    }

    /// Every block in the order of tensors and their elements: its rank, and its place among those of that rank, which has them in the
    /// same order.
    pub fn places(&self) -> impl Iterator<Item = (usize, usize)> {
        let mut taken = vec![0; self.totals().len()];
        self.by_tensor.iter().flatten().enumerate().flat_map(move |(i, &n)| {
            let rank = i % taken.len();
            let first = taken[rank];
            taken[rank] += n;
            (first..first + n).map(move |at| (rank, at))
        })
    }
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
    fn shares_are_ranges_of_one_length_where_tensors_lie_in_their_rooms() {
        for lengths in BUCKETS {
            for size in 1..=9 {
                let (rooms, share) = (rooms(lengths, size), share(lengths, size) * BLOCK);
                assert!(rooms.iter().zip(lengths).all(|(room, len)| room >= len && room.is_multiple_of(BLOCK)));
                assert_eq!(rooms.iter().sum::<usize>(), if lengths.is_empty() { 0 } else { share * size });
                let extent = Extent::of(lengths, size);
                assert_eq!((0..size).map(|r| extent.slot(r)).sum::<usize>(), extent.len);
                assert!(extent.share == share && extent.len >= lengths.iter().sum(), "{lengths:?} on {size}");
                // Where each tensor begins.
                let begins: Vec<usize> = (0..rooms.len()).map(|t| rooms[..t].iter().sum()).collect();
                for r in 0..size {
                    let mut at = r * share;
                    for (t, range) in pieces(lengths, r, size) {
                        assert_eq!(
                            begins[t] + range.start,
                            at,
                            "{lengths:?} on {size}: a hole in the share of rank {r}"
                        );
                        at = begins[t] + range.end.next_multiple_of(BLOCK);
                        assert!(at <= (r + 1) * share);
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_come_in_the_order_of_tensors_whoever_owns_them() {
        // Three tensors on three ranks; the second rank begins in the middle of the first.
        let counts = BlockCounts::new(&[
            vec![0, 2 * BLOCK, 2 * BLOCK + 1, 2 * BLOCK + 1],
            vec![0, 0, 5, 5],
            vec![0, 0, 0, BLOCK + 1],
        ]);
        assert_eq!((counts.totals(), counts.of_tensors()), (vec![2, 2, 2], vec![3, 1, 2]));
        let places: Vec<_> = counts.places().collect();
        assert_eq!(places, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]);
        // The fourth block of the second tensor is the second one of its rank.
        let counts = BlockCounts::new(&[vec![0, BLOCK, 2 * BLOCK], vec![0, BLOCK, 3 * BLOCK]]);
        assert_eq!(counts.places().collect::<Vec<_>>(), [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2)]);
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
