//! What the loop asks of data: the micro-batches of one optimiser step, and those of an evaluation.

use std::path::{Component, Path};
use std::sync::Arc;

use crate::batch::MicroBatch;
use crate::data::loader::{EvalPlan, Loader, Step, StepShape};
use crate::data::train_set::{Cursor, PieceSet, TrainSet};
use crate::error::Result;

/// Training data from a prefetching loader: steps in order, from the cursor where it was started.
pub struct TrainBatches {
    data: Arc<TrainSet>,
    loader: Loader,
}

impl TrainBatches {
    /// Starts at a cursor.
    ///
    /// # Errors
    /// If the cursor lies outside the data.
    pub fn start(data: &Arc<TrainSet>, cursor: Cursor, shape: StepShape, rank: usize) -> Result<Self> {
        let loader = Loader::start(Arc::clone(data), cursor, shape, rank)?;
        Ok(Self { data: Arc::clone(data), loader })
    }

    /// The next step. Blocks until it is there.
    ///
    /// # Errors
    /// If the data cannot be read.
    pub fn next_step(&mut self) -> Result<Step> {
        self.loader.next_step()
    }

    /// Where a sample of [`MicroBatch::samples`] came from, as `file:line`.
    pub fn sample_name(&self, sample: u32) -> String {
        self.data.sample_name(sample)
    }
}

/// Validation pieces of every data set, planned once.
pub struct EvalBatches {
    sets: Vec<(String, PieceSet, EvalPlan)>,
    micro_batch: usize,
    rank: usize,
    world_size: usize,
}

impl EvalBatches {
    /// Plans rows of at most `max_seq_len` tokens, `micro_batch` of them at a time. Data sets without a piece are left out;
    /// `None` if all are.
    pub fn new(
        sets: Vec<PieceSet>,
        max_seq_len: usize,
        packing: bool,
        micro_batch: usize,
        (rank, world_size): (usize, usize),
    ) -> Option<Self> {
        let paths: Vec<String> = sets.iter().map(|s| s.name.clone()).collect();
        let sets: Vec<_> = short_names(&paths)
            .into_iter()
            .zip(sets)
            .filter(|(_, s)| !s.pieces.is_empty())
            .map(|(name, s)| {
                let plan = EvalPlan::new(&s, max_seq_len, packing, None, 0);
                (name, s, plan)
            })
            .collect();
        (!sets.is_empty()).then_some(Self { sets, micro_batch, rank, world_size })
    }

    /// Names of the data sets, in order.
    pub fn names(&self) -> Vec<String> {
        self.sets.iter().map(|(name, ..)| name.clone()).collect()
    }

    /// Number of micro-batches of data set `i` over all ranks.
    pub fn count(&self, i: usize) -> usize {
        self.sets[i].2.n_micro_batches(self.micro_batch)
    }

    /// Every micro-batch of data set `i` on this rank with its number, in order, within the capacity the model was allocated for.
    ///
    /// # Errors
    /// The error of `each`.
    pub fn visit(&self, i: usize, mut each: impl FnMut(usize, &MicroBatch) -> Result<()>) -> Result<()> {
        let (_, set, plan) = &self.sets[i];
        plan.micro_batches(set, self.micro_batch, self.rank, self.world_size).try_for_each(|(k, b)| each(k, &b))
    }
}

/// `data/sft/dolly15k.jsonl` as `dolly15k`: a name for tables and metrics. Where several would have one name, as many folders
/// as tell them apart come first (`a_train`), or else a number behind it.
fn short_names(paths: &[String]) -> Vec<String> {
    let parts: Vec<Vec<String>> = paths
        .iter()
        .map(|path| {
            let path = Path::new(path.strip_suffix(".gz").unwrap_or(path)).with_extension("");
            let names = path.components().filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir));
            names.map(|c| c.as_os_str().to_string_lossy().into_owned()).collect()
        })
        .collect();
    let name = |i: usize, n: usize| parts[i][parts[i].len().saturating_sub(n)..].join("_");
    let deepest = parts.iter().map(Vec::len).max().unwrap_or(0);
    let mut names: Vec<String> = Vec::with_capacity(paths.len());
    for i in 0..paths.len() {
        let alone = |n: &usize| (0..paths.len()).all(|k| parts[k] == parts[i] || name(k, *n) != name(i, *n));
        let base = name(i, (1..=deepest).find(alone).unwrap_or(deepest));
        let numbered = (2..).map(|n| format!("{base}_{n}"));
        let free = std::iter::once(base.clone()).chain(numbered).find(|n| !names.contains(n));
        names.push(free.expect("numbers do not end"));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_sets_of_one_file_name_have_names_apart() {
        let check = |paths: &[&str], names: &[&str]| {
            assert_eq!(short_names(&paths.iter().map(ToString::to_string).collect::<Vec<_>>()), names);
        };
        check(&["data/dolly15k.jsonl", "b/x.jsonl.gz", "c.tok"], &["dolly15k", "x", "c"]);
        check(&["a/train.jsonl", "b/train.jsonl", "dev.jsonl"], &["a_train", "b_train", "dev"]);
        check(&["x/a/train.jsonl", "y/a/train.jsonl"], &["x_a_train", "y_a_train"]);
        check(&["train.jsonl", "b/train.jsonl", "b/train.json"], &["train", "b_train", "b_train_2"]);
        check(&["train.jsonl", "./train.jsonl", "/d/train.jsonl"], &["train", "train_2", "d_train"]);
        check(&["a/train.jsonl", "b/train.jsonl", "a_train.jsonl"], &["a_train", "b_train", "a_train_2"]);
    }
}
