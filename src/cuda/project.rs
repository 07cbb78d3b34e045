//! Projections of a group in one launch each way: `kernels/project.cu`, `kernels/project_dx.cu`, `kernels/project_dw.cu` and their
//! launches. What they do not take (f32, widths that are no multiples of 8) has the bodies of [`crate::backend::project`].

use super::compile::{Define, Defines, Source, Value, source};
use super::device::Cuda;
use super::group::{GROUP, Then, widths};
use super::kernels::Param::{In, Out, U32};
use super::kernels::{Configuration, Kernel, Param};
use super::launch::Launch;
use super::lora::{self, Updates};
use super::tiles::{MOST_ACROSS, Tile};
use super::{elementwise, matmul_sm90, project_sm90};
use crate::backend::project as composed;
use crate::backend::{
    Backend, LowRank, ProjectScratch, Projected, Projection, ProjectionGrads, Rope, Rotate, expect_shape,
};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// The source of projections.
pub const SOURCE: Source = source!("kernels/project.cu");
/// The source of the gradient of their input.
pub const SOURCE_DX: Source = source!("kernels/project_dx.cu");
/// The source of the gradients of their weights.
pub const SOURCE_DW: Source = source!("kernels/project_dw.cu");

fn tiled(source: Source, entry: &'static str, tile: Tile, more: &[Define], params: &'static [Param]) -> Kernel {
    let ((block_m, block_n), (warps_m, warps_n)) = (tile.block(), tile.warps());
    let of_tile = [
        ("BLOCK_M", Value::Number(block_m)),
        ("BLOCK_N", Value::Number(block_n)),
        ("WARPS_M", Value::Number(warps_m)),
        ("WARPS_N", Value::Number(warps_n)),
        ("STAGES", Value::Number(Tile::STAGES)),
    ];
    Kernel { source, entry, defines: Defines::new(&[more, &of_tile].concat()), params, threads: tile.threads() }
}

/// Projections of a group; of gate and up, which meet in SwiGLU, as a pair.
pub fn kernel(tile: Tile, pair: bool) -> Kernel {
    const PARAMS: &[Param] = &[
        Out, Out, Out, Out, In, In, In, In, In, In, In, In, In, In, In, In, In, In, In, In, U32, U32, U32, U32, U32,
        U32, U32, U32, U32,
    ];
    tiled(SOURCE, "project", tile, &[("PAIR", Value::Number(usize::from(pair)))], PARAMS)
}

/// Gradient of their input.
pub fn dx_kernel(tile: Tile) -> Kernel {
    const PARAMS: &[Param] = &[
        Out, In, In, In, In, In, In, In, In, In, In, In, In, U32, U32, U32, U32, U32, U32, U32, U32, U32, U32, U32,
        U32, U32, U32, U32, U32, U32, U32, U32,
    ];
    tiled(SOURCE_DX, "project_dx", tile, &[], PARAMS)
}

/// Gradients of their weights.
pub fn dw_kernel(tile: Tile) -> Kernel {
    const PARAMS: &[Param] = &[Out, Out, Out, In, In, In, In, U32, U32, U32, U32, U32];
    tiled(SOURCE_DW, "project_dw", tile, &[], PARAMS)
}

/// Every configuration that an architecture (major · 10 + minor) may be asked to run.
pub fn all(cc: u32) -> Vec<Configuration> {
    let of_tile = |&t: &Tile| [kernel(t, false), kernel(t, true), dx_kernel(t), dw_kernel(t)].map(|k| (k, t.shared()));
    Tile::of_arch(cc).iter().flat_map(of_tile).collect()
}

/// The tile of the least cost, where `blocks` says how many each needs, and `None` where it cannot be used.
fn cheapest(dev: &Cuda, blocks: impl Fn(Tile) -> Option<usize>) -> Option<Tile> {
    let device = dev.properties();
    let given = dev.tile.filter(|&tile| blocks(tile).is_some());
    given.or_else(|| Tile::cheapest(device.cc, device.sm_count, device.shared_limit, blocks))
}

/// Whether rows of a tensor are bf16 in whole pieces of 16 bytes, which kernels ask for.
fn aligned(t: &Tensor<Cuda>) -> bool {
    t.dtype() == DType::Bf16 && t.cols().is_multiple_of(8) && t.cols() <= MOST_ACROSS
}

