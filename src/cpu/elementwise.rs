//! Operations on elements: copies and casts, sums, biases, rotary embedding, SwiGLU, dropout. One pass each, in parallel.

use super::Cpu;
use super::buffer::{ViewMut, elems, elems_mut, typed, view_mut};
use super::elem::Elem;
use super::level::multiversion;
use super::threads::chunked;
use super::vector::sigmoid;
use crate::backend::elementwise::{check_bias, check_bias_grad, check_same};
use crate::backend::{Dropout, Rope, Rotate, Swiglu};
use crate::rng::Stream;
use crate::tensor::{Fill, Tensor};

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

multiversion! {
    fn convert[Y: Elem, X: Elem](y: &mut [Y], x: &[X]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = Y::put(x.get());
        }
    }
}

multiversion! {
    pub fn add_slice[Y: Elem, X: Elem](y: &mut [Y], x: &[X]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = Y::put(y.get() + x.get());
        }
    }
}

pub fn upload(dev: &Cpu, dst: &mut Tensor<Cpu>, src: &[f32]) {
    assert_eq!(dst.len(), src.len(), "upload: number of elements");
    typed!(y = mut dst, => dev.pool.split(chunked(y, TASK), |i, y| convert(dev.level, y, piece(src, i, TASK))));
}

pub fn upload_by(dev: &Cpu, dst: &mut Tensor<Cpu>, fill: &Fill<'_>) {
    match view_mut(dst) {
        ViewMut::F32(y) => dev.pool.split(chunked(y, TASK), |i, y| fill(i * TASK, y)),
        ViewMut::Bf16(y) => dev.pool.split(chunked(y, TASK), |i, y| {
            let mut values = vec![0.0; y.len()];
            fill(i * TASK, &mut values);
            convert(dev.level, y, &values);
        }),
    }
}

pub fn download(dev: &Cpu, dst: &mut [f32], src: &Tensor<Cpu>) {
    assert_eq!(dst.len(), src.len(), "download: number of elements");
    typed!(x = src, => dev.pool.split(chunked(dst, TASK), |i, y| convert(dev.level, y, piece(x, i, TASK))));
}

pub fn upload_at(dev: &Cpu, dst: &mut Tensor<Cpu>, first: usize, src: &[f32]) {
    typed!(y = mut dst, => {
        let y = &mut y[first..first + src.len()];
        dev.pool.split(chunked(y, TASK), |i, y| convert(dev.level, y, piece(src, i, TASK)))
    });
}

pub fn download_at(dev: &Cpu, dst: &mut [f32], src: &Tensor<Cpu>, first: usize) {
    typed!(x = src, => {
        let x = &x[first..first + dst.len()];
        dev.pool.split(chunked(dst, TASK), |i, y| convert(dev.level, y, piece(x, i, TASK)))
    });
}

pub fn fill_zero(dev: &Cpu, dst: &mut Tensor<Cpu>) {
    let bytes = dst.len() * dst.dtype().bytes();
    if !dst.buf.zero_later(bytes) {
        write_zeros(dev, dst, bytes);
    }
}

/// Writes zeros that are due, on all threads, before a tensor is added to here and there.
pub fn settle(dev: &Cpu, dst: &mut Tensor<Cpu>) {
    let bytes = dst.len() * dst.dtype().bytes();
    if dst.buf.overwrites_zeros(bytes) {
        write_zeros(dev, dst, bytes);
    }
}

fn write_zeros(dev: &Cpu, dst: &mut Tensor<Cpu>, bytes: usize) {
    dev.pool.split(chunked(&mut dst.buf.bytes_mut()[..bytes], 8 * TASK), |_, y| y.fill(0));
}

pub fn copy(dev: &Cpu, dst: &mut Tensor<Cpu>, src: &Tensor<Cpu>) {
    check_same("copy", dst, src);
    if dst.dtype() == src.dtype() {
        let bytes = src.len() * src.dtype().bytes();
        let (y, x) = (&mut dst.buf.bytes_mut()[..bytes], &src.buf.bytes()[..bytes]);
        dev.pool.split(chunked(y, 4 * TASK), |i, y| y.copy_from_slice(piece(x, i, 4 * TASK)));
        return;
    }
    typed!(y = mut dst, x = src, => dev.pool.split(chunked(y, TASK), |i, y| convert(dev.level, y, piece(x, i, TASK))));
}

pub fn add(dev: &Cpu, dst: &mut Tensor<Cpu>, src: &Tensor<Cpu>) {
    check_same("add", dst, src);
    typed!(y = mut dst, x = src, => dev.pool.split(chunked(y, TASK), |i, y| add_slice(dev.level, y, piece(x, i, TASK))));
}

