//! The native CPU backend: every operation of [`Backend`] on all cores, vectorised for what the processor has.
//!
//! Results depend neither on the number of threads nor on where in a micro-batch a row or a document stands: work is cut by
//! shape, and every element is one fixed chain of sums. They may differ in the last bits between instruction levels.

mod attention;
mod attention_backward;
mod attention_blocks;
mod attention_forward;
mod buffer;
mod elem;
mod elementwise;
mod embedding;
mod kernels;
mod level;
mod loss;
mod matmul;
mod norm;
mod optim;
mod pack;
#[cfg(target_arch = "x86_64")]
mod pack_avx512;
mod threads;
mod vector;

#[cfg(test)]
mod testing;

use std::sync::Mutex;

use crate::backend::{
    AdamWSlot, AdamWStep, Attention, AttentionGrads, Backend, Decode, Dropout, Figures, HeadGrads, HeadLoss, HostStats,
    MatMul, Norm, Norms, Products, Rope, Rotate, Swiglu, Write,
};
use crate::batch::Batch;
use crate::ensure;
use crate::error::{Context, Result};
use crate::tensor::{DType, Device, Tensor};

pub use buffer::CpuBuf;
pub use level::Level;
pub use loss::CHUNK as LOGITS_ROWS;
use threads::Pool;

/// The processor's cores and memory as a device.
pub struct Cpu {
    level: Level,
    pool: Pool,
    /// Packed operands and other intermediates of one operation, kept between operations.
    scratch: Mutex<matmul::Scratch>,
}

