//! Growing the vocabulary: rows for new tokens, and frozen padding rows.

use super::{HostTensor, InFile, Pieces, TensorSource};
use crate::ensure;
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::model::weights::{Kind, Place};
use crate::rng::Stream;

/// Standard deviation of the noise on a new row, as a share of the root mean square of the row it is made from: enough that
/// two tokens never have equal logits, too little to change what the row means.
const NOISE: f64 = 0.01;

/// A token whose row is made from another token's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewToken {
    /// Id of the new token.
    pub id: usize,
    /// Token whose row it starts from: eos for `<|im_end|>`, bos for `<|im_start|>`.
    pub like: usize,
}

/// What is done to the vocabulary.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resize {
    /// New tokens. Ids below the model's vocabulary re-use rows that a padded model has spare.
    pub tokens: Vec<NewToken>,
    /// Rows of embedding and head in the end (`--pad-vocab-to`); those beyond the last token are zero, frozen, and no class.
    pub pad_to: Option<usize>,
    /// Seed of the noise.
    pub seed: u64,
}

/// A model with a changed vocabulary. Tied heads stay tied.
pub struct Resized<'a> {
    base: &'a dyn TensorSource,
    how: Resize,
    config: ModelConfig,
}

impl<'a> Resized<'a> {
    /// Checks the plan against the model.
    ///
    /// # Errors
    /// If `pad_to` is smaller than the vocabulary, or a token is made from one that does not exist.
    pub fn new(base: &'a dyn TensorSource, how: Resize) -> Result<Self> {
        let mut config = base.config().clone();
        let (old_rows, old_classes) = (config.vocab_size, config.n_classes);
        for t in &how.tokens {
            ensure!(t.like < old_classes, "token {} starts from token {}, the model has {old_classes}", t.id, t.like);
        }
        let classes = how.tokens.iter().map(|t| t.id + 1).fold(old_classes, usize::max);
        let rows = classes.max(old_rows);
        // A vocabulary with a hole would have rows that nothing initialises.
        let new = how.tokens.iter().filter(|t| t.id >= old_rows).count();
        ensure!(rows - old_rows == new, "new token ids have to follow the vocabulary of {old_rows} without a gap");
        config.n_classes = classes;
        config.vocab_size = rows;
        if let Some(pad_to) = how.pad_to {
            if pad_to < rows {
                return Err(Error::usage(format!("--pad-vocab-to {pad_to}: the vocabulary already has {rows} tokens")));
            }
            config.vocab_size = pad_to;
        }
        Ok(Self { base, how, config })
    }

    /// The first row that is new, where there is one: with LoRA, training covers the new rows alone.
    pub fn first_new_row(&self) -> Option<usize> {
        self.how.tokens.iter().map(|t| t.id).min()
    }

    /// Whether a weight has rows beyond those of the base.
    fn grows(&self, at: Place) -> bool {
        let more = !self.how.tokens.is_empty() || self.config.vocab_size != self.base.config().vocab_size;
        at.kind() == Kind::Vocabulary && more
    }

    fn grow(&self, at: Place, mut t: HostTensor) -> HostTensor {
        t.rows = self.config.vocab_size;
        t.data.resize(t.rows * t.cols, 0.0);
        let which = u64::from(at == Place::Head);
        for new in &self.how.tokens {
            let source = t.row(new.like).to_vec();
            let square: f64 = source.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let std = NOISE * (square / t.cols as f64).sqrt();
            let noise = Stream::new(&[self.how.seed, u64::from_le_bytes(*b"newtoken"), new.id as u64, which]);
            for (j, (x, &s)) in t.row_mut(new.id).iter_mut().zip(&source).enumerate() {
                *x = (f64::from(s) + std * noise.normal_at(j as u64)) as f32;
            }
        }
        t
    }
}

impl TensorSource for Resized<'_> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn load(&self, at: Place) -> Result<HostTensor> {
        let t = self.base.load(at)?;
        Ok(if at.kind() == Kind::Vocabulary { self.grow(at, t) } else { t })
    }

    fn pieces(&self, at: Place) -> Result<Option<Box<dyn Pieces + '_>>> {
        if self.grows(at) { Ok(None) } else { self.base.pieces(at) }
    }

    fn in_file(&self, at: Place) -> Result<Option<InFile>> {
        if self.grows(at) { Ok(None) } else { self.base.in_file(at) }
    }
}
