//! Integer instructions beyond plain arithmetic: carry chains, bit masks and fields, dot products of bytes, packed 16-bit.

use super::alu::{Arith, Op, arith, f2, f3, permute, pred, write_pred};
use super::code::alu;
use super::decode::{Decoded, Decoder};
use super::opcode::{need, unknown};
use super::{Alu, Class, Inst, LANES, Lane, NONE, Regs, map2, map3};
use crate::ptx::{Operand, Ty};

/// Integers that carry chains take.
trait Chain: Lane {
    fn add(self, other: Self, carry: bool) -> (Self, bool);
    fn subtract(self, other: Self, borrow: bool) -> (Self, bool);
    fn product(self, other: Self, high: bool) -> Self;
}

macro_rules! chain {
    ($t:ty, $wide:ty) => {
        impl Chain for $t {
            #[inline(always)]
            fn add(self, other: $t, carry: bool) -> ($t, bool) {
                let (s, a) = self.overflowing_add(other);
                let (s, b) = s.overflowing_add(<$t>::from(carry));
                (s, a | b)
            }
            #[inline(always)]
            fn subtract(self, other: $t, borrow: bool) -> ($t, bool) {
                let (s, a) = self.overflowing_sub(other);
                let (s, b) = s.overflowing_sub(<$t>::from(borrow));
                (s, a | b)
            }
            #[inline(always)]
            fn product(self, other: $t, high: bool) -> $t {
                let p = <$wide>::from(self) * <$wide>::from(other);
                (if high { p >> <$t>::BITS } else { p }) as $t
            }
        }
    };
}
chain!(u32, u64);
chain!(u64, u128);

/// Reads carry bits from predicate row `y`, and writes them back if `k` bit 0 is set; bit 1: the instruction adds them in.
#[inline(always)]
fn with_carry<T: Chain>(r: &mut Regs, i: &Inst, m: u32, f: impl Fn(usize, bool) -> (T, bool)) {
    let row = i.y as usize;
    let carry = if i.k & 2 != 0 { r.p[row] } else { 0 };
    let mut next = 0;
    let v = std::array::from_fn(|l| {
        let (x, c) = f(l, carry >> l & 1 == 1);
        next |= u32::from(c) << l;
        x
    });
    T::put(r, i.d, v, m);
    if i.k & 1 != 0 {
        r.p[row] = r.p[row] & !m | next & m;
    }
}

#[inline(always)]
fn chain_add<T: Chain>(r: &mut Regs, i: &Inst, m: u32) {
    let (a, b) = (T::get(r, i.a), T::get(r, i.b));
    with_carry(r, i, m, |l, c| a[l].add(b[l], c));
}

#[inline(always)]
fn chain_sub<T: Chain>(r: &mut Regs, i: &Inst, m: u32) {
    let (a, b) = (T::get(r, i.a), T::get(r, i.b));
    with_carry(r, i, m, |l, c| a[l].subtract(b[l], c));
}

#[inline(always)]
fn chain_mad<T: Chain>(r: &mut Regs, i: &Inst, m: u32, product: impl Fn(T, T) -> T) {
    let (a, b, s) = (T::get(r, i.a), T::get(r, i.b), T::get(r, i.c));
    with_carry(r, i, m, |l, c| product(a[l], b[l]).add(s[l], c));
}

