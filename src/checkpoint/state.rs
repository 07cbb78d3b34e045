//! What a training checkpoint holds besides weights: the optimiser's tensors and the fingerprints of what the run depends on.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Context, Error, Result};
use crate::files::read_text;
use crate::hf::save::{Entry, write_tensors_with};
use crate::hf::{HostTensor, SaveDType};
use crate::{bail, ensure};

/// Name of the optimiser's file in a checkpoint.
pub const OPTIMIZER: &str = "optimizer.safetensors";

/// Writes named f32 tensors, for example the optimiser's moments and masters.
///
/// # Errors
/// If the file cannot be written.
pub fn write_state_tensors(path: &Path, tensors: &[(String, HostTensor)]) -> Result<()> {
    write_state_tensors_with(path, tensors, &[])
}

/// As [`write_state_tensors`], with entries of text in the header. Parts, which have an `@` in their names, are flat.
///
/// # Errors
/// If the file cannot be written.
pub fn write_state_tensors_with(path: &Path, tensors: &[(String, HostTensor)], more: &[(&str, String)]) -> Result<()> {
    let entries: Vec<Entry> = tensors.iter().map(|(name, t)| state_entry(name, (t.rows, t.cols))).collect();
    write_tensors_with(path, &entries, more, |i, _| Ok(&tensors[i].1))
}

/// A tensor of the optimiser's state in a file.
pub fn state_entry(name: &str, (rows, cols): (usize, usize)) -> Entry {
    let shape = if name.contains('@') { vec![rows * cols] } else { vec![rows, cols] };
    Entry { name: name.into(), shape, dtype: SaveDType::F32 }
}

/// Settings that decide which tensors a checkpoint holds, and their shapes: no run goes on with others.
const FIXED: [&str; 4] = ["lora_r", "lora_targets", "mixed_precision", "use_lora"];

/// What the hash of the data is of.
const DATA: &str = ": other rows, or rows that are divided or written otherwise (--dataset-paths, --val-fraction, --prompt-template, \
--max-seq-len, …)";

/// Hashes of what a run depends on, by name: `data`, `tokenizer`, `base_model`, `config`, …
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprints(pub BTreeMap<String, String>);

impl Fingerprints {
    /// Adds the settings that decide the bits of a run, each under `config.NAME` with its value instead of a hash.
    pub fn add_settings(&mut self, settings: impl IntoIterator<Item = (&'static str, String)>) {
        self.0.extend(settings.into_iter().map(|(name, value)| (format!("config.{name}"), value)));
    }

    /// Compares the fingerprints of a checkpoint (`self`) with those of this run. Names in `allowed` may differ; the differing
    /// ones are returned, so that they can be reported. What a checkpoint of an earlier version does not hold is not compared; its hash
    /// of all settings, `config`, is where it does not name them.
    ///
    /// # Errors
    /// If another one differs: the message names it and the flag that allows it. A usage error if `allowed` has an unknown name.
    pub fn check(&self, now: &Fingerprints, allowed: &[String]) -> Result<Vec<String>> {
        let groups: BTreeSet<&str> = self.0.keys().chain(now.0.keys()).map(|name| group(name).0).collect();
        if let Some(unknown) = allowed.iter().find(|a| !groups.contains(a.as_str())) {
            let known = groups.into_iter().collect::<Vec<_>>().join(", ");
            return Err(Error::usage(format!("--allow-changed {unknown}: expected one of {known}")));
        }
        let named = self.0.keys().any(|name| name.starts_with("config."));
        let mut changed: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        let mut fixed = Vec::new();
        for (name, old) in self.0.iter().filter(|(name, _)| !(named && *name == "config")) {
            let new = now.0.get(name);
            if Some(old) == new {
                continue;
            }
            let (group, setting) = group(name);
            // What only the other way to train has goes with it.
            const LORA: &str = "config.use_lora";
            if group == "config" && new.is_none() && self.0.get(LORA) != now.0.get(LORA) {
                continue;
            }
            // A hash is known by its beginning.
            let short = |h: Option<&String>| match h {
                None => "none".to_string(),
                Some(h) if setting.is_some_and(|_| h.len() < 64) => h.clone(),
                Some(h) => h.chars().take(12).collect(),
            };
            fixed.extend(setting.filter(|setting| FIXED.contains(setting)));
            let name = setting.map_or(String::new(), |setting| format!("{setting} "));
            changed.entry(group).or_default().push(format!("{name}was {}, is {}", short(Some(old)), short(new)));
        }
        for (group, what) in &changed {
            let (what, these) = (what.join("; "), if what.len() == 1 { "the same one" } else { "the same ones" });
            ensure!(
                fixed.is_empty() || *group != "config",
                "config differs from the checkpoint's ({what}); the checkpoint holds other tensors with another {}: resume with \
                 {these}, or start a run of its own in another --output-dir",
                fixed.join(" or ")
            );
            let of = if *group == "data" { DATA } else { "" };
            ensure!(
                allowed.iter().any(|a| a == group),
                "{group} differs from the checkpoint's ({what}){of}; resume with {these}, or pass --allow-changed {group}"
            );
        }
        Ok(changed.into_keys().map(String::from).collect())
    }

    /// As a JSON object.
    pub fn to_json(&self) -> Value {
        serde_json::to_value(&self.0).expect("a map of strings always prints")
    }

    /// From a JSON object of strings.
    ///
    /// # Errors
    /// If it is something else.
    pub fn from_json(value: &Value) -> Result<Self> {
        let map = BTreeMap::deserialize(value).map_err(|e| Error::new(format!("fingerprints: {e}")))?;
        Ok(Self(map))
    }
}

/// `config.seed` as `config` and `seed`.
fn group(name: &str) -> (&str, Option<&str>) {
    name.split_once('.').map_or((name, None), |(group, setting)| (group, Some(setting)))
}

/// Reads a JSON object from a file.
///
/// # Errors
/// If the file cannot be read or holds something else.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = read_text(path, 256 << 20)?;
    let value: Value = serde_json::from_str(&text)
        .map_err(|e| Error::new(format!("invalid JSON: {e}")))
        .context(|| path.display().to_string())?;
    if !value.is_object() {
        bail!("{}: expected a JSON object", path.display());
    }
    Ok(value)
}
