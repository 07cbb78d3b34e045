//! Low-rank updates of a group of projections: `kernels/lora.cu` and its launches.
//!
//! All factors of an update, its own and that of dropout, are in what is kept: `t_i = f·drop_i(x)·A_iᵀ`, `u_i = f·dy_i·B_i`, and drop
//! is 0 or 1.

use super::compile::{Defines, Source, Value, source};
use super::device::{Cuda, Room};
use super::group::GROUP;
use super::kernels::Param::{F32, In, Out, U32};
use super::kernels::{Configuration, Kernel, Param};
use super::launch::Launch;
use crate::backend::{LowRank, Projection, ProjectionGrads};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// The source of its kernels.
pub const SOURCE: Source = source!("kernels/lora.cu");

/// Rows of one partial sum of a gradient, and columns of one of u (`STRIP` and `CHUNK` of the source).
const STRIP: usize = 512;

/// Columns of an update that a block takes.
const WIDTHS: [usize; 3] = [16, 32, 64];

/// The width for updates of this rank.
fn width(rank: usize) -> usize {
    WIDTHS.into_iter().find(|&w| rank <= w).unwrap_or(WIDTHS[2])
}

/// Buffers that tiles pass through: as many as shared memory of 99 KiB takes.
fn stages(width: usize) -> usize {
    if width > 32 { 2 } else { 3 }
}

fn kernel(entry: &'static str, width: usize, params: &'static [Param], threads: usize) -> Kernel {
    let defines = [("RANK", Value::Number(width)), ("STAGES", Value::Number(stages(width)))];
    Kernel { source: SOURCE, entry, defines: Defines::new(&defines), params, threads }
}

/// `t` of a group, with its shared memory for `count` updates.
fn t_kernel(width: usize, count: usize) -> Configuration {
    const PARAMS: &[Param] = &[
        Out, Out, Out, In, In, In, In, U32, U32, U32, U32, F32, U32, U32, U32, U32, U32, U32, U32, U32, U32, U32, U32,
        U32, U32,
    ];
    let shared = stages(width) * 64 * 2 * (64 + count * width) + 4 * GROUP * 512;
    (kernel("lora_t", width, PARAMS, 128), shared)
}

/// `u` and the gradient of B.
fn u_db_kernel(width: usize) -> Configuration {
    const PARAMS: &[Param] = &[
        Out, Out, Out, Out, Out, Out, Out, Out, Out, In, In, In, In, In, In, In, In, In, U32, U32, U32, U32, U32, F32,
    ];
    let shared = stages(width) * 2 * (128 * 64 + 128 * width + 64 * width) + 64 * width * size_of::<f32>();
    (kernel("lora_u_db", width, PARAMS, 256), shared)
}

/// The gradient of A, with its shared memory for `count` updates.
fn da_kernel(width: usize, count: usize) -> Configuration {
    const PARAMS: &[Param] = &[
        Out, Out, Out, Out, Out, In, In, In, In, U32, U32, U32, U32, U32, U32, U32, U32, U32, U32, U32, U32, U32, U32,
        U32, U32, U32,
    ];
    let shared = stages(width) * 64 * 2 * (128 + count * width) + 8 * GROUP * 512;
    (kernel("lora_da", width, PARAMS, 256), shared)
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    WIDTHS.into_iter().flat_map(|w| [t_kernel(w, GROUP), u_db_kernel(w), da_kernel(w, GROUP)]).collect()
}

/// What the updates of a group have in common, and the masks of each.
pub(super) struct Updates {
    /// 0 where there are none.
    pub rank: usize,
    /// Draws below this value drop; 0: none.
    pub threshold: usize,
    /// Names of the draws of each.
    pub streams: [[u32; 4]; GROUP],
    /// The factor on what is kept.
    factor: f32,
}

