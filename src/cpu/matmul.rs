//! Products of matrices: operands packed into panels, tiles of C computed in parallel.
//!
//! ```text
//! for each slab of columns, of rows, of k:            slabs bound the packed memory
//!     pack the slab of A and the slab of B            in parallel, a few panels a task
//!     compute tiles of C, panel by panel              in parallel; a block of A stays in the L2 cache
//! ```
//! The cut along k depends on k alone, and a sum over several slabs is finished before it reaches C: an element is the same
//! chain of sums whatever M, N and the number of threads. Goto & van de Geijn 2008, "Anatomy of high-performance matrix
//! multiplication", for the scheme. Products that read one A are a group: A is packed once. Where A is small or stays in the L2 cache,
//! another scheme serves: `by_panels`.

mod by_panels;

use std::ops::Range;

use super::Cpu;
use super::buffer::{Grow, ViewMut, view, view_mut};
use super::elem::{Elem, View};
use super::elementwise::add_slice;
use super::kept::Weight;
use super::kernels::{Micro, Store, Target, Tile};
use super::level::{Level, multiversion};
use super::pack::Operand;
use super::slabs::{k_steps, pack_slab};
use super::threads::{Pool, SharedMut};
use crate::backend::{MatMul, Write};
use crate::tensor::{DType, Tensor};
use by_panels::by_panels;

/// Units of a packed slab (4 MiB): it stays in the L3 cache until it is used.
const SLAB_UNITS: usize = 1 << 20;

/// Units of packed A (768 KiB) that stay in the L2 cache while panels of B go by.
const RESIDENT_UNITS: usize = 3 << 16;

/// Rows up to which nothing is gained by packing B for others to read: what there is to do is to read it.
pub const FEW_ROWS: usize = 64;

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

/// C as tasks share it, each with elements of its own.
#[derive(Clone, Copy)]
pub enum Shared {
    F32(SharedMut<f32>),
    Bf16(SharedMut<half::bf16>),
}

impl Shared {
    /// All of C. What points to it is no longer than the slice: whoever makes one sees to that.
    pub fn new(c: Dest<'_>) -> Self {
        match c {
            Dest::F32(c) => Shared::F32(SharedMut::new(c)),
            Dest::Bf16(c) => Shared::Bf16(SharedMut::new(c)),
        }
    }

    /// The element at `at`.
    ///
    /// # Safety
    /// `at` lies inside C.
    unsafe fn place(self, at: usize) -> Target {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Shared::F32(c) => Target::F32(c.get().add(at)),
                Shared::Bf16(c) => Target::Bf16(c.get().add(at)),
            }
        }
    }
}

/// Elements that are only read, as a tile takes them.
fn read_only(x: View<'_>) -> Target {
    match x {
        View::F32(x) => Target::F32(x.as_ptr().cast_mut()),
        View::Bf16(x) => Target::Bf16(x.as_ptr().cast_mut()),
    }
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
        MatMul::NT | MatMul::NN => Weight::of(dev, b, &Micro::new(dev.level, bf16), op == MatMul::NT, n, k),
    };
    // A sum is the first that is added to these zeros: nobody has to write them.
    let added_to_zeros = write == Write::Add && c.buf.overwrites_zeros(c.len() * c.dtype().bytes());
    let write = if added_to_zeros { Write::Set } else { write };
    let c = dest(c);
    let mut scratch = dev.scratch.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    product(dev, &mut scratch, c, Product { a, b, shape: Shape { m, n, k }, bf16, alpha, write });
}

/// A tensor as C.
pub fn dest(c: &mut Tensor<Cpu>) -> Dest<'_> {
    match view_mut(c) {
        ViewMut::F32(c) => Dest::F32(c),
        ViewMut::Bf16(c) => Dest::Bf16(c),
    }
}

multiversion! {
    /// A row of sums that were formed apart reaches C.
    fn finish[E: Elem](c: &mut [E], onto: Option<&[E]>, sum: &[f32], alpha: f32, write: Write) {
        match (write, onto) {
            (Write::Set, _) => c.iter_mut().zip(sum).for_each(|(c, s)| *c = E::put(s * alpha)),
            (Write::Add, None) => c.iter_mut().zip(sum).for_each(|(c, s)| *c = E::put(c.get() + s * alpha)),
            (Write::Add, Some(onto)) => {
                c.iter_mut().zip(onto).zip(sum).for_each(|((c, o), s)| *c = E::put(o.get() + s * alpha));
            }
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
    let to = Member { c: Shared::new(c), b, n, alpha, write, onto: None, bias: None, then: None };
    products(dev, scratch, Left { a, m, k, bf16 }, &[to]);
}

/// What the products of a group share.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    pub a: Operand<'a>,
    pub m: usize,
    pub k: usize,
    /// As in [`Product`].
    pub bf16: bool,
}

/// A product of a group that reads one A: `c = alpha · A · B`, added to what is there or to `onto`; then `+ bias`, after a rounding of its
/// own; then what `then` makes of it.
#[derive(Clone, Copy)]
pub struct Member<'a> {
    /// (m, n), dense; no other member has the same.
    pub c: Shared,
    pub b: Weight<'a>,
    pub n: usize,
    pub alpha: f32,
    pub write: Write,
    /// (m, n) of C's type, for [`Write::Add`].
    pub onto: Option<View<'a>>,
    /// (1, n).
    pub bias: Option<View<'a>>,
    pub then: Option<Then<'a>>,
}

