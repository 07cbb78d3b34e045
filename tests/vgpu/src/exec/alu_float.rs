//! Floating-point instructions: f32, f64, f16 and bf16 with their packed forms.

use super::alu::{Arith, Op, arith, compare, f1, f2, f3};
use super::code::alu;
use super::float::{self, BF16, F16, Format, Mode, canon, flush, saturate};
use super::{Alu, Inst, Lane, Regs, map1, map2, map3};
use crate::ptx::Ty;

/// `$f` with flush-to-zero of inputs and result, and saturation, chosen by two flags.
macro_rules! variants {
    ($ftz:expr, $sat:expr, $mac:ident, |$($a:ident),+| $e:expr) => {
        match ($ftz, $sat) {
            (false, false) => $mac!(f32, |$($a),+| canon($e)),
            (true, false) => $mac!(f32, |$($a),+| { $(let $a = flush($a);)+ canon(flush($e)) }),
            (false, true) => $mac!(f32, |$($a),+| saturate($e)),
            (true, true) => $mac!(f32, |$($a),+| { $(let $a = flush($a);)+ saturate(flush($e)) }),
        }
    };
}

/// The body under each rounding mode as a constant, so that nearest stays a plain instruction.
macro_rules! modes {
    ($mode:expr, |$m:ident| $e:expr) => {
        match $mode {
            Mode::Rn => {
                const $m: Mode = Mode::Rn;
                $e
            }
            Mode::Rz => {
                const $m: Mode = Mode::Rz;
                $e
            }
            Mode::Rm => {
                const $m: Mode = Mode::Rm;
                $e
            }
            Mode::Rp => {
                const $m: Mode = Mode::Rp;
                $e
            }
        }
    };
}

/// Floating-point opcodes.
pub fn floating(op: &mut Op<'_>) -> Option<Arith> {
    match op.ty()? {
        Ty::F32 => single(op),
        Ty::F64 => double(op),
        Ty::F32x2 => pair(op),
        ty @ (Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2) => half(op, ty),
        _ => None,
    }
}

