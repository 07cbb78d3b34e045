//! Runs a recorded case of another library and compares: logits, losses, every gradient, packed rows, grown
//! vocabularies, low-rank updates, AdamW steps, greedy generation.
//!
//! The tests compare with it on every device, and `ringtune parity` is a thin caller.

mod case;
mod compare;
mod dump;
mod report;
mod run;
mod steps;

use std::path::PathBuf;

use ringtune::backend::Backend;
use ringtune::error::Result;
use ringtune::files::create_dir_all;
use ringtune::hf::safetensors::ModelFiles;
use ringtune::tensor::DType;

pub use report::{Report, Tolerances};

/// What to run.
#[derive(Clone, Debug)]
pub struct ParityArgs {
    /// Folder with `golden.json`, `golden.safetensors`, `adapter_NAME/`.
    pub case: PathBuf,
    /// Folder of the model the case was recorded with.
    pub model: PathBuf,
    /// Where our tensors, metrics, models and adapters go.
    pub out: PathBuf,
    /// Precision of weights and activations: f32 or bf16.
    pub dtype: DType,
}

/// Runs every part that was recorded, writes our side to `args.out`, and compares.
///
/// # Errors
/// If a file is missing or damaged, or the device fails; differences are in the report, not errors.
pub fn compare<B: Backend>(dev: &B, args: &ParityArgs) -> Result<Report> {
    let case = case::Case::open(&args.case)?;
    let model = ModelFiles::open(&args.model)?;
    create_dir_all(&args.out)?;
    let mut run = run::Run {
        dev,
        case: &case,
        model: &model,
        out: &args.out,
        dtype: args.dtype,
        allowed: Tolerances::of(args.dtype),
        report: Report::default(),
    };
    run.all()?;
    Ok(run.report)
}
