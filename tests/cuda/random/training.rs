//! A drawn training on any backend, and how far its results may be from those in f64.

use std::collections::HashMap;

use ringtune::backend::Backend;
use ringtune::comm::Solo;
use ringtune::data::loader::Step;
use ringtune::error::Result;
use ringtune::hf::TensorSource;
use ringtune::hf::artifact::HostParams;
use ringtune::model::config::ModelConfig;
use ringtune::model::decode::Decoder;
use ringtune::model::weights::{Kind, Part, Place};
use ringtune::rng::Stream;
use ringtune::tensor::{DType, HostTensor};
use ringtune::train::setup;
use ringtune::train::step::{Problem, Workload};

use super::draw::{Case, NEW};
use crate::close::{rounded, values};

/// Results by name.
pub type Named = (String, Vec<f32>);

/// Weights that are a function of seed and place, of about the size that those of models have.
struct Drawn<'a>(&'a Case);

/// As a run stores them, so that all devices begin with the same numbers.
fn normal(of: &Case, at: Place, (rows, cols): (usize, usize), size: f64, shift: f64) -> HostTensor {
    let name = at.to_string().bytes().fold(0u64, |hash, byte| hash.wrapping_mul(31) + u64::from(byte));
    let stream = Stream::new(&[of.seed, name]);
    let value = |i| rounded(of.settings.dtype, size * stream.normal_at(i) + shift) as f32;
    HostTensor { rows, cols, data: (0..(rows * cols) as u64).map(value).collect() }
}

impl TensorSource for Drawn<'_> {
    fn config(&self) -> &ModelConfig {
        &self.0.config
    }

    fn load(&self, at: Place) -> Result<HostTensor> {
        let shape = at.shape(&self.0.config, 0);
        let (size, shift) = match at.kind() {
            Kind::Norm => (0.2, 1.0),
            Kind::Bias => (0.3, 0.0),
            Kind::Vocabulary | Kind::Matrix | Kind::LowRank => (1.0 / (shape.1 as f64).sqrt(), 0.0),
        };
        Ok(normal(self.0, at, shape, size, shift))
    }
}

/// A case being trained.
pub struct Training<'a, B: Backend> {
    dev: &'a B,
    case: &'a Case,
    work: Workload<B>,
    /// First and second moments in f64, of the device's own gradients.
    moments: HashMap<Place, [Vec<f64>; 2]>,
}

/// Learning rate of the steps.
const RATE: f64 = 0.01;

impl<'a, B: Backend> Training<'a, B> {
    /// With updates that are not zero.
    pub fn new(dev: &'a B, case: &'a Case) -> Result<Self> {
        let mut work = setup::workload(dev, &Drawn(case), &case.settings, case.new_rows, case.capacity)?;
        let mut params = work.export_params(dev)?;
        for (at, t) in &mut params {
            let size = match at {
                Place::Layer(_, Part::LoraA(_)) => 1.0 / (t.cols as f64).sqrt(),
                Place::Layer(_, Part::LoraB(_)) => 0.3 / (t.cols as f64).sqrt(),
                _ => continue,
            };
            *t = normal(case, *at, (t.rows, t.cols), size, 0.0);
        }
        work.import_params(dev, &params)?;
        Ok(Self { dev, case, work, moments: HashMap::new() })
    }

    /// A step: losses of tokens, gradients, and why there was no update. What it updates is held to the gradients.
    pub fn step(&mut self, step: usize) -> Result<(Vec<Named>, Option<Problem>)> {
        let before = self.work.export_params(self.dev)?;
        let Self { dev, case, work, .. } = self;
        let micro_batches = case.steps[step].clone();
        let batch = Step { micro_batches, ..Default::default() };
        let stepped = work.step(*dev, &Solo, &batch, step as u64, RATE)?;
        let mut all = Vec::new();
        if stepped.problem.is_some() {
            return Ok((all, stepped.problem));
        }
        let mut sum = 0.0;
        for (i, b) in case.steps[step].iter().enumerate().filter(|(_, b)| b.n_valid > 0) {
            let losses = work.acts.losses_at(*dev, i)?;
            assert_eq!(losses.len(), b.tokens.len());
            sum += losses.iter().map(|&x| f64::from(x)).sum::<f64>();
            all.push((format!("losses of micro-batch {i}"), losses));
        }
        // What is logged is made of the same figures.
        let mean = sum / stepped.supervised as f64;
        assert!((stepped.loss - mean).abs() <= 1e-6 * mean.abs(), "loss {}, of the tokens {mean}", stepped.loss);
        let mut squares = 0.0;
        for (at, g) in work.grads.places() {
            let Some(g) = g else { continue };
            let g = values(*dev, g);
            squares += g.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
            all.push((format!("gradient of {at}"), g));
        }
        let norm = squares.sqrt();
        assert!((stepped.grad_norm - norm).abs() <= 1e-6 * norm, "norm {}, of gradients {norm}", stepped.grad_norm);
        self.follows_its_gradients(&before, norm)?;
        Ok((all, None))
    }

