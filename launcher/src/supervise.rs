//! One attempt: starts the ranks, waits for the first thing that goes wrong, says it, and leaves nothing running.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use crate::beacon::Beacon;
use crate::cause::{BYSTANDER, Cause, HANG, REQUEUE, signal_name};
use crate::hub::{self, Hub};
use crate::options::Options;
use crate::output::{Lines, Stream, Style, drain};
use crate::spawn::{RankCommand, Streams, end_orphans, signal_group, spawn, state};

/// What wakes the supervisor.
#[derive(Debug)]
pub enum Event {
    /// From the hub of an attempt.
    Hub(u32, hub::Event),
    /// A rank's process ended in an attempt; it was not reaped yet.
    Ended(u32, usize),
    /// ringrun got a signal.
    Signal(i32),
}

/// How an attempt ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Exit code of the run.
    pub code: u8,
    /// What went wrong first.
    pub cause: Option<Cause>,
    /// Whether a checkpoint was completed.
    pub saved: bool,
    /// Whether a signal asked the run to end.
    pub asked: bool,
}

struct Rank {
    child: Child,
    beacon: Beacon,
    lines: Option<Lines>,
    joined: bool,
    /// Its connection to the hub is closed; with the exit code that it announced.
    closed: Option<Option<u8>>,
    /// How its process ended.
    status: Option<ExitStatus>,
    settled: bool,
}

struct Watch<'a> {
    options: &'a Options,
    attempt: u32,
    hub: &'a Hub,
    host: String,
    ranks: Vec<Rank>,
    outcome: Outcome,
    /// The first exit code that is not 0, where nothing counts as a failure.
    first_code: u8,
    kill_at: Option<Instant>,
    /// A line for the terminal.
    say: &'a dyn Fn(&str),
}

/// Runs the ranks to their end.
///
/// # Errors
/// If a rank cannot be started; then none is left.
pub fn supervise(
    options: &Options,
    commands: &[RankCommand],
    hub: &Hub,
    attempt: u32,
    (sender, events): (&Sender<Event>, &Receiver<Event>),
    logs: impl Fn(usize) -> io::Result<Option<File>>,
    say: &dyn Fn(&str),
) -> io::Result<Outcome> {
    let mut ends = Vec::new();
    let host = host_name();
    let mut watch = Watch {
        options,
        attempt,
        hub,
        host,
        ranks: Vec::new(),
        outcome: Outcome::default(),
        first_code: 0,
        kill_at: None,
        say,
    };
    for (rank, command) in commands.iter().enumerate() {
        let started = start(options, rank, command, logs(rank), &mut ends);
        match started.and_then(|rank_| wait_for((attempt, rank), rank_.child.id(), sender).map(|()| rank_)) {
            Ok(started) => watch.ranks.push(started),
            Err(e) => {
                watch.end_all();
                return Err(io::Error::new(e.kind(), format!("{}: {e}", command.program.display())));
            }
        }
    }
    watch.run(events);
    watch.end_all();
    drain(ends);
    watch.repeat_last_lines();
    Ok(watch.finish())
}

fn start(
    options: &Options,
    rank: usize,
    command: &RankCommand,
    log: io::Result<Option<File>>,
    ends: &mut Vec<Receiver<()>>,
) -> io::Result<Rank> {
    let log = log?;
    let piped = rank > 0 || log.is_some() || options.tag_output || options.timestamp;
    let (beacon, file) = Beacon::create()?;
    let mut child = spawn(command, if piped { Streams::Piped } else { Streams::Inherited }, &file)?;
    let mut lines = None;
    if piped {
        let style = Style { tag: rank > 0 || options.tag_output, timestamp: options.timestamp };
        let own = Lines::new(rank, style, log);
        ends.extend(child.stdout.take().map(|out| own.follow(out, Stream::Out)).transpose()?);
        ends.extend(child.stderr.take().map(|err| own.follow(err, Stream::Err)).transpose()?);
        lines = Some(own);
    }
    Ok(Rank { child, beacon, lines, joined: false, closed: None, status: None, settled: false })
}

