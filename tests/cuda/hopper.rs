//! Products on Hopper, held to what every device's are: on a GPU of compute capability 9.0, or on the emulator in a process of its own,
//! where the device poses as one.

use std::process::Command;

use ringtune::backend::{Backend, Write};
use ringtune::cuda::matmul_sm90::{CC, Cluster, Columns};
use ringtune::cuda::tiles::Tile;
use ringtune::cuda::{Cuda, Properties};
use ringtune::tensor::{DType, Device};

use crate::close::{assert_same, normal, tensor, values};
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
fn in_a_child(args: &[&str]) {
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
