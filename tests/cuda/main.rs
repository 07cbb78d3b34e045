//! Tests of the CUDA backend, in a program of their own. They run unchanged on a GPU and, through `scripts/vgpu.sh`, on the emulator
//! of `tests/vgpu`. Where there is no device or no NVRTC each says `skipped: …`; with `RINGTUNE_NO_SKIP=1` that is a failure.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/close.rs"]
mod close;
mod device;
mod doctor;
mod gate;
mod matmul;
mod norm;
#[path = "../common/norms.rs"]
mod norms;
#[path = "../common/products.rs"]
mod products;
mod skip;
mod traffic;
