//! Rotary embedding: `kernels/rope.cu` and its launch.

use super::compile::{Defines, Source, source};
use super::device::Cuda;
use super::kernels::Param::{In, Out, U32};
use super::kernels::{Configuration, Kernel, THREADS, TYPES, c_type};
use super::launch::Launch;
use crate::backend::{Rope, Rotate};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// The source of its kernel.
pub const SOURCE: Source = source!("kernels/rope.cu");

/// Turns rows of this type.
pub fn kernel(x: DType) -> Kernel {
    Kernel {
        source: SOURCE,
        entry: "rope",
        defines: Defines::new(&[("X_T", c_type(x))]),
        params: &[Out, In, In, U32, U32, U32],
        threads: THREADS,
    }
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    TYPES.map(|x| (kernel(x), 0)).into()
}

pub(super) fn rope(dev: &Cuda, x: &mut Tensor<Cuda>, by: Rope<'_, Cuda>, direction: Rotate) -> Result<()> {
    let (dim, (rows, cols), kernel) = (by.check("rope", x), x.shape(), kernel(x.dtype()));
    let launch = Launch::new(dev, &kernel, rows * (cols / 2).div_ceil(THREADS), 0).write(x);
    launch.read(by.table).read(by.positions).u32(cols).u32(dim).flag(direction == Rotate::Inverse).run()
}
