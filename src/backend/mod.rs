//! `trait Backend`: the closed list of operations a device offers. It is the contract of every kernel.
//!
//! Each operation has a file with its arguments, their shapes beside them, and one check of these shapes for all backends.
//!
//! Rules that hold for every operation:
//! - destination first, then sources, then scalars; what is read together is one `Copy` value;
//! - storage is f32 or bf16, accumulation f32 (or wider), one rounding per stored value;
//! - sums run in a fixed order: same inputs, same build, same device, same bits, whatever the number of threads;
//! - per-token vectors (`tokens`, `targets`, `positions`, `doc_start`) are `(N, 1)` tensors of [`DType::I32`];
//! - a shape that disagrees is a bug of ours: a backend calls the operation's `check` first, which panics with the values;
//! - an operation fails if the device refuses the launch or an earlier operation failed on it, and for no other reason.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod dropout;
pub mod elementwise;
pub mod embedding;
pub mod footprint;
pub mod matmul;
pub mod norm;
pub mod project;
pub mod rope;
pub mod stats;
pub mod swiglu;

use std::ops::Range;

use crate::batch::{Batch, BatchView};
use crate::error::{Error, Result};
use crate::tensor::{DType, Device, Tensor};

pub use adamw::{AdamWSlot, AdamWStep};
pub use attention::{Attention, AttentionGrads, Decode, Heads, Mask};
pub use cross_entropy::{HeadGrads, HeadLoss};
pub use dropout::Dropout;
pub use footprint::{Footprint, Keep};
pub use matmul::{MatMul, Write};
pub use norm::Norm;
pub use project::{LowRank, ProjectScratch, Projected, Projection, ProjectionGrads};
pub use rope::{Rope, Rotate};
pub use stats::{Figures, HostStats};
pub use swiglu::Swiglu;

/// What is read together is copied freely, whatever the device: a derive would ask that the device be `Copy` too.
macro_rules! copies {
    ($($name:ident),+) => {$(
        impl<B: Device> Clone for $name<'_, B> {
            fn clone(&self) -> Self {
                *self
            }
        }

        impl<B: Device> Copy for $name<'_, B> {}
    )+};
}
copies!(Attention, Decode, HeadLoss, LowRank, Norm, Projection, Rope, Swiglu);

/// Panics unless the argument `name` of operation `what` has this shape.
#[track_caller]
pub fn expect_shape<B: Device>(what: &str, name: &str, t: &Tensor<B>, shape: (usize, usize)) {
    assert!(t.shape() == shape, "{what}: shape of {name} is {:?}, expected {shape:?}", t.shape());
}

/// Panics unless the argument `name` of operation `what` has this element type.
#[track_caller]
pub fn expect_dtype<B: Device>(what: &str, name: &str, t: &Tensor<B>, dtype: DType) {
    assert!(t.dtype() == dtype, "{what}: element type of {name} is {:?}, expected {dtype:?}", t.dtype());
}

/// A device that trains: every operation. See the module documentation for the rules they share.
///
/// Projections have bodies made of the other operations, which a device replaces by fused ones; see [`project`].
pub trait Backend: Device {
    /// What a step leaves behind, where the device works: see [`stats`].
    type Stats;

    /// What a device of this kind keeps in memory for a model with so many classes.
    fn footprint(classes: usize) -> Footprint;

    /// Before a run starts: `work` queues once everything that the run will, with its largest shapes and all that decide differently. A
    /// device that compiles kernels or takes memory for itself does both now, for all of it, and computes nothing: no result is there to
    /// be read, and tensors keep what they held. Here nothing is done, and `work` not called.
    ///
    /// # Errors
    /// If the device has not enough memory, a kernel does not compile, or `work` fails.
    fn prepare(&self, _work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Ok(())
    }

