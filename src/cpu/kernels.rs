//! Micro-kernels: one register tile of C from one panel of A and one of B.
//!
//! Each element of C is one chain of sums over k, the same at every place of the tile and for every tile height. So a row of
//! a product depends neither on its index nor on how many rows there are.

mod ahead;
#[cfg(target_arch = "x86_64")]
pub mod amx;
#[cfg(target_arch = "x86_64")]
mod few;
#[cfg(target_arch = "aarch64")]
pub mod neon;
mod tile;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::elem::View;
use super::elementwise::piece;
use super::level::Level;
use super::pack::{Operand, Unit};

use tile::store_rows;
pub use tile::{Store, Target, Tile};

/// `tile = or += alpha · panel of A · panel of B`. Safe where `a` points to `units · mr` and `b` to `units · nr` units, the tile's
/// `rows <= mr` and `cols <= nr` elements may be read and written, and the processor has the level.
type Kernel = unsafe fn(units: usize, a: *const u32, b: *const u32, tile: Tile);

/// A register tile: its size, what its panels hold, and the code.
#[derive(Clone, Copy)]
pub struct Micro {
    /// Rows of the tile: width of A's panels.
    pub mr: usize,
    /// Columns of the tile: width of B's panels.
    pub nr: usize,
    /// What A's panels hold.
    pub a: Unit,
    /// What B's panels hold: as many units for so many steps of k.
    pub b: Unit,
    /// Units of A that one block of C reads again and again: they stay in the L2 cache.
    pub block_units: usize,
    code: Code,
}

/// What computes a block of C from panels.
#[derive(Clone, Copy)]
enum Code {
    /// A kernel for one register tile.
    Kernel(Kernel),
    /// AMX: whole blocks, see [`amx::block`](amx::block).
    #[cfg(target_arch = "x86_64")]
    Tiles,
}

/// A few rows of A as pairs of bf16: units of a row lie `unit_stride` apart, rows `row_stride` elements of bf16. For panels of quads the same,
/// but the two units of a quad lie side by side, and quads twice as far apart.
#[derive(Clone, Copy)]
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    expect(dead_code, reason = "no kernel reads rows as they stand")
)]
pub struct FewRows<'a> {
    pub data: &'a [half::bf16],
    pub unit_stride: usize,
    pub row_stride: usize,
}

/// Units of A in a block (256 KiB) where the L2 cache has 512 KiB or 1 MiB.
const BLOCK_UNITS: usize = 1 << 16;

impl Micro {
    /// The tile for products of two f32 operands (`bf16 == false`) or with at least one of bf16.
    pub fn new(level: Level, bf16: bool) -> Self {
        let single = if bf16 { Unit::Rounded } else { Unit::Single };
        let of = |(mr, nr), unit, kernel| Self {
            mr,
            nr,
            a: unit,
            b: unit,
            block_units: BLOCK_UNITS,
            code: Code::Kernel(kernel),
        };
        #[cfg(target_arch = "x86_64")]
        match level {
            Level::Amx if bf16 => {
                // The processors that have tiles have an L2 cache of 2 MiB: half of it for A, since B's panels come from beyond.
                let (side, block_units) = (amx::SIDE, 4 * BLOCK_UNITS);
                return Self {
                    mr: side,
                    nr: side,
                    a: Unit::RowTile,
                    b: Unit::PairTile,
                    block_units,
                    code: Code::Tiles,
                };
            }
            Level::Avx512Bf16 if bf16 => return of((14, 32), Unit::Pair, avx512::bf16_tile),
            Level::Avx512 | Level::Avx512Bf16 | Level::Amx => return of((14, 32), single, avx512::f32_tile),
            Level::Avx2 => return of((6, 16), single, avx2::f32_tile),
            Level::Portable | Level::Neon | Level::NeonBf16 => {}
        }
        #[cfg(target_arch = "aarch64")]
        match level {
            Level::NeonBf16 if bf16 => return of((6, 16), Unit::Quad, neon::bf16_tile),
            Level::Neon | Level::NeonBf16 => return of((6, 16), single, neon::f32_tile),
            _ => {}
        }
        let _ = level;
        of((4, 8), single, portable::f32_tile)
    }

    /// Units of a panel's row for `k` steps.
    pub fn units(&self, k: usize) -> usize {
        self.a.count(k)
    }

    /// Panels of A at most in a [`Micro::block`] of so many units.
    pub fn most_panels(&self, units: usize) -> usize {
        let most = (self.block_units / (self.mr * units).max(1)).max(1);
        match self.code {
            Code::Kernel(_) => most,
            #[cfg(target_arch = "x86_64")]
            Code::Tiles => most.min(amx::MOST_PANELS),
        }
    }

