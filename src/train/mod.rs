//! The training loop and what surrounds it.

pub mod batches;
pub mod early_stop;
pub mod eval;
pub mod metrics;
pub mod report;
pub mod saver;
pub mod settings;
pub mod signals;
pub mod state;
pub mod tensorboard;

pub use settings::TrainSettings;
