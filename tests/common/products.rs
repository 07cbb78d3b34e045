//! What every device's products are held to.

use ringtune::backend::{Backend, MatMul, Write};
use ringtune::tensor::{DType, Tensor};

use super::close::{assert_close_but, assert_same, normal, rounded, stored, tensor, values};
use super::sums::{Sums, relative};

pub const OPS: [MatMul; 3] = [MatMul::NT, MatMul::NN, MatMul::TN];

/// C (m, n), k steps.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

impl Shape {
    /// Shapes of A and B.
    pub fn operands(self, op: MatMul) -> [(usize, usize); 2] {
        let Shape { m, n, k } = self;
        match op {
            MatMul::NT => [(m, k), (n, k)],
            MatMul::NN => [(m, k), (k, n)],
            MatMul::TN => [(k, m), (k, n)],
        }
    }
}

/// The products that make each element, in the order of k.
fn terms<'a>(a: &'a [f64], b: &'a [f64], s: Shape, op: MatMul) -> impl Iterator<Item = Vec<f64>> + 'a {
    let Shape { m, n, k } = s;
    (0..m * n).map(move |at| {
        let (i, j) = (at / n, at % n);
        let a = |l: usize| if op == MatMul::TN { a[l * m + i] } else { a[i * k + l] };
        let b = |l: usize| if op == MatMul::NT { b[j * k + l] } else { b[l * n + j] };
        (0..k).map(|l| a(l) * b(l)).collect()
    })
}

/// `c0 + alpha · op(a, b)` in f64 with every step of the sum passed through `round`.
fn reference(
    c0: &[f64],
    a: &[f64],
    b: &[f64],
    s: Shape,
    op: MatMul,
    alpha: f64,
    round: impl Fn(f64) -> f64,
) -> Vec<f64> {
    let sums = terms(a, b, s, op).map(|terms| terms.into_iter().fold(0.0, |sum, p| round(sum + round(p))));
    c0.iter().zip(sums).map(|(c, sum)| round(c + round(alpha * sum))).collect()
}

/// Shapes that are odd, small, or cross borders of tiles.
pub const SHAPES: [(usize, usize, usize); 8] =
    [(1, 1, 1), (7, 33, 5), (33, 7, 64), (14, 32, 31), (15, 17, 8), (2, 49, 130), (61, 40, 24), (3, 16, 2100)];

/// Every op, mix of types and way to write over `shapes`, computed by `matmul(C, A, B, op, alpha, write)`. `sums` is how the device adds
/// products of bf16; those of two f32 are rounded everywhere.
pub fn as_close_as_plain_arithmetic<D: Backend>(
    dev: &D,
    name: &str,
    shapes: &[(usize, usize, usize)],
    types: &[(DType, DType)],
    sums: Sums,
    matmul: impl Fn(&mut Tensor<D>, &Tensor<D>, &Tensor<D>, MatMul, f32, Write),
) {
    for &(m, n, k) in shapes {
        let s = Shape { m, n, k };
        let (a, b, c) = (normal(1, m * k), normal(2, k * n), normal(3, m * n));
        for (i, op) in OPS.into_iter().enumerate() {
            for &(ta, tb) in types {
                let tc = [DType::F32, DType::Bf16][i % 2];
                let [ashape, bshape] = s.operands(op);
                let at = tensor(dev, ashape.0, ashape.1, ta, &a);
                let bt = tensor(dev, bshape.0, bshape.1, tb, &b);
                // With a bf16 operand the f32 other is rounded first.
                let mixed = if ta == tb { ta } else { DType::Bf16 };
                let (a, b) = (stored(mixed, &a), stored(mixed, &b));
                let sums = if mixed == DType::F32 { Sums::Rounded } else { sums };
                let lost: Vec<f64> = terms(&a, &b, s, op).map(|terms| sums.lose(&terms)).collect();
                for (write, alpha) in [(Write::Set, 1.0), (Write::Add, -0.5)] {
                    let mut ct = tensor(dev, m, n, tc, &c);
                    matmul(&mut ct, &at, &bt, op, alpha, write);
                    let c0 = if write == Write::Add { stored(tc, &c) } else { vec![0.0; m * n] };
                    let expected = reference(&c0, &a, &b, s, op, f64::from(alpha), |x| x);
                    // Sums are f32 even where the operands are bf16, so plain arithmetic is f32's.
                    let plain = reference(&c0, &a, &b, s, op, f64::from(alpha), |x| rounded(DType::F32, x));
                    let what = format!("{name} {op:?} {m}x{n}x{k} {ta:?} {tb:?} -> {tc:?} {write:?}");
                    let ours = values(dev, &ct);
                    let lost = |i: usize| f64::from(alpha.abs()) * lost[i];
                    assert_close_but(&what, &ours, &expected, &plain, tc, lost);
                    if (write, mixed, tc) == (Write::Set, DType::Bf16, DType::F32) {
                        let size: f64 = terms(&a, &b, s, op).flatten().map(|p| p * p).sum();
                        let error: f64 = ours.iter().zip(&expected).map(|(x, e)| (f64::from(*x) - e).powi(2)).sum();
                        let error = (error / size).sqrt();
                        assert!(error <= relative(k), "{what}: {error:.2e} of all, allowed {:.2e}", relative(k));
                    }
                }
            }
        }
    }
}