    /// Rows of A at most that [`Micro::few_rows`] multiplies with such a B; none where it has no code for it.
    pub fn few(&self, b: Operand<'_>) -> usize {
        match (b.data, self.b) {
            #[cfg(target_arch = "x86_64")]
            (View::Bf16(_), Unit::Pair) if b.k_stride == 1 => few::ROWS,
            #[cfg(target_arch = "aarch64")]
            (View::Bf16(_), Unit::Quad) if b.k_stride == 1 => neon::few::ROWS,
            _ => 0,
        }
    }

    /// `tile = or += alpha · A · Bᵀ` for a few rows of A, from rows of B as they stand in memory, so far apart: those of the tile's columns, at
    /// steps `k0 ..`. Meanwhile the rows that are read `next` are asked for. Where [`Micro::few`] says that there is code for it.
    ///
    /// # Safety
    /// The tile's elements may be read and written, and the processor has the level this was made for.
    pub unsafe fn few_rows(
        &self,
        a: FewRows<'_>,
        (b, stride): (&[half::bf16], usize),
        (k0, k): (usize, usize),
        tile: Tile,
        next: &[half::bf16],
    ) {
        assert!(matches!(self.b, Unit::Pair | Unit::Quad), "panels of pairs are those of levels with bf16");
        // SAFETY: the caller's promise; the level has the instructions (asserted above).
        #[cfg(target_arch = "x86_64")]
        unsafe {
            few::multiply(a, &b[k0..], stride, k, tile, next);
        }
        // SAFETY: as above; nothing is asked for ahead.
        #[cfg(target_arch = "aarch64")]
        unsafe {
            neon::few::multiply(a, &b[k0..], stride, k, tile);
        }
        let _ = (a, b, stride, k0, k, tile, next);
    }

    /// `tile = or += alpha · A · B` from panels of `units` units, on this thread.
    ///
    /// # Safety
    /// `a` and `b` hold the panels that the tile's rows and columns need, the tile's elements may be read and written, and the
    /// processor has the level this was made for.
    pub unsafe fn block(&self, a: &[u32], b: &[u32], units: usize, tile: Tile) {
        // SAFETY: the caller's promise.
        unsafe { self.block_before(a, b, units, tile, &[]) };
    }

    /// [`Micro::block`], and asks meanwhile for the memory of the panel that is read `next`.
    ///
    /// # Safety
    /// As [`Micro::block`].
    pub unsafe fn block_before(&self, a: &[u32], b: &[u32], units: usize, tile: Tile, next: &[u32]) {
        let Self { mr, nr, .. } = *self;
        let kernel = match self.code {
            Code::Kernel(kernel) => kernel,
            #[cfg(target_arch = "x86_64")]
            Code::Tiles => {
                ask(next);
                let rows = mr * amx::MOST_PANELS;
                for i in (0..tile.rows).step_by(rows) {
                    // SAFETY: the caller's promise.
                    unsafe { amx::block(&a[i * units..], b, units, tile.part(i, 0, rows, tile.cols)) };
                }
                return;
            }
        };
        let (high, wide) = (tile.rows.div_ceil(mr), tile.cols.div_ceil(nr));
        // A few panels of A are over sooner than so much memory arrives.
        let next = if high < 4 { &[] } else { next };
        let mut parts = next.chunks(next.len().div_ceil((high * wide).max(1)).next_multiple_of(LINE).max(LINE));
        for j in 0..wide {
            let b = piece(b, j, nr * units).as_ptr();
            for i in 0..high {
                ask(parts.next().unwrap_or(&[]));
                let a = piece(a, i, mr * units).as_ptr();
                // SAFETY: the caller's promise; the part is a register tile.
                unsafe { kernel(units, a, b, tile.part(i * mr, j * nr, mr, nr)) };
            }
        }
    }
}

/// Units in a line of a cache.
const LINE: usize = 16;

/// Asks for memory that is read soon.
#[inline(always)]
fn ask(memory: &[u32]) {
    memory.chunks(LINE).for_each(|line| ahead::ask::<2>(line.as_ptr()));
}

mod portable {
    use super::{Tile, store_rows};

    const MR: usize = 4;
    const NR: usize = 8;

