//! A whole run: attempts one after the other, and what is said of them.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use serde_json::json;

use crate::cause::{BYSTANDER, REQUEUE, signal_name};
use crate::engine::{self, Mpi};
use crate::environment::{Identity, identify, own};
use crate::hub::Hub;
use crate::local::{self, Meeting};
use crate::options::{Engine, Options};
use crate::process::Start;
use crate::secret::{Secret, nonce};
use crate::spawn::adopt_orphans;
use crate::supervise::{Attempt, Event, LAST_WORD, Outcome, host_name, supervise};
use crate::wrap::{self, Report};

/// Runs what was typed; the exit code.
pub fn run(options: &Options) -> u8 {
    let outcome = match options {
        Options { wrap: true, .. } => wrapped(options),
        Options { dry_run: true, .. } => dry_run(options),
        _ => attempts(options),
    };
    outcome.unwrap_or_else(|e| {
        say(&format!("{}{}", in_words(&e.to_string()), meant(options, e.kind())));
        match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => 127,
            io::ErrorKind::InvalidInput => 2,
            _ => 1,
        }
    })
}

/// An error without the system's number for it.
fn in_words(text: &str) -> String {
    let rest = text.split_once(" (os error ").and_then(|(before, rest)| Some((before, rest.split_once(')')?.1)));
    rest.map_or_else(|| text.into(), |(before, after)| format!("{before}{after}"))
}

/// What was meant by a program that is not there: a command of ringtune without its name, or another launcher's.
fn meant(options: &Options, kind: io::ErrorKind) -> String {
    let word = options.program.first().and_then(|word| word.to_str()).unwrap_or_default();
    match word {
        _ if kind != io::ErrorKind::NotFound => String::new(),
        "sft" | "pretrain" | "eval" | "bench" | "doctor" => format!("; did you mean `ringrun … ringtune {word} …`?"),
        "launch" | "run" | "torchrun" | "accelerate" | "deepspeed" => {
            "; ringrun is the launcher: `ringrun -n N ringtune sft …`".into()
        }
        _ => String::new(),
    }
}

fn say(text: &str) {
    // In one write: ranks write there too. A terminal that has gone ends nothing.
    let _ = io::stderr().write_all(format!("ringrun: {text}\n").as_bytes());
}

