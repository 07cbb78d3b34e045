//! What every device's norms are held to.

use ringtune::backend::{Backend, Norm, Write};
use ringtune::tensor::DType;

use super::close::{assert_close, normal, rounded, stored, tensor, values};

/// out, dx, dw of groups of the weight's width, every step passed through `round`.
fn reference(x: &[f64], w: &[f64], dout: &[f64], eps: f64, round: impl Fn(f64) -> f64) -> [Vec<f64>; 3] {
    let d = w.len();
    let (mut out, mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; d]);
    for g in (0..x.len()).step_by(d) {
        let mean = round((g..g + d).fold(0.0, |s, i| round(s + round(x[i] * x[i]))) / d as f64);
        let r = round(1.0 / round((mean + eps).sqrt()));
        let dot = (g..g + d).fold(0.0, |s, i| round(s + round(round(dout[i] * w[i - g]) * round(x[i] * r))));
        for i in g..g + d {
            let normed = round(x[i] * r);
            out[i] = round(normed * w[i - g]);
            dx[i] = round(r * round(round(dout[i] * w[i - g]) - round(normed * round(dot / d as f64))));
            dw[i - g] = round(dw[i - g] + round(dout[i] * normed));
        }
    }
    [out, dx, dw]
}

/// Types of x, w, out and dout, dx.
#[derive(Clone, Copy, Debug)]
pub struct Types {
    pub x: DType,
    pub w: DType,
    pub out: DType,
    pub dx: DType,
}

impl Types {
    /// One type for all.
    pub fn all(dtype: DType) -> Self {
        Self { x: dtype, w: dtype, out: dtype, dx: dtype }
    }

    /// Every mix.
    pub fn mixes() -> Vec<Self> {
        let types = [DType::F32, DType::Bf16];
        let mut mixes = Vec::new();
        for x in types {
            for w in types {
                for out in types {
                    mixes.extend(types.map(|dx| Self { x, w, out, dx }));
                }
            }
        }
        mixes
    }
}

/// out, dx, dw of rows of width `c`. With `Write::Add`, dx begins at `before`.
pub fn run<D: Backend>(
    dev: &D,
    t: Types,
    (n, c): (usize, usize),
    [x, w, dout]: &[Vec<f32>; 3],
    write: Write,
    before: f32,
) -> [Vec<f32>; 3] {
    let d = w.len();
    let (xt, wt, dt) = (tensor(dev, n, c, t.x, x), tensor(dev, 1, d, t.w, w), tensor(dev, n, c, t.out, dout));
    let mut out = dev.alloc(n, c, t.out).unwrap();
    let mut rstd = dev.alloc(n, c / d, DType::F32).unwrap();
    let norm = Norm { x: &xt, w: &wt, eps: 1e-5 };
    dev.rmsnorm_forward(&mut out, &mut rstd, norm).unwrap();
    let mut dx = tensor(dev, n, c, t.dx, &vec![before; n * c]);
    let mut dw = tensor(dev, 1, d, DType::F32, &vec![before; d]);
    dev.rmsnorm_backward(&mut dx, Some(&mut dw), &dt, &rstd, norm, write).unwrap();
    // Without dw, the same dx.
    let mut alone = tensor(dev, n, c, t.dx, &vec![before; n * c]);
    dev.rmsnorm_backward(&mut alone, None, &dt, &rstd, norm, write).unwrap();
    let bits = |t| values(dev, t).into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(&alone), bits(&dx), "dx does not depend on dw");
    [&out, &dx, &dw].map(|t| values(dev, t))
}

/// Rows, width, width of the weight.
pub const SHAPES: [(usize, usize, usize); 4] = [(1, 8, 8), (7, 33, 33), (130, 48, 16), (33, 576, 576)];

