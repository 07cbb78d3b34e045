//! What the unit tests of the kernels share: devices of every level and thread count; what every device is held to comes from
//! `tests/common`.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[path = "../../tests/common/amx.rs"]
mod amx;
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
#[path = "../../tests/common/odd.rs"]
pub mod odd;
#[path = "../../tests/common/optimiser.rs"]
pub mod optimiser;
#[path = "../../tests/common/products.rs"]
pub mod products;
#[path = "../../tests/common/projections.rs"]
#[allow(dead_code, reason = "composed here: products have tests of their own")]
pub mod projections;
#[path = "../../tests/common/reference.rs"]
#[allow(dead_code, reason = "the masks that it drew are asked for elsewhere")]
pub mod reference;
#[path = "../../tests/common/rows.rs"]
pub mod rows;
#[path = "../../tests/common/sums.rs"]
#[allow(dead_code, reason = "devices that cut sums off are tested elsewhere")]
pub mod sums;
#[path = "../../tests/common/levels.rs"]
mod support;

pub use close::{normal, tensor, values};

use super::{Cpu, Level};
pub use support::{Support, cpu, levels};

/// Devices of every level that runs here, with two threads.
pub fn cpus() -> Vec<Cpu> {
    levels().into_iter().map(|l| cpu(2, l)).collect()
}

/// Devices of one, two and three threads at the fastest level.
pub fn thread_counts() -> Vec<Cpu> {
    [1, 2, 3].map(|n| cpu(n, Level::fastest())).into()
}

/// The same for each level that runs here.
pub fn thread_counts_of_levels() -> Vec<Vec<Cpu>> {
    levels().into_iter().map(|l| [1, 2, 3].map(|n| cpu(n, l)).into()).collect()
}

#[test]
fn every_level_is_native_emulated_or_not_for_this_machine() {
    let all = Level::ALL.map(|l| (l, Support::of(l)));
    assert!(all.iter().all(|(l, how)| (*how == Support::Native) == l.is_supported()), "{all:?}");
    // Tiles can be emulated wherever the vectors beside them exist.
    let runs = |l| Support::of(l) != Support::None;
    assert!(!cfg!(target_os = "linux") || runs(Level::Amx) == runs(Level::Avx512Bf16), "{all:?}");
    assert_eq!(cpus().len(), all.iter().filter(|(_, how)| !how.word().contains("cannot")).count());
}

#[test]
fn what_is_not_finite_stays_in_its_place() {
    for dev in cpus() {
        odd::what_is_not_finite_stays_in_its_place(&dev, &reference::Reference, dev.level().name());
    }
}
