//! One micro-batch as the model takes it: tokens, targets, document starts.

/// Target value of a token that carries no loss.
pub const IGNORE: i32 = -100;

/// Flattened documents of one micro-batch, padding already removed; vectors of length N.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// Token ids.
    pub tokens: Vec<i32>,
    /// The token to predict at each position, or [`IGNORE`]; never across a document's end.
    pub targets: Vec<i32>,
    /// First position of the token's document in this micro-batch.
    pub doc_start: Vec<i32>,
    /// Number of targets that carry loss.
    pub n_valid: usize,
    /// Which samples are in it, for messages about bad steps: indices into the data set.
    pub samples: Vec<u32>,
}
