//! Products of matrices: operands packed into panels, tiles of C computed in parallel.
//!
//! ```text
//! for each slab of columns, of rows, of k:            slabs bound the packed memory
//!     pack the slab of A and the slab of B            in parallel, a few panels a task
//!     compute tiles of C, panel by panel              in parallel; a block of A stays in the L2 cache
//! ```
//! The cut along k depends on k alone, and a sum over several slabs is finished before it reaches C: an element is the same
//! chain of sums whatever M, N and the number of threads. Goto & van de Geijn 2008, "Anatomy of high-performance matrix
//! multiplication", for the scheme.

use super::Cpu;
use super::buffer::{Grow, ViewMut, view, view_mut};
use super::elem::Elem;
use super::kept::Weight;
use super::kernels::{Micro, Store, Target, Tile};
use super::level::multiversion;
use super::pack::{Operand, pack_panel};
use super::slabs::{k_steps, pack_slab};
use super::threads::{Pool, SharedMut};
use crate::backend::{MatMul, Write};
use crate::tensor::{DType, Tensor};

/// Units of a packed slab (4 MiB): it stays in the L3 cache until it is used.
const SLAB_UNITS: usize = 1 << 20;

/// Units of packed A (768 KiB) that stay in the L2 cache while panels of B go by.
const RESIDENT_UNITS: usize = 3 << 16;

/// Rows up to which nothing is gained by packing B for others to read: what there is to do is to read it.
const FEW_ROWS: usize = 64;

/// Memory kept between operations; grows to what the largest one needs.
#[derive(Default)]
pub struct Scratch {
    a: Grow,
    b: Grow,
    /// Sums over several slabs of k.
    sum: Grow,
    /// Logits of a chunk of rows, then their gradients.
    pub logits: Grow,
    /// Packed keys and values, or the gradients of each query head.
    pub attention: Grow,
}

/// C in memory.
pub enum Dest<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [half::bf16]),
}

/// Shape of a product: C (m, n), k steps.
#[derive(Clone, Copy)]
pub struct Shape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

pub fn matmul(dev: &Cpu, c: &mut Tensor<Cpu>, a: &Tensor<Cpu>, b: &Tensor<Cpu>, op: MatMul, alpha: f32, write: Write) {
    let (m, n, k) = op.check(c, a, b);
    let (a_major, a_k) = if op == MatMul::TN { (1, a.cols()) } else { (a.cols(), 1) };
    let bf16 = a.dtype() == DType::Bf16 || b.dtype() == DType::Bf16;
    let a = Operand { data: view(a), major_stride: a_major, k_stride: a_k };
    let b = match op {
        MatMul::TN => Weight::from(Operand { data: view(b), major_stride: 1, k_stride: b.cols() }),
        MatMul::NT | MatMul::NN => Weight::of(b, &Micro::new(dev.level, bf16), op == MatMul::NT, n, k),
    };
    // A sum is the first that is added to these zeros: nobody has to write them.
    let added_to_zeros = write == Write::Add && c.buf.overwrites_zeros(c.len() * c.dtype().bytes());
    let write = if added_to_zeros { Write::Set } else { write };
    let c = match view_mut(c) {
        ViewMut::F32(c) => Dest::F32(c),
        ViewMut::Bf16(c) => Dest::Bf16(c),
    };
    let mut scratch = dev.scratch.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    product(dev, &mut scratch, c, Product { a, b, shape: Shape { m, n, k }, bf16, alpha, write });
}

multiversion! {
    fn finish[E: Elem](c: &mut [E], sum: &[f32], alpha: f32, write: Write) {
        match write {
            Write::Set => c.iter_mut().zip(sum).for_each(|(c, s)| *c = E::put(s * alpha)),
            Write::Add => c.iter_mut().zip(sum).for_each(|(c, s)| *c = E::put(c.get() + s * alpha)),
        }
    }
}

/// `alpha · A · B` for any strides, and how it reaches C.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    pub a: Operand<'a>,
    pub b: Weight<'a>,
    pub shape: Shape,
    /// Whether the operands are rounded to bf16 where they are not already.
    pub bf16: bool,
    pub alpha: f32,
    pub write: Write,
}

