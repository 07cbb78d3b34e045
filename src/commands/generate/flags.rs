//! The flags of `ringtune generate`.

use std::path::PathBuf;

use clap::{Arg, Command};

use crate::commands::model_folder::ModelArgs;
use crate::data::template::Unmarked;
use crate::error::{Error, Result};
use crate::generate::Sampling;
use crate::settings::{GenerateSettings, Settings};

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

/// What its help says besides its flags, the prompts, and which flags exclude each other.
pub fn about(clap: Command) -> Command {
    let relations = |arg: Arg| match arg.get_id().as_str() {
        "prompt_file" => arg.conflicts_with("prompts"),
        "chat" => arg.conflicts_with_all(["prompts", "prompt_file", "batch", "json"]),
        "system" => arg.conflicts_with("raw"),
        "raw" => arg.conflicts_with("prompt_template"),
        "greedy" => arg.conflicts_with_all(["temperature", "top_k", "top_p", "min_p"]),
        "logprobs" => arg.requires("json"),
        _ => arg,
    };
    clap.about("Answer prompts, or hold a conversation, with a model or adapter")
        .after_help(
            "Without a prompt, standard input is the prompt; at a terminal it is a conversation, with line editing and a history: \
             /help lists its commands, Ctrl-C stops an answer.",
        )
        .arg(Arg::new("prompts").value_name("PROMPT").num_args(0..).help("Prompts, each answered on its own"))
        // Not `mut_arg`, which moves the flag to the end of the list.
        .mut_args(relations)
}

impl GenerateArgs {
    /// What was typed.
    pub fn of(s: &Settings, prompts: Vec<String>) -> Result<Self> {
        let GenerateSettings { prompt_file, batch, chat, system, raw, max_new_tokens, .. } = s.generate.clone();
        let GenerateSettings { sampling, stop, stop_ids, logprobs, json, .. } = s.generate.clone();
        let model = ModelArgs {
            // Text that is continued as it is needs no token of ChatML: a model without them is not grown.
            default_template: if raw { "plain" } else { "chatml" },
            ..ModelArgs::of(s, Unmarked::Whole)?
        };
        if batch && !prompts.is_empty() {
            return Err(Error::usage("--batch: prompts on the command line are prompts each already; leave it out"));
        }
        let asked = match prompt_file {
            _ if chat => Asked::Chat,
            Some(path) => Asked::File(path),
            None if prompts.is_empty() => Asked::Input,
            None => Asked::Words(prompts),
        };
        let style = if raw { Style::Raw } else { Style::Template };
        let (sampling, batch_size) = (Sampling { seed: s.train.seed, ..sampling }, s.train.eval_batch_size);
        Ok(Self {
            model,
            asked,
            batch,
            system,
            style,
            sampling,
            max_new_tokens,
            stop,
            stop_ids,
            batch_size,
            json,
            logprobs,
        })
    }
}
