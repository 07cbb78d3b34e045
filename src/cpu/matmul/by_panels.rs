//! Products whose A stays in the L2 cache, or has few rows: each task packs panels of B for itself and uses them at once, so that B is
//! read once and packed panels never leave the caches.

use std::cell::RefCell;
use std::ops::Range;

use super::{Left, Member, Scratch};
use crate::cpu::Cpu;
use crate::cpu::buffer::Grow;
use crate::cpu::elem::View;
use crate::cpu::kernels::{FewRows, Micro, Store, Target, Tile};
use crate::cpu::pack::{Operand, pack_panel};
use crate::cpu::slabs::pack_slab;

/// Columns of a task of few rows: a multiple of it, a line of f32.
const FEW_COLUMNS: usize = 16;

thread_local! {
    /// A panel of B and sums, of the task that a thread runs.
    static MEMORY: RefCell<[Grow; 2]> = RefCell::default();
}

/// A as products read it.
struct Packed<'a> {
    micro: &'a Micro,
    m: usize,
    k: usize,
    /// Steps of k in a slab.
    k_steps: usize,
    /// Slabs of k one after the other; all but the last are full. Empty where `rows` serves.
    slabs: &'a [u32],
    /// Units of a full slab.
    slab: usize,
    /// A few rows of bf16 pairs, for members that read rows of B as they stand.
    few: Option<View<'a>>,
    row_stride: usize,
}

