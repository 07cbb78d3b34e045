//! What the forward and backward passes of attention share: documents, blocks, packing, memory of a task.
//!
//! Blocks of queries and keys are counted from the start of their document, so a document's result is the same bits
//! wherever it lies in the micro-batch and whatever lies beside it.

use std::cell::RefCell;
use std::ops::Range;

use super::Cpu;
use super::buffer::{Grow, elems};
use super::elem::Elem;
use super::kernels::{Micro, Store, Target, Tile};
use super::level::{Level, multiversion};
use super::pack::{Operand, Unit, pack_panel};
use crate::backend::{Attention, Heads, Mask};

/// What attention reads, as slices; see [`Attention`].
#[derive(Clone, Copy)]
pub struct Inputs<'a, E> {
    pub q: &'a [E],
    pub k: &'a [E],
    pub v: &'a [E],
    pub doc_start: &'a [i32],
    pub heads: Heads,
    pub mask: Mask,
}

impl<'a, E: Elem> Inputs<'a, E> {
    pub fn new(x: Attention<'a, Cpu>) -> Self {
        let Attention { q, k, v, batch, heads, mask } = x;
        Self { q: elems(q), k: elems(k), v: elems(v), doc_start: elems(&batch.doc_start), heads, mask }
    }
}

/// What backward reads besides.
#[derive(Clone, Copy)]
pub struct Results<'a, E> {
    pub dout: &'a [E],
    pub out: &'a [E],
    pub lse: &'a [f32],
}

/// One document of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document {
    pub start: usize,
    pub len: usize,
}

/// The documents, in order.
pub fn documents(doc_start: &[i32]) -> Vec<Document> {
    let mut docs: Vec<Document> = vec![];
    for (i, &start) in doc_start.iter().enumerate() {
        match docs.last_mut() {
            Some(doc) if doc.start as i64 == i64::from(start) => doc.len += 1,
            _ => {
                assert_eq!(i64::from(start), i as i64, "doc_start: a document begins at {i}");
                docs.push(Document { start: i, len: 1 });
            }
        }
    }
    docs
}

/// The setting of one pass.
#[derive(Clone, Copy)]
pub struct Pass {
    pub level: Level,
    pub micro: Micro,
    pub heads: Heads,
    pub window: usize,
    /// `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Queries of a block: whole register tiles at every level but the 6-row one.
    pub queries: usize,
    /// Keys of a block, a multiple of the queries and of the tile's width.
    pub keys: usize,
}

impl Pass {
    pub fn new<E: Elem>(level: Level, heads: Heads, mask: Mask) -> Self {
        let micro = Micro::new(level, E::DTYPE == crate::tensor::DType::Bf16);
        let scale = 1.0 / (heads.head_dim as f32).sqrt();
        let (queries, keys) = if micro.mr == 32 { (64, 256) } else { (56, 224) };
        Self { level, micro, heads, window: mask.window.unwrap_or(usize::MAX), scale, queries, keys }
    }

    /// Keys that query `i` of a document sees, counted in the document.
    pub fn keys_of(&self, i: usize) -> Range<usize> {
        (i + 1).saturating_sub(self.window)..i + 1
    }

    /// The same inside the block of keys `block`, counted from the block's start.
    pub fn keys_in(&self, i: usize, block: &Range<usize>) -> Range<usize> {
        let keys = self.keys_of(i);
        let from = keys.start.clamp(block.start, block.end) - block.start;
        from..(keys.end.clamp(block.start, block.end) - block.start).max(from)
    }

    /// The blocks of keys that the queries `rows` see; the last one ends at the last query.
    pub fn key_blocks(&self, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let (first, keys) = (self.keys_of(rows.start).start / self.keys, self.keys);
        (first..rows.end.div_ceil(keys)).map(move |b| b * keys..((b + 1) * keys).min(rows.end))
    }

    /// Units of an A operand of `rows` x `k`.
    pub fn a_units(&self, rows: usize, k: usize) -> usize {
        rows.next_multiple_of(self.micro.mr) * self.micro.units(k)
    }

    /// Units of a B operand of `cols` x `k`.
    pub fn b_units(&self, cols: usize, k: usize) -> usize {
        cols.next_multiple_of(self.micro.nr) * self.micro.units(k)
    }

    /// Packs an A operand: `rows` of the major axis, `k` steps from `k0`.
    pub fn pack_a(&self, dst: &mut [u32], src: Operand<'_>, first: usize, rows: usize, k0: usize, k: usize) {
        self.pack(dst, (self.micro.a, self.micro.mr), src, (first, rows), (k0, k));
    }

    /// Packs a B operand.
    pub fn pack_b(&self, dst: &mut [u32], src: Operand<'_>, first: usize, cols: usize, k0: usize, k: usize) {
        self.pack(dst, (self.micro.b, self.micro.nr), src, (first, cols), (k0, k));
    }

    fn pack(
        &self,
        dst: &mut [u32],
        (unit, width): (Unit, usize),
        src: Operand<'_>,
        majors: (usize, usize),
        ks: (usize, usize),
    ) {
        let size = width * unit.count(ks.1);
        for (i, panel) in dst.chunks_exact_mut(size).take(majors.1.div_ceil(width)).enumerate() {
            let have = width.min(majors.1 - i * width);
            pack_panel(self.level, panel, unit, width, src, majors.0 + i * width, have, ks.0, ks.1);
        }
    }

