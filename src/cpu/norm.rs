//! Root-mean-square norm, forward and backward, over rows or over groups of a row (one norm per head).

use super::Cpu;
use super::buffer::{elems, elems_mut, typed};
use super::elementwise::task_rows;
use super::level::multiversion;
use super::threads::chunked;
use super::vector::{Elem, dot, fold2};
use crate::backend::Write;
use crate::tensor::Tensor;

/// Checks the shapes and gives the width of a group.
fn group(what: &str, rows: usize, cols: usize, w: &Tensor<Cpu>, rstd: &Tensor<Cpu>) -> usize {
    let width = w.cols();
    assert!(
        w.rows() == 1 && width > 0 && cols.is_multiple_of(width),
        "{what}: weight {:?} for rows of {cols}",
        w.shape()
    );
    assert_eq!(rstd.shape(), (rows, cols / width), "{what}: shape of rstd");
    width
}

/// The weight as f32.
fn widened(w: &Tensor<Cpu>) -> Vec<f32> {
    typed!(w = w, => w.iter().map(|x| x.get()).collect())
}

multiversion! {
    fn forward_rows[Y: Elem, X: Elem](out: &mut [Y], rstd: &mut [f32], x: &[X], w: &[f32], eps: f32) {
        let width = w.len();
        for ((out, r), x) in out.chunks_exact_mut(width).zip(rstd).zip(x.chunks_exact(width)) {
            let mean = dot::<I, X, X>(x, x) / width as f32;
            *r = 1.0 / (mean + eps).sqrt();
            for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
                *o = Y::put(x.get() * *r * w);
            }
        }
    }
}

pub fn forward(dev: &Cpu, out: &mut Tensor<Cpu>, rstd: &mut Tensor<Cpu>, x: &Tensor<Cpu>, w: &Tensor<Cpu>, eps: f32) {
    let (rows, cols) = x.shape();
    assert_eq!(out.shape(), x.shape(), "rmsnorm: shapes of out and x");
    let width = group("rmsnorm", rows, cols, w, rstd);
    if x.is_empty() {
        return;
    }
    let w = widened(w);
    let rstd: &mut [f32] = elems_mut(rstd);
    let per_task = task_rows(cols);
    typed!(out = mut out, x = x, => {
        let parts = (chunked(out, per_task * cols), chunked(rstd, per_task * (cols / width)));
        dev.pool.split(parts, |i, (out, rstd)| {
            let at = i * per_task * cols;
            forward_rows(dev.level, out, rstd, &x[at..at + out.len()], &w, eps);
        });
    });
}

multiversion! {
    /// `dx (+)= rstd · (w·dout - x̂ · mean(w·dout·x̂))` with `x̂ = x·rstd`, and `dw += dout·x̂` where `dw` is not empty.
    fn backward_rows[Z: Elem, Y: Elem, X: Elem](
        dx: &mut [Z], dw: &mut [f32], dout: &[Y], x: &[X], w: &[f32], rstd: &[f32], write: Write,
    ) {
        let width = w.len();
        let rows = dx.chunks_exact_mut(width).zip(dout.chunks_exact(width)).zip(x.chunks_exact(width)).zip(rstd);
        let mut wd = vec![0.0f32; width];
        for (((dx, dout), x), &r) in rows {
            for ((wd, d), w) in wd.iter_mut().zip(dout).zip(w) {
                *wd = d.get() * w;
            }
            let mean = fold2(&wd, x, |acc, wd, x| I::fma(wd, x.get(), acc)) * r / width as f32;
            let back = mean * r;
            match write {
                Write::Set => {
                    for ((dx, x), wd) in dx.iter_mut().zip(x).zip(&wd) {
                        *dx = Z::put(r * I::fma(-x.get(), back, *wd));
                    }
                }
                Write::Add => {
                    for ((dx, x), wd) in dx.iter_mut().zip(x).zip(&wd) {
                        *dx = Z::put(dx.get() + r * I::fma(-x.get(), back, *wd));
                    }
                }
            }
            if !dw.is_empty() {
                for ((dw, d), x) in dw.iter_mut().zip(dout).zip(x) {
                    *dw = I::fma(d.get(), x.get() * r, *dw);
                }
            }
        }
    }
}

