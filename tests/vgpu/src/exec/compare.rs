//! Comparisons that give values (`set`), classes of floats (`testp`), selection by sign (`slct`), and packed halves.

use super::alu::{Op, compare_int, pred, write_pred};
use super::alu_float::compare_float;
use super::code::alu;
use super::decode::{Decoded, Decoder, file_of};
use super::float::{BF16, F16, Format, flush};
use super::opcode::{need, unknown};
use super::{Alu, Class, File, Inst, LANES, Lane, NONE, Regs, put_raw, raw};
use crate::ptx::{Operand, Ty};

/// Comparison of two values that may be unordered.
#[derive(Clone, Copy)]
struct Test {
    less: bool,
    equal: bool,
    greater: bool,
    unordered: bool,
}

impl Test {
    fn of(name: &str) -> Option<Test> {
        let t = |less, equal, greater, unordered| Test { less, equal, greater, unordered };
        Some(match name {
            "eq" => t(false, true, false, false),
            "ne" => t(true, false, true, false),
            "lt" => t(true, false, false, false),
            "le" => t(true, true, false, false),
            "gt" => t(false, false, true, false),
            "ge" => t(false, true, true, false),
            "equ" => t(false, true, false, true),
            "neu" => t(true, false, true, true),
            "ltu" => t(true, false, false, true),
            "leu" => t(true, true, false, true),
            "gtu" => t(false, false, true, true),
            "geu" => t(false, true, true, true),
            "num" => t(true, true, true, false),
            "nan" => t(false, false, false, true),
            _ => return None,
        })
    }

    /// As a number for [`Inst::y`].
    fn pack(self) -> u32 {
        u32::from(self.less)
            | u32::from(self.equal) << 1
            | u32::from(self.greater) << 2
            | u32::from(self.unordered) << 3
    }
}

#[inline(always)]
fn holds(test: u32, a: f32, b: f32) -> bool {
    let class = match a.partial_cmp(&b) {
        Some(std::cmp::Ordering::Less) => 0,
        Some(std::cmp::Ordering::Equal) => 1,
        Some(std::cmp::Ordering::Greater) => 2,
        None => 3,
    };
    test >> class & 1 == 1
}

#[inline(always)]
fn combine(k: u8, x: u32, c: u32) -> u32 {
    match k & 3 {
        0 => x,
        1 => x & c,
        2 => x | c,
        _ => x ^ c,
    }
}

/// Packed halves compared: bits of the low and of the high half. `y` is the test, bit 4 flushes subnormals.
#[inline(always)]
fn halves(r: &Regs, i: &Inst, f: Format) -> (u32, u32) {
    let (a, b) = (u32::get(r, i.a), u32::get(r, i.b));
    let value = |x: u16| {
        let ftz = i.y & 16 != 0 && x & 0x7c00 == 0;
        f.unpack(if ftz { x & 0x8000 } else { x })
    };
    let (mut low, mut high) = (0, 0);
    for l in 0..LANES {
        low |= u32::from(holds(i.y, value(a[l] as u16), value(b[l] as u16))) << l;
        high |= u32::from(holds(i.y, value((a[l] >> 16) as u16), value((b[l] >> 16) as u16))) << l;
    }
    let c = if i.k & 3 == 0 { 0 } else { pred(r, i.c, i.k & 4 != 0) };
    (combine(i.k, low, c), combine(i.k, high, c))
}

/// `setp` on packed halves: `d` from the low, row `x` from the high ones.
#[inline(always)]
fn pair_predicates(r: &mut Regs, i: &Inst, m: u32, f: Format) {
    let (low, high) = halves(r, i, f);
    write_pred(r, i.d, low, m);
    write_pred(r, i.x as u16, high, m);
}

/// `set` on packed halves: 1.0 or 0 in each.
#[inline(always)]
fn pair_values(r: &mut Regs, i: &Inst, m: u32, f: Format, one: u32) {
    let (low, high) = halves(r, i, f);
    let v = std::array::from_fn(|l| ((low >> l & 1) * one) | (((high >> l & 1) * one) << 16));
    u32::put(r, i.d, v, m);
}

/// `testp`: class `k` of 0 finite, 1 infinite, 2 number, 3 notanumber, 4 normal, 5 subnormal.
#[inline(always)]
fn class_of(k: u8, c: std::num::FpCategory) -> bool {
    use std::num::FpCategory::{Infinite, Nan, Normal, Subnormal};
    match k {
        0 => !matches!(c, Infinite | Nan),
        1 => c == Infinite,
        2 => c != Nan,
        3 => c == Nan,
        // Zero counts as normal: the text defines subnormal and leaves zero to the other.
        4 => c == Normal || c == std::num::FpCategory::Zero,
        _ => c == Subnormal,
    }
}

#[inline(always)]
fn classify<T: Lane>(r: &mut Regs, i: &Inst, m: u32, f: impl Fn(T) -> std::num::FpCategory) {
    let a = T::get(r, i.a);
    let bits = (0..LANES).fold(0, |b, l| b | u32::from(class_of(i.k, f(a[l]))) << l);
    write_pred(r, i.d, bits, m);
}

