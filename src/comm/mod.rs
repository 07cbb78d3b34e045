//! Ranks and collectives: `trait Communicator`, and [`Solo`], a run of one rank.
//!
//! **Invariant:** every rank calls the same collectives in the same order. A transport (MPI, NCCL) is one file here that
//! implements the trait; nothing above this module knows which one runs.

use crate::backend::Backend;
use crate::error::Result;
use crate::tensor::Tensor;

/// What the ranks of a run do together. Object-safe: the trainer holds a `&dyn Communicator<B>`.
pub trait Communicator<B: Backend> {
    /// This process, in `0..world_size`.
    fn rank(&self) -> usize;

    /// Number of processes.
    fn world_size(&self) -> usize;

    /// Starts summing f32 tensors over all ranks. They are read before this returns, or in the order of the device's stream, so
    /// that nothing is borrowed while the sum is under way; several may be, so that the reduction of one layer's gradients
    /// overlaps the backward pass of the layers below. Every rank starts the same ones in the same order, a rank without a
    /// target in its micro-batches too.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn reduce_start(&self, dev: &B, tensors: &[&Tensor<B>]) -> Result<()>;

    /// Waits for the oldest reduction under way and writes its sums, in rank order where the transport allows it, to the tensors
    /// it was started with.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn reduce_finish(&self, dev: &B, tensors: &mut [&mut Tensor<B>]) -> Result<()>;

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

    /// Whether any rank says so: what ends a loop has to end it on all of them after the same step.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn any(&self, flag: bool) -> Result<bool> {
        let mut ranks = [f64::from(flag)];
        self.sum_host(&mut ranks)?;
        Ok(ranks[0] > 0.0)
    }

    /// Whether this rank writes files and prints.
    fn is_main(&self) -> bool {
        self.rank() == 0
    }
}

/// Sums figures of `n` micro-batches over all ranks. Each rank gives those of its own with their numbers; places of the others are
/// zero, so the sum over ranks is exact, and the fold is in the order of the numbers: the same bits on any number of ranks.
///
/// # Errors
/// If a peer is gone or the transport fails.
pub fn fold<B: Backend, const N: usize>(
    comm: &dyn Communicator<B>,
    n: usize,
    own: impl IntoIterator<Item = (usize, [f64; N])>,
) -> Result<[f64; N]> {
    let mut all = vec![0.0; n * N];
    for (k, figures) in own {
        all[k * N..][..N].copy_from_slice(&figures);
    }
    comm.sum_host(&mut all)?;
    let mut sums = [0.0; N];
    for figures in all.chunks_exact(N) {
        sums.iter_mut().zip(figures).for_each(|(sum, x)| *sum += x);
    }
    Ok(sums)
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

    fn reduce_start(&self, _dev: &B, _tensors: &[&Tensor<B>]) -> Result<()> {
        Ok(())
    }

    fn reduce_finish(&self, _dev: &B, _tensors: &mut [&mut Tensor<B>]) -> Result<()> {
        Ok(())
    }

    fn sum_host(&self, _values: &mut [f64]) -> Result<()> {
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}
