//! What was typed: ringrun's own words, and those that users of mpirun and torchrun know.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

const AFTER: &str = "\
Examples:
  ringrun -n 4 ringtune sft …                 four ranks on this machine
  ringrun -n 2 --max-restarts 3 ringtune sft …  start again from the newest checkpoint when a rank fails

Exit codes: that of the first rank that failed (128 + n when signal n ended it), 75 when a signal stopped the run and its state is
saved, 124 when a rank hung or gave no sign of life, 2 for a wrong option. The last line names the first cause.";

/// How ranks are tied to cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// Not at all.
    None,
    /// Each rank to its equal share of the cores.
    Core,
}

/// Which program starts the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Chosen by what there is.
    Auto,
    /// This one, on this machine.
    Local,
}

/// What ringrun is asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Ranks; all of them.
    pub ranks: usize,
    /// Who starts them.
    pub engine: Engine,
    /// Variables for the ranks.
    pub env: Vec<(String, String)>,
    /// Their working folder.
    pub dir: Option<PathBuf>,
    /// Ties to cores.
    pub bind: Bind,
    /// More ranks than cores, knowingly.
    pub oversubscribe: bool,
    /// Every line with its rank, rank 0 too.
    pub tag_output: bool,
    /// Every line with the time.
    pub timestamp: bool,
    /// Where `attempt-N/rank-NNNN.log` go.
    pub log_dir: Option<PathBuf>,
    /// Nothing of its own but the last line.
    pub quiet: bool,
    /// How often a failed run is started again without progress in between.
    pub max_restarts: u32,
    /// Seconds before the first restart; doubled each time, at most 60.
    pub backoff: Duration,
    /// How long no rank may move.
    pub hang_timeout: Duration,
    /// How long ranks may take to end once they are asked to.
    pub grace: Duration,
    /// How long the whole run may take.
    pub timeout: Option<Duration>,
    /// Print what would be started.
    pub dry_run: bool,
    /// The program and its words.
    pub program: Vec<OsString>,
}

/// The command line; every long option is known with dashes and with underscores.
pub fn command() -> Command {
    let text = |id: &'static str, name: &'static str| Arg::new(id).long(id).value_name(name);
    let switch = |id: &'static str| Arg::new(id).long(id).action(ArgAction::SetTrue);
    let seconds = |id: &'static str| text(id, "SECONDS").value_parser(value_parser!(f64));
    let command = Command::new("ringrun")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Starts the ranks of a run, watches over them, and names what went wrong first")
        .after_help(AFTER)
        .override_usage("ringrun [OPTIONS] [--] PROGRAM [ARGS]…")
        .max_term_width(120)
        .arg(
            text("n", "N")
                .short('n')
                .visible_short_alias('c')
                .visible_aliases(["np", "nproc-per-node", "nprocs"])
                .value_parser(value_parser!(u64).range(1..=4096))
                .help("Ranks on this machine [default: 1]"),
        )
        .arg(
            text("engine", "ENGINE").value_parser(["auto", "local"]).default_value("auto").help("Who starts the ranks"),
        )
        .arg(
            text("env", "VAR[=VALUE]")
                .short('x')
                .action(ArgAction::Append)
                .help("A variable for the ranks: with a value, or the one that it has here"),
        )
        .arg(
            text("wdir", "DIR")
                .aliases(["workdir", "wd"])
                .value_parser(value_parser!(PathBuf))
                .help("Folder in which the ranks run"),
        )
        .arg(
            text("bind-to", "WHAT")
                .alias("bind")
                .value_parser(["none", "core"])
                .default_value("none")
                .help("core: each rank on its equal share of the cores"),
        )
        .arg(switch("oversubscribe").help("More ranks than cores, without a word about it"))
        .arg(switch("tag-output").help("Every line with its rank; rank 0 is not tagged otherwise"))
        .arg(switch("timestamp-output").help("Every line with the time"))
        .arg(
            text("log-dir", "DIR")
                .alias("output-filename")
                .value_parser(value_parser!(PathBuf))
                .help("Write DIR/attempt-0/rank-0003.log and outcome.json"),
        )
        .arg(switch("quiet").short('q').help("Nothing of its own but the last line of a run that failed"))
        .arg(
            text("max-restarts", "K").default_value("0").value_parser(value_parser!(u32)).help(
                "Start a failed run again from its newest checkpoint, at most K times without a new one in between",
            ),
        )
        .arg(
            seconds("restart-backoff")
                .default_value("1")
                .help("Wait before the first restart, then twice as long, up to 60"),
        )
        .arg(seconds("hang-timeout").default_value("600").help("End the run when no rank has gone on for so long"))
        .arg(seconds("grace").default_value("60").help("End what has not ended so long after it was asked to"))
        .arg(seconds("timeout").help("End the run after so long, as with mpirun"))
        .arg(switch("dry-run").help("Print the commands with what they get of the environment, one a line"))
        .arg(switch("standalone").help("Accepted as with torchrun: ranks on this machine need no address"))
        .arg(
            text("nnodes", "N")
                .default_value("1")
                .value_parser(["1", "1:1"])
                .help("Accepted as with torchrun: one machine"),
        )
        .arg(switch("allow-run-as-root").help("Accepted as with mpirun: nothing stands in root's way here"))
        .arg(
            Arg::new("program")
                .value_name("PROGRAM")
                .required(true)
                .num_args(1..)
                .trailing_var_arg(true)
                .allow_hyphen_values(true)
                .value_parser(value_parser!(OsString))
                .help("The program of each rank, and its words"),
        );
    command.mut_args(|arg| {
        let names: Vec<String> = arg
            .get_long()
            .into_iter()
            .chain(arg.get_all_aliases().unwrap_or_default())
            .filter(|name| name.contains('-'))
            .map(|name| name.replace('-', "_"))
            .collect();
        arg.aliases(names)
    })
}

