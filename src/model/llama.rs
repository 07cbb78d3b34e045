//! Forward and backward of the decoder, layer by layer.
//!
//! ```text
//! x      = embed[tokens]
//! h      = norm(x);  q, k, v = h·Wq, h·Wk, h·Wv (+ bias, + LoRA);  q, k = rope(norm?(q)), rope(norm?(k))
//! mid    = x + attention(q, k, v)·Wo
//! h      = norm(mid);  x' = mid + (silu(h·Wgate) * (h·Wup))·Wdown
//! hidden = norm(x);  loss = cross_entropy(hidden·head)
//! ```

use super::acts::{Acts, AttnActs, BackScratch, MlpActs, Scratch};
use super::config::ModelConfig;
use super::linear::{self, LoraPass, Target};
use super::weights::{Layer, Weights};
use super::{Grads, Params, Recompute};
use crate::backend::{Backend, CrossEntropy, MatMul, Rotate, Write};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// What all layers of a pass share.
pub(super) struct Pass<'a, B: Backend> {
    pub c: &'a ModelConfig,
    pub table: &'a Tensor<B>,
    pub positions: &'a Tensor<B>,
    pub doc_start: &'a Tensor<B>,
    pub lora: LoraPass,
}

impl<B: Backend> Clone for Pass<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Pass<'_, B> {}

impl<B: Backend> Pass<'_, B> {
    fn at(mut self, layer: usize) -> Self {
        self.lora.layer = layer;
        self
    }

    fn eps(&self) -> f32 {
        self.c.rms_norm_eps as f32
    }
}

/// The low-rank part of a pass over `a`, with dropout where it trains.
pub(super) fn lora_pass<B: Backend>(a: &Acts<B>, dropout: bool) -> LoraPass {
    let spec = a.options.lora.as_ref();
    let p = spec.map_or(0.0, |l| l.dropout as f32);
    LoraPass {
        scale: spec.map_or(0.0, |l| l.scale() as f32),
        dropout: (dropout && p > 0.0).then_some((a.dropout_key, p)),
        layer: 0,
    }
}

/// The head: its own weight, or the embedding when tied.
pub(super) fn head<T>(w: &Weights<T>) -> &T {
    w.lm_head.as_ref().unwrap_or(&w.embed)
}

/// Runs the loaded micro-batch up to the final norm, with LoRA dropout: the forward pass of training.
///
/// # Errors
/// If the device refuses a launch.
pub fn forward<B: Backend>(dev: &B, c: &ModelConfig, p: &Params<B>, a: &mut Acts<B>) -> Result<()> {
    let lora = lora_pass(a, true);
    run(dev, c, p, a, lora)
}

/// Runs the loaded micro-batch without dropout and computes each token's loss and whether its arg max is right:
/// [`Acts::losses`], [`Acts::corrects`]. No gradients.
///
/// # Errors
/// If the device refuses a launch.
pub fn loss<B: Backend>(dev: &B, c: &ModelConfig, p: &Params<B>, a: &mut Acts<B>) -> Result<()> {
    evaluate(dev, c, p, a)?;
    let how = CrossEntropy {
        n_classes: c.n_classes,
        scale: 1.0,
        dw_first_row: 0,
    };
    let Acts {
        loss,
        correct,
        hidden,
        targets,
        ..
    } = a;
    dev.linear_cross_entropy(loss, Some(correct), None, None, hidden, head(p), targets, how)
}

/// Runs the loaded micro-batch up to the final norm without dropout.
///
/// # Errors
/// If the device refuses a launch.
pub fn evaluate<B: Backend>(dev: &B, c: &ModelConfig, p: &Params<B>, a: &mut Acts<B>) -> Result<()> {
    let lora = lora_pass(a, false);
    run(dev, c, p, a, lora)
}

