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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::{batch, f32s, i32s, refuses};

    #[test]
    fn every_wrong_shape_is_refused() {
        let (picked, table) = (f32s(3, 8), f32s(20, 8));
        check_rows("gather", &picked, &table, &i32s(3));
        refuses("rows", || check_rows("gather", &picked, &table, &i32s(4)));
        refuses("table", || check_rows("gather", &picked, &f32s(20, 7), &i32s(3)));
        let narrow = Tensor::from_buf((), 20, 8, DType::Bf16);
        refuses("element type of picked", || check_rows("gather", &picked, &narrow, &i32s(3)));
        check_backward("backward", &table, &picked, &batch(3));
        refuses("tokens", || check_backward("backward", &table, &picked, &batch(4)));
        refuses("dw", || check_backward("backward", &f32s(20, 7), &picked, &batch(3)));
        refuses("element type of dw", || check_backward("backward", &narrow, &picked, &batch(3)));
    }
}
