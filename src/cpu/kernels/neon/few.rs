//! A few rows of A against rows of bf16 as they stand in memory: a token that is decoded reads every weight once, and to write panels first
//! would take longer than to read the weights.
//!
//! Each element is the chain of sums of `bfmmla` over k that the register tile makes, so that a row has the same bits here and there.

use std::arch::aarch64::{
    float32x4_t, vcombine_u16, vdupq_n_f32, vdupq_n_u16, vld1_u16, vld1q_u16, vreinterpretq_u16_u64,
    vreinterpretq_u64_u16, vzip1q_u64, vzip2q_u64,
};

use half::bf16;

use super::{NR, multiply_add, store, unfold};
use crate::cpu::kernels::{FewRows, Tile};

/// Rows of A at most.
pub const ROWS: usize = 4;

/// Steps that are read at a time: two quads.
const STEPS: usize = 8;

/// `tile = or += alpha · A · Bᵀ`: the rows of A that the tile has, at most [`ROWS`]; B's rows of `k` steps, one for each column of the tile,
/// `stride` apart.
///
/// # Safety
/// The processor has bf16, and the tile's elements may be read and written.
pub unsafe fn multiply(a: FewRows<'_>, b: &[bf16], stride: usize, k: usize, tile: Tile) {
    assert!((1..=ROWS).contains(&tile.rows) && tile.cols > 0 && k > 0, "a few rows");
    let last = (k - 1) / 4 * 4;
    assert!(last * a.unit_stride + (tile.rows - 1) * a.row_stride + (k - last) <= a.data.len(), "A is as long");
    assert!((tile.cols - 1) * stride + k <= b.len(), "B is as long");
    for col in (0..tile.cols).step_by(NR) {
        // SAFETY: the caller's promise; the operands have these rows (asserted above).
        unsafe {
            let (part, b) = (tile.part(0, col, tile.rows, NR), b[col * stride..].as_ptr().cast());
            match tile.rows {
                1..=2 => columns::<1>(a, b, stride, k, part),
                _ => columns::<2>(a, b, stride, k, part),
            }
        }
    }
}

/// Adds eight steps: of each pair of A's rows a quad from `at` on and another `quad` elements later, of each row of B eight elements.
///
/// # Safety
/// They may be read, and the processor has bf16.
#[inline]
#[target_feature(enable = "neon,bf16")]
unsafe fn add<const P: usize>(
    sums: &mut [[float32x4_t; NR / 2]; P],
    (a, a_at, quad): (&[[*const u16; 2]; P], usize, usize),
    (b, at): (&[*const u16; NR], usize),
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut x = [[vdupq_n_u16(0); 2]; P];
        for (x, [first, second]) in x.iter_mut().zip(a) {
            for (x, at) in x.iter_mut().zip([a_at, a_at + quad]) {
                *x = vcombine_u16(vld1_u16(first.add(at)), vld1_u16(second.add(at)));
            }
        }
        for q in 0..NR / 2 {
            let even = vreinterpretq_u64_u16(vld1q_u16(b[2 * q].add(at)));
            let odd = vreinterpretq_u64_u16(vld1q_u16(b[2 * q + 1].add(at)));
            let y = [vreinterpretq_u16_u64(vzip1q_u64(even, odd)), vreinterpretq_u16_u64(vzip2q_u64(even, odd))];
            for (sums, x) in sums.iter_mut().zip(x) {
                sums[q] = multiply_add(multiply_add(sums[q], x[0], y[0]), x[1], y[1]);
            }
        }
    }
}

/// # Safety
/// As [`multiply`], for at most 2 P rows and 16 columns.
#[target_feature(enable = "neon,bf16")]
unsafe fn columns<const P: usize>(a: FewRows<'_>, b: *const u16, stride: usize, k: usize, tile: Tile) {
    // Rows and columns that the tile has not are the last ones again, and not stored.
    let a_row = |r: usize| a.data.as_ptr().cast::<u16>().wrapping_add(r.min(tile.rows - 1) * a.row_stride);
    let a_rows: [[*const u16; 2]; P] = std::array::from_fn(|p| [a_row(2 * p), a_row(2 * p + 1)]);
    let b_rows: [*const u16; NR] = std::array::from_fn(|j| b.wrapping_add(j.min(tile.cols - 1) * stride));
    let (quad, full) = (4 * a.unit_stride, k / STEPS * STEPS);
    let mut sums = [[vdupq_n_f32(0.0); NR / 2]; P];
    for at in (0..full).step_by(STEPS) {
        // SAFETY: eight more steps are there. A has a quad for each four of them, so nothing overflows.
        unsafe { add(&mut sums, (&a_rows, at.wrapping_mul(a.unit_stride), quad), (&b_rows, at)) };
    }
    let rest = k - full;
    if rest > 0 {
        // Zeros behind what is left.
        let (mut a_rest, mut b_rest) = ([[[0u16; STEPS]; 2]; P], [[0u16; STEPS]; NR]);
        // SAFETY: so much is left of each row, of A in quads.
        unsafe {
            for (to, from) in a_rest.as_flattened_mut().iter_mut().zip(a_rows.as_flattened()) {
                (0..rest).for_each(|i| to[i] = *from.add(full * a.unit_stride + i / 4 * quad + i % 4));
            }
            for (to, from) in b_rest.iter_mut().zip(b_rows) {
                (0..rest).for_each(|i| to[i] = *from.add(full + i));
            }
            let a_rows = std::array::from_fn(|p| [a_rest[p][0].as_ptr(), a_rest[p][1].as_ptr()]);
            let b_rows = std::array::from_fn(|j| b_rest[j].as_ptr());
            add(&mut sums, (&a_rows, 0, 4), (&b_rows, 0));
        }
    }
    // SAFETY: the caller's promise about the tile.
    unsafe { store(sums.map(|sums| unfold(sums)).as_flattened(), tile) };
}
