//! What every device's sums, biases, rotary embedding, SwiGLU and dropout are held to.

use ringtune::backend::{Backend, Dropout, Rope, Rotate, Swiglu};
use ringtune::tensor::DType;

use super::close::{assert_close, normal, rounded, stored, tensor, tensor_i32, values};

/// The types of numbers.
pub const TYPES: [DType; 2] = [DType::F32, DType::Bf16];

/// A formula over the elements of inputs, exact and with every result rounded, against what the device gives.
fn compare(what: &str, ours: &[f32], dtype: DType, f: impl Fn(usize, &dyn Fn(f64) -> f64) -> f64) {
    let exact: Vec<f64> = (0..ours.len()).map(|i| f(i, &|x| x)).collect();
    let plain: Vec<f64> = (0..ours.len()).map(|i| f(i, &|x| rounded(dtype, x))).collect();
    assert_close(what, ours, &exact, &plain, dtype);
}

/// Rows and columns.
pub const SHAPES: [(usize, usize); 3] = [(1, 1), (7, 33), (300, 129)];

/// Copies, sums, biases and their gradient, in every mix of types.
pub fn copies_casts_and_sums_round_once<B: Backend>(dev: &B, name: &str, shapes: &[(usize, usize)]) {
    for &(n, c) in shapes {
        let (x, y, b) = (normal(1, n * c), normal(2, n * c), normal(3, c));
        for (to, from) in [(TYPES[0], TYPES[0]), (TYPES[0], TYPES[1]), (TYPES[1], TYPES[0]), (TYPES[1], TYPES[1])] {
            let what = |op: &str| format!("{name} {op} {n}x{c} {to:?} {from:?}");
            let (src, bias) = (tensor(dev, n, c, from, &x), tensor(dev, 1, c, from, &b));
            let mut dst = tensor(dev, n, c, to, &y);
            let (xs, ys, bs) = (stored(from, &x), stored(to, &y), stored(from, &b));
            // One rounding of the exact sum (exact in f32 up to its own rounding).
            dev.add(&mut dst, &src).unwrap();
            let added = values(dev, &dst);
            compare(&what("add"), &added, to, |i, r| r(xs[i] + ys[i]));
            dev.add_bias(&mut dst, &bias).unwrap();
            let biased = values(dev, &dst);
            compare(&what("add_bias"), &biased, to, |i, r| r(f64::from(added[i]) + bs[i % c]));
            dev.copy(&mut dst, &src).unwrap();
            let expected: Vec<f32> = xs.iter().map(|&x| rounded(to, x) as f32).collect();
            assert_eq!(values(dev, &dst), expected, "{}", what("copy"));
            dev.fill_zero(&mut dst).unwrap();
            assert!(values(dev, &dst).iter().all(|&x| x == 0.0));
            let mut db = tensor(dev, 1, c, DType::F32, &b);
            dev.bias_backward(&mut db, &src).unwrap();
            compare(&what("bias_backward"), &values(dev, &db), DType::F32, |j, r| {
                (0..n).fold(f64::from(b[j]), |s, i| r(s + xs[i * c + j]))
            });
        }
    }
}

