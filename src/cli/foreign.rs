//! Command lines as people of other tools type them.

use std::ffi::OsString;

use clap::Command as Clap;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::command;
use crate::error::Error;
use crate::settings::habits::{self, Instead};
use crate::settings::{Kind, find, likest};

/// Commands whose settings may stand in a config file.
const WITH_CONFIG: [&str; 4] = ["sft", "pretrain", "check", "pack"];

/// The command line as this program has it: switches with a value, a config file without its flag, `inspect FILE`, `--prompt TEXT`.
pub(super) fn as_here(args: Vec<OsString>) -> Vec<OsString> {
    switches_with_a_value(prompt_without_its_flag(file_to_inspect(config_without_its_flag(check_of_what(args)))))
}

fn text(arg: &OsString) -> Option<String> {
    arg.to_str().map(String::from)
}

/// Where the command stands among the words: after `--mixed_precision bf16`, where that is there.
fn command_at(args: &[OsString]) -> Option<usize> {
    let mut at = 1;
    while let Some(word) = args.get(at)?.to_str() {
        match word {
            "--mixed-precision" | "--mixed_precision" => at += 2,
            _ if word.starts_with('-') => at += 1,
            _ => return Some(at),
        }
    }
    None
}

/// `ringtune check sft …` and `ringtune check pretrain …`.
fn check_of_what(mut args: Vec<OsString>) -> Vec<OsString> {
    if let Some(at) = command_at(&args).filter(|&at| args[at] == "check") {
        match args.get(at + 1).and_then(|word| word.to_str()) {
            Some("sft") => drop(args.remove(at + 1)),
            Some("pretrain") => args[at + 1] = "--pretrain".into(),
            _ => {}
        }
    }
    args
}

/// `ringtune sft config.yaml`, as the tools that read one file are called.
fn config_without_its_flag(mut args: Vec<OsString>) -> Vec<OsString> {
    let Some(at) = command_at(&args) else { return args };
    let takes = text(&args[at]).is_some_and(|name| WITH_CONFIG.contains(&name.as_str()));
    let is_config = |word: &str| [".yaml", ".yml", ".json", ".toml"].iter().any(|ending| word.ends_with(ending));
    if takes && args.get(at + 1).and_then(text).is_some_and(|word| !word.starts_with('-') && is_config(&word)) {
        args.insert(at + 1, "--config-path".into());
    }
    args
}

/// `ringtune inspect PATH` is `ringtune inspect file PATH`.
fn file_to_inspect(mut args: Vec<OsString>) -> Vec<OsString> {
    let Some(at) = command_at(&args).filter(|&at| args[at] == "inspect") else { return args };
    let Some(word) = args.get(at + 1) else { return args };
    let whole = command();
    let known = |word: &str| {
        let inspect = whole.find_subcommand("inspect");
        word == "help" || inspect.is_some_and(|clap| clap.find_subcommand(word).is_some())
    };
    // A file that has the name of a view is inspected as ./file.
    if text(word).is_none_or(|w| !w.starts_with('-') && !known(&w)) {
        args.insert(at + 1, "file".into());
    }
    args
}

/// `ringtune generate --prompt TEXT`: prompts stand without a flag here.
fn prompt_without_its_flag(args: Vec<OsString>) -> Vec<OsString> {
    let Some(at) = command_at(&args).filter(|&at| args[at] == "generate") else { return args };
    let (mut all, mut prompts) = (args[..=at].to_vec(), Vec::new());
    let mut rest = args.into_iter().skip(at + 1);
    while let Some(arg) = rest.next() {
        match text(&arg).as_deref() {
            // What follows are prompts already, whatever they begin with.
            Some("--") => {
                prompts.extend(rest);
                break;
            }
            Some("--prompt" | "-p") => prompts.extend(rest.next()),
            Some(word) if word.starts_with("--prompt=") => prompts.push(word["--prompt=".len()..].into()),
            _ => all.push(arg),
        }
    }
    if !prompts.is_empty() {
        all.push("--".into());
        all.extend(prompts);
    }
    all
}

