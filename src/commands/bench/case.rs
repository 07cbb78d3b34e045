//! A case: one operation on one shape, with what makes and verifies it.

use super::roofline::Work;
use super::verify::{Samples, judge};
use crate::backend::Backend;
use crate::batch::{Batch, BatchIndex, MicroBatch};
use crate::error::Result;
use crate::measure::Tally;
use crate::model::config::ModelConfig;
use crate::tensor::{DType, Tensor};

/// What the shapes of the cases depend on.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The model.
    pub config: ModelConfig,
    /// Tokens of a micro-batch.
    pub tokens: usize,
    /// Tokens of a document at most.
    pub document: usize,
    /// How weights and activations are stored.
    pub dtype: DType,
}

impl Setup {
    /// First position of each token's document: documents of `document` tokens one after the other, the last one shorter.
    pub fn doc_start(&self) -> Vec<i32> {
        (0..self.tokens).map(|i| (i / self.document * self.document) as i32).collect()
    }

    /// Pairs of a query and a key that it sees.
    pub fn pairs(&self) -> f64 {
        self.doc_start().iter().enumerate().map(|(i, &start)| (i - start as usize + 1) as f64).sum()
    }
}

/// An operation on one set of buffers.
pub trait Kernel<B: Backend> {
    /// Does it once.
    ///
    /// # Errors
    /// If the device refuses it.
    fn run(&mut self, dev: &B) -> Result<()>;

    /// Puts back what a run overwrites, where that changes the next run's work.
    ///
    /// # Errors
    /// If the device refuses a copy.
    fn restore(&mut self, _dev: &B) -> Result<()> {
        Ok(())
    }

    /// Every tensor that a run writes.
    fn outputs(&self) -> Vec<&Tensor<B>>;

    /// Samples of the outputs, which `found` has, after the first run.
    ///
    /// # Errors
    /// If the device refuses a copy.
    fn samples(&self, dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>>;
}

/// What makes the buffers of a case: the device and a seed.
type Make<B> = Box<dyn Fn(&B, u64) -> Result<Box<dyn Kernel<B>>>>;

/// One operation on one shape.
pub struct Case<B: Backend> {
    /// The kernel, a word of `--only`.
    pub kernel: &'static str,
    /// The kernel and what it is of.
    pub name: String,
    /// The shape in short.
    pub shape: String,
    /// What a run has to do.
    pub work: Work,
    /// Bytes of one set of buffers, whether or not a run touches them.
    pub memory: u64,
    /// Makes a set.
    pub make: Make<B>,
}

/// A case of which the first run is verified.
pub struct Verified<B: Backend> {
    /// A set of buffers.
    pub kernel: Box<dyn Kernel<B>>,
    /// The relative error of the samples.
    pub error: f64,
    /// What the run asked of the device.
    pub tally: Option<Tally>,
}

impl<B: Backend> Case<B> {
    /// Makes a set of buffers and verifies its first run.
    ///
    /// # Errors
    /// If the device refuses something, or a result is wrong.
    pub fn verified(&self, dev: &B) -> Result<Verified<B>> {
        let mut kernel = (self.make)(dev, 1)?;
        dev.synchronize()?;
        let before = dev.tally();
        kernel.run(dev)?;
        dev.synchronize()?;
        let tally = dev.tally().zip(before).map(|(now, then)| now.since(then));
        let found = kernel.outputs().into_iter().map(|t| values(dev, t)).collect::<Result<Vec<_>>>()?;
        let error = judge(&self.name, &kernel.samples(dev, &found)?)?;
        Ok(Verified { kernel, error, tally })
    }
}

/// The values of a tensor of numbers.
///
/// # Errors
/// If the device refuses the copy.
pub fn values<B: Backend>(dev: &B, t: &Tensor<B>) -> Result<Vec<f32>> {
    let mut v = vec![0.0; t.len()];
    dev.download(&mut v, t)?;
    Ok(v)
}

/// A micro-batch on the device.
///
/// # Errors
/// If the device has not enough memory.
pub fn load<B: Backend>(dev: &B, tokens: Vec<i32>, targets: Vec<i32>, doc_start: Vec<i32>) -> Result<Batch<B>> {
    let host = MicroBatch { tokens, targets, doc_start, ..MicroBatch::default() };
    let mut batch = dev.new_batch(host.tokens.len())?;
    dev.load_batch(&mut batch, BatchIndex::default().view(&host))?;
    Ok(batch)
}

/// The sum of products.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}
