//! What each subcommand does.

pub mod bench;
pub mod check;
pub mod convert;
pub mod curve;
pub mod data;
pub mod device;
mod did_you_mean;
pub mod doctor;
pub mod eval;
pub mod generate;
pub mod inspect;
pub mod jobs;
pub mod kernels;
pub mod merge;
mod model_folder;
pub mod open;
pub mod pack;
pub mod parity;
pub mod plan;
pub mod prepare;
pub mod preview;
pub mod report;
pub mod shell;
pub mod start;
pub mod templates;
pub mod train;
pub mod watch;
