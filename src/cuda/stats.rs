//! What a step leaves behind stays on the device, as f64: `kernels/stats.cu` and its launches. The host waits in `figures` alone.

use std::ops::Range;

use super::compile::{Defines, Source, source};
use super::device::{Cuda, Room, Table};
use super::kernels::Param::{In, Out, U32, U64};
use super::kernels::{Configuration, Kernel, Param, THREADS};
use super::launch::Launch;
use crate::backend::{Figures, expect_shape};
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

/// The source of its kernels.
pub const SOURCE: Source = source!("kernels/stats.cu");

/// Figures before those of the micro-batches: right arg maxes, squared norm, clip factor, whether all is finite.
const HEAD: usize = 4;

/// Elements of one partial sum of squares.
pub(super) const CHUNK: usize = 16 * 1024;

/// Words of 32 bits of an f64.
const WORDS: usize = 2;

/// [`crate::backend::Backend::Stats`] of this backend.
pub struct CudaStats {
    /// (1, 2 · figures) i32: f64 figures, [`HEAD`] of them and one for each micro-batch.
    pub(super) block: Tensor<Cuda>,
    /// Micro-batches of the step so far.
    micro_batches: usize,
}

const BEGIN: (&str, &[Param]) = ("stats_begin", &[Out]);
const ADD_LOSS: (&str, &[Param]) = ("stats_add_loss", &[Out, In, In, U32, U32]);
const SQUARES: (&str, &[Param]) = ("stats_squares", &[Out, In]);
const NORM2: (&str, &[Param]) = ("stats_norm2", &[Out, In, U32]);
const NORM2_IN_ORDER: (&str, &[Param]) = ("stats_norm2_in_order", &[Out, In, In, U32]);
const CLIP: (&str, &[Param]) = ("stats_clip", &[Out, U64, U32]);

fn kernel((entry, params): (&'static str, &'static [Param])) -> Kernel {
    Kernel { source: SOURCE, entry, defines: Defines::new(&[]), params, threads: THREADS }
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    [BEGIN, ADD_LOSS, SQUARES, NORM2, NORM2_IN_ORDER, CLIP].map(|k| (kernel(k), 0)).into()
}

pub(super) fn new(dev: &Cuda) -> Result<CudaStats> {
    let mut stats = CudaStats { block: dev.alloc(1, WORDS * (HEAD + 8), DType::I32)?, micro_batches: 0 };
    begin(dev, &mut stats)?;
    Ok(stats)
}

pub(super) fn begin(dev: &Cuda, s: &mut CudaStats) -> Result<()> {
    s.micro_batches = 0;
    Launch::new(dev, &kernel(BEGIN), 1, 0).write(&mut s.block).run()
}

pub(super) fn add_loss(
    dev: &Cuda,
    s: &mut CudaStats,
    loss: &Tensor<Cuda>,
    correct: Option<&Tensor<Cuda>>,
) -> Result<()> {
    let n = loss.rows();
    for (name, t) in [("loss", Some(loss)), ("correct", correct)] {
        let Some(t) = t else { continue };
        expect_shape("add_loss", name, t, (n, 1));
    }
    let figures = HEAD + s.micro_batches + 1;
    if WORDS * figures > s.block.len() {
        // The first step alone comes here: later ones have as many micro-batches.
        let mut larger = dev.alloc(1, 2 * s.block.len(), DType::I32)?;
        let (all, so_far) = (larger.len(), s.block.len());
        larger.set_shape(1, so_far);
        dev.copy(&mut larger, &s.block)?;
        larger.set_shape(1, all);
        s.block = larger;
    }
    let kernel = kernel(ADD_LOSS);
    let launch = Launch::new(dev, &kernel, 1, 0).write(&mut s.block).read(loss).read_if(correct);
    launch.u32(n).u32(s.micro_batches).run()?;
    s.micro_batches += 1;
    Ok(())
}

/// Chunks of the elements of tensors, as the kernel reads them, and their number.
fn chunks_of<'a>(parts: impl IntoIterator<Item = (&'a Tensor<Cuda>, Range<usize>)>) -> (Vec<u64>, usize) {
    let mut words = Vec::new();
    for (g, range) in parts {
        let (bytes, narrow) = (g.dtype().bytes(), g.dtype() == DType::Bf16);
        for at in range.clone().step_by(CHUNK) {
            let n = CHUNK.min(range.end - at);
            words.push(g.buf.address() + (at * bytes) as u64);
            words.push(n as u64 | u64::from(narrow) << 32);
        }
    }
    let chunks = words.len() / 2;
    (words, chunks)
}

