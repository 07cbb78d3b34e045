//! Conversions that are rare enough to read their types from the instruction: 8- and 16-bit floats, tf32, saturation.

use super::alu::Op;
use super::code::alu;
use super::convert::{Convert, extend, to_int};
use super::decode::{Decoded, Decoder};
use super::float::{BF16, F16, Format, Mode, canon, flush, to_f32};
use super::opcode::{need, unknown};
use super::{Alu, Class, File, Inst, Regs, map2, map3, put_raw, raw};
use crate::ptx::{Operand, Ty};

/// Modifiers of a conversion.
#[derive(Clone, Copy, Default)]
pub struct How {
    /// `.rni` and its kin.
    pub whole: Option<Mode>,
    /// `.rn` and its kin.
    pub mode: Option<Mode>,
    /// Flush subnormal f32.
    pub ftz: bool,
    /// Clamp to [0, 1].
    pub sat: bool,
    /// Negative to zero.
    pub relu: bool,
    /// Clamp to the largest finite value.
    pub satfinite: bool,
}

const TYPES: [Ty; 18] = [
    Ty::U8,
    Ty::U16,
    Ty::U32,
    Ty::U64,
    Ty::S8,
    Ty::S16,
    Ty::S32,
    Ty::S64,
    Ty::F16,
    Ty::Bf16,
    Ty::F32,
    Ty::F64,
    Ty::Tf32,
    Ty::F16x2,
    Ty::Bf16x2,
    Ty::E4m3x2,
    Ty::E5m2x2,
    Ty::B32,
];
const MODES: [Mode; 4] = [Mode::Rn, Mode::Rz, Mode::Rm, Mode::Rp];

impl How {
    /// Destination, source and modifiers as a number for [`Inst::y`].
    fn pack(self, d: Ty, s: Ty) -> Option<u32> {
        let place = |t: Ty| TYPES.iter().position(|x| *x == t).map(|n| n as u32);
        let mode = |m: Option<Mode>| m.map_or(4, |m| MODES.iter().position(|x| *x == m).unwrap_or(0) as u32);
        let flags = [self.ftz, self.sat, self.relu, self.satfinite];
        let flags = flags.iter().enumerate().fold(0, |f, (n, on)| f | u32::from(*on) << n);
        Some(place(d)? | place(s)? << 5 | mode(self.whole) << 10 | mode(self.mode) << 13 | flags << 16)
    }

    fn unpack(y: u32) -> (Ty, Ty, How) {
        let ty = |n: u32| TYPES[(y >> n & 31) as usize % TYPES.len()];
        let mode = |n: u32| MODES.get((y >> n & 7) as usize).copied();
        let flag = |n: u32| y >> n & 1 == 1;
        let how =
            How { whole: mode(10), mode: mode(13), ftz: flag(16), sat: flag(17), relu: flag(18), satfinite: flag(19) };
        (ty(0), ty(5), how)
    }
}

/// The conversion with its types packed; the table of forms has said that it exists.
pub(super) fn decode(d: Ty, s: Ty, how: How) -> Option<Convert> {
    let pair = s == Ty::F32 && matches!(d, Ty::F16x2 | Ty::Bf16x2 | Ty::E4m3x2 | Ty::E5m2x2);
    let f: Alu = if pair { alu!(|r, i, m| two(r, i, m)) } else { alu!(|r, i, m| one(r, i, m)) };
    Some(Convert { f, d, s, pair, y: how.pack(d, s)? })
}

#[inline(always)]
fn one(r: &mut Regs, i: &Inst, m: u32) {
    let (d, s, how) = How::unpack(i.y);
    let of = |bit: u8| if i.k & bit != 0 { File::Q } else { File::W };
    let kept = if i.k & 4 != 0 { 0xffff } else { u64::MAX };
    let v = raw(r, of(2), i.a).map(|x| value(x, d, s, how) & kept);
    put_raw(r, of(1), i.d, v, m);
}

#[inline(always)]
fn two(r: &mut Regs, i: &Inst, m: u32) {
    let (d, _, how) = How::unpack(i.y);
    map2(r, i, m, |a: f32, b: f32| match d {
        Ty::E4m3x2 | Ty::E5m2x2 => u32::from(eight(f64::from(a), d, how)) << 8 | u32::from(eight(f64::from(b), d, how)),
        _ => u32::from(sixteen(f64::from(a), d, how)) << 16 | u32::from(sixteen(f64::from(b), d, how)),
    });
}