/// `slct`: `d = c >= 0 ? a : b`. `k` bit 0: 64 bits, bit 1: `c` is a float, bit 2: flushed.
#[inline(always)]
fn select_by_sign(r: &mut Regs, i: &Inst, m: u32) {
    let file = if i.k & 1 != 0 { File::Q } else { File::W };
    let (a, b, c) = (raw(r, file, i.a), raw(r, file, i.b), u32::get(r, i.c));
    let first = |c: u32| match i.k >> 1 {
        0 => c as i32 >= 0,
        1 => f32::from_bits(c) >= 0.0,
        _ => flush(f32::from_bits(c)) >= 0.0,
    };
    let v = std::array::from_fn(|l| if first(c[l]) { a[l] } else { b[l] });
    put_raw(r, file, i.d, v, m);
}

impl Decoder<'_> {
    /// Comparison, combination and source type of `setp` and `set`, once the destination type is taken.
    fn comparison(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<(Inst, Ty, bool)> {
        let ty = op.ty().ok_or("no type")?;
        let ftz = op.take("ftz");
        let Some(name) = (!op.mods.is_empty()).then(|| op.mods.remove(0)) else {
            return unknown(op);
        };
        let mut k = 0;
        for (n, bool_op) in [(1, "and"), (2, "or"), (3, "xor")] {
            if op.take(bool_op) {
                k = n;
            }
        }
        need(o, 3 + usize::from(k != 0))?;
        let float = matches!(ty, Ty::F32 | Ty::F64 | Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2);
        let pair = matches!(ty, Ty::F16x2 | Ty::Bf16x2);
        let f = match (float, pair) {
            (_, true) => None,
            (true, _) => Some(compare_float(name, ty, ftz)),
            (false, _) => Some(compare_int(name, ty)),
        };
        let class = if float { Class::Float } else { Class::Integer };
        let mut i = match f {
            Some(Some(f)) => Self::blank(self.alu(f), class),
            Some(None) => return unknown(op),
            None => Self::blank(super::Act::Nop, class),
        };
        if pair {
            let Some(test) = Test::of(name) else { return unknown(op) };
            i.y = test.pack() | u32::from(ftz) << 4;
        }
        (i.a, i.b, i.k) = (self.src(&o[1], ty)?, self.src(&o[2], ty)?, k);
        if k != 0 {
            let (row, not) = self.predicate(&o[3])?;
            i.c = row;
            i.k |= u8::from(not) << 2;
        }
        Ok((i, ty, pair))
    }

    pub(super) fn setp(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        let (mut i, ty, pair) = self.comparison(op, o)?;
        let (d, q) = self.dst_pair(&o[0], Ty::Pred, Ty::Pred)?;
        let two = matches!(o[0], Operand::Pair(..));
        if two && matches!(ty, Ty::F16 | Ty::Bf16) || pair && !two {
            return Err("halves give one predicate, packed halves two".into());
        }
        (i.d, i.x) = (d, u32::from(q));
        if pair {
            let f: Alu = if ty == Ty::F16x2 {
                alu!(|r, i, m| pair_predicates(r, i, m, F16))
            } else {
                alu!(|r, i, m| pair_predicates(r, i, m, BF16))
            };
            i.act = self.alu(f);
        }
        Ok(i)
    }

    /// `set`: the comparison as 0 or all ones, or as 0 or 1.0 in a float destination.
    pub(super) fn set(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        let n = op.mods.len();
        if n < 3 {
            return unknown(op);
        }
        let Some(d) = Ty::from_name(op.mods.remove(n - 2)) else {
            return unknown(op);
        };
        let (mut i, ty, pair) = self.comparison(op, o)?;
        i.d = self.dst(&o[0], d)?;
        if pair {
            let f: Alu = if ty == Ty::F16x2 {
                alu!(|r, i, m| pair_values(r, i, m, F16, 0x3c00))
            } else {
                alu!(|r, i, m| pair_values(r, i, m, BF16, 0x3f80))
            };
            i.act = self.alu(f);
            return Ok(i);
        }
        i.y = match d {
            Ty::F32 => 0x3f80_0000,
            Ty::F16 => 0x3c00,
            Ty::Bf16 => 0x3f80,
            t if t.size() == 2 => 0xffff,
            _ => 0xffff_ffff,
        };
        Ok(i)
    }

    pub(super) fn testp(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 2)?;
        let ty = op.ty().ok_or("no type")?;
        let f: Alu = if ty == Ty::F32 {
            alu!(|r, i, m| classify(r, i, m, f32::classify))
        } else {
            alu!(|r, i, m| classify(r, i, m, f64::classify))
        };
        let names = ["finite", "infinite", "number", "notanumber", "normal", "subnormal"];
        let Some(k) = names.iter().position(|n| op.take(n)) else {
            return unknown(op);
        };
        let mut i = Self::blank(self.alu(f), Class::Float);
        (i.d, i.a, i.k) = (self.dst(&o[0], Ty::Pred)?, self.src(&o[1], ty)?, k as u8);
        Ok(i)
    }

    pub(super) fn slct(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 4)?;
        let (c, ftz) = (op.ty().ok_or("no type")?, op.take("ftz"));
        let ty = op.ty().ok_or("no type")?;
        let mut i = Self::blank(self.alu(alu!(|r, i, m| select_by_sign(r, i, m))), Class::Integer);
        (i.d, i.a, i.b) = (self.dst(&o[0], ty)?, self.src(&o[1], ty)?, self.src(&o[2], ty)?);
        i.c = self.src(&o[3], c)?;
        i.k = u8::from(file_of(ty) == File::Q) | u8::from(c == Ty::F32) << 1 | u8::from(ftz) << 2;
        debug_assert!(i.c != NONE);
        Ok(i)
    }
}