/// Logits of all tokens of the loaded micro-batch, (N, V) row-major, without dropout. For inspection and tests: training never
/// forms them.
///
/// # Errors
/// If the device has not enough memory or refuses a launch.
pub fn logits<B: Backend>(dev: &B, c: &ModelConfig, p: &Params<B>, a: &mut Acts<B>) -> Result<Vec<f32>> {
    evaluate(dev, c, p, a)?;
    let mut out = dev.alloc(a.n_tokens(), c.vocab_size, DType::F32)?;
    dev.matmul(&mut out, &a.hidden, head(p), MatMul::NT, 1.0, Write::Set)?;
    let mut host = vec![0.0; out.len()];
    dev.download(&mut host, &out)?;
    Ok(host)
}

fn run<B: Backend>(dev: &B, c: &ModelConfig, p: &Params<B>, a: &mut Acts<B>, lora: LoraPass) -> Result<()> {
    let Acts {
        table,
        positions,
        doc_start,
        tokens,
        x,
        mid,
        attn,
        mlp,
        scratch,
        hidden,
        rstd,
        ..
    } = a;
    let pass = Pass {
        c,
        table,
        positions,
        doc_start,
        lora,
    };
    dev.embedding_forward(&mut x[0], &p.embed, tokens)?;
    let (streams, mids, attns, mlps) = (x.len(), mid.len(), attn.len(), mlp.len());
    for (i, layer) in p.layers.iter().enumerate() {
        let pass = pass.at(i);
        let mid = &mut mid[i % mids];
        attention_forward(dev, pass, layer, &x[i % streams], &mut attn[i % attns], scratch)?;
        attention_out(dev, pass, layer, mid, &x[i % streams], &mut attn[i % attns], scratch)?;
        mlp_forward(dev, pass, layer, mid, &mut mlp[i % mlps], scratch)?;
        mlp_out(
            dev,
            pass,
            layer,
            &mut x[(i + 1) % streams],
            mid,
            &mut mlp[i % mlps],
            scratch,
        )?;
    }
    let last = &x[p.layers.len() % streams];
    dev.rmsnorm_forward(hidden, rstd, last, &p.final_norm, pass.eps())
}

/// Queries, keys and values of a layer's input, normed and rotated.
pub(super) fn qkv_forward<B: Backend>(
    dev: &B,
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    x: &Tensor<B>,
    a: &mut AttnActs<B>,
    s: &mut Scratch<B>,
) -> Result<()> {
    let AttnActs {
        q,
        k,
        v,
        q_norm,
        k_norm,
        t: [tq, tk, tv, _],
        ..
    } = a;
    let Scratch { h, rstd, lora, .. } = s;
    dev.rmsnorm_forward(h, rstd, x, &layer.attn_norm, pass.eps())?;
    let qx = q_norm.as_mut().map_or(&mut *q, |n| &mut n.x);
    linear::forward(
        dev,
        qx,
        tq.as_mut(),
        h,
        &layer.q,
        Write::Set,
        Target::Q,
        pass.lora,
        lora.as_mut(),
    )?;
    let kx = k_norm.as_mut().map_or(&mut *k, |n| &mut n.x);
    linear::forward(
        dev,
        kx,
        tk.as_mut(),
        h,
        &layer.k,
        Write::Set,
        Target::K,
        pass.lora,
        lora.as_mut(),
    )?;
    linear::forward(
        dev,
        v,
        tv.as_mut(),
        h,
        &layer.v,
        Write::Set,
        Target::V,
        pass.lora,
        lora.as_mut(),
    )?;
    for (out, norm, w) in [(&mut *q, q_norm, &layer.q_norm), (&mut *k, k_norm, &layer.k_norm)] {
        if let (Some(n), Some(w)) = (norm, w) {
            dev.rmsnorm_forward(out, &mut n.rstd, &n.x, w, pass.eps())?;
        }
        dev.rope(out, pass.table, pass.positions, Rotate::Forward)?;
    }
    Ok(())
}

fn attention_forward<B: Backend>(
    dev: &B,
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    x: &Tensor<B>,
    a: &mut AttnActs<B>,
    s: &mut Scratch<B>,
) -> Result<()> {
    qkv_forward(dev, pass, layer, x, a, s)?;
    let AttnActs { q, k, v, out, lse, .. } = a;
    dev.attention_forward(out, lse, q, k, v, pass.doc_start, pass.c.heads, pass.c.mask())
}

