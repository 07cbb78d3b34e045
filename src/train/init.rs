//! Weights at step 0 of pretraining: a random model; and which products LoRA is asked to update.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::hf::{HostTensor, TensorSource};
use crate::model::config::ModelConfig;
use crate::model::weights::{Kind, Place, Product, Weights};
use crate::rng::Stream;

const STREAM_MODEL: u64 = 0x696e_6974;
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

/// The products a user names, in their order: `q` and `q_proj` are the same, `all-linear` is all of them; repeated ones count once.
///
/// # Errors
/// A usage error for a name that is none of the seven products.
pub fn resolve_targets(given: &[String]) -> Result<Vec<Product>> {
    let mut found = Vec::new();
    for name in given {
        // PEFT's word for all of them.
        if ["all-linear", "all_linear", "all"].contains(&name.trim()) {
            found.extend(Product::ALL);
            continue;
        }
        let product = Product::from_word(name.trim()).ok_or_else(|| {
            Error::usage(format!(
                "lora_targets: expected some of q, k, v, o, gate, up, down, or all-linear, found {name:?}"
            ))
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
        assert_eq!(of(&["all-linear"]).unwrap(), Product::ALL);
        assert_eq!(of(&["q", "all"]).unwrap(), Product::ALL);
        let e = of(&["q", "query"]).unwrap_err();
        assert_eq!((e.exit_code(), e.to_string().contains("found \"query\"")), (2, true));
    }
}
