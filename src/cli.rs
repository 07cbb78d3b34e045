//! The command line: clap built from the table of settings, and the way from a command's name to its body.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::builder::Styles;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, ColorChoice, Command as Clap, value_parser};

use crate::error::{Context, Error, Result};
use crate::hf::save::parse_size;
use crate::hub::Part;
use crate::settings::{Command, Kind, Resolved, Setting, TABLE, Typed};
use crate::train::signals::leave_nothing_behind;
use crate::{commands, say};
use commands::fetch::ALONE;

mod foreign;

use foreign::{as_here, unknown_flags, usage};

const COLUMNS: &str = "\
Results go to stdout, progress to stderr. Exit codes: 0 done, 1 data, files or device, 2 flags or configuration,
75 stopped by a signal with the state saved (run again with --resume-from-checkpoint auto).";

/// Id of the `--mixed-precision` that stands before the command.
const BEFORE: &str = "mixed_precision before the command";

/// The whole command line. Every flag is known with dashes and with underscores.
pub fn command() -> Clap {
    let colour = if say::stdout_has_colour() { ColorChoice::Always } else { ColorChoice::Never };
    let styles = Styles::styled().header(say::look::HEADING).usage(say::look::HEADING).literal(say::look::HEADING);
    Clap::new("ringtune")
        .color(colour)
        .styles(styles.placeholder(say::look::DIM))
        .version(env!("CARGO_PKG_VERSION"))
        .about("Fine-tunes Llama-family language models: JSONL in, Hugging Face and PEFT files out")
        .after_help(COLUMNS)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .max_term_width(120)
        .arg(
            // `accelerate launch --mixed_precision bf16 …` puts it before the program's name.
            Arg::new(BEFORE)
                .long("mixed-precision")
                .alias("mixed_precision")
                .value_name("CHOICE")
                .help("As the training commands' flag of this name, before the command"),
        )
        .subcommand(settings(Clap::new("pretrain"), Command::Pretrain).about("Train a new model on packed text"))
        .subcommand(
            settings(Clap::new("sft"), Command::Sft)
                .about("Fine-tune a model on prompts and responses, with LoRA or whole"),
        )
        .subcommand(check())
        .subcommand(settings(Clap::new("pack"), Command::Pack).about("Tokenise data sets into a token file"))
        .subcommand(inspect())
        .subcommand(
            Clap::new("templates")
                .about("Print each prompt template's rendering of a small conversation, trained parts in colour"),
        )
        .subcommand(settings(commands::parity::command(), Command::Parity))
        .subcommand(commands::prepare::about(settings(Clap::new("prepare"), Command::Prepare)))
        .subcommand(commands::download::command())
        .subcommand(commands::convert::command())
        .subcommand(commands::eval::about(settings(Clap::new("eval"), Command::Eval)))
        .subcommand(commands::generate::about(settings(Clap::new("generate"), Command::Generate)))
        .subcommand(commands::merge::about(settings(Clap::new("merge"), Command::Merge)))
        .subcommand(commands::doctor::command())
        .subcommand(commands::kernels::command())
        .subcommand(commands::report::command())
        .subcommand(commands::watch::command())
        .subcommand(commands::bench::command())
        .subcommand(commands::plan::command())
        .subcommand(commands::shell::completions_command())
        .subcommand(commands::shell::man_command())
}

/// The flags of both trainings, and those of looking.
fn check() -> Clap {
    let of_trainings = |s: &Setting| s.commands.contains(Command::Sft) || s.commands.contains(Command::Pretrain);
    let flag = |id: &'static str, name: &'static str| Arg::new(id).long(name).help_heading("Check");
    let switch = |id, name| flag(id, name).action(ArgAction::SetTrue);
    with_settings(Clap::new("check"), of_trainings)
        .about("Say what sft (or pretrain) with the same flags would do, and every problem, without training")
        .after_help(commands::check::CODES)
        .arg(switch("pretrain", "pretrain").help("Check a pretrain instead of an sft"))
        .arg(switch("json", "json").help("Print one JSON object"))
        .arg(
            flag("preview", "preview")
                .value_name("N")
                .default_value("2")
                .value_parser(value_parser!(u64).range(..=1_000_000))
                .help("Rows to show with what is trained in colour"),
        )
        .arg(
            flag("device_memory", "device-memory")
                .alias("device_memory")
                .value_name("SIZE")
                .value_parser(|text: &str| parse_size(text).map_err(|e| e.to_string()))
                .help("Memory of the device to train on, such as 24GB [default: what is free on the GPU that --device names, or on this machine]"),
        )
        .arg(
            flag("ranks", "ranks")
                .value_name("N")
                .default_value("1")
                .value_parser(value_parser!(u64).range(1..=65_536))
                .help("Ranks to train on: memory is that of one, a step is that of all"),
        )
        .arg(switch("time", "time").help("Take a few steps on this machine and estimate the whole run's time"))
        .arg(
            flag("flops_rate", "flops-rate")
                .alias("flops_rate")
                .value_name("FLOPS")
                .value_parser(value_parser!(f64))
                .help("Estimate the time from this many operations a second, such as 40e12"),
        )
}

