//! Everything a run holds on its device, allocated once: weights, gradients, activations, moments.

use std::ops::Range;

use super::buckets::Buckets;
use super::gathering::Gathering;
use super::init::resolve_targets;
use super::memory::{self, Demand};
use super::step::Workload;
use crate::backend::Backend;
use crate::comm::{Communicator, Solo};
use crate::error::{self, Result};
use crate::hf::TensorSource;
use crate::hf::device::{load_params_in, load_params_where};
use crate::log::tables::MemoryClass;
use crate::log::trace::Trace;
use crate::machine::available_memory;
use crate::model;
use crate::model::config::ModelConfig;
use crate::model::flops::FlopCount;
use crate::model::lora::{add_lora, first_values};
use crate::model::weights::{Kind, Part, Place};
use crate::model::{Acts, ActsOptions, Grads, LoraSpec, Model};
use crate::optim::groups::GroupSettings;
use crate::optim::{AdamWSettings, Optimizer, Schedule, ScheduleSettings};
use crate::settings::{TrainSettings, Zero};
use crate::tensor::{DType, Tensor};
use crate::text::grouped;
use crate::words::Words;

/// The low-rank updates of a run, with their targets as in files; `None` in full training.
///
/// # Errors
/// A usage error for an unknown target.
pub fn lora_spec(s: &TrainSettings) -> Result<Option<LoraSpec>> {
    let Some(l) = &s.lora else { return Ok(None) };
    let targets = resolve_targets(&s.lora_targets)?;
    Ok(Some(LoraSpec { targets, ..l.clone() }))
}

/// Constants of AdamW. `new_rows`: with LoRA, the first row that the vocabulary was grown by.
pub fn adamw(s: &TrainSettings, new_rows: Option<usize>) -> AdamWSettings {
    AdamWSettings {
        beta1: s.adam_beta1,
        beta2: s.adam_beta2,
        eps: s.adam_eps,
        weight_decay: s.weight_decay,
        max_grad_norm: s.max_grad_norm,
        groups: GroupSettings { lora_plus: s.lora_plus, new_rows },
    }
}

/// Every setting that decides the bits of a run, by its name on the command line, as it comes out: the warmup in steps, targets in
/// their order. Settings that only decide when to look, save, print or give up are left out.
pub fn deciding(s: &TrainSettings, peak: f64, max_steps: u64, packing: bool) -> Vec<(&'static str, String)> {
    let ScheduleSettings { shape, min_lr_ratio, wsd_decay_ratio, warmup_from_zero, .. } = s.schedule;
    let warmup = Schedule::new(s.schedule, peak, max_steps).warmup_steps();
    let or_none = |v: Option<String>| v.unwrap_or_else(|| "none".into());
    let mut all = vec![
        ("learning_rate", peak.to_string()),
        ("lr_scheduler_type", shape.word().into()),
        ("min_lr_ratio", min_lr_ratio.to_string()),
        ("wsd_decay_ratio", wsd_decay_ratio.to_string()),
        ("warmup_steps", warmup.to_string()),
        ("warmup_from_zero", warmup_from_zero.to_string()),
        ("max_steps", max_steps.to_string()),
        ("per_device_train_batch_size", s.micro_batch_size.to_string()),
        ("gradient_accumulation_steps", s.grad_accum.to_string()),
        ("max_seq_len", or_none(s.max_seq_len.map(|n| n.to_string()))),
        ("packing", packing.to_string()),
        ("seed", s.seed.to_string()),
        ("mixed_precision", if s.dtype == DType::Bf16 { "bf16" } else { "no" }.into()),
        ("weight_decay", s.weight_decay.to_string()),
        ("max_grad_norm", or_none(s.max_grad_norm.map(|x| x.to_string()))),
        ("adam_beta1", s.adam_beta1.to_string()),
        ("adam_beta2", s.adam_beta2.to_string()),
        ("adam_epsilon", s.adam_eps.to_string()),
        ("use_lora", s.lora.is_some().to_string()),
    ];
    if let Some(LoraSpec { r, alpha, dropout, rslora, targets: _ }) = &s.lora {
        let targets = resolve_targets(&s.lora_targets).unwrap_or_default();
        all.extend([
            ("lora_r", r.to_string()),
            ("lora_alpha", alpha.to_string()),
            ("lora_dropout", dropout.to_string()),
            ("use_rslora", rslora.to_string()),
            ("lora_targets", targets.iter().map(|p| p.name()).collect::<Vec<_>>().join(" ")),
            ("loraplus_lr_ratio", or_none(s.lora_plus.map(|x| x.to_string()))),
        ]);
    }
    all
}

