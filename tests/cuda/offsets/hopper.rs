//! The last tile of large products on Hopper, alone and in clusters, of the same operands as a product of that tile alone.

use ringtune::backend::MatMul;
use ringtune::cuda::kernels::Kernel;
use ringtune::cuda::matmul_sm90::{self, Cluster, Columns};
use ringtune::cuda::project_sm90;

use super::Arg::{self, F32, Null, U32};
use super::{Case, FAR, bf16s, both, f32s, i32s, is_promised, read, whole, written};

/// A tile's columns, and tiles beside each other: a multiple of the raster's groups, so that the last block has the last tile.
const SIDE: usize = 256;
const TILES: usize = 264;

/// Columns, and rows, of a result of more than 2^32 elements.
const WIDE: usize = SIDE * TILES;

const COLUMNS: Columns = Columns::N256;

/// Steps of k: no whole tiles of them.
const K: usize = 72;

/// The last rows of an operand along which k runs.
fn along(seed: u64, rows: usize, box_rows: usize) -> Arg {
    read(bf16s(seed, rows * K), 2 * K, WIDE - rows).boxes([(rows, K), (WIDE, K)], box_rows)
}

/// The last columns of an operand whose rows, `wide` long, are steps of k.
fn across(seed: u64, steps: usize, columns: usize, wide: usize) -> Arg {
    let last = read(bf16s(seed, steps * columns), 2 * columns, 0).within(2 * wide, 2 * (wide - columns));
    last.boxes([(steps, columns), (steps, wide)], 64)
}

/// An operand that is not there.
pub fn absent() -> Arg {
    let nothing = Arg::Rows { rows: 64, row: 128, stride: [128; 2], at: [0; 2], values: None, compared: false };
    nothing.boxes([(64, 64); 2], 64)
}

fn none(count: usize) -> impl Iterator<Item = Arg> {
    (0..count).map(|_| Null)
}

fn absents(count: usize) -> impl Iterator<Item = Arg> {
    (0..count).map(|_| absent())
}

/// A cluster's tiles below each other at the end of a large result.
#[derive(Clone, Copy)]
struct Last {
    cluster: Cluster,
    blocks: usize,
    high: usize,
}

impl Last {
    fn each(of: impl Fn(Last)) {
        if !is_promised() {
            return;
        }
        for cluster in Cluster::ALL {
            let blocks = cluster.count();
            of(Last { cluster, blocks, high: 128 * blocks });
        }
    }

    /// Rows of `columns` elements of so many bytes there.
    fn place(self, arg: Arg, columns: usize, bytes: usize) -> Arg {
        arg.within(bytes * WIDE, bytes * ((WIDE - self.high) * WIDE + WIDE - columns))
    }

    fn rows(self) -> Arg {
        U32([self.high, WIDE])
    }

    /// The launch of the tiles at the end, of `columns` columns each.
    fn holds(self, kernel: Kernel, columns: usize, args: Vec<Arg>) {
        let far_block = WIDE / 128 * (WIDE / columns) - self.blocks;
        Case { kernel, shared: COLUMNS.shared(), far_block, blocks: self.blocks, args }.holds();
    }
}

#[test]
fn products() {
    Last::each(|last| {
        let Last { cluster, blocks, high } = last;
        let product = |op, c: Arg, [a, b]: [Arg; 2], [m, n, k]: [Arg; 3]| {
            let args = vec![c, a, b, m, n, k, F32(0.5), both(0), both(1)];
            (matmul_sm90::kernel(COLUMNS, op, cluster), args)
        };
        let c = || last.place(read(f32s(9, high * SIDE), 4 * SIDE, 0), SIDE, 4).changed();
        let b = || across(2, K, SIDE, WIDE);
        for (op, operands) in [
            (MatMul::NT, [along(1, high, 128), along(2, SIDE, SIDE / blocks)]),
            (MatMul::NN, [along(1, high, 128), b()]),
            (MatMul::TN, [across(1, K, high, WIDE), b()]),
        ] {
            let (kernel, args) = product(op, c(), operands, [last.rows(), U32([SIDE, WIDE]), both(K)]);
            last.holds(kernel, SIDE, args);
        }
        // Operands whose own last elements lie behind 2^32 others.
        let (steps, long) = (272, (1 << 24) - 2048);
        assert!(steps * long > FAR && WIDE * WIDE > FAR);
        let c = written(high, 4 * SIDE, long - high);
        let operands = [across(1, steps, high, long), across(2, steps, SIDE, SIDE)];
        let (kernel, mut args) = product(MatMul::TN, c, operands, [U32([high, long]), both(SIDE), both(steps)]);
        *args.last_mut().unwrap() = both(0);
        let far_block = long / 128 - blocks;
        Case { kernel, shared: COLUMNS.shared(), far_block, blocks, args }.holds();
    });
}

#[test]
fn projections() {
    Last::each(|last| {
        let Last { cluster, blocks, high } = last;
        let tile = (COLUMNS, cluster);
        let y = |columns| last.place(written(high, 2 * columns, 0), columns, 2);
        let n = |columns| U32([columns, WIDE]);
        let end =
            |columns, turned| [last.rows(), n(columns), both(0), both(0), both(K), both(0), both(0), both(turned)];
        let x = || along(1, high, 128);
        let project = |columns, pair, dim, residual: Arg, [table, positions]: [Arg; 2], more: [Arg; 3], weights| {
            let mut args = vec![y(columns)];
            args.extend(more);
            args.push(x());
            args.extend::<Vec<Arg>>(weights);
            args.extend(absents(14 - args.len()));
            args.extend(none(3));
            args.extend([residual, table, positions]);
            args.extend(end(columns, usize::from(dim > 0)));
            last.holds(project_sm90::kernel(tile, pair, dim), columns, args);
        };
        let residual = last.place(read(bf16s(3, high * SIDE), 2 * SIDE, 0), SIDE, 2);
        let weights = || vec![along(2, SIDE, SIDE / blocks)];
        project(SIDE, false, 0, residual, [Null, Null], [Null, Null, Null], weights());
        let turns = [whole(f32s(6, 50 * 64)), read(i32s((0..high).map(|i| i % 50)), 4, WIDE - high)];
        project(SIDE, false, 64, Null, turns, [Null, Null, Null], weights());
        // Gate and up share a tile.
        let half = SIDE / 2;
        let pair = vec![along(2, half, half / blocks), along(3, half, half / blocks)];
        project(half, true, 0, Null, [Null, Null], [y(half), Null, y(half)], pair);
    });
}

#[test]
fn gradients_of_projections() {
    Last::each(|last| {
        let Last { cluster, high, .. } = last;
        let tile = (COLUMNS, cluster);
        let mut args = vec![last.place(written(high, 2 * SIDE, 0), SIDE, 2), along(1, high, 128)];
        args.extend(absents(2));
        args.push(across(2, K, SIDE, WIDE));
        args.extend(absents(8));
        args.extend([last.rows(), U32([SIDE, WIDE]), both(K)]);
        args.extend((0..5).map(|_| both(0)));
        args.extend((0..12).map(|_| both(0)));
        last.holds(project_sm90::dx_kernel(tile, 0), SIDE, args);

        let mut args = vec![last.place(read(f32s(4, high * SIDE), 4 * SIDE, 0), SIDE, 4).changed(), Null, Null];
        args.push(across(1, K, high, WIDE));
        args.extend(absents(2));
        args.extend([across(2, K, SIDE, WIDE), last.rows(), both(0), both(0), U32([SIDE, WIDE]), both(K)]);
        last.holds(project_sm90::dw_kernel(tile), SIDE, args);
    });
}