/// `add.cc`, `addc`, `sub.cc`, `subc`, `mad.cc`, `madc`, and the `k` of their instruction; `None` for anything else.
pub(super) fn carry(op: &mut Op<'_>) -> Option<(Arith, u8)> {
    let cc = op.take("cc");
    let (base, takes) = match op.base {
        "addc" | "subc" | "madc" => (&op.base[..3], true),
        "add" | "sub" | "mad" if cc => (op.base, false),
        _ => return None,
    };
    let (high, low) = (op.take("hi"), op.take("lo"));
    let ty = op.ty()?;
    let long = ty.size() == 8;
    let f: Alu = match (base, long, high) {
        ("add", false, _) => alu!(|r, i, m| chain_add::<u32>(r, i, m)),
        ("add", true, _) => alu!(|r, i, m| chain_add::<u64>(r, i, m)),
        ("sub", false, _) => alu!(|r, i, m| chain_sub::<u32>(r, i, m)),
        ("sub", true, _) => alu!(|r, i, m| chain_sub::<u64>(r, i, m)),
        (_, false, false) => alu!(|r, i, m| chain_mad::<u32>(r, i, m, |a, b| a.product(b, false))),
        (_, true, false) => alu!(|r, i, m| chain_mad::<u64>(r, i, m, |a, b| a.product(b, false))),
        (_, false, true) if ty == Ty::U32 => alu!(|r, i, m| chain_mad::<u32>(r, i, m, |a, b| a.product(b, true))),
        (_, true, true) if ty == Ty::U64 => alu!(|r, i, m| chain_mad::<u64>(r, i, m, |a, b| a.product(b, true))),
        (_, false, true) => alu!(|r, i, m| chain_mad::<u32>(r, i, m, |a, b| {
            ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32
        })),
        (_, true, true) => alu!(|r, i, m| chain_mad::<u64>(r, i, m, |a, b| {
            ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64
        })),
    };
    if (base == "mad") != (high || low) {
        return None;
    }
    let n = if base == "mad" { 3 } else { 2 };
    Some((arith(f, ty, &[ty; 3][..n])?, u8::from(cc) | u8::from(takes) << 1))
}

/// `szext`, `bmsk`, `fns`, `dp2a` and packed 16-bit arithmetic; `None` for anything else.
pub(super) fn more(op: &mut Op<'_>) -> Option<Arith> {
    let b32 = [Ty::B32; 3];
    match op.base {
        "szext" => {
            let wrap = op.take("wrap");
            op.take("clamp");
            let ty = op.ty()?;
            let f: Alu = match (wrap, ty == Ty::S32) {
                (true, false) => f2!(u32, |a, b| extend(a, b & 31, false)),
                (true, true) => f2!(u32, |a, b| extend(a, b & 31, true)),
                (false, false) => f2!(u32, |a, b| extend(a, b.min(32), false)),
                (false, true) => f2!(u32, |a, b| extend(a, b.min(32), true)),
            };
            arith(f, ty, &[ty, Ty::U32])
        }
        "bmsk" => {
            let wrap = op.take("wrap");
            op.take("clamp");
            op.ty()?;
            let f: Alu =
                if wrap { f2!(u32, |a, b| mask(a & 31, b & 31)) } else { f2!(u32, |a, b| mask(a.min(32), b.min(32))) };
            arith(f, Ty::B32, &b32[..2])
        }
        "fns" => {
            op.ty()?;
            arith(f3!(u32, |a, b, c| nth_set(a, b, c as i32)), Ty::B32, &[Ty::B32, Ty::B32, Ty::S32])
        }
        "dp2a" => {
            let high = op.take("hi");
            op.take("lo");
            let (b, a) = (op.ty()?, op.ty()?);
            let f: Alu = match (a == Ty::S32, b == Ty::S32) {
                (false, false) => alu!(|r, i, m| dot2(r, i, m, i64::from, i64::from)),
                (true, false) => alu!(|r, i, m| dot2(r, i, m, |x| i64::from(x as i16), i64::from)),
                (false, true) => alu!(|r, i, m| dot2(r, i, m, i64::from, |y| i64::from(y as i8))),
                (true, true) => alu!(|r, i, m| dot2(r, i, m, |x| i64::from(x as i16), |y| i64::from(y as i8))),
            };
            let mut a = arith(f, Ty::B32, &[a, b, if a == Ty::S32 || b == Ty::S32 { Ty::S32 } else { Ty::U32 }])?;
            a.k = u8::from(high);
            Some(a)
        }
        "add" | "min" | "max" if matches!(op.mods.last(), Some(&("u16x2" | "s16x2"))) => {
            let relu = op.take("relu");
            let ty = op.ty()?;
            let f: Alu = match (op.base, ty, relu) {
                ("add", ..) => f2!(u32, |a, b| pair(a, b, |x, y| x.wrapping_add(y))),
                ("min", Ty::U16x2, _) => f2!(u32, |a, b| pair(a, b, u16::min)),
                ("max", Ty::U16x2, _) => f2!(u32, |a, b| pair(a, b, u16::max)),
                ("min", _, false) => f2!(u32, |a, b| pair(a, b, |x, y| (x as i16).min(y as i16) as u16)),
                ("max", _, false) => f2!(u32, |a, b| pair(a, b, |x, y| (x as i16).max(y as i16) as u16)),
                ("min", _, true) => f2!(u32, |a, b| pair(a, b, |x, y| (x as i16).min(y as i16).max(0) as u16)),
                _ => f2!(u32, |a, b| pair(a, b, |x, y| (x as i16).max(y as i16).max(0) as u16)),
            };
            arith(f, ty, &[ty; 2])
        }
        "min" | "max" if op.mods.contains(&"relu") => {
            op.take("relu");
            let ty = op.ty()?;
            let f: Alu =
                if op.base == "min" { f2!(i32, |a, b| a.min(b).max(0)) } else { f2!(i32, |a, b| a.max(b).max(0)) };
            arith(f, ty, &[ty; 2])
        }
        _ => None,
    }
}

