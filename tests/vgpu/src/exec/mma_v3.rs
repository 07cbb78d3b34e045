//! `mma.sync` with f32 accumulators on AVX2 and FMA.
//!
//! The registers of all lanes are row-major tiles of eight rows already: A and B need widening, B a transposition of
//! 8x8, C and D an interleaving of pairs. The products are summed in the order of k, one fused multiply-add each, as in
//! the portable code, so that both give the same bits.

use std::arch::x86_64::*;

use super::tensor::{Element, Mma, Widened};
use super::{LANES, Regs};

/// Sixteen rows of A, as wide as the largest k.
#[repr(align(32))]
struct Rows([[f32; 16]; 16]);

/// Up to sixteen rows of B.
#[repr(align(32))]
struct Columns([[f32; 8]; 16]);

/// Both elements of each word of two rows of bf16, the first ones and then the second ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves(x: __m256i) -> (__m256, __m256) {
    let high = _mm256_set1_epi32(0xffff_0000u32 as i32);
    let (even, odd) = (_mm256_slli_epi32::<16>(x), _mm256_and_si256(x, high));
    (_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd))
}

/// `D = A B + C` for bf16: a row of registers is eight rows of four pairs, and the pairs are never put together. Element
/// `k = 8 i + 2 t + e` of row `g` of A lies at `4 g + t` of half `e` of its register; B likewise, once its quads are
/// transposed.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn product_bf16(m: &Mma, r: &mut Regs, a: &mut Widened, reuse: bool) {
    for (i, row) in m.a.iter().enumerate().take(if reuse { 0 } else { 4 }) {
        let row = &r.w[*row as usize];
        for n in 0..4 {
            let x = _mm256_set_m128i(quad(row, 2 * n + 1), quad(row, 2 * n));
            let (even, odd) = halves(x);
            store8(&mut a.0[i][0][8 * n..], even);
            store8(&mut a.0[i][1][8 * n..], odd);
        }
    }
    let mut b = [[[_mm256_setzero_ps(); 2]; 4]; 2];
    for (i, row) in m.b.iter().enumerate().take(2) {
        let row = &r.w[*row as usize];
        let mut x = [_mm256_setzero_ps(); 4];
        for n in 0..4 {
            x[n] = _mm256_castsi256_ps(_mm256_set_m128i(quad(row, n + 4), quad(row, n)));
        }
        // Four by four within each half: x[n] holds pairs 0 to 3 of columns n and n + 4.
        let (a0, a1) = (_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
        let (b0, b1) = (_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
        const LOW: i32 = 0b01_00_01_00;
        const HIGH: i32 = 0b11_10_11_10;
        let t = [
            _mm256_shuffle_ps::<LOW>(a0, b0),
            _mm256_shuffle_ps::<HIGH>(a0, b0),
            _mm256_shuffle_ps::<LOW>(a1, b1),
            _mm256_shuffle_ps::<HIGH>(a1, b1),
        ];
        for (t, pair) in t.into_iter().zip(&mut b[i]) {
            let (even, odd) = halves(_mm256_castps_si256(t));
            *pair = [even, odd];
        }
    }
    for half in 0..2 {
        let mut acc = accumulators(m, r, half);
        for i in 0..m.k / 8 {
            let a = &a.0[half + 2 * i];
            for t in 0..4 {
                for e in 0..2 {
                    for g in 0..8 {
                        acc[g] = _mm256_fmadd_ps(_mm256_set1_ps(a[e][4 * g + t]), b[i][t][e], acc[g]);
                    }
                }
            }
        }
        results(m, r, half, &acc);
    }
}

/// Eight rows of C.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn accumulators(m: &Mma, r: &Regs, half: usize) -> [__m256; 8] {
    let mut acc = [_mm256_setzero_ps(); 8];
    let (even, odd) = (&r.w[m.c[2 * half] as usize], &r.w[m.c[2 * half + 1] as usize]);
    for g in 0..8 {
        let (x, y) = (_mm_castsi128_ps(quad(even, g)), _mm_castsi128_ps(quad(odd, g)));
        acc[g] = _mm256_set_m128(_mm_unpackhi_ps(x, y), _mm_unpacklo_ps(x, y));
    }
    acc
}

/// Writes eight rows of D.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn results(m: &Mma, r: &mut Regs, half: usize, acc: &[__m256; 8]) {
    let mut out = *acc;
    // NaN is rare: one look at all rows, and only then the choice in each.
    let mut any = _mm256_setzero_ps();
    for x in acc {
        any = _mm256_or_ps(any, _mm256_cmp_ps::<_CMP_UNORD_Q>(*x, *x));
    }
    if _mm256_movemask_ps(any) != 0 {
        let nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fff_ffff));
        for x in &mut out {
            *x = _mm256_blendv_ps(*x, nan, _mm256_cmp_ps::<_CMP_UNORD_Q>(*x, *x));
        }
    }
    let places = [m.d[2 * half] as usize, m.d[2 * half + 1] as usize];
    // `product` leaves instructions with one row twice to the portable code.
    let Ok([even, odd]) = r.w.get_disjoint_mut(places) else {
        return;
    };
    for g in 0..8 {
        let (low, high) = (_mm256_castps256_ps128(out[g]), _mm256_extractf128_ps::<1>(out[g]));
        let pair = [_mm_shuffle_ps::<0b10_00_10_00>(low, high), _mm_shuffle_ps::<0b11_01_11_01>(low, high)];
        for (row, x) in [&mut *even, &mut *odd].into_iter().zip(pair) {
            let to = &mut row[4 * g..4 * g + 4];
            // SAFETY: the slice holds four words; unaligned stores are allowed.
            unsafe { _mm_storeu_ps(to.as_mut_ptr().cast(), x) };
        }
    }
}

