//! A few rows of A against rows of bf16 as they stand in memory: a token that is decoded reads every weight once, and to write panels
//! first would take longer than to read the weights.
//!
//! Each element is the chain of sums of `vdpbf16ps` over k that the register tile makes, so that a row has the same bits here and there.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_setzero_si512,
};

use half::bf16;

use super::{FewRows, Tile};
use crate::cpu::pack::avx512::{Load, PairBf16, ahead, transpose};

/// Rows of A at most.
pub const ROWS: usize = 4;

/// Columns of C that are formed side by side.
const COLUMNS: usize = 16;

/// `tile = or += alpha · A · Bᵀ`: the rows of A that the tile has, at most [`ROWS`]; B's rows of `k` steps, one for each column of the tile,
/// `stride` apart. While columns are formed the rows of the next ones are asked for, at last those of `next`.
///
/// # Safety
/// The processor has AVX-512 with bf16, and the tile's elements may be read and written.
pub unsafe fn multiply(a: FewRows<'_>, b: &[bf16], stride: usize, k: usize, tile: Tile, next: &[bf16]) {
    assert!((1..=ROWS).contains(&tile.rows) && tile.cols > 0 && k > 0, "a few rows");
    let last_unit = (k.div_ceil(2) - 1) * 2 * a.unit_stride + (tile.rows - 1) * a.row_stride;
    assert!(last_unit + 2 <= a.data.len() && (tile.cols - 1) * stride + k <= b.len(), "the operands are as long");
    for col in (0..tile.cols).step_by(COLUMNS) {
        // SAFETY: the caller's promise; the operands have these rows (asserted above).
        unsafe {
            let part = tile.part(0, col, tile.rows, COLUMNS);
            let after = if col + COLUMNS < tile.cols { &b[(col + COLUMNS) * stride..] } else { next };
            let b = &b[col * stride..];
            match tile.rows {
                1 => columns::<1>(a, b, stride, k, part, after),
                2 => columns::<2>(a, b, stride, k, part, after),
                3 => columns::<3>(a, b, stride, k, part, after),
                _ => columns::<ROWS>(a, b, stride, k, part, after),
            }
        }
    }
}

/// # Safety
/// As [`multiply`], for M rows and at most 16 columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn columns<const M: usize>(a: FewRows<'_>, b: &[bf16], stride: usize, k: usize, tile: Tile, next: &[bf16]) {
    let (units, b) = (k.div_ceil(2), b.as_ptr());
    // Memory that nobody reads soon, or that is not there, is not asked for: it would cost as much. Where rows lie side by side it is asked for
    // from front to back, a stream that the processor follows; in other places along 16 rows.
    let (next, asks) = (next.as_ptr(), next.len() >= (COLUMNS - 1) * stride + k);
    let side_by_side = stride == k;
    let mut sums = [_mm512_setzero_ps(); M];
    for first in (0..units).step_by(16) {
        let mut rows = [_mm512_setzero_si512(); 16];
        for (r, row) in rows.iter_mut().enumerate().take(tile.cols) {
            let at = r * stride + 2 * first;
            if asks {
                ahead(next.wrapping_add(if side_by_side { COLUMNS * 2 * first + 32 * r } else { at }));
            }
            // SAFETY: row r of B exists and has so many more steps from here.
            *row = unsafe { PairBf16::along_k(b.add(at), k - 2 * first) };
        }
        for (u, y) in transpose(rows).into_iter().enumerate().take(units - first) {
            for (r, sum) in sums.iter_mut().enumerate() {
                // SAFETY: A has unit `first + u` of row r, at any address. The transmutes change the type of a vector only.
                unsafe {
                    let at = a.data.as_ptr().add((first + u) * 2 * a.unit_stride + r * a.row_stride);
                    let x = _mm512_set1_epi32(at.cast::<i32>().read_unaligned());
                    let pair = |v| std::mem::transmute::<__m512i, __m512bh>(v);
                    *sum = _mm512_dpbf16_ps(*sum, pair(x), pair(y));
                }
            }
        }
    }
    for (r, sum) in sums.into_iter().enumerate() {
        // SAFETY: the tile has M rows.
        unsafe { super::avx512::store_vector(sum, r, 0, tile) };
    }
}