    /// # Safety
    /// As `Kernel`.
    pub unsafe fn f32_tile(units: usize, a: *const u32, b: *const u32, tile: Tile) {
        // SAFETY: the panels hold `units` rows of MR and NR units, each the bits of an f32.
        let (a, b) = unsafe {
            (
                std::slice::from_raw_parts(a.cast::<f32>(), units * MR),
                std::slice::from_raw_parts(b.cast::<f32>(), units * NR),
            )
        };
        let mut acc = [0.0f32; MR * NR];
        for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(NR)) {
            for (acc, &a) in acc.chunks_exact_mut(NR).zip(a) {
                for (acc, &b) in acc.iter_mut().zip(b) {
                    *acc += a * b;
                }
            }
        }
        // SAFETY: the caller's promise about the tile.
        unsafe { store_rows(&acc, NR, tile) };
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{Tile, store_rows};
    use std::arch::x86_64::{
        _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };

    const MR: usize = 6;
    const NR: usize = 16;

    /// # Safety
    /// As `Kernel`.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn f32_tile(units: usize, a: *const u32, b: *const u32, tile: Tile) {
        let (mut a, mut b) = (a.cast::<f32>(), b.cast::<f32>());
        let mut acc = [[_mm256_setzero_ps(); 2]; MR];
        for _ in 0..units {
            // SAFETY: the panels hold `units` rows of MR and NR units.
            unsafe {
                let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*a.add(r));
                    acc[0] = _mm256_fmadd_ps(x, b0, acc[0]);
                    acc[1] = _mm256_fmadd_ps(x, b1, acc[1]);
                }
                (a, b) = (a.add(MR), b.add(NR));
            }
        }
        let mut rows = [0.0f32; MR * NR];
        for (row, acc) in rows.chunks_exact_mut(NR).zip(acc) {
            // SAFETY: a row has 16 elements.
            unsafe {
                _mm256_storeu_ps(row.as_mut_ptr(), acc[0]);
                _mm256_storeu_ps(row.as_mut_ptr().add(8), acc[1]);
            }
        }
        // SAFETY: the caller's promise about the tile.
        unsafe { store_rows(&rows, NR, tile) };
    }
}

