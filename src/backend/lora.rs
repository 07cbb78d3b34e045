//! Low-rank updates `scale · dropout(x) Aᵀ Bᵀ`, composed of products. Source: Hu et al. 2021, arXiv:2106.09685, eq. 3.

use super::{Backend, Dropout, MatMul, Write, expect_shape};
use crate::error::Result;
use crate::tensor::{Device, Tensor};

/// A low-rank update of a product.
pub struct LowRank<'a, B: Device> {
    /// (r, in).
    pub a: &'a Tensor<B>,
    /// (out, r).
    pub b: &'a Tensor<B>,
    /// The factor s on `B A`.
    pub scale: f32,
    /// Dropout of the input, in training.
    pub dropout: Option<Dropout>,
}

/// Where its gradients go: `+=`.
pub struct LowRankGrads<'a, B: Device> {
    /// (N, in), where it is asked for.
    pub dx: Option<&'a mut Tensor<B>>,
    /// (r, in) f32.
    pub da: &'a mut Tensor<B>,
    /// (out, r) f32.
    pub db: &'a mut Tensor<B>,
}

/// Intermediate tensors of low-rank updates, shared by all layers.
pub struct LoraScratch<B: Device> {
    /// Dropped input, capacity (N, widest input); empty without dropout.
    pub x: Tensor<B>,
    /// Gradient before dropout, the same size; empty without dropout.
    pub dx: Tensor<B>,
    /// `s·dy·B`, (N, largest r), same dtype as the activations.
    pub u: Tensor<B>,
}

impl<B: Device> Clone for LowRank<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Device> Copy for LowRank<'_, B> {}

impl<B: Device> LowRank<'_, B> {
    /// Panics unless the shapes agree: `x` (N, in), `t` (N, r), `y` (N, out).
    pub fn check(&self, what: &str, y: &Tensor<B>, x: &Tensor<B>, t: &Tensor<B>) {
        let ((n, wide), r) = (x.shape(), self.a.rows());
        expect_shape(what, "a", self.a, (r, wide));
        expect_shape(what, "b", self.b, (y.cols(), r));
        expect_shape(what, "t", t, (n, r));
        expect_shape(what, "y", y, (n, y.cols()));
    }
}

/// [`Backend::lora_forward`] from products.
pub(super) fn forward<B: Backend>(
    dev: &B,
    y: &mut Tensor<B>,
    t: &mut Tensor<B>,
    x: &Tensor<B>,
    by: LowRank<'_, B>,
    scratch: &mut LoraScratch<B>,
) -> Result<()> {
    by.check("lora_forward", y, x, t);
    match by.dropout {
        Some(d) => {
            scratch.x.set_shape(x.rows(), x.cols());
            dev.dropout(&mut scratch.x, x, d)?;
            dev.matmul(t, &scratch.x, by.a, MatMul::NT, 1.0, Write::Set)?;
        }
        None => dev.matmul(t, x, by.a, MatMul::NT, 1.0, Write::Set)?,
    }
    dev.matmul(y, t, by.b, MatMul::NT, by.scale, Write::Add)
}

/// [`Backend::lora_backward`] from products: `u = s·dy·B`, then `dB += s·dyᵀ·t`, `dA += uᵀ·drop(x)`, `dx += drop(u·A)`.
pub(super) fn backward<B: Backend>(
    dev: &B,
    grads: LowRankGrads<'_, B>,
    dy: &Tensor<B>,
    x: &Tensor<B>,
    t: &Tensor<B>,
    by: LowRank<'_, B>,
    scratch: &mut LoraScratch<B>,
) -> Result<()> {
    by.check("lora_backward", dy, x, t);
    let LowRankGrads { dx, da, db } = grads;
    scratch.u.set_shape(dy.rows(), by.a.rows());
    dev.matmul(&mut scratch.u, dy, by.b, MatMul::NN, by.scale, Write::Set)?;
    dev.matmul(db, dy, t, MatMul::TN, by.scale, Write::Add)?;
    let Some(d) = by.dropout else {
        dev.matmul(da, &scratch.u, x, MatMul::TN, 1.0, Write::Add)?;
        return match dx {
            Some(dx) => dev.matmul(dx, &scratch.u, by.a, MatMul::NN, 1.0, Write::Add),
            None => Ok(()),
        };
    };
    scratch.x.set_shape(x.rows(), x.cols());
    dev.dropout(&mut scratch.x, x, d)?;
    dev.matmul(da, &scratch.u, &scratch.x, MatMul::TN, 1.0, Write::Add)?;
    if let Some(dx) = dx {
        scratch.dx.set_shape(x.rows(), x.cols());
        dev.matmul(&mut scratch.dx, &scratch.u, by.a, MatMul::NN, 1.0, Write::Set)?;
        dev.dropout(&mut scratch.x, &scratch.dx, d)?;
        dev.add(dx, &scratch.x)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::{each_wrong_shape_is_refused, f32s};
    use crate::tensor::DType;

    #[test]
    fn every_wrong_shape_is_refused() {
        let (x, f) = (f32s(3, 8), DType::F32);
        let arguments = [("t", (3, 2), f), ("b", (5, 2), f)];
        let (a, y) = (f32s(2, 8), f32s(3, 5));
        each_wrong_shape_is_refused(&arguments, |t| {
            LowRank { a: &a, b: &t[1], scale: 1.0, dropout: None }.check("lora", &y, &x, &t[0]);
        });
        // a's rows are r: a taller one makes b and t wrong.
        let (b, t) = (f32s(5, 2), f32s(3, 2));
        for (name, a, y) in
            [("a", f32s(2, 9), f32s(3, 5)), ("b", f32s(3, 8), f32s(3, 5)), ("y", f32s(2, 8), f32s(4, 5))]
        {
            crate::backend::testing::refuses(name, || {
                LowRank { a: &a, b: &b, scale: 1.0, dropout: None }.check("lora", &y, &x, &t);
            });
        }
    }
}