/// Forward, then back to where it came from.
pub fn rope_turns_pairs_and_turns_them_back<B: Backend>(dev: &B, name: &str) {
    for dtype in TYPES {
        for (n, heads, d) in [(33, 3, 24), (1, 1, 2), (5, 20, 64)] {
            let x = normal(4, n * heads * d);
            let angles: Vec<f32> = (0..50 * d / 2).map(|i| i as f32 * 0.37).collect();
            let row = |p: usize, f: fn(f32) -> f32| angles[p * d / 2..(p + 1) * d / 2].iter().map(move |&a| f(a));
            let table: Vec<f32> =
                (0..50).flat_map(|p| row(p, f32::cos).chain(row(p, f32::sin)).collect::<Vec<_>>()).collect();
            let positions: Vec<i32> = (0..n as i32).map(|i| (i * 7) % 50).collect();
            let (tt, pt) = (tensor(dev, 50, d, DType::F32, &table), tensor_i32(dev, &positions));
            let by = Rope { table: &tt, positions: &pt };
            let mut t = tensor(dev, n, heads * d, dtype, &x);
            let xs = stored(dtype, &x);
            dev.rope(&mut t, by, Rotate::Forward).unwrap();
            let turned = values(dev, &t);
            compare(&format!("{name} rope {dtype:?} {n}x{heads}x{d}"), &turned, dtype, |e, r| {
                let (token, j) = (e / (heads * d), e % d);
                let at = positions[token] as usize * d + j % (d / 2);
                let (cos, sin) = (f64::from(table[at]), f64::from(table[at + d / 2]));
                let (other, sign) = if j < d / 2 { (xs[e + d / 2], -1.0) } else { (xs[e - d / 2], 1.0) };
                r(r(xs[e] * cos) + r(sign * other * sin))
            });
            dev.rope(&mut t, by, Rotate::Inverse).unwrap();
            let unit = if dtype == DType::F32 { 1e-6 } else { 0.02 };
            for (a, b) in values(dev, &t).iter().zip(&xs) {
                assert!((f64::from(*a) - b).abs() <= unit * b.abs().max(1.0), "{name} {a} {b}");
            }
        }
    }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Forward, backward in place, and what is not finite.
pub fn swiglu_and_its_gradient<B: Backend>(dev: &B, name: &str, shapes: &[(usize, usize)]) {
    for dtype in TYPES {
        for &(n, f) in shapes {
            let g: Vec<f32> = normal(5, n * f).iter().map(|x| x * 6.0).collect();
            let (u, d) = (normal(6, n * f), normal(7, n * f));
            let [mut gt, mut ut, mut dt] = [&g, &u, &d].map(|x| tensor(dev, n, f, dtype, x));
            let [gs, us, ds] = [&g, &u, &d].map(|x| stored(dtype, x));
            let mut out = dev.alloc(n, f, dtype).unwrap();
            dev.swiglu_forward(&mut out, Swiglu { gate: &gt, up: &ut }).unwrap();
            dev.swiglu_backward(&mut gt, &mut ut, &mut dt).unwrap();
            let (dg, du) = (gt, ut);
            assert_eq!(values(dev, &dt), values(dev, &out), "{name}: the same output again");
            let what = format!("{name} {dtype:?} {n}x{f}");
            let sigmoid = |x: f64, r: &dyn Fn(f64) -> f64| r(1.0 / r(1.0 + r((-x).exp())));
            compare(&format!("{what} out"), &values(dev, &out), dtype, |i, r| r(r(gs[i] * sigmoid(gs[i], r)) * us[i]));
            compare(&format!("{what} dup"), &values(dev, &du), dtype, |i, r| r(ds[i] * r(gs[i] * sigmoid(gs[i], r))));
            // The derivative from finite differences of the f64 formula agrees with the formula compared here.
            let slope = |x: f64| (silu(x + 1e-5) - silu(x - 1e-5)) / 2e-5;
            let derivative = |x: f64, r: &dyn Fn(f64) -> f64| {
                let s = sigmoid(x, r);
                r(s * r(1.0 + r(x * r(1.0 - s))))
            };
            assert!(gs.iter().all(|&x| (slope(x) - derivative(x, &|x| x)).abs() < 1e-8));
            compare(&format!("{what} dgate"), &values(dev, &dg), dtype, |i, r| {
                r(r(ds[i] * us[i]) * derivative(gs[i], r))
            });
        }
    }
    let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -200.0];
    let (gt, ut) = (tensor(dev, 1, 4, DType::F32, &special), tensor(dev, 1, 4, DType::F32, &[1.0; 4]));
    let mut out = dev.alloc(1, 4, DType::F32).unwrap();
    dev.swiglu_forward(&mut out, Swiglu { gate: &gt, up: &ut }).unwrap();
    let out = values(dev, &out);
    // -inf · 0 is NaN, as the formula in f32 says.
    assert!(out[0].is_nan() && out[1] == f32::INFINITY && out[2].is_nan() && out[3].abs() < 1e-30, "{name} {out:?}");
}

/// Element by element what [`Dropout::drops`] says.
pub fn dropout_draws_what_its_definition_says<B: Backend>(dev: &B, name: &str, shapes: &[(usize, usize)]) {
    for (&(n, c), p) in shapes.iter().zip([0.5, 0.1, 0.0].into_iter().cycle()) {
        let d = Dropout { key: 77 + ((n as u64) << 33), p };
        let x = normal(8, n * c);
        for (to, from) in [(TYPES[0], TYPES[0]), (TYPES[1], TYPES[0]), (TYPES[0], TYPES[1]), (TYPES[1], TYPES[1])] {
            let src = tensor(dev, n, c, from, &x);
            let mut dst = dev.alloc(n, c, to).unwrap();
            dev.dropout(&mut dst, &src, d).unwrap();
            for (e, (y, x)) in values(dev, &dst).iter().zip(stored(from, &x)).enumerate() {
                let kept = rounded(to, f64::from(x as f32 * d.scale())) as f32;
                let expected = if d.drops(e as u64) { 0.0 } else { kept };
                assert_eq!(*y, expected, "{name} {to:?} {from:?} {n}x{c} p {p} element {e}");
            }
        }
    }
    // A dropped NaN stays visible.
    let (src, mut dst) = (tensor(dev, 1, 9, DType::F32, &[f32::NAN; 9]), dev.alloc(1, 9, DType::F32).unwrap());
    dev.dropout(&mut dst, &src, Dropout { key: 3, p: 0.5 }).unwrap();
    assert!(values(dev, &dst).iter().all(|x| x.is_nan()), "{name}");
}