/// Hash of every setting that decides a step's arithmetic; what only decides when to look, save or print is left out.
///
/// The hashed text is part of the checkpoint format: it keeps the names that the settings had when it was first written.
pub fn fingerprint(s: &TrainSettings, peak: f64, max_steps: u64) -> String {
    let ScheduleSettings { shape, warmup, min_lr_ratio, wsd_decay_ratio, warmup_from_zero } = s.schedule;
    let rate = (peak, shape, min_lr_ratio, wsd_decay_ratio, warmup, warmup_from_zero, max_steps);
    let steps = (s.micro_batch_size, s.grad_accum, s.max_seq_len, s.seed, s.dtype);
    let update = (s.weight_decay, s.max_grad_norm, s.adam_beta1, s.adam_beta2, s.adam_eps, s.max_bad_steps);
    let lora = s.lora.as_ref().map_or("None".to_string(), |l| {
        let LoraSpec { r, alpha, dropout, rslora, targets: _ } = l;
        format!(
            "Some(LoraSettings {{ r: {r:?}, alpha: {alpha:?}, dropout: {dropout:?}, rslora: {rslora:?}, targets: {:?}, \
             plus_ratio: {:?} }})",
            s.lora_targets, s.lora_plus
        )
    });
    let text = format!("{rate:?} {steps:?} {update:?} {lora}");
    blake3::hash(text.as_bytes()).to_hex().to_string()
}

/// Loads and allocates everything, and has the device prepare for it. `new_rows` are the rows of embedding and head that LoRA trains, `max_tokens` the largest
/// micro-batch.
///
/// # Errors
/// If a weight is damaged, or the device has not enough memory: then also which flags would help.
pub fn workload<B: Backend>(
    dev: &B,
    source: &dyn TensorSource,
    s: &TrainSettings,
    new_rows: Option<(usize, usize)>,
    max_tokens: usize,
) -> Result<Workload<B>> {
    workload_of(dev, &Solo, source, s, new_rows, max_tokens)
}

/// As [`workload`], on one of several ranks: with ZeRO-1 the optimiser's state is its share alone.
///
/// # Errors
/// As [`workload`].
pub fn workload_of<B: Backend>(
    dev: &B,
    comm: &dyn Communicator<B>,
    source: &dyn TensorSource,
    s: &TrainSettings,
    new_rows: Option<(usize, usize)>,
    max_tokens: usize,
) -> Result<Workload<B>> {
    let free = dev.free_memory().or_else(available_memory);
    built(dev, comm, source, s, new_rows, max_tokens).map_err(|e| match (e.kind(), free) {
        (error::Kind::Memory, Some(free)) => e.context(what_fits::<B>(source.config(), s, new_rows, max_tokens, free)),
        _ => e,
    })
}

/// What a device with so much free memory, that was full, would take.
fn what_fits<B: Backend>(
    config: &ModelConfig,
    s: &TrainSettings,
    new_rows: Option<(usize, usize)>,
    max_tokens: usize,
    free: u64,
) -> String {
    let usual = lora_spec(&TrainSettings::default()).ok().flatten().expect("the table's defaults are valid");
    demand::<B, _>(config, s, new_rows, max_tokens, |d| memory::does_not_fit(d, &usual, free))
}

/// `f` of what a run's memory depends on.
fn demand<B: Backend, R>(
    config: &ModelConfig,
    s: &TrainSettings,
    new_rows: Option<(usize, usize)>,
    max_tokens: usize,
    f: impl FnOnce(&Demand) -> R,
) -> R {
    let lora = lora_spec(s).ok().flatten();
    f(&Demand {
        config,
        settings: s,
        lora: lora.as_ref(),
        new_rows: new_rows.map(|(_, n)| n).filter(|_| lora.is_some()),
        max_seq_len: max_tokens / s.micro_batch_size.max(s.eval_batch_size).max(1),
        saves: false,
        device: B::footprint(config.n_classes),
    })
}