    /// The update is that of AdamW, in f64, by the device's own gradients.
    fn follows_its_gradients(&mut self, before: &HostParams, norm: f64) -> Result<()> {
        let Self { dev, case, work, moments } = self;
        let s = &case.settings;
        let clip = s.max_grad_norm.map_or(1.0, |most| (most / (norm + 1e-6)).min(1.0));
        let updates = work.optimizer.updates() as i32;
        let corrections = [s.adam_beta1, s.adam_beta2].map(|beta| 1.0 - beta.powi(updates));
        let after = work.export_params(*dev)?;
        let mut grads = work.grads.places().into_iter().filter_map(|(at, g)| Some((at, g.as_ref()?)));
        for ((at, before), (_, after)) in before.iter().zip(&after) {
            let g = grads.find(|(place, _)| place == at).map(|(_, g)| values(*dev, g)).expect("it is trained");
            let [m, v] = moments.entry(*at).or_insert_with(|| [vec![0.0; g.len()], vec![0.0; g.len()]]);
            let is_b = matches!(at, Place::Layer(_, Part::LoraB(_)));
            let rate = RATE * s.lora_plus.filter(|_| is_b).unwrap_or(1.0);
            // New rows of a vocabulary do not decay.
            let decays = at.decays() && !(at.kind() == Kind::Vocabulary && case.settings.lora.is_some());
            let decay = if decays { s.weight_decay } else { 0.0 };
            for (i, g) in g.iter().map(|&g| f64::from(g) * clip).enumerate() {
                m[i] = s.adam_beta1 * m[i] + (1.0 - s.adam_beta1) * g;
                v[i] = s.adam_beta2 * v[i] + (1.0 - s.adam_beta2) * g * g;
                let moved = m[i] / corrections[0] / ((v[i] / corrections[1]).sqrt() + s.adam_eps);
                let p = f64::from(before.data[i]);
                let (expected, found) = (p * (1.0 - rate * decay) - rate * moved, f64::from(after.data[i]));
                // Moments of both signs may cancel.
                let allowed = rate * (2e-5 * moved.abs() + 2e-6) + 2.4e-7 * p.abs();
                assert!(
                    (found - expected).abs() <= allowed,
                    "{at}[{i}] from {p} to {found}, expected {expected}, gradient {g}"
                );
            }
        }
        Ok(())
    }

    /// What is trained, as a run stores it.
    pub fn weights(&mut self) -> Result<HostParams> {
        let mut params = self.work.export_params(self.dev)?;
        let dtype = self.case.settings.dtype;
        params.iter_mut().flat_map(|(_, t)| &mut t.data).for_each(|x| *x = rounded(dtype, f64::from(*x)) as f32);
        Ok(params)
    }

    pub fn take(&mut self, params: &HostParams) -> Result<()> {
        self.work.import_params(self.dev, params)
    }

    /// Losses of an evaluation of the first step's micro-batches.
    pub fn evaluate(&mut self) -> Result<Vec<Named>> {
        let mut all = Vec::new();
        for (i, b) in self.case.steps[0].iter().enumerate().filter(|(_, b)| b.n_valid > 0) {
            let [nll, n, correct] = self.work.evaluate(self.dev, b)?;
            let losses = self.work.acts.losses(self.dev)?;
            let sum = losses.iter().map(|&x| f64::from(x)).sum::<f64>();
            assert!((sum - nll).abs() <= 1e-6 * nll.abs() && n == b.n_valid as f64, "evaluated {nll} of {n}, {sum}");
            assert!((0.0..=n).contains(&correct), "{correct} of {n} are right");
            all.push((format!("losses of an evaluation of micro-batch {i}"), losses));
        }
        Ok(all)
    }

