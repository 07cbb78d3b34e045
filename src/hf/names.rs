//! The weights a model consists of: their names in Hugging Face files and their shapes, in one fixed order.

use crate::error::Result;
use crate::model::config::{AttentionBias, ModelConfig};
use crate::model::weights::{Layer, Linear, Weights};

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
        if self.vector { vec![self.cols] } else { vec![self.rows, self.cols] }
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
        all.push(WeightInfo { name, rows, cols, vector });
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
                push(format!("{layer}.post_attention_layernorm.weight"), 1, c.hidden_size, true);
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

/// The values of a model by their names in files, low-rank updates included (`….lora_A.weight`, `….lora_B.weight`), in the order
/// of [`weights`].
pub fn named<T>(w: &Weights<T>) -> Vec<(String, &T)> {
    let mut all = vec![(EMBED.to_string(), &w.embed)];
    for (i, l) in w.layers.iter().enumerate() {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        all.push((at("input_layernorm.weight"), &l.attn_norm));
        for (_, place) in LINEARS {
            if place == "mlp.gate_proj" {
                let norms = [("self_attn.q_norm.weight", &l.q_norm), ("self_attn.k_norm.weight", &l.k_norm)];
                all.extend(norms.into_iter().filter_map(|(n, t)| Some((at(n), t.as_ref()?))));
                all.push((at("post_attention_layernorm.weight"), &l.mlp_norm));
            }
            let linear = linear(l, place);
            all.push((at(&format!("{place}.weight")), &linear.w));
            all.extend(linear.bias.iter().map(|b| (at(&format!("{place}.bias")), b)));
            if let Some(lora) = &linear.lora {
                all.push((at(&format!("{place}.lora_A.weight")), &lora.a));
                all.push((at(&format!("{place}.lora_B.weight")), &lora.b));
            }
        }
    }
    all.push(("model.norm.weight".to_string(), &w.final_norm));
    all.extend(w.lm_head.iter().map(|h| (LM_HEAD.to_string(), h)));
    all
}

/// A product of a layer by its place, one of [`LINEARS`].
pub fn linear<'a, T>(layer: &'a Layer<T>, place: &str) -> &'a Linear<T> {
    match place {
        "self_attn.q_proj" => &layer.q,
        "self_attn.k_proj" => &layer.k,
        "self_attn.v_proj" => &layer.v,
        "self_attn.o_proj" => &layer.o,
        "mlp.gate_proj" => &layer.gate,
        "mlp.up_proj" => &layer.up,
        "mlp.down_proj" => &layer.down,
        other => unreachable!("{other} is none of the seven products"),
    }
}

/// As [`linear`], to write to.
pub fn linear_mut<'a, T>(layer: &'a mut Layer<T>, place: &str) -> &'a mut Linear<T> {
    match place {
        "self_attn.q_proj" => &mut layer.q,
        "self_attn.k_proj" => &mut layer.k,
        "self_attn.v_proj" => &mut layer.v,
        "self_attn.o_proj" => &mut layer.o,
        "mlp.gate_proj" => &mut layer.gate,
        "mlp.up_proj" => &mut layer.up,
        "mlp.down_proj" => &mut layer.down,
        other => unreachable!("{other} is none of the seven products"),
    }
}

/// Makes one value for each weight of the model, in the order of [`weights`]; no low-rank updates.
///
/// # Errors
/// The first error of `make`.
pub fn build<T>(c: &ModelConfig, mut make: impl FnMut(&WeightInfo) -> Result<T>) -> Result<Weights<T>> {
    let mut all = std::collections::BTreeMap::new();
    for info in weights(c) {
        let value = make(&info)?;
        all.insert(info.name, value);
    }
    let mut layers = Vec::with_capacity(c.n_layers);
    for i in 0..c.n_layers {
        let mut opt = |part: &str| all.remove(&format!("model.layers.{i}.{part}"));
        let mut take = |part: &str| opt(part).expect("`weights` lists every weight of a layer");
        let (attn_norm, mlp_norm) = (take("input_layernorm.weight"), take("post_attention_layernorm.weight"));
        let matrices = LINEARS.map(|(_, place)| take(&format!("{place}.weight")));
        let biases = LINEARS.map(|(_, place)| opt(&format!("{place}.bias")));
        let (q_norm, k_norm) = (opt("self_attn.q_norm.weight"), opt("self_attn.k_norm.weight"));
        let mut products = matrices.into_iter().zip(biases).map(|(w, bias)| Linear { w, bias, lora: None });
        let mut next = || products.next().expect("seven products");
        let (q, k, v, o) = (next(), next(), next(), next());
        let (gate, up, down) = (next(), next(), next());
        layers.push(Layer { attn_norm, q, k, v, o, q_norm, k_norm, mlp_norm, gate, up, down });
    }
    let mut last = |name: &str| all.remove(name);
    let (embed, final_norm) = (last(EMBED), last("model.norm.weight"));
    let lm_head = last(LM_HEAD);
    assert!(all.is_empty(), "weights without a place: {:?}", all.keys());
    let expected = "`weights` lists the embedding and the final norm";
    Ok(Weights { embed: embed.expect(expected), layers, final_norm: final_norm.expect(expected), lm_head })
}
