//! The output folder: whether it can be written, what an earlier run left, whether it can be resumed, room on the disk.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::budget::Steps;
use super::{Check, Finding};
use crate::checkpoint::manifest;
use crate::checkpoint::state::Fingerprints;
use crate::commands::device;
use crate::commands::start::{Start, fingerprints, hash_model};
use crate::error::Result;
use crate::files::check_writable;
use crate::machine::free_bytes;
use crate::model::weights::{Kind, Weights};
use crate::settings::{Every, Resume};
use crate::tensor::DType;
use crate::text::{bytes, grouped, table};
use crate::train::checkpoints::{Saved, longer_line, read_state};
use crate::train::folder::refuse_overwriting;
use crate::train::memory::Demand;
use crate::train::run::check_no_earlier_run;
use crate::train::setup;

/// Looks at the output folder without creating or changing it.
pub fn examine(check: &mut Check, start: &Start, steps: Option<Steps>) {
    let dir = &start.run_dir;
    let place = dir.display().to_string();
    let state = match (dir.is_dir(), dir.exists()) {
        (true, _) => "there",
        (false, true) => "not a folder",
        (false, false) => "new",
    };
    let above = existing(dir);
    let writable = check_writable(&above).is_ok();
    if state == "not a folder" || !writable {
        check.push(
            Finding::problem("output-folder", place.as_str(), "the output folder cannot be written")
                .but(
                    "a folder that can be written to",
                    if state == "not a folder" { "a file" } else { "no permission" },
                )
                .advice("choose another --output-dir"),
        );
    }
    let rows = start.data.iter().flat_map(|d| d.train.sets()).map(|set| ("the data set", Path::new(&set.name)));
    let model = start.base.iter().map(|base| ("the model", base.dir()));
    check.take("output-folder", &place, refuse_overwriting(dir, &rows.chain(model).collect::<Vec<_>>()));
    let checkpoints = manifest::list(dir).unwrap_or_default();
    let left: Vec<&str> = ["adapter_model.safetensors", "model.safetensors", "final/model.safetensors"]
        .into_iter()
        .filter(|name| dir.join(name).exists())
        .collect();
    if let Some(name) = left.first() {
        check.push(
            Finding::warning("output-folder", format!("{place}/{name}"), "a result of an earlier run will be replaced")
                .advice("choose another --output-dir to keep it"),
        );
    }
    let resume = match state {
        "not a folder" => ("impossible".into(), json!({"asked": false})),
        _ => resume(check, start, steps),
    };
    let needed = steps.and_then(|steps| room(start, steps));
    let free = free_bytes(&above);
    let mut rows = vec![
        vec!["folder".into(), format!("{place} ({state})")],
        vec![
            "checkpoints".into(),
            match checkpoints.last() {
                Some((step, _)) => format!("{}, the newest of step {step}", checkpoints.len()),
                None => "none".into(),
            },
        ],
        vec!["resume".into(), resume.0],
    ];
    if let Some(n) = &needed {
        rows.push(vec!["a checkpoint takes".into(), format!("about {}", bytes(n.checkpoint))]);
        rows.push(vec!["checkpoints kept".into(), grouped(n.kept)]);
        rows.push(vec!["needed in all".into(), format!("about {}", bytes(n.total))]);
    }
    if let Some(free) = free {
        rows.push(vec!["free".into(), bytes(free)]);
    }
    if let (Some(n), Some(free)) = (&needed, free)
        && n.total > free
    {
        check.push(
            Finding::problem("disk", place.as_str(), "the disk would be full before the end")
                .but(format!("about {} free", bytes(n.total)), bytes(free))
                .advice("keep fewer checkpoints (--save-total-limit), save less often, or choose another --output-dir"),
        );
    }
    check.section(
        "output folder",
        table(&rows),
        json!({
            "path": place, "state": state, "writable": writable, "checkpoints": checkpoints.len(),
            "newest_step": checkpoints.last().map(|c| c.0), "resume": resume.1,
            "needed_bytes": needed.as_ref().map(|n| n.total), "checkpoint_bytes": needed.as_ref().map(|n| n.checkpoint),
            "free_bytes": free,
        }),
    );
}

