//! Exact arithmetic on floats of any format: fixed point wide enough for every product of doubles, rounded once at the end.

/// Limbs of 64 bits; bit 0 is worth 2^-2240.
const LIMBS: usize = 72;
const UNIT: i32 = -2240;

/// A float format: fraction and exponent bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    pub fraction: i32,
    pub exponent: i32,
}

pub const F16: Format = Format { fraction: 10, exponent: 5 };
pub const BF16: Format = Format { fraction: 7, exponent: 8 };
pub const F32: Format = Format { fraction: 23, exponent: 8 };
pub const F64: Format = Format { fraction: 52, exponent: 11 };
pub const TF32: Format = Format { fraction: 10, exponent: 8 };

/// Magnitude in fixed point.
#[derive(Clone, PartialEq, Eq)]
pub struct Fixed([u64; LIMBS]);

/// A number, its sign, and whether something below the fixed point was cut off.
#[derive(Clone, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "a test holds a few of them at a time")]
pub enum Number {
    Nan,
    Infinite(bool),
    Finite(bool, Fixed, bool),
}

impl Fixed {
    fn zero() -> Fixed {
        Fixed([0; LIMBS])
    }

    /// `m * 2^e`, which must fit.
    fn of(m: u128, e: i32) -> Fixed {
        let mut out = Fixed::zero();
        let at = (e - UNIT) as usize;
        for i in 0..128 {
            if m >> i & 1 == 1 {
                out.0[(at + i) / 64] |= 1 << ((at + i) % 64);
            }
        }
        out
    }

    fn is_zero(&self) -> bool {
        self.0.iter().all(|x| *x == 0)
    }

    fn less(&self, o: &Fixed) -> bool {
        self.0.iter().rev().lt(o.0.iter().rev())
    }

    fn add(&self, o: &Fixed) -> Fixed {
        let (mut out, mut carry) = (Fixed::zero(), 0u128);
        for i in 0..LIMBS {
            carry += u128::from(self.0[i]) + u128::from(o.0[i]);
            out.0[i] = carry as u64;
            carry >>= 64;
        }
        out
    }

    fn sub(&self, o: &Fixed) -> Fixed {
        let (mut out, mut borrow) = (Fixed::zero(), false);
        for i in 0..LIMBS {
            let (x, a) = self.0[i].overflowing_sub(o.0[i]);
            let (x, b) = x.overflowing_sub(u64::from(borrow));
            out.0[i] = x;
            borrow = a | b;
        }
        out
    }

    /// Position of the highest bit, as a power of two.
    fn top(&self) -> Option<i32> {
        let i = self.0.iter().rposition(|x| *x != 0)?;
        Some(UNIT + 64 * i as i32 + 63 - self.0[i].leading_zeros() as i32)
    }

    fn bit(&self, at: usize) -> bool {
        at / 64 < LIMBS && self.0[at / 64] >> (at % 64) & 1 == 1
    }

    /// Bits from 2^e up, and whether what is below is zero, less than, equal to or more than half of 2^e.
    fn cut(&self, e: i32, sticky: bool) -> (u128, u8) {
        let at = (e - UNIT) as usize;
        let above = (0..128).fold(0, |m, i| m | u128::from(self.bit(at + i)) << i);
        let half = at > 0 && self.bit(at - 1);
        let below = sticky || (0..at.saturating_sub(1)).any(|i| self.bit(i));
        (above, u8::from(half) * 2 + u8::from(below))
    }
}

/// Rounding: the modes of the ISA, and ties away from zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Nearest,
    Zero,
    Down,
    Up,
    Away,
}

impl Format {
    fn bias(self) -> i32 {
        (1 << (self.exponent - 1)) - 1
    }

    fn sign_bit(self) -> u64 {
        1 << (self.fraction + self.exponent)
    }

    /// Mantissa and power of two of finite bits.
    fn parts(self, bits: u64) -> (bool, u128, i32) {
        let field = (bits >> self.fraction) as i32 & ((1 << self.exponent) - 1);
        let f = u128::from(bits) & ((1 << self.fraction) - 1);
        let low = 1 - self.bias() - self.fraction;
        let neg = bits & self.sign_bit() != 0;
        if field == 0 { (neg, f, low) } else { (neg, f | 1 << self.fraction, low + field - 1) }
    }

