//! Training checkpoints: the folder that is renamed into place whole, and the state that a run resumes from.

pub mod manifest;
pub mod shards;
pub mod state;
