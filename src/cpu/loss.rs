//! The head and its cross-entropy in chunks of supervised rows: the logits never exist whole.

use super::Cpu;
use super::buffer::{elems, elems_mut, view};
use super::elem::{Elem, View};
use super::level::multiversion;
use super::matmul::{Dest, Product, Shape, product};
use super::pack::Operand;
use super::threads::chunked;
use super::vector::{LANES, exp, sum_lanes};
use crate::backend::{HeadGrads, HeadLoss, Write};
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};
use half::bf16;

/// Rows of a chunk. More rows read and write `dw` and pack `w` less often; fewer take less memory.
pub const CHUNK: usize = 512;

/// What a row of logits gives.
#[derive(Clone, Copy, Default)]
struct RowLoss {
    loss: f32,
    correct: bool,
    /// 1 over the sum of the exponentials.
    normalizer: f32,
}

multiversion! {
    /// Loss of one row; the logits become `exp(logit - max)`.
    fn softmax_row(logits: &mut [f32], target: usize) -> RowLoss {
        let larger = |m: f32, x: f32| if x > m || x.is_nan() { x } else { m };
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let chunks = logits.chunks_exact(LANES);
        let rest = chunks.remainder();
        for x in chunks {
            for l in 0..LANES {
                lanes[l] = larger(lanes[l], x[l]);
            }
        }
        let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &x| larger(m, x));
        let logit = logits[target];
        // The lowest class wins a tie.
        let correct = logit == max && logits[..target].iter().all(|&x| x != max);
        let mut lanes = [0.0f32; LANES];
        let mut chunks = logits.chunks_exact_mut(LANES);
        for x in &mut chunks {
            for l in 0..LANES {
                x[l] = exp::<I>(x[l] - max);
                lanes[l] += x[l];
            }
        }
        for (x, sum) in chunks.into_remainder().iter_mut().zip(&mut lanes) {
            *x = exp::<I>(*x - max);
            *sum += *x;
        }
        let sum = sum_lanes(lanes);
        RowLoss { loss: max + sum.ln() - logit, correct, normalizer: 1.0 / sum }
    }
}

multiversion! {
    fn scaled[G: Elem](out: &mut [G], x: &[f32], by: f32) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = G::put(x * by);
        }
    }
}

multiversion! {
    fn scale_row(x: &mut [f32], by: f32) {
        for x in x {
            *x *= by;
        }
    }
}

