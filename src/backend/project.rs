//! Projections `y = x Wᵀ + bias + s·drop(x) Aᵀ Bᵀ` of a group that reads one x, and their gradients. A device may fuse a group
//! into one pass over x with one rounding of each result; the bodies here compose it from products, with a rounding after each
//! term, in the order in which the terms stand. Both are right.
//!
//! Low-rank updates: Hu et al. 2021, arXiv:2106.09685, eq. 3.

use super::{Backend, Dropout, MatMul, Swiglu, Write, expect_dtype, expect_shape};
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

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

/// A product with its bias and its low-rank update.
pub struct Projection<'a, B: Device> {
    /// (out, in).
    pub w: &'a Tensor<B>,
    /// (1, out).
    pub bias: Option<&'a Tensor<B>>,
    /// The update, where the product has one.
    pub lora: Option<LowRank<'a, B>>,
}

/// Where a projection goes.
pub struct Projected<'a, B: Device> {
    /// (N, out), set.
    pub y: &'a mut Tensor<B>,
    /// (N, r), set where there is an update: `drop(x)·Aᵀ`, kept for backward. What it holds is the device's own business.
    pub t: Option<&'a mut Tensor<B>>,
}

/// Gradients of a projection's weights, f32, where they are trained.
pub struct ProjectionGrads<'a, B: Device> {
    /// (out, in).
    pub w: Option<&'a mut Tensor<B>>,
    /// (1, out).
    pub bias: Option<&'a mut Tensor<B>>,
    /// (r, in).
    pub a: Option<&'a mut Tensor<B>>,
    /// (out, r).
    pub b: Option<&'a mut Tensor<B>>,
}

/// Scratch of projections, shared by all layers; empty without low-rank updates.
pub struct ProjectScratch<B: Device> {
    /// `u_i = s·dy_i·B_i` of a group, (N, r) each: from [`Backend::project_dx`] to [`Backend::project_dw`].
    pub u: [Tensor<B>; 3],
    /// Dropped input, (N, widest input); empty without dropout.
    pub x: Tensor<B>,
    /// Gradient before dropout, the same size; empty without dropout.
    pub dx: Tensor<B>,
}

impl<B: Device> LowRank<'_, B> {
    /// Panics unless the shapes agree with `x` (N, in) and `t` (N, r).
    pub fn check(&self, what: &str, x: (usize, usize), t: &Tensor<B>) {
        expect_shape(what, "a", self.a, (self.a.rows(), x.1));
        expect_shape(what, "t", t, (x.0, self.a.rows()));
    }
}

impl<B: Device> Projection<'_, B> {
    /// Panics unless the shapes agree: `x` (N, in), `y` or its gradient (N, out), `t` (N, r) where there is an update.
    pub fn check(&self, what: &str, y: &Tensor<B>, x: (usize, usize), t: Option<&Tensor<B>>) {
        let (n, wide) = x;
        let out = self.w.rows();
        expect_shape(what, "w", self.w, (out, wide));
        expect_shape(what, "y", y, (n, out));
        if let Some(bias) = self.bias {
            expect_shape(what, "bias", bias, (1, out));
        }
        let Some(lora) = &self.lora else { return };
        lora.check(what, x, t.unwrap_or_else(|| panic!("{what}: t is missing; a low-rank update needs it")));
        expect_shape(what, "b", lora.b, (out, lora.a.rows()));
    }
}

impl<B: Device> ProjectionGrads<'_, B> {
    /// Panics unless the shapes are those of the weights, and all are f32.
    pub fn check(&self, what: &str, of: &Projection<'_, B>) {
        let lora = of.lora.as_ref();
        let pairs = [
            ("dw", &self.w, Some(of.w)),
            ("dbias", &self.bias, of.bias),
            ("da", &self.a, lora.map(|l| l.a)),
            ("db", &self.b, lora.map(|l| l.b)),
        ];
        for (name, grad, weight) in pairs {
            let Some(grad) = grad else { continue };
            let weight = weight.unwrap_or_else(|| panic!("{what}: {name} of a weight that is not there"));
            expect_shape(what, name, grad, weight.shape());
            expect_dtype(what, name, grad, DType::F32);
        }
    }
}

/// `t = drop(x)·Aᵀ`.
pub(crate) fn low_rank_t<B: Backend>(
    dev: &B,
    t: &mut Tensor<B>,
    x: &Tensor<B>,
    by: LowRank<'_, B>,
    s: &mut ProjectScratch<B>,
) -> Result<()> {
    by.check("low_rank_t", x.shape(), t);
    dev.matmul(t, dropped(dev, &mut s.x, x, by.dropout)?, by.a, MatMul::NT, 1.0, Write::Set)
}

/// `drop(x)` in the scratch, or x itself.
fn dropped<'a, B: Backend>(
    dev: &B,
    scratch: &'a mut Tensor<B>,
    x: &'a Tensor<B>,
    dropout: Option<Dropout>,
) -> Result<&'a Tensor<B>> {
    let Some(dropout) = dropout else { return Ok(x) };
    scratch.set_shape(x.rows(), x.cols());
    dev.dropout(scratch, x, dropout)?;
    Ok(scratch)
}

