//! Products of the layers: forward (NT), gradient of the input (NN), gradient of the weight (TN, added to f32 as in training).

use super::case::{Case, Kernel, Setup, dot};
use super::roofline::Work;
use super::values::Filled;
use super::verify::{Point, Samples, picks};
use crate::backend::{Backend, MatMul, Write};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Rows and columns of C that are verified.
const SAMPLES: usize = 8;

/// What f32 sums of `k` products may be off, relative to their size; with room for tensor cores, which cut off what they add.
pub fn sums(k: usize) -> f64 {
    1e-6 * (k as f64).sqrt() + 1e-6
}

/// C (m, n), k steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

struct Product<B: Backend> {
    /// Whether the maker's library multiplies.
    peer: bool,
    op: MatMul,
    dims: Dims,
    a: Filled<B>,
    b: Filled<B>,
    c: Tensor<B>,
    write: Write,
}

impl<B: Backend> Product<B> {
    /// Row `i` of op(A), column `j` of op(B).
    fn operands(&self, i: usize, j: usize) -> (Vec<f64>, Vec<f64>) {
        let column = |x: &Filled<B>, c: usize| (0..self.dims.k).map(|l| x.m.at(l, c)).collect();
        match self.op {
            MatMul::NT => (self.a.m.row(i), self.b.m.row(j)),
            MatMul::NN => (self.a.m.row(i), column(&self.b, j)),
            MatMul::TN => (column(&self.a, i), column(&self.b, j)),
        }
    }
}

impl<B: Backend> Kernel<B> for Product<B> {
    fn run(&mut self, dev: &B) -> Result<()> {
        match self.peer {
            true => dev.peer_matmul(&mut self.c, &self.a.t, &self.b.t, self.op, self.write),
            false => dev.matmul(&mut self.c, &self.a.t, &self.b.t, self.op, 1.0, self.write),
        }
    }

    fn outputs(&self) -> Vec<&Tensor<B>> {
        vec![&self.c]
    }

    fn samples(&self, _dev: &B, found: &[Vec<f32>]) -> Result<Vec<Samples>> {
        let Dims { m, n, k } = self.dims;
        let mut points = Vec::new();
        for i in picks(m, SAMPLES) {
            for j in picks(n, SAMPLES) {
                let (a, b) = self.operands(i, j);
                points.push(Point { place: (i, j), expected: dot(&a, &b), found: f64::from(found[0][i * n + j]) });
            }
        }
        Ok(vec![Samples { what: "C", dtype: self.c.dtype(), inner: sums(k), points }])
    }
}

/// A product of operands of `dtype`.
pub fn case<B: Backend + 'static>(op: MatMul, of: &str, dims: Dims, dtype: DType) -> Case<B> {
    by("matmul", op, of, dims, dtype)
}

/// Kernel of the cases that the maker's library multiplies.
pub const PEER: &str = "cublaslt";

/// A product by our kernels, or by [`PEER`].
fn by<B: Backend + 'static>(kernel: &'static str, op: MatMul, of: &str, dims: Dims, dtype: DType) -> Case<B> {
    let Dims { m, n, k } = dims;
    let ((ar, ac), (br, bc)) = match op {
        MatMul::NT => ((m, k), (n, k)),
        MatMul::NN => ((m, k), (k, n)),
        MatMul::TN => ((k, m), (k, n)),
    };
    let (result, write) = if op == MatMul::TN { (DType::F32, Write::Add) } else { (dtype, Write::Set) };
    let (operands, c) = ((m * k + k * n) * dtype.bytes(), m * n * result.bytes());
    let passes = if write == Write::Add { 2 } else { 1 };
    Case {
        kernel,
        name: format!("{kernel} {} {of}", format!("{op:?}").to_lowercase()),
        shape: format!("{m} x {n} x {k}"),
        work: Work { flop: 2.0 * m as f64 * n as f64 * k as f64, bytes: (operands + passes * c) as f64 },
        memory: (operands + c) as u64,
        make: Box::new(move |dev, seed| {
            let a = Filled::new(dev, 2 * seed, 1.0, ar, ac, dtype)?;
            let b = Filled::new(dev, 2 * seed + 1, 1.0 / (k as f64).sqrt(), br, bc, dtype)?;
            Ok(Box::new(Product { peer: kernel == PEER, op, dims, a, b, c: dev.alloc(m, n, result)?, write }))
        }),
    }
}

/// The products of a layer.
pub fn cases<B: Backend + 'static>(s: &Setup) -> Vec<Case<B>> {
    layer("matmul", s)
}

/// The same products by the maker's library, and the square one.
pub fn peers<B: Backend + 'static>(s: &Setup, side: usize) -> Vec<Case<B>> {
    let square = by(PEER, MatMul::NT, "square", Dims { m: side, n: side, k: side }, s.dtype);
    std::iter::once(square).chain(layer(PEER, s)).collect()
}

fn layer<B: Backend + 'static>(kernel: &'static str, s: &Setup) -> Vec<Case<B>> {
    let c = &s.config;
    let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
    let weights = [
        ("q", c.q_dim(), hidden),
        ("k, v", c.kv_dim(), hidden),
        ("o", hidden, c.q_dim()),
        ("gate, up", ffn, hidden),
        ("down", hidden, ffn),
    ];
    let mut all = Vec::new();
    for (of, out, wide) in weights {
        // Where it has the shape of q, it is that product.
        if of == "o" && c.q_dim() == hidden {
            continue;
        }
        let t = s.tokens;
        let dims = [
            (MatMul::NT, Dims { m: t, n: out, k: wide }),
            (MatMul::NN, Dims { m: t, n: wide, k: out }),
            (MatMul::TN, Dims { m: out, n: wide, k: t }),
        ];
        let of = if of == "q" && c.q_dim() == hidden { "q, o" } else { of };
        all.extend(dims.map(|(op, dims)| by(kernel, op, of, dims, s.dtype)));
    }
    all
}