pub fn linear_cross_entropy(
    dev: &Cpu,
    loss: &mut Tensor<Cpu>,
    correct: Option<&mut Tensor<Cpu>>,
    grads: HeadGrads<'_, Cpu>,
    of: HeadLoss<'_, Cpu>,
) -> Result<()> {
    of.check("cross entropy", loss, correct.as_deref(), &grads);
    let HeadLoss { x, w, batch, n_classes: classes, scale } = of;
    let HeadGrads { mut dx, mut dw, first_row } = grads;
    let c = x.cols();
    // Rows of dw beyond the classes belong to padding of the vocabulary and have no gradient.
    let first = first_row.min(classes);
    let tail = dw.as_ref().map_or(0, |dw| (first_row + dw.rows()).min(classes).max(first) - first);
    let targets = elems::<i32>(&batch.targets);
    let rows: Vec<usize> = elems::<i32>(&batch.rows).iter().map(|&i| i as usize).collect();
    for &i in &rows {
        assert!(
            (0..classes as i32).contains(&targets[i]),
            "cross entropy: target {} at position {i} outside 0..{classes}",
            targets[i]
        );
    }
    let loss: &mut [f32] = elems_mut(loss);
    loss.fill(0.0);
    let mut correct = correct.map(elems_mut::<f32>);
    if let Some(c) = &mut correct {
        c.fill(0.0);
    }
    if let Some(dx) = &mut dx {
        super::elementwise::fill_zero(dev, dx);
    }
    let gradient = dx.is_some() || dw.is_some();
    let both_bf16 = x.dtype() == DType::Bf16 || w.dtype() == DType::Bf16;
    let mut scratch = dev.scratch.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (mut kept, mut kept_gradients) = (std::mem::take(&mut scratch.logits), std::mem::take(&mut scratch.gradients));
    let most = CHUNK.min(rows.len());
    let logits = kept.elems::<f32>(most * classes);
    // Products with a bf16 operand round the gradients anyway: rounding them once here halves the memory they move.
    let apart = gradient && both_bf16;
    let gradients = kept_gradients.elems::<bf16>(if apart { most * classes } else { 0 });
    let mut gathered = dev.alloc(most, c, x.dtype())?;
    let mut gathered_dx = vec![0.0f32; if dx.is_some() { most * c } else { 0 }];
    let mut results = vec![RowLoss::default(); most];
    for chunk in rows.chunks(CHUNK) {
        let m = chunk.len();
        let logits = &mut logits[..m * classes];
        let width = c * x.dtype().bytes();
        dev.pool.split(chunked(&mut gathered.buf.bytes_mut()[..m * width], width), |i, row| {
            row.copy_from_slice(&x.buf.bytes()[chunk[i] * width..(chunk[i] + 1) * width]);
        });
        gathered.set_rows(m);
        let xs = view(&gathered);
        let operand = |data, major_stride, k_stride| Operand { data, major_stride, k_stride };
        let of =
            |a, b, (m, n, k), write| Product { a, b, shape: Shape { m, n, k }, bf16: both_bf16, alpha: 1.0, write };
        let (a, b) = (operand(xs, c, 1), operand(view(w), c, 1));
        product(dev, &mut scratch, Dest::F32(logits), of(a, b, (m, classes, c), Write::Set));
        dev.pool.split((chunked(logits, classes), chunked(&mut results[..m], 1)), |i, (logits, result)| {
            result[0] = softmax_row(dev.level, logits, targets[chunk[i]] as usize);
        });
        for (&i, result) in chunk.iter().zip(&results) {
            loss[i] = result.loss;
            if let Some(correct) = &mut correct {
                correct[i] = f32::from(result.correct);
            }
        }
        if !gradient {
            continue;
        }
        let how_row = |i: usize| (scale * results[i].normalizer, targets[chunk[i]] as usize);
        let ds = if apart {
            let gradients = &mut gradients[..m * classes];
            dev.pool.split(chunked(gradients, classes), |i, row| {
                let ((by, target), x) = (how_row(i), &logits[i * classes..(i + 1) * classes]);
                scaled(dev.level, row, x, by);
                row[target] = bf16::put(x[target] * by - scale);
            });
            View::Bf16(gradients)
        } else {
            dev.pool.split(chunked(logits, classes), |i, row| {
                let (by, target) = how_row(i);
                scale_row(dev.level, row, by);
                row[target] -= scale;
            });
            View::F32(logits)
        };
        if let Some(dx) = &mut dx {
            let out = &mut gathered_dx[..m * c];
            let (a, b) = (operand(ds, classes, 1), operand(view(w), 1, c));
            product(dev, &mut scratch, Dest::F32(out), of(a, b, (m, c, classes), Write::Set));
            match dx.dtype() {
                DType::F32 => scatter(elems_mut::<f32>(dx), out, chunk, c),
                _ => scatter(elems_mut::<bf16>(dx), out, chunk, c),
            }
        }
        if let (Some(dw), true) = (&mut dw, tail > 0) {
            let ds = match ds {
                View::F32(ds) => View::F32(&ds[first..]),
                View::Bf16(ds) => View::Bf16(&ds[first..]),
            };
            let out = &mut elems_mut::<f32>(dw)[..tail * c];
            let (a, b) = (operand(ds, 1, classes), operand(xs, 1, c));
            product(dev, &mut scratch, Dest::F32(out), of(a, b, (tail, c, m), Write::Add));
        }
    }
    scratch.gradients = kept_gradients;
    scratch.logits = kept;
    Ok(())
}