/// A whole number as a double that rounds on as the number itself would.
fn sticky(x: i128) -> f64 {
    let near = x as f64;
    let back = near as i128;
    if back == x || near.to_bits() & 1 == 1 {
        return near;
    }
    let up = (back < x) == (near > 0.0);
    f64::from_bits(if up { near.to_bits() + 1 } else { near.to_bits() - 1 })
}

fn clamped(x: f64, how: How) -> f64 {
    match () {
        () if how.sat => {
            if x > 0.0 {
                x.min(1.0)
            } else {
                0.0
            }
        }
        () if how.relu && x <= 0.0 => 0.0,
        () => x,
    }
}

fn format(d: Ty) -> Format {
    if matches!(d, Ty::F16 | Ty::F16x2) { F16 } else { BF16 }
}

fn sixteen(x: f64, d: Ty, how: How) -> u16 {
    format(d).pack(clamped(x, how), how.mode.unwrap_or(Mode::Rn))
}

/// Fraction bits, exponent bits, bits of the largest finite number of the 8-bit floats. Source: OCP 8-bit floating point
/// specification 1.0, section 5.
fn shape(d: Ty) -> (i32, i32, u8) {
    if d == Ty::E4m3x2 { (3, 4, 0x7e) } else { (2, 5, 0x7b) }
}

/// To nearest even, and to the largest finite number beyond it; NaN is 0x7f.
fn eight(x: f64, d: Ty, how: How) -> u8 {
    let x = clamped(x, how);
    if x.is_nan() {
        return 0x7f;
    }
    let (fraction, exponent, max) = shape(d);
    let sign = u8::from(x.is_sign_negative()) << 7;
    let bias = (1 << (exponent - 1)) - 1;
    let e = ((x.abs().to_bits() >> 52) as i32 - 1023).max(1 - bias);
    if e > bias + 1 {
        return sign | max;
    }
    let units = (x.abs() * 2f64.powi(fraction - e)).round_ties_even() as i32;
    sign | (units + ((e + bias - 1) << fraction)).min(i32::from(max)) as u8
}

fn from_eight(x: u8, s: Ty) -> f64 {
    let (fraction, exponent, max) = shape(s);
    let sign = if x & 0x80 != 0 { -1.0 } else { 1.0 };
    let (e, f) = (i32::from(x & 0x7f) >> fraction, f64::from(i32::from(x) & ((1 << fraction) - 1)));
    let bias = (1 << (exponent - 1)) - 1;
    let unit = 2f64.powi(-fraction);
    match x & 0x7f {
        m if m > max && s == Ty::E5m2x2 && f == 0.0 => sign * f64::INFINITY,
        m if m > max => f64::NAN,
        _ if e == 0 => sign * f * unit * 2f64.powi(1 - bias),
        _ => sign * (1.0 + f * unit) * 2f64.powi(e - bias),
    }
}

fn whole(x: f64, mode: Option<Mode>) -> f64 {
    match mode {
        None => x,
        Some(Mode::Rn) => x.round_ties_even(),
        Some(Mode::Rz) => x.trunc(),
        Some(Mode::Rm) => x.floor(),
        Some(Mode::Rp) => x.ceil(),
    }
}