/// What is done with finished parts of C while they are in the caches.
#[derive(Clone, Copy)]
pub struct Then<'a> {
    /// A part has whole groups of so many columns; the last one may be shorter.
    pub columns: usize,
    /// Of row i and these columns. Members that stand before this one in the group and have as many columns have finished theirs there.
    pub of: &'a (dyn Fn(usize, Range<usize>) + Sync),
}

impl Member<'_> {
    /// The tile that begins at (i, j) of C.
    ///
    /// # Safety
    /// (i, j) lies inside C.
    pub unsafe fn tile(&self, i: usize, j: usize, size: (usize, usize)) -> Tile {
        let store = if self.write == Write::Set { Store::Set } else { Store::Add };
        let at = i * self.n + j;
        // SAFETY: the caller's promise; `products` has seen that what is added has C's shape.
        unsafe {
            let onto = self.onto.map(|x| read_only(x).at(at));
            let bias = self.bias.map(|x| read_only(x).at(j));
            Tile { onto, bias, ..Tile::new(self.c.place(at), self.n, size, self.alpha, store) }
        }
    }

    /// Stores a row of sums from (i, j) on.
    ///
    /// # Safety
    /// They lie inside C, and no other task uses them meanwhile.
    pub unsafe fn finish(&self, level: Level, i: usize, j: usize, sum: &[f32]) {
        let (at, len) = (i * self.n + j, sum.len());
        // SAFETY: the caller's promise.
        unsafe {
            match (self.c, self.onto.map(|x| x.from(at))) {
                (Shared::F32(c), Some(View::F32(x))) => self.row(level, j, c.slice(at, len), Some(&x[..len]), sum),
                (Shared::F32(c), _) => self.row(level, j, c.slice(at, len), None, sum),
                (Shared::Bf16(c), Some(View::Bf16(x))) => self.row(level, j, c.slice(at, len), Some(&x[..len]), sum),
                (Shared::Bf16(c), _) => self.row(level, j, c.slice(at, len), None, sum),
            }
        }
    }

    fn row<E: Elem>(&self, level: Level, j: usize, c: &mut [E], onto: Option<&[E]>, sum: &[f32]) {
        finish(level, c, onto, sum, self.alpha, self.write);
        match self.bias.map(|b| b.from(j)) {
            None => {}
            Some(View::F32(b)) => add_slice(level, c, &b[..sum.len()]),
            Some(View::Bf16(b)) => add_slice(level, c, &b[..sum.len()]),
        }
    }

    /// Columns of a part of C: a multiple of `width` and of what is done together.
    pub fn together(&self, width: usize) -> usize {
        let of = self.then.map_or(1, |then| then.columns);
        (1..=width).find(|i| (i * of).is_multiple_of(width)).map_or(width, |i| i * of)
    }

    pub fn then(&self, rows: Range<usize>, columns: Range<usize>) {
        if let Some(then) = self.then {
            rows.for_each(|i| (then.of)(i, columns.clone()));
        }
    }
}

/// All products of a group.
pub fn products(dev: &Cpu, scratch: &mut Scratch, left: Left<'_>, group: &[Member<'_>]) {
    let Left { m, k, bf16, .. } = left;
    let len = |x: View<'_>| match x {
        View::F32(x) => x.len(),
        View::Bf16(x) => x.len(),
    };
    for to in group {
        assert!(to.onto.is_none_or(|x| len(x) >= m * to.n && same_type(to.c, x)), "what is added is as C");
        assert!(to.bias.is_none_or(|x| len(x) >= to.n), "a bias has a value for each column");
    }
    if m == 0 || group.iter().all(|to| to.n == 0) {
        return;
    }
    let micro = Micro::new(dev.level, bf16);
    let k_steps = k_steps(micro.b);
    let units = micro.units(k.min(k_steps)).max(1);
    let panels: usize = group.iter().map(|to| to.n.div_ceil(micro.nr)).sum();
    let resident = m.next_multiple_of(micro.mr) * units <= RESIDENT_UNITS && panels >= 4 * dev.threads();
    if m <= FEW_ROWS || resident && k <= k_steps {
        return by_panels(dev, scratch, &micro, k_steps, left, group);
    }
    for (i, to) in group.iter().enumerate().filter(|(_, to)| to.n > 0) {
        by_slabs(dev, scratch, &micro, k_steps, left, to, i > 0);
    }
}

