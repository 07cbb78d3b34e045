//! Operations that go through rows or elements once: norms, rotary embedding, SwiGLU, token embedding, dropout, sums.

use super::case::{Case, Kernel, Setup, dot, load};
use super::products::sums;
use super::roofline::Work;
use super::values::Filled;
use super::verify::{Point, Samples, picks};
use crate::backend::{Backend, Dropout, Norm, Rope, Rotate, Swiglu, Write};
use crate::batch::Batch;
use crate::error::Result;
use crate::model::config::ModelConfig;
use crate::model::rope;
use crate::rng::Stream;
use crate::tensor::{DType, Tensor};

/// Rows that are verified.
const SAMPLES: usize = 4;

/// Samples of a row of an output.
pub fn row(what: &'static str, t: (DType, f64), at: usize, expected: &[f64], found: &[f32]) -> Samples {
    let (dtype, inner) = t;
    let of = &found[at * expected.len()..][..expected.len()];
    let points = expected.iter().zip(of).enumerate();
    let points = points.map(|(c, (&expected, &x))| Point { place: (at, c), expected, found: f64::from(x) });
    Samples { what, dtype, inner, points: points.collect() }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

struct NormForward<B: Backend> {
    x: Filled<B>,
    w: Filled<B>,
    eps: f32,
    out: Tensor<B>,
    rstd: Tensor<B>,
}

/// `1 / sqrt(mean(x²) + eps)`.
fn rstd(x: &[f64], eps: f32) -> f64 {
    1.0 / (dot(x, x) / x.len() as f64 + f64::from(eps)).sqrt()
}

impl<B: Backend> Kernel<B> for NormForward<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        dev.rmsnorm_forward(&mut self.out, &mut self.rstd, Norm { x: &self.x.t, w: &self.w.t, eps: self.eps })
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.out, &self.rstd]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let (w, mut all) = (self.w.m.row(0), Vec::new());
        for i in picks(self.x.t.rows(), SAMPLES) {
            let x = self.x.m.row(i);
            let r = rstd(&x, self.eps);
            let out: Vec<f64> = x.iter().zip(&w).map(|(x, w)| x * r * w).collect();
            all.push(row("out", (self.out.dtype(), 1e-5), i, &out, &found[0]));
            all.push(row("rstd", (DType::F32, 1e-5), i, &[r], &found[1]));
        }
        Ok(all)
    }
}

struct NormBackward<B: Backend> {
    forward: NormForward<B>,
    dout: Filled<B>,
    dx: Tensor<B>,
    dw: Tensor<B>,
}

impl<B: Backend> Kernel<B> for NormBackward<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        let f = &self.forward;
        let norm = Norm { x: &f.x.t, w: &f.w.t, eps: f.eps };
        dev.rmsnorm_backward(&mut self.dx, Some(&mut self.dw), &self.dout.t, &f.rstd, norm, Write::Set)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.dx, &self.dw]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let f = &self.forward;
        let (w, (n, width), mut all) = (f.w.m.row(0), f.x.t.shape(), Vec::new());
        for i in picks(n, SAMPLES) {
            let (x, dy) = (f.x.m.row(i), self.dout.m.row(i));
            let (r, sum) = (rstd(&x, f.eps), (0..width).map(|j| dy[j] * w[j] * x[j]).sum::<f64>());
            let dx: Vec<f64> = (0..width).map(|j| r * dy[j] * w[j] - x[j] * r * r * r * sum / width as f64).collect();
            all.push(row("dx", (self.dx.dtype(), 2e-5), i, &dx, &found[0]));
        }
        let columns = picks(width, SAMPLES);
        let mut dw = vec![0.0; columns.len()];
        for i in 0..n {
            let (x, dy) = (f.x.m.row(i), self.dout.m.row(i));
            let r = rstd(&x, f.eps);
            columns.iter().zip(&mut dw).for_each(|(&j, dw)| *dw += dy[j] * x[j] * r);
        }
        let points = columns.iter().zip(dw);
        let points = points.map(|(&j, expected)| Point { place: (0, j), expected, found: f64::from(found[1][j]) });
        all.push(Samples { what: "dw", dtype: DType::F32, inner: 4.0 * sums(n), points: points.collect() });
        Ok(all)
    }
}

struct Rotated<B: Backend> {
    config: ModelConfig,
    x: Filled<B>,
    table: Tensor<B>,
    batch: Batch<B>,
    document: usize,
}

