//! The CUDA backend: kernels of `kernels/`, compiled at run time by NVRTC for the device that is there, behind the traits of
//! [`crate::backend`].
//!
//! So far it has [`Device`], [`Products`] and [`Norms`]; the rest of [`crate::backend::Backend`] follows, a file an operation with its
//! source, entries and launches. Everything runs in one stream, in the order of the calls; what a call reports may be the failure of
//! an earlier one.

pub mod cast;
pub mod compile;
mod device;
pub mod device_library;
mod error;
pub mod kernels;
mod launch;
pub mod library;
pub mod matmul;
mod memory;
mod modules;
pub mod nccl;
pub mod norm;
pub mod nvrtc;
pub mod tiles;

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::backend::elementwise::check_same;
use crate::backend::{MatMul, Norm, Norms, Products, Write};
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

pub use device::{Cuda, Properties, properties};
pub use memory::CudaBuf;

/// Every configuration of every kernel that an architecture (major · 10 + minor) may be asked to run.
pub fn configurations(cc: u32) -> Vec<kernels::Configuration> {
    [cast::all(), matmul::all(cc), norm::all()].concat()
}

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device for Cuda {
    type Buf = CudaBuf;
    type Plan = ();

    fn describe(&self) -> String {
        let p = self.properties();
        format!("cuda:{}, {}, sm_{}, {:.1} GiB", p.ordinal, p.name, p.cc, p.memory as f64 / f64::from(1 << 30))
    }

    fn alloc(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>> {
        self.allocate(rows, cols, dtype)
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

    fn synchronize(&self) -> Result<()> {
        self.wait()
    }

    fn fill_zero(&self, dst: &mut Tensor<Self>) -> Result<()> {
        self.zero(dst)
    }

    fn copy(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>) -> Result<()> {
        check_same("copy", dst, src);
        if src.is_empty() {
            return Ok(());
        }
        if dst.dtype() == src.dtype() { self.copy_bytes(dst, src) } else { cast::cast(self, dst, src) }
    }
}

impl Products for Cuda {
    fn matmul(
        &self,
        c: &mut Tensor<Self>,
        a: &Tensor<Self>,
        b: &Tensor<Self>,
        op: MatMul,
        alpha: f32,
        write: Write,
    ) -> Result<()> {
        self.matmul_with(None, c, [a, b], op, alpha, write)
    }
}

impl Norms for Cuda {
    fn rmsnorm_forward(&self, out: &mut Tensor<Self>, rstd: &mut Tensor<Self>, x: Norm<'_, Self>) -> Result<()> {
        norm::forward(self, out, rstd, x)
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
        norm::backward(self, dx, dw, dout, rstd, x, write)
    }
}
