//! Attention on tensor cores: the kernels of `kernels/attention.cu`, `kernels/attention_backward.cu` and `kernels/attention_decode.cu`, for
//! bf16 and the widths of heads that models have.

use super::compile::{Defines, Source, Value, source};
use super::device::{Cuda, Room};
use super::kernels::Param::{F32, In, Out, U32};
use super::kernels::{Configuration, Kernel, Param};
use super::launch::{Launch, MOST_COUNTED, too_large};
use super::plan::{List, ROWS, ROWS_BACKWARD};
use crate::backend::{Attention, AttentionGrads, Decode, Heads, Rope};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// The source of forward.
pub const SOURCE: Source = source!("kernels/attention.cu");
/// The source of backward.
pub const SOURCE_BACKWARD: Source = source!("kernels/attention_backward.cu");

/// The source of decoding.
pub const SOURCE_DECODE: Source = source!("kernels/attention_decode.cu");

/// Widths of heads that have kernels.
pub const WIDTHS: [usize; 5] = [32, 64, 80, 96, 128];

/// Keys of a block of forward.
const KEYS: usize = 64;

/// Threads of a block of backward.
const THREADS: usize = 128;

/// Rows of a block of delta.
const DELTAS: usize = THREADS / 4;

/// Bytes behind the tiles in shared memory, for what is asked for at the edges alone (`Job` of the sources).
const JOB: usize = 32;

/// Whether these kernels take heads of this width and elements of this type.
pub(super) fn takes(dim: usize, dtype: DType) -> bool {
    dtype == DType::Bf16 && WIDTHS.contains(&dim)
}

/// Bytes of a row in shared memory: see `kernels/common/heads.cuh`.
fn row(dim: usize) -> usize {
    if dim.is_power_of_two() { 2 * dim } else { 2 * dim + 16 }
}

/// Forward on an architecture (major · 10 + minor), and its dynamic shared memory. Warps of 32 queries halve what is read of shared memory, which
/// is what the tensor cores of A100 and H100 wait for; elsewhere wide heads get more warps of fewer registers. The bits are the same.
pub fn forward_kernel(dim: usize, cc: u32) -> Configuration {
    let warp_rows = if dim <= 64 || matches!(cc, 80 | 90) { 32 } else { 16 };
    let warps = ROWS / warp_rows;
    let defines = [("HEAD_DIM", dim), ("WARPS", warps), ("WARP_ROWS", warp_rows), ("KEYS", KEYS)];
    let kernel = Kernel {
        source: SOURCE,
        entry: "attention_tiles_forward",
        defines: Defines::new(&defines.map(|(name, n)| (name, Value::Number(n)))),
        params: &[Out, Out, In, In, In, In, U32, U32, U32, F32],
        threads: 32 * warps,
    };
    (kernel, (ROWS + 4 * KEYS) * row(dim) + JOB)
}

fn backward_kernel(entry: &'static str, params: &'static [Param], dim: usize) -> Kernel {
    let defines = Defines::new(&[("HEAD_DIM", Value::Number(dim))]);
    Kernel { source: SOURCE_BACKWARD, entry, defines, params, threads: THREADS }
}

/// delta, dq and dkdv, and their dynamic shared memory.
pub fn backward_kernels(dim: usize) -> [Configuration; 3] {
    let delta = backward_kernel("attention_tiles_delta", &[Out, In, In, In, U32], dim);
    let dq =
        backward_kernel("attention_tiles_dq", &[Out, In, In, In, In, In, In, In, In, U32, U32, U32, U32, F32], dim);
    let dkdv = backward_kernel(
        "attention_tiles_dkdv",
        &[Out, Out, In, In, In, In, In, In, In, In, U32, U32, U32, U32, F32],
        dim,
    );
    // Tiles, figures of two blocks of queries, which dq leaves alone.
    let shared = 6 * ROWS_BACKWARD * row(dim) + 4 * ROWS_BACKWARD * size_of::<f32>() + JOB;
    [(delta, 0), (dq, shared), (dkdv, shared)]
}

/// Keys of a part of a cache, and query heads of a tile (`KEYS` and `HEADS` of the source).
const PART: usize = 128;
const HEADS: usize = 16;

/// Decoding, and its dynamic shared memory.
pub fn decode_kernel(dim: usize) -> Configuration {
    let kernel = Kernel {
        source: SOURCE_DECODE,
        entry: "attention_tiles_decode",
        defines: Defines::new(&[("HEAD_DIM", Value::Number(dim))]),
        params: &[Out, Out, Out, In, In, In, In, U32, U32, U32, U32, F32],
        threads: THREADS,
    };
    (kernel, (HEADS + 2 * PART) * row(dim))
}

/// Every configuration that an architecture (major · 10 + minor) may be asked to run.
pub fn all(cc: u32) -> Vec<Configuration> {
    WIDTHS
        .into_iter()
        .flat_map(|dim| [vec![forward_kernel(dim, cc), decode_kernel(dim)], backward_kernels(dim).to_vec()].concat())
        .collect()
}

