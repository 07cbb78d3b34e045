//! Products and projections by `mma.sync`, and in f32.

use ringtune::backend::MatMul;
use ringtune::cuda::tiles::Tile;
use ringtune::cuda::{matmul, project};

use super::Arg::{self, F32, Null, U32, U64};
use super::{B, Case, FAR, bf16s, both, f32s, is_promised, read, written};

/// The last tile of a large product, of the same operands as a product of that tile alone.
#[test]
fn products_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let tile = Tile::Small;
    let side = 64;
    // A result of more than 2^32 elements, and operands whose rows are long.
    let (wide, long, steps) = (65_600, (1 << 24) - side, 272);
    assert!(wide * wide > FAR && steps * long > FAR);
    let dims = |far: usize| U32([side, far]);
    // `n` rows of a tile that stands at (row, column) of a matrix of rows of `width` elements of so many bytes.
    let place = |arg: Arg, width: usize, row: usize, column: usize, bytes: usize| {
        arg.within(width * bytes, (row * width + column) * bytes)
    };
    let values = |seed, rows: usize| read(bf16s(seed, rows * side), 2 * side, 0);
    let tiles = |m: usize, n: usize| m.div_ceil(side) * n.div_ceil(side) - 1;
    let product = |op, k, (m, n): (usize, usize), a: Arg, b: Arg, [sa, sb]: [[usize; 2]; 2]| {
        let c = place(written(side, 4 * side, 0), n, m - side, n - side, 4);
        let args = vec![c, a, b, dims(m), dims(n), both(k), U32(sa), U32(sb), F32(1.0), both(0), both(0)];
        let kernel = matmul::kernel(tile, op, B, B, true);
        Case { kernel, shared: tile.shared(), far_block: tiles(m, n), blocks: 1, args }
    };
    let k = 64;
    let along = |seed, far: usize| read(bf16s(seed, side * k), 2 * k, far - side);
    let across = |seed, steps, far: usize| place(values(seed, steps), far, 0, far - side, 2);
    product(MatMul::NT, k, (wide, wide), along(1, wide), along(2, wide), [[k; 2], [k; 2]]).holds();
    let whole_of = |seed| read(bf16s(seed, steps * side), 2 * side, 0);
    let lengths = [side, long];
    product(MatMul::TN, steps, (long, side), across(1, steps, long), whole_of(2), [lengths, [side; 2]]).holds();
    let rows = read(bf16s(1, side * steps), 2 * steps, 0);
    product(MatMul::NN, steps, (side, long), rows, across(2, steps, long), [[steps; 2], lengths]).holds();

    let of_f32 = |seed| read(f32s(seed, side * k), 4 * k, wide - side);
    let c = || place(written(side, 4 * side, 0), wide, wide - side, wide - side, 4);
    let mut args = vec![c(), of_f32(1), of_f32(2), dims(wide), dims(wide), both(k)];
    args.extend([U64([k; 2]), U64([1; 2]), U64([k; 2]), U64([1; 2]), F32(1.0), both(0), both(0)]);
    Case { kernel: matmul::kernel_f32(), shared: 0, far_block: tiles(wide, wide), blocks: 1, args }.holds();

    let narrow = || place(written(side, 2 * side, 0), wide, wide - side, wide - side, 2);
    let residual = place(values(3, side), wide, wide - side, wide - side, 2);
    let mut args = vec![narrow(), Null, Null, Null, along(1, wide), along(2, wide)];
    args.extend((0..11).map(|_| Null));
    args.extend([residual, Null, Null, dims(wide), dims(wide), both(0), both(0), both(k), both(0)]);
    args.extend([both(side), both(0), both(0)]);
    let kernel = project::kernel(tile, false);
    Case { kernel, shared: tile.shared(), far_block: tiles(wide, wide), blocks: 1, args }.holds();

    let mut args = vec![narrow(), along(1, wide), Null, Null, across(2, k, wide), Null, Null];
    args.extend((0..6).map(|_| Null));
    args.extend([dims(wide), dims(wide), both(k), both(0), both(0)]);
    args.extend((0..14).map(|_| both(0)));
    let kernel = project::dx_kernel(tile);
    Case { kernel, shared: tile.shared(), far_block: tiles(wide, wide), blocks: 1, args }.holds();

    let before = place(read(f32s(4, side * side), 4 * side, 0), wide, wide - side, wide - side, 4).changed();
    let mut args = vec![before, Null, Null, across(1, k, wide), Null, Null, across(2, k, wide)];
    args.extend([dims(wide), both(0), both(0), dims(wide), both(k)]);
    let kernel = project::dw_kernel(tile);
    Case { kernel, shared: tile.shared(), far_block: tiles(wide, wide), blocks: 1, args }.holds();
}