/// All mixes of operand types.
pub const TYPES: [(DType, DType); 4] =
    [(DType::F32, DType::F32), (DType::F32, DType::Bf16), (DType::Bf16, DType::F32), (DType::Bf16, DType::Bf16)];

/// NaN and infinity reach the result, and a sum over nothing is zero.
pub fn what_is_not_finite_stays_visible_and_an_empty_sum_is_zero<D: Backend>(dev: &D, name: &str) {
    for dtype in [DType::F32, DType::Bf16] {
        let mut a = vec![1.0; 6];
        (a[1], a[5]) = (f32::NAN, f32::INFINITY);
        let (at, bt) = (tensor(dev, 3, 2, dtype, &a), tensor(dev, 1, 2, dtype, &[2.0, 1.0]));
        let mut c = dev.alloc(3, 1, dtype).unwrap();
        dev.matmul(&mut c, &at, &bt, MatMul::NT, 1.0, Write::Set).unwrap();
        let c = values(dev, &c);
        assert!(c[0].is_nan() && c[1] == 3.0 && c[2] == f32::INFINITY, "{name} {c:?}");
        let mut c = tensor(dev, 2, 2, DType::F32, &[5.0; 4]);
        let (a, b) = (dev.alloc(0, 2, dtype).unwrap(), dev.alloc(0, 2, dtype).unwrap());
        dev.matmul(&mut c, &a, &b, MatMul::TN, 1.0, Write::Add).unwrap();
        assert_eq!(values(dev, &c), [5.0; 4], "{name}");
        dev.matmul(&mut c, &a, &b, MatMul::TN, 1.0, Write::Set).unwrap();
        assert_eq!(values(dev, &c), [0.0; 4], "{name}");
    }
}

/// A row of the result is the same bits wherever it stands and whatever stands beside it.
pub fn a_row_depends_neither_on_its_place_nor_on_the_number_of_rows<D: Backend>(
    dev: &D,
    name: &str,
    n: usize,
    k: usize,
) -> Vec<f32> {
    let mut all = Vec::new();
    for dtype in [DType::F32, DType::Bf16] {
        let (a, b) = (normal(4, 100 * k), normal(5, n * k));
        let bt = tensor(dev, n, k, dtype, &b);
        let run = |rows: &[f32]| {
            let m = rows.len() / k;
            let at = tensor(dev, m, k, dtype, rows);
            let mut c = dev.alloc(m, n, DType::F32).unwrap();
            dev.matmul(&mut c, &at, &bt, MatMul::NT, 1.0, Write::Set).unwrap();
            values(dev, &c)
        };
        let whole = run(&a);
        for (from, to) in [(0, 1), (13, 16), (20, 61), (99, 100)] {
            assert_same(
                &format!("{name} {dtype:?} rows {from}..{to}"),
                &run(&a[from * k..to * k]),
                &whole[from * n..to * n],
            );
        }
        all.extend(whole);
    }
    all
}