/// All products of a group. Tasks have the same columns of all members, one after the other.
pub fn by_panels(
    dev: &Cpu,
    scratch: &mut Scratch,
    micro: &Micro,
    k_steps: usize,
    left: Left<'_>,
    group: &[Member<'_>],
) {
    let Left { a, m, k, .. } = left;
    let few = |to: &Member<'_>| to.b.kept.is_none() && k > 0 && m <= micro.few(to.b.rows);
    // Rows of pairs need no packing.
    let as_they_stand = group.iter().all(few) && matches!(a.data, View::Bf16(_)) && a.k_stride == 1 && k % 2 == 0;
    let slab = m.next_multiple_of(micro.mr) * micro.units(k_steps.min(k));
    let starts = || (0..k.max(1)).step_by(k_steps);
    let slabs = scratch.a.elems::<u32>(if as_they_stand { 0 } else { slab * starts().count() });
    for (k0, slab) in starts().zip(slabs.chunks_mut(slab.max(1))) {
        pack_slab(dev, slab, (micro.a, micro.mr), a, (0, m), (k0, k_steps.min(k - k0)));
    }
    let few_rows = as_they_stand.then_some(a.data);
    let packed = Packed { micro, m, k, k_steps, slabs, slab, few: few_rows, row_stride: a.major_stride };
    // Rows that are read as they stand are asked for ahead, as far as a task goes: long tasks. A tile of few rows has no width of its own, so
    // that threads get the same number of columns.
    let as_rows = group.iter().all(few);
    let (width, tasks, most) = if as_rows { (FEW_COLUMNS, 2, 1024 / FEW_COLUMNS) } else { (micro.nr, 8, 8) };
    let widest = group.iter().map(|to| to.n).max().unwrap_or(0).div_ceil(width);
    // Members that are done together by groups of columns have the same ones.
    let together = group.iter().map(|to| to.together(width) / width).max().unwrap_or(1);
    let per_task = widest.div_ceil(tasks * dev.threads()).min(most).next_multiple_of(together) * width;
    dev.pool.run((widest * width).div_ceil(per_task), &|task| {
        let columns = |to: &Member<'_>, task: usize| (task * per_task).min(to.n)..((task + 1) * per_task).min(to.n);
        for (i, to) in group.iter().enumerate() {
            let own = columns(to, task);
            if own.is_empty() {
                continue;
            }
            if few(to) {
                // What is read next: the same columns of another member, else those of the first in the task that this thread takes next, where
                // all threads take one in turn.
                let later = group[i + 1..].iter().map(|to| (to, task)).chain([(&group[0], task + dev.threads())]);
                let next = later.map(|(to, task)| (to, columns(to, task))).find(|(_, columns)| !columns.is_empty());
                let next = next.map_or(&[][..], |(to, columns)| rows_of(to.b.rows, columns.start));
                // SAFETY: these columns of C belong to this task.
                unsafe { packed.few_columns(dev, to, own.clone(), next) };
            } else {
                // SAFETY: as above.
                unsafe { packed.columns(dev, to, own.clone()) };
            }
            to.then(0..m, own);
        }
    });
}

/// The rows of bf16 from row `first` on.
fn rows_of(b: Operand<'_>, first: usize) -> &[half::bf16] {
    match b.data {
        View::Bf16(x) => x.get(first * b.major_stride..).unwrap_or(&[]),
        View::F32(_) => &[],
    }
}

impl Packed<'_> {
    /// The slabs of k: their first steps and their numbers of steps.
    fn ks(&self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.k.max(1)).step_by(self.k_steps).map(|k0| (k0, self.k_steps.min(self.k - k0)))
    }

    /// The tile that a slab of k is stored to: C's where there is one slab, else sums.
    ///
    /// # Safety
    /// Column `j` lies inside C.
    unsafe fn tile(&self, to: &Member<'_>, (j, cols): (usize, usize), k0: usize, sum: &mut [f32]) -> Tile {
        if self.k <= self.k_steps {
            // SAFETY: the caller's promise.
            return unsafe { to.tile(0, j, (self.m, cols)) };
        }
        let store = if k0 == 0 { Store::Set } else { Store::Add };
        Tile::new(Target::F32(sum.as_mut_ptr()), cols, (self.m, cols), 1.0, store)
    }

    /// Some columns of a member from panels, which are packed here where they are not kept.
    ///
    /// # Safety
    /// No other task uses these columns of C.
    unsafe fn columns(&self, dev: &Cpu, to: &Member<'_>, own: Range<usize>) {
        let (Micro { mr, nr, .. }, b) = (*self.micro, to.b);
        MEMORY.with_borrow_mut(|[panel, sum]| {
            let most = nr * self.micro.units(self.k_steps.min(self.k));
            let panel = panel.elems::<u32>(if b.kept.is_some() { 0 } else { most });
            let sum = sum.elems::<f32>(if self.k > self.k_steps { self.m * nr } else { 0 });
            for j in own.clone().step_by(nr) {
                let cols = nr.min(own.end - j);
                for (k0, steps) in self.ks() {
                    let units = self.micro.units(steps);
                    // SAFETY: column j lies inside C.
                    let tile = unsafe { self.tile(to, (j, cols), k0, sum) };
                    let a = &self.slabs[k0.div_ceil(self.k_steps) * self.slab..];
                    let panel = match b.kept {
                        Some(kept) => kept.panels(j, k0),
                        None => {
                            pack_panel(dev.level, panel, self.micro.b, nr, b.rows, j, cols, k0, steps);
                            &*panel
                        }
                    };
                    assert!(self.m.next_multiple_of(mr) * units <= a.len() && nr * units <= panel.len(), "packed");
                    // What is read next lies right behind.
                    let next = if b.kept.is_some() { panel.get(nr * units..).unwrap_or(&[]) } else { &[] };
                    // SAFETY: the panels hold the tile (asserted above); these columns of C belong to this task, and the sums do.
                    unsafe { self.micro.block_before(a, panel, units, tile, &next[..next.len().min(nr * units)]) };
                }
                // SAFETY: these columns of C belong to this task.
                unsafe { self.finish(dev, to, j, &sum[..if sum.is_empty() { 0 } else { self.m * cols }], cols) };
            }
        });
    }

    /// Some columns of a member from a few rows of A and rows of B as they stand.
    ///
    /// # Safety
    /// As [`Packed::columns`].
    unsafe fn few_columns(&self, dev: &Cpu, to: &Member<'_>, own: Range<usize>, next: &[half::bf16]) {
        MEMORY.with_borrow_mut(|[_, sum]| {
            let sum = sum.elems::<f32>(if self.k > self.k_steps { self.m * own.len() } else { 0 });
            for (k0, steps) in self.ks() {
                let a = match self.few {
                    Some(View::Bf16(x)) => FewRows { data: &x[k0..], unit_stride: 1, row_stride: self.row_stride },
                    _ => FewRows {
                        data: bytemuck::cast_slice(&self.slabs[k0.div_ceil(self.k_steps) * self.slab..]),
                        unit_stride: self.micro.mr,
                        row_stride: 2 * self.micro.a.side_by_side(),
                    },
                };
                let rows = rows_of(to.b.rows, own.start);
                // SAFETY: these columns lie inside C and belong to this task, and the sums do.
                unsafe {
                    let tile = self.tile(to, (own.start, own.len()), k0, sum);
                    self.micro.few_rows(a, (rows, to.b.rows.major_stride), (k0, steps), tile, next);
                }
            }
            // SAFETY: as above.
            unsafe { self.finish(dev, to, own.start, sum, own.len()) };
        });
    }

    /// Stores sums of several slabs, rows of `cols`.
    ///
    /// # Safety
    /// They lie inside C from column `j` on, and belong to this task.
    unsafe fn finish(&self, dev: &Cpu, to: &Member<'_>, j: usize, sum: &[f32], cols: usize) {
        for (i, sum) in sum.chunks_exact(cols).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { to.finish(dev.level, i, j, sum) };
        }
    }
}