/// [`Backend::project`] from products.
pub(crate) fn project<B: Backend>(
    dev: &B,
    to: &mut [Projected<'_, B>],
    x: &Tensor<B>,
    by: &[Projection<'_, B>],
    residual: Option<&Tensor<B>>,
    s: &mut ProjectScratch<B>,
) -> Result<()> {
    assert!(residual.is_none() || by.len() == 1, "project: a residual of {} projections", by.len());
    assert_eq!(to.len(), by.len(), "project: results");
    for (Projected { y, t }, by) in to.iter_mut().zip(by) {
        by.check("project", y, x.shape(), t.as_deref());
        if let Some(residual) = residual {
            dev.copy(y, residual)?;
        }
        let write = if residual.is_some() { Write::Add } else { Write::Set };
        dev.matmul(y, x, by.w, MatMul::NT, 1.0, write)?;
        if let Some(bias) = by.bias {
            dev.add_bias(y, bias)?;
        }
        if let (Some(lora), Some(t)) = (by.lora, t) {
            // Not the device's: what it keeps in t besides is its own affair, and here the factor comes with B.
            low_rank_t(dev, t, x, lora, s)?;
            dev.matmul(y, t, lora.b, MatMul::NT, lora.scale, Write::Add)?;
        }
    }
    Ok(())
}

/// [`Backend::project_gate_up`] from products.
pub(crate) fn project_gate_up<B: Backend>(
    dev: &B,
    act: &mut Tensor<B>,
    to: &mut [Projected<'_, B>; 2],
    x: &Tensor<B>,
    by: &[Projection<'_, B>; 2],
    s: &mut ProjectScratch<B>,
) -> Result<()> {
    dev.project(to, x, by, None, s)?;
    let [gate, up] = to;
    dev.swiglu_forward(act, Swiglu { gate: gate.y, up: up.y })
}

/// [`Backend::project_dx`] from products.
pub(crate) fn project_dx<B: Backend>(
    dev: &B,
    mut dx: Option<&mut Tensor<B>>,
    grads: &mut [ProjectionGrads<'_, B>],
    dys: &[&Tensor<B>],
    ts: &[Option<&Tensor<B>>],
    by: &[Projection<'_, B>],
    s: &mut ProjectScratch<B>,
) -> Result<()> {
    assert!([grads.len(), dys.len(), ts.len()] == [by.len(); 3], "project_dx: a group of {}", by.len());
    for (i, (by, g)) in by.iter().zip(grads).enumerate() {
        let (dy, t) = (dys[i], ts[i]);
        by.check("project_dx", dy, (dy.rows(), by.w.cols()), t);
        g.check("project_dx", by);
        if let Some(dx) = dx.as_deref_mut() {
            expect_shape("project_dx", "dx", dx, (dy.rows(), by.w.cols()));
            dev.matmul(dx, dy, by.w, MatMul::NN, 1.0, if i == 0 { Write::Set } else { Write::Add })?;
        }
        let (Some(lora), Some(t)) = (by.lora, t) else { continue };
        let u = &mut s.u[i];
        u.set_shape(dy.rows(), lora.a.rows());
        dev.matmul(u, dy, lora.b, MatMul::NN, lora.scale, Write::Set)?;
        if let Some(db) = g.b.as_deref_mut() {
            dev.matmul(db, dy, t, MatMul::TN, lora.scale, Write::Add)?;
        }
        let Some(dx) = dx.as_deref_mut() else { continue };
        match lora.dropout {
            None => dev.matmul(dx, u, lora.a, MatMul::NN, 1.0, Write::Add)?,
            Some(dropout) => {
                s.dx.set_shape(dx.rows(), dx.cols());
                dev.matmul(&mut s.dx, u, lora.a, MatMul::NN, 1.0, Write::Set)?;
                dev.add(dx, dropped(dev, &mut s.x, &s.dx, Some(dropout))?)?;
            }
        }
    }
    Ok(())
}

/// [`Backend::project_dw`] from products.
pub(crate) fn project_dw<B: Backend>(
    dev: &B,
    grads: &mut [ProjectionGrads<'_, B>],
    dys: &[&Tensor<B>],
    x: &Tensor<B>,
    by: &[Projection<'_, B>],
    s: &mut ProjectScratch<B>,
) -> Result<()> {
    assert!([grads.len(), dys.len()] == [by.len(); 2], "project_dw: a group of {}", by.len());
    for (i, (by, g)) in by.iter().zip(grads).enumerate() {
        let dy = dys[i];
        g.check("project_dw", by);
        expect_shape("project_dw", "y", dy, (x.rows(), by.w.rows()));
        if let Some(dw) = g.w.as_deref_mut() {
            dev.matmul(dw, dy, x, MatMul::TN, 1.0, Write::Add)?;
        }
        if let Some(dbias) = g.bias.as_deref_mut() {
            dev.bias_backward(dbias, dy)?;
        }
        if let (Some(lora), Some(da)) = (by.lora, g.a.as_deref_mut()) {
            dev.matmul(da, &s.u[i], dropped(dev, &mut s.x, x, lora.dropout)?, MatMul::TN, 1.0, Write::Add)?;
        }
    }
    Ok(())
}
