//! The training loop and what surrounds it.

pub mod artifact;
pub mod batches;
pub mod checkpoints;
pub mod companions;
pub mod early_stop;
pub mod eval;
pub mod eval_sets;
pub mod flops;
pub mod gen_test;
pub mod init;
pub mod memory;
pub mod merged;
pub mod metrics;
pub mod plan;
pub mod record;
pub mod report;
pub mod run;
pub mod saver;
pub mod settings;
pub mod setup;
pub mod signals;
pub mod state;
pub mod step;
pub mod tensorboard;
pub mod trainer;

pub use settings::TrainSettings;
