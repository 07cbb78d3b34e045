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

impl<B: Device> Clone for Attention<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Device> Copy for Attention<'_, B> {}

impl<B: Device> Clone for Decode<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Device> Copy for Decode<'_, B> {}

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::testing::{Shapes, batch, each_wrong_shape_is_refused, f32s, refuses};

    const HEADS: Heads = Heads { n_query: 4, n_kv: 2, head_dim: 8 };
    const MASK: Mask = Mask { window: None };
    const F: DType = DType::F32;
    const I: DType = DType::I32;

    fn grads(t: &[Tensor<Shapes>], f: impl FnOnce(AttentionGrads<'_, Shapes>)) {
        let copy = |t: &Tensor<Shapes>| f32s(t.rows(), t.cols());
        let (mut dq, mut dk, mut dv) = (copy(&t[0]), copy(&t[1]), copy(&t[2]));
        f(AttentionGrads { dq: &mut dq, dk: &mut dk, dv: &mut dv });
    }

    #[test]
    fn every_wrong_shape_is_refused() {
        // The rows of q decide the others, so another q is seen in its width and in them.
        let (q, batch, other) = (f32s(5, 32), batch(5), batch(6));
        let arguments = [
            ("dq", (5, 32), F),
            ("dk", (5, 16), F),
            ("dv", (5, 16), F),
            ("dout", (5, 32), F),
            ("out", (5, 32), F),
            ("lse", (5, 4), F),
            ("k", (5, 16), F),
            ("v", (5, 16), F),
        ];
        each_wrong_shape_is_refused(&arguments, |t| {
            let x = Attention { q: &q, k: &t[6], v: &t[7], batch: &batch, heads: HEADS, mask: MASK };
            grads(t, |dx| dx.check("backward", &t[3], &t[4], &t[5], x));
        });
        let (q, k) = (f32s(5, 33), f32s(5, 16));
        let x = Attention { q: &q, k: &k, v: &k, batch: &batch, heads: HEADS, mask: MASK };
        refuses("shape of q", || x.check("forward", &[], &f32s(5, 4)));
        let q = f32s(5, 32);
        refuses("shape of doc_start", || Attention { q: &q, batch: &other, ..x }.check("forward", &[], &f32s(5, 4)));
        let three = Heads { n_kv: 3, ..HEADS };
        refuses("4 query heads share 3", || Attention { heads: three, ..x }.check("forward", &[], &f32s(5, 4)));
    }

    #[test]
    fn every_wrong_shape_of_decoding_is_refused() {
        let q = f32s(3, 32);
        let arguments = [("out", (3, 32), F), ("k_cache", (30, 16), F), ("v_cache", (30, 16), F), ("lens", (3, 1), I)];
        each_wrong_shape_is_refused(&arguments, |t| {
            let x = Decode { q: &q, k_cache: &t[1], v_cache: &t[2], lens: &t[3], heads: HEADS, mask: MASK };
            assert_eq!(x.check("decode", &t[0]), 10);
        });
    }
}
