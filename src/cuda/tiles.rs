//! Which tile of C a block of a product computes, by shape and architecture. Nothing else chooses tiles.

use crate::backend::MatMul;

/// Longest rows of an operand, in elements: offsets inside a tile, which has 256 of them at most, are 32 bits wide in the kernels.
pub(super) const MOST_ACROSS: usize = (1 << 32) / 256 - 1;

/// A tile: BLOCK_M x BLOCK_N elements of C, cut among WARPS_M x WARPS_N warps; 64 steps of k through STAGES buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tile {
    /// 128 x 256, 8 warps of 64 x 64, 3 buffers of 48 KiB: the least shared memory traffic per product. 144 KiB.
    Wide,
    /// 128 x 128, 4 warps of 64 x 64, 3 buffers of 32 KiB. 96 KiB.
    Square,
    /// 128 x 128, 8 warps of 64 x 32: fewer registers a thread, more shared memory traffic. For architectures whose tensor cores are
    /// slower against their shared memory (Ada, GeForce): there 64 x 64 warps win nothing, and on sm_120 they spill.
    Square8,
    /// 64 x 64, 4 warps of 32 x 32, 3 buffers of 16 KiB: small products, and operands that need conversion or are not aligned.
    Small,
}

impl Tile {
    /// All of them.
    pub const ALL: [Tile; 4] = [Tile::Wide, Tile::Square, Tile::Square8, Tile::Small];

    /// (BLOCK_M, BLOCK_N).
    pub fn block(self) -> (usize, usize) {
        match self {
            Tile::Wide => (128, 256),
            Tile::Square | Tile::Square8 => (128, 128),
            Tile::Small => (64, 64),
        }
    }

    /// (WARPS_M, WARPS_N).
    pub fn warps(self) -> (usize, usize) {
        match self {
            Tile::Wide | Tile::Square8 => (2, 4),
            Tile::Square | Tile::Small => (2, 2),
        }
    }

    /// Buffers that tiles of the operands pass through.
    pub const STAGES: usize = 3;

    /// Dynamic shared memory in bytes: 64 steps of k in bf16 in each buffer.
    pub fn shared(self) -> usize {
        let (m, n) = self.block();
        Self::STAGES * (m + n) * 64 * 2
    }

    /// Threads of a block.
    pub fn threads(self) -> usize {
        let (m, n) = self.warps();
        32 * m * n
    }

    /// The tiles that are built for an architecture (major · 10 + minor).
    pub fn of_arch(cc: u32) -> &'static [Tile] {
        match cc {
            // The tensor cores of A100 and H100 are fast against their shared memory: large warps, and room for large tiles.
            80 | 90 => &[Tile::Wide, Tile::Square, Tile::Small],
            _ => &[Tile::Square8, Tile::Small],
        }
    }

    /// Time of a product with this tile, in units that only compare: rounds of blocks over the multiprocessors, times the work of a
    /// block, over how well the tile uses the tensor cores (from the shared memory traffic of its warps, not measured).
    fn cost(self, blocks: usize, sm_count: usize) -> f64 {
        let (bm, bn) = self.block();
        let rounds = blocks.div_ceil(sm_count.max(1));
        let efficiency = match self {
            Tile::Wide => 1.0,
            Tile::Square | Tile::Square8 => 0.95,
            Tile::Small => 0.6,
        };
        (rounds * bm * bn) as f64 / efficiency
    }

    /// The tile of the least cost on a device; `blocks` is how many a product needs of each, `None` where it cannot be used.
    pub fn cheapest(
        cc: u32,
        sm_count: usize,
        shared_limit: usize,
        blocks: impl Fn(Tile) -> Option<usize>,
    ) -> Option<Tile> {
        let fitting = Self::of_arch(cc).iter().copied().filter(|t| t.shared() <= shared_limit);
        let costs = fitting.filter_map(|t| Some((t, t.cost(blocks(t)?, sm_count))));
        costs.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(t, _)| t)
    }

    /// The tile for C (m, n) on a device. `plain`: both operands are bf16 and aligned.
    pub fn choose(m: usize, n: usize, plain: bool, cc: u32, sm_count: usize, shared_limit: usize) -> Tile {
        let blocks = |t: Tile| {
            let (bm, bn) = t.block();
            (plain || t == Tile::Small).then(|| m.div_ceil(bm) * n.div_ceil(bn))
        };
        Self::cheapest(cc, sm_count, shared_limit, blocks).unwrap_or(Tile::Small)
    }
}

/// Which operands have k along their rows: (A, B).
pub fn k_major(op: MatMul) -> (bool, bool) {
    match op {
        MatMul::NT => (true, true),
        MatMul::NN => (true, false),
        MatMul::TN => (false, false),
    }
}

#[cfg(test)]
mod tests {
    use super::super::matmul_sm90::{Cluster, Columns};
    use super::*;
    use crate::backend::footprint::{ROW_STEP, row_counts};

    #[test]
    fn shared_memory_is_within_what_each_architecture_has() {
        // Largest block of shared memory: CUDA C++ programming guide, table of technical specifications per compute capability.
        for (cc, kib) in [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)] {
            for tile in Tile::of_arch(cc) {
                assert!(tile.shared() <= kib * 1024, "{tile:?} on {cc}");
            }
        }
    }

    /// What [`crate::backend::Backend::prepare`] goes by.
    #[test]
    fn numbers_of_rows_of_a_step_choose_alike() {
        for (cc, sms, kib) in [(80, 108, 163), (89, 128, 99), (90, 132, 227)] {
            for n in [64, 576, 4096, 28_672] {
                for m in 1..2000 {
                    let choose = |m: usize| Tile::choose(m, n, true, cc, sms, kib * 1024);
                    assert_eq!(choose(m), choose(m.next_multiple_of(ROW_STEP)), "{m} rows of {n} on {cc}");
                    let choose = |m: usize| Columns::choose(m, n, Cluster::Two, sms);
                    assert_eq!(choose(m), choose(m.next_multiple_of(ROW_STEP)), "{m} rows of {n}");
                }
            }
        }
        // The choice of a larger step is no guide to that of a smaller one.
        let chosen = |m| Tile::choose(m, 4096, true, 80, 108, 163 * 1024);
        assert!(
            row_counts(8192).any(|m| chosen(m) == Tile::Wide) && row_counts(8192).any(|m| chosen(m) == Tile::Small)
        );
    }

    #[test]
    fn large_products_get_large_tiles_and_small_ones_fill_the_device() {
        let choose = |m, n, plain, cc, sms, kib: usize| Tile::choose(m, n, plain, cc, sms, kib * 1024);
        assert_eq!(choose(8192, 6144, true, 80, 108, 163), Tile::Wide);
        assert_eq!(choose(8192, 6144, true, 89, 128, 99), Tile::Square8);
        assert_eq!(choose(8192, 6144, false, 80, 108, 163), Tile::Small);
        assert_eq!(choose(512, 512, true, 80, 108, 163), Tile::Small);
        assert_eq!(choose(8192, 6144, true, 80, 108, 99), Tile::Square);
    }
}
