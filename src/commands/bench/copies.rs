//! Operations that move rows or add one to all of them: biases and their gradient, rows by index, conversions.

use super::case::{Case, Kernel, Setup, load};
use super::products::sums;
use super::roofline::Work;
use super::rows::row;
use super::values::Filled;
use super::verify::{Samples, picks};
use crate::backend::Backend;
use crate::batch::{Batch, IGNORE};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Rows that are verified.
const SAMPLES: usize = 4;

struct Bias<B: Backend> {
    dst: Filled<B>,
    b: Filled<B>,
}

impl<B: Backend> Kernel<B> for Bias<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        dev.add_bias(&mut self.dst.t, &self.b.t)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.dst.t]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let b = self.b.m.row(0);
        let of = |i| {
            let sum: Vec<f64> = self.dst.m.row(i).iter().zip(&b).map(|(x, b)| x + b).collect();
            row("dst", (self.dst.t.dtype(), 1e-6), i, &sum, &found[0])
        };
        Ok(picks(self.dst.t.rows(), SAMPLES).into_iter().map(of).collect())
    }
}

struct BiasBackward<B: Backend> {
    dy: Filled<B>,
    db: Tensor<B>,
}

impl<B: Backend> Kernel<B> for BiasBackward<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        dev.bias_backward(&mut self.db, &self.dy.t)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.db]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let (rows, cols) = self.dy.t.shape();
        let mut db = vec![0.0; cols];
        (0..rows).for_each(|i| db.iter_mut().zip(self.dy.m.row(i)).for_each(|(d, x)| *d += x));
        Ok(vec![row("db", (DType::F32, sums(rows)), 0, &db, &found[0])])
    }
}

struct Scatter<B: Backend> {
    src: Filled<B>,
    /// Every second row is one of those that are supervised.
    batch: Batch<B>,
    dst: Tensor<B>,
}

impl<B: Backend> Kernel<B> for Scatter<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        dev.scatter_rows(&mut self.dst, &self.src.t, &self.batch.rows)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.dst]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let of = |i| row("dst", (self.dst.dtype(), 0.0), 2 * i, &self.src.m.row(i), &found[0]);
        Ok(picks(self.src.t.rows(), SAMPLES).into_iter().map(of).collect())
    }
}

struct Cast<B: Backend> {
    src: Filled<B>,
    dst: Tensor<B>,
}

impl<B: Backend> Kernel<B> for Cast<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        dev.copy(&mut self.dst, &self.src.t)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.dst]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let of = |i| row("dst", (self.dst.dtype(), 0.0), i, &self.src.m.row(i), &found[0]);
        Ok(picks(self.src.t.rows(), SAMPLES).into_iter().map(of).collect())
    }
}

/// Bias, its gradient, supervised rows put back, conversions between the types.
pub fn cases<B: Backend + 'static>(s: &Setup) -> Vec<Case<B>> {
    let (n, dtype, hidden) = (s.tokens, s.dtype, s.config.hidden_size);
    let (e, b) = ((n * hidden) as f64, dtype.bytes() as f64);
    let other = if dtype == DType::F32 { DType::Bf16 } else { DType::F32 };
    let picked = n.div_ceil(2);
    let mut all = Vec::new();
    let mut add = |kernel, name: &str, rows: usize, flop: f64, bytes: f64, memory: f64, make| {
        let (work, shape) = (Work { flop, bytes }, format!("{rows} x {hidden}"));
        all.push(Case { kernel, name: name.into(), shape, work, memory: memory as u64, make });
    };
    let bias = hidden as f64;
    add(
        "bias",
        "bias",
        n,
        e,
        2.0 * e * b + bias * b,
        e * b + bias * b,
        Box::new(move |dev: &B, seed: u64| {
            let dst = Filled::new(dev, 2 * seed, 1.0, n, hidden, dtype)?;
            Ok(Box::new(Bias { dst, b: Filled::new(dev, 2 * seed + 1, 1.0, 1, hidden, dtype)? }))
        }),
    );
    add(
        "bias",
        "bias backward",
        n,
        e,
        e * b + 8.0 * bias,
        e * b + 4.0 * bias,
        Box::new(move |dev: &B, seed: u64| {
            let dy = Filled::new(dev, seed, 1.0, n, hidden, dtype)?;
            Ok(Box::new(BiasBackward { dy, db: dev.alloc(1, hidden, DType::F32)? }))
        }),
    );
    let half = (picked * hidden) as f64;
    add(
        "scatter",
        "scatter",
        picked,
        0.0,
        2.0 * half * b,
        (half + e) * b,
        Box::new(move |dev: &B, seed: u64| {
            let src = Filled::new(dev, seed, 1.0, picked, hidden, dtype)?;
            let targets = (0..n).map(|i| if i % 2 == 0 { 0 } else { IGNORE }).collect();
            let batch = load(dev, vec![0; n], targets, vec![0; n])?;
            Ok(Box::new(Scatter { src, batch, dst: dev.alloc(n, hidden, dtype)? }))
        }),
    );
    let both = e * (dtype.bytes() + other.bytes()) as f64;
    add(
        "cast",
        "cast",
        n,
        0.0,
        both,
        both,
        Box::new(move |dev: &B, seed: u64| {
            let src = Filled::new(dev, seed, 1.0, n, hidden, dtype)?;
            Ok(Box::new(Cast { src, dst: dev.alloc(n, hidden, other)? }))
        }),
    );
    all
}
