//! Projections of a group on Hopper: the kernels `kernels/project_sm90.cu`, `project_dx_sm90.cu` and `project_dw_sm90.cu` and their
//! launches. They take what [`super::project`] takes, and leave the rest to its own kernels.

use super::compile::{Define, Defines, Source, Value, source};
use super::device::Cuda;
use super::group::{GROUP, Then, widths};
use super::kernels::Param::{In, Map, Out, U32};
use super::kernels::{Configuration, Kernel, Param};
use super::launch::Launch;
use super::lora::{self, Updates};
use super::matmul_sm90::{BLOCK_M, CC, Cluster, Columns};
use super::tensor_map::TensorMap;
use crate::backend::{Projected, Projection};
use crate::error::Result;
use crate::tensor::Tensor;

/// The source of projections.
pub const SOURCE: Source = source!("kernels/project_sm90.cu");
/// The source of the gradient of their input.
pub const SOURCE_DX: Source = source!("kernels/project_dx_sm90.cu");
/// The source of the gradients of their weights.
pub const SOURCE_DW: Source = source!("kernels/project_dw_sm90.cu");

/// Largest rank of updates whose gradient is masked: all of it stands in buffers while one is left to fill.
const MOST_MASKED: usize = 256;

fn of_columns(
    source: Source,
    entry: &'static str,
    (columns, cluster): (Columns, Cluster),
    more: &[Define],
    params: &'static [Param],
) -> Kernel {
    let of_columns = [("BLOCK_N", columns.count()), ("STAGES", columns.stages()), ("CLUSTER", cluster.count())];
    let of_columns = of_columns.map(|(name, n)| (name, Value::Number(n)));
    Kernel { source, entry, defines: Defines::new(&[more, &of_columns].concat()), params, threads: 384 }
}

/// Projections of a group, of gate and up as a pair; heads of `dim` elements are rotated, or none where it is 0.
pub fn kernel(tile: (Columns, Cluster), pair: bool, dim: usize) -> Kernel {
    const PARAMS: &[Param] = &[
        Out, Out, Out, Out, Map, Map, Map, Map, Map, Map, Map, Map, Map, Map, In, In, In, In, In, In, U32, U32, U32,
        U32, U32, U32, U32, U32,
    ];
    let more = [("PAIR", Value::Number(usize::from(pair))), ("DIM", Value::Number(dim))];
    of_columns(SOURCE, "project_sm90", tile, &more, PARAMS)
}

/// Gradient of their input, with so many masked updates.
pub fn dx_kernel(tile: (Columns, Cluster), masks: usize) -> Kernel {
    const PARAMS: &[Param] = &[
        Out, Map, Map, Map, Map, Map, Map, Map, Map, Map, Map, Map, Map, U32, U32, U32, U32, U32, U32, U32, U32, U32,
        U32, U32, U32, U32, U32, U32, U32, U32, U32, U32, U32,
    ];
    of_columns(SOURCE_DX, "project_dx_sm90", tile, &[("MASKS", Value::Number(masks))], PARAMS)
}

/// Gradients of their weights.
pub fn dw_kernel(tile: (Columns, Cluster)) -> Kernel {
    const PARAMS: &[Param] = &[Out, Out, Out, Map, Map, Map, Map, U32, U32, U32, U32, U32];
    of_columns(SOURCE_DW, "project_dw_sm90", tile, &[], PARAMS)
}

/// Columns of C in a tile of projections; `None` where it cannot be had.
fn step(columns: Columns, pair: bool, dim: usize) -> Option<usize> {
    match (columns, pair, columns.count()) {
        (Columns::N64, true, _) => None,
        (_, true, count) => Some(count / 2),
        (_, _, count) if dim == 0 => Some(count),
        (_, _, count) => Some(count / dim * dim).filter(|&step| step > 0),
    }
}

/// Widths of a masked tile: a masked sum takes registers of its own.
fn masked(columns: Columns) -> bool {
    columns != Columns::N256
}

