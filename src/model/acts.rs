//! Activations of one micro-batch and the scratch of forward and backward, allocated once for the largest micro-batch.
//!
//! Kept for backward in each layer: its input, queries, keys and values (rotated), attention output and `lse`, the residual
//! stream between attention and feed-forward, gate and up. Norms and SwiGLU are computed again; that is cheaper than keeping them.

use super::attention::{AttnActs, HeadNorm};
use super::config::ModelConfig;
use super::mlp::MlpActs;
use super::weights::Product;
use super::{LoraSpec, Model, Recompute, rope};
use crate::backend::{Backend, ProjectScratch};
use crate::batch::{Batch, BatchIndex, BatchView, MicroBatch};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// What activations are allocated for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ActsOptions {
    /// What backward computes again.
    pub recompute: Recompute,
    /// Whether backward will run; without it one layer's memory serves all.
    pub training: bool,
    /// Micro-batches whose losses are kept side by side: those of a step.
    pub micro_batches: usize,
}

impl ActsOptions {
    /// For forward passes alone.
    pub const FORWARD: Self = Self { recompute: Recompute::None, training: false, micro_batches: 1 };
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

/// All activations of a micro-batch of up to `capacity` tokens.
pub struct Acts<B: Backend> {
    pub(super) recompute: Recompute,
    capacity: usize,
    n: usize,
    bytes: usize,
    index: BatchIndex,
    pub(super) dropout_key: u64,
    pub(super) table: Tensor<B>, // (P, D) f32
    pub(super) batch: Batch<B>,
    pub(super) x: Vec<Tensor<B>>,   // (N, C), input of each layer, then of the final norm
    pub(super) mid: Vec<Tensor<B>>, // (N, C), between attention and feed-forward
    pub(super) attn: Vec<AttnActs<B>>,
    pub(super) mlp: Vec<MlpActs<B>>,
    pub(super) hidden: Tensor<B>,      // (N, C), output of the final norm
    pub(super) rstd: Tensor<B>,        // (N, 1), of the final norm
    pub(super) losses: Vec<Tensor<B>>, // (N, 1) f32, one for each micro-batch of a step
    pub(super) slot: usize,            // which of them is the loaded micro-batch's
    pub(super) correct: Tensor<B>,     // (N, 1) f32
    pub(super) scratch: Scratch<B>,
}

/// Allocates tensors of one height and counts nothing itself; a shorthand for [`Acts::new`].
struct Alloc<'a, B: Backend> {
    dev: &'a B,
    c: &'a ModelConfig,
    n: usize,
    dtype: DType,
    lora: Option<&'a LoraSpec>,
}

impl<B: Backend> Alloc<'_, B> {
    fn act(&self, cols: usize) -> Result<Tensor<B>> {
        self.dev.alloc(self.n, cols, self.dtype)
    }

    fn f32(&self, cols: usize) -> Result<Tensor<B>> {
        self.dev.alloc(self.n, cols, DType::F32)
    }

    fn low_rank(&self, product: Product) -> Result<Option<Tensor<B>>> {
        self.lora.filter(|l| l.has(product)).map(|l| self.act(l.r)).transpose()
    }

    fn head_norm(&self, heads: usize) -> Result<Option<HeadNorm<B>>> {
        if !self.c.qk_norm {
            return Ok(None);
        }
        Ok(Some(HeadNorm { x: self.act(heads * self.c.heads.head_dim)?, rstd: self.f32(heads)? }))
    }

    fn attn(&self) -> Result<AttnActs<B>> {
        let c = self.c;
        Ok(AttnActs {
            q: self.act(c.q_dim())?,
            k: self.act(c.kv_dim())?,
            v: self.act(c.kv_dim())?,
            out: self.act(c.q_dim())?,
            lse: self.f32(c.heads.n_query)?,
            q_norm: self.head_norm(c.heads.n_query)?,
            k_norm: self.head_norm(c.heads.n_kv)?,
            t_q: self.low_rank(Product::Q)?,
            t_k: self.low_rank(Product::K)?,
            t_v: self.low_rank(Product::V)?,
        })
    }

    fn mlp(&self) -> Result<MlpActs<B>> {
        Ok(MlpActs {
            gate: self.act(self.c.intermediate_size)?,
            up: self.act(self.c.intermediate_size)?,
            t_o: self.low_rank(Product::O)?,
            t_gate: self.low_rank(Product::Gate)?,
            t_up: self.low_rank(Product::Up)?,
            t_down: self.low_rank(Product::Down)?,
        })
    }

    fn scratch(&self, training: bool, vocabulary: usize) -> Result<Scratch<B>> {
        let c = self.c;
        let widest = c.hidden_size.max(c.intermediate_size).max(c.q_dim());
        let dropped = if self.lora.is_some_and(|l| l.dropout > 0.0) { widest } else { 0 };
        let u = || self.act(self.lora.map_or(0, |l| l.r));
        Ok(Scratch {
            h: self.act(c.hidden_size)?,
            rstd: self.f32(1)?,
            act: self.act(c.intermediate_size)?,
            project: ProjectScratch { u: [u()?, u()?, u()?], x: self.act(dropped)?, dx: self.act(dropped)? },
            back: if training { Some(self.back(vocabulary)?) } else { None },
        })
    }

    fn back(&self, vocabulary: usize) -> Result<BackScratch<B>> {
        let c = self.c;
        let pre = match c.qk_norm {
            true => Some((self.act(c.q_dim())?, self.act(c.kv_dim())?)),
            false => None,
        };
        Ok(BackScratch {
            dres: self.act(c.hidden_size)?,
            dh: self.act(c.hidden_size)?,
            dact: self.act(c.intermediate_size)?,
            dq: self.act(c.q_dim())?,
            dk: self.act(c.kv_dim())?,
            dv: self.act(c.kv_dim())?,
            dout: self.act(c.q_dim())?,
            pre,
            vocabulary: match vocabulary {
                0 => None,
                rows => Some(self.dev.alloc(rows, c.hidden_size, DType::F32)?),
            },
        })
    }
}

