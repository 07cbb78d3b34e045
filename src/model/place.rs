//! The name of a weight: a [`Place`] says where it stands in the model; its name in files, its shape and its kind follow.

use std::fmt;

use super::config::ModelConfig;

/// A product `x Wᵀ` of a layer; each can carry a low-rank update. The number names its first values and its dropout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Product {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Output of attention.
    O,
    /// Gate of the feed-forward layer.
    Gate,
    /// Its other half.
    Up,
    /// Its output.
    Down,
}

impl Product {
    /// All seven, in the order of the layer.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Where it stands in a layer, as Hugging Face files name it.
    pub fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Its name among the products of a layer: `q_proj`, PEFT's word for a target.
    pub fn name(self) -> &'static str {
        self.path().rsplit('.').next().expect("split gives at least one part")
    }

    /// The product that a user calls `q` or `q_proj`.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.name() == word || p.name().strip_suffix("_proj") == Some(word))
    }

    /// (out, in).
    pub fn shape(self, c: &ModelConfig) -> (usize, usize) {
        match self {
            Self::Q => (c.q_dim(), c.hidden_size),
            Self::K | Self::V => (c.kv_dim(), c.hidden_size),
            Self::O => (c.hidden_size, c.q_dim()),
            Self::Gate | Self::Up => (c.intermediate_size, c.hidden_size),
            Self::Down => (c.hidden_size, c.intermediate_size),
        }
    }
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A norm of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Norm {
    /// Before attention.
    Attn,
    /// Of each head's queries.
    Q,
    /// Of each head's keys.
    K,
    /// Before the feed-forward layer.
    Mlp,
}

impl Norm {
    /// Where it stands in a layer, as Hugging Face files name it, and its width.
    fn row(self) -> (&'static str, fn(&ModelConfig) -> usize) {
        match self {
            Self::Attn => ("input_layernorm", |c| c.hidden_size),
            Self::Q => ("self_attn.q_norm", |c| c.heads.head_dim),
            Self::K => ("self_attn.k_norm", |c| c.heads.head_dim),
            Self::Mlp => ("post_attention_layernorm", |c| c.hidden_size),
        }
    }
}

/// A weight of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// A norm, (1, width).
    Norm(Norm),
    /// The weight of a product, (out, in).
    Matrix(Product),
    /// Its bias, (1, out).
    Bias(Product),
    /// A of its low-rank update, (r, in).
    LoraA(Product),
    /// B of its low-rank update, (out, r).
    LoraB(Product),
}

/// Where a weight stands in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// The embedding, (V, C).
    Embed,
    /// A part of layer i.
    Layer(usize, Part),
    /// The norm after the last layer, (1, C).
    FinalNorm,
    /// The head, (V, C); tied models have none.
    Head,
}

/// What is done with a weight depends on its kind alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The embedding or the head: one row a token.
    Vocabulary,
    /// The weight of a product.
    Matrix,
    /// The weight of a norm.
    Norm,
    /// A bias.
    Bias,
    /// A or B of a low-rank update.
    LowRank,
}

impl Place {
    /// The kind of the weight.
    pub fn kind(self) -> Kind {
        match self {
            Self::Embed | Self::Head => Kind::Vocabulary,
            Self::FinalNorm | Self::Layer(_, Part::Norm(_)) => Kind::Norm,
            Self::Layer(_, Part::Matrix(_)) => Kind::Matrix,
            Self::Layer(_, Part::Bias(_)) => Kind::Bias,
            Self::Layer(_, Part::LoraA(_) | Part::LoraB(_)) => Kind::LowRank,
        }
    }

    /// Its layer, where it is in one.
    pub fn layer(self) -> Option<usize> {
        match self {
            Self::Layer(i, _) => Some(i),
            Self::Embed | Self::FinalNorm | Self::Head => None,
        }
    }

    /// Whether it is a norm or a bias: (1, width) in memory, of one dimension in files.
    pub fn is_vector(self) -> bool {
        matches!(self.kind(), Kind::Norm | Kind::Bias)
    }

    /// Whether weight decay applies: to matrices alone.
    pub fn decays(self) -> bool {
        !self.is_vector()
    }

    /// (rows, cols) in memory; `rank` is that of low-rank updates, on which nothing but A and B depends.
    pub fn shape(self, c: &ModelConfig, rank: usize) -> (usize, usize) {
        match self {
            Self::Embed | Self::Head => (c.vocab_size, c.hidden_size),
            Self::FinalNorm => (1, c.hidden_size),
            Self::Layer(_, Part::Norm(n)) => (1, n.row().1(c)),
            Self::Layer(_, Part::Matrix(p)) => p.shape(c),
            Self::Layer(_, Part::Bias(p)) => (1, p.shape(c).0),
            Self::Layer(_, Part::LoraA(p)) => (rank, p.shape(c).1),
            Self::Layer(_, Part::LoraB(p)) => (p.shape(c).0, rank),
        }
    }

    /// The shape in files.
    pub fn file_shape(self, c: &ModelConfig, rank: usize) -> Vec<usize> {
        let (rows, cols) = self.shape(c, rank);
        if self.is_vector() { vec![cols] } else { vec![rows, cols] }
    }

    /// Number of elements.
    pub fn len(self, c: &ModelConfig, rank: usize) -> usize {
        let (rows, cols) = self.shape(c, rank);
        rows * cols
    }
}

/// The name in Hugging Face files, for example `model.layers.0.self_attn.q_proj.weight`; PEFT's files put a prefix before it.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Embed => f.write_str("model.embed_tokens.weight"),
            Self::FinalNorm => f.write_str("model.norm.weight"),
            Self::Head => f.write_str("lm_head.weight"),
            Self::Layer(i, part) => {
                let (path, what) = match part {
                    Part::Norm(n) => (n.row().0, "weight"),
                    Part::Matrix(p) => (p.path(), "weight"),
                    Part::Bias(p) => (p.path(), "bias"),
                    Part::LoraA(p) => (p.path(), "lora_A.weight"),
                    Part::LoraB(p) => (p.path(), "lora_B.weight"),
                };
                write!(f, "model.layers.{i}.{path}.{what}")
            }
        }
    }
}
