//! Kernels that go through tables of addresses, and sums over ranks, blocks and rows.

use ringtune::cuda::{adamw, elementwise, fold};

use super::Arg::{self, F32, Null, U32, U64};
use super::Word::{self, Address, Number};
use super::figures::of_stats;
use super::{B, Case, FAR, bf16s, both, f32s, f64s, i32s, is_promised, read, whole, written};

/// A block that stands far behind the beginning of a table: words of it lie behind 2^31 of them.
const BLOCK: usize = 1 << 30;

/// One row that is read or written far behind the beginning of the tensor.
fn row(values: Vec<u8>, bytes: usize) -> Arg {
    let len = values.len();
    read(values, len, 0).within(len, bytes)
}

pub(super) fn table(of: Vec<Arg>, head: Vec<Word>, at: usize, more: Vec<Word>) -> Arg {
    Arg::Table { of, head, at: [0, at], more }
}

/// The beginning of one of a table's tensors.
fn begin(of: usize) -> Word {
    Address(of, [0; 2])
}

/// The figures of a step whose gradients are halved.
fn figures() -> Arg {
    whole(f64s([0.0, 4.0, 0.5, 1.0]))
}

#[test]
fn adamw_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let n = 700;
    let f32_at = |seed| row(f32s(seed, n), 4 * FAR);
    let square = || {
        let squares = crate::close::normal(3, n).into_iter().flat_map(|x| (x * x).to_le_bytes());
        row(squares.collect(), 4 * FAR).changed()
    };
    for narrow in [true, false] {
        // A bf16 weight with its master, or an f32 one that is its own.
        let p = if narrow { row(bf16s(1, n), 2 * FAR) } else { f32_at(1) };
        let mut of = vec![p.changed(), f32_at(2).changed(), square(), f32_at(4)];
        let master = if narrow { begin(4) } else { Number([0; 2]) };
        if narrow {
            of.push(f32_at(1).changed());
        }
        let head = vec![
            begin(0),
            master,
            begin(1),
            begin(2),
            begin(3),
            Number([n, FAR + n]),
            Number([1.5f64.to_bits() as usize; 2]),
            Number([1; 2]),
        ];
        // The slot in the upper half, its chunk of 16,384 elements in the lower one.
        let table = table(of, head, BLOCK, vec![Number([0, FAR / 16_384])]);
        let mut args = vec![figures(), table, both(1), U64([1e-2f64.to_bits() as usize; 2])];
        args.extend([0.9, 0.95, 0.1, 0.05, 1e-8, 0.1, 0.5, 0.25].map(F32));
        Case { kernel: adamw::kernel(), shared: 0, far_block: BLOCK, blocks: 1, args }.holds();
    }
}

#[test]
fn squares_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let n = 1000;
    for narrow in [true, false] {
        let values = if narrow { row(bf16s(1, n), 2 * FAR) } else { row(f32s(1, n), 4 * FAR) };
        // The host works out where a chunk begins.
        let at = if narrow { 2 * FAR } else { 4 * FAR };
        let what = Number([n | usize::from(narrow) << 32; 2]);
        let table = table(vec![values], Vec::new(), 2 * BLOCK, vec![Address(0, [0, at]), what]);
        let args = vec![written(1, 8, BLOCK), table];
        Case { kernel: of_stats("stats_squares"), shared: 0, far_block: BLOCK, blocks: 1, args }.holds();
    }
}

#[test]
fn folds_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let (quads, block) = (300, 256);
    let first = FAR / 4 / block + 1;
    let at = first * block * 16;
    let x = |seed| row(f32s(seed, 4 * quads), at);
    // The second of two ranks: what the first sent lies at the beginning of what was received.
    let fold = |sum: Arg, own: Arg, received: Arg, rank: usize, stride: [usize; 2], far_block: usize| {
        let quads = U64([quads, far_block * block + quads]);
        let args = vec![sum, own, received, both(2), both(rank), U64(stride), quads, both(0)];
        Case { kernel: fold::kernel(), shared: 0, far_block, blocks: 2, args }.holds();
    };
    fold(x(1).changed(), x(2), x(3), 1, [0; 2], first);
    // And the first: the other's slot lies that far behind.
    let near = |seed| read(f32s(seed, 4 * quads), 16 * quads, 0);
    let stride = 4 * quads;
    let received = near(3).within(16 * quads, 4 * FAR);
    let Arg::Rows { rows, row, values, compared, .. } = received else { panic!("rows") };
    let received = Arg::Rows { rows, row, stride: [row; 2], at: [4 * stride, 4 * FAR], values, compared };
    fold(near(1).changed(), near(2), received, 0, [stride, FAR], 0);
}

#[test]
fn sums_of_rows_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    // Two rows, the second behind half of the elements.
    let (block, far) = (256, FAR / 2 + 256);
    let column = |arg: Arg| arg.within(4 * far, 4 * (far - block));
    let args = vec![
        column(read(f32s(1, block), 4 * block, 0)).changed(),
        column(read(f32s(2, 2 * block), 4 * block, 0)),
        both(2),
        U32([block, far]),
    ];
    let kernel = elementwise::column_add_kernel();
    Case { kernel, shared: 0, far_block: far / block - 1, blocks: 1, args }.holds();

    // One strip: nothing waits, the sum goes to the gradient, whose columns lie behind those of two others.
    let cols = block;
    let rows = 40;
    let wide = FAR / 32;
    let args = vec![
        Null,
        column_at(read(f32s(1, cols), 4 * cols, 0).changed(), 4, wide),
        Null,
        Null,
        whole(i32s([0])),
        Null,
        column_at(read(bf16s(2, rows * cols), 2 * cols, 0), 2, wide),
        Null,
        both(rows),
        both(0),
        U32([cols, wide]),
        both(0),
    ];
    Case { kernel: elementwise::column_kernel(B), shared: 0, far_block: wide / block - 1, blocks: 1, args }.holds();
}

/// The last columns of rows of `wide` elements of so many bytes.
fn column_at(arg: Arg, bytes: usize, wide: usize) -> Arg {
    let Arg::Rows { row, .. } = arg else { panic!("rows") };
    arg.within(bytes * wide, bytes * wide - row)
}
