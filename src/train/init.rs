//! Weights at step 0 of pretraining: a random model; and which products LoRA is asked to update.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::hf::{HostTensor, Pieces, TensorSource};
use crate::model::config::ModelConfig;
use crate::model::weights::{Kind, Place, Product, Weights};
use crate::rng::{Stream, normal};

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

    /// The values of a matrix: from the stream of the weight with its number in the order of files.
    fn drawn(&self, at: Place) -> Result<Drawn> {
        let index = Weights::of(&self.config).places().iter().position(|(place, _)| *place == at);
        let index = index.ok_or_else(|| Error::new(format!("no weight {at} in this model")))?;
        Ok(Drawn { stream: Stream::new(&[self.seed, STREAM_MODEL, index as u64]), shape: at.shape(&self.config, 0) })
    }
}

impl TensorSource for RandomModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn load(&self, at: Place) -> Result<HostTensor> {
        const CHUNK: usize = 1 << 14;
        let (rows, cols) = at.shape(&self.config, 0);
        let mut t = HostTensor::zeros(rows, cols);
        match at.kind() {
            Kind::Norm => t.data.fill(1.0),
            Kind::Bias => {}
            Kind::Vocabulary | Kind::Matrix | Kind::LowRank => {
                let drawn = self.drawn(at)?;
                let parts = t.data.par_chunks_mut(CHUNK).enumerate();
                parts.for_each(|(i, part)| drawn.fill(i * CHUNK, part));
            }
        }
        Ok(t)
    }

    fn pieces(&self, at: Place) -> Result<Option<Box<dyn Pieces + '_>>> {
        match at.kind() {
            Kind::Norm | Kind::Bias => Ok(None),
            Kind::Vocabulary | Kind::Matrix | Kind::LowRank => Ok(Some(Box::new(self.drawn(at)?))),
        }
    }
}

/// Normal values, drawn as they are asked for.
struct Drawn {
    stream: Stream,
    shape: (usize, usize),
}

impl Pieces for Drawn {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn fill(&self, first: usize, out: &mut [f32]) {
        let mut bits = [0u64; 512];
        let mut at = 2 * first as u64;
        for values in out.chunks_mut(bits.len() / 2) {
            self.stream.fill(at, &mut bits[..2 * values.len()]);
            at += 2 * values.len() as u64;
            for (v, [first, second]) in values.iter_mut().zip(bits.as_chunks().0) {
                *v = (STD * normal(*first, *second)) as f32;
            }
        }
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
                "lora_targets: expected some of q, k, v, o, gate, up, down, or all-linear, found {name:?}{}",
                match name.as_str() {
                    list if list.starts_with(['[', '(']) => "; write them without brackets: q_proj v_proj",
                    "lm_head" | "embed_tokens" => "; rows that a template's tokens need are trained by themselves",
                    _ => "",
                }
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