/// mpirun's long options with one dash, as `-np`, up to the program.
fn with_two_dashes(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut args = args.into_iter();
    let mut all: Vec<OsString> = args.next().into_iter().collect();
    let switches = switches();
    let mut value = false;
    while let Some(arg) = args.next() {
        let text = arg.to_str().unwrap_or_default();
        let option = match text {
            "-np" => "-n",
            "-wdir" => "--wdir",
            "-env" => "--env",
            other => other,
        };
        // The first word that is neither an option nor the value of one is the program; the rest is its own.
        if text == "--" || !(value || text.starts_with('-')) {
            all.push(arg);
            all.extend(args);
            break;
        }
        value = !value && !text.contains('=') && !switches.iter().any(|s| s == text);
        all.push(option.into());
    }
    all
}

/// The options that stand alone.
fn switches() -> Vec<String> {
    let mut all = vec!["-h".into(), "--help".into(), "-V".into(), "--version".into()];
    for arg in command().get_arguments().filter(|arg| matches!(arg.get_action(), ArgAction::SetTrue)) {
        let longs = arg.get_long().into_iter().chain(arg.get_all_aliases().unwrap_or_default());
        all.extend(longs.map(|name| format!("--{name}")));
        all.extend(arg.get_short().map(|c| format!("-{c}")));
    }
    all
}

/// Reads a command line, the program's name first. What is wrong ends the process with 2, help with 0.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Options {
    match try_parse(args) {
        Ok(options) => options,
        Err(e) => e.exit(),
    }
}

/// As [`parse`], with the error.
///
/// # Errors
/// What is wrong, or the help that was asked for.
pub fn try_parse(args: impl IntoIterator<Item = OsString>) -> Result<Options, clap::Error> {
    let matches = command().try_get_matches_from(with_two_dashes(args))?;
    read(&matches).map_err(|text| command().error(clap::error::ErrorKind::InvalidValue, text))
}

