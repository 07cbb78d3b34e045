//! One value per weight. The same struct serves shapes, tensors, gradients, moments and file entries.

/// A product `y = x Wᵀ (+ bias) (+ s·x Aᵀ Bᵀ)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear<T> {
    /// (out, in).
    pub w: T,
    /// (1, out).
    pub bias: Option<T>,
    /// The low-rank update, where this product has one.
    pub lora: Option<Lora<T>>,
}

/// A low-rank update.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora<T> {
    /// (r, in).
    pub a: T,
    /// (out, r).
    pub b: T,
}

/// One decoder layer; the field names follow the names in Hugging Face files.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer<T> {
    /// `input_layernorm`, (1, C).
    pub attn_norm: T,
    /// `self_attn.q_proj`, (H·D, C).
    pub q: Linear<T>,
    /// `self_attn.k_proj`, (K·D, C).
    pub k: Linear<T>,
    /// `self_attn.v_proj`, (K·D, C).
    pub v: Linear<T>,
    /// `self_attn.o_proj`, (C, H·D).
    pub o: Linear<T>,
    /// `self_attn.q_norm`, (1, D), Qwen3.
    pub q_norm: Option<T>,
    /// `self_attn.k_norm`, (1, D), Qwen3.
    pub k_norm: Option<T>,
    /// `post_attention_layernorm`, (1, C).
    pub mlp_norm: T,
    /// `mlp.gate_proj`, (F, C).
    pub gate: Linear<T>,
    /// `mlp.up_proj`, (F, C).
    pub up: Linear<T>,
    /// `mlp.down_proj`, (C, F).
    pub down: Linear<T>,
}

/// All weights of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights<T> {
    /// `model.embed_tokens`, (V, C).
    pub embed: T,
    /// `model.layers.{i}`.
    pub layers: Vec<Layer<T>>,
    /// `model.norm`, (1, C).
    pub final_norm: T,
    /// `lm_head`, (V, C); `None` when tied to the embedding.
    pub lm_head: Option<T>,
}

impl<T> Linear<T> {
    /// Calls `f` on every value: weight, bias, A, B.
    pub fn for_each_mut(&mut self, f: &mut impl FnMut(&mut T)) {
        f(&mut self.w);
        self.bias.iter_mut().for_each(&mut *f);
        if let Some(lora) = &mut self.lora {
            f(&mut lora.a);
            f(&mut lora.b);
        }
    }
}

impl<T> Layer<T> {
    /// Calls `f` on every value, in the order of the layer's computation.
    pub fn for_each_mut(&mut self, f: &mut impl FnMut(&mut T)) {
        f(&mut self.attn_norm);
        for linear in [&mut self.q, &mut self.k, &mut self.v, &mut self.o] {
            linear.for_each_mut(f);
        }
        self.q_norm.iter_mut().for_each(&mut *f);
        self.k_norm.iter_mut().for_each(&mut *f);
        f(&mut self.mlp_norm);
        for linear in [&mut self.gate, &mut self.up, &mut self.down] {
            linear.for_each_mut(f);
        }
    }
}

impl<T> Weights<T> {
    /// Calls `f` on every value: embedding, layers, final norm, head.
    pub fn for_each_mut(&mut self, f: &mut impl FnMut(&mut T)) {
        f(&mut self.embed);
        for layer in &mut self.layers {
            layer.for_each_mut(f);
        }
        f(&mut self.final_norm);
        self.lm_head.iter_mut().for_each(&mut *f);
    }
}

/// Which kind of weight a value belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The embedding or the head.
    Vocabulary,
    /// Matrices, norms and biases of the layers, and the final norm.
    Base,
    /// A or B of a low-rank update.
    LowRank,
}

impl<T> Weights<T> {
    /// A structure of the same form with `f` of every value.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn try_map<U, E>(&self, f: &mut impl FnMut(Part, &T) -> Result<U, E>) -> Result<Weights<U>, E> {
        Ok(Weights {
            embed: f(Part::Vocabulary, &self.embed)?,
            layers: self.layers.iter().map(|l| l.try_map(f)).collect::<Result<_, E>>()?,
            final_norm: f(Part::Base, &self.final_norm)?,
            lm_head: self.lm_head.as_ref().map(|h| f(Part::Vocabulary, h)).transpose()?,
        })
    }
}

impl<T> Layer<T> {
    fn try_map<U, E>(&self, f: &mut impl FnMut(Part, &T) -> Result<U, E>) -> Result<Layer<U>, E> {
        Ok(Layer {
            attn_norm: f(Part::Base, &self.attn_norm)?,
            q: self.q.try_map(f)?,
            k: self.k.try_map(f)?,
            v: self.v.try_map(f)?,
            o: self.o.try_map(f)?,
            q_norm: self.q_norm.as_ref().map(|n| f(Part::Base, n)).transpose()?,
            k_norm: self.k_norm.as_ref().map(|n| f(Part::Base, n)).transpose()?,
            mlp_norm: f(Part::Base, &self.mlp_norm)?,
            gate: self.gate.try_map(f)?,
            up: self.up.try_map(f)?,
            down: self.down.try_map(f)?,
        })
    }
}

impl<T> Linear<T> {
    fn try_map<U, E>(&self, f: &mut impl FnMut(Part, &T) -> Result<U, E>) -> Result<Linear<U>, E> {
        Ok(Linear {
            w: f(Part::Base, &self.w)?,
            bias: self.bias.as_ref().map(|b| f(Part::Base, b)).transpose()?,
            lora: match &self.lora {
                Some(l) => Some(Lora { a: f(Part::LowRank, &l.a)?, b: f(Part::LowRank, &l.b)? }),
                None => None,
            },
        })
    }
}