/// The folder itself, or the nearest one above it that exists.
fn existing(dir: &Path) -> PathBuf {
    let found = dir.ancestors().find(|p| !p.as_os_str().is_empty() && p.exists());
    found.map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Where the run would start, in words and as data.
fn resume(check: &mut Check, start: &Start, steps: Option<Steps>) -> (String, Value) {
    let dir = &start.run_dir;
    let path = match &start.settings.resume {
        Resume::No => {
            check.take("resume", &dir.display().to_string(), check_no_earlier_run(dir));
            return ("no: starts at step 0".into(), json!({"asked": false}));
        }
        Resume::Path(path) => match check.take("resume", &path.display().to_string(), manifest::verify(path)) {
            Some(_) => path.clone(),
            None => return ("impossible".into(), json!({"asked": true, "possible": false})),
        },
        Resume::Auto => {
            let found = manifest::find_newest(dir);
            let Some(found) = check.take("resume", &dir.display().to_string(), found) else {
                return ("impossible".into(), json!({"asked": true, "possible": false}));
            };
            for (passed, why) in &found.passed_over {
                let mut finding = Finding::error("resume", passed.display().to_string(), why);
                finding.severity = super::Severity::Warning;
                finding.advice = "this checkpoint is passed over".into();
                check.push(finding);
            }
            match found.chosen {
                Some(path) => path,
                None => {
                    return ("no checkpoint yet: starts at step 0".into(), json!({"asked": true, "from": null}));
                }
            }
        }
    };
    let place = path.display().to_string();
    let Some(steps) = steps else {
        return (format!("{place}, not compared: the data could not be read"), json!({"asked": true, "from": place}));
    };
    let compared = now(start, steps).and_then(|now| read_state(&path, &now, &start.settings, steps.total));
    match check.take("resume", &place, compared) {
        Some(Saved { state, changed, longer, .. }) => {
            if let Some(was) = longer {
                let line = longer_line(&start.settings, start.peak_lr, was, steps.total, state.step);
                check.push(Finding::warning("resume", place.as_str(), line));
            }
            for name in &changed {
                check.push(Finding::warning(
                    "resume",
                    place.as_str(),
                    format!("{name} differs from the checkpoint's, as --allow-changed permits"),
                ));
            }
            let left = steps.total - state.step;
            (
                format!("from {place}, after step {}, {left} steps left", state.step),
                json!({"asked": true, "possible": true, "from": place, "step": state.step, "steps_left": left, "changed": changed}),
            )
        }
        None => (format!("{place}: impossible"), json!({"asked": true, "possible": false, "from": place})),
    }
}

/// Hashes of everything the run depends on, as the training would make them.
fn now(start: &Start, steps: Steps) -> Result<Fingerprints> {
    let mut all = match (&start.data, &start.tokenizer) {
        (Some(data), Some(tokenizer)) => fingerprints(data, tokenizer),
        _ => Fingerprints::default(),
    };
    if let Some(base) = &start.base {
        all.0.insert("base_model".into(), hash_model(base.dir())?);
    }
    let (s, peak) = (&start.settings, start.peak_lr);
    all.0.insert("config".into(), setup::fingerprint(s, peak, steps.total));
    all.add_settings(setup::deciding(s, peak, steps.total, start.packing));
    Ok(all)
}

/// Bytes on the disk.
struct Room {
    checkpoint: u64,
    kept: u64,
    total: u64,
}

/// What a run writes: its checkpoints, its result, and what goes with them.
fn room(start: &Start, steps: Steps) -> Option<Room> {
    let (config, data) = (start.config.as_ref()?, start.data.as_ref()?);
    let s = &start.settings;
    let demand = Demand {
        config,
        settings: s,
        lora: start.lora.as_ref(),
        new_rows: start.new_rows.map(|(_, n)| n),
        max_seq_len: data.train.max_seq_len(),
        saves: false,
        device: device::footprint(false, config.n_classes),
    };
    let element = s.dtype.bytes() as u64;
    let in_files = start.base.as_ref().map_or(element, |b| b.dtype().bytes() as u64);
    let tokenizer = start.tokenizer.as_ref().map_or(0, |t| 8 * t.bytes().len() as u64);
    let weights = Weights::of(config);
    let vocabulary = weights.places().into_iter().filter(|(at, _)| at.kind() == Kind::Vocabulary);
    let vocabulary: u64 = vocabulary.map(|(at, _)| at.len(config, 0) as u64).sum();
    // An adapter of a grown vocabulary carries the whole embedding and head.
    let result = match (&start.lora, start.new_rows) {
        (Some(_), Some(_)) => 4 * (demand.lora_weights() + vocabulary),
        (Some(_), None) => 4 * demand.lora_weights(),
        (None, _) => element * demand.base_weights(),
    } + tokenizer;
    let masters = if s.dtype == DType::Bf16 { 3 } else { 2 };
    let checkpoint = result + 4 * masters * demand.trained_weights();
    let saves = match s.save_every {
        Every::Never => 0,
        Every::Steps(n) => steps.total.div_ceil(n),
        Every::Epoch => steps.total.div_ceil(steps.epoch.max(1)),
    };
    // The best one is kept besides, and the next is written before the oldest goes.
    let kept = s.save_total_limit.map_or(saves, |k| saves.min(k as u64 + 2));
    let model = in_files * demand.base_weights() + tokenizer;
    let mut total = kept * checkpoint + result;
    if start.new_rows.is_some() && start.lora.is_some() {
        total += model;
    }
    if s.merge_adapters {
        total += model;
    }
    Some(Room { checkpoint, kept, total })
}
