//! `cvt`: every source and destination type that the set needs, through one exact intermediate.

use super::alu::Op;
use super::code::alu;
use super::float::{BF16, F16, Mode, bf16, canon, flush, saturate, to_f32};
use super::{Alu, File, Inst, Regs, convert_any, map1, map2};
use crate::ptx::Ty;

/// A decoded conversion.
pub struct Convert {
    /// The function; files of destination and source come from `k`.
    pub f: Alu,
    /// Destination type.
    pub d: Ty,
    /// Source type.
    pub s: Ty,
    /// Two sources packed into one destination (first one high).
    pub pair: bool,
    /// Types and modifiers packed, for functions that take them from [`Inst::y`].
    pub y: u32,
}

/// Files of destination and source in `k`: bit 0 and bit 1 say 64 bits; bit 2 that the destination register has 16.
#[inline(always)]
fn files(i: &Inst) -> (File, File) {
    let of = |bit: u8| if i.k & bit != 0 { File::Q } else { File::W };
    (of(1), of(2))
}

#[inline(always)]
fn run(r: &mut Regs, i: &Inst, m: u32, f: impl Fn(u64) -> u64) {
    let (d, s) = files(i);
    // Registers of 16 bits are zero above.
    let kept = if i.k & 4 != 0 { 0xffff } else { u64::MAX };
    // One loop per pair of files: words alone become vector code of words.
    match (d, s) {
        (File::Q, File::Q) => map1(r, i, m, |x: u64| f(x) & kept),
        (File::Q, _) => map1(r, i, m, |x: u32| f(u64::from(x)) & kept),
        (_, File::Q) => map1(r, i, m, |x: u64| (f(x) & kept) as u32),
        _ => map1(r, i, m, |x: u32| (f(u64::from(x)) & kept) as u32),
    }
}

macro_rules! cv {
    (|$x:ident| $e:expr) => {
        alu!(|r, i, m| run(r, i, m, |$x| $e))
    };
}
#[inline(always)]
fn f32_of(x: u64) -> f32 {
    f32::from_bits(x as u32)
}
#[inline(always)]
fn bits32(x: f32) -> u64 {
    u64::from(canon(x).to_bits())
}
#[inline(always)]
fn round(x: f64, mode: Mode) -> f64 {
    match mode {
        Mode::Rn => x.round_ties_even(),
        Mode::Rz => x.trunc(),
        Mode::Rm => x.floor(),
        Mode::Rp => x.ceil(),
    }
}
/// Integer of a whole double, saturated. NaN gives zero if neither side has 64 bits, and the sign bit alone otherwise.
#[inline(always)]
pub(super) fn to_int(x: f64, ty: Ty, from: Ty) -> u64 {
    if x.is_nan() && (from == Ty::F64 || ty.size() == 8) {
        return extend(1 << (8 * ty.size() - 1), ty) as u64;
    }
    match ty {
        Ty::U8 => u64::from(x as u8),
        Ty::S8 => i64::from(x as i8) as u64,
        Ty::U16 => u64::from(x as u16),
        Ty::S16 => i64::from(x as i16) as u64,
        Ty::U32 => u64::from(x as u32),
        Ty::S32 => i64::from(x as i32) as u64,
        Ty::U64 => x as u64,
        _ => x as i64 as u64,
    }
}
/// Sign- or zero-extends the low bits of an integer type.
#[inline(always)]
pub fn extend(x: u64, ty: Ty) -> i128 {
    match ty {
        Ty::U8 | Ty::B8 => i128::from(x as u8),
        Ty::S8 => i128::from(x as i8),
        Ty::U16 | Ty::B16 => i128::from(x as u16),
        Ty::S16 => i128::from(x as i16),
        Ty::U32 | Ty::B32 => i128::from(x as u32),
        Ty::S32 => i128::from(x as i32),
        Ty::S64 => i128::from(x as i64),
        _ => i128::from(x),
    }
}

