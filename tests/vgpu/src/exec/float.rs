//! Rounding: directed modes of f32 and f64, 16-bit floats, flush to zero, canonical NaN.

/// Rounding mode of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// To nearest, ties to even.
    Rn,
    /// Towards zero.
    Rz,
    /// Towards minus infinity.
    Rm,
    /// Towards plus infinity.
    Rp,
}

/// The NaN that single-precision instructions return.
#[inline(always)]
pub fn canon(x: f32) -> f32 {
    // On bits: the compiler counts one NaN as good as another, and drops a choice between two (seen after `sqrt`).
    let bits = x.to_bits();
    let nan = bits & 0x7fff_ffff > 0x7f80_0000;
    f32::from_bits(if nan { 0x7fff_ffff } else { bits })
}

/// Subnormals become zero of the same sign.
#[inline(always)]
pub fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { f32::from_bits(x.to_bits() & 0x8000_0000) } else { x }
}

/// Clamps to [0, 1]; NaN becomes +0.
#[inline(always)]
pub fn saturate(x: f32) -> f32 {
    if x > 0.0 { x.min(1.0) } else { 0.0 }
}

/// A value whose exact form is `s` plus something with the sign of `e`, as the neighbour of `s` with an odd last bit:
/// rounding that to at most 50 bits gives what rounding the exact value gives.
#[inline(always)]
fn odd(s: f64, e: f64) -> f64 {
    if e == 0.0 || !s.is_finite() || s.to_bits() & 1 == 1 {
        return s;
    }
    if s == 0.0 {
        return f64::from_bits(1).copysign(e);
    }
    let up = (e > 0.0) == (s > 0.0);
    f64::from_bits(if up { s.to_bits() + 1 } else { s.to_bits() - 1 })
}

/// Sum and its rounding error.
#[inline(always)]
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let s = a + b;
    let t = s - a;
    (s, (a - (s - t)) + (b - t))
}

/// Rounds an exactly comparable double to f32.
#[inline(always)]
pub fn to_f32(x: f64, mode: Mode) -> f32 {
    let r = x as f32;
    if x.is_nan() || x.is_infinite() {
        return r;
    }
    let wide = f64::from(r);
    match mode {
        Mode::Rm if wide > x => r.next_down(),
        Mode::Rp if wide < x => r.next_up(),
        Mode::Rz if wide.abs() > x.abs() => {
            if r > 0.0 {
                r.next_down()
            } else {
                r.next_up()
            }
        }
        _ => r,
    }
}

/// An exact zero sum of operands with different signs is -0 when rounding down.
#[inline(always)]
fn zero_sign(x: f64, a: f64, b: f64, mode: Mode) -> f64 {
    if x == 0.0 && mode == Mode::Rm && (a.is_sign_negative() || b.is_sign_negative()) { -0.0 } else { x }
}

