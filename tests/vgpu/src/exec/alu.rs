//! Integer, logic and comparison instructions: from opcode to a function over lanes.

use super::code::alu;
use super::float::Mode;
use super::{Alu, Class, Inst, LANES, Lane, Regs, map1, map2, map3};
use crate::ptx::Ty;

/// An opcode in pieces; modifiers are taken out as they are understood.
pub struct Op<'a> {
    /// Mnemonic.
    pub base: &'a str,
    /// Modifiers nobody has taken yet.
    pub mods: Vec<&'a str>,
}

impl<'a> Op<'a> {
    /// Splits at the dots.
    pub fn new(opcode: &'a str) -> Op<'a> {
        let mut parts = opcode.split('.');
        Op { base: parts.next().unwrap_or(""), mods: parts.collect() }
    }

    /// Takes a modifier if it is there.
    pub fn take(&mut self, name: &str) -> bool {
        let at = self.mods.iter().position(|m| *m == name);
        at.map(|i| self.mods.remove(i)).is_some()
    }

    /// Takes the last modifier as a type.
    pub fn ty(&mut self) -> Option<Ty> {
        let ty = Ty::from_name(self.mods.last()?)?;
        self.mods.pop();
        Some(ty)
    }

    /// Takes a rounding mode.
    pub fn mode(&mut self) -> Option<Mode> {
        for (name, mode) in [("rn", Mode::Rn), ("rz", Mode::Rz), ("rm", Mode::Rm), ("rp", Mode::Rp)] {
            if self.take(name) {
                return Some(mode);
            }
        }
        None
    }
}

/// A decoded arithmetic opcode: function, type of the destination, types of the sources.
pub struct Arith {
    /// The function.
    pub f: Alu,
    /// Destination type.
    pub d: Ty,
    /// Source types.
    pub src: Vec<Ty>,
    /// For the counters.
    pub class: Class,
    /// Variant of the function, for [`Inst::k`].
    pub k: u8,
}

pub(super) fn arith(f: Alu, d: Ty, src: &[Ty]) -> Option<Arith> {
    let class = match src.first() {
        Some(Ty::F32 | Ty::F64 | Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2 | Ty::F32x2) => Class::Float,
        _ => Class::Integer,
    };
    Some(Arith { f, d, src: src.to_vec(), class, k: 0 })
}

macro_rules! f1 {
    ($t:ty, |$a:ident| $e:expr) => {
        alu!(|r, i, m| map1(r, i, m, |$a: $t| $e))
    };
}
macro_rules! f2 {
    ($t:ty, |$a:ident, $b:ident| $e:expr) => {
        alu!(|r, i, m| map2(r, i, m, |$a: $t, $b: $t| $e))
    };
}
macro_rules! f3 {
    ($t:ty, |$a:ident, $b:ident, $c:ident| $e:expr) => {
        alu!(|r, i, m| map3(r, i, m, |$a: $t, $b: $t, $c: $t| $e))
    };
}
/// One body for the six integer types.
macro_rules! ints {
    ($ty:expr, $mac:ident, |$($a:ident),+| $e:expr) => {
        match $ty {
            Ty::U16 | Ty::B16 => $mac!(u16, |$($a),+| $e),
            Ty::S16 => $mac!(i16, |$($a),+| $e),
            Ty::U32 | Ty::B32 => $mac!(u32, |$($a),+| $e),
            Ty::S32 => $mac!(i32, |$($a),+| $e),
            Ty::U64 | Ty::B64 => $mac!(u64, |$($a),+| $e),
            Ty::S64 => $mac!(i64, |$($a),+| $e),
            _ => return None,
        }
    };
}
pub(super) use {f1, f2, f3};

fn is_int(t: Ty) -> bool {
    matches!(t, Ty::U16 | Ty::S16 | Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64)
}

/// Integer and logic opcodes.
pub fn integer(op: &mut Op<'_>) -> Option<Arith> {
    let (base, ty) = (op.base, op.ty()?);
    if ty == Ty::Pred {
        let f: Alu = match base {
            "and" => alu!(|r, i, m| logic(r, i, m, |a, b| a & b)),
            "or" => alu!(|r, i, m| logic(r, i, m, |a, b| a | b)),
            "xor" => alu!(|r, i, m| logic(r, i, m, |a, b| a ^ b)),
            "not" => alu!(|r, i, m| write_pred(r, i.d, !pred(r, i.a, i.k & 1 != 0), m)),
            "mov" => alu!(|r, i, m| write_pred(r, i.d, pred(r, i.a, i.k & 1 != 0), m)),
            _ => return None,
        };
        let n = if matches!(base, "not" | "mov") { 1 } else { 2 };
        return arith(f, ty, &[Ty::Pred, Ty::Pred][..n]);
    }
    let two = [ty; 2];
    let wide = match ty {
        Ty::U16 => Some(Ty::U32),
        Ty::S16 => Some(Ty::S32),
        Ty::U32 => Some(Ty::U64),
        Ty::S32 => Some(Ty::S64),
        _ => None,
    };
    match base {
        "add" if is_int(ty) => {
            if op.take("sat") {
                return (ty == Ty::S32).then(|| arith(f2!(i32, |a, b| a.saturating_add(b)), ty, &two))?;
            }
            arith(ints!(ty, f2, |a, b| a.wrapping_add(b)), ty, &two)
        }
        "sub" if is_int(ty) => {
            if op.take("sat") {
                return (ty == Ty::S32).then(|| arith(f2!(i32, |a, b| a.saturating_sub(b)), ty, &two))?;
            }
            arith(ints!(ty, f2, |a, b| a.wrapping_sub(b)), ty, &two)
        }
        "mul" if is_int(ty) && op.take("lo") => arith(ints!(ty, f2, |a, b| a.wrapping_mul(b)), ty, &two),
        "mul" if op.take("wide") => arith(mul_wide(ty)?, wide?, &two),
        "mul" if op.take("hi") => arith(mul_hi(ty)?, ty, &two),
        "mul24" => {
            let high = op.take("hi");
            op.take("lo");
            let f = match (ty, high) {
                (Ty::U32, false) => f2!(u32, |a, b| product24(a, b) as u32),
                (Ty::U32, true) => f2!(u32, |a, b| (product24(a, b) >> 16) as u32),
                (Ty::S32, false) => f2!(i32, |a, b| signed24(a, b) as i32),
                (Ty::S32, true) => f2!(i32, |a, b| (signed24(a, b) >> 16) as i32),
                _ => return None,
            };
            arith(f, ty, &two)
        }
        "mad24" => {
            let (high, sat) = (op.take("hi"), op.take("sat"));
            op.take("lo");
            let f = match (ty, high, sat) {
                (Ty::U32, false, _) => f3!(u32, |a, b, c| (product24(a, b) as u32).wrapping_add(c)),
                (Ty::U32, true, _) => f3!(u32, |a, b, c| ((product24(a, b) >> 16) as u32).wrapping_add(c)),
                (Ty::S32, false, _) => f3!(i32, |a, b, c| (signed24(a, b) as i32).wrapping_add(c)),
                (Ty::S32, true, false) => f3!(i32, |a, b, c| ((signed24(a, b) >> 16) as i32).wrapping_add(c)),
                (Ty::S32, true, true) => f3!(i32, |a, b, c| ((signed24(a, b) >> 16) as i32).saturating_add(c)),
                _ => return None,
            };
            arith(f, ty, &[ty; 3])
        }
        "mad" if is_int(ty) && op.take("lo") => {
            arith(ints!(ty, f3, |a, b, c| a.wrapping_mul(b).wrapping_add(c)), ty, &[ty; 3])
        }
        "mad" if op.take("wide") => arith(mad_wide(ty)?, wide?, &[ty, ty, wide?]),
        "mad" if op.take("hi") => {
            if op.take("sat") {
                let f = f3!(i32, |a, b, c| (((i64::from(a) * i64::from(b)) >> 32) as i32).saturating_add(c));
                return arith(f, ty, &[ty; 3]);
            }
            let f = match ty {
                Ty::U16 => f3!(u16, |a, b, c| ((u32::from(a) * u32::from(b)) >> 16).wrapping_add(u32::from(c)) as u16),
                Ty::S16 => f3!(i16, |a, b, c| (((i32::from(a) * i32::from(b)) >> 16) as i16).wrapping_add(c)),
                Ty::U32 => f3!(u32, |a, b, c| ((u64::from(a) * u64::from(b)) >> 32).wrapping_add(u64::from(c)) as u32),
                Ty::S32 => f3!(i32, |a, b, c| (((i64::from(a) * i64::from(b)) >> 32) as i32).wrapping_add(c)),
                Ty::U64 => f3!(u64, |a, b, c| (((u128::from(a) * u128::from(b)) >> 64) as u64).wrapping_add(c)),
                Ty::S64 => f3!(i64, |a, b, c| (((i128::from(a) * i128::from(b)) >> 64) as i64).wrapping_add(c)),
                _ => return None,
            };
            arith(f, ty, &[ty; 3])
        }
        // Division by zero gives all ones and its remainder the dividend, as the hardware sequences do.
        "div" if is_int(ty) => arith(ints!(ty, f2, |a, b| if b == 0 { !0 } else { a.wrapping_div(b) }), ty, &two),
        "rem" if is_int(ty) => arith(ints!(ty, f2, |a, b| if b == 0 { a } else { a.wrapping_rem(b) }), ty, &two),
        "min" if is_int(ty) => arith(ints!(ty, f2, |a, b| a.min(b)), ty, &two),
        "max" if is_int(ty) => arith(ints!(ty, f2, |a, b| a.max(b)), ty, &two),
        "neg" if ty.signed() => {
            let f = match ty {
                Ty::S16 => f1!(i16, |a| a.wrapping_neg()),
                Ty::S32 => f1!(i32, |a| a.wrapping_neg()),
                _ => f1!(i64, |a| a.wrapping_neg()),
            };
            arith(f, ty, &[ty])
        }
        "abs" if ty.signed() => {
            let f = match ty {
                Ty::S16 => f1!(i16, |a| a.wrapping_abs()),
                Ty::S32 => f1!(i32, |a| a.wrapping_abs()),
                _ => f1!(i64, |a| a.wrapping_abs()),
            };
            arith(f, ty, &[ty])
        }
        "and" => arith(ints!(ty, f2, |a, b| a & b), ty, &two),
        "or" => arith(ints!(ty, f2, |a, b| a | b), ty, &two),
        "xor" => arith(ints!(ty, f2, |a, b| a ^ b), ty, &two),
        "not" => arith(ints!(ty, f1, |a| !a), ty, &[ty]),
        "mov" => {
            let f = if ty.size() == 8 { f1!(u64, |a| a) } else { f1!(u32, |a| a) };
            let mut m = arith(f, ty, &[ty])?;
            m.class = Class::Integer;
            Some(m)
        }
        "shl" | "shr" => arith(shift(base, ty)?, ty, &[ty, Ty::U32]),
        "shf" => arith(funnel(op)?, ty, &[Ty::B32, Ty::B32, Ty::U32]),
        "popc" | "clz" | "brev" => {
            let f = match (base, ty) {
                ("popc", Ty::B32) => f1!(u32, |a| a.count_ones()),
                ("popc", Ty::B64) => f1!(u64, |a| a.count_ones()),
                ("clz", Ty::B32) => f1!(u32, |a| a.leading_zeros()),
                ("clz", Ty::B64) => f1!(u64, |a| a.leading_zeros()),
                ("brev", Ty::B32) => f1!(u32, |a| a.reverse_bits()),
                ("brev", Ty::B64) => f1!(u64, |a| a.reverse_bits()),
                _ => return None,
            };
            arith(f, if base == "brev" { ty } else { Ty::U32 }, &[ty])
        }
        "bfind" => {
            let shift = op.take("shiftamt");
            // Signed values look for the first bit that differs from the sign.
            let f = match (ty, shift) {
                (Ty::U32, false) => f1!(u32, |a| 31u32.wrapping_sub(a.leading_zeros())),
                (Ty::U32, true) => f1!(u32, |a| if a == 0 { !0 } else { a.leading_zeros() }),
                (Ty::S32, false) => f1!(i32, |a| 31u32.wrapping_sub((a ^ (a >> 31)).leading_zeros())),
                (Ty::U64, false) => f1!(u64, |a| 63u32.wrapping_sub(a.leading_zeros())),
                (Ty::S64, false) => f1!(i64, |a| 63u32.wrapping_sub((a ^ (a >> 63)).leading_zeros())),
                (Ty::S32, true) => f1!(i32, |a| distance(u64::from((a ^ (a >> 31)) as u32), 32)),
                (Ty::U64, true) => f1!(u64, |a| distance(a, 64)),
                (Ty::S64, true) => f1!(i64, |a| distance((a ^ (a >> 63)) as u64, 64)),
                _ => return None,
            };
            arith(f, Ty::U32, &[ty])
        }
        "sad" => {
            let f = match ty {
                Ty::U16 => f3!(u16, |a, b, c| a.abs_diff(b).wrapping_add(c)),
                Ty::S16 => f3!(i16, |a, b, c| (a.abs_diff(b) as i16).wrapping_add(c)),
                Ty::U64 => f3!(u64, |a, b, c| a.abs_diff(b).wrapping_add(c)),
                Ty::S64 => f3!(i64, |a, b, c| (a.abs_diff(b) as i64).wrapping_add(c)),
                Ty::U32 => f3!(u32, |a, b, c| a.abs_diff(b).wrapping_add(c)),
                Ty::S32 => f3!(i32, |a, b, c| (a.abs_diff(b) as i32).wrapping_add(c)),
                _ => return None,
            };
            arith(f, ty, &[ty; 3])
        }
        "cnot" => {
            let f = match ty {
                Ty::B16 => f1!(u16, |a| u16::from(a == 0)),
                Ty::B32 => f1!(u32, |a| u32::from(a == 0)),
                Ty::B64 => f1!(u64, |a| u64::from(a == 0)),
                _ => return None,
            };
            arith(f, ty, &[ty])
        }
        _ => None,
    }
}

/// Product of the low 24 bits; `hi` forms take its bits 16 to 47.
#[inline(always)]
fn product24(a: u32, b: u32) -> u64 {
    u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff)
}

