//! Attention inside documents, forward and backward.

use super::case::{Case, Kernel, Setup, dot, load, values};
use super::roofline::Work;
use super::values::Filled;
use super::verify::{Point, Samples, picks};
use crate::backend::{Attention, AttentionGrads, Backend, Heads, Mask, Rope};
use crate::batch::Batch;
use crate::error::Result;
use crate::model::rope;
use crate::tensor::{DType, Tensor};

/// Rows that are verified, each for one head.
const SAMPLES: usize = 8;

/// Buffers of both directions.
struct Buffers<B: Backend> {
    heads: Heads,
    doc_start: Vec<i32>,
    q: Filled<B>,
    k: Filled<B>,
    v: Filled<B>,
    batch: Batch<B>,
    out: Tensor<B>,
    lse: Tensor<B>,
}

impl<B: Backend> Buffers<B> {
    fn new(dev: &B, s: &Setup, seed: u64) -> Result<Self> {
        let (n, heads, dtype) = (s.tokens, s.config.heads, s.dtype);
        let (q, kv) = (s.config.q_dim(), s.config.kv_dim());
        let fill = |i: u64, cols| Filled::new(dev, 4 * seed + i, 1.0, n, cols, dtype);
        Ok(Self {
            heads,
            doc_start: s.doc_start(),
            q: fill(0, q)?,
            k: fill(1, kv)?,
            v: fill(2, kv)?,
            batch: load(dev, vec![0; n], vec![0; n], s.doc_start())?,
            out: dev.alloc(n, q, dtype)?,
            lse: dev.alloc(n, heads.n_query, DType::F32)?,
        })
    }

    fn forward(&mut self, dev: &B) -> Result<()> {
        let x = Attention {
            q: &self.q.t,
            k: &self.k.t,
            v: &self.v.t,
            batch: &self.batch,
            heads: self.heads,
            mask: Mask { window: None },
        };
        dev.attention_forward(&mut self.out, &mut self.lse, x)
    }

    /// A head of a row of queries, keys or values.
    fn head(&self, of: &Filled<B>, row: usize, head: usize) -> Vec<f64> {
        of.m.part(row, head * self.heads.head_dim, self.heads.head_dim)
    }

    fn group(&self, head: usize) -> usize {
        head / (self.heads.n_query / self.heads.n_kv)
    }

    /// Keys that a row sees.
    fn seen(&self, row: usize) -> std::ops::Range<usize> {
        self.doc_start[row] as usize..row + 1
    }

    /// Scores of a row's head against the keys it sees.
    fn scores(&self, row: usize, head: usize) -> Vec<f64> {
        let (q, g) = (self.head(&self.q, row, head), self.group(head));
        let scale = 1.0 / (self.heads.head_dim as f64).sqrt();
        self.seen(row).map(|j| scale * dot(&q, &self.head(&self.k, j, g))).collect()
    }

    /// Rows with a head each.
    fn samples(&self) -> Vec<(usize, usize)> {
        let rows = picks(self.doc_start.len(), SAMPLES);
        rows.into_iter().enumerate().map(|(i, row)| (row, i * 5 % self.heads.n_query)).collect()
    }
}

/// A head of a row of what a device gave.
fn head_of(values: &[f32], row: usize, head: usize, heads: usize, dim: usize) -> Vec<f64> {
    values[(row * heads + head) * dim..][..dim].iter().map(|&x| f64::from(x)).collect()
}

/// Samples of a row's head, which begins at a column.
fn group(
    what: &'static str,
    (row, column): (usize, usize),
    expected: &[f64],
    found: &[f64],
    dtype: DType,
    inner: f64,
) -> Samples {
    let points = expected.iter().zip(found).enumerate();
    let points = points.map(|(e, (&expected, &found))| Point { place: (row, column + e), expected, found });
    Samples { what, dtype, inner, points: points.collect() }
}

/// `to += factor · x`.
fn add(to: &mut [f64], factor: f64, x: &[f64]) {
    to.iter_mut().zip(x).for_each(|(t, x)| *t += factor * x);
}

struct Forward<B: Backend>(Buffers<B>);

