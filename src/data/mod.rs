//! From JSONL to micro-batches: rows, templates, tokenizer, mix, packing, token files, loader.

pub mod cache;
pub mod encode;
pub mod jsonl;
pub mod loader;
pub mod mix;
pub mod pack;
pub mod pretrain;
pub mod progress;
pub mod raw_tokens;
mod row_fields;
pub mod sft;
mod sp_model;
pub mod split;
pub mod template;
pub mod text_loss;
pub mod token_file;
pub mod tokenizer;
pub mod train_set;

/// Flattened documents of one micro-batch, padding already removed; vectors of length N.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// Token ids.
    pub tokens: Vec<i32>,
    /// The token to predict at each position, or [`crate::backend::IGNORE`]; never across a document's end.
    pub targets: Vec<i32>,
    /// First position of the token's document in this micro-batch.
    pub doc_start: Vec<i32>,
    /// Number of targets that carry loss.
    pub n_valid: usize,
    /// Which samples are in it, for messages about bad steps: indices into the data set.
    pub samples: Vec<u32>,
}
