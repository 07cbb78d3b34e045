//! ZeRO-1 (Rajbhandari et al. 2019, arXiv:1910.02054, stage 1): each rank holds the state of a part of every trained weight, and updates it.

use std::ops::Range;

use crate::comm::bucket::BlockCounts;

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

    /// What this rank owns of weight `i`.
    pub fn own(&self, i: usize) -> Range<usize> {
        self.cuts[i][self.rank]..self.cuts[i][self.rank + 1]
    }

    /// Blocks of every weight by rank.
    pub fn blocks(&self) -> BlockCounts {
        BlockCounts::new(&self.cuts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_owns_its_part_of_each_weight() {
        let shares = Shares::new(1, vec![vec![0, 4, 5, 5], vec![0, 0, 2, 2], vec![0, 0, 0, 4]]);
        assert_eq!((shares.own(0), shares.own(1), shares.own(2)), (4..5, 0..2, 0..0));
        assert_eq!(shares.blocks().totals(), [1, 2, 1]);
    }
}
