//! Products of bf16 operands on Hopper: the kernel of `kernels/matmul_sm90.cu`, which tile it takes, and its launch.
//!
//! One family for every number of rows: a row's bits do not depend on how many there are, whatever an architecture's older products give.

use super::compile::{Defines, Source, Value, source};
use super::device::Cuda;
use super::kernels::Param::{F32, Map, Out, U32};
use super::kernels::{Configuration, Kernel};
use super::launch::Launch;
use super::operands::{Operand, Product};
use super::tensor_map::TensorMap;
use super::tiles::k_major;
use crate::backend::{MatMul, Write};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// The source.
pub const SOURCE: Source = source!("kernels/matmul_sm90.cu");

/// The compute capability that it is for.
pub const CC: u32 = 90;

/// Rows of a tile of C.
pub(super) const BLOCK_M: usize = 128;

/// Blocks that share the columns of B: they work on tiles below each other, and each copies a part of B to all. The bits are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Each block by itself: where there is one row of tiles.
    One,
    /// Two.
    Two,
}

impl Cluster {
    /// Both.
    pub const ALL: [Cluster; 2] = [Cluster::One, Cluster::Two];

    /// As a number.
    pub fn count(self) -> usize {
        match self {
            Cluster::One => 1,
            Cluster::Two => 2,
        }
    }

    /// Blocks that have a tile each, of `tiles` rows of tiles in each of `across` columns of them; the last row may be one too many.
    pub(super) fn tiles(self, rows: usize, across: usize) -> usize {
        rows.next_multiple_of(self.count()) * across
    }

    /// Blocks of a launch with so many tiles: as many as run at once, which go on to further ones.
    pub(super) fn blocks(self, tiles: usize, sm_count: usize) -> usize {
        tiles.min((sm_count / self.count()).max(1) * self.count())
    }
}

/// Columns of a tile of C. The same bits come of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Columns {
    /// 256: the least traffic of shared memory for a product.
    N256,
    /// 128.
    N128,
    /// 64: for few tiles.
    N64,
}

impl Columns {
    /// All of them.
    pub const ALL: [Columns; 3] = [Columns::N256, Columns::N128, Columns::N64];

    /// As a number.
    pub fn count(self) -> usize {
        match self {
            Columns::N256 => 256,
            Columns::N128 => 128,
            Columns::N64 => 64,
        }
    }

    /// Buffers that tiles of 64 steps of k pass through: 192 KiB of them.
    pub fn stages(self) -> usize {
        match self {
            Columns::N256 => 4,
            Columns::N128 => 6,
            Columns::N64 => 8,
        }
    }

    /// Dynamic shared memory in bytes: the buffers with two barriers each, the results that eight warps stage, and room to align them.
    pub fn shared(self) -> usize {
        self.stages() * ((BLOCK_M + self.count()) * 64 * 2 + 16) + 8 * 16 * 64 * 4 + 1024
    }

    /// Rows of a box of B that one of a cluster copies, of a matrix with a row for each step of k or with k along its rows.
    pub(super) fn box_rows(self, k_major: bool, cluster: Cluster) -> usize {
        match k_major {
            true => self.count() / cluster.count(),
            // Whole panels of 64 columns are shared out, of a single one its steps.
            false if self == Columns::N64 => 64 / cluster.count(),
            false => 64,
        }
    }

    /// The width whose tiles, as many as `tiles` says of each that can be used, take the busiest multiprocessor the shortest time, and
    /// their number: columns that it computes, weighed by the traffic of shared memory that a `wgmma` of this width needs (63, 75 and
    /// 100 % of what there is, derived), not measured.
    pub(super) fn cheapest(sm_count: usize, tiles: impl Fn(Self) -> Option<usize>) -> Option<(Self, usize)> {
        let cost = |(c, tiles): (Self, usize)| {
            let efficiency = match c {
                Columns::N256 => 1.0,
                Columns::N128 => 0.9,
                Columns::N64 => 0.65,
            };
            (tiles.div_ceil(sm_count.max(1)) * c.count()) as f64 / efficiency
        };
        let all = Self::ALL.into_iter().filter_map(|c| Some((c, tiles(c)?)));
        all.min_by(|a, b| cost(*a).total_cmp(&cost(*b)))
    }

    /// The one for a product with the result (m, n).
    pub fn choose(m: usize, n: usize, cluster: Cluster, sm_count: usize) -> Self {
        let tiles = |c: Self| Some(cluster.tiles(m.div_ceil(BLOCK_M), n.div_ceil(c.count())));
        Self::cheapest(sm_count, tiles).map_or(Columns::N64, |(c, _)| c)
    }
}

/// The product with tiles of this width.
pub fn kernel(columns: Columns, op: MatMul, cluster: Cluster) -> Kernel {
    let flag = |on: bool| Value::Number(usize::from(on));
    let (a_k_major, b_k_major) = k_major(op);
    Kernel {
        source: SOURCE,
        entry: "matmul_sm90",
        defines: Defines::new(&[
            ("A_K_MAJOR", flag(a_k_major)),
            ("B_K_MAJOR", flag(b_k_major)),
            ("BLOCK_N", Value::Number(columns.count())),
            ("STAGES", Value::Number(columns.stages())),
            ("CLUSTER", Value::Number(cluster.count())),
        ]),
        params: &[Out, Map, Map, U32, U32, U32, F32, U32, U32],
        threads: 384,
    }
}

