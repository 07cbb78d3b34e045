//! `ringrun` as a program, and the hub as its ranks see it: a file per behaviour.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cluster;
mod engines;
mod hub;
mod local;
mod program;
mod restarts;
