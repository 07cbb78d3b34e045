//! What the layers of a pass over a micro-batch share.

use super::Model;
use super::config::ModelConfig;
use super::weights::{Linear, Product};
use crate::backend::{Attention, Backend, Dropout, LowRank, Norm, Projection, Rope};
use crate::batch::Batch;
use crate::rng;
use crate::tensor::Tensor;

/// A pass over a micro-batch, at one of its layers.
pub(super) struct Pass<'a, B: Backend> {
    pub dev: &'a B,
    pub c: &'a ModelConfig,
    pub batch: &'a Batch<B>,
    /// (P, D): angles of the rotary embedding.
    pub table: &'a Tensor<B>,
    /// The factor s on the low-rank updates.
    pub scale: f32,
    /// Key of the micro-batch and probability of dropping, where there is dropout.
    pub dropout: Option<(u64, f32)>,
    pub layer: usize,
    /// Whether backward has to reach the layer's input: something below is trained.
    pub needs_input: bool,
}

impl<B: Backend> Clone for Pass<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Pass<'_, B> {}

impl<'a, B: Backend> Pass<'a, B> {
    pub fn new(
        dev: &'a B,
        model: &'a Model<B>,
        batch: &'a Batch<B>,
        table: &'a Tensor<B>,
        dropout: Option<(u64, f32)>,
    ) -> Self {
        let scale = model.lora.as_ref().map_or(0.0, |l| l.scale() as f32);
        Self { dev, c: &model.config, batch, table, scale, dropout, layer: 0, needs_input: true }
    }

    /// The pass at a layer.
    pub fn at(self, layer: usize) -> Self {
        Self { layer, ..self }
    }

    pub fn norm<'b>(&self, x: &'b Tensor<B>, w: &'b Tensor<B>) -> Norm<'b, B> {
        Norm { x, w, eps: self.c.rms_norm_eps as f32 }
    }

    pub fn rope(&self) -> Rope<'a, B> {
        Rope { table: self.table, positions: &self.batch.positions }
    }

    pub fn attention<'b>(&self, q: &'b Tensor<B>, k: &'b Tensor<B>, v: &'b Tensor<B>) -> Attention<'b, B>
    where
        'a: 'b,
    {
        Attention { q, k, v, batch: self.batch, heads: self.c.heads, mask: self.c.mask() }
    }

    /// A product of this layer with its bias and its low-rank update.
    pub fn product<'b>(&self, p: &'b Linear<Tensor<B>>) -> Projection<'b, B> {
        let lora =
            p.lora.as_ref().map(|l| LowRank { a: &l.a, b: &l.b, scale: self.scale, dropout: self.drops(p.product) });
        Projection { w: &p.w, bias: p.bias.as_ref(), lora }
    }

    fn drops(&self, product: Product) -> Option<Dropout> {
        let (key, p) = self.dropout?;
        Some(Dropout { key: rng::mix(&[key, self.layer as u64, product as u64]), p })
    }
}
