//! ZeRO-1 (Rajbhandari et al. 2019, arXiv:1910.02054, stage 1): each rank holds the state of a part of every trained weight, and updates it.

use std::ops::Range;

/// Which elements of each trained weight's gradient every rank owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares {
    rank: usize,
    /// By weight, in the order of files: rank r owns `cuts[r]..cuts[r + 1]`.
    cuts: Vec<Vec<usize>>,
}

impl Shares {
    /// Shares of this rank and the others, from where they begin in each weight.
    pub fn new(rank: usize, cuts: Vec<Vec<usize>>) -> Self {
        Self { rank, cuts }
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.cuts.first().map_or(1, |cuts| cuts.len() - 1)
    }

    /// What this rank owns of weight `i`.
    pub fn own(&self, i: usize) -> Range<usize> {
        self.of(i, self.rank)
    }

    fn of(&self, i: usize, rank: usize) -> Range<usize> {
        self.cuts[i][rank]..self.cuts[i][rank + 1]
    }

    /// Blocks of `block` elements of weight `i` that a rank owns.
    fn blocks(&self, i: usize, rank: usize, block: usize) -> usize {
        self.of(i, rank).len().div_ceil(block)
    }

    /// Blocks that each rank owns of all weights.
    pub fn counts(&self, block: usize) -> Vec<usize> {
        (0..self.size()).map(|r| (0..self.cuts.len()).map(|i| self.blocks(i, r, block)).sum()).collect()
    }

    /// Values of the blocks of all ranks, each rank's in the order of weights, in the order of weights and their elements; and how many
    /// each weight has.
    pub fn in_order(&self, block: usize, by_rank: &[Vec<f64>]) -> (Vec<usize>, Vec<f64>) {
        let mut taken = vec![0; by_rank.len()];
        let (mut counts, mut all) = (Vec::new(), Vec::new());
        for i in 0..self.cuts.len() {
            let before = all.len();
            for (r, values) in by_rank.iter().enumerate() {
                let n = self.blocks(i, r, block);
                all.extend_from_slice(&values[taken[r]..taken[r] + n]);
                taken[r] += n;
            }
            counts.push(all.len() - before);
        }
        (counts, all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_in_the_order_of_weights_whoever_owns_them() {
        // Three weights of 5, 2 and 4 elements in blocks of 2 on three ranks; the second rank begins in the middle of the first.
        let shares = Shares::new(1, vec![vec![0, 4, 5, 5], vec![0, 0, 2, 2], vec![0, 0, 0, 4]]);
        assert_eq!((shares.size(), shares.own(0), shares.own(1), shares.own(2)), (3, 4..5, 0..2, 0..0));
        assert_eq!(shares.counts(2), [2, 2, 2]);
        let (counts, all) = shares.in_order(2, &[vec![1.0, 2.0], vec![3.0, 4.0], vec![5.0, 6.0]]);
        assert_eq!((counts, all), (vec![3, 1, 2], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    }
}
