//! Activations of one micro-batch, allocated once for the largest micro-batch.
//!
//! Kept for backward in each layer: its input, queries, keys and values (rotated), attention output and `lse`, the residual
//! stream between attention and feed-forward, gate and up. Norms and SwiGLU are computed again; that is cheaper than keeping them.

use super::attention::AttnActs;
use super::mlp::MlpActs;
use super::scratch::{Alloc, Scratch};
use super::{Model, Recompute, rope};
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
        let a = Alloc::new(dev, model, max_tokens);
        let vocabulary = if micro_batches > 1 { model.vocabulary_rows() } else { 0 };
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
            attn: each(keeps_attention).map(|_| AttnActs::new(&a)).collect::<Result<_>>()?,
            mlp: each(keeps_mlp).map(|_| MlpActs::new(&a)).collect::<Result<_>>()?,
            hidden: a.act(c.hidden_size)?,
            rstd: a.f32(1)?,
            losses: (0..micro_batches).map(|_| a.f32(1)).collect::<Result<_>>()?,
            slot: 0,
            correct: a.f32(1)?,
            scratch: Scratch::new(&a, training.then_some(vocabulary))?,
        };
        let size = |t: &Tensor<B>| t.capacity() * t.dtype().bytes();
        let ProjectScratch { u, x, dx } = &acts.scratch.project;
        let vocabulary = acts.scratch.back.iter().flat_map(|b| &b.vocabulary);
        let apart = u.iter().chain([x, dx, &acts.table]).chain(&acts.losses).chain(vocabulary);
        let mut bytes = apart.map(size).sum::<usize>();
        bytes += max_tokens * B::footprint(c.n_classes).batch_words * size_of::<i32>();
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

    /// Tokens of the largest micro-batch.
    pub fn capacity(&self) -> usize {
        self.capacity
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
        self.attn.iter_mut().for_each(|a| a.for_each(f));
        self.mlp.iter_mut().for_each(|m| m.for_each(f));
        [&mut self.hidden, &mut self.rstd, &mut self.correct].into_iter().for_each(&mut *f);
        self.scratch.for_each_per_token(f);
    }
}
