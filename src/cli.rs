//! The command line: clap built from the table of settings, and the way from a command's name to its body.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command as Clap, value_parser};

use crate::commands;
use crate::error::Result;

const COLUMNS: &str = "\
Results go to stdout, progress to stderr. Exit codes: 0 done, 1 data, files or device, 2 flags or configuration,
75 stopped by a signal with the state saved (run again with --resume-from-checkpoint auto).";

/// The whole command line. Every flag is known with dashes and with underscores.
pub fn command() -> Clap {
    Clap::new("ringtune")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Fine-tunes Llama-family language models: JSONL in, Hugging Face and PEFT files out")
        .after_help(COLUMNS)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .max_term_width(120)
        .subcommand(inspect())
        .subcommand(
            Clap::new("templates")
                .about("Print each prompt template's rendering of a small conversation, trained parts in colour"),
        )
}

fn inspect() -> Clap {
    let json = || {
        Arg::new("json")
            .long("json")
            .action(ArgAction::SetTrue)
            .help("Print JSON lines")
    };
    Clap::new("inspect")
        .about("Look at files, templates, tokens, and the rows a training sees")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(
            Clap::new("templates")
                .about("Render conversations and show which bytes are trained")
                .arg(
                    path("conversations")
                        .long("conversations")
                        .required(true)
                        .help("JSON file of conversations"),
                )
                .arg(
                    Arg::new("template")
                        .long("template")
                        .value_name("NAME")
                        .help("One template instead of all"),
                )
                .arg(json()),
        )
}

fn path(id: &'static str) -> Arg {
    Arg::new(id).value_name("PATH").value_parser(value_parser!(PathBuf))
}

/// Parses `args` and runs the command. Help, version and usage errors print themselves and end the process (0 or 2).
///
/// # Errors
/// Whatever stopped the command.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    let matches = command().try_get_matches_from(args).unwrap_or_else(|e| e.exit());
    match matches.subcommand().expect("clap requires a command") {
        ("templates", _) => commands::templates::run(),
        ("inspect", m) => run_inspect(m),
        _ => unreachable!("clap knows no other command"),
    }
}

fn run_inspect(matches: &ArgMatches) -> Result<()> {
    use commands::inspect;
    let (name, m) = matches.subcommand().expect("clap requires a command");
    let path = |id: &str| m.get_one::<PathBuf>(id).expect("clap requires it").as_path();
    let json = m.get_flag("json");
    match name {
        "templates" => {
            let template = m.get_one::<String>("template").map(String::as_str);
            inspect::templates::run(path("conversations"), template, json)
        }
        _ => unreachable!("clap knows no other command"),
    }
}