    /// Mantissa of full length and power of two of finite bits that are not zero.
    fn normal(self, bits: u64) -> (u128, i32) {
        let (_, mut m, mut e) = self.parts(bits);
        while m >> self.fraction == 0 {
            (m, e) = (m << 1, e - 1);
        }
        (m, e)
    }

    pub fn is_nan(self, bits: u64) -> bool {
        bits & (self.sign_bit() - 1) > self.infinity()
    }

    pub fn infinity(self) -> u64 {
        ((1 << self.exponent) - 1) << self.fraction
    }

    pub fn subnormal(self, bits: u64) -> bool {
        let m = bits & (self.sign_bit() - 1);
        m != 0 && m >> self.fraction == 0
    }

    /// Zero of the same sign for subnormals.
    pub fn flush(self, bits: u64) -> u64 {
        if self.subnormal(bits) { bits & self.sign_bit() } else { bits }
    }

    pub fn read(self, bits: u64) -> Number {
        let magnitude = bits & (self.sign_bit() - 1);
        if magnitude > self.infinity() {
            return Number::Nan;
        }
        if magnitude == self.infinity() {
            return Number::Infinite(bits & self.sign_bit() != 0);
        }
        let (neg, m, e) = self.parts(bits);
        Number::Finite(neg, Fixed::of(m, e), false)
    }

    /// Bits of the number in this format; `None` for NaN.
    pub fn write(self, n: &Number, mode: Mode) -> Option<u64> {
        let (neg, x, sticky) = match n {
            Number::Nan => return None,
            Number::Infinite(neg) => return Some(self.infinity() | if *neg { self.sign_bit() } else { 0 }),
            Number::Finite(neg, x, sticky) => (*neg, x, *sticky),
        };
        let sign = if neg { self.sign_bit() } else { 0 };
        let low = 1 - self.bias() - self.fraction;
        let unit = x.top().map_or(low, |t| (t - self.fraction).max(low));
        let (mut m, rest) = x.cut(unit, sticky);
        let up = match mode {
            Mode::Nearest => rest == 3 || rest == 2 && m & 1 == 1,
            Mode::Away => rest >= 2,
            Mode::Zero => false,
            Mode::Down => neg && rest > 0,
            Mode::Up => !neg && rest > 0,
        };
        m += u128::from(up);
        // The hidden bit carries into the exponent by itself.
        let bits = m + (((unit - low) as u128) << self.fraction);
        let bits = bits.min(u128::from(self.infinity())) as u64;
        if bits < self.infinity() {
            return Some(sign | bits);
        }
        let to_max = match mode {
            Mode::Nearest | Mode::Away => false,
            Mode::Zero => true,
            Mode::Down => !neg,
            Mode::Up => neg,
        };
        Some(sign | (self.infinity() - u64::from(to_max)))
    }
}

impl Number {
    pub fn whole(x: i128) -> Number {
        Number::Finite(x < 0, Fixed::of(x.unsigned_abs(), 0), false)
    }

    pub fn negative(&self) -> Number {
        match self {
            Number::Nan => Number::Nan,
            Number::Infinite(n) => Number::Infinite(!n),
            Number::Finite(n, x, s) => Number::Finite(!n, x.clone(), *s),
        }
    }

    /// An exact zero has the sign of both, or minus when rounding down and plus otherwise.
    pub fn add(&self, o: &Number, mode: Mode) -> Number {
        match (self, o) {
            (Number::Nan, _) | (_, Number::Nan) => Number::Nan,
            (Number::Infinite(a), Number::Infinite(b)) if a != b => Number::Nan,
            (Number::Infinite(a), _) | (_, Number::Infinite(a)) => Number::Infinite(*a),
            (Number::Finite(a, x, _), Number::Finite(b, y, _)) => {
                if a == b {
                    return Number::Finite(*a, x.add(y), false);
                }
                match (x.less(y), x == y) {
                    (_, true) => Number::Finite(mode == Mode::Down, Fixed::zero(), false),
                    (true, _) => Number::Finite(*b, y.sub(x), false),
                    _ => Number::Finite(*a, x.sub(y), false),
                }
            }
        }
    }

