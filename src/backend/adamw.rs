//! AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; eps outside the corrected root, as torch).

use std::ops::Range;

use super::expect_dtype;
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
    /// The parameter; rows `first_row ..` of it are those that `g` covers. The rest stay.
    pub p: &'a mut Tensor<B>,
    /// As `m`, where `p` is bf16: then `p = round(master)`. An f32 `p` is its own master.
    pub master: Option<&'a mut Tensor<B>>,
    /// First moment of the elements in `range`, in whatever shape.
    pub m: &'a mut Tensor<B>,
    /// Second moment, as `m`.
    pub v: &'a mut Tensor<B>,
    /// (rows, C), gradient.
    pub g: &'a Tensor<B>,
    /// First row of `p` that `g` covers.
    pub first_row: usize,
    /// Elements of `g`, and of `p` from `first_row` on, that are updated: all of them, or those that a rank owns.
    pub range: Range<usize>,
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
        let range = &self.range;
        assert!(
            range.start <= range.end && range.end <= self.g.len(),
            "{what}: range {range:?} of g {:?}",
            self.g.shape()
        );
        for (name, t) in state {
            let Some(t) = t else { continue };
            assert!(
                t.len() == range.len(),
                "{what}: shape of {name} is {:?}, expected {} elements",
                t.shape(),
                range.len()
            );
            expect_dtype(what, name, t, DType::F32);
        }
        let p = if self.master.is_some() { DType::Bf16 } else { DType::F32 };
        expect_dtype(what, "p", self.p, p);
    }
}