pub(super) fn grad_norm2(dev: &Cuda, s: &mut CudaStats, grads: &[&Tensor<Cuda>]) -> Result<()> {
    let (words, chunks) = chunks_of(grads.iter().map(|g| (*g, 0..g.len())));
    let mut parts = dev.room(Room::Sums, 1, WORDS * chunks, DType::F32)?;
    let table = dev.table(Table::Squares, words)?;
    Launch::new(dev, &kernel(SQUARES), chunks, 0).write(parts.tensor()).read(table.tensor()).run()?;
    let kernel = kernel(NORM2);
    Launch::new(dev, &kernel, 1, 0).write(&mut s.block).read(parts.tensor()).u32(chunks).run()
}

pub(super) fn squares(dev: &Cuda, parts: &[(&Tensor<Cuda>, Range<usize>)]) -> Result<Vec<f64>> {
    let (words, chunks) = chunks_of(parts.iter().map(|(g, range)| (*g, range.clone())));
    if chunks == 0 {
        return Ok(Vec::new());
    }
    // Sums of f64, read back as the words they are.
    let mut sums = dev.alloc(1, WORDS * chunks, DType::I32)?;
    let table = dev.table(Table::Squares, words)?;
    Launch::new(dev, &kernel(SQUARES), chunks, 0).write(&mut sums).read(table.tensor()).run()?;
    Ok(dev.download_words(&sums, chunks)?.into_iter().map(f64::from_bits).collect())
}

pub(super) fn add_squares(dev: &Cuda, s: &mut CudaStats, sums: &[f64]) -> Result<()> {
    let mut parts = dev.alloc(1, WORDS * sums.len().max(1), DType::I32)?;
    parts.set_shape(1, WORDS * sums.len());
    dev.upload_i32(&mut parts, bytemuck::cast_slice(sums))?;
    let kernel = kernel(NORM2);
    Launch::new(dev, &kernel, 1, 0).write(&mut s.block).read(&parts).u32(sums.len()).run()
}

/// Where every rank leaves the sums of its blocks: rank r from `r · most` on.
#[derive(Clone, Copy, Debug)]
pub struct Slots {
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// Blocks of the rank that has most.
    pub most: usize,
}

impl Cuda {
    /// Adds the squared norm of a gradient to the figures, of which this rank has the parts `own`: `gather` queues that all ranks get the
    /// slots of the given number of bytes of all, and `order` names each block's sum in them. Nobody waits.
    ///
    /// # Errors
    /// If the device refuses an operation, or that of `gather`.
    pub fn norm2_over_ranks(
        &self,
        s: &mut CudaStats,
        own: &[(&Tensor<Self>, Range<usize>)],
        slots: Slots,
        order: Vec<u64>,
        gather: impl FnOnce(&Tensor<Self>, usize) -> Result<()>,
    ) -> Result<()> {
        let (words, chunks) = chunks_of(own.iter().map(|(g, range)| (*g, range.clone())));
        // Slots begin at multiples of 16 bytes.
        let most = slots.most.next_multiple_of(2);
        let order: Vec<u64> =
            order.into_iter().map(|at| at / slots.most as u64 * most as u64 + at % slots.most as u64).collect();
        let mut parts = self.room(Room::Sums, 1, WORDS * most * slots.size, DType::F32)?;
        let table = self.table(Table::Squares, words)?;
        let at = WORDS * most * slots.rank;
        Launch::new(self, &kernel(SQUARES), chunks, 0).write_from(parts.tensor(), at).read(table.tensor()).run()?;
        if !self.rehearsal.is_on() {
            gather(parts.tensor(), WORDS * most * size_of::<f32>())?;
        }
        let (n, table) = (order.len(), self.table(Table::Order, order)?);
        let kernel = kernel(NORM2_IN_ORDER);
        let launch = Launch::new(self, &kernel, 1, 0).write(&mut s.block).read(parts.tensor());
        launch.read(table.tensor()).u32(n).run()
    }
}

pub(super) fn set_clip(dev: &Cuda, s: &mut CudaStats, max_norm: Option<f64>) -> Result<()> {
    let kernel = kernel(CLIP);
    let launch = Launch::new(dev, &kernel, 1, 0).write(&mut s.block);
    launch.u64(max_norm.unwrap_or(0.0).to_bits() as usize).flag(max_norm.is_some()).run()
}

pub(super) fn figures(dev: &Cuda, s: &CudaStats) -> Result<Figures> {
    let all: Vec<f64> = dev.download_words(&s.block, HEAD + s.micro_batches)?.into_iter().map(f64::from_bits).collect();
    Ok(Figures { nll: all[HEAD..].to_vec(), correct: all[0], grad_norm2: all[1] })
}
