//! Gradients of the weights of a layer's groups, as backward takes them after that of their input: of the weights, in f32 and added to, or
//! of the low-rank factors alone, with their two readings of dy and x.

use rayon::prelude::*;

use super::case::{Case, Kernel, Setup};
use super::products::sums;
use super::project::{COLUMNS, Forward, Of, RANK, SAMPLES, SCALE, inner, kept, projections};
use super::roofline::Work;
use super::values::Filled;
use super::verify::{Point, Samples, picks};
use crate::backend::{Backend, ProjectionGrads};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// A group with the gradients of its results.
struct Weights<B: Backend> {
    forward: Forward<B>,
    dy: Vec<Filled<B>>,
    /// Of each projection: of the weight, or of A and B.
    grads: Vec<Vec<Tensor<B>>>,
}

/// Names of the gradients of a projection, of the weight or of the factors.
const NAMES: [[&str; 3]; 3] = [["dw 0", "da 0", "db 0"], ["dw 1", "da 1", "db 1"], ["dw 2", "da 2", "db 2"]];

impl<B: Backend> Weights<B> {
    fn new(dev: &B, of: Of, s: &Setup, with_lora: bool, seed: u64) -> Result<Self> {
        let mut forward = Forward::new(dev, of, s, with_lora, seed)?;
        forward.run(dev)?;
        let (wide, outs) = of.widths(s);
        let dy = |(i, &out): (usize, &usize)| Filled::new(dev, 16 * seed + 11 + i as u64, 1.0, s.tokens, out, s.dtype);
        let grads = |&out: &usize| {
            let shapes = if with_lora { vec![(RANK, wide), (out, RANK)] } else { vec![(out, wide)] };
            shapes.into_iter().map(|(rows, cols)| dev.alloc(rows, cols, DType::F32)).collect()
        };
        Ok(Self {
            forward,
            dy: outs.iter().enumerate().map(dy).collect::<Result<_>>()?,
            grads: outs.iter().map(grads).collect::<Result<_>>()?,
        })
    }

    /// The sum of `f` over the tokens.
    fn over_tokens(&self, f: impl Fn(usize) -> f64 + Send + Sync) -> f64 {
        (0..self.forward.x.t.rows()).into_par_iter().map(f).sum()
    }

    /// Samples of dW_i = dy_i^T x.
    fn of_weight(&self, i: usize, found: &[f32]) -> Samples {
        let (x, dy) = (&self.forward.x.m, &self.dy[i].m);
        let (out, wide) = self.grads[i][0].shape();
        let places =
            picks(out, SAMPLES).into_iter().flat_map(|row| picks(wide, COLUMNS).into_iter().map(move |c| (row, c)));
        let points = places.map(|(row, c)| Point {
            place: (row, c),
            expected: self.over_tokens(|t| dy.at(t, row) * x.at(t, c)),
            found: f64::from(found[row * wide + c]),
        });
        let inner = sums(self.forward.x.t.rows());
        Samples { what: NAMES[i][0], dtype: DType::F32, inner, points: points.collect() }
    }