    /// `c (+)= alpha · A · B` for packed operands; rows of c lie `stride` apart.
    #[allow(clippy::too_many_arguments)]
    pub fn multiply(
        &self,
        c: &mut [f32],
        stride: usize,
        rows: usize,
        cols: usize,
        a: &[u32],
        b: &[u32],
        k: usize,
        alpha: f32,
        store: Store,
    ) {
        let units = self.micro.units(k);
        assert!(
            rows > 0 && cols <= stride && (rows - 1) * stride + cols <= c.len(),
            "the product fits its destination"
        );
        assert!(self.a_units(rows, k) <= a.len() && self.b_units(cols, k) <= b.len(), "the operands are packed");
        let tile = Tile::new(Target::F32(c.as_mut_ptr()), stride, (rows, cols), alpha, store);
        // SAFETY: the destination and the panels are as large as needed (asserted above).
        unsafe { self.micro.block(a, b, units, tile) };
    }
}

/// One head of the rows of a document.
#[derive(Clone, Copy)]
pub struct HeadRows<'a, E> {
    x: &'a [E],
    /// From a row to the next.
    width: usize,
    dim: usize,
}

impl<'a, E: Elem> HeadRows<'a, E> {
    /// Head `head`, `dim` wide, of the rows from `start` of a tensor with `width` columns.
    pub fn new(x: &'a [E], width: usize, start: usize, head: usize, dim: usize) -> Self {
        Self { x: &x[start * width + head * dim..], width, dim }
    }

    /// Row `i` of the document.
    pub fn row(&self, i: usize) -> &'a [E] {
        &self.x[i * self.width..][..self.dim]
    }

    /// Rows are the major axis.
    pub fn rows(&self) -> Operand<'a> {
        Operand { data: E::view(self.x), major_stride: self.width, k_stride: 1 }
    }

    /// Columns are the major axis, rows lie along k.
    fn columns(&self) -> Operand<'a> {
        Operand { data: E::view(self.x), major_stride: 1, k_stride: self.width }
    }
}

impl Pass {
    /// Packs columns as a B operand, `count` rows from `first` along k, with zero for what is not finite: pairs that do not see each other
    /// are a factor of 0 in such a product, and 0 · NaN is NaN. Gives whether there was any, which [`add_not_finite`] then adds where it is
    /// seen.
    pub fn pack_columns<E: Elem>(&self, dst: &mut [u32], x: HeadRows<'_, E>, first: usize, count: usize) -> bool {
        let rows = || (first..first + count).map(|i| x.row(i));
        if rows().all(|row| all_finite(self.level, row)) {
            self.pack_b(dst, x.columns(), 0, x.dim, first, count);
            return false;
        }
        let zero = |x: &E| if x.get().is_finite() { *x } else { E::put(0.0) };
        let finite: Vec<E> = rows().flatten().map(zero).collect();
        let finite = HeadRows { x: &finite, width: x.dim, dim: x.dim };
        self.pack_b(dst, finite.columns(), 0, x.dim, 0, count);
        true
    }
}

multiversion! {
    fn all_finite[E: Elem](x: &[E]) -> bool {
        // No early end, so that it is done in vectors.
        !x.iter().fold(false, |odd, x| odd | !x.get().is_finite())
    }
}

multiversion! {
    /// `out += by · x` in the elements of x that are not finite.
    pub fn add_not_finite[E: Elem](out: &mut [f32], x: &[E], by: f32) {
        for (out, x) in out.iter_mut().zip(x) {
            let x = x.get();
            *out = if x.is_finite() { *out } else { *out + by * x };
        }
    }
}

thread_local! {
    /// Memory of the task a thread runs; grows to what the largest one needs.
    static TASK_MEMORY: RefCell<Grow> = RefCell::new(Grow::default());
}

/// Calls `f` with pieces of this thread's memory, of the given numbers of four-byte units, each aligned to a cache line.
/// Their values are whatever they were.
pub fn with_memory<const N: usize, R>(sizes: [usize; N], f: impl FnOnce([&mut [u32]; N]) -> R) -> R {
    TASK_MEMORY.with_borrow_mut(|memory| {
        let total = sizes.iter().map(|s| s.next_multiple_of(16)).sum();
        let mut rest = memory.elems::<u32>(total);
        f(sizes.map(|size| {
            let (piece, tail) = std::mem::take(&mut rest).split_at_mut(size.next_multiple_of(16));
            rest = tail;
            &mut piece[..size]
        }))
    })
}

/// A piece of a task's memory as numbers.
pub fn floats(x: &mut [u32]) -> &mut [f32] {
    bytemuck::cast_slice_mut(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_and_visible_keys() {
        let doc = |start, len| Document { start, len };
        assert_eq!(documents(&[0, 0, 0, 3, 4, 4]), [doc(0, 3), doc(3, 1), doc(4, 2)]);
        assert!(documents(&[]).is_empty());
        let heads = Heads { n_query: 1, n_kv: 1, head_dim: 8 };
        let pass = Pass::new::<f32>(Level::Portable, heads, Mask { window: Some(3) });
        assert_eq!(pass.keys_of(0), 0..1);
        assert_eq!(pass.keys_of(9), 7..10);
        assert_eq!(pass.keys_in(9, &(8..20)), 0..2);
        assert!(pass.keys_in(9, &(20..30)).is_empty() && pass.keys_in(9, &(0..4)).is_empty());
        let blocks: Vec<_> = pass.key_blocks(448..500).collect();
        assert_eq!(blocks, [224..448, 448..500]);
    }
}
