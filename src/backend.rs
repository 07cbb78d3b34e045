//! `trait Backend`: the closed list of operations a device offers. It is the contract of every kernel.
//!
//! It stands on [`Device`], a device's memory; [`Products`] and [`Norms`] are apart so that a device whose other
//! kernels are not written yet is already held to them by the same tests. The list is closed all the same: it is this file.
//!
//! Rules that hold for every operation:
//! - destination first, then sources, then scalars;
//! - storage is f32 or bf16, accumulation f32 (or wider), one rounding per stored value;
//! - sums run in a fixed order: same inputs, same build, same device, same bits, whatever the number of threads;
//! - per-token vectors (`tokens`, `targets`, `positions`, `doc_start`) are `(N, 1)` tensors of [`DType::I32`];
//! - a shape or dtype that disagrees is a bug of ours and panics with the values; a device failure is an `Err`.

use crate::error::Result;
use crate::rng::Stream;
use crate::tensor::{Device, Tensor};

/// Which of the two operands of a product is transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MatMul {
    /// `C = A Bᵀ`: A (M, K), B (N, K). Forward with weights stored `[out, in]`.
    NT,
    /// `C = A B`: A (M, K), B (K, N). Gradient of the input.
    NN,
    /// `C = Aᵀ B`: A (K, M), B (K, N). Gradient of the weight.
    TN,
}

/// Whether a destination is overwritten or added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Write {
    /// `dst = sum`.
    Set,
    /// `dst += sum`; the finished sum is added once, never term by term.
    Add,
}

/// Direction of the rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotate {
    /// Rotate by the position's angle.
    Forward,
    /// Rotate back: the gradient of [`Rotate::Forward`].
    Inverse,
}

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

/// Dropout named by a key: element `e` of the flattened input is dropped where the Philox draw at counter `e` is below `p`,
/// and scaled by `1/(1-p)` elsewhere. Nothing is stored; backward draws the same numbers again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Key of the stream: made of (seed, step, micro-batch, layer, target).
    pub key: u64,
    /// Probability of dropping an element, in `[0, 1)`.
    pub p: f32,
}

impl Dropout {
    /// The stream of its draws.
    pub fn stream(&self) -> Stream {
        Stream::new(&[self.key])
    }

    /// Draws below this value drop: `p · 2^32`.
    pub fn threshold(&self) -> u64 {
        (f64::from(self.p) * 4_294_967_296.0) as u64
    }

    /// Whether element `e` is dropped: word `e mod 4` of block `e / 4` of the stream lies below the threshold.
    pub fn drops(&self, e: u64) -> bool {
        u64::from(self.stream().block(e / 4)[(e % 4) as usize]) < self.threshold()
    }
}

/// Scalars of one AdamW step (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; eps outside the corrected root, as torch).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the corrected root.
    pub eps: f32,
    /// Decoupled weight decay: `p *= 1 - lr * weight_decay`; 0 for norms and biases.
    pub weight_decay: f32,
    /// `1 - beta1^t`.
    pub bias_correction1: f32,
    /// `1 - beta2^t`.
    pub bias_correction2: f32,
    /// Factor on the gradient: the clip coefficient.
    pub grad_scale: f32,
}

/// Intermediate tensors of [`Backend::lora_forward`] and [`Backend::lora_backward`], shared by all layers.
pub struct LoraScratch<B: Backend> {
    /// Dropped input, capacity (N, widest input); empty without dropout.
    pub x: Tensor<B>,
    /// Gradient before dropout, the same size; empty without dropout.
    pub dx: Tensor<B>,
    /// `s·dy·B`, (N, largest r), same dtype as the activations.
    pub u: Tensor<B>,
}

/// The loss at the head: what [`Backend::linear_cross_entropy`] reads besides tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropy {
    /// Classes that take part in the softmax: rows `0..n_classes` of the head. Padding rows of the vocabulary stay out.
    pub n_classes: usize,
    /// Factor on the gradients, `1 / (supervised targets of the whole step)`. The losses themselves are not scaled.
    pub scale: f32,
    /// First row of the head that `dw` covers: `dw` is (rows, C) for head rows `dw_first_row ..`.
    pub dw_first_row: usize,
}