#[inline(always)]
fn signed24(a: i32, b: i32) -> i64 {
    i64::from(a << 8 >> 8) * i64::from(b << 8 >> 8)
}

fn mul_wide(ty: Ty) -> Option<Alu> {
    Some(match ty {
        Ty::U16 => f2!(u16, |a, b| u32::from(a) * u32::from(b)),
        Ty::S16 => f2!(i16, |a, b| i32::from(a) * i32::from(b)),
        Ty::U32 => f2!(u32, |a, b| u64::from(a) * u64::from(b)),
        Ty::S32 => f2!(i32, |a, b| i64::from(a) * i64::from(b)),
        _ => return None,
    })
}

fn mul_hi(ty: Ty) -> Option<Alu> {
    Some(match ty {
        Ty::U16 => f2!(u16, |a, b| ((u32::from(a) * u32::from(b)) >> 16) as u16),
        Ty::S16 => f2!(i16, |a, b| ((i32::from(a) * i32::from(b)) >> 16) as i16),
        Ty::U32 => f2!(u32, |a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32),
        Ty::S32 => f2!(i32, |a, b| ((i64::from(a) * i64::from(b)) >> 32) as i32),
        Ty::U64 => f2!(u64, |a, b| ((u128::from(a) * u128::from(b)) >> 64) as u64),
        Ty::S64 => f2!(i64, |a, b| ((i128::from(a) * i128::from(b)) >> 64) as i64),
        _ => return None,
    })
}