/// Any source to any destination.
fn value(x: u64, d: Ty, s: Ty, how: How) -> u64 {
    match (d, s) {
        (Ty::F16x2, Ty::E4m3x2 | Ty::E5m2x2) => {
            let half = |b: u8| u64::from(F16.pack(clamped(from_eight(b, s), how), Mode::Rn));
            return half(x as u8) | half((x >> 8) as u8) << 16;
        }
        (Ty::E4m3x2 | Ty::E5m2x2, _) => {
            let byte = |h: u16| u64::from(eight(f64::from(F16.unpack(h)), d, how));
            return byte(x as u16) | byte((x >> 16) as u16) << 8;
        }
        _ => {}
    }
    let v = match s {
        Ty::F16 => f64::from(F16.unpack(x as u16)),
        Ty::Bf16 => f64::from(BF16.unpack(x as u16)),
        Ty::F32 => f64::from(if how.ftz { flush(f32::from_bits(x as u32)) } else { f32::from_bits(x as u32) }),
        Ty::F64 => f64::from_bits(x),
        _ => sticky(extend(x, s)),
    };
    let v = whole(v, how.whole);
    match d {
        Ty::F16 | Ty::Bf16 => u64::from(sixteen(v, d, how)),
        Ty::F32 => {
            let single = to_f32(v, how.mode.unwrap_or(Mode::Rn));
            let single = if how.ftz { flush(single) } else { single };
            u64::from(canon(clamped(f64::from(single), how) as f32).to_bits())
        }
        Ty::F64 => clamped(directed(x, v, s, how), how).to_bits(),
        Ty::Tf32 => u64::from(tf32(clamped(v, how), how.mode.unwrap_or(Mode::Rn))),
        _ => to_int(v, d, s),
    }
}

/// A double from a 64-bit integer under a rounding mode; everything else is exact already.
fn directed(x: u64, v: f64, s: Ty, how: How) -> f64 {
    if !matches!(s, Ty::U64 | Ty::S64) {
        return v;
    }
    let exact = extend(x, s);
    let near = exact as f64;
    let (over, under) = (near as i128 > exact, (near as i128) < exact);
    match how.mode {
        Some(Mode::Rm) if over => near.next_down(),
        Some(Mode::Rp) if under => near.next_up(),
        Some(Mode::Rz) if over && near > 0.0 => near.next_down(),
        Some(Mode::Rz) if under && near < 0.0 => near.next_up(),
        _ => near,
    }
}

/// Ten fraction bits of an f32.
fn tf32(v: f64, mode: Mode) -> u32 {
    let bits = (v as f32).to_bits();
    if v.is_nan() {
        return 0x7fff_ffff;
    }
    let cut = bits & !0x1fff;
    if mode == Mode::Rz || bits & 0x7fff_ffff >= 0x7f80_0000 {
        return cut;
    }
    let rest = bits & 0x1fff;
    let up = rest > 0x1000 || rest == 0x1000 && cut & 0x2000 != 0;
    cut + if up { 0x2000 } else { 0 }
}

/// Clamps to `n` bits, as bits.
#[inline(always)]
fn narrow(x: i32, n: u32, signed: bool) -> u32 {
    let (low, high) = if signed { (-(1 << (n - 1)), (1 << (n - 1)) - 1) } else { (0, (1 << n) - 1) };
    x.clamp(low, high) as u32 & ((1 << n) - 1)
}

impl Decoder<'_> {
    /// `cvt.pack.sat.type.s32{.b32} d, a, b{, c};`: `a` above `b`, and above both what `c` holds.
    pub(super) fn cvt_pack(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        let with_c = op.take("b32");
        need(o, if with_c { 4 } else { 3 })?;
        let names = [("u16", 16), ("s16", 16), ("u8", 8), ("s8", 8), ("u4", 4), ("s4", 4), ("u2", 2), ("s2", 2)];
        let Some((name, bits)) = names.into_iter().find(|(n, _)| op.take(n)) else {
            return unknown(op);
        };
        op.mods.clear();
        let f: Alu = if with_c {
            alu!(|r, i, m| map3(r, i, m, |a: i32, b: i32, c: u32| {
                let (n, signed) = (u32::from(i.k & 31), i.k & 32 != 0);
                c << (2 * n) | narrow(a, n, signed) << n | narrow(b, n, signed)
            }))
        } else {
            alu!(|r, i, m| map2(r, i, m, |a: i32, b: i32| {
                let signed = i.k & 32 != 0;
                narrow(a, 16, signed) << 16 | narrow(b, 16, signed)
            }))
        };
        let mut i = Self::blank(self.alu(f), Class::Convert);
        (i.d, i.a, i.b) = (self.dst(&o[0], Ty::B32)?, self.src(&o[1], Ty::S32)?, self.src(&o[2], Ty::S32)?);
        if with_c {
            i.c = self.src(&o[3], Ty::B32)?;
        }
        i.k = bits | u8::from(name.starts_with('s')) << 5;
        Ok(i)
    }
}
