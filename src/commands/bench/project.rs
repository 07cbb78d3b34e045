//! Projections of a group that reads one x, as a layer does them: q, k and v rotated; gate and up with SwiGLU; down added to the stream.
//! Forward and the gradient of x, alone and with low-rank updates under dropout.

use super::case::{Case, Kernel, Setup, dot, load};
use super::products::sums;
use super::roofline::Work;
use super::values::Filled;
use super::verify::{Point, Samples, picks};
use crate::backend::{Backend, Dropout, LowRank, ProjectScratch, Projected, Projection, ProjectionGrads, Rope};
use crate::batch::Batch;
use crate::error::Result;
use crate::model::rope;
use crate::tensor::{DType, Tensor};

/// Rank and factor of the low-rank updates, and what is dropped of their input.
pub(super) const RANK: usize = 16;
pub(super) const SCALE: f32 = 2.0;
const DROPPED: f32 = 0.05;

/// Rows that are verified, and columns of each.
pub(super) const SAMPLES: usize = 3;
pub(super) const COLUMNS: usize = 16;

/// Which projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    /// q, k and v, rotated.
    Qkv,
    /// gate and up with SwiGLU.
    GateUp,
    /// down, added to the stream.
    Down,
}

impl Of {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Of::Qkv => "q, k, v",
            Of::GateUp => "gate, up",
            Of::Down => "down",
        }
    }

    /// Names of the results.
    fn results(self) -> &'static [&'static str] {
        match self {
            Of::Qkv => &["q", "k", "v"],
            Of::GateUp => &["gate", "up"],
            Of::Down => &["y"],
        }
    }

    /// Width of x, and of each result.
    pub fn widths(self, s: &Setup) -> (usize, Vec<usize>) {
        let c = &s.config;
        match self {
            Of::Qkv => (c.hidden_size, vec![c.q_dim(), c.kv_dim(), c.kv_dim()]),
            Of::GateUp => (c.hidden_size, vec![c.intermediate_size; 2]),
            Of::Down => (c.intermediate_size, vec![c.hidden_size]),
        }
    }
}

/// A weight's low-rank factors.
pub(super) struct Factors<B: Backend> {
    /// (rank, width of x).
    pub a: Filled<B>,
    /// (width of the result, rank).
    pub b: Filled<B>,
    /// Of x.
    pub dropout: Dropout,
}

/// What dropout makes of an element of x.
pub(super) fn kept(dropout: Dropout, place: usize, x: f64) -> f64 {
    if dropout.drops(place as u64) { 0.0 } else { x * f64::from(dropout.scale()) }
}

impl<B: Backend> Factors<B> {
    /// What dropout makes of an element of x.
    fn kept(&self, place: usize, x: f64) -> f64 {
        kept(self.dropout, place, x)
    }
}

/// A group with all that its forward takes and leaves.
pub(super) struct Forward<B: Backend> {
    of: Of,
    setup: Setup,
    pub x: Filled<B>,
    pub w: Vec<Filled<B>>,
    pub lora: Vec<Factors<B>>,
    residual: Option<Filled<B>>,
    table: Tensor<B>,
    batch: Batch<B>,
    y: Vec<Tensor<B>>,
    pub t: Vec<Tensor<B>>,
    act: Option<Tensor<B>>,
    pub scratch: ProjectScratch<B>,
}

