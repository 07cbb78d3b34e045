//! Register tiles of aarch64: f32 by multiply-add with a lane (`fmla`), bf16 by products of 2 x 4 by 4 x 2 (`bfmmla`).
//!
//! `bfmmla` adds two pairs of products to each of four sums, one pair after the other. Products are exact, the sum of a pair and the sum so
//! far are each rounded to odd (the last bit is set where anything was cut off), subnormal operands and results are zero. These are the
//! rules of processors without FEAT_EBF16 and, on the others, of programs that leave `FPCR.EBF` at 0, as this one does: one result
//! everywhere (Arm ARM DDI 0487, `BFMatMulAdd`, `BFDotAdd`).

use std::arch::aarch64::{
    float32x2_t, float32x4_t, uint16x4_t, uint16x8_t, uint32x4_t, vaddq_f32, vaddq_u32, vandq_u32, vbslq_u32,
    vceqq_f32, vdupq_n_f32, vdupq_n_u32, vfmaq_lane_f32, vfmaq_laneq_f32, vld1_f32, vld1_u16, vld1q_f32, vld1q_u16,
    vmovl_u16, vmulq_n_f32, vorrq_u32, vreinterpretq_f32_f64, vreinterpretq_f32_u32, vreinterpretq_f64_f32,
    vreinterpretq_u32_f32, vshlq_n_u32, vshrn_n_u32, vshrq_n_u32, vst1_u16, vst1q_f32, vzip1q_f64, vzip2q_f64,
};
use std::arch::asm;

use super::{Store, Target, Tile, store_rows};

pub mod few;

const MR: usize = 6;
const NR: usize = 16;

/// Lanes of a vector.
const LANES: usize = 4;

/// Steps of the inner loop from which on there is time to fetch the tile of C before it is needed.
const PREFETCH_UNITS: usize = 64;

/// # Safety
/// As `Kernel`.
pub unsafe fn f32_tile(units: usize, a: *const u32, b: *const u32, tile: Tile) {
    // SAFETY: the caller's promise, and a tile at least as high as asked for.
    unsafe {
        match tile.rows {
            0..=1 => f32_sized::<1>(units, a, b, tile),
            2 => f32_sized::<2>(units, a, b, tile),
            3..=4 => f32_sized::<4>(units, a, b, tile),
            _ => f32_sized::<MR>(units, a, b, tile),
        }
    }
}

/// # Safety
/// As `Kernel`, on a processor with bf16.
pub unsafe fn bf16_tile(units: usize, a: *const u32, b: *const u32, tile: Tile) {
    // SAFETY: the caller's promise, and a tile at least as high as asked for.
    unsafe {
        match tile.rows {
            0..=2 => bf16_sized::<1>(units, a, b, tile),
            3..=4 => bf16_sized::<2>(units, a, b, tile),
            _ => bf16_sized::<3>(units, a, b, tile),
        }
    }
}

/// # Safety
/// As `Kernel`, with `rows <= M`.
#[target_feature(enable = "neon")]
unsafe fn f32_sized<const M: usize>(units: usize, a: *const u32, b: *const u32, tile: Tile) {
    let (mut a, mut b) = (a.cast::<f32>(), b.cast::<f32>());
    if units >= PREFETCH_UNITS {
        tile.ask();
    }
    let mut sums = [[vdupq_n_f32(0.0); NR / LANES]; M];
    for _ in 0..units {
        // SAFETY: the panels hold `units` rows of MR and NR units.
        let (x, y): ((float32x4_t, float32x2_t), [float32x4_t; NR / LANES]) =
            unsafe { ((vld1q_f32(a), vld1_f32(a.add(LANES))), std::array::from_fn(|v| vld1q_f32(b.add(LANES * v)))) };
        macro_rules! rows {
            ($($row:literal: $multiply_add:ident $lane:literal of $part:tt,)+) => {$(
                if $row < M {
                    for (sum, y) in sums[$row].iter_mut().zip(y) {
                        *sum = $multiply_add::<$lane>(*sum, y, x.$part);
                    }
                }
            )+};
        }
        rows! {
            0: vfmaq_laneq_f32 0 of 0,
            1: vfmaq_laneq_f32 1 of 0,
            2: vfmaq_laneq_f32 2 of 0,
            3: vfmaq_laneq_f32 3 of 0,
            4: vfmaq_lane_f32 0 of 1,
            5: vfmaq_lane_f32 1 of 1,
        }
        (a, b) = (a.wrapping_add(MR), b.wrapping_add(NR));
    }
    // SAFETY: the caller's promise about the tile.
    unsafe { store(&sums, tile) };
}