/// Eight halves as f32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen(x: __m128i) -> __m256 {
    _mm256_cvtph_ps(x)
}

/// The four words of lanes `4 g` to `4 g + 3`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quad(row: &[u32; LANES], g: usize) -> __m128i {
    let words = &row[4 * g..4 * g + 4];
    // SAFETY: the slice holds four words; unaligned loads are allowed.
    unsafe { _mm_loadu_si128(words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose(r: [__m256; 8]) -> [__m256; 8] {
    let pair = |a: usize, b: usize| (_mm256_unpacklo_ps(r[a], r[b]), _mm256_unpackhi_ps(r[a], r[b]));
    let ((a0, a1), (b0, b1), (c0, c1), (d0, d1)) = (pair(0, 1), pair(2, 3), pair(4, 5), pair(6, 7));
    const LOW: i32 = 0b01_00_01_00;
    const HIGH: i32 = 0b11_10_11_10;
    let (e0, e1) = (_mm256_shuffle_ps::<LOW>(a0, b0), _mm256_shuffle_ps::<HIGH>(a0, b0));
    let (e2, e3) = (_mm256_shuffle_ps::<LOW>(a1, b1), _mm256_shuffle_ps::<HIGH>(a1, b1));
    let (f0, f1) = (_mm256_shuffle_ps::<LOW>(c0, d0), _mm256_shuffle_ps::<HIGH>(c0, d0));
    let (f2, f3) = (_mm256_shuffle_ps::<LOW>(c1, d1), _mm256_shuffle_ps::<HIGH>(c1, d1));
    [
        _mm256_permute2f128_ps::<0x20>(e0, f0),
        _mm256_permute2f128_ps::<0x20>(e1, f1),
        _mm256_permute2f128_ps::<0x20>(e2, f2),
        _mm256_permute2f128_ps::<0x20>(e3, f3),
        _mm256_permute2f128_ps::<0x31>(e0, f0),
        _mm256_permute2f128_ps::<0x31>(e1, f1),
        _mm256_permute2f128_ps::<0x31>(e2, f2),
        _mm256_permute2f128_ps::<0x31>(e3, f3),
    ]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store8(to: &mut [f32], x: __m256) {
    let to = &mut to[..8];
    // SAFETY: the slice holds eight values; unaligned stores are allowed.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), x) };
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load8(from: &[f32; 8]) -> __m256 {
    // SAFETY: the array holds eight values; unaligned loads are allowed.
    unsafe { _mm256_loadu_ps(from.as_ptr()) }
}

/// `D = A B + C` for k of 8 or 16 and f32 accumulators; `reuse` says that `widened` holds this A already. False, and nothing done, for other forms.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product(m: &Mma, r: &mut Regs, widened: &mut Widened, reuse: bool) -> bool {
    if m.half || !matches!(m.k, 8 | 16) || m.d.len() != 4 || m.c.len() != 4 {
        return false;
    }
    // The upper half of C is read after the lower half of D is written.
    let twice = |half: usize| m.d[2 * half] == m.d[2 * half + 1];
    if m.d[..2].iter().any(|d| m.c[2..].contains(d)) || twice(0) || twice(1) {
        return false;
    }
    if m.element == Element::Bf16 && m.a.len() == m.k / 4 && m.b.len() == m.k / 8 {
        product_bf16(m, r, widened, reuse);
        return true;
    }
    let (mut a, mut b) = (Rows([[0.0; 16]; 16]), Columns([[0.0; 8]; 16]));
    match m.element {
        Element::F16 => {
            for (i, row) in m.a.iter().enumerate() {
                let row = &r.w[*row as usize];
                for g in 0..8 {
                    store8(&mut a.0[g + 8 * (i & 1)][8 * (i >> 1)..], widen(quad(row, g)));
                }
            }
            for (i, row) in m.b.iter().enumerate() {
                let row = &r.w[*row as usize];
                let mut t = [_mm256_setzero_ps(); 8];
                for g in 0..8 {
                    t[g] = widen(quad(row, g));
                }
                for (k, x) in transpose(t).into_iter().enumerate() {
                    store8(&mut b.0[8 * i + k], x);
                }
            }
        }
        Element::Tf32 if m.k == 8 => {
            // 19 of the 32 bits count.
            let bits = _mm256_castsi256_ps(_mm256_set1_epi32(!0x1fff));
            let both = |low: &[u32; LANES], high: &[u32; LANES], g: usize| {
                let x = _mm256_set_m128i(quad(high, g), quad(low, g));
                _mm256_and_ps(_mm256_castsi256_ps(x), bits)
            };
            for half in 0..2 {
                let (low, high) = (&r.w[m.a[half] as usize], &r.w[m.a[half + 2] as usize]);
                for g in 0..8 {
                    store8(&mut a.0[g + 8 * half], both(low, high, g));
                }
            }
            let (low, high) = (&r.w[m.b[0] as usize], &r.w[m.b[1] as usize]);
            let mut t = [_mm256_setzero_ps(); 8];
            for g in 0..8 {
                t[g] = both(low, high, g);
            }
            for (k, x) in transpose(t).into_iter().enumerate() {
                store8(&mut b.0[k], x);
            }
        }
        _ => return false,
    }
    for half in 0..2 {
        let mut acc = accumulators(m, r, half);
        for k in 0..m.k {
            let column = load8(&b.0[k]);
            for g in 0..8 {
                acc[g] = _mm256_fmadd_ps(_mm256_set1_ps(a.0[8 * half + g][k]), column, acc[g]);
            }
        }
        results(m, r, half, &acc);
    }
    true
}
