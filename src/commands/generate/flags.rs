//! The flags of `ringtune generate`.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use crate::commands::model_folder::{ModelArgs, count, long, model_flags, path};
use crate::error::{Error, Result};
use crate::generate::Sampling;

/// New tokens where none are asked for and the model has room for them.
pub(super) const DEFAULT_NEW_TOKENS: usize = 256;

/// Where prompts come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// The command line.
    Words(Vec<String>),
    /// `--prompt-file`
    File(PathBuf),
    /// Standard input; a conversation where that is a terminal.
    Input,
    /// `--chat`
    Chat,
}

/// What stands around a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// The prompt template.
    Template,
    /// Nothing: the text is continued.
    Raw,
}

/// What the command is asked to do.
#[derive(Clone, Debug)]
pub(super) struct GenerateArgs {
    pub model: ModelArgs,
    pub asked: Asked,
    /// Each line is a prompt.
    pub batch: bool,
    pub system: Option<String>,
    pub style: Style,
    pub sampling: Sampling,
    pub max_new_tokens: Option<usize>,
    pub stop: Vec<String>,
    pub stop_ids: Vec<u32>,
    pub batch_size: usize,
    pub json: bool,
    /// Likeliest tokens to print with each new one.
    pub logprobs: usize,
}

/// The command's flags.
pub fn command() -> Command {
    let switch = |id: &'static str, dashed: &'static str| long(id, dashed).action(ArgAction::SetTrue);
    let float = |id: &'static str, dashed: &'static str, default: &'static str| {
        long(id, dashed)
            .value_name("NUMBER")
            .allow_hyphen_values(true)
            .value_parser(value_parser!(f64))
            .default_value(default)
    };
    model_flags(Command::new("generate"))
        .about("Answer prompts, or hold a conversation, with a model or adapter")
        .after_help(
            "Without a prompt, standard input is the prompt; at a terminal it is a conversation: /reset forgets it, /exit ends it.",
        )
        .arg(
            Arg::new("prompts")
                .value_name("PROMPT")
                .num_args(0..)
                .help("Prompts, each answered on its own"),
        )
        .arg(path("prompt_file", "prompt-file").conflicts_with("prompts").help("File with the prompt"))
        .arg(switch("batch", "batch").help("Each line of the file or of standard input is a prompt"))
        .arg(
            switch("chat", "chat")
                .conflicts_with_all(["prompts", "prompt_file", "batch", "json"])
                .help("A conversation, a turn a line, where standard input is no terminal too"),
        )
        .arg(long("system", "system").value_name("TEXT").conflicts_with("raw").help("System turn before the prompt"))
        .arg(
            switch("raw", "raw")
                .conflicts_with("prompt_template")
                .help("No template: continue the text itself"),
        )
        .arg(
            count("max_new_tokens", "max-new-tokens", 1)
                .help("Longest answer in tokens [default: 256, or what the model has room for]"),
        )
        .arg(
            switch("greedy", "greedy")
                .conflicts_with_all(["temperature", "top_k", "top_p", "min_p"])
                .help("Always the likeliest token"),
        )
        .arg(float("temperature", "temperature", "0.7").help("Divides the logits; 0: the likeliest token"))
        .arg(count("top_k", "top-k", 0).default_value("0").help("Draw from the K likeliest tokens; 0: all"))
        .arg(float("top_p", "top-p", "0.9").help("Draw from the likeliest tokens that reach this probability together; 1: all"))
        .arg(float("min_p", "min-p", "0").help("Draw from tokens with this share of the likeliest one's probability; 0: all"))
        .arg(
            float("repetition_penalty", "repetition-penalty", "1")
                .help("Makes tokens that came before less likely; 1: off"),
        )
        .arg(
            long("stop", "stop")
                .value_name("TEXT")
                .action(ArgAction::Append)
                .allow_hyphen_values(true)
                .help("End an answer before this text, or at this control token; may be given again"),
        )
        .arg(
            long("stop_ids", "stop-ids")
                .value_name("IDS")
                .value_delimiter(',')
                .value_parser(value_parser!(u32))
                .help("End an answer at these token ids"),
        )
        .arg(
            count("batch_size", "batch-size", 1)
                .default_value("8")
                .help("Prompts at once; changes speed and memory only"),
        )
        .arg(
            count("logprobs", "logprobs", 1)
                .requires("json")
                .help("With --json: the N likeliest tokens at each place and their log probabilities"),
        )
        .arg(switch("json", "json").help("Print an object a prompt: prompt, text, token ids, why it ended"))
}

impl GenerateArgs {
    /// What was typed.
    pub fn of(m: &ArgMatches) -> Result<Self> {
        let number = |id: &str| m.get_one::<u64>(id).map(|&n| usize::try_from(n).unwrap_or(usize::MAX));
        let float = |id: &str| *m.get_one::<f64>(id).expect("it has a default");
        let texts = |id: &str| -> Vec<String> { m.get_many(id).into_iter().flatten().cloned().collect() };
        let raw = m.get_flag("raw");
        let model = ModelArgs {
            // Text that is continued as it is needs no token of ChatML: a model without them is not grown.
            default_template: if raw { "plain" } else { "chatml" },
            ..ModelArgs::of(m)?
        };
        let (words, batch) = (texts("prompts"), m.get_flag("batch"));
        if batch && !words.is_empty() {
            return Err(Error::usage("--batch: prompts on the command line are prompts each already; leave it out"));
        }
        let asked = match m.get_one::<PathBuf>("prompt_file") {
            _ if m.get_flag("chat") => Asked::Chat,
            Some(path) => Asked::File(path.clone()),
            None if words.is_empty() => Asked::Input,
            None => Asked::Words(words),
        };
        Ok(Self {
            asked,
            batch,
            system: m.get_one::<String>("system").cloned(),
            style: if raw { Style::Raw } else { Style::Template },
            sampling: Sampling {
                temperature: if m.get_flag("greedy") { 0.0 } else { float("temperature") },
                top_k: number("top_k").expect("it has a default"),
                top_p: float("top_p"),
                min_p: float("min_p"),
                repetition_penalty: float("repetition_penalty"),
                seed: model.seed,
            },
            max_new_tokens: number("max_new_tokens"),
            stop: texts("stop"),
            stop_ids: m.get_many("stop_ids").into_iter().flatten().copied().collect(),
            batch_size: number("batch_size").expect("it has a default"),
            json: m.get_flag("json"),
            logprobs: number("logprobs").unwrap_or(0),
            model,
        })
    }
}
