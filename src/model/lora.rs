//! Low-rank updates above the kernels: what a run asks for, their first values, where their gradients go.
//!
//! Hu et al. 2021, arXiv:2106.09685.

use super::Params;
use super::config::ModelConfig;
use super::weights::{Linear, Lora, Part, Place, Product};
use crate::backend::{Backend, ProjectionGrads};
use crate::error::Result;
use crate::rng::{Stream, uniform};
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

/// First values of A or B: A uniform in ±1/√in, B zero, so that an update changes nothing yet. PEFT draws A so (Kaiming uniform
/// with a = √5).
pub fn first_values(c: &ModelConfig, at: Place, r: usize, seed: u64) -> Vec<f32> {
    let (rows, cols) = at.shape(c, r);
    let Place::Layer(i, Part::LoraA(product)) = at else { return vec![0.0; rows * cols] };
    let stream = Stream::new(&[seed, STREAM_LORA, i as u64, product as u64]);
    let bound = 1.0 / (cols as f64).sqrt();
    let mut bits = vec![0; rows * cols];
    stream.fill(0, &mut bits);
    bits.into_iter().map(|bits| (bound * (2.0 * uniform(bits) - 1.0)) as f32).collect()
}

/// Gives the products of `spec` low-rank updates with their first values, stored in `dtype`: in one piece of memory where the device has
/// such, each factor in a room of `room` elements, in the order of files.
///
/// # Errors
/// If the device has not enough memory.
///
/// # Panics
/// If a room is too small.
pub fn add_lora<B: Backend>(
    dev: &B,
    c: &ModelConfig,
    params: &mut Params<B>,
    dtype: DType,
    spec: &LoraSpec,
    (seed, room): (u64, &dyn Fn(Place) -> usize),
) -> Result<()> {
    let mut products: Vec<_> = Vec::new();
    for (i, layer) in params.layers.iter_mut().enumerate() {
        let own = layer.products_mut().into_iter().filter(|l| spec.has(l.product));
        products.extend(own.map(|linear| (i, linear)));
    }
    let factors = |i: usize, product| [Part::LoraA(product), Part::LoraB(product)].map(|part| Place::Layer(i, part));
    let places: Vec<Place> = products.iter().flat_map(|(i, linear)| factors(*i, linear.product)).collect();
    let shapes: Vec<_> = places.iter().map(|at| at.shape(c, spec.r)).collect();
    let rooms: Vec<usize> = places.iter().map(|at| room(*at)).collect();
    let all = dev.alloc_together(&shapes, &rooms, dtype)?;
    let mut all = places.into_iter().zip(all).map(|(at, mut factor)| {
        dev.upload(&mut factor, &first_values(c, at, spec.r, seed))?;
        Ok(factor)
    });
    let mut next = || -> Result<Tensor<B>> { all.next().expect("two for each product") };
    for (_, linear) in products {
        linear.lora = Some(Lora { a: next()?, b: next()? });
    }
    Ok(())
}

/// Where the gradients of a product go, as far as it is trained.
pub(super) fn grads<B: Backend>(g: &mut Linear<Option<Tensor<B>>>) -> ProjectionGrads<'_, B> {
    let (a, b) = g.lora.as_mut().map_or((None, None), |l| (l.a.as_mut(), l.b.as_mut()));
    ProjectionGrads { w: g.w.as_mut(), bias: g.bias.as_mut().and_then(Option::as_mut), a, b }
}
