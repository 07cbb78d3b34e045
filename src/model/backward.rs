//! Backward of the decoder: the head with its loss, then the layers in reverse, down to the lowest trained weight.

use super::acts::{Acts, AttnActs, BackScratch, MlpActs, Scratch};
use super::config::ModelConfig;
use super::linear;
use super::llama::{Pass, attention_forward, attention_out, head, lora_pass, mlp_forward};
use super::weights::Layer;
use super::{Grads, Params, Recompute};
use crate::backend::{AttentionGrads, Backend, HeadGrads, HeadLoss, Rope, Rotate, Swiglu, Write};
use crate::error::Result;
use crate::tensor::Tensor;

/// Adds the gradients of `scale · summed loss` of the micro-batch that [`super::forward`] ran; sets [`Acts::losses`].
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

/// What is done with the finished gradients of layer `i`.
pub type OnLayer<'a, B> = dyn FnMut(usize, &mut Layer<Option<Tensor<B>>>) -> Result<()> + 'a;

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
    on_layer: &mut OnLayer<B>,
) -> Result<()> {
    let lora = lora_pass(a, true);
    let recompute = a.options.recompute;
    let Acts {
        table, positions, doc_start, tokens, targets, x, mid, attn, mlp, scratch, back, hidden, rstd, loss, ..
    } = a;
    let b = back.as_mut().expect("activations are allocated for training");
    let pass = Pass { c, rope: Rope { table, positions }, doc_start, lora };
    let n_layers = p.layers.len();

    // What lies below the lowest trained weight needs no gradient.
    let trains_embed = g.embed.is_some();
    let lowest = if trains_embed { 0 } else { lowest_trained_layer(g) };
    let needs_hidden = lowest < n_layers || g.final_norm.is_some();

    let dw = match &mut g.lm_head {
        Some(own) => own.as_mut(),
        None => g.embed.as_mut(),
    };
    let first = dw.as_ref().map_or(0, |w| first_row(c, w));
    let grads = HeadGrads { dx: needs_hidden.then_some(&mut b.dh), dw, first_row: first };
    let of = HeadLoss { x: hidden, w: head(p), targets, n_classes: c.n_classes, scale };
    dev.linear_cross_entropy(loss, None, grads, of)?;
    if !needs_hidden {
        return Ok(());
    }
    let norm = pass.norm(&x[n_layers], &p.final_norm);
    dev.rmsnorm_backward(&mut b.dres, g.final_norm.as_mut(), &b.dh, rstd, norm, Write::Set)?;

    for i in (lowest..n_layers).rev() {
        let (pass, layer, grads) = (pass.at(i), &p.layers[i], &mut g.layers[i]);
        let (mids, attns, mlps) = (mid.len(), attn.len(), mlp.len());
        let (x, mid, attn, mlp) = (&x[i], &mut mid[i % mids], &mut attn[i % attns], &mut mlp[i % mlps]);
        if recompute != Recompute::None {
            attention_forward(dev, pass, layer, x, attn, scratch)?;
        }
        if recompute == Recompute::Layer {
            attention_out(dev, pass, layer, mid, x, attn, mlp, scratch)?;
            mlp_forward(dev, pass, layer, mid, mlp, scratch)?;
            if layer.down.lora.is_some() {
                // Of the layer's output only the `t` of its low-rank part is needed; the rest goes to memory that is free now.
                let MlpActs { gate, up, t } = &mut *mlp;
                let (act, lora) = (&mut scratch.act, scratch.lora.as_mut());
                dev.swiglu_forward(act, Swiglu { gate, up })?;
                linear::low_rank(dev, &mut b.dh, t[3].as_mut(), act, &layer.down, pass.lora, lora)?;
            }
        }
        mlp_backward(dev, pass, layer, grads, mid, mlp, scratch, b)?;
        let needs_input = trains_embed || i > lowest;
        attention_backward(dev, pass, layer, grads, x, attn, mlp.t[0].as_ref(), scratch, b, needs_input)?;
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
    if grad.rows() == c.vocab_size { 0 } else { c.n_classes - grad.rows() }
}

/// The first layer with a trained weight; their number where there is none.
fn lowest_trained_layer<B: Backend>(g: &Grads<B>) -> usize {
    let trained = g.places().into_iter().filter(|(_, grad)| grad.is_some());
    trained.filter_map(|(at, _)| at.layer()).min().unwrap_or(g.layers.len())
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
    let MlpActs { gate, up, t: [_, tg, tu, td] } = m;
    let Scratch { h, rstd, act, lora } = s;
    let BackScratch { dres, dh, dact, dup, .. } = b;
    dev.swiglu_forward(act, Swiglu { gate, up })?;
    let dx = Some((&mut *dact, Write::Set));
    linear::backward(dev, dx, &mut g.down, dres, act, td.as_ref(), &layer.down, pass.lora, lora.as_mut())?;
    // SwiGLU's output has served; its memory takes dgate.
    let dgate = act;
    dev.swiglu_backward(dgate, dup, dact, Swiglu { gate, up })?;
    let norm = pass.norm(mid, &layer.mlp_norm);
    dev.rmsnorm_forward(h, rstd, norm)?;
    let dx = Some((&mut *dh, Write::Set));
    linear::backward(dev, dx, &mut g.gate, dgate, h, tg.as_ref(), &layer.gate, pass.lora, lora.as_mut())?;
    let dx = Some((&mut *dh, Write::Add));
    linear::backward(dev, dx, &mut g.up, dup, h, tu.as_ref(), &layer.up, pass.lora, lora.as_mut())?;
    dev.rmsnorm_backward(dres, g.mlp_norm.as_mut(), dh, rstd, norm, Write::Add)
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
    to: Option<&Tensor<B>>,
    s: &mut Scratch<B>,
    b: &mut BackScratch<B>,
    needs_input: bool,
) -> Result<()> {
    let AttnActs { q, k, v, out, lse, q_norm, k_norm, t: [tq, tk, tv] } = a;
    let Scratch { h, rstd, lora, .. } = s;
    let BackScratch { dres, dh, dq, dk, dv, dout, pre, .. } = b;
    let dx = Some((&mut *dout, Write::Set));
    linear::backward(dev, dx, &mut g.o, dres, out, to, &layer.o, pass.lora, lora.as_mut())?;
    let grads = AttentionGrads { dq, dk, dv };
    dev.attention_backward(grads, dout, out, lse, pass.attention(q, k, v))?;
    dev.rope(dq, pass.rope, Rotate::Inverse)?;
    dev.rope(dk, pass.rope, Rotate::Inverse)?;
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
    let needs_dh = needs_input || g.attn_norm.is_some();
    let dx = needs_dh.then_some((&mut *dh, Write::Set));
    linear::backward(dev, dx, &mut g.q, dq, h, tq.as_ref(), &layer.q, pass.lora, lora.as_mut())?;
    let dx = needs_dh.then_some((&mut *dh, Write::Add));
    linear::backward(dev, dx, &mut g.k, dk, h, tk.as_ref(), &layer.k, pass.lora, lora.as_mut())?;
    let dx = needs_dh.then_some((&mut *dh, Write::Add));
    linear::backward(dev, dx, &mut g.v, dv, h, tv.as_ref(), &layer.v, pass.lora, lora.as_mut())?;
    if !needs_dh {
        return Ok(());
    }
    dev.rmsnorm_backward(dres, g.attn_norm.as_mut(), dh, rstd, norm, Write::Add)
}