/// The projections of a group.
pub(super) fn projections<'a, B: Backend>(w: &'a [Filled<B>], lora: &'a [Factors<B>]) -> Vec<Projection<'a, B>> {
    let low_rank = |f: &'a Factors<B>| LowRank { a: &f.a.t, b: &f.b.t, scale: SCALE, dropout: Some(f.dropout) };
    let of = |(i, w): (usize, &'a Filled<B>)| Projection { w: &w.t, bias: None, lora: lora.get(i).map(low_rank) };
    w.iter().enumerate().map(of).collect()
}

impl<B: Backend> Forward<B> {
    /// Buffers of a seed.
    pub fn new(dev: &B, of: Of, s: &Setup, with_lora: bool, seed: u64) -> Result<Self> {
        let ((wide, outs), n, dtype) = (of.widths(s), s.tokens, s.dtype);
        let size = 1.0 / (wide as f64).sqrt();
        let fill = |i: usize, size, rows, cols| Filled::new(dev, 16 * seed + i as u64, size, rows, cols, dtype);
        let mut lora = Vec::new();
        for (i, &out) in outs.iter().enumerate().filter(|_| with_lora) {
            let (a, b) = (fill(4 + i, size, RANK, wide)?, fill(7 + i, 0.05, out, RANK)?);
            lora.push(Factors { a, b, dropout: Dropout { key: 16 * seed + i as u64, p: DROPPED } });
        }
        let empty = |cols| dev.alloc(n, cols, dtype);
        let positions = s.document.min(n);
        let mut table = dev.alloc(positions, s.config.heads.head_dim, DType::F32)?;
        dev.upload(&mut table, &rope::table(&s.config, positions))?;
        Ok(Self {
            of,
            setup: s.clone(),
            x: fill(0, 1.0, n, wide)?,
            w: outs.iter().enumerate().map(|(i, &out)| fill(1 + i, size, out, wide)).collect::<Result<_>>()?,
            residual: if of == Of::Down { Some(fill(10, 1.0, n, outs[0])?) } else { None },
            table,
            batch: load(dev, vec![0; n], vec![0; n], s.doc_start())?,
            y: outs.iter().map(|&out| empty(out)).collect::<Result<_>>()?,
            t: lora.iter().map(|_| empty(RANK)).collect::<Result<_>>()?,
            act: if of == Of::GateUp { Some(empty(outs[0])?) } else { None },
            scratch: ProjectScratch {
                u: [empty(RANK)?, empty(RANK)?, empty(RANK)?],
                x: empty(wide)?,
                dx: empty(wide)?,
            },
            lora,
        })
    }

    /// An element of a result before it is rotated: of projection `i`, for a row of x and its `t`.
    fn element(&self, i: usize, row: usize, x: &[f64], t: &[f64], column: usize) -> f64 {
        let update = self.lora.get(i).map_or(0.0, |f| f64::from(SCALE) * dot(t, &f.b.m.row(column)));
        let residual = self.residual.as_ref().map_or(0.0, |r| r.m.at(row, column));
        dot(x, &self.w[i].m.row(column)) + update + residual
    }

    /// Columns of a result that are verified, and what they are to be.
    fn expected(&self, i: usize, row: usize, x: &[f64]) -> Vec<(usize, f64)> {
        let t = self.lora.get(i).map_or(Vec::new(), |f| {
            let kept: Vec<f64> = x.iter().enumerate().map(|(k, &v)| f.kept(row * x.len() + k, v)).collect();
            (0..RANK).map(|r| dot(&kept, &f.a.m.row(r))).collect()
        });
        let of = |c| self.element(i, row, x, &t, c);
        let (d, width) = (self.setup.config.heads.head_dim, self.y[i].cols());
        if self.of != Of::Qkv || i == 2 {
            return picks(width, COLUMNS).into_iter().map(|c| (c, of(c))).collect();
        }
        // A whole head, in pairs that turn.
        let first = row * 5 % (width / d) * d;
        let frequencies = rope::frequencies(&self.setup.config);
        let turned = frequencies.iter().enumerate().flat_map(|(j, f)| {
            let (sin, cos) = ((row % self.setup.document) as f64 * f).sin_cos();
            let (a, b) = (first + j, first + j + d / 2);
            let (x, y) = (of(a), of(b));
            [(a, x * cos - y * sin), (b, y * cos + x * sin)]
        });
        turned.collect()
    }
}

/// Samples of a row.
fn group(
    what: &'static str,
    t: (DType, f64),
    row: usize,
    expected: &[(usize, f64)],
    found: &[f32],
    cols: usize,
) -> Samples {
    let at = |c: usize| f64::from(found[row * cols + c]);
    let points = expected.iter().map(|&(c, expected)| Point { place: (row, c), expected, found: at(c) });
    Samples { what, dtype: t.0, inner: t.1, points: points.collect() }
}

/// What results may be off before the last rounding: composed of products, each term is rounded to bf16.
pub(super) fn inner(dtype: DType, k: usize) -> f64 {
    if dtype == DType::Bf16 { 2e-2 } else { 4.0 * sums(k) + 1e-5 }
}

impl<B: Backend> Kernel<B> for Forward<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        let by = projections(&self.w, &self.lora);
        let mut t = self.t.iter_mut();
        let mut to: Vec<Projected<'_, B>> = self.y.iter_mut().map(|y| Projected { y, t: t.next() }).collect();
        let (x, s) = (&self.x.t, &mut self.scratch);
        match (self.of, &mut self.act) {
            (Of::GateUp, Some(act)) => {
                let (to, by) = (to.as_mut_slice().try_into(), by.as_slice().try_into());
                dev.project_gate_up(act, to.expect("two"), x, by.expect("two"), s)
            }
            (Of::Qkv, _) => {
                let (to, by) = (to.as_mut_slice().try_into(), by.as_slice().try_into());
                let rope = Rope { table: &self.table, positions: &self.batch.positions };
                dev.project_qkv(to.expect("three"), x, by.expect("three"), Some(rope), s)
            }
            _ => dev.project(&mut to, x, &by, self.residual.as_ref().map(|r| &r.t), s),
        }
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        self.y.iter().chain(&self.act).collect()
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let t = (self.x.t.dtype(), inner(self.x.t.dtype(), self.x.t.cols()));
        let mut all = Vec::new();
        for row in picks(self.x.t.rows(), SAMPLES) {
            let x = self.x.m.row(row);
            let results: Vec<_> = (0..self.y.len()).map(|i| self.expected(i, row, &x)).collect();
            for ((i, what), expected) in self.of.results().iter().enumerate().zip(&results) {
                all.push(group(what, t, row, expected, &found[i], self.y[i].cols()));
            }
            if let [gate, up] = results.as_slice() {
                let silu = |g: f64| g / (1.0 + (-g).exp());
                let act: Vec<_> = gate.iter().zip(up).map(|(&(c, g), &(_, u))| (c, silu(g) * u)).collect();
                all.push(group("act", t, row, &act, &found[2], self.y[0].cols()));
            }
        }
        Ok(all)
    }
}

