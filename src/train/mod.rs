//! The training loop and what surrounds it.

pub mod settings;

pub use settings::TrainSettings;
