//! Packing with 512-bit vectors, for panels of 14 and 32. The same units as the portable code of `pack`, except that numbers
//! too small to be normal become zero where f32 is rounded to pairs (`vcvtne2ps2bf16`).
//!
//! Every packer exists twice: for processors with the instructions of bf16, and without, where no pairs are packed.

use super::Unit;
use crate::cpu::elem::View;
use crate::cpu::level::Level;
use half::bf16;
use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, _CMP_UNORD_Q, _mm256_maskz_loadu_epi16, _mm512_add_epi32, _mm512_and_si512,
    _mm512_castps_si512, _mm512_cmp_ps_mask, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_mask_or_epi32,
    _mm512_mask_storeu_epi32, _mm512_maskz_loadu_epi16, _mm512_maskz_loadu_epi32, _mm512_maskz_loadu_ps,
    _mm512_or_si512, _mm512_permutexvar_epi16, _mm512_set_epi16, _mm512_set1_epi32, _mm512_setzero_si512,
    _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
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
/// f32 rounded to bf16.
pub struct RoundedF32;
/// bf16 widened to f32.
pub struct SingleBf16;
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

impl Load for RoundedF32 {
    type Source = f32;
    const STEPS: usize = 1;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn along_k(p: *const f32, steps: usize) -> __m512i {
        // SAFETY: the mask covers the elements that exist.
        _mm512_slli_epi32::<16>(round_bf16(unsafe { _mm512_maskz_loadu_ps(lanes16(steps), p) }))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn across_rows(even: *const f32, _: *const f32, rows: usize) -> __m512i {
        // SAFETY: the caller's promise is that of neighbouring steps, with rows for steps.
        unsafe { Self::along_k(even, rows) }
    }
}

impl Load for SingleBf16 {
    type Source = bf16;
    const STEPS: usize = 1;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn along_k(p: *const bf16, steps: usize) -> __m512i {
        // SAFETY: the mask covers the elements that exist.
        let x = unsafe { _mm256_maskz_loadu_epi16(lanes16(steps), p.cast()) };
        _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn across_rows(even: *const bf16, _: *const bf16, rows: usize) -> __m512i {
        // SAFETY: the caller's promise is that of neighbouring steps, with rows for steps.
        unsafe { Self::along_k(even, rows) }
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

/// The packers for one set of instructions.
macro_rules! packers {
    ($name:ident, $features:literal) => {
        mod $name {
            use super::*;

            /// One panel of W rows of which `have` exist, `k` contiguous steps each, rows `stride` apart.
            ///
            /// # Safety
            /// The processor has the instructions of this module and of `L`.
            #[target_feature(enable = $features)]
            pub unsafe fn k_contiguous<L: Load, const W: usize>(
                dst: &mut [u32],
                have: usize,
                src: &[L::Source],
                stride: usize,
                k: usize,
            ) {
                let units = k.div_ceil(L::STEPS);
                assert!(have <= W && (have - 1) * stride + k <= src.len() && units * W <= dst.len(), "a panel fits");
                for first in (0..units).step_by(16) {
                    let count = (units - first).min(16);
                    let steps = k - first * L::STEPS;
                    for group in (0..W).step_by(16) {
                        let mut rows = [_mm512_setzero_si512(); 16];
                        for (r, row) in rows.iter_mut().enumerate().take(have.saturating_sub(group)) {
                            let at = (group + r) * stride + first * L::STEPS;
                            ahead(src.as_ptr().wrapping_add(at + W * stride));
                            // SAFETY: row `group + r` exists and has `steps` more elements from here.
                            *row = unsafe { L::along_k(src.as_ptr().add(at), steps) };
                        }
                        for (j, column) in transpose(rows).into_iter().enumerate().take(count) {
                            // SAFETY: unit `first + j` of the panel has `W - group` lanes from `group` on.
                            unsafe { store(dst.as_mut_ptr().add((first + j) * W + group), W - group, column) };
                        }
                    }
                }
            }

            /// As [`k_contiguous`] where rows are contiguous and `stride` lies between steps of k.
            ///
            /// # Safety
            /// As [`k_contiguous`].
            #[target_feature(enable = $features)]
            pub unsafe fn rows_contiguous<L: Load, const W: usize>(
                dst: &mut [u32],
                have: usize,
                src: &[L::Source],
                stride: usize,
                k: usize,
            ) {
                let units = k.div_ceil(L::STEPS);
                assert!(have <= W && (k - 1) * stride + have <= src.len() && units * W <= dst.len(), "a panel fits");
                for u in 0..units {
                    for group in (0..W).step_by(16) {
                        // SAFETY: the source has these rows and steps, and the panel `W - group` lanes from there.
                        unsafe {
                            let x = unit_of_rows::<L>(src, stride, k, u, group, have);
                            store(dst.as_mut_ptr().add(u * W + group), W - group, x);
                        }
                    }
                }
            }

            /// Unit `u` of up to 16 rows from `group`, of which `have` in all exist.
            ///
            /// # Safety
            /// As [`rows_contiguous`], which has seen that the source is as long.
            #[inline]
            #[target_feature(enable = $features)]
            pub unsafe fn unit_of_rows<L: Load>(
                src: &[L::Source],
                stride: usize,
                k: usize,
                u: usize,
                group: usize,
                have: usize,
            ) -> __m512i {
                let (step, rows) = (u * L::STEPS, have.saturating_sub(group).min(16));
                // SAFETY: `rows` elements from `group` exist in both steps.
                unsafe {
                    let even = src.as_ptr().add(step * stride + group.min(have));
                    let odd = if step + L::STEPS <= k { even.add((L::STEPS - 1) * stride) } else { std::ptr::null() };
                    L::across_rows(even, odd, rows)
                }
            }

            /// Both directions, for panels of 14 or 32 rows.
            ///
            /// # Safety
            /// As [`k_contiguous`].
            pub unsafe fn either<L: Load>(
                dst: &mut [u32],
                width: usize,
                have: usize,
                src: &[L::Source],
                (major_stride, k_stride): (usize, usize),
                k: usize,
            ) {
                // SAFETY: the caller's promise.
                unsafe {
                    match (width, k_stride == 1) {
                        (14, true) => k_contiguous::<L, 14>(dst, have, src, major_stride, k),
                        (14, false) => rows_contiguous::<L, 14>(dst, have, src, k_stride, k),
                        (_, true) => k_contiguous::<L, 32>(dst, have, src, major_stride, k),
                        (_, false) => rows_contiguous::<L, 32>(dst, have, src, k_stride, k),
                    }
                }
            }
        }
    };
}
packers!(plain, "avx512f,avx512bw,avx512vl");
packers!(pairs, "avx512f,avx512bw,avx512vl,avx512bf16");

/// Asks for the line of an element of the next panel, whether it exists or not: the rows of a panel are more streams than a
/// processor follows by itself.
#[inline(always)]
pub fn ahead<T>(p: *const T) {
    // SAFETY: a prefetch of any address does nothing but move data between caches.
    unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast()) };
}

/// Stores the lanes that a panel has from here.
///
/// # Safety
/// `p` points to `lanes` units, or 16 if that is less.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(p: *mut u32, lanes: usize, x: __m512i) {
    // SAFETY: the mask covers the units that exist.
    unsafe {
        if lanes >= 16 {
            _mm512_storeu_si512(p.cast(), x);
        } else {
            _mm512_mask_storeu_epi32(p.cast(), lanes16(lanes), x);
        }
    }
}

/// A panel of W rows as tiles of 16 units, each row's side by side; see `Unit::RowTile`.
///
/// # Safety
/// The processor has AVX-512 with bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn row_tiles<L: Load, const W: usize>(
    dst: &mut [u32],
    have: usize,
    src: &[L::Source],
    (major_stride, k_stride): (usize, usize),
    k: usize,
) {
    let units = k.div_ceil(L::STEPS);
    let need = if k_stride == 1 { (have - 1) * major_stride + k } else { (k - 1) * k_stride + have };
    let fits = have <= W && need <= src.len() && units.next_multiple_of(16) * W <= dst.len();
    assert!(fits && W.is_multiple_of(16), "a panel fits");
    for first in (0..units).step_by(16) {
        for group in (0..W).step_by(16) {
            let mut rows = [_mm512_setzero_si512(); 16];
            if k_stride == 1 {
                let steps = k - first * L::STEPS;
                for (r, row) in rows.iter_mut().enumerate().take(have.saturating_sub(group)) {
                    // SAFETY: row `group + r` exists and has `steps` more elements from here.
                    *row =
                        unsafe { L::along_k(src.as_ptr().add((group + r) * major_stride + first * L::STEPS), steps) };
                }
            } else {
                for (j, unit) in rows.iter_mut().enumerate().take(units - first) {
                    // SAFETY: the source has these rows and steps (asserted above).
                    *unit = unsafe { pairs::unit_of_rows::<L>(src, k_stride, k, first + j, group, have) };
                }
                rows = transpose(rows);
            }
            for (r, row) in rows.into_iter().enumerate() {
                // SAFETY: the panel has 16 units of row `group + r` in this tile.
                unsafe { store(dst.as_mut_ptr().add(first * W + (group + r) * 16), 16, row) };
            }
        }
    }
}