    /// Samples of dA_i = u^T drop(x) and dB_i = s dy^T drop(x) A^T, with u = s dy B, of one of the ranks.
    fn of_factors(&self, i: usize, [da, db]: [&[f32]; 2]) -> [Samples; 2] {
        let (x, dy, factors) = (&self.forward.x.m, &self.dy[i].m, &self.forward.lora[i]);
        let (n, wide) = self.forward.x.t.shape();
        let (out, r, scale) = (self.dy[i].t.cols(), i * 5 % RANK, f64::from(SCALE));
        let (a, b): (Vec<f64>, Vec<f64>) = (factors.a.m.row(r), (0..out).map(|o| factors.b.m.at(o, r)).collect());
        let dropout = factors.dropout;
        let kept = |t: usize, c: usize, x: f64| kept(dropout, t * wide + c, x);
        let of_x = |t: usize| {
            let row = x.row(t).into_iter().enumerate();
            row.zip(&a).map(|((c, x), a)| kept(t, c, x) * a).sum::<f64>()
        };
        let of_dy = |t: usize| scale * dy.row(t).iter().zip(&b).map(|(d, b)| d * b).sum::<f64>();
        let low: Vec<(f64, f64)> = (0..n).into_par_iter().map(|t| (of_x(t), of_dy(t))).collect();
        let of_a = picks(wide, COLUMNS).into_iter().map(|c| Point {
            place: (r, c),
            expected: self.over_tokens(|t| low[t].1 * kept(t, c, x.at(t, c))),
            found: f64::from(da[r * wide + c]),
        });
        let of_b = picks(out, COLUMNS).into_iter().map(|o| Point {
            place: (o, r),
            expected: scale * self.over_tokens(|t| dy.at(t, o) * low[t].0),
            found: f64::from(db[o * RANK + r]),
        });
        // t and u are rounded as activations are.
        let inner = inner(self.forward.x.t.dtype(), n);
        [
            Samples { what: NAMES[i][1], dtype: DType::F32, inner, points: of_a.collect() },
            Samples { what: NAMES[i][2], dtype: DType::F32, inner, points: of_b.collect() },
        ]
    }
}

impl<B: Backend> Kernel<B> for Weights<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        let f = &mut self.forward;
        let by = projections(&f.w, &f.lora);
        let dys: Vec<&Tensor<B>> = self.dy.iter().map(|dy| &dy.t).collect();
        let mut grads: Vec<ProjectionGrads<'_, B>> = self
            .grads
            .iter_mut()
            .map(|g| match g.as_mut_slice() {
                [w] => ProjectionGrads { w: Some(w), bias: None, a: None, b: None },
                [a, b] => ProjectionGrads { w: None, bias: None, a: Some(a), b: Some(b) },
                _ => unreachable!("a weight, or two factors"),
            })
            .collect();
        if !f.lora.is_empty() {
            let ts: Vec<Option<&Tensor<B>>> = f.t.iter().map(Some).collect();
            dev.project_dx(None, &mut grads, &dys, &ts, &by, &mut f.scratch)?;
        }
        dev.project_dw(&mut grads, &dys, &f.x.t, &by, &mut f.scratch)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        self.grads.iter().flatten().collect()
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let each = found.chunks(self.grads[0].len()).enumerate();
        Ok(each
            .flat_map(|(i, found)| match found {
                [a, b] => self.of_factors(i, [a, b]).to_vec(),
                _ => vec![self.of_weight(i, &found[0])],
            })
            .collect())
    }
}

/// Gradients of the weights, and of low-rank factors, of the three groups of a layer.
pub fn cases<B: Backend + 'static>(s: &Setup) -> Vec<Case<B>> {
    let mut all = Vec::new();
    for with_lora in [false, true] {
        for of in [Of::Qkv, Of::GateUp, Of::Down] {
            let ((wide, outs), n, size) = (of.widths(s), s.tokens, s.dtype.bytes());
            let (out, group) = (outs.iter().sum::<usize>(), outs.len());
            // Products of tokens: one for a weight; for factors u and dB with dy, dA with x.
            let (name, products, grads) = match with_lora {
                false => ("dw", wide * out, wide * out),
                true => ("da, db", RANK * (2 * out + group * wide), RANK * (out + group * wide)),
            };
            // Gradients are read and written; t and u are small.
            let bytes = n * (wide + out) * size + 2 * 4 * grads;
            let held = 3 * n * (wide + out) * size + wide * out * size + 4 * grads;
            let setup = s.clone();
            all.push(Case {
                kernel: "project",
                name: format!("project {name} {}", of.name()),
                shape: format!("{n} x {out} x {wide}"),
                work: Work { flop: 2.0 * (n * products) as f64, bytes: bytes as f64 },
                memory: held as u64,
                make: Box::new(move |dev: &B, seed| Ok(Box::new(Weights::new(dev, of, &setup, with_lora, seed)?))),
            });
        }
    }
    all
}
