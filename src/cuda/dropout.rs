//! Dropout: `kernels/dropout.cu` and its launch.

use super::compile::{Defines, Source, source};
use super::device::Cuda;
use super::kernels::Param::{F32, In, Out, U32, U64};
use super::kernels::{Configuration, Kernel, THREADS, TYPES, c_type};
use super::launch::Launch;
use crate::backend::Dropout;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// The source of its kernel.
pub const SOURCE: Source = source!("kernels/dropout.cu");

/// `dst = dropout(src)`.
pub fn kernel(dst: DType, src: DType) -> Kernel {
    Kernel {
        source: SOURCE,
        entry: "dropout",
        defines: Defines::new(&[("DST_T", c_type(dst)), ("SRC_T", c_type(src))]),
        params: &[Out, In, U64, U32, U32, U32, U32, U32, F32],
        threads: THREADS,
    }
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    TYPES.into_iter().flat_map(|dst| TYPES.map(|src| (kernel(dst, src), 0))).collect()
}

pub(super) fn dropout(dev: &Cuda, dst: &mut Tensor<Cuda>, src: &Tensor<Cuda>, dropout: Dropout) -> Result<()> {
    dropout.check("dropout", dst, src);
    let (kernel, n) = (kernel(dst.dtype(), src.dtype()), src.len());
    let launch = Launch::new(dev, &kernel, n.div_ceil(THREADS * Dropout::PER_BLOCK), 0).write(dst).read(src).u64(n);
    let launch = dropout.stream().words().into_iter().fold(launch, Launch::word);
    launch.word(dropout.threshold()).f32(dropout.scale()).run()
}
