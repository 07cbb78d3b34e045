//! The CUDA backend: kernels of `kernels/`, compiled at run time by NVRTC for the device that is there, behind the traits of
//! [`crate::backend`].
//!
//! A file an operation has its source, entries and launches. Everything runs in one stream, in the order of the calls, but for micro-batches, which
//! `upload` copies ahead in another; what a call reports may be the failure of an earlier one.

pub mod adamw;
pub mod attention;
pub mod attention_tiles;
mod behind;
pub mod cast;
pub mod collectives;
pub mod compile;
pub mod cross_entropy;
mod cublaslt;
mod device;
pub mod device_library;
pub mod dropout;
pub mod elementwise;
mod error;
pub mod fold;
mod group;
pub mod kernels;
mod launch;
pub mod library;
pub mod lora;
pub mod matmul;
pub mod matmul_sm90;
mod measure;
mod memory;
mod modules;
pub mod nccl;
pub mod norm;
pub mod nvrtc;
mod operands;
mod pieces;
mod pinned;
mod plan;
mod prepare;
pub mod project;
pub mod project_sm90;
mod rehearsal;
pub mod rope;
pub mod rows;
pub mod stats;
pub mod swiglu;
mod tables;
mod tensor_map;
pub mod tiles;
mod timings;
mod upload;

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::backend::elementwise::check_same;
use crate::backend::{
    AdamWSlot, AdamWStep, Attention, AttentionGrads, Backend, Decode, Dropout, Figures, Footprint, HeadGrads, HeadLoss,
    LowRank, MatMul, Norm, ProjectScratch, Projected, Projection, ProjectionGrads, Rope, Rotate, Swiglu, Write,
};
use crate::batch::{Batch, BatchView};
use crate::error::Result;
use crate::measure::{MemoryUse, Nature, Tally, sheets};
use crate::tensor::{DType, Device, Tensor};

pub use device::{Cuda, Properties, properties};
pub use memory::CudaBuf;
pub use plan::Plan;
pub use stats::CudaStats;

/// What widths and ranks of projections are multiples of where kernels take a group whole.
const FUSED_MULTIPLE: usize = 8;

/// Every configuration of every kernel that an architecture (major · 10 + minor) may be asked to run.
pub fn configurations(cc: u32) -> Vec<kernels::Configuration> {
    let always = [
        adamw::all(),
        attention::all(),
        cast::all(),
        cross_entropy::all(),
        dropout::all(),
        elementwise::all(),
        lora::all(),
        norm::all(),
        rope::all(),
        rows::all(),
        stats::all(),
        swiglu::all(),
        fold::all(),
    ];
    [
        always.concat(),
        attention_tiles::all(cc),
        matmul::all(cc),
        matmul_sm90::all(cc),
        project::all(cc),
        project_sm90::all(cc),
    ]
    .concat()
}

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device for Cuda {
    type Buf = CudaBuf;
    type Plan = Plan;

    fn describe(&self) -> String {
        let p = self.properties();
        format!("cuda:{}, {}, sm_{}, {:.1} GiB", p.ordinal, p.name, p.cc, p.memory as f64 / f64::from(1 << 30))
    }

    fn arithmetic(&self) -> String {
        // An emulated GPU has its number in its name, which decides nothing.
        let p = self.properties();
        let name = p.name.strip_prefix(&format!("vgpu {} ", p.ordinal)).map(|kind| format!("vgpu {kind}"));
        format!("cuda, {}, {}", name.as_deref().unwrap_or(&p.name), self.target())
    }

    fn alloc(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>> {
        self.allocate(rows, cols, dtype)
    }

    fn free_memory(&self) -> Option<u64> {
        self.memory().ok().map(|(free, _)| free as u64)
    }

    fn peak_flops(&self, dtype: DType) -> Option<f64> {
        let p = self.properties();
        sheets::of(&p.name).filter(|_| dtype == DType::Bf16 && !p.emulated).map(|sheet| sheet.flops)
    }

    fn nature(&self) -> Nature {
        measure::nature(self)
    }

    fn tally(&self) -> Option<Tally> {
        Some(measure::tally(self))
    }

    fn memory_use(&self) -> Option<MemoryUse> {
        measure::memory_use(self)
    }

    fn forget_peak(&self) -> bool {
        measure::forget_peak(self)
    }

    fn timed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        measure::timed(self, work)
    }

    fn upload(&self, dst: &mut Tensor<Self>, src: &[f32]) -> Result<()> {
        self.upload_values(dst, src)
    }

    fn upload_i32(&self, dst: &mut Tensor<Self>, src: &[i32]) -> Result<()> {
        self.upload_integers(dst, src)
    }

    fn download(&self, dst: &mut [f32], src: &Tensor<Self>) -> Result<()> {
        self.download_values(dst, src)
    }

    fn upload_at(&self, dst: &mut Tensor<Self>, first: usize, src: &[f32]) -> Result<()> {
        self.upload_values_at(dst, first, src)
    }

    fn download_at(&self, dst: &mut [f32], src: &Tensor<Self>, first: usize) -> Result<()> {
        self.download_values_at(dst, src, first)
    }

    fn synchronize(&self) -> Result<()> {
        self.wait()
    }

    fn fill_zero(&self, dst: &mut Tensor<Self>) -> Result<()> {
        self.zero(dst)
    }

    fn fill_zeros(&self, all: &mut [&mut Tensor<Self>]) -> Result<()> {
        self.zero_all(all)
    }

    fn alloc_together(&self, shapes: &[(usize, usize)], rooms: &[usize], dtype: DType) -> Result<Vec<Tensor<Self>>> {
        self.allocate_together(shapes, rooms, dtype)
    }

    fn copy(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>) -> Result<()> {
        check_same("copy", dst, src);
        if src.is_empty() {
            return Ok(());
        }
        if dst.dtype() == src.dtype() { self.copy_bytes(dst, src) } else { cast::cast(self, dst, src) }
    }
}

