//! `ringtune completions` and `ringtune man`: what shells and `man` know of the command line, made from it.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgMatches, Command, value_parser};
use clap_complete::Shell;

use crate::comm::launcher_command;
use crate::error::Result;
use crate::files::{create_dir_all, write_bytes};
use crate::say::{self, Out};

/// The command line of `completions`.
pub fn completions_command() -> Command {
    Command::new("completions")
        .about("Print what a shell needs to complete commands and flags")
        .after_help(
            "bash: ringtune completions bash > ~/.local/share/bash-completion/completions/ringtune\n\
             zsh:  ringtune completions zsh > a folder of $fpath, as _ringtune\n\
             fish: ringtune completions fish > ~/.config/fish/completions/ringtune.fish",
        )
        .arg(Arg::new("shell").value_name("SHELL").required(true).value_parser(value_parser!(Shell)).help("The shell"))
        .arg(
            Arg::new("program")
                .value_name("PROGRAM")
                .value_parser(["ringtune", "ringrun"])
                .default_value("ringtune")
                .help("Whose commands and flags"),
        )
}

/// The command line of `man`.
pub fn man_command() -> Command {
    Command::new("man")
        .about("Write a man page for the program, one for each command and one for ringrun into a folder")
        .after_help("ringtune man ~/.local/share/man/man1, then: man ringtune-sft")
        .arg(
            Arg::new("folder").value_name("DIR").required(true).value_parser(value_parser!(PathBuf)).help("The folder"),
        )
}

/// Prints the completions of `whole`, or those of ringrun.
///
/// # Errors
/// If they cannot be printed.
pub fn completions(m: &ArgMatches, mut whole: Command) -> Result<()> {
    let shell = *m.get_one::<Shell>("shell").expect("clap requires it");
    let mut text = Vec::new();
    match m.get_one::<String>("program").map(String::as_str) {
        Some("ringrun") => clap_complete::generate(shell, &mut launcher_command(), "ringrun", &mut text),
        _ => clap_complete::generate(shell, &mut whole, "ringtune", &mut text),
    }
    let mut out = Out::new();
    out.write_all(&text)?;
    out.flush()?;
    Ok(())
}

/// Writes the pages of `whole` and that of ringrun.
///
/// # Errors
/// If the folder or a page cannot be written.
pub fn man(m: &ArgMatches, mut whole: Command) -> Result<()> {
    let folder = m.get_one::<PathBuf>("folder").expect("clap requires it");
    create_dir_all(folder)?;
    whole.build();
    let mut ringrun = launcher_command();
    ringrun.build();
    let pages = pages(&whole, "ringtune", folder)? + pages(&ringrun, "ringrun", folder)?;
    say::result(&format!("{}: {pages} pages", folder.display()));
    Ok(())
}

/// A page for `command` and one for each command below it; how many there are.
fn pages(command: &Command, name: &str, folder: &Path) -> Result<usize> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command.clone().name(name.to_string())).render(&mut text)?;
    write_bytes(&folder.join(format!("{name}.1")), &text)?;
    let mut written = 1;
    for below in command.get_subcommands().filter(|c| c.get_name() != "help") {
        written += pages(below, &format!("{name}-{}", below.get_name()), folder)?;
    }
    Ok(written)
}
