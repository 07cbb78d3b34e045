//! The gather of updated weights beside the next forward pass, with ZeRO-1: a layer's weights are waited for when the layer begins.
//!
//! **Invariant:** nothing reads or writes trained weights while some are on their way, but for the forward pass that waits for them part by
//! part. Evaluations, checkpoints, comparisons and the next update come after [`super::step::Workload::settle`].

use std::ops::Range;

use super::buckets::Buckets;
use crate::backend::Backend;
use crate::comm::Communicator;
use crate::error::Result;
use crate::model::{self, Grads, Params, Ready};

/// What weights travel by.
pub struct Way<'a, B: Backend> {
    /// Where they lie.
    pub dev: &'a B,
    /// The other ranks.
    pub comm: &'a dyn Communicator<B>,
    /// Which weights travel together.
    pub buckets: &'a Buckets,
    /// Rows of embedding and head that are trained beside low-rank updates.
    pub new_rows: Option<&'a Range<usize>>,
}

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

    /// Starts to give what every rank updated to all of them.
    ///
    /// # Errors
    /// If a peer is gone or the device fails.
    pub fn start<B: Backend>(&mut self, way: &Way<'_, B>, params: &mut Params<B>, grads: &Grads<B>) -> Result<()> {
        assert!(self.is_done(), "weights are gathered once a step");
        let spans = way.buckets.spans(params, grads, |at| model::first_row(way.new_rows, at));
        let all: Vec<_> = spans.into_iter().enumerate().rev().collect();
        way.comm.gather_start(way.dev, &all)?;
        self.left = all.len();
        Ok(())
    }

    /// Waits for the weights of a part, and of those that a forward pass reads before it; `None`: for all.
    ///
    /// # Errors
    /// If a peer is gone or the device fails.
    pub fn wait<B: Backend>(
        &mut self,
        way: &Way<'_, B>,
        params: &mut Params<B>,
        grads: &Grads<B>,
        part: Option<Ready>,
    ) -> Result<()> {
        let first = part.map_or(0, |part| way.buckets.bucket_with(part));
        if first >= self.left {
            return Ok(());
        }
        let mut spans = way.buckets.spans(params, grads, |at| model::first_row(way.new_rows, at));
        while self.left > first {
            self.left -= 1;
            way.comm.gather_finish(way.dev, self.left, &mut spans[self.left])?;
        }
        Ok(())
    }
}
