//! The optimiser's passes over all weights: AdamW in one pass, and the squared norm of the gradients.

use half::bf16;

use std::ops::Range;

use super::Cpu;
use super::buffer::{elems, elems_mut, typed};
use super::elem::Elem;
use super::elementwise::{TASK, piece};
use super::level::multiversion;
use super::threads::chunked;
use super::vector::LANES;
use crate::backend::{AdamWSlot, AdamWStep};
use crate::tensor::Tensor;

multiversion! {
    /// Sum of squares in f64: exact products of f32, [`LANES`] running sums.
    fn squares[X: Elem](x: &[X]) -> f64 {
        let mut acc = [0.0f64; LANES];
        let chunks = x.chunks_exact(LANES);
        let rest = chunks.remainder();
        for x in chunks {
            for l in 0..LANES {
                let v = f64::from(x[l].get());
                acc[l] += v * v;
            }
        }
        for (acc, x) in acc.iter_mut().zip(rest) {
            let v = f64::from(x.get());
            *acc += v * v;
        }
        acc.iter().sum()
    }
}

/// Sums of squares of the blocks of `range`, which begins with one.
fn blocks(dev: &Cpu, t: &Tensor<Cpu>, range: Range<usize>) -> Vec<f64> {
    let mut parts = vec![0.0f64; range.len().div_ceil(TASK)];
    typed!(x = t, => {
        let x = &x[range];
        dev.pool.split(chunked(&mut parts, 1), |i, part| part[0] = squares(dev.level, piece(x, i, TASK)))
    });
    parts
}

pub fn norm2(dev: &Cpu, tensors: &[&Tensor<Cpu>]) -> f64 {
    tensors.iter().map(|t| blocks(dev, t, 0..t.len()).iter().sum::<f64>()).fold(0.0, |total, t| total + t)
}

pub fn all_blocks(dev: &Cpu, parts: &[(&Tensor<Cpu>, Range<usize>)]) -> Vec<f64> {
    parts.iter().flat_map(|(t, range)| blocks(dev, t, range.clone())).collect()
}

/// The scalars of a step as the inner loop wants them.
#[derive(Clone, Copy)]
struct Scalars {
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    grad_scale: f32,
    /// `lr / (1 - beta1^t)`.
    rate: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    root: f32,
    eps: f32,
    /// `1 - lr · weight_decay`.
    keep: f32,
}

multiversion! {
    /// Updates `master` from its gradient, and writes it rounded to `p` where `p` is not empty.
    fn update[P: Elem](p: &mut [P], master: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], s: Scalars) {
        let rounded = !p.is_empty();
        for (((w, m), v), g) in master.iter_mut().zip(m).zip(v).zip(g) {
            let g = g * s.grad_scale;
            *m = I::fma(s.beta1, *m, s.one_minus_beta1 * g);
            *v = I::fma(s.beta2, *v, s.one_minus_beta2 * g * g);
            let denominator = I::fma(v.sqrt(), s.root, s.eps);
            *w = I::fma(*w, s.keep, -(s.rate * *m / denominator));
        }
        if rounded {
            for (p, w) in p.iter_mut().zip(master) {
                *p = P::put(*w);
            }
        }
    }
}

/// Elements of one task: its five streams stay in the L2 cache between the update and the rounding.
const UPDATE: usize = 4 * 1024;

pub fn adamw(dev: &Cpu, slot: &mut AdamWSlot<'_, Cpu>, step: AdamWStep, grad_scale: f32) {
    slot.check("adamw");
    let (lr, weight_decay) = slot.rates(&step);
    let AdamWSlot { p, master, m, v, g, first_row, range, .. } = slot;
    let s = Scalars {
        beta1: step.beta1,
        beta2: step.beta2,
        one_minus_beta1: step.one_minus_beta1,
        one_minus_beta2: step.one_minus_beta2,
        grad_scale,
        rate: lr / step.bias_correction1,
        root: 1.0 / step.bias_correction2.sqrt(),
        eps: step.eps,
        keep: 1.0 - lr * weight_decay,
    };
    let first = *first_row * g.cols();
    let g: &[f32] = &elems(g)[range.clone()];
    let range = first + range.start..first + range.end;
    let (m, v) = (chunked(elems_mut::<f32>(m), UPDATE), chunked(elems_mut::<f32>(v), UPDATE));
    match master {
        None => {
            let p = &mut elems_mut::<f32>(p)[range];
            dev.pool.split((chunked(p, UPDATE), m, v), |i, (w, m, v)| {
                update::<f32>(dev.level, &mut [], w, m, v, piece(g, i, UPDATE), s);
            });
        }
        Some(master) => {
            let p = &mut elems_mut::<bf16>(p)[range];
            let master = chunked(elems_mut::<f32>(master), UPDATE);
            dev.pool.split((chunked(p, UPDATE), master, m, v), |i, (p, w, m, v)| {
                update(dev.level, p, w, m, v, piece(g, i, UPDATE), s);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{cpus, normal, optimiser, tensor, thread_counts};
    use crate::tensor::DType;

    #[test]
    fn adamw_updates_the_rows_it_is_given() {
        for dev in cpus().iter().chain(&thread_counts()) {
            optimiser::adamw_updates_the_rows_it_is_given(
                dev,
                dev.level().name(),
                &[(1, 1, 0), (5, 33, 2), (70, 129, 0)],
            );
        }
    }

    #[test]
    fn figures_and_what_is_not_finite() {
        for dev in cpus() {
            optimiser::figures_are_sums_in_f64(&dev, dev.level().name());
            optimiser::nothing_is_updated_where_the_figures_are_not_finite(&dev, dev.level().name());
        }
    }

    #[test]
    fn the_norm_does_not_depend_on_threads() {
        let x = tensor(&thread_counts()[0], 33, 1001, DType::F32, &normal(5, 33 * 1001));
        let norms: Vec<f64> = thread_counts().iter().map(|d| norm2(d, &[&x])).collect();
        assert!(norms.iter().all(|n| n.to_bits() == norms[0].to_bits()), "{norms:?}");
    }
}
