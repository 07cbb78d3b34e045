//! Every test of the library: through cudarc's raw interface and the dynamic loader, in processes of their own.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

#[path = "it/child.rs"]
mod child;
#[path = "it/collectives.rs"]
mod collectives;
#[path = "it/communicators.rs"]
mod communicators;
#[path = "it/faults.rs"]
mod faults;
#[path = "it/graphs.rs"]
mod graphs;
#[path = "it/points.rs"]
mod points;
#[path = "it/ranks.rs"]
mod ranks;
#[path = "it/reference.rs"]
mod reference;
