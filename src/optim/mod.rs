//! Optimisation: parameter groups, AdamW state, learning-rate schedules.

pub mod adamw;
pub mod groups;
pub mod schedule;

pub use adamw::{AdamWSettings, Optimizer, OptimizerState, Verdict};
pub use schedule::{Schedule, ScheduleSettings, Shape, Warmup};