/// `c = or += alpha · A · B`; C is dense.
pub fn product(dev: &Cpu, scratch: &mut Scratch, c: Dest<'_>, p: Product<'_>) {
    let Product { a, b, shape: Shape { m, n, k }, bf16, alpha, write } = p;
    if m == 0 || n == 0 {
        return;
    }
    let micro = Micro::new(dev.level, bf16);
    let k_steps = k_steps(micro.b);
    let units = micro.units(k.min(k_steps)).max(1);
    let slab = |width: usize| (SLAB_UNITS / units / width).max(1) * width;
    let (ms, ns) = (slab(micro.mr).min(m), slab(micro.nr).min(n));
    let store = if write == Write::Set { Store::Set } else { Store::Add };
    let (c_f32, c_bf16) = match c {
        Dest::F32(c) => (Some(SharedMut::new(c)), None),
        Dest::Bf16(c) => (None, Some(SharedMut::new(c))),
    };
    let several = k > k_steps;
    let resident = m.next_multiple_of(micro.mr) * units <= RESIDENT_UNITS && n.div_ceil(micro.nr) >= 4 * dev.threads();
    if m <= FEW_ROWS || resident && !several {
        return by_panels(dev, scratch, &micro, k_steps, (c_f32, c_bf16), p);
    }
    let packed_a = scratch.a.elems::<u32>(ms.next_multiple_of(micro.mr) * units);
    let packed_b = scratch.b.elems::<u32>(if b.kept.is_some() { 0 } else { ns.next_multiple_of(micro.nr) * units });
    let sum = scratch.sum.elems::<f32>(if several { ms * ns } else { 0 });
    let one_b = !several;
    for j0 in (0..n).step_by(ns) {
        let nj = ns.min(n - j0);
        for i0 in (0..m).step_by(ms) {
            let mi = ms.min(m - i0);
            for k0 in (0..k.max(1)).step_by(k_steps) {
                let kk = k_steps.min(k - k0);
                if !(one_b && i0 > 0 || b.kept.is_some()) {
                    pack_slab(dev, packed_b, (micro.b, micro.nr), b.rows, (j0, nj), (k0, kk));
                }
                let b = b.kept.map_or(&*packed_b, |kept| kept.panels(j0, k0));
                if !(m <= ms && !several && j0 > 0) {
                    pack_slab(dev, packed_a, (micro.a, micro.mr), a, (i0, mi), (k0, kk));
                }
                let panels = Panels { micro, a: packed_a, b, units: micro.units(kk) };
                let tile = if several {
                    let store = if k0 == 0 { Store::Set } else { Store::Add };
                    Tile { target: Target::F32(sum.as_mut_ptr()), stride: nj, rows: mi, cols: nj, alpha: 1.0, store }
                } else {
                    // SAFETY: (i0, j0) lies inside C.
                    let target = unsafe { place(c_f32, c_bf16, i0 * n + j0) };
                    Tile { target, stride: n, rows: mi, cols: nj, alpha, store }
                };
                // SAFETY: the tile lies inside `sum` or C, which nothing else uses meanwhile.
                unsafe { tiles(&dev.pool, &panels, tile) };
            }
            if several {
                let sum = &sum[..mi * nj];
                dev.pool.run(mi, &|i| {
                    let row = &sum[i * nj..(i + 1) * nj];
                    let at = (i0 + i) * n + j0;
                    // SAFETY: row i of this slab of C belongs to this task alone.
                    unsafe {
                        match (c_f32, c_bf16) {
                            (Some(c), _) => finish(dev.level, c.slice(at, nj), row, alpha, write),
                            (_, Some(c)) => finish(dev.level, c.slice(at, nj), row, alpha, write),
                            (None, None) => unreachable!("C has a type"),
                        }
                    }
                });
            }
        }
    }
}

thread_local! {
    /// A panel of B and sums, of the task that a thread runs.
    static PANEL: std::cell::RefCell<[Grow; 2]> = std::cell::RefCell::default();
}

