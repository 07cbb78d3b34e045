//! Models whose shapes are measured.

use crate::backend::Heads;
use crate::model::config::{Architecture, AttentionBias, ModelConfig, RopeScaling};
use crate::words::words;

/// A model of known shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// 6 layers of 256: minutes of training on a laptop.
    Tiny,
    /// SmolLM2-135M.
    Small,
    /// Llama-3.2-1B.
    OneB,
    /// Llama-3-8B.
    EightB,
}
words!(Shape { Tiny = "tiny", Small = "135m", OneB = "1b", EightB = "8b" });

impl Shape {
    /// Its configuration, as the `config.json` of the published model has it, with `layers` layers where that is given.
    pub fn config(self, layers: Option<usize>) -> ModelConfig {
        let heads = |n_query, n_kv, head_dim| Heads { n_query, n_kv, head_dim };
        let (vocab_size, hidden_size, intermediate_size, n_layers, heads, rope_theta, tied) = match self {
            Shape::Tiny => (32_000, 256, 688, 6, heads(8, 4, 32), 1e4, true),
            Shape::Small => (49_152, 576, 1536, 30, heads(9, 3, 64), 1e5, true),
            Shape::OneB => (128_256, 2048, 8192, 16, heads(32, 8, 64), 5e5, true),
            Shape::EightB => (128_256, 4096, 14_336, 32, heads(32, 8, 128), 5e5, false),
        };
        ModelConfig {
            architecture: Architecture::Llama,
            vocab_size,
            n_classes: vocab_size,
            hidden_size,
            intermediate_size,
            n_layers: layers.unwrap_or(n_layers),
            heads,
            max_position: 8192,
            rms_norm_eps: 1e-5,
            rope_theta,
            rope_scaling: RopeScaling::Default,
            tied,
            attention_bias: AttentionBias::None,
            mlp_bias: false,
            qk_norm: false,
            sliding_window: None,
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
            pad_token_id: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::Weights;

    #[test]
    fn shapes_have_the_published_numbers_of_weights() {
        let count = |shape: Shape| Weights::count(&shape.config(None));
        // The sizes that the published files have, without their vectors of frequencies.
        assert_eq!(count(Shape::Small), 134_515_008);
        assert_eq!(count(Shape::OneB), 1_235_814_400);
        assert_eq!(count(Shape::EightB), 8_030_261_248);
        assert_eq!(Shape::EightB.config(Some(8)).n_layers, 8);
    }
}
