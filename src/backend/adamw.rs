//! AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; eps outside the corrected root, as torch).

use super::{expect_dtype, expect_shape};
use crate::tensor::{DType, Device, Tensor};

/// Scalars of one AdamW step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// `1 - beta1`, taken in f64: in f32 it is off by what `beta1` was rounded by, which the bias correction then does not undo.
    pub one_minus_beta1: f32,
    /// `1 - beta2`, taken in f64: in f32 that of 0.999 is 0.0013 % too small.
    pub one_minus_beta2: f32,
    /// Added to the corrected root.
    pub eps: f32,
    /// Decoupled weight decay: `p *= 1 - lr * weight_decay`, of tensors that decay.
    pub weight_decay: f32,
    /// `1 - beta1^t`.
    pub bias_correction1: f32,
    /// `1 - beta2^t`.
    pub bias_correction2: f32,
}

/// A tensor to update with its gradient and its state, all f32 but `p`.
pub struct AdamWSlot<'a, B: Device> {
    /// The parameter; rows `first_row ..` of it are updated, as many as `g` has. The rest stay.
    pub p: &'a mut Tensor<B>,
    /// (rows, C), where `p` is bf16: then `p = round(master)`. An f32 `p` is its own master.
    pub master: Option<&'a mut Tensor<B>>,
    /// (rows, C), first moment.
    pub m: &'a mut Tensor<B>,
    /// (rows, C), second moment.
    pub v: &'a mut Tensor<B>,
    /// (rows, C), gradient.
    pub g: &'a Tensor<B>,
    /// First row of `p` that `g` covers.
    pub first_row: usize,
    /// Whether weight decay applies.
    pub decays: bool,
    /// Multiple of the learning rate.
    pub lr_scale: f64,
}

impl<B: Device> AdamWSlot<'_, B> {
    /// The learning rate and the decay of this tensor in a step.
    pub fn rates(&self, step: &AdamWStep) -> (f32, f32) {
        ((step.lr * self.lr_scale) as f32, if self.decays { step.weight_decay } else { 0.0 })
    }

    /// Panics unless the shapes agree.
    pub fn check(&self, what: &str) {
        let (rows, cols) = self.g.shape();
        assert!(
            self.p.cols() == cols && self.first_row + rows <= self.p.rows(),
            "{what}: shape of p is {:?} for g {:?} at row {}",
            self.p.shape(),
            self.g.shape(),
            self.first_row
        );
        let state = [("m", Some(&*self.m)), ("v", Some(&*self.v)), ("master", self.master.as_deref())];
        for (name, t) in state {
            let Some(t) = t else { continue };
            expect_shape(what, name, t, (rows, cols));
            expect_dtype(what, name, t, DType::F32);
        }
        let p = if self.master.is_some() { DType::Bf16 } else { DType::F32 };
        expect_dtype(what, "p", self.p, p);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::{Shapes, each_wrong_shape_is_refused, f32s, refuses};

    fn slot<'a>(t: &'a mut [Tensor<Shapes>; 4], g: &'a Tensor<Shapes>) -> AdamWSlot<'a, Shapes> {
        let [p, master, m, v] = t;
        AdamWSlot { p, master: Some(master), m, v, g, first_row: 5, decays: true, lr_scale: 1.0 }
    }

    #[test]
    fn every_wrong_shape_is_refused() {
        let f = DType::F32;
        // One row more of g would end beyond p; a taller p is none's business.
        let arguments = [("master", (3, 8), f), ("m", (3, 8), f), ("v", (3, 8), f)];
        let g = f32s(3, 8);
        let p = || Tensor::from_buf((), 8, 8, DType::Bf16);
        let copy = |t: &Tensor<Shapes>| f32s(t.rows(), t.cols());
        each_wrong_shape_is_refused(&arguments, |t| {
            let mut all = [p(), copy(&t[0]), copy(&t[1]), copy(&t[2])];
            slot(&mut all, &g).check("adamw");
        });
        for g in [f32s(4, 8), f32s(3, 9)] {
            let mut all = [p(), copy(&g), copy(&g), copy(&g)];
            refuses("shape of p", || slot(&mut all, &g).check("adamw"));
        }
        let mut all = [f32s(8, 8), copy(&g), copy(&g), copy(&g)];
        refuses("element type of p", || slot(&mut all, &g).check("adamw"));
    }
}
