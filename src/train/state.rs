//! What a run knows besides tensors, and `trainer_state.json` in the shape Hugging Face's Trainer writes.
//!
//! transformers loads the one file, so it holds the fields of its `TrainerState` and no others; ringtune's own, which resuming needs bit for
//! bit, stand in a file beside it. Here they are one document, with the latter under `ringtune`.

use serde_json::{Map, Value, json};

use super::early_stop::BestSoFar;
use crate::checkpoint::manifest;
use crate::checkpoint::state::read_json;
use crate::error::{Context, Error, Result};
use crate::settings::{Every, TrainSettings};

/// The part of a run that is not a tensor. Everything that influences later steps or log lines is in it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunState {
    /// Optimiser steps taken, skipped ones included.
    pub step: u64,
    /// Updates made: the `t` of Adam's bias correction, which a skipped step does not advance.
    pub updates: u64,
    /// Epoch of the cursor.
    pub epoch: u64,
    /// Rows of that epoch's global order that were consumed.
    pub rows: u64,
    /// The same place as a fraction of epochs, for logs.
    pub epoch_fraction: f64,
    /// Tokens processed.
    pub tokens_seen: u64,
    /// Floating-point operations done, for the model's arithmetic alone.
    pub flops: f64,
    /// Steps in a row skipped because something was not finite.
    pub bad_in_row: u32,
    /// Best evaluation and patience.
    pub best: BestSoFar,
    /// Sum of the losses since the last log line, and their number.
    pub window: (f64, u64),
    /// Sum of the losses of all updates.
    pub loss_sum: f64,
    /// Log lines and evaluations so far, as Hugging Face's `log_history`.
    pub log_history: Vec<Value>,
}

/// Facts of the run that `trainer_state.json` repeats.
#[derive(Clone, Copy, Debug)]
pub struct RunFacts<'a> {
    /// Settings of the loop.
    pub settings: &'a TrainSettings,
    /// Output folder as the user wrote it.
    pub output_dir: &'a std::path::Path,
    /// Steps the run is planned for.
    pub max_steps: u64,
}

/// The file's name, in checkpoints and in the output folder.
pub const TRAINER_STATE: &str = "trainer_state.json";
/// The file with ringtune's own fields, beside it.
pub const OWN_STATE: &str = "ringtune_state.json";

