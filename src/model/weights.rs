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

/// The weights of a layer, in the order of files: what each is, and for a norm that not every model has, which models do.
/// The structure, the walk and the places of a model are made of this one list.
macro_rules! layer {
    ($($(#[$doc:meta])* $field:ident: $type:ty = $kind:ident($what:expr $(, $has:expr)?),)*) => {
        /// One decoder layer; the field names follow the names in Hugging Face files.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Layer<T> {
            $($(#[$doc])* pub $field: $type,)*
        }

        /// Takes a layer apart, by reference or by mutable reference, and gives one with `f(part, value)?` of every value.
        macro_rules! walk_layer {
            ($layer:expr, $f:ident) => {{
                let Layer { $($field),* } = $layer;
                Layer { $($field: layer!(@map $kind($what) $field, $f)),* }
            }};
        }

        impl Layer<Part> {
            /// The parts that a layer of the model has; `targets` have low-rank updates.
            fn of(c: &ModelConfig, targets: &[Product]) -> Self {
                Self { $($field: layer!(@of $kind($what $(, $has)?) c, targets)),* }
            }
        }
    };
    (@map norm($norm:expr) $value:ident, $f:ident) => { $f(Part::Norm($norm), $value)? };
    (@map optional_norm($norm:expr) $value:ident, $f:ident) => { walk!(@option $value, |n| $f(Part::Norm($norm), n)?) };
    (@map linear($product:expr) $value:ident, $f:ident) => {{
        let Linear { product, w, bias, lora } = $value;
        Linear {
            product: *product,
            w: $f(Part::Matrix($product), w)?,
            bias: walk!(@option bias, |b| $f(Part::Bias($product), b)?),
            lora: match lora {
                Some(Lora { a, b }) => Some(Lora { a: $f(Part::LoraA($product), a)?, b: $f(Part::LoraB($product), b)? }),
                None => None,
            },
        }
    }};
    (@of norm($norm:expr) $c:ident, $targets:ident) => { Part::Norm($norm) };
    (@of optional_norm($norm:expr, $has:expr) $c:ident, $targets:ident) => {
        Some(Part::Norm($norm)).filter(|_| ($has as fn(&ModelConfig) -> bool)($c))
    };
    (@of linear($product:expr) $c:ident, $targets:ident) => { Linear::of($product, $c, $targets) };
}

layer! {
    /// `input_layernorm`, (1, C).
    attn_norm: T = norm(Norm::Attn),
    /// `self_attn.q_proj`, (H·D, C).
    q: Linear<T> = linear(Product::Q),
    /// `self_attn.k_proj`, (K·D, C).
    k: Linear<T> = linear(Product::K),
    /// `self_attn.v_proj`, (K·D, C).
    v: Linear<T> = linear(Product::V),
    /// `self_attn.o_proj`, (C, H·D).
    o: Linear<T> = linear(Product::O),
    /// `self_attn.q_norm`, (1, D), Qwen3.
    q_norm: Option<T> = optional_norm(Norm::Q, |c| c.qk_norm),
    /// `self_attn.k_norm`, (1, D), Qwen3.
    k_norm: Option<T> = optional_norm(Norm::K, |c| c.qk_norm),
    /// `post_attention_layernorm`, (1, C).
    mlp_norm: T = norm(Norm::Mlp),
    /// `mlp.gate_proj`, (F, C).
    gate: Linear<T> = linear(Product::Gate),
    /// `mlp.up_proj`, (F, C).
    up: Linear<T> = linear(Product::Up),
    /// `mlp.down_proj`, (C, F).
    down: Linear<T> = linear(Product::Down),
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
/// `f(place, value)?` of every value: embedding, layers, final norm, head, which is the order of files.
macro_rules! walk {
    ($weights:expr, $f:ident) => {{
        let Weights { embed, layers, final_norm, lm_head } = $weights;
        Ok(Weights {
            embed: $f(Place::Embed, embed)?,
            layers: {
                let mut mapped = Vec::with_capacity(layers.len());
                for (i, layer) in layers.into_iter().enumerate() {
                    let mut f = |part, value| $f(Place::Layer(i, part), value);
                    mapped.push(walk_layer!(layer, f));
                }
                mapped
            },
            final_norm: $f(Place::FinalNorm, final_norm)?,
            lm_head: walk!(@option lm_head, |h| $f(Place::Head, h)?),
        })
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
        let parts = Layer::of(c, targets);
        let layer = |i| {
            let at = |part, _| Ok::<_, Infallible>(Place::Layer(i, part));
            let Ok(layer) = (|| Ok::<_, Infallible>(walk_layer!(&parts, at)))();
            layer
        };
        Weights {
            embed: Place::Embed,
            layers: (0..c.n_layers).map(layer).collect(),
            final_norm: Place::FinalNorm,
            lm_head: (!c.tied).then_some(Place::Head),
        }
    }
}

impl Linear<Part> {
    fn of(product: Product, c: &ModelConfig, targets: &[Product]) -> Self {
        let lora = || Lora { a: Part::LoraA(product), b: Part::LoraB(product) };
        Self {
            product,
            w: Part::Matrix(product),
            bias: biased(c, product).then_some(Part::Bias(product)),
            lora: targets.contains(&product).then(lora),
        }
    }
}

fn biased(c: &ModelConfig, product: Product) -> bool {
    match product {
        Product::Q | Product::K | Product::V => c.attention_bias != AttentionBias::None,
        Product::O => c.attention_bias == AttentionBias::Qkvo,
        Product::Gate | Product::Up | Product::Down => c.mlp_bias,
    }
}
