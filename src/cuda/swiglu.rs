//! SwiGLU: the kernels of `kernels/swiglu.cu` and their launches.

use super::compile::{Defines, Source, source};
use super::device::Cuda;
use super::kernels::Param::{In, Out, U64};
use super::kernels::{Configuration, Kernel, THREADS, TYPES, c_type};
use super::launch::Launch;
use crate::backend::Swiglu;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// The source of its kernels.
pub const SOURCE: Source = source!("kernels/swiglu.cu");

fn entry(entry: &'static str, params: &'static [super::kernels::Param], x: DType) -> Kernel {
    Kernel { source: SOURCE, entry, defines: Defines::new(&[("X_T", c_type(x))]), params, threads: THREADS }
}

/// SwiGLU.
pub fn forward_kernel(x: DType) -> Kernel {
    entry("swiglu_forward", &[Out, In, In, U64], x)
}

/// Its gradient.
pub fn backward_kernel(x: DType) -> Kernel {
    entry("swiglu_backward", &[Out, Out, Out, U64], x)
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    TYPES.into_iter().flat_map(|x| [(forward_kernel(x), 0), (backward_kernel(x), 0)]).collect()
}

pub(super) fn forward(dev: &Cuda, out: &mut Tensor<Cuda>, x: Swiglu<'_, Cuda>) -> Result<()> {
    x.check("swiglu", &[("out", out)]);
    let Swiglu { gate, up } = x;
    let (kernel, n) = (forward_kernel(same_type("swiglu", &[out, gate, up])), gate.len());
    Launch::new(dev, &kernel, n.div_ceil(THREADS * 8), 0).write(out).read(gate).read(up).u64(n).run()
}

pub(super) fn backward(
    dev: &Cuda,
    gate: &mut Tensor<Cuda>,
    up: &mut Tensor<Cuda>,
    dact: &mut Tensor<Cuda>,
) -> Result<()> {
    Swiglu { gate, up }.check("swiglu_backward", &[("dact", dact)]);
    let (kernel, n) = (backward_kernel(same_type("swiglu_backward", &[gate, up, dact])), gate.len());
    Launch::new(dev, &kernel, n.div_ceil(THREADS * 8), 0).write(gate).write(up).write(dact).u64(n).run()
}

/// The element type that the tensors of an operation have in common.
#[track_caller]
pub(super) fn same_type(what: &str, all: &[&Tensor<Cuda>]) -> DType {
    let first = all[0].dtype();
    let dtypes: Vec<DType> = all.iter().map(|t| t.dtype()).collect();
    assert!(dtypes.iter().all(|&d| d == first), "{what}: element types differ: {dtypes:?}");
    first
}
