//! One model over any backend: forward and backward by hand, no autograd.
//!
//! A [`Model`] is run; everything it needs is allocated once, in [`Acts`]: a micro-batch is loaded, run forward, and run backward
//! into [`Grads`].

pub mod acts;
mod attention;
pub mod config;
pub mod decode;
pub mod flops;
pub mod llama;
pub mod lora;
mod mlp;
mod pass;
pub mod place;
pub mod rope;
mod scratch;
pub mod weights;

use std::ops::Range;

use crate::backend::{Backend, Keep};
use crate::error::Result;
use crate::tensor::{DType, Tensor};
use crate::words::words;
use config::ModelConfig;
use weights::{Kind, Place, Weights};

pub use acts::{Acts, ActsOptions};
pub use llama::{Ready, backward, forward, forward_with, logits, loss};
pub use lora::LoraSpec;
pub use scratch::dropped_width;

/// The weights of a model on a device.
pub type Params<B> = Weights<Tensor<B>>;

/// f32 gradients; `None` where the weight is frozen. Those of the embedding and head may hold the trained rows alone: then
/// they are the last rows before [`config::ModelConfig::n_classes`].
pub type Grads<B> = Weights<Option<Tensor<B>>>;

/// What is computed again in backward instead of being kept. The results are the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing but norms and SwiGLU.
    #[default]
    None,
    /// Queries, keys, values and attention of each layer.
    Attention,
    /// Everything of a layer; only its input is kept.
    Layer,
}
words!(Recompute { None = "none", Attention = "attention", Layer = "layer" });

/// A model on a device: its shape, its weights, and how they are used.
pub struct Model<B: Backend> {
    /// Shape.
    pub config: ModelConfig,
    /// Weights; low-rank updates are among them.
    pub params: Params<B>,
    /// What the low-rank updates are, where there are some.
    pub lora: Option<LoraSpec>,
    /// Storage of activations: f32 or bf16.
    pub dtype: DType,
    /// Rows of the embedding and the head that are trained beside low-rank updates: those of a grown vocabulary. Nothing else says
    /// which rows of the vocabulary are trained: all of them without updates, these with.
    pub new_rows: Option<Range<usize>>,
}

impl<B: Backend> Model<B> {
    /// A model that is used as it is: nothing of it is trained.
    pub fn fixed(config: ModelConfig, params: Params<B>, lora: Option<LoraSpec>, dtype: DType) -> Self {
        Self { config, params, lora, dtype, new_rows: None }
    }

    /// The head: its own weight, or the embedding when tied.
    pub fn head(&self) -> &Tensor<B> {
        self.params.lm_head.as_ref().unwrap_or(&self.params.embed)
    }

    /// Has the device keep what its products read in the form that they read: what is not trained beside low-rank updates for the run, else every
    /// matrix from one change to the next. Gives the bytes that this takes beyond the weights'.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn keep_packed(&mut self, dev: &B) -> Result<u64> {
        let (config, frozen, new_rows) = (&self.config, self.lora.is_some(), self.new_rows.is_some());
        let mut taken = 0;
        for (at, w) in self.params.places_mut() {
            if let Some(how) = kept_packed(config, frozen, new_rows, at) {
                taken += dev.keep_packed(w, how)? as u64;
            }
        }
        Ok(taken)
    }

    /// Probability of dropping an element of a low-rank update's input in training; `None` without dropout.
    fn dropout(&self) -> Option<f32> {
        self.lora.as_ref().map(|l| l.dropout as f32).filter(|&p| p > 0.0)
    }

    /// First row of a weight that its gradient covers.
    pub fn first_row(&self, at: Place) -> usize {
        first_row(self.new_rows.as_ref(), at)
    }

    /// How many rows of the embedding, and of the head, are trained.
    pub fn vocabulary_rows(&self) -> usize {
        match (&self.lora, &self.new_rows) {
            (None, _) => self.config.vocab_size,
            (Some(_), rows) => rows.as_ref().map_or(0, Range::len),
        }
    }

    /// How many rows of a weight are trained.
    fn trained_rows(&self, at: Place, weight: &Tensor<B>) -> usize {
        match at.kind() {
            _ if self.lora.is_none() => weight.rows(),
            Kind::LowRank => weight.rows(),
            Kind::Vocabulary => self.vocabulary_rows(),
            Kind::Matrix | Kind::Norm | Kind::Bias => 0,
        }
    }
}

