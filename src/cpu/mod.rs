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
mod kept;
mod kernels;
mod level;
mod loss;
mod matmul;
mod norm;
mod optim;
mod pack;
mod pages;
mod peak;
mod project;
mod slabs;
mod threads;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod vector;

#[cfg(test)]
mod testing;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::backend::{
    AdamWSlot, AdamWStep, Attention, AttentionGrads, Backend, Decode, Dropout, Figures, Footprint, HeadGrads, HeadLoss,
    HostStats, Keep, MatMul, Norm, ProjectScratch, Projected, Projection, Rope, Rotate, Swiglu, Write,
};
use crate::batch::Batch;
use crate::ensure;
use crate::error::{Context, Result};
use crate::machine;
use crate::mapped::{FilePart, Mapped};
use crate::measure::{MemoryUse, Nature};
use crate::tensor::{DType, Device, Fill, Tensor};

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
    /// Parts of files that tensors stand in.
    files: Mutex<Vec<Weak<FilePart>>>,
}

impl Cpu {
    /// A device of `threads` threads (`None`: one per available core) at the fastest instruction level of this processor, or the
    /// one that the environment variable `RINGTUNE_CPU` names: see [`Level`].
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
        ensure!(level.is_supported(), "cpu: this machine cannot run level {}", level.name());
        // SAFETY: the level is supported.
        unsafe { Self::with_level_unchecked(threads, level) }
    }

    /// As [`Cpu::with_level`], for a level that nobody asked the processor about.
    ///
    /// # Errors
    /// As [`Cpu::new`].
    ///
    /// # Safety
    /// The level's instructions are carried out: by the processor, or by a handler of the signal that it raises instead.
    pub unsafe fn with_level_unchecked(threads: Option<usize>, level: Level) -> Result<Self> {
        let threads = match threads {
            Some(n) => n,
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        ensure!(threads > 0, "cpu: expected at least 1 thread, found 0");
        let pool = Pool::new(threads).context(|| format!("cpu: cannot start {threads} threads"))?;
        Ok(Self { level, pool, scratch: Mutex::default(), files: Mutex::default() })
    }

    /// The instruction level in use.
    pub fn level(&self) -> Level {
        self.level
    }

    /// That nobody changed the files that tensors stand in.
    fn check_files(&self) -> Result<()> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.retain(|part| part.strong_count() > 0);
        let mut last: *const Mapped = std::ptr::null();
        for part in files.iter().filter_map(Weak::upgrade) {
            // Parts of a file follow each other.
            if !std::ptr::eq(last, part.file()) {
                last = part.file();
                part.file().check_unchanged()?;
            }
        }
        Ok(())
    }

    /// The number of threads in use.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}

/// Operations that a file of this folder does whole, and that cannot fail.
macro_rules! operations {
    ($($op:ident($($arg:ident: $type:ty),*) = $file:ident::$name:ident;)*) => {$(
        fn $op(&self, $($arg: $type),*) -> Result<()> {
            $file::$name(self, $($arg),*);
            Ok(())
        }
    )*};
}

impl Device for Cpu {
    type Buf = CpuBuf;
    type Plan = ();

    fn describe(&self) -> String {
        let threads = self.threads();
        let note =
            Level::note().filter(|_| self.level == Level::fastest()).map_or(String::new(), |n| format!(" ({n})"));
        format!("cpu, {threads} thread{}, {}{note}", if threads == 1 { "" } else { "s" }, self.level.name())
    }

    fn arithmetic(&self) -> String {
        format!("cpu, {}", self.level.name())
    }

    fn alloc(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>> {
        let buf = CpuBuf::zeros(rows * cols * dtype.bytes())?;
        Ok(Tensor::from_buf(buf, rows, cols, dtype))
    }

    fn alloc_rows(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>> {
        let buf = CpuBuf::zeros_in_part(rows * cols * dtype.bytes())?;
        Ok(Tensor::from_buf(buf, rows, cols, dtype))
    }

    fn adopt(&self, part: FilePart, rows: usize, cols: usize, dtype: DType) -> Option<Tensor<Self>> {
        assert_eq!(part.len(), rows * cols * dtype.bytes(), "a tensor of {rows} x {cols} in a file");
        let part = Arc::new(part);
        self.files.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&part));
        Some(Tensor::from_buf(CpuBuf::of_file(part), rows, cols, dtype))
    }

    fn download(&self, dst: &mut [f32], src: &Tensor<Self>) -> Result<()> {
        elementwise::download(self, dst, src);
        src.buf.file().map_or(Ok(()), |part| part.file().check_unchanged())
    }

    fn download_at(&self, dst: &mut [f32], src: &Tensor<Self>, first: usize) -> Result<()> {
        elementwise::download_at(self, dst, src, first);
        src.buf.file().map_or(Ok(()), |part| part.file().check_unchanged())
    }

    fn alloc_together(&self, shapes: &[(usize, usize)], rooms: &[usize], dtype: DType) -> Result<Vec<Tensor<Self>>> {
        let _ = rooms;
        let each = shapes.iter().map(|&(rows, cols)| self.alloc(rows, cols, dtype));
        let mut all: Vec<_> = each.collect::<Result<_>>()?;
        buffer::touch(self, &mut all);
        Ok(all)
    }

