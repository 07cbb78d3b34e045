//! The exported functions, grouped as the documentation of the driver API groups them.

mod context;
mod device;
mod error;
mod event;
mod graph;
mod launch;
mod memory;
mod module;
mod private;
mod stream;
mod transfer;
