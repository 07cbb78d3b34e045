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
pub mod place;
pub mod rope;
pub mod weights;

use crate::backend::Backend;
use crate::error::Result;
use crate::tensor::{DType, Tensor};
use crate::words::words;
use weights::{Kind, Place, Product, Weights};

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
    /// The products that have an update.
    pub targets: Vec<Product>,
}

impl LoraSpec {
    /// The factor s on `B A`.
    pub fn scale(&self) -> f64 {
        let r = self.r as f64;
        self.alpha / if self.rslora { r.sqrt() } else { r }
    }

    /// Whether this product has an update.
    pub fn has(&self, product: Product) -> bool {
        self.targets.contains(&product)
    }
}

/// f32 gradients of zeros for what is trained: with low-rank updates these alone, and the `vocabulary_rows` last rows of the
/// embedding and head where they are given; without, everything.
///
/// # Errors
/// If the device has not enough memory.
pub fn alloc_grads<B: Backend>(dev: &B, params: &Params<B>, vocabulary_rows: Option<usize>) -> Result<Grads<B>> {
    let low_rank = params.places().iter().any(|(at, _)| at.kind() == Kind::LowRank);
    params.try_map(|at, t| {
        let rows = match at.kind() {
            _ if !low_rank => t.rows(),
            Kind::LowRank => t.rows(),
            Kind::Vocabulary => vocabulary_rows.unwrap_or(0),
            Kind::Matrix | Kind::Norm | Kind::Bias => 0,
        };
        if rows == 0 { Ok(None) } else { dev.alloc(rows, t.cols(), DType::F32).map(Some) }
    })
}

/// Sets every gradient to zero.
///
/// # Errors
/// If the device refuses a launch.
pub fn zero_grads<B: Backend>(dev: &B, grads: &mut Grads<B>) -> Result<()> {
    grads.places_mut().into_iter().filter_map(|(_, g)| g.as_mut()).try_for_each(|g| dev.fill_zero(g))
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