fn mad_wide(ty: Ty) -> Option<Alu> {
    Some(match ty {
        Ty::U16 => {
            alu!(|r, i, m| map3(r, i, m, |a: u16, b: u16, c: u32| (u32::from(a) * u32::from(b)).wrapping_add(c)))
        }
        Ty::S16 => {
            alu!(|r, i, m| map3(r, i, m, |a: i16, b: i16, c: i32| (i32::from(a) * i32::from(b)).wrapping_add(c)))
        }
        Ty::U32 => {
            alu!(|r, i, m| map3(r, i, m, |a: u32, b: u32, c: u64| (u64::from(a) * u64::from(b)).wrapping_add(c)))
        }
        Ty::S32 => {
            alu!(|r, i, m| map3(r, i, m, |a: i32, b: i32, c: i64| (i64::from(a) * i64::from(b)).wrapping_add(c)))
        }
        _ => return None,
    })
}

/// Amounts above the width give zero or the sign.
fn shift(base: &str, ty: Ty) -> Option<Alu> {
    Some(match (base, ty) {
        ("shl", Ty::B16) => alu!(|r, i, m| map2(r, i, m, |a: u16, b: u32| a.checked_shl(b).unwrap_or(0))),
        ("shl", Ty::B32) => alu!(|r, i, m| map2(r, i, m, |a: u32, b: u32| a.checked_shl(b).unwrap_or(0))),
        ("shl", Ty::B64) => alu!(|r, i, m| map2(r, i, m, |a: u64, b: u32| a.checked_shl(b).unwrap_or(0))),
        ("shr", Ty::B16 | Ty::U16) => alu!(|r, i, m| map2(r, i, m, |a: u16, b: u32| a.checked_shr(b).unwrap_or(0))),
        ("shr", Ty::B32 | Ty::U32) => alu!(|r, i, m| map2(r, i, m, |a: u32, b: u32| a.checked_shr(b).unwrap_or(0))),
        ("shr", Ty::B64 | Ty::U64) => alu!(|r, i, m| map2(r, i, m, |a: u64, b: u32| a.checked_shr(b).unwrap_or(0))),
        ("shr", Ty::S16) => alu!(|r, i, m| map2(r, i, m, |a: i16, b: u32| a >> b.min(15))),
        ("shr", Ty::S32) => alu!(|r, i, m| map2(r, i, m, |a: i32, b: u32| a >> b.min(31))),
        ("shr", Ty::S64) => alu!(|r, i, m| map2(r, i, m, |a: i64, b: u32| a >> b.min(63))),
        _ => return None,
    })
}