    /// Before a run: `w` will be multiplied with several times before it changes, as `x wᵀ` and as `dy w`. A device may keep it in the form that its
    /// products read. Gives the bytes that this takes beyond the tensor's own. Here nothing is kept.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn keep_packed(&self, _w: &mut Tensor<Self>, _how: Keep) -> Result<usize> {
        Ok(0)
    }

    /// Memory of a micro-batch of up to `max_tokens` tokens.
    fn new_batch(&self, max_tokens: usize) -> Result<Batch<Self>> {
        let column = || self.alloc(max_tokens, 1, DType::I32);
        Ok(Batch {
            tokens: column()?,
            targets: column()?,
            positions: column()?,
            doc_start: column()?,
            rows: column()?,
            by_token: column()?,
            plan: Self::Plan::default(),
        })
    }

    /// Loads a micro-batch; its tensors take their lengths.
    fn load_batch(&self, to: &mut Batch<Self>, from: BatchView<'_>) -> Result<()> {
        for (column, values) in to.columns(&from) {
            column.set_rows(values.len());
            self.upload_i32(column, values)?;
        }
        Ok(())
    }

    /// `C = alpha · op(A, B)` or `C += alpha · op(A, B)`, see [`MatMul`].
    ///
    /// Operands may be f32 or bf16 in any mix. Two f32 operands multiply in f32; with a bf16 one the f32 other is rounded to
    /// bf16 first. Accumulates in f32; `C` f32 or bf16 is rounded once (`Write::Add` on bf16: sum in f32, then rounded).
    fn matmul(
        &self,
        c: &mut Tensor<Self>,
        a: &Tensor<Self>,
        b: &Tensor<Self>,
        op: MatMul,
        alpha: f32,
        write: Write,
    ) -> Result<()>;

    /// The maker's own library of products, which benches show beside ours: its name and where it is.
    ///
    /// # Errors
    /// Why there is none.
    fn peer(&self) -> Result<String> {
        Err(Error::new("cuBLASLt: it is a library for NVIDIA's GPUs, and the device is none"))
    }

    /// [`Backend::matmul`] of bf16 operands with a factor of 1 by that library.
    ///
    /// # Errors
    /// If there is none, or it refuses the product.
    fn peer_matmul(
        &self,
        _c: &mut Tensor<Self>,
        _a: &Tensor<Self>,
        _b: &Tensor<Self>,
        _op: MatMul,
        _write: Write,
    ) -> Result<()> {
        self.peer().map(|_| ())
    }

    /// Root-mean-square norm over each row: `out = x * rstd * w`, `rstd = 1/sqrt(mean(x²) + eps)`; see [`Norm`].
    fn rmsnorm_forward(&self, out: &mut Tensor<Self>, rstd: &mut Tensor<Self>, x: Norm<'_, Self>) -> Result<()>;

    /// Gradient of [`Backend::rmsnorm_forward`]: `dx` set or added to; `dw` (1, D) f32 `+=` where it is trained.
    fn rmsnorm_backward(
        &self,
        dx: &mut Tensor<Self>,
        dw: Option<&mut Tensor<Self>>,
        dout: &Tensor<Self>,
        rstd: &Tensor<Self>,
        x: Norm<'_, Self>,
        write: Write,
    ) -> Result<()>;

    /// `dst += src`, same shape; the sum is formed in f32 and rounded once.
    fn add(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>) -> Result<()>;

    /// `dst += b` for every row of `dst` (N, C); `b` (1, C).
    fn add_bias(&self, dst: &mut Tensor<Self>, b: &Tensor<Self>) -> Result<()>;

    /// `db += sum over rows of dy`: `db` (1, C) f32, `dy` (N, C).
    fn bias_backward(&self, db: &mut Tensor<Self>, dy: &Tensor<Self>) -> Result<()>;

    /// `dst[i] = src[rows[i]]`: `dst` (n, C), `src` (m, C), `rows` (n, 1) i32 in `0..m`. Same dtype.
    fn gather_rows(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>, rows: &Tensor<Self>) -> Result<()>;

    /// `dst[rows[i]] = src[i]`: the rows are distinct. Same dtype.
    fn scatter_rows(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>, rows: &Tensor<Self>) -> Result<()>;

    /// Token embedding: `out[i] = w[tokens[i]]`; `out` (N, C), `w` (V, C).
    fn embedding_forward(&self, out: &mut Tensor<Self>, w: &Tensor<Self>, tokens: &Tensor<Self>) -> Result<()> {
        self.gather_rows(out, w, tokens)
    }

    /// `dw[tokens[i] - first_row] += dout[i]` in order of i; tokens below `first_row` or beyond `dw` are skipped. `dw` f32.
    fn embedding_backward(
        &self,
        dw: &mut Tensor<Self>,
        dout: &Tensor<Self>,
        batch: &Batch<Self>,
        first_row: usize,
    ) -> Result<()>;

    /// Rotary embedding in place on `x` (N, heads*D); see [`Rope`].
    fn rope(&self, x: &mut Tensor<Self>, by: Rope<'_, Self>, direction: Rotate) -> Result<()>;

    /// Causal attention inside documents: `out` (N, H*D), and `lse` (N, H) f32, natural log; see [`Attention`].
    fn attention_forward(&self, out: &mut Tensor<Self>, lse: &mut Tensor<Self>, x: Attention<'_, Self>) -> Result<()>;

    /// [`Backend::attention_forward`] for whom rows before `first` are of no use: a device need not compute them. Here it does.
    fn attention_forward_from(
        &self,
        out: &mut Tensor<Self>,
        lse: &mut Tensor<Self>,
        x: Attention<'_, Self>,
        _first: usize,
    ) -> Result<()> {
        self.attention_forward(out, lse, x)
    }

    /// Gradient of [`Backend::attention_forward`], whose results are `out` and `lse`, for `dout` (N, H*D). With `rope`, q and k were
    /// rotated before, and dq and dk are rotated back: before their one rounding where a device can, else after it.
    ///
    /// Source: Dao 2023, arXiv:2307.08691, algorithm 2.
    fn attention_backward(
        &self,
        dx: AttentionGrads<'_, Self>,
        dout: &Tensor<Self>,
        out: &Tensor<Self>,
        lse: &Tensor<Self>,
        x: Attention<'_, Self>,
        rope: Option<Rope<'_, Self>>,
    ) -> Result<()>;

    /// Attention of one new token per sequence against a cache: `out` (S, H*D); see [`Decode`].
    fn attention_decode(&self, out: &mut Tensor<Self>, x: Decode<'_, Self>) -> Result<()>;

    /// `out = silu(gate) * up`, all (N, F). Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    fn swiglu_forward(&self, out: &mut Tensor<Self>, x: Swiglu<'_, Self>) -> Result<()>;

    /// Gradient of [`Backend::swiglu_forward`], in place: `gate` and `up` become their gradients, and `dact` becomes what
    /// swiglu_forward gave, which the gradient of the next product needs.
    fn swiglu_backward(&self, gate: &mut Tensor<Self>, up: &mut Tensor<Self>, dact: &mut Tensor<Self>) -> Result<()>;

    /// The head and its loss in chunks of rows; the logits never exist whole and unsupervised rows are skipped.
    ///
    /// - `loss` (N, 1) f32, set: `logsumexp(x·wᵀ) - logit[target]`, 0 on ignored rows.
    /// - `correct` (N, 1) f32, set: 1 where the arg max (lowest index on ties) is the target, else 0.
    /// - `grads`: see [`HeadGrads`].
    fn linear_cross_entropy(
        &self,
        loss: &mut Tensor<Self>,
        correct: Option<&mut Tensor<Self>>,
        grads: HeadGrads<'_, Self>,
        x: HeadLoss<'_, Self>,
    ) -> Result<()>;

    /// `dst = dropout(src)`; see [`Dropout`]. Linear, so it is also its own gradient.
    fn dropout(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>, dropout: Dropout) -> Result<()>;

    /// `y_i = x W_iᵀ + bias_i + s·drop_i(x) A_iᵀ B_iᵀ` of a group that reads one x; `+ residual` for a single one.
    fn project(
        &self,
        to: &mut [Projected<'_, Self>],
        x: &Tensor<Self>,
        by: &[Projection<'_, Self>],
        residual: Option<&Tensor<Self>>,
        s: &mut ProjectScratch<Self>,
    ) -> Result<()> {
        project::project(self, to, x, by, residual, s)
    }

    /// q, k and v; q and k are rotated where `rope` is given (not with norms per head, which come between).
    fn project_qkv(
        &self,
        to: &mut [Projected<'_, Self>; 3],
        x: &Tensor<Self>,
        by: &[Projection<'_, Self>; 3],
        rope: Option<Rope<'_, Self>>,
        s: &mut ProjectScratch<Self>,
    ) -> Result<()> {
        self.project(to, x, by, None, s)?;
        let [q, k, _] = to;
        rope.map_or(Ok(()), |rope| [q, k].into_iter().try_for_each(|to| self.rope(to.y, rope, Rotate::Forward)))
    }

    /// Gate and up, and `act = silu(gate)·up`.
    fn project_gate_up(
        &self,
        act: &mut Tensor<Self>,
        to: &mut [Projected<'_, Self>; 2],
        x: &Tensor<Self>,
        by: &[Projection<'_, Self>; 2],
        s: &mut ProjectScratch<Self>,
    ) -> Result<()> {
        project::project_gate_up(self, act, to, x, by, s)
    }

    /// The `t` of a projection alone, as [`Backend::project`] leaves it: for a layer computed again, whose output nobody reads.
    fn low_rank_t(
        &self,
        t: &mut Tensor<Self>,
        x: &Tensor<Self>,
        by: LowRank<'_, Self>,
        s: &mut ProjectScratch<Self>,
    ) -> Result<()> {
        project::low_rank_t(self, t, x, by, s)
    }

    /// `dx = sum of dy_i W_i + drop_i(u_i A_i)`, set where it is asked for; `u_i = s·dy_i B_i` stays in the scratch;
    /// `dB_i += s·dy_iᵀ t_i`.
    fn project_dx(
        &self,
        dx: Option<&mut Tensor<Self>>,
        grads: &mut [ProjectionGrads<'_, Self>],
        dys: &[&Tensor<Self>],
        ts: &[Option<&Tensor<Self>>],
        by: &[Projection<'_, Self>],
        s: &mut ProjectScratch<Self>,
    ) -> Result<()> {
        project::project_dx(self, dx, grads, dys, ts, by, s)
    }

    /// `dW_i += dy_iᵀ x`, `dbias_i += column sums of dy_i`, `dA_i += u_iᵀ drop_i(x)`, after [`Backend::project_dx`] of the group.
    fn project_dw(
        &self,
        grads: &mut [ProjectionGrads<'_, Self>],
        dys: &[&Tensor<Self>],
        x: &Tensor<Self>,
        by: &[Projection<'_, Self>],
        s: &mut ProjectScratch<Self>,
    ) -> Result<()> {
        project::project_dw(self, grads, dys, x, by, s)
    }

    /// A block of figures, all zero.
    fn new_stats(&self) -> Result<Self::Stats>;

    /// Sets all figures to zero, and the clip factor to 1.
    fn begin_step(&self, s: &mut Self::Stats) -> Result<()>;

    /// Adds the sums of `loss` (N, 1) and `correct` (N, 1), each in f64 and in a fixed order.
    fn add_loss(&self, s: &mut Self::Stats, loss: &Tensor<Self>, correct: Option<&Tensor<Self>>) -> Result<()>;

    /// Adds the sum of the squares of all elements of all tensors, in f64 or a fixed f32 tree.
    fn grad_norm2(&self, s: &mut Self::Stats, grads: &[&Tensor<Self>]) -> Result<()>;

    /// Sums of squares of elements of f32 tensors, in blocks of 16,384 of which each range begins with one: what [`Backend::grad_norm2`]
    /// adds, for a rank that owns a part of the gradient. Waits for the device.
    fn squares(&self, parts: &[(&Tensor<Self>, Range<usize>)]) -> Result<Vec<f64>>;

    /// Adds such sums of the blocks of all ranks, `blocks[i]` of them of tensor i: the bits that [`Backend::grad_norm2`] gives.
    fn add_squares(&self, s: &mut Self::Stats, blocks: &[usize], sums: &[f64]) -> Result<()>;

    /// Sets the clip factor, `min(1, max_norm / (norm + 1e-6))` of the norm so far.
    fn set_clip(&self, s: &mut Self::Stats, max_norm: Option<f64>) -> Result<()>;

    /// One AdamW update of every slot, its gradient times the clip factor; nothing where the figures are not finite.
    fn adamw_all(&self, s: &Self::Stats, slots: &mut [AdamWSlot<'_, Self>], step: AdamWStep) -> Result<()>;

    /// The figures so far: the only wait of a step.
    fn figures(&self, s: &Self::Stats) -> Result<Figures>;
}
