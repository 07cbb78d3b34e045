//! One model over any backend: forward and backward by hand, no autograd.
//!
//! Everything is allocated once, in [`Acts`]; a micro-batch is loaded, run forward, and run backward into [`Grads`].

pub mod acts;
mod backward;
pub mod config;
pub mod decode;
pub mod flops;
mod linear;
pub mod llama;
pub mod rope;
pub mod weights;

use crate::backend::Backend;
use crate::error::Result;
use crate::tensor::{DType, Tensor};
use crate::words::words;
use std::convert::Infallible;
use weights::{Part, Weights};

pub use acts::{Acts, ActsOptions};
pub use backward::{backward, backward_with};
pub use llama::{forward, logits, loss};

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

/// Low-rank updates of a run (Hu et al. 2021, arXiv:2106.09685).
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSpec {
    /// Rank.
    pub r: usize,
    /// The update is scaled by `alpha / r`.
    pub alpha: f64,
    /// Probability of dropping an element of the input.
    pub dropout: f64,
    /// Scale by `alpha / sqrt(r)` instead (Kalajdzievski 2023, arXiv:2312.03732).
    pub rslora: bool,
    /// Short names of the products that have an update: `q_proj`, …
    pub targets: Vec<String>,
}

impl LoraSpec {
    /// The factor s on `B A`.
    pub fn scale(&self) -> f64 {
        let r = self.r as f64;
        self.alpha / if self.rslora { r.sqrt() } else { r }
    }

    /// Whether the product of this short name has an update.
    pub fn has(&self, target: &str) -> bool {
        self.targets.iter().any(|t| t == target)
    }
}

/// f32 gradients of zeros for what is trained: with low-rank updates these alone, and the `vocabulary_rows` last rows of the
/// embedding and head where they are given; without, everything.
///
/// # Errors
/// If the device has not enough memory.
pub fn alloc_grads<B: Backend>(dev: &B, params: &Params<B>, vocabulary_rows: Option<usize>) -> Result<Grads<B>> {
    let mut low_rank = false;
    params
        .try_map(&mut |part, _| {
            low_rank |= part == Part::LowRank;
            Ok::<(), Infallible>(())
        })
        .unwrap_or_else(|never| match never {});
    params.try_map(&mut |part, t| {
        let rows = match part {
            Part::LowRank => t.rows(),
            Part::Vocabulary if low_rank => vocabulary_rows.unwrap_or(0),
            Part::Base if low_rank => 0,
            Part::Vocabulary | Part::Base => t.rows(),
        };
        if rows == 0 { Ok(None) } else { dev.alloc(rows, t.cols(), DType::F32).map(Some) }
    })
}

/// Sets every gradient to zero.
///
/// # Errors
/// If the device refuses a launch.
pub fn zero_grads<B: Backend>(dev: &B, grads: &mut Grads<B>) -> Result<()> {
    for_each_grad(grads, |g| dev.fill_zero(g))
}

/// Calls `f` on every gradient that exists, in the order of the weights in files.
///
/// # Errors
/// The first error of `f`.
pub fn for_each_grad<B: Backend>(grads: &mut Grads<B>, mut f: impl FnMut(&mut Tensor<B>) -> Result<()>) -> Result<()> {
    let mut result = Ok(());
    grads.for_each_mut(&mut |g| {
        if let (Some(g), true) = (g, result.is_ok()) {
            result = f(g);
        }
    });
    result
}