/// The gradient of x, after its forward.
struct Backward<B: Backend> {
    forward: Forward<B>,
    dy: Vec<Filled<B>>,
    dx: Tensor<B>,
}

impl<B: Backend> Kernel<B> for Backward<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        let f = &mut self.forward;
        let by = projections(&f.w, &f.lora);
        let dys: Vec<&Tensor<B>> = self.dy.iter().map(|dy| &dy.t).collect();
        let ts: Vec<Option<&Tensor<B>>> = (0..by.len()).map(|i| f.t.get(i)).collect();
        let none = || ProjectionGrads { w: None, bias: None, a: None, b: None };
        let mut grads: Vec<ProjectionGrads<'_, B>> = by.iter().map(|_| none()).collect();
        dev.project_dx(Some(&mut self.dx), &mut grads, &dys, &ts, &by, &mut f.scratch)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.dx]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let (f, (n, wide)) = (&self.forward, self.dx.shape());
        let t = (self.dx.dtype(), inner(self.dx.dtype(), self.dy[0].t.cols()));
        let mut all = Vec::new();
        for row in picks(n, SAMPLES) {
            let mut expected: Vec<(usize, f64)> = picks(wide, COLUMNS).into_iter().map(|c| (c, 0.0)).collect();
            for (i, dy) in self.dy.iter().enumerate() {
                let dy = dy.m.row(row);
                let u = f.lora.get(i).map(|l| {
                    let mut u = vec![0.0; RANK];
                    for (j, &d) in dy.iter().enumerate() {
                        u.iter_mut().zip(l.b.m.row(j)).for_each(|(u, b)| *u += f64::from(SCALE) * d * b);
                    }
                    u
                });
                for (c, sum) in &mut expected {
                    *sum += dy.iter().enumerate().map(|(j, d)| d * f.w[i].m.at(j, *c)).sum::<f64>();
                    if let (Some(l), Some(u)) = (f.lora.get(i), &u) {
                        let update = u.iter().enumerate().map(|(r, u)| u * l.a.m.at(r, *c)).sum();
                        *sum += l.kept(row * wide + *c, update);
                    }
                }
            }
            all.push(group("dx", t, row, &expected, &found[0], wide));
        }
        Ok(all)
    }
}

/// Forward and gradient of x of the three groups of a layer.
pub fn cases<B: Backend + 'static>(s: &Setup) -> Vec<Case<B>> {
    let mut all = Vec::new();
    for with_lora in [false, true] {
        for of in [Of::Qkv, Of::GateUp, Of::Down] {
            let ((wide, outs), n) = (of.widths(s), s.tokens);
            let out: usize = outs.iter().sum();
            let rank = if with_lora { RANK } else { 0 };
            let flop = 2.0 * n as f64 * (wide * out + rank * (wide * outs.len() + out)) as f64;
            let weights = wide * out + rank * (wide * outs.len() + out);
            // The residual is read, SwiGLU's output written.
            let more = if of == Of::Qkv { 0 } else { n * outs[0] };
            let size = s.dtype.bytes();
            let (forward, backward) = ((n * (wide + out) + weights + more) * size, (n * (wide + out) + weights) * size);
            let scratch = 2 * n * wide * size;
            let lora = if with_lora { " LoRA" } else { "" };
            let (setup, again) = (s.clone(), s.clone());
            let case = |name: String, bytes: usize, make| Case {
                kernel: "project",
                name,
                shape: format!("{n} x {out} x {wide}"),
                work: Work { flop, bytes: bytes as f64 },
                memory: (forward + scratch) as u64,
                make,
            };
            all.push(case(
                format!("project {}{lora}", of.name()),
                forward,
                Box::new(move |dev: &B, seed| Ok(Box::new(Forward::new(dev, of, &setup, with_lora, seed)?))),
            ));
            let mut dx = case(
                format!("project dx {}{lora}", of.name()),
                backward,
                Box::new(move |dev: &B, seed| {
                    let mut forward = Forward::new(dev, of, &again, with_lora, seed)?;
                    forward.run(dev)?;
                    let (n, dtype) = (again.tokens, again.dtype);
                    let dy = |(i, y): (usize, &Tensor<B>)| {
                        Filled::new(dev, 16 * seed + 11 + i as u64, 1.0, n, y.cols(), dtype)
                    };
                    let dy = forward.y.iter().enumerate().map(dy).collect::<Result<_>>()?;
                    let dx = dev.alloc(n, forward.x.t.cols(), dtype)?;
                    Ok(Box::new(Backward { forward, dy, dx }))
                }),
            );
            dx.memory += backward as u64;
            all.push(dx);
        }
    }
    all
}