    /// Logits of prompts that are continued at once, with tokens that are given; then a sequence of which a part is kept.
    pub fn decode(&self) -> Result<Vec<Named>> {
        let Self { dev, case, work, .. } = self;
        let (dev, model, prompts) = (*dev, &work.model, &case.prompts);
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(1);
        let mut decoder = Decoder::new(dev, model, prompts.len(), longest + NEW)?;
        decoder.prepare(dev, model, prompts.iter().map(Vec::len))?;
        let mut all = Vec::new();
        for (s, prompt) in prompts.iter().enumerate() {
            all.push((format!("logits after prompt {s}"), decoder.prefill(dev, model, s, prompt)?));
        }
        for new in 0..NEW {
            // All but one at the end.
            let which = (0..prompts.len()).filter(|s| new < 2 || *s > 0 || prompts.len() == 1);
            let which: Vec<_> = which.map(|s| (s, ((s + 7 * new) % case.config.vocab_size) as u32)).collect();
            all.push((format!("logits after new token {new}"), decoder.step(dev, model, &which)?));
        }
        let mut alone = Decoder::new(dev, model, 1, longest + NEW)?;
        alone.prefill(dev, model, 0, &prompts[0])?;
        let keep = prompts[0].len() / 2;
        let rest: Vec<u32> = (0..NEW).map(|i| (i % case.config.vocab_size) as u32).collect();
        all.push((format!("logits after {keep} tokens that were kept"), alone.extend(dev, model, keep, &rest)?));
        Ok(all)
    }
}

/// The Euclidean norm of what is given.
fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

/// How far results may be from those in f64: in the Euclidean norm, four times as far as the CPU's each, twice as far all of them together, each
/// by its size; and by what rounding to the run's type is, of a result or, where others have all the size, of a part of the largest of its
/// kind. A line for each that is further. The largest distance in units of what is allowed comes with them.
///
/// Why four times and twice: the device and the CPU round as often, each at other places, so that two distances are norms of independent errors of one
/// size, and their ratio squared has an F distribution whose degrees are the number of roundings that decide. A gradient behind one column, or
/// one key, hangs on few. Of ratios with 4 deciding roundings on each side 10 in 100 are beyond two and 1 in 100 beyond four; with 8, 3 in
/// 100 and 4 in 10,000; with 32, one in 10,000 is beyond two. A case has some dozens of results, of which some hang on eight; all of them together hang
/// on hundreds. A sum that is rounded once too often or a product in the wrong type stands in all of them.
pub fn too_far(dtype: DType, ours: &[Named], cpu: &[Named], exact: &[Named]) -> (Vec<String>, f64) {
    assert!(ours.len() == exact.len() && cpu.len() == exact.len(), "numbers of results");
    let unit = if dtype == DType::Bf16 { 4e-3 } else { 2e-6 };
    let kind = |name: &str| name.split(' ').next().unwrap_or("").to_string();
    let size = |x: &[f32]| norm(x.iter().map(|&x| f64::from(x)));
    let largest =
        |of: &str| exact.iter().filter(|(name, _)| kind(name) == of).map(|(_, x)| size(x)).fold(0.0, f64::max);
    let (mut lines, mut worst) = (Vec::new(), 0.0f64);
    let mut hold = |what: String, far: f64, cpu: f64, allowed: f64| {
        let share = far / allowed;
        // NaN is the worst.
        if share > worst || share.is_nan() {
            worst = share;
        }
        if share > 1.0 || share.is_nan() {
            lines.push(format!("{what}: off by {far:.2e}, the CPU by {cpu:.2e}, allowed {allowed:.2e}"));
        }
    };
    let (mut all, mut all_cpu) = (Vec::new(), Vec::new());
    for (((name, ours), (_, cpu)), (_, exact)) in ours.iter().zip(cpu).zip(exact) {
        assert!(ours.len() == exact.len() && cpu.len() == exact.len(), "{name}: numbers of elements");
        let from = |x: &[f32]| norm(x.iter().zip(exact).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        let largest = largest(&kind(name));
        // Zero on paper, as where a token sees itself alone: what is left of terms that cancel is as large as they are.
        let share = if size(exact) < 1e-6 * largest { 0.1 } else { 0.01 };
        let floor = unit * size(exact).max(share * largest) + f64::from(f32::MIN_POSITIVE);
        let (far, cpu) = (from(ours), from(cpu));
        hold(format!("{name}, {} elements of {:.2e}", exact.len(), size(exact)), far, cpu, 4.0 * cpu + floor);
        all.push(far / floor * unit);
        all_cpu.push(cpu / floor * unit);
    }
    if !all.is_empty() {
        let mean = |x: Vec<f64>| norm(x.iter().copied()) / (x.len() as f64).sqrt();
        let (all, cpu) = (mean(all), mean(all_cpu));
        hold("all results, by their sizes".into(), all, cpu, 2.0 * cpu + unit);
    }
    (lines, worst)
}