fn usage(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// What is started here, for an attempt.
fn starts(options: &Options, meeting: &Meeting) -> io::Result<Vec<Start>> {
    let of_engine = |command| vec![Start { rank: None, command, plain: true }];
    let ringrun = std::env::current_exe().map_or_else(|_| "ringrun".into(), |path| path.display().to_string());
    Ok(match options.engine {
        Engine::Local | Engine::Node => {
            let first = options.node.as_ref().map_or(0, |node| node.rank * options.ranks);
            let commands = local::commands(options, meeting).into_iter().enumerate();
            commands.map(|(i, command)| Start { rank: Some(first + i), command, plain: false }).collect()
        }
        Engine::Mpirun => {
            let mpi = Mpi::found().map_err(usage)?;
            of_engine(engine::mpirun(mpi, options, meeting, &ringrun))
        }
        Engine::Srun => of_engine(engine::srun(options, meeting, &ringrun)),
    })
}

fn dry_run(options: &Options) -> io::Result<u8> {
    let control = match &options.node {
        Some(node) => format!("{}:{}", node.master.0, node.master.1),
        None => "127.0.0.1:0".into(),
    };
    let meeting = Meeting { control, secret: "…".into(), master_port: 0, attempt: 0 };
    let lines = starts(options, &meeting)?.iter().map(|s| format!("{}\n", s.command.shell())).collect::<String>();
    io::stdout().write_all(lines.as_bytes()).map(|()| 0)
}

/// The parent of one rank.
fn wrapped(options: &Options) -> io::Result<u8> {
    adopt_orphans();
    let (sender, events) = channel();
    listen_for_signals(sender.clone())?;
    let (command, rank, report) = wrap::command(options).map_err(usage)?;
    let size = report.size;
    let starts = [Start { rank: Some(rank), command, plain: true }];
    let say = &|_: &str| {};
    let attempt = Attempt { options, number: 0, size, starts: &starts, hub: None, report: Some(report), say };
    supervise(attempt, (&sender, &events), |_| Ok(None)).map(|outcome| outcome.code)
}

fn attempts(options: &Options) -> io::Result<u8> {
    adopt_orphans();
    let (sender, events) = channel();
    listen_for_signals(sender.clone())?;
    if let Ok(Some(Identity { launcher, size, .. })) = identify(&own)
        && options.engine == Engine::Local
        && !options.quiet
    {
        say(&format!(
            "{} started {size} ringruns, and each starts a run of its own; for one run give ringrun its words (--engine srun, --hostfile), \
             or start the program with it alone",
            launcher.name()
        ));
    }
    let (mut failures, mut backoff) = (0, options.backoff);
    for attempt in 0.. {
        let outcome = one(options, attempt, &sender, &events)?;
        if let Some(dir) = &options.log_dir {
            note_outcome(&folder(dir, attempt), &outcome)?;
        }
        if outcome.saved {
            (failures, backoff) = (0, options.backoff);
        }
        let again = restarts(&outcome) && failures < options.max_restarts;
        report(options, attempt, &outcome);
        if !again {
            return Ok(outcome.code);
        }
        failures += 1;
        say(&format!(
            "starting again in {:.0?} (failure {failures} of {} without a new checkpoint)",
            backoff, options.max_restarts
        ));
        if let Some(signal) = sleep(backoff, &events) {
            say(&format!("{}: not started again", signal_name(signal)));
            return Ok(outcome.code);
        }
        backoff = (backoff * 2).min(Duration::from_secs(60));
    }
    unreachable!("attempts are counted without an end")
}

/// Whether another try may help: not after a wrong option, not after a stop that was asked for.
fn restarts(outcome: &Outcome) -> bool {
    let failed = outcome.cause.is_some() || outcome.code == BYSTANDER;
    !outcome.asked && failed && ![0, 2, REQUEUE].contains(&outcome.code)
}

fn report(options: &Options, attempt: u32, outcome: &Outcome) {
    let which = if attempt > 0 { format!("attempt {attempt}: ") } else { String::new() };
    match &outcome.cause {
        Some(cause) => {
            // What another launcher prints may have ended in the middle of a line, above all when it was killed.
            let below = if matches!(options.engine, Engine::Mpirun | Engine::Srun) { "\n" } else { "" };
            let _ = io::stderr().write_all(format!("{below}ringrun: {which}{}\n", cause.line()).as_bytes());
        }
        None if outcome.code == REQUEUE && !options.quiet => say("all ranks stopped with their state saved"),
        None => {}
    }
}

/// The hub of an attempt, where the ranks meet, and how many they are.
fn meet(options: &Options, attempt: u32, sender: &Sender<Event>) -> io::Result<(Option<Hub>, Meeting, usize)> {
    let mut meeting = Meeting { secret: secret()?, master_port: local::free_port(), attempt, ..Meeting::default() };
    let (at, size) = match (&options.node, options.engine) {
        (Some(node), _) => {
            meeting.control = format!("{}:{}", node.master.0, node.master.1);
            // All machines have to know it, and have nothing in common but what they were told.
            meeting.secret = std::env::var("RINGTUNE_SECRET").unwrap_or_default();
            if meeting.secret.is_empty() && attempt == 0 {
                say(
                    "RINGTUNE_SECRET is not set: whoever reaches this port can join the run; set the same text on all machines",
                );
            }
            meeting.master_port = node.master.1.wrapping_add(1);
            (SocketAddr::from((Ipv4Addr::UNSPECIFIED, node.master.1)), node.count * options.ranks)
        }
        (None, Engine::Local) => (SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), options.ranks),
        _ => (SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), options.ranks),
    };
    if options.node.as_ref().is_some_and(|node| node.rank > 0) {
        return Ok((None, meeting, size));
    }
    let listener =
        TcpListener::bind(at).map_err(|e| io::Error::new(e.kind(), format!("cannot listen at {at}: {e}")))?;
    if meeting.control.is_empty() {
        let port = listener.local_addr()?.port();
        let host = if at.ip().is_loopback() { at.ip().to_string() } else { own_address(options) };
        meeting.control = format!("{host}:{port}");
    }
    let to = sender.clone();
    let notify = move |event| drop(to.send(Event::Hub(attempt, event)));
    let called = meeting.control.rsplit_once(':').map_or("", |(host, _)| host);
    let hub = Hub::start(listener, called, size, &Secret::of(&meeting.secret), options.hang_timeout, notify)?;
    hub.is_of_attempt(attempt);
    Ok((Some(hub), meeting, size))
}