/// Operations that a file of this folder does whole.
macro_rules! operations {
    ($($op:ident($($arg:ident: $type:ty),*) = $file:ident::$name:ident;)*) => {$(
        fn $op(&self, $($arg: $type),*) -> Result<()> {
            $file::$name(self, $($arg),*)
        }
    )*};
}

impl Backend for Cuda {
    type Stats = CudaStats;

    fn footprint(classes: usize) -> Footprint {
        Footprint {
            logits_rows: cross_entropy::chunk_rows(classes),
            logits_gradient: true,
            batch_words: plan::SLOTS * plan::TOKEN_WORDS,
            block: stats::CHUNK,
            fused_multiple: Some(FUSED_MULTIPLE),
            packed: None,
        }
    }

    fn prepare(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        prepare::prepare(self, work)
    }

    fn new_batch(&self, max_tokens: usize) -> Result<Batch<Self>> {
        plan::new_batch(self, max_tokens)
    }

    operations! {
        load_batch(to: &mut Batch<Self>, from: BatchView<'_>) = plan::load_batch;
        matmul(c: &mut Tensor<Self>, a: &Tensor<Self>, b: &Tensor<Self>, op: MatMul, alpha: f32, write: Write) = matmul::matmul;
        rmsnorm_forward(out: &mut Tensor<Self>, rstd: &mut Tensor<Self>, x: Norm<'_, Self>) = norm::forward;
        rmsnorm_backward(
            dx: &mut Tensor<Self>, dw: Option<&mut Tensor<Self>>, dout: &Tensor<Self>, rstd: &Tensor<Self>, x: Norm<'_, Self>,
            write: Write
        ) = norm::backward;
        add(dst: &mut Tensor<Self>, src: &Tensor<Self>) = elementwise::add;
        add_bias(dst: &mut Tensor<Self>, b: &Tensor<Self>) = elementwise::add_bias;
        bias_backward(db: &mut Tensor<Self>, dy: &Tensor<Self>) = elementwise::bias_backward;
        gather_rows(dst: &mut Tensor<Self>, src: &Tensor<Self>, rows: &Tensor<Self>) = rows::gather;
        scatter_rows(dst: &mut Tensor<Self>, src: &Tensor<Self>, rows: &Tensor<Self>) = rows::scatter;
        embedding_backward(dw: &mut Tensor<Self>, dout: &Tensor<Self>, batch: &Batch<Self>, first_row: usize) = rows::backward;
        rope(x: &mut Tensor<Self>, by: Rope<'_, Self>, direction: Rotate) = rope::rope;
        attention_forward(out: &mut Tensor<Self>, lse: &mut Tensor<Self>, x: Attention<'_, Self>) = attention::forward;
        attention_backward(
            dx: AttentionGrads<'_, Self>, dout: &Tensor<Self>, out: &Tensor<Self>, lse: &Tensor<Self>, x: Attention<'_, Self>,
            rope: Option<Rope<'_, Self>>
        ) = attention::backward;
        attention_decode(out: &mut Tensor<Self>, x: Decode<'_, Self>) = attention::decode;
        swiglu_forward(out: &mut Tensor<Self>, x: Swiglu<'_, Self>) = swiglu::forward;
        swiglu_backward(gate: &mut Tensor<Self>, up: &mut Tensor<Self>, dact: &mut Tensor<Self>) = swiglu::backward;
        linear_cross_entropy(
            loss: &mut Tensor<Self>, correct: Option<&mut Tensor<Self>>, grads: HeadGrads<'_, Self>, x: HeadLoss<'_, Self>
        ) = cross_entropy::linear_cross_entropy;
        dropout(dst: &mut Tensor<Self>, src: &Tensor<Self>, dropout: Dropout) = dropout::dropout;
        project(
            to: &mut [Projected<'_, Self>], x: &Tensor<Self>, by: &[Projection<'_, Self>], residual: Option<&Tensor<Self>>,
            s: &mut ProjectScratch<Self>
        ) = project::project;
        project_qkv(
            to: &mut [Projected<'_, Self>; 3], x: &Tensor<Self>, by: &[Projection<'_, Self>; 3], rope: Option<Rope<'_, Self>>,
            s: &mut ProjectScratch<Self>
        ) = project::project_qkv;
        project_gate_up(
            act: &mut Tensor<Self>, to: &mut [Projected<'_, Self>; 2], x: &Tensor<Self>, by: &[Projection<'_, Self>; 2],
            s: &mut ProjectScratch<Self>
        ) = project::project_gate_up;
        low_rank_t(
            t: &mut Tensor<Self>, x: &Tensor<Self>, by: LowRank<'_, Self>, s: &mut ProjectScratch<Self>
        ) = project::low_rank_t;
        project_dx(
            dx: Option<&mut Tensor<Self>>, grads: &mut [ProjectionGrads<'_, Self>], dys: &[&Tensor<Self>],
            ts: &[Option<&Tensor<Self>>], by: &[Projection<'_, Self>], s: &mut ProjectScratch<Self>
        ) = project::project_dx;
        project_dw(
            grads: &mut [ProjectionGrads<'_, Self>], dys: &[&Tensor<Self>], x: &Tensor<Self>, by: &[Projection<'_, Self>],
            s: &mut ProjectScratch<Self>
        ) = project::project_dw;
        begin_step(s: &mut CudaStats) = stats::begin;
        add_loss(s: &mut CudaStats, loss: &Tensor<Self>, correct: Option<&Tensor<Self>>) = stats::add_loss;
        grad_norm2(s: &mut CudaStats, grads: &[&Tensor<Self>]) = stats::grad_norm2;
        set_clip(s: &mut CudaStats, max_norm: Option<f64>) = stats::set_clip;
        adamw_all(s: &CudaStats, slots: &mut [AdamWSlot<'_, Self>], step: AdamWStep) = adamw::adamw_all;
    }

    fn peer(&self) -> Result<String> {
        cublaslt::peer(self)
    }

    fn peer_matmul(
        &self,
        c: &mut Tensor<Self>,
        a: &Tensor<Self>,
        b: &Tensor<Self>,
        op: MatMul,
        write: Write,
    ) -> Result<()> {
        cublaslt::peer_matmul(self, c, a, b, op, write)
    }

    fn new_stats(&self) -> Result<CudaStats> {
        stats::new(self)
    }

    fn squares(&self, parts: &[(&Tensor<Self>, Range<usize>)]) -> Result<Vec<f64>> {
        stats::squares(self, parts)
    }

    fn add_squares(&self, s: &mut CudaStats, _blocks: &[usize], sums: &[f64]) -> Result<()> {
        stats::add_squares(self, s, sums)
    }

    fn figures(&self, s: &CudaStats) -> Result<Figures> {
        stats::figures(self, s)
    }
}