fn funnel(op: &mut Op<'_>) -> Option<Alu> {
    let (left, right) = (op.take("l"), op.take("r"));
    let (wrap, clamp) = (op.take("wrap"), op.take("clamp"));
    if left == right || wrap == clamp {
        return None;
    }
    Some(match (left, wrap) {
        (true, true) => f3!(u32, |a, b, c| ((join(a, b) << (c & 31)) >> 32) as u32),
        (true, false) => f3!(u32, |a, b, c| ((join(a, b) << c.min(32)) >> 32) as u32),
        (false, true) => f3!(u32, |a, b, c| (join(a, b) >> (c & 31)) as u32),
        (false, false) => f3!(u32, |a, b, c| (join(a, b) >> c.min(32)) as u32),
    })
}

/// Left shift that brings the highest set bit to the top; all ones for zero.
#[inline(always)]
fn distance(a: u64, width: u32) -> u32 {
    if a == 0 { u32::MAX } else { a.leading_zeros() - (64 - width) }
}

#[inline(always)]
fn join(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

#[inline(always)]
pub(super) fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = join(a, b).to_le_bytes();
    let pick = |n: u32| {
        let s = selector >> (4 * n) & 15;
        let byte = bytes[(s & 7) as usize];
        u32::from(if s & 8 == 0 { byte } else { (byte as i8 >> 7) as u8 }) << (8 * n)
    };
    pick(0) | pick(1) | pick(2) | pick(3)
}

