//! What the unit tests of the kernels share: devices of every level and thread count; what every device is held to comes from
//! `tests/common`.

#[path = "../../tests/common/attention.rs"]
pub mod attention;
#[path = "../../tests/common/batches.rs"]
mod batches;
#[path = "../../tests/common/close.rs"]
mod close;
#[path = "../../tests/common/elementwise.rs"]
pub mod elementwise;
#[path = "../../tests/common/head.rs"]
pub mod head;
#[path = "../../tests/common/norms.rs"]
pub mod norms;
#[path = "../../tests/common/optimiser.rs"]
pub mod optimiser;
#[path = "../../tests/common/products.rs"]
pub mod products;
#[path = "../../tests/common/rows.rs"]
pub mod rows;
#[path = "../../tests/common/sums.rs"]
#[allow(dead_code, reason = "devices that cut sums off are tested elsewhere")]
pub mod sums;

pub use close::{normal, tensor, values};

use super::{Cpu, Level};

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
