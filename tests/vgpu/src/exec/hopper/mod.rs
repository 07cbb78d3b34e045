//! The sm_90a set: warpgroup products, barriers in shared memory, bulk and tensor copies, clusters.

pub mod descriptor;
pub mod fp8;
pub mod mbarrier;
pub mod product;
pub mod tile;