/// Forward and backward of one mix of types over `shapes`, set and added to.
pub fn follow_the_formula<D: Backend>(dev: &D, name: &str, t: Types, shapes: &[(usize, usize, usize)]) {
    for &(n, c, d) in shapes {
        let inputs = [normal(1, n * c), normal(2, d), normal(3, n * c)];
        let [x, w, dout] = [stored(t.x, &inputs[0]), stored(t.w, &inputs[1]), stored(t.out, &inputs[2])];
        let exact = reference(&x, &w, &dout, 1e-5, |x| x);
        for (write, before) in [(Write::Set, 0.0), (Write::Add, 0.0), (Write::Add, 0.75)] {
            let ours = run(dev, t, (n, c), &inputs, write, before);
            for (i, (what, stored_as)) in [("out", t.out), ("dx", t.dx), ("dw", DType::F32)].into_iter().enumerate() {
                // Plain arithmetic is that of the type the result is stored in, or of the narrowest that goes into dw.
                let narrow =
                    if i == 2 && (t.x == DType::Bf16 || t.out == DType::Bf16) { DType::Bf16 } else { stored_as };
                let plain = reference(&x, &w, &dout, 1e-5, |x| rounded(narrow, x));
                let moved = |v: &[f64]| -> Vec<f64> {
                    let by = if i == 0 { 0.0 } else { f64::from(before) };
                    v.iter().map(|v| v + by).collect()
                };
                let label = format!("{name} {t:?} {n}x{c}/{d} {what} {write:?} from {before}");
                assert_close(&label, &ours[i], &moved(&exact[i]), &moved(&plain[i]), stored_as);
            }
        }
    }
}

/// The same bits for a row with other rows around it.
pub fn bits_do_not_depend_on_the_rows_around<D: Backend>(dev: &D, name: &str, c: usize) -> [Vec<f32>; 3] {
    let n = 200;
    let inputs = [normal(7, n * c), normal(8, c), normal(9, n * c)];
    let t = Types::all(DType::Bf16);
    let first = run(dev, t, (n, c), &inputs, Write::Set, 0.0);
    assert_eq!(run(dev, t, (n, c), &inputs, Write::Set, 0.0), first, "{name}: run to run");
    let cut = |x: &[f32]| x[70 * c..90 * c].to_vec();
    let part = [cut(&inputs[0]), inputs[1].clone(), cut(&inputs[2])];
    let [out, dx, _] = run(dev, t, (20, c), &part, Write::Set, 0.0);
    assert_eq!((out, dx), (cut(&first[0]), cut(&first[1])), "{name}");
    first
}

/// The gradient in [`reference`] is that of its forward: finite differences.
#[test]
fn the_reference_gradient_is_that_of_the_reference() {
    let (n, d) = (3, 7);
    let [x, w, dout] = [normal(4, n * d), normal(5, d), normal(6, n * d)].map(|x| stored(DType::F32, &x));
    let [_, dx, dw] = reference(&x, &w, &dout, 1e-5, |x| x);
    let value = |x: &[f64], w: &[f64]| -> f64 {
        let [out, ..] = reference(x, w, &dout, 1e-5, |x| x);
        out.iter().zip(&dout).map(|(o, d)| o * d).sum()
    };
    let moved = |v: &[f64], i: usize, by: f64| -> Vec<f64> {
        let mut v = v.to_vec();
        v[i] += by;
        v
    };
    for (i, dx) in dx.iter().enumerate() {
        let slope = (value(&moved(&x, i, 1e-5), &w) - value(&moved(&x, i, -1e-5), &w)) / 2e-5;
        assert!((slope - dx).abs() < 1e-7, "dx {i}: {slope} {dx}");
    }
    for (i, dw) in dw.iter().enumerate() {
        let slope = (value(&x, &moved(&w, i, 1e-5)) - value(&x, &moved(&w, i, -1e-5))) / 2e-5;
        assert!((slope - dw).abs() < 1e-7, "dw {i}: {slope} {dw}");
    }
}