impl<B: Backend> Kernel<B> for Rotated<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        let by = Rope { table: &self.table, positions: &self.batch.positions };
        dev.rope(&mut self.x.t, by, Rotate::Forward)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.x.t]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let d = self.config.heads.head_dim;
        let frequencies = rope::frequencies(&self.config);
        let turned = |i: usize| {
            let mut x = self.x.m.row(i);
            for head in x.chunks_mut(d) {
                for (j, f) in frequencies.iter().enumerate() {
                    let (sin, cos) = ((i % self.document) as f64 * f).sin_cos();
                    (head[j], head[j + d / 2]) =
                        (head[j] * cos - head[j + d / 2] * sin, head[j + d / 2] * cos + head[j] * sin);
                }
            }
            row("x", (self.x.t.dtype(), 1e-6), i, &x, &found[0])
        };
        Ok(picks(self.x.t.rows(), SAMPLES).into_iter().map(turned).collect())
    }
}

struct SwigluForward<B: Backend> {
    gate: Filled<B>,
    up: Filled<B>,
    out: Tensor<B>,
}

impl<B: Backend> Kernel<B> for SwigluForward<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        dev.swiglu_forward(&mut self.out, Swiglu { gate: &self.gate.t, up: &self.up.t })
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.out]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let of = |i| {
            let pairs = self.gate.m.row(i).into_iter().zip(self.up.m.row(i));
            let out: Vec<f64> = pairs.map(|(g, u)| g * sigmoid(g) * u).collect();
            row("out", (self.out.dtype(), 1e-5), i, &out, &found[0])
        };
        Ok(picks(self.gate.t.rows(), SAMPLES).into_iter().map(of).collect())
    }
}

/// In place: what it was given is kept on the device.
struct SwigluBackward<B: Backend> {
    gate: Filled<B>,
    up: Filled<B>,
    dact: Filled<B>,
    given: [Tensor<B>; 3],
}

impl<B: Backend> Kernel<B> for SwigluBackward<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        dev.swiglu_backward(&mut self.gate.t, &mut self.up.t, &mut self.dact.t)
    }

    fn restore(&mut self, dev: &B) -> Result<()> {
        let all = [&mut self.gate, &mut self.up, &mut self.dact].into_iter().zip(&self.given);
        all.into_iter().try_for_each(|(x, given)| dev.copy(&mut x.t, given))
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.gate.t, &self.up.t, &self.dact.t]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let mut all = Vec::new();
        for i in picks(self.gate.t.rows(), SAMPLES) {
            let (g, u, d) = (self.gate.m.row(i), self.up.m.row(i), self.dact.m.row(i));
            let each =
                |f: &dyn Fn(f64, f64, f64) -> f64| -> Vec<f64> { (0..g.len()).map(|j| f(g[j], u[j], d[j])).collect() };
            let dgate = each(&|g, u, d| d * u * sigmoid(g) * (1.0 + g * (1.0 - sigmoid(g))));
            let (dup, act) = (each(&|g, _, d| d * g * sigmoid(g)), each(&|g, u, _| g * sigmoid(g) * u));
            let t = (self.gate.t.dtype(), 1e-5);
            all.extend([row("dgate", t, i, &dgate, &found[0]), row("dup", t, i, &dup, &found[1])]);
            all.push(row("act", t, i, &act, &found[2]));
        }
        Ok(all)
    }
}

/// Ids of tokens, small ones more often, as words are.
fn tokens(n: usize, vocabulary: usize) -> Vec<i32> {
    let stream = Stream::new(&[0x746f_6b65_6e00]);
    (0..n as u64).map(|i| (stream.f64_at(i).powi(3) * vocabulary as f64) as i32).collect()
}

struct Embedding<B: Backend> {
    w: Filled<B>,
    ids: Vec<i32>,
    batch: Batch<B>,
    out: Tensor<B>,
}

impl<B: Backend> Kernel<B> for Embedding<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        dev.embedding_forward(&mut self.out, &self.w.t, &self.batch.tokens)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.out]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let of = |i: usize| row("out", (self.out.dtype(), 0.0), i, &self.w.m.row(self.ids[i] as usize), &found[0]);
        Ok(picks(self.ids.len(), SAMPLES).into_iter().map(of).collect())
    }
}

