//! Rows by index: gather, scatter, and the gradient of the token embedding.

use super::Cpu;
use super::buffer::{elems, elems_mut, typed};
use super::elem::Elem;
use super::elementwise::{settle, task_rows};
use super::level::multiversion;
use super::threads::chunked;
use crate::backend::embedding::{check_backward, check_rows};
use crate::batch::Batch;
use crate::tensor::Tensor;

fn index(rows: &[i32], i: usize, limit: usize, what: &str) -> usize {
    match usize::try_from(rows[i]) {
        Ok(row) if row < limit => row,
        _ => panic!("{what}: index {} at position {i} lies outside 0..{limit}", rows[i]),
    }
}

pub fn gather_rows(dev: &Cpu, dst: &mut Tensor<Cpu>, src: &Tensor<Cpu>, rows: &Tensor<Cpu>) {
    check_rows("gather_rows", dst, src, rows);
    if dst.is_empty() {
        return;
    }
    let (width, limit, rows) = (src.cols() * src.dtype().bytes(), src.rows(), elems::<i32>(rows));
    let (per_task, bytes) = (task_rows(src.cols()), dst.rows() * width);
    let (x, y) = (src.buf.bytes(), &mut dst.buf.bytes_mut()[..bytes]);
    dev.pool.split(chunked(y, per_task * width), |task, y| {
        for (i, y) in y.chunks_exact_mut(width).enumerate() {
            let row = index(rows, task * per_task + i, limit, "gather_rows");
            y.copy_from_slice(&x[row * width..(row + 1) * width]);
        }
    });
}

pub fn scatter_rows(_dev: &Cpu, dst: &mut Tensor<Cpu>, src: &Tensor<Cpu>, rows: &Tensor<Cpu>) {
    check_rows("scatter_rows", src, dst, rows);
    let (width, limit, rows) = (src.cols() * src.dtype().bytes(), dst.rows(), elems::<i32>(rows));
    for i in 0..src.rows() {
        let row = index(rows, i, limit, "scatter_rows");
        let x = &src.buf.bytes()[i * width..(i + 1) * width];
        dst.buf.bytes_mut()[row * width..(row + 1) * width].copy_from_slice(x);
    }
}

multiversion! {
    fn accumulate[X: Elem](y: &mut [f32], x: &[X]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x.get();
        }
    }
}

/// Parts of the table that are updated in parallel; frequent tokens lie close together, so there are many.
const PARTS: usize = 128;

pub fn backward(dev: &Cpu, dw: &mut Tensor<Cpu>, dout: &Tensor<Cpu>, batch: &Batch<Cpu>, first_row: usize) {
    check_backward("embedding_backward", dw, dout, batch);
    let (rows, cols) = dw.shape();
    if dw.is_empty() || dout.is_empty() {
        return;
    }
    let (tokens, by_token) = (elems::<i32>(&batch.tokens), elems::<i32>(&batch.by_token));
    let token = |i: i32| usize::try_from(tokens[i as usize]).expect("tokens are not negative");
    let per_part = rows.div_ceil(PARTS);
    settle(dev, dw);
    let dw: &mut [f32] = elems_mut(dw);
    typed!(dout = dout, => dev.pool.split(chunked(dw, per_part * cols), |part, dw| {
        let first = first_row + part * per_part;
        let end = first + dw.len() / cols;
        // Rows of the batch are in order of token, then of position: each sum runs from the first position to the last.
        let from = by_token.partition_point(|&i| token(i) < first);
        let here = by_token[from..].iter().take_while(|&&i| token(i) < end);
        for &i in here {
            let (at, i) = ((token(i) - first) * cols, i as usize * cols);
            accumulate(dev.level, &mut dw[at..at + cols], &dout[i..i + cols]);
        }
    }));
}

#[cfg(test)]
mod tests {
    use crate::cpu::testing::{cpus, rows};
    use crate::tensor::DType;

    #[test]
    fn gather_scatter_and_embedding_gradient() {
        for dev in cpus() {
            for dtype in [DType::F32, DType::Bf16] {
                rows::gather_scatter_and_embedding_gradient(&dev, dev.level().name(), dtype, 33);
            }
            rows::the_embedding_gradient_is_summed_in_order(&dev, dev.level().name());
        }
    }
}
