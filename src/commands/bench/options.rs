//! What `ringtune bench` is asked, and the defaults that follow from the device.

use std::path::Path;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::baseline::Baseline;
use super::case::Setup;
use super::shapes::Shape;
use crate::commands::device;
use crate::error::{Context, Error, Result};
use crate::files::read_text;
use crate::hf;
use crate::measure::Nature;
use crate::model::Recompute;
use crate::model::config::ModelConfig;
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
    /// The shapes of a `config.json` instead, with its path.
    pub config: Option<(String, ModelConfig)>,
    /// Layers instead of the model's.
    pub layers: Option<usize>,
    /// Tokens of a micro-batch.
    pub tokens: Option<usize>,
    /// Tokens of a document.
    pub document: usize,
    /// Documents of a micro-batch instead.
    pub documents: Option<usize>,
    /// Share of a document's tokens that have a target: its last ones.
    pub supervised: f64,
    /// Micro-batches of a step.
    pub grad_accum: usize,
    /// Steps that are timed, instead of a time.
    pub steps: Option<usize>,
    /// Steps before those that count.
    pub warmup: usize,
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
    /// Whether products of the maker's library stand beside ours.
    pub peer: bool,
    /// Figures of another time, to compare with.
    pub baseline: Option<Baseline>,
    /// The least ratio of speeds that is no error.
    pub fail_below: Option<f64>,
}

/// Which command it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// `bench kernels`
    Kernels,
    /// `bench step`
    Step,
}

impl Which {
    /// The command's words.
    pub fn command(self) -> &'static str {
        if self == Which::Kernels { "bench kernels" } else { "bench step" }
    }
}

/// `--baseline` and `--fail-below`, which every bench has.
pub fn comparison(clap: Command) -> Command {
    clap.arg(
        Arg::new("baseline")
            .long("baseline")
            .value_name("FILE")
            .help("Compare with what --json printed at another time: the ratio of speeds of each case, and whether it is beyond the spread"),
    )
    .arg(
        Arg::new("fail_below")
            .long("fail-below")
            .alias("fail_below")
            .value_name("RATIO")
            .requires("baseline")
            .value_parser(value_parser!(f64))
            .help("End with 1 where a case has less than this of the speed in --baseline, such as 0.9 [default: it never does]"),
    )
}

/// What `--fail-below` says.
///
/// # Errors
/// A usage error for what is no ratio.
pub fn fail_below(m: &ArgMatches) -> Result<Option<f64>> {
    match m.get_one::<f64>("fail_below").copied() {
        Some(r) if !(r > 0.0 && r <= 1000.0) => {
            Err(Error::usage(format!("--fail-below: expected a ratio of speeds above 0, such as 0.9, found {r}")))
        }
        ratio => Ok(ratio),
    }
}

