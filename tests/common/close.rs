//! The rule that bounds an error by twice that of the same formula in plain arithmetic, and tensors from values.

use half::bf16;
use ringtune::rng::Stream;
use ringtune::tensor::{DType, Device, Tensor};

/// Standard normal values.
pub fn normal(seed: u64, n: usize) -> Vec<f32> {
    let s = Stream::new(&[seed]);
    (0..n as u64).map(|i| s.normal_at(i) as f32).collect()
}

/// A tensor of given values.
pub fn tensor<D: Device>(dev: &D, rows: usize, cols: usize, dtype: DType, values: &[f32]) -> Tensor<D> {
    let mut t = dev.alloc(rows, cols, dtype).unwrap();
    dev.upload(&mut t, values).unwrap();
    t
}

/// A column of integers.
pub fn tensor_i32<D: Device>(dev: &D, values: &[i32]) -> Tensor<D> {
    let mut t = dev.alloc(values.len(), 1, DType::I32).unwrap();
    dev.upload_i32(&mut t, values).unwrap();
    t
}

/// The values of a tensor.
pub fn values<D: Device>(dev: &D, t: &Tensor<D>) -> Vec<f32> {
    let mut v = vec![0.0; t.len()];
    dev.download(&mut v, t).unwrap();
    v
}

/// `x` as the storage type holds it, rounded once to nearest even.
pub fn rounded(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(x as f32),
        // By the bits of f64: `half` looks at the upper half of them alone and takes some values for ties that are none.
        DType::Bf16 if x.is_normal() && x.abs() >= f64::from(f32::MIN_POSITIVE) => {
            let dropped = 52 - 7;
            let bits = x.to_bits();
            let even = (bits >> dropped) & 1;
            let up = bits + ((1 << (dropped - 1)) - 1) + even;
            f64::from(f64::from_bits(up >> dropped << dropped) as f32)
        }
        DType::Bf16 => f64::from(bf16::from_f64(x)),
        DType::I32 => panic!("integers are not rounded"),
    }
}

/// Values as the storage type holds them, widened to f64.
pub fn stored(dtype: DType, x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| rounded(dtype, f64::from(x))).collect()
}

/// Asserts `max|ours - reference| <= 2 max|plain - reference| + atol`; atol is the largest error of rounding the reference to
/// its storage type. `plain` is the same formula with every intermediate rounded to the storage type.
pub fn assert_close(what: &str, ours: &[f32], reference: &[f64], plain: &[f64], dtype: DType) {
    assert_close_but(what, ours, reference, plain, dtype, |_| 0.0);
}

/// The same, where element i may be off by `lost(i)` more.
pub fn assert_close_but(
    what: &str,
    ours: &[f32],
    reference: &[f64],
    plain: &[f64],
    dtype: DType,
    lost: impl Fn(usize) -> f64,
) {
    assert_eq!(ours.len(), reference.len(), "{what}: number of elements");
    let largest = |error: &dyn Fn(usize) -> f64| (0..reference.len()).map(error).fold(0.0, f64::max);
    let atol = largest(&|i| (rounded(dtype, reference[i]) - reference[i]).abs());
    let allowed = 2.0 * largest(&|i| (plain[i] - reference[i]).abs()) + atol;
    for (i, (&x, &r)) in ours.iter().zip(reference).enumerate() {
        let (error, allowed) = ((f64::from(x) - r).abs(), allowed + lost(i));
        // Written so that NaN fails.
        assert!(error <= allowed, "{what}: element {i}: {x}, expected {r}, error {error:.3e}, allowed {allowed:.3e}");
    }
}

/// Asserts that two lists hold the same values; the message names the first that differs.
pub fn assert_same(what: &str, ours: &[f32], expected: &[f32]) {
    assert_eq!(ours.len(), expected.len(), "{what}: number of elements");
    for (i, (x, e)) in ours.iter().zip(expected).enumerate() {
        assert!(x == e, "{what}: element {i}: {x}, expected {e}");
    }
}