/// Forward, once shapes and types were checked; `window` 0 is none.
pub(super) fn forward(
    dev: &Cuda,
    out: &mut Tensor<Cuda>,
    lse: &mut Tensor<Cuda>,
    x: Attention<'_, Cuda>,
    window: usize,
    scale: f32,
) -> Result<()> {
    let Attention { q, k, v, batch, heads, .. } = x;
    let (kernel, shared) = forward_kernel(heads.head_dim, dev.properties().cc);
    let (at, len) = batch.plan.list(List::Forward);
    let launch = Launch::new(dev, &kernel, len * heads.n_query, shared).write(out).write(lse);
    let launch = launch.read(q).read(k).read(v).read_from(&batch.doc_start, at);
    launch.u32(heads.n_query).u32(heads.n_kv).u32(window).f32(scale).run()
}

/// The tensors of backward that it reads and that forward did not, all checked.
#[derive(Clone, Copy)]
pub(super) struct Results<'a> {
    pub dout: &'a Tensor<Cuda>,
    pub out: &'a Tensor<Cuda>,
    pub lse: &'a Tensor<Cuda>,
}

/// Backward, once shapes and types were checked; `window` 0 is none.
pub(super) fn backward(
    dev: &Cuda,
    dx: AttentionGrads<'_, Cuda>,
    Results { dout, out, lse }: Results<'_>,
    x: Attention<'_, Cuda>,
    rope: Option<Rope<'_, Cuda>>,
    window: usize,
    scale: f32,
) -> Result<()> {
    let AttentionGrads { dq, dk, dv } = dx;
    let Attention { q, k, v, batch, heads: Heads { n_query, n_kv, head_dim }, .. } = x;
    let (table, positions) = (rope.map(|r| r.table), rope.map(|r| r.positions));
    let [(delta_kernel, _), (dq_kernel, dq_shared), (dkdv_kernel, dkdv_shared)] = backward_kernels(head_dim);
    let n = q.rows();
    // Figures of both kinds are found by one index.
    if 2 * n * n_query > MOST_COUNTED {
        let figures = format!("{} figures of {n} tokens and {n_query} heads", 2 * n * n_query);
        return Err(too_large("attention_backward", &figures, MOST_COUNTED));
    }
    let mut stats = dev.room(Room::Sums, 2 * n, n_query, DType::F32)?;
    let launch = Launch::new(dev, &delta_kernel, (n * n_query).div_ceil(DELTAS), 0).write(stats.tensor());
    launch.read(dout).read(out).read(lse).u32(n * n_query).run()?;
    let (at, len) = batch.plan.list(List::Queries);
    let launch = Launch::new(dev, &dq_kernel, len * n_query, dq_shared).write(dq);
    let launch = launch.read(dout).read(q).read(k).read(v).read(stats.tensor()).read_from(&batch.doc_start, at);
    let launch = launch.read_if(table).read_if(positions).u32(n);
    launch.u32(n_query).u32(n_kv).u32(window).f32(scale).run()?;
    let (at, len) = batch.plan.list(List::Keys);
    let launch = Launch::new(dev, &dkdv_kernel, len * n_kv, dkdv_shared).write(dk).write(dv);
    let launch = launch.read(dout).read(q).read(k).read(v).read(stats.tensor()).read_from(&batch.doc_start, at);
    let launch = launch.read_if(table).read_if(positions).u32(n);
    launch.u32(n_query).u32(n_kv).u32(window).f32(scale).run()
}

/// One new token a sequence, once shapes and types were checked; `window` 0 is none.
pub(super) fn decode(
    dev: &Cuda,
    out: &mut Tensor<Cuda>,
    x: Decode<'_, Cuda>,
    capacity: usize,
    window: usize,
    scale: f32,
) -> Result<()> {
    let Decode { q, k_cache, v_cache, lens, heads: Heads { n_query, n_kv, head_dim }, .. } = x;
    let (kernel, shared) = decode_kernel(head_dim);
    let group = n_query / n_kv;
    let (tasks, parts) = (q.rows() * n_kv * group.div_ceil(HEADS), capacity.div_ceil(PART));
    let blocks = tasks * parts;
    // What the parts of a sequence leave for the block that comes last.
    let mut sums = match parts {
        1 => None,
        _ => Some(dev.room(Room::Sums, blocks * group.min(HEADS), head_dim + 2, DType::F32)?),
    };
    let mut counters = dev.room(Room::Counters, tasks, 1, DType::I32)?;
    let launch = Launch::new(dev, &kernel, blocks, shared).write(out).write_if(sums.as_mut().map(|s| s.tensor()));
    let launch = launch.write(counters.tensor()).read(q).read(k_cache).read(v_cache).read(lens);
    launch.u32(n_query).u32(n_kv).u32(window).u32(capacity).f32(scale).run()
}
