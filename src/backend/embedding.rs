//! Rows by index: gather, scatter, the token embedding and its gradient; the checks of their shapes.

use super::{expect_dtype, expect_shape};
use crate::batch::Batch;
use crate::tensor::{DType, Device, Tensor};

/// Panics unless `picked` (n, C) can be rows `rows` (n, 1) of `table` (m, C), and both have one type.
pub fn check_rows<B: Device>(what: &str, picked: &Tensor<B>, table: &Tensor<B>, rows: &Tensor<B>) {
    let width = picked.cols() == table.cols();
    assert!(width, "{what}: shapes of picked {:?} and table {:?}", picked.shape(), table.shape());
    expect_dtype(what, "picked", picked, table.dtype());
    expect_shape(what, "rows", rows, (picked.rows(), 1));
}

/// Panics unless `dout` (N, C) are gradients of rows as wide as those of `dw` f32, one for each token of the batch.
pub fn check_backward<B: Device>(what: &str, dw: &Tensor<B>, dout: &Tensor<B>, batch: &Batch<B>) {
    let width = dw.cols() == dout.cols();
    assert!(width, "{what}: shapes of dw {:?} and dout {:?}", dw.shape(), dout.shape());
    expect_dtype(what, "dw", dw, DType::F32);
    expect_shape(what, "tokens", &batch.tokens, (dout.rows(), 1));
    expect_shape(what, "by_token", &batch.by_token, (dout.rows(), 1));
}