impl<B: Backend> Kernel<B> for Forward<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        self.0.forward(dev)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.0.out, &self.0.lse]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let b = &self.0;
        let (heads, dim, dtype) = (b.heads.n_query, b.heads.head_dim, b.out.dtype());
        // Probabilities are rounded to bf16 for the second product.
        let inner = if dtype == DType::Bf16 { 1e-2 } else { 2e-5 };
        let mut all = Vec::new();
        for (row, head) in b.samples() {
            let scores = b.scores(row, head);
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = top + scores.iter().map(|s| (s - top).exp()).sum::<f64>().ln();
            let mut out = vec![0.0; dim];
            for (j, s) in b.seen(row).zip(&scores) {
                add(&mut out, (s - lse).exp(), &b.head(&b.v, j, b.group(head)));
            }
            all.push(group("out", (row, head * dim), &out, &head_of(&found[0], row, head, heads, dim), dtype, inner));
            let point = Point { place: (row, head), expected: lse, found: f64::from(found[1][row * heads + head]) };
            // A sum of one key may be near 0: it is held to what scores of deviation 1 may be off.
            let sum = Point { place: (row, head), expected: 1.0, found: 1.0 + point.found - point.expected };
            all.push(Samples { what: "lse", dtype: DType::F32, inner: 2e-5, points: vec![sum] });
        }
        Ok(all)
    }
}

struct Backward<B: Backend> {
    b: Buffers<B>,
    dout: Filled<B>,
    dq: Tensor<B>,
    dk: Tensor<B>,
    dv: Tensor<B>,
    /// Where queries and keys were rotated before, whose gradients are turned back: the table, and the frequencies it is of.
    rope: Option<(Tensor<B>, Vec<f64>)>,
}

impl<B: Backend> Backward<B> {
    /// Turns a head's gradient back by the angles of its row.
    fn turn_back(&self, row: usize, mut x: Vec<f64>) -> Vec<f64> {
        let position = row - self.b.doc_start[row] as usize;
        for (j, f) in self.rope.iter().flat_map(|(_, frequencies)| frequencies.iter().enumerate()) {
            let (sin, cos) = (position as f64 * f).sin_cos();
            let (lo, hi) = (x[j], x[j + x.len() / 2]);
            let half = x.len() / 2;
            (x[j], x[j + half]) = (lo * cos + hi * sin, hi * cos - lo * sin);
        }
        x
    }

    /// Gradient of a score, and its probability: of row `i` and head `h` against key `j`, given what forward left.
    fn score(&self, i: usize, h: usize, j: usize, out: &[f32], lse: &[f32]) -> (f64, f64) {
        let (heads, dim) = (self.b.heads.n_query, self.b.heads.head_dim);
        let (g, dout) = (self.b.group(h), self.b.head(&self.dout, i, h));
        let scale = 1.0 / (dim as f64).sqrt();
        let s = scale * dot(&self.b.head(&self.b.q, i, h), &self.b.head(&self.b.k, j, g));
        let p = (s - f64::from(lse[i * heads + h])).exp();
        let delta = dot(&dout, &head_of(out, i, h, heads, dim));
        (scale * p * (dot(&dout, &self.b.head(&self.b.v, j, g)) - delta), p)
    }
}

