//! Ranks and collectives: `trait Communicator`, and [`Solo`], a run of one rank.
//!
//! **Invariant:** every rank calls the same collectives in the same order. A transport (MPI, NCCL) is one file here that
//! implements the trait; nothing above this module knows which one runs.

use crate::backend::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

/// What the ranks of a run do together. Object-safe: the trainer holds a `Box<dyn Communicator<B>>`.
pub trait Communicator<B: Backend> {
    /// This process, in `0..world_size`.
    fn rank(&self) -> usize;

    /// Number of processes.
    fn world_size(&self) -> usize;

    /// Starts summing f32 tensors over all ranks, in place and in rank order where the transport allows it. The tensors may
    /// be read again only after [`Communicator::all_reduce_wait`]; several starts may be under way, so that the reduction of
    /// one layer's gradients overlaps the backward pass of the layers below.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn all_reduce_start(&self, dev: &B, tensors: &mut [&mut Tensor<B>]) -> Result<()>;

    /// Waits for every reduction started so far.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn all_reduce_wait(&self, dev: &B) -> Result<()>;

    /// Sums host values over all ranks, in rank order: every rank gets the same bits.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn sum_host(&self, values: &mut [f64]) -> Result<()>;

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn barrier(&self) -> Result<()>;

    /// Whether this rank writes files and prints.
    fn is_main(&self) -> bool {
        self.rank() == 0
    }
}

/// One rank: every sum is its own term.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl<B: Backend> Communicator<B> for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce_start(&self, _dev: &B, _tensors: &mut [&mut Tensor<B>]) -> Result<()> {
        Ok(())
    }

    fn all_reduce_wait(&self, _dev: &B) -> Result<()> {
        Ok(())
    }

    fn sum_host(&self, _values: &mut [f64]) -> Result<()> {
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}