fn single(op: &mut Op<'_>) -> Option<Arith> {
    let (ftz, sat, mode) = (op.take("ftz"), op.take("sat"), op.mode());
    let (approx, full) = (op.take("approx"), op.take("full"));
    let t = Ty::F32;
    let rn = mode.unwrap_or(Mode::Rn);
    if sat && !matches!(op.base, "add" | "sub" | "mul" | "fma" | "mad") || mode.is_some() && (approx || full) {
        return None;
    }
    let f: Alu = match op.base {
        "add" if rn == Mode::Rn => variants!(ftz, sat, f2, |a, b| a + b),
        "sub" if rn == Mode::Rn => variants!(ftz, sat, f2, |a, b| a - b),
        "mul" if rn == Mode::Rn => variants!(ftz, sat, f2, |a, b| a * b),
        "add" => modes!(rn, |M| variants!(ftz, sat, f2, |a, b| float::add32(a, b, M))),
        "sub" => modes!(rn, |M| variants!(ftz, sat, f2, |a, b| float::add32(a, -b, M))),
        "mul" => modes!(rn, |M| variants!(ftz, sat, f2, |a, b| float::mul32(a, b, M))),
        "fma" | "mad" if mode == Some(Mode::Rn) => variants!(ftz, sat, f3, |a, b, c| a.mul_add(b, c)),
        "fma" | "mad" if mode.is_some() => modes!(rn, |M| variants!(ftz, sat, f3, |a, b, c| float::fma32(a, b, c, M))),
        "div" if mode.is_some() => modes!(rn, |M| variants!(ftz, false, f2, |a, b| float::div32(a, b, M))),
        "div" if approx || full => variants!(ftz, false, f2, |a, b| a / b),
        "rcp" if mode.is_some() => modes!(rn, |M| variants!(ftz, false, f1, |a| float::div32(1.0, a, M))),
        "rcp" if approx => variants!(ftz, false, f1, |a| 1.0 / a),
        "sqrt" if mode.is_some() => modes!(rn, |M| variants!(ftz, false, f1, |a| float::sqrt32(a, M))),
        "sqrt" if approx => variants!(ftz, false, f1, |a| a.sqrt()),
        "rsqrt" if approx => variants!(ftz, false, f1, |a| (1.0 / f64::from(a).sqrt()) as f32),
        "ex2" if approx => variants!(ftz, false, f1, |a| float::exp2_32(a)),
        "lg2" if approx => variants!(ftz, false, f1, |a| f64::from(a).log2() as f32),
        "sin" if approx => variants!(ftz, false, f1, |a| f64::from(a).sin() as f32),
        "cos" if approx => variants!(ftz, false, f1, |a| f64::from(a).cos() as f32),
        "tanh" if approx && !ftz => variants!(false, false, f1, |a| f64::from(a).tanh() as f32),
        "abs" if ftz => f1!(f32, |a| flush(a).abs()),
        "abs" => f1!(f32, |a| a.abs()),
        "neg" if ftz => f1!(f32, |a| -flush(a)),
        "neg" => f1!(f32, |a| -a),
        "min" | "max" if op.mods.contains(&"xorsign") => {
            let nan = op.take("NaN");
            op.take("xorsign");
            op.take("abs");
            match (op.base == "min", nan) {
                (true, false) => variants!(ftz, false, f2, |a, b| cross(a, b, minimum(a.abs(), b.abs()))),
                (true, true) => {
                    variants!(ftz, false, f2, |a, b| cross(a, b, either_nan(a, b, minimum(a.abs(), b.abs()))))
                }
                (false, false) => variants!(ftz, false, f2, |a, b| cross(a, b, maximum(a.abs(), b.abs()))),
                (false, true) => {
                    variants!(ftz, false, f2, |a, b| cross(a, b, either_nan(a, b, maximum(a.abs(), b.abs()))))
                }
            }
        }
        "min" | "max" => {
            let nan = op.take("NaN");
            match (op.base == "min", nan) {
                (true, false) => variants!(ftz, false, f2, |a, b| minimum(a, b)),
                (true, true) => variants!(ftz, false, f2, |a, b| either_nan(a, b, minimum(a, b))),
                (false, false) => variants!(ftz, false, f2, |a, b| maximum(a, b)),
                (false, true) => variants!(ftz, false, f2, |a, b| either_nan(a, b, maximum(a, b))),
            }
        }
        // Sign of a, magnitude of b.
        "copysign" => f2!(f32, |a, b| b.copysign(a)),
        "mov" => f1!(u32, |a| a),
        _ => return None,
    };
    let n = sources(op.base);
    if matches!(op.base, "ex2" | "lg2" | "sin" | "cos" | "tanh" | "rsqrt") && mode.is_some() {
        return None;
    }
    arith(f, t, &[t; 3][..n])
}

fn sources(base: &str) -> usize {
    match base {
        "fma" | "mad" => 3,
        "add" | "sub" | "mul" | "div" | "min" | "max" | "copysign" => 2,
        _ => 1,
    }
}

/// IEEE minimumNumber with -0 below +0.
#[inline(always)]
fn minimum(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        b
    } else if b.is_nan() {
        a
    } else if a == b {
        f32::from_bits(if a.is_sign_negative() { a.to_bits() } else { b.to_bits() })
    } else if a < b {
        a
    } else {
        b
    }
}

/// IEEE maximumNumber with +0 above -0.
#[inline(always)]
fn maximum(a: f32, b: f32) -> f32 {
    -minimum(-a, -b)
}

/// The sign that `.xorsign.abs` gives the magnitude `x`.
#[inline(always)]
fn cross(a: f32, b: f32, x: f32) -> f32 {
    f32::from_bits(x.to_bits() & 0x7fff_ffff | (a.to_bits() ^ b.to_bits()) & 0x8000_0000)
}

#[inline(always)]
fn either_nan(a: f32, b: f32, x: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { x }
}

