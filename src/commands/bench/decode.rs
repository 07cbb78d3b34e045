//! Attention of one new token a sequence against a cache of keys and values.

use super::case::{Case, Kernel, Setup, dot};
use super::roofline::Work;
use super::values::Filled;
use super::verify::{Point, Samples, picks};
use crate::backend::{Backend, Decode, Heads, Mask};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Sequences side by side.
const SEQUENCES: usize = 8;

struct Step<B: Backend> {
    heads: Heads,
    capacity: usize,
    q: Filled<B>,
    k: Filled<B>,
    v: Filled<B>,
    lens: Tensor<B>,
    out: Tensor<B>,
}

impl<B: Backend> Kernel<B> for Step<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        let (k_cache, v_cache, mask) = (&self.k.t, &self.v.t, Mask { window: None });
        let x = Decode { q: &self.q.t, k_cache, v_cache, lens: &self.lens, heads: self.heads, mask };
        dev.attention_decode(&mut self.out, x)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.out]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let Heads { n_query, n_kv, head_dim: dim } = self.heads;
        let (scale, inner) = (1.0 / (dim as f64).sqrt(), if self.out.dtype() == DType::Bf16 { 1e-2 } else { 2e-5 });
        let mut all = Vec::new();
        for (i, s) in picks(SEQUENCES, 3).into_iter().enumerate() {
            let h = i * 5 % n_query;
            let g = h / (n_query / n_kv);
            let of = |x: &Filled<B>, j| x.m.part(s * self.capacity + j, g * dim, dim);
            let q = self.q.m.part(s, h * dim, dim);
            let weights: Vec<f64> = (0..self.capacity).map(|j| (scale * dot(&q, &of(&self.k, j))).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut out = vec![0.0; dim];
            for (j, w) in weights.iter().enumerate() {
                out.iter_mut().zip(of(&self.v, j)).for_each(|(o, v)| *o += w / sum * v);
            }
            let points = out.iter().enumerate().map(|(e, &expected)| Point {
                place: (s, h * dim + e),
                expected,
                found: f64::from(found[0][(s * n_query + h) * dim + e]),
            });
            all.push(Samples { what: "out", dtype: self.out.dtype(), inner, points: points.collect() });
        }
        Ok(all)
    }
}

/// One new token of several sequences.
pub fn cases<B: Backend + 'static>(s: &Setup) -> Vec<Case<B>> {
    let (n, q, kv, heads, dtype) = (SEQUENCES, s.config.q_dim(), s.config.kv_dim(), s.config.heads, s.dtype);
    let capacity = s.document.min(s.tokens);
    let bytes = (2 * n * capacity * kv + 2 * n * q) * dtype.bytes();
    vec![Case {
        kernel: "decode",
        name: "attention decode".into(),
        shape: format!("{n} x {}/{} x {}, caches of {capacity}", heads.n_query, heads.n_kv, heads.head_dim),
        work: Work { flop: 4.0 * (n * capacity * q) as f64, bytes: bytes as f64 },
        memory: bytes as u64,
        make: Box::new(move |dev, seed| {
            let fill = |i: u64, rows, cols| Filled::new(dev, 3 * seed + i, 1.0, rows, cols, dtype);
            let mut lens = dev.alloc(n, 1, DType::I32)?;
            dev.upload_i32(&mut lens, &vec![capacity as i32; n])?;
            let (k, v) = (fill(1, n * capacity, kv)?, fill(2, n * capacity, kv)?);
            Ok(Box::new(Step { heads, capacity, q: fill(0, n, q)?, k, v, lens, out: dev.alloc(n, q, dtype)? }))
        }),
    }]
}