/// `sum += x · yᵀ` of two rows of four bf16 each: `sum` has the products of x's first row with both of y, then those of its second.
#[inline]
#[target_feature(enable = "neon,bf16")]
fn multiply_add(mut sum: float32x4_t, x: uint16x8_t, y: uint16x8_t) -> float32x4_t {
    // SAFETY: registers alone, and the processor has the instruction.
    unsafe {
        asm!(
            "bfmmla {sum:v}.4s, {x:v}.8h, {y:v}.8h",
            sum = inout(vreg) sum,
            x = in(vreg) x,
            y = in(vreg) y,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// # Safety
/// As `Kernel`, with `rows <= 2 P`.
#[target_feature(enable = "neon,bf16")]
unsafe fn bf16_sized<const P: usize>(units: usize, a: *const u32, b: *const u32, tile: Tile) {
    let (mut a, mut b) = (a.cast::<u16>(), b.cast::<u16>());
    if units >= PREFETCH_UNITS {
        tile.ask();
    }
    let mut sums = [[vdupq_n_f32(0.0); NR / 2]; P];
    for _ in 0..units / 2 {
        // SAFETY: the panels hold `units / 2` quads of MR and NR rows.
        unsafe {
            let x: [uint16x8_t; P] = std::array::from_fn(|p| vld1q_u16(a.add(8 * p)));
            for q in 0..NR / 2 {
                let y = vld1q_u16(b.add(8 * q));
                for (sums, x) in sums.iter_mut().zip(x) {
                    sums[q] = multiply_add(sums[q], x, y);
                }
            }
        }
        (a, b) = (a.wrapping_add(4 * MR), b.wrapping_add(4 * NR));
    }
    // SAFETY: the caller's promise about the tile.
    unsafe { store(sums.map(|sums| unfold(sums)).as_flattened(), tile) };
}

/// Blocks of 2 x 2 sums as two rows.
#[inline]
#[target_feature(enable = "neon")]
fn unfold(sums: [float32x4_t; NR / 2]) -> [[float32x4_t; NR / LANES]; 2] {
    let pair = |v: usize| (vreinterpretq_f64_f32(sums[2 * v]), vreinterpretq_f64_f32(sums[2 * v + 1]));
    [
        std::array::from_fn(|v| vreinterpretq_f32_f64(vzip1q_f64(pair(v).0, pair(v).1))),
        std::array::from_fn(|v| vreinterpretq_f32_f64(vzip2q_f64(pair(v).0, pair(v).1))),
    ]
}

/// Stores the rows and columns of the tile that exist.
///
/// # Safety
/// As `Kernel`, and there are as many sums.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store(sums: &[[float32x4_t; NR / LANES]], t: Tile) {
    if t.cols == NR {
        for (r, sums) in sums.iter().enumerate().take(t.rows) {
            for (v, &sum) in sums.iter().enumerate() {
                // SAFETY: the tile has row r, and all columns.
                unsafe { store_vector(sum, r, LANES * v, t) };
            }
        }
        return;
    }
    let mut rows = [0.0f32; MR * NR];
    for (to, &sum) in rows.as_chunks_mut::<LANES>().0.iter_mut().zip(sums.as_flattened()) {
        // SAFETY: four places.
        unsafe { vst1q_f32(to.as_mut_ptr(), sum) };
    }
    // SAFETY: the caller's promise about the tile.
    unsafe { store_rows(&rows, NR, t) };
}

/// Stores four sums of row `r` from column `col`.
///
/// # Safety
/// They lie inside the tile, whose elements may be read and written.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store_vector(sum: float32x4_t, r: usize, col: usize, t: Tile) {
    let mut x = vmulq_n_f32(sum, t.alpha);
    let at = r * t.stride + col;
    // SAFETY: four elements of C, of what is added to and of the bias exist.
    unsafe {
        if t.store == Store::Add {
            x = vaddq_f32(load(t.onto.unwrap_or(t.target).at(at)), x);
        }
        if let Some(bias) = t.bias {
            // The sum is rounded before a bias is added, as if it had been stored.
            if let Target::Bf16(_) = t.target {
                x = widened(rounded(x));
            }
            x = vaddq_f32(x, load(bias.at(col)));
        }
        match t.target.at(at) {
            Target::F32(c) => vst1q_f32(c, x),
            Target::Bf16(c) => vst1_u16(c.cast(), rounded(x)),
        }
    }
}

/// Four elements, widened.
///
/// # Safety
/// They may be read.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load(p: Target) -> float32x4_t {
    // SAFETY: the caller's promise.
    unsafe {
        match p {
            Target::F32(p) => vld1q_f32(p),
            Target::Bf16(p) => widened(vld1_u16(p.cast())),
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn widened(x: uint16x4_t) -> float32x4_t {
    vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(x)))
}

/// As [`crate::cpu::elem::round_bits`], four at once.
#[inline]
#[target_feature(enable = "neon")]
fn rounded(x: float32x4_t) -> uint16x4_t {
    let bits: uint32x4_t = vreinterpretq_u32_f32(x);
    let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
    let nearest = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
    vshrn_n_u32::<16>(vbslq_u32(vceqq_f32(x, x), nearest, quiet))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Level;
    use crate::rng::Stream;
    use half::bf16;

    /// `x + y` in f32, rounded to odd: cut off, and the last bit set where anything was.
    fn odd_sum(x: f32, y: f32) -> f32 {
        const CUT: u64 = (1 << 29) - 1;
        let (x, y) = (f64::from(x), f64::from(y));
        let sum = x + y;
        let from_y = sum - x;
        let lost = (x - (sum - from_y)) + (y - from_y);
        let mut bits = sum.to_bits();
        if lost != 0.0 {
            bits = (bits - u64::from((lost < 0.0) != (sum < 0.0))) | 1;
        }
        let cut = f64::from_bits(bits & !CUT) as f32;
        f32::from_bits(cut.to_bits() | u32::from(bits & CUT != 0))
    }

    fn product(sum: f32, x: [bf16; 4], y: [bf16; 4]) -> f32 {
        let lanes = |v: [bf16; 4]| v.map(bf16::to_bits).repeat(2);
        // SAFETY: eight elements each, and the processor has the instruction.
        unsafe {
            let all = multiply_add(vdupq_n_f32(sum), vld1q_u16(lanes(x).as_ptr()), vld1q_u16(lanes(y).as_ptr()));
            let mut out = [0.0; 4];
            vst1q_f32(out.as_mut_ptr(), all);
            assert!(out.iter().all(|o| o.to_bits() == out[0].to_bits()), "{out:?}");
            out[0]
        }
    }

    #[test]
    fn bfmmla_adds_pair_after_pair_rounded_to_odd_and_takes_subnormals_for_zero() {
        if !Level::NeonBf16.is_supported() {
            return eprintln!("skipped: this processor has no bf16");
        }
        let s = Stream::new(&[21]);
        let value = |i: u64| (s.normal_at(i) * 2.0f64.powi((s.u64_at(1 << 40 | i) % 24) as i32 - 12)) as f32;
        let (mut cut, rounds) = (0, 20_000);
        for i in 0..rounds {
            let four = |from: u64| std::array::from_fn(|j| bf16::from_f32(value(9 * i + from + j as u64)));
            let (sum, x, y): (f32, [bf16; 4], [bf16; 4]) = (value(9 * i + 8), four(0), four(4));
            let exact = |j: usize| x[j].to_f32() * y[j].to_f32();
            let first = odd_sum(sum, odd_sum(exact(0), exact(1)));
            let expected = odd_sum(first, odd_sum(exact(2), exact(3)));
            let found = product(sum, x, y);
            assert_eq!(found.to_bits(), expected.to_bits(), "{sum} + {x:?} · {y:?}: {found}, expected {expected}");
            cut += u32::from(f64::from(found) != f64::from(sum) + (0..4).map(|j| f64::from(exact(j))).sum::<f64>());
        }
        assert!(cut > 9_000, "{cut} of {rounds} sums were rounded");
        let [zero, one, least] = [0x0000, 0x3f80, 0x0001].map(bf16::from_bits);
        assert_eq!(product(0.0, [least; 4], [one; 4]), 0.0);
        assert_eq!(product(1e-40, [zero; 4], [zero; 4]), 0.0);
        assert!(product(0.0, [bf16::INFINITY, zero, zero, zero], [zero; 4]).is_nan());
    }

    #[test]
    fn four_at_once_are_rounded_as_one() {
        let odd = [0x7f80_0001, 0xffc0_0000, 0x7f7f_ffff, 0x3f80_8000, 0x3f81_8000, 0x8000_0001, 0x7f80_0000, 0];
        let all = (0..100_000u32).map(|i| i.wrapping_mul(0x9E37_79B9)).chain(odd);
        let x: Vec<f32> = all.map(f32::from_bits).collect();
        for x in x.as_chunks::<LANES>().0 {
            let mut found = [0u16; LANES];
            // SAFETY: four elements each.
            unsafe { vst1_u16(found.as_mut_ptr(), rounded(vld1q_f32(x.as_ptr()))) };
            assert_eq!(found, x.map(crate::cpu::elem::round_bits), "{x:?}");
        }
    }
}
