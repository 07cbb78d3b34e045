//! Attention: what the tensor cores take goes to `attention_tiles`, the rest to the kernels of `kernels/attention_plain.cu`.

use super::attention_tiles;
use super::compile::{Defines, Source, Value, source};
use super::device::{Cuda, Room};
use super::kernels::Param::{F32, In, Out, U32};
use super::kernels::{Configuration, Kernel, Param, TYPES, c_type};
use super::launch::Launch;
use super::swiglu::same_type;
use super::tiles::MOST_ACROSS;
use crate::backend::{Attention, AttentionGrads, Decode, Heads, Mask, Rope};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// The source of its kernels.
pub const SOURCE: Source = source!("kernels/attention_plain.cu");

/// Warps of a block (`WARPS` of the source).
const WARPS: usize = 4;

/// Widest head that the kernels hold in registers.
pub const WIDEST: usize = 256;

/// How heads are read: so many elements at once (`VEC`), a row held by 32 lanes times so many (`DIMS`). The last takes what the others
/// do not: widths that are no multiple of 8, or beyond those of the models in use.
const LAYOUTS: [(usize, usize); 3] = [(8, 2), (8, 4), (1, 8)];

fn layout(dim: usize) -> (usize, usize) {
    *LAYOUTS
        .iter()
        .find(|(vector, dims)| dim.is_multiple_of(*vector) && dim <= 32 * dims)
        .expect("the width was checked")
}

fn entry(entry: &'static str, params: &'static [Param], x: DType, (vector, dims): (usize, usize)) -> Kernel {
    let defines = Defines::new(&[("X_T", c_type(x)), ("VEC", Value::Number(vector)), ("DIMS", Value::Number(dims))]);
    Kernel { source: SOURCE, entry, defines, params, threads: 32 * WARPS }
}

const FORWARD: (&str, &[Param]) = ("attention_forward", &[Out, Out, In, In, In, In, U32, U32, U32, U32, U32, F32]);
const DQ: (&str, &[Param]) =
    ("attention_dq", &[Out, Out, In, In, In, In, In, In, In, In, In, U32, U32, U32, U32, U32, F32]);
const DKDV: (&str, &[Param]) =
    ("attention_dkdv", &[Out, Out, In, In, In, In, In, In, In, In, In, U32, U32, U32, U32, U32, U32, F32]);
const DECODE: (&str, &[Param]) = ("attention_decode", &[Out, In, In, In, In, U32, U32, U32, U32, U32, F32]);

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    let mut all = Vec::new();
    for x in TYPES {
        for of in LAYOUTS {
            let dim = 32 * of.1;
            let shared = [WARPS * dim, 2 * WARPS * dim, 2 * WARPS * dim, decode_floats(dim)];
            for ((name, params), floats) in [FORWARD, DQ, DKDV, DECODE].into_iter().zip(shared) {
                all.push((entry(name, params, x, of), floats * 4));
            }
        }
    }
    all
}

/// Floats of shared memory: the query, then of each warp its largest score, its sum and its values.
fn decode_floats(dim: usize) -> usize {
    dim + WARPS * (dim + 2)
}

/// The width of a head that the kernels can hold, the window as they take it (0: none), and the scale of scores.
fn shape(heads: Heads, mask: Mask) -> Result<(usize, usize, f32)> {
    let dim = heads.head_dim;
    if dim > WIDEST {
        return Err(Error::new(format!(
            "cuda: attention with heads of {dim} elements, {WIDEST} at most are supported"
        )));
    }
    let across = heads.n_query * dim;
    if across > MOST_ACROSS {
        return Err(Error::new(format!(
            "cuda: attention with {} heads of {dim} elements, {MOST_ACROSS} elements of all heads at most are supported",
            heads.n_query
        )));
    }
    // A window beyond 32 bits is none.
    let window = mask.window.filter(|&w| w < 1 << 31).unwrap_or(0);
    Ok((dim, window, 1.0 / (dim as f32).sqrt()))
}

