//! What every device's AdamW and its figures of a step are held to.

use ringtune::backend::{AdamWSlot, AdamWStep, Backend, Figures};
use ringtune::tensor::{DType, Tensor};

use super::close::{assert_close, normal, rounded, stored, tensor, values};

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
fn reference([p, m, v, g]: [f64; 4], lr: f32, decay: f32, round: &dyn Fn(f64) -> f64) -> [f64; 3] {
    let s = |x: f32| f64::from(x);
    let g = round(g * s(CLIP));
    let m = round(round(s(STEP.beta1) * m) + round(s(STEP.one_minus_beta1) * g));
    let v = round(round(s(STEP.beta2) * v) + round(s(STEP.one_minus_beta2) * round(g * g)));
    let (mean, square) = (round(m / s(STEP.bias_correction1)), round(v / s(STEP.bias_correction2)));
    let p = round(p * round(1.0 - round(s(lr) * s(decay))));
    [round(p - round(round(s(lr) * mean) / round(square.sqrt() + s(STEP.eps)))), m, v]
}

/// Figures whose clip factor is [`CLIP`].
fn clipping<B: Backend>(dev: &B) -> B::Stats {
    let mut stats = dev.new_stats().unwrap();
    let one = tensor(dev, 1, 1, DType::F32, &[1.0]);
    dev.grad_norm2(&mut stats, &[&one]).unwrap();
    dev.set_clip(&mut stats, Some(f64::from(CLIP) * (1.0 + 1e-6))).unwrap();
    stats
}

/// A tensor with its state.
struct Trained<B: Backend> {
    p: Tensor<B>,
    master: Option<Tensor<B>>,
    m: Tensor<B>,
    v: Tensor<B>,
    g: Tensor<B>,
    first_row: usize,
    decays: bool,
    lr_scale: f64,
    /// p from `first_row` on, m, v and g as they were.
    before: [Vec<f64>; 4],
    kept: Vec<f64>,
}

impl<B: Backend> Trained<B> {
    fn new(dev: &B, dtype: DType, (rows, cols, first_row): (usize, usize, usize), decays: bool, lr_scale: f64) -> Self {
        let n = rows * cols;
        // Two rows more than are trained.
        let (p, m, g) = (normal(1, (rows + first_row + 2) * cols), normal(2, n), normal(3, n));
        let v: Vec<f32> = normal(4, n).iter().map(|x| x * x).collect();
        let trained = &p[first_row * cols..(first_row + rows) * cols];
        Self {
            master: (dtype == DType::Bf16).then(|| tensor(dev, rows, cols, DType::F32, trained)),
            m: tensor(dev, rows, cols, DType::F32, &m),
            v: tensor(dev, rows, cols, DType::F32, &v),
            g: tensor(dev, rows, cols, DType::F32, &g),
            before: [trained, &m, &v, &g].map(|x| stored(DType::F32, x)),
            kept: stored(dtype, &p),
            p: tensor(dev, rows + first_row + 2, cols, dtype, &p),
            first_row,
            decays,
            lr_scale,
        }
    }

    fn slot(&mut self) -> AdamWSlot<'_, B> {
        let Self { p, master, m, v, g, first_row, decays, lr_scale, .. } = self;
        let (first_row, decays, lr_scale) = (*first_row, *decays, *lr_scale);
        let range = 0..g.len();
        AdamWSlot { p, master: master.as_mut(), m, v, g, first_row, range, decays, lr_scale }
    }

    /// Everything that an update may change.
    fn all(&self, dev: &B) -> Vec<Vec<f32>> {
        [Some(&self.p), self.master.as_ref(), Some(&self.m), Some(&self.v)]
            .into_iter()
            .flatten()
            .map(|t| values(dev, t))
            .collect()
    }

    fn compare(&self, dev: &B, what: &str) {
        let (dtype, after, cols) = (self.p.dtype(), values(dev, &self.p), self.p.cols());
        let (from, to) = (self.first_row * cols, self.first_row * cols + self.g.len());
        for (i, (&x, &kept)) in after.iter().zip(&self.kept).enumerate().filter(|(i, _)| !(from..to).contains(i)) {
            assert_eq!(f64::from(x), kept, "{what}: element {i} of a row that is not trained");
        }
        let lr = (STEP.lr * self.lr_scale) as f32;
        let decay = if self.decays { STEP.weight_decay } else { 0.0 };
        let [p, m, v, g] = &self.before;
        let at = |i: usize, round: &dyn Fn(f64) -> f64| reference([p[i], m[i], v[i], g[i]], lr, decay, round);
        let updated = self.master.as_ref().map_or_else(|| after[from..to].to_vec(), |t| values(dev, t));
        for (which, ours) in [(0, updated), (1, values(dev, &self.m)), (2, values(dev, &self.v))] {
            let exact: Vec<f64> = (0..p.len()).map(|i| at(i, &|x| x)[which]).collect();
            let plain: Vec<f64> = (0..p.len()).map(|i| at(i, &|x| rounded(DType::F32, x))[which]).collect();
            let label = format!("{what} {dtype:?} {}x{cols} {}", self.g.rows(), ["p", "m", "v"][which]);
            assert_close(&label, &ours, &exact, &plain, DType::F32);
            if which == 0 {
                let expected: Vec<f32> = ours.iter().map(|&x| rounded(dtype, f64::from(x)) as f32).collect();
                assert_eq!(after[from..to], expected, "{label}: p is the master, rounded");
            }
        }
    }
}

