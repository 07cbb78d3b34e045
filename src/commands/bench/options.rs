//! What `ringtune bench` is asked, and the defaults that follow from the device.

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::case::Setup;
use super::shapes::Shape;
use crate::commands::device;
use crate::error::{Error, Result};
use crate::measure::Nature;
use crate::model::Recompute;
use crate::tensor::DType;
use crate::words::Words;

/// Flags of both commands, as typed.
#[derive(Clone, Debug)]
pub struct Options {
    /// What to compute on.
    pub device: String,
    /// Threads of the CPU.
    pub threads: Option<usize>,
    /// Whose shapes.
    pub model: Option<Shape>,
    /// Layers instead of the model's.
    pub layers: Option<usize>,
    /// Tokens of a micro-batch.
    pub tokens: Option<usize>,
    /// Tokens of a document.
    pub document: usize,
    /// How weights and activations are stored.
    pub dtype: DType,
    /// What backward computes again.
    pub recompute: Recompute,
    /// Seconds of timing for a case.
    pub seconds: f64,
    /// Words of which a case's name has one.
    pub only: Vec<String>,
    /// What the figures are of, in the user's words.
    pub label: Option<String>,
    /// One JSON document instead of a table.
    pub json: bool,
}

/// Which command it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// `bench kernels`
    Kernels,
    /// `bench step`
    Step,
}

/// The flags of one of the two commands.
pub fn flags(clap: Command, which: Which) -> Command {
    let arg = |name: &'static str, value: &'static str| Arg::new(name).long(name).value_name(value);
    let count = |name, most| arg(name, "N").value_parser(value_parser!(u64).range(1..=most));
    let clap = clap
        .arg(
            arg("device", "DEVICE")
                .default_value("auto")
                .help("Device to measure: auto, cpu, or cuda and the number of a GPU (cuda:1); an emulated GPU gives counters, no times"),
        )
        .arg(count("threads", 4096).help("Threads of the CPU [default: one per core]"))
        .arg(
            arg("model", "MODEL").value_parser(Shape::WORDS.to_vec()).help(
                "Shapes of Llama-3-8B, Llama-3.2-1B, SmolLM2-135M or a tiny model [default: 135m, tiny on an emulated GPU]",
            ),
        )
        .arg(count("tokens", 1 << 20).help("Tokens of a micro-batch [default: 512 on the CPU, 8192 on a GPU, 64 on an emulated one]"))
        .arg(count("document", 1 << 20).default_value("2048").help("Tokens of a document at most"))
        .arg(
            arg("dtype", "TYPE")
                .default_value("bf16")
                .value_parser(["bf16", "f32"])
                .help("How weights and activations are stored"),
        )
        .arg(
            arg("seconds", "S")
                .default_value(if which == Which::Kernels { "0.3" } else { "5" })
                .value_parser(value_parser!(f64))
                .allow_hyphen_values(true)
                .help("Time to spend on each case after its first run, at least three rounds; 0 is a quick look from warm caches"),
        )
        .arg(arg("only", "WORDS").value_delimiter(',').help("Cases whose name has one of these words, such as matmul,attention"))
        .arg(arg("label", "TEXT").help("A name for these figures, such as the commit of the build; printed with them"))
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print one JSON document; its fields are in benches/README.md"));
    match which {
        Which::Kernels => clap,
        Which::Step => clap.arg(count("layers", 4096).help("Layers instead of the model's")).arg(
            arg("recompute", "WHAT")
                .default_value("none")
                .value_parser(Recompute::WORDS.to_vec())
                .help("What backward computes again"),
        ),
    }
}

impl Options {
    /// From what was typed.
    ///
    /// # Errors
    /// A usage error for a device or a time that is none.
    pub fn new(m: &ArgMatches, which: Which) -> Result<Self> {
        let word = |id: &str| m.get_one::<String>(id).map(String::as_str);
        let count = |id: &str| m.get_one::<u64>(id).map(|&n| n as usize);
        let device = word("device").unwrap_or("auto").to_string();
        device::check(&device)?;
        let seconds = *m.get_one::<f64>("seconds").expect("it has a default");
        if !(0.0..=3600.0).contains(&seconds) {
            return Err(Error::usage(format!("--seconds: expected 0 to 3600, found {seconds}")));
        }
        let step = which == Which::Step;
        let recompute = if step { word("recompute").and_then(Recompute::of_word) } else { None };
        Ok(Self {
            device,
            threads: count("threads"),
            model: word("model").and_then(Shape::of_word),
            layers: if step { count("layers") } else { None },
            tokens: count("tokens"),
            document: count("document").expect("it has a default"),
            dtype: if word("dtype") == Some("f32") { DType::F32 } else { DType::Bf16 },
            recompute: recompute.unwrap_or(Recompute::None),
            seconds,
            only: m.get_many("only").into_iter().flatten().cloned().collect(),
            label: m.get_one("label").cloned(),
            json: m.get_flag("json"),
        })
    }

    /// The model that is measured on a device.
    pub fn shape(&self, nature: &Nature) -> Shape {
        self.model.unwrap_or(if nature.emulated { Shape::Tiny } else { Shape::Small })
    }

    /// Tokens of a micro-batch on a device.
    pub fn tokens(&self, nature: &Nature, has_memory: bool) -> usize {
        self.tokens.unwrap_or(match (nature.emulated, has_memory) {
            (true, _) => 64,
            (false, true) => 8192,
            (false, false) => 512,
        })
    }

    /// Shapes of the cases on a device; `has_memory`: of its own, as a GPU has.
    pub fn setup(&self, nature: &Nature, has_memory: bool) -> Setup {
        let tokens = self.tokens(nature, has_memory);
        let config = self.shape(nature).config(self.layers);
        Setup { config, tokens, document: self.document.min(tokens), dtype: self.dtype }
    }

    /// Whether a case is wanted: its name has one of the words, whatever their case.
    pub fn wants(&self, name: &str) -> bool {
        let name = name.to_lowercase();
        self.only.is_empty() || self.only.iter().any(|word| name.contains(&word.trim().to_lowercase()))
    }

    /// That a word names no case.
    ///
    /// # Errors
    /// A usage error with the words that do, if none of the names is wanted, or a word is in none of them.
    pub fn check_only<'a>(&self, names: impl Iterator<Item = &'a str> + Clone, words: &[&str]) -> Result<()> {
        let known = |word: &String| names.clone().any(|n| n.to_lowercase().contains(&word.trim().to_lowercase()));
        match self.only.iter().find(|word| word.trim().is_empty() || !known(word)) {
            None => Ok(()),
            Some(word) => Err(Error::usage(format!(
                "--only: no case has \"{word}\" in its name; expected some of {}",
                words.join(", ")
            ))),
        }
    }

    /// The flags that decide the figures, as they would be typed, defaults too.
    pub fn line(&self, which: Which, nature: &Nature, setup: &Setup) -> String {
        let mut line = format!(
            "--model {} --tokens {} --document {} --dtype {} --seconds {}",
            self.shape(nature).word(),
            setup.tokens,
            setup.document,
            dtype_word(setup.dtype),
            self.seconds
        );
        if which == Which::Step {
            line += &format!(" --layers {} --recompute {}", setup.config.n_layers, self.recompute.word());
        }
        if !self.only.is_empty() {
            line += &format!(" --only {}", self.only.join(","));
        }
        line
    }
}

/// As `--dtype` says it.
pub fn dtype_word(dtype: DType) -> &'static str {
    if dtype == DType::Bf16 { "bf16" } else { "f32" }
}