fn double(op: &mut Op<'_>) -> Option<Arith> {
    let (mode, t) = (op.mode(), Ty::F64);
    let rn = mode.unwrap_or(Mode::Rn);
    let (approx, ftz) = (op.take("approx"), op.take("ftz"));
    let f: Alu = match op.base {
        // The approximations work on the upper half of their operand and leave the lower half of the result zero.
        "rcp" if approx => f1!(f64, |a| upper(1.0 / upper(a))),
        "rsqrt" if approx && ftz => f1!(f64, |a| upper(1.0 / upper(a).sqrt())),
        "rsqrt" if approx => f1!(f64, |a| 1.0 / a.sqrt()),
        "add" => modes!(rn, |M| f2!(f64, |a, b| float::add64(a, b, M))),
        "sub" => modes!(rn, |M| f2!(f64, |a, b| float::add64(a, -b, M))),
        "mul" => modes!(rn, |M| f2!(f64, |a, b| float::mul64(a, b, M))),
        "fma" | "mad" if mode.is_some() => modes!(rn, |M| f3!(f64, |a, b, c| float::fma64(a, b, c, M))),
        "div" if mode.is_some() => modes!(rn, |M| f2!(f64, |a, b| float::div64(a, b, M))),
        "rcp" if mode.is_some() => modes!(rn, |M| f1!(f64, |a| float::div64(1.0, a, M))),
        "sqrt" if mode.is_some() => modes!(rn, |M| f1!(f64, |a| float::sqrt64(a, M))),
        "abs" => f1!(f64, |a| a.abs()),
        "neg" => f1!(f64, |a| -a),
        "min" => f2!(f64, |a, b| minimum64(a, b)),
        "max" => f2!(f64, |a, b| -minimum64(-a, -b)),
        "copysign" => f2!(f64, |a, b| b.copysign(a)),
        "mov" => f1!(u64, |a| a),
        _ => return None,
    };
    arith(f, t, &[t; 3][..sources(op.base)])
}

/// IEEE minimumNumber in double precision.
#[inline(always)]
fn minimum64(a: f64, b: f64) -> f64 {
    match () {
        () if a.is_nan() => b,
        () if b.is_nan() => a,
        () if a == b => f64::from_bits(if a.is_sign_negative() { a.to_bits() } else { b.to_bits() }),
        () if a < b => a,
        () => b,
    }
}

/// Flushed to zero and cut to its upper 32 bits.
#[inline(always)]
fn upper(a: f64) -> f64 {
    if a.is_nan() {
        return f64::from_bits(0x7fff_ffff_0000_0000);
    }
    let flushed = if a.abs() < f64::MIN_POSITIVE { 0f64.copysign(a) } else { a };
    f64::from_bits(flushed.to_bits() & !0xffff_ffff)
}

/// Two f32 in 64 bits, each on its own.
fn pair(op: &mut Op<'_>) -> Option<Arith> {
    let (mode, ftz) = (op.mode().unwrap_or(Mode::Rn), op.take("ftz"));
    macro_rules! both {
        (|$($a:ident),+| $e:expr) => {
            match ftz {
                false => two!(|$($a),+| canon($e)),
                true => two!(|$($a),+| { $(let $a = flush($a);)+ canon(flush($e)) }),
            }
        };
    }
    macro_rules! two {
        (|$a:ident, $b:ident| $e:expr) => {
            f2!(u64, |a, b| halves32([a, b, 0], |$a, $b, _| $e))
        };
        (|$a:ident, $b:ident, $c:ident| $e:expr) => {
            f3!(u64, |a, b, c| halves32([a, b, c], |$a, $b, $c| $e))
        };
    }
    let f: Alu = match op.base {
        "add" => modes!(mode, |M| both!(|a, b| float::add32(a, b, M))),
        "sub" => modes!(mode, |M| both!(|a, b| float::add32(a, -b, M))),
        "mul" => modes!(mode, |M| both!(|a, b| float::mul32(a, b, M))),
        "fma" => modes!(mode, |M| both!(|a, b, c| float::fma32(a, b, c, M))),
        _ => return None,
    };
    arith(f, Ty::F32x2, &[Ty::F32x2; 3][..sources(op.base)])
}

#[inline(always)]
fn halves32(x: [u64; 3], f: impl Fn(f32, f32, f32) -> f32) -> u64 {
    let low = |x: u64| f32::from_bits(x as u32);
    let high = |x: u64| f32::from_bits((x >> 32) as u32);
    let [a, b, c] = x;
    u64::from(f(low(a), low(b), low(c)).to_bits()) | u64::from(f(high(a), high(b), high(c)).to_bits()) << 32
}

