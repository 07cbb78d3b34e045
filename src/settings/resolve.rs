//! From flags, config file and defaults to one value per setting, each with where it came from.

use std::path::PathBuf;

use super::{Command, Setting, TABLE, Value, file, find, find_config};
use crate::error::{Error, Result};

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// A config file, by name.
    File(String),
    /// The command line.
    Flag,
}

/// What was typed on the command line: key and words of each flag, in the table's order.
pub type Typed = Vec<(&'static Setting, Vec<String>)>;

/// One value per setting of a command.
#[derive(Clone, Debug)]
pub struct Resolved {
    command: Command,
    entries: Vec<(&'static Setting, Option<Value>, Origin)>,
    /// Notes for the user: settings that have no effect.
    pub warnings: Vec<String>,
}

impl Resolved {
    /// Flags over the config file over defaults; then checks settings against each other.
    ///
    /// # Errors
    /// Usage errors that name the flag or key, what is expected and what was found.
    pub fn new(command: Command, typed: Typed, config_path: Option<&str>) -> Result<Self> {
        let (mut name, mut from_file) = (String::new(), Vec::new());
        if let Some(path) = config_path {
            let source = find_config(path)?;
            from_file = file::read(&source.text, &source.name)?;
            name = source.name;
        }
        let mut entries = Vec::new();
        for setting in TABLE.iter().filter(|s| s.commands.contains(command)) {
            let entry = if let Some((_, words)) = typed.iter().find(|(s, _)| s.key == setting.key) {
                (setting, Some(from_words(setting, words)?), Origin::Flag)
            } else if let Some(i) = from_file.iter().position(|(s, _)| s.key == setting.key) {
                (setting, Some(from_file.swap_remove(i).1), Origin::File(name.clone()))
            } else {
                let default = setting.default.map(|d| {
                    let words: Vec<&str> = d.split(' ').collect();
                    setting.kind.parse(&words).expect("the table's defaults are valid")
                });
                (setting, default, Origin::Default)
            };
            entries.push(entry);
        }
        // What flags override stays in place; the rest belongs to other commands. `pack` and `inspect` read only a part of a training's file.
        let mut warnings = Vec::new();
        let elsewhere = from_file.iter().filter(|(s, _)| !s.commands.contains(command));
        let left: Vec<&str> = elsewhere.map(|(s, _)| s.key).collect();
        if !left.is_empty() && matches!(command, Command::Pretrain | Command::Sft) {
            warnings.push(format!("{name}: no effect on this command: {}", left.join(", ")));
        }
        let mut resolved = Self { command, entries, warnings };
        resolved.check_effects()?;
        resolved.check_counts()?;
        Ok(resolved)
    }

    /// The command these settings are for.
    pub fn command(&self) -> Command {
        self.command
    }

    /// Every setting that has a value or could have one: key, value, origin.
    pub fn entries(&self) -> impl Iterator<Item = (&'static Setting, Option<&Value>, &Origin)> {
        self.entries.iter().map(|(s, v, o)| (*s, v.as_ref(), o))
    }

    /// A setting that another one switches off: an error when typed, a warning from a file.
    fn check_effects(&mut self) -> Result<()> {
        let mut idle: Vec<(String, String, String)> = Vec::new();
        for (setting, value, origin) in &self.entries {
            let Some(needs) = setting.needs else { continue };
            // `false` does nothing by itself; so `--no-lora` beside `"merge_adapters": false` is no mistake.
            if *origin == Origin::Default || *value == Some(Value::Bool(false)) || self.holds(&needs) {
                continue;
            }
            let other = find(needs.key).expect("the table names settings that exist");
            let reason = match &self.entry(needs.key).1 {
                Some(Value::Bool(false)) => format!("--{}", other.off_flag()),
                Some(v) => format!("--{} {v}", other.flag()),
                None => format!("no --{}", other.flag()),
            };
            match origin {
                Origin::Flag if self.command != Command::Inspect => {
                    return Err(Error::usage(format!(
                        "--{}: has no effect with {reason}; leave one of the two out",
                        setting.flag()
                    )));
                }
                Origin::File(name) => idle.push((name.clone(), reason, setting.key.into())),
                _ => {}
            }
        }
        while let Some((name, reason, _)) = idle.first().cloned() {
            let (same, rest): (Vec<_>, Vec<_>) = idle.into_iter().partition(|i| i.0 == name && i.1 == reason);
            let keys: Vec<String> = same.into_iter().map(|i| i.2).collect();
            self.warnings.push(format!("{name}: no effect with {reason}: {}", keys.join(", ")));
            idle = rest;
        }
        Ok(())
    }

    fn holds(&self, needs: &super::Needs) -> bool {
        match &self.entry(needs.key).1 {
            None => false,
            Some(v) => needs.values.is_empty() || needs.values.contains(&v.to_string().as_str()),
        }
    }

    /// Checks that concern two settings.
    fn check_counts(&self) -> Result<()> {
        if let (Some(Value::Floats(w)), Some(Value::Texts(p))) =
            (self.get("dataset_weights"), self.get("dataset_paths"))
            && w.len() != p.len()
        {
            return Err(Error::usage(format!(
                "{}: expected one weight for each of the {} data sets, found {} weights",
                self.named("dataset_weights"),
                p.len(),
                w.len()
            )));
        }
        if self.is_set("warmup_steps") && self.is_set("warmup_ratio") {
            let (steps, ratio) = (&self.entry("warmup_steps").2, &self.entry("warmup_ratio").2);
            if steps == ratio {
                return Err(Error::usage(format!(
                    "{} and {}: both say how long the warmup is; leave one out",
                    self.named("warmup_steps"),
                    self.named("warmup_ratio")
                )));
            }
        }
        if let Some(Value::Text(strategy)) = self.get("eval_strategy") {
            let steps = self.is_set("eval_steps");
            if strategy == "steps" && !steps {
                return Err(Error::usage(format!("{}: \"steps\" needs eval_steps", self.named("eval_strategy"))));
            }
            if strategy != "steps" && steps && self.entry("eval_strategy").2 == self.entry("eval_steps").2 {
                return Err(Error::usage(format!(
                    "{} and {}: \"{strategy}\" has no use for eval_steps; leave one out",
                    self.named("eval_strategy"),
                    self.named("eval_steps")
                )));
            }
        }
        Ok(())
    }

    /// How the user wrote a setting: `--lora-r`, or `FILE: key "lora_r"`.
    pub fn named(&self, key: &str) -> String {
        let (setting, _, origin) = self.entry(key);
        match origin {
            Origin::File(name) => format!("{name}: key \"{key}\""),
            Origin::Flag | Origin::Default => format!("--{}", setting.flag()),
        }
    }

    fn entry(&self, key: &str) -> &(&'static Setting, Option<Value>, Origin) {
        let found = self.entries.iter().find(|e| e.0.key == key);
        found.unwrap_or_else(|| panic!("{key} is no setting of {:?}", self.command))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|e| e.0.key == key).and_then(|e| e.1.as_ref())
    }

    /// Where the value came from.
    ///
    /// # Panics
    /// If the command has no such setting, as do all that follow.
    pub fn origin(&self, key: &str) -> &Origin {
        &self.entry(key).2
    }

    /// Whether a flag or a file gave the setting.
    pub fn is_set(&self, key: &str) -> bool {
        self.entries.iter().any(|e| e.0.key == key && e.2 != Origin::Default && e.1.is_some())
    }

    /// A switch.
    pub fn bool(&self, key: &str) -> bool {
        matches!(self.entry(key).1, Some(Value::Bool(true)))
    }

    /// A whole number, if there is one.
    pub fn int(&self, key: &str) -> Option<u64> {
        match &self.entry(key).1 {
            Some(Value::Int(n)) => Some(*n),
            _ => None,
        }
    }

    /// A number, if there is one.
    pub fn float(&self, key: &str) -> Option<f64> {
        match &self.entry(key).1 {
            Some(Value::Float(x)) => Some(*x),
            _ => None,
        }
    }

    /// A text, if there is one.
    pub fn text(&self, key: &str) -> Option<&str> {
        match &self.entry(key).1 {
            Some(Value::Text(s)) => Some(s),
            _ => None,
        }
    }

    /// A path, if there is one.
    pub fn path(&self, key: &str) -> Option<PathBuf> {
        self.text(key).map(PathBuf::from)
    }

    /// A path, if the command has the setting and there is one.
    pub fn opt_path(&self, key: &str) -> Option<PathBuf> {
        match self.get(key) {
            Some(Value::Text(s)) => Some(s.into()),
            _ => None,
        }
    }

    /// A path that the command cannot do without.
    ///
    /// # Errors
    /// A usage error that names the flag.
    pub fn required_path(&self, key: &str) -> Result<PathBuf> {
        self.path(key).ok_or_else(|| self.missing(key))
    }

    /// The error for a setting that has to be given.
    pub fn missing(&self, key: &str) -> Error {
        let setting = self.entry(key).0;
        Error::usage(format!("--{} is required (or \"{key}\" in the config file)", setting.flag()))
    }

    /// Texts or paths; empty without a value.
    pub fn texts(&self, key: &str) -> Vec<String> {
        match &self.entry(key).1 {
            Some(Value::Texts(v)) => v.clone(),
            _ => Vec::new(),
        }
    }

    /// Numbers, if there are any.
    pub fn floats(&self, key: &str) -> Option<Vec<f64>> {
        match &self.entry(key).1 {
            Some(Value::Floats(v)) => Some(v.clone()),
            _ => None,
        }
    }
}

fn from_words(setting: &'static Setting, words: &[String]) -> Result<Value> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    setting.kind.parse(&words).map_err(|found| {
        let json = serde_json::Value::String(words.first().copied().unwrap_or_default().into());
        let hint = file::hint(setting.key, &json);
        Error::usage(format!("--{}: expected {}, found {found}{hint}", setting.flag(), setting.kind.expected()))
    })
}
