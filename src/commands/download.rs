//! `ringtune download`: models and data sets of the hub into the cache, for machines without network and to have them before a run.

use clap::{Arg, ArgMatches, Command};

use crate::error::{Error, Result};
use crate::hub::{DataName, Hub, Part, Repo};
use crate::say;
use crate::text::{bytes, plural};

/// The command line of it.
pub fn command() -> Command {
    Command::new("download")
        .about("Fetch models and data sets of the Hugging Face hub into the cache that Python shares, and print where they lie")
        .after_help(
            "HF_HOME or HF_HUB_CACHE is where they are kept, HF_TOKEN (or `hf auth login`) opens what is gated or private, HF_ENDPOINT is the hub; \
             HTTPS_PROXY and NO_PROXY are honoured. What is here already is not fetched again, what was interrupted is resumed.",
        )
        .arg(
            Arg::new("names")
                .value_name("NAME")
                .num_args(1..)
                .required(true)
                .help("org/name[@revision] of a model, hf:org/name[@revision][/config][:split] of a data set"),
        )
        .arg(
            Arg::new("include")
                .long("include")
                .value_name("PATTERN")
                .num_args(1..)
                .help("Files to fetch instead of those that trainings need, such as *.json"),
        )
}

/// Runs the command.
///
/// # Errors
/// A usage error for what is no name; as [`Hub::model`] and [`Hub::data`].
pub fn run(m: &ArgMatches) -> Result<()> {
    let hub = Hub::from_env()?;
    let include: Vec<String> = m.get_many("include").into_iter().flatten().cloned().collect();
    let names: Vec<&String> = m.get_many("names").into_iter().flatten().collect();
    let expected = "expected org/name[@revision] of a model, or hf:org/name[@revision][/config][:split] of a data set";
    for text in names {
        let (repo, data) = match DataName::parse(text)? {
            Some(name) => (name.repo.clone(), Some(name)),
            None => (Repo::model(text).ok_or_else(|| Error::usage(format!("{text}: {expected}")))?, None),
        };
        let fetched = match data {
            _ if !include.is_empty() => hub.matching(&repo, &include)?,
            Some(name) => hub.data(&name)?,
            None => hub.model(&repo, Part::Whole)?,
        };
        let commit = &fetched.commit[..fetched.commit.len().min(12)];
        say::note(&format!(
            "{text}: {}, {}, commit {commit}",
            plural(fetched.files.len(), "file"),
            bytes(fetched.bytes)
        ));
        say::result(&fetched.dir.display().to_string());
    }
    Ok(())
}
