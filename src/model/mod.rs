//! One model over any backend: forward and backward by hand, no autograd.

pub mod config;
pub mod weights;
