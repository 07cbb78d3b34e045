//! A group of projections that read one x: how many there are, and what follows their products.

use super::device::Cuda;
use crate::backend::{Projection, Rope};
use crate::tensor::Tensor;

/// Projections of a group at most.
pub(super) const GROUP: usize = 3;

/// Widths of the results of a group, 0 where there is none.
pub(super) fn widths(by: &[Projection<'_, Cuda>]) -> [usize; GROUP] {
    std::array::from_fn(|i| by.get(i).map_or(0, |p| p.w.rows()))
}

/// What follows the products of a launch.
pub(super) enum Then<'a, 'b> {
    /// The residual is added, where there is one.
    Residual(Option<&'a Tensor<Cuda>>),
    /// The first two are rotated.
    Rope(Rope<'a, Cuda>),
    /// SwiGLU of a pair.
    Swiglu(&'b mut Tensor<Cuda>),
}

/// The tensors of [`Then`]: act, residual, rope.
type Parts<'a, 'b> = (Option<&'b mut Tensor<Cuda>>, Option<&'a Tensor<Cuda>>, Option<Rope<'a, Cuda>>);

impl<'a, 'b> Then<'a, 'b> {
    /// Width of the heads that are rotated, or 0.
    pub fn dim(&self) -> usize {
        if let Then::Rope(rope) = self { rope.table.cols() } else { 0 }
    }

    /// Those of them that there are.
    pub fn parts(self) -> Parts<'a, 'b> {
        match self {
            Then::Swiglu(act) => (Some(act), None, None),
            Then::Residual(residual) => (None, residual, None),
            Then::Rope(rope) => (None, None, Some(rope)),
        }
    }
}
