//! Arithmetic of reductions: in rank order, 16-bit floats in f32, one rounding at the end.

pub use crate::call::{Dtype, ReduceOp};

/// Elements per pass; accumulators of a pass stay in the first cache.
const PASS: usize = 512;

/// The value of a bf16.
#[inline(always)]
pub fn from_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// The nearest bf16, ties to even; every NaN stays a NaN.
#[inline(always)]
pub fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    (if x.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
}

/// The value of an f16.
#[inline(always)]
pub fn from_f16(x: u16) -> f32 {
    let sign = u32::from(x & 0x8000) << 16;
    let magnitude = u32::from(x & 0x7fff) << 13;
    // The exponent moves by 112; the product handles normal and subnormal numbers alike.
    let scaled = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    let special = magnitude | 0x7f80_0000;
    f32::from_bits(sign | if magnitude >= 0x0f80_0000 { special } else { scaled })
}

/// The nearest f16, ties to even; every NaN stays a NaN.
#[inline(always)]
pub fn to_f16(x: f32) -> u16 {
    let sign = (x.to_bits() >> 16 & 0x8000) as u16;
    let bits = x.to_bits() & 0x7fff_ffff;
    // Adding a power of two whose last bit is that of the smallest f16 rounds subnormal results.
    let magic = f32::from_bits(0x3f00_0000);
    let small = (f32::from_bits(bits.min(0x3880_0000)) + magic).to_bits().wrapping_sub(0x3f00_0000);
    let normal = bits.wrapping_sub(0x3800_0000).wrapping_add(0xfff + (bits >> 13 & 1)) >> 13;
    let magnitude = match bits {
        0x7f80_0001.. => 0x7e00 | (bits >> 13 & 0x3ff),
        0x4780_0000.. => 0x7c00,
        0x3880_0000.. => normal.min(0x7c00),
        _ => small,
    };
    sign | magnitude as u16
}

