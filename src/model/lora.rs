//! Low-rank updates above the kernels: what a run asks for, their first values, where their gradients go.
//!
//! Hu et al. 2021, arXiv:2106.09685.

use super::Params;
use super::config::ModelConfig;
use super::weights::{Linear, Lora, Product};
use crate::backend::{Backend, ProjectionGrads};
use crate::error::Result;
use crate::rng::Stream;
use crate::tensor::{DType, Tensor};

/// Low-rank updates of a run.
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

const STREAM_LORA: u64 = 0x6c6f_7261;

/// Gives the products of `spec` low-rank updates that change nothing yet: A uniform in ±1/√in, B zero, both f32. PEFT draws A so
/// (Kaiming uniform with a = √5).
///
/// # Errors
/// If the device has not enough memory.
pub fn add_lora<B: Backend>(
    dev: &B,
    c: &ModelConfig,
    params: &mut Params<B>,
    spec: &LoraSpec,
    seed: u64,
) -> Result<()> {
    for (i, layer) in params.layers.iter_mut().enumerate() {
        for linear in layer.products_mut().into_iter().filter(|l| spec.has(l.product)) {
            let ((rows, cols), r) = (linear.product.shape(c), spec.r);
            let stream = Stream::new(&[seed, STREAM_LORA, i as u64, linear.product as u64]);
            let bound = 1.0 / (cols as f64).sqrt();
            let values: Vec<f32> =
                (0..(r * cols) as u64).map(|k| (bound * (2.0 * stream.f64_at(k) - 1.0)) as f32).collect();
            let mut a = dev.alloc(r, cols, DType::F32)?;
            dev.upload(&mut a, &values)?;
            linear.lora = Some(Lora { a, b: dev.alloc(rows, r, DType::F32)? });
        }
    }
    Ok(())
}

/// Where the gradients of a product go, as far as it is trained.
pub(super) fn grads<B: Backend>(g: &mut Linear<Option<Tensor<B>>>) -> ProjectionGrads<'_, B> {
    let (a, b) = g.lora.as_mut().map_or((None, None), |l| (l.a.as_mut(), l.b.as_mut()));
    ProjectionGrads { w: g.w.as_mut(), bias: g.bias.as_mut().and_then(Option::as_mut), a, b }
}
