//! Packing with 512-bit vectors, for panels of 14 and 32. The same units as the portable code of `pack`, except that numbers
//! too small to be normal become zero where f32 is rounded to pairs (`vcvtne2ps2bf16`).

use half::bf16;
use std::arch::x86_64::{
    __m256i, __m512bh, __m512i, _mm256_maskz_loadu_epi16, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh,
    _mm512_mask_storeu_epi32, _mm512_maskz_loadu_epi16, _mm512_maskz_loadu_epi32, _mm512_maskz_loadu_ps,
    _mm512_or_si512, _mm512_permutexvar_epi16, _mm512_set_epi16, _mm512_setzero_si512, _mm512_shuffle_i32x4,
    _mm512_slli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
    _mm512_unpacklo_epi64,
};

/// How source elements become vectors of units.
pub trait Load {
    type Source;
    /// Steps of k in a unit.
    const STEPS: usize;

    /// Up to 16 units from neighbouring steps of one row; `steps` of them exist.
    ///
    /// # Safety
    /// `p` points to `steps` elements; the processor has AVX-512 with bf16.
    unsafe fn along_k(p: *const Self::Source, steps: usize) -> __m512i;

    /// Up to 16 units from neighbouring rows; `odd` is null where the second step does not exist.
    ///
    /// # Safety
    /// `even` and `odd` point to `rows` elements; the processor has AVX-512 with bf16.
    unsafe fn across_rows(even: *const Self::Source, odd: *const Self::Source, rows: usize) -> __m512i;
}

/// f32 as it is.
pub struct SingleF32;
/// Pairs of bf16 from bf16.
pub struct PairBf16;
/// Pairs of bf16 from f32.
pub struct PairF32;

fn lanes16(n: usize) -> u16 {
    ((1u32 << n.min(16)) - 1) as u16
}

