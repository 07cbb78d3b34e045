//! Everything a run holds on its device, allocated once: weights, gradients, activations, moments.

use super::init::{add_lora, resolve_targets};
use super::plan;
use super::step::Workload;
use crate::backend::Backend;
use crate::error::Result;
use crate::hf::TensorSource;
use crate::hf::device::load_params;
use crate::hf::names::named;
use crate::log::tables::{MemoryClass, grouped};
use crate::model::flops::FlopCount;
use crate::model::{self, Acts, ActsOptions, Grads, LoraSpec};
use crate::optim::Optimizer;
use crate::settings::{Precision, Recompute, TrainSettings};
use crate::tensor::{DType, Tensor};

/// Storage type of weights and activations.
pub fn dtype(s: &TrainSettings) -> DType {
    match s.precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::Bf16,
    }
}

/// The low-rank updates of a run, with their targets as in files; `None` in full training.
///
/// # Errors
/// A usage error for an unknown target.
pub fn lora_spec(s: &TrainSettings) -> Result<Option<LoraSpec>> {
    let Some(l) = &s.lora else { return Ok(None) };
    let targets = resolve_targets(&l.targets)?;
    Ok(Some(LoraSpec { r: l.r, alpha: l.alpha, dropout: l.dropout, rslora: l.rslora, targets }))
}

/// Loads and allocates everything. `new_rows` are the rows of embedding and head that LoRA trains, `max_tokens` the largest
/// micro-batch.
///
/// # Errors
/// If a weight is damaged or the device has not enough memory.
pub fn workload<B: Backend>(
    dev: &B,
    source: &dyn TensorSource,
    s: &TrainSettings,
    new_rows: Option<(usize, usize)>,
    max_tokens: usize,
) -> Result<Workload<B>> {
    let config = source.config().clone();
    let lora = lora_spec(s)?;
    let mut params = load_params(dev, source, dtype(s))?;
    if let Some(l) = &lora {
        add_lora(dev, &config, &mut params, l.r, &l.targets, s.seed)?;
    }
    let grads = model::alloc_grads(dev, &params, new_rows.map(|(_, n)| n))?;
    let options = ActsOptions {
        dtype: dtype(s),
        recompute: match s.recompute {
            Recompute::None => model::Recompute::None,
            Recompute::Attention => model::Recompute::Attention,
            Recompute::Layer => model::Recompute::Layer,
        },
        lora: lora.clone(),
        training: true,
    };
    let acts = Acts::new(dev, &config, max_tokens, options)?;
    let new_rows = lora.is_some().then(|| new_rows.map(|(first, _)| first)).flatten();
    let adamw = plan::adamw(s, new_rows);
    let optimizer = Optimizer::new(dev, adamw, &mut params, &grads)?;
    let trained = trained_weights(&grads);
    let flops = FlopCount::new(&config, lora.is_some().then_some(trained));
    Ok(Workload { config, params, grads, acts, optimizer, groups: adamw.groups, flops, seed: s.seed })
}

/// Number of weights that have a gradient.
pub(super) fn trained_weights<B: Backend>(grads: &Grads<B>) -> u64 {
    named(grads).iter().filter_map(|(_, t)| t.as_ref()).map(|t| t.len() as u64).sum()
}

/// `parameters: 12,345 in all, 678 trained (5.49%)`.
pub fn parameters_line<B: Backend>(work: &Workload<B>) -> String {
    let all: u64 = named(&work.params).iter().map(|(_, t)| t.len() as u64).sum();
    let trained = trained_weights(&work.grads);
    let share = 100.0 * trained as f64 / all as f64;
    format!("parameters: {} in all, {} trained ({share:.2}%)", grouped(all), grouped(trained))
}

/// Bytes on the device by class. `per_class` activations are those of the model's own account.
pub fn memory<B: Backend>(work: &Workload<B>) -> Vec<MemoryClass> {
    let bytes = |t: &Tensor<B>| (t.capacity() * t.dtype().bytes()) as u64;
    vec![
        MemoryClass { name: "weights", bytes: named(&work.params).iter().map(|(_, t)| bytes(t)).sum() },
        MemoryClass {
            name: "gradients",
            bytes: named(&work.grads).iter().filter_map(|(_, t)| t.as_ref()).map(bytes).sum(),
        },
        MemoryClass { name: "moments and masters", bytes: work.optimizer.bytes() as u64 },
        MemoryClass { name: "activations", bytes: work.acts.bytes() as u64 },
    ]
}