/// `--packing false` and `--packing=true` as other tools write switches: as the flags that mean the same. `--max_steps -1`, which is how
/// transformers writes "as many as the epochs have", goes.
fn switches_with_a_value(args: Vec<OsString>) -> Vec<OsString> {
    // Other commands have switches beside words of their own.
    let training = |name: String| WITH_CONFIG.contains(&name.as_str());
    if !command_at(&args).and_then(|at| text(&args[at])).is_some_and(training) {
        return args;
    }
    let on = |word: &str| match word.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    };
    let mut all = Vec::with_capacity(args.len());
    let mut rest = args.into_iter().peekable();
    while let Some(arg) = rest.next() {
        let Some(word) = text(&arg) else {
            all.push(arg);
            continue;
        };
        let (name, joined) = word.split_once('=').map_or((word.as_str(), None), |(name, value)| (name, Some(value)));
        let setting = name.strip_prefix("--").and_then(|n| find(&n.replace('-', "_")));
        if setting.is_some_and(|s| s.key == "max_steps") {
            let all_epochs = |value: &str| value == "-1";
            let goes = match joined {
                Some(value) => all_epochs(value),
                None => rest.next_if(|next| next.to_str().is_some_and(all_epochs)).is_some(),
            };
            if !goes {
                all.push(arg);
            }
            continue;
        }
        let Some(setting) = setting.filter(|s| s.kind == Kind::Bool) else {
            all.push(arg);
            continue;
        };
        let value = match joined {
            Some(value) => on(value),
            None => rest.next_if(|next| text(next).is_some_and(|w| on(&w).is_some())).and_then(|w| on(&text(&w)?)),
        };
        match (value, joined) {
            (Some(false), _) => all.push(format!("--{}", setting.off_flag()).into()),
            (Some(true), _) | (None, None) => all.push(name.into()),
            (None, Some(_)) => all.push(arg),
        }
    }
    all
}

/// A flag that the command does not know, with the words behind it and what to type instead.
struct Unknown {
    name: String,
    words: Vec<String>,
    instead: Option<Instead>,
}

/// What clap says of flags that it does not know: what to type instead of another tool's, the nearest one only where it is near; all of
/// them at once, and then the whole line as it can be typed.
pub(super) fn unknown_flags(e: &clap::Error, args: &[OsString]) -> Option<Error> {
    let Some(ContextValue::String(found)) = e.get(ContextKind::InvalidArg) else { return None };
    if e.kind() != ErrorKind::UnknownArgument || !found.starts_with("--") {
        return None;
    }
    let whole = command();
    let (mut clap, mut name, mut last) = (&whole, "ringtune".to_string(), 0);
    for (i, arg) in args.iter().enumerate().skip(1) {
        if let Some((word, inner)) = arg.to_str().and_then(|word| Some((word, clap.find_subcommand(word)?))) {
            (clap, name, last) = (inner, format!("{name} {word}"), i);
        }
    }
    let command = name.rsplit(' ').next().unwrap_or_default().to_string();
    let words: Vec<String> = args.iter().skip(last + 1).map(|a| a.to_string_lossy().into_owned()).collect();
    let (unknown, whole_line) = sort(clap, &command, &words);
    match &unknown[..] {
        [] => None,
        [one] => {
            let advice = advice(one, clap, &name);
            Some(Error::usage(format!("--{}: no flag of {name}; {advice}", one.name)))
        }
        all => {
            let lines: Vec<String> =
                all.iter().map(|u| format!("\n  --{}: {}", u.name, advice(u, clap, &name))).collect();
            // Of words behind a flag that nobody knows, some may be prompts.
            let known = all.iter().all(|u| u.instead.is_some()) && clap.get_positionals().next().is_none();
            let line = if known { format!("\nso type: {name} {}", whole_line.join(" ")) } else { String::new() };
            Some(Error::usage(format!("{} flags are none of {name}{}{line}", all.len(), lines.concat())))
        }
    }
}