impl Updates {
    /// Of a group; `None` where the kernels do not take them: ranks that are no multiples of 8, other types than bf16, or updates of
    /// different ranks, factors or probabilities.
    pub fn of<'a>(each: impl Iterator<Item = Option<LowRank<'a, Cuda>>>) -> Option<Self> {
        let mut all = Self { rank: 0, threshold: 0, streams: [[0; 4]; GROUP], factor: 0.0 };
        for (i, lora) in each.enumerate() {
            let Some(lora) = lora else { continue };
            let fits =
                |t: &Tensor<Cuda>| t.dtype() == DType::Bf16 && t.rows().is_multiple_of(8) && t.cols().is_multiple_of(8);
            let (dropped, kept) = lora.dropout.map_or((0, 1.0), |d| (d.threshold() as usize, d.scale()));
            let (rank, factor) = (lora.a.rows(), lora.scale * kept);
            let alike = all.rank == 0 || (all.rank, all.threshold, all.factor) == (rank, dropped, factor);
            if !alike || rank == 0 || !fits(lora.a) || !fits(lora.b) {
                return None;
            }
            (all.rank, all.threshold, all.factor) = (rank, dropped, factor);
            all.streams[i] = lora.dropout.map_or([0; 4], |d| d.stream().words());
        }
        Some(all)
    }

    /// Blocks along an update.
    fn parts(&self) -> usize {
        self.rank.div_ceil(width(self.rank))
    }
}

/// Which of a group have an update, in order.
fn present<'a>(by: &'a [Projection<'_, Cuda>]) -> impl Iterator<Item = (usize, LowRank<'a, Cuda>)> {
    by.iter().enumerate().filter_map(|(i, p)| Some((i, p.lora?)))
}

/// Those of a group that have an update, without gaps.
pub(super) fn places(by: &[Projection<'_, Cuda>]) -> [Option<usize>; GROUP] {
    let mut all = present(by).map(|(i, _)| i);
    std::array::from_fn(|_| all.next())
}

/// What `pick` gives of those of a group that have an update, without gaps.
pub(super) fn list<'t>(
    by: &[Projection<'_, Cuda>],
    pick: impl Fn(usize) -> Option<&'t Tensor<Cuda>>,
) -> [Option<&'t Tensor<Cuda>>; GROUP] {
    places(by).map(|i| i.and_then(&pick))
}

/// The threshold, then the streams of those that have an update.
pub(super) fn masks<'a>(launch: Launch<'a>, of: &Updates, which: &[Option<usize>; GROUP]) -> Launch<'a> {
    let words = which.iter().flat_map(|i| i.map_or([0; 4], |i| of.streams[i]));
    words.fold(launch.u32(of.threshold), Launch::word)
}

/// `t_i` of a group, each where it belongs: `None` where there is no update.
pub(super) fn t<'a>(
    dev: &Cuda,
    ts: impl Iterator<Item = Option<&'a mut Tensor<Cuda>>>,
    x: &Tensor<Cuda>,
    each: impl Iterator<Item = Option<LowRank<'a, Cuda>>>,
    of: &Updates,
) -> Result<()> {
    let mut all = ts.zip(each).enumerate().filter_map(|(i, (t, lora))| Some((i, t?, lora?.a)));
    let mut which = [None; GROUP];
    let mut a: [Option<&Tensor<Cuda>>; GROUP] = [None; GROUP];
    let mut to: [Option<&mut Tensor<Cuda>>; GROUP] = [const { None }; GROUP];
    for place in 0..GROUP {
        let Some((i, t, factor)) = all.next() else { break };
        (which[place], to[place], a[place]) = (Some(i), Some(t), Some(factor));
    }
    let (m, k) = x.shape();
    let count = which.iter().flatten().count();
    let (kernel, shared) = t_kernel(width(of.rank), count);
    let launch = Launch::new(dev, &kernel, m.div_ceil(64) * of.parts(), shared);
    let launch = to.into_iter().fold(launch, Launch::write_if).read(x);
    let launch = a.into_iter().fold(launch, Launch::read_if);
    masks(launch.u32(m).u32(k).u32(of.rank).u32(count).f32(of.factor), of, &which).run()
}