/// Rows whose contributions to `dw` form one partial sum; fixed, so that the order of the whole sum is.
const PARTIAL_ROWS: usize = 64;

#[allow(clippy::too_many_arguments)]
pub fn backward(
    dev: &Cpu,
    dx: &mut Tensor<Cpu>,
    dw: Option<&mut Tensor<Cpu>>,
    dout: &Tensor<Cpu>,
    x: &Tensor<Cpu>,
    w: &Tensor<Cpu>,
    rstd: &Tensor<Cpu>,
    write: Write,
) {
    let (rows, cols) = x.shape();
    assert_eq!(dx.shape(), x.shape(), "rmsnorm_backward: shapes of dx and x");
    assert_eq!(dout.shape(), x.shape(), "rmsnorm_backward: shapes of dout and x");
    let width = group("rmsnorm_backward", rows, cols, w, rstd);
    if let Some(dw) = &dw {
        assert_eq!(dw.shape(), w.shape(), "rmsnorm_backward: shape of dw");
    }
    if x.is_empty() {
        return;
    }
    let w = widened(w);
    let rstd: &[f32] = elems(rstd);
    let groups = cols / width;
    let n_tasks = rows.div_ceil(PARTIAL_ROWS);
    // One partial sum per task; where `dw` is not asked for, one unused element.
    let partial_width = if dw.is_some() { width } else { 1 };
    let mut partial = vec![0.0f32; n_tasks * partial_width];
    let with_dw = dw.is_some();
    typed!(dx = mut dx, dout = dout, x = x, => {
        let parts = (chunked(dx, PARTIAL_ROWS * cols), chunked(&mut partial, partial_width));
        dev.pool.split(parts, |i, (dx, partial)| {
            let at = i * PARTIAL_ROWS * cols;
            let range = at..at + dx.len();
            let rstd = &rstd[i * PARTIAL_ROWS * groups..];
            let dw = if with_dw { partial } else { &mut [] };
            backward_rows(dev.level, dx, dw, &dout[range.clone()], &x[range], &w, rstd, write);
        });
    });
    if let Some(dw) = dw {
        let dw: &mut [f32] = elems_mut(dw);
        let mut sum = vec![0.0f32; width];
        for partial in partial.chunks_exact(width) {
            sum.iter_mut().zip(partial).for_each(|(s, p)| *s += p);
        }
        dw.iter_mut().zip(&sum).for_each(|(dw, s)| *dw += s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Device, Norms};
    use crate::cpu::testing::{assert_close, cpus, normal, rounded, stored, tensor, thread_counts, values};
    use crate::tensor::DType;

    /// out, dx, dw of groups of the weight's width, every step passed through `round`.
    fn reference(x: &[f64], w: &[f64], dout: &[f64], eps: f64, round: impl Fn(f64) -> f64) -> [Vec<f64>; 3] {
        let d = w.len();
        let (mut out, mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; d]);
        for g in (0..x.len()).step_by(d) {
            let mean = round((g..g + d).fold(0.0, |s, i| round(s + round(x[i] * x[i]))) / d as f64);
            let r = round(1.0 / round((mean + eps).sqrt()));
            let dot = (g..g + d).fold(0.0, |s, i| {
                round(s + round(round(dout[i] * w[i - g]) * round(x[i] * r)))
            });
            for i in g..g + d {
                let normed = round(x[i] * r);
                out[i] = round(normed * w[i - g]);
                dx[i] = round(r * round(round(dout[i] * w[i - g]) - round(normed * round(dot / d as f64))));
                dw[i - g] = round(dw[i - g] + round(dout[i] * normed));
            }
        }
        [out, dx, dw]
    }

    fn run(dev: &Cpu, dtype: DType, n: usize, c: usize, [x, w, dout]: &[Vec<f32>; 3], write: Write) -> [Vec<f32>; 3] {
        let d = w.len();
        let (xt, wt, dt) = (
            tensor(dev, n, c, dtype, x),
            tensor(dev, 1, d, dtype, w),
            tensor(dev, n, c, dtype, dout),
        );
        let mut out = dev.alloc(n, c, dtype).unwrap();
        let mut rstd = dev.alloc(n, c / d, DType::F32).unwrap();
        dev.rmsnorm_forward(&mut out, &mut rstd, &xt, &wt, 1e-5).unwrap();
        let mut dx = tensor(dev, n, c, dtype, &vec![0.0; n * c]);
        let mut dw = tensor(dev, 1, d, DType::F32, &vec![0.0; d]);
        dev.rmsnorm_backward(&mut dx, Some(&mut dw), &dt, &xt, &wt, &rstd, write)
            .unwrap();
        [&out, &dx, &dw].map(|t| values(dev, t))
    }

    #[test]
    fn forward_and_backward_follow_the_formula() {
        for dev in cpus() {
            for dtype in [DType::F32, DType::Bf16] {
                for (n, c, d) in [(1, 8, 8), (7, 33, 33), (130, 48, 16), (33, 576, 576)] {
                    let inputs = [normal(1, n * c), normal(2, d), normal(3, n * c)];
                    let [x, w, dout] = inputs.each_ref().map(|x| stored(dtype, x));
                    let exact = reference(&x, &w, &dout, 1e-5, |x| x);
                    let plain = reference(&x, &w, &dout, 1e-5, |x| rounded(dtype, x));
                    for write in [Write::Set, Write::Add] {
                        let ours = run(&dev, dtype, n, c, &inputs, write);
                        for (i, name) in ["out", "dx", "dw"].into_iter().enumerate() {
                            let what = format!("{:?} {dtype:?} {n}x{c}/{d} {name}", dev.level());
                            let stored_as = if i == 2 { DType::F32 } else { dtype };
                            assert_close(&what, &ours[i], &exact[i], &plain[i], stored_as);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_reference_gradient_is_that_of_the_reference() {
        let (n, d) = (3, 7);
        let [x, w, dout] = [normal(4, n * d), normal(5, d), normal(6, n * d)].map(|x| stored(DType::F32, &x));
        let [_, dx, dw] = reference(&x, &w, &dout, 1e-5, |x| x);
        let value = |x: &[f64], w: &[f64]| -> f64 {
            reference(x, w, &dout, 1e-5, |x| x)[0]
                .iter()
                .zip(&dout)
                .map(|(o, d)| o * d)
                .sum()
        };
        let moved = |v: &[f64], i: usize, by: f64| -> Vec<f64> {
            v.iter()
                .enumerate()
                .map(|(j, &x)| if i == j { x + by } else { x })
                .collect()
        };
        for (i, dx) in dx.iter().enumerate() {
            let slope = (value(&moved(&x, i, 1e-5), &w) - value(&moved(&x, i, -1e-5), &w)) / 2e-5;
            assert!((slope - dx).abs() < 1e-7, "dx {i}: {slope} {dx}");
        }
        for (i, dw) in dw.iter().enumerate() {
            let slope = (value(&x, &moved(&w, i, 1e-5)) - value(&x, &moved(&w, i, -1e-5))) / 2e-5;
            assert!((slope - dw).abs() < 1e-7, "dw {i}: {slope} {dw}");
        }
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_the_rows_around() {
        let (n, c) = (200, 40);
        let inputs = [normal(7, n * c), normal(8, c), normal(9, n * c)];
        let devs = thread_counts();
        let first = run(&devs[0], DType::Bf16, n, c, &inputs, Write::Set);
        let cut = |x: &[f32]| x[70 * c..90 * c].to_vec();
        for dev in &devs {
            assert_eq!(run(dev, DType::Bf16, n, c, &inputs, Write::Set), first);
            let part = [cut(&inputs[0]), inputs[1].clone(), cut(&inputs[2])];
            let [out, dx, _] = run(dev, DType::Bf16, 20, c, &part, Write::Set);
            assert_eq!((out, dx), (cut(&first[0]), cut(&first[1])));
        }
    }
}
