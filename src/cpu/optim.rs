//! The optimiser's passes over all weights: AdamW in one pass, and the squared norm of the gradients.

use half::bf16;

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

pub fn norm2(dev: &Cpu, tensors: &[&Tensor<Cpu>]) -> f64 {
    let mut total = 0.0;
    for t in tensors {
        let mut parts = vec![0.0f64; t.len().div_ceil(TASK)];
        typed!(x = t, => dev.pool.split(chunked(&mut parts, 1), |i, part| part[0] = squares(dev.level, piece(x, i, TASK))));
        total += parts.iter().sum::<f64>();
    }
    total
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
    let AdamWSlot { p, master, m, v, g, first_row, .. } = slot;
    let first_row = *first_row;
    let (rows, cols) = g.shape();
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
    let range = first_row * cols..(first_row + rows) * cols;
    let g: &[f32] = elems(g);
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
    use crate::backend::{Backend, HostStats};
    use crate::cpu::testing::{assert_close, cpus, normal, rounded, stored, tensor, thread_counts, values};
    use crate::tensor::DType;

    const STEP: AdamWStep = AdamWStep {
        lr: 0.01,
        beta1: 0.9,
        beta2: 0.99,
        one_minus_beta1: 0.1,
        one_minus_beta2: 0.01,
        eps: 1e-6,
        weight_decay: 0.1,
        bias_correction1: 0.19,
        bias_correction2: 0.0199,
    };
    const CLIP: f32 = 0.5;

    /// (p, m, v) after one update by algorithm 2 of the paper.
    fn reference(p: f64, m: f64, v: f64, g: f64, round: impl Fn(f64) -> f64) -> [f64; 3] {
        let s = |x: f32| f64::from(x);
        let g = round(g * s(CLIP));
        let m = round(round(s(STEP.beta1) * m) + round(s(STEP.one_minus_beta1) * g));
        let v = round(round(s(STEP.beta2) * v) + round(s(STEP.one_minus_beta2) * round(g * g)));
        let (mean, square) = (round(m / s(STEP.bias_correction1)), round(v / s(STEP.bias_correction2)));
        let p = round(p * round(1.0 - round(f64::from(STEP.lr as f32) * s(STEP.weight_decay))));
        [round(p - round(round(f64::from(STEP.lr as f32) * mean) / round(square.sqrt() + s(STEP.eps)))), m, v]
    }

    #[test]
    fn adamw_updates_the_rows_it_is_given() {
        for dev in cpus().iter().chain(&thread_counts()) {
            for dtype in [DType::F32, DType::Bf16] {
                for (rows, cols, first) in [(1, 1, 0), (5, 33, 2), (70, 129, 0)] {
                    let n = rows * cols;
                    let (p, m, g) = (normal(1, (rows + first) * cols), normal(2, n), normal(3, n));
                    let v: Vec<f32> = normal(4, n).iter().map(|x| x * x).collect();
                    let mut pt = tensor(dev, rows + first, cols, dtype, &p);
                    let [mut mt, mut vt, gt] = [&m, &v, &g].map(|x| tensor(dev, rows, cols, DType::F32, x));
                    let mut master = tensor(dev, rows, cols, DType::F32, &p[first * cols..]);
                    let own = (dtype == DType::Bf16).then_some(&mut master);
                    let slot = AdamWSlot {
                        p: &mut pt,
                        master: own,
                        m: &mut mt,
                        v: &mut vt,
                        g: &gt,
                        first_row: first,
                        decays: true,
                        lr_scale: 1.0,
                    };
                    let stats = HostStats { clip: f64::from(CLIP), ..Default::default() };
                    dev.adamw_all(&stats, &mut [slot], STEP).unwrap();
                    let after = values(dev, &pt);
                    let kept: Vec<f64> = after[..first * cols].iter().map(|&x| f64::from(x)).collect();
                    assert_eq!(kept, stored(dtype, &p[..first * cols]), "rows before first_row stay");
                    let p = stored(DType::F32, &p[first * cols..]);
                    let [m, v, g] = [&m, &v, &g].map(|x| stored(DType::F32, x));
                    let at = |i: usize, which: usize, round: &dyn Fn(f64) -> f64| {
                        reference(p[i], m[i], v[i], g[i], round)[which]
                    };
                    let updated =
                        if dtype == DType::Bf16 { values(dev, &master) } else { after[first * cols..].to_vec() };
                    for (which, ours) in [(0, updated), (1, values(dev, &mt)), (2, values(dev, &vt))] {
                        let exact: Vec<f64> = (0..n).map(|i| at(i, which, &|x| x)).collect();
                        let plain: Vec<f64> = (0..n).map(|i| at(i, which, &|x| rounded(DType::F32, x))).collect();
                        let what = format!("{:?} {dtype:?} {rows}x{cols} {}", dev.level(), ["p", "m", "v"][which]);
                        assert_close(&what, &ours, &exact, &plain, DType::F32);
                        if which == 0 {
                            let expected: Vec<f32> =
                                ours.iter().map(|&x| rounded(dtype, f64::from(x)) as f32).collect();
                            assert_eq!(after[first * cols..], expected, "p is the master, rounded");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn norm2_is_exact_for_integers_and_shows_what_is_not_finite() {
        for dev in cpus() {
            let x: Vec<f32> = (0..40_000).map(|i| (i % 13) as f32 - 6.0).collect();
            let expected: f64 = x.iter().map(|&x| f64::from(x * x)).sum();
            let (a, b) = (tensor(&dev, 40, 1000, DType::F32, &x), tensor(&dev, 1000, 40, DType::Bf16, &x));
            assert_eq!(norm2(&dev, &[&a, &b]), 2.0 * expected);
            assert_eq!(norm2(&dev, &[]), 0.0);
            let c = tensor(&dev, 1, 3, DType::F32, &[1.0, f32::NAN, 2.0]);
            assert!(norm2(&dev, &[&a, &c]).is_nan());
        }
        let x = tensor(&thread_counts()[0], 33, 1001, DType::F32, &normal(5, 33 * 1001));
        let norms: Vec<f64> = thread_counts().iter().map(|d| norm2(d, &[&x])).collect();
        assert!(norms.iter().all(|n| n.to_bits() == norms[0].to_bits()), "{norms:?}");
    }
}
