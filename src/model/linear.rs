//! Forward and backward of one product with its bias and its low-rank update.

use super::weights::{Linear, Lora, Product};
use crate::backend::{Backend, Dropout, LoraScratch, LowRank, LowRankGrads, MatMul, Write};
use crate::error::Result;
use crate::rng;
use crate::tensor::Tensor;

/// What the low-rank updates of one layer share.
#[derive(Clone, Copy, Debug)]
pub(super) struct LoraPass {
    /// The factor s on `B A`.
    pub scale: f32,
    /// Key of the micro-batch and probability; `None` outside training or without dropout.
    pub dropout: Option<(u64, f32)>,
    /// Index of the layer.
    pub layer: usize,
}

impl LoraPass {
    fn low_rank<'a, B: Backend>(&self, lora: &'a Lora<Tensor<B>>, product: Product) -> LowRank<'a, B> {
        let draws = |(key, p)| Dropout { key: rng::mix(&[key, self.layer as u64, product as u64]), p };
        LowRank { a: &lora.a, b: &lora.b, scale: self.scale, dropout: self.dropout.map(draws) }
    }
}

/// Scratch of the low-rank updates and the `t = x Aᵀ` kept for backward; asked for by products that have an update.
const LORA_MEMORY: &str = "activations were allocated for the low-rank updates of the weights";

/// `y (+)= x Wᵀ + bias + s·drop(x) Aᵀ Bᵀ`.
#[allow(clippy::too_many_arguments)]
pub(super) fn forward<B: Backend>(
    dev: &B,
    y: &mut Tensor<B>,
    t: Option<&mut Tensor<B>>,
    x: &Tensor<B>,
    p: &Linear<Tensor<B>>,
    write: Write,
    pass: LoraPass,
    scratch: Option<&mut LoraScratch<B>>,
) -> Result<()> {
    dev.matmul(y, x, &p.w, MatMul::NT, 1.0, write)?;
    if let Some(bias) = &p.bias {
        dev.add_bias(y, bias)?;
    }
    low_rank(dev, y, t, x, p, pass, scratch)
}

/// The low-rank part of [`forward`] alone: `y += s·drop(x) Aᵀ Bᵀ`, and its `t`.
#[allow(clippy::too_many_arguments)]
pub(super) fn low_rank<B: Backend>(
    dev: &B,
    y: &mut Tensor<B>,
    t: Option<&mut Tensor<B>>,
    x: &Tensor<B>,
    p: &Linear<Tensor<B>>,
    pass: LoraPass,
    scratch: Option<&mut LoraScratch<B>>,
) -> Result<()> {
    if let Some(lora) = &p.lora {
        let (t, scratch) = (t.expect(LORA_MEMORY), scratch.expect(LORA_MEMORY));
        dev.lora_forward(y, t, x, pass.low_rank(lora, p.product), scratch)?;
    }
    Ok(())
}

/// Gradients of [`forward`] for `dy`: into `g` where the weight is trained, into `dx` where it is asked for.
#[allow(clippy::too_many_arguments)]
pub(super) fn backward<B: Backend>(
    dev: &B,
    dx: Option<(&mut Tensor<B>, Write)>,
    g: &mut Linear<Option<Tensor<B>>>,
    dy: &Tensor<B>,
    x: &Tensor<B>,
    t: Option<&Tensor<B>>,
    p: &Linear<Tensor<B>>,
    pass: LoraPass,
    scratch: Option<&mut LoraScratch<B>>,
) -> Result<()> {
    if let Some(dw) = &mut g.w {
        dev.matmul(dw, dy, x, MatMul::TN, 1.0, Write::Add)?;
    }
    if let Some(Some(db)) = &mut g.bias {
        dev.bias_backward(db, dy)?;
    }
    let dx = match dx {
        Some((dx, write)) => {
            dev.matmul(dx, dy, &p.w, MatMul::NN, 1.0, write)?;
            Some(dx)
        }
        None => None,
    };
    if let Some(lora) = &p.lora {
        let (t, scratch) = (t.expect(LORA_MEMORY), scratch.expect(LORA_MEMORY));
        let expected = "a low-rank update has gradients";
        let gl = g.lora.as_mut().expect(expected);
        let (da, db) = (gl.a.as_mut().expect(expected), gl.b.as_mut().expect(expected));
        dev.lora_backward(LowRankGrads { dx, da, db }, dy, x, t, pass.low_rank(lora, p.product), scratch)?;
    }
    Ok(())
}
