//! What was typed: ringrun's own words, and those that users of mpirun and torchrun know.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use crate::devices::{self, Bind, Count};
use crate::environment::{own, tasks_of_job};
use crate::hosts::{self, Host, parse_list, read_file};
use crate::spawn::own_cores;

const AFTER: &str = "\
Examples:
  ringrun -n 4 ringtune sft …                 four ranks on this machine
  ringrun -n 2 --max-restarts 3 ringtune sft …  start again from the newest checkpoint when a rank fails
  ringrun -H a:4,b:4 ringtune sft …           eight ranks on two machines, started by mpirun
  ringrun --engine srun -n 16 ringtune sft …  in a Slurm job
  ringrun --nnodes 2 --node-rank 1 --master-addr a --nproc-per-node 4 ringtune sft …   on machine b; --node-rank 0 on a

Exit codes: that of the first rank that failed (128 + n when signal n ended it), 75 when a signal stopped the run and its state is
saved, 124 when a rank hung or gave no sign of life, 2 for a wrong option. The last line names the first cause.";

/// How long ranks may take to end where nothing else was said.
pub const GRACE: Duration = Duration::from_secs(60);

/// Which program starts the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// ringrun, on this machine.
    Local,
    /// mpirun of Open MPI, MPICH or Intel.
    Mpirun,
    /// Slurm's srun.
    Srun,
    /// One ringrun on each machine, started by hand or by Kubernetes.
    Node,
}

/// Which of the machines this is, where each has a ringrun of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Machines.
    pub count: usize,
    /// This one.
    pub rank: usize,
    /// Where the first one's ringrun listens.
    pub master: (String, u16),
}

/// What ringrun is asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Ranks: all of them, or with [`Engine::Node`] those of this machine.
    pub ranks: usize,
    /// Who starts them.
    pub engine: Engine,
    /// Machines, where they are named.
    pub hosts: Vec<Host>,
    /// With [`Engine::Node`]: which machine this is.
    pub node: Option<Node>,
    /// Be the parent of one rank that another launcher started.
    pub wrap: bool,
    /// mpirun may run as root.
    pub root: bool,
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
                .visible_aliases(["np", "nprocs"])
                .value_parser(|text: &str| Count::parse(text, 65_536))
                .help(
                    "Ranks over all machines, or gpu, cpu: one for each of this machine [default: every slot of the named machines, else \
                     auto: one for each GPU, or one]",
                ),
        )
        .arg(
            text("nproc-per-node", "N")
                .value_parser(|text: &str| Count::parse(text, 4096))
                .conflicts_with("n")
                .help("Ranks on each machine, or gpu, cpu, auto: as many as this one has"),
        )
        .arg(
            text("host", "a:4,b:4")
                .short('H')
                .visible_alias("hosts")
                .conflicts_with("hostfile")
                .help("Machines, each with the ranks that it takes"),
        )
        .arg(
            text("hostfile", "FILE")
                .visible_alias("machinefile")
                .value_parser(value_parser!(PathBuf))
                .help("Machines, one a line: `a slots=4`, `a:4` or `a`"),
        )
        .arg(
            text("engine", "ENGINE")
                .value_parser(["auto", "local", "mpirun", "srun", "node"])
                .default_value("auto")
                .help("Who starts the ranks. auto: srun in a Slurm job of several machines, mpirun where machines are named, node with --nnodes"),
        )
        .arg(
            text("nnodes", "N")
                .value_parser(hosts::machines)
                .help("Engine node: machines, each with a ringrun of its own (N:N as with torchrun)"),
        )
        .arg(text("node-rank", "R").value_parser(value_parser!(u64)).help("Engine node: which of them this is, from 0"))
        .arg(text("master-addr", "ADDRESS").help("Engine node: the first machine"))
        .arg(text("master-port", "PORT").value_parser(value_parser!(u16)).help("Engine node: a port there [default: 29500]"))
        .arg(text("rdzv-endpoint", "ADDRESS:PORT").help("Engine node: both in one word, as with torchrun"))
        .arg(switch("wrap").hide(true))
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
                .value_parser(["none", "core", "numa"])
                .default_value("none")
                .help("core: each rank on its equal share of the cores; numa: on the cores of one NUMA node, ranks spread evenly over the nodes"),
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
        .arg(switch("allow-run-as-root").help("Let Open MPI's mpirun run as root"))
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
            "-host" | "-hosts" => "--host",
            "-hostfile" | "-machinefile" => "--hostfile",
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
    let program: Vec<OsString> = m.get_many::<OsString>("program").into_iter().flatten().cloned().collect();
    if let Some(option) = program.first().filter(|p| p.as_encoded_bytes().starts_with(b"-")) {
        return Err(format!(
            "{}: no option of ringrun; options of the program stand behind its name",
            option.display()
        ));
    }
    let env = m.get_many::<String>("env").into_iter().flatten().map(|word| variable(word)).collect::<Result<_, _>>()?;
    let hosts = match (text("host"), path("hostfile")) {
        (Some(list), _) => parse_list(list)?,
        (None, Some(file)) => read_file(&file)?,
        (None, None) => Vec::new(),
    };
    let oversubscribe = m.get_flag("oversubscribe");
    let node = node(m)?;
    let engine = engine(text("engine"), &hosts, node.is_some());
    if engine == Engine::Node && node.is_none() {
        return Err("--engine node: expected --nnodes, --node-rank and --master-addr".into());
    }
    let (hosts, ranks) = ranks(m, engine, hosts, oversubscribe)?;
    Ok(Options {
        ranks,
        engine,
        hosts,
        node: node.filter(|_| engine == Engine::Node),
        wrap: m.get_flag("wrap"),
        root: m.get_flag("allow-run-as-root"),
        env,
        dir: path("wdir"),
        bind: [Bind::Core, Bind::Numa].into_iter().find(|b| text("bind-to") == Some(b.word())).unwrap_or(Bind::None),
        oversubscribe,
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
        program,
    })
}

