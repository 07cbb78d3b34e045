//! Shape of a model: what `config.json` says, resolved and checked.

use std::fmt;

use crate::backend::{Heads, Mask};

/// Model family; decides which optional weights exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1 to 3, SmolLM and relatives.
    Llama,
    /// Llama with a sliding window.
    Mistral,
    /// Llama with biases on q, k and v.
    Qwen2,
    /// Llama with norms on the heads of q and k.
    Qwen3,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Architecture::Llama => "Llama",
            Architecture::Mistral => "Mistral",
            Architecture::Qwen2 => "Qwen2",
            Architecture::Qwen3 => "Qwen3",
        })
    }
}

/// Scaling of rotary frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// `theta^(-2j/D)` as it is.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// Divisor of all frequencies.
        factor: f64,
    },
    /// Llama-3: low frequencies divided, high ones kept, a smooth zone between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before scaling.
        original_max_position: usize,
    },
}

impl fmt::Display for RopeScaling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RopeScaling::Default => f.write_str("not scaled"),
            RopeScaling::Linear { factor } => write!(f, "linear, by {factor}"),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => write!(
                f,
                "llama3, by {factor} below 1/{low_freq_factor} and not above 1/{high_freq_factor} of {original_max_position} positions"
            ),
        }
    }
}

/// Everything `forward` and `backward` need to know about a model's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Model family.
    pub architecture: Architecture,
    /// V: rows of the embedding.
    pub vocab_size: usize,
    /// Rows of the head that take part in the softmax; below `vocab_size` only with `--pad-vocab-to`.
    pub n_classes: usize,
    /// C: width of the residual stream.
    pub hidden_size: usize,
    /// F: width of the feed-forward layer.
    pub intermediate_size: usize,
    /// L: number of layers.
    pub n_layers: usize,
    /// H, K and D. D need not be C / H.
    pub heads: Heads,
    /// Longest sequence the model was made for.
    pub max_position: usize,
    /// Epsilon of the norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Biases on q, k, v (Qwen2) or, in Llama files with `attention_bias`, on q, k, v and o.
    pub attention_bias: AttentionBias,
    /// Biases on gate, up and down (Llama files with `mlp_bias`).
    pub mlp_bias: bool,
    /// Norms on the heads of q and k (Qwen3).
    pub qk_norm: bool,
    /// Sliding window, where it is in force.
    pub sliding_window: Option<usize>,
    /// Token ids as config.json gives them.
    pub bos_token_id: Option<u32>,
    /// All end-of-sequence ids.
    pub eos_token_ids: Vec<u32>,
    /// Padding id.
    pub pad_token_id: Option<u32>,
}

/// Which attention products carry a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionBias {
    /// None of them.
    None,
    /// q, k and v (Qwen2).
    Qkv,
    /// q, k, v and o (Llama with `attention_bias: true`).
    Qkvo,
}

impl ModelConfig {
    /// Width of q and of the attention output: H·D.
    pub fn q_dim(&self) -> usize {
        self.heads.n_query * self.heads.head_dim
    }

    /// Width of k and v: K·D.
    pub fn kv_dim(&self) -> usize {
        self.heads.n_kv * self.heads.head_dim
    }

    /// The attention mask of every layer.
    pub fn mask(&self) -> Mask {
        Mask { window: self.sliding_window }
    }
}