    fn upload_i32(&self, dst: &mut Tensor<Self>, src: &[i32]) -> Result<()> {
        buffer::elems_mut::<i32>(dst).copy_from_slice(src);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn measured_peak(&self, dtype: DType) -> Option<f64> {
        // SAFETY: the device's level is carried out here.
        Some(unsafe { peak::measure(self.level, self.threads(), dtype == DType::Bf16) })
    }

    fn nature(&self) -> Nature {
        Nature { cache: machine::last_cache().unwrap_or(0), ..Nature::default() }
    }

    fn memory_use(&self) -> Option<MemoryUse> {
        machine::resident_memory().map(|(now, peak)| MemoryUse { now, peak })
    }

    fn forget_peak(&self) -> bool {
        machine::forget_peak_memory()
    }

    operations! {
        upload(dst: &mut Tensor<Self>, src: &[f32]) = elementwise::upload;
        upload_by(dst: &mut Tensor<Self>, fill: &Fill<'_>) = elementwise::upload_by;
        upload_at(dst: &mut Tensor<Self>, first: usize, src: &[f32]) = elementwise::upload_at;
        fill_zero(dst: &mut Tensor<Self>) = elementwise::fill_zero;
        copy(dst: &mut Tensor<Self>, src: &Tensor<Self>) = elementwise::copy;
    }
}

impl Backend for Cpu {
    type Stats = HostStats;

    fn footprint(_classes: usize) -> Footprint {
        // What is asked of `RINGTUNE_CPU` and cannot run is said where the device is opened.
        let level = Level::detect().unwrap_or_else(|_| Level::fastest());
        Footprint {
            logits_rows: LOGITS_ROWS,
            logits_gradient: false,
            batch_words: 6,
            block: 1,
            fused_multiple: None,
            packed: kept::packed(level),
        }
    }

    fn keep_packed(&self, w: &mut Tensor<Self>, how: Keep) -> Result<usize> {
        kept::keep(self, w, how)
    }

    operations! {
        matmul(c: &mut Tensor<Self>, a: &Tensor<Self>, b: &Tensor<Self>, op: MatMul, alpha: f32, write: Write) = matmul::matmul;
        rmsnorm_forward(out: &mut Tensor<Self>, rstd: &mut Tensor<Self>, x: Norm<'_, Self>) = norm::forward;
        rmsnorm_backward(
            dx: &mut Tensor<Self>, dw: Option<&mut Tensor<Self>>, dout: &Tensor<Self>, rstd: &Tensor<Self>, x: Norm<'_, Self>,
            write: Write
        ) = norm::backward;
        add(dst: &mut Tensor<Self>, src: &Tensor<Self>) = elementwise::add;
        add_bias(dst: &mut Tensor<Self>, b: &Tensor<Self>) = elementwise::add_bias;
        bias_backward(db: &mut Tensor<Self>, dy: &Tensor<Self>) = elementwise::bias_backward;
        gather_rows(dst: &mut Tensor<Self>, src: &Tensor<Self>, rows: &Tensor<Self>) = embedding::gather_rows;
        scatter_rows(dst: &mut Tensor<Self>, src: &Tensor<Self>, rows: &Tensor<Self>) = embedding::scatter_rows;
        embedding_backward(dw: &mut Tensor<Self>, dout: &Tensor<Self>, batch: &Batch<Self>, first_row: usize) = embedding::backward;
        rope(x: &mut Tensor<Self>, by: Rope<'_, Self>, direction: Rotate) = elementwise::rope;
        attention_forward_from(
            out: &mut Tensor<Self>, lse: &mut Tensor<Self>, x: Attention<'_, Self>, first: usize
        ) = attention::forward;
        attention_decode(out: &mut Tensor<Self>, x: Decode<'_, Self>) = attention::decode;
        swiglu_forward(out: &mut Tensor<Self>, x: Swiglu<'_, Self>) = elementwise::swiglu_forward;
        swiglu_backward(gate: &mut Tensor<Self>, up: &mut Tensor<Self>, dact: &mut Tensor<Self>) = elementwise::swiglu_backward;
        dropout(dst: &mut Tensor<Self>, src: &Tensor<Self>, dropout: Dropout) = elementwise::dropout;
    }

    fn attention_forward(&self, out: &mut Tensor<Self>, lse: &mut Tensor<Self>, x: Attention<'_, Self>) -> Result<()> {
        self.attention_forward_from(out, lse, x, 0)
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

    fn project_qkv(
        &self,
        to: &mut [Projected<'_, Self>; 3],
        x: &Tensor<Self>,
        by: &[Projection<'_, Self>; 3],
        rope: Option<Rope<'_, Self>>,
        s: &mut ProjectScratch<Self>,
    ) -> Result<()> {
        project::project_qkv(self, to, x, by, rope, s)
    }

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

    fn linear_cross_entropy(
        &self,
        loss: &mut Tensor<Self>,
        correct: Option<&mut Tensor<Self>>,
        grads: HeadGrads<'_, Self>,
        x: HeadLoss<'_, Self>,
    ) -> Result<()> {
        loss::linear_cross_entropy(self, loss, correct, grads, x)
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

    fn squares(&self, parts: &[(&Tensor<Self>, Range<usize>)]) -> Result<Vec<f64>> {
        Ok(optim::all_blocks(self, parts))
    }

    fn add_squares(&self, s: &mut HostStats, blocks: &[usize], sums: &[f64]) -> Result<()> {
        s.add_squares(blocks, sums);
        Ok(())
    }

    fn set_clip(&self, s: &mut HostStats, max_norm: Option<f64>) -> Result<()> {
        s.set_clip(max_norm);
        Ok(())
    }

    fn adamw_all(&self, s: &HostStats, slots: &mut [AdamWSlot<'_, Self>], step: AdamWStep) -> Result<()> {
        // What came of other weights updates nothing.
        self.check_files()?;
        if s.figures.finite() {
            optim::adamw(self, slots, step, s.clip as f32);
        }
        Ok(())
    }

    fn figures(&self, s: &HostStats) -> Result<Figures> {
        self.check_files()?;
        Ok(s.figures.clone())
    }
}
