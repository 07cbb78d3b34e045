//! The training loop and what surrounds it.

pub mod early_stop;
pub mod settings;
pub mod signals;
pub mod tensorboard;

pub use settings::TrainSettings;