/// Every configuration that an architecture (major · 10 + minor) may be asked to run.
pub fn all(cc: u32) -> Vec<Configuration> {
    if cc != CC {
        return Vec::new();
    }
    // Rows of C are tokens, which share the weights; those of a weight's gradient may be less than two tiles.
    let uses = [
        (MatMul::NT, Cluster::Two),
        (MatMul::NN, Cluster::Two),
        (MatMul::TN, Cluster::One),
        (MatMul::TN, Cluster::Two),
    ];
    let of = |(op, cluster)| Columns::ALL.map(|columns| (kernel(columns, op, cluster), columns.shared()));
    uses.into_iter().flat_map(of).collect()
}

/// The map of an operand in boxes of so many rows: of the result's, along which k runs, or steps of k.
fn map(of: &Operand<'_>, extent: usize, k: usize, k_major: bool, box_rows: usize) -> Result<TensorMap> {
    let address = of.t.buf.address() + (of.at * of.t.dtype().bytes()) as u64;
    let shape = if k_major { (extent, k) } else { (k, extent) };
    TensorMap::new(address, shape, of.stride, box_rows)
}

impl Cuda {
    /// Blocks that work together on a result of so many tiles below each other, or of tokens, whose number decides nothing.
    pub(super) fn cluster(&self, weight_tiles: Option<usize>) -> Cluster {
        match weight_tiles {
            _ if !self.clusters => Cluster::One,
            Some(tiles) if tiles < 2 => Cluster::One,
            _ => Cluster::Two,
        }
    }

    /// [`crate::backend::Backend::matmul`] on a Hopper device with tiles of a given width and clusters of a given size, for tests and
    /// benches.
    ///
    /// # Errors
    /// If the device refuses the launch.
    ///
    /// # Panics
    /// If an operand is not bf16 or its rows do not start at multiples of 16 bytes.
    pub fn matmul_sm90(
        &self,
        (columns, cluster): (Columns, Cluster),
        c: &mut Tensor<Self>,
        operands: [&Tensor<Self>; 2],
        op: MatMul,
        alpha: f32,
        write: Write,
    ) -> Result<()> {
        let of = Product::whole(c, operands, op, alpha, write);
        assert!(
            operands.iter().all(|t| t.dtype() == DType::Bf16 && t.cols().is_multiple_of(8)),
            "matmul_sm90: aligned bf16 alone"
        );
        product(self, columns, cluster, c, of)
    }
}

/// A product of aligned bf16 operands, of at least one row, column and step.
pub(super) fn product(
    dev: &Cuda,
    columns: Columns,
    cluster: Cluster,
    c: &mut Tensor<Cuda>,
    of: Product<'_>,
) -> Result<()> {
    let Product { a, b, shape: (m, n, k), op, alpha, write } = of;
    let (a_k_major, b_k_major) = k_major(op);
    let a_rows = if a_k_major { BLOCK_M } else { 64 };
    let maps = [map(&a, m, k, a_k_major, a_rows)?, map(&b, n, k, b_k_major, columns.box_rows(b_k_major, cluster))?];
    let kernel = kernel(columns, op, cluster);
    let tiles = cluster.tiles(m.div_ceil(BLOCK_M), n.div_ceil(columns.count()));
    let blocks = cluster.blocks(tiles, dev.properties().sm_count);
    let c_is_bf16 = c.dtype() == DType::Bf16;
    let launch = Launch::new(dev, &kernel, blocks, columns.shared()).write(c).maps(&maps);
    launch.u32(m).u32(n).u32(k).f32(alpha).flag(c_is_bf16).flag(write == Write::Add).run()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_products_get_wide_tiles_and_all_fit_a_block() {
        for cluster in Cluster::ALL {
            assert_eq!(Columns::choose(8192, 28672, cluster, 132), Columns::N256);
            assert_eq!(Columns::choose(8192, 4096, cluster, 132), Columns::N256);
            assert_eq!(Columns::choose(512, 576, cluster, 132), Columns::N64);
        }
        for columns in Columns::ALL {
            assert!(columns.shared() <= 227 * 1024, "{columns:?}");
        }
    }

    #[test]
    fn a_grid_is_whole_clusters() {
        for cluster in Cluster::ALL {
            for (rows, across, sms) in [(1, 1, 1), (1, 7, 4), (3, 5, 7), (9, 40, 131), (2, 1, 132)] {
                let tiles = cluster.tiles(rows, across);
                let blocks = cluster.blocks(tiles, sms);
                assert!(blocks > 0 && blocks.is_multiple_of(cluster.count()) && tiles >= rows * across, "{cluster:?}");
            }
        }
        assert_eq!((Cluster::Two.tiles(3, 5), Cluster::Two.blocks(20, 7), Cluster::One.blocks(15, 7)), (20, 6, 7));
    }
}