/// `a * b + c` with one rounding.
#[inline(always)]
pub fn fma32(a: f32, b: f32, c: f32, mode: Mode) -> f32 {
    let (p, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let (s, e) = two_sum(p, c);
    to_f32(zero_sign(odd(s, e), p, c, mode), mode)
}

/// `a + b`.
#[inline(always)]
pub fn add32(a: f32, b: f32, mode: Mode) -> f32 {
    if mode == Mode::Rn {
        return a + b;
    }
    fma32(a, 1.0, b, mode)
}

/// `a * b`.
#[inline(always)]
pub fn mul32(a: f32, b: f32, mode: Mode) -> f32 {
    if mode == Mode::Rn {
        return a * b;
    }
    to_f32(f64::from(a) * f64::from(b), mode)
}

/// `a / b`.
#[inline(always)]
pub fn div32(a: f32, b: f32, mode: Mode) -> f32 {
    if mode == Mode::Rn {
        return a / b;
    }
    let (x, y) = (f64::from(a), f64::from(b));
    let q = x / y;
    if !q.is_finite() || q == 0.0 || y.is_infinite() {
        return to_f32(q, mode);
    }
    let rest = (-q).mul_add(y, x);
    to_f32(odd(q, rest * y.signum()), mode)
}

/// Square root.
#[inline(always)]
pub fn sqrt32(a: f32, mode: Mode) -> f32 {
    if mode == Mode::Rn {
        return a.sqrt();
    }
    let x = f64::from(a);
    let s = x.sqrt();
    if !s.is_finite() || s == 0.0 { s as f32 } else { to_f32(odd(s, (-s).mul_add(s, x)), mode) }
}

/// `2^x` rounded to f32, the double before it off by less than 2^-40: straight arithmetic that becomes vector code.
#[inline(always)]
pub fn exp2_32(x: f32) -> f32 {
    let x = f64::from(x);
    // Beyond this the result is 0 or infinity in any case; NaN goes through.
    let x = if x < -1000.0 { -1000.0 } else { x };
    let x = if x > 1000.0 { 1000.0 } else { x };
    // Adding 1.5 * 2^52 leaves the nearest whole number in the low bits.
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    let shifted = x + SHIFT;
    let t = (x - (shifted - SHIFT)) * std::f64::consts::LN_2;
    // The series of e^t up to t^10; |t| < 0.35, so that what is left out is below 2^-41.
    let series = [
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    let mut y = 0.0;
    for c in series {
        y = y * t + c;
    }
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    (y * power) as f32
}

/// `sig * 2^e` rounded to double precision in a direction. The last bit of `sig` may stand for anything below it.
fn round64(negative: bool, sig: u128, e: i32, mode: Mode) -> f64 {
    const LOW: i32 = -1074;
    let sign = u64::from(negative) << 63;
    if sig == 0 {
        return f64::from_bits(sign);
    }
    let top = 127 - sig.leading_zeros() as i32 + e;
    let unit = (top - 52).max(LOW);
    let shift = unit - e;
    let (m, rest) = match shift {
        ..=0 => ((sig << -shift) as u64, false),
        1..=127 => ((sig >> shift) as u64, sig & ((1 << shift) - 1) != 0),
        _ => (0, true),
    };
    // Nearest has a path of its own: the hardware's.
    let away = rest && (mode == Mode::Rm && negative || mode == Mode::Rp && !negative);
    // The hidden bit carries into the exponent by itself.
    let bits = m + u64::from(away) + (((unit - LOW) as u64) << 52);
    const INFINITE: u64 = 0x7ff << 52;
    if bits < INFINITE {
        return f64::from_bits(sign | bits);
    }
    let to_max = mode == Mode::Rz || mode == Mode::Rm && !negative || mode == Mode::Rp && negative;
    f64::from_bits(sign | (INFINITE - u64::from(to_max)))
}

/// Sign, significand and power of two of a finite double.
fn parts64(x: f64) -> (bool, u128, i32) {
    let bits = x.to_bits();
    let (field, f) = ((bits >> 52) as i32 & 0x7ff, u128::from(bits & ((1 << 52) - 1)));
    let (sig, e) = if field == 0 { (f, -1074) } else { (f | 1 << 52, field - 1075) };
    (x.is_sign_negative(), sig, e)
}

/// [`parts64`] with 53 significant bits for subnormals too.
fn whole64(x: f64) -> (bool, u128, i32) {
    let (neg, sig, e) = parts64(x);
    let up = (sig.leading_zeros() as i32 - 75).max(0);
    if sig == 0 { (neg, sig, e) } else { (neg, sig << up, e - up) }
}

/// Sum of two values with significands of at most 106 bits, rounded once.
fn sum64(a: (bool, u128, i32), b: (bool, u128, i32), mode: Mode) -> f64 {
    // The highest bit goes to bit 125, so that what is lost of the smaller one is far below every rounding.
    let normal = |(neg, sig, e): (bool, u128, i32)| {
        let up = sig.leading_zeros() as i32 - 2;
        (neg, sig << up, e - up)
    };
    if a.1 == 0 || b.1 == 0 {
        let zero = if a.0 == b.0 { a.0 } else { mode == Mode::Rm };
        return match (a.1, b.1) {
            (0, 0) => round64(zero, 0, 0, mode),
            (0, _) => round64(b.0, b.1, b.2, mode),
            _ => round64(a.0, a.1, a.2, mode),
        };
    }
    let (a, b) = (normal(a), normal(b));
    let (big, small) = if (a.2, a.1) >= (b.2, b.1) { (a, b) } else { (b, a) };
    let gap = (big.2 - small.2).min(127) as u32;
    let lost = gap > 0 && small.1 & ((1 << gap) - 1) != 0;
    let moved = small.1 >> gap | u128::from(lost);
    if big.0 == small.0 {
        return round64(big.0, big.1 + moved, big.2, mode);
    }
    let rest = big.1 - moved;
    round64(if rest == 0 { mode == Mode::Rm } else { big.0 }, rest, big.2, mode)
}

/// `a * b + c` in double precision.
#[inline(always)]
pub fn fma64(a: f64, b: f64, c: f64, mode: Mode) -> f64 {
    let near = a.mul_add(b, c);
    if mode == Mode::Rn || !a.is_finite() || !b.is_finite() || !c.is_finite() {
        return near;
    }
    let ((s, m, e), (t, n, f)) = (parts64(a), parts64(b));
    sum64((s != t, m * n, e + f), parts64(c), mode)
}

/// `a + b` in double precision.
#[inline(always)]
pub fn add64(a: f64, b: f64, mode: Mode) -> f64 {
    if mode == Mode::Rn || !a.is_finite() || !b.is_finite() {
        return a + b;
    }
    sum64(parts64(a), parts64(b), mode)
}

/// `a * b` in double precision.
#[inline(always)]
pub fn mul64(a: f64, b: f64, mode: Mode) -> f64 {
    if mode == Mode::Rn || !a.is_finite() || !b.is_finite() {
        return a * b;
    }
    let ((s, m, e), (t, n, f)) = (parts64(a), parts64(b));
    round64(s != t, m * n, e + f, mode)
}

/// `a / b` in double precision.
#[inline(always)]
pub fn div64(a: f64, b: f64, mode: Mode) -> f64 {
    if mode == Mode::Rn || !a.is_finite() || !b.is_finite() || b == 0.0 {
        return a / b;
    }
    let ((s, m, e), (t, n, f)) = (whole64(a), whole64(b));
    let q = (m << 73) / n;
    round64(s != t, q << 1 | u128::from(q * n != m << 73), e - f - 74, mode)
}

/// Square root in double precision.
#[inline(always)]
pub fn sqrt64(a: f64, mode: Mode) -> f64 {
    let near = a.sqrt();
    if mode == Mode::Rn || !near.is_finite() || near == 0.0 {
        return near;
    }
    let (_, m, e) = whole64(a);
    // An even power of two, and more bits than the root needs.
    let up = 70 + (e & 1);
    let m = m << up;
    let r = m.isqrt();
    round64(false, r << 1 | u128::from(r * r != m), (e - up) / 2 - 1, mode)
}

/// A binary float format narrower than f32, by fraction and exponent bits.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// Fraction bits.
    pub fraction: u32,
    /// Exponent bits.
    pub exponent: u32,
}

/// IEEE half.
pub const F16: Format = Format { fraction: 10, exponent: 5 };
/// bfloat16.
pub const BF16: Format = Format { fraction: 7, exponent: 8 };

impl Format {
    /// Bits of `x` rounded to this format; NaN gives the canonical one (0x7fff).
    #[inline(always)]
    pub fn pack(self, x: f64, mode: Mode) -> u16 {
        let sign = u16::from(x.is_sign_negative()) << 15;
        if x.is_nan() {
            return 0x7fff;
        }
        let bias = (1i32 << (self.exponent - 1)) - 1;
        let infinity = ((1u16 << self.exponent) - 1) << self.fraction;
        if x.is_infinite() {
            return sign | infinity;
        }
        let v = x.abs();
        let exponent = ((v.to_bits() >> 52) as i32 - 1023).max(1 - bias);
        // Units of the last place at this exponent; scaling by a power of two is exact.
        let units = v * 2f64.powi(self.fraction as i32 - exponent);
        let whole = match mode {
            Mode::Rn => units.round_ties_even(),
            Mode::Rz => units.floor(),
            Mode::Rm => {
                if sign != 0 {
                    units.ceil()
                } else {
                    units.floor()
                }
            }
            Mode::Rp => {
                if sign != 0 {
                    units.floor()
                } else {
                    units.ceil()
                }
            }
        } as i64;
        // A whole number with its hidden bit added onto the exponent carries into it by itself.
        let bits = whole + (i64::from(exponent + bias - 1) << self.fraction);
        if bits < i64::from(infinity) {
            return sign | bits as u16;
        }
        let to_max = match mode {
            Mode::Rn => false,
            Mode::Rz => true,
            Mode::Rm => sign == 0,
            Mode::Rp => sign != 0,
        };
        sign | (infinity - u16::from(to_max))
    }

    /// The value of bits in this format, exact.
    #[inline(always)]
    pub fn unpack(self, bits: u16) -> f32 {
        if self.exponent == 8 {
            return f32::from_bits(u32::from(bits) << 16);
        }
        let (sign, e, f) = (u32::from(bits >> 15) << 31, u32::from(bits >> 10) & 31, u32::from(bits) & 0x3ff);
        match e {
            0 => f32::from_bits(sign | (f as f32 / 16_777_216.0).to_bits()),
            31 => f32::from_bits(sign | 0x7f80_0000 | f << 13),
            _ => f32::from_bits(sign | (e + 112) << 23 | f << 13),
        }
    }

    /// Whether the bits are a subnormal number.
    #[inline(always)]
    pub fn subnormal(self, bits: u16) -> bool {
        let magnitude = bits & 0x7fff;
        magnitude != 0 && magnitude >> self.fraction == 0
    }

    /// `a * b + c` on bits, with one rounding.
    #[inline(always)]
    pub fn fma(self, a: u16, b: u16, c: u16) -> u16 {
        let (p, c) = (f64::from(self.unpack(a)) * f64::from(self.unpack(b)), f64::from(self.unpack(c)));
        let (s, e) = two_sum(p, c);
        self.pack(odd(s, e), Mode::Rn)
    }
}

/// Round-to-nearest-even bf16 of an f32, the common case, without the detour.
#[inline(always)]
pub fn bf16(x: f32) -> u16 {
    let b = x.to_bits();
    if x.is_nan() { 0x7fff } else { ((b + 0x7fff + (b >> 16 & 1)) >> 16) as u16 }
}