/// The flags among `words` that are none of the command's, and the line with what stands for them.
fn sort(clap: &Clap, command: &str, words: &[String]) -> (Vec<Unknown>, Vec<String>) {
    let flags = flags_of(clap);
    let has = |key: &str| flags.iter().any(|f| f.replace('-', "_") == key);
    let (mut unknown, mut line): (Vec<Unknown>, Vec<String>) = (Vec::new(), Vec::new());
    let mut i = 0;
    while i < words.len() {
        let word = &words[i];
        i += 1;
        let Some(flag) = word.strip_prefix("--").filter(|f| !f.is_empty()) else {
            line.push(quoted(word));
            continue;
        };
        let (typed, joined) = flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)));
        if flags.contains(&typed) {
            line.push(quoted(word));
            continue;
        }
        let mut values: Vec<String> = joined.iter().map(|v| quoted(v)).collect();
        while joined.is_none() && i < words.len() && !is_flag(&words[i]) {
            values.push(quoted(&words[i]));
            i += 1;
        }
        let value = values.first().map_or("true", String::as_str);
        let instead = habits::instead_of(command, typed, value).filter(|instead| match instead {
            Instead::Write(key, ..) | Instead::Name(key) => has(key),
            Instead::Do(_) => true,
        });
        line.extend(instead.map(|instead| instead.typed(&values)).unwrap_or_default());
        unknown.push(Unknown { name: typed.to_string(), words: values, instead });
    }
    (unknown, line)
}

fn is_flag(word: &str) -> bool {
    word.starts_with("--") || (word.starts_with('-') && word.parse::<f64>().is_err() && word.len() > 1)
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=:,@%+".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_string(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// Every spelling of a command's flags.
fn flags_of(clap: &Clap) -> Vec<&str> {
    let spellings =
        clap.get_arguments().flat_map(|a| a.get_long().into_iter().chain(a.get_all_aliases().into_iter().flatten()));
    spellings.chain(["help"]).collect()
}

fn advice(unknown: &Unknown, clap: &Clap, name: &str) -> String {
    let (flags, typed) = (flags_of(clap), &unknown.name);
    if let Some(instead) = unknown.instead {
        let first = instead.typed(&unknown.words).into_iter().next().unwrap_or_default();
        // What a training takes this command may not know.
        if first.trim_start_matches("--").replace('-', "_") != typed.replace('-', "_") {
            return instead.as_flag(&unknown.words);
        }
    }
    match likest(&typed.replace('_', "-"), flags.iter().copied().filter(|f| !f.contains('_'))) {
        // In the spelling that was typed.
        Some((near, likeness)) if likeness > 0.88 && typed.contains('_') => {
            format!("did you mean --{}?", near.replace('-', "_"))
        }
        Some((near, likeness)) if likeness > 0.88 => format!("did you mean --{near}?"),
        _ => format!("`{name} --help` lists those it has"),
    }
}

/// Words that other tools have for a command, and what to type; `…` stands for what was typed behind the word.
const COMMANDS: &[(&[&str], &str)] = &[
    (
        &[
            "train",
            "finetune",
            "fine-tune",
            "fine_tune",
            "ft",
            "tune",
            "lora",
            "qlora",
            "run",
            "sft_trainer",
            "llamafactory-cli",
            "trl",
            "axolotl",
            "unsloth",
            "litgpt",
            "mlx_lm.lora",
            "run_clm",
            "run_clm.py",
            "run_sft.py",
            "sft.py",
            "train.py",
            "finetune.py",
        ],
        "`ringtune sft …` fine-tunes a model, `ringtune pretrain …` begins a new one",
    ),
    (&["pt", "continued-pretrain", "pre-train"], "`ringtune pretrain …`"),
    (
        &["dpo", "orpo", "kto", "grpo", "ppo", "reward", "rm", "rloo"],
        "preferences and rewards are not trained on; `ringtune sft …` trains on answers",
    ),
    (
        &["chat", "infer", "inference", "predict", "complete", "cli", "talk"],
        "`ringtune generate --model-path MODEL` is a chat at a terminal, and answers a prompt that it is given",
    ),
    (
        &[
            "export",
            "merge-lora",
            "merge_lora",
            "merge-adapter",
            "merge-adapters",
            "merge-sharded-fsdp-weights",
            "merge_and_unload",
        ],
        "`ringtune merge --model-path ADAPTER --output-dir MERGED`",
    ),
    (
        &["serve", "api", "server", "webui", "webchat", "vllm-serve", "vllm", "sglang", "ollama"],
        "there is no server; `ringtune merge` writes a folder for one, then `vllm serve MERGED`",
    ),
    (
        &["launch", "torchrun", "accelerate", "deepspeed", "mpirun", "srun"],
        "`ringrun -n N ringtune sft …` starts N ranks",
    ),
    (&["preprocess", "tokenize", "tokenise"], "`ringtune pack …` makes a token file; sft does it by itself"),
    (
        &["evaluate", "test", "lm-eval", "lm_eval", "benchmark"],
        "`ringtune eval --model-path MODEL --dataset-paths FILE`",
    ),
    (&["env", "info", "diagnose"], "`ringtune doctor` says what this machine has"),
    (&["version"], "`ringtune --version`"),
    (
        &["dry-run", "dry_run", "validate", "lint", "verify"],
        "`ringtune check …` says what sft would do, and every problem",
    ),
    (
        &["estimate", "estimate-memory", "memory"],
        "`ringtune check …` for this machine, `ringtune plan …` for GPUs that are not here",
    ),
    (
        &["quantize", "quantise", "gguf", "convert-hf"],
        "weights are not quantised here; llama.cpp's convert_hf_to_gguf.py takes the folder that `ringtune merge` writes",
    ),
    (&["show", "view", "cat", "head", "describe"], "`ringtune inspect FILE`"),
    (
        &["huggingface-cli", "hf", "fetch", "pull"],
        "`ringtune download ORG/NAME`, of a data set `ringtune download hf:ORG/NAME`",
    ),
    (&["upload", "push"], "files are written here; `hf upload NAME FOLDER` sends them"),
    (
        &["tensorboard", "wandb", "dashboard", "monitor"],
        "`ringtune watch RUN_DIR` shows a run while it goes on; TensorBoard's files are in runs/ of its folder",
    ),
    (
        &["resume", "continue"],
        "`ringtune sft --resume-from-checkpoint auto …` with the flags of the run goes on with it",
    ),
    (&["login", "whoami"], "there is no login; the variable HF_TOKEN holds the token of the hub"),
];

/// Every other mistake that clap finds, in this program's one form: what, then what to type.
pub(super) fn usage(e: &clap::Error, args: &[OsString]) -> Error {
    if let (ErrorKind::InvalidSubcommand, Some(ContextValue::String(found))) =
        (e.kind(), e.get(ContextKind::InvalidSubcommand))
    {
        return unknown_command(found, args);
    }
    let text = e.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    // Clap adds the usage and where to look.
    if let (ErrorKind::UnknownArgument, Some(ContextValue::String(found))) = (e.kind(), e.get(ContextKind::InvalidArg))
        && let Some(answer) = word_without_a_flag(found, args)
    {
        return Error::usage(answer);
    }
    let body = text.split("\n\nUsage:").next().unwrap_or(text).split("\n\nFor more").next().unwrap_or(text);
    let lines: Vec<&str> = body.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with("tip:")).collect();
    let mut name = "ringtune".to_string();
    let whole = command();
    let mut clap = &whole;
    for word in args.iter().skip(1).filter_map(|a| a.to_str()) {
        if let Some(inner) = clap.find_subcommand(word) {
            (clap, name) = (inner, format!("{name} {word}"));
        }
    }
    Error::usage(format!("{}; `{name} --help` lists what it takes", lines.join(" ")))
}