impl Load for SingleF32 {
    type Source = f32;
    const STEPS: usize = 1;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn along_k(p: *const f32, steps: usize) -> __m512i {
        // SAFETY: the mask covers the elements that exist.
        unsafe { _mm512_maskz_loadu_epi32(lanes16(steps), p.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn across_rows(even: *const f32, _: *const f32, rows: usize) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_maskz_loadu_epi32(lanes16(rows), even.cast()) }
    }
}

impl Load for PairBf16 {
    type Source = bf16;
    const STEPS: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn along_k(p: *const bf16, steps: usize) -> __m512i {
        let mask = if steps >= 32 { !0 } else { (1u32 << steps) - 1 };
        // SAFETY: the mask covers the elements that exist.
        unsafe { _mm512_maskz_loadu_epi16(mask, p.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn across_rows(even: *const bf16, odd: *const bf16, rows: usize) -> __m512i {
        let mask = lanes16(rows);
        // SAFETY: the mask covers the elements that exist.
        let load = |p: *const bf16| -> __m256i { unsafe { _mm256_maskz_loadu_epi16(mask, p.cast()) } };
        let low = _mm512_cvtepu16_epi32(load(even));
        if odd.is_null() {
            return low;
        }
        _mm512_or_si512(low, _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load(odd))))
    }
}

impl Load for PairF32 {
    type Source = f32;
    const STEPS: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn along_k(p: *const f32, steps: usize) -> __m512i {
        // SAFETY: the masks cover the elements that exist; the transmute changes the type of a vector only.
        unsafe {
            let low = _mm512_maskz_loadu_ps(lanes16(steps), p);
            let high = _mm512_maskz_loadu_ps(lanes16(steps.saturating_sub(16)), p.wrapping_add(16));
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn across_rows(even: *const f32, odd: *const f32, rows: usize) -> __m512i {
        let mask = lanes16(rows);
        // SAFETY: the masks cover the elements that exist; the transmute changes the type of a vector only.
        unsafe {
            let even = _mm512_maskz_loadu_ps(mask, even);
            let odd = _mm512_maskz_loadu_ps(if odd.is_null() { 0 } else { mask }, odd);
            let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
            // Words 0..16 are even steps, 16..32 odd ones: interleave them.
            let order = _mm512_set_epi16(
                31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2,
                17, 1, 16, 0,
            );
            _mm512_permutexvar_epi16(order, halves)
        }
    }
}

/// Transposes 16 x 16 lanes of four bytes: by pairs of lanes, of pairs, and twice by quarters of vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut pairs = rows;
    for i in (0..16).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // quads[4 i + j] holds column 4 q + j of rows 4 i .. 4 i + 4 in its quarter q.
    let mut quads = pairs;
    for i in (0..16).step_by(4) {
        quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    let mut out = rows;
    for j in 0..4 {
        let even_upper = _mm512_shuffle_i32x4::<0b10_00_10_00>(quads[j], quads[4 + j]);
        let odd_upper = _mm512_shuffle_i32x4::<0b11_01_11_01>(quads[j], quads[4 + j]);
        let even_lower = _mm512_shuffle_i32x4::<0b10_00_10_00>(quads[8 + j], quads[12 + j]);
        let odd_lower = _mm512_shuffle_i32x4::<0b11_01_11_01>(quads[8 + j], quads[12 + j]);
        out[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(even_upper, even_lower);
        out[8 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(even_upper, even_lower);
        out[4 + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(odd_upper, odd_lower);
        out[12 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(odd_upper, odd_lower);
    }
    out
}

/// One panel of W rows of which `have` exist, `k` contiguous steps each, rows `stride` apart.
///
/// # Safety
/// The processor has AVX-512 with bf16 (`PairF32`) or without.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub unsafe fn k_contiguous<L: Load, const W: usize>(
    dst: &mut [u32],
    have: usize,
    src: &[L::Source],
    stride: usize,
    k: usize,
) {
    let units = k.div_ceil(L::STEPS);
    assert!(have > 0 && have <= W && (have - 1) * stride + k <= src.len() && units * W <= dst.len(), "a panel fits");
    for first in (0..units).step_by(16) {
        let count = (units - first).min(16);
        let steps = k - first * L::STEPS;
        for group in (0..W).step_by(16) {
            let mut rows = [_mm512_setzero_si512(); 16];
            for (r, row) in rows.iter_mut().enumerate().take(have.saturating_sub(group)) {
                // SAFETY: row `group + r` exists and has `steps` more elements from here.
                *row = unsafe { L::along_k(src.as_ptr().add((group + r) * stride + first * L::STEPS), steps) };
            }
            let width = (W - group).min(16);
            for (j, column) in transpose(rows).into_iter().enumerate().take(count) {
                // SAFETY: unit `first + j` of the panel has `width` lanes from `group` on.
                unsafe {
                    let p = dst.as_mut_ptr().add((first + j) * W + group);
                    if width == 16 {
                        _mm512_storeu_si512(p.cast(), column);
                    } else {
                        _mm512_mask_storeu_epi32(p.cast(), lanes16(width), column);
                    }
                }
            }
        }
    }
}

/// As [`k_contiguous`] where rows are contiguous and `stride` lies between steps of k.
///
/// # Safety
/// As [`k_contiguous`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub unsafe fn rows_contiguous<L: Load, const W: usize>(
    dst: &mut [u32],
    have: usize,
    src: &[L::Source],
    stride: usize,
    k: usize,
) {
    let units = k.div_ceil(L::STEPS);
    assert!(have > 0 && have <= W && (k - 1) * stride + have <= src.len() && units * W <= dst.len(), "a panel fits");
    for u in 0..units {
        let step = u * L::STEPS;
        for group in (0..W).step_by(16) {
            let (rows, width) = (have.saturating_sub(group).min(16), (W - group).min(16));
            // SAFETY: `rows` elements from `group` exist in both steps, and the panel has `width` lanes from there.
            unsafe {
                let even = src.as_ptr().add(step * stride + group.min(have));
                let odd = if step + L::STEPS <= k { even.add((L::STEPS - 1) * stride) } else { std::ptr::null() };
                let x = L::across_rows(even, odd, rows);
                let p = dst.as_mut_ptr().add(u * W + group);
                if width == 16 {
                    _mm512_storeu_si512(p.cast(), x);
                } else {
                    _mm512_mask_storeu_epi32(p.cast(), lanes16(width), x);
                }
            }
        }
    }
}
