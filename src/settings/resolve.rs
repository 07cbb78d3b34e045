//! From flags, config file and defaults to one value per setting, each with where it came from.

use super::{Command, Setting, Settings, Value, file, find, find_config};
use crate::comm::ranks_of_environment;
use crate::error::{Error, Result};

/// Where a value came from; a later one overrides an earlier one.
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

/// What [`ResolvedSetting::origin`] says of a setting that nobody set.
pub const DEFAULT: &str = "default";

/// One line of the table printed at the start of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedSetting {
    /// Name as in the config file.
    pub name: String,
    /// Value as the run uses it.
    pub value: String,
    /// Where it came from: `default`, `config/sft_tiny.json`, `--lora_r`.
    pub origin: String,
}

/// The settings of a command, and where each came from.
#[derive(Clone, Debug)]
pub struct Resolved {
    command: Command,
    entries: Vec<(&'static Setting, Value, Origin)>,
    /// The values in their fields.
    pub settings: Settings,
    /// Notes for the user: settings that have no effect.
    pub warnings: Vec<String>,
}

impl Resolved {
    /// Flags over the config file over defaults; then checks settings against each other, and applies them.
    ///
    /// # Errors
    /// Usage errors that name the flag or key, what is expected and what was found.
    pub fn new(command: Command, typed: Typed, config_path: Option<&str>) -> Result<Self> {
        Self::on_ranks(command, typed, config_path, None)
    }