impl<B: Backend> Kernel<B> for Backward<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        let b = &self.b;
        let (q, k, v) = (&b.q.t, &b.k.t, &b.v.t);
        let x = Attention { q, k, v, batch: &b.batch, heads: b.heads, mask: Mask { window: None } };
        let dx = AttentionGrads { dq: &mut self.dq, dk: &mut self.dk, dv: &mut self.dv };
        let rope = self.rope.as_ref().map(|(table, _)| Rope { table, positions: &b.batch.positions });
        dev.attention_backward(dx, &self.dout.t, &b.out, &b.lse, x, rope)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.dq, &self.dk, &self.dv]
    }

    fn samples(&self, dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let b = &self.b;
        let (out, lse) = (values(dev, &b.out)?, values(dev, &b.lse)?);
        let (Heads { n_query, n_kv, head_dim: dim }, dtype) = (b.heads, self.dq.dtype());
        let inner = if dtype == DType::Bf16 { 2e-2 } else { 1e-4 };
        let mut all = Vec::new();
        for (row, h) in b.samples() {
            let mut dq = vec![0.0; dim];
            for j in b.seen(row) {
                add(&mut dq, self.score(row, h, j, &out, &lse).0, &b.head(&b.k, j, b.group(h)));
            }
            // The first row of a document sees itself alone and has no gradient but rounding.
            let g = b.group(h);
            if b.seen(row).len() > 1 {
                let of = head_of(&found[0], row, h, n_query, dim);
                all.push(group("dq", (row, h * dim), &self.turn_back(row, dq), &of, dtype, inner));
            }
            let (mut dk, mut dv) = (vec![0.0; dim], vec![0.0; dim]);
            let end = b.doc_start.iter().rposition(|&start| start == b.doc_start[row]).unwrap_or(row);
            for i in row..=end {
                for h in g * (n_query / n_kv)..(g + 1) * (n_query / n_kv) {
                    let (ds, p) = self.score(i, h, row, &out, &lse);
                    add(&mut dk, ds, &b.head(&b.q, i, h));
                    add(&mut dv, p, &b.head(&self.dout, i, h));
                }
            }
            if b.doc_start[row] as usize != row || end > row {
                let of = head_of(&found[1], row, g, n_kv, dim);
                all.push(group("dk", (row, g * dim), &self.turn_back(row, dk), &of, dtype, inner));
            }
            all.push(group("dv", (row, g * dim), &dv, &head_of(&found[2], row, g, n_kv, dim), dtype, inner));
        }
        Ok(all)
    }
}

/// Forward and backward.
pub fn cases<B: Backend + 'static>(s: &Setup) -> Vec<Case<B>> {
    let (n, q, kv) = (s.tokens, s.config.q_dim(), s.config.kv_dim());
    let shape = format!(
        "{n} x {}/{} x {}, documents of {}",
        s.config.heads.n_query,
        s.config.heads.n_kv,
        s.config.heads.head_dim,
        s.document.min(n)
    );
    // A product of queries and keys, one of probabilities and values; backward has five of them.
    let product = 2.0 * s.pairs() * q as f64;
    let size = s.dtype.bytes();
    let lse = n * s.config.heads.n_query * 4;
    let read = n * (q + 2 * kv) * size;
    let forward = s.clone();
    let batch = (n * 16 * 4) as u64;
    let backward = |name: &str, rotated: bool| {
        let s = s.clone();
        Case {
            kernel: "attention",
            name: name.into(),
            shape: shape.clone(),
            work: Work { flop: 5.0 * product, bytes: (2 * read + 2 * n * q * size + lse) as f64 },
            memory: (2 * read + 2 * n * q * size + lse) as u64 + batch,
            make: Box::new(move |dev: &B, seed| {
                let mut b = Buffers::new(dev, &s, seed)?;
                b.forward(dev)?;
                let dout = Filled::new(dev, 4 * seed + 3, 1.0, s.tokens, s.config.q_dim(), s.dtype)?;
                let grad = |cols| dev.alloc(s.tokens, cols, s.dtype);
                let (dq, dk, dv) = (grad(s.config.q_dim())?, grad(s.config.kv_dim())?, grad(s.config.kv_dim())?);
                let rope = if rotated {
                    let positions = s.document.min(s.tokens);
                    let mut table = dev.alloc(positions, s.config.heads.head_dim, DType::F32)?;
                    dev.upload(&mut table, &rope::table(&s.config, positions))?;
                    Some((table, rope::frequencies(&s.config)))
                } else {
                    None
                };
                Ok(Box::new(Backward { b, dout, dq, dk, dv, rope }) as Box<dyn Kernel<B>>)
            }),
        }
    };
    vec![
        Case {
            kernel: "attention",
            name: "attention forward".into(),
            shape: shape.clone(),
            work: Work { flop: 2.0 * product, bytes: (read + n * q * size + lse) as f64 },
            memory: (read + n * q * size + lse) as u64 + batch,
            make: Box::new(move |dev, seed| Ok(Box::new(Forward(Buffers::new(dev, &forward, seed)?)))),
        },
        backward("attention backward", false),
        backward("attention backward, rotated", true),
    ]
}
