//! Activations of one micro-batch and the scratch of forward and backward, allocated once for the largest micro-batch.
//!
//! Kept for backward in each layer: its input, queries, keys and values (rotated), attention output and `lse`, the residual
//! stream between attention and feed-forward, gate and up. Norms and SwiGLU are computed again; that is cheaper than keeping them.

use super::config::ModelConfig;
use super::weights::Product;
use super::{LoraSpec, Recompute, rope};
use crate::backend::{Backend, LoraScratch};
use crate::batch::MicroBatch;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// What activations are allocated for.
#[derive(Clone, Debug, PartialEq)]
pub struct ActsOptions {
    /// Storage of activations: f32 or bf16.
    pub dtype: DType,
    /// What backward computes again.
    pub recompute: Recompute,
    /// The low-rank updates of the weights, if any.
    pub lora: Option<LoraSpec>,
    /// Whether backward will run; without it one layer's memory serves all.
    pub training: bool,
}

/// Norm per head: what backward needs of it.
pub(super) struct HeadNorm<B: Backend> {
    /// Input, (N, heads·D).
    pub x: Tensor<B>,
    /// (N, heads).
    pub rstd: Tensor<B>,
}

/// Attention of one layer.
pub(super) struct AttnActs<B: Backend> {
    pub q: Tensor<B>,   // (N, H*D), rotated
    pub k: Tensor<B>,   // (N, K*D), rotated
    pub v: Tensor<B>,   // (N, K*D)
    pub out: Tensor<B>, // (N, H*D)
    pub lse: Tensor<B>, // (N, H)
    pub q_norm: Option<HeadNorm<B>>,
    pub k_norm: Option<HeadNorm<B>>,
    pub t: [Option<Tensor<B>>; 3], // (N, r) of q, k, v
}

/// What one layer keeps besides its attention: feed-forward, and the low-rank part of the output projection.
pub(super) struct MlpActs<B: Backend> {
    pub gate: Tensor<B>, // (N, F)
    pub up: Tensor<B>,   // (N, F)
    /// (N, r) of o, gate, up, down. That of o is here because it is kept when attention is computed again.
    pub t: [Option<Tensor<B>>; 4],
}

/// Scratch of forward, used again in backward.
pub(super) struct Scratch<B: Backend> {
    pub h: Tensor<B>,    // (N, C), a norm's output
    pub rstd: Tensor<B>, // (N, 1)
    pub act: Tensor<B>,  // (N, F), SwiGLU's output; in backward then dgate
    pub lora: Option<LoraScratch<B>>,
}

/// Scratch of backward.
pub(super) struct BackScratch<B: Backend> {
    pub dres: Tensor<B>, // (N, C), gradient of the residual stream
    pub dh: Tensor<B>,   // (N, C)
    pub dact: Tensor<B>, // (N, F)
    pub dup: Tensor<B>,  // (N, F)
    pub dq: Tensor<B>,   // (N, H*D)
    pub dk: Tensor<B>,   // (N, K*D)
    pub dv: Tensor<B>,   // (N, K*D)
    pub dout: Tensor<B>, // (N, H*D)
    /// Gradients before the norms of q and k.
    pub pre: Option<(Tensor<B>, Tensor<B>)>,
}

/// All activations of a micro-batch of up to `capacity` tokens.
pub struct Acts<B: Backend> {
    pub(super) options: ActsOptions,
    capacity: usize,
    n: usize,
    bytes: usize,
    pub(super) dropout_key: u64,
    pub(super) table: Tensor<B>, // (P, D) f32
    pub(super) tokens: Tensor<B>,
    pub(super) targets: Tensor<B>,
    pub(super) positions: Tensor<B>,
    pub(super) doc_start: Tensor<B>,
    pub(super) x: Vec<Tensor<B>>,   // (N, C), input of each layer, then of the final norm
    pub(super) mid: Vec<Tensor<B>>, // (N, C), between attention and feed-forward
    pub(super) attn: Vec<AttnActs<B>>,
    pub(super) mlp: Vec<MlpActs<B>>,
    pub(super) hidden: Tensor<B>,  // (N, C), output of the final norm
    pub(super) rstd: Tensor<B>,    // (N, 1), of the final norm
    pub(super) loss: Tensor<B>,    // (N, 1) f32
    pub(super) correct: Tensor<B>, // (N, 1) f32
    pub(super) scratch: Scratch<B>,
    pub(super) back: Option<BackScratch<B>>,
}