/// Applies a 16-bit operation to both halves of packed values.
#[inline(always)]
fn halves(packed: bool, x: [u32; 3], f: impl Fn(u16, u16, u16) -> u16) -> u32 {
    let low = u32::from(f(x[0] as u16, x[1] as u16, x[2] as u16));
    if !packed {
        return low;
    }
    low | u32::from(f((x[0] >> 16) as u16, (x[1] >> 16) as u16, (x[2] >> 16) as u16)) << 16
}

#[inline(always)]
fn half_op<const BF: bool, const PACKED: bool>(
    r: &mut Regs,
    i: &Inst,
    m: u32,
    f: impl Fn(Format, u16, u16, u16) -> u16,
) {
    let format = if BF { BF16 } else { F16 };
    let (a, b, c) = (u32::get(r, i.a), u32::get(r, i.b), u32::get(r, i.c));
    if i.k == 0 {
        let v = std::array::from_fn(|l| halves(PACKED, [a[l], b[l], c[l]], |x, y, z| f(format, x, y, z)));
        return u32::put(r, i.d, v, m);
    }
    let v = std::array::from_fn(|l| {
        halves(PACKED, [a[l], b[l], c[l]], |x, y, z| modified(format, i.k, [x, y, z], |x, y, z| f(format, x, y, z)))
    });
    u32::put(r, i.d, v, m);
}

fn half(op: &mut Op<'_>, ty: Ty) -> Option<Arith> {
    macro_rules! h {
        (|$f:ident, $a:ident, $b:ident, $c:ident| $e:expr) => {
            match ty {
                Ty::F16 => alu!(|r, i, m| half_op::<false, false>(r, i, m, |$f, $a, $b, $c| $e)),
                Ty::F16x2 => alu!(|r, i, m| half_op::<false, true>(r, i, m, |$f, $a, $b, $c| $e)),
                Ty::Bf16 => alu!(|r, i, m| half_op::<true, false>(r, i, m, |$f, $a, $b, $c| $e)),
                _ => alu!(|r, i, m| half_op::<true, true>(r, i, m, |$f, $a, $b, $c| $e)),
            }
        };
    }
    let mode = op.mode();
    if mode.is_some_and(|m| m != Mode::Rn) {
        return None;
    }
    let (ftz, sat, relu, nan) = (op.take("ftz"), op.take("sat"), op.take("relu"), op.take("NaN"));
    let cross = op.take("xorsign") && op.take("abs");
    let approx = op.take("approx");
    let f = match op.base {
        "add" => h!(|f, a, b, _c| f.fma(a, f.pack(1.0, Mode::Rn), b)),
        "sub" => h!(|f, a, b, _c| f.fma(b, f.pack(-1.0, Mode::Rn), a)),
        "mul" => h!(|f, a, b, _c| f.pack(f64::from(f.unpack(a)) * f64::from(f.unpack(b)), Mode::Rn)),
        "fma" if mode.is_some() => h!(|f, a, b, c| f.fma(a, b, c)),
        "neg" => h!(|_f, a, _b, _c| a ^ 0x8000),
        "abs" => h!(|_f, a, _b, _c| a & 0x7fff),
        "min" if nan => {
            h!(|f, a, b, _c| pick(f, either_nan(f.unpack(a), f.unpack(b), minimum(f.unpack(a), f.unpack(b)))))
        }
        "max" if nan => {
            h!(|f, a, b, _c| pick(f, either_nan(f.unpack(a), f.unpack(b), maximum(f.unpack(a), f.unpack(b)))))
        }
        "min" => h!(|f, a, b, _c| pick(f, minimum(f.unpack(a), f.unpack(b)))),
        "max" => h!(|f, a, b, _c| pick(f, maximum(f.unpack(a), f.unpack(b)))),
        "ex2" if approx => h!(|f, a, _b, _c| f.pack(f64::from(f.unpack(a)).exp2(), Mode::Rn)),
        "tanh" if approx => h!(|f, a, _b, _c| f.pack(f64::from(f.unpack(a)).tanh(), Mode::Rn)),
        _ => return None,
    };
    let mut a = arith(f, ty, &[ty; 3][..sources(op.base)])?;
    a.k = [ftz, sat, relu, cross].iter().enumerate().map(|(n, on)| u8::from(*on) << n).sum();
    Some(a)
}

