//! The optimiser's pass over all trained tensors: `kernels/adamw.cu` and its launch.

use super::compile::{Defines, Source, source};
use super::device::{Cuda, Table};
use super::kernels::Param::{F32, In, U32, U64};
use super::kernels::{Configuration, Kernel, THREADS};
use super::launch::Launch;
use super::stats::CudaStats;
use crate::backend::{AdamWSlot, AdamWStep};
use crate::error::Result;

/// The source of its kernel.
pub const SOURCE: Source = source!("kernels/adamw.cu");

/// Elements of a block (`CHUNK` of the source).
const CHUNK: usize = 16 * 1024;

/// One AdamW step of a table of tensors.
pub fn kernel() -> Kernel {
    Kernel {
        source: SOURCE,
        entry: "adamw",
        defines: Defines::new(&[]),
        params: &[In, In, U32, U64, F32, F32, F32, F32, F32, F32, F32, F32],
        threads: THREADS,
    }
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    vec![(kernel(), 0)]
}

pub(super) fn adamw_all(dev: &Cuda, s: &CudaStats, slots: &mut [AdamWSlot<'_, Cuda>], step: AdamWStep) -> Result<()> {
    let (mut words, mut chunks) = (Vec::new(), Vec::new());
    for (i, slot) in slots.iter().enumerate() {
        slot.check("adamw");
        let AdamWSlot { p, master, m, v, g, first_row, range, decays, lr_scale } = slot;
        let first = p.buf.address() + ((*first_row * g.cols() + range.start) * p.dtype().bytes()) as u64;
        let gradient = g.buf.address() + (range.start * g.dtype().bytes()) as u64;
        let master = master.as_deref().map_or(0, |t| t.buf.address());
        words.extend([first, master, m.buf.address(), v.buf.address(), gradient]);
        words.extend([range.len() as u64, lr_scale.to_bits(), u64::from(*decays)]);
        chunks.extend((0..range.len().div_ceil(CHUNK) as u64).map(|chunk| (i as u64) << 32 | chunk));
    }
    let blocks = chunks.len();
    words.extend(chunks);
    // The table names what the slots borrow until the launch is queued; buffers are freed after it, in stream order.
    let (kernel, table) = (kernel(), dev.table(Table::AdamW, words)?);
    let launch = Launch::new(dev, &kernel, blocks, 0).read(&s.block).read(table.tensor()).u32(slots.len());
    let launch = launch.u64(step.lr.to_bits() as usize).f32(step.beta1).f32(step.beta2);
    let launch = launch.f32(step.one_minus_beta1).f32(step.one_minus_beta2).f32(step.eps).f32(step.weight_decay);
    launch.f32(step.bias_correction1).f32(step.bias_correction2).run()
}
