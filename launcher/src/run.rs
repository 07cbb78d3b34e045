//! A whole run: attempts one after the other, and what is said of them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use serde_json::json;

use crate::cause::{REQUEUE, signal_name};
use crate::hub::Hub;
use crate::local::{self, Meeting};
use crate::options::Options;
use crate::spawn::adopt_orphans;
use crate::supervise::{Event, Outcome, note_memory, supervise};

/// Runs what was typed; the exit code.
pub fn run(options: &Options) -> u8 {
    if options.dry_run {
        return dry_run(options);
    }
    match attempts(options) {
        Ok(code) => code,
        Err(e) => {
            say(&e.to_string());
            match e.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => 127,
                _ => 1,
            }
        }
    }
}

fn say(text: &str) {
    // A terminal that has gone ends nothing.
    let _ = writeln!(io::stderr(), "ringrun: {text}");
}

fn dry_run(options: &Options) -> u8 {
    let meeting = Meeting { control: "127.0.0.1:0".into(), secret: "…".into(), master_port: 0, attempt: 0 };
    let mut text = String::new();
    local::commands(options, &meeting).iter().for_each(|c| text += &format!("{}\n", c.shell()));
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

fn attempts(options: &Options) -> io::Result<u8> {
    adopt_orphans();
    note_memory();
    let (sender, events) = channel();
    listen_for_signals(sender.clone())?;
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
    !outcome.asked && outcome.cause.is_some() && ![0, 2, REQUEUE].contains(&outcome.code)
}

fn report(options: &Options, attempt: u32, outcome: &Outcome) {
    let which = if attempt > 0 { format!("attempt {attempt}: ") } else { String::new() };
    match &outcome.cause {
        Some(cause) => say(&format!("{which}{}", cause.line())),
        None if outcome.code == REQUEUE && !options.quiet => say("all ranks stopped with their state saved"),
        None => {}
    }
}

fn one(options: &Options, attempt: u32, sender: &Sender<Event>, events: &Receiver<Event>) -> io::Result<Outcome> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let control = listener.local_addr()?.to_string();
    let secret = secret()?;
    // Of an earlier attempt nothing may arrive late: each hub has a channel's end that knows its number.
    let to = sender.clone();
    let notify = move |event| drop(to.send(Event::Hub(attempt, event)));
    let hub = Hub::start(listener, options.ranks, secret.clone(), options.hang_timeout, notify)?;
    let meeting = Meeting { control, secret, master_port: local::free_port(), attempt };
    let commands = local::commands(options, &meeting);
    let too_many = options.ranks > std::thread::available_parallelism().map_or(1, usize::from);
    if too_many && !options.oversubscribe && !options.quiet && attempt == 0 {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        say(&format!(
            "{} ranks share {cores} cores: none is faster for it (--oversubscribe says that this is meant)",
            options.ranks
        ));
    }
    let logs = |rank: usize| match &options.log_dir {
        None => Ok(None),
        Some(dir) => {
            let dir = folder(dir, attempt);
            std::fs::create_dir_all(&dir)?;
            let path = dir.join(format!("rank-{rank:04}.log"));
            OpenOptions::new().create(true).write(true).truncate(true).open(path).map(Some)
        }
    };
    let quiet = options.quiet;
    supervise(options, &commands, &hub, attempt, (sender, events), logs, &|text| {
        if !quiet {
            say(text);
        }
    })
}

fn folder(dir: &Path, attempt: u32) -> PathBuf {
    dir.join(format!("attempt-{attempt}"))
}

fn note_outcome(dir: &Path, outcome: &Outcome) -> io::Result<()> {
    let cause = outcome.cause.as_ref().map(crate::cause::Cause::to_json);
    let value = json!({"code": outcome.code, "cause": cause, "new_checkpoint": outcome.saved});
    std::fs::write(dir.join("outcome.json"), format!("{value:#}\n"))
}

/// 128 random bits in hex.
fn secret() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
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