fn inspect() -> Clap {
    let json = || Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print JSON lines");
    let epoch = || {
        let arg = Arg::new("epoch").long("epoch").value_name("N").default_value("0");
        arg.value_parser(value_parser!(u64).range(..=100_000)).help("Which epoch, from 0")
    };
    Clap::new("inspect")
        .about("Look at files, templates, tokens, and the rows a training sees")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(
            Clap::new("file")
                .about("Say what a file or folder is, and show what is in it; `inspect PATH` is the same")
                .arg(path("path").required(true).help("File or folder"))
                .arg(
                    path("tokenizer")
                        .long("tokenizer")
                        .help("Tokenizer for the preview: .model, tokenizer.json or a folder"),
                )
                .arg(json()),
        )
        .subcommand(
            Clap::new("templates")
                .about("Render conversations and show which bytes are trained")
                .arg(path("conversations").long("conversations").required(true).help("JSON file of conversations"))
                .arg(Arg::new("template").long("template").value_name("NAME").help("One template instead of all"))
                .arg(json()),
        )
        .subcommand(
            Clap::new("tokens")
                .about("Tokenise strings")
                .arg(
                    path("tokenizer")
                        .long("tokenizer")
                        .alias("tokenizer_path")
                        .required(true)
                        .help("Tokenizer: .model, tokenizer.json or a folder"),
                )
                .arg(
                    Arg::new("special_ids")
                        .long("special-ids")
                        .alias("special_ids")
                        .value_name("IDS")
                        .default_value("0,1,2,3")
                        .help("Ids the tokenizer has to have: pad,unk,bos,eos"),
                )
                .arg(path("strings").long("strings").required(true).help("JSON file of strings"))
                .arg(json()),
        )
        .subcommand(
            settings(Clap::new("rows"), Command::Inspect)
                .about("List the rows an epoch of sft trains on, in order")
                .arg(epoch())
                .arg(json()),
        )
        .subcommand(
            settings(Clap::new("packs"), Command::Inspect)
                .about("List the packed rows of an epoch of sft")
                .arg(epoch())
                .arg(json()),
        )
}

fn path(id: &'static str) -> Arg {
    Arg::new(id).value_name("PATH").value_parser(value_parser!(PathBuf))
}

/// Adds the flags of a command: one for each of its settings; where there is a config file, `--config-path` too, and two for a
/// switch.
fn settings(clap: Clap, command: Command) -> Clap {
    match command.takes_config() {
        true => with_settings(clap, |s| s.commands.contains(command)),
        false => clap.args(command.rows().into_iter().map(flag_alone)),
    }
}

fn with_settings(mut clap: Clap, wanted: impl Fn(&Setting) -> bool) -> Clap {
    clap = clap.arg(
        Arg::new("config_path")
            .long("config-path")
            .aliases(["config_path", "config", "config_file", "config-file"])
            .value_name("PATH")
            .help_heading("Configuration")
            .help("JSON or YAML file of settings, looked for as given, under configs/ and built in; flags override it"),
    );
    for setting in TABLE.iter().filter(|s| wanted(s)) {
        clap = clap.arg(flag(setting));
        if setting.kind == Kind::Bool {
            clap = clap.arg(off_flag(setting));
        }
    }
    clap
}