#[cfg(target_arch = "x86_64")]
use avx512::store_sums;

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Store, Target, Tile};
    use crate::cpu::pack::avx512::round_bf16;
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm256_mask_storeu_epi16, _mm256_maskz_loadu_epi16, _mm512_add_ps,
        _mm512_castsi512_ps, _mm512_cvtepi32_epi16, _mm512_cvtepu16_epi32, _mm512_dpbf16_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_mul_ps,
        _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32,
    };

    const MR: usize = 14;
    const NR: usize = 32;

    /// Steps of the inner loop from which on there is time to fetch the tile of C before it is needed.
    const PREFETCH_UNITS: usize = 64;

    /// Chooses the height and the number of vectors that hold the tile; the sums are the same for each.
    macro_rules! by_size {
        ($kernel:ident, $units:expr, $a:expr, $b:expr, $tile:expr) => {
            // SAFETY: the caller's promise, and a tile at least as high and as wide as asked for.
            unsafe {
                match ($tile.rows, $tile.cols > 16) {
                    (0..=1, false) => $kernel::<1, 1>($units, $a, $b, $tile),
                    (0..=1, true) => $kernel::<1, 2>($units, $a, $b, $tile),
                    (2..=4, false) => $kernel::<4, 1>($units, $a, $b, $tile),
                    (2..=4, true) => $kernel::<4, 2>($units, $a, $b, $tile),
                    (5..=8, false) => $kernel::<8, 1>($units, $a, $b, $tile),
                    (5..=8, true) => $kernel::<8, 2>($units, $a, $b, $tile),
                    (_, false) => $kernel::<MR, 1>($units, $a, $b, $tile),
                    (_, true) => $kernel::<MR, 2>($units, $a, $b, $tile),
                }
            }
        };
    }

    /// # Safety
    /// As `Kernel`.
    pub unsafe fn f32_tile(units: usize, a: *const u32, b: *const u32, tile: Tile) {
        by_size!(f32_sized, units, a, b, tile);
    }

    /// # Safety
    /// As `Kernel`.
    pub unsafe fn bf16_tile(units: usize, a: *const u32, b: *const u32, tile: Tile) {
        by_size!(bf16_sized, units, a, b, tile);
    }

    /// # Safety
    /// As `Kernel`, with `rows <= M` and `cols <= 16 V`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn f32_sized<const M: usize, const V: usize>(units: usize, a: *const u32, b: *const u32, tile: Tile) {
        let (mut a, mut b) = (a.cast::<f32>(), b.cast::<f32>());
        if units >= PREFETCH_UNITS {
            tile.ask();
        }
        let mut acc = [[_mm512_setzero_ps(); V]; M];
        for _ in 0..units {
            // SAFETY: the panels hold `units` rows of MR >= M and NR >= 16 V units.
            unsafe {
                let mut y = [_mm512_setzero_ps(); V];
                for (v, y) in y.iter_mut().enumerate() {
                    *y = _mm512_loadu_ps(b.add(16 * v));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(r));
                    for (acc, y) in acc.iter_mut().zip(y) {
                        *acc = _mm512_fmadd_ps(x, y, *acc);
                    }
                }
                (a, b) = (a.add(MR), b.add(NR));
            }
        }
        // SAFETY: the caller's promise about the tile.
        unsafe { store(&acc, tile) };
    }

    /// # Safety
    /// As `Kernel`, with `rows <= M` and `cols <= 16 V`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn bf16_sized<const M: usize, const V: usize>(units: usize, a: *const u32, b: *const u32, tile: Tile) {
        let (mut a, mut b) = (a.cast::<i32>(), b.cast::<i32>());
        if units >= PREFETCH_UNITS {
            tile.ask();
        }
        let mut acc = [[_mm512_setzero_ps(); V]; M];
        for _ in 0..units {
            // SAFETY: the panels hold `units` rows of MR >= M and NR >= 16 V units. The transmutes change the type of a
            // 64-byte vector only.
            unsafe {
                let mut y = [std::mem::transmute::<__m512, __m512bh>(_mm512_setzero_ps()); V];
                for (v, y) in y.iter_mut().enumerate() {
                    *y = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.add(16 * v).cast()));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*a.add(r)));
                    for (acc, y) in acc.iter_mut().zip(y) {
                        *acc = _mm512_dpbf16_ps(*acc, x, y);
                    }
                }
                (a, b) = (a.add(MR), b.add(NR));
            }
        }
        // SAFETY: the caller's promise about the tile.
        unsafe { store(&acc, tile) };
    }

    /// Stores the rows and columns of the tile that exist.
    ///
    /// # Safety
    /// As `Kernel`, with `rows <= M` and `cols <= 16 V`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn store<const M: usize, const V: usize>(acc: &[[__m512; V]; M], t: Tile) {
        for (r, acc) in acc.iter().enumerate() {
            if r >= t.rows {
                break;
            }
            for (v, &sum) in acc.iter().enumerate() {
                // SAFETY: row r of the tile exists.
                unsafe { store_vector(sum, r, 16 * v, t) };
            }
        }
    }

    /// Stores a tile that stands in memory as rows of `width` sums.
    ///
    /// # Safety
    /// The processor has AVX-512, `sums` has the tile's rows, and the tile's elements may be read and written.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn store_sums(sums: &[f32], width: usize, t: Tile) {
        assert!(t.cols <= width && t.rows * width <= sums.len() && width.is_multiple_of(16), "the sums of a tile");
        for r in 0..t.rows {
            for col in (0..t.cols).step_by(16) {
                // SAFETY: 16 sums from this column of row r exist (asserted above); so does the tile's row.
                unsafe { store_vector(_mm512_loadu_ps(sums.as_ptr().add(r * width + col)), r, col, t) };
            }
        }
    }

    /// Stores 16 sums of row `r` from column `col`, as many as the tile has.
    ///
    /// # Safety
    /// Row `r` of the tile may be read and written.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn store_vector(sum: __m512, r: usize, col: usize, t: Tile) {
        let have = t.cols.saturating_sub(col).min(16);
        let mask = ((1u32 << have) - 1) as u16;
        let mut x = _mm512_mul_ps(sum, _mm512_set1_ps(t.alpha));
        let at = r * t.stride + col;
        // SAFETY: the mask covers the `have` columns that exist, of C, of what is added to and of the bias.
        unsafe {
            if t.store == Store::Add {
                x = _mm512_add_ps(x, load_vector(t.onto.unwrap_or(t.target).at(at), mask));
            }
            if let Some(bias) = t.bias {
                // The sum is rounded before a bias is added, as if it had been stored.
                if let Target::Bf16(_) = t.target {
                    x = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(round_bf16(x)));
                }
                x = _mm512_add_ps(x, load_vector(bias.at(col), mask));
            }
            match t.target.at(at) {
                Target::F32(c) => _mm512_mask_storeu_ps(c, mask, x),
                Target::Bf16(c) => _mm256_mask_storeu_epi16(c.cast(), mask, _mm512_cvtepi32_epi16(round_bf16(x))),
            }
        }
    }

    /// The elements under the mask, widened.
    ///
    /// # Safety
    /// They may be read.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_vector(p: Target, mask: u16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            match p {
                Target::F32(p) => _mm512_maskz_loadu_ps(mask, p),
                Target::Bf16(p) => {
                    let bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
                }
            }
        }
    }
}
