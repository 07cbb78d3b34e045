//! Causal attention inside documents: token i sees `doc_start[i] <= j <= i` (and `j > i - W` with a window).
//!
//! Source: Dao 2023, arXiv:2307.08691, algorithms 1 and 2.

use super::{expect_dtype, expect_shape};
use crate::batch::Batch;
use crate::tensor::{DType, Device, Tensor};

/// Shape of an attention layer. `n_query` is a multiple of `n_kv` (grouped-query attention, Ainslie et al. 2023).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Heads {
    /// Query heads (H).
    pub n_query: usize,
    /// Key and value heads (K).
    pub n_kv: usize,
    /// Width of a head (D).
    pub head_dim: usize,
}

/// Which keys a token may see. Scores are scaled by `1/sqrt(head_dim)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mask {
    /// Sliding window W: token i sees keys `j > i - W` of its own document (Mistral). `None`: all of them.
    pub window: Option<usize>,
}

/// What attention reads, forward and backward alike.
pub struct Attention<'a, B: Device> {
    /// (N, H*D).
    pub q: &'a Tensor<B>,
    /// (N, K*D).
    pub k: &'a Tensor<B>,
    /// (N, K*D).
    pub v: &'a Tensor<B>,
    /// Where its documents begin.
    pub batch: &'a Batch<B>,
    /// H, K and D.
    pub heads: Heads,
    /// Which keys a token sees besides.
    pub mask: Mask,
}

/// Where the gradients of attention go: set.
pub struct AttentionGrads<'a, B: Device> {
    /// (N, H*D).
    pub dq: &'a mut Tensor<B>,
    /// (N, K*D).
    pub dk: &'a mut Tensor<B>,
    /// (N, K*D).
    pub dv: &'a mut Tensor<B>,
}

/// What attention of one new token per sequence reads.
pub struct Decode<'a, B: Device> {
    /// (S, H*D).
    pub q: &'a Tensor<B>,
    /// (S*capacity, K*D), sequence s at rows `s*capacity ..`.
    pub k_cache: &'a Tensor<B>,
    /// (S*capacity, K*D).
    pub v_cache: &'a Tensor<B>,
    /// (S, 1) i32: keys present, the new token's own included (last).
    pub lens: &'a Tensor<B>,
    /// H, K and D.
    pub heads: Heads,
    /// Which keys a token sees besides.
    pub mask: Mask,
}

impl Heads {
    /// H*D and K*D, once the key heads divide the query heads.
    fn widths(self, what: &str) -> (usize, usize) {
        let Heads { n_query, n_kv, head_dim } = self;
        assert!(n_kv > 0 && n_query % n_kv == 0, "{what}: {n_query} query heads share {n_kv} key heads");
        (n_query * head_dim, n_kv * head_dim)
    }
}

impl<B: Device> Attention<'_, B> {
    /// Panics unless the shapes agree: `like_q` are of q's shape, `lse` is (N, H) f32.
    pub fn check(&self, what: &str, like_q: &[(&str, &Tensor<B>)], lse: &Tensor<B>) {
        let (n, (wide, narrow)) = (self.q.rows(), self.heads.widths(what));
        for (name, t) in like_q.iter().chain(&[("q", self.q)]) {
            expect_shape(what, name, t, (n, wide));
        }
        expect_shape(what, "k", self.k, (n, narrow));
        expect_shape(what, "v", self.v, (n, narrow));
        expect_shape(what, "doc_start", &self.batch.doc_start, (n, 1));
        expect_shape(what, "lse", lse, (n, self.heads.n_query));
        expect_dtype(what, "lse", lse, DType::F32);
    }
}

impl<B: Device> AttentionGrads<'_, B> {
    /// Panics unless these and what backward reads have the shapes of `x`.
    pub fn check(&self, what: &str, dout: &Tensor<B>, out: &Tensor<B>, lse: &Tensor<B>, x: Attention<'_, B>) {
        x.check(what, &[("dq", self.dq), ("dout", dout), ("out", out)], lse);
        expect_shape(what, "dk", self.dk, x.k.shape());
        expect_shape(what, "dv", self.dv, x.k.shape());
    }
}

impl<B: Device> Decode<'_, B> {
    /// Rows of the cache for each sequence, once the shapes agree with `out` (S, H*D).
    pub fn check(&self, what: &str, out: &Tensor<B>) -> usize {
        let (n, (wide, narrow)) = (self.q.rows(), self.heads.widths(what));
        expect_shape(what, "q", self.q, (n, wide));
        expect_shape(what, "out", out, (n, wide));
        expect_shape(what, "lens", self.lens, (n, 1));
        let rows = self.k_cache.rows();
        let divides = rows.is_multiple_of(n);
        assert!(divides, "{what}: shape of k_cache is {:?} for {n} sequences", self.k_cache.shape());
        expect_shape(what, "k_cache", self.k_cache, (rows, narrow));
        expect_shape(what, "v_cache", self.v_cache, (rows, narrow));
        rows.checked_div(n).unwrap_or(0)
    }
}