/// A flag that may stand in a config file too: what is missing or wrong is found, and said, when both are read.
fn flag(setting: &'static Setting) -> Arg {
    let mut help = setting.help.to_string();
    match (setting.kind, setting.default) {
        (Kind::Choice(words), Some(d)) => help += &format!(" [{}; default: {d}]", words.join(", ")),
        (Kind::Choice(words), None) => help += &format!(" [{}; default: {}]", words.join(", "), setting.unset),
        (Kind::Bool, Some("true")) => help += &format!(" [default: on; off with --{}]", setting.off_flag()),
        (Kind::Bool, _) => help += " [default: off]",
        (_, Some(d)) => help += &format!(" [default: {d}]"),
        (_, None) if setting.unset == "required" => help += " [required]",
        (_, None) => help += &format!(" [default: {}]", setting.unset),
    }
    let arg = named(setting).help_heading(setting.group).help(help);
    match setting.kind {
        Kind::Bool => arg.action(ArgAction::SetTrue).conflicts_with(format!("no:{}", setting.key)),
        // Negative numbers reach the setting's own message, which says what is expected.
        kind if kind.is_list() => arg.num_args(1..).value_name(kind.placeholder()).allow_negative_numbers(true),
        kind @ (Kind::Int(..) | Kind::Float(_)) => arg.value_name(kind.placeholder()).allow_hyphen_values(true),
        kind => arg.value_name(kind.placeholder()),
    }
}

/// A flag of a command without a config file: clap knows whether it is required, its default and its words.
fn flag_alone(setting: &'static Setting) -> Arg {
    let mut help = setting.help.to_string();
    if !["", "required"].contains(&setting.unset) {
        help += &format!(" [default: {}]", setting.unset);
    }
    let arg = named(setting).help(help).required(setting.unset == "required");
    if setting.kind == Kind::Bool {
        return arg.action(ArgAction::SetTrue);
    }
    let arg = match setting.kind {
        kind @ Kind::Int(..) => arg.allow_hyphen_values(true).value_parser(move |text: &str| {
            kind.parse(&[text]).map(|v| v.int()).map_err(|found| format!("expected {}, found {found}", kind.expected()))
        }),
        Kind::Float(_) => arg.value_parser(value_parser!(f64)).allow_hyphen_values(true),
        Kind::Choice(words) | Kind::Choices(words) => arg.value_parser(words.to_vec()),
        Kind::Path | Kind::Paths => arg.value_parser(value_parser!(PathBuf)),
        Kind::Repeated => arg.action(ArgAction::Append).allow_hyphen_values(true),
        Kind::Ids => arg.value_delimiter(',').value_parser(value_parser!(u32)),
        _ => arg,
    };
    let arg = if setting.kind.is_list() { arg.num_args(1..) } else { arg };
    let placeholder = match (setting.placeholder, setting.kind) {
        ("", Kind::Float(_)) => "NUMBER",
        ("", kind) => kind.placeholder(),
        (word, _) => word,
    };
    arg.value_name(placeholder).default_values(setting.default)
}

fn named(setting: &Setting) -> Arg {
    Arg::new(setting.key).long(setting.flag()).aliases(setting.other_names())
}

fn off_flag(setting: &'static Setting) -> Arg {
    let dashed = setting.off_flag();
    let mut names = vec![dashed.replace('-', "_"), format!("no-{}", setting.flag()), format!("no_{}", setting.key)];
    names.sort_unstable();
    names.dedup();
    names.retain(|n| *n != dashed);
    Arg::new(format!("no:{}", setting.key)).long(dashed).aliases(names).action(ArgAction::SetTrue).hide(true)
}

/// What was typed for each setting of `command`; `before` is the mixed precision typed before the command.
fn typed(command: Command, matches: &ArgMatches, before: Option<&String>) -> Result<Typed> {
    let mut typed = Vec::new();
    for setting in command.rows() {
        let before = before.filter(|_| setting.key == "mixed_precision");
        let words: Vec<String> = match setting.kind {
            Kind::Bool if matches.get_flag(setting.key) => vec!["true".into()],
            Kind::Bool => {
                let off = command.takes_config() && matches.get_flag(&format!("no:{}", setting.key));
                if off { vec!["false".into()] } else { Vec::new() }
            }
            _ if matches.value_source(setting.key) != Some(ValueSource::CommandLine) => Vec::new(),
            _ => {
                let raw = matches.get_raw(setting.key).into_iter().flatten();
                let text = |word: &OsStr| word.to_str().map(String::from);
                let words = raw.map(text).collect::<Option<_>>();
                words.ok_or_else(|| Error::usage(format!("--{}: expected UTF-8 text", setting.flag())))?
            }
        };
        match (words.is_empty(), before) {
            (true, None) => {}
            (true, Some(word)) => typed.push((setting, vec![word.clone()])),
            (false, Some(word)) if words[0] != *word => {
                return Err(Error::usage(format!(
                    "--mixed-precision: {word} before the command and {} after it; leave one out",
                    words[0]
                )));
            }
            (false, _) => typed.push((setting, words)),
        }
    }
    Ok(typed)
}