/// `u_i` of a group, and `dB_i` where it is trained.
pub(super) fn u_db(
    dev: &Cuda,
    us: &mut [Tensor<Cuda>; GROUP],
    grads: &mut [ProjectionGrads<'_, Cuda>],
    dys: &[&Tensor<Cuda>],
    ts: &[Option<&Tensor<Cuda>>],
    by: &[Projection<'_, Cuda>],
    of: &Updates,
) -> Result<()> {
    let (m, rank) = (dys[0].rows(), of.rank);
    let mut n = [0; GROUP];
    present(by).zip(&mut n).for_each(|((_, lora), n)| *n = lora.b.rows());
    let (kernel, shared) = u_db_kernel(width(rank));
    let (strips, chunks) = (m.div_ceil(STRIP), n.iter().map(|n| n.div_ceil(STRIP)).sum::<usize>());
    let mut partial_u = dev.room(Room::UpdateSums, chunks * m, rank, DType::F32)?;
    let mut partial_db = dev.room(Room::Sums, strips * n.iter().sum::<usize>(), rank, DType::F32)?;
    let mut counters = dev.room(Room::Counters, (GROUP * strips + chunks) * of.parts(), 1, DType::I32)?;
    let mut launch = Launch::new(dev, &kernel, strips * chunks * of.parts(), shared);
    let has = |i: usize| by.get(i).is_some_and(|p| p.lora.is_some());
    us.iter_mut().for_each(|u| u.set_shape(m, rank));
    let mut to = us.iter_mut().enumerate().filter(|(i, _)| has(*i)).map(|(_, u)| u);
    for _ in 0..GROUP {
        launch = launch.write_if(to.next());
    }
    let mut db = grads.iter_mut().enumerate().filter(|(i, _)| has(*i)).map(|(_, g)| g.b.as_deref_mut());
    for _ in 0..GROUP {
        launch = launch.write_if(db.next().flatten());
    }
    launch = launch.write(partial_u.tensor()).write(partial_db.tensor()).write(counters.tensor());
    launch = list(by, |i| Some(dys[i])).into_iter().fold(launch, Launch::read_if);
    launch = list(by, |i| Some(by[i].lora?.b)).into_iter().fold(launch, Launch::read_if);
    launch = list(by, |i| ts[i]).into_iter().fold(launch, Launch::read_if);
    n.into_iter().fold(launch.u32(m), Launch::u32).u32(rank).f32(of.factor).run()
}

/// `dA_i` of a group.
pub(super) fn da(
    dev: &Cuda,
    grads: &mut [ProjectionGrads<'_, Cuda>],
    us: &[Tensor<Cuda>; GROUP],
    x: &Tensor<Cuda>,
    of: &Updates,
) -> Result<()> {
    let ((m, k), rank) = (x.shape(), of.rank);
    let mut which = [None; GROUP];
    grads.iter().enumerate().filter(|(_, g)| g.a.is_some()).zip(&mut which).for_each(|((i, _), to)| *to = Some(i));
    let count = which.iter().flatten().count();
    if count == 0 || m == 0 {
        return Ok(());
    }
    let (kernel, shared) = da_kernel(width(rank), count);
    let (strips, blocks) = (m.div_ceil(STRIP), k.div_ceil(128));
    let mut partial = dev.room(Room::Sums, strips * count * rank, k, DType::F32)?;
    let mut counters = dev.room(Room::Counters, blocks * of.parts(), 1, DType::I32)?;
    let mut launch = Launch::new(dev, &kernel, strips * blocks * of.parts(), shared);
    let mut to = grads.iter_mut().filter_map(|g| g.a.as_deref_mut());
    for _ in 0..GROUP {
        launch = launch.write_if(to.next());
    }
    launch = launch.write(partial.tensor()).write(counters.tensor()).read(x);
    launch = which.iter().fold(launch, |l, i| l.read_if(i.map(|i| &us[i])));
    masks(launch.u32(m).u32(k).u32(rank).u32(count), of, &which).run()
}