/// The flags of one of the two commands.
pub fn flags(clap: Command, which: Which) -> Command {
    let arg = |name: &'static str, value: &'static str| Arg::new(name).long(name).value_name(value);
    let count = |name, most| arg(name, "N").value_parser(value_parser!(u64).range(1..=most));
    let clap = comparison(clap)
        .arg(
            Arg::new("filter")
                .value_name("WORDS")
                .num_args(0..)
                .value_delimiter(',')
                .help("As --only, without the flag: cargo bench --bench kernels -- attention"),
        )
        .arg(
            arg("device", "DEVICE")
                .default_value("auto")
                .help("Device to measure: auto, cpu, or cuda and the number of a GPU (cuda:1); an emulated GPU gives counters, no times"),
        )
        .arg(count("threads", 4096).help("Threads of the CPU [default: one per core]"))
        .arg(
            arg("model", "MODEL").visible_alias("shape").help(
                "Shapes of Llama-3-8B (8b), Llama-3.2-1B (1b), SmolLM2-135M (135m or small), a tiny model, or those of a config.json [default: \
                 135m, tiny on an emulated GPU]",
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
        Which::Kernels => clap.arg(arg("compare", "LIBRARY").value_parser(["cublaslt"]).help(
            "Multiply by this library too, on the same shapes, with results held to the same bounds, where it is found",
        )),
        Which::Step => clap
            .arg(count("layers", 4096).help("Layers instead of the model's"))
            .arg(
                arg("recompute", "WHAT")
                    .default_value("none")
                    .value_parser(Recompute::WORDS.to_vec())
                    .help("What backward computes again"),
            )
            .arg(
                Arg::new("lora")
                    .long("lora")
                    .action(ArgAction::SetTrue)
                    .help("LoRA alone, as --only lora; without it both"),
            )
            .arg(
                arg("mixed_precision", "TYPE")
                    .value_parser(["no", "bf16"])
                    .conflicts_with("dtype")
                    .help("As --dtype, in the words of a training: no is f32"),
            )
            .arg(count("micro_batch", 1 << 20).help("Rows of a micro-batch of --seq_len tokens each [default: 1]"))
            .arg(
                count("seq_len", 1 << 20).conflicts_with_all(["tokens", "document"]).help(
                    "Tokens of a row, which is one document unless --documents says otherwise; instead of --tokens",
                ),
            )
            .arg(
                count("documents", 1 << 20).conflicts_with("document").help("Documents of a micro-batch, equally long"),
            )
            .arg(
                arg("supervised", "SHARE")
                    .default_value("1")
                    .value_parser(value_parser!(f64))
                    .help("Share of a document's tokens that have a target, its last ones; above 0, at most 1"),
            )
            .arg(count("grad_accum", 1 << 10).default_value("1").help("Micro-batches of a step, all alike"))
            .arg(count("steps", 1 << 20).help("Steps to time, instead of --seconds"))
            .arg(
                count("warmup", 1 << 20)
                    .default_value("1")
                    .help("Steps before those that count; the first of all is never counted"),
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
        let Asked { known: model, file: config } = shape(word("model"))?;
        let of_step = |id: &str| if step { count(id) } else { None };
        let supervised = if step { *m.get_one::<f64>("supervised").expect("it has a default") } else { 1.0 };
        if !(supervised > 0.0 && supervised <= 1.0) {
            return Err(Error::usage(format!(
                "--supervised: expected a share above 0 and at most 1, found {supervised}"
            )));
        }
        let (rows, length) = (of_step("micro_batch"), of_step("seq_len"));
        if rows.is_some() && length.is_none() {
            return Err(Error::usage("--micro_batch: it counts rows of --seq_len tokens, which is missing"));
        }
        let tokens = length.map(|length| length.saturating_mul(rows.unwrap_or(1))).or_else(|| count("tokens"));
        if let Some(tokens) = tokens.filter(|&n| n > 1 << 20) {
            return Err(Error::usage(format!("--micro_batch: at most {} tokens in all, found {tokens}", 1 << 20)));
        }
        let dtype = match (step && m.contains_id("mixed_precision"), word("dtype")) {
            (true, _) if word("mixed_precision") == Some("no") => DType::F32,
            (true, _) => DType::Bf16,
            (false, word) => {
                if word == Some("f32") {
                    DType::F32
                } else {
                    DType::Bf16
                }
            }
        };
        let lora = step && m.get_flag("lora");
        let fail_below = fail_below(m)?;
        let baseline = word("baseline").map(|file| Baseline::read(file, which.command())).transpose()?;
        let words = ["only", "filter"].into_iter().flat_map(|id| m.get_many::<String>(id).into_iter().flatten());
        Ok(Self {
            device,
            threads: count("threads"),
            model,
            config,
            layers: if step { count("layers") } else { None },
            tokens,
            document: length.or_else(|| count("document")).expect("it has a default"),
            documents: of_step("documents"),
            supervised,
            grad_accum: of_step("grad_accum").unwrap_or(1),
            steps: of_step("steps"),
            warmup: of_step("warmup").unwrap_or(1),
            dtype,
            recompute: recompute.unwrap_or(Recompute::None),
            seconds,
            only: words.cloned().chain(lora.then(|| "lora".into())).collect(),
            label: m.get_one("label").cloned(),
            json: m.get_flag("json"),
            peer: !step && word("compare").is_some(),
            baseline,
            fail_below,
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
        let mut config = self.config.as_ref().map_or_else(|| self.shape(nature).config(None), |(_, c)| c.clone());
        config.n_layers = self.layers.unwrap_or(config.n_layers);
        let document = self.documents.map_or(self.document, |n| tokens.div_ceil(n));
        Setup { config, tokens, document: document.min(tokens), dtype: self.dtype }
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
    pub fn check_only<'a>(&self, names: impl Iterator<Item = &'a str> + Clone, words: &[&'a str]) -> Result<()> {
        let known = |word: &String| names.clone().any(|n| n.to_lowercase().contains(&word.trim().to_lowercase()));
        match self.only.iter().find(|word| word.trim().is_empty() || !known(word)) {
            None => Ok(()),
            Some(word) => Err(Error::usage(format!(
                "--only: no case has \"{word}\" in its name; {}expected some of {}",
                near(word, names.clone().chain(words.iter().copied())),
                words.join(", ")
            ))),
        }
    }

    /// That there is something to compare.
    ///
    /// # Errors
    /// A usage error for `--baseline` on an emulated device.
    pub fn check_baseline(&self, nature: &Nature) -> Result<()> {
        match &self.baseline {
            Some(_) if nature.emulated => Err(Error::usage(
                "--baseline: an emulated device has no times to compare; leave it out, or use --device cpu",
            )),
            _ => Ok(()),
        }
    }

    /// The flags that decide the figures, as they would be typed, defaults too.
    pub fn line(&self, which: Which, nature: &Nature, setup: &Setup) -> String {
        let mut line = format!(
            "--model {} --tokens {} --document {} --dtype {} --seconds {}",
            self.config.as_ref().map_or(self.shape(nature).word(), |(path, _)| path),
            setup.tokens,
            setup.document,
            dtype_word(setup.dtype),
            self.seconds
        );
        if which == Which::Step {
            line += &format!(" --layers {} --recompute {}", setup.config.n_layers, self.recompute.word());
            line += &format!(" --warmup {} --supervised {}", self.warmup, self.supervised);
            line += &if self.grad_accum > 1 { format!(" --grad_accum {}", self.grad_accum) } else { String::new() };
            line += &self.steps.map_or(String::new(), |n| format!(" --steps {n}"));
        }
        if !self.only.is_empty() {
            line += &format!(" --only {}", self.only.join(","));
        }
        line
    }
}

/// The words of the names that are most like one that none has, in words of an error.
fn near<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> String {
    let found = word.trim().to_lowercase();
    let mut all: Vec<(f64, String)> = Vec::new();
    for part in names.flat_map(|name| name.split(|c: char| !c.is_alphanumeric())).filter(|part| part.len() > 1) {
        let part = part.to_lowercase();
        let likeness = strsim::jaro_winkler(&found, &part);
        if likeness >= 0.8 && !all.iter().any(|(_, known)| *known == part) {
            all.push((likeness, part));
        }
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    match all.len() {
        0 => String::new(),
        _ => format!("near are {}; ", all.into_iter().take(3).map(|(_, part)| part).collect::<Vec<_>>().join(", ")),
    }
}

/// What `--model` names, if anything.
#[derive(Default)]
struct Asked {
    known: Option<Shape>,
    file: Option<(String, ModelConfig)>,
}

/// A model of known shape by its word, or one that a `config.json` describes, by its path or that of its folder.
fn shape(word: Option<&str>) -> Result<Asked> {
    let Some(word) = word else { return Ok(Asked::default()) };
    let known = Shape::of_word(if word == "small" { "135m" } else { word });
    if known.is_some() {
        return Ok(Asked { known, file: None });
    }
    let path = Path::new(word);
    if !path.exists() {
        let words = Shape::WORDS.join(", ");
        return Err(Error::usage(format!("--model: expected {words}, small or a config.json, found {word}")));
    }
    let text = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
    let text = read_text(&text, 16 << 20).context(|| "--model".into())?;
    Ok(Asked { known: None, file: Some((word.to_string(), hf::config::parse(&text)?.model)) })
}

/// As `--dtype` says it.
pub fn dtype_word(dtype: DType) -> &'static str {
    if dtype == DType::Bf16 { "bf16" } else { "f32" }
}
