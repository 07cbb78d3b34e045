//! `run.json`: what a run is made of, for reports: settings with origins, machine, parameters, memory, mix, warnings.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::setup;
use super::spec::RunSpec;
use super::step::Workload;
use crate::backend::Backend;

use crate::data::loader::StepShape;
use crate::data::mix::WeightUnit;
use crate::error::Result;
use crate::files::write_json;
use crate::log::tables::MemoryClass;
use crate::machine;
use crate::words::Words;

/// The file's name, in the run's folder.
pub const RUN: &str = "run.json";

/// Writes the record of a run that is about to start at a step; one that is resumed replaces it.
///
/// # Errors
/// If the file cannot be written.
pub fn write<B: Backend>(
    dev: &B,
    spec: &RunSpec,
    work: &Workload<B>,
    (first_step, max_steps): (u64, u64),
    shape: StepShape,
) -> Result<()> {
    let settings: Vec<Value> = spec
        .resolved_settings()
        .into_iter()
        .map(|s| json!({"name": s.name, "value": s.value, "origin": s.origin}))
        .collect();
    let memory: serde_json::Map<String, Value> =
        setup::memory(work).into_iter().map(|MemoryClass { name, bytes }| (name.to_string(), json!(bytes))).collect();
    let trained = setup::trained_weights(&work.grads);
    let all: u64 = work.model.params.places().iter().map(|(_, t)| t.len() as u64).sum();
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let value = json!({
        "program": format!("ringtune {}", env!("CARGO_PKG_VERSION")),
        "started": started,
        "first_step": first_step,
        "max_steps": max_steps,
        "rows_per_step": shape.rows(),
        "world_size": shape.world_size,
        "device": dev.describe(),
        "machine": this_machine(),
        "parameters": {"all": all, "trained": trained},
        "memory": memory,
        "mix": mix(spec),
        "settings": settings,
        "warnings": spec.warnings,
    });
    write_json(&spec.run_dir.join(RUN), &value)
}

/// Requested and achieved shares of the first epoch, and what each data set holds.
fn mix(spec: &RunSpec) -> Vec<Value> {
    let rows = spec.train.mix_report(0);
    let shares = |r: &crate::data::mix::MixRow| -> serde_json::Map<String, Value> {
        let units = WeightUnit::ALL.into_iter().enumerate();
        units.map(|(i, u)| (u.word().into(), json!({"requested": r.requested[i], "achieved": r.achieved[i]}))).collect()
    };
    rows.iter()
        .zip(spec.train.sets())
        .map(|(r, set)| {
            let size = set.size();
            json!({
                "name": r.name, "rows": r.available, "rows_of_an_epoch": r.size.samples, "tokens": size.tokens,
                "supervised_tokens": size.supervised, "shares": shares(r),
            })
        })
        .collect()
}

/// Processor, cores, memory and system, as far as the system says.
fn this_machine() -> Value {
    json!({
        "processor": machine::processor(),
        "cores": machine::threads(),
        "memory": machine::total_memory(),
        "system": machine::system(),
    })
}
