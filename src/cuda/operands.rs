//! A product of parts of tensors, as every family of kernels takes it.

use super::device::Cuda;
use crate::backend::{MatMul, Write};
use crate::tensor::Tensor;

/// An operand of a product: rows `stride` elements apart, from element `at` of a tensor on.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    /// The tensor it lies in.
    pub t: &'a Tensor<Cuda>,
    /// Its first element.
    pub at: usize,
    /// Elements from row to row.
    pub stride: usize,
}

impl Operand<'_> {
    /// Whether its rows start at multiples of 16 bytes; buffers always do.
    pub fn aligned(&self) -> bool {
        self.at.is_multiple_of(8) && self.stride.is_multiple_of(8)
    }
}

/// A product of parts of tensors; its result, (m, n), takes the first elements of another.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub a: Operand<'a>,
    pub b: Operand<'a>,
    /// (m, n, k).
    pub shape: (usize, usize, usize),
    pub op: MatMul,
    pub alpha: f32,
    pub write: Write,
}

impl<'a> Product<'a> {
    /// Of whole tensors; `c` takes the result, or the sum with it.
    ///
    /// # Panics
    /// If their shapes do not fit.
    #[track_caller]
    pub fn whole(c: &Tensor<Cuda>, [a, b]: [&'a Tensor<Cuda>; 2], op: MatMul, alpha: f32, write: Write) -> Self {
        let of = |t: &'a Tensor<Cuda>| Operand { t, at: 0, stride: t.cols() };
        Self { a: of(a), b: of(b), shape: op.check(c, a, b), op, alpha, write }
    }

    /// Without a factor.
    pub fn new(a: Operand<'a>, b: Operand<'a>, shape: (usize, usize, usize), op: MatMul, write: Write) -> Self {
        Self { a, b, shape, op, alpha: 1.0, write }
    }
}