/// `mid = x + out·Wo`.
pub(super) fn attention_out<B: Backend>(
    dev: &B,
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    mid: &mut Tensor<B>,
    x: &Tensor<B>,
    a: &mut AttnActs<B>,
    s: &mut Scratch<B>,
) -> Result<()> {
    dev.copy(mid, x)?;
    let AttnActs {
        out, t: [_, _, _, to], ..
    } = a;
    linear::forward(
        dev,
        mid,
        to.as_mut(),
        out,
        &layer.o,
        Write::Add,
        Target::O,
        pass.lora,
        s.lora.as_mut(),
    )
}

/// Gate and up of the norm of `mid`.
pub(super) fn mlp_forward<B: Backend>(
    dev: &B,
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    mid: &Tensor<B>,
    m: &mut MlpActs<B>,
    s: &mut Scratch<B>,
) -> Result<()> {
    let MlpActs {
        gate,
        up,
        t: [tg, tu, _],
    } = m;
    let Scratch { h, rstd, lora, .. } = s;
    dev.rmsnorm_forward(h, rstd, mid, &layer.mlp_norm, pass.eps())?;
    linear::forward(
        dev,
        gate,
        tg.as_mut(),
        h,
        &layer.gate,
        Write::Set,
        Target::Gate,
        pass.lora,
        lora.as_mut(),
    )?;
    linear::forward(
        dev,
        up,
        tu.as_mut(),
        h,
        &layer.up,
        Write::Set,
        Target::Up,
        pass.lora,
        lora.as_mut(),
    )
}

/// `next = mid + (silu(gate) * up)·Wdown`.
pub(super) fn mlp_out<B: Backend>(
    dev: &B,
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    next: &mut Tensor<B>,
    mid: &Tensor<B>,
    m: &mut MlpActs<B>,
    s: &mut Scratch<B>,
) -> Result<()> {
    let MlpActs {
        gate,
        up,
        t: [_, _, td],
    } = m;
    let Scratch { act, lora, .. } = s;
    dev.swiglu_forward(act, gate, up)?;
    dev.copy(next, mid)?;
    linear::forward(
        dev,
        next,
        td.as_mut(),
        act,
        &layer.down,
        Write::Add,
        Target::Down,
        pass.lora,
        lora.as_mut(),
    )
}

/// Adds the gradients of `scale · summed loss` of the micro-batch that [`forward`] ran; sets [`Acts::losses`].
///
/// # Errors
/// If the device refuses a launch.
pub fn backward<B: Backend>(
    dev: &B,
    c: &ModelConfig,
    p: &Params<B>,
    g: &mut Grads<B>,
    a: &mut Acts<B>,
    scale: f32,
) -> Result<()> {
    backward_with(dev, c, p, g, a, scale, &mut |_, _| Ok(()))
}

