//! What the loop asks of data: the micro-batches of one optimiser step, and those of an evaluation.

use std::sync::Arc;

use crate::batch::MicroBatch;
use crate::data::loader::{EvalPlan, Loader, Step, StepShape};
use crate::data::train_set::{Cursor, PieceSet, TrainSet};
use crate::error::Result;
use crate::text::short_names;

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

    /// Names of the data sets.
    pub fn set_names(&self) -> Vec<String> {
        let paths: Vec<String> = self.data.sets().iter().map(|s| s.name.clone()).collect();
        short_names(&paths)
    }

    /// Which data set a sample of [`MicroBatch::samples`] is of.
    pub fn set_of(&self, sample: u32) -> usize {
        self.data.locate(sample).0
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
    /// The error of `each`; or if another program cut the file, so that what `each` got is not all from it.
    pub fn visit(&self, i: usize, mut each: impl FnMut(usize, &MicroBatch) -> Result<()>) -> Result<()> {
        let (_, set, plan) = &self.sets[i];
        plan.micro_batches(set, self.micro_batch, self.rank, self.world_size).try_for_each(|(k, b)| each(k, &b))?;
        set.tokens.check_whole()
    }
}