/// Decodes the modifiers of `cvt`.
pub fn convert(op: &mut Op<'_>) -> Option<Convert> {
    let s = op.ty()?;
    let d = op.ty()?;
    let (ftz, sat) = (op.take("ftz"), op.take("sat"));
    let mut whole = None;
    for (name, mode) in [("rni", Mode::Rn), ("rzi", Mode::Rz), ("rmi", Mode::Rm), ("rpi", Mode::Rp)] {
        if op.take(name) {
            whole = Some(mode);
        }
    }
    let mode = op.mode();
    let relu = op.take("relu");
    let int = |t: Ty| matches!(t, Ty::U8 | Ty::S8 | Ty::U16 | Ty::S16 | Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64);
    let satfinite = op.take("satfinite");
    let single = |f: Alu| Some(Convert { f, d, s, pair: false, y: 0 });
    let slow = convert_any::decode(d, s, convert_any::How { whole, mode, ftz, sat, relu, satfinite });
    macro_rules! by_type {
        ($ty:expr, |$t:ident| $e:expr, [$($v:ident),+]) => {
            match $ty { $(Ty::$v => { const $t: Ty = Ty::$v; $e })+ _ => return None }
        };
    }
    macro_rules! by_mode {
        ($mode:expr, |$t:ident| $e:expr) => {
            match $mode {
                Mode::Rn => {
                    const $t: Mode = Mode::Rn;
                    $e
                }
                Mode::Rz => {
                    const $t: Mode = Mode::Rz;
                    $e
                }
                Mode::Rm => {
                    const $t: Mode = Mode::Rm;
                    $e
                }
                Mode::Rp => {
                    const $t: Mode = Mode::Rp;
                    $e
                }
            }
        };
    }
    if int(d) && int(s) {
        if mode.is_some() || whole.is_some() || ftz {
            return None;
        }
        let f = by_type!(
            s,
            |S| match sat {
                false => by_type!(d, |D| cv!(|x| keep(extend(x, S), D)), [U8, S8, U16, S16, U32, S32, U64, S64]),
                true => by_type!(d, |D| cv!(|x| clamp(extend(x, S), D)), [U8, S8, U16, S16, U32, S32, U64, S64]),
            },
            [U8, S8, U16, S16, U32, S32, U64, S64]
        );
        return single(f);
    }
    match (d, s) {
        (Ty::F32, s) if int(s) => {
            let m = mode?;
            let f = by_type!(
                s,
                |S| by_mode!(m, |M| match sat {
                    false => cv!(|x| bits32(int_to_f32(extend(x, S), M))),
                    true => cv!(|x| bits32(saturate(int_to_f32(extend(x, S), M)))),
                }),
                [U8, S8, U16, S16, U32, S32, U64, S64]
            );
            single(f)
        }
        (Ty::F64, s) if int(s) => {
            let m = mode?;
            if m != Mode::Rn && s.size() == 8 || sat {
                return slow;
            }
            single(by_type!(s, |S| cv!(|x| (extend(x, S) as f64).to_bits()), [U8, S8, U16, S16, U32, S32, U64, S64]))
        }
        (d, Ty::F32) if int(d) => {
            let m = whole?;
            let f = by_type!(
                d,
                |D| by_mode!(m, |M| match ftz {
                    false => cv!(|x| to_int(round(f64::from(f32_of(x)), M), D, Ty::F32)),
                    true => cv!(|x| to_int(round(f64::from(flush(f32_of(x))), M), D, Ty::F32)),
                }),
                [U8, S8, U16, S16, U32, S32, U64, S64]
            );
            single(f)
        }
        (d, Ty::F64) if int(d) => {
            let m = whole?;
            let f = by_type!(
                d,
                |D| by_mode!(m, |M| cv!(|x| to_int(round(f64::from_bits(x), M), D, Ty::F64))),
                [U8, S8, U16, S16, U32, S32, U64, S64]
            );
            single(f)
        }
        (Ty::F32, Ty::F32) if mode.is_none() => {
            let f = match (whole, sat, ftz) {
                (None, true, false) => cv!(|x| u64::from(saturate(f32_of(x)).to_bits())),
                (None, true, true) => cv!(|x| u64::from(saturate(flush(f32_of(x))).to_bits())),
                (None, false, true) => cv!(|x| u64::from(canon(flush(f32_of(x))).to_bits())),
                (Some(m), false, false) => by_mode!(m, |M| cv!(|x| bits32(round(f64::from(f32_of(x)), M) as f32))),
                (Some(m), false, true) => {
                    by_mode!(m, |M| cv!(|x| bits32(round(f64::from(flush(f32_of(x))), M) as f32)))
                }
                _ => return slow,
            };
            single(f)
        }
        (Ty::F64, Ty::F64) if mode.is_none() && !sat && whole.is_some() => {
            let m = whole?;
            single(by_mode!(m, |M| cv!(|x| round(f64::from_bits(x), M).to_bits())))
        }
        (Ty::F64, Ty::F32) if sat => slow,
        (Ty::F64, Ty::F32) if ftz => single(cv!(|x| f64::from(flush(f32_of(x))).to_bits())),
        (Ty::F64, Ty::F32) => single(cv!(|x| f64::from(f32_of(x)).to_bits())),
        (Ty::F32, Ty::F64) => {
            let m = mode?;
            single(by_mode!(m, |M| match (ftz, sat) {
                (false, false) => cv!(|x| bits32(to_f32(f64::from_bits(x), M))),
                (true, false) => cv!(|x| bits32(flush(to_f32(f64::from_bits(x), M)))),
                (false, true) => cv!(|x| bits32(saturate(to_f32(f64::from_bits(x), M)))),
                (true, true) => cv!(|x| bits32(saturate(flush(to_f32(f64::from_bits(x), M))))),
            }))
        }
        (Ty::F32, Ty::F16) if !ftz && !sat => single(cv!(|x| bits32(F16.unpack(x as u16)))),
        (Ty::F32, Ty::Bf16) if !ftz && !sat => single(cv!(|x| bits32(BF16.unpack(x as u16)))),
        (Ty::F64, Ty::F16) if !sat => single(cv!(|x| f64::from(F16.unpack(x as u16)).to_bits())),
        (Ty::F16 | Ty::Bf16, Ty::F32) if !sat && !ftz && !relu => {
            let m = mode?;
            single(by_mode!(m, |M| match d {
                Ty::F16 => cv!(|x| u64::from(F16.pack(f64::from(f32_of(x)), M))),
                _ => cv!(|x| u64::from(BF16.pack(f64::from(f32_of(x)), M))),
            }))
        }
        (Ty::F16, Ty::F64) if !sat => {
            let m = mode?;
            single(by_mode!(m, |M| cv!(|x| u64::from(F16.pack(f64::from_bits(x), M)))))
        }
        (Ty::F16x2 | Ty::Bf16x2, Ty::F32) if !sat && !ftz && !relu => {
            let f: Alu = match (d, mode?) {
                (Ty::Bf16x2, Mode::Rn) => alu!(|r, i, m| pack2(r, i, m, bf16)),
                (Ty::Bf16x2, Mode::Rz) => alu!(|r, i, m| pack2(r, i, m, |x| BF16.pack(f64::from(x), Mode::Rz))),
                (Ty::F16x2, Mode::Rn) => alu!(|r, i, m| pack2(r, i, m, |x| F16.pack(f64::from(x), Mode::Rn))),
                (Ty::F16x2, Mode::Rz) => alu!(|r, i, m| pack2(r, i, m, |x| F16.pack(f64::from(x), Mode::Rz))),
                _ => return None,
            };
            Some(Convert { f, d, s, pair: true, y: 0 })
        }
        // Round to nearest, ties away from zero, on the 10 fraction bits that tf32 keeps.
        (Ty::Tf32, Ty::F32) if op.take("rna") => single(cv!(|x| {
            let v = f32_of(x);
            if v.is_nan() {
                0x7fff_ffff
            } else if v.is_infinite() {
                x
            } else {
                u64::from((x as u32 + 0x1000) & !0x1fff)
            }
        })),
        _ => slow,
    }
}

