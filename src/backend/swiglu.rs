//! SwiGLU: `silu(gate) * up`. Source: Shazeer 2020, arXiv:2002.05202, eq. 6.

use super::expect_shape;
use crate::tensor::{Device, Tensor};

/// What SwiGLU reads, forward and backward alike.
pub struct Swiglu<'a, B: Device> {
    /// (N, F).
    pub gate: &'a Tensor<B>,
    /// (N, F).
    pub up: &'a Tensor<B>,
}

impl<B: Device> Swiglu<'_, B> {
    /// Panics unless all shapes are equal.
    pub fn check(&self, what: &str, others: &[(&str, &Tensor<B>)]) {
        for (name, t) in others.iter().chain(&[("up", self.up)]) {
            expect_shape(what, name, t, self.gate.shape());
        }
    }
}
