//! AdamW and the squared norm of the gradient over the weights of a layer.

use super::case::{Case, Kernel, Setup};
use super::roofline::Work;
use super::values::Filled;
use super::verify::{Point, Samples, picks};
use crate::backend::{AdamWSlot, AdamWStep, Backend};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Elements that are verified.
const SAMPLES: usize = 64;

/// The first step of a run.
const STEP: AdamWStep = AdamWStep {
    lr: 1e-3,
    beta1: 0.9,
    beta2: 0.999,
    one_minus_beta1: 0.1,
    one_minus_beta2: 0.001,
    eps: 1e-8,
    weight_decay: 0.1,
    bias_correction1: 0.1,
    bias_correction2: 0.001,
};

struct Update<B: Backend> {
    p: Filled<B>,
    master: Option<Filled<B>>,
    g: Filled<B>,
    m: Tensor<B>,
    v: Tensor<B>,
    stats: B::Stats,
}

impl<B: Backend> Kernel<B> for Update<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        let master = self.master.as_mut().map(|f| &mut f.t);
        let (p, m, v, g) = (&mut self.p.t, &mut self.m, &mut self.v, &self.g.t);
        let slot = AdamWSlot { p, master, m, v, g, first_row: 0, range: 0..g.len(), decays: true, lr_scale: 1.0 };
        dev.adamw_all(&self.stats, &mut [slot], STEP)
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        [&self.p.t, &self.m, &self.v].into_iter().chain(self.master.as_ref().map(|f| &f.t)).collect()
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let cols = self.g.t.cols();
        let places = picks(self.g.t.len(), SAMPLES);
        // The constants are f32.
        let [b1, b2] = [STEP.one_minus_beta1, STEP.one_minus_beta2].map(f64::from);
        let [c1, c2] = [STEP.bias_correction1, STEP.bias_correction2].map(f64::from);
        let m = |i| b1 * self.g.m.v.at(i);
        let v = |i| b2 * self.g.m.v.at(i).powi(2);
        let p = |i| {
            let p0 = self.master.as_ref().unwrap_or(&self.p).m.v.at(i);
            let lr = f64::from(STEP.lr as f32);
            p0 * (1.0 - lr * f64::from(STEP.weight_decay))
                - lr * (m(i) / c1) / ((v(i) / c2).sqrt() + f64::from(STEP.eps))
        };
        let of = |what, dtype, found: &[f32], expected: &dyn Fn(usize) -> f64| {
            let point =
                |&i: &usize| Point { place: (i / cols, i % cols), expected: expected(i), found: f64::from(found[i]) };
            Samples { what, dtype, inner: 1e-6, points: places.iter().map(point).collect() }
        };
        let mut all = vec![of("p", self.p.t.dtype(), &found[0], &p)];
        all.extend([of("m", DType::F32, &found[1], &m), of("v", DType::F32, &found[2], &v)]);
        all.extend(found.get(3).map(|master| of("master", DType::F32, master, &p)));
        Ok(all)
    }
}

struct Norm2<B: Backend> {
    g: Filled<B>,
    stats: B::Stats,
}

impl<B: Backend> Kernel<B> for Norm2<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        dev.begin_step(&mut self.stats)?;
        dev.grad_norm2(&mut self.stats, &[&self.g.t])
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        Vec::new()
    }

    fn samples(&self, dev: &B, _found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let expected = self.g.m.v.all(self.g.t.len()).iter().map(|&x| f64::from(x).powi(2)).sum();
        let found = dev.figures(&self.stats)?.grad_norm2;
        let points = vec![Point { place: (0, 0), expected, found }];
        Ok(vec![Samples { what: "norm²", dtype: DType::F32, inner: 1e-6, points }])
    }
}

/// Over as many weights as a layer has.
pub fn cases<B: Backend + 'static>(s: &Setup) -> Vec<Case<B>> {
    let (c, dtype) = (&s.config, s.dtype);
    let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
    let rows = 2 * c.q_dim() + 2 * c.kv_dim() + 3 * ffn;
    let elements = (rows * hidden) as f64;
    // Gradient read; weight or its master, and two moments, read and written; the bf16 weight written.
    let (masters, rounded) = if dtype == DType::Bf16 { (4.0, 2.0) } else { (0.0, 0.0) };
    let shape = format!("{rows} x {hidden}");
    vec![
        Case {
            kernel: "adamw",
            name: "adamw".into(),
            shape: shape.clone(),
            work: Work { flop: 14.0 * elements, bytes: elements * (28.0 + rounded) },
            memory: (elements * (12.0 + masters + dtype.bytes() as f64)) as u64,
            make: Box::new(move |dev: &B, seed| {
                let fill = |seed, dtype| Filled::new(dev, seed, 0.02, rows, hidden, dtype);
                let master = if dtype == DType::Bf16 { Some(fill(2 * seed, DType::F32)?) } else { None };
                let (g, p) = (fill(2 * seed + 1, DType::F32)?, fill(2 * seed, dtype)?);
                let (m, v) = (dev.alloc(rows, hidden, DType::F32)?, dev.alloc(rows, hidden, DType::F32)?);
                let mut stats = dev.new_stats()?;
                dev.begin_step(&mut stats)?;
                Ok(Box::new(Update { p, master, g, m, v, stats }))
            }),
        },
        Case {
            kernel: "norm2",
            name: "norm2 of the gradient".into(),
            shape,
            work: Work { flop: 2.0 * elements, bytes: 4.0 * elements },
            memory: (4.0 * elements) as u64,
            make: Box::new(move |dev: &B, seed| {
                let g = Filled::new(dev, seed, 0.02, rows, hidden, DType::F32)?;
                Ok(Box::new(Norm2 { g, stats: dev.new_stats()? }))
            }),
        },
    ]
}
