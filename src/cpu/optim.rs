//! The optimiser's passes over all weights: AdamW in one pass, and the squared norm of the gradients.

use half::bf16;

use std::ops::Range;

use super::Cpu;
use super::buffer::{elems, elems_mut, view};
use super::elem::{Elem, View};
use super::elementwise::{TASK, piece};
use super::level::multiversion;
use super::threads::{SharedMut, chunked};
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

/// Sums of squares of the blocks of each part, which begins with one: all of them in one pass.
pub fn all_blocks(dev: &Cpu, parts: &[(&Tensor<Cpu>, Range<usize>)]) -> Vec<f64> {
    let ends = ends(parts.iter().map(|(_, range)| range.len().div_ceil(TASK)));
    let views: Vec<View<'_>> = parts.iter().map(|(t, _)| view(t)).collect();
    let mut sums = vec![0.0f64; ends.last().copied().unwrap_or(0)];
    dev.pool.split(chunked(&mut sums, 1), |task, sum| {
        let (which, block) = place(&ends, task);
        let range = parts[which].1.clone();
        sum[0] = match views[which] {
            View::F32(x) => squares(dev.level, piece(&x[range], block, TASK)),
            View::Bf16(x) => squares(dev.level, piece(&x[range], block, TASK)),
        };
    });
    sums
}

pub fn norm2(dev: &Cpu, tensors: &[&Tensor<Cpu>]) -> f64 {
    let parts: Vec<_> = tensors.iter().map(|t| (*t, 0..t.len())).collect();
    let sums = all_blocks(dev, &parts);
    let mut rest = &sums[..];
    tensors.iter().fold(0.0, |total, t| {
        let (own, more) = rest.split_at(t.len().div_ceil(TASK));
        rest = more;
        total + own.iter().sum::<f64>()
    })
}

/// One past the last task of each part, in one row of tasks.
fn ends(tasks: impl Iterator<Item = usize>) -> Vec<usize> {
    tasks.scan(0, |end, n| (*end += n, Some(*end)).1).collect()
}

/// The part that a task belongs to, and its number there.
fn place(ends: &[usize], task: usize) -> (usize, usize) {
    let which = ends.partition_point(|&end| end <= task);
    (which, task - if which == 0 { 0 } else { ends[which - 1] })
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
    /// Updates `master` from its gradient, and writes it rounded to `p` where `p` is not empty. `first`: the moments are zero, whatever
    /// stands there.
    fn update[P: Elem](p: &mut [P], master: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], s: Scalars, first: bool) {
        let rounded = !p.is_empty();
        for (((w, m), v), g) in master.iter_mut().zip(m).zip(v).zip(g) {
            let g = g * s.grad_scale;
            let (m0, v0) = if first { (0.0, 0.0) } else { (*m, *v) };
            *m = I::fma(s.beta1, m0, s.one_minus_beta1 * g);
            *v = I::fma(s.beta2, v0, s.one_minus_beta2 * g * g);
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

/// What a slot's tasks write, each a piece of it.
struct Update<'a> {
    /// The bf16 weights; `None` where they are their own masters.
    rounded: Option<SharedMut<bf16>>,
    master: SharedMut<f32>,
    m: SharedMut<f32>,
    v: SharedMut<f32>,
    g: &'a [f32],
    scalars: Scalars,
    /// Whether the moments are zeros that nobody wrote.
    first: bool,
}

impl<'a> Update<'a> {
    fn new(slot: &'a mut AdamWSlot<'_, Cpu>, step: &AdamWStep, grad_scale: f32) -> Self {
        slot.check("adamw");
        let (lr, weight_decay) = slot.rates(step);
        let AdamWSlot { p, master, m, v, g, first_row, range, .. } = slot;
        let scalars = Scalars {
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
        let own = first + range.start..first + range.end;
        let (rounded, master) = match master {
            None => (None, &mut elems_mut::<f32>(p)[own]),
            Some(master) => (Some(SharedMut::new(&mut elems_mut::<bf16>(p)[own])), elems_mut::<f32>(master)),
        };
        assert!([master.len(), m.len(), v.len()] == [range.len(); 3], "adamw: elements of the state");
        let zeros = [&mut **m, &mut **v].map(|t| t.buf.overwrites_zeros(t.len() * size_of::<f32>()));
        let first = zeros == [true; 2];
        // Of one alone they are written.
        for (t, _) in [&mut **m, &mut **v].into_iter().zip(zeros).filter(|(_, zero)| *zero && !first) {
            elems_mut::<f32>(t).fill(0.0);
        }
        let [master, m, v] = [master, elems_mut::<f32>(m), elems_mut::<f32>(v)].map(SharedMut::new);
        Self { rounded, master, m, v, g: &elems(g)[range.clone()], scalars, first }
    }
}

/// Updates all slots in one pass.
pub fn adamw(dev: &Cpu, slots: &mut [AdamWSlot<'_, Cpu>], step: AdamWStep, grad_scale: f32) {
    let updates: Vec<Update<'_>> = slots.iter_mut().map(|slot| Update::new(slot, &step, grad_scale)).collect();
    let ends = ends(updates.iter().map(|u| u.g.len().div_ceil(UPDATE)));
    dev.pool.run(ends.last().copied().unwrap_or(0), &|task| {
        let (which, block) = place(&ends, task);
        let u = &updates[which];
        let (first, g) = (block * UPDATE, piece(u.g, block, UPDATE));
        // SAFETY: all are as long as `g`, and this piece of them belongs to this task.
        unsafe {
            let [master, m, v] = [u.master, u.m, u.v].map(|x| x.slice(first, g.len()));
            match u.rounded {
                None => update::<f32>(dev.level, &mut [], master, m, v, g, u.scalars, u.first),
                Some(p) => update(dev.level, p.slice(first, g.len()), master, m, v, g, u.scalars, u.first),
            }
        }
    });
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
    fn tasks_have_their_places() {
        let ends = ends([2, 0, 3, 1].into_iter());
        assert_eq!(
            (0..6).map(|t| place(&ends, t)).collect::<Vec<_>>(),
            [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2), (3, 0)]
        );
    }

    #[test]
    fn the_norm_does_not_depend_on_threads() {
        let x = tensor(&thread_counts()[0], 33, 1001, DType::F32, &normal(5, 33 * 1001));
        let norms: Vec<f64> = thread_counts().iter().map(|d| norm2(d, &[&x])).collect();
        assert!(norms.iter().all(|n| n.to_bits() == norms[0].to_bits()), "{norms:?}");
    }
}
