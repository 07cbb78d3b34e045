//! The feed-forward block of a layer, forward and backward.
//!
//! ```text
//! h    = norm(mid)
//! next = mid + (silu(h·Wgate) * (h·Wup))·Wdown
//! ```

use super::lora::grads;
use super::pass::Pass;
use super::scratch::{Alloc, BackScratch, Scratch, TRAINING};
use super::weights::{Layer, Product};
use crate::backend::{Backend, Projected, Write};
use crate::error::Result;
use crate::tensor::Tensor;

/// What a layer keeps besides its attention.
pub(super) struct MlpActs<B: Backend> {
    pub gate: Tensor<B>,           // (N, F); in backward then its gradient
    pub up: Tensor<B>,             // (N, F); likewise
    pub t_o: Option<Tensor<B>>,    // (N, r), of the output projection of attention
    pub t_gate: Option<Tensor<B>>, // (N, r)
    pub t_up: Option<Tensor<B>>,   // (N, r)
    pub t_down: Option<Tensor<B>>, // (N, r)
}

impl<B: Backend> MlpActs<B> {
    pub fn new(a: &Alloc<'_, B>) -> Result<Self> {
        Ok(Self {
            gate: a.act(a.c.intermediate_size)?,
            up: a.act(a.c.intermediate_size)?,
            t_o: a.low_rank(Product::O)?,
            t_gate: a.low_rank(Product::Gate)?,
            t_up: a.low_rank(Product::Up)?,
            t_down: a.low_rank(Product::Down)?,
        })
    }

    pub fn for_each(&mut self, f: &mut impl FnMut(&mut Tensor<B>)) {
        let Self { gate, up, t_o, t_gate, t_up, t_down } = self;
        [gate, up].into_iter().chain([t_o, t_gate, t_up, t_down].into_iter().flatten()).for_each(f);
    }
}

/// Gate and up of the norm of `mid`, and SwiGLU of them in the scratch.
pub(super) fn gate_up<B: Backend>(
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    mid: &Tensor<B>,
    m: &mut MlpActs<B>,
    s: &mut Scratch<B>,
) -> Result<()> {
    let MlpActs { gate, up, t_gate, t_up, .. } = m;
    let Scratch { h, rstd, act, project, .. } = s;
    pass.dev.rmsnorm_forward(h, rstd, pass.norm(mid, &layer.mlp_norm))?;
    let to = &mut [Projected { y: gate, t: t_gate.as_mut() }, Projected { y: up, t: t_up.as_mut() }];
    pass.dev.project_gate_up(act, to, h, &[&layer.gate, &layer.up].map(|p| pass.product(p)), project)
}

/// `next = mid + act·Wdown`, after [`gate_up`].
pub(super) fn down<B: Backend>(
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    next: &mut Tensor<B>,
    mid: &Tensor<B>,
    m: &mut MlpActs<B>,
    s: &mut Scratch<B>,
) -> Result<()> {
    let to = &mut [Projected { y: next, t: m.t_down.as_mut() }];
    pass.dev.project(to, &s.act, &[pass.product(&layer.down)], Some(mid), &mut s.project)
}

/// What [`down`] leaves for backward, without the product: its result is not needed again.
pub(super) fn down_again<B: Backend>(
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    m: &mut MlpActs<B>,
    s: &mut Scratch<B>,
) -> Result<()> {
    match (pass.product(&layer.down).lora, &mut m.t_down) {
        (Some(lora), Some(t)) => pass.dev.low_rank_t(t, &s.act, lora, &mut s.project),
        _ => Ok(()),
    }
}

/// `dres` of the layer's output becomes that of `mid`.
pub(super) fn backward<B: Backend>(
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    g: &mut Layer<Option<Tensor<B>>>,
    mid: &Tensor<B>,
    m: &mut MlpActs<B>,
    s: &mut Scratch<B>,
) -> Result<()> {
    let MlpActs { gate, up, t_gate, t_up, t_down, .. } = m;
    let Scratch { h, rstd, project, back, .. } = s;
    let BackScratch { dres, dh, dact, .. } = back.as_mut().expect(TRAINING);
    let dev = pass.dev;

    let (by, gs) = ([pass.product(&layer.down)], &mut [grads(&mut g.down)]);
    dev.project_dx(Some(&mut *dact), gs, &[dres], &[t_down.as_ref()], &by, project)?;
    dev.swiglu_backward(gate, up, dact)?;
    let (dgate, dup, act) = (&*gate, &*up, &*dact);
    dev.project_dw(gs, &[dres], act, &by, project)?;

    let norm = pass.norm(mid, &layer.mlp_norm);
    dev.rmsnorm_forward(h, rstd, norm)?;
    let by = [&layer.gate, &layer.up].map(|p| pass.product(p));
    let gs = &mut [&mut g.gate, &mut g.up].map(grads);
    dev.project_dx(Some(&mut *dh), gs, &[dgate, dup], &[t_gate, t_up].map(|t| t.as_ref()), &by, project)?;
    dev.project_dw(gs, &[dgate, dup], h, &by, project)?;
    dev.rmsnorm_backward(dres, g.mlp_norm.as_mut(), dh, rstd, norm, Write::Add)
}