/// How a weight is kept for products, of a model whose weights are `frozen` or trained; `None` where they read it seldom, or it is small. Of what is
/// frozen others may read the rows too: the embedding's are gathered, and of a head with rows beyond the classes a product reads a part.
pub fn kept_packed(config: &ModelConfig, frozen: bool, new_rows: bool, at: Place) -> Option<Keep> {
    let rows_are_read = match at {
        Place::Embed if config.tied && !new_rows => true,
        Place::Head if !new_rows => config.n_classes != config.vocab_size,
        Place::Layer(_, weights::Part::Matrix(_)) => false,
        _ => return None,
    };
    Some(match (frozen, rows_are_read) {
        (false, _) => Keep::Trained,
        (true, true) => Keep::FrozenAndRead,
        (true, false) => Keep::Frozen,
    })
}

/// First row of a weight that its gradient covers, in a model of which these rows of the vocabulary are trained.
pub fn first_row(new_rows: Option<&Range<usize>>, at: Place) -> usize {
    match new_rows {
        Some(rows) if at.kind() == Kind::Vocabulary => rows.start,
        _ => 0,
    }
}

/// Elements at whose multiples gradients and moments begin in memory that they share: the block that norms and ranks go by.
pub const BLOCK: usize = 16 * 1024;

/// f32 gradients of zeros for what is trained: with low-rank updates these alone, and [`Model::new_rows`]; without, everything.
///
/// # Errors
/// If the device has not enough memory.
pub fn alloc_grads<B: Backend>(dev: &B, model: &Model<B>) -> Result<Grads<B>> {
    let lens = model.params.places().into_iter().map(|(at, t)| model.trained_rows(at, t) * t.cols());
    let rooms: Vec<usize> = lens.filter(|len| *len > 0).map(|len| len.next_multiple_of(BLOCK)).collect();
    alloc_grads_in(dev, model, &rooms)
}

/// As [`alloc_grads`], each in a room of so many elements: one for every trained weight, in the order of files.
///
/// # Errors
/// If the device has not enough memory.
///
/// # Panics
/// If there are more or fewer rooms, or one is too small.
pub fn alloc_grads_in<B: Backend>(dev: &B, model: &Model<B>, rooms: &[usize]) -> Result<Grads<B>> {
    let shape = |at: Place, t: &Tensor<B>| Some((model.trained_rows(at, t), t.cols())).filter(|s| s.0 > 0);
    let shapes: Vec<_> = model.params.places().into_iter().filter_map(|(at, t)| shape(at, t)).collect();
    let mut grads = dev.alloc_together(&shapes, rooms, DType::F32)?.into_iter();
    model.params.try_map(|at, t| Ok(shape(at, t).and_then(|_| grads.next())))
}

/// Sets every gradient to zero.
///
/// # Errors
/// If the device refuses a launch.
pub fn zero_grads<B: Backend>(dev: &B, grads: &mut Grads<B>) -> Result<()> {
    let mut all: Vec<&mut Tensor<B>> = grads.places_mut().into_iter().filter_map(|(_, g)| g.as_mut()).collect();
    dev.fill_zeros(&mut all)
}

/// Every weight that is trained with its gradient, in the order of files.
///
/// # Panics
/// If the two structures disagree.
pub fn trained<'a, B: Backend>(
    params: &'a mut Params<B>,
    grads: &'a Grads<B>,
) -> Vec<(Place, &'a mut Tensor<B>, &'a Tensor<B>)> {
    let (params, grads) = (params.places_mut(), grads.places());
    assert_eq!(params.len(), grads.len(), "weights and gradients");
    let pairs = params.into_iter().zip(grads).filter_map(|((at, param), (at_grad, grad))| {
        assert_eq!(at, at_grad, "places of weights and gradients");
        Some((at, param, grad.as_ref()?))
    });
    pairs.inspect(|(at, p, g)| assert_eq!(p.cols(), g.cols(), "{at}: width of the gradient")).collect()
}
