//! Which tensors are trained and how: decay on matrices only, the LoRA+ rate of B, the rows of grown embeddings.

use crate::backend::Backend;
use crate::model::weights::{Layer, Linear, Weights};
use crate::tensor::Tensor;

/// A trained tensor with its gradient, and what the optimiser has to know about it.
pub struct Slot<'a, B: Backend> {
    /// Its name in Hugging Face files; low-rank updates end in `lora_A.weight` and `lora_B.weight`.
    pub name: String,
    /// Whether weight decay applies.
    pub decays: bool,
    /// Multiple of the learning rate.
    pub lr_scale: f64,
    /// First row of `param` that `grad` covers.
    pub first_row: usize,
    /// The parameter.
    pub param: &'a mut Tensor<B>,
    /// Its gradient, f32.
    pub grad: &'a Tensor<B>,
}

/// What decides a tensor's group besides its name.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GroupSettings {
    /// LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns at this multiple of the learning rate.
    pub lora_plus: Option<f64>,
    /// With LoRA on a grown vocabulary: the first of the new rows, which are trained alone and without decay. Gradients of
    /// the embedding and head then hold just these rows. `None`: such gradients begin at row 0.
    pub new_rows: Option<usize>,
}

/// Pairs every parameter that has a gradient with it, in a fixed order: embedding, layers, final norm, head.
///
/// # Panics
/// If the two structures disagree.
pub fn slots<'a, B: Backend>(
    params: &'a mut Weights<Tensor<B>>,
    grads: &'a Weights<Option<Tensor<B>>>,
    settings: GroupSettings,
) -> Vec<Slot<'a, B>> {
    let mut out = Collect { slots: Vec::new(), settings };
    out.rows("model.embed_tokens.weight", &mut params.embed, &grads.embed);
    assert_eq!(params.layers.len(), grads.layers.len(), "layers of parameters and gradients");
    for (i, (p, g)) in params.layers.iter_mut().zip(&grads.layers).enumerate() {
        out.layer(i, p, g);
    }
    out.vector("model.norm.weight".into(), &mut params.final_norm, &grads.final_norm);
    match (&mut params.lm_head, &grads.lm_head) {
        (Some(p), Some(g)) => out.rows("lm_head.weight", p, g),
        (p, g) => assert!(p.is_none() && g.is_none(), "head of parameters and gradients"),
    }
    out.slots
}

struct Collect<'a, B: Backend> {
    slots: Vec<Slot<'a, B>>,
    settings: GroupSettings,
}

impl<'a, B: Backend> Collect<'a, B> {
    fn push(&mut self, name: String, decays: bool, param: &'a mut Tensor<B>, grad: &'a Option<Tensor<B>>) {
        if let Some(grad) = grad {
            assert_eq!(param.cols(), grad.cols(), "{name}: width of the gradient");
            self.slots.push(Slot { name, decays, lr_scale: 1.0, first_row: 0, param, grad });
        }
    }

    fn vector(&mut self, name: String, param: &'a mut Tensor<B>, grad: &'a Option<Tensor<B>>) {
        self.push(name, false, param, grad);
    }

    /// The embedding or the head, of which some rows may be trained.
    fn rows(&mut self, name: &str, param: &'a mut Tensor<B>, grad: &'a Option<Tensor<B>>) {
        let Some(g) = grad else { return };
        self.push(name.to_string(), self.settings.new_rows.is_none(), param, grad);
        let slot = self.slots.last_mut().expect("one was pushed");
        slot.first_row = self.settings.new_rows.unwrap_or(0);
        let (rows, end) = (slot.param.rows(), slot.first_row + g.rows());
        assert!(end <= rows, "{name}: gradient of rows up to {end} for {rows} rows");
    }

    fn linear(&mut self, name: &str, p: &'a mut Linear<Tensor<B>>, g: &'a Linear<Option<Tensor<B>>>) {
        self.push(format!("{name}.weight"), true, &mut p.w, &g.w);
        if let (Some(p), Some(g)) = (&mut p.bias, &g.bias) {
            self.vector(format!("{name}.bias"), p, g);
        }
        if let (Some(p), Some(g)) = (&mut p.lora, &g.lora) {
            self.push(format!("{name}.lora_A.weight"), true, &mut p.a, &g.a);
            self.push(format!("{name}.lora_B.weight"), true, &mut p.b, &g.b);
            if let Some(slot) = self.slots.last_mut().filter(|_| g.b.is_some()) {
                slot.lr_scale = self.settings.lora_plus.unwrap_or(1.0);
            }
        }
    }

    fn layer(&mut self, i: usize, p: &'a mut Layer<Tensor<B>>, g: &'a Layer<Option<Tensor<B>>>) {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        self.vector(at("input_layernorm.weight"), &mut p.attn_norm, &g.attn_norm);
        self.linear(&at("self_attn.q_proj"), &mut p.q, &g.q);
        self.linear(&at("self_attn.k_proj"), &mut p.k, &g.k);
        self.linear(&at("self_attn.v_proj"), &mut p.v, &g.v);
        self.linear(&at("self_attn.o_proj"), &mut p.o, &g.o);
        if let (Some(p), Some(g)) = (&mut p.q_norm, &g.q_norm) {
            self.vector(at("self_attn.q_norm.weight"), p, g);
        }
        if let (Some(p), Some(g)) = (&mut p.k_norm, &g.k_norm) {
            self.vector(at("self_attn.k_norm.weight"), p, g);
        }
        self.vector(at("post_attention_layernorm.weight"), &mut p.mlp_norm, &g.mlp_norm);
        self.linear(&at("mlp.gate_proj"), &mut p.gate, &g.gate);
        self.linear(&at("mlp.up_proj"), &mut p.up, &g.up);
        self.linear(&at("mlp.down_proj"), &mut p.down, &g.down);
    }
}
