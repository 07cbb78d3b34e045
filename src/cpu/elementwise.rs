//! Operations on elements: copies and casts, sums, biases, rotary embedding, SwiGLU, dropout. One pass each, in parallel.

use super::Cpu;
use super::buffer::{elems, elems_mut, i32s, typed};
use super::level::multiversion;
use super::threads::chunked;
use super::vector::{Elem, sigmoid};
use crate::backend::{Dropout, Rotate};
use crate::rng::Stream;
use crate::tensor::{DType, Tensor};
use half::bf16;

/// Elements of one task: enough to hide its start, few enough to stay in the L2 cache.
pub const TASK: usize = 16 * 1024;

/// Rows of one task for rows of `cols` elements.
pub fn task_rows(cols: usize) -> usize {
    (TASK / cols.max(1)).max(1)
}

/// `size` elements of `x` from `part · size`; the last part may be shorter.
pub fn piece<T>(x: &[T], part: usize, size: usize) -> &[T] {
    &x[part * size..((part + 1) * size).min(x.len())]
}

fn same_shape(what: &str, a: &Tensor<Cpu>, b: &Tensor<Cpu>) {
    assert_eq!(a.shape(), b.shape(), "{what}: shapes differ");
}

multiversion! {
    fn convert[Y: Elem, X: Elem](y: &mut [Y], x: &[X]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = Y::put(x.get());
        }
    }
}

multiversion! {
    fn add_slice[Y: Elem, X: Elem](y: &mut [Y], x: &[X]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = Y::put(y.get() + x.get());
        }
    }
}

pub fn upload(dev: &Cpu, dst: &mut Tensor<Cpu>, src: &[f32]) {
    assert_eq!(dst.len(), src.len(), "upload: number of elements");
    typed!(y = mut dst, => dev.pool.split(chunked(y, TASK), |i, y| convert(dev.level, y, piece(src, i, TASK))));
}

pub fn download(dev: &Cpu, dst: &mut [f32], src: &Tensor<Cpu>) {
    assert_eq!(dst.len(), src.len(), "download: number of elements");
    typed!(x = src, => dev.pool.split(chunked(dst, TASK), |i, y| convert(dev.level, y, piece(x, i, TASK))));
}

pub fn fill_zero(dev: &Cpu, dst: &mut Tensor<Cpu>) {
    let bytes = dst.len() * dst.dtype().bytes();
    let dst = &mut dst.buf.bytes_mut()[..bytes];
    dev.pool.split(chunked(dst, 8 * TASK), |_, y| y.fill(0));
}

pub fn copy(dev: &Cpu, dst: &mut Tensor<Cpu>, src: &Tensor<Cpu>) {
    same_shape("copy", dst, src);
    if dst.dtype() == src.dtype() {
        let bytes = src.len() * src.dtype().bytes();
        let (y, x) = (&mut dst.buf.bytes_mut()[..bytes], &src.buf.bytes()[..bytes]);
        dev.pool
            .split(chunked(y, 4 * TASK), |i, y| y.copy_from_slice(piece(x, i, 4 * TASK)));
        return;
    }
    typed!(y = mut dst, x = src, => dev.pool.split(chunked(y, TASK), |i, y| convert(dev.level, y, piece(x, i, TASK))));
}

pub fn add(dev: &Cpu, dst: &mut Tensor<Cpu>, src: &Tensor<Cpu>) {
    same_shape("add", dst, src);
    typed!(y = mut dst, x = src, => dev.pool.split(chunked(y, TASK), |i, y| add_slice(dev.level, y, piece(x, i, TASK))));
}

pub fn add_bias(dev: &Cpu, dst: &mut Tensor<Cpu>, b: &Tensor<Cpu>) {
    let cols = dst.cols();
    assert_eq!(b.shape(), (1, cols), "add_bias: shape of the bias");
    if dst.is_empty() {
        return;
    }
    typed!(y = mut dst, b = b, => dev.pool.split(chunked(y, task_rows(cols) * cols), |_, y| {
        for row in y.chunks_exact_mut(cols) {
            add_slice(dev.level, row, b);
        }
    }));
}

/// Columns of one task of a sum over rows.
const SUM_COLS: usize = 256;

