//! The head and its loss over chunks of rows: with the gradient of its input alone, as with LoRA, and with that of its weight.

use rayon::prelude::*;

use super::case::{Case, Kernel, Setup, dot, load};
use super::roofline::Work;
use super::values::Filled;
use super::verify::{Point, Samples, picks};
use crate::backend::{Backend, HeadGrads, HeadLoss};
use crate::batch::Batch;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Rows whose whole softmax is computed, and classes whose gradient is.
const SAMPLES: usize = 3;

struct Head<B: Backend> {
    x: Filled<B>,
    w: Filled<B>,
    targets: Vec<i32>,
    batch: Batch<B>,
    loss: Tensor<B>,
    dx: Tensor<B>,
    dw: Option<Tensor<B>>,
}

impl<B: Backend> Head<B> {
    fn scale(&self) -> f32 {
        1.0 / self.targets.len() as f32
    }

    /// Logits of a row.
    fn logits(&self, row: usize) -> Vec<f64> {
        let (x, w) = (self.x.m.row(row), &self.w.m);
        (0..self.w.t.rows()).into_par_iter().map(|class| dot(&x, &w.row(class))).collect()
    }
}

impl<B: Backend> Kernel<B> for Head<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        let scale = self.scale();
        let of = HeadLoss { x: &self.x.t, w: &self.w.t, batch: &self.batch, n_classes: self.w.t.rows(), scale };
        let grads = HeadGrads { dx: Some(&mut self.dx), dw: self.dw.as_mut(), first_row: 0 };
        dev.linear_cross_entropy(&mut self.loss, None, grads, of)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        [&self.loss, &self.dx].into_iter().chain(&self.dw).collect()
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let (n, hidden, scale) = (self.targets.len(), self.x.t.cols(), f64::from(self.scale()));
        let (x, w, targets) = (&self.x.m, &self.w.m, &self.targets);
        // The gradient of logits is rounded to bf16 between the products.
        let inner = if self.x.t.dtype() == DType::Bf16 { 2e-2 } else { 1e-4 };
        let mut all = Vec::new();
        for i in picks(n, SAMPLES) {
            let logits = self.logits(i);
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = top + logits.iter().map(|l| (l - top).exp()).sum::<f64>().ln();
            let target = self.targets[i] as usize;
            let point = Point { place: (i, 0), expected: lse - logits[target], found: f64::from(found[0][i]) };
            all.push(Samples { what: "loss", dtype: DType::F32, inner: 2e-5, points: vec![point] });
            let mut columns = picks(hidden, 8);
            columns.sort_unstable();
            let sum = |j: usize| -> f64 {
                let of = |class: usize| {
                    ((logits[class] - lse).exp() - f64::from(u8::from(class == target))) * w.at(class, j)
                };
                scale * (0..logits.len()).into_par_iter().map(of).sum::<f64>()
            };
            let point =
                |&j: &usize| Point { place: (i, j), expected: sum(j), found: f64::from(found[1][i * hidden + j]) };
            all.push(Samples {
                what: "dx",
                dtype: self.dx.dtype(),
                inner,
                points: columns.iter().map(point).collect(),
            });
        }
        if self.dw.is_none() {
            return Ok(all);
        }
        // A row's normaliser, from its loss, which is verified above.
        let lse = |i: usize, x: &[f64]| f64::from(found[0][i]) + dot(x, &w.row(targets[i] as usize));
        let classes = picks(n, SAMPLES).into_iter().map(|i| self.targets[i] as usize);
        for class in classes {
            let (of, columns) = (w.row(class), picks(hidden, 8));
            let part = |i: usize| {
                let x = x.row(i);
                let p = (dot(&x, &of) - lse(i, &x)).exp() - f64::from(u8::from(targets[i] as usize == class));
                columns.iter().map(|&j| scale * p * x[j]).collect::<Vec<f64>>()
            };
            let add = |a: Vec<f64>, b: Vec<f64>| {
                if a.is_empty() { b } else { a.iter().zip(&b).map(|(a, b)| a + b).collect() }
            };
            let dw = (0..n).into_par_iter().map(part).reduce(Vec::new, add);
            let points = columns.iter().zip(&dw);
            let at = |j: usize| f64::from(found[2][class * hidden + j]);
            let points = points.map(|(&j, &expected)| Point { place: (class, j), expected, found: at(j) });
            all.push(Samples { what: "dw", dtype: DType::F32, inner, points: points.collect() });
        }
        Ok(all)
    }
}

/// The head with a frozen and with a trained weight.
pub fn cases<B: Backend + 'static>(s: &Setup) -> Vec<Case<B>> {
    let (n, hidden, classes, dtype) = (s.tokens, s.config.hidden_size, s.config.n_classes, s.dtype);
    let product = 2.0 * n as f64 * hidden as f64 * classes as f64;
    let of = |trained: bool| {
        let bytes =
            (classes * hidden + 2 * n * hidden) * dtype.bytes() + if trained { classes * hidden * 8 } else { 0 };
        let held = (classes * hidden + 2 * n * hidden) * dtype.bytes() + if trained { classes * hidden * 4 } else { 0 };
        Case {
            kernel: "head",
            name: format!("head {}", if trained { "trained" } else { "frozen" }),
            shape: format!("{n} x {hidden} x {classes}"),
            work: Work { flop: product * if trained { 3.0 } else { 2.0 }, bytes: bytes as f64 },
            memory: held as u64,
            make: Box::new(move |dev: &B, seed| {
                let targets: Vec<i32> = (0..n).map(|i| (i * 104_729 % classes) as i32).collect();
                Ok(Box::new(Head {
                    x: Filled::new(dev, 2 * seed, 1.0, n, hidden, dtype)?,
                    w: Filled::new(dev, 2 * seed + 1, 1.0 / (hidden as f64).sqrt(), classes, hidden, dtype)?,
                    batch: load(dev, vec![0; n], targets.clone(), vec![0; n])?,
                    targets,
                    loss: dev.alloc(n, 1, DType::F32)?,
                    dx: dev.alloc(n, hidden, dtype)?,
                    dw: trained.then(|| dev.alloc(classes, hidden, DType::F32)).transpose()?,
                }))
            }),
        }
    };
    vec![of(false), of(true)]
}
