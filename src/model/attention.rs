//! The attention block of a layer, forward and backward.
//!
//! ```text
//! h       = norm(x)
//! q, k, v = h·Wq, h·Wk, h·Wv (+ bias, + LoRA);  q, k = rope(norm?(q)), rope(norm?(k))
//! mid     = x + attention(q, k, v)·Wo
//! ```

use super::lora::grads;
use super::pass::Pass;
use super::scratch::{Alloc, BackScratch, Scratch, TRAINING};
use super::weights::{Layer, Product};
use crate::backend::{AttentionGrads, Backend, Projected, Rotate, Write};
use crate::error::Result;
use crate::tensor::Tensor;

/// What a layer keeps of its attention.
pub(super) struct AttnActs<B: Backend> {
    pub q: Tensor<B>,   // (N, H*D), rotated
    pub k: Tensor<B>,   // (N, K*D), rotated
    pub v: Tensor<B>,   // (N, K*D)
    pub out: Tensor<B>, // (N, H*D)
    pub lse: Tensor<B>, // (N, H)
    pub q_norm: Option<HeadNorm<B>>,
    pub k_norm: Option<HeadNorm<B>>,
    pub t_q: Option<Tensor<B>>, // (N, r)
    pub t_k: Option<Tensor<B>>, // (N, r)
    pub t_v: Option<Tensor<B>>, // (N, r)
}

/// Norm per head: what backward needs of it.
pub(super) struct HeadNorm<B: Backend> {
    pub x: Tensor<B>,    // (N, heads·D)
    pub rstd: Tensor<B>, // (N, heads)
}

impl<B: Backend> AttnActs<B> {
    pub fn new(a: &Alloc<'_, B>) -> Result<Self> {
        let c = a.c;
        let norm = |heads| -> Result<_> { Ok(HeadNorm { x: a.act(heads * c.heads.head_dim)?, rstd: a.f32(heads)? }) };
        Ok(Self {
            q: a.act(c.q_dim())?,
            k: a.act(c.kv_dim())?,
            v: a.act(c.kv_dim())?,
            out: a.act(c.q_dim())?,
            lse: a.f32(c.heads.n_query)?,
            q_norm: c.qk_norm.then(|| norm(c.heads.n_query)).transpose()?,
            k_norm: c.qk_norm.then(|| norm(c.heads.n_kv)).transpose()?,
            t_q: a.low_rank(Product::Q)?,
            t_k: a.low_rank(Product::K)?,
            t_v: a.low_rank(Product::V)?,
        })
    }

    pub fn for_each(&mut self, f: &mut impl FnMut(&mut Tensor<B>)) {
        let Self { q, k, v, out, lse, q_norm, k_norm, t_q, t_k, t_v } = self;
        let norms = [q_norm, k_norm].into_iter().flatten().flat_map(|HeadNorm { x, rstd }| [x, rstd]);
        [q, k, v, out, lse].into_iter().chain([t_q, t_k, t_v].into_iter().flatten()).chain(norms).for_each(f);
    }
}

/// Queries, keys and values of a layer's input, normed and rotated.
pub(super) fn qkv<B: Backend>(
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    x: &Tensor<B>,
    a: &mut AttnActs<B>,
    s: &mut Scratch<B>,
) -> Result<()> {
    let AttnActs { q, k, v, q_norm, k_norm, t_q, t_k, t_v, .. } = a;
    let Scratch { h, rstd, project, .. } = s;
    pass.dev.rmsnorm_forward(h, rstd, pass.norm(x, &layer.attn_norm))?;
    // Norms per head stand between product and rotation.
    let rope = q_norm.is_none().then(|| pass.rope());
    let qx = q_norm.as_mut().map_or(&mut *q, |n| &mut n.x);
    let kx = k_norm.as_mut().map_or(&mut *k, |n| &mut n.x);
    let to = &mut [
        Projected { y: qx, t: t_q.as_mut() },
        Projected { y: kx, t: t_k.as_mut() },
        Projected { y: v, t: t_v.as_mut() },
    ];
    pass.dev.project_qkv(to, h, &[&layer.q, &layer.k, &layer.v].map(|p| pass.product(p)), rope, project)?;
    for (out, norm, w) in [(q, q_norm, &layer.q_norm), (k, k_norm, &layer.k_norm)] {
        if let (Some(n), Some(w)) = (norm, w) {
            pass.dev.rmsnorm_forward(out, &mut n.rstd, pass.norm(&n.x, w))?;
            pass.dev.rope(out, pass.rope(), Rotate::Forward)?;
        }
    }
    Ok(())
}

