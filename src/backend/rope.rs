//! Rotary embedding: the pair `(x[j], x[j + D/2])` of each head turns by the angle of the token's position.
//!
//! Source: Su et al. 2021, arXiv:2104.09864, eq. 34, in the half-split layout of Hugging Face.

use super::expect_shape;
use crate::tensor::{Device, Tensor};

/// Direction of the rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotate {
    /// Rotate by the position's angle.
    Forward,
    /// Rotate back: the gradient of [`Rotate::Forward`].
    Inverse,
}

/// The angle of every token.
pub struct Rope<'a, B: Device> {
    /// (P, D) f32: cos in columns `0..D/2`, sin in `D/2..D`.
    pub table: &'a Tensor<B>,
    /// (N, 1) i32, in `0..P`.
    pub positions: &'a Tensor<B>,
}

impl<B: Device> Rope<'_, B> {
    /// D, once the shapes fit `x` (N, heads*D).
    pub fn check(&self, what: &str, x: &Tensor<B>) -> usize {
        let dim = self.table.cols();
        let fits = dim > 0 && dim.is_multiple_of(2) && x.cols().is_multiple_of(dim);
        assert!(fits, "{what}: shape of table is {:?} for rows of x of {}", self.table.shape(), x.cols());
        expect_shape(what, "positions", self.positions, (x.rows(), 1));
        dim
    }
}