fn built<B: Backend>(
    dev: &B,
    comm: &dyn Communicator<B>,
    source: &dyn TensorSource,
    s: &TrainSettings,
    new_rows: Option<(usize, usize)>,
    max_tokens: usize,
) -> Result<Workload<B>> {
    let config = source.config().clone();
    let lora = lora_spec(s)?;
    let needed = demand::<B, _>(&config, s, new_rows, max_tokens, |d| memory::sum(&memory::estimate(d)));
    let packs = memory::reads_again(s, lora.is_some()) && available_memory().is_none_or(|n| n >= needed);
    let new_rows = new_rows.filter(|_| lora.is_some()).map(|(first, n)| first..first + n);
    // What is trained lies together, with its gradients at the same places.
    let lengths = memory::trained_lengths(&config, lora.as_ref(), new_rows.as_ref().map_or(0, Range::len));
    let buckets = Buckets::new(config.n_layers, &lengths, comm.bucket_elements());
    let rooms = buckets.rooms(&lengths, comm.world_size());
    let params = match &lora {
        None => load_params_in(dev, source, s.dtype, &rooms)?,
        Some(l) => {
            let frozen = |at: Place| new_rows.is_none() || at.kind() != Kind::Vocabulary;
            let mut params = load_params_where(dev, source, s.dtype, frozen)?;
            let room = |at: Place| lengths.iter().position(|(place, _)| *place == at).map_or(0, |i| rooms[i]);
            add_lora(dev, &config, &mut params, s.dtype, l, (s.seed, &room))?;
            params
        }
    };
    let mut model = Model { config, params, lora, dtype: s.dtype, new_rows };
    let packed = if packs { model.keep_packed(dev)? } else { 0 };
    let grads = model::alloc_grads_in(dev, &model, &rooms)?;
    let options = ActsOptions { recompute: s.recompute, training: true, micro_batches: s.grad_accum };
    let acts = Acts::new(dev, &model, max_tokens, options)?;
    let adamw = adamw(s, model.new_rows.as_ref().map(|rows| rows.start));
    let shares = if s.zero == Zero::Moments { buckets.shares(comm, &grads) } else { None };
    let mut optimizer = Optimizer::sharded(dev, adamw, &mut model.params, &grads, shares)?;
    if let Some(l) = &model.lora {
        // A master begins with what was drawn, not with its rounding.
        let is_drawn = |at: Place| matches!(at, Place::Layer(_, Part::LoraA(_)));
        let drawn = |at: Place| is_drawn(at).then(|| first_values(&model.config, at, l.r, s.seed));
        optimizer.set_masters(dev, |at| Ok(drawn(at)))?;
    }
    let trained = trained_weights(&grads);
    let flops = FlopCount::new(&model.config, model.lora.is_some().then_some(trained));
    let (stats, seed, trace, gathering) = (dev.new_stats()?, s.seed, Trace::default(), Gathering::default());
    let mut work = Workload { model, packed, grads, acts, optimizer, stats, flops, seed, trace, gathering };
    work.prepare(dev, comm, s.grad_accum)?;
    Ok(work)
}

/// Number of weights that have a gradient.
pub(super) fn trained_weights<B: Backend>(grads: &Grads<B>) -> u64 {
    grads.places().iter().filter_map(|(_, t)| t.as_ref()).map(|t| t.len() as u64).sum()
}

/// `parameters: 12,345 in all, 678 trained (5.49%)`.
pub fn parameters_line<B: Backend>(work: &Workload<B>) -> String {
    let all: u64 = work.model.params.places().iter().map(|(_, t)| t.len() as u64).sum();
    let trained = trained_weights(&work.grads);
    let share = 100.0 * trained as f64 / all as f64;
    format!("parameters: {} in all, {} trained ({share:.2}%)", grouped(all), grouped(trained))
}

