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

impl<B: Device> Clone for Swiglu<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Device> Copy for Swiglu<'_, B> {}

impl<B: Device> Swiglu<'_, B> {
    /// Panics unless all shapes are equal.
    pub fn check(&self, what: &str, others: &[(&str, &Tensor<B>)]) {
        for (name, t) in others.iter().chain(&[("up", self.up)]) {
            expect_shape(what, name, t, self.gate.shape());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::{each_wrong_shape_is_refused, f32s};
    use crate::tensor::DType;

    #[test]
    fn every_wrong_shape_is_refused() {
        let gate = f32s(3, 8);
        each_wrong_shape_is_refused(&[("up", (3, 8), DType::F32), ("out", (3, 8), DType::F32)], |t| {
            Swiglu { gate: &gate, up: &t[0] }.check("swiglu", &[("out", &t[1])]);
        });
    }
}
