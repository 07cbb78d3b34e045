//! What a pass writes and does not keep, and how activations are allocated.

use super::config::ModelConfig;
use super::weights::Product;
use super::{LoraSpec, Model};
use crate::backend::{Backend, Footprint, ProjectScratch};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Allocates the activations of a model for `n` tokens.
#[derive(Clone, Copy)]
pub(super) struct Alloc<'a, B: Backend> {
    pub dev: &'a B,
    pub c: &'a ModelConfig,
    n: usize,
    dtype: DType,
    lora: Option<&'a LoraSpec>,
}

impl<'a, B: Backend> Alloc<'a, B> {
    pub fn new(dev: &'a B, model: &'a Model<B>, n: usize) -> Self {
        Self { dev, c: &model.config, n, dtype: model.dtype, lora: model.lora.as_ref() }
    }

    /// (N, cols) of the activations' type.
    pub fn act(&self, cols: usize) -> Result<Tensor<B>> {
        self.dev.alloc_rows(self.n, cols, self.dtype)
    }

    /// (N, cols) f32.
    pub fn f32(&self, cols: usize) -> Result<Tensor<B>> {
        self.dev.alloc_rows(self.n, cols, DType::F32)
    }

    /// (N, r), where the product has a low-rank update.
    pub fn low_rank(&self, product: Product) -> Result<Option<Tensor<B>>> {
        self.lora.filter(|l| l.has(product)).map(|l| self.act(l.r)).transpose()
    }
}

/// Elements of a token in each of the two buffers of what dropout leaves; 0 without dropout, and where the device needs none.
pub fn dropped_width(device: &Footprint, c: &ModelConfig, dtype: DType, lora: Option<&LoraSpec>) -> usize {
    let widths = [c.hidden_size, c.intermediate_size, c.q_dim(), c.kv_dim()];
    let Some(l) = lora.filter(|l| l.dropout > 0.0) else { return 0 };
    let all = widths.into_iter().chain([l.r]).collect::<Vec<_>>();
    if device.writes_dropped(dtype, &all) { widths[..3].iter().copied().max().unwrap_or(0) } else { 0 }
}

/// Scratch of a pass.
pub(super) struct Scratch<B: Backend> {
    pub h: Tensor<B>,    // (N, C), a norm's output
    pub rstd: Tensor<B>, // (N, 1)
    pub act: Tensor<B>,  // (N, F), SwiGLU's output
    pub project: ProjectScratch<B>,
    pub back: Option<BackScratch<B>>,
}

/// Scratch of backward.
pub(super) struct BackScratch<B: Backend> {
    pub dres: Tensor<B>, // (N, C), gradient of the residual stream
    pub dh: Tensor<B>,   // (N, C)
    pub dact: Tensor<B>, // (N, F); then SwiGLU's output again
    pub dq: Tensor<B>,   // (N, H*D)
    pub dk: Tensor<B>,   // (N, K*D)
    pub dv: Tensor<B>,   // (N, K*D)
    pub dout: Tensor<B>, // (N, H*D)
    /// Gradients before the norms of q and k.
    pub pre: Option<(Tensor<B>, Tensor<B>)>,
    /// (trained rows, C) f32: what this micro-batch adds to the gradient of the embedding or the head, where it is not the only one
    /// of its step. Their operations add token by token and chunk by chunk, and a step's sum is that of its micro-batches, each
    /// formed from zero, whatever the number of ranks that form them.
    pub vocabulary: Option<Tensor<B>>,
}

/// [`Scratch::back`] is asked for by backward alone.
pub(super) const TRAINING: &str = "activations are allocated for training";

impl<B: Backend> Scratch<B> {
    /// `training`: the rows of [`BackScratch::vocabulary`], 0 where there is none; `None` where backward will not run.
    pub fn new(a: &Alloc<'_, B>, training: Option<usize>) -> Result<Self> {
        let c = a.c;
        let dropped = dropped_width(&B::footprint(c.n_classes), c, a.dtype, a.lora);
        let u = || a.act(a.lora.map_or(0, |l| l.r));
        Ok(Self {
            h: a.act(c.hidden_size)?,
            rstd: a.f32(1)?,
            act: a.act(c.intermediate_size)?,
            project: ProjectScratch { u: [u()?, u()?, u()?], x: a.act(dropped)?, dx: a.act(dropped)? },
            back: training.map(|vocabulary| BackScratch::new(a, vocabulary)).transpose()?,
        })
    }

    /// Calls `f` on every tensor that has one row for each token.
    pub fn for_each_per_token(&mut self, f: &mut impl FnMut(&mut Tensor<B>)) {
        let Self { h, rstd, act, project: _, back } = self;
        [h, rstd, act].into_iter().for_each(&mut *f);
        if let Some(BackScratch { dres, dh, dact, dq, dk, dv, dout, pre, vocabulary: _ }) = back {
            [dres, dh, dact, dq, dk, dv, dout].into_iter().for_each(&mut *f);
            pre.iter_mut().flat_map(|(q, k)| [q, k]).for_each(f);
        }
    }
}

impl<B: Backend> BackScratch<B> {
    fn new(a: &Alloc<'_, B>, vocabulary: usize) -> Result<Self> {
        let c = a.c;
        let pre = || -> Result<_> { Ok((a.act(c.q_dim())?, a.act(c.kv_dim())?)) };
        Ok(Self {
            dres: a.act(c.hidden_size)?,
            dh: a.act(c.hidden_size)?,
            dact: a.act(c.intermediate_size)?,
            dq: a.act(c.q_dim())?,
            dk: a.act(c.kv_dim())?,
            dv: a.act(c.kv_dim())?,
            dout: a.act(c.q_dim())?,
            pre: c.qk_norm.then(pre).transpose()?,
            vocabulary: (vocabulary > 0).then(|| a.dev.alloc(vocabulary, c.hidden_size, DType::F32)).transpose()?,
        })
    }
}