/// Bytes on the device by class. `per_class` activations are those of the model's own account.
pub fn memory<B: Backend>(work: &Workload<B>) -> Vec<MemoryClass> {
    let bytes = |t: &Tensor<B>| (t.capacity() * t.dtype().bytes()) as u64;
    let weights =
        MemoryClass { name: "weights", bytes: work.model.params.places().iter().map(|(_, t)| bytes(t)).sum() };
    let packed = Some(work.packed).filter(|&n| n > 0).map(|bytes| MemoryClass { name: memory::PACKED, bytes });
    let rest = [
        MemoryClass {
            name: "gradients",
            bytes: work.grads.places().iter().filter_map(|(_, t)| t.as_ref()).map(bytes).sum(),
        },
        MemoryClass { name: "moments and masters", bytes: work.optimizer.bytes() as u64 },
        MemoryClass { name: "activations", bytes: work.acts.bytes() as u64 },
    ];
    [weights].into_iter().chain(packed).chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::{Shape, Warmup};
    use crate::settings::{Every, Resume};

    #[test]
    fn the_fingerprint_follows_arithmetic_alone() {
        let base = TrainSettings::default();
        let of = |change: fn(&mut TrainSettings)| {
            let mut s = base.clone();
            change(&mut s);
            fingerprint(&s, 1e-4, 100)
        };
        let same = fingerprint(&base, 1e-4, 100);
        assert_eq!(of(|s| s.save_every = Every::Steps(3)), same);
        assert_eq!(of(|s| s.logging_steps = 7), same);
        assert_eq!(of(|s| s.resume = Resume::Auto), same);
        assert_eq!(of(|s| s.threads = Some(1)), same);
        assert_ne!(of(|s| s.seed = 43), same);
        assert_ne!(of(|s| s.grad_accum = 2), same);
        assert_ne!(of(|s| s.lora.as_mut().unwrap().dropout = 0.1), same);
        assert_ne!(fingerprint(&base, 1e-4, 101), same);
        assert_ne!(fingerprint(&base, 2e-4, 100), same);
    }

    /// One setting changed at a time: what decides bits is among the deciding ones, and nothing else is.
    #[test]
    fn what_decides_bits_is_named_and_the_rest_is_not() {
        let base = TrainSettings::default();
        let of = |s: &TrainSettings| deciding(s, 1e-4, 100, true);
        let changed = |change: fn(&mut TrainSettings)| -> Vec<&str> {
            let mut s = base.clone();
            change(&mut s);
            let (before, after) = (of(&base), of(&s));
            after.iter().filter(|v| !before.contains(v)).map(|v| v.0).collect()
        };
        assert_eq!(changed(|s| s.seed = 9), ["seed"]);
        assert_eq!(changed(|s| s.max_grad_norm = None), ["max_grad_norm"]);
        assert_eq!(changed(|s| s.dtype = DType::Bf16), ["mixed_precision"]);
        assert_eq!(changed(|s| s.schedule.shape = Shape::Wsd), ["lr_scheduler_type"]);
        assert_eq!(changed(|s| s.max_seq_len = Some(64)), ["max_seq_len"]);
        assert_eq!(changed(|s| s.lora_targets = vec!["q".into()]), ["lora_targets"]);
        assert_eq!(changed(|s| s.lora = None), ["use_lora"]);
        assert_eq!(changed(|s| s.schedule.warmup = Warmup::Steps(4)), ["warmup_steps"]);
        // Nothing else was taken out of the list.
        let names: Vec<&str> = of(&base).into_iter().map(|v| v.0).collect();
        let all = "learning_rate lr_scheduler_type min_lr_ratio wsd_decay_ratio warmup_steps warmup_from_zero max_steps \
                   per_device_train_batch_size gradient_accumulation_steps max_seq_len packing seed mixed_precision weight_decay \
                   max_grad_norm adam_beta1 adam_beta2 adam_epsilon use_lora lora_r lora_alpha lora_dropout use_rslora lora_targets \
                   loraplus_lr_ratio";
        assert_eq!(names, all.split_whitespace().collect::<Vec<_>>());
        // Three of a hundred steps, and the targets in other words.
        assert!(changed(|s| s.schedule.warmup = Warmup::Steps(3)).is_empty());
        assert!(
            changed(
                |s| s.lora_targets = ["down_proj", "up", "gate", "o", "v", "k_proj", "q"].map(String::from).to_vec()
            )
            .is_empty()
        );
        assert!(changed(|s| (s.max_bad_steps, s.save_total_limit, s.logging_steps) = (3, Some(2), 7)).is_empty());
        assert!(
            changed(|s| (s.eval_every, s.save_every, s.threads) = (Every::Epoch, Every::Never, Some(1))).is_empty()
        );
        assert_eq!(deciding(&base, 1e-4, 100, false).iter().filter(|v| !of(&base).contains(v)).count(), 1);
    }

    /// Checkpoints of earlier versions resume: this is the text that they hashed.
    #[test]
    fn the_fingerprint_keeps_its_value() {
        let hash = |text: &str| blake3::hash(text.as_bytes()).to_hex().to_string();
        let mut s = TrainSettings::default();
        let text = "(0.0002, Cosine, 0.0, 0.2, Ratio(0.03), false, 100) (8, 1, None, 42, F32) (0.0, Some(1.0), 0.9, 0.999, 1e-8, 10) \
                    Some(LoraSettings { r: 16, alpha: 32.0, dropout: 0.05, rslora: false, targets: [\"q\", \"k\", \"v\", \"o\", \
                    \"gate\", \"up\", \"down\"], plus_ratio: None })";
        assert_eq!(fingerprint(&s, 2e-4, 100), hash(text));
        (s.lora, s.schedule.shape, s.schedule.warmup) = (None, Shape::Wsd, Warmup::Steps(7));
        (s.dtype, s.max_grad_norm, s.max_seq_len) = (DType::Bf16, None, Some(64));
        let text = "(0.001, Wsd, 0.0, 0.2, Steps(7), false, 9) (8, 1, Some(64), 42, Bf16) (0.0, None, 0.9, 0.999, 1e-8, 10) None";
        assert_eq!(fingerprint(&s, 1e-3, 9), hash(text));
    }

    #[test]
    fn settings_reach_the_optimiser() {
        let s = TrainSettings { max_grad_norm: None, ..Default::default() };
        let a = adamw(&s, Some(4096));
        assert_eq!((a.max_grad_norm, a.groups.new_rows, a.beta2), (None, Some(4096), 0.999));
    }
}