/// As [`backward`]; calls `on_layer` with the gradients of each layer, last layer first, as soon as they are final for this
/// micro-batch, so that their reduction can overlap the layers below.
///
/// # Errors
/// If the device refuses a launch, or the first error of `on_layer`.
///
/// # Panics
/// If the activations were not allocated for training.
pub fn backward_with<B: Backend>(
    dev: &B,
    c: &ModelConfig,
    p: &Params<B>,
    g: &mut Grads<B>,
    a: &mut Acts<B>,
    scale: f32,
    on_layer: &mut dyn FnMut(usize, &mut Layer<Option<Tensor<B>>>) -> Result<()>,
) -> Result<()> {
    let lora = lora_pass(a, true);
    let recompute = a.options.recompute;
    let Acts {
        table,
        positions,
        doc_start,
        tokens,
        targets,
        x,
        mid,
        attn,
        mlp,
        scratch,
        back,
        hidden,
        rstd,
        loss,
        ..
    } = a;
    let b = back.as_mut().expect("activations are allocated for training");
    let pass = Pass {
        c,
        table,
        positions,
        doc_start,
        lora,
    };
    let n_layers = p.layers.len();

    // What lies below the lowest trained weight needs no gradient.
    let trains_embed = g.embed.is_some();
    let lowest = if trains_embed { 0 } else { lowest_trained_layer(g) };
    let needs_hidden = lowest < n_layers || g.final_norm.is_some();

    let dw = match &mut g.lm_head {
        Some(own) => own.as_mut(),
        None => g.embed.as_mut(),
    };
    let how = CrossEntropy {
        n_classes: c.n_classes,
        scale,
        dw_first_row: dw.as_ref().map_or(0, |w| first_row(c, w)),
    };
    let dhidden = needs_hidden.then_some(&mut b.dh);
    dev.linear_cross_entropy(loss, None, dhidden, dw, hidden, head(p), targets, how)?;
    if !needs_hidden {
        return Ok(());
    }
    dev.rmsnorm_backward(
        &mut b.dres,
        g.final_norm.as_mut(),
        &b.dh,
        &x[n_layers],
        &p.final_norm,
        rstd,
        Write::Set,
    )?;

    for i in (lowest..n_layers).rev() {
        let (pass, layer, grads) = (pass.at(i), &p.layers[i], &mut g.layers[i]);
        let (mids, attns, mlps) = (mid.len(), attn.len(), mlp.len());
        let (x, mid, attn, mlp) = (&x[i], &mut mid[i % mids], &mut attn[i % attns], &mut mlp[i % mlps]);
        if recompute != Recompute::None {
            attention_forward(dev, pass, layer, x, attn, scratch)?;
        }
        if recompute == Recompute::Layer {
            attention_out(dev, pass, layer, mid, x, attn, scratch)?;
            mlp_forward(dev, pass, layer, mid, mlp, scratch)?;
        }
        mlp_backward(dev, pass, layer, grads, mid, mlp, scratch, b)?;
        attention_backward(dev, pass, layer, grads, x, attn, scratch, b, trains_embed || i > lowest)?;
        on_layer(i, grads)?;
    }
    match &mut g.embed {
        Some(dw) => {
            let first = first_row(c, dw);
            dev.embedding_backward(dw, &b.dres, tokens, first)
        }
        None => Ok(()),
    }
}

/// First row of the embedding or head that a gradient covers: all rows, or the last ones before `n_classes`.
fn first_row<B: Backend>(c: &ModelConfig, grad: &Tensor<B>) -> usize {
    if grad.rows() == c.vocab_size {
        0
    } else {
        c.n_classes - grad.rows()
    }
}

fn lowest_trained_layer<B: Backend>(g: &mut Grads<B>) -> usize {
    let mut trained = |layer: &mut Layer<Option<Tensor<B>>>| {
        let mut any = false;
        layer.for_each_mut(&mut |t| any |= t.is_some());
        any
    };
    g.layers.iter_mut().position(&mut trained).unwrap_or(g.layers.len())
}

/// `dres` of the layer's output becomes that of `mid`.
#[allow(clippy::too_many_arguments)]
fn mlp_backward<B: Backend>(
    dev: &B,
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    g: &mut Layer<Option<Tensor<B>>>,
    mid: &Tensor<B>,
    m: &MlpActs<B>,
    s: &mut Scratch<B>,
    b: &mut BackScratch<B>,
) -> Result<()> {
    let MlpActs {
        gate,
        up,
        t: [tg, tu, td],
    } = m;
    let Scratch { h, rstd, act, lora } = s;
    let BackScratch {
        dres, dh, dact, dup, ..
    } = b;
    dev.swiglu_forward(act, gate, up)?;
    let dx = Some((&mut *dact, Write::Set));
    linear::backward(
        dev,
        dx,
        &mut g.down,
        dres,
        act,
        td.as_ref(),
        &layer.down,
        Target::Down,
        pass.lora,
        lora.as_mut(),
    )?;
    // SwiGLU's output has served; its memory takes dgate.
    let dgate = act;
    dev.swiglu_backward(dgate, dup, dact, gate, up)?;
    dev.rmsnorm_forward(h, rstd, mid, &layer.mlp_norm, pass.eps())?;
    let dx = Some((&mut *dh, Write::Set));
    linear::backward(
        dev,
        dx,
        &mut g.gate,
        dgate,
        h,
        tg.as_ref(),
        &layer.gate,
        Target::Gate,
        pass.lora,
        lora.as_mut(),
    )?;
    let dx = Some((&mut *dh, Write::Add));
    linear::backward(
        dev,
        dx,
        &mut g.up,
        dup,
        h,
        tu.as_ref(),
        &layer.up,
        Target::Up,
        pass.lora,
        lora.as_mut(),
    )?;
    dev.rmsnorm_backward(dres, g.mlp_norm.as_mut(), dh, mid, &layer.mlp_norm, rstd, Write::Add)
}

