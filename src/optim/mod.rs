//! Optimisation: parameter groups, AdamW state, learning-rate schedules.

pub mod adamw;
pub mod groups;
pub mod schedule;
pub mod shares;

pub use adamw::{AdamWSettings, Optimizer, OptimizerState, StatePart, Verdict};
pub use schedule::{Schedule, ScheduleSettings, Shape, Warmup};
pub use shares::Shares;
