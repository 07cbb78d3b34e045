//! What each arithmetic instruction computes, written from the PTX ISA text (sections named at each group).

use super::convert;
use super::exact::{BF16, F16, F32, F64, Format, Mode, Number, product, quotient, root};

/// What a result has to be.
#[derive(Clone, Copy, Debug)]
pub enum Want {
    /// These bits.
    Bits(u64),
    /// Any NaN of the format.
    Nan(Format),
    /// Close to a value: within a relative or an absolute error.
    Near(Format, f64, f64, f64),
}

/// Types of the destinations and of the sources.
pub type Signature = (Vec<&'static str>, Vec<&'static str>);

pub fn format(ty: &str) -> Option<Format> {
    Some(match ty {
        "f16" | "f16x2" => F16,
        "bf16" | "bf16x2" => BF16,
        "f32" | "f32x2" => F32,
        "f64" => F64,
        _ => return None,
    })
}

fn bits(ty: &str) -> u32 {
    ty[1..].parse().unwrap_or(32)
}

fn mask(x: i128, n: u32) -> u64 {
    if n == 64 { x as u64 } else { x as u64 & ((1 << n) - 1) }
}

/// The value of an integer type.
pub fn value(x: u64, ty: &str) -> i128 {
    let n = bits(ty);
    let x = i128::from(mask(i128::from(x), n));
    if ty.starts_with('s') && x >> (n - 1) & 1 == 1 { x - (1 << n) } else { x }
}

const BOOLS: [&str; 3] = ["and", "or", "xor"];

