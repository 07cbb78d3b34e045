//! One value per weight. The same struct serves places, tensors, gradients and moments; one walk visits them all.

use std::convert::Infallible;

use super::config::{AttentionBias, ModelConfig};
pub use super::place::{Kind, Norm, Part, Place, Product};

/// A product `y = x Wᵀ (+ bias) (+ s·x Aᵀ Bᵀ)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear<T> {
    /// Which one it is.
    pub product: Product,
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

impl<T> Layer<T> {
    /// The seven products, in the order of [`Product::ALL`].
    pub fn products_mut(&mut self) -> [&mut Linear<T>; 7] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o, &mut self.gate, &mut self.up, &mut self.down]
    }
}

/// The one walk. It takes a structure apart by reference or by mutable reference and gives one of the same form with
/// `f(place, value)?` of every value: embedding, layers, final norm, head, which is the order of files. The patterns have no
/// `..`, so the compiler asks for a place for every new field.
macro_rules! walk {
    ($weights:expr, $f:ident) => {{
        let Weights { embed, layers, final_norm, lm_head } = $weights;
        Ok(Weights {
            embed: $f(Place::Embed, embed)?,
            layers: {
                let mut mapped = Vec::with_capacity(layers.len());
                for (i, layer) in layers.into_iter().enumerate() {
                    let Layer { attn_norm, q, k, v, o, q_norm, k_norm, mlp_norm, gate, up, down } = layer;
                    let mut f = |part, value| $f(Place::Layer(i, part), value);
                    mapped.push(Layer {
                        attn_norm: f(Part::Norm(Norm::Attn), attn_norm)?,
                        q: walk!(@linear q, f),
                        k: walk!(@linear k, f),
                        v: walk!(@linear v, f),
                        o: walk!(@linear o, f),
                        q_norm: walk!(@option q_norm, |n| f(Part::Norm(Norm::Q), n)?),
                        k_norm: walk!(@option k_norm, |n| f(Part::Norm(Norm::K), n)?),
                        mlp_norm: f(Part::Norm(Norm::Mlp), mlp_norm)?,
                        gate: walk!(@linear gate, f),
                        up: walk!(@linear up, f),
                        down: walk!(@linear down, f),
                    });
                }
                mapped
            },
            final_norm: $f(Place::FinalNorm, final_norm)?,
            lm_head: walk!(@option lm_head, |h| $f(Place::Head, h)?),
        })
    }};
    (@linear $linear:ident, $f:ident) => {{
        let Linear { product, w, bias, lora } = $linear;
        let product = *product;
        Linear {
            product,
            w: $f(Part::Matrix(product), w)?,
            bias: walk!(@option bias, |b| $f(Part::Bias(product), b)?),
            lora: match lora {
                Some(Lora { a, b }) => Some(Lora { a: $f(Part::LoraA(product), a)?, b: $f(Part::LoraB(product), b)? }),
                None => None,
            },
        }
    }};
    (@option $value:ident, |$x:ident| $mapped:expr) => {
        match $value {
            Some($x) => Some($mapped),
            None => None,
        }
    };
}

impl<T> Weights<T> {
    /// A structure of the same form with `f` of every value, in the order of files.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn try_map<'a, U, E>(&'a self, mut f: impl FnMut(Place, &'a T) -> Result<U, E>) -> Result<Weights<U>, E> {
        walk!(self, f)
    }

    /// Every value with its place, in the order of files.
    pub fn places(&self) -> Vec<(Place, &T)> {
        let mut all = Vec::new();
        let Ok(_) = self.try_map(|at, value| {
            all.push((at, value));
            Ok::<(), Infallible>(())
        });
        all
    }

    /// As [`Weights::places`], to write to.
    pub fn places_mut(&mut self) -> Vec<(Place, &mut T)> {
        let mut all = Vec::new();
        let Ok(_) = self.try_map_mut(|at, value| {
            all.push((at, value));
            Ok::<(), Infallible>(())
        });
        all
    }

    fn try_map_mut<'a, U, E>(
        &'a mut self,
        mut f: impl FnMut(Place, &'a mut T) -> Result<U, E>,
    ) -> Result<Weights<U>, E> {
        walk!(self, f)
    }
}

impl Weights<Place> {
    /// Number of elements of a model, low-rank updates left out.
    pub fn count(c: &ModelConfig) -> u64 {
        Self::of(c).places().iter().map(|(at, _)| at.len(c, 0) as u64).sum()
    }

    /// The weights of a model, low-rank updates left out.
    pub fn of(c: &ModelConfig) -> Self {
        Self::with_updates(c, &[])
    }

    /// The weights of a model whose products called `targets` have low-rank updates.
    pub fn with_updates(c: &ModelConfig, targets: &[Product]) -> Self {
        let layer = |i| {
            let at = |part| Place::Layer(i, part);
            let linear = |product| Linear {
                product,
                w: at(Part::Matrix(product)),
                bias: biased(c.attention_bias, product).then(|| at(Part::Bias(product))),
                lora: (targets.contains(&product))
                    .then(|| Lora { a: at(Part::LoraA(product)), b: at(Part::LoraB(product)) }),
            };
            Layer {
                attn_norm: at(Part::Norm(Norm::Attn)),
                q: linear(Product::Q),
                k: linear(Product::K),
                v: linear(Product::V),
                o: linear(Product::O),
                q_norm: c.qk_norm.then(|| at(Part::Norm(Norm::Q))),
                k_norm: c.qk_norm.then(|| at(Part::Norm(Norm::K))),
                mlp_norm: at(Part::Norm(Norm::Mlp)),
                gate: linear(Product::Gate),
                up: linear(Product::Up),
                down: linear(Product::Down),
            }
        };
        Weights {
            embed: Place::Embed,
            layers: (0..c.n_layers).map(layer).collect(),
            final_norm: Place::FinalNorm,
            lm_head: (!c.tied).then_some(Place::Head),
        }
    }
}

fn biased(which: AttentionBias, product: Product) -> bool {
    match which {
        AttentionBias::None => false,
        AttentionBias::Qkv => matches!(product, Product::Q | Product::K | Product::V),
        AttentionBias::Qkvo => matches!(product, Product::Q | Product::K | Product::V | Product::O),
    }
}
