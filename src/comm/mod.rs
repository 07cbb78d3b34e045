//! Ranks and collectives: `trait Communicator`, [`Solo`], a run of one rank, and [`Ranks`], one of several.
//!
//! ```text
//! start ─► control ── small values, heartbeats, causes ──► the hub of ringrun, or of rank 0
//!      └─► sockets ── gradients ──► every other rank
//! ```
//! Two things, apart: gradients travel between ranks over a [`transport`]; everything else, and above all why a run ends, over the
//! [`control`] channel. Where mpirun or srun started the ranks and the program was built for it, gradients travel over [`mpi`].
//!
//! **Invariant:** every rank calls the same collectives in the same order. Nothing above this module knows what carries them.

pub mod bucket;
pub mod control;
mod doors;
pub mod fault;
pub mod mpi;
#[cfg(feature = "cuda")]
pub mod nccl;
pub mod ranks;
pub mod start;
pub mod transport;

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

pub use launcher::beacon::{Phase, Position};
pub use launcher::options::command as launcher_command;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::words::words;

use bucket::BlockCounts;
pub use mpi::Choice;
pub use ranks::Ranks;
pub use start::{Comm, On, ranks_of_environment, start};

/// Which rank this is, and of how many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// This process, in `0..size`.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
    /// Its number among the ranks of this machine.
    pub local_rank: usize,
    /// Ranks of this machine.
    pub local_size: usize,
}

impl World {
    /// One rank.
    pub const SOLO: Self = Self { rank: 0, size: 1, local_rank: 0, local_size: 1 };

    /// Whether this rank decides and writes for all.
    pub fn is_main(&self) -> bool {
        self.rank == 0
    }
}

/// When gradients are summed over ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fold {
    /// After every micro-batch, in the order of their numbers: any number of ranks gives the bits of one. The caller sets the gradients
    /// to zero once a reduction has read them.
    #[default]
    MicroBatch,
    /// Once a step: less to send, and results that depend on how the micro-batches of a step are dealt to ranks.
    Step,
}
words!(Fold { MicroBatch = "micro_batch", Step = "step" });

/// How ranks work together, as far as the user decides it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ways {
    /// What carries gradients.
    pub transport: Choice,
    /// When they are summed; `None`: once a step over NCCL, else after every micro-batch.
    pub fold: Option<Fold>,
    /// Elements of a bucket at least; `None`: as many as fill the links. Another layout gives the same bits.
    pub bucket: Option<usize>,
}

/// Which sums of a bucket a rank wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sums {
    /// All of them.
    Whole,
    /// Those that it owns; the other elements of its tensors are left as they are, of no meaning.
    Owned,
}

/// Elements of a tensor that belong to a bucket: all of a weight, or the trained rows of it.
pub struct Span<'a, B: Backend> {
    /// The tensor.
    pub tensor: &'a mut Tensor<B>,
    /// Its first element that belongs to the bucket.
    pub first: usize,
    /// How many do.
    pub len: usize,
}

/// Something that the collectives did, from when to when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// What it was: `reduce` (exchange and fold, or sum), `collect` (sums to who wants them), `gather` (weights), `share` (small values).
    pub what: &'static str,
    /// The bucket, where it was one.
    pub bucket: Option<usize>,
    /// When it began.
    pub begun: Instant,
    /// When it ended.
    pub ended: Instant,
}

/// Hears of it, in the thread of the collectives or the main one.
pub type Listener = Box<dyn Fn(Timing) + Send>;

/// What the ranks of a run do together. Object-safe: the trainer holds a `&dyn Communicator<B>`.
pub trait Communicator<B: Backend> {
    /// Which rank this is.
    fn world(&self) -> &World;

    /// When the caller starts reductions.
    fn fold(&self) -> Fold;

    /// Fewer elements make no bucket of their own: parts of the gradient are joined until there are as many.
    fn bucket_elements(&self) -> usize {
        0
    }

    /// Starts adding f32 tensors to the sum over all ranks of this bucket. They are read before this returns, or in the order of the
    /// device's stream, so that nothing is borrowed while the sum is under way; several may be, so that the reduction of one layer's
    /// gradients overlaps the backward pass of the layers below. Every rank starts or skips the same buckets in the same order.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn reduce_start(&self, dev: &B, bucket: usize, tensors: &[&Tensor<B>]) -> Result<()>;

    /// Takes this rank's place in a reduction to which it has nothing to add, its tensors being zeros.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn reduce_skip(&self, dev: &B, bucket: usize, tensors: &[&Tensor<B>]) -> Result<()>;