/// The updates of a group that reads `x`; `None` where the kernels do not take it.
fn taken(x: &Tensor<Cuda>, by: &[Projection<'_, Cuda>]) -> Option<Updates> {
    let fits = |p: &Projection<'_, Cuda>| {
        aligned(p.w) && p.w.rows().is_multiple_of(8) && p.bias.is_none_or(|b| b.dtype() == DType::Bf16)
    };
    let all = (1..=GROUP).contains(&by.len()) && aligned(x) && by.iter().all(fits);
    all.then(|| Updates::of(by.iter().map(|p| p.lora)))?
}

/// The updates of a group whose gradients the kernels take: those that [`taken`] says of the same group.
fn taken_back(dys: &[&Tensor<Cuda>], by: &[Projection<'_, Cuda>]) -> Option<Updates> {
    if dys.iter().all(|dy| aligned(dy)) { taken(by.first()?.w, by) } else { None }
}

/// Whether the device has kernels of its own for what this file does.
fn hopper(dev: &Cuda) -> bool {
    dev.tile.is_none() && dev.properties().cc == matmul_sm90::CC
}

/// A group in one launch. `false`: no tile holds whole heads, nothing was done.
fn launch(
    dev: &Cuda,
    to: &mut [Projected<'_, Cuda>],
    x: &Tensor<Cuda>,
    by: &[Projection<'_, Cuda>],
    updates: &Updates,
    then: Then<'_, '_>,
) -> Result<bool> {
    assert_eq!(to.len(), by.len(), "project: results");
    for (to, by) in to.iter().zip(by) {
        by.check("project", to.y, x.shape(), to.t.as_deref());
        assert!(to.y.dtype() == DType::Bf16, "project: a result of {:?} of bf16 operands", to.y.dtype());
    }
    let like_y = |t: &Tensor<Cuda>| t.shape() == to[0].y.shape() && t.dtype() == DType::Bf16;
    match &then {
        Then::Swiglu(act) => assert!(like_y(act), "project: act of {:?}", act.shape()),
        Then::Residual(Some(r)) => assert!(like_y(r), "project: a residual of {:?}", r.shape()),
        Then::Residual(None) => {}
        Then::Rope(rope) => to[..2].iter().for_each(|to| _ = rope.check("project", to.y)),
    }
    let (pair, dim) = (matches!(then, Then::Swiglu(_)), then.dim());
    if !dim.is_multiple_of(16) {
        return Ok(false);
    }
    if hopper(dev) {
        return project_sm90::forward(dev, to, x, by, updates, then);
    }
    let (m, k) = x.shape();
    // Columns of C in a tile.
    let width = |tile: Tile| match tile.block().1 {
        block if pair => block / 2,
        block if dim > 0 => block / dim * dim,
        block => block,
    };
    let n = widths(by);
    let in_row = |tile: Tile| n[..if pair { 1 } else { GROUP }].iter().map(|n| n.div_ceil(width(tile))).sum::<usize>();
    let blocks = |tile: Tile| (width(tile) > 0).then(|| m.div_ceil(tile.block().0) * in_row(tile));
    let Some(tile) = cheapest(dev, blocks) else { return Ok(false) };
    let (act, residual, rope) = then.parts();
    if updates.rank > 0 {
        lora::t(dev, to.iter_mut().map(|to| to.t.as_deref_mut()), x, by.iter().map(|p| p.lora), updates)?;
    }
    let kernel = kernel(tile, pair);
    let mut launch = Launch::new(dev, &kernel, blocks(tile).unwrap_or(0), tile.shared());
    let mut ts: [Option<&Tensor<Cuda>>; GROUP] = [None; GROUP];
    let mut results = to.iter_mut().enumerate();
    for _ in 0..GROUP {
        let result = results.next().map(|(i, Projected { y, t })| {
            ts[i] = t.as_deref().filter(|_| by[i].lora.is_some());
            &mut **y
        });
        launch = launch.write_if(result);
    }
    launch = launch.write_if(act).read(x);
    let each = |i: usize| by.get(i);
    launch = (0..GROUP).fold(launch, |l, i| l.read_if(each(i).map(|p| p.w)));
    launch = (0..GROUP).fold(launch, |l, i| l.read_if(each(i).and_then(|p| p.bias)));
    launch = ts.into_iter().fold(launch, Launch::read_if);
    launch = (0..GROUP).fold(launch, |l, i| l.read_if(each(i).and_then(|p| Some(p.lora?.b))));
    launch = launch.read_if(residual).read_if(rope.map(|r| r.table)).read_if(rope.map(|r| r.positions));
    launch = n.into_iter().fold(launch.u32(m), Launch::u32).u32(k).u32(updates.rank);
    launch.u32(width(tile)).u32(dim).u32(if rope.is_some() { 2 } else { 0 }).run()?;
    Ok(true)
}

pub(super) fn project(
    dev: &Cuda,
    to: &mut [Projected<'_, Cuda>],
    x: &Tensor<Cuda>,
    by: &[Projection<'_, Cuda>],
    residual: Option<&Tensor<Cuda>>,
    s: &mut ProjectScratch<Cuda>,
) -> Result<()> {
    let Some(updates) = taken(x, by) else { return composed::project(dev, to, x, by, residual, s) };
    assert!(residual.is_none() || by.len() == 1, "project: a residual of {} projections", by.len());
    launch(dev, to, x, by, &updates, Then::Residual(residual)).map(|_| ())
}

pub(super) fn project_qkv(
    dev: &Cuda,
    to: &mut [Projected<'_, Cuda>; 3],
    x: &Tensor<Cuda>,
    by: &[Projection<'_, Cuda>; 3],
    rope: Option<Rope<'_, Cuda>>,
    s: &mut ProjectScratch<Cuda>,
) -> Result<()> {
    if let Some(rope) = rope
        && let Some(updates) = taken(x, by)
        && launch(dev, to, x, by, &updates, Then::Rope(rope))?
    {
        return Ok(());
    }
    project(dev, to, x, by, None, s)?;
    let [q, k, _] = to;
    rope.map_or(Ok(()), |rope| [q, k].into_iter().try_for_each(|to| dev.rope(to.y, rope, Rotate::Forward)))
}

pub(super) fn project_gate_up(
    dev: &Cuda,
    act: &mut Tensor<Cuda>,
    to: &mut [Projected<'_, Cuda>; 2],
    x: &Tensor<Cuda>,
    by: &[Projection<'_, Cuda>; 2],
    s: &mut ProjectScratch<Cuda>,
) -> Result<()> {
    if by[0].w.shape() == by[1].w.shape()
        && let Some(updates) = taken(x, by)
    {
        return launch(dev, to, x, by, &updates, Then::Swiglu(act)).map(|_| ());
    }
    composed::project_gate_up(dev, act, to, x, by, s)
}

pub(super) fn low_rank_t(
    dev: &Cuda,
    t: &mut Tensor<Cuda>,
    x: &Tensor<Cuda>,
    by: LowRank<'_, Cuda>,
    s: &mut ProjectScratch<Cuda>,
) -> Result<()> {
    by.check("low_rank_t", x.shape(), t);
    match Updates::of([Some(by)].into_iter()).filter(|_| aligned(x)) {
        Some(updates) => lora::t(dev, [Some(t)].into_iter(), x, [Some(by)].into_iter(), &updates),
        None => composed::low_rank_t(dev, t, x, by, s),
    }
}

pub(super) fn project_dx(
    dev: &Cuda,
    dx: Option<&mut Tensor<Cuda>>,
    grads: &mut [ProjectionGrads<'_, Cuda>],
    dys: &[&Tensor<Cuda>],
    ts: &[Option<&Tensor<Cuda>>],
    by: &[Projection<'_, Cuda>],
    s: &mut ProjectScratch<Cuda>,
) -> Result<()> {
    let Some(updates) = taken_back(dys, by) else { return composed::project_dx(dev, dx, grads, dys, ts, by, s) };
    assert!([grads.len(), dys.len(), ts.len()] == [by.len(); 3], "project_dx: a group of {}", by.len());
    let (m, n) = (dys[0].rows(), by[0].w.cols());
    for i in 0..by.len() {
        by[i].check("project_dx", dys[i], (m, n), ts[i]);
        grads[i].check("project_dx", &by[i]);
    }
    if updates.rank > 0 {
        lora::u_db(dev, &mut s.u, grads, dys, ts, by, &updates)?;
    }
    let Some(dx) = dx else { return Ok(()) };
    expect_shape("project_dx", "dx", dx, (m, n));
    assert!(dx.dtype() == DType::Bf16, "project_dx: a result of {:?} of bf16 operands", dx.dtype());
    if hopper(dev) && project_sm90::dx(dev, dx, &s.u, dys, by, &updates)? {
        return Ok(());
    }
    let blocks = |tile: Tile| {
        let (block_m, block_n) = tile.block();
        Some(m.div_ceil(block_m) * n.div_ceil(block_n))
    };
    let tile = cheapest(dev, blocks).expect("a tile for every shape");
    let kernel = dx_kernel(tile);
    let mut launch = Launch::new(dev, &kernel, blocks(tile).unwrap_or(0), tile.shared()).write(dx);
    launch = (0..GROUP).fold(launch, |l, i| l.read_if(dys.get(i).copied()));
    launch = (0..GROUP).fold(launch, |l, i| l.read_if(by.get(i).map(|p| p.w)));
    let has = |i: usize| by.get(i).and_then(|p| p.lora);
    launch = (0..GROUP).fold(launch, |l, i| l.read_if(has(i).map(|_| &s.u[i])));
    launch = (0..GROUP).fold(launch, |l, i| l.read_if(has(i).map(|lora| lora.a)));
    launch = widths(by).into_iter().fold(launch.u32(m).u32(n), Launch::u32);
    launch = launch.u32(updates.rank).u32(updates.threshold);
    updates.streams.iter().flatten().fold(launch, |l, &word| l.word(word)).run()
}

pub(super) fn project_dw(
    dev: &Cuda,
    grads: &mut [ProjectionGrads<'_, Cuda>],
    dys: &[&Tensor<Cuda>],
    x: &Tensor<Cuda>,
    by: &[Projection<'_, Cuda>],
    s: &mut ProjectScratch<Cuda>,
) -> Result<()> {
    let Some(updates) = taken_back(dys, by).filter(|_| aligned(x)) else {
        return composed::project_dw(dev, grads, dys, x, by, s);
    };
    assert!([grads.len(), dys.len()] == [by.len(); 2], "project_dw: a group of {}", by.len());
    for i in 0..by.len() {
        grads[i].check("project_dw", &by[i]);
        expect_shape("project_dw", "y", dys[i], (x.rows(), by[i].w.rows()));
    }
    weights(dev, grads, dys, x)?;
    let (biases, of) = lists(grads.iter_mut().zip(dys).filter_map(|(g, dy)| Some((g.bias.as_deref_mut()?, *dy))));
    elementwise::bias_sums(dev, biases, of)?;
    if updates.rank > 0 { lora::da(dev, grads, &s.u, x, &updates) } else { Ok(()) }
}

/// Tensors of a group that are trained, and the gradients that they come from.
type Trained<'a> = ([Option<&'a mut Tensor<Cuda>>; GROUP], [Option<&'a Tensor<Cuda>>; GROUP]);

/// The same as two lists without gaps.
fn lists<'a>(trained: impl Iterator<Item = (&'a mut Tensor<Cuda>, &'a Tensor<Cuda>)>) -> Trained<'a> {
    let (mut to, mut of): Trained<'a> = ([const { None }; GROUP], [None; GROUP]);
    trained.zip(to.iter_mut().zip(&mut of)).for_each(|((w, dy), (to, of))| (*to, *of) = (Some(w), Some(dy)));
    (to, of)
}

/// `dW_i += dy_iᵀ x` of those that are trained.
fn weights(dev: &Cuda, grads: &mut [ProjectionGrads<'_, Cuda>], dys: &[&Tensor<Cuda>], x: &Tensor<Cuda>) -> Result<()> {
    let (k, n) = x.shape();
    let (to, of) = lists(grads.iter_mut().zip(dys).filter_map(|(g, dy)| Some((g.w.as_deref_mut()?, *dy))));
    if of[0].is_none() || k == 0 {
        return Ok(());
    }
    if hopper(dev) {
        return project_sm90::dw(dev, to, of, x);
    }
    let ms = of.map(|dy| dy.map_or(0, Tensor::cols));
    let blocks = |tile: Tile| {
        let (block_m, block_n) = tile.block();
        Some(ms.iter().map(|m| m.div_ceil(block_m)).sum::<usize>() * n.div_ceil(block_n))
    };
    let tile = cheapest(dev, blocks).expect("a tile for every shape");
    let kernel = dw_kernel(tile);
    let launch = Launch::new(dev, &kernel, blocks(tile).unwrap_or(0), tile.shared());
    let launch = to.into_iter().fold(launch, Launch::write_if);
    let launch = of.into_iter().fold(launch, Launch::read_if).read(x);
    ms.into_iter().fold(launch, Launch::u32).u32(n).u32(k).run()
}