/// One panel, where these instructions serve: its source starts at its first element. False where they do not.
#[allow(clippy::too_many_arguments)]
pub fn panel(
    level: Level,
    dst: &mut [u32],
    unit: Unit,
    width: usize,
    src: View<'_>,
    have: usize,
    strides: (usize, usize),
    k: usize,
) -> bool {
    let wide = (width == 14 || width == 32) && k > 0 && have > 0;
    let (plain, pairs) = (level >= Level::Avx512, level >= Level::Avx512Bf16);
    if !wide || !plain || unit.is_pair() && !pairs || unit == Unit::RowTile && width != 32 {
        return false;
    }
    // SAFETY: the level has the instructions that are used.
    unsafe {
        match (src, unit) {
            (View::F32(x), Unit::Single) => plain::either::<SingleF32>(dst, width, have, x, strides, k),
            (View::F32(x), Unit::Rounded) => plain::either::<RoundedF32>(dst, width, have, x, strides, k),
            (View::Bf16(x), Unit::Single | Unit::Rounded) => {
                plain::either::<SingleBf16>(dst, width, have, x, strides, k);
            }
            (View::F32(x), Unit::RowTile) => row_tiles::<PairF32, 32>(dst, have, x, strides, k),
            (View::Bf16(x), Unit::RowTile) => row_tiles::<PairBf16, 32>(dst, have, x, strides, k),
            (View::F32(x), _) => pairs::either::<PairF32>(dst, width, have, x, strides, k),
            (View::Bf16(x), _) => pairs::either::<PairBf16>(dst, width, have, x, strides, k),
        }
    }
    if unit == Unit::PairTile {
        dst[k.div_ceil(2) * width..unit.count(k) * width].fill(0);
    }
    true
}

/// The bf16 bits of each lane, in its low half: nearest, ties to even, NaN kept (as `elem::round_bits`).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub fn round_bf16(x: __m512) -> __m512i {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    _mm512_srli_epi32::<16>(_mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000)))
}

/// Transposes 16 x 16 lanes of four bytes: by pairs of lanes, of pairs, and twice by quarters of vectors.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
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