/// The engine that was asked for, or the one that fits.
fn engine(word: Option<&str>, hosts: &[Host], node: bool) -> Engine {
    let slurm = std::env::var("SLURM_JOB_NUM_NODES").ok().and_then(|n| n.parse::<u32>().ok()).is_some_and(|n| n > 1);
    let here =
        |h: &Host| ["localhost", "127.0.0.1"].contains(&h.name.as_str()) || h.name == crate::supervise::host_name();
    match word {
        Some("local") => Engine::Local,
        Some("mpirun") => Engine::Mpirun,
        Some("srun") => Engine::Srun,
        Some("node") => Engine::Node,
        _ if node => Engine::Node,
        _ if slurm => Engine::Srun,
        _ if hosts.iter().all(here) => Engine::Local,
        _ => Engine::Mpirun,
    }
}

/// Which machine this is, where torchrun's words say that there are several.
fn node(m: &ArgMatches) -> Result<Option<Node>, String> {
    let number = |id: &str| m.get_one::<u64>(id).map(|&n| n as usize);
    let (count, rank) = (number("nnodes").unwrap_or(1), number("node-rank"));
    if count <= 1 && rank.unwrap_or(0) == 0 {
        return Ok(None);
    }
    let rank = rank.ok_or("--nnodes: expected --node-rank too: which of the machines this is")?;
    if rank >= count {
        return Err(format!("--node-rank: expected a number below --nnodes {count}, found {rank}"));
    }
    let text = |id: &str| m.get_one::<String>(id).cloned();
    let port = m.get_one::<u16>("master-port").copied();
    let master = match (text("master-addr"), text("rdzv-endpoint")) {
        (Some(address), _) => (address, port.unwrap_or(29_500)),
        (None, Some(both)) => match both.rsplit_once(':').map(|(a, p)| (a, p.parse())) {
            Some((address, Ok(port))) => (address.into(), port),
            _ => return Err(format!("--rdzv-endpoint: expected ADDRESS:PORT, found {both:?}")),
        },
        (None, None) => return Err("--nnodes: expected --master-addr too: the first machine".into()),
    };
    Ok(Some(Node { count, rank, master }))
}