/// The document as two files: what transformers knows, and the rest.
pub fn split(mut document: Value) -> [(&'static str, Value); 2] {
    let own = document.as_object_mut().and_then(|d| d.shift_remove("ringtune")).unwrap_or_default();
    [(TRAINER_STATE, document), (OWN_STATE, own)]
}

/// The document of a folder. Earlier versions wrote it as one file.
///
/// # Errors
/// If a file cannot be read or is no JSON object.
pub fn read_document(dir: &std::path::Path) -> Result<Value> {
    let mut document = read_json(&dir.join(TRAINER_STATE))?;
    if document.get("ringtune").is_none() {
        document["ringtune"] = read_json(&dir.join(OWN_STATE))?;
    }
    Ok(document)
}

impl RunState {
    /// The whole document.
    pub fn to_json(&self, facts: RunFacts) -> Value {
        let s = facts.settings;
        let steps = |every: Every| match every {
            Every::Steps(n) => json!(n),
            Every::Epoch | Every::Never => json!(facts.max_steps),
        };
        let best = self.best.best;
        let best_checkpoint = best.map(|(_, step)| manifest::path_of(facts.output_dir, step).display().to_string());
        let mut callbacks = Map::new();
        if let Some(stop) = s.early_stopping {
            callbacks.insert(
                "EarlyStoppingCallback".into(),
                json!({
                    "args": {"early_stopping_patience": stop.patience, "early_stopping_threshold": stop.threshold},
                    "attributes": {"early_stopping_patience_counter": self.best.misses},
                }),
            );
        }
        json!({
            "best_global_step": best.map(|b| b.1),
            "best_metric": best.map(|b| b.0),
            "best_model_checkpoint": best_checkpoint,
            "epoch": self.epoch_fraction,
            "eval_steps": steps(s.eval_every),
            "global_step": self.step,
            "is_hyper_param_search": false,
            "is_local_process_zero": true,
            "is_world_process_zero": true,
            "log_history": self.log_history,
            "logging_steps": s.logging_steps,
            "max_steps": facts.max_steps,
            "num_input_tokens_seen": self.tokens_seen,
            "num_train_epochs": if s.epochs.fract() == 0.0 { json!(s.epochs as u64) } else { json!(s.epochs) },
            "save_steps": steps(s.save_every),
            "stateful_callbacks": callbacks,
            "total_flos": self.flops,
            "train_batch_size": s.micro_batch_size,
            "trial_name": null,
            "trial_params": null,
            "ringtune": {
                "updates": self.updates,
                "cursor": {"epoch": self.epoch, "rows": self.rows},
                "bad_steps_in_row": self.bad_in_row,
                "early_stopping": {"reference": self.best.reference, "misses": self.best.misses},
                "log_window": {"loss_sum": self.window.0, "steps": self.window.1},
                "loss_sum": self.loss_sum,
            },
        })
    }

    /// Reads what [`RunState::to_json`] wrote, bit for bit.
    ///
    /// # Errors
    /// If a field is missing or of another type, with its path.
    pub fn from_json(v: &Value) -> Result<Self> {
        let at = |path: &str| v.pointer(path).ok_or_else(|| Error::new(format!("{path}: missing")));
        let whole =
            |path: &str| at(path)?.as_u64().ok_or_else(|| Error::new(format!("{path}: expected a whole number")));
        let number = |path: &str| at(path)?.as_f64().ok_or_else(|| Error::new(format!("{path}: expected a number")));
        let small = |path: &str| u32::try_from(whole(path)?).map_err(|_| Error::new(format!("{path}: too large")));
        let list =
            |path: &str| at(path)?.as_array().cloned().ok_or_else(|| Error::new(format!("{path}: expected a list")));
        let optional = |path: &str| match at(path)? {
            Value::Null => Ok(None),
            _ => number(path).map(Some),
        };
        let best = match optional("/best_metric")? {
            Some(loss) => Some((loss, whole("/best_global_step")?)),
            None => None,
        };
        Ok(Self {
            step: whole("/global_step")?,
            updates: whole("/ringtune/updates")?,
            epoch: whole("/ringtune/cursor/epoch")?,
            rows: whole("/ringtune/cursor/rows")?,
            epoch_fraction: number("/epoch")?,
            tokens_seen: whole("/num_input_tokens_seen")?,
            flops: number("/total_flos")?,
            bad_in_row: small("/ringtune/bad_steps_in_row")?,
            best: BestSoFar {
                best,
                reference: optional("/ringtune/early_stopping/reference")?,
                misses: small("/ringtune/early_stopping/misses")?,
            },
            window: (number("/ringtune/log_window/loss_sum")?, whole("/ringtune/log_window/steps")?),
            loss_sum: number("/ringtune/loss_sum")?,
            log_history: list("/log_history")?,
        })
    }

    /// [`RunState::from_json`] of a file.
    ///
    /// # Errors
    /// If the file cannot be read or is not what this version writes.
    pub fn read(path: &std::path::Path) -> Result<Self> {
        let parse = || -> Result<Self> {
            let text = std::fs::read(path)?;
            Self::from_json(&serde_json::from_slice(&text).map_err(|e| Error::new(e.to_string()))?)
        };
        parse().context(|| path.display().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::EarlyStopping;

    fn facts(settings: &TrainSettings) -> RunFacts<'_> {
        RunFacts { settings, output_dir: std::path::Path::new("out"), max_steps: 40 }
    }

    #[test]
    fn survives_the_file_bit_for_bit() {
        let settings = TrainSettings {
            early_stopping: Some(EarlyStopping { patience: 3, threshold: 0.01 }),
            ..Default::default()
        };
        let state = RunState {
            step: 17,
            updates: 15,
            epoch: 1,
            rows: 36,
            epoch_fraction: 1.0 / 3.0,
            tokens_seen: 123_456_789_012,
            flops: 1.234_567_890_123_456_7e21,
            bad_in_row: 2,
            best: BestSoFar { best: Some((0.1 + 0.2, 10)), reference: Some(1.0 / 7.0), misses: 1 },
            window: (std::f64::consts::PI, 7),
            loss_sum: 1e-300,
            log_history: vec![json!({"step": 1, "loss": 10.123_456_789_012_345})],
        };
        let value = state.to_json(facts(&settings));
        let text = serde_json::to_string_pretty(&value).unwrap();
        assert_eq!(RunState::from_json(&serde_json::from_str(&text).unwrap()).unwrap(), state);
        assert_eq!(value["best_model_checkpoint"], "out/checkpoint-10");
        // As two files, and as the one of earlier versions.
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(TRAINER_STATE), &text).unwrap();
        assert_eq!(read_document(dir.path()).unwrap(), value);
        for (name, part) in split(value.clone()) {
            std::fs::write(dir.path().join(name), part.to_string()).unwrap();
        }
        assert_eq!(RunState::from_json(&read_document(dir.path()).unwrap()).unwrap(), state);
        let fresh = RunState::default();
        assert_eq!(RunState::from_json(&fresh.to_json(facts(&settings))).unwrap(), fresh);
    }

    /// The fields of `transformers.trainer_callback.TrainerState`, 5.24: it takes no others.
    #[test]
    fn transformers_knows_every_field() {
        let known = [
            "best_global_step",
            "best_metric",
            "best_model_checkpoint",
            "epoch",
            "eval_steps",
            "global_step",
            "is_hyper_param_search",
            "is_local_process_zero",
            "is_world_process_zero",
            "log_history",
            "logging_steps",
            "max_steps",
            "num_input_tokens_seen",
            "num_train_epochs",
            "save_steps",
            "stateful_callbacks",
            "total_flos",
            "train_batch_size",
            "trial_name",
            "trial_params",
        ];
        let [(_, theirs), (_, own)] = split(RunState::default().to_json(facts(&TrainSettings::default())));
        let mut names: Vec<&str> = theirs.as_object().unwrap().keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, known);
        assert!(own["cursor"]["rows"] == 0 && own.get("updates").is_some());
    }

    #[test]
    fn a_missing_field_is_named() {
        let mut value = RunState::default().to_json(facts(&TrainSettings::default()));
        value["ringtune"]["cursor"]["rows"] = json!("x");
        let e = RunState::from_json(&value).unwrap_err();
        assert_eq!(e.to_string(), "/ringtune/cursor/rows: expected a whole number");
        assert!(RunState::from_json(&json!({})).unwrap_err().to_string().ends_with("missing"));
    }
}