pub fn bias_backward(dev: &Cpu, db: &mut Tensor<Cpu>, dy: &Tensor<Cpu>) {
    let cols = dy.cols();
    assert_eq!(db.shape(), (1, cols), "bias_backward: shape of db");
    let db: &mut [f32] = elems_mut(db);
    // The sum is formed apart, from the first row to the last, and added once.
    typed!(dy = dy, => dev.pool.split(chunked(db, SUM_COLS), |i, db| {
        let mut sum = [0.0f32; SUM_COLS];
        let sum = &mut sum[..db.len()];
        for row in dy.chunks_exact(cols) {
            add_slice(dev.level, sum, piece(row, i, SUM_COLS));
        }
        add_slice(dev.level, db, sum);
    }));
}

multiversion! {
    /// Rotates the heads of one row: `lo' = lo·cos - hi·sin`, `hi' = hi·cos + lo·sin`.
    fn rope_row[E: Elem](x: &mut [E], cos: &[f32], sin: &[f32], sign: f32) {
        let half = cos.len();
        for head in x.chunks_exact_mut(2 * half) {
            let (lo, hi) = head.split_at_mut(half);
            for (((lo, hi), &c), &s) in lo.iter_mut().zip(hi).zip(cos).zip(sin) {
                let (a, b, s) = (lo.get(), hi.get(), s * sign);
                *lo = E::put(I::fma(a, c, -(b * s)));
                *hi = E::put(I::fma(b, c, a * s));
            }
        }
    }
}

pub fn rope(dev: &Cpu, x: &mut Tensor<Cpu>, table: &Tensor<Cpu>, positions: &Tensor<Cpu>, direction: Rotate) {
    let (rows, cols) = x.shape();
    let dim = table.cols();
    assert!(
        dim > 0 && dim.is_multiple_of(2) && cols.is_multiple_of(dim),
        "rope: rows of {cols} do not hold heads of {dim}"
    );
    assert_eq!(positions.shape(), (rows, 1), "rope: shape of positions");
    if x.is_empty() {
        return;
    }
    let (table, positions): (&[f32], _) = (elems(table), i32s(positions));
    let sign = if direction == Rotate::Forward { 1.0 } else { -1.0 };
    let per_task = task_rows(cols);
    typed!(x = mut x, => dev.pool.split(chunked(x, per_task * cols), |i, x| {
        for (row, &position) in x.chunks_exact_mut(cols).zip(&positions[i * per_task..]) {
            let at = usize::try_from(position).expect("positions are not negative") * dim;
            let (cos, sin) = table[at..at + dim].split_at(dim / 2);
            rope_row(dev.level, row, cos, sin, sign);
        }
    }));
}

multiversion! {
    fn swiglu_slice[E: Elem](out: &mut [E], gate: &[E], up: &[E]) {
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            let g = g.get();
            *o = E::put(g * sigmoid::<I>(g) * u.get());
        }
    }
}

multiversion! {
    fn swiglu_backward_slice[E: Elem](dgate: &mut [E], dup: &mut [E], dout: &[E], gate: &[E], up: &[E]) {
        for ((((dg, du), d), g), u) in dgate.iter_mut().zip(dup).zip(dout).zip(gate).zip(up) {
            let (d, g, u) = (d.get(), g.get(), u.get());
            let s = sigmoid::<I>(g);
            *du = E::put(d * g * s);
            // silu'(g) = s + g·s·(1 - s)
            *dg = E::put(d * u * s * I::fma(g, 1.0 - s, 1.0));
        }
    }
}

/// Runs the body with `E` as the common element type of the named tensors.
macro_rules! same_type {
    ($what:literal, $($t:expr),+; $f:ident($($arg:expr),*)) => {{
        let dtypes = [$($t.dtype()),+];
        assert!(dtypes.iter().all(|&d| d == dtypes[0]), "{}: element types differ: {dtypes:?}", $what);
        match dtypes[0] {
            DType::F32 => $f::<f32>($($arg),*),
            DType::Bf16 => $f::<bf16>($($arg),*),
            DType::I32 => panic!("{}: a tensor of integers", $what),
        }
    }};
}
pub(super) use same_type;

