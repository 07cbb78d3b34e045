//! The weights a model consists of: their names in Hugging Face files and their shapes, in one fixed order.

use crate::model::config::{AttentionBias, ModelConfig};

/// One weight of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightInfo {
    /// Name in files, for example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Height as a tensor; 1 for vectors.
    pub rows: usize,
    /// Width.
    pub cols: usize,
    /// Whether files store it with one dimension (norms and biases).
    pub vector: bool,
}

impl WeightInfo {
    /// The shape in files.
    pub fn file_shape(&self) -> Vec<usize> {
        if self.vector {
            vec![self.cols]
        } else {
            vec![self.rows, self.cols]
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether the weight has no element (it never has none in a checked model).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Name of the embedding.
pub const EMBED: &str = "model.embed_tokens.weight";
/// Name of the head; absent from files of tied models.
pub const LM_HEAD: &str = "lm_head.weight";

/// The seven products of a layer that can carry a low-rank update: short name, place in a layer.
pub const LINEARS: [(&str, &str); 7] = [
    ("q_proj", "self_attn.q_proj"),
    ("k_proj", "self_attn.k_proj"),
    ("v_proj", "self_attn.v_proj"),
    ("o_proj", "self_attn.o_proj"),
    ("gate_proj", "mlp.gate_proj"),
    ("up_proj", "mlp.up_proj"),
    ("down_proj", "mlp.down_proj"),
];

/// `(out, in)` of a product of [`LINEARS`].
pub fn linear_shape(c: &ModelConfig, short: &str) -> (usize, usize) {
    let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
    match short {
        "q_proj" => (c.q_dim(), hidden),
        "k_proj" | "v_proj" => (c.kv_dim(), hidden),
        "o_proj" => (hidden, c.q_dim()),
        "gate_proj" | "up_proj" => (ffn, hidden),
        "down_proj" => (hidden, ffn),
        other => unreachable!("{other} is none of the seven products"),
    }
}

/// Every weight of the model, from the embedding to the head; low-rank updates are not among them.
pub fn weights(c: &ModelConfig) -> Vec<WeightInfo> {
    let mut all = Vec::new();
    let mut push = |name: String, rows: usize, cols: usize, vector: bool| {
        all.push(WeightInfo {
            name,
            rows,
            cols,
            vector,
        });
    };
    push(EMBED.to_string(), c.vocab_size, c.hidden_size, false);
    for i in 0..c.n_layers {
        let layer = format!("model.layers.{i}");
        push(format!("{layer}.input_layernorm.weight"), 1, c.hidden_size, true);
        for (short, place) in LINEARS {
            let (rows, cols) = linear_shape(c, short);
            if short == "gate_proj" {
                if c.qk_norm {
                    push(format!("{layer}.self_attn.q_norm.weight"), 1, c.heads.head_dim, true);
                    push(format!("{layer}.self_attn.k_norm.weight"), 1, c.heads.head_dim, true);
                }
                push(
                    format!("{layer}.post_attention_layernorm.weight"),
                    1,
                    c.hidden_size,
                    true,
                );
            }
            push(format!("{layer}.{place}.weight"), rows, cols, false);
            let biased = match c.attention_bias {
                AttentionBias::None => false,
                AttentionBias::Qkv => matches!(short, "q_proj" | "k_proj" | "v_proj"),
                AttentionBias::Qkvo => place.starts_with("self_attn"),
            };
            if biased {
                push(format!("{layer}.{place}.bias"), 1, rows, true);
            }
        }
    }
    push("model.norm.weight".to_string(), 1, c.hidden_size, true);
    if !c.tied {
        push(LM_HEAD.to_string(), c.vocab_size, c.hidden_size, false);
    }
    all
}