    pub fn is_zero(&self) -> bool {
        matches!(self, Number::Finite(_, x, false) if x.is_zero())
    }

    fn sign(&self) -> bool {
        matches!(self, Number::Infinite(true) | Number::Finite(true, ..))
    }

    /// Rounds to a whole number.
    pub fn round(&self, mode: Mode) -> Number {
        let Number::Finite(neg, x, s) = self else {
            return self.clone();
        };
        if x.top().is_some_and(|t| t >= 120) {
            return self.clone();
        }
        let (m, rest) = x.cut(0, *s);
        let up = match mode {
            Mode::Nearest => rest == 3 || rest == 2 && m & 1 == 1,
            Mode::Away => rest >= 2,
            Mode::Zero => false,
            Mode::Down => *neg && rest > 0,
            Mode::Up => !*neg && rest > 0,
        };
        Number::Finite(*neg, Fixed::of(m + u128::from(up), 0), false)
    }

    /// A whole number clamped to a range; NaN has no value.
    pub fn clamp(&self, low: i128, high: i128) -> Option<i128> {
        match self {
            Number::Nan => None,
            Number::Infinite(n) => Some(if *n { low } else { high }),
            Number::Finite(n, x, _) => {
                if x.top().is_some_and(|t| t >= 100) {
                    return Some(if *n { low } else { high });
                }
                let m = x.cut(0, false).0 as i128;
                Some((if *n { -m } else { m }).clamp(low, high))
            }
        }
    }
}

/// `a * b` exactly.
pub fn product(f: Format, a: u64, b: u64) -> Number {
    let (x, y) = (f.read(a), f.read(b));
    let neg = x.sign() != y.sign();
    match (&x, &y) {
        (Number::Nan, _) | (_, Number::Nan) => Number::Nan,
        (Number::Infinite(_), o) | (o, Number::Infinite(_)) => {
            if o.is_zero() {
                Number::Nan
            } else {
                Number::Infinite(neg)
            }
        }
        _ => {
            let ((_, m, e), (_, n, g)) = (f.parts(a), f.parts(b));
            Number::Finite(neg, Fixed::of(m * n, e + g), false)
        }
    }
}

/// `a / b`, with what 74 bits cut off as the sticky part.
pub fn quotient(f: Format, a: u64, b: u64) -> Number {
    let (x, y) = (f.read(a), f.read(b));
    let neg = x.sign() != y.sign();
    match (&x, &y) {
        (Number::Nan, _) | (_, Number::Nan) | (Number::Infinite(_), Number::Infinite(_)) => Number::Nan,
        (Number::Infinite(_), _) => Number::Infinite(neg),
        (_, Number::Infinite(_)) => Number::Finite(neg, Fixed::zero(), false),
        _ if y.is_zero() => {
            if x.is_zero() {
                Number::Nan
            } else {
                Number::Infinite(neg)
            }
        }
        _ if x.is_zero() => Number::Finite(neg, Fixed::zero(), false),
        _ => {
            let ((m, e), (n, g)) = (f.normal(a), f.normal(b));
            let q = (m << 74) / n;
            Number::Finite(neg, Fixed::of(q, e - g - 74), q * n != m << 74)
        }
    }
}

/// Square root, likewise.
pub fn root(f: Format, a: u64) -> Number {
    match f.read(a) {
        Number::Nan | Number::Infinite(true) => Number::Nan,
        Number::Infinite(false) => Number::Infinite(false),
        x if x.is_zero() => x,
        Number::Finite(true, ..) => Number::Nan,
        _ => {
            let (m, e) = f.normal(a);
            // An even power of two, and enough bits for the root.
            let shift = 70 + (e & 1).abs();
            let m = m << shift;
            let r = m.isqrt();
            Number::Finite(false, Fixed::of(r, (e - shift) / 2), r * r != m)
        }
    }
}