struct EmbeddingBackward<B: Backend> {
    dout: Filled<B>,
    ids: Vec<i32>,
    batch: Batch<B>,
    dw: Tensor<B>,
}

impl<B: Backend> Kernel<B> for EmbeddingBackward<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        dev.embedding_backward(&mut self.dw, &self.dout.t, &self.batch, 0)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.dw]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let width = self.dw.cols();
        let mut all = Vec::new();
        for id in picks(self.ids.len(), SAMPLES).into_iter().map(|i| self.ids[i]) {
            let rows: Vec<usize> = (0..self.ids.len()).filter(|&i| self.ids[i] == id).collect();
            let mut dw = vec![0.0; width];
            rows.iter().for_each(|&i| dw.iter_mut().zip(self.dout.m.row(i)).for_each(|(d, x)| *d += x));
            all.push(row("dw", (DType::F32, sums(rows.len())), id as usize, &dw, &found[0]));
        }
        Ok(all)
    }
}

struct Dropped<B: Backend> {
    x: Filled<B>,
    dropout: Dropout,
    out: Tensor<B>,
}

impl<B: Backend> Kernel<B> for Dropped<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        dev.dropout(&mut self.out, &self.x.t, self.dropout)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.out]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let (width, scale) = (self.x.t.cols(), f64::from(self.dropout.scale()));
        let of = |i: usize| {
            let keep = |(j, x): (usize, f64)| if self.dropout.drops((i * width + j) as u64) { 0.0 } else { x * scale };
            let out: Vec<f64> = self.x.m.row(i).into_iter().enumerate().map(keep).collect();
            row("out", (self.out.dtype(), 1e-6), i, &out, &found[0])
        };
        Ok(picks(self.x.t.rows(), SAMPLES).into_iter().map(of).collect())
    }
}

struct Sum<B: Backend> {
    dst: Filled<B>,
    src: Filled<B>,
}

impl<B: Backend> Kernel<B> for Sum<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        dev.add(&mut self.dst.t, &self.src.t)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.dst.t]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let of = |i| {
            let sum: Vec<f64> = self.dst.m.row(i).iter().zip(self.src.m.row(i)).map(|(a, b)| a + b).collect();
            row("dst", (self.dst.t.dtype(), 1e-6), i, &sum, &found[0])
        };
        Ok(picks(self.dst.t.rows(), SAMPLES).into_iter().map(of).collect())
    }
}