/// Every configuration that an architecture (major · 10 + minor) may be asked to run, with heads of the usual widths.
pub fn all(cc: u32) -> Vec<Configuration> {
    let mut all = Vec::new();
    for columns in Columns::ALL.into_iter().filter(|_| cc == CC) {
        let mut push = |kernel| all.push((kernel, columns.shared()));
        let tile = (columns, Cluster::Two);
        for dim in [0, 32, 64, 80, 96, 128].into_iter().filter(|&dim| step(columns, false, dim).is_some()) {
            push(kernel(tile, false, dim));
        }
        if step(columns, true, 0).is_some() {
            push(kernel(tile, true, 0));
        }
        (0..=GROUP).filter(|&masks| masks == 0 || masked(columns)).for_each(|masks| push(dx_kernel(tile, masks)));
        Cluster::ALL.into_iter().for_each(|cluster| push(dw_kernel((columns, cluster))));
    }
    all
}

/// A tensor in boxes of so many rows.
fn boxes(t: &Tensor<Cuda>, rows: usize) -> Result<TensorMap> {
    TensorMap::new(t.buf.address(), t.shape(), t.cols(), rows)
}

/// A group in one launch, after one for its `t`. `false`: no tile holds whole heads, nothing was done.
pub(super) fn forward(
    dev: &Cuda,
    to: &mut [Projected<'_, Cuda>],
    x: &Tensor<Cuda>,
    by: &[Projection<'_, Cuda>],
    updates: &Updates,
    then: Then<'_, '_>,
) -> Result<bool> {
    let (m, k) = x.shape();
    let (pair, dim) = (matches!(then, Then::Swiglu(_)), then.dim());
    let n = widths(by);
    let in_row = |step: usize| n[..if pair { 1 } else { GROUP }].iter().map(|n| n.div_ceil(step)).sum::<usize>();
    let cluster = dev.cluster(None);
    let tiles = |columns| Some(cluster.tiles(m.div_ceil(BLOCK_M), in_row(step(columns, pair, dim)?)));
    let Some((columns, tiles)) = Columns::cheapest(dev.properties().sm_count, tiles) else { return Ok(false) };
    if tiles == 0 {
        return Ok(true);
    }
    if updates.rank > 0 {
        lora::t(dev, to.iter_mut().map(|to| to.t.as_deref_mut()), x, by.iter().map(|p| p.lora), updates)?;
    }
    // Each of a pair has half of the rows.
    let rows = columns.box_rows(true, cluster) / if pair { 2 } else { 1 };
    let (act, residual, rope) = then.parts();

    let has = |i: usize| by.get(i).and_then(|p| p.lora);
    let mut maps = [TensorMap::absent(); 10];
    maps[0] = boxes(x, BLOCK_M)?;
    let mut updated = 0;
    for (i, (to, by)) in to.iter().zip(by).enumerate() {
        maps[1 + i] = boxes(by.w, rows)?;
        if let (Some(t), Some(lora)) = (to.t.as_deref(), has(i)) {
            (maps[4 + i], maps[7 + i]) = (boxes(t, BLOCK_M)?, boxes(lora.b, rows)?);
            updated |= 1 << i;
        }
    }
    let kernel = kernel((columns, cluster), pair, dim);
    let blocks = cluster.blocks(tiles, dev.properties().sm_count);
    let mut launch = Launch::new(dev, &kernel, blocks, columns.shared());
    let mut results = to.iter_mut();
    for _ in 0..GROUP {
        launch = launch.write_if(results.next().map(|to| &mut *to.y));
    }
    launch = launch.write_if(act).maps(&maps);
    launch = (0..GROUP).fold(launch, |l, i| l.read_if(by.get(i).and_then(|p| p.bias)));
    launch = launch.read_if(residual).read_if(rope.map(|r| r.table)).read_if(rope.map(|r| r.positions));
    launch = n.into_iter().fold(launch.u32(m), Launch::u32).u32(k).u32(updates.rank);
    launch.u32(updated).u32(if dim > 0 { 2 } else { 0 }).run()?;
    Ok(true)
}

/// The gradient of a group's input, its `u` being there. `false`: updates that the kernel does not mask, nothing was done.
pub(super) fn dx(
    dev: &Cuda,
    dx: &mut Tensor<Cuda>,
    us: &[Tensor<Cuda>; GROUP],
    dys: &[&Tensor<Cuda>],
    by: &[Projection<'_, Cuda>],
    updates: &Updates,
) -> Result<bool> {
    let (m, n) = dx.shape();
    let places = lora::places(by);
    let count = places.iter().flatten().count();
    let masks = if updates.threshold > 0 { count } else { 0 };
    if masks > 0 && updates.rank > MOST_MASKED {
        return Ok(false);
    }
    let cluster = dev.cluster(None);
    let of = |columns: Columns| cluster.tiles(m.div_ceil(BLOCK_M), n.div_ceil(columns.count()));
    let tiles = |columns: Columns| (masks == 0 || masked(columns)).then(|| of(columns));
    let Some((columns, tiles)) = Columns::cheapest(dev.properties().sm_count, tiles) else { return Ok(false) };
    if tiles == 0 {
        return Ok(true);
    }
    let rows = columns.box_rows(false, cluster);
    let mut maps = [TensorMap::absent(); 12];
    for i in 0..by.len() {
        (maps[i], maps[3 + i]) = (boxes(dys[i], BLOCK_M)?, boxes(by[i].w, rows)?);
    }
    let pairs = lora::list(by, |i| Some(&us[i])).into_iter().zip(lora::list(by, |i| Some(by[i].lora?.a)));
    for (place, (u, a)) in pairs.enumerate() {
        let (Some(u), Some(a)) = (u, a) else { break };
        (maps[6 + place], maps[9 + place]) = (boxes(u, BLOCK_M)?, boxes(a, rows)?);
    }
    let kernel = dx_kernel((columns, cluster), masks);
    let blocks = cluster.blocks(tiles, dev.properties().sm_count);
    let launch = Launch::new(dev, &kernel, blocks, columns.shared()).write(dx).maps(&maps).u32(m).u32(n);
    let launch = widths(by).into_iter().fold(launch, Launch::u32).u32(updates.rank).u32(count);
    lora::masks(launch, updates, &places).run()?;
    Ok(true)
}

/// `dW_i += dy_iᵀ x` of as many as there are of `dw`, all f32 and without gaps, from the `dy` in the same places.
pub(super) fn dw(
    dev: &Cuda,
    dw: [Option<&mut Tensor<Cuda>>; GROUP],
    dys: [Option<&Tensor<Cuda>>; GROUP],
    x: &Tensor<Cuda>,
) -> Result<()> {
    let (k, n) = x.shape();
    let m = dys.map(|dy| dy.map_or(0, Tensor::cols));
    let below = m.iter().map(|m| m.div_ceil(BLOCK_M)).sum::<usize>();
    let cluster = dev.cluster(Some(below));
    let tiles = |columns: Columns| Some(cluster.tiles(below, n.div_ceil(columns.count())));
    let (columns, tiles) = Columns::cheapest(dev.properties().sm_count, tiles).expect("a tile for every shape");
    let mut maps = [TensorMap::absent(); 4];
    for (map, dy) in maps.iter_mut().zip(dys.into_iter().flatten()) {
        *map = boxes(dy, 64)?;
    }
    maps[3] = boxes(x, columns.box_rows(false, cluster))?;
    let kernel = dw_kernel((columns, cluster));
    let launch = Launch::new(dev, &kernel, cluster.blocks(tiles, dev.properties().sm_count), columns.shared());
    let launch = dw.into_iter().fold(launch, Launch::write_if).maps(&maps);
    m.into_iter().fold(launch, Launch::u32).u32(n).u32(k).run()
}