fn same_type(c: Shared, x: View<'_>) -> bool {
    matches!((c, x), (Shared::F32(_), View::F32(_)) | (Shared::Bf16(_), View::Bf16(_)))
}

/// One product whose operands are packed slab by slab. Where A is a single slab it is there already if another of the group was before.
fn by_slabs(
    dev: &Cpu,
    scratch: &mut Scratch,
    micro: &Micro,
    k_steps: usize,
    left: Left<'_>,
    to: &Member<'_>,
    another: bool,
) {
    let (Left { a, m, k, .. }, &Member { b, n, .. }) = (left, to);
    let units = micro.units(k.min(k_steps)).max(1);
    let slab = |width: usize| (SLAB_UNITS / units / width).max(1) * width;
    let together = to.together(micro.nr);
    let (ms, ns) = (slab(micro.mr).min(m), slab(together).min(n));
    let several = k > k_steps;
    let packed_a = scratch.a.elems::<u32>(ms.next_multiple_of(micro.mr) * units);
    let packed_b = scratch.b.elems::<u32>(if b.kept.is_some() { 0 } else { ns.next_multiple_of(micro.nr) * units });
    let sum = scratch.sum.elems::<f32>(if several { ms * ns } else { 0 });
    for j0 in (0..n).step_by(ns) {
        let nj = ns.min(n - j0);
        for i0 in (0..m).step_by(ms) {
            let mi = ms.min(m - i0);
            for k0 in (0..k.max(1)).step_by(k_steps) {
                let kk = k_steps.min(k - k0);
                if !(!several && i0 > 0 || b.kept.is_some()) {
                    pack_slab(dev, packed_b, (micro.b, micro.nr), b.rows, (j0, nj), (k0, kk));
                }
                let b = b.kept.map_or(&*packed_b, |kept| kept.panels(j0, k0));
                if !(m <= ms && !several && (j0 > 0 || another)) {
                    pack_slab(dev, packed_a, (micro.a, micro.mr), a, (i0, mi), (k0, kk));
                }
                let panels = Panels { micro: *micro, a: packed_a, b, units: micro.units(kk), together };
                if several {
                    let store = if k0 == 0 { Store::Set } else { Store::Add };
                    let tile = Tile::new(Target::F32(sum.as_mut_ptr()), nj, (mi, nj), 1.0, store);
                    // SAFETY: the tile is the sums, which nothing else uses meanwhile.
                    unsafe { tiles(&dev.pool, &panels, tile, &|_, _| {}) };
                } else {
                    let then = |rows: Range<usize>, columns: Range<usize>| {
                        to.then(i0 + rows.start..i0 + rows.end, j0 + columns.start..j0 + columns.end);
                    };
                    // SAFETY: the tile lies inside C, which nothing else uses meanwhile.
                    unsafe { tiles(&dev.pool, &panels, to.tile(i0, j0, (mi, nj)), &then) };
                }
            }
            if several {
                let sum = &sum[..mi * nj];
                dev.pool.run(mi, &|i| {
                    // SAFETY: row i of this slab of C belongs to this task alone.
                    unsafe { to.finish(dev.level, i0 + i, j0, &sum[i * nj..(i + 1) * nj]) };
                    to.then(i0 + i..i0 + i + 1, j0..j0 + nj);
                });
            }
        }
    }
}

/// Packed slabs of A and B with the same k.
struct Panels<'a> {
    micro: Micro,
    a: &'a [u32],
    b: &'a [u32],
    units: usize,
    /// Tasks have whole groups of so many columns.
    together: usize,
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

/// Computes a tile of any size from packed slabs, in parallel; calls `then` with the rows and columns of each part that is finished.
///
/// # Safety
/// The tile's elements may be read and written, and nothing else uses them meanwhile.
unsafe fn tiles(pool: &Pool, p: &Panels<'_>, tile: Tile, then: &(dyn Fn(Range<usize>, Range<usize>) + Sync)) {
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
    per_j = per_j.next_multiple_of(p.together / nr);
    let (ti, tj) = (mi.div_ceil(per_i), nj.div_ceil(per_j));
    let shared = SharedTile(tile);
    pool.run(ti * tj, &|task| {
        let (i0, j0) = (task / tj * per_i, task % tj * per_j);
        // SAFETY: the panels hold `units` rows (asserted above); tasks write different parts of the tile.
        let part = unsafe {
            let part = shared.get().part(i0 * mr, j0 * nr, per_i * mr, per_j * nr);
            p.micro.block(&p.a[i0 * mr * p.units..], &p.b[j0 * nr * p.units..], p.units, part);
            part
        };
        then(i0 * mr..i0 * mr + part.rows, j0 * nr..j0 * nr + part.cols);
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