/// The row operations of a layer, and the embedding.
pub fn cases<B: Backend + 'static>(s: &Setup) -> Vec<Case<B>> {
    let (n, dtype) = (s.tokens, s.dtype);
    let c = &s.config;
    let (hidden, ffn, q, vocabulary) = (c.hidden_size, c.intermediate_size, c.q_dim(), c.vocab_size);
    let (eps, size) = (c.rms_norm_eps as f32, dtype.bytes());
    let elements = |cols: usize| (n * cols) as f64;
    let mut all = Vec::new();
    let mut add = |kernel, name: &str, (rows, cols): (usize, usize), flop: f64, bytes: f64, make| {
        let shape = format!("{rows} x {cols}");
        // In place, one matrix less than is read and written.
        let held = bytes - if ["add", "rope"].contains(&name) { (rows * cols * size) as f64 } else { 0.0 };
        all.push(Case { kernel, name: name.into(), shape, work: Work { flop, bytes }, memory: held as u64, make });
    };
    let norm = move |dev: &B, seed: u64| -> Result<NormForward<B>> {
        Ok(NormForward {
            x: Filled::new(dev, 3 * seed, 1.0, n, hidden, dtype)?,
            w: Filled::new(dev, 3 * seed + 1, 1.0, 1, hidden, dtype)?,
            eps,
            out: dev.alloc(n, hidden, dtype)?,
            rstd: dev.alloc(n, 1, DType::F32)?,
        })
    };
    let (e, b) = (elements(hidden), size as f64);
    let rstds = (4 * n) as f64;
    add(
        "rmsnorm",
        "rmsnorm forward",
        (n, hidden),
        4.0 * e,
        2.0 * e * b + rstds,
        Box::new(move |dev, seed| Ok(Box::new(norm(dev, seed)?))),
    );
    add(
        "rmsnorm",
        "rmsnorm backward",
        (n, hidden),
        10.0 * e,
        3.0 * e * b + rstds,
        Box::new(move |dev, seed| {
            let mut forward = norm(dev, seed)?;
            forward.run(dev)?;
            let dout = Filled::new(dev, 3 * seed + 2, 1.0, n, hidden, dtype)?;
            let (dx, dw) = (dev.alloc(n, hidden, dtype)?, dev.alloc(1, hidden, DType::F32)?);
            Ok(Box::new(NormBackward { forward, dout, dx, dw }))
        }),
    );
    let setup = s.clone();
    add(
        "rope",
        "rope",
        (n, q),
        3.0 * elements(q),
        2.0 * elements(q) * b,
        Box::new(move |dev, seed| {
            let (config, positions) = (setup.config.clone(), setup.document.min(n));
            let mut table = dev.alloc(positions, config.heads.head_dim, DType::F32)?;
            dev.upload(&mut table, &rope::table(&config, positions))?;
            let batch = load(dev, vec![0; n], vec![0; n], setup.doc_start())?;
            let x = Filled::new(dev, seed, 1.0, n, q, dtype)?;
            Ok(Box::new(Rotated { config, x, table, batch, document: setup.document }))
        }),
    );
    let w = elements(ffn);
    add(
        "swiglu",
        "swiglu forward",
        (n, ffn),
        5.0 * w,
        3.0 * w * b,
        Box::new(move |dev, seed| {
            let fill = |i| Filled::new(dev, 2 * seed + i, 1.0, n, ffn, dtype);
            Ok(Box::new(SwigluForward { gate: fill(0)?, up: fill(1)?, out: dev.alloc(n, ffn, dtype)? }))
        }),
    );
    add(
        "swiglu",
        "swiglu backward",
        (n, ffn),
        12.0 * w,
        6.0 * w * b,
        Box::new(move |dev, seed| {
            let fill = |i| Filled::new(dev, 3 * seed + i, 1.0, n, ffn, dtype);
            let (gate, up, dact) = (fill(0)?, fill(1)?, fill(2)?);
            let given = [fill(0)?.t, fill(1)?.t, fill(2)?.t];
            Ok(Box::new(SwigluBackward { gate, up, dact, given }))
        }),
    );
    let ids = tokens(n, vocabulary);
    let mut distinct = ids.clone();
    distinct.sort_unstable();
    distinct.dedup();
    let (of, rows) = (ids.clone(), (distinct.len() * hidden) as f64);
    add(
        "embedding",
        "embedding forward",
        (n, hidden),
        0.0,
        (e + rows) * b,
        Box::new(move |dev, seed| {
            let w = Filled::new(dev, seed, 0.02, vocabulary, hidden, dtype)?;
            let batch = load(dev, of.clone(), vec![0; n], vec![0; n])?;
            Ok(Box::new(Embedding { w, ids: of.clone(), batch, out: dev.alloc(n, hidden, dtype)? }))
        }),
    );
    add(
        "embedding",
        "embedding backward",
        (n, hidden),
        e,
        e * b + 8.0 * rows,
        Box::new(move |dev, seed| {
            let dout = Filled::new(dev, seed, 1.0, n, hidden, dtype)?;
            let batch = load(dev, ids.clone(), vec![0; n], vec![0; n])?;
            let dw = dev.alloc(vocabulary, hidden, DType::F32)?;
            Ok(Box::new(EmbeddingBackward { dout, ids: ids.clone(), batch, dw }))
        }),
    );
    add(
        "dropout",
        "dropout",
        (n, hidden),
        e,
        2.0 * e * b,
        Box::new(move |dev, seed| {
            let x = Filled::new(dev, seed, 1.0, n, hidden, dtype)?;
            Ok(Box::new(Dropped { x, dropout: Dropout { key: seed, p: 0.05 }, out: dev.alloc(n, hidden, dtype)? }))
        }),
    );
    add(
        "add",
        "add",
        (n, hidden),
        e,
        3.0 * e * b,
        Box::new(move |dev, seed| {
            let fill = |i| Filled::new(dev, 2 * seed + i, 1.0, n, hidden, dtype);
            Ok(Box::new(Sum { dst: fill(0)?, src: fill(1)? }))
        }),
    );
    // The whole table lies there, whatever rows of it are read.
    for case in all.iter_mut().filter(|c: &&mut Case<B>| c.kernel == "embedding") {
        case.memory += (vocabulary * hidden * if case.name.ends_with("forward") { size } else { 4 }) as u64;
    }
    all
}
