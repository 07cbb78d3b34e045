//! What steps and evaluations ask of their device, asked once before the first of them.

use super::buckets::Buckets;
use super::step::Workload;
use crate::backend::Backend;
use crate::backend::footprint::row_counts;
use crate::batch::MicroBatch;
use crate::comm::Communicator;
use crate::error::Result;
use crate::model::weights::Place;
use crate::model::{self, Model};

impl<B: Backend> Workload<B> {
    /// Has the device compile and allocate what steps of `micro_batches` micro-batches and evaluations between them will take:
    /// [`Backend::prepare`].
    ///
    /// # Errors
    /// If the device has not enough memory, or a kernel does not compile.
    pub fn prepare(&mut self, dev: &B, comm: &dyn Communicator<B>, micro_batches: usize) -> Result<()> {
        dev.prepare(&mut || self.rehearse(dev, comm, micro_batches))?;
        self.optimizer.forget_step(dev)?;
        dev.begin_step(&mut self.stats)
    }

    fn rehearse(&mut self, dev: &B, comm: &dyn Communicator<B>, micro_batches: usize) -> Result<()> {
        let Self { model, grads, acts, optimizer, stats, .. } = self;
        model::zero_grads(dev, grads)?;
        for n in row_counts(acts.capacity()) {
            acts.load(dev, &MicroBatch::of_size(n))?;
            model::forward(dev, model, acts)?;
            model::backward(dev, model, grads, acts, 1.0, &mut |_, _| Ok(()))?;
            model::loss(dev, model, acts)?;
        }
        let Model { params, new_rows, .. } = model;
        let first_row = |at| model::first_row(new_rows.as_ref(), at);
        let sharded = optimizer.is_sharded().then_some(&first_row as &dyn Fn(Place) -> usize);
        Buckets::of(comm, grads).prepare(dev, comm, params, grads, sharded)?;
        dev.begin_step(stats)?;
        dev.add_loss(stats, acts.loss_tensor(), Some(acts.correct_tensor()))?;
        optimizer.rehearse(dev, comm, &mut model.params, grads, acts.loss_tensor(), micro_batches)
    }
}
