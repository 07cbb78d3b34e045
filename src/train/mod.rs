//! The training loop and what surrounds it.

pub mod artifact;
pub mod batches;
pub mod companions;
pub mod early_stop;
pub mod eval;
pub mod flops;
pub mod init;
pub mod metrics;
pub mod plan;
pub mod report;
pub mod saver;
pub mod settings;
pub mod signals;
pub mod state;
pub mod tensorboard;

pub use settings::TrainSettings;
