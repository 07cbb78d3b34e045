//! Kernels that go through rows or elements.

use ringtune::cuda::{cast, cross_entropy, dropout, elementwise, norm, rope, rows, swiglu};
use ringtune::tensor::DType;

use super::Arg::{F32, Null, U32, U64};
use super::{B, Case, FAR, alike, bf16s, both, configuration, f32s, i32s, is_promised, read, whole, written};

#[test]
fn rows_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let (cols, n) = (4096, 32);
    // A multiple of the rows of every block.
    let far = FAR / cols + 16;
    let x = || read(bf16s(1, n * cols), 2 * cols, far);
    let w = || whole(bf16s(2, cols));
    let groups = || U32([n, far + n]);
    let cases = [
        Case {
            kernel: norm::forward_kernel(B, B, B, cols),
            shared: 0,
            far_block: far,
            blocks: n,
            args: vec![
                written(n, 2 * cols, far),
                written(n, 4, far),
                x(),
                w(),
                F32(1e-5),
                groups(),
                both(cols),
                both(256),
            ],
        },
        Case {
            kernel: norm::backward_kernel(B, B, B, B, cols),
            shared: 4 * cols,
            far_block: far / norm::ROUNDS,
            blocks: n / norm::ROUNDS,
            args: vec![
                read(bf16s(3, n * cols), 2 * cols, far).changed(),
                written(n / norm::ROUNDS, 4 * cols, far / norm::ROUNDS),
                read(bf16s(4, n * cols), 2 * cols, far),
                x(),
                w(),
                read(f32s(5, n), 4, far),
                groups(),
                both(cols),
                both(256),
                both(1),
                both(1),
            ],
        },
        Case {
            kernel: elementwise::kernel("add_bias", B, B, cols),
            shared: 0,
            far_block: far * cols.div_ceil(256 * 8),
            blocks: n * cols.div_ceil(256 * 8),
            args: vec![x().changed(), w(), both(cols)],
        },
        Case {
            // A strip of several: its sums wait for the others'.
            kernel: elementwise::column_kernel(B),
            shared: 0,
            far_block: FAR / cols / 512 * cols / 256,
            blocks: cols / 256,
            args: vec![
                Null,
                Null,
                Null,
                written(1, 4 * cols, FAR / cols / 512),
                whole(i32s(vec![0; cols / 256])),
                read(bf16s(1, 513 * cols), 2 * cols, FAR / cols),
                Null,
                Null,
                U32([513, FAR / cols + 513]),
                both(cols),
                both(0),
                both(0),
            ],
        },
        Case {
            kernel: rope::kernel(B),
            shared: 0,
            far_block: far * (cols / 2).div_ceil(256),
            blocks: n * (cols / 2).div_ceil(256),
            args: vec![
                x().changed(),
                whole(f32s(6, 50 * 64)),
                read(i32s((0..n).map(|i| i % 50)), 4, far),
                both(cols),
                both(64),
                both(0),
            ],
        },
    ];
    // Updates read rows in 64s.
    let ((kernel, shared), beyond) = (configuration("lora_t", &["RANK=16"]), FAR / cols + 64);
    let x = || read(bf16s(1, 64 * cols), 2 * cols, beyond);
    let mut args = vec![written(64, 32, beyond), Null, Null, x(), whole(bf16s(2, 16 * cols)), Null, Null];
    args.extend([U32([64, beyond + 64]), both(cols), both(16), both(1), F32(0.5)]);
    args.extend((0..13).map(|_| both(0)));
    Case { kernel, shared, far_block: beyond / 64, blocks: 1, args }.holds();
    cases.iter().for_each(Case::holds);
    // Which rows they are is another number far behind the beginning.
    alike(|side| Case {
        kernel: cross_entropy::kernel(),
        shared: 0,
        far_block: far,
        blocks: 2,
        args: vec![
            written(2, 4, far),
            written(2, 4, far),
            written(2, 2 * cols, far),
            read(f32s(7, 2 * cols), 4 * cols, far),
            read(i32s([side * far, side * far + 1]), 4, far),
            read(i32s([5, 4095]), 4, far),
            both(cols),
            F32(0.25),
            both(1),
        ],
    });
}

#[test]
fn rows_by_index_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    // An odd width: rows are copied in pieces of two bytes, of which there are as many as elements.
    let cols = 4095;
    let far = FAR / cols + 3;
    let bytes = 2 * cols;
    let (gather, units) = rows::kernel("gather", bytes);
    let (scatter, _) = rows::kernel("scatter", bytes);
    let blocks = units.div_ceil(256);
    for kernel in [gather, scatter] {
        // From row `far` of one to row `far` of the other.
        let index = |at: usize| read(i32s([at]), 4, far);
        let case = |at: usize| Case {
            kernel,
            shared: 0,
            far_block: far * blocks,
            blocks,
            args: vec![
                written(1, bytes, far),
                read(bf16s(1, cols), bytes, far),
                index(at),
                both(units),
                U32([1, far + 1]),
            ],
        };
        alike(|side| case(side * far));
    }
    let cols = 4096;
    let far = FAR / cols + 3;
    alike(|side| Case {
        kernel: rows::backward_kernel(B),
        shared: 0,
        far_block: 0,
        blocks: cols / 256,
        args: vec![
            read(f32s(1, cols), 4 * cols, far).changed(),
            read(bf16s(2, cols), 2 * cols, far),
            read(i32s([side * far]), 4, far),
            whole(i32s([side * far])),
            both(1),
            both(cols),
            both(0),
            U32([1, far + 1]),
        ],
    });
}

#[test]
fn elements_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let block = 256 * 8;
    let (first, n) = (FAR / block + 1, 2 * block - 3);
    let at = first * block;
    let wide = |seed| read(f32s(seed, n), 4 * n, 0).within(4 * n, 4 * at);
    let narrow = |seed| read(bf16s(seed, n), 2 * n, 0).within(2 * n, 2 * at);
    let to = || written(1, 2 * n, 0).within(2 * n, 2 * at);
    let len = || U64([n, at + n]);
    let of = |kernel, args| Case { kernel, shared: 0, far_block: first, blocks: 2, args };
    let mut draws = vec![to(), narrow(1), len()];
    // Nothing is dropped, since what is goes by the place of an element.
    draws.extend([both(1), both(2), both(3), both(4), both(0), F32(1.25)]);
    for case in [
        of(swiglu::forward_kernel(B), vec![to(), narrow(1), narrow(2), len()]),
        of(swiglu::backward_kernel(B), vec![narrow(1).changed(), narrow(2).changed(), narrow(3).changed(), len()]),
        of(elementwise::kernel("add", B, B, 8), vec![narrow(1).changed(), narrow(2), len()]),
        of(dropout::kernel(B, B), draws),
        of(cast::kernel(B, DType::F32), vec![to(), wide(1), len()]),
    ] {
        case.holds();
    }
}
