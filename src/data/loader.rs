//! The loader: a thread that builds the micro-batches of coming steps, and an exact cursor.
//!
//! A step takes the next `micro_batch * grad_accum * world_size` rows of an epoch's global order. They are cut into micro-batches
//! of `micro_batch` rows before anyone's share is decided: micro-batch k goes to rank `k mod world_size`, so what it holds does not
//! depend on the number of ranks. At the end of an epoch the missing rows are empty micro-batches or fewer rows in one, never
//! repeated samples. No step crosses from one epoch into the next.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, bounded};

use crate::batch::MicroBatch;
use crate::data::pack::best_fit_decreasing;
use crate::data::train_set::{Cursor, EpochPlan, PieceSet, TrainSet};
use crate::error::{Error, Result};
use crate::panics::caught;
use crate::rng::Stream;

/// How many rows a step takes, and who takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// Rows of a micro-batch on one rank.
    pub micro_batch: usize,
    /// Micro-batches of a step on one rank.
    pub grad_accum: usize,
    /// Number of ranks.
    pub world_size: usize,
}

impl StepShape {
    /// Rows of a step over all ranks.
    pub fn rows(&self) -> u64 {
        (self.micro_batch * self.grad_accum * self.world_size) as u64
    }

    /// Steps an epoch of `n_rows` takes, the last one filled up with nothing.
    pub fn steps(&self, n_rows: u64) -> u64 {
        n_rows.div_ceil(self.rows())
    }
}

/// Numbers of the micro-batches that are a rank's, in its order: k goes to rank `k mod world_size`.
pub fn dealt(rank: usize, world_size: usize) -> impl Iterator<Item = usize> {
    (rank..).step_by(world_size)
}

/// One optimiser step on this rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// `grad_accum` micro-batches, numbered by [`dealt`]; at an epoch's end some may be empty (`tokens.len() == 0`).
    pub micro_batches: Vec<MicroBatch>,
    /// Where the run stands after it; after the last step of an epoch, the start of the next.
    pub cursor: Cursor,
    /// The cursor as a number of epochs.
    pub epoch_fraction: f64,
    /// Whether it is the last of its epoch.
    pub epoch_end: bool,
}

/// Builds steps ahead of the trainer.
#[derive(Debug)]
pub struct Loader {
    receiver: Option<Receiver<Result<Step>>>,
    thread: Option<JoinHandle<()>>,
}

/// Steps built ahead.
const PREFETCH: usize = 4;

