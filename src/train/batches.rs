//! What the loop asks of data: the micro-batches of one optimiser step, and those of an evaluation.

use crate::data::MicroBatch;
use crate::error::Result;

/// The data of one optimiser step on this rank.
#[derive(Clone, Debug, Default)]
pub struct StepBatch {
    /// At most `grad_accum` of them; fewer at the end of an epoch, which no step crosses.
    pub micro_batches: Vec<MicroBatch>,
    /// Place of the first micro-batch in the step over all ranks, for dropout: independent of the number of ranks.
    pub first_index: u64,
    /// Cursor after this step: epoch, and rows of its global order consumed. At an epoch's end it is the next one's start.
    pub cursor: (u64, u64),
    /// The cursor as a number of epochs.
    pub epoch_fraction: f64,
    /// Whether this step closed an epoch.
    pub epoch_end: bool,
}

/// Steps in order, from the cursor where it was started.
pub trait TrainBatches {
    /// The next step; `None` after the last epoch. Blocks until a prefetched step is there.
    ///
    /// # Errors
    /// If the data cannot be read.
    fn next_step(&mut self) -> Result<Option<StepBatch>>;

    /// Where a sample of [`MicroBatch::samples`] came from, as `file:line`.
    fn sample_name(&self, sample: u32) -> String;
}

/// Validation data, per data set.
pub trait EvalBatches {
    /// Names of the data sets, in order.
    fn names(&self) -> Vec<String>;

    /// Every micro-batch of data set `i` on this rank, in order, with at most the capacity the model was allocated for.
    ///
    /// # Errors
    /// If the data cannot be read, or the error of `each`.
    fn visit(&self, i: usize, each: &mut dyn FnMut(&MicroBatch) -> Result<()>) -> Result<()>;
}
