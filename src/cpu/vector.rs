//! The small formulas inside vectorised loops: exp, dot, sums in fixed lanes.
//!
//! Everything here is branchless and inlined into loops compiled per instruction level, see [`multiversion`].
//!
//! [`multiversion`]: super::level

use super::elem::Elem;
use super::level::Isa;

/// Lanes of every running sum: the order of a sum is the same at every vector width up to this one.
pub const LANES: usize = 16;

/// e^x to about 1 ulp: `2^n · p(r)` with `r = x - n ln 2`, `|r| <= ln 2 / 2`, and p the Taylor polynomial of degree 7.
/// Overflows to infinity, underflows to 0; NaN stays NaN.
#[inline(always)]
pub fn exp<I: Isa>(x: f32) -> f32 {
    // Adding 1.5·2^23 rounds to an integer that stands in the low bits of the sum.
    const MAGIC: f32 = 12_582_912.0;
    // Comparisons are written so that NaN passes through.
    let x = if x > 100.0 { 100.0 } else { x };
    let x = if x < -110.0 { -110.0 } else { x };
    let t = I::fma(x, std::f32::consts::LOG2_E, MAGIC);
    let n = t - MAGIC;
    // ln 2 in two parts; the first has few bits, so that n times it is exact.
    let r = I::fma(n, -0.693_359_4, x);
    let r = I::fma(n, 2.121_944_4e-4, r);
    let p = I::fma(1.0 / 5040.0, r, 1.0 / 720.0);
    let p = I::fma(p, r, 1.0 / 120.0);
    let p = I::fma(p, r, 1.0 / 24.0);
    let p = I::fma(p, r, 1.0 / 6.0);
    let p = I::fma(p, r, 0.5);
    let p = I::fma(p, r, 1.0);
    let p = I::fma(p, r, 1.0);
    // 2^n in two factors: n reaches beyond the exponents of a normal number.
    let n = t.to_bits().wrapping_sub(MAGIC.to_bits()) as i32;
    let half = n >> 1;
    let rest = n.wrapping_sub(half);
    let scale = |e: i32| f32::from_bits((e.wrapping_add(127) as u32) << 23);
    p * scale(half) * scale(rest)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid<I: Isa>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<I>(-x))
}

/// Sum of the lanes as a fixed tree.
#[inline(always)]
pub fn sum_lanes(mut v: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            v[i] += v[i + width];
        }
        width /= 2;
    }
    v[0]
}

/// `sum f(x[i], y[i])` in [`LANES`] running sums; `f` gets the lane's sum and returns the new one.
#[inline(always)]
pub fn fold2<X: Copy, Y: Copy>(x: &[X], y: &[Y], f: impl Fn(f32, X, Y) -> f32) -> f32 {
    let mut acc = [0.0f32; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let (xr, yr) = (xs.remainder(), ys.remainder());
    for (x, y) in xs.zip(ys) {
        for l in 0..LANES {
            acc[l] = f(acc[l], x[l], y[l]);
        }
    }
    for (l, (&x, &y)) in xr.iter().zip(yr).enumerate() {
        acc[l] = f(acc[l], x, y);
    }
    sum_lanes(acc)
}

/// Dot product.
#[inline(always)]
pub fn dot<I: Isa, X: Elem, Y: Elem>(x: &[X], y: &[Y]) -> f32 {
    fold2(x, y, |acc, x, y| I::fma(x.get(), y.get(), acc))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::level::multiversion;

    multiversion! {
        fn exp_all(out: &mut [f32], x: &[f32]) {
            for (o, &x) in out.iter_mut().zip(x) {
                *o = exp::<I>(x);
            }
        }
    }

    #[test]
    fn exp_is_close_everywhere_and_keeps_what_is_not_finite() {
        let x: Vec<f32> = (-1050..=890).map(|i| i as f32 * 0.1 + 0.0137).collect();
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e30, -1e30, 1e-30];
        for level in crate::cpu::testing::levels() {
            let mut out = vec![0.0; x.len()];
            exp_all(level, &mut out, &x);
            for (&x, &y) in x.iter().zip(&out) {
                let expected = f64::from(x).exp();
                // 1.5 ulp, and the spacing of denormals below the normal range.
                let allowed = expected * 1.8e-7 + 1.5e-45;
                assert!(
                    (f64::from(y) - expected).abs() <= allowed || f64::from(y) == expected as f32 as f64,
                    "{level:?} exp({x}) = {y}"
                );
            }
            let mut out = [0.0; 8];
            exp_all(level, &mut out, &special);
            assert!(out[0].is_nan());
            assert_eq!(out[1..], [f32::INFINITY, 0.0, 1.0, 1.0, f32::INFINITY, 0.0, 1.0]);
        }
    }
}