/// A product whose A stays in the L2 cache, or has few rows: each task packs panels of B for itself and uses them at once, so that
/// B is read once and packed panels never leave the caches.
fn by_panels(
    dev: &Cpu,
    scratch: &mut Scratch,
    micro: &Micro,
    k_steps: usize,
    (c_f32, c_bf16): (Option<SharedMut<f32>>, Option<SharedMut<half::bf16>>),
    p: Product<'_>,
) {
    let Product { a, b, shape: Shape { m, n, k }, alpha, write, .. } = p;
    let Micro { mr, nr, .. } = *micro;
    let starts: Vec<usize> = (0..k.max(1)).step_by(k_steps).collect();
    // Slabs of k one after the other; all but the last are full.
    let slab = m.next_multiple_of(mr) * micro.units(k_steps.min(k));
    let packed_a = scratch.a.elems::<u32>(slab * starts.len());
    for (&k0, slab) in starts.iter().zip(packed_a.chunks_mut(slab.max(1))) {
        pack_slab(dev, slab, (micro.a, mr), a, (0, m), (k0, k_steps.min(k - k0)));
    }
    let packed_a = &*packed_a;
    let panels = n.div_ceil(nr);
    let per_task = panels.div_ceil(8 * dev.threads()).min(8);
    let several = starts.len() > 1;
    let store = if write == Write::Set { Store::Set } else { Store::Add };
    dev.pool.run(panels.div_ceil(per_task), &|task| {
        PANEL.with_borrow_mut(|[panel, sum]| {
            let own = panel.elems::<u32>(if b.kept.is_some() { 0 } else { nr * micro.units(k_steps.min(k)) });
            let sum = sum.elems::<f32>(if several { m * nr } else { 0 });
            for j in (task * per_task..(task + 1) * per_task).map(|j| j * nr).take_while(|&j| j < n) {
                let cols = nr.min(n - j);
                for &k0 in &starts {
                    let steps = k_steps.min(k - k0);
                    let units = micro.units(steps);
                    let tile = if several {
                        let store = if k0 == 0 { Store::Set } else { Store::Add };
                        Tile { target: Target::F32(sum.as_mut_ptr()), stride: nr, rows: m, cols, alpha: 1.0, store }
                    } else {
                        // SAFETY: column j lies inside C.
                        let target = unsafe { place(c_f32, c_bf16, j) };
                        Tile { target, stride: n, rows: m, cols, alpha, store }
                    };
                    let a = &packed_a[k0.div_ceil(k_steps) * slab..];
                    let panel = match b.kept {
                        Some(kept) => kept.panels(j, k0),
                        None => {
                            let b = b.rows;
                            let rows = b.data.from(j * b.major_stride + k0 * b.k_stride);
                            // SAFETY: these columns of C, or the sums, belong to this task.
                            if b.k_stride == 1 && unsafe { micro.few_rows(a, rows, b.major_stride, steps, tile) } {
                                continue;
                            }
                            pack_panel(dev.level, own, micro.b, nr, b, j, cols, k0, steps);
                            &*own
                        }
                    };
                    assert!(m.next_multiple_of(mr) * units <= a.len() && nr * units <= panel.len(), "packed operands");
                    // What is read next lies right behind.
                    let next = if b.kept.is_some() { panel.get(nr * units..).unwrap_or(&[]) } else { &[] };
                    // SAFETY: the panels hold the tile (asserted above); these columns of C belong to this task, and the sums do.
                    unsafe { micro.block_before(a, panel, units, tile, &next[..next.len().min(nr * units)]) };
                }
                for (i, sum) in sum.chunks_exact(nr).enumerate() {
                    let at = i * n + j;
                    // SAFETY: these columns of C belong to this task.
                    unsafe {
                        match (c_f32, c_bf16) {
                            (Some(c), _) => finish(dev.level, c.slice(at, cols), &sum[..cols], alpha, write),
                            (_, Some(c)) => finish(dev.level, c.slice(at, cols), &sum[..cols], alpha, write),
                            (None, None) => unreachable!("C has a type"),
                        }
                    }
                }
            }
        });
    });
}

/// The element of C at `at`.
///
/// # Safety
/// `at` lies inside C.
unsafe fn place(c_f32: Option<SharedMut<f32>>, c_bf16: Option<SharedMut<half::bf16>>, at: usize) -> Target {
    // SAFETY: the caller's promise.
    unsafe {
        match (c_f32, c_bf16) {
            (Some(c), _) => Target::F32(c.get().add(at)),
            (_, Some(c)) => Target::Bf16(c.get().add(at)),
            (None, None) => unreachable!("C has a type"),
        }
    }
}

/// Packed slabs of A and B with the same k.
struct Panels<'a> {
    micro: Micro,
    a: &'a [u32],
    b: &'a [u32],
    units: usize,
}

/// A tile that tasks share; each writes a part of its own.
#[derive(Clone, Copy)]
struct SharedTile(Tile);

// SAFETY: `tiles` gives each task a part of the tile that no other task has.
unsafe impl Sync for SharedTile {}

impl SharedTile {
    fn get(&self) -> Tile {
        self.0
    }
}

