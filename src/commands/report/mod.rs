//! `ringtune report`: one or several runs as one HTML file that needs nothing else, with or without scripts.

mod chart;
mod curves;
mod figures;
mod files;
mod html;
mod page;
mod points;
mod pulse;
mod sections;

use std::io::Write;
use std::path::PathBuf;

use clap::{Arg, ArgMatches, Command, value_parser};

use crate::error::Result;
use crate::files::{check_replaces, write_bytes};
use crate::say::{self, Out};
pub use files::{Lines, Metrics, Run, parse_metrics, run_folders, tell_apart};
pub use page::{PageKind, body, page};
pub use points::{shown, smooth};
pub use pulse::Pulse;

/// The file's name where none is given.
const NAME: &str = "report.html";

/// The report of `dirs` as HTML.
///
/// # Errors
/// If a folder holds no run.
pub fn html_of(dirs: &[PathBuf]) -> Result<String> {
    Ok(page(&files::read_all(dirs)?, PageKind::File))
}

/// The command line of `report`.
pub fn command() -> Command {
    let path = |id: &'static str| Arg::new(id).value_name("PATH").value_parser(value_parser!(PathBuf));
    Command::new("report")
        .about("Write one HTML file of one or several runs: curves, mix, settings, samples, checkpoints")
        .arg(path("run_dir").required(true).num_args(1..).help("Folders of runs, as --output-dir named them"))
        .arg(
            path("output")
                .long("output")
                .short('o')
                .help("File to write [default: report.html in the run's folder, or here for several]"),
        )
}

/// Writes the report of the folders named: into the run's folder, or where the command runs for several, unless `--output`
/// says otherwise.
///
/// # Errors
/// If a folder holds no run or the file cannot be written.
pub fn run(m: &ArgMatches) -> Result<()> {
    let dirs: Vec<PathBuf> = m.get_many("run_dir").expect("clap requires it").cloned().collect();
    let runs = files::read_all(&dirs)?;
    let output = m.get_one::<PathBuf>("output");
    let to = match (output, &runs[..]) {
        (Some(path), _) => path.clone(),
        (None, [one]) => one.dir.join(NAME),
        (None, _) => PathBuf::from(NAME),
    };
    check_replaces("--output", &to, "report", |head| head.starts_with(b"<!doctype html>"))?;
    write_bytes(&to, page(&runs, PageKind::File).as_bytes())?;
    for (run, note) in runs.iter().flat_map(|r| r.metrics.notes.iter().map(move |n| (r, n))) {
        say::note(&format!("note: {}: {note}", run.dir.display()));
    }
    let mut out = Out::new();
    writeln!(out, "{}", to.display())?;
    out.flush()?;
    Ok(())
}
