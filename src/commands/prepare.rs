//! `ringtune prepare`: downloads or reads Dolly 15k, OASST1 and Alpaca and writes them as JSONL rows.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::note;
use crate::datasets::{Dataset, Paths, PrepareSpec, Prepared, run as prepare};
use crate::error::Result;

/// The command's flags.
pub fn command() -> Command {
    let long = |id: &'static str, dashed: &'static str| Arg::new(id).long(dashed).alias(id);
    let path = |id, dashed| long(id, dashed).value_name("PATH").value_parser(value_parser!(PathBuf));
    Command::new("prepare")
        .about("Download data sets and write them as rows for sft: dolly15k.jsonl, oasst1_en.jsonl, alpaca.jsonl")
        .after_help(
            "HF_ENDPOINT and HF_TOKEN, HTTPS_PROXY, HTTP_PROXY and NO_PROXY are honoured. Licences: Dolly 15k CC BY-SA 3.0, \
             OASST1 Apache-2.0, Alpaca CC BY-NC 4.0.",
        )
        .arg(
            Arg::new("dataset")
                .long("dataset")
                .value_name("NAME")
                .required(true)
                .num_args(1..)
                .value_parser(["all", "dolly15k", "oasst1", "alpaca"])
                .help("Which data sets"),
        )
        .arg(path("output_dir", "output-dir").required(true).help("Folder of the JSONL files"))
        .arg(path("source_dir", "source-dir").help("Folder with copies of the upstream files, instead of a download"))
        .arg(path("cache_dir", "cache-dir").help("Where downloads are kept [default: the user's cache folder]"))
        .arg(
            long("multi_turn", "multi-turn")
                .action(ArgAction::SetTrue)
                .help("OASST1: whole conversations as messages, not one row for each answer"),
        )
        .arg(
            long("oasst_paths", "oasst-paths")
                .value_name("CHOICE")
                .value_parser(["best", "all"])
                .default_value("best")
                .help("OASST1: the best-ranked path of each tree, or every branch"),
        )
}

/// Runs the command.
///
/// # Errors
/// As [`prepare`].
pub fn run(m: &ArgMatches) -> Result<()> {
    let path = |id: &str| m.get_one::<PathBuf>(id).cloned();
    let names: Vec<&str> = m.get_many::<String>("dataset").into_iter().flatten().map(String::as_str).collect();
    let wanted = |d: &Dataset| names.contains(&"all") || names.contains(&d.name());
    let best = m.get_one::<String>("oasst_paths").is_some_and(|p| p == "best");
    let spec = PrepareSpec {
        datasets: Dataset::ALL.into_iter().filter(wanted).collect(),
        output_dir: path("output_dir").expect("clap requires it"),
        source_dir: path("source_dir"),
        cache_dir: path("cache_dir"),
        multi_turn: m.get_flag("multi_turn"),
        paths: if best { Paths::Best } else { Paths::All },
    };
    for done in prepare(&spec)? {
        report(&done);
    }
    Ok(())
}

fn report(p: &Prepared) {
    println!("{}: {} rows of {} records, from {}", p.output.display(), p.kept, p.records, p.source.display());
    for (reason, n) in &p.dropped {
        note(&format!("  dropped: {n} x {reason}"));
    }
}