pub(super) fn forward(
    dev: &Cuda,
    out: &mut Tensor<Cuda>,
    lse: &mut Tensor<Cuda>,
    x: Attention<'_, Cuda>,
) -> Result<()> {
    x.check("attention", &[("out", out)], lse);
    let Attention { q, k, v, batch, heads, mask } = x;
    let (dim, window, scale) = shape(heads, mask)?;
    let dtype = same_type("attention", &[out, q, k, v]);
    if attention_tiles::takes(dim, dtype) {
        return attention_tiles::forward(dev, out, lse, x, window, scale);
    }
    let kernel = entry(FORWARD.0, FORWARD.1, dtype, layout(dim));
    let tasks = q.rows() * heads.n_query;
    let launch = Launch::new(dev, &kernel, tasks.div_ceil(WARPS), WARPS * dim * 4).write(out).write(lse);
    let launch = launch.read(q).read(k).read(v).read(&batch.doc_start).u32(tasks);
    launch.u32(heads.n_query).u32(heads.n_kv).u32(dim).u32(window).f32(scale).run()
}

pub(super) fn backward(
    dev: &Cuda,
    dx: AttentionGrads<'_, Cuda>,
    dout: &Tensor<Cuda>,
    out: &Tensor<Cuda>,
    lse: &Tensor<Cuda>,
    x: Attention<'_, Cuda>,
    rope: Option<Rope<'_, Cuda>>,
) -> Result<()> {
    dx.check("attention_backward", dout, out, lse, x);
    if let Some(rope) = rope {
        rope.check("attention_backward", dx.dq);
    }
    let Attention { q, k, v, batch, heads, mask } = x;
    let (dim, window, scale) = shape(heads, mask)?;
    let dtype = same_type("attention_backward", &[dx.dq, dx.dk, dx.dv, dout, out, q, k, v]);
    if attention_tiles::takes(dim, dtype) {
        let results = attention_tiles::Results { dout, out, lse };
        return attention_tiles::backward(dev, dx, results, x, rope, window, scale);
    }
    let AttentionGrads { dq, dk, dv } = dx;
    let (n, Heads { n_query, n_kv, .. }) = (q.rows(), heads);
    let mut delta = dev.room(Room::Sums, n, n_query, DType::F32)?;
    let (tasks, shared) = (n * n_query, 2 * WARPS * dim * 4);
    let kernel = entry(DQ.0, DQ.1, dtype, layout(dim));
    let launch = Launch::new(dev, &kernel, tasks.div_ceil(WARPS), shared).write(dq).write(delta.tensor());
    let launch = launch.read(dout).read(out).read(q).read(k).read(v).read(lse).read(&batch.doc_start);
    let launch = launch.read_if(rope.map(|r| r.table)).read_if(rope.map(|r| r.positions)).u32(tasks);
    launch.u32(n_query).u32(n_kv).u32(dim).u32(window).f32(scale).run()?;
    let tasks = n * n_kv;
    let kernel = entry(DKDV.0, DKDV.1, dtype, layout(dim));
    let launch = Launch::new(dev, &kernel, tasks.div_ceil(WARPS), shared).write(dk).write(dv);
    let launch = launch.read(dout).read(q).read(k).read(v).read(lse).read(delta.tensor()).read(&batch.doc_start);
    let launch = launch.read_if(rope.map(|r| r.table)).read_if(rope.map(|r| r.positions)).u32(tasks).u32(n);
    launch.u32(n_query).u32(n_kv).u32(dim).u32(window).f32(scale).run()
}

pub(super) fn decode(dev: &Cuda, out: &mut Tensor<Cuda>, x: Decode<'_, Cuda>) -> Result<()> {
    let capacity = x.check("attention_decode", out);
    let Decode { q, k_cache, v_cache, lens, heads, mask } = x;
    let (dim, window, scale) = shape(heads, mask)?;
    let dtype = same_type("attention_decode", &[out, q, k_cache, v_cache]);
    if attention_tiles::takes(dim, dtype) {
        return attention_tiles::decode(dev, out, x, capacity, window, scale);
    }
    let kernel = entry(DECODE.0, DECODE.1, dtype, layout(dim));
    let launch = Launch::new(dev, &kernel, q.rows() * heads.n_query, decode_floats(dim) * 4).write(out);
    let launch = launch.read(q).read(k_cache).read(v_cache).read(lens);
    launch.u32(heads.n_query).u32(heads.n_kv).u32(dim).u32(window).u32(capacity).f32(scale).run()
}
