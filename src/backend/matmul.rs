//! Products of matrices: which operand is transposed, and how the result is written.

use crate::tensor::{Device, Tensor};

/// Which of the two operands of a product is transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MatMul {
    /// `C = A Bᵀ`: A (M, K), B (N, K). Forward with weights stored `[out, in]`.
    NT,
    /// `C = A B`: A (M, K), B (K, N). Gradient of the input.
    NN,
    /// `C = Aᵀ B`: A (K, M), B (K, N). Gradient of the weight.
    TN,
}

/// Whether a destination is overwritten or added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Write {
    /// `dst = sum`.
    Set,
    /// `dst += sum`; the finished sum is added once, never term by term.
    Add,
}

impl MatMul {
    /// (M, N, K) of `c = op(a, b)`, once the three shapes agree.
    pub fn check<B: Device>(self, c: &Tensor<B>, a: &Tensor<B>, b: &Tensor<B>) -> (usize, usize, usize) {
        let ((ar, ac), (br, bc)) = (a.shape(), b.shape());
        let (m, k, n, kb) = match self {
            MatMul::NT => (ar, ac, br, bc),
            MatMul::NN => (ar, ac, bc, br),
            MatMul::TN => (ac, ar, bc, br),
        };
        assert!(
            k == kb && c.shape() == (m, n),
            "matmul {self:?}: C {:?}, A {:?}, B {:?}",
            c.shape(),
            a.shape(),
            b.shape()
        );
        (m, n, k)
    }
}
