//! `ringtune parity`: a recorded case of another library against this build. The comparison is the tests' own.

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Command, value_parser};

use self::recorded::{ParityArgs, compare};
use super::device::{self, OnDevice};
use super::fetch::ALONE;
use crate::backend::Backend;
use crate::bail;
use crate::error::Result;
use crate::hub::Part;
use crate::say;
use crate::settings::Settings;

#[path = "../../tests/common/parity/mod.rs"]
mod recorded;

/// The command's arguments, besides its settings.
pub fn command() -> Command {
    let path = |id: &'static str| Arg::new(id).value_name("PATH").value_parser(value_parser!(PathBuf)).required(true);
    Command::new("parity")
        .about("Run a recorded case and compare losses, gradients, steps and generation within its tolerances")
        .arg(path("case_dir").help("Folder with golden.json and golden.safetensors"))
        .arg(path("model").long("model").help("The model the case was recorded with"))
        .arg(path("out").long("out").help("Where tensors, metrics, models and adapters go"))
}

/// Compares and prints the table.
///
/// # Errors
/// If a file is missing or damaged, the device fails, or a difference is beyond its tolerance.
pub fn run(m: &ArgMatches, settings: &Settings) -> Result<()> {
    let path = |id: &str| m.get_one::<PathBuf>(id).expect("clap requires it").clone();
    let args = ParityArgs {
        case: path("case_dir"),
        model: ALONE.model(&path("model"), Part::Whole)?.0,
        out: path("out"),
        dtype: settings.train.dtype,
    };
    device::run(&settings.device, None, args)
}

impl OnDevice for ParityArgs {
    fn run<B: Backend>(self, dev: &B) -> Result<()> {
        let report = compare(dev, &self)?;
        say::result(report.table().trim_end_matches('\n'));
        let (failures, all) = (report.failures(), report.len());
        if failures > 0 {
            bail!("{}: {failures} of {all} comparisons are beyond their tolerance", self.case.display());
        }
        say::result(&format!("all {all} comparisons are within their tolerances"));
        Ok(())
    }
}
