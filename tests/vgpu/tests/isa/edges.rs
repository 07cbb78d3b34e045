//! Values at the edges of each type, as raw bits, and the cases made of them.

use super::exact::{BF16, F16, F32, F64, Format};

/// 32 edge values of a type by its name.
pub fn edges(ty: &str) -> Vec<u64> {
    let float = |f: Format| -> Vec<u64> {
        let sign = 1u64 << (f.fraction + f.exponent);
        let bias = (1u64 << (f.exponent - 1)) - 1;
        let one = bias << f.fraction;
        let inf = f.infinity();
        let positive = [
            0,
            1,
            (1 << f.fraction) - 1,
            1 << f.fraction,
            one,
            one + 1,
            one - 1,
            one | 1 << (f.fraction - 1),
            inf - 1,
            inf,
            inf | 1 << (f.fraction - 1),
            (bias + 1) << f.fraction,
            (bias + 4) << f.fraction | 0x15 << (f.fraction - 6),
            (bias - 2) << f.fraction | 0x2a << (f.fraction - 6),
            (bias - 1) << f.fraction,
        ];
        positive.iter().flat_map(|x| [*x, *x | sign]).collect()
    };
    match ty {
        "f16" => float(F16),
        "bf16" => float(BF16),
        "f32" | "tf32" => {
            let mut v = float(F32);
            let more = [8_388_609.0f32, 2.5, -3.5, 255.5, 65_520.0, 2_147_483_648.0, 1.0e10, 0.3, 1e-30];
            v.extend(more.iter().map(|x| u64::from(x.to_bits())));
            v
        }
        "f64" => {
            let mut v = float(F64);
            let more = [2.5f64, -3.5, 255.5, 65_520.0, 4_294_967_295.5, -2_147_483_649.0, 9.3e18, 1.9e19, 0.1];
            v.extend(more.iter().map(|x| x.to_bits()));
            v
        }
        "pred" => vec![0, 1],
        "f16x2" | "bf16x2" | "u16x2" | "s16x2" => {
            let half = edges(match ty {
                "f16x2" => "f16",
                "bf16x2" => "bf16",
                _ => "u16",
            });
            let n = half.len();
            (0..n).map(|i| half[i] | half[(7 * i + 3) % n] << 16).collect()
        }
        "f32x2" => {
            let half = edges("f32");
            let n = half.len();
            (0..n).map(|i| half[i] | half[(7 * i + 3) % n] << 32).collect()
        }
        "e4m3x2" | "e5m2x2" => (0..256).map(|i: u64| i | (((i * 7 + 3) & 255) << 8)).collect(),
        _ => {
            let bits: u32 = ty[1..].parse().unwrap();
            let max = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
            let top = 1 << (bits - 1);
            let list = [
                0,
                1,
                2,
                3,
                7,
                15,
                16,
                31,
                32,
                33,
                63,
                64,
                0x7f,
                0x80,
                0xff,
                0x100,
                top - 1,
                top,
                top + 1,
                max,
                max - 1,
                max - 6,
                0x1234_5678_9abc_def0,
                0xdead_beef_0f1e_2d3c,
                0x5555_5555_5555_5555,
                0x0000_0001_ffff_ffff,
            ];
            let mut v: Vec<u64> = list.iter().map(|x| x & max).collect();
            v.dedup();
            v
        }
    }
}

/// Every pair of the first two operands, with the others moving along.
pub fn cases(types: &[&str]) -> Vec<Vec<u64>> {
    let lists: Vec<Vec<u64>> = types.iter().map(|t| edges(t)).collect();
    if lists.is_empty() {
        return vec![Vec::new()];
    }
    let (a, b) = (&lists[0], lists.get(1));
    let mut out = Vec::new();
    for (i, x) in a.iter().enumerate() {
        for (j, y) in b.unwrap_or(&vec![0]).iter().enumerate() {
            let mut case = vec![*x];
            if b.is_some() {
                case.push(*y);
            }
            for (k, list) in lists.iter().enumerate().skip(2) {
                case.push(list[(i * (2 * k + 1) + j * (k + 2) + (i * j) / 3) % list.len()]);
            }
            out.push(case);
        }
    }
    out
}