/// An operation with `k` of: 1 flush subnormals, 2 saturate, 4 negative to zero, 8 magnitudes with
/// the product of the signs.
#[inline(always)]
fn modified(f: Format, k: u8, x: [u16; 3], op: impl Fn(u16, u16, u16) -> u16) -> u16 {
    let flushed = |x: u16| if k & 1 != 0 && f.subnormal(x) { x & 0x8000 } else { x };
    let mut y = x.map(flushed);
    if k & 8 != 0 {
        y = y.map(|x| x & 0x7fff);
    }
    let mut d = flushed(op(y[0], y[1], y[2]));
    if k & 2 != 0 {
        d = f.pack(f64::from(saturate(f.unpack(d))), Mode::Rn);
    }
    if k & 4 != 0 {
        d = relu(f, d);
    }
    if k & 8 != 0 {
        d = d & 0x7fff | (x[0] ^ x[1]) & 0x8000;
    }
    d
}

#[inline(always)]
fn relu(f: Format, x: u16) -> u16 {
    if f.unpack(x) > 0.0 || f.unpack(x).is_nan() { x } else { 0 }
}

#[inline(always)]
fn pick(f: Format, value: f32) -> u16 {
    f.pack(f64::from(value), Mode::Rn)
}

/// Comparison function of a float type.
pub fn compare_float(name: &str, ty: Ty, ftz: bool) -> Option<Alu> {
    macro_rules! cmp {
        (|$a:ident, $b:ident| $e:expr) => {
            match (ty, ftz) {
                (Ty::F32, false) => alu!(|r, i, m| compare(r, i, m, |$a: f32, $b: f32| $e)),
                (Ty::F32, true) => alu!(|r, i, m| {
                    compare(r, i, m, |a: f32, b: f32| {
                        let ($a, $b) = (flush(a), flush(b));
                        $e
                    })
                }),
                (Ty::F64, false) => alu!(|r, i, m| compare(r, i, m, |$a: f64, $b: f64| $e)),
                (Ty::F16, false) => alu!(|r, i, m| {
                    compare(r, i, m, |a: u16, b: u16| {
                        let ($a, $b) = (F16.unpack(a), F16.unpack(b));
                        $e
                    })
                }),
                (Ty::F16, true) => alu!(|r, i, m| {
                    compare(r, i, m, |a: u16, b: u16| {
                        let f = |x: u16| F16.unpack(if F16.subnormal(x) { x & 0x8000 } else { x });
                        let ($a, $b) = (f(a), f(b));
                        $e
                    })
                }),
                (Ty::Bf16, false) => alu!(|r, i, m| {
                    compare(r, i, m, |a: u16, b: u16| {
                        let ($a, $b) = (BF16.unpack(a), BF16.unpack(b));
                        $e
                    })
                }),
                _ => return None,
            }
        };
    }
    let f: Alu = match name {
        "eq" => cmp!(|a, b| a == b),
        "ne" => cmp!(|a, b| a != b && !a.is_nan() && !b.is_nan()),
        "lt" => cmp!(|a, b| a < b),
        "le" => cmp!(|a, b| a <= b),
        "gt" => cmp!(|a, b| a > b),
        "ge" => cmp!(|a, b| a >= b),
        "equ" => cmp!(|a, b| a == b || a.is_nan() || b.is_nan()),
        "neu" => cmp!(|a, b| a != b),
        "ltu" => cmp!(|a, b| a < b || a.is_nan() || b.is_nan()),
        "leu" => cmp!(|a, b| a <= b || a.is_nan() || b.is_nan()),
        "gtu" => cmp!(|a, b| a > b || a.is_nan() || b.is_nan()),
        "geu" => cmp!(|a, b| a >= b || a.is_nan() || b.is_nan()),
        "num" => cmp!(|a, b| !a.is_nan() && !b.is_nan()),
        "nan" => cmp!(|a, b| a.is_nan() || b.is_nan()),
        _ => return None,
    };
    Some(f)
}
