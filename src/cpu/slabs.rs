//! Slabs of a packed operand: all panels of a range of k, one after the other.

use super::Cpu;
use super::pack::{Operand, Unit, pack_panel};
use super::threads::chunked;

/// Steps of k in a slab, in units of four bytes: a panel of B is then 128 KiB.
const K_UNITS: usize = 1024;

/// Steps of k in a slab of these units: the cut depends on nothing else.
pub fn k_steps(unit: Unit) -> usize {
    if unit.is_pair() { 2 * K_UNITS } else { K_UNITS }
}

/// Panels of one task when packing: about 64 KiB.
fn panels_per_task(panel_units: usize) -> usize {
    (16 * 1024 / panel_units.max(1)).max(1)
}

/// Packs a slab: `majors` has the first column (or row) and their number, `ks` the first step and their number.
pub fn pack_slab(
    dev: &Cpu,
    dst: &mut [u32],
    (unit, width): (Unit, usize),
    src: Operand<'_>,
    majors: (usize, usize),
    ks: (usize, usize),
) {
    let ((first, count), (k0, k)) = (majors, ks);
    let panel_units = width * unit.count(k);
    if panel_units == 0 {
        return;
    }
    let dst = &mut dst[..count.div_ceil(width) * panel_units];
    let per_task = panels_per_task(panel_units);
    dev.pool.split(chunked(dst, per_task * panel_units), |task, dst| {
        for (i, panel) in dst.chunks_exact_mut(panel_units).enumerate() {
            let at = (task * per_task + i) * width;
            pack_panel(dev.level, panel, unit, width, src, first + at, width.min(count - at), k0, k);
        }
    });
}
