//! The loss at the head: cross-entropy of `softmax(x·wᵀ)` and its gradients.

use super::{expect_dtype, expect_shape};
use crate::batch::Batch;
use crate::tensor::{DType, Device, Tensor};

/// What the head and its loss read.
pub struct HeadLoss<'a, B: Device> {
    /// (N, C), final hidden states.
    pub x: &'a Tensor<B>,
    /// (V, C), the head.
    pub w: &'a Tensor<B>,
    /// Its targets, and the rows that have one.
    pub batch: &'a Batch<B>,
    /// Classes that take part in the softmax: rows `0..n_classes` of the head. Padding rows of the vocabulary stay out.
    pub n_classes: usize,
    /// Factor on the gradients, `1 / (supervised targets of the whole step)`. The losses themselves are not scaled.
    pub scale: f32,
}

/// Where the gradients of the loss go.
pub struct HeadGrads<'a, B: Device> {
    /// (N, C), set: `scale · (softmax - onehot) · w`, 0 on ignored rows.
    pub dx: Option<&'a mut Tensor<B>>,
    /// (rows, C) f32, `+=`: `scale · (softmax - onehot)ᵀ · x` for head rows `first_row ..`.
    pub dw: Option<&'a mut Tensor<B>>,
    /// First row of the head that `dw` covers.
    pub first_row: usize,
}

impl<B: Device> HeadGrads<'_, B> {
    /// No gradients.
    pub fn none() -> Self {
        Self { dx: None, dw: None, first_row: 0 }
    }
}

impl<B: Device> HeadLoss<'_, B> {
    /// Panics unless the shapes agree: `loss` and `correct` are (N, 1) f32.
    pub fn check(&self, what: &str, loss: &Tensor<B>, correct: Option<&Tensor<B>>, grads: &HeadGrads<'_, B>) {
        let ((n, c), (v, wide), classes) = (self.x.shape(), self.w.shape(), self.n_classes);
        assert!(wide == c, "{what}: shapes of w {:?} and x {:?}", self.w.shape(), self.x.shape());
        assert!((1..=v).contains(&classes), "{what}: n_classes is {classes} for {v} rows of w");
        expect_shape(what, "targets", &self.batch.targets, (n, 1));
        for (name, t) in [("loss", Some(loss)), ("correct", correct)] {
            let Some(t) = t else { continue };
            expect_shape(what, name, t, (n, 1));
            expect_dtype(what, name, t, DType::F32);
        }
        if let Some(dx) = &grads.dx {
            expect_shape(what, "dx", dx, (n, c));
        }
        if let Some(dw) = &grads.dw {
            let (rows, cols) = dw.shape();
            assert!(
                cols == c && grads.first_row + rows <= v,
                "{what}: shape of dw is {:?} from row {} of w {:?}",
                dw.shape(),
                grads.first_row,
                self.w.shape()
            );
            expect_dtype(what, "dw", dw, DType::F32);
        }
    }
}