/// Waits in a thread of its own until a process has ended, and leaves it to be reaped: its number stays its own until then.
fn wait_for((attempt, rank): (u32, usize), pid: u32, to: &Sender<Event>) -> io::Result<()> {
    let to = to.clone();
    let wait = move || {
        loop {
            // SAFETY: the struct is filled by the call and not read; the child is ours and is reaped by nobody else.
            let result = unsafe {
                let mut info = std::mem::zeroed::<libc::siginfo_t>();
                libc::waitid(libc::P_PID, pid, &mut info, libc::WEXITED | libc::WNOWAIT)
            };
            if result == 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                break;
            }
        }
        let _ = to.send(Event::Ended(attempt, rank));
    };
    std::thread::Builder::new().name("wait".into()).spawn(wait).map(drop)
}

impl Watch<'_> {
    fn run(&mut self, events: &Receiver<Event>) {
        let timeout = self.options.timeout.map(|t| Instant::now() + t);
        while self.ranks.iter().any(|r| !r.settled) {
            let until = [self.kill_at, timeout.filter(|_| self.outcome.cause.is_none())].into_iter().flatten().min();
            let wait = until.map_or(Duration::from_secs(3600), |t| t.saturating_duration_since(Instant::now()));
            match events.recv_timeout(wait) {
                Ok(event) => self.take(event),
                Err(RecvTimeoutError::Timeout) if self.kill_at.is_some_and(|t| t <= Instant::now()) => {
                    self.kill_at = Some(Instant::now() + Duration::from_secs(1));
                    self.signal(libc::SIGKILL);
                }
                Err(RecvTimeoutError::Timeout) if timeout.is_some_and(|t| t <= Instant::now()) => {
                    let text = format!("ended by --timeout after {:?}", self.options.timeout.unwrap_or_default());
                    self.fail(Cause { text, ..self.cause(0, HANG) });
                }
                Err(_) => {}
            }
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Signal(signal) => self.got_signal(signal),
            // Nothing of an earlier attempt counts.
            Event::Ended(attempt, _) | Event::Hub(attempt, _) if attempt != self.attempt => {}
            Event::Ended(_, rank) => {
                // It has ended: this does not wait. A second end is impossible.
                self.ranks[rank].status = self.ranks[rank].child.wait().ok();
                self.settle(rank);
            }
            Event::Hub(_, event) => match event {
                hub::Event::Joined(rank) => self.ranks[rank].joined = true,
                hub::Event::Closed(rank, goodbye) => {
                    self.ranks[rank].closed = Some(goodbye);
                    self.settle(rank);
                }
                hub::Event::Failed(cause) => self.fail(cause),
                hub::Event::Silent(rank) => self.silent(rank),
                hub::Event::Saved(_) => self.outcome.saved = true,
                hub::Event::Missing(ranks) => {
                    let list: Vec<String> = ranks.iter().take(8).map(usize::to_string).collect();
                    let more = if ranks.len() > 8 { ", …" } else { "" };
                    (self.say)(&format!("waiting for rank {}{more}", list.join(", ")));
                }
            },
        }
    }

    /// A rank's process has ended and, where it had one, its connection too: now all that it said is known.
    fn settle(&mut self, rank: usize) {
        let r = &mut self.ranks[rank];
        let Some(status) = r.status else { return };
        if r.settled || (r.joined && r.closed.is_none()) {
            return;
        }
        r.settled = true;
        let goodbye = r.closed.flatten();
        let code = goodbye.unwrap_or_else(|| code_of(status));
        let deliberate = goodbye.is_some() || (!r.joined && code == 0);
        // What was asked to end may end in any way.
        let asked = self.outcome.asked && (status.signal().is_some() || code == REQUEUE) && !r.joined;
        if self.first_code == 0 && code != BYSTANDER {
            self.first_code = code;
        }
        if deliberate && (code == 0 || code == REQUEUE) || asked {
            return;
        }
        if code != BYSTANDER {
            let text = self.ended(rank, status, code);
            self.fail(Cause { text, ..self.cause(rank, code.max(1)) });
        }
    }

    fn ended(&self, rank: usize, status: ExitStatus, code: u8) -> String {
        match status.signal() {
            Some(libc::SIGKILL) if out_of_memory() => "killed by SIGKILL: the kernel was out of memory".into(),
            Some(signal) => format!("killed by {}", signal_name(signal)),
            None if code == REQUEUE => "stopped by a signal before the first step; there was nothing to save".into(),
            None if code == 0 => "ended with exit code 0 before the others were done".into(),
            None if self.ranks[rank].joined => format!("ended with exit code {code} and did not say why"),
            None => format!("ended with exit code {code}"),
        }
    }

    fn cause(&self, rank: usize, code: u8) -> Cause {
        let position = self.ranks[rank].joined.then(|| self.ranks[rank].beacon.position());
        Cause { rank, host: self.host.clone(), position, text: String::new(), code }
    }

    /// The first cause counts. Ranks that know the hub learn it there and end; the others are asked by a signal.
    fn fail(&mut self, mut cause: Cause) {
        if self.outcome.cause.is_some() {
            return;
        }
        if let Some(rank) = self.ranks.get(cause.rank).filter(|r| r.joined) {
            cause.position = Some(rank.beacon.position());
        }
        self.hub.fail(&cause);
        for r in self.ranks.iter().filter(|r| !r.joined && r.status.is_none()) {
            signal_group(r.child.id(), libc::SIGTERM);
        }
        self.outcome.cause = Some(cause);
        self.kill_at = Some(Instant::now() + self.options.grace);
    }

    /// No heartbeat: it is stopped, or its machine is.
    fn silent(&mut self, rank: usize) {
        let r = &self.ranks[rank];
        if r.status.is_some() || self.outcome.cause.is_some() {
            return;
        }
        let pid = r.child.id();
        let stopped = if state(pid) == Some('T') { " (stopped by a signal)" } else { "" };
        let text = format!("no sign of life for {} s{stopped}", hub::SILENCE.as_secs());
        self.fail(Cause { text, ..self.cause(rank, HANG) });
        signal_group(pid, libc::SIGKILL);
    }

    fn got_signal(&mut self, signal: i32) {
        match signal {
            libc::SIGTSTP => {
                self.signal(libc::SIGSTOP);
                // SAFETY: stops this process until somebody continues it.
                unsafe { libc::raise(libc::SIGSTOP) };
                self.signal(libc::SIGCONT);
                self.hub.wake();
            }
            libc::SIGCONT => {
                self.signal(libc::SIGCONT);
                self.hub.wake();
            }
            libc::SIGUSR1 | libc::SIGUSR2 => self.signal(signal),
            _ if self.outcome.asked => self.kill_at = Some(Instant::now()),
            _ => {
                self.outcome.asked = true;
                self.signal(libc::SIGTERM);
                (self.say)(&format!("{}: the ranks were asked to end; once more kills them", signal_name(signal)));
                self.kill_at = Some(Instant::now() + self.options.grace);
            }
        }
        self.outcome.asked |= signal == libc::SIGUSR1;
    }

    fn signal(&self, signal: i32) {
        self.ranks.iter().filter(|r| r.status.is_none()).for_each(|r| signal_group(r.child.id(), signal));
    }

    /// Nothing is left: groups first, then what left its group.
    fn end_all(&mut self) {
        for r in &mut self.ranks {
            if r.status.is_none() {
                signal_group(r.child.id(), libc::SIGKILL);
                r.status = r.child.wait().ok();
            }
        }
        end_orphans();
    }

    /// The lines of the guilty rank may have scrolled away, or stand between those of others.
    fn repeat_last_lines(&self) {
        let Some(cause) = &self.outcome.cause else { return };
        let lines = self.ranks.get(cause.rank).and_then(|r| r.lines.as_ref()).map(Lines::last).unwrap_or_default();
        if self.ranks.len() > 1 && !lines.is_empty() {
            (self.say)(&format!("last lines of rank {}:\n{}", cause.rank, lines.join("\n")));
        }
    }

    fn finish(self) -> Outcome {
        let code = self.outcome.cause.as_ref().map_or(self.first_code, |c| c.code);
        Outcome { code, ..self.outcome }
    }
}

/// The exit code of a process: 128 + n when signal n ended it.
fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|s| 128 + s));
    code.and_then(|c| u8::try_from(c).ok()).unwrap_or(1)
}

/// Whether the kernel killed something of this control group since ringrun was asked last.
fn out_of_memory() -> bool {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    static KNOWN: AtomicU64 = AtomicU64::new(u64::MAX);
    let text = std::fs::read_to_string("/sys/fs/cgroup/memory.events").unwrap_or_default();
    let fields: BTreeMap<&str, u64> =
        text.lines().filter_map(|l| l.split_once(' ')).filter_map(|(k, n)| Some((k, n.parse().ok()?))).collect();
    let now = fields.get("oom_kill").copied().unwrap_or(0);
    KNOWN.swap(now, Relaxed) < now
}

/// Takes note of what the kernel killed before the ranks were started.
pub fn note_memory() {
    out_of_memory();
}

/// The machine's name.
pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "this machine".into() } else { name.trim().into() }
}
