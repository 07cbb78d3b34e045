//! Products on Hopper, held to what every device's are: on a GPU of compute capability 9.0, or on the emulator in a process of its own,
//! where the device poses as one.

use std::process::Command;

use ringtune::backend::{Backend, MatMul, Write};
use ringtune::cuda::kernels::Kernel;
use ringtune::cuda::matmul_sm90::{self, CC, Cluster, Columns};
use ringtune::cuda::tiles::Tile;
use ringtune::cuda::{Cuda, Properties, project_sm90};
use ringtune::tensor::{DType, Device};

use crate::close::{assert_same, normal, tensor, values};
use crate::offsets::Arg::{self, F32, Null};
use crate::offsets::hopper::absent;
use crate::offsets::{Case, bf16s, both, f32s, read, written};
use crate::products::{self, OPS, Shape};
use crate::skip::{device, skipped, sums};

/// Device 0 where it is of Hopper's architecture. Where the emulator poses as another, the test has run in a child, and there is none
/// here.
fn hopper() -> Option<Cuda> {
    let dev = device()?;
    let Properties { cc, emulated, .. } = *dev.properties();
    if cc == CC {
        return Some(dev);
    }
    if !emulated {
        skipped(&format!("the device is sm_{cc}, expected sm_{CC}"));
        return None;
    }
    in_a_child(&["--exact", std::thread::current().name().unwrap(), "--nocapture"]);
    None
}

/// Runs tests of this program, by a part of their names, in a child where the emulated device is Hopper.
pub fn in_a_child(args: &[&str]) {
    let mut child = Command::new(std::env::current_exe().unwrap());
    let status = child.args(args).env("VGPU_CC", "9.0").status().unwrap();
    assert!(status.success(), "{args:?} with VGPU_CC=9.0: {status}");
}

/// The tests of projections, fused ones with updates and masks among them, with Hopper's kernels.
#[test]
fn projections_follow_their_formulas() {
    let Some(dev) = device() else { return };
    // Elsewhere those tests run on this device anyway.
    if dev.properties().emulated && dev.properties().cc != CC {
        in_a_child(&["project::"]);
    }
}

/// Aligned shapes: less than a tile, its borders and just beyond them, several tiles for a block, steps of k that are no whole tile, more
/// of them than buffers.
const ALIGNED: [(usize, usize, usize); 6] =
    [(8, 8, 8), (136, 264, 72), (128, 256, 64), (120, 40, 712), (264, 520, 136), (8, 1032, 328)];

/// Every width, by blocks alone and in clusters.
const TILES: [(Columns, Cluster); 6] = [
    (Columns::N256, Cluster::One),
    (Columns::N256, Cluster::Two),
    (Columns::N128, Cluster::One),
    (Columns::N128, Cluster::Two),
    (Columns::N64, Cluster::One),
    (Columns::N64, Cluster::Two),
];

#[test]
fn every_tile_is_as_close_as_plain_arithmetic() {
    let Some(dev) = hopper() else { return };
    for columns in Columns::ALL {
        let tile = (columns, Cluster::Two);
        let types = [(DType::Bf16, DType::Bf16)];
        let name = format!("{tile:?}");
        products::as_close_as_plain_arithmetic(
            &dev,
            &name,
            &ALIGNED,
            &types,
            sums(&dev),
            |c, a, b, op, alpha, write| {
                dev.matmul_sm90(tile, c, [a, b], op, alpha, write).unwrap();
            },
        );
    }
}

/// A chain of sums for each element, as in the products of every architecture: with whole tiles of k also in their order, so that on the
/// emulator, where both instructions round alike, the bits are theirs.
#[test]
fn every_tile_gives_the_same_bits() {
    let Some(dev) = hopper() else { return };
    let shapes = [(200, 328, 320), (264, 520, 136), (8, 1032, 72)];
    for (s, op) in shapes.into_iter().flat_map(|(m, n, k)| OPS.map(|op| (Shape { m, n, k }, op))) {
        let (a, b) = (normal(1, s.m * s.k), normal(2, s.k * s.n));
        let [(ar, ac), (br, bc)] = s.operands(op);
        let (at, bt) = (tensor(&dev, ar, ac, DType::Bf16, &a), tensor(&dev, br, bc, DType::Bf16, &b));
        let mut c = dev.alloc(s.m, s.n, DType::F32).unwrap();
        let mut run = |tile: (Columns, Cluster)| {
            dev.matmul_sm90(tile, &mut c, [&at, &bt], op, 1.0, Write::Set).unwrap();
            values(&dev, &c)
        };
        let wide = run(TILES[0]);
        for tile in &TILES[1..] {
            assert_same(&format!("{tile:?} {op:?} {s:?}"), &run(*tile), &wide);
        }
        if dev.properties().emulated && s.k.is_multiple_of(64) {
            dev.matmul_with(Some(Tile::Small), &mut c, [&at, &bt], op, 1.0, Write::Set).unwrap();
            assert_same(&format!("{op:?} of every architecture"), &wide, &values(&dev, &c));
        }
    }
}

/// A product of one row is that row of a large one, whatever tile each takes.
#[test]
fn a_row_depends_neither_on_its_place_nor_on_the_number_of_rows() {
    let Some(dev) = hopper() else { return };
    for (n, k) in [(24, 200), (264, 72)] {
        products::a_row_depends_neither_on_its_place_nor_on_the_number_of_rows(&dev, "sm90", n, k);
    }
}

