//! Settings: one table says of each of them what it takes, its default and the field it writes. Flags, config files, the help,
//! configs/README.md and the tables at the start of a run are made from it.

mod fields;
mod file;
mod flags;
pub mod habits;
mod lookup;
mod resolve;
mod table;
mod train;
mod value;
mod variables;

pub use fields::{Content, DataSettings, EvalSettings, GenerateSettings, MergeSettings, ModelSettings};
pub use fields::{PrepareSettings, Settings};
pub use file::read as read_file;
pub use lookup::{Source, find_config};
pub use resolve::{DEFAULT, Origin, Resolved, ResolvedSetting, Typed};
pub use table::TABLE;
pub use train::{EarlyStopping, Every, GenTest, Reporter, Resume, TrainSettings, Zero};
pub use value::{Kind, Value};

/// A command that takes settings; of those that take a config file also a bit in [`Row::commands`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `ringtune pretrain`
    Pretrain = 1,
    /// `ringtune sft`
    Sft = 2,
    /// `ringtune pack`
    Pack = 4,
    /// `ringtune inspect rows` and `inspect packs`: they take what `sft` takes.
    Inspect = 8,
    /// `ringtune eval`
    Eval = 16,
    /// `ringtune generate`
    Generate = 32,
    /// `ringtune merge`
    Merge = 64,
    /// `ringtune prepare`
    Prepare = 128,
    /// `ringtune parity`
    Parity = 256,
}

impl Command {
    /// Its settings, in the order of its help.
    pub fn rows(self) -> Vec<&'static Setting> {
        match self {
            Command::Pretrain | Command::Sft | Command::Pack | Command::Inspect => {
                TABLE.iter().filter(|s| s.commands.contains(self)).collect()
            }
            Command::Eval => flags::EVAL.iter().collect(),
            Command::Generate => flags::GENERATE.iter().collect(),
            Command::Merge => flags::MERGE.iter().collect(),
            Command::Prepare => flags::PREPARE.iter().collect(),
            Command::Parity => flags::PARITY.iter().collect(),
        }
    }

    /// Whether its settings may stand in a config file.
    pub fn takes_config(self) -> bool {
        matches!(self, Command::Pretrain | Command::Sft | Command::Pack | Command::Inspect)
    }
}

/// Commands a setting belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commands(u16);

impl Commands {
    /// `sft` and the inspections of its data.
    pub const SFT: Self = Self(Command::Sft as u16 | Command::Inspect as u16);
    /// `pretrain` alone.
    pub const PRETRAIN: Self = Self(Command::Pretrain as u16);
    /// Both trainings.
    pub const TRAIN: Self = Self(Self::SFT.0 | Command::Pretrain as u16);
    /// What decides the rows of fine-tuning, so `pack` takes it too.
    pub const SFT_DATA: Self = Self(Self::SFT.0 | Command::Pack as u16);
    /// What decides any data.
    pub const DATA: Self = Self(Self::TRAIN.0 | Command::Pack as u16);
    /// What decides the text of pretraining, so `pack` takes it too.
    pub const PRETRAIN_DATA: Self = Self(Command::Pretrain as u16 | Command::Pack as u16);
    /// `pack` alone.
    pub const PACK: Self = Self(Command::Pack as u16);
    /// None that takes a config file.
    pub const NO_CONFIG: Self = Self(0);

    /// Whether `command` is one of them.
    pub fn contains(self, command: Command) -> bool {
        self.0 & command as u16 != 0
    }
}

/// When a setting has an effect: only while another has one of these values.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Key of the other setting.
    pub key: &'static str,
    /// Its values, as [`Value`] prints them; empty: any value but none.
    pub values: &'static [&'static str],
}

/// One setting: a key of the config file and a flag of the same name. Without `to` it is not done, and no table takes it.
#[derive(Clone, Copy, Debug)]
pub struct Row<T> {
    /// Key of the config file, snake case; the flag is `--` and the key, with dashes or underscores.
    pub key: &'static str,
    /// Names other tools use for it, accepted in both places.
    pub aliases: &'static [&'static str],
    /// Heading in the help.
    pub group: &'static str,
    /// Commands that take it.
    pub commands: Commands,
    /// What values it takes: the only place that knows the range.
    pub kind: Kind,
    /// The default as it would be typed; `None`: see `unset`.
    pub default: Option<&'static str>,
    /// What happens without a value, where there is no default.
    pub unset: &'static str,
    /// What it does, one or two sentences.
    pub help: &'static str,
    /// The word for its value in the help, where it is not the kind's.
    pub placeholder: &'static str,
    /// Other settings without which it does nothing.
    pub needs: Option<Needs>,
    /// Writes the value into its field. Rows are applied in the table's order, each of them, those without a value too.
    pub to: T,
}

/// A row that says where its value goes.
pub type Setting = Row<fn(&mut Settings, &Value)>;

impl<T> Row<T> {
    /// The flag with dashes, without `--`.
    pub fn flag(&self) -> String {
        self.key.replace('_', "-")
    }

    /// The flag that switches it off, without `--`: `no-lora` for `use_lora`, `no-packing` for `packing`.
    pub fn off_flag(&self) -> String {
        let stem = self.key.trim_start_matches("use_").trim_start_matches("do_");
        format!("no-{}", stem.replace('_', "-"))
    }

    /// Every name but the flag with dashes: the key, and the aliases in both spellings.
    pub fn other_names(&self) -> Vec<String> {
        let mut names: Vec<String> = vec![self.key.into()];
        for alias in self.aliases {
            names.extend([alias.to_string(), alias.replace('_', "-")]);
        }
        names.sort_unstable();
        names.dedup();
        names.retain(|n| *n != self.flag());
        names
    }

    /// The default as a value.
    pub fn default_value(&self) -> Value {
        let Some(default) = self.default else { return Value::Unset };
        let words: Vec<&str> = default.split(' ').collect();
        self.kind.parse(&words).expect("the table's defaults are valid")
    }
}

/// The setting of config files with this key or alias.
pub fn find(name: &str) -> Option<&'static Setting> {
    TABLE.iter().find(|s| s.key == name || s.aliases.contains(&name))
}

/// The nearest of `names` to `found`, when it is near enough to be what was meant (Jaro-Winkler above 0.8).
pub fn nearest<'a>(found: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    likest(found, names).filter(|b| b.1 > 0.8).map(|b| b.0)
}

/// The name most like `found`, and how much: 1 for the same (Jaro-Winkler).
pub fn likest<'a>(found: &str, names: impl IntoIterator<Item = &'a str>) -> Option<(&'a str, f64)> {
    names.into_iter().map(|n| (n, strsim::jaro_winkler(found, n))).reduce(|a, b| if b.1 > a.1 { b } else { a })
}
