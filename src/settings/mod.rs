//! Settings: one table defines each of them once, for the flags, the config file, the help and configs/README.md.

mod file;
mod fill;
mod lookup;
mod resolve;
mod table;
mod train;
mod value;

pub use file::read as read_file;
pub use lookup::{Source, find_config};
pub use resolve::{Origin, Resolved, Typed};
pub use table::TABLE;
pub use train::{
    EarlyStopping, Every, GenTest, LoraSettings, LrSchedule, Precision, Recompute, ResolvedSetting, Resume,
    TrainSettings, Warmup,
};
pub use value::{Kind, Value};

/// A command that takes settings; also a bit in [`Setting::commands`].
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
}

/// Commands a setting belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commands(u8);

impl Commands {
    /// `sft` and the inspections of its data.
    pub const SFT: Self = Self(Command::Sft as u8 | Command::Inspect as u8);
    /// `pretrain` alone.
    pub const PRETRAIN: Self = Self(Command::Pretrain as u8);
    /// Both trainings.
    pub const TRAIN: Self = Self(Self::SFT.0 | Command::Pretrain as u8);
    /// What decides the rows of fine-tuning, so `pack` takes it too.
    pub const SFT_DATA: Self = Self(Self::SFT.0 | Command::Pack as u8);
    /// What decides any data.
    pub const DATA: Self = Self(Self::TRAIN.0 | Command::Pack as u8);
    /// What decides the text of pretraining, so `pack` takes it too.
    pub const PRETRAIN_DATA: Self = Self(Command::Pretrain as u8 | Command::Pack as u8);
    /// `pack` alone.
    pub const PACK: Self = Self(Command::Pack as u8);

    /// Whether `command` is one of them.
    pub fn contains(self, command: Command) -> bool {
        self.0 & command as u8 != 0
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

/// One setting: a key of the config file and a flag of the same name.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Key of the config file, snake case; the flag is `--` and the key, with dashes or underscores.
    pub key: &'static str,
    /// Names other tools use for it, accepted in both places.
    pub aliases: &'static [&'static str],
    /// Heading in the help.
    pub group: &'static str,
    /// Commands that take it.
    pub commands: Commands,
    /// What values it takes.
    pub kind: Kind,
    /// The default as it would be typed; `None`: see `unset`.
    pub default: Option<&'static str>,
    /// What happens without a value, where there is no default.
    pub unset: &'static str,
    /// What it does, one or two sentences.
    pub help: &'static str,
    /// Other settings without which it does nothing.
    pub needs: Option<Needs>,
}

impl Setting {
    /// The flag with dashes, without `--`.
    pub fn flag(&self) -> String {
        self.key.replace('_', "-")
    }

    /// The flag that switches it off, without `--`: `no-lora` for `use_lora`, `no-packing` for `packing`.
    pub fn off_flag(&self) -> String {
        let stem = self.key.trim_start_matches("use_").trim_start_matches("do_");
        format!("no-{}", stem.replace('_', "-"))
    }
}

/// The setting with this key or alias.
pub fn find(name: &str) -> Option<&'static Setting> {
    TABLE.iter().find(|s| s.key == name || s.aliases.contains(&name))
}

/// The nearest of `names` to `found`, when it is near enough to be what was meant (Jaro-Winkler above 0.8).
pub fn nearest<'a>(found: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let scored = names.into_iter().map(|n| (strsim::jaro_winkler(found, n), n));
    let best = scored.fold(None, |best: Option<(f64, &str)>, s| match best {
        Some(b) if b.0 >= s.0 => Some(b),
        _ => Some(s),
    });
    best.filter(|b| b.0 > 0.8).map(|b| b.1)
}