    /// As [`Resolved::new`], for so many ranks instead of those that the environment says.
    ///
    /// # Errors
    /// Those of [`Resolved::new`].
    pub fn on_ranks(command: Command, typed: Typed, config_path: Option<&str>, ranks: Option<usize>) -> Result<Self> {
        let (mut name, mut from_file) = (String::new(), Vec::new());
        if let Some(path) = config_path {
            let source = find_config(path)?;
            from_file = file::read(&source.text, &source.name)?;
            name = source.name;
        }
        let mut entries = Vec::new();
        for setting in command.rows() {
            let entry = if let Some((_, words)) = typed.iter().find(|(s, _)| s.key == setting.key) {
                (setting, from_words(setting, words)?, Origin::Flag)
            } else if let Some(i) = from_file.iter().position(|(s, _)| s.key == setting.key) {
                (setting, from_file.swap_remove(i).1, Origin::File(name.clone()))
            } else {
                (setting, setting.default_value(), Origin::Default)
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
        let mut resolved = Self { command, entries, settings: Settings::blank(), warnings };
        resolved.check_effects()?;
        resolved.check_counts()?;
        resolved.apply();
        if resolved.is_set("global_batch_size") {
            resolved.deal_rows(ranks.map_or_else(ranks_of_environment, Ok)?)?;
        }
        Ok(resolved)
    }

    /// The micro-batches of a step on each of so many ranks, from the rows of a step over all of them.
    fn deal_rows(&mut self, ranks: usize) -> Result<()> {
        let (train, global, own) = (&self.settings.train, "global_batch_size", "gradient_accumulation_steps");
        let (rows, micro_batch) = (train.global_batch_size.unwrap_or(0), train.micro_batch_size);
        let unit = micro_batch * ranks;
        let on = if ranks == 1 { String::new() } else { format!(" on {ranks} ranks") };
        if !rows.is_multiple_of(unit) {
            let (below, above) = (rows / unit * unit, rows.next_multiple_of(unit));
            let near = if below == 0 { above.to_string() } else { format!("{below} or {above}") };
            return Err(Error::usage(format!(
                "{} {rows}: micro-batches of {micro_batch} rows{on} make no step of so many rows; expected {near}, or another {}",
                self.named(global),
                self.named("per_device_train_batch_size")
            )));
        }
        let needed = rows / unit;
        let most = find(own).map_or(u64::MAX, |setting| setting.kind.most());
        if needed as u64 > most {
            return Err(Error::usage(format!(
                "{} {rows}: micro-batches of {micro_batch} rows{on} make it with {needed} a step, expected at most {most}; lower it, or raise {}",
                self.named(global),
                self.named("per_device_train_batch_size")
            )));
        }
        if self.is_set(own) && train.grad_accum != needed {
            return Err(Error::usage(format!(
                "{} {} contradicts {} {rows}, which micro-batches of {micro_batch} rows{on} make with {needed}; leave one of the two out",
                self.named(own),
                train.grad_accum,
                self.named(global)
            )));
        }
        let origin = self.origin(global).clone();
        for (setting, value, from) in &mut self.entries {
            if setting.key == own {
                (*value, *from) = (Value::Int(needed as u64), origin.clone());
            }
        }
        self.settings.train.grad_accum = needed;
        Ok(())
    }

    /// Every row writes its field, in the table's order.
    fn apply(&mut self) {
        let mut settings = Settings::blank();
        for (setting, value, _) in &self.entries {
            let value = if self.is_overridden(setting.key) { &Value::Unset } else { value };
            (setting.to)(&mut settings, value);
        }
        self.settings = settings;
    }

    /// Whether a key of the file loses its field to a flag that says the same in another way.
    fn is_overridden(&self, key: &str) -> bool {
        let by_flag = |key: &str| *self.origin(key) == Origin::Flag;
        match key {
            "warmup_steps" => by_flag("warmup_ratio"),
            "eval_steps" => {
                by_flag("eval_strategy") && !by_flag(key) && self.entry("eval_strategy").1.text() != "steps"
            }
            _ => false,
        }
    }

    /// The command these settings are for.
    pub fn command(&self) -> Command {
        self.command
    }

    /// A setting that another one switches off: an error when typed, a warning from a file.
    fn check_effects(&mut self) -> Result<()> {
        let mut idle: Vec<(String, String, String)> = Vec::new();
        for (setting, value, origin) in &self.entries {
            let Some(needs) = setting.needs else { continue };
            // `false` does nothing by itself; so `--no-lora` beside `"merge_adapters": false` is no mistake.
            if *origin == Origin::Default || *value == Value::Bool(false) || self.holds(&needs) {
                continue;
            }
            let other = find(needs.key).expect("the table names settings that exist");
            let reason = match &self.entry(needs.key).1 {
                Value::Bool(false) => format!("--{}", other.off_flag()),
                Value::Unset => format!("no --{}", other.flag()),
                v => format!("--{} {v}", other.flag()),
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
            Value::Unset => false,
            v => needs.values.is_empty() || needs.values.contains(&v.to_string().as_str()),
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

    fn entry(&self, key: &str) -> &(&'static Setting, Value, Origin) {
        let found = self.entries.iter().find(|e| e.0.key == key);
        found.unwrap_or_else(|| panic!("{key} is no setting of {:?}", self.command))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|e| e.0.key == key).and_then(|e| e.1.given())
    }

    fn origin(&self, key: &str) -> &Origin {
        &self.entry(key).2
    }

    /// Whether a flag or a file gave the setting.
    pub fn is_set(&self, key: &str) -> bool {
        self.get(key).is_some() && *self.origin(key) != Origin::Default
    }

    /// A value that the command cannot do without.
    ///
    /// # Errors
    /// A usage error that names the flag.
    pub fn required<T: Clone>(&self, value: &Option<T>, key: &str) -> Result<T> {
        value.clone().ok_or_else(|| self.missing(key))
    }

    /// Refuses a command that lacks some of these settings; all of them are named at once.
    ///
    /// # Errors
    /// A usage error that names the flags.
    pub fn require_all(&self, keys: &[&str]) -> Result<()> {
        let missing: Vec<&str> = keys.iter().copied().filter(|key| self.entry(key).1.given().is_none()).collect();
        match missing[..] {
            [] => Ok(()),
            [key] => Err(self.missing(key)),
            _ => {
                let flags: Vec<String> = missing.iter().map(|key| format!("--{}", self.entry(key).0.flag())).collect();
                let keys: Vec<String> = missing.iter().map(|key| format!("\"{key}\"")).collect();
                let (flags, keys) = (flags.join(", "), keys.join(", "));
                Err(Error::usage(format!("{flags} are required (or {keys} in the config file)")))
            }
        }
    }

    /// The error for a setting that has to be given.
    pub fn missing(&self, key: &str) -> Error {
        let setting = self.entry(key).0;
        Error::usage(format!("--{} is required (or \"{key}\" in the config file)", setting.flag()))
    }

    /// One line for each setting of the table at the start of a run, in the table's order.
    pub fn lines(&self) -> Vec<ResolvedSetting> {
        let line = |(setting, value, origin): &(&Setting, Value, Origin)| ResolvedSetting {
            name: setting.key.into(),
            value: value.given().map_or_else(|| format!("({})", setting.unset), Value::to_string),
            origin: match origin {
                Origin::Default => DEFAULT.into(),
                Origin::File(name) => name.clone(),
                Origin::Flag => format!("--{}", setting.flag()),
            },
        };
        self.entries.iter().map(line).collect()
    }
}

fn from_words(setting: &'static Setting, words: &[String]) -> Result<Value> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    setting.kind.parse(&words).map_err(|found| {
        let json = words.iter().flat_map(|w| w.split(',')).collect::<serde_json::Value>();
        let hint = file::hint(setting.key, &json);
        Error::usage(format!("--{}: expected {}, found {found}{hint}", setting.flag(), setting.kind.expected()))
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Every, TrainSettings};
    use super::*;
    use crate::optim::Warmup;

    fn resolved(flags: &[(&str, &str)]) -> Result<TrainSettings> {
        let typed: Typed =
            flags.iter().map(|(k, v)| (find(k).unwrap(), v.split(' ').map(String::from).collect())).collect();
        Resolved::new(Command::Sft, typed, None).map(|r| r.settings.train)
    }

    fn sft(flags: &[(&str, &str)]) -> TrainSettings {
        resolved(flags).unwrap()
    }

    #[test]
    fn without_flags_everything_is_as_the_table_says() {
        assert_eq!(sft(&[]), TrainSettings::default());
    }

    #[test]
    fn alpha_follows_the_rank() {
        let s = sft(&[("lora_r", "4")]).lora.unwrap();
        assert_eq!((s.r, s.alpha), (4, 8.0));
    }

    #[test]
    fn every_value_arrives() {
        let s = sft(&[("use_lora", "false"), ("warmup_steps", "7"), ("eval_steps", "5"), ("max_grad_norm", "0")]);
        assert_eq!((s.lora, s.schedule.warmup, s.eval_every), (None, Warmup::Steps(7), Every::Steps(5)));
        assert_eq!(s.max_grad_norm, None);
    }

    #[test]
    fn bad_values_are_named() {
        let bad = |key: &str, word: &str, expected: &str| {
            let e = resolved(&[(key, word)]).unwrap_err();
            assert_eq!(e.exit_code(), 2);
            assert!(e.to_string().starts_with(expected), "{e}");
        };
        bad("learning_rate", "-1", "--learning-rate: expected a number above 0, found \"-1\"");
        bad("learning_rate", "NaN", "--learning-rate");
        bad("gradient_accumulation_steps", "0", "--gradient-accumulation-steps: expected a whole number of at least 1");
        bad("warmup_ratio", "1.5", "--warmup-ratio");
        bad("warmup_ratio", "1", "--warmup-ratio: expected a number from 0 to below 1");
        bad("max_grad_norm", "-1", "--max-grad-norm");
        bad("adam_beta2", "1", "--adam-beta2");
        bad("lora_dropout", "1", "--lora-dropout");
        bad("save_steps", "0", "--save-steps");
        bad("max_seq_len", "1", "--max-seq-len");
    }

    /// A flag wins over the file where two keys say the same: warmup by ratio or steps, evaluation by strategy or steps.
    #[test]
    fn a_flag_wins_over_another_key_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let with = |file: &str, key: &str, word: &str| {
            let path = dir.path().join("c.json");
            std::fs::write(&path, file).unwrap();
            let typed: Typed = vec![(find(key).unwrap(), vec![word.into()])];
            Resolved::new(Command::Sft, typed, path.to_str()).unwrap().settings.train
        };
        let warmup = |file: &str, key: &str, word: &str| with(file, key, word).schedule.warmup;
        assert_eq!(warmup(r#"{"warmup_steps": 9}"#, "warmup_ratio", "0.5"), Warmup::Ratio(0.5));
        assert_eq!(warmup(r#"{"warmup_ratio": 0.5}"#, "warmup_steps", "9"), Warmup::Steps(9));
        assert_eq!(warmup(r#"{"warmup_steps": 9}"#, "seed", "1"), Warmup::Steps(9));
        let every = |file: &str, key: &str, word: &str| with(file, key, word).eval_every;
        assert_eq!(every(r#"{"eval_steps": 9}"#, "eval_strategy", "no"), Every::Never);
        assert_eq!(every(r#"{"eval_steps": 9}"#, "eval_strategy", "epoch"), Every::Epoch);
        assert_eq!(every(r#"{"eval_steps": 9}"#, "eval_strategy", "steps"), Every::Steps(9));
        assert_eq!(every(r#"{"eval_strategy": "no"}"#, "eval_steps", "9"), Every::Steps(9));
        assert_eq!(every(r#"{"eval_strategy": "no"}"#, "seed", "9"), Every::Never);
        // What another setting switches off is not taken.
        let save = |file: &str| with(file, "seed", "1").save_every;
        assert_eq!(save(r#"{"save_strategy": "no", "save_steps": 7}"#), Every::Never);
        assert_eq!(save(r#"{"save_steps": 7}"#), Every::Steps(7));
    }
}
