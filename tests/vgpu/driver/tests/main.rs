//! Every test of the library: through cudarc and the dynamic loader, each in a process of its own.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

#[path = "it/basics.rs"]
mod basics;
#[path = "it/child.rs"]
mod child;
