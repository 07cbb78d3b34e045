//! Command lines as people of other tools type them.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::command;
use crate::error::Error;
use crate::settings::habits::{self, Instead};
use crate::settings::{Kind, find, likest};

/// `--packing false` and `--packing=true` as other tools write switches: as the flags that mean the same.
pub(super) fn switches_with_a_value(args: Vec<OsString>) -> Vec<OsString> {
    let text = |arg: &OsString| arg.to_str().map(String::from);
    let training = |name: &str| ["sft", "pretrain", "check", "pack"].contains(&name);
    // Other commands have switches beside words of their own.
    if !args.iter().skip(1).filter_map(text).find(|a| !a.starts_with('-')).is_some_and(|name| training(&name)) {
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
        let setting = name.strip_prefix("--").and_then(|n| find(&n.replace('-', "_"))).filter(|s| s.kind == Kind::Bool);
        let Some(setting) = setting else {
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

/// What clap says of a flag that it does not know: what to type instead of another tool's, the nearest one only where it is near.
pub(super) fn unknown_flag(e: &clap::Error, args: &[OsString]) -> Option<Error> {
    let Some(ContextValue::String(found)) = e.get(ContextKind::InvalidArg) else { return None };
    if e.kind() != ErrorKind::UnknownArgument || !found.starts_with("--") {
        return None;
    }
    let whole = command();
    let (mut clap, mut name) = (&whole, "ringtune".to_string());
    for arg in args.iter().skip(1).filter_map(|a| a.to_str()) {
        if let Some(inner) = clap.find_subcommand(arg) {
            (clap, name) = (inner, format!("{name} {arg}"));
        }
    }
    let flags: Vec<&str> = clap
        .get_arguments()
        .flat_map(|a| a.get_long().into_iter().chain(a.get_all_aliases().into_iter().flatten()))
        .collect();
    let typed = found.trim_start_matches('-').split('=').next().unwrap_or_default();
    let has = |key: &str| flags.iter().any(|f| f.replace('-', "_") == key);
    let known = habits::instead(typed).filter(|instead| match instead {
        Instead::Write(key, ..) | Instead::Name(key) => has(key),
        Instead::Do(_) => true,
    });
    let advice = match known {
        Some(instead) => instead.as_flag(),
        None => match likest(&typed.replace('_', "-"), flags.iter().copied().filter(|f| !f.contains('_'))) {
            // In the spelling that was typed.
            Some((near, likeness)) if likeness > 0.88 && typed.contains('_') => {
                format!("did you mean --{}?", near.replace('-', "_"))
            }
            Some((near, likeness)) if likeness > 0.88 => format!("did you mean --{near}?"),
            _ => format!("`{name} --help` lists those it has"),
        },
    };
    Some(Error::usage(format!("--{typed}: no flag of {name}; {advice}")))
}