/// Products of matrices.
pub trait Products: Device {
    /// `C = alpha · op(A, B)` or `C += alpha · op(A, B)`, see [`MatMul`].
    ///
    /// Operands may be f32 or bf16 in any mix. Two f32 operands multiply in f32; with a bf16 one the f32 other is rounded to
    /// bf16 first. Accumulates in f32; `C` f32 or bf16 is rounded once (`Write::Add` on bf16: sum in f32, then rounded).
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn matmul(
        &self,
        c: &mut Tensor<Self>,
        a: &Tensor<Self>,
        b: &Tensor<Self>,
        op: MatMul,
        alpha: f32,
        write: Write,
    ) -> Result<()>;
}

/// Norms of rows.
pub trait Norms: Device {
    /// Root-mean-square norm over each row: `out = x * rstd * w`, `rstd = 1/sqrt(mean(x²) + eps)`.
    ///
    /// Shapes: `x`, `out` (N, C); `w` (1, D) with D = C, or D dividing C for a norm per head (Qwen3): then each row is C/D
    /// groups with a mean of their own. `rstd` (N, C/D) f32.
    /// Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn rmsnorm_forward(
        &self,
        out: &mut Tensor<Self>,
        rstd: &mut Tensor<Self>,
        x: &Tensor<Self>,
        w: &Tensor<Self>,
        eps: f32,
    ) -> Result<()>;

    /// Gradient of [`Norms::rmsnorm_forward`]: `dx` set or added to; `dw` (1, D) f32 `+=` where it is trained.
    ///
    /// # Errors
    /// If the device refuses the launch.
    #[allow(clippy::too_many_arguments)]
    fn rmsnorm_backward(
        &self,
        dx: &mut Tensor<Self>,
        dw: Option<&mut Tensor<Self>>,
        dout: &Tensor<Self>,
        x: &Tensor<Self>,
        w: &Tensor<Self>,
        rstd: &Tensor<Self>,
        write: Write,
    ) -> Result<()>;
}

/// A device that trains: every operation. See the module documentation for the rules they share.
pub trait Backend: Products + Norms {
    /// `dst += src`, same shape; the sum is formed in f32 and rounded once.
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn add(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>) -> Result<()>;

    /// `dst += b` for every row of `dst` (N, C); `b` (1, C).
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn add_bias(&self, dst: &mut Tensor<Self>, b: &Tensor<Self>) -> Result<()>;

    /// `db += sum over rows of dy`: `db` (1, C) f32, `dy` (N, C).
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn bias_backward(&self, db: &mut Tensor<Self>, dy: &Tensor<Self>) -> Result<()>;

    /// `dst[i] = src[rows[i]]`: `dst` (n, C), `src` (m, C), `rows` (n, 1) i32 in `0..m`. Same dtype.
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn gather_rows(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>, rows: &Tensor<Self>) -> Result<()>;

    /// `dst[rows[i]] = src[i]`: the rows are distinct. Same dtype.
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn scatter_rows(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>, rows: &Tensor<Self>) -> Result<()>;

    /// Token embedding: `out[i] = w[tokens[i]]`; `out` (N, C), `w` (V, C).
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn embedding_forward(&self, out: &mut Tensor<Self>, w: &Tensor<Self>, tokens: &Tensor<Self>) -> Result<()>;

    /// `dw[tokens[i] - first_row] += dout[i]` in order of i; tokens below `first_row` or beyond `dw` are skipped. `dw` f32.
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn embedding_backward(
        &self,
        dw: &mut Tensor<Self>,
        dout: &Tensor<Self>,
        tokens: &Tensor<Self>,
        first_row: usize,
    ) -> Result<()>;

    /// Rotary embedding in place on `x` (N, heads*D): the pair `(x[j], x[j + D/2])` of each head turns by the angle of the
    /// token's position. `table` (P, D) f32 holds cos in columns `0..D/2` and sin in `D/2..D`; `positions` in `0..P`.
    ///
    /// Source: Su et al. 2021, arXiv:2104.09864, eq. 34, in the half-split layout of Hugging Face.
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn rope(
        &self,
        x: &mut Tensor<Self>,
        table: &Tensor<Self>,
        positions: &Tensor<Self>,
        direction: Rotate,
    ) -> Result<()>;