impl Loader {
    /// Starts at a cursor and goes on without end, epoch after epoch.
    ///
    /// # Errors
    /// If the cursor lies outside its epoch, or the thread cannot be started.
    ///
    /// # Panics
    /// If the shape has a zero or the rank is not below the world size.
    pub fn start(data: Arc<TrainSet>, cursor: Cursor, shape: StepShape, rank: usize) -> Result<Self> {
        assert!(shape.rows() > 0 && rank < shape.world_size, "rank {rank} of {shape:?}");
        let plan = data.plan(cursor.epoch);
        let n_rows = plan.n_rows() as u64;
        crate::ensure!(
            cursor.rows < n_rows || (cursor.rows == 0 && n_rows == 0),
            "cursor at row {} of epoch {}, expected one below {n_rows}: the data differ from those of the checkpoint",
            cursor.rows,
            cursor.epoch
        );
        let (sender, receiver) = bounded(PREFETCH);
        let work = move || {
            let (mut plan, mut cursor) = (plan, cursor);
            loop {
                // Where a file was cut, what is read from it makes no sense, and the check says so.
                let step = caught(|| build_step(&data, &plan, cursor, shape, rank));
                let whole = data.sets().iter().try_for_each(|s| s.tokens.check_whole());
                let changed =
                    || Error::new("a token file was changed while it was read; remove it, and it is made anew");
                let step = match whole.and_then(|()| step.ok_or_else(changed)) {
                    Ok(step) => step,
                    Err(e) => {
                        // Nobody listens when the loader was dropped.
                        let _ = sender.send(Err(e));
                        return;
                    }
                };
                cursor = step.cursor;
                // The receiver is gone when the loader was dropped.
                if sender.send(Ok(step)).is_err() {
                    return;
                }
                if cursor.epoch != plan.epoch {
                    plan = data.plan(cursor.epoch);
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("loader".to_string())
            .spawn(work)
            .map_err(|e| Error::new(format!("loader thread: {e}")))?;
        Ok(Self { receiver: Some(receiver), thread: Some(thread) })
    }

    /// The next step; waits until it is built.
    ///
    /// # Errors
    /// If a file was cut, or the loader thread died.
    pub fn next_step(&mut self) -> Result<Step> {
        let receiver = self.receiver.as_ref().expect("only drop takes the receiver");
        receiver
            .recv()
            .unwrap_or_else(|_| Err(Error::new("the loader thread ended early: a token file became unreadable")))
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One rank's part of the step that starts at `cursor`.
pub fn build_step(data: &TrainSet, plan: &EpochPlan, cursor: Cursor, shape: StepShape, rank: usize) -> Step {
    let n_rows = plan.n_rows() as u64;
    let end = (cursor.rows + shape.rows()).min(n_rows);
    // Counted from the cursor, so that a resumed run may start anywhere.
    let first = |k: usize| cursor.rows + (k * shape.micro_batch) as u64;
    let micro_batches = dealt(rank, shape.world_size)
        .take(shape.grad_accum)
        .map(|k| {
            let mut batch = MicroBatch::default();
            (first(k)..first(k + 1).min(end)).for_each(|row| data.append_row(plan, row as usize, &mut batch));
            batch
        })
        .collect();
    let epoch_end = end == n_rows;
    let cursor =
        if epoch_end { Cursor { epoch: plan.epoch + 1, rows: 0 } } else { Cursor { epoch: plan.epoch, rows: end } };
    let epoch_fraction = cursor.epoch as f64 + cursor.rows as f64 / n_rows.max(1) as f64;
    Step { micro_batches, cursor, epoch_fraction, epoch_end }
}

/// Steps from `cursor` until `epochs` passes are over, the last one perhaps in part: what a schedule over epochs is made for. A part of
/// a step is a step. Packed epochs differ in their number of rows, so every one on the way is planned.
pub fn steps_until(data: &TrainSet, cursor: Cursor, epochs: f64, shape: StepShape) -> u64 {
    let unpacked = data.unpacked_rows();
    (cursor.epoch..epochs.ceil() as u64)
        .map(|epoch| {
            let n_rows = unpacked.unwrap_or_else(|| data.plan(epoch).n_rows() as u64);
            let done = if epoch == cursor.epoch { cursor.rows.min(n_rows) } else { 0 };
            let steps = shape.steps(n_rows - done);
            match epochs - epoch as f64 {
                part if part < 1.0 => ((steps as f64 * part).ceil() as u64).clamp(1, steps.max(1)),
                _ => steps,
            }
        })
        .sum()
}

/// Micro-batches of an evaluation: every piece of a data set once, in an order that no number of ranks changes.
#[derive(Clone, Debug)]
pub struct EvalPlan {
    rows: Vec<Vec<u32>>,
}

impl EvalPlan {
    /// Rows over the first `max_samples` pieces of a seeded order (all without a limit).
    pub fn new(set: &PieceSet, max_seq_len: usize, packing: bool, max_samples: Option<usize>, seed: u64) -> Self {
        const STREAM_EVAL: u64 = 0x6576_616c;
        let n = set.pieces.len();
        let mut chosen: Vec<u32> = match max_samples.filter(|&m| m < n) {
            Some(m) => Stream::new(&[seed, STREAM_EVAL]).permutation(n)[..m].to_vec(),
            None => (0..n as u32).collect(),
        };
        chosen.sort_unstable();
        let rows = if packing {
            let lengths: Vec<u32> = chosen.iter().map(|&p| set.pieces[p as usize].len).collect();
            let rows = best_fit_decreasing(&lengths, max_seq_len as u32);
            rows.into_iter().map(|row| row.into_iter().map(|i| chosen[i as usize]).collect()).collect()
        } else {
            chosen.into_iter().map(|p| vec![p]).collect()
        };
        Self { rows }
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.rows.len()
    }

    /// Number of micro-batches over all ranks, of at most `micro_batch` rows each.
    pub fn n_micro_batches(&self, micro_batch: usize) -> usize {
        self.rows.len().div_ceil(micro_batch)
    }

    /// The micro-batches of a rank with their numbers, dealt as in training. Samples are indices of pieces in the set.
    pub fn micro_batches<'a>(
        &'a self,
        set: &'a PieceSet,
        micro_batch: usize,
        rank: usize,
        world_size: usize,
    ) -> impl Iterator<Item = (usize, MicroBatch)> + 'a {
        let n = self.n_micro_batches(micro_batch);
        dealt(rank, world_size).take_while(move |&k| k < n).map(move |k| {
            let mut batch = MicroBatch::default();
            for row in self.rows.iter().skip(k * micro_batch).take(micro_batch) {
                row.iter().for_each(|&piece| set.append(piece as usize, piece, &mut batch));
            }
            (k, batch)
        })
    }
}