/// The machines with the ranks of each, and their number.
fn ranks(m: &ArgMatches, engine: Engine, hosts: Vec<Host>, oversubscribe: bool) -> Result<(Vec<Host>, usize), String> {
    let counted = |id: &str| -> Result<Option<usize>, String> {
        let Some(count) = m.get_one::<Count>(id) else { return Ok(None) };
        let here = count.on(devices::gpus(), own_cores().len());
        here.map(Some).map_err(|e| if id == "n" { format!("-n {e}") } else { format!("--{id} {e}") })
    };
    let each = counted("nproc-per-node")?;
    if hosts.is_empty() || engine == Engine::Local || engine == Engine::Node {
        let slots = match hosts.iter().map(|h| h.slots).sum::<usize>() {
            0 if matches!(engine, Engine::Local | Engine::Node) => devices::gpus().max(1),
            slots => slots.max(1),
        };
        let of_job = tasks_of_job(&own).filter(|&n| engine == Engine::Srun || (engine == Engine::Local && n > 1));
        let of_job = of_job.filter(|_| hosts.is_empty());
        return Ok((hosts, counted("n")?.or(each).or(of_job).unwrap_or(slots)));
    }
    if let Some(word @ (Count::Gpu | Count::Cpu | Count::Auto)) = m.get_one::<Count>("n") {
        return Err(format!(
            "-n {}: expected a number where several machines are named; --nproc-per-node takes as many on each as this one has",
            format!("{word:?}").to_lowercase()
        ));
    }
    let hosts: Vec<Host> = match each {
        Some(slots) => hosts.into_iter().map(|h| Host { slots, ..h }).collect(),
        None => hosts,
    };
    let placed = hosts::place(&hosts, counted("n")?, oversubscribe)?;
    let total = placed.iter().map(|(_, n)| n).sum();
    Ok((placed.into_iter().map(|(name, slots)| Host { name, slots }).collect(), total))
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
        assert_eq!(of("ringrun prog").unwrap().ranks, devices::gpus().max(1));
        assert_eq!(of("ringrun prog").unwrap().grace, GRACE);
        assert_eq!(of("ringrun -n cpu prog").unwrap().ranks, own_cores().len());
        assert_eq!(of("ringrun --nproc_per_node=auto --bind-to numa prog").unwrap().ranks, devices::gpus().max(1));
        assert_eq!(of("ringrun -H a,b --nproc-per-node cpu prog").unwrap().ranks, 2 * own_cores().len());
        assert_eq!(of("ringrun -n gpu prog").is_ok(), devices::gpus() > 0);
        for (word, bind) in [("none", Bind::None), ("core", Bind::Core), ("numa", Bind::Numa)] {
            assert_eq!(of(&format!("ringrun --bind-to {word} prog")).unwrap().bind, bind);
        }
        assert_eq!(of("ringrun --tag-output -q prog -np 4").unwrap().program, ["prog", "-np", "4"]);
    }

    #[test]
    fn machines_and_engines() {
        let o = of("ringrun -H a:4,b:4 -n 6 prog").unwrap();
        assert_eq!((o.engine, o.ranks, o.hosts[1].slots), (Engine::Mpirun, 6, 2));
        assert_eq!(of("ringrun -H a,b --nproc-per-node 3 prog").unwrap().ranks, 6);
        assert_eq!(of("ringrun -H localhost:3 prog").unwrap().engine, Engine::Local);
        let o = of("ringrun --nnodes=2 --node_rank=1 --rdzv_endpoint=a:77 --nproc_per_node=4 prog").unwrap();
        assert_eq!((o.engine, o.ranks), (Engine::Node, 4));
        assert_eq!(o.node, Some(Node { count: 2, rank: 1, master: ("a".into(), 77) }));
        assert_eq!(of("ringrun --nnodes 1:1 --standalone prog").unwrap().engine, Engine::Local);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, expected) in [
            ("ringrun -n 0 prog", "expected a number from 1 to 65536, gpu, cpu or auto"),
            ("ringrun -n gpus prog", "expected a number from 1 to 65536, gpu, cpu or auto"),
            ("ringrun -H a,b -n cpu prog", "-n cpu: expected a number where several machines are named"),
            ("ringrun -n 2", "required"),
            ("ringrun --surely-wrong prog", "--surely-wrong: no option of ringrun"),
            ("ringrun --grace -1 prog", "--grace"),
            ("ringrun --timeout nan prog", "--timeout: expected seconds"),
            ("ringrun -x =3 prog", "-x =3: expected VAR"),
            ("ringrun -x RINGRUN_SURELY_UNSET prog", "not set here"),
            ("ringrun --nnodes 2 prog", "expected --node-rank too"),
            ("ringrun --nnodes 2 --node-rank 2 --master-addr a prog", "below --nnodes 2, found 2"),
            ("ringrun --nnodes 2 --node-rank 1 prog", "expected --master-addr too"),
            ("ringrun --engine node prog", "--engine node: expected --nnodes"),
            ("ringrun -H a:2,b:2 -n 5 prog", "5 ranks on 4 slots"),
            ("ringrun -H a:2 --hostfile f prog", "cannot be used with"),
            ("ringrun --hostfile /surely/missing prog", "/surely/missing: "),
            ("ringrun --hostfile /dev/zero prog", "/dev/zero: longer than 1048576 bytes"),
            ("ringrun --hostfile /dev/null prog", "/dev/null: no machine in it"),
            ("ringrun -n 2 --nproc-per-node 2 prog", "cannot be used with"),
        ] {
            let e = of(line).unwrap_err();
            assert!(e.contains(expected), "{line}: {e}");
        }
    }
}
