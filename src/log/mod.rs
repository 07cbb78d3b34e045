//! What a run writes down of itself: metrics, TensorBoard files, the tables at its start.

pub mod metrics;
pub mod mlflow;
mod mlflow_server;
pub mod tables;
pub mod tensorboard;
pub mod trace;