/// What a command's flags and config file come to. Warnings are printed.
fn resolve(command: Command, matches: &ArgMatches, before: Option<&String>) -> Result<Resolved> {
    let resolved = resolve_quietly(command, matches, before, None)?;
    for warning in &resolved.warnings {
        say::warning(warning);
    }
    Ok(resolved)
}

/// `ranks`: so many, instead of those that the environment says.
fn resolve_quietly(
    command: Command,
    matches: &ArgMatches,
    before: Option<&String>,
    ranks: Option<usize>,
) -> Result<Resolved> {
    let config = command.takes_config().then(|| matches.get_one::<String>("config_path")).flatten();
    let mut resolved =
        Resolved::on_ranks(command, typed(command, matches, before)?, config.map(String::as_str), ranks)?;
    // Ranks of a training look names up in turn.
    if !matches!(command, Command::Sft | Command::Pretrain) {
        ALONE.settings(command, &mut resolved.settings)?;
    }
    // The pool for tokenising; the first to set it wins, and nobody else does.
    if let Some(threads) = resolved.settings.train.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build_global().map_err(|e| Error::new(format!("cannot start {threads} threads: {e}")))?;
    }
    Ok(resolved)
}

/// Prints help or version; a reader that has seen enough (`| head`) is no error.
fn shown(help: &clap::Error) -> Result<()> {
    match help.print() {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.context(|| "standard output".into()),
    }
}

/// Parses `args` and runs the command.
///
/// # Errors
/// Whatever stopped the command.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    let args = as_here(args.into_iter().collect());
    let matches = match command().try_get_matches_from(&args) {
        Ok(matches) => matches,
        // Help and version are results.
        Err(e) if !e.use_stderr() => return shown(&e),
        Err(e) if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => e.exit(),
        Err(e) => return Err(unknown_flags(&e, &args).unwrap_or_else(|| usage(&e, &args))),
    };
    let before = matches.get_one::<String>(BEFORE);
    let (name, m) = matches.subcommand().expect("clap requires a command");
    if before.is_some() && !takes_precision(&command(), &matches) {
        return Err(Error::usage(format!("--mixed-precision: has no effect on `{name}`; leave it out")));
    }
    // A training saves before it ends, and Ctrl-C is how watching ends; the others only may not leave half of a file.
    if !["sft", "pretrain", "watch"].contains(&name) {
        leave_nothing_behind()?;
    }
    if ["sft", "pretrain"].contains(&name) {
        crate::comm::start::announce()?;
    }
    match name {
        "sft" => {
            let job = commands::data::sft_job(&resolve(Command::Sft, m, before)?)?;
            commands::train::run_sft(&job)?;
            draw_curve(&job.output_dir, "sft");
            Ok(())
        }
        "pretrain" => {
            let job = commands::data::pretrain_job(&resolve(Command::Pretrain, m, before)?)?;
            commands::train::run_pretrain(&job)?;
            draw_curve(&job.output_dir.join(&job.config_name), "pretrain");
            Ok(())
        }
        "check" => run_check(m, before),
        "pack" => commands::pack::run(&resolve(Command::Pack, m, None)?),
        "inspect" => run_inspect(m, before),
        "templates" => commands::templates::run(),
        "prepare" => commands::prepare::run(&resolve(Command::Prepare, m, None)?.settings),
        "download" => commands::download::run(m),
        "convert" => commands::convert::run(m),
        "eval" => commands::eval::run(&resolve(Command::Eval, m, before)?.settings),
        "generate" => {
            let prompts = m.get_many("prompts").into_iter().flatten().cloned().collect();
            commands::generate::run(&resolve(Command::Generate, m, before)?.settings, prompts)
        }
        "merge" => commands::merge::run(&resolve(Command::Merge, m, None)?.settings),
        "doctor" => commands::doctor::run(m),
        "kernels" => commands::kernels::run(m),
        "report" => commands::report::run(m),
        "watch" => commands::watch::run(m),
        "bench" => commands::bench::run(m),
        "plan" => commands::plan::run(m),
        "completions" => commands::shell::completions(m, command()),
        "man" => commands::shell::man(m, command()),
        "parity" => commands::parity::run(m, &resolve(Command::Parity, m, before)?.settings),
        _ => unreachable!("clap knows no other command"),
    }
}