/// The low `n` bits, extended to 32.
#[inline(always)]
fn extend(a: u32, n: u32, signed: bool) -> u32 {
    if n == 0 {
        return 0;
    }
    let up = 32 - n;
    if signed { ((a << up) as i32 >> up) as u32 } else { a << up >> up }
}

/// `n` ones from bit `at` on.
#[inline(always)]
fn mask(at: u32, n: u32) -> u32 {
    ((((1u64 << n) - 1) << at) & 0xffff_ffff) as u32
}

/// Position of the `n`-th set bit from `base` on, upwards for positive and downwards for negative `n`; for zero `base` itself.
#[inline(always)]
fn nth_set(bits: u32, base: u32, n: i32) -> u32 {
    let (step, want) = if n < 0 { (-1, -(i64::from(n))) } else { (1, i64::from(n).max(1)) };
    let (mut at, mut seen) = (i64::from(base), 0);
    while (0..32).contains(&at) {
        if bits >> at & 1 == 1 {
            seen += 1;
            if seen == want {
                return at as u32;
            }
        }
        if n == 0 {
            break;
        }
        at += step;
    }
    u32::MAX
}

/// Two 16-bit values of `a` by two bytes of `b`, the low or (`k`) the high ones.
#[inline(always)]
fn dot2(r: &mut Regs, i: &Inst, m: u32, x: impl Fn(u16) -> i64, y: impl Fn(u8) -> i64) {
    let shift = 16 * u32::from(i.k & 1);
    map3(r, i, m, |a: u32, b: u32, c: u32| {
        let b = b >> shift;
        let sum = x(a as u16) * y(b as u8) + x((a >> 16) as u16) * y((b >> 8) as u8);
        c.wrapping_add(sum as u32)
    });
}

#[inline(always)]
fn pair(a: u32, b: u32, f: impl Fn(u16, u16) -> u16) -> u32 {
    u32::from(f(a as u16, b as u16)) | u32::from(f((a >> 16) as u16, (b >> 16) as u16)) << 16
}

/// Modes of `prmt` and their selectors by the two low bits of the control. Source: PTX ISA, `prmt`.
const MODES: [(&str, [u32; 4]); 6] = [
    ("f4e", [0x3210, 0x4321, 0x5432, 0x6543]),
    ("b4e", [0x5670, 0x6701, 0x7012, 0x0123]),
    ("rc8", [0x0000, 0x1111, 0x2222, 0x3333]),
    ("ecl", [0x3210, 0x3211, 0x3222, 0x3333]),
    ("ecr", [0x0000, 0x1110, 0x2210, 0x3210]),
    ("rc16", [0x1010, 0x3232, 0x1010, 0x3232]),
];

/// Each result bit is bit `4 a + 2 b + c` of the table.
#[inline(always)]
fn lookup(r: &Regs, i: &Inst) -> [u32; LANES] {
    let (a, b, c) = (u32::get(r, i.a), u32::get(r, i.b), u32::get(r, i.c));
    std::array::from_fn(|l| {
        (0..8).filter(|t| i.y >> t & 1 == 1).fold(0, |out, t: u32| {
            let side = |x: u32, bit: u32| if t >> bit & 1 == 1 { x } else { !x };
            out | side(a[l], 2) & side(b[l], 1) & side(c[l], 0)
        })
    })
}