    /// Causal attention inside documents: token i sees `doc_start[i] <= j <= i` (and `j > i - W` with a window).
    ///
    /// Shapes: `q`, `out` (N, H*D); `k`, `v` (N, K*D); `doc_start` (N, 1) i32; `lse` (N, H) f32, natural log.
    /// Source: Dao 2023, arXiv:2307.08691, algorithm 1.
    ///
    /// # Errors
    /// If the device refuses the launch.
    #[allow(clippy::too_many_arguments)]
    fn attention_forward(
        &self,
        out: &mut Tensor<Self>,
        lse: &mut Tensor<Self>,
        q: &Tensor<Self>,
        k: &Tensor<Self>,
        v: &Tensor<Self>,
        doc_start: &Tensor<Self>,
        heads: Heads,
        mask: Mask,
    ) -> Result<()>;

    /// Gradient of [`Backend::attention_forward`]: sets `dq` (N, H*D), `dk`, `dv` (N, K*D).
    ///
    /// Source: Dao 2023, arXiv:2307.08691, algorithm 2.
    ///
    /// # Errors
    /// If the device refuses the launch.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        dq: &mut Tensor<Self>,
        dk: &mut Tensor<Self>,
        dv: &mut Tensor<Self>,
        dout: &Tensor<Self>,
        out: &Tensor<Self>,
        lse: &Tensor<Self>,
        q: &Tensor<Self>,
        k: &Tensor<Self>,
        v: &Tensor<Self>,
        doc_start: &Tensor<Self>,
        heads: Heads,
        mask: Mask,
    ) -> Result<()>;

    /// Attention of one new token per sequence against a cache. `q`, `out` (S, H*D); `k_cache`, `v_cache` (S*capacity, K*D)
    /// with sequence s at rows `s*capacity ..`; `lens` (S, 1) i32: keys present, the new token's own included (last).
    ///
    /// # Errors
    /// If the device refuses the launch.
    #[allow(clippy::too_many_arguments)]
    fn attention_decode(
        &self,
        out: &mut Tensor<Self>,
        q: &Tensor<Self>,
        k_cache: &Tensor<Self>,
        v_cache: &Tensor<Self>,
        lens: &Tensor<Self>,
        heads: Heads,
        mask: Mask,
    ) -> Result<()>;

    /// `out = silu(gate) * up`, all (N, F). Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn swiglu_forward(&self, out: &mut Tensor<Self>, gate: &Tensor<Self>, up: &Tensor<Self>) -> Result<()>;

    /// Gradient of [`Backend::swiglu_forward`]: sets `dgate` and `dup`.
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn swiglu_backward(
        &self,
        dgate: &mut Tensor<Self>,
        dup: &mut Tensor<Self>,
        dout: &Tensor<Self>,
        gate: &Tensor<Self>,
        up: &Tensor<Self>,
    ) -> Result<()>;

    /// The head and its loss in chunks of rows; the logits never exist whole and unsupervised rows are skipped.
    ///
    /// `x` (N, C) final hidden states; `w` (V, C); `targets` (N, 1) i32, the token to predict or [`IGNORE`](crate::batch::IGNORE).
    /// - `loss` (N, 1) f32, set: `logsumexp(x·wᵀ) - logit[target]`, 0 on ignored rows.
    /// - `correct` (N, 1) f32, set: 1 where the arg max (lowest index on ties) is the target, else 0.
    /// - `dx` (N, C), set: `scale · (softmax - onehot) · w`, 0 on ignored rows.
    /// - `dw` (rows, C) f32, `+=`: `scale · (softmax - onehot)ᵀ · x` for head rows `dw_first_row ..`.
    ///
    /// # Errors
    /// If the device refuses the launch.
    #[allow(clippy::too_many_arguments)]
    fn linear_cross_entropy(
        &self,
        loss: &mut Tensor<Self>,
        correct: Option<&mut Tensor<Self>>,
        dx: Option<&mut Tensor<Self>>,
        dw: Option<&mut Tensor<Self>>,
        x: &Tensor<Self>,
        w: &Tensor<Self>,
        targets: &Tensor<Self>,
        how: CrossEntropy,
    ) -> Result<()>;

    /// `dst = dropout(src)`; see [`Dropout`]. Linear, so it is also its own gradient.
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn dropout(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>, dropout: Dropout) -> Result<()>;

    /// Low-rank update `y += scale · dropout(x) Aᵀ Bᵀ`, and `t = dropout(x) Aᵀ` kept for backward.
    ///
    /// Shapes: `x` (N, in), `a` (r, in) f32, `b` (out, r) f32, `t` (N, r), `y` (N, out). Hu et al. 2021, arXiv:2106.09685, eq. 3.
    /// This default composes it from products; a device may fuse it.
    ///
    /// # Errors
    /// If the device refuses a launch.
    #[allow(clippy::too_many_arguments)]
    fn lora_forward(
        &self,
        y: &mut Tensor<Self>,
        t: &mut Tensor<Self>,
        x: &Tensor<Self>,
        a: &Tensor<Self>,
        b: &Tensor<Self>,
        scale: f32,
        dropout: Option<Dropout>,
        scratch: &mut LoraScratch<Self>,
    ) -> Result<()> {
        match dropout {
            Some(d) => {
                scratch.x.set_shape(x.rows(), x.cols());
                self.dropout(&mut scratch.x, x, d)?;
                self.matmul(t, &scratch.x, a, MatMul::NT, 1.0, Write::Set)?;
            }
            None => self.matmul(t, x, a, MatMul::NT, 1.0, Write::Set)?,
        }
        self.matmul(y, t, b, MatMul::NT, scale, Write::Add)
    }

    /// Gradients of [`Backend::lora_forward`]: `da`, `db` (f32) `+=`, `dx +=` where asked.
    ///
    /// # Errors
    /// If the device refuses a launch.
    #[allow(clippy::too_many_arguments)]
    fn lora_backward(
        &self,
        dx: Option<&mut Tensor<Self>>,
        da: &mut Tensor<Self>,
        db: &mut Tensor<Self>,
        dy: &Tensor<Self>,
        x: &Tensor<Self>,
        t: &Tensor<Self>,
        a: &Tensor<Self>,
        b: &Tensor<Self>,
        scale: f32,
        dropout: Option<Dropout>,
        scratch: &mut LoraScratch<Self>,
    ) -> Result<()> {
        // u = s·dy·B, then dB += s·dyᵀ·t, dA += uᵀ·drop(x), dx += drop(u·A).
        scratch.u.set_shape(dy.rows(), a.rows());
        self.matmul(&mut scratch.u, dy, b, MatMul::NN, scale, Write::Set)?;
        self.matmul(db, dy, t, MatMul::TN, scale, Write::Add)?;
        let Some(d) = dropout else {
            self.matmul(da, &scratch.u, x, MatMul::TN, 1.0, Write::Add)?;
            return match dx {
                Some(dx) => self.matmul(dx, &scratch.u, a, MatMul::NN, 1.0, Write::Add),
                None => Ok(()),
            };
        };
        scratch.x.set_shape(x.rows(), x.cols());
        self.dropout(&mut scratch.x, x, d)?;
        self.matmul(da, &scratch.u, &scratch.x, MatMul::TN, 1.0, Write::Add)?;
        if let Some(dx) = dx {
            scratch.dx.set_shape(x.rows(), x.cols());
            self.matmul(&mut scratch.dx, &scratch.u, a, MatMul::NN, 1.0, Write::Set)?;
            self.dropout(&mut scratch.x, &scratch.dx, d)?;
            self.add(dx, &scratch.x)?;
        }
        Ok(())
    }

    /// Sum of the squares of all elements of all tensors, in f64 or a fixed f32 tree. Waits for the device.
    ///
    /// # Errors
    /// If an earlier operation failed.
    fn norm2(&self, tensors: &[&Tensor<Self>]) -> Result<f64>;

    /// One AdamW update. `m`, `v`, `g` f32 of the same shape; `master` f32 where `p` is bf16 (then `p = round(master)`), else
    /// `p` itself is the master. `p` may be taller than `g`: rows `first_row ..` of it are updated, the rest stay.
    ///
    /// # Errors
    /// If the device refuses the launch.
    #[allow(clippy::too_many_arguments)]
    fn adamw(
        &self,
        p: &mut Tensor<Self>,
        master: Option<&mut Tensor<Self>>,
        m: &mut Tensor<Self>,
        v: &mut Tensor<Self>,
        g: &Tensor<Self>,
        step: AdamWStep,
        first_row: usize,
    ) -> Result<()>;
}
