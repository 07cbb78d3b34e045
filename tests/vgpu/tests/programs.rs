//! CUDA programs that NVRTC 12.9.86 compiled for compute_80 (tests/cuda) against references in f64, over odd shapes, in several
//! orders of blocks and warps. Right programs must raise no fault.

#[path = "programs/attention.rs"]
mod attention;
#[path = "programs/device.rs"]
mod device;
#[path = "programs/gemm.rs"]
mod gemm;
#[path = "programs/pipelines.rs"]
mod pipelines;
#[path = "programs/rows.rs"]
mod rows;
#[path = "programs/small.rs"]
mod small;
#[path = "programs/update.rs"]
mod update;
