//! Products on the device, held to what the CPU's are, in every tile.

use ringtune::backend::{Backend, MatMul, Write};
use ringtune::cuda::tiles::Tile;
use ringtune::tensor::{DType, Device};

use crate::close::{assert_same, normal, tensor, values};
use crate::products::{self, OPS, SHAPES, Shape, TYPES};
use crate::skip::{device, sums};

#[test]
fn as_close_as_plain_arithmetic() {
    let Some(dev) = device() else { return };
    products::as_close_as_plain_arithmetic(&dev, "cuda", &SHAPES, &TYPES, sums(&dev), |c, a, b, op, alpha, write| {
        dev.matmul(c, a, b, op, alpha, write).unwrap();
    });
}

/// Aligned shapes whose borders fall inside, on and just beyond tiles; steps of k that are and are not whole tiles.
const ALIGNED: [(usize, usize, usize); 4] = [(8, 8, 8), (136, 264, 72), (128, 256, 64), (120, 40, 200)];

#[test]
fn every_tile_is_as_close_as_plain_arithmetic() {
    let Some(dev) = device() else { return };
    for tile in Tile::ALL {
        if tile.shared() > dev.properties().shared_limit {
            continue;
        }
        let types = [(DType::Bf16, DType::Bf16)];
        products::as_close_as_plain_arithmetic(
            &dev,
            &format!("{tile:?}"),
            &ALIGNED,
            &types,
            sums(&dev),
            |c, a, b, op, alpha, write| {
                dev.matmul_with(Some(tile), c, [a, b], op, alpha, write).unwrap();
            },
        );
    }
}

/// The tile is chosen by the shape, so a row would change with the rows beside it if the tile changed its bits.
#[test]
fn every_tile_gives_the_same_bits() {
    let Some(dev) = device() else { return };
    let s = Shape { m: 72, n: 88, k: 328 };
    let (a, b) = (normal(1, s.m * s.k), normal(2, s.k * s.n));
    for op in OPS {
        let [(ar, ac), (br, bc)] = s.operands(op);
        let (at, bt) = (tensor(&dev, ar, ac, DType::Bf16, &a), tensor(&dev, br, bc, DType::Bf16, &b));
        let run = |tile: Tile| {
            let mut c = dev.alloc(s.m, s.n, DType::F32).unwrap();
            dev.matmul_with(Some(tile), &mut c, [&at, &bt], op, 1.0, Write::Set).unwrap();
            values(&dev, &c)
        };
        let fits = |t: &Tile| t.shared() <= dev.properties().shared_limit;
        let small = run(Tile::Small);
        for tile in Tile::ALL.into_iter().filter(fits) {
            assert_same(&format!("{tile:?} {op:?}"), &run(tile), &small);
        }
    }
}

#[test]
fn a_row_depends_neither_on_its_place_nor_on_the_number_of_rows() {
    let Some(dev) = device() else { return };
    for (n, k) in [(24, 200), (33, 77)] {
        products::a_row_depends_neither_on_its_place_nor_on_the_number_of_rows(&dev, "cuda", n, k);
    }
}

#[test]
fn what_is_not_finite_stays_visible_and_an_empty_sum_is_zero() {
    let Some(dev) = device() else { return };
    products::what_is_not_finite_stays_visible_and_an_empty_sum_is_zero(&dev, "cuda");
}

/// Several groups of 8 rows of tiles, the last one short: every tile of C is computed once.
#[test]
fn many_tiles_cover_the_result() {
    let Some(dev) = device() else { return };
    // Small integers: every sum is exact.
    let (m, n, k) = (64 * 19 + 5, 64 * 3 + 1, 16);
    let value = |i: usize| ((i * 7 + i / 13) % 5) as f32 - 2.0;
    let (a, b): (Vec<f32>, Vec<f32>) = ((0..m * k).map(value).collect(), (0..n * k).map(value).collect());
    let (at, bt) = (tensor(&dev, m, k, DType::Bf16, &a), tensor(&dev, n, k, DType::Bf16, &b));
    let mut c = tensor(&dev, m, n, DType::F32, &vec![3.0; m * n]);
    dev.matmul(&mut c, &at, &bt, MatMul::NT, 1.0, Write::Add).unwrap();
    for (at, ours) in values(&dev, &c).into_iter().enumerate() {
        let (i, j) = (at / n, at % n);
        let expected: f32 = (0..k).map(|l| a[i * k + l] * b[j * k + l]).sum();
        assert_eq!(ours, 3.0 + expected, "({i}, {j})");
    }
}