/// Whether the command that was typed has the flag `--mixed-precision`.
fn takes_precision(clap: &Clap, matches: &ArgMatches) -> bool {
    match matches.subcommand() {
        Some((name, inner)) => clap.find_subcommand(name).is_some_and(|clap| takes_precision(clap, inner)),
        None => clap.get_arguments().any(|arg| arg.get_id() == "mixed_precision"),
    }
}

/// The run is done and its files are written: a picture that fails is said and changes nothing.
fn draw_curve(dir: &Path, command: &str) {
    if !say::is_main() {
        return;
    }
    match commands::curve::write(dir, &format!("{command}: {}", dir.display())) {
        Ok(true) => say::note(&format!("loss curve: {0}/loss.svg, {0}/loss.png, {0}/loss-dark.png", dir.display())),
        Ok(false) => {}
        Err(e) => say::warning(&format!("no loss curve: {e}")),
    }
}

fn run_check(m: &ArgMatches, before: Option<&String>) -> Result<()> {
    let (command, other) = match m.get_flag("pretrain") {
        true => (Command::Pretrain, Command::Sft),
        false => (Command::Sft, Command::Pretrain),
    };
    let foreign = |s: &&(&Setting, Vec<String>)| !s.0.commands.contains(command);
    if let Some((setting, _)) = typed(other, m, None)?.iter().find(foreign) {
        let hint = if command == Command::Sft { "add" } else { "leave out" };
        return Err(Error::usage(format!(
            "--{}: has no effect on this training; {hint} --pretrain, or leave it out",
            setting.flag()
        )));
    }
    let options = commands::check::Options {
        json: m.get_flag("json"),
        preview_rows: *m.get_one::<u64>("preview").expect("it has a default") as usize,
        time: m.get_flag("time"),
        device_memory: m.get_one("device_memory").copied(),
        flops_rate: m.get_one("flops_rate").copied(),
        ranks: *m.get_one::<u64>("ranks").expect("it has a default") as usize,
    };
    if let Some(rate) = options.flops_rate.filter(|r| !(r.is_finite() && *r > 0.0)) {
        return Err(Error::usage(format!("--flops-rate: expected a number above 0, found {rate}")));
    }
    // The warnings of the settings are among the findings.
    let mut resolved = resolve_quietly(command, m, before, Some(options.ranks))?;
    ALONE.settings(command, &mut resolved.settings)?;
    commands::check::run(&resolved, &options)
}

fn run_inspect(matches: &ArgMatches, before: Option<&String>) -> Result<()> {
    use commands::inspect;
    let (name, m) = matches.subcommand().expect("clap requires a command");
    let path = |id: &str| m.get_one::<PathBuf>(id).expect("clap requires it").as_path();
    let text = |id: &str| m.get_one::<String>(id).map(String::as_str);
    let json = m.get_flag("json");
    match name {
        "file" => {
            let (path, _) = ALONE.model(path("path"), Part::Whole)?;
            let tokenizer = m.get_one::<PathBuf>("tokenizer").map(|t| ALONE.model(t, Part::Tokenizer)).transpose()?;
            inspect::file::run(&path, tokenizer.as_ref().map(|(t, _)| t.as_path()), json)
        }
        "templates" => inspect::templates::run(path("conversations"), text("template"), json),
        "tokens" => {
            let special_ids = text("special_ids").expect("it has a default");
            let (tokenizer, _) = ALONE.model(path("tokenizer"), Part::Tokenizer)?;
            inspect::tokens::run(&tokenizer, special_ids, path("strings"), json)
        }
        "rows" | "packs" => {
            let settings = resolve(Command::Inspect, m, before)?;
            let epoch = *m.get_one::<u64>("epoch").expect("it has a default");
            match name {
                "rows" => inspect::rows::rows(&settings, epoch, json),
                _ => inspect::rows::packs(&settings, epoch, json),
            }
        }
        _ => unreachable!("clap knows no other command"),
    }
}