/// Operand types of the instruction, or `None` if this file does not know it.
pub fn signature(base: &str, mods: &[&'static str]) -> Option<Signature> {
    let last = *mods.last()?;
    let has = |m: &str| mods.contains(&m);
    let wide = match last {
        "u16" => "u32",
        "s16" => "s32",
        "u32" => "u64",
        "s32" => "s64",
        _ => last,
    };
    Some(match base {
        "mul" if has("wide") => (vec![wide], vec![last; 2]),
        "mad" if has("wide") => (vec![wide], vec![last, last, wide]),
        "add" | "sub" | "mul" | "div" | "rem" | "min" | "max" | "and" | "or" | "xor" | "mul24" | "copysign"
            if !has("cc") =>
        {
            (vec![last], vec![last; 2])
        }
        "mad" | "mad24" | "sad" | "fma" if !has("cc") => (vec![last], vec![last; 3]),
        "abs" | "neg" | "not" | "cnot" | "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" | "brev"
        | "mov"
            if last != "b128" =>
        {
            (vec![last], vec![last])
        }
        "popc" | "clz" | "bfind" => (vec!["u32"], vec![last]),
        "fns" => (vec!["b32"], vec!["b32", "b32", "s32"]),
        "bfe" => (vec![last], vec![last, "u32", "u32"]),
        "bfi" => (vec![last], vec![last, last, "u32", "u32"]),
        "szext" => (vec![last], vec![last, "u32"]),
        "bmsk" => (vec!["b32"], vec!["u32"; 2]),
        "dp4a" | "dp2a" => {
            let c = if has("s32") { "s32" } else { "u32" };
            (vec![c], vec![mods[mods.len() - 2], last, c])
        }
        "lop3" if !has("or") && !has("and") => (vec!["b32"], vec!["b32"; 3]),
        "lop3" => (vec!["b32", "pred"], vec!["b32", "b32", "b32", "pred"]),
        "shf" => (vec!["b32"], vec!["b32", "b32", "u32"]),
        "shl" | "shr" => (vec![last], vec![last, "u32"]),
        "prmt" => (vec!["b32"], vec!["b32"; 3]),
        "testp" => (vec!["pred"], vec![last]),
        "setp" => {
            let mut s = vec![last; 2];
            if BOOLS.iter().any(|b| has(b)) {
                s.push("pred");
            }
            let one = matches!(last, "f16" | "bf16");
            (vec!["pred"; if one { 1 } else { 2 }], s)
        }
        "set" => {
            let mut s = vec![last; 2];
            if BOOLS.iter().any(|b| has(b)) {
                s.push("pred");
            }
            (vec![mods[mods.len() - 2]], s)
        }
        "selp" => (vec![last], vec![last, last, "pred"]),
        "slct" => {
            let ty = mods[mods.len() - 2];
            (vec![ty], vec![ty, ty, last])
        }
        "cvt" => convert::signature(mods),
        _ => return None,
    })
}

/// What the destinations have to be.
pub fn reference(base: &str, mods: &[&'static str], x: &[u64]) -> Vec<Want> {
    let last = mods[mods.len() - 1];
    if base == "cvt" {
        return vec![convert::reference(mods, x)];
    }
    if matches!(base, "set" | "setp") {
        return compare(base, mods, x);
    }
    if base == "testp" {
        return vec![Want::Bits(u64::from(class(mods[0], format(last).unwrap(), x[0])))];
    }
    if base == "selp" {
        return vec![Want::Bits(if x[2] & 1 == 1 { x[0] } else { x[1] })];
    }
    if base == "slct" {
        let first = if last == "s32" {
            x[2] as u32 as i32 >= 0
        } else {
            let c = if mods.contains(&"ftz") { F32.flush(x[2]) } else { x[2] };
            f32::from_bits(c as u32) >= 0.0
        };
        return vec![Want::Bits(if first { x[0] } else { x[1] })];
    }
    if base == "mov" {
        return vec![Want::Bits(x[0])];
    }
    match last {
        "f16x2" | "bf16x2" | "f32x2" => {
            let f = format(last).unwrap();
            let n = 1 + f.fraction + f.exponent;
            let half = |at: i32| {
                let part: Vec<u64> = x.iter().map(|v| v >> at & ((1 << n) - 1)).collect();
                float(base, mods, f, &part)
            };
            vec![half(0), half(n)]
        }
        "u16x2" | "s16x2" => {
            let ty = if last == "u16x2" { "u16" } else { "s16" };
            let half = |at: u32| {
                let part: Vec<u64> = x.iter().map(|v| v >> at & 0xffff).collect();
                integer(base, mods, ty, &part)[0]
            };
            vec![Want::Bits(half(0) | half(16) << 16)]
        }
        "f16" | "bf16" | "f32" | "f64" => vec![float(base, mods, format(last).unwrap(), x)],
        _ => integer(base, mods, last, x).into_iter().map(Want::Bits).collect(),
    }
}

/// Sections 9.7.1, 9.7.2, 9.7.8: integers and logic. `ty` is the type of the sources.
fn integer(base: &str, mods: &[&str], ty: &str, x: &[u64]) -> Vec<u64> {
    let n = if ty == "pred" { 1 } else { bits(ty) };
    let has = |m: &str| mods.contains(&m);
    let v: Vec<i128> = x.iter().map(|x| if ty == "pred" { i128::from(*x) } else { value(*x, ty) }).collect();
    let clamp = |x: i128| {
        if has("sat") { x.clamp(-(1 << (n - 1)), (1 << (n - 1)) - 1) } else { x }
    };
    let part = |p: i128| match () {
        () if has("hi") => p >> n,
        () => p,
    };
    let low24 = |x: u64| {
        let x = i128::from(x & 0xff_ffff);
        if ty == "s32" && x >> 23 == 1 { x - (1 << 24) } else { x }
    };
    let part24 = |p: i128| if has("hi") { p >> 16 } else { p };
    let ones = |x: u64| (0..n).filter(|i| x >> i & 1 == 1).count() as i128;
    let out: i128 = match base {
        "add" => clamp(v[0] + v[1]),
        "sub" => clamp(v[0] - v[1]),
        "mul" if has("wide") => return vec![mask(v[0] * v[1], 2 * n)],
        "mad" if has("wide") => return vec![mask(v[0] * v[1] + i128::from(x[2]), 2 * n)],
        "mul" => part(v[0].wrapping_mul(v[1])),
        // The high part is cut to its size before the addition.
        "mad" => clamp(part(v[0].wrapping_mul(v[1])).wrapping_add(v[2])),
        "mul24" => part24(low24(x[0]) * low24(x[1])),
        "mad24" if has("hi") => clamp(part24(low24(x[0]) * low24(x[1])) + v[2]),
        "mad24" => low24(x[0]) * low24(x[1]) + v[2],
        "sad" => (v[0] - v[1]).abs() + v[2],
        // Division by zero is unspecified; the machine gives all ones and, as the remainder, the dividend.
        "div" => v[0].checked_div(v[1]).unwrap_or(-1),
        "rem" => v[0].checked_rem(v[1]).unwrap_or(v[0]),
        "min" | "max" => {
            let m = if base == "min" { v[0].min(v[1]) } else { v[0].max(v[1]) };
            if has("relu") { m.max(0) } else { m }
        }
        "abs" => v[0].abs(),
        "neg" => -v[0],
        "and" => v[0] & v[1],
        "or" => v[0] | v[1],
        "xor" => v[0] ^ v[1],
        "not" => !v[0],
        "cnot" => i128::from(v[0] == 0),
        "popc" => ones(x[0]),
        "clz" => (0..n).take_while(|i| x[0] >> (n - 1 - i) & 1 == 0).count() as i128,
        "brev" => (0..n).fold(0, |o, i| o | i128::from(x[0] >> i & 1) << (n - 1 - i)),
        "bfind" => {
            let sign = ty.starts_with('s') && v[0] < 0;
            let found = (0..n).rev().find(|i| (x[0] >> i & 1 == 1) != sign);
            match found {
                None => 0xffff_ffff,
                Some(i) if has("shiftamt") => i128::from(n - 1 - i),
                Some(i) => i128::from(i),
            }
        }
        "fns" => {
            let (base, offset) = (x[1] & 0xffff_ffff, v[2]);
            let offset = value(offset as u64, "s32");
            let step: i128 = if offset < 0 { -1 } else { 1 };
            let mut at = i128::from(base);
            let mut left = if offset == 0 { 1 } else { offset.abs() };
            loop {
                if !(0..32).contains(&at) {
                    break 0xffff_ffff;
                }
                if x[0] >> at & 1 == 1 {
                    left -= 1;
                    if left == 0 {
                        break at;
                    }
                }
                if offset == 0 {
                    break 0xffff_ffff;
                }
                at += step;
            }
        }
        "bfe" => {
            let (pos, len) = ((x[1] & 255) as u32, (x[2] & 255) as u32);
            let top = (pos + len).saturating_sub(1).min(n - 1);
            let sign = ty.starts_with('s') && len > 0 && x[0] >> top & 1 == 1;
            (0..n).fold(0, |o, i| {
                let bit = if i < len && pos + i < n { x[0] >> (pos + i) & 1 == 1 } else { sign };
                o | i128::from(bit) << i
            })
        }
        "bfi" => {
            let (pos, len) = ((x[2] & 255) as u32, (x[3] & 255) as u32);
            (0..n).fold(0, |o, i| {
                let inside = i >= pos && i - pos < len;
                let bit = if inside { x[0] >> (i - pos) } else { x[1] >> i } & 1;
                o | i128::from(bit) << i
            })
        }
        "szext" => {
            let n = if has("wrap") { x[1] & 31 } else { (x[1] & 0xffff_ffff).min(32) } as u32;
            let low = if n == 0 { 0 } else { i128::from(x[0] & ((1u64 << n) - 1)) };
            if ty == "s32" && n > 0 && low >> (n - 1) & 1 == 1 { low - (1 << n) } else { low }
        }
        "bmsk" => {
            let amount = |x: u64| if has("wrap") { x & 31 } else { (x & 0xffff_ffff).min(32) } as u32;
            let (at, len) = (amount(x[0]), amount(x[1]));
            ((1i128 << len) - 1) << at
        }
        "dp4a" | "dp2a" => {
            let (ta, tb) = (mods[mods.len() - 2], mods[mods.len() - 1]);
            let (na, count, skip) = if base == "dp4a" { (8, 4, 0) } else { (16, 2, if has("hi") { 2 } else { 0 }) };
            let piece = |x: u64, at: u32, n: u32, ty: &str| value(x >> at, &format!("{}{n}", &ty[..1]));
            let sum: i128 = (0..count).map(|i| piece(x[0], na * i, na, ta) * piece(x[1], 8 * (i + skip), 8, tb)).sum();
            sum + i128::from(x[2])
        }
        "lop3" => {
            // The tests use the table 0xca: a ? b : c.
            let d = x[0] & x[1] | !x[0] & x[2];
            if mods.len() == 1 {
                i128::from(d)
            } else {
                let (d, q) = (d & 0xffff_ffff, x[3] & 1 == 1);
                let p = if has("or") { d != 0 || q } else { d != 0 && q };
                return vec![d, u64::from(p)];
            }
        }
        "shf" => {
            let c = if has("wrap") { x[2] & 31 } else { (x[2] & 0xffff_ffff).min(32) };
            let both = i128::from(x[1] & 0xffff_ffff) << 32 | i128::from(x[0] & 0xffff_ffff);
            if has("l") { (both << c) >> 32 } else { both >> c }
        }
        "shl" => v[0] << (x[1] & 0xffff_ffff).min(u64::from(n)),
        "shr" => v[0] >> (x[1] & 0xffff_ffff).min(u64::from(n)),
        "prmt" => {
            let bytes: Vec<u64> =
                (0..8).map(|i| if i < 4 { x[0] >> (8 * i) } else { x[1] >> (8 * i - 32) } & 255).collect();
            let c = x[2];
            // Figures of the text: byte i of the result for each mode and the two low bits of the control.
            let pick = |i: u64| -> u64 {
                let s = c & 3;
                let at = match mods.get(1).copied() {
                    None => {
                        let nibble = c >> (4 * i) & 15;
                        let byte = bytes[(nibble & 7) as usize];
                        return if nibble & 8 == 0 { byte } else { (byte >> 7) * 255 };
                    }
                    Some("f4e") => s + i,
                    Some("b4e") => (s + 8 - i) % 8,
                    Some("rc8") => s,
                    Some("ecl") => s.max(i),
                    Some("ecr") => s.min(i),
                    _ => (s & 1) * 2 + (i & 1),
                };
                bytes[at as usize]
            };
            i128::from((0..4).fold(0, |o, i| o | pick(i) << (8 * i)))
        }
        other => panic!("{other} is not known to the reference"),
    };
    let n = if matches!(base, "popc" | "clz" | "bfind" | "fns" | "dp4a" | "dp2a") { 32 } else { n };
    vec![mask(out, n)]
}

pub fn mode(mods: &[&str]) -> Mode {
    mods.iter()
        .find_map(|m| {
            Some(match *m {
                "rz" | "rzi" => Mode::Zero,
                "rm" | "rmi" => Mode::Down,
                "rp" | "rpi" => Mode::Up,
                "rna" => Mode::Away,
                _ => return None,
            })
        })
        .unwrap_or(Mode::Nearest)
}

fn order(f: Format, x: u64) -> i128 {
    let sign = 1u64 << (f.fraction + f.exponent);
    if x & sign != 0 { -i128::from(x & (sign - 1)) - 1 } else { i128::from(x) }
}

/// Value of a result with `.sat`, `.relu` and `.ftz` applied; `None` is NaN.
pub fn finish(f: Format, mods: &[&str], bits: Option<u64>) -> Want {
    let has = |m: &str| mods.contains(&m);
    let sign = 1u64 << (f.fraction + f.exponent);
    let one = ((1u64 << (f.exponent - 1)) - 1) << f.fraction;
    let Some(mut b) = bits else {
        return if has("sat") { Want::Bits(0) } else { Want::Nan(f) };
    };
    if has("ftz") {
        b = f.flush(b);
    }
    if has("sat") {
        b = if b & sign != 0 { 0 } else { b.min(one) };
    }
    if has("relu") && b & sign != 0 {
        b = 0;
    }
    Want::Bits(b)
}

/// Sections 9.7.3 to 9.7.5: floats of one format.
fn float(base: &str, mods: &[&str], f: Format, x: &[u64]) -> Want {
    let has = |m: &str| mods.contains(&m);
    let (m, sign) = (mode(mods), 1u64 << (f.fraction + f.exponent));
    let x: Vec<u64> = x.iter().map(|v| if has("ftz") { f.flush(*v) } else { *v }).collect();
    let number = |n: Number| finish(f, mods, f.write(&n, m));
    if has("approx") || has("full") {
        return approximate(base, mods, f, &x);
    }
    match base {
        "add" => number(f.read(x[0]).add(&f.read(x[1]), m)),
        "sub" => number(f.read(x[0]).add(&f.read(x[1]).negative(), m)),
        "mul" => number(product(f, x[0], x[1])),
        "fma" | "mad" => number(product(f, x[0], x[1]).add(&f.read(x[2]), m)),
        "div" => number(quotient(f, x[0], x[1])),
        "rcp" => number(quotient(f, ((1 << (f.exponent - 1)) - 1) << f.fraction, x[0])),
        "sqrt" => number(root(f, x[0])),
        "abs" | "neg" | "copysign" => {
            let (source, bits) = match base {
                "abs" => (x[0], x[0] & (sign - 1)),
                "neg" => (x[0], x[0] ^ sign),
                _ => (x[1], x[1] & (sign - 1) | x[0] & sign),
            };
            if f.is_nan(source) { Want::Nan(f) } else { Want::Bits(bits) }
        }
        "min" | "max" => {
            let cross = has("xorsign");
            let y: Vec<u64> = x.iter().map(|v| if cross { v & (sign - 1) } else { *v }).collect();
            let (a, b) = (f.is_nan(x[0]), f.is_nan(x[1]));
            if a && b || has("NaN") && (a || b) {
                return Want::Nan(f);
            }
            let first = match (a, b) {
                (true, _) => false,
                (_, true) => true,
                _ => (order(f, y[0]) < order(f, y[1])) == (base == "min"),
            };
            let d = if first { y[0] } else { y[1] };
            Want::Bits(if cross { d & (sign - 1) | (x[0] ^ x[1]) & sign } else { d })
        }
        other => panic!("{other} is not known to the reference"),
    }
}

fn real(f: Format, x: u64) -> f64 {
    match f {
        F64 => f64::from_bits(x),
        F32 => f64::from(f32::from_bits(x as u32)),
        _ => f64::from_bits(F64.write(&f.read(x), Mode::Nearest).unwrap_or(f64::NAN.to_bits())),
    }
}

/// Approximations, with the errors their sections document.
fn approximate(base: &str, mods: &[&str], f: Format, x: &[u64]) -> Want {
    let a = real(f, x[0]);
    let ulp = 2f64.powi(-f.fraction);
    let (v, relative, absolute) = match base {
        // 2 ulp; outside 2^-126..2^126 of the divisor `approx` may give zero, which these values are kept from.
        "div" => (a / real(f, x[1]), 2.0 * ulp, 0.0),
        "rcp" if f == F64 => (1.0 / real(f, x[0] & !0xffff_ffff), 2f64.powi(-19), 0.0),
        "rcp" => (1.0 / a, ulp, 0.0),
        "sqrt" => (a.sqrt(), ulp, 0.0),
        "rsqrt" if f == F64 => {
            (1.0 / real(f, if mods.contains(&"ftz") { x[0] & !0xffff_ffff } else { x[0] }).sqrt(), 2f64.powi(-19), 0.0)
        }
        "rsqrt" => (1.0 / a.sqrt(), 2f64.powf(-22.9), 0.0),
        "sin" => (a.sin(), 0.0, 2f64.powf(-20.5)),
        "cos" => (a.cos(), 0.0, 2f64.powf(-20.5)),
        "lg2" => (a.log2(), 2f64.powi(-22), 2f64.powi(-22)),
        "ex2" if f == F32 => (a.exp2(), 2.0 * ulp, 0.0),
        "ex2" if f == F16 => (a.exp2(), 2f64.powf(-9.9), 0.0),
        "ex2" => (a.exp2(), 2f64.powi(-7), 0.0),
        "tanh" if f == F32 => (a.tanh(), 2f64.powi(-11), 0.0),
        "tanh" if f == F16 => (a.tanh(), 0.0, 2f64.powf(-10.987)),
        "tanh" => (a.tanh(), 0.0, 2f64.powi(-8)),
        other => panic!("{other} is not known to the reference"),
    };
    if v.is_nan() {
        return Want::Nan(f);
    }
    Want::Near(f, v, relative, absolute)
}

fn class(name: &str, f: Format, x: u64) -> bool {
    let sign = 1u64 << (f.fraction + f.exponent);
    let m = x & (sign - 1);
    let (nan, infinite) = (m > f.infinity(), m == f.infinity());
    match name {
        "finite" => !nan && !infinite,
        "infinite" => infinite,
        "number" => !nan,
        "notanumber" => nan,
        "normal" => !nan && !infinite && !f.subnormal(x),
        _ => f.subnormal(x),
    }
}

/// Section 9.7.6: comparisons, combined with a predicate.
fn compare(base: &str, mods: &[&'static str], x: &[u64]) -> Vec<Want> {
    let ty = mods[mods.len() - 1];
    let has = |m: &str| mods.contains(&m);
    let holds = |a: u64, b: u64| -> bool {
        use std::cmp::Ordering::{Equal, Greater, Less};
        let order = match format(ty) {
            Some(f) => {
                let (a, b) = if has("ftz") { (f.flush(a), f.flush(b)) } else { (a, b) };
                if f.is_nan(a) || f.is_nan(b) {
                    None
                } else {
                    let zero = |x: u64| if f.read(x).is_zero() { 0 } else { x };
                    Some(order(f, zero(a)).cmp(&order(f, zero(b))))
                }
            }
            None => Some(value(a, ty).cmp(&value(b, ty))),
        };
        match (mods[0], order) {
            ("num", o) => o.is_some(),
            ("nan", o) => o.is_none(),
            ("equ" | "neu" | "ltu" | "leu" | "gtu" | "geu", None) => true,
            (_, None) => false,
            ("eq" | "equ", Some(o)) => o == Equal,
            ("ne" | "neu", Some(o)) => o != Equal,
            ("lt" | "lo" | "ltu", Some(o)) => o == Less,
            ("le" | "ls" | "leu", Some(o)) => o != Greater,
            ("gt" | "hi" | "gtu", Some(o)) => o == Greater,
            (_, Some(o)) => o != Less,
        }
    };
    let combined = |t: bool| {
        let c = x.get(2).is_some_and(|c| c & 1 == 1);
        match () {
            () if has("and") => t && c,
            () if has("or") => t || c,
            () if has("xor") => t != c,
            () => t,
        }
    };
    let pair = matches!(ty, "f16x2" | "bf16x2");
    let (low, high) = (holds(x[0] & 0xffff, x[1] & 0xffff), holds(x[0] >> 16, x[1] >> 16));
    if base == "setp" {
        let (p, q) = if pair {
            (combined(low), combined(high))
        } else {
            let t = holds(x[0], x[1]);
            (combined(t), combined(!t))
        };
        let n = if matches!(ty, "f16" | "bf16") { 1 } else { 2 };
        return [p, q][..n].iter().map(|b| Want::Bits(u64::from(*b))).collect();
    }
    let one: u64 = match mods[mods.len() - 2] {
        "f32" => 0x3f80_0000,
        "f16" | "f16x2" => 0x3c00,
        "bf16" | "bf16x2" => 0x3f80,
        "u16" | "s16" => 0xffff,
        _ => 0xffff_ffff,
    };
    if pair {
        return vec![Want::Bits((u64::from(combined(low)) * one) | ((u64::from(combined(high)) * one) << 16))];
    }
    vec![Want::Bits(u64::from(combined(holds(x[0], x[1]))) * one)]
}
