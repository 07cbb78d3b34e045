//! The merged model, proven against base + adapter.

use std::fmt;
use std::path::Path;

use crate::backend::Backend;
use crate::batch::MicroBatch;
use crate::ensure;
use crate::error::{Context, Result};
use crate::files::StagedDir;
use crate::hf::device::{load_adapter, load_params};
use crate::hf::merge::{Adapted, Merged};
use crate::hf::peft::Adapter;
use crate::hf::safetensors::ModelFiles;
use crate::hf::save::{SaveOptions, save_model};
use crate::hf::{TensorSource, second_reading};
use crate::model::weights::Weights;
use crate::model::{self, Acts, ActsOptions, LoraSpec, Model, Params};
use crate::tensor::DType;

/// Tokens whose logits are compared: enough for every weight to show, few enough to be quick.
const CHECK_TOKENS: usize = 64;

/// How far a merged model is from base + adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MergeCheck {
    /// Relative distance of the logits of the merge before rounding: `|merged - adapted| / |adapted|`.
    pub exact: f64,
    /// The same of the file as it was written.
    pub rounded: f64,
    /// Low-rank updates that a second reading of the adapter's files found in the written weights.
    pub updates: usize,
}

impl fmt::Display for MergeCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { exact, rounded, updates } = self;
        write!(f, "logits differ from base + adapter by {exact:.1e} relative, as written by {rounded:.1e}")?;
        write!(f, "; {updates} updates found again in the weights")
    }
}

/// Writes the merged model of `adapter_dir` and `base` to `output`, through a folder beside it that gets the name once everything
/// in it is proven; what lies at `output` is replaced then and stays as it is on any error. `beside` adds other files to the folder.
///
/// Three proofs: logits on the first tokens of `batch` agree with base + adapter to f32's accuracy; each weight of the file is the
/// merged one after one rounding; and it is what the adapter's files, read anew by PEFT's own names and rule, make of the base.
///
/// # Errors
/// If the adapter does not fit, a weight is not finite, a file cannot be written, `beside` fails, or a proof does.
pub fn merge<B: Backend>(
    dev: &B,
    base: &dyn TensorSource,
    adapter_dir: &Path,
    output: &Path,
    options: SaveOptions,
    batch: &MicroBatch,
    beside: impl FnOnce(&Path) -> Result<()>,
) -> Result<MergeCheck> {
    let adapter = Adapter::open(adapter_dir)?;
    StagedDir::new(output)?.publish(|dir| {
        let check = write_checked(dev, base, &adapter, dir, options, batch)?;
        beside(dir)?;
        Ok(check)
    })
}

fn write_checked<B: Backend>(
    dev: &B,
    base: &dyn TensorSource,
    adapter: &Adapter,
    dir: &Path,
    options: SaveOptions,
    batch: &MicroBatch,
) -> Result<MergeCheck> {
    let adapted = Adapted::new(base, adapter)?;
    let merged = Merged::new(base, adapter)?;
    let config = merged.config().clone();
    save_model(dir, &merged, options)?;

    let sample = head_of(batch, CHECK_TOKENS);
    let mut with_adapter = load_params(dev, &adapted, DType::F32)?;
    load_adapter(dev, &mut with_adapter, adapter)?;
    let logits = |params: Params<B>, lora: Option<LoraSpec>| -> Result<Vec<f32>> {
        let model = Model::fixed(config.clone(), params, lora, DType::F32);
        let mut acts = Acts::new(dev, &model, sample.tokens.len(), ActsOptions::FORWARD)?;
        acts.load(dev, &sample)?;
        model::logits(dev, &model, &mut acts)
    };
    let expected = logits(with_adapter, Some(lora_spec(adapter)))?;
    let exact = distance(&logits(load_params(dev, &merged, DType::F32)?, None)?, &expected);
    let written = ModelFiles::open(dir)?;
    let rounded = distance(&logits(load_params(dev, &written, DType::F32)?, None)?, &expected);
    // Both sides sum the same products in another order. A term carries an error of 2^-24 a rounding; a chain of layers with
    // some thousand terms each stays well below 2^-24 · 2^12, while a wrong scale or a missing update is larger by far.
    let tolerance = 2f64.powi(-12);
    ensure!(
        exact <= tolerance,
        "{}: the merged model's logits differ from base + adapter by {exact:.2e}, expected at most {tolerance:.2e}; do not use it",
        dir.display()
    );
    check_rounding(&merged, &written).context(|| dir.display().to_string())?;
    let updates = second_reading::check(base, adapter.dir(), &written).context(|| dir.display().to_string())?;
    Ok(MergeCheck { exact, rounded, updates })
}

/// The low-rank updates of an adapter, without dropout.
pub fn lora_spec(adapter: &Adapter) -> LoraSpec {
    LoraSpec { dropout: 0.0, ..adapter.config.lora.clone() }
}

/// Every weight of the file is the merged one after one rounding to its type.
fn check_rounding(merged: &dyn TensorSource, written: &ModelFiles) -> Result<()> {
    let round = |x: f32| written.dtype().round(x);
    for (at, _) in Weights::of(merged.config()).places() {
        let (a, b) = (merged.load(at)?, written.load(at)?);
        ensure!(
            a.data.iter().zip(&b.data).all(|(&x, &y)| round(x) == y),
            "{at}: the file holds another weight than the merge gave"
        );
    }
    Ok(())
}

/// `|a - b| / |b|`, in the Euclidean norm.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(&x, &y)| square(f64::from(x) - f64::from(y))).sum();
    let size: f64 = b.iter().map(|&y| square(f64::from(y))).sum();
    (difference / size.max(f64::MIN_POSITIVE)).sqrt()
}

/// The first tokens of a micro-batch.
fn head_of(batch: &MicroBatch, n: usize) -> MicroBatch {
    let n = n.min(batch.tokens.len());
    MicroBatch {
        tokens: batch.tokens[..n].to_vec(),
        targets: batch.targets[..n].to_vec(),
        doc_start: batch.doc_start[..n].to_vec(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_is_relative() {
        assert_eq!(distance(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert!((distance(&[3.0, 9.0], &[3.0, 4.0]) - 1.0).abs() < 1e-12);
        assert!(distance(&[f32::NAN], &[1.0]).is_nan());
    }
}
