//! The training loop and what surrounds it.

pub mod batches;
pub mod buckets;
pub mod checkpoints;
pub mod divergence;
pub mod drift;
pub mod early_stop;
pub mod folder;
pub mod gathering;
pub mod holder;
pub mod init;
pub mod memory;
pub mod outputs;
pub mod part;
mod prepare;
pub mod record;
pub mod run;
pub mod saver;
pub mod set_losses;
pub mod setup;
pub mod shared_folder;
pub mod signals;
pub mod spec;
pub mod state;
pub mod step;
pub mod trainer;