fn scatter<E: Elem>(dst: &mut [E], src: &[f32], rows: &[usize], c: usize) {
    for (&i, src) in rows.iter().zip(src.chunks_exact(c)) {
        dst[i * c..(i + 1) * c].iter_mut().zip(src).for_each(|(d, s)| *d = E::put(*s));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::batch::IGNORE;
    use crate::cpu::testing::{assert_close, cpus, loaded, normal, rounded, stored, tensor, thread_counts, values};

    /// Classes, factor, and the first row that dw covers.
    #[derive(Clone, Copy)]
    struct How {
        n_classes: usize,
        scale: f32,
        first_row: usize,
    }

    struct Expected {
        loss: Vec<f64>,
        dx: Vec<f64>,
        dw: Vec<f64>,
    }

    fn reference(x: &[f64], w: &[f64], targets: &[i32], c: usize, how: How, round: impl Fn(f64) -> f64) -> Expected {
        let (n, v) = (targets.len(), how.n_classes);
        let mut e = Expected { loss: vec![0.0; n], dx: vec![0.0; n * c], dw: vec![0.0; w.len()] };
        for (i, &target) in targets.iter().enumerate().filter(|&(_, &t)| t != IGNORE) {
            let logit = |j: usize| (0..c).fold(0.0, |s, l| round(s + round(x[i * c + l] * w[j * c + l])));
            let logits: Vec<f64> = (0..v).map(logit).collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum = logits.iter().fold(0.0, |s, l| round(s + round((l - max).exp())));
            e.loss[i] = round(round(max + round(sum.ln())) - logits[target as usize]);
            for j in 0..v {
                let p = round(round((logits[j] - max).exp()) / sum);
                let d = round(f64::from(how.scale) * (p - f64::from(u8::from(j == target as usize))));
                for l in 0..c {
                    e.dx[i * c + l] = round(e.dx[i * c + l] + round(d * w[j * c + l]));
                    e.dw[j * c + l] = round(e.dw[j * c + l] + round(d * x[i * c + l]));
                }
            }
        }
        e
    }

    fn run(dev: &Cpu, dtype: DType, x: &[f32], w: &[f32], targets: &[i32], how: How, rows: usize) -> [Vec<f32>; 4] {
        let (n, c) = (targets.len(), x.len() / targets.len());
        let (xt, wt) = (tensor(dev, n, c, dtype, x), tensor(dev, w.len() / c, c, dtype, w));
        let mut loss = tensor(dev, n, 1, DType::F32, &vec![9.0; n]);
        let mut correct = tensor(dev, n, 1, DType::F32, &vec![9.0; n]);
        let mut dx = tensor(dev, n, c, dtype, &vec![9.0; n * c]);
        let mut dw = tensor(dev, rows, c, DType::F32, &vec![0.5; rows * c]);
        let t = loaded(dev, &vec![0; n], targets, &vec![0; n]);
        let How { n_classes, scale, first_row } = how;
        let grads = HeadGrads { dx: Some(&mut dx), dw: Some(&mut dw), first_row };
        let of = HeadLoss { x: &xt, w: &wt, batch: &t, n_classes, scale };
        dev.linear_cross_entropy(&mut loss, Some(&mut correct), grads, of).unwrap();
        [&loss, &correct, &dx, &dw].map(|t| values(dev, t))
    }

    #[test]
    fn loss_and_gradients_follow_the_formula() {
        for dev in cpus() {
            for dtype in [DType::F32, DType::Bf16] {
                for (n, v, c) in [(1, 3, 8), (7, 50, 24), (33, 131, 40)] {
                    let (x, w) = (normal(1, n * c), normal(2, (v + 5) * c));
                    let targets: Vec<i32> =
                        (0..n).map(|i| if i % 3 == 1 { IGNORE } else { (i * 37 % v) as i32 }).collect();
                    // Five padding rows stay out of the softmax; dw covers rows from 2 on.
                    let how = How { n_classes: v, scale: 0.25, first_row: 2 };
                    let [loss, correct, dx, dw] = run(&dev, dtype, &x, &w, &targets, how, v + 3);
                    let (xs, ws) = (stored(dtype, &x), stored(dtype, &w));
                    let exact = reference(&xs, &ws, &targets, c, how, |x| x);
                    let plain = reference(&xs, &ws, &targets, c, how, |x| rounded(dtype, x));
                    let what = format!("{:?} {dtype:?} {n}x{v}x{c}", dev.level());
                    assert_close(&format!("{what} loss"), &loss, &exact.loss, &plain.loss, DType::F32);
                    assert_close(&format!("{what} dx"), &dx, &exact.dx, &plain.dx, dtype);
                    let shift = |x: &[f64]| -> Vec<f64> { x[2 * c..].iter().map(|x| x + 0.5).collect() };
                    assert_close(&format!("{what} dw"), &dw, &shift(&exact.dw), &shift(&plain.dw), DType::F32);
                    for i in 0..n {
                        let logit = |j: usize| -> f64 { (0..c).map(|l| xs[i * c + l] * ws[j * c + l]).sum() };
                        let best = (0..v).rev().max_by(|&a, &b| logit(a).total_cmp(&logit(b))).unwrap();
                        assert_eq!(correct[i], f32::from(targets[i] == best as i32), "{what} correct {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn ties_go_to_the_lowest_class_and_nan_stays_visible() {
        for dev in cpus() {
            let w = vec![1.0; 40];
            for (target, expected) in [(0, 1.0), (1, 0.0), (39, 0.0)] {
                let how = How { n_classes: 40, scale: 1.0, first_row: 0 };
                let [loss, correct, ..] = run(&dev, DType::F32, &[2.0], &w, &[target], how, 40);
                assert_eq!(correct, [expected]);
                assert!((loss[0] - 40f32.ln()).abs() < 1e-6);
                let [loss, correct, ..] = run(&dev, DType::F32, &[f32::NAN], &w, &[target], how, 40);
                assert!(loss[0].is_nan() && correct == [0.0]);
            }
        }
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_the_rows_around() {
        let (n, v, c) = (300, 97, 16);
        let (x, w) = (normal(3, n * c), normal(4, v * c));
        let targets: Vec<i32> = (0..n).map(|i| if i % 9 == 0 { IGNORE } else { (i % v) as i32 }).collect();
        let how = How { n_classes: v, scale: 1.0, first_row: 0 };
        let devs = thread_counts();
        let first = run(&devs[0], DType::Bf16, &x, &w, &targets, how, v);
        for dev in &devs {
            assert_eq!(run(dev, DType::Bf16, &x, &w, &targets, how, v), first);
            let [loss, _, dx, _] = run(dev, DType::Bf16, &x[100 * c..110 * c], &w, &targets[100..110], how, v);
            assert_eq!(loss, first[0][100..110]);
            assert_eq!(dx, first[2][100 * c..110 * c]);
        }
    }
}
