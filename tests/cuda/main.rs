//! Tests of the CUDA backend, in a program of their own. They run unchanged on a GPU and, through `scripts/vgpu.sh`, on the emulator
//! of `tests/vgpu`. Where there is no device or no NVRTC each says `skipped: …`; with `RINGTUNE_NO_SKIP=1` that is a failure.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod arenas;
#[path = "../common/attention.rs"]
mod attention;
#[path = "../common/batches.rs"]
mod batches;
mod bench;
mod beyond;
#[path = "../common/close.rs"]
mod close;
mod curves;
mod device;
mod doctor;
#[path = "../common/elementwise.rs"]
mod elementwise;
mod faults;
mod fold;
mod gate;
#[path = "../common/head.rs"]
mod head;
mod hopper;
mod launches;
mod matmul;
mod norm;
#[path = "../common/norms.rs"]
mod norms;
#[path = "../common/odd.rs"]
mod odd;
mod offsets;
mod operations;
#[path = "../common/optimiser.rs"]
mod optimiser;
mod prebuilt;
mod prepared;
#[path = "../common/products.rs"]
mod products;
mod project;
#[path = "../common/projections.rs"]
mod projections;
mod random;
mod ranks;
mod readme;
#[path = "../common/reference.rs"]
mod reference;
mod rounding;
#[path = "../common/rows.rs"]
mod rows;
mod sass;
mod skip;
#[path = "../common/sums.rs"]
mod sums;
mod traffic;
mod train;
mod uploads;