    /// Called in [`Backend::prepare`], before the first step, with the gradients of each bucket, and with its weights where owners will give
    /// theirs to all: takes what that will need.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn prepare(&self, _dev: &B, _grads: &[Vec<&Tensor<B>>], _weights: &[Vec<Span<'_, B>>]) -> Result<()> {
        Ok(())
    }

    /// Waits for the sums of a bucket over all reductions since it was finished last, and writes those that are wanted. Each element has
    /// one owner, see [`bucket`].
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn reduce_finish(&self, dev: &B, bucket: usize, tensors: &mut [&mut Tensor<B>], wanted: Sums) -> Result<()>;

    /// Starts giving every owner's elements of buckets to all ranks, one bucket after the other, in the tensors' own element type: weights
    /// that each updated its part of. Own elements are read before this returns, or in the order of the device's stream. Nothing uses a
    /// bucket, and no reduction is asked for its sums, before [`Communicator::gather_finish`] has returned for it.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn gather_start(&self, dev: &B, buckets: &[(usize, Vec<Span<'_, B>>)]) -> Result<()>;

    /// From here on the device finds all elements of a bucket; buckets come in the order in which they were started.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn gather_finish(&self, dev: &B, bucket: usize, spans: &mut [Span<'_, B>]) -> Result<()>;

    /// Gives every owner's elements of a bucket to all ranks.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn all_gather(&self, dev: &B, bucket: usize, spans: Vec<Span<'_, B>>) -> Result<()> {
        let mut all = [(bucket, spans)];
        self.gather_start(dev, &all)?;
        self.gather_finish(dev, bucket, &mut all[0].1)
    }

    /// What owners alone hold of a bucket of tensors of these lengths, `own` its part here, joined on the main rank; `None` elsewhere.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn collect(&self, bucket: usize, lengths: &[usize], own: Vec<f32>) -> Result<Option<Vec<f32>>>;

    /// The values of all ranks, `counts[r]` of them from rank r, by rank: more than the control channel should carry.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn all_squares(&self, counts: &[usize], own: Vec<f64>) -> Result<Vec<Vec<f64>>>;

    /// Adds to the figures of a step the squared norm of a gradient of which every rank has the sums of its part, `own`: that of the whole,
    /// its blocks in one order on all ranks.
    ///
    /// # Errors
    /// If a peer is gone, or the transport or the device fails.
    fn add_norm2(
        &self,
        dev: &B,
        stats: &mut B::Stats,
        own: &[(&Tensor<B>, Range<usize>)],
        blocks: &BlockCounts,
    ) -> Result<()> {
        let all = self.all_squares(&blocks.totals(), dev.squares(own)?)?;
        let sums: Vec<f64> = blocks.places().map(|(rank, at)| all[rank][at]).collect();
        dev.add_squares(stats, &blocks.of_tensors(), &sums)
    }

    /// From now on `listener` hears what the collectives did and when; `None`: nobody, and what is under way was told before this returns.
    ///
    /// # Errors
    /// If the device fails.
    fn listen(&self, _listener: Option<Listener>) -> Result<()> {
        Ok(())
    }

    /// How threads that write exchange small values with those of other ranks, in their own order; `None` on one rank.
    fn aside(&self) -> Option<Arc<dyn control::Aside>>;

    /// Everyone's bytes, by rank. `what` names the exchange: ranks that name it differently have lost each other.
    ///
    /// # Errors
    /// If a peer is gone.
    fn gather(&self, what: &str, own: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// No reductions follow: what carried them ends, on all ranks at the same place. The main rank may go on for long.
    ///
    /// # Errors
    /// If a peer is gone or the transport fails.
    fn end_reductions(&self) -> Result<()> {
        Ok(())
    }

    /// Where this rank is now, for whoever has to say where it died. `step` counts from 1.
    fn at(&self, _position: Position) {}

    /// A factor of the loss: 1, or NaN where a test asks for that.
    fn gain(&self) -> f32 {
        1.0
    }

    /// This process, in `0..world_size`.
    fn rank(&self) -> usize {
        self.world().rank
    }

    /// Number of processes.
    fn world_size(&self) -> usize {
        self.world().size
    }

    /// Whether this rank writes files and prints.
    fn is_main(&self) -> bool {
        self.world().is_main()
    }

    /// Sums host values over all ranks, in rank order: every rank gets the same bits.
    ///
    /// # Errors
    /// If a peer is gone, or the ranks sum other numbers of values.
    fn sum_host(&self, values: &mut [f64]) -> Result<()> {
        let n = values.len();
        let all = self.gather(&format!("sum of {n}"), bytemuck::cast_slice(values))?;
        values.fill(0.0);
        for rank in all {
            crate::ensure!(rank.len() == n * 8, "the ranks sum {} and {n} values", rank.len() / 8);
            let of = |bytes: &[u8]| f64::from_ne_bytes(bytes.try_into().expect("eight of them"));
            values.iter_mut().zip(rank.chunks_exact(8)).for_each(|(sum, x)| *sum += of(x));
        }
        Ok(())
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// If a peer is gone.
    fn barrier(&self) -> Result<()> {
        self.gather("barrier", &[]).map(drop)
    }

    /// Whether any rank says so: what ends a loop has to end it on all of them after the same step.
    ///
    /// # Errors
    /// If a peer is gone.
    fn any(&self, flag: bool) -> Result<bool> {
        Ok(self.gather("any", &[u8::from(flag)])?.iter().any(|rank| rank == &[1]))
    }

    /// The main rank's bytes on every rank, or its error.
    ///
    /// # Errors
    /// The main rank's: there as it is, elsewhere as one of a bystander, who has nothing to say about it.
    fn main_says(&self, what: &str, own: Result<Vec<u8>>) -> Result<Vec<u8>> {
        let said = match (&own, self.is_main()) {
            (Ok(bytes), true) => [&[1], &bytes[..]].concat(),
            (Err(_), true) => vec![0],
            _ => Vec::new(),
        };
        let mut all = self.gather(what, &said)?;
        if self.is_main() {
            return own;
        }
        let mut main = std::mem::take(&mut all[0]);
        match main.first() {
            Some(1) => Ok(main.split_off(1)),
            _ => Err(Error::bystander()),
        }
    }

    /// Whether all ranks say the same of `what`.
    ///
    /// # Errors
    /// If they do not: the message has both.
    fn agree(&self, what: &str, own: &str) -> Result<()> {
        let all = self.gather(what, own.as_bytes())?;
        let Some(other) = all.iter().position(|said| *said != all[0]) else { return Ok(()) };
        let text = |rank: usize| String::from_utf8_lossy(&all[rank]).into_owned();
        crate::bail!("{what} differs between ranks: rank 0 has {}, rank {other} has {}", text(0), text(other))
    }
}

/// Whether ringrun started the run again after a failure: then it goes on from its newest checkpoint.
pub fn is_restarted() -> bool {
    std::env::var("RINGTUNE_RESTART").is_ok_and(|attempt| attempt != "0")
}

/// Does something on the main rank, then on the first rank of every other machine, then on the rest: what the first ones leave in a
/// cache the later ones find there.
///
/// # Errors
/// The first error, on every rank.
pub fn in_turn<B: Backend, T>(comm: &dyn Communicator<B>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let world = comm.world();
    let turn = match world {
        World { rank: 0, .. } => 0,
        World { local_rank: 0, .. } => 1,
        _ => 2,
    };
    let (mut work, mut done) = (Some(work), None);
    for now in 0..if world.size > 1 { 3 } else { 1 } {
        if let Some(work) = work.take_if(|_| now == turn) {
            done = Some(work());
        }
        if now == 0 {
            // The others learn of the main rank's error here; an error of theirs ends the run by itself.
            let outcome = match &mut done {
                Some(result) if result.is_err() => result.as_ref().map(|_| Vec::new()).map_err(|_| Error::bystander()),
                _ => Ok(Vec::new()),
            };
            let _ =
                comm.main_says("turn", outcome).or_else(|e| if world.is_main() { Ok(Vec::new()) } else { Err(e) })?;
        } else {
            comm.barrier()?;
        }
        if done.as_ref().is_some_and(Result::is_err) {
            break;
        }
    }
    done.expect("every rank has its turn")
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

/// What every rank knows of its micro-batches, joined in the order of their numbers.
///
/// # Errors
/// If a peer is gone.
pub fn joined<B: Backend>(
    comm: &dyn Communicator<B>,
    own: impl IntoIterator<Item = (usize, Vec<u32>)>,
) -> Result<Vec<u32>> {
    let mut said = Vec::new();
    for (k, values) in own {
        said.extend([k as u32, values.len() as u32]);
        said.extend(values);
    }
    let mut all = Vec::new();
    for rank in comm.gather("samples", bytemuck::cast_slice(&said))? {
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&rank);
        let mut rest = &words[..];
        while let [k, n, more @ ..] = rest {
            let (values, more) = more.split_at((*n as usize).min(more.len()));
            all.push((*k, values.to_vec()));
            rest = more;
        }
    }
    all.sort_by_key(|(k, _)| *k);
    Ok(all.into_iter().flat_map(|(_, values)| values).collect())
}

/// One rank: every sum is its own term.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl<B: Backend> Communicator<B> for Solo {
    fn world(&self) -> &World {
        &World::SOLO
    }

    fn fold(&self) -> Fold {
        Fold::Step
    }

    fn reduce_start(&self, _dev: &B, _bucket: usize, _tensors: &[&Tensor<B>]) -> Result<()> {
        Ok(())
    }

    fn reduce_skip(&self, _dev: &B, _bucket: usize, _tensors: &[&Tensor<B>]) -> Result<()> {
        Ok(())
    }

    fn reduce_finish(&self, _dev: &B, _bucket: usize, _tensors: &mut [&mut Tensor<B>], _wanted: Sums) -> Result<()> {
        Ok(())
    }

    fn gather_start(&self, _dev: &B, _buckets: &[(usize, Vec<Span<'_, B>>)]) -> Result<()> {
        Ok(())
    }

    fn gather_finish(&self, _dev: &B, _bucket: usize, _spans: &mut [Span<'_, B>]) -> Result<()> {
        Ok(())
    }

    fn collect(&self, _bucket: usize, _lengths: &[usize], own: Vec<f32>) -> Result<Option<Vec<f32>>> {
        Ok(Some(own))
    }

    fn all_squares(&self, _counts: &[usize], own: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        Ok(vec![own])
    }

    fn aside(&self) -> Option<Arc<dyn control::Aside>> {
        None
    }

    fn gather(&self, _what: &str, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![own.to_vec()])
    }
}
