//! What the unit tests of the kernels share: devices of every level and thread count, tensors from values, and the rule
//! that bounds an error by twice that of the same formula in the storage type.

use super::{Cpu, Level};
use crate::backend::Device;
use crate::rng::Stream;
use crate::tensor::{DType, Tensor};
use half::bf16;

/// Devices of every level this processor has, with two threads.
pub fn cpus() -> Vec<Cpu> {
    let levels = Level::ALL.into_iter().filter(|l| l.is_supported());
    levels.map(|l| Cpu::with_level(Some(2), l).unwrap()).collect()
}

/// Devices of one, two and three threads at the best level.
pub fn thread_counts() -> Vec<Cpu> {
    let best = Level::ALL.into_iter().rfind(|l| l.is_supported()).unwrap();
    [1, 2, 3].map(|n| Cpu::with_level(Some(n), best).unwrap()).into()
}

/// Standard normal values.
pub fn normal(seed: u64, n: usize) -> Vec<f32> {
    let s = Stream::new(&[seed]);
    (0..n as u64).map(|i| s.normal_at(i) as f32).collect()
}

/// A tensor of given values.
pub fn tensor(dev: &Cpu, rows: usize, cols: usize, dtype: DType, values: &[f32]) -> Tensor<Cpu> {
    let mut t = dev.alloc(rows, cols, dtype).unwrap();
    dev.upload(&mut t, values).unwrap();
    t
}

/// A column of integers.
pub fn tensor_i32(dev: &Cpu, values: &[i32]) -> Tensor<Cpu> {
    let mut t = dev.alloc(values.len(), 1, DType::I32).unwrap();
    dev.upload_i32(&mut t, values).unwrap();
    t
}

/// The values of a tensor.
pub fn values(dev: &Cpu, t: &Tensor<Cpu>) -> Vec<f32> {
    let mut v = vec![0.0; t.len()];
    dev.download(&mut v, t).unwrap();
    v
}

/// `x` as the storage type holds it.
pub fn rounded(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(x as f32),
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
    assert_eq!(ours.len(), reference.len(), "{what}: number of elements");
    let largest = |error: &dyn Fn(usize) -> f64| (0..reference.len()).map(error).fold(0.0, f64::max);
    let atol = largest(&|i| (rounded(dtype, reference[i]) - reference[i]).abs());
    let allowed = 2.0 * largest(&|i| (plain[i] - reference[i]).abs()) + atol;
    for (i, (&x, &r)) in ours.iter().zip(reference).enumerate() {
        let error = (f64::from(x) - r).abs();
        // Written so that NaN fails.
        assert!(
            error <= allowed,
            "{what}: element {i}: {x}, expected {r}, error {error:.3e}, allowed {allowed:.3e}"
        );
    }
}
