//! What a reduction gives, element by element, written apart from the library: floats through the `half` crate.

use cudarc::nccl::sys::{ncclDataType_t as D, ncclRedOp_t as Op};
use half::{bf16, f16};

use crate::ranks::size;

/// A number that looks like noise.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Elements of a rank: all bits for integers, values of moderate size for floats, now and then a special one.
pub fn input(d: D, rank: usize, n: usize, seed: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(n * size(d));
    for i in 0..n as u64 {
        let bits = mix(seed << 40 ^ (rank as u64 + 1) << 32 ^ i);
        let special = [f64::INFINITY, -0.0, f64::NAN, 1e-7];
        let x = match bits % 61 {
            k @ 0..4 if rank == 1 => special[k as usize],
            _ => (bits >> 11) as f64 / (1u64 << 53) as f64 * 4.0 - 2.0,
        };
        match d {
            D::ncclFloat16 => out.extend(f16::from_f64(x).to_le_bytes()),
            D::ncclBfloat16 => out.extend(bf16::from_f64(x).to_le_bytes()),
            D::ncclFloat32 => out.extend((x as f32).to_le_bytes()),
            D::ncclFloat64 => out.extend(x.to_le_bytes()),
            _ => out.extend(&bits.to_le_bytes()[..size(d)]),
        }
    }
    out
}

macro_rules! integer {
    ($t:ty, $parts:expr, $op:expr) => {{
        let v: Vec<$t> = $parts.iter().map(|p| <$t>::from_le_bytes((*p).try_into().unwrap())).collect();
        let wide = v.iter().map(|x| i128::from(*x));
        let x = match $op {
            Op::ncclSum => wide.sum::<i128>() as $t,
            Op::ncclProd => v.iter().fold(1, |a: $t, b| a.wrapping_mul(*b)),
            Op::ncclMax => wide.max().unwrap() as $t,
            Op::ncclMin => wide.min().unwrap() as $t,
            // The wrapped sum, cut towards zero.
            _ => (i128::from(wide.sum::<i128>() as $t) / v.len() as i128) as $t,
        };
        x.to_le_bytes().to_vec()
    }};
}

macro_rules! float {
    ($t:ty, $v:expr, $op:expr) => {{
        let v: Vec<$t> = $v;
        // A NaN loses against a number.
        let better = |a: $t, b: $t, less: bool| {
            if b.is_nan() || !a.is_nan() && !((b < a) == less && a != b) { a } else { b }
        };
        let (first, rest) = v.split_first().unwrap();
        let fold = |f: &dyn Fn($t, $t) -> $t| rest.iter().fold(*first, |a, b| f(a, *b));
        match $op {
            Op::ncclSum => fold(&|a, b| a + b),
            Op::ncclProd => fold(&|a, b| a * b),
            Op::ncclMax => fold(&|a, b| better(a, b, false)),
            Op::ncclMin => fold(&|a, b| better(a, b, true)),
            _ => fold(&|a, b| a + b) / v.len() as $t,
        }
    }};
}

/// One element from those of the ranks, in their order.
fn element(d: D, op: Op, parts: &[&[u8]]) -> Vec<u8> {
    match d {
        D::ncclInt8 => integer!(i8, parts, op),
        D::ncclUint8 => integer!(u8, parts, op),
        D::ncclInt32 => integer!(i32, parts, op),
        D::ncclUint32 => integer!(u32, parts, op),
        D::ncclInt64 => integer!(i64, parts, op),
        D::ncclUint64 => integer!(u64, parts, op),
        D::ncclFloat16 => {
            let v = parts.iter().map(|p| f16::from_le_bytes((*p).try_into().unwrap()).to_f32()).collect();
            f16::from_f32(float!(f32, v, op)).to_le_bytes().to_vec()
        }
        D::ncclBfloat16 => {
            let v = parts.iter().map(|p| bf16::from_le_bytes((*p).try_into().unwrap()).to_f32()).collect();
            bf16::from_f32(float!(f32, v, op)).to_le_bytes().to_vec()
        }
        D::ncclFloat32 => {
            let v = parts.iter().map(|p| f32::from_le_bytes((*p).try_into().unwrap())).collect();
            float!(f32, v, op).to_le_bytes().to_vec()
        }
        _ => {
            let v = parts.iter().map(|p| f64::from_le_bytes((*p).try_into().unwrap())).collect();
            float!(f64, v, op).to_le_bytes().to_vec()
        }
    }
}

/// The reduction of whole buffers.
pub fn reduced(d: D, op: Op, parts: &[Vec<u8>]) -> Vec<u8> {
    let e = size(d);
    let n = parts[0].len() / e;
    (0..n)
        .flat_map(|i| {
            let each: Vec<&[u8]> = parts.iter().map(|p| &p[i * e..(i + 1) * e]).collect();
            element(d, op, &each)
        })
        .collect()
}

/// Compares bit by bit; any NaN is as good as another.
#[track_caller]
pub fn same(d: D, got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let e = size(d);
    let nan = |b: &[u8]| match d {
        D::ncclFloat16 => f16::from_le_bytes(b.try_into().unwrap()).is_nan(),
        D::ncclBfloat16 => bf16::from_le_bytes(b.try_into().unwrap()).is_nan(),
        D::ncclFloat32 => f32::from_le_bytes(b.try_into().unwrap()).is_nan(),
        D::ncclFloat64 => f64::from_le_bytes(b.try_into().unwrap()).is_nan(),
        _ => false,
    };
    for (i, (g, w)) in got.chunks(e).zip(want.chunks(e)).enumerate() {
        assert!(g == w || nan(g) && nan(w), "{what}: element {i}: {g:02x?}, expected {w:02x?}");
    }
}