/// `bfe` and `bfi`: position and length are the low bytes of their operands.
pub fn bit_field(op: &mut Op<'_>) -> Option<Arith> {
    let ty = op.ty()?;
    let f: Alu = match (op.base, ty) {
        ("bfe", Ty::U32) => {
            alu!(|r, i, m| map3(r, i, m, |a: u32, b: u32, c: u32| extract(u64::from(a), b, c, 32, false) as u32))
        }
        ("bfe", Ty::S32) => {
            alu!(|r, i, m| map3(r, i, m, |a: u32, b: u32, c: u32| extract(u64::from(a), b, c, 32, true) as u32))
        }
        ("bfe", Ty::U64) => alu!(|r, i, m| map3(r, i, m, |a: u64, b: u32, c: u32| extract(a, b, c, 64, false))),
        ("bfe", Ty::S64) => alu!(|r, i, m| map3(r, i, m, |a: u64, b: u32, c: u32| extract(a, b, c, 64, true))),
        // The fourth operand of bfi is a row number in `x`.
        ("bfi", Ty::B32) => alu!(|r, i, m| {
            let n = u32::get(r, i.x as u16);
            let (a, b, c) = (u32::get(r, i.a), u32::get(r, i.b), u32::get(r, i.c));
            let v = std::array::from_fn(|l| insert(u64::from(a[l]), u64::from(b[l]), c[l], n[l], 32) as u32);
            u32::put(r, i.d, v, m);
        }),
        ("bfi", Ty::B64) => alu!(|r, i, m| {
            let n = u32::get(r, i.x as u16);
            let (a, b, c) = (u64::get(r, i.a), u64::get(r, i.b), u32::get(r, i.c));
            u64::put(r, i.d, std::array::from_fn(|l| insert(a[l], b[l], c[l], n[l], 64)), m);
        }),
        _ => return None,
    };
    let src = if op.base == "bfe" { vec![ty, Ty::U32, Ty::U32] } else { vec![ty, ty, Ty::U32, Ty::U32] };
    arith(f, ty, &src)
}

