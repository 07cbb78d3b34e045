//! What `cvt` computes. Source: PTX ISA, section `cvt`; the 8-bit formats after the OCP 8-bit floating point specification.

use super::exact::{BF16, F16, F32, Format, Mode, Number, TF32};
use super::reference::{Signature, Want, finish, format, mode, value};

const TYPES: [&str; 21] = [
    "u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64", "f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "tf32",
    "e4m3x2", "e5m2x2", "u4", "s4", "u2", "s2",
];

fn types(mods: &[&'static str]) -> (&'static str, &'static str) {
    let list: Vec<&str> = mods.iter().copied().filter(|m| TYPES.contains(m)).collect();
    (list[0], list[list.len() - 1])
}

pub fn signature(mods: &[&'static str]) -> Signature {
    let (d, s) = types(mods);
    if mods[0] == "pack" {
        let three = mods[mods.len() - 1] == "b32";
        return (vec!["b32"], if three { vec!["s32", "s32", "b32"] } else { vec!["s32", "s32"] });
    }
    let pair = s == "f32" && d.ends_with("x2");
    // An 8-bit source stands in the low byte of a 16-bit register; what is above must not matter.
    let d = match d {
        "u8" | "s8" => "b16",
        "e4m3x2" | "e5m2x2" => "b16",
        "tf32" => "b32",
        d => d,
    };
    (vec![d], vec![s; if pair { 2 } else { 1 }])
}

fn small(d: &str) -> (Format, u64) {
    // Largest finite magnitude as bits.
    if d == "e4m3x2" {
        (Format { fraction: 3, exponent: 4 }, 0x7e)
    } else {
        (Format { fraction: 2, exponent: 5 }, 0x7b)
    }
}

/// To nearest even, beyond the largest finite number to it.
fn to_small(n: &Number, d: &str, relu: bool) -> u64 {
    let (f, max) = small(d);
    if *n == Number::Nan {
        return 0x7f;
    }
    // The next exponent up keeps the format's own top binade from counting as infinity.
    let bits = match n {
        Number::Infinite(neg) => max | u64::from(*neg) << 7,
        _ => {
            let wide = Format { fraction: f.fraction, exponent: f.exponent + 1 };
            let w = wide.write(n, Mode::Nearest).unwrap_or(0);
            let (sign, m) =
                (w >> (wide.fraction + wide.exponent) & 1, w & ((1 << (wide.fraction + wide.exponent)) - 1));
            // Numbers below the format's normal range round at its own last place.
            let shift = (1 << (f.exponent - 1)) << f.fraction;
            let magnitude =
                if m >= shift + (1 << f.fraction) { m - shift } else { f.write(n, Mode::Nearest).unwrap_or(0) & 0x7f };
            magnitude.min(max) | sign << 7
        }
    };
    if relu && bits & 0x80 != 0 { 0 } else { bits }
}

fn from_small(x: u64, s: &str) -> Number {
    let (f, max) = small(s);
    let m = x & 0x7f;
    if s == "e5m2x2" {
        return f.read(x & 0xff);
    }
    if m > max {
        return Number::Nan;
    }
    // The top exponent of e4m3 holds numbers, not infinities: 1.m * 2^8 is twice what the exponent below holds.
    if m >> 3 == 15 {
        let Number::Finite(neg, _, _) = f.read(x & 0xff & !0x78 | 0x70) else {
            return Number::Nan;
        };
        let whole = i128::from(8 + (m & 7)) << 5;
        return if neg { Number::whole(-whole) } else { Number::whole(whole) };
    }
    f.read(x & 0xff)
}

pub fn reference(mods: &[&'static str], x: &[u64]) -> Want {
    let (d, s) = types(mods);
    let has = |m: &str| mods.contains(&m);
    if mods[0] == "pack" {
        let n: u32 = d[1..].parse().unwrap();
        let (low, high) =
            if d.starts_with('s') { (-(1i128 << (n - 1)), (1i128 << (n - 1)) - 1) } else { (0, (1i128 << n) - 1) };
        let part = |x: u64| value(x, "s32").clamp(low, high) as u64 & ((1 << n) - 1);
        let c = x.get(2).copied().unwrap_or(0);
        return Want::Bits((c << (2 * n) | part(x[0]) << n | part(x[1])) & 0xffff_ffff);
    }
    if d.ends_with("x2") || s.ends_with("x2") {
        return packed(mods, d, s, x);
    }
    let x = x[0];
    let number = match format(s) {
        Some(f) => f.read(if has("ftz") && f == F32 { f.flush(x) } else { x }),
        None => Number::whole(value(x, s)),
    };
    if d == "tf32" {
        let n = match number {
            Number::Nan => return Want::Nan(F32),
            n => n,
        };
        // tf32 keeps the exponent of f32 and ten bits of its fraction.
        let bits = TF32.write(&n, mode(mods)).unwrap_or(0) << 13;
        return Want::Bits(if has("relu") && bits >> 31 == 1 { 0 } else { bits });
    }
    let to_whole = mods.iter().any(|m| matches!(*m, "rni" | "rzi" | "rmi" | "rpi"));
    let number = if to_whole { number.round(mode(mods)) } else { number };
    match format(d) {
        Some(f) => {
            let m = if to_whole { Mode::Nearest } else { mode(mods) };
            let kept: Vec<&str> = mods.iter().copied().filter(|m| *m != "ftz" || f == F32).collect();
            finish(f, &kept, f.write(&number, m))
        }
        None => integer(d, s, &number, has("sat") || format(s).is_some()),
    }
}

/// To an integer: clamped from a float or with `.sat`, otherwise cut. The register is wider than 8 bits: the value is extended.
fn integer(d: &str, s: &str, number: &Number, clamps: bool) -> Want {
    let n: u32 = d[1..].parse().unwrap();
    let signed = d.starts_with('s');
    let (low, high) = if signed { (-(1i128 << (n - 1)), (1i128 << (n - 1)) - 1) } else { (0, (1i128 << n) - 1) };
    let register = n.max(16);
    let v = match number.clamp(-(1 << 90), 1 << 90) {
        // NaN: zero if neither side has 64 bits, otherwise the sign bit alone.
        None if s == "f64" || n == 64 => value(1 << (n - 1), d),
        None => 0,
        Some(v) if clamps => v.clamp(low, high),
        Some(v) => value(v as u64, d),
    };
    Want::Bits(if register == 64 { v as u64 } else { v as u64 & ((1 << register) - 1) })
}

fn packed(mods: &[&'static str], d: &'static str, s: &'static str, x: &[u64]) -> Want {
    let relu = mods.contains(&"relu");
    let half = |f: Format, n: &Number| match f.write(n, mode(mods)) {
        // The canonical NaN.
        None => 0x7fff,
        Some(b) if relu && b >> 15 == 1 => 0,
        Some(b) => b,
    };
    Want::Bits(match (d, s) {
        ("f16x2" | "bf16x2", "f32") => {
            let f = if d == "f16x2" { F16 } else { BF16 };
            half(f, &F32.read(x[0])) << 16 | half(f, &F32.read(x[1]))
        }
        ("f16x2", _) => half(F16, &from_small(x[0], s)) | half(F16, &from_small(x[0] >> 8, s)) << 16,
        (_, "f32") => to_small(&F32.read(x[0]), d, relu) << 8 | to_small(&F32.read(x[1]), d, relu),
        _ => to_small(&F16.read(x[0] & 0xffff), d, relu) | to_small(&F16.read(x[0] >> 16), d, relu) << 8,
    })
}
