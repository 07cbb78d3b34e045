//! How a trained weight is updated: decay on matrices only, the LoRA+ rate of B, the rows of grown embeddings.

use crate::model::weights::{Kind, Part, Place};

/// What decides how a weight is updated besides its place.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GroupSettings {
    /// LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns at this multiple of the learning rate.
    pub lora_plus: Option<f64>,
    /// With LoRA on a grown vocabulary: the first of the new rows, which are trained alone and without decay. Gradients of
    /// the embedding and head then hold just these rows. `None`: such gradients begin at row 0.
    pub new_rows: Option<usize>,
}

impl GroupSettings {
    /// Whether weight decay applies.
    pub fn decays(&self, at: Place) -> bool {
        at.decays() && !(at.kind() == Kind::Vocabulary && self.new_rows.is_some())
    }

    /// Multiple of the learning rate.
    pub fn lr_scale(&self, at: Place) -> f64 {
        match at {
            Place::Layer(_, Part::LoraB(_)) => self.lora_plus.unwrap_or(1.0),
            _ => 1.0,
        }
    }

    /// First row of the weight that its gradient covers.
    pub fn first_row(&self, at: Place) -> usize {
        if at.kind() == Kind::Vocabulary { self.new_rows.unwrap_or(0) } else { 0 }
    }
}
