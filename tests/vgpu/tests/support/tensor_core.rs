//! A tensor core bit by bit, in whole numbers, written from the text of the sources that `src/exec/rounding.rs` names.

/// A 16-bit float: bits of the fraction and exponent bias.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Format {
    pub fraction: i32,
    pub bias: i32,
}

pub const BF16: Format = Format { fraction: 7, bias: 127 };
pub const F16: Format = Format { fraction: 10, bias: 15 };
const F32: Format = Format { fraction: 23, bias: 127 };

/// Sign, exponent and significand, the latter in units of `2^-fraction`; finite numbers.
fn parts(bits: u32, f: Format) -> (bool, i32, i128) {
    let width = if f == F32 { 32 } else { 16 };
    let (exponent, fraction) = (bits << (32 - width + 1) >> (33 - width + f.fraction), bits & ((1 << f.fraction) - 1));
    let normal = exponent != 0;
    let significand = i128::from(fraction) + if normal { 1 << f.fraction } else { 0 };
    (bits >> (width - 1) & 1 == 1, exponent.max(1) as i32 - f.bias, significand)
}

/// `x` shifted left, or right with what falls off cut.
fn shifted(x: i128, by: i32) -> i128 {
    if by >= 0 { x << by } else { x >> (-by).min(127) }
}

/// One group of finite products and the accumulator, with `extra` bits below those of f32.
fn group(extra: i32, f: Format, c: u32, a: &[u32], b: &[u32]) -> u32 {
    if c << 1 == 0xff00_0000 {
        return c;
    }
    // Terms as sign, exponent, significand with 2 * fraction or 23 bits behind the point.
    let mut terms = Vec::new();
    for (x, y) in a.iter().zip(b) {
        let ((s, e, m), (t, g, n)) = (parts(*x, f), parts(*y, f));
        terms.push((s != t, e + g, m * n, 2 * f.fraction));
    }
    let (s, e, m) = parts(c, F32);
    terms.push((s, e, m, 23));
    terms.retain(|t| t.2 != 0);
    let Some(top) = terms.iter().map(|t| t.1).max() else {
        return 0;
    };
    // In units of 2^(top - 23 - extra).
    let mut sum = 0i128;
    for (negative, e, m, point) in terms {
        let aligned = shifted(m, 23 + extra - point - (top - e));
        sum += if negative { -aligned } else { aligned };
    }
    if sum == 0 {
        return 0;
    }
    let (sign, size) = (u32::from(sum < 0) << 31, sum.abs());
    // The leading bit stands for 2^exponent; below the smallest normal number the place of the last bit is fixed.
    let exponent = 127 - size.leading_zeros() as i32 + top - 23 - extra;
    if exponent > 127 {
        return sign | 0x7f80_0000;
    }
    let last = exponent.max(-126) - 23;
    let cut = shifted(size, top - 23 - extra - last) as u32;
    if exponent < -126 { sign | cut } else { sign | ((exponent + 127) as u32) << 23 | cut & 0x7f_ffff }
}

/// `c` plus the products of `a` and `b`, so many at a time.
pub fn sum(size: usize, extra: i32, f: Format, c: u32, a: &[u32], b: &[u32]) -> u32 {
    a.chunks(size).zip(b.chunks(size)).fold(c, |c, (a, b)| group(extra, f, c, a, b))
}

/// Bits of a number: mostly within some powers of two of 1, sometimes zero, subnormal or far away.
pub fn sample(f: Format, mut below: impl FnMut(u64) -> u64) -> u32 {
    let largest = if f == BF16 { 250 } else { 30 };
    let exponent = match below(20) {
        0 => 0,
        1 => below(largest) as u32,
        _ => (f.bias - 6) as u32 + below(12) as u32,
    };
    let fraction = if exponent == 0 && below(2) == 0 { 0 } else { below(1 << f.fraction) as u32 };
    (below(2) as u32) << 15 | exponent << f.fraction | fraction
}
