//! The CUDA driver API on the CPU: a `libcuda.so.1` whose launches run in vgpu's interpreter.
//!
//! `chip` says what a device poses as, `driver` holds everything with a handle, `queue` and `executor` order and run what streams
//! are asked to do (`op`), and `api` holds the exported functions, a file for each group of the documentation.

pub mod abi;
pub mod api;
pub mod chip;
pub mod code;
pub mod config;
pub mod driver;
pub mod executor;
pub mod ffi;
pub mod graph;
pub mod leaks;
pub mod module;
pub mod occupancy;
pub mod op;
pub mod queue;
pub mod report;
pub mod table;
pub mod totals;
