//! The head and its cross-entropy in chunks of supervised rows: the logits never exist whole.

use super::Cpu;
use super::buffer::{elems, elems_mut, view};
use super::elem::{Elem, View};
use super::kept::Weight;
use super::kernels::Micro;
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
    /// `x · by`, at the target less `less`: the gradient of a row, in place of its exponentials.
    fn gradient_row(x: &mut [f32], by: f32, target: usize, less: f32) {
        for x in &mut *x {
            *x *= by;
        }
        x[target] -= less;
    }
}

multiversion! {
    /// The same rounded to bf16, in the first half of the row's memory.
    fn narrow_gradient_row(x: &mut [f32], by: f32, target: usize, less: f32) {
        const BLOCK: usize = 256;
        let at_target = x[target] * by - less;
        let mut rounded = [bf16::ZERO; BLOCK];
        for first in (0..x.len()).step_by(BLOCK) {
            let block = first..(first + BLOCK).min(x.len());
            let n = block.len();
            for (out, x) in rounded.iter_mut().zip(&x[block.clone()]) {
                *out = bf16::put(x * by);
            }
            // These halves of words were read before.
            bytemuck::cast_slice_mut::<f32, bf16>(x)[block].copy_from_slice(&rounded[..n]);
        }
        bytemuck::cast_slice_mut::<f32, bf16>(x)[target] = bf16::put(at_target);
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
    let micro = Micro::new(dev.level, both_bf16);
    let mut scratch = dev.scratch.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut kept = std::mem::take(&mut scratch.logits);
    let most = CHUNK.min(rows.len());
    let logits = kept.elems::<f32>(most * classes);
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
        let b = Weight::of(dev, w, &micro, true, classes, c);
        product(dev, &mut scratch, Dest::F32(logits), of(operand(xs, c, 1), b, (m, classes, c), Write::Set));
        // A row's gradient is formed while the row is in the caches.
        dev.pool.split((chunked(logits, classes), chunked(&mut results[..m], 1)), |i, (row, result)| {
            let target = targets[chunk[i]] as usize;
            result[0] = softmax_row(dev.level, row, target);
            let by = scale * result[0].normalizer;
            match (gradient, both_bf16) {
                (false, _) => {}
                // Products with a bf16 operand round the gradients anyway: rounding them once here halves the memory they move.
                (true, true) => narrow_gradient_row(dev.level, row, by, target, scale),
                (true, false) => gradient_row(dev.level, row, by, target, scale),
            }
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
        let (ds, pitch) = match both_bf16 {
            true => (View::Bf16(bytemuck::cast_slice(logits)), 2 * classes),
            false => (View::F32(logits), classes),
        };
        if let Some(dx) = &mut dx {
            let out = &mut gathered_dx[..m * c];
            let b = Weight::of(dev, w, &micro, false, c, classes);
            product(dev, &mut scratch, Dest::F32(out), of(operand(ds, pitch, 1), b, (m, c, classes), Write::Set));
            match dx.dtype() {
                DType::F32 => scatter(elems_mut::<f32>(dx), out, chunk, c),
                _ => scatter(elems_mut::<bf16>(dx), out, chunk, c),
            }
        }
        if let (Some(dw), true) = (&mut dw, tail > 0) {
            // All of the gradient is written where it is zero so far.
            let write = if dw.buf.overwrites_zeros(tail * c * size_of::<f32>()) { Write::Set } else { Write::Add };
            let out = &mut elems_mut::<f32>(dw)[..tail * c];
            let (a, b) = (operand(ds.from(first), 1, pitch), operand(xs, 1, c));
            product(dev, &mut scratch, Dest::F32(out), of(a, b.into(), (tail, c, m), write));
        }
    }
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
    use crate::cpu::testing::head::{self, How, SHAPES};
    use crate::cpu::testing::{cpus, normal, thread_counts, thread_counts_of_levels};
    use crate::tensor::DType;

    #[test]
    fn loss_and_gradients_follow_the_formula() {
        for dev in cpus() {
            for factor in [1.0, 30.0] {
                head::loss_and_gradients_follow_the_formula(&dev, dev.level().name(), &SHAPES, factor);
            }
        }
    }

    #[test]
    fn ties_go_to_the_lowest_class_and_nan_stays_visible() {
        for dev in cpus() {
            head::ties_go_to_the_lowest_class_and_nan_stays_visible(&dev, dev.level().name());
        }
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_the_rows_around() {
        for devs in thread_counts_of_levels() {
            let first = head::bits_do_not_depend_on_the_rows_around(&devs[0], "one thread", 300, 97);
            for dev in &devs[1..] {
                let again = head::bits_do_not_depend_on_the_rows_around(dev, "more threads", 300, 97);
                assert_eq!(again, first, "{}, {} threads", dev.level().name(), dev.threads());
            }
        }
    }

    #[test]
    fn a_row_without_a_target_has_neither_loss_nor_gradient() {
        let (x, w) = (normal(1, 4 * 8), normal(2, 5 * 8));
        let how = How { n_classes: 5, scale: 1.0, first_row: 0 };
        let none = [crate::batch::IGNORE; 4];
        let [loss, correct, dx, dw] = head::run(&thread_counts()[0], DType::F32, &x, &w, &none, how, 5);
        assert_eq!((loss, correct, dx, dw), (vec![0.0; 4], vec![0.0; 4], vec![0.0; 32], vec![0.5; 40]));
    }
}
