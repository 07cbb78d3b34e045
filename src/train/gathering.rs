//! The gather of updated weights beside the next forward pass, with ZeRO-1: a layer's weights are waited for when the layer begins.
//!
//! **Invariant:** nothing reads or writes trained weights while some are on their way, but for the forward pass that waits for them part by
//! part. Evaluations, checkpoints, comparisons and the next update come after [`super::step::Workload::settle`].

use super::buckets::Buckets;
use crate::backend::Backend;
use crate::comm::Communicator;
use crate::error::Result;
use crate::model::weights::Place;
use crate::model::{Grads, Params, Ready};

/// Buckets of weights that are on their way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gathering {
    /// Those below this number: they come from the last one, which a forward pass reads first, to the first.
    left: usize,
}

impl Gathering {
    /// Whether all weights are where they belong.
    pub fn is_done(self) -> bool {
        self.left == 0
    }

    /// Starts to give what every rank updated to all of them. `first_row` is the first row of a weight that its gradient covers.
    ///
    /// # Errors
    /// If a peer is gone or the device fails.
    pub fn start<B: Backend>(
        &mut self,
        dev: &B,
        comm: &dyn Communicator<B>,
        buckets: &Buckets,
        (params, grads): (&mut Params<B>, &Grads<B>),
        first_row: impl Fn(Place) -> usize,
    ) -> Result<()> {
        assert!(self.is_done(), "weights are gathered once a step");
        let spans = buckets.spans(params, grads, first_row);
        let all: Vec<_> = spans.into_iter().enumerate().rev().collect();
        comm.gather_start(dev, &all)?;
        self.left = all.len();
        Ok(())
    }

    /// Waits for the weights of a part, and of those that a forward pass reads before it; `None`: for all.
    ///
    /// # Errors
    /// If a peer is gone or the device fails.
    pub fn wait<B: Backend>(
        &mut self,
        dev: &B,
        comm: &dyn Communicator<B>,
        buckets: &Buckets,
        (params, grads): (&mut Params<B>, &Grads<B>),
        first_row: impl Fn(Place) -> usize,
        part: Option<Ready>,
    ) -> Result<()> {
        let first = part.map_or(0, |part| buckets.bucket_with(part));
        if first >= self.left {
            return Ok(());
        }
        let mut spans = buckets.spans(params, grads, first_row);
        while self.left > first {
            self.left -= 1;
            comm.gather_finish(dev, self.left, &mut spans[self.left])?;
        }
        Ok(())
    }
}