fn swiglu_forward_typed<E: Elem>(dev: &Cpu, out: &mut Tensor<Cpu>, gate: &Tensor<Cpu>, up: &Tensor<Cpu>) {
    let (gate, up) = (elems::<E>(gate), elems(up));
    dev.pool.split(chunked(elems_mut::<E>(out), TASK), |i, out| {
        swiglu_slice(dev.level, out, piece(gate, i, TASK), piece(up, i, TASK));
    });
}

pub fn swiglu_forward(dev: &Cpu, out: &mut Tensor<Cpu>, gate: &Tensor<Cpu>, up: &Tensor<Cpu>) {
    same_shape("swiglu", out, gate);
    same_shape("swiglu", gate, up);
    same_type!("swiglu", out, gate, up; swiglu_forward_typed(dev, out, gate, up));
}

fn swiglu_backward_typed<E: Elem>(
    dev: &Cpu,
    dgate: &mut Tensor<Cpu>,
    dup: &mut Tensor<Cpu>,
    dout: &Tensor<Cpu>,
    gate: &Tensor<Cpu>,
    up: &Tensor<Cpu>,
) {
    let (dout, gate, up) = (elems::<E>(dout), elems(gate), elems(up));
    let parts = (chunked(elems_mut::<E>(dgate), TASK), chunked(elems_mut::<E>(dup), TASK));
    dev.pool.split(parts, |i, (dgate, dup)| {
        let (dout, gate, up) = (piece(dout, i, TASK), piece(gate, i, TASK), piece(up, i, TASK));
        swiglu_backward_slice(dev.level, dgate, dup, dout, gate, up);
    });
}

pub fn swiglu_backward(
    dev: &Cpu,
    dgate: &mut Tensor<Cpu>,
    dup: &mut Tensor<Cpu>,
    dout: &Tensor<Cpu>,
    gate: &Tensor<Cpu>,
    up: &Tensor<Cpu>,
) {
    same_shape("swiglu_backward", dgate, dup);
    same_shape("swiglu_backward", dgate, dout);
    same_shape("swiglu_backward", dgate, gate);
    same_shape("swiglu_backward", dgate, up);
    same_type!("swiglu_backward", dgate, dup, dout, gate, up; swiglu_backward_typed(dev, dgate, dup, dout, gate, up));
}

/// Philox blocks drawn side by side; each gives four elements.
const DRAWS: usize = 16;

multiversion! {
    /// `y = keep · scale · x`; the slices begin at element `4 · block` of the tensor. Element e is dropped where word e mod 4
    /// of block e / 4 lies below `threshold`.
    fn dropout_slice[Y: Elem, X: Elem](y: &mut [Y], x: &[X], first_block: u64, stream: Stream, threshold: u64, scale: f32) {
        for (i, (y, x)) in y.chunks_mut(4 * DRAWS).zip(x.chunks(4 * DRAWS)).enumerate() {
            let mut words = [[0u32; 4]; DRAWS];
            for (j, w) in words.iter_mut().enumerate() {
                let block = first_block.wrapping_add((i * DRAWS + j) as u64);
                *w = stream.block(block);
            }
            for ((y, x), &w) in y.iter_mut().zip(x).zip(words.as_flattened()) {
                // A product, so that a dropped NaN stays visible.
                *y = Y::put(x.get() * if u64::from(w) < threshold { 0.0 } else { scale });
            }
        }
    }
}

pub fn dropout(dev: &Cpu, dst: &mut Tensor<Cpu>, src: &Tensor<Cpu>, dropout: Dropout) {
    same_shape("dropout", dst, src);
    assert!(
        (0.0..1.0).contains(&dropout.p),
        "dropout: p = {} lies outside [0, 1)",
        dropout.p
    );
    let (stream, threshold) = (dropout.stream(), dropout.threshold());
    let scale = 1.0 / (1.0 - dropout.p);
    typed!(y = mut dst, x = src, => dev.pool.split(chunked(y, TASK), |i, y| {
        let first_block = (i * TASK / 4) as u64;
        dropout_slice(dev.level, y, piece(x, i, TASK), first_block, stream, threshold, scale);
    }));
}