impl Cpu {
    /// A device of `threads` threads (`None`: one per available core) at the best instruction level of this processor, or
    /// the one that the environment variable `RINGTUNE_CPU` names: `portable`, `avx2`, `avx512`, `avx512bf16`.
    ///
    /// # Errors
    /// If `threads` is zero, the system refuses a thread, or `RINGTUNE_CPU` asks for what the processor lacks.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        Self::with_level(threads, Level::detect()?)
    }

    /// A device at a given instruction level.
    ///
    /// # Errors
    /// As [`Cpu::new`].
    pub fn with_level(threads: Option<usize>, level: Level) -> Result<Self> {
        ensure!(level.is_supported(), "cpu: this processor cannot run level {}", level.name());
        let threads = match threads {
            Some(n) => n,
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        ensure!(threads > 0, "cpu: expected at least 1 thread, found 0");
        let pool = Pool::new(threads).context(|| format!("cpu: cannot start {threads} threads"))?;
        Ok(Self { level, pool, scratch: Mutex::new(matmul::Scratch::default()) })
    }

    /// The instruction level in use.
    pub fn level(&self) -> Level {
        self.level
    }

    /// The number of threads in use.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}

impl Device for Cpu {
    type Buf = CpuBuf;
    type Plan = ();

    fn describe(&self) -> String {
        let threads = self.threads();
        format!("cpu, {threads} thread{}, {}", if threads == 1 { "" } else { "s" }, self.level.name())
    }

    fn alloc(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>> {
        let buf = CpuBuf::zeros(rows * cols * dtype.bytes())?;
        Ok(Tensor::from_buf(buf, rows, cols, dtype))
    }

    fn upload(&self, dst: &mut Tensor<Self>, src: &[f32]) -> Result<()> {
        elementwise::upload(self, dst, src);
        Ok(())
    }

    fn upload_i32(&self, dst: &mut Tensor<Self>, src: &[i32]) -> Result<()> {
        buffer::i32s_mut(dst).copy_from_slice(src);
        Ok(())
    }

    fn download(&self, dst: &mut [f32], src: &Tensor<Self>) -> Result<()> {
        elementwise::download(self, dst, src);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn fill_zero(&self, dst: &mut Tensor<Self>) -> Result<()> {
        elementwise::fill_zero(self, dst);
        Ok(())
    }

    fn copy(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>) -> Result<()> {
        elementwise::copy(self, dst, src);
        Ok(())
    }
}

impl Products for Cpu {
    fn matmul(
        &self,
        c: &mut Tensor<Self>,
        a: &Tensor<Self>,
        b: &Tensor<Self>,
        op: MatMul,
        alpha: f32,
        write: Write,
    ) -> Result<()> {
        matmul::matmul(self, c, a, b, op, alpha, write);
        Ok(())
    }
}

impl Norms for Cpu {
    fn rmsnorm_forward(&self, out: &mut Tensor<Self>, rstd: &mut Tensor<Self>, x: Norm<'_, Self>) -> Result<()> {
        norm::forward(self, out, rstd, x);
        Ok(())
    }

    fn rmsnorm_backward(
        &self,
        dx: &mut Tensor<Self>,
        dw: Option<&mut Tensor<Self>>,
        dout: &Tensor<Self>,
        rstd: &Tensor<Self>,
        x: Norm<'_, Self>,
        write: Write,
    ) -> Result<()> {
        norm::backward(self, dx, dw, dout, rstd, x, write);
        Ok(())
    }
}

impl Backend for Cpu {
    type Stats = HostStats;

    fn add(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>) -> Result<()> {
        elementwise::add(self, dst, src);
        Ok(())
    }

    fn add_bias(&self, dst: &mut Tensor<Self>, b: &Tensor<Self>) -> Result<()> {
        elementwise::add_bias(self, dst, b);
        Ok(())
    }

    fn bias_backward(&self, db: &mut Tensor<Self>, dy: &Tensor<Self>) -> Result<()> {
        elementwise::bias_backward(self, db, dy);
        Ok(())
    }

    fn gather_rows(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>, rows: &Tensor<Self>) -> Result<()> {
        embedding::gather_rows(self, dst, src, rows);
        Ok(())
    }

    fn scatter_rows(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>, rows: &Tensor<Self>) -> Result<()> {
        embedding::scatter_rows(dst, src, rows);
        Ok(())
    }

    fn embedding_backward(
        &self,
        dw: &mut Tensor<Self>,
        dout: &Tensor<Self>,
        batch: &Batch<Self>,
        first_row: usize,
    ) -> Result<()> {
        embedding::backward(self, dw, dout, batch, first_row);
        Ok(())
    }

    fn rope(&self, x: &mut Tensor<Self>, by: Rope<'_, Self>, direction: Rotate) -> Result<()> {
        elementwise::rope(self, x, by, direction);
        Ok(())
    }

    fn attention_forward(&self, out: &mut Tensor<Self>, lse: &mut Tensor<Self>, x: Attention<'_, Self>) -> Result<()> {
        attention::forward(self, out, lse, x);
        Ok(())
    }

    fn attention_backward(
        &self,
        dx: AttentionGrads<'_, Self>,
        dout: &Tensor<Self>,
        out: &Tensor<Self>,
        lse: &Tensor<Self>,
        x: Attention<'_, Self>,
        rope: Option<Rope<'_, Self>>,
    ) -> Result<()> {
        let AttentionGrads { dq, dk, dv } = dx;
        attention::backward(self, AttentionGrads { dq, dk, dv }, dout, out, lse, x);
        rope.map_or(Ok(()), |rope| [dq, dk].into_iter().try_for_each(|dx| self.rope(dx, rope, Rotate::Inverse)))
    }

    fn attention_decode(&self, out: &mut Tensor<Self>, x: Decode<'_, Self>) -> Result<()> {
        attention::decode(self, out, x);
        Ok(())
    }

    fn swiglu_forward(&self, out: &mut Tensor<Self>, x: Swiglu<'_, Self>) -> Result<()> {
        elementwise::swiglu_forward(self, out, x);
        Ok(())
    }

    fn swiglu_backward(&self, gate: &mut Tensor<Self>, up: &mut Tensor<Self>, dact: &mut Tensor<Self>) -> Result<()> {
        elementwise::swiglu_backward(self, gate, up, dact);
        Ok(())
    }

    fn linear_cross_entropy(
        &self,
        loss: &mut Tensor<Self>,
        correct: Option<&mut Tensor<Self>>,
        grads: HeadGrads<'_, Self>,
        x: HeadLoss<'_, Self>,
    ) -> Result<()> {
        loss::linear_cross_entropy(self, loss, correct, grads, x)
    }

    fn dropout(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>, dropout: Dropout) -> Result<()> {
        elementwise::dropout(self, dst, src, dropout);
        Ok(())
    }

    fn new_stats(&self) -> Result<HostStats> {
        Ok(HostStats::default())
    }

    fn begin_step(&self, s: &mut HostStats) -> Result<()> {
        *s = HostStats::default();
        Ok(())
    }

    fn add_loss(&self, s: &mut HostStats, loss: &Tensor<Self>, correct: Option<&Tensor<Self>>) -> Result<()> {
        s.add_loss(self, loss, correct)
    }

    fn grad_norm2(&self, s: &mut HostStats, grads: &[&Tensor<Self>]) -> Result<()> {
        s.figures.grad_norm2 += optim::norm2(self, grads);
        Ok(())
    }

    fn set_clip(&self, s: &mut HostStats, max_norm: Option<f64>) -> Result<()> {
        s.set_clip(max_norm);
        Ok(())
    }

    fn adamw_all(&self, s: &HostStats, slots: &mut [AdamWSlot<'_, Self>], step: AdamWStep) -> Result<()> {
        if s.figures.finite() {
            slots.iter_mut().for_each(|slot| optim::adamw(self, slot, step, s.clip as f32));
        }
        Ok(())
    }

    fn figures(&self, s: &HostStats) -> Result<Figures> {
        Ok(s.figures.clone())
    }
}
