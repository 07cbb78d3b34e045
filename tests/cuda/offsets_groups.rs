//! As `offsets.rs`: strips of low-rank updates, and the last tile of large products on Hopper, alone and in clusters.

use ringtune::backend::MatMul;
use ringtune::cuda::matmul_sm90::{self, Cluster, Columns};
use ringtune::cuda::project_sm90;

use crate::offsets::Arg::{self, F32, Null, U32};
use crate::offsets::{Case, FAR, bf16s, both, configuration, f32s, i32s, is_promised, read, whole, written};

/// A strip of rows whose sums wait for those of others.
#[test]
fn strips_of_updates_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let (n, rank, strip) = (4096, 16, 512);
    let far = FAR / n;
    let strips = far / strip + 2;
    let m = || U32([strip + 1, far + strip + 1]);
    let rows = |seed, width| read(bf16s(seed, strip * width), 2 * width, far);
    let none = |count| (0..count).map(|_| Null);

    let (kernel, shared) = configuration("lora_u_db", &["RANK=16"]);
    let chunks = n / 512;
    let mut args: Vec<Arg> = none(3).collect();
    args.extend([whole(f32s(9, n * rank)), Null, Null]);
    // Sums of u of the first chunk, then those of dB of its columns.
    args.extend([written(strip, 4 * rank, far), written(512, 4 * rank, far / strip * n)]);
    args.push(whole(i32s(vec![0; 3 * strips + chunks])));
    for operand in [rows(1, n), whole(bf16s(3, n * rank)), rows(2, rank)] {
        args.extend([operand, Null, Null]);
    }
    args.extend([m(), both(n), both(0), both(0), both(rank), F32(0.5)]);
    Case { kernel, shared, far_block: far / strip * chunks, blocks: 1, args }.holds();

    let (kernel, shared) = configuration("lora_da", &["RANK=16"]);
    let mut args = vec![whole(f32s(9, n * rank)), Null, Null, written(rank, 4 * n, far / strip * rank)];
    args.extend([whole(i32s(vec![0; n / 128])), rows(1, n), rows(2, rank), Null, Null]);
    args.extend([m(), both(n), both(rank), both(1), both(0)]);
    args.extend((0..12).map(|_| both(0)));
    Case { kernel, shared, far_block: far / strip * (n / 128), blocks: 1, args }.holds();
}

/// The last tiles of a result of more than 2^32 elements, one or two below each other.
#[test]
fn hopper_products_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    // As wide as so many tiles: a multiple of the raster's groups, so that the last block has the last tile.
    let (side, tiles, k) = (256, 264, 72);
    let wide = side * tiles;
    assert!(wide * wide > FAR);
    // The last rows of an operand along which k runs.
    let along = |seed, rows: usize, box_rows| Arg::Map {
        rows: [rows, wide],
        cols: k,
        at: [0, wide - rows],
        box_rows,
        values: bf16s(seed, rows * k),
    };
    let columns = Columns::N256;
    for cluster in Cluster::ALL {
        let blocks = cluster.count();
        let high = 128 * blocks;
        let place = |arg: Arg, bytes: usize| arg.within(bytes * wide, bytes * ((wide - high) * wide + wide - side));
        let c = place(written(high, 4 * side, 0), 4);
        let (a, b) = (along(1, high, 128), along(2, side, columns.count() / blocks));
        let (m, n) = (|| U32([high, wide]), || U32([side, wide]));
        let far_block = wide / 128 * tiles - blocks;
        let args = vec![c, a, b, m(), n(), both(k), F32(1.0), both(0), both(0)];
        let kernel = matmul_sm90::kernel(columns, MatMul::NT, cluster);
        Case { kernel, shared: columns.shared(), far_block, blocks, args }.holds();
        if cluster == Cluster::One {
            continue;
        }
        let residual = place(read(bf16s(3, high * side), 2 * side, 0), 2);
        let absent = || Arg::Map { rows: [64; 2], cols: 64, at: [0; 2], box_rows: 64, values: Vec::new() };
        let mut args = vec![place(written(high, 2 * side, 0), 2), Null, Null, Null];
        args.extend([along(1, high, 128), along(2, side, 128)]);
        args.extend((0..8).map(|_| absent()));
        args.extend([Null, Null, Null, residual, Null, Null]);
        args.extend([m(), n(), both(0), both(0), both(k), both(0), both(0), both(0)]);
        let kernel = project_sm90::kernel((columns, cluster), false, 0);
        Case { kernel, shared: columns.shared(), far_block, blocks, args }.holds();
    }
}
