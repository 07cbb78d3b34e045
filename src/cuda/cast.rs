//! Conversion between element types: `kernels/cast.cu` and its launch.

use super::compile::{Defines, Source, source};
use super::device::Cuda;
use super::kernels::Param::{In, Out, U64};
use super::kernels::{Configuration, Kernel, THREADS, c_type};
use super::launch::Launch;
use crate::error::{Context, Error, Result};
use crate::tensor::{DType, Device, Tensor};

/// The source of its kernel.
pub const SOURCE: Source = source!("kernels/cast.cu");

/// `dst = src` of another type.
pub fn kernel(dst: DType, src: DType) -> Kernel {
    Kernel {
        source: SOURCE,
        entry: "cast",
        defines: Defines::new(&[("DST_T", c_type(dst)), ("SRC_T", c_type(src))]),
        params: &[Out, In, U64],
        threads: THREADS,
    }
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    vec![(kernel(DType::F32, DType::Bf16), 0), (kernel(DType::Bf16, DType::F32), 0)]
}

pub(super) fn cast(dev: &Cuda, dst: &mut Tensor<Cuda>, src: &Tensor<Cuda>) -> Result<()> {
    let (kernel, n) = (kernel(dst.dtype(), src.dtype()), src.len());
    let launch = Launch::new(dev, &kernel, n.div_ceil(THREADS * 8), 0);
    launch.write(dst).read(src).u64(n).run().context(|| "copy".into())
}

impl Cuda {
    /// Compiles a kernel, runs it and compares every element of its result.
    ///
    /// # Errors
    /// If something of that fails, or an element is wrong.
    pub fn prove(&self) -> Result<()> {
        let x: Vec<f32> = (0..5000).map(|i| (i as f32 - 2500.0) * 0.37).collect();
        let mut wide = self.alloc(1, x.len(), DType::F32)?;
        let mut narrow = self.alloc(1, x.len(), DType::Bf16)?;
        self.upload(&mut wide, &x)?;
        self.copy(&mut narrow, &wide)?;
        let mut back = vec![0.0; x.len()];
        self.download(&mut back, &narrow)?;
        let wrong = x.iter().zip(&back).filter(|(x, b)| half::bf16::from_f32(**x).to_f32() != **b).count();
        if wrong > 0 {
            return Err(Error::new(format!("a kernel gave {wrong} wrong results of {}", x.len())));
        }
        Ok(())
    }
}
