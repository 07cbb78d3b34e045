//! What the unit tests of the kernels share: devices of every level and thread count; tensors from values, the rule that bounds
//! errors, and what every device is held to come from `tests/common`.

#[path = "../../tests/common/batches.rs"]
mod batches;
#[path = "../../tests/common/close.rs"]
mod close;
#[path = "../../tests/common/norms.rs"]
pub mod norms;
#[path = "../../tests/common/products.rs"]
pub mod products;

pub use batches::{documents, loaded};
pub use close::{assert_close, normal, rounded, stored, tensor, values};

use super::{Cpu, Level};
use crate::tensor::{DType, Device, Tensor};

/// Devices of every level this processor has, with two threads.
pub fn cpus() -> Vec<Cpu> {
    let levels = Level::ALL.into_iter().filter(|l| l.is_supported());
    levels.map(|l| Cpu::with_level(Some(2), l).unwrap()).collect()
}

/// Devices of one, two and three threads at the best level.
pub fn thread_counts() -> Vec<Cpu> {
    let best = Level::ALL.into_iter().rfind(|l| l.is_supported()).unwrap();
    [1, 2, 3].map(|n| Cpu::with_level(Some(n), best).unwrap()).into()
}

/// A column of integers.
pub fn tensor_i32(dev: &Cpu, values: &[i32]) -> Tensor<Cpu> {
    let mut t = dev.alloc(values.len(), 1, DType::I32).unwrap();
    dev.upload_i32(&mut t, values).unwrap();
    t
}
