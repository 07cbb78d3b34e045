//! Forward of the decoder, layer by layer.
//!
//! ```text
//! x      = embed[tokens]
//! h      = norm(x);  q, k, v = h·Wq, h·Wk, h·Wv (+ bias, + LoRA);  q, k = rope(norm?(q)), rope(norm?(k))
//! mid    = x + attention(q, k, v)·Wo
//! h      = norm(mid);  x' = mid + (silu(h·Wgate) * (h·Wup))·Wdown
//! hidden = norm(x);  loss = cross_entropy(hidden·head)
//! ```

use super::Params;
use super::acts::{Acts, AttnActs, MlpActs, Scratch};
use super::config::ModelConfig;
use super::linear::{self, LoraPass};
use super::weights::{Layer, Weights};
use crate::backend::{Attention, Backend, HeadGrads, HeadLoss, MatMul, Norm, Rope, Rotate, Swiglu, Write};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// What all layers of a pass share.
pub(super) struct Pass<'a, B: Backend> {
    pub c: &'a ModelConfig,
    pub rope: Rope<'a, B>,
    pub doc_start: &'a Tensor<B>,
    pub lora: LoraPass,
}

impl<B: Backend> Clone for Pass<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Pass<'_, B> {}

impl<'a, B: Backend> Pass<'a, B> {
    pub(super) fn at(mut self, layer: usize) -> Self {
        self.lora.layer = layer;
        self
    }

    pub(super) fn norm<'b>(&self, x: &'b Tensor<B>, w: &'b Tensor<B>) -> Norm<'b, B> {
        Norm { x, w, eps: self.c.rms_norm_eps as f32 }
    }

    pub(super) fn attention<'b>(&self, q: &'b Tensor<B>, k: &'b Tensor<B>, v: &'b Tensor<B>) -> Attention<'b, B>
    where
        'a: 'b,
    {
        Attention { q, k, v, doc_start: self.doc_start, heads: self.c.heads, mask: self.c.mask() }
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
    let Acts { loss, correct, hidden, targets, .. } = a;
    let of = HeadLoss { x: hidden, w: head(p), targets, n_classes: c.n_classes, scale: 1.0 };
    dev.linear_cross_entropy(loss, Some(correct), HeadGrads::none(), of)
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
    let Acts { table, positions, doc_start, tokens, x, mid, attn, mlp, scratch, hidden, rstd, .. } = a;
    let pass = Pass { c, rope: Rope { table, positions }, doc_start, lora };
    dev.embedding_forward(&mut x[0], &p.embed, tokens)?;
    let (streams, mids, attns, mlps) = (x.len(), mid.len(), attn.len(), mlp.len());
    for (i, layer) in p.layers.iter().enumerate() {
        let pass = pass.at(i);
        let mid = &mut mid[i % mids];
        attention_forward(dev, pass, layer, &x[i % streams], &mut attn[i % attns], scratch)?;
        attention_out(dev, pass, layer, mid, &x[i % streams], &attn[i % attns], &mut mlp[i % mlps], scratch)?;
        mlp_forward(dev, pass, layer, mid, &mut mlp[i % mlps], scratch)?;
        mlp_out(dev, pass, layer, &mut x[(i + 1) % streams], mid, &mut mlp[i % mlps], scratch)?;
    }
    let last = &x[p.layers.len() % streams];
    dev.rmsnorm_forward(hidden, rstd, pass.norm(last, &p.final_norm))
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
    let AttnActs { q, k, v, q_norm, k_norm, t: [tq, tk, tv], .. } = a;
    let Scratch { h, rstd, lora, .. } = s;
    dev.rmsnorm_forward(h, rstd, pass.norm(x, &layer.attn_norm))?;
    let qx = q_norm.as_mut().map_or(&mut *q, |n| &mut n.x);
    linear::forward(dev, qx, tq.as_mut(), h, &layer.q, Write::Set, pass.lora, lora.as_mut())?;
    let kx = k_norm.as_mut().map_or(&mut *k, |n| &mut n.x);
    linear::forward(dev, kx, tk.as_mut(), h, &layer.k, Write::Set, pass.lora, lora.as_mut())?;
    linear::forward(dev, v, tv.as_mut(), h, &layer.v, Write::Set, pass.lora, lora.as_mut())?;
    for (out, norm, w) in [(&mut *q, q_norm, &layer.q_norm), (&mut *k, k_norm, &layer.k_norm)] {
        if let (Some(n), Some(w)) = (norm, w) {
            dev.rmsnorm_forward(out, &mut n.rstd, pass.norm(&n.x, w))?;
        }
        dev.rope(out, pass.rope, Rotate::Forward)?;
    }
    Ok(())
}

pub(super) fn attention_forward<B: Backend>(
    dev: &B,
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    x: &Tensor<B>,
    a: &mut AttnActs<B>,
    s: &mut Scratch<B>,
) -> Result<()> {
    qkv_forward(dev, pass, layer, x, a, s)?;
    let AttnActs { q, k, v, out, lse, .. } = a;
    dev.attention_forward(out, lse, pass.attention(q, k, v))
}

/// `mid = x + out·Wo`.
#[allow(clippy::too_many_arguments)]
pub(super) fn attention_out<B: Backend>(
    dev: &B,
    pass: Pass<'_, B>,
    layer: &Layer<Tensor<B>>,
    mid: &mut Tensor<B>,
    x: &Tensor<B>,
    a: &AttnActs<B>,
    m: &mut MlpActs<B>,
    s: &mut Scratch<B>,
) -> Result<()> {
    dev.copy(mid, x)?;
    let to = &mut m.t[0];
    linear::forward(dev, mid, to.as_mut(), &a.out, &layer.o, Write::Add, pass.lora, s.lora.as_mut())
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
    let MlpActs { gate, up, t: [_, tg, tu, _] } = m;
    let Scratch { h, rstd, lora, .. } = s;
    dev.rmsnorm_forward(h, rstd, pass.norm(mid, &layer.mlp_norm))?;
    linear::forward(dev, gate, tg.as_mut(), h, &layer.gate, Write::Set, pass.lora, lora.as_mut())?;
    linear::forward(dev, up, tu.as_mut(), h, &layer.up, Write::Set, pass.lora, lora.as_mut())
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
    let MlpActs { gate, up, t: [_, _, _, td] } = m;
    let Scratch { act, lora, .. } = s;
    dev.swiglu_forward(act, Swiglu { gate, up })?;
    dev.copy(next, mid)?;
    linear::forward(dev, next, td.as_mut(), act, &layer.down, Write::Add, pass.lora, lora.as_mut())
}