/// `dres` of `mid` becomes that of the layer's input, if anything below needs it.
#[allow(clippy::too_many_arguments)]
fn attention_backward<B: Backend>(
    dev: &B,
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    g: &mut Layer<Option<Tensor<B>>>,
    x: &Tensor<B>,
    a: &AttnActs<B>,
    s: &mut Scratch<B>,
    b: &mut BackScratch<B>,
    needs_input: bool,
) -> Result<()> {
    let AttnActs {
        q,
        k,
        v,
        out,
        lse,
        q_norm,
        k_norm,
        t: [tq, tk, tv, to],
    } = a;
    let Scratch { h, rstd, lora, .. } = s;
    let BackScratch {
        dres,
        dh,
        dq,
        dk,
        dv,
        dout,
        pre,
        ..
    } = b;
    let dx = Some((&mut *dout, Write::Set));
    linear::backward(
        dev,
        dx,
        &mut g.o,
        dres,
        out,
        to.as_ref(),
        &layer.o,
        Target::O,
        pass.lora,
        lora.as_mut(),
    )?;
    dev.attention_backward(
        dq,
        dk,
        dv,
        dout,
        out,
        lse,
        q,
        k,
        v,
        pass.doc_start,
        pass.c.heads,
        pass.c.mask(),
    )?;
    dev.rope(dq, pass.table, pass.positions, Rotate::Inverse)?;
    dev.rope(dk, pass.table, pass.positions, Rotate::Inverse)?;
    let (mut dq, mut dk) = (&*dq, &*dk);
    if let (Some((pq, pk)), Some(nq), Some(nk), Some(wq), Some(wk)) =
        (pre, q_norm, k_norm, &layer.q_norm, &layer.k_norm)
    {
        let (gq, gk) = (
            g.q_norm.as_mut().and_then(Option::as_mut),
            g.k_norm.as_mut().and_then(Option::as_mut),
        );
        dev.rmsnorm_backward(pq, gq, dq, &nq.x, wq, &nq.rstd, Write::Set)?;
        dev.rmsnorm_backward(pk, gk, dk, &nk.x, wk, &nk.rstd, Write::Set)?;
        (dq, dk) = (pq, pk);
    }
    dev.rmsnorm_forward(h, rstd, x, &layer.attn_norm, pass.eps())?;
    let needs_dh = needs_input || g.attn_norm.is_some();
    let dx = needs_dh.then_some((&mut *dh, Write::Set));
    linear::backward(
        dev,
        dx,
        &mut g.q,
        dq,
        h,
        tq.as_ref(),
        &layer.q,
        Target::Q,
        pass.lora,
        lora.as_mut(),
    )?;
    let dx = needs_dh.then_some((&mut *dh, Write::Add));
    linear::backward(
        dev,
        dx,
        &mut g.k,
        dk,
        h,
        tk.as_ref(),
        &layer.k,
        Target::K,
        pass.lora,
        lora.as_mut(),
    )?;
    let dx = needs_dh.then_some((&mut *dh, Write::Add));
    linear::backward(
        dev,
        dx,
        &mut g.v,
        dv,
        h,
        tv.as_ref(),
        &layer.v,
        Target::V,
        pass.lora,
        lora.as_mut(),
    )?;
    if !needs_dh {
        return Ok(());
    }
    dev.rmsnorm_backward(dres, g.attn_norm.as_mut(), dh, x, &layer.attn_norm, rstd, Write::Add)
}