/// Attention of a layer's input.
pub(super) fn attend<B: Backend>(
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    x: &Tensor<B>,
    a: &mut AttnActs<B>,
    s: &mut Scratch<B>,
) -> Result<()> {
    qkv(pass, layer, x, a, s)?;
    let AttnActs { q, k, v, out, lse, .. } = a;
    pass.dev.attention_forward(out, lse, pass.attention(q, k, v))
}

/// `mid = x + out·Wo`. The `t_o` of its update is kept with the feed-forward, because it is kept when attention is not.
pub(super) fn output<B: Backend>(
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    mid: &mut Tensor<B>,
    x: &Tensor<B>,
    out: &Tensor<B>,
    t_o: &mut Option<Tensor<B>>,
    s: &mut Scratch<B>,
) -> Result<()> {
    let to = &mut [Projected { y: mid, t: t_o.as_mut() }];
    pass.dev.project(to, out, &[pass.product(&layer.o)], Some(x), &mut s.project)
}

/// `dres` of `mid` becomes that of the layer's input, if anything below needs it.
pub(super) fn backward<B: Backend>(
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    g: &mut Layer<Option<Tensor<B>>>,
    x: &Tensor<B>,
    a: &AttnActs<B>,
    t_o: &Option<Tensor<B>>,
    s: &mut Scratch<B>,
) -> Result<()> {
    let AttnActs { q, k, v, out, lse, q_norm, k_norm, t_q, t_k, t_v } = a;
    let Scratch { h, rstd, project, back, .. } = s;
    let BackScratch { dres, dh, dq, dk, dv, dout, pre, .. } = back.as_mut().expect(TRAINING);
    let dev = pass.dev;

    let (by, go) = ([pass.product(&layer.o)], &mut [grads(&mut g.o)]);
    dev.project_dx(Some(dout), go, &[dres], &[t_o.as_ref()], &by, project)?;
    dev.project_dw(go, &[dres], out, &by, project)?;

    let dx = AttentionGrads { dq, dk, dv };
    dev.attention_backward(dx, dout, out, lse, pass.attention(q, k, v), Some(pass.rope()))?;
    let (mut dq, mut dk) = (&*dq, &*dk);
    if let (Some((pq, pk)), Some(nq), Some(nk), Some(wq), Some(wk)) =
        (pre, q_norm, k_norm, &layer.q_norm, &layer.k_norm)
    {
        let (gq, gk) = (g.q_norm.as_mut().and_then(Option::as_mut), g.k_norm.as_mut().and_then(Option::as_mut));
        dev.rmsnorm_backward(pq, gq, dq, &nq.rstd, pass.norm(&nq.x, wq), Write::Set)?;
        dev.rmsnorm_backward(pk, gk, dk, &nk.rstd, pass.norm(&nk.x, wk), Write::Set)?;
        (dq, dk) = (pq, pk);
    }

    let norm = pass.norm(x, &layer.attn_norm);
    dev.rmsnorm_forward(h, rstd, norm)?;
    let needs_dh = pass.needs_input || g.attn_norm.is_some();
    let by = [&layer.q, &layer.k, &layer.v].map(|p| pass.product(p));
    let (gs, dys) = (&mut [&mut g.q, &mut g.k, &mut g.v].map(grads), [dq, dk, &*dv]);
    let ts = [t_q, t_k, t_v].map(Option::as_ref);
    dev.project_dx(needs_dh.then_some(&mut *dh), gs, &dys, &ts, &by, project)?;
    dev.project_dw(gs, &dys, h, &by, project)?;
    if !needs_dh {
        return Ok(());
    }
    dev.rmsnorm_backward(dres, g.attn_norm.as_mut(), dh, rstd, norm, Write::Add)
}
