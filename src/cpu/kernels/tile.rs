//! Tiles of C: where a finished sum goes, and what is added to it before it is stored.

use half::bf16;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::ahead;
use crate::cpu::elem::Elem;

/// What happens to a finished tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// `c = sum`.
    Set,
    /// `c = onto + sum`, where `onto` is c itself unless the tile says otherwise.
    Add,
}

/// Elements of C, or of what is added to it.
#[derive(Clone, Copy)]
pub enum Target {
    /// f32 elements.
    F32(*mut f32),
    /// bf16 elements.
    Bf16(*mut bf16),
}

impl Target {
    /// The elements from `at` on.
    ///
    /// # Safety
    /// `at` lies inside what this points to.
    #[inline(always)]
    pub unsafe fn at(self, at: usize) -> Target {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Target::F32(c) => Target::F32(c.add(at)),
                Target::Bf16(c) => Target::Bf16(c.add(at)),
            }
        }
    }
}

/// A tile of C: its first element, the distance between rows, how much of it exists, and what to do with the sum.
#[derive(Clone, Copy)]
pub struct Tile {
    pub target: Target,
    pub stride: usize,
    pub rows: usize,
    pub cols: usize,
    pub alpha: f32,
    pub store: Store,
    /// What [`Store::Add`] adds to, of C's type and with its stride; `None`: C itself. It is read only.
    pub onto: Option<Target>,
    /// A value for each column, added to what would be stored without it. It is read only.
    pub bias: Option<Target>,
}

impl Tile {
    /// A tile without anything added to it but C itself.
    pub fn new(target: Target, stride: usize, (rows, cols): (usize, usize), alpha: f32, store: Store) -> Self {
        Self { target, stride, rows, cols, alpha, store, onto: None, bias: None }
    }

    /// Asks for the tile's lines before its sums are there: rows of C far apart are streams that no processor follows.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[inline(always)]
    pub fn ask(&self) {
        for r in 0..self.rows {
            let row: *const i8 = match self.target {
                Target::F32(c) => c.wrapping_add(r * self.stride).cast(),
                Target::Bf16(c) => c.wrapping_add(r * self.stride).cast(),
            };
            ahead::ask::<1>(row);
            // A row of a tile of AVX-512 is two lines.
            #[cfg(target_arch = "x86_64")]
            ahead::ask::<1>(row.wrapping_add(64));
        }
    }

    /// The part of the tile from (i, j), at most `rows` x `cols` of it.
    ///
    /// # Safety
    /// (i, j) lies inside the tile.
    pub unsafe fn part(self, i: usize, j: usize, rows: usize, cols: usize) -> Tile {
        // SAFETY: the caller's promise; what is added has the tile's places.
        let (target, onto, bias) = unsafe {
            let at = i * self.stride + j;
            (self.target.at(at), self.onto.map(|p| p.at(at)), self.bias.map(|p| p.at(j)))
        };
        Tile { target, onto, bias, rows: rows.min(self.rows - i), cols: cols.min(self.cols - j), ..self }
    }
}

/// Stores a tile that stands in memory as rows of `width`.
///
/// # Safety
/// The tile's elements may be read and written, and what is added to them may be read.
#[inline(always)]
pub unsafe fn store_rows(acc: &[f32], width: usize, t: Tile) {
    for (r, row) in acc.chunks_exact(width).take(t.rows).enumerate() {
        let at = r * t.stride;
        // SAFETY: row r of the tile exists and has `cols` elements, and so has what is added.
        unsafe {
            match (t.target, t.onto) {
                (Target::F32(c), Some(Target::F32(onto))) => store_row(row, c.add(at), onto.add(at), t),
                (Target::F32(c), _) => store_row(row, c.add(at), c.add(at), t),
                (Target::Bf16(c), Some(Target::Bf16(onto))) => store_row(row, c.add(at), onto.add(at), t),
                (Target::Bf16(c), _) => store_row(row, c.add(at), c.add(at), t),
            }
        }
    }
}

/// # Safety
/// `c` has the tile's columns, and so has `onto`, which may be the same.
#[inline(always)]
unsafe fn store_row<E: Elem>(row: &[f32], c: *mut E, onto: *const E, t: Tile) {
    for (j, x) in row.iter().enumerate().take(t.cols) {
        // SAFETY: column j exists.
        unsafe {
            let x = match t.store {
                Store::Set => x * t.alpha,
                Store::Add => (*onto.add(j)).get() + x * t.alpha,
            };
            // The sum is rounded before a bias is added, as if it had been stored.
            *c.add(j) = match t.bias {
                None => E::put(x),
                Some(Target::F32(bias)) => E::put(E::put(x).get() + *bias.add(j)),
                Some(Target::Bf16(bias)) => E::put(E::put(x).get() + (*bias.add(j)).get()),
            };
        }
    }
}