/// The destination's bits of an extended source; a wider register gets the extension of those.
#[inline(always)]
fn keep(x: i128, d: Ty) -> u64 {
    match d {
        Ty::U8 => u64::from(x as u8),
        Ty::S8 => i64::from(x as i8) as u64,
        Ty::U16 => u64::from(x as u16),
        Ty::S16 => i64::from(x as i16) as u64,
        Ty::U32 => u64::from(x as u32),
        Ty::S32 => i64::from(x as i32) as u64,
        _ => x as u64,
    }
}

#[inline(always)]
fn clamp(x: i128, d: Ty) -> u64 {
    let (low, high) = match d {
        Ty::U8 => (0, 0xff),
        Ty::S8 => (-0x80, 0x7f),
        Ty::U16 => (0, 0xffff),
        Ty::S16 => (-0x8000, 0x7fff),
        Ty::U32 => (0, i128::from(u32::MAX)),
        Ty::S32 => (i128::from(i32::MIN), i128::from(i32::MAX)),
        Ty::S64 => (i128::from(i64::MIN), i128::from(i64::MAX)),
        _ => (0, i128::from(u64::MAX)),
    };
    x.clamp(low, high) as u64
}

#[inline(always)]
fn int_to_f32(x: i128, mode: Mode) -> f32 {
    let r = x as f32;
    let back = r as i128;
    match mode {
        Mode::Rm if back > x => r.next_down(),
        Mode::Rp if back < x => r.next_up(),
        Mode::Rz if back.abs() > x.abs() => {
            if r > 0.0 {
                r.next_down()
            } else {
                r.next_up()
            }
        }
        _ => r,
    }
}

#[inline(always)]
fn pack2(r: &mut Regs, i: &Inst, m: u32, f: impl Fn(f32) -> u16) {
    map2(r, i, m, |a: f32, b: f32| u32::from(f(a)) << 16 | u32::from(f(b)));
}
