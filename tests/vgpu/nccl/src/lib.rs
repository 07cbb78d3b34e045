//! The NCCL interface on the CPU: collectives between the devices of vgpu, over shared memory.
//!
//! Ranks are threads or processes of one machine. Every call becomes an operation in stream order of vgpu's `libcuda`
//! (`driver`) that the executor polls until it is done; it never blocks. A communicator is a file of shared memory
//! (`shared`) in which each rank owns slots; a collective is a row of chunks that pass through them (`engine`).
//!
//! **Invariant:** sums run in rank order and are rounded once, so that all ranks hold the same bits.
//! **Invariant:** before data move, all ranks compare their calls; a difference is an error that names both.
//! **Invariant:** no wait is endless: a rank that died, left, failed, or stays away ends it with an error that names it.

#![allow(non_snake_case)]

pub mod api;
pub mod api_comm;
mod call;
mod comm;
mod driver;
mod engine;
mod error;
mod group;
mod join;
mod member;
mod operation;
mod point;
mod reduce;
mod shared;
mod stall;
mod sweep;

pub use api::*;
pub use api_comm::*;
