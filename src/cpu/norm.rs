//! Root-mean-square norm, forward and backward, over rows or over groups of a row (one norm per head).

use super::Cpu;
use super::buffer::{elems, elems_mut, typed};
use super::elem::Elem;
use super::elementwise::task_rows;
use super::level::multiversion;
use super::threads::chunked;
use super::vector::{dot, fold2};
use crate::backend::{Norm, Write};
use crate::tensor::Tensor;

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

pub fn forward(dev: &Cpu, out: &mut Tensor<Cpu>, rstd: &mut Tensor<Cpu>, norm: Norm<'_, Cpu>) {
    let width = norm.check("rmsnorm", &[("out", out)], rstd, None);
    let Norm { x, w, eps } = norm;
    let cols = x.cols();
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

pub fn backward(
    dev: &Cpu,
    dx: &mut Tensor<Cpu>,
    dw: Option<&mut Tensor<Cpu>>,
    dout: &Tensor<Cpu>,
    rstd: &Tensor<Cpu>,
    norm: Norm<'_, Cpu>,
    write: Write,
) {
    let width = norm.check("rmsnorm_backward", &[("dx", dx), ("dout", dout)], rstd, dw.as_deref());
    let Norm { x, w, .. } = norm;
    let (rows, cols) = x.shape();
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
    use crate::backend::Write;
    use crate::cpu::testing::norms::{self, SHAPES, Types};
    use crate::cpu::testing::{cpus, normal, thread_counts};
    use crate::tensor::DType;

    #[test]
    fn forward_and_backward_follow_the_formula() {
        for dev in cpus() {
            let name = format!("{:?}", dev.level());
            for dtype in [DType::F32, DType::Bf16] {
                norms::follow_the_formula(&dev, &name, Types::all(dtype), &SHAPES);
            }
            for t in Types::mixes() {
                norms::follow_the_formula(&dev, &name, t, &SHAPES[1..3]);
            }
        }
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_the_rows_around() {
        let devs = thread_counts();
        let first = norms::bits_do_not_depend_on_the_rows_around(&devs[0], "one thread", 40);
        let inputs = [normal(7, 200 * 40), normal(8, 40), normal(9, 200 * 40)];
        for dev in &devs {
            let again = norms::run(dev, Types::all(DType::Bf16), (200, 40), &inputs, Write::Set, 0.0);
            assert_eq!(again, first, "{} threads", dev.threads());
        }
    }
}
