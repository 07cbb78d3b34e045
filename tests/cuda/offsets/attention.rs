//! Attention, on tensor cores and plain.

use super::Arg::{self, F32, U32};
use super::{Case, FAR, alike, bf16s, both, configuration, f32s, i32s, is_promised, read, whole, written};

use crate::close::normal;

#[test]
fn attention_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let (heads, dim, n) = (4usize, 64, 70);
    let (cols, scale) = (heads * dim, 0.125);
    let far = FAR / cols + 8;
    let x = |seed| read(bf16s(seed, n * cols), 2 * cols, far);
    let to = || written(n, 2 * cols, far);
    let of_heads = |seed| read(f32s(seed, n * heads), 4 * heads, far);
    // A figure of all tokens, then another one.
    let stats = |values| {
        let (row, all) = (4 * n * heads, 4 * (far + n) * heads);
        Arg::Rows {
            rows: 2,
            row,
            stride: [row, all],
            at: [0, 4 * far * heads],
            compared: Option::is_none(&values),
            values,
        }
    };
    // The log of a sum of exponentials, so that weights are of order one.
    let lse = || read(vec![2.0f32; n * heads].into_iter().flat_map(f32::to_le_bytes).collect(), 4 * heads, far);
    let table = || whole(f32s(8, 80 * dim));
    let positions = || read(i32s(0..n), 4, far);
    let end = || [both(heads), both(heads), both(0), F32(scale)];
    let words = [format!("HEAD_DIM={dim}")];
    let of_width = |entry: &str| configuration(entry, &[words[0].as_str()]);

    // Lists of tiles name rows.
    let tiles = |rows: usize, first: usize| i32s((0..n).step_by(rows).flat_map(|i| [first, first + n, first + i]));
    let listed = |entry: &str, rows: usize, before: &dyn Fn() -> Vec<Arg>, after: &dyn Fn() -> Vec<Arg>| {
        let (kernel, shared) = of_width(entry);
        let case = |first: usize| {
            let mut args = before();
            args.push(whole(tiles(rows, first)));
            args.extend(after());
            Case { kernel, shared, far_block: 0, blocks: n.div_ceil(rows) * heads, args }
        };
        alike(|side| case(side * far));
    };
    let plain = || end().into_iter().collect::<Vec<_>>();
    let tokens = || U32([n, far + n]);
    let turned = || [table(), positions(), tokens()].into_iter().chain(end()).collect::<Vec<_>>();
    listed("attention_tiles_forward", 128, &|| vec![to(), written(n, 4 * heads, far), x(1), x(2), x(3)], &plain);
    let figures = || [vec![3.0f32; n * heads], normal(5, n * heads)].concat();
    let figures = || stats(Some(figures().into_iter().flat_map(f32::to_le_bytes).collect()));
    let backward = || vec![x(4), x(1), x(2), x(3), figures()];
    listed("attention_tiles_dq", 64, &|| [vec![to()], backward()].into_iter().flatten().collect(), &turned);
    listed("attention_tiles_dkdv", 64, &|| [vec![to(), to()], backward()].into_iter().flatten().collect(), &turned);
    let (kernel, shared) = of_width("attention_tiles_delta");
    let tasks = || U32([n * heads, (far + n) * heads]);
    let args = vec![stats(None), x(4), x(1), lse(), tasks()];
    Case { kernel, shared, far_block: far * heads / 32, blocks: (n * heads).div_ceil(32), args }.holds();

    // The plain kernels find the document's beginning beside each token.
    let of_block = |entry: &str, floats: usize, args: &dyn Fn(usize) -> Vec<Arg>| {
        let (kernel, _) = configuration(entry, &["X_T=bf16", "DIMS=2"]);
        let case = |first| Case { kernel, shared: 4 * floats, far_block: far, blocks: n, args: args(first) };
        alike(|side| case(side * far));
    };
    let starts = |first: usize| read(i32s(vec![first; n]), 4, far);
    let shape = || [both(heads), both(heads), both(dim), both(0), F32(scale)];
    of_block("attention_forward", 4 * dim, &|first| {
        let args = [to(), written(n, 4 * heads, far), x(1), x(2), x(3), starts(first), tasks()];
        args.into_iter().chain(shape()).collect()
    });
    of_block("attention_dq", 8 * dim, &|first| {
        let args = [to(), written(n, 4 * heads, far), x(4), x(5), x(1), x(2), x(3), lse(), starts(first)];
        args.into_iter().chain([table(), positions(), tasks()]).chain(shape()).collect()
    });
    of_block("attention_dkdv", 8 * dim, &|first| {
        let args = [to(), to(), x(4), x(1), x(2), x(3), lse(), of_heads(5), starts(first)];
        args.into_iter().chain([table(), positions(), tasks(), tokens()]).chain(shape()).collect()
    });
}

/// A sequence whose cache begins far behind those of others: plain, and on tensor cores, where its keys are in three parts.
#[test]
fn caches_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let (heads, dim, scale, sequence) = (4usize, 64, 0.125, 3);
    let cols = heads * dim;
    let capacity = (FAR / cols + 8).div_ceil(sequence);
    let cache = |seed, len: usize| read(bf16s(seed, len * cols), 2 * cols, sequence * capacity);
    let out = || written(1, 2 * cols, sequence);
    let q = || read(bf16s(1, cols), 2 * cols, sequence);
    let lens = |len| read(i32s([len]), 4, sequence);

    let (kernel, shared) = configuration("attention_decode", &["X_T=bf16", "DIMS=2"]);
    let len = 40;
    let mut args = vec![out(), q(), cache(2, len), cache(3, len), lens(len)];
    args.extend([both(heads), both(heads), both(dim), both(0), U32([64, capacity]), F32(scale)]);
    Case { kernel, shared, far_block: sequence * heads, blocks: heads, args }.holds();

    let (kernel, shared) = configuration("attention_tiles_decode", &["HEAD_DIM=64"]);
    let (len, keys, near) = (300, 128, 384);
    let parts = capacity.div_ceil(keys);
    let first = sequence * heads * parts;
    // Of the first head: largest score, sum and values of each part.
    let sums = written(3, 4 * (dim + 2), first);
    let counter = read(i32s([0]), 4, sequence * heads).changed();
    let mut args = vec![out(), sums, counter, q(), cache(2, len), cache(3, len), lens(len)];
    args.extend([both(heads), both(heads), both(0), U32([near, capacity]), F32(scale)]);
    Case { kernel, shared, far_block: first, blocks: 3, args }.holds();
}
