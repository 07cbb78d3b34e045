//! Products as tensor cores round them.
//!
//! A tensor core takes `group` products at a time. They are exact; their exponents are the sums of the factors' exponents (those of
//! subnormal factors are the smallest normal one), not those of normalised products. The largest exponent among them and the
//! accumulator is that of the alignment: every significand is shifted to it and cut off `extra` bits below the 23 of f32. What is left is
//! added exactly, and the sum is cut off to f32. The next group starts from that.
//!
//! Sources: Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores" (2021), for the common alignment, the cutting
//! off and subnormal numbers; Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores", arXiv:2512.07004 (2025), for the figures:
//!
//! | | capability | 16-bit factors | tf32 | extra bits |
//! |---|---|---|---|---|
//! | ampere | 8.0, 8.9 (A100, A30, A2, L40S) | 8 | 4 | 1 |
//! | hopper | 9.0, 10.0 (H100, H200, B200) | 16 | 8 | 2 |
//!
//! Groups are taken in the order of k. A sum of 2^128 and more is infinite; zeros are positive.

use super::code::Build;
use super::float::canon;
use crate::error::{Error, Result};

/// How matrix products round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// One f32 fused multiply-add after the other, each rounded to nearest.
    #[default]
    Exact,
    /// As compute capability 8.0 to 8.9.
    Ampere,
    /// As compute capability 9.0 and 10.0.
    Hopper,
}

/// What a tensor core adds at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Products.
    pub group: usize,
    /// Bits kept below those of f32.
    pub extra: i32,
    /// Smallest exponent of a normal factor.
    pub lowest: i32,
}

impl Products {
    /// From `VGPU_MMA`: `exact`, `ampere` or `hopper`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another name.
    pub fn from_env() -> Result<Products> {
        match std::env::var("VGPU_MMA").as_deref().map(str::trim) {
            Err(_) | Ok("" | "exact") => Ok(Products::Exact),
            Ok("ampere") => Ok(Products::Ampere),
            Ok("hopper") => Ok(Products::Hopper),
            Ok(name) => Err(Error::Invalid(format!("VGPU_MMA={name}: known are exact, ampere and hopper"))),
        }
    }

    /// The unit for factors of `bytes` bytes whose smallest normal exponent is `lowest`; none when products are exact.
    #[inline(always)]
    pub fn unit(self, bytes: usize, lowest: i32) -> Option<Unit> {
        let (group, extra) = match self {
            Products::Exact => return None,
            Products::Ampere => (16, 1),
            Products::Hopper => (32, 2),
        };
        Some(Unit { group: group / bytes, extra, lowest })
    }
}

/// Below every exponent: that of zero.
const ZERO: i32 = -4096;

/// Exponent of a factor.
#[inline(always)]
fn exponent(x: f32, lowest: i32) -> i32 {
    let bits = x.to_bits();
    let e = (bits >> 23 & 255) as i32 - 127;
    if bits << 1 == 0 { ZERO } else { e.max(lowest) }
}

/// 2^e, for exponents of normal doubles.
#[inline(always)]
fn power(e: i32) -> f64 {
    f64::from_bits(((1023 + e) as u64) << 52)
}

/// Cut off to f32.
#[inline(always)]
fn cut(x: f64) -> f32 {
    if x.abs() >= power(128) {
        return f32::INFINITY.copysign(x as f32);
    }
    let near = x as f32;
    let over = f64::from(near).abs() > x.abs();
    f32::from_bits(near.to_bits() - u32::from(over))
}

/// Adds `a b` to eight columns of sums. `a` holds rows of `stride` numbers, of which as many count as `b` has.
pub fn multiply(sums: &mut [[f32; 8]], a: &[f32], stride: usize, b: &[[f32; 8]], unit: Unit, build: Build) {
    #[cfg(target_arch = "x86_64")]
    if build == Build::V3 {
        // SAFETY: a program is only decoded for V3 when the processor supports it (`Module::load_for`).
        return unsafe { multiply_v3(sums, a, stride, b, unit) };
    }
    let _ = build;
    multiply_body(sums, a, stride, b, unit);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt,f16c,movbe")]
fn multiply_v3(sums: &mut [[f32; 8]], a: &[f32], stride: usize, b: &[[f32; 8]], unit: Unit) {
    multiply_body(sums, a, stride, b, unit);
}

#[inline(always)]
fn multiply_body(sums: &mut [[f32; 8]], a: &[f32], stride: usize, b: &[[f32; 8]], unit: Unit) {
    let mut right = [[0; 8]; 32];
    for (e, b) in right.iter_mut().zip(b) {
        *e = b.map(|x| exponent(x, unit.lowest));
    }
    let whole = |v: &[f32]| v.iter().all(|x| x.is_finite());
    let right_whole = whole(b.as_flattened());
    for (sums, a) in sums.iter_mut().zip(a.chunks(stride)) {
        let a = &a[..b.len()];
        let factors_whole = right_whole && whole(a);
        for first in (0..b.len()).step_by(unit.group) {
            let part = first..(first + unit.group).min(b.len());
            let before = *sums;
            group(sums, &a[part.clone()], &b[part.clone()], &right[part.clone()], unit);
            if factors_whole && whole(&before) {
                continue;
            }
            for c in 0..8 {
                let products = || part.clone().map(|k| f64::from(a[k]) * f64::from(b[k][c]));
                if !before[c].is_finite() || products().any(|p| !p.is_finite()) {
                    // Infinities and NaN: what any order of adding gives.
                    sums[c] = canon(products().fold(f64::from(before[c]), |s, p| s + p) as f32);
                }
            }
        }
    }
}

/// One group of products in eight columns; those with infinities or NaN come out as anything.
#[inline(always)]
fn group(sums: &mut [f32; 8], a: &[f32], b: &[[f32; 8]], right: &[[i32; 8]], unit: Unit) {
    let mut top = sums.map(|c| exponent(c, -126));
    for (x, right) in a.iter().zip(right) {
        let e = exponent(*x, unit.lowest);
        for c in 0..8 {
            top[c] = top[c].max(e + right[c]);
        }
    }
    // A column of zeros has no exponent; its sum is zero with any.
    let top = top.map(|e| e.max(-300));
    let (mut up, mut down, mut total) = ([0.0; 8], [0.0; 8], [0.0; 8]);
    for c in 0..8 {
        up[c] = power(23 + unit.extra - top[c]);
        down[c] = power(top[c] - 23 - unit.extra);
        total[c] = (f64::from(sums[c]) * up[c]).trunc();
    }
    for (x, b) in a.iter().zip(b) {
        let x = f64::from(*x);
        for c in 0..8 {
            // Exact: 48 bits at most, and below 2^27 after the shift, so that the sum of all is exact too.
            total[c] += (x * f64::from(b[c]) * up[c]).trunc();
        }
    }
    for c in 0..8 {
        // Adding zero makes the zero positive.
        sums[c] = cut(total[c] * down[c] + 0.0);
    }
}
