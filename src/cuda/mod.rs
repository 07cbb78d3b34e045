//! The CUDA backend: kernels of `kernels/`, compiled at run time by NVRTC for the device that is there, behind the traits of
//! [`crate::backend`]. File for file as the CPU's.
//!
//! So far it has [`crate::tensor::Device`], [`Products`] and [`Norms`]; the rest of [`crate::backend::Backend`] follows. Everything runs in one
//! stream, in the order of the calls; what a call reports may be the failure of an earlier one.

pub mod compile;
mod context;
pub mod device_library;
mod error;
pub mod kernels;
mod launch;
pub mod library;
mod matmul;
pub mod nccl;
mod norm;
pub mod nvrtc;
pub mod tiles;

use crate::backend::{MatMul, Norms, Products, Write};
use crate::error::Result;
use crate::tensor::Tensor;

pub use context::{Cuda, CudaBuf, Properties, properties};

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
        self.matmul_with(None, c, a, b, op, alpha, write)
    }
}

impl Norms for Cuda {
    fn rmsnorm_forward(
        &self,
        out: &mut Tensor<Self>,
        rstd: &mut Tensor<Self>,
        x: &Tensor<Self>,
        w: &Tensor<Self>,
        eps: f32,
    ) -> Result<()> {
        norm::forward(self, out, rstd, x, w, eps)
    }

    fn rmsnorm_backward(
        &self,
        dx: &mut Tensor<Self>,
        dw: Option<&mut Tensor<Self>>,
        dout: &Tensor<Self>,
        x: &Tensor<Self>,
        w: &Tensor<Self>,
        rstd: &Tensor<Self>,
        write: Write,
    ) -> Result<()> {
        norm::backward(self, dx, dw, dout, x, w, rstd, write)
    }
}
