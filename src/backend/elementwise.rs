//! Sums of equal shapes and of biases: the checks of their shapes.

use super::{expect_dtype, expect_shape};
use crate::tensor::{DType, Device, Tensor};

/// Panics unless `dst` and `src` have one shape.
pub fn check_same<B: Device>(what: &str, dst: &Tensor<B>, src: &Tensor<B>) {
    expect_shape(what, "dst", dst, src.shape());
}

/// Panics unless the bias `b` is one row as wide as `x` (N, C).
pub fn check_bias<B: Device>(what: &str, b: &Tensor<B>, x: &Tensor<B>) {
    expect_shape(what, "the bias", b, (1, x.cols()));
}

/// The same for the gradient of a bias, which is f32.
pub fn check_bias_grad<B: Device>(what: &str, db: &Tensor<B>, dy: &Tensor<B>) {
    check_bias(what, db, dy);
    expect_dtype(what, "the bias", db, DType::F32);
}
