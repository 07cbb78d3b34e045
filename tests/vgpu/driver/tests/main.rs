//! Every test of the library: through cudarc and the dynamic loader, each in a process of its own.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

#[path = "it/basics.rs"]
mod basics;
#[path = "it/child.rs"]
mod child;
#[path = "it/errors.rs"]
mod errors;
#[path = "it/graphs.rs"]
mod graphs;
#[path = "it/header.rs"]
mod header;
#[path = "it/limits.rs"]
mod limits;
#[path = "it/memory.rs"]
mod memory;
#[path = "it/modules.rs"]
mod modules;
#[path = "it/order.rs"]
mod order;
#[path = "it/private.rs"]
mod private;
#[path = "it/programs.rs"]
mod programs;
#[path = "it/raw.rs"]
mod raw;
#[path = "it/streams.rs"]
mod streams;
#[path = "it/symbols.rs"]
mod symbols;