/// Flags of one letter that other programs have, and the settings they stand for.
const LETTERS: [(&str, &str); 8] = [
    ("-m", "--model-path"),
    ("-d", "--dataset-paths"),
    ("-o", "--output-dir"),
    ("-c", "--config-path"),
    ("-t", "--tokenizer-path"),
    ("-b", "--per-device-train-batch-size"),
    ("-v", "--verbose"),
    ("-q", "--quiet"),
];

/// What is said of a word that stands where none belongs, or of a flag of one letter.
fn word_without_a_flag(found: &str, args: &[OsString]) -> Option<String> {
    let whole = command();
    let (mut clap, mut name) = (&whole, "ringtune".to_string());
    for word in args.iter().skip(1).filter_map(|a| a.to_str()) {
        if let Some(inner) = clap.find_subcommand(word) {
            (clap, name) = (inner, format!("{name} {word}"));
        }
    }
    let flags = flags_of(clap);
    let has = |flag: &str| flags.contains(&flag.trim_start_matches("--"));
    if found.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
        return Some(format!(
            "{found}: a number below 0 is none that {name} takes; `{name} --help` lists what it takes"
        ));
    }
    if found.starts_with('-') {
        let long = LETTERS.iter().find(|(letter, flag)| *letter == found && has(flag)).map(|(_, flag)| *flag);
        let said = long.map_or(format!("`{name} --help` lists them"), |flag| format!("did you mean {flag}?"));
        return Some(format!("{found}: the flags of {name} are whole words; {said}"));
    }
    let wanted = |flags: &[&str]| flags.iter().filter(|f| has(f)).map(|f| f.to_string()).collect::<Vec<_>>().join(", ");
    let config = if has("--config-path") { "; a file of settings ends in .json, .yaml or .yml" } else { "" };
    let behind = wanted(&["--model-path", "--tokenizer-path", "--dataset-paths", "--output-dir"]);
    let advice = match behind.as_str() {
        "" => format!("`{name} --help` lists what it takes"),
        flags => format!("files and folders stand behind flags ({flags}){config}"),
    };
    Some(format!("{found}: {name} takes no word without a flag here; {advice}"))
}