pub fn add_bias(dev: &Cpu, dst: &mut Tensor<Cpu>, b: &Tensor<Cpu>) {
    check_bias("add_bias", b, dst);
    let cols = dst.cols();
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
    check_bias_grad("bias_backward", db, dy);
    let cols = dy.cols();
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
    pub fn rope_row[E: Elem](x: &mut [E], cos: &[f32], sin: &[f32], sign: f32) {
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

pub fn rope(dev: &Cpu, x: &mut Tensor<Cpu>, by: Rope<'_, Cpu>, direction: Rotate) {
    let (cols, dim) = (x.cols(), by.check("rope", x));
    if x.is_empty() {
        return;
    }
    let (table, positions): (&[f32], _) = (elems(by.table), elems::<i32>(by.positions));
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
    pub fn swiglu_slice[E: Elem](out: &mut [E], gate: &[E], up: &[E]) {
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            let g = g.get();
            *o = E::put(g * sigmoid::<I>(g) * u.get());
        }
    }
}

multiversion! {
    /// `gate` and `up` become their gradients for `dact`, which becomes SwiGLU's output.
    fn swiglu_backward_slice[E: Elem](gate: &mut [E], up: &mut [E], dact: &mut [E]) {
        for ((gate, up), dact) in gate.iter_mut().zip(up).zip(dact) {
            let (d, g, u) = (dact.get(), gate.get(), up.get());
            let s = sigmoid::<I>(g);
            *dact = E::put(g * s * u);
            *up = E::put(d * g * s);
            // silu'(g) = s + g·s·(1 - s)
            *gate = E::put(d * u * s * I::fma(g, 1.0 - s, 1.0));
        }
    }
}

/// Runs the body with `$E` as the element type that the named tensors have in common.
macro_rules! same_type {
    ($what:literal, $($t:expr),+; $E:ident => $body:expr) => {{
        let dtypes = [$($t.dtype()),+];
        assert!(dtypes.iter().all(|&d| d == dtypes[0]), "{}: element types differ: {dtypes:?}", $what);
        match dtypes[0] {
            $crate::tensor::DType::F32 => {
                type $E = f32;
                $body
            }
            $crate::tensor::DType::Bf16 => {
                type $E = half::bf16;
                $body
            }
            $crate::tensor::DType::I32 => panic!("{}: a tensor of integers", $what),
        }
    }};
}
pub(super) use same_type;

pub fn swiglu_forward(dev: &Cpu, out: &mut Tensor<Cpu>, x: Swiglu<'_, Cpu>) {
    x.check("swiglu", &[("out", out)]);
    let Swiglu { gate, up } = x;
    same_type!("swiglu", out, gate, up; E => {
        let (gate, up) = (elems::<E>(gate), elems::<E>(up));
        dev.pool.split(chunked(elems_mut::<E>(out), TASK), |i, out| {
            swiglu_slice(dev.level, out, piece(gate, i, TASK), piece(up, i, TASK));
        });
    });
}

pub fn swiglu_backward(dev: &Cpu, gate: &mut Tensor<Cpu>, up: &mut Tensor<Cpu>, dact: &mut Tensor<Cpu>) {
    Swiglu { gate, up }.check("swiglu_backward", &[("dact", dact)]);
    same_type!("swiglu_backward", gate, up, dact; E => {
        let [gate, up, dact] = [gate, up, dact].map(|t| chunked(elems_mut::<E>(t), TASK));
        dev.pool.split((gate, up, dact), |_, (gate, up, dact)| swiglu_backward_slice(dev.level, gate, up, dact));
    });
}

/// Philox blocks drawn side by side: enough that their chains of products fill the units.
const DRAWS: usize = 32;

multiversion! {
    /// `y = keep · scale · x`; the slices begin with the first element of block `first_block`. See [`Dropout`] for the draws.
    fn dropout_slice[Y: Elem, X: Elem](y: &mut [Y], x: &[X], first_block: u64, stream: Stream, threshold: u32, scale: f32) {
        const ELEMENTS: usize = DRAWS * Dropout::PER_BLOCK;
        for (i, (y, x)) in y.chunks_mut(ELEMENTS).zip(x.chunks(ELEMENTS)).enumerate() {
            let [low, high] = stream.blocks::<DRAWS>(first_block.wrapping_add((i * DRAWS) as u64));
            let mut words = [0u64; 2 * DRAWS];
            for j in 0..DRAWS {
                (words[2 * j], words[2 * j + 1]) = (low[j].to_le(), high[j].to_le());
            }
            // Little-endian words, so the low quarter of each comes first.
            let quarters: &[u16] = bytemuck::cast_slice(&words);
            for ((y, x), &quarter) in y.iter_mut().zip(x).zip(quarters) {
                // A product, so that a dropped NaN stays visible.
                *y = Y::put(x.get() * if u32::from(u16::from_le(quarter)) < threshold { 0.0 } else { scale });
            }
        }
    }
}

pub fn dropout(dev: &Cpu, dst: &mut Tensor<Cpu>, src: &Tensor<Cpu>, dropout: Dropout) {
    dropout.check("dropout", dst, src);
    let (stream, threshold, scale) = (dropout.stream(), dropout.threshold(), dropout.scale());
    typed!(y = mut dst, x = src, => dev.pool.split(chunked(y, TASK), |i, y| {
        let first_block = (i * TASK / Dropout::PER_BLOCK) as u64;
        dropout_slice(dev.level, y, piece(x, i, TASK), first_block, stream, threshold, scale);
    }));
}

#[cfg(test)]
mod tests {
    use crate::cpu::testing::elementwise::{self, SHAPES};
    use crate::cpu::testing::{cpus, thread_counts};

    #[test]
    fn copies_casts_and_sums_round_once() {
        for dev in cpus() {
            elementwise::copies_casts_and_sums_round_once(&dev, dev.level().name(), &SHAPES);
        }
    }

    #[test]
    fn rope_turns_pairs_and_turns_them_back() {
        for dev in cpus() {
            elementwise::rope_turns_pairs_and_turns_them_back(&dev, dev.level().name());
        }
    }

    #[test]
    fn swiglu_and_its_gradient() {
        for dev in cpus() {
            elementwise::swiglu_and_its_gradient(&dev, dev.level().name(), &[(1, 1), (7, 33), (5, 8000)]);
        }
    }

    #[test]
    fn dropout_draws_what_its_definition_says() {
        for dev in cpus().iter().chain(&thread_counts()) {
            elementwise::dropout_draws_what_its_definition_says(dev, "cpu", &[(1, 3), (40, 1000), (3, 33)]);
        }
    }
}
