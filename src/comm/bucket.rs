//! Which rank owns which elements of a bucket: pure functions of lengths and number of ranks.
//!
//! A bucket is the tensors that are final together, one after the other. It is cut into blocks of [`BLOCK`] elements, the last one
//! perhaps shorter; n blocks are padded to a multiple of w, and rank r owns blocks `r·n/w ..`: equal shares, and the ranges follow from
//! the lengths alone. The squared norm of a gradient is summed by blocks of the same size, so owners may sum their own.

use std::ops::Range;

/// Elements of a block: those that the sum of squares of a gradient takes together.
pub const BLOCK: usize = 16 * 1024;

/// The elements of a bucket of `len` that rank `rank` of `size` owns; empty where there are more ranks than blocks.
///
/// # Panics
/// If the rank is not below the size.
pub fn owned(len: usize, rank: usize, size: usize) -> Range<usize> {
    assert!(rank < size, "rank {rank} of {size}");
    let share = len.div_ceil(BLOCK).div_ceil(size) * BLOCK;
    (rank * share).min(len)..((rank + 1) * share).min(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_has_one_owner_and_shares_are_whole_blocks() {
        for size in 1..=64 {
            for len in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK + 3, 64 * BLOCK, 1_000_003] {
                let ranges: Vec<_> = (0..size).map(|r| owned(len, r, size)).collect();
                assert_eq!((ranges[0].start, ranges[size - 1].end), (0, len));
                for pair in ranges.windows(2) {
                    assert_eq!(pair[0].end, pair[1].start, "{len} elements on {size} ranks");
                    assert!(
                        pair[1].is_empty() || pair[0].len().is_multiple_of(BLOCK) && pair[0].len() >= pair[1].len()
                    );
                }
            }
        }
        assert_eq!(owned(3 * BLOCK + 5, 1, 2), 2 * BLOCK..3 * BLOCK + 5);
    }
}