fn unknown_command(found: &str, args: &[OsString]) -> Error {
    let whole = command();
    let word = found.to_ascii_lowercase();
    // Of `inspect` and `bench` too.
    let mut clap = &whole;
    let mut name = "ringtune".to_string();
    for arg in args.iter().skip(1).filter_map(|a| a.to_str()).take_while(|arg| *arg != found) {
        if let Some(inner) = clap.find_subcommand(arg) {
            (clap, name) = (inner, format!("{name} {arg}"));
        }
    }
    if let Some((_, answer)) = COMMANDS.iter().find(|(words, _)| words.contains(&word.as_str())) {
        return Error::usage(format!("{found}: no command of {name}; {answer}"));
    }
    let names: Vec<&str> = clap.get_subcommands().map(Clap::get_name).collect();
    let answer = match likest(&word, names.iter().copied()) {
        Some((near, likeness)) if likeness > 0.88 => format!("did you mean `{name} {near}`?"),
        _ => format!("it has {}", names.join(", ")),
    };
    Error::usage(format!("{found}: no command of {name}; {answer}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn lines_of_other_tools_become_those_of_here() {
        let same = |typed: &str, here: &str| assert_eq!(as_here(words(typed)), words(here), "{typed}");
        same("ringtune sft config.yaml --lr 1", "ringtune sft --config-path config.yaml --lr 1");
        same("ringtune --mixed_precision bf16 sft c.yml", "ringtune --mixed_precision bf16 sft --config-path c.yml");
        same("ringtune sft --packing false --max_steps -1", "ringtune sft --no-packing");
        same("ringtune sft --max_steps=-1 --use_lora=true", "ringtune sft --use_lora");
        same("ringtune sft --max_steps 5", "ringtune sft --max_steps 5");
        same("ringtune inspect rows.jsonl --json", "ringtune inspect file rows.jsonl --json");
        same("ringtune inspect rows --json", "ringtune inspect rows --json");
        same("ringtune inspect --help", "ringtune inspect --help");
        same("ringtune check sft c.json --lr 1", "ringtune check --config-path c.json --lr 1");
        same("ringtune check pretrain --lr 1", "ringtune check --pretrain --lr 1");
        same("ringtune generate c.json", "ringtune generate c.json");
        same("ringtune generate --prompt hi --json", "ringtune generate --json -- hi");
        same("ringtune generate a --prompt=-hi -p c -- -d", "ringtune generate a -- -hi c -d");
        same("ringtune sft --prompt hi", "ringtune sft --prompt hi");
    }

    #[test]
    fn every_answer_to_a_command_names_one_that_exists() {
        let whole = command();
        for (words, answer) in COMMANDS {
            for word in *words {
                assert!(whole.find_subcommand(word).is_none(), "{word} is a command");
            }
            for named in answer.split('`').skip(1).step_by(2).filter_map(|line| line.strip_prefix("ringtune ")) {
                let name = named.split(' ').next().unwrap();
                let clap = whole.find_subcommand(name);
                assert!(name.starts_with("--") || clap.is_some(), "{answer}");
                for flag in named.split(' ').filter_map(|w| w.strip_prefix("--")).filter(|f| *f != "version") {
                    assert!(flags_of(clap.unwrap()).contains(&flag), "{answer}: --{flag}");
                }
            }
        }
    }
}