/// What lies behind a matrix in memory is read neither as rows, columns nor steps of k.
#[test]
fn what_lies_beyond_the_operands_is_not_read() {
    let Some(dev) = hopper() else { return };
    let (m, n, k) = (72, 40, 88);
    for op in OPS {
        let [(ar, ac), (br, bc)] = Shape { m, n, k }.operands(op);
        // Larger tensors whose rest is NaN, shrunk to the operands.
        let operand = |rows: usize, cols: usize, seed: u64| {
            let mut values = normal(seed, rows * cols);
            values.extend(vec![f32::NAN; 64 * cols]);
            let mut t = tensor(&dev, rows + 64, cols, DType::Bf16, &values);
            t.set_rows(rows);
            t
        };
        let (at, bt) = (operand(ar, ac, 1), operand(br, bc, 2));
        let mut c = dev.alloc(m, n, DType::F32).unwrap();
        dev.matmul(&mut c, &at, &bt, op, 1.0, Write::Set).unwrap();
        assert!(values(&dev, &c).iter().all(|x| x.is_finite()), "{op:?}");
    }
}

/// Three rows of tiles and more columns of them than buffers have turns; the steps of k are no whole tiles.
const FURTHER: Shape = Shape { m: 296, n: 264, k: 200 };

/// Updates of more steps than a buffer holds.
const RANK: usize = 72;

/// Launches over the same tiles: with a block for each, and with a single cluster that goes through all of them.
fn one_cluster_for_all((columns, cluster): (Columns, Cluster), kernel: Kernel, args: &dyn Fn() -> Vec<Arg>) {
    let tiles = FURTHER.m.div_ceil(128).next_multiple_of(cluster.count()) * FURTHER.n.div_ceil(columns.count());
    let left = |blocks| Case { kernel, shared: columns.shared(), far_block: 0, blocks, args: args() }.run(false);
    let (Some(each), Some(all)) = (left(tiles), left(cluster.count())) else { return };
    assert!(each == all, "{} of {columns:?} and {cluster:?} differs where a block goes on", kernel.entry);
}

/// A block that is done goes on to a further tile, its buffers to their next turn. The emulated device has more multiprocessors than any
/// test has tiles, and a GPU fewer than a product of a model: launched as it would be there. Needs NVRTC, no device.
#[test]
fn a_block_goes_on_to_further_tiles() {
    let Shape { m, n, k } = FURTHER;
    let matrix = |seed, rows: usize, cols: usize, of: usize| {
        read(bf16s(seed, rows * cols), 2 * cols, 0).boxes([(rows, cols); 2], of)
    };
    let sums = |rows: usize| read(f32s(9, rows * n), 4 * n, 0).changed();
    let (absents, zeros) = (|count| (0..count).map(|_| absent()), |count| (0..count).map(|_| both(0)));
    for tile @ (columns, cluster) in TILES {
        // Rows of a box of B, along which k runs and else.
        let along = columns.count() / cluster.count();
        let across = if columns == Columns::N64 { along } else { 64 };
        let x = |seed| matrix(seed, m, k, 128);
        for (op, [a, b]) in [
            (MatMul::NT, [(m, k, 128), (n, k, along)]),
            (MatMul::NN, [(m, k, 128), (k, n, across)]),
            (MatMul::TN, [(k, m, 64), (k, n, across)]),
        ] {
            one_cluster_for_all(tile, matmul_sm90::kernel(columns, op, cluster), &|| {
                let operands = [matrix(1, a.0, a.1, a.2), matrix(2, b.0, b.1, b.2)];
                let end = [both(m), both(n), both(k), F32(0.5), both(0), both(1)];
                std::iter::once(sums(m)).chain(operands).chain(end).collect()
            });
        }
        one_cluster_for_all(tile, project_sm90::kernel(tile, false, 0), &|| {
            let mut args = vec![written(m, 2 * n, 0), Null, Null, Null, x(1), matrix(2, n, k, along)];
            args.extend(absents(2));
            args.push(matrix(3, m, RANK, 128));
            args.extend(absents(2));
            args.push(matrix(4, n, RANK, along));
            args.extend(absents(2));
            args.extend((0..6).map(|_| Null));
            args.extend([both(m), both(n), both(0), both(0), both(k), both(RANK), both(1), both(0)]);
            args
        });
        // A masked update where there can be one.
        let masks = usize::from(columns != Columns::N256);
        one_cluster_for_all(tile, project_sm90::dx_kernel(tile, masks), &|| {
            let mut args = vec![written(m, 2 * n, 0), x(1)];
            args.extend(absents(2));
            args.push(matrix(2, k, n, across));
            args.extend(absents(2));
            args.push(matrix(3, m, RANK, 128));
            args.extend(absents(2));
            args.push(matrix(4, RANK, n, across));
            args.extend(absents(2));
            args.extend([both(m), both(n), both(k), both(0), both(0), both(RANK), both(1), both(masks << 14)]);
            args.extend(zeros(12));
            args
        });
        // Two weights, whose tiles lie below each other: of two rows of tiles and of one.
        one_cluster_for_all(tile, project_sm90::dw_kernel(tile), &|| {
            let mut args = vec![sums(200), sums(104), Null, matrix(1, k, 200, 64), matrix(2, k, 104, 64), absent()];
            args.extend([matrix(3, k, n, across), both(200), both(104), both(0), both(n), both(k)]);
            args
        });
    }
}