/// One call with tensors of both types, with and without decay, of rates of their own.
pub fn adamw_updates_the_rows_it_is_given<B: Backend>(dev: &B, name: &str, shapes: &[(usize, usize, usize)]) {
    let mut all = Vec::new();
    for &shape in shapes {
        for dtype in [DType::F32, DType::Bf16] {
            all.push(Trained::new(dev, dtype, shape, true, 1.0));
            all.push(Trained::new(dev, dtype, shape, false, 0.3));
        }
    }
    let stats = clipping(dev);
    let mut slots: Vec<_> = all.iter_mut().map(Trained::slot).collect();
    dev.adamw_all(&stats, &mut slots, STEP).unwrap();
    for t in &all {
        t.compare(dev, name);
    }
}

/// A loss or a gradient that is not finite leaves everything as it was, and the next step goes on.
pub fn nothing_is_updated_where_the_figures_are_not_finite<B: Backend>(dev: &B, name: &str) {
    for (loss, gradient) in [(f32::NAN, 1.0), (f32::INFINITY, 1.0), (1.0, f32::NAN), (1.0, f32::NEG_INFINITY)] {
        for dtype in [DType::F32, DType::Bf16] {
            let mut t = Trained::new(dev, dtype, (3, 5, 1), true, 1.0);
            let before = t.all(dev);
            let mut stats = dev.new_stats().unwrap();
            dev.add_loss(&mut stats, &tensor(dev, 2, 1, DType::F32, &[loss, 1.0]), None).unwrap();
            dev.add_loss(&mut stats, &tensor(dev, 1, 1, DType::F32, &[1.0]), None).unwrap();
            let g = tensor(dev, 1, 2, DType::F32, &[1.0, gradient]);
            dev.grad_norm2(&mut stats, &[&t.g, &g]).unwrap();
            dev.set_clip(&mut stats, Some(1.0)).unwrap();
            dev.adamw_all(&stats, &mut [t.slot()], STEP).unwrap();
            assert!(!dev.figures(&stats).unwrap().finite(), "{name}");
            assert_eq!(t.all(dev), before, "{name} loss {loss} gradient {gradient}");
            dev.begin_step(&mut stats).unwrap();
            assert_eq!(dev.figures(&stats).unwrap(), Figures::default(), "{name}");
            dev.adamw_all(&stats, &mut [t.slot()], STEP).unwrap();
            assert_ne!(t.all(dev), before, "{name}");
        }
    }
}

/// Sums of integers are exact, whatever their order.
pub fn figures_are_sums_in_f64<B: Backend>(dev: &B, name: &str) {
    let x: Vec<f32> = (0..40_000).map(|i| (i % 13) as f32 - 6.0).collect();
    let expected: f64 = x.iter().map(|&x| f64::from(x * x)).sum();
    let (a, b) = (tensor(dev, 40, 1000, DType::F32, &x), tensor(dev, 1000, 40, DType::Bf16, &x));
    let mut stats = dev.new_stats().unwrap();
    assert_eq!(dev.figures(&stats).unwrap(), Figures::default(), "{name}");
    dev.grad_norm2(&mut stats, &[]).unwrap();
    dev.grad_norm2(&mut stats, &[&a, &b]).unwrap();
    assert_eq!(dev.figures(&stats).unwrap().grad_norm2, 2.0 * expected, "{name}");
    dev.grad_norm2(&mut stats, &[&a]).unwrap();
    assert_eq!(dev.figures(&stats).unwrap().grad_norm2, 3.0 * expected, "{name}");
    // Parts of tensors, as ranks have them, in blocks of 16,384 elements from their own first one on.
    let square = |range: std::ops::Range<usize>| x[range].iter().map(|&x| f64::from(x * x)).sum::<f64>();
    let sums = dev.squares(&[(&a, 7..20_011), (&a, 16_385..40_000)]).unwrap();
    let blocks = [7..16_391, 16_391..20_011, 16_385..32_769, 32_769..40_000].map(square);
    assert_eq!(sums, blocks, "{name}");
    // More micro-batches than most steps have, the larger sums beyond what f32 holds.
    let mut nll = Vec::new();
    for i in 0..19usize {
        let n = 1 + i * 61;
        let losses: Vec<f32> = (0..n).map(|j| ((1 << 20) + i * 37 + j) as f32).collect();
        let correct: Vec<f32> = (0..n).map(|j| (j % 3 == 0) as u8 as f32).collect();
        let [loss, correct] = [&losses, &correct].map(|x| tensor(dev, n, 1, DType::F32, x));
        dev.add_loss(&mut stats, &loss, (i % 2 == 0).then_some(&correct)).unwrap();
        nll.push(losses.iter().map(|&x| f64::from(x)).sum::<f64>());
    }
    let figures = dev.figures(&stats).unwrap();
    let right = (0..19usize).step_by(2).map(|i| (1 + i * 61).div_ceil(3) as f64).sum::<f64>();
    assert_eq!(figures, Figures { nll, correct: right, grad_norm2: 3.0 * expected }, "{name}");
    let c = tensor(dev, 1, 3, DType::F32, &[1.0, f32::NAN, 2.0]);
    dev.grad_norm2(&mut stats, &[&a, &c]).unwrap();
    assert!(dev.figures(&stats).unwrap().grad_norm2.is_nan(), "{name}");
}