/// The address by which the other machines see this one: that of the way to the first of them.
fn own_address(options: &Options) -> String {
    let here = host_name();
    let way = |name: &str| -> Option<String> {
        let to = (name, 9).to_socket_addrs().ok()?.next()?;
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).ok()?;
        // Nothing is sent: the system only chooses the way.
        socket.connect(to).ok()?;
        let ip = socket.local_addr().ok()?.ip();
        Some(if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() })
    };
    options.hosts.iter().filter(|h| h.name != here).find_map(|h| way(&h.name)).unwrap_or(here)
}

fn one(options: &Options, number: u32, sender: &Sender<Event>, events: &Receiver<Event>) -> io::Result<Outcome> {
    let (hub, meeting, size) = meet(options, number, sender)?;
    let starts = starts(options, &meeting)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let here = starts.iter().filter(|s| s.rank.is_some()).count();
    if here > cores && !options.oversubscribe && !options.quiet && number == 0 {
        say(&format!(
            "{here} ranks share {cores} cores: none is faster for it (--oversubscribe says that this is meant)"
        ));
    }
    let log = |rank: usize| match &options.log_dir {
        None => Ok(None),
        Some(dir) => {
            let dir = folder(dir, number);
            std::fs::create_dir_all(&dir)?;
            let path = dir.join(format!("rank-{rank:04}.log"));
            OpenOptions::new().create(true).write(true).truncate(true).open(path).map(Some)
        }
    };
    let say: &dyn Fn(&str) = if options.quiet { &|_| {} } else { &say };
    let report = match &hub {
        None => {
            Some(Report { address: meeting.control.clone(), secret: meeting.secret.clone(), size, attempt: number })
        }
        Some(_) => None,
    };
    let attempt = Attempt { options, number, size, starts: &starts, hub: hub.as_ref(), report, say };
    let outcome = supervise(attempt, (sender, events), log);
    if let (Some(hub), Some(node), Ok(Outcome { cause: Some(_), .. })) = (&hub, &options.node, &outcome) {
        hub.wait_until_told(node.count - 1, LAST_WORD);
    }
    hub.iter().for_each(Hub::shut);
    outcome
}

fn folder(dir: &Path, attempt: u32) -> PathBuf {
    dir.join(format!("attempt-{attempt}"))
}

fn note_outcome(dir: &Path, outcome: &Outcome) -> io::Result<()> {
    let cause = outcome.cause.as_ref().map(crate::cause::Cause::to_json);
    let value = json!({"code": outcome.code, "cause": cause, "new_checkpoint": outcome.saved});
    std::fs::write(dir.join("outcome.json"), format!("{value:#}\n"))
}

/// 256 random bits in hex.
fn secret() -> io::Result<String> {
    Ok(nonce()?.iter().map(|b| format!("{b:02x}")).collect())
}

/// What ringrun hands on to its ranks. SIGHUP stays ignored where whoever started us wants that, as nohup does.
fn listen_for_signals(to: Sender<Event>) -> io::Result<()> {
    use libc::{SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2};
    let mut all = vec![SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGTSTP, SIGCONT];
    if !is_ignored(SIGHUP) {
        all.push(SIGHUP);
    }
    let mut signals = signal_hook::iterator::Signals::new(all)?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            if to.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

fn is_ignored(signal: i32) -> bool {
    let mut now = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: asked, not changed; all zeros is a valid `sigaction`, and the pointer is to a local.
    let action = unsafe {
        libc::sigaction(signal, std::ptr::null(), now.as_mut_ptr());
        now.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}

/// Waits, unless a signal asks for an end meanwhile: which one.
fn sleep(time: Duration, events: &Receiver<Event>) -> Option<i32> {
    let until = std::time::Instant::now() + time;
    loop {
        match events.recv_timeout(until.saturating_duration_since(std::time::Instant::now())) {
            Ok(Event::Signal(signal @ (libc::SIGINT | libc::SIGTERM | libc::SIGHUP))) => return Some(signal),
            Ok(_) => {}
            Err(_) => return None,
        }
    }
}