/// `lop3` with a predicate: whether the result is not zero, combined with the predicate in bits 8 to 23 of `y`.
#[inline(always)]
fn lookup_test(r: &mut Regs, i: &Inst, m: u32) {
    let v = lookup(r, i);
    let q = pred(r, (i.y >> 8) as u16, i.k & 2 != 0);
    let bits = (0..LANES).fold(0, |p, l| p | u32::from(v[l] != 0) << l);
    if i.d != NONE {
        u32::put(r, i.d, v, m);
    }
    write_pred(r, i.x as u16, if i.k & 1 != 0 { bits | q } else { bits & q }, m);
}

impl Decoder<'_> {
    /// `prmt.b32{.mode} d, a, b, c;`
    pub(super) fn prmt(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 4)?;
        op.take("b32");
        let mode = MODES.iter().position(|(n, _)| op.take(n));
        let f: Alu = match mode {
            None => f3!(u32, |a, b, c| permute(a, b, c)),
            Some(_) => alu!(|r, i, m| {
                let table = &MODES[i.y as usize].1;
                map3(r, i, m, |a: u32, b: u32, c: u32| permute(a, b, table[(c & 3) as usize]))
            }),
        };
        let mut i = Self::blank(self.alu(f), Class::Integer);
        (i.d, i.a) = (self.dst(&o[0], Ty::B32)?, self.src(&o[1], Ty::B32)?);
        (i.b, i.c) = (self.src(&o[2], Ty::B32)?, self.src(&o[3], Ty::B32)?);
        i.y = mode.unwrap_or(0) as u32;
        Ok(i)
    }

    /// `lop3.b32 d, a, b, c, table;` and `lop3.op.b32 d|p, a, b, c, table, q;`
    pub(super) fn lop3(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        let (or, and) = (op.take("or"), op.take("and"));
        op.take("b32");
        let test = or || and;
        need(o, if test { 6 } else { 5 })?;
        let Operand::Int(table @ 0..=255) = o[4] else {
            return Err("the table of lop3 is not a number from 0 to 255".into());
        };
        let f: Alu = if test {
            alu!(|r, i, m| lookup_test(r, i, m))
        } else {
            alu!(|r, i, m| {
                let v = lookup(r, i);
                u32::put(r, i.d, v, m);
            })
        };
        let mut i = Self::blank(self.alu(f), Class::Integer);
        (i.a, i.b, i.c) = (self.src(&o[1], Ty::B32)?, self.src(&o[2], Ty::B32)?, self.src(&o[3], Ty::B32)?);
        i.y = table as u32;
        if test {
            if !matches!(o[0], Operand::Pair(..)) {
                return Err("lop3 with a predicate needs two destinations".into());
            }
            let (d, p) = self.dst_pair(&o[0], Ty::B32, Ty::Pred)?;
            let (q, not) = self.predicate(&o[5])?;
            (i.d, i.x, i.k) = (d, u32::from(p), u8::from(or) | u8::from(not) << 1);
            i.y |= u32::from(q) << 8;
        } else {
            i.d = self.dst(&o[0], Ty::B32)?;
        }
        Ok(i)
    }

    /// `add.cc` and its kin: the carry bits are a predicate row of the kernel.
    pub(super) fn chain(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Option<Decoded<Inst>> {
        let chained = matches!(op.base, "addc" | "subc" | "madc") || op.mods.contains(&"cc");
        chained.then(|| {
            let Some((a, k)) = carry(op) else { return unknown(op) };
            need(o, a.src.len() + 1)?;
            let mut i = Self::blank(self.alu(a.f), a.class);
            i.d = self.dst(&o[0], a.d)?;
            let mut rows = [NONE; 3];
            for (n, ty) in a.src.iter().enumerate() {
                rows[n] = self.src(&o[n + 1], *ty)?;
            }
            (i.a, i.b, i.c, i.k, i.y) = (rows[0], rows[1], rows[2], k, u32::from(self.carry_row()));
            Ok(i)
        })
    }
}
