//! ringtune fine-tunes Llama-family language models: JSONL in, Hugging Face and PEFT files out.
//!
//! See ARCHITECTURE.md for the floors: a module imports only from lower ones.

pub mod backend;
pub mod batch;
pub mod checkpoint;
pub mod cli;
pub mod comm;
pub mod commands;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
pub mod datasets;
pub mod dirs;
pub mod error;
pub mod eval;
pub mod files;
pub mod generate;
pub mod heap;
pub mod hf;
pub mod hub;
pub mod log;
pub mod machine;
pub mod mapped;
pub mod measure;
pub mod model;
pub mod optim;
pub mod panics;
pub mod rng;
pub mod say;
pub mod settings;
pub mod tables;
pub mod tensor;
pub mod text;
pub mod train;
pub mod words;

// What is shared with tests/ names the library as it is named there.
extern crate self as ringtune;
