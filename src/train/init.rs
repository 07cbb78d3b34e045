//! Weights at step 0: a random model for pretraining, low-rank updates for LoRA.

use rayon::prelude::*;

use crate::backend::Backend;

use crate::error::{Error, Result};
use crate::hf::device::upload;
use crate::hf::{HostTensor, TensorSource};
use crate::model::config::ModelConfig;
use crate::model::weights::{Kind, Lora, Place, Product, Weights};
use crate::rng::Stream;
use crate::tensor::{DType, Tensor};

const STREAM_MODEL: u64 = 0x696e_6974;
const STREAM_LORA: u64 = 0x6c6f_7261;
/// Standard deviation of new matrices: `initializer_range` of Hugging Face's Llama.
const STD: f64 = 0.02;

/// A model whose weights are drawn when they are asked for: matrices normal with deviation 0.02, norms 1, biases 0.
pub struct RandomModel {
    config: ModelConfig,
    seed: u64,
}

impl RandomModel {
    /// The model of a seed.
    pub fn new(config: ModelConfig, seed: u64) -> Self {
        Self { config, seed }
    }
}

impl TensorSource for RandomModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn load(&self, at: Place) -> Result<HostTensor> {
        let index = Weights::of(&self.config).places().iter().position(|(place, _)| *place == at);
        let index = index.ok_or_else(|| Error::new(format!("no weight {at} in this model")))?;
        let (rows, cols) = at.shape(&self.config, 0);
        let mut t = HostTensor::zeros(rows, cols);
        match at.kind() {
            Kind::Norm => t.data.fill(1.0),
            Kind::Bias => {}
            Kind::Vocabulary | Kind::Matrix | Kind::LowRank => self.draw(index as u64, &mut t),
        }
        Ok(t)
    }
}

impl RandomModel {
    /// Normal values from the stream of the weight with this number in the order of files.
    fn draw(&self, index: u64, t: &mut HostTensor) {
        let cols = t.cols;
        let stream = Stream::new(&[self.seed, STREAM_MODEL, index]);
        t.data.par_chunks_mut(cols).enumerate().for_each(|(row, values)| {
            let first = (row * cols) as u64;
            values.iter_mut().zip(first..).for_each(|(v, i)| *v = (STD * stream.normal_at(i)) as f32);
        });
    }
}

/// Gives the products in `targets` low-rank updates that change nothing yet: A uniform in ±1/√in, B zero, both
/// f32. PEFT draws A so (Kaiming uniform with a = √5).
///
/// # Errors
/// If the device has not enough memory.
pub fn add_lora<B: Backend>(
    dev: &B,
    c: &ModelConfig,
    params: &mut Weights<Tensor<B>>,
    r: usize,
    targets: &[Product],
    seed: u64,
) -> Result<()> {
    for (i, layer) in params.layers.iter_mut().enumerate() {
        for linear in layer.products_mut().into_iter().filter(|l| targets.contains(&l.product)) {
            let (rows, cols) = linear.product.shape(c);
            let stream = Stream::new(&[seed, STREAM_LORA, i as u64, linear.product as u64]);
            let bound = 1.0 / (cols as f64).sqrt();
            let data = (0..(r * cols) as u64).map(|k| (bound * (2.0 * stream.f64_at(k) - 1.0)) as f32).collect();
            let a = upload(dev, &HostTensor { rows: r, cols, data }, DType::F32)?;
            linear.lora = Some(Lora { a, b: dev.alloc(rows, r, DType::F32)? });
        }
    }
    Ok(())
}

/// The products a user names, in their order: `q` and `q_proj` are the same; repeated ones count once.
///
/// # Errors
/// A usage error for a name that is none of the seven products.
pub fn resolve_targets(given: &[String]) -> Result<Vec<Product>> {
    let mut found = Vec::new();
    for name in given {
        let product = Product::from_word(name.trim()).ok_or_else(|| {
            Error::usage(format!("lora_targets: expected some of q, k, v, o, gate, up, down, found {name:?}"))
        })?;
        found.push(product);
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_have_two_spellings() {
        let of = |names: &[&str]| resolve_targets(&names.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        assert_eq!(of(&["v", "q_proj", "q"]).unwrap(), [Product::Q, Product::V]);
        let e = of(&["q", "query"]).unwrap_err();
        assert_eq!((e.exit_code(), e.to_string().contains("found \"query\"")), (2, true));
    }
}