fn read(m: &ArgMatches) -> Result<Options, String> {
    let text = |id: &str| m.get_one::<String>(id).map(String::as_str);
    let path = |id: &str| m.get_one::<PathBuf>(id).cloned();
    let seconds = |id: &str| -> Result<Option<Duration>, String> {
        let Some(&s) = m.get_one::<f64>(id) else { return Ok(None) };
        let expected = || format!("--{id}: expected seconds, found {s}");
        Duration::try_from_secs_f64(s).ok().filter(|d| d.as_secs() < 1 << 32).ok_or_else(expected).map(Some)
    };
    let needed = |id: &str| seconds(id).map(|s| s.unwrap_or_default());
    let env = m.get_many::<String>("env").into_iter().flatten().map(|word| variable(word)).collect::<Result<_, _>>()?;
    let ranks = m.get_one::<u64>("n").map_or(1, |&n| n as usize);
    Ok(Options {
        ranks,
        engine: if text("engine") == Some("local") { Engine::Local } else { Engine::Auto },
        env,
        dir: path("wdir"),
        bind: if text("bind-to") == Some("core") { Bind::Core } else { Bind::None },
        oversubscribe: m.get_flag("oversubscribe"),
        tag_output: m.get_flag("tag-output"),
        timestamp: m.get_flag("timestamp-output"),
        log_dir: path("log-dir"),
        quiet: m.get_flag("quiet"),
        max_restarts: m.get_one("max-restarts").copied().unwrap_or_default(),
        backoff: needed("restart-backoff")?,
        hang_timeout: needed("hang-timeout")?,
        grace: needed("grace")?,
        timeout: seconds("timeout")?,
        dry_run: m.get_flag("dry-run"),
        program: m.get_many::<OsString>("program").into_iter().flatten().cloned().collect(),
    })
}

/// `VAR=VALUE`, or `VAR` with the value that it has here.
fn variable(word: &str) -> Result<(String, String), String> {
    match word.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        None if !word.is_empty() => {
            std::env::var(word).map(|value| (word.into(), value)).map_err(|_| format!("-x {word}: it is not set here"))
        }
        _ => Err(format!("-x {word}: expected VAR or VAR=VALUE")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Result<Options, String> {
        try_parse(line.split_whitespace().map(OsString::from)).map_err(|e| e.to_string())
    }

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn words_of_mpirun_and_torchrun() {
        for line in [
            "ringrun -n 3 prog -n 9 --x",
            "ringrun -np 3 prog -n 9 --x",
            "ringrun --np=3 -- prog -n 9 --x",
            "ringrun -c 3 --tag_output prog -n 9 --x",
            "ringrun --nproc_per_node 3 --standalone --nnodes=1 prog -n 9 --x",
            "ringrun --nproc-per-node=3 --log_dir d prog -n 9 --x",
        ] {
            let o = of(line).unwrap();
            assert_eq!(o.ranks, 3, "{line}");
            assert_eq!(o.program, ["prog", "-n", "9", "--x"], "{line}");
        }
        let o = of("ringrun -x A=1 --env B=2 -wdir /tmp --hang_timeout 2.5 prog -np 4").unwrap();
        assert_eq!(o.env, [("A".into(), "1".into()), ("B".into(), "2".into())]);
        assert_eq!((o.dir, o.hang_timeout), (Some("/tmp".into()), Duration::from_millis(2500)));
        assert_eq!(o.program, ["prog", "-np", "4"]);
        assert_eq!(of("ringrun prog").unwrap().ranks, 1);
        assert_eq!(of("ringrun --tag-output -q prog -np 4").unwrap().program, ["prog", "-np", "4"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, expected) in [
            ("ringrun -n 0 prog", "0 is not in 1..=4096"),
            ("ringrun -n 2", "required"),
            ("ringrun --grace -1 prog", "--grace"),
            ("ringrun --timeout nan prog", "--timeout: expected seconds"),
            ("ringrun -x =3 prog", "-x =3: expected VAR"),
            ("ringrun -x RINGRUN_SURELY_UNSET prog", "not set here"),
            ("ringrun --nnodes 2 prog", "nnodes"),
        ] {
            let e = of(line).unwrap_err();
            assert!(e.contains(expected), "{line}: {e}");
        }
    }
}