/// An element type: its bytes, and the type that sums are held in.
trait Element {
    type Acc: Copy + Default;
    const SIZE: usize;
    fn load(bytes: &[u8]) -> Self::Acc;
    fn store(bytes: &mut [u8], x: Self::Acc);
    fn add(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    fn mul(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    fn less(a: Self::Acc, b: Self::Acc) -> bool;
    /// Whether the value is no number, so that the other one wins.
    fn void(a: Self::Acc) -> bool;
    fn divide(a: Self::Acc, n: usize) -> Self::Acc;
}

macro_rules! integer {
    ($name:ident, $t:ty) => {
        struct $name;
        impl Element for $name {
            type Acc = $t;
            const SIZE: usize = size_of::<$t>();
            #[inline(always)]
            fn load(bytes: &[u8]) -> $t {
                <$t>::from_le_bytes(bytes.try_into().expect("the size of the type"))
            }
            #[inline(always)]
            fn store(bytes: &mut [u8], x: $t) {
                bytes.copy_from_slice(&x.to_le_bytes());
            }
            #[inline(always)]
            fn add(a: $t, b: $t) -> $t {
                a.wrapping_add(b)
            }
            #[inline(always)]
            fn mul(a: $t, b: $t) -> $t {
                a.wrapping_mul(b)
            }
            #[inline(always)]
            fn less(a: $t, b: $t) -> bool {
                a < b
            }
            #[inline(always)]
            fn void(_: $t) -> bool {
                false
            }
            #[inline(always)]
            fn divide(a: $t, n: usize) -> $t {
                // At most 64 ranks: the number fits each type.
                a.wrapping_div(n as $t)
            }
        }
    };
}

macro_rules! float {
    ($name:ident, $acc:ty, $raw:ty, $load:expr, $store:expr) => {
        struct $name;
        impl Element for $name {
            type Acc = $acc;
            const SIZE: usize = size_of::<$raw>();
            #[inline(always)]
            fn load(bytes: &[u8]) -> $acc {
                $load(<$raw>::from_le_bytes(bytes.try_into().expect("the size of the type")))
            }
            #[inline(always)]
            fn store(bytes: &mut [u8], x: $acc) {
                bytes.copy_from_slice(&$store(x).to_le_bytes());
            }
            #[inline(always)]
            fn add(a: $acc, b: $acc) -> $acc {
                a + b
            }
            #[inline(always)]
            fn mul(a: $acc, b: $acc) -> $acc {
                a * b
            }
            #[inline(always)]
            fn less(a: $acc, b: $acc) -> bool {
                a < b
            }
            #[inline(always)]
            fn void(a: $acc) -> bool {
                a.is_nan()
            }
            #[inline(always)]
            fn divide(a: $acc, n: usize) -> $acc {
                a / n as $acc
            }
        }
    };
}

integer!(I8, i8);
integer!(U8, u8);
integer!(I32, i32);
integer!(U32, u32);
integer!(I64, i64);
integer!(U64, u64);
float!(F16, f32, u16, from_f16, to_f16);
float!(Bf16, f32, u16, from_bf16, to_bf16);
float!(F32, f32, f32, |x| x, |x| x);
float!(F64, f64, f64, |x| x, |x| x);

/// `out[i] = op over r of parts[r][i]`, in the order of `parts`. All have the length of `out`; `factors` holds the
/// bits of each rank's factor for [`ReduceOp::PreMulSum`].
///
/// # Panics
/// If lengths differ or the type has no arithmetic: callers check both before.
pub fn reduce(dtype: Dtype, op: ReduceOp, out: &mut [u8], parts: &[&[u8]], factors: &[u64]) {
    match dtype {
        Dtype::I8 => by_op::<I8>(op, out, parts, factors),
        Dtype::U8 => by_op::<U8>(op, out, parts, factors),
        Dtype::I32 => by_op::<I32>(op, out, parts, factors),
        Dtype::U32 => by_op::<U32>(op, out, parts, factors),
        Dtype::I64 => by_op::<I64>(op, out, parts, factors),
        Dtype::U64 => by_op::<U64>(op, out, parts, factors),
        Dtype::F16 => by_op::<F16>(op, out, parts, factors),
        Dtype::F32 => by_op::<F32>(op, out, parts, factors),
        Dtype::F64 => by_op::<F64>(op, out, parts, factors),
        Dtype::Bf16 => by_op::<Bf16>(op, out, parts, factors),
        Dtype::Fp8E4 | Dtype::Fp8E5 => panic!("8-bit floats have no arithmetic here"),
    }
}

fn by_op<E: Element>(op: ReduceOp, out: &mut [u8], parts: &[&[u8]], factors: &[u64]) {
    let n = parts.len();
    let same = |x, _: usize| x;
    match op {
        ReduceOp::Sum => fold::<E>(out, parts, same, E::add, |x| x),
        ReduceOp::Prod => fold::<E>(out, parts, same, E::mul, |x| x),
        ReduceOp::Avg => fold::<E>(out, parts, same, E::add, |x| E::divide(x, n)),
        ReduceOp::PreMulSum => {
            let factor = |r: usize| E::load(&factors[r].to_le_bytes()[..E::SIZE]);
            fold::<E>(out, parts, |x, r| E::mul(x, factor(r)), E::add, |x| x);
        }
        // A NaN loses against a number, as fmax and fmin have it.
        ReduceOp::Max => {
            let f = |a, b| if E::less(a, b) || E::void(a) { b } else { a };
            fold::<E>(out, parts, same, f, |x| x);
        }
        ReduceOp::Min => {
            let f = |a, b| if E::less(b, a) || E::void(a) { b } else { a };
            fold::<E>(out, parts, same, f, |x| x);
        }
    }
}

#[inline(always)]
fn fold<E: Element>(
    out: &mut [u8],
    parts: &[&[u8]],
    before: impl Fn(E::Acc, usize) -> E::Acc,
    join: impl Fn(E::Acc, E::Acc) -> E::Acc,
    after: impl Fn(E::Acc) -> E::Acc,
) {
    let mut sums = [E::Acc::default(); PASS];
    for (pass, out) in out.chunks_mut(PASS * E::SIZE).enumerate() {
        let at = pass * PASS * E::SIZE;
        let n = out.len() / E::SIZE;
        for (r, part) in parts.iter().enumerate() {
            let elements = part[at..at + out.len()].chunks_exact(E::SIZE);
            for (sum, x) in sums[..n].iter_mut().zip(elements) {
                let x = before(E::load(x), r);
                *sum = if r == 0 { x } else { join(*sum, x) };
            }
        }
        for (sum, out) in sums[..n].iter().zip(out.chunks_exact_mut(E::SIZE)) {
            E::store(out, after(*sum));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_bit_floats_convert_as_half_does() {
        for x in 0..=u16::MAX {
            let (f, b) = (half::f16::from_bits(x), half::bf16::from_bits(x));
            assert!(from_f16(x).to_bits() == f.to_f32().to_bits() || f.is_nan() && from_f16(x).is_nan());
            assert!(from_bf16(x).to_bits() == b.to_f32().to_bits() || b.is_nan() && from_bf16(x).is_nan());
        }
        // All exponents and signs, with last bits around every tie.
        for high in 0..=u16::MAX {
            for low in [0u32, 1, 0xfff, 0x1000, 0x1001, 0x1fff, 0x7fff, 0x8000, 0x8001, 0xefff, 0xf000, 0xf001, 0xffff]
            {
                let x = f32::from_bits(u32::from(high) << 16 | low);
                if x.is_nan() {
                    assert!(from_f16(to_f16(x)).is_nan() && from_bf16(to_bf16(x)).is_nan());
                } else {
                    assert_eq!(to_f16(x), half::f16::from_f32(x).to_bits(), "{x:e}");
                    assert_eq!(to_bf16(x), half::bf16::from_f32(x).to_bits(), "{x:e}");
                }
            }
        }
    }
}