/// Allocates tensors of one height and counts nothing itself; a shorthand for [`Acts::new`].
struct Alloc<'a, B: Backend> {
    dev: &'a B,
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

    fn i32(&self) -> Result<Tensor<B>> {
        self.dev.alloc(self.n, 1, DType::I32)
    }

    fn low_rank(&self, product: Product) -> Result<Option<Tensor<B>>> {
        self.lora.filter(|l| l.has(product)).map(|l| self.act(l.r)).transpose()
    }

    fn head_norm(&self, c: &ModelConfig, heads: usize) -> Result<Option<HeadNorm<B>>> {
        if !c.qk_norm {
            return Ok(None);
        }
        Ok(Some(HeadNorm { x: self.act(heads * c.heads.head_dim)?, rstd: self.f32(heads)? }))
    }

    fn attn(&self, c: &ModelConfig) -> Result<AttnActs<B>> {
        Ok(AttnActs {
            q: self.act(c.q_dim())?,
            k: self.act(c.kv_dim())?,
            v: self.act(c.kv_dim())?,
            out: self.act(c.q_dim())?,
            lse: self.f32(c.heads.n_query)?,
            q_norm: self.head_norm(c, c.heads.n_query)?,
            k_norm: self.head_norm(c, c.heads.n_kv)?,
            t: [self.low_rank(Product::Q)?, self.low_rank(Product::K)?, self.low_rank(Product::V)?],
        })
    }

    fn mlp(&self, c: &ModelConfig) -> Result<MlpActs<B>> {
        Ok(MlpActs {
            gate: self.act(c.intermediate_size)?,
            up: self.act(c.intermediate_size)?,
            t: [
                self.low_rank(Product::O)?,
                self.low_rank(Product::Gate)?,
                self.low_rank(Product::Up)?,
                self.low_rank(Product::Down)?,
            ],
        })
    }

    fn lora_scratch(&self, c: &ModelConfig) -> Result<Option<LoraScratch<B>>> {
        let Some(lora) = self.lora else { return Ok(None) };
        let widest = c.hidden_size.max(c.intermediate_size).max(c.q_dim());
        let dropped = if lora.dropout > 0.0 { widest } else { 0 };
        Ok(Some(LoraScratch { x: self.act(dropped)?, dx: self.act(dropped)?, u: self.act(lora.r)? }))
    }

    fn back(&self, c: &ModelConfig) -> Result<BackScratch<B>> {
        let pre = match c.qk_norm {
            true => Some((self.act(c.q_dim())?, self.act(c.kv_dim())?)),
            false => None,
        };
        Ok(BackScratch {
            dres: self.act(c.hidden_size)?,
            dh: self.act(c.hidden_size)?,
            dact: self.act(c.intermediate_size)?,
            dup: self.act(c.intermediate_size)?,
            dq: self.act(c.q_dim())?,
            dk: self.act(c.kv_dim())?,
            dv: self.act(c.kv_dim())?,
            dout: self.act(c.q_dim())?,
            pre,
        })
    }
}