/// Computes a tile of any size from packed slabs, in parallel.
///
/// # Safety
/// The tile's elements may be read and written, and nothing else uses them meanwhile.
unsafe fn tiles(pool: &Pool, p: &Panels<'_>, tile: Tile) {
    let Micro { mr, nr, .. } = p.micro;
    let (mi, nj) = (tile.rows.div_ceil(mr), tile.cols.div_ceil(nr));
    assert!(mi * mr * p.units <= p.a.len() && nj * nr * p.units <= p.b.len(), "packed slabs hold the tile");
    // How C is cut does not change its values; it balances the threads.
    let mut per_i = p.micro.most_panels(p.units).min(mi);
    let mut per_j = nj.min(8);
    let enough = 4 * pool.threads();
    while mi.div_ceil(per_i) * nj.div_ceil(per_j) < enough && (per_i > 2 || per_j > 2) {
        if per_i > per_j { per_i = per_i.div_ceil(2) } else { per_j = per_j.div_ceil(2) }
    }
    let (ti, tj) = (mi.div_ceil(per_i), nj.div_ceil(per_j));
    let shared = SharedTile(tile);
    pool.run(ti * tj, &|task| {
        let (i0, j0) = (task / tj * per_i, task % tj * per_j);
        // SAFETY: the panels hold `units` rows (asserted above); tasks write different parts of the tile.
        unsafe {
            let part = shared.get().part(i0 * mr, j0 * nr, per_i * mr, per_j * nr);
            p.micro.block(&p.a[i0 * mr * p.units..], &p.b[j0 * nr * p.units..], p.units, part);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::cpu::Level;
    use crate::cpu::testing::sums::Sums;
    use crate::cpu::testing::{cpus, products, tensor, thread_counts_of_levels, values};

    #[test]
    fn matmul_is_as_close_as_plain_arithmetic_at_every_level() {
        for dev in cpus() {
            let name = format!("{:?}", dev.level());
            products::as_close_as_plain_arithmetic(
                &dev,
                &name,
                &products::SHAPES,
                &products::TYPES,
                Sums::Rounded,
                |c, a, b, op, alpha, write| {
                    dev.matmul(c, a, b, op, alpha, write).unwrap();
                },
            );
        }
    }

    #[test]
    fn a_row_depends_neither_on_its_place_nor_on_the_number_of_rows_or_threads() {
        for devs in thread_counts_of_levels() {
            let mut first: Option<Vec<f32>> = None;
            for dev in devs {
                let name = format!("{}, {} threads", dev.level().name(), dev.threads());
                let whole =
                    products::a_row_depends_neither_on_its_place_nor_on_the_number_of_rows(&dev, &name, 70, 2500);
                assert_eq!(first.get_or_insert_with(|| whole.clone()), &whole, "{name}");
            }
        }
    }

    #[test]
    fn large_operands_go_through_several_slabs() {
        // Small integers: every sum is exact, so the answer is known whatever the order.
        let (m, n, k) = (1100, 1130, 1050);
        let value = |i: usize| ((i * 7 + i / 13) % 5) as f32 - 2.0;
        let (a, b): (Vec<f32>, Vec<f32>) = ((0..m * k).map(value).collect(), (0..n * k).map(value).collect());
        for (dev, dtype) in cpus().iter().flat_map(|dev| [(dev, DType::F32), (dev, DType::Bf16)]) {
            if dev.level() == Level::Portable {
                continue;
            }
            let (at, bt) = (tensor(dev, m, k, dtype, &a), tensor(dev, n, k, dtype, &b));
            let mut c = tensor(dev, m, n, DType::F32, &vec![3.0; m * n]);
            dev.matmul(&mut c, &at, &bt, MatMul::NT, 1.0, Write::Add).unwrap();
            let c = values(dev, &c);
            for (i, j) in [(0, 0), (1, 1129), (500, 600), (1023, 1024), (1099, 0), (1099, 1129)] {
                let expected: f32 = (0..k).map(|l| a[i * k + l] * b[j * k + l]).sum();
                assert_eq!(c[i * n + j], 3.0 + expected, "{} {dtype:?} ({i}, {j})", dev.level().name());
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_visible_and_an_empty_sum_is_zero() {
        for dev in cpus() {
            let name = format!("{:?}", dev.level());
            products::what_is_not_finite_stays_visible_and_an_empty_sum_is_zero(&dev, &name);
        }
    }
}
