//! What every device's head and its loss are held to.

use ringtune::backend::{Backend, HeadGrads, HeadLoss};
use ringtune::batch::IGNORE;
use ringtune::tensor::DType;

use super::batches::loaded;
use super::close::{assert_close, normal, rounded, stored, tensor, values};

/// Classes, factor, and the first row that dw covers.
#[derive(Clone, Copy)]
pub struct How {
    pub n_classes: usize,
    pub scale: f32,
    pub first_row: usize,
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

/// Loss, correct, dx, and dw of `rows` rows.
pub fn run<B: Backend>(
    dev: &B,
    dtype: DType,
    x: &[f32],
    w: &[f32],
    targets: &[i32],
    how: How,
    rows: usize,
) -> [Vec<f32>; 4] {
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
    let all = [&loss, &correct, &dx, &dw].map(|t| values(dev, t));
    // The same loss without gradients, and without counting.
    let mut alone = tensor(dev, n, 1, DType::F32, &vec![9.0; n]);
    dev.linear_cross_entropy(&mut alone, None, HeadGrads::none(), of).unwrap();
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&values(dev, &alone)), bits(&all[0]), "the loss does not depend on its gradients");
    all
}

/// Tokens, classes, width.
pub const SHAPES: [(usize, usize, usize); 3] = [(1, 3, 8), (7, 50, 24), (33, 131, 40)];

/// Loss, right classes and gradients of random logits, of `factor` times the usual size.
pub fn loss_and_gradients_follow_the_formula<B: Backend>(
    dev: &B,
    name: &str,
    shapes: &[(usize, usize, usize)],
    factor: f32,
) {
    for dtype in [DType::F32, DType::Bf16] {
        for &(n, v, c) in shapes {
            let (x, w) = (normal(1, n * c), normal(2, (v + 5) * c));
            let x: Vec<f32> = x.iter().map(|x| x * factor).collect();
            let targets: Vec<i32> = (0..n).map(|i| if i % 3 == 1 { IGNORE } else { (i * 37 % v) as i32 }).collect();
            // Five padding rows stay out of the softmax; dw covers rows from 2 on.
            let how = How { n_classes: v, scale: 0.25, first_row: 2 };
            let [loss, correct, dx, dw] = run(dev, dtype, &x, &w, &targets, how, v + 3);
            let (xs, ws) = (stored(dtype, &x), stored(dtype, &w));
            let exact = reference(&xs, &ws, &targets, c, how, |x| x);
            let plain = reference(&xs, &ws, &targets, c, how, |x| rounded(dtype, x));
            let what = format!("{name} {dtype:?} {n}x{v}x{c} by {factor}");
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

/// Equal logits, and logits that are none.
pub fn ties_go_to_the_lowest_class_and_nan_stays_visible<B: Backend>(dev: &B, name: &str) {
    let w = vec![1.0; 40];
    for (target, expected) in [(0, 1.0), (1, 0.0), (39, 0.0)] {
        let how = How { n_classes: 40, scale: 1.0, first_row: 0 };
        let [loss, correct, ..] = run(dev, DType::F32, &[2.0], &w, &[target], how, 40);
        assert_eq!(correct, [expected], "{name}");
        assert!((loss[0] - 40f32.ln()).abs() < 1e-6, "{name}");
        let [loss, correct, ..] = run(dev, DType::F32, &[f32::NAN], &w, &[target], how, 40);
        assert!(loss[0].is_nan() && correct == [0.0], "{name}");
    }
    // One class that is none spoils the row, however large the target's logit is.
    let mut w: Vec<f32> = (0..40).map(|i| if i == 7 { 9.0 } else { 1.0 }).collect();
    w[30] = f32::NAN;
    let how = How { n_classes: 40, scale: 1.0, first_row: 0 };
    let [loss, correct, ..] = run(dev, DType::F32, &[2.0], &w, &[7], how, 40);
    assert!(loss[0].is_nan() && correct == [0.0], "{name}");
}

/// A row's loss and gradient are the same bits with other rows around it; gives all of them.
pub fn bits_do_not_depend_on_the_rows_around<B: Backend>(dev: &B, name: &str, n: usize, v: usize) -> [Vec<f32>; 4] {
    let c = 16;
    let (x, w) = (normal(3, n * c), normal(4, v * c));
    let targets: Vec<i32> = (0..n).map(|i| if i % 9 == 0 { IGNORE } else { (i % v) as i32 }).collect();
    let how = How { n_classes: v, scale: 1.0, first_row: 0 };
    let first = run(dev, DType::Bf16, &x, &w, &targets, how, v);
    // The first rows, ones in the middle, the last ones, which may lie in another chunk.
    for from in [0, n / 3, n - 10] {
        let to = from + 10;
        let [loss, correct, dx, _] = run(dev, DType::Bf16, &x[from * c..to * c], &w, &targets[from..to], how, v);
        assert_eq!(loss, first[0][from..to], "{name}: rows from {from} on");
        assert_eq!(correct, first[1][from..to], "{name}: rows from {from} on");
        assert_eq!(dx, first[2][from * c..to * c], "{name}: rows from {from} on");
    }
    first
}
