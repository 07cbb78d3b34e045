//! Root-mean-square norm of rows, or of the heads of a row (Qwen3).
//!
//! Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.

use super::{expect_dtype, expect_shape};
use crate::tensor::{DType, Device, Tensor};

/// What a norm reads, forward and backward alike. With D below C each row is C/D groups with a mean of their own.
pub struct Norm<'a, B: Device> {
    /// (N, C).
    pub x: &'a Tensor<B>,
    /// (1, D); D divides C.
    pub w: &'a Tensor<B>,
    /// Added to the mean of the squares.
    pub eps: f32,
}

impl<B: Device> Norm<'_, B> {
    /// D, once the shapes agree: `like_x` are of x's shape, `rstd` is (N, C/D) f32, `dw` (1, D) f32.
    pub fn check(&self, what: &str, like_x: &[(&str, &Tensor<B>)], rstd: &Tensor<B>, dw: Option<&Tensor<B>>) -> usize {
        let ((rows, cols), width) = (self.x.shape(), self.w.cols());
        let divides = self.w.rows() == 1 && width > 0 && cols.is_multiple_of(width);
        assert!(divides, "{what}: shape of w is {:?} for rows of x of {cols}", self.w.shape());
        for (name, t) in like_x {
            expect_shape(what, name, t, (rows, cols));
        }
        expect_shape(what, "rstd", rstd, (rows, cols / width));
        expect_dtype(what, "rstd", rstd, DType::F32);
        if let Some(dw) = dw {
            expect_shape(what, "dw", dw, (1, width));
            expect_dtype(what, "dw", dw, DType::F32);
        }
        width
    }
}