impl<B: Backend> Acts<B> {
    /// Allocates everything for micro-batches of up to `max_tokens` tokens.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn new(dev: &B, model: &Model<B>, max_tokens: usize, options: ActsOptions) -> Result<Self> {
        let keeps_attention = options.training && options.recompute == Recompute::None;
        Self::build(dev, model, max_tokens, options, keeps_attention)
    }

    /// As [`Acts::new`] for a forward pass without gradients that keeps the keys and values of every layer for a cache.
    pub(super) fn for_prefill(dev: &B, model: &Model<B>, max_tokens: usize) -> Result<Self> {
        Self::build(dev, model, max_tokens, ActsOptions::FORWARD, true)
    }

    fn build(
        dev: &B,
        model: &Model<B>,
        max_tokens: usize,
        options: ActsOptions,
        keeps_attention: bool,
    ) -> Result<Self> {
        let ActsOptions { recompute, training, micro_batches } = options;
        let c = &model.config;
        let a = Alloc { dev, c, n: max_tokens, dtype: model.dtype, lora: model.lora.as_ref() };
        let each = |kept: bool| 0..if kept { c.n_layers } else { 1 };
        let keeps_mlp = training && recompute != Recompute::Layer;
        let streams = if training { c.n_layers + 1 } else { 2 };
        let mut table = dev.alloc(max_tokens, c.heads.head_dim, DType::F32)?;
        dev.upload(&mut table, &rope::table(c, max_tokens))?;
        let mut acts = Self {
            recompute,
            capacity: max_tokens,
            n: max_tokens,
            bytes: 0,
            index: BatchIndex::default(),
            dropout_key: 0,
            table,
            batch: dev.new_batch(max_tokens)?,
            x: (0..streams).map(|_| a.act(c.hidden_size)).collect::<Result<_>>()?,
            mid: each(keeps_mlp).map(|_| a.act(c.hidden_size)).collect::<Result<_>>()?,
            attn: each(keeps_attention).map(|_| a.attn()).collect::<Result<_>>()?,
            mlp: each(keeps_mlp).map(|_| a.mlp()).collect::<Result<_>>()?,
            hidden: a.act(c.hidden_size)?,
            rstd: a.f32(1)?,
            losses: (0..micro_batches).map(|_| a.f32(1)).collect::<Result<_>>()?,
            slot: 0,
            correct: a.f32(1)?,
            scratch: a.scratch(training, if micro_batches > 1 { model.vocabulary_rows() } else { 0 })?,
        };
        let size = |t: &Tensor<B>| t.capacity() * t.dtype().bytes();
        let ProjectScratch { u, x, dx } = &acts.scratch.project;
        let vocabulary = acts.scratch.back.iter().flat_map(|b| &b.vocabulary);
        let apart =
            u.iter().chain([x, dx, &acts.table]).chain(acts.batch.tensors()).chain(&acts.losses).chain(vocabulary);
        let mut bytes = apart.map(size).sum();
        acts.for_each_per_token(&mut |t| bytes += size(t));
        acts.bytes = bytes;
        Ok(acts)
    }

    /// Loads the only micro-batch of a pass; all activations take its number of tokens.
    ///
    /// # Errors
    /// If the device refuses a copy.
    ///
    /// # Panics
    /// If the micro-batch is empty, larger than the capacity, or its vectors disagree in length.
    pub fn load(&mut self, dev: &B, batch: &MicroBatch) -> Result<()> {
        self.load_at(dev, 0, batch)
    }

    /// As [`Acts::load`], for micro-batch `slot` of a step: its losses stay until another is loaded there.
    ///
    /// # Errors
    /// As [`Acts::load`].
    ///
    /// # Panics
    /// As [`Acts::load`], or if there are not so many micro-batches.
    pub fn load_at(&mut self, dev: &B, slot: usize, batch: &MicroBatch) -> Result<()> {
        self.slot = slot;
        let mut index = std::mem::take(&mut self.index);
        let loaded = self.load_view(dev, index.view(batch));
        self.index = index;
        loaded
    }

    /// Loads what a view shows.
    pub(super) fn load_view(&mut self, dev: &B, view: BatchView<'_>) -> Result<()> {
        let n = view.tokens.len();
        assert!(n > 0 && n <= self.capacity, "a micro-batch of {n} tokens; allocated for {}", self.capacity);
        self.n = n;
        self.for_each_per_token(&mut |t| t.set_rows(n));
        self.losses[self.slot].set_rows(n);
        dev.load_batch(&mut self.batch, view)
    }

    /// Tokens of the loaded micro-batch.
    pub fn n_tokens(&self) -> usize {
        self.n
    }

    /// Names the dropout masks of the micro-batch: made of seed, step and the micro-batch's number in the step.
    pub fn set_dropout_key(&mut self, key: u64) {
        self.dropout_key = key;
    }

    /// Negative log-likelihood of each token's target, 0 where it has none; as the last loss or backward left it.
    ///
    /// # Errors
    /// If the device refuses the copy.
    pub fn losses(&self, dev: &B) -> Result<Vec<f32>> {
        self.losses_at(dev, self.slot)
    }

    /// The same of micro-batch `slot` of a step.
    ///
    /// # Errors
    /// If the device refuses the copy.
    pub fn losses_at(&self, dev: &B, slot: usize) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.losses[slot].len()];
        dev.download(&mut out, &self.losses[slot])?;
        Ok(out)
    }

    /// The tensor behind [`Acts::losses`], (N, 1).
    pub fn loss_tensor(&self) -> &Tensor<B> {
        &self.losses[self.slot]
    }

    /// The tensor behind [`Acts::corrects`], (N, 1).
    pub fn correct_tensor(&self) -> &Tensor<B> {
        &self.correct
    }

    /// 1 for each token whose target was the arg max, else 0; as the last [`super::loss`] left it.
    ///
    /// # Errors
    /// If the device refuses the copy.
    pub fn corrects(&self, dev: &B) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.n];
        dev.download(&mut out, &self.correct)?;
        Ok(out)
    }

    /// Keys and values of layer `i` after a forward pass that kept them, (N, K·D) each: what a cache is filled with.
    ///
    /// # Panics
    /// If the activations of the layer were not kept.
    pub fn keys_values(&self, i: usize) -> (&Tensor<B>, &Tensor<B>) {
        assert!(self.attn.len() > i, "keys and values of layer {i} were not kept");
        (&self.attn[i].k, &self.attn[i].v)
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Calls `f` on every tensor that has one row for each token, but for those that know their rows from elsewhere: the micro-batch,
    /// the losses of others, the scratch of projections and of the vocabulary.
    fn for_each_per_token(&mut self, f: &mut impl FnMut(&mut Tensor<B>)) {
        for t in self.x.iter_mut().chain(&mut self.mid) {
            f(t);
        }
        for AttnActs { q, k, v, out, lse, q_norm, k_norm, t_q, t_k, t_v } in &mut self.attn {
            [q, k, v, out, lse].into_iter().chain([t_q, t_k, t_v].into_iter().flatten()).for_each(&mut *f);
            for HeadNorm { x, rstd } in [q_norm, k_norm].into_iter().flatten() {
                [x, rstd].into_iter().for_each(&mut *f);
            }
        }
        for MlpActs { gate, up, t_o, t_gate, t_up, t_down } in &mut self.mlp {
            [gate, up].into_iter().chain([t_o, t_gate, t_up, t_down].into_iter().flatten()).for_each(&mut *f);
        }
        [&mut self.hidden, &mut self.rstd, &mut self.correct].into_iter().for_each(&mut *f);
        let Scratch { h, rstd, act, project: _, back } = &mut self.scratch;
        [h, rstd, act].into_iter().for_each(&mut *f);
        if let Some(BackScratch { dres, dh, dact, dq, dk, dv, dout, pre, vocabulary: _ }) = back {
            [dres, dh, dact, dq, dk, dv, dout].into_iter().for_each(&mut *f);
            pre.iter_mut().flat_map(|(q, k)| [q, k]).for_each(f);
        }
    }
}