impl<B: Backend> Acts<B> {
    /// Allocates everything for micro-batches of up to `max_tokens` tokens.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn new(dev: &B, c: &ModelConfig, max_tokens: usize, options: ActsOptions) -> Result<Self> {
        let keeps_attention = options.training && options.recompute == Recompute::None;
        Self::build(dev, c, max_tokens, options, keeps_attention)
    }

    /// As [`Acts::new`] for a forward pass without gradients that keeps the keys and values of every layer for a cache.
    pub(super) fn for_prefill(dev: &B, c: &ModelConfig, max_tokens: usize, options: ActsOptions) -> Result<Self> {
        Self::build(dev, c, max_tokens, options, true)
    }

    fn build(dev: &B, c: &ModelConfig, max_tokens: usize, options: ActsOptions, keeps_attention: bool) -> Result<Self> {
        let a = Alloc { dev, n: max_tokens, dtype: options.dtype, lora: options.lora.as_ref() };
        let hidden = c.hidden_size;
        let each = |kept: bool| if kept { c.n_layers } else { 1 };
        let keeps_mlp = options.training && options.recompute != Recompute::Layer;
        let streams = if options.training { c.n_layers + 1 } else { 2 };
        let mut table = dev.alloc(max_tokens, c.heads.head_dim, DType::F32)?;
        dev.upload(&mut table, &rope::table(c, max_tokens))?;
        let mut acts = Self {
            capacity: max_tokens,
            n: max_tokens,
            bytes: 0,
            dropout_key: 0,
            table,
            tokens: a.i32()?,
            targets: a.i32()?,
            positions: a.i32()?,
            doc_start: a.i32()?,
            x: (0..streams).map(|_| a.act(hidden)).collect::<Result<_>>()?,
            mid: (0..each(keeps_mlp)).map(|_| a.act(hidden)).collect::<Result<_>>()?,
            attn: (0..each(keeps_attention)).map(|_| a.attn(c)).collect::<Result<_>>()?,
            mlp: (0..each(keeps_mlp)).map(|_| a.mlp(c)).collect::<Result<_>>()?,
            hidden: a.act(hidden)?,
            rstd: a.f32(1)?,
            loss: a.f32(1)?,
            correct: a.f32(1)?,
            scratch: Scratch {
                h: a.act(hidden)?,
                rstd: a.f32(1)?,
                act: a.act(c.intermediate_size)?,
                lora: a.lora_scratch(c)?,
            },
            back: if options.training { Some(a.back(c)?) } else { None },
            options,
        };
        let size = |t: &Tensor<B>| t.capacity() * t.dtype().bytes();
        let lora: usize = acts.scratch.lora.iter().flat_map(|l| [&l.x, &l.dx, &l.u]).map(size).sum();
        let mut bytes = size(&acts.table) + lora;
        acts.for_each_per_token(&mut |t| bytes += size(t));
        acts.bytes = bytes;
        Ok(acts)
    }

    /// Loads a micro-batch; all activations take its number of tokens.
    ///
    /// # Errors
    /// If the device refuses a copy.
    ///
    /// # Panics
    /// If the micro-batch is empty, larger than the capacity, or its vectors disagree in length.
    pub fn load(&mut self, dev: &B, batch: &MicroBatch) -> Result<()> {
        let n = batch.tokens.len();
        assert!(n > 0 && n <= self.capacity, "a micro-batch of {n} tokens; allocated for {}", self.capacity);
        assert!(batch.targets.len() == n && batch.doc_start.len() == n, "vectors of a micro-batch differ in length");
        self.n = n;
        self.for_each_per_token(&mut |t| t.set_rows(n));
        let positions: Vec<i32> = (0i32..).zip(&batch.doc_start).map(|(i, start)| i - start).collect();
        dev.upload_i32(&mut self.tokens, &batch.tokens)?;
        dev.upload_i32(&mut self.targets, &batch.targets)?;
        dev.upload_i32(&mut self.positions, &positions)?;
        dev.upload_i32(&mut self.doc_start, &batch.doc_start)
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
        let mut out = vec![0.0; self.n];
        dev.download(&mut out, &self.loss)?;
        Ok(out)
    }

    /// The tensor behind [`Acts::losses`], (N, 1).
    pub fn loss_tensor(&self) -> &Tensor<B> {
        &self.loss
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

    /// Calls `f` on every tensor that has one row for each token, the scratch of low-rank updates left out: products shape it.
    fn for_each_per_token(&mut self, f: &mut impl FnMut(&mut Tensor<B>)) {
        for t in [&mut self.tokens, &mut self.targets, &mut self.positions, &mut self.doc_start] {
            f(t);
        }
        for t in self.x.iter_mut().chain(&mut self.mid) {
            f(t);
        }
        for a in &mut self.attn {
            for t in [&mut a.q, &mut a.k, &mut a.v, &mut a.out, &mut a.lse] {
                f(t);
            }
            for norm in [&mut a.q_norm, &mut a.k_norm].into_iter().flatten() {
                f(&mut norm.x);
                f(&mut norm.rstd);
            }
            a.t.iter_mut().flatten().for_each(&mut *f);
        }
        for m in &mut self.mlp {
            f(&mut m.gate);
            f(&mut m.up);
            m.t.iter_mut().flatten().for_each(&mut *f);
        }
        for t in [&mut self.hidden, &mut self.rstd, &mut self.loss, &mut self.correct] {
            f(t);
        }
        let s = &mut self.scratch;
        for t in [&mut s.h, &mut s.rstd, &mut s.act] {
            f(t);
        }
        if let Some(b) = &mut self.back {
            for t in [&mut b.dres, &mut b.dh, &mut b.dact, &mut b.dup, &mut b.dq, &mut b.dk, &mut b.dv, &mut b.dout] {
                f(t);
            }
            if let Some((q, k)) = &mut b.pre {
                f(q);
                f(k);
            }
        }
    }
}
