//! The sums of the ordered fold over ranks: `kernels/fold.cu`, which `collectives::ordered` launches.

use super::compile::{Defines, Source, source};
use super::kernels::Param::{In, Out, U32, U64};
use super::kernels::{Configuration, Kernel, THREADS};

/// The source of its kernel.
pub const SOURCE: Source = source!("kernels/fold.cu");

/// Elements that a thread adds.
pub(super) const QUAD: usize = 4;

/// The terms of all ranks, added to the sums of one.
pub fn kernel() -> Kernel {
    let params = &[Out, In, In, U32, U32, U64, U64, U32];
    Kernel { source: SOURCE, entry: "fold", defines: Defines::new(&[]), params, threads: THREADS }
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    vec![(kernel(), 0)]
}