#[inline(always)]
fn extract(a: u64, pos: u32, len: u32, width: u32, signed: bool) -> u64 {
    let (pos, len) = (pos & 255, len & 255);
    let top = (pos + len).wrapping_sub(1).min(width - 1);
    let fill = signed && len > 0 && a >> top & 1 == 1;
    (0..width).fold(0, |out, i| {
        let bit = if i < len && pos + i < width { a >> (pos + i) & 1 } else { u64::from(fill) };
        out | bit << i
    })
}

#[inline(always)]
fn insert(a: u64, b: u64, pos: u32, len: u32, width: u32) -> u64 {
    let (pos, len) = (pos & 255, len & 255);
    if pos >= width || len == 0 {
        return b;
    }
    let ones = if len >= 64 { !0 } else { (1u64 << len) - 1 };
    let mask = ones << pos;
    b & !mask | (a << pos) & mask
}

/// A predicate row, negated on demand.
#[inline(always)]
pub fn pred(r: &Regs, row: u16, not: bool) -> u32 {
    let p = r.p[row as usize];
    if not { !p } else { p }
}

/// Writes the lanes of `mask` of a predicate.
#[inline(always)]
pub fn write_pred(r: &mut Regs, row: u16, bits: u32, mask: u32) {
    if row != super::NONE {
        let p = &mut r.p[row as usize];
        *p = *p & !mask | bits & mask;
    }
}

#[inline(always)]
fn logic(r: &mut Regs, i: &Inst, m: u32, f: impl Fn(u32, u32) -> u32) {
    let v = f(pred(r, i.a, i.k & 1 != 0), pred(r, i.b, i.k & 2 != 0));
    write_pred(r, i.d, v, m);
}

/// Compares lanes, then combines with predicate `c` as `k` says (0 none, 1 and, 2 or, 3 xor; 4: `c` negated) and
/// writes `d` and, if asked, the complement to row `x`.
#[inline(always)]
pub fn compare<T: Lane>(r: &mut Regs, i: &Inst, m: u32, f: impl Fn(T, T) -> bool) {
    let (a, b) = (T::row(r, i.a), T::row(r, i.b));
    let mut bits = 0u32;
    for l in 0..LANES {
        bits |= if f(T::of(a[l]), T::of(b[l])) { 1 << l } else { 0 };
    }
    let mut other = !bits;
    if i.k & 3 != 0 {
        let c = pred(r, i.c, i.k & 4 != 0);
        let combine = |x: u32| match i.k & 3 {
            1 => x & c,
            2 => x | c,
            _ => x ^ c,
        };
        (bits, other) = (combine(bits), combine(other));
    }
    // `set` gives the value in `y` where `setp` gives a predicate.
    if i.y != 0 {
        u32::put(r, i.d, std::array::from_fn(|l| (bits >> l & 1) * i.y), m);
        return;
    }
    write_pred(r, i.d, bits, m);
    write_pred(r, i.x as u16, other, m);
}

/// Comparison function of an integer type.
pub fn compare_int(name: &str, ty: Ty) -> Option<Alu> {
    macro_rules! cmp {
        ($t:ty, |$a:ident, $b:ident| $e:expr) => {
            alu!(|r, i, m| compare(r, i, m, |$a: $t, $b: $t| $e))
        };
    }
    Some(match name {
        "eq" => ints!(ty, cmp, |a, b| a == b),
        "ne" => ints!(ty, cmp, |a, b| a != b),
        "lt" | "lo" => ints!(ty, cmp, |a, b| a < b),
        "le" | "ls" => ints!(ty, cmp, |a, b| a <= b),
        "gt" | "hi" => ints!(ty, cmp, |a, b| a > b),
        "ge" | "hs" => ints!(ty, cmp, |a, b| a >= b),
        _ => return None,
    })
}
