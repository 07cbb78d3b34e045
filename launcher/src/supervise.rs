//! One attempt: starts the ranks, waits for the first thing that goes wrong, says it, and leaves nothing running.

use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use crate::cause::{BYSTANDER, Cause, HANG, REQUEUE, signal_name};
use crate::hub::{self, Hub};
use crate::link::{Heard, Link};
use crate::memory::Kills;
use crate::options::{Engine, Options};
use crate::output::{Lines, drain};
use crate::process::{Process, Start};
use crate::spawn::{end_orphans, is_stopped, signal_group};
pub use crate::system::host_name;
use crate::wrap::Report;

/// What wakes the supervisor.
#[derive(Debug)]
pub enum Event {
    /// From the hub of an attempt.
    Hub(u32, hub::Event),
    /// From the hub of an attempt, where it is elsewhere.
    Heard(u32, Heard),
    /// A process that was started ended in an attempt; it was not reaped yet.
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

/// What an attempt is made of.
pub struct Attempt<'a> {
    /// What was typed.
    pub options: &'a Options,
    /// Its number, from 0.
    pub number: u32,
    /// Ranks over all machines.
    pub size: usize,
    /// What is started here.
    pub starts: &'a [Start],
    /// The hub, where it is here.
    pub hub: Option<&'a Hub>,
    /// Where ends of ranks are told, where the hub is elsewhere.
    pub report: Option<Report>,
    /// A line for the terminal.
    pub say: &'a dyn Fn(&str),
}

/// What the hub says of a rank, wherever it runs.
#[derive(Clone, Copy, Default)]
struct Member {
    joined: bool,
    /// Its connection is closed; with the exit code that it announced.
    closed: Option<Option<u8>>,
}

struct Watch<'a> {
    attempt: Attempt<'a>,
    host: String,
    processes: Vec<Process>,
    kills: Kills,
    members: Vec<Member>,
    outcome: Outcome,
    /// The first exit code that is not 0, where nothing counts as a failure.
    first_code: u8,
    kill_at: Option<Instant>,
    /// The connection to a hub that is elsewhere, and whether it stands.
    link: Option<Link>,
    linked: bool,
    /// Nobody listens to it where the hub should be.
    strange: bool,
    /// The hub is elsewhere, and a rank has heard there that the run has failed: what is left here is ended, and not to blame.
    over: bool,
    /// A rank elsewhere is gone; who started it may say more until then.
    lost: Option<(Instant, usize)>,
    /// The mpirun of ranks that have all ended was given until [`AFTER_RANKS`].
    hurried: bool,
}

/// How long who started a rank elsewhere has to say what became of it, and to be told why the run ends.
pub const LAST_WORD: Duration = Duration::from_secs(1);
/// How long an mpirun may take to end once every rank has: between signals of its own it waits for two seconds, and one that lost a rank may
/// wait for ever.
const AFTER_RANKS: Duration = Duration::from_secs(3);

/// Runs the ranks to their end.
///
/// # Errors
/// If a rank cannot be started; then none is left.
pub fn supervise(
    attempt: Attempt,
    (sender, events): (&Sender<Event>, &Receiver<Event>),
    log: impl Fn(usize) -> io::Result<Option<File>>,
) -> io::Result<Outcome> {
    let (mut ends, options) = (Vec::new(), attempt.options);
    let members = vec![Member::default(); attempt.size];
    let mut watch = Watch {
        host: host_name(),
        processes: Vec::new(),
        kills: Kills::from_now(),
        members,
        outcome: Outcome::default(),
        first_code: 0,
        kill_at: None,
        link: None,
        linked: false,
        strange: false,
        over: false,
        lost: None,
        hurried: false,
        attempt,
    };
    for (index, what) in watch.attempt.starts.iter().enumerate() {
        let log = what.rank.map_or(Ok(None), &log);
        let started = log.and_then(|log| Process::start(options, what, log, &mut ends));
        match started.and_then(|p| p.watch(watch.attempt.number, index, sender).map(|()| p)) {
            Ok(started) => watch.processes.push(started),
            Err(e) => {
                watch.end_all();
                return Err(io::Error::new(e.kind(), format!("{}: {e}", what.command.program.display())));
            }
        }
    }
    if let Some(report) = &watch.attempt.report {
        let pages = watch.processes.iter().filter_map(|p| Some((p.rank?, p.beacon))).collect();
        let (number, to) = (watch.attempt.number, sender.clone());
        // Without it the ranks hear for themselves why the run ends.
        watch.link = Link::start(report, pages, move |heard| drop(to.send(Event::Heard(number, heard)))).ok();
    }
    watch.run(events);
    watch.ask_why(events);
    watch.link = None;
    watch.end_all();
    drain(ends);
    watch.repeat_last_lines();
    Ok(watch.finish())
}

impl Watch<'_> {
    fn under_way(&self) -> bool {
        let elsewhere = self.members.iter().any(|m| m.joined && m.closed.is_none());
        self.processes.iter().any(|p| !p.settled) || elsewhere
    }

    fn run(&mut self, events: &Receiver<Event>) {
        let timeout = self.attempt.options.timeout.map(|t| Instant::now() + t);
        while self.under_way() {
            let timeout = timeout.filter(|_| self.outcome.cause.is_none());
            let until = [self.kill_at, timeout, self.lost.map(|l| l.0)].into_iter().flatten().min();
            let wait = until.map_or(Duration::from_secs(3600), |t| t.saturating_duration_since(Instant::now()));
            match events.recv_timeout(wait) {
                Ok(event) => self.take(event),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.hurry();
            let now = Instant::now();
            if let Some((_, rank)) = self.lost.take_if(|(t, _)| *t <= now) {
                let text = "connection closed: killed or crashed; see its machine's own messages".into();
                self.fail(Cause { text, ..self.cause(rank, 1) });
            }
            if timeout.is_some_and(|t| t <= now) {
                let text = format!(
                    "ended by --timeout after {} s",
                    self.attempt.options.timeout.unwrap_or_default().as_secs_f64()
                );
                self.fail(Cause { text, ..self.cause(0, HANG) });
            }
            if self.kill_at.is_some_and(|t| t <= now) {
                if self.processes.iter().all(|p| p.settled) {
                    return; // What is left elsewhere cannot be reached.
                }
                self.kill_at = Some(now + Duration::from_secs(1));
                self.signal(libc::SIGKILL);
            }
        }
    }

    /// The run has failed, and nothing but the mpirun that started the ranks is left of it here.
    fn hurry(&mut self) {
        let of_mpirun =
            self.attempt.options.engine == Engine::Mpirun && self.processes.iter().all(|p| p.rank.is_none());
        let joined = self.members.iter().filter(|m| m.joined);
        let gone = joined.clone().count() > 0 && joined.into_iter().all(|m| m.closed.is_some());
        if of_mpirun && gone && self.outcome.cause.is_some() && !self.hurried {
            self.hurried = true;
            let soon = Instant::now() + AFTER_RANKS;
            self.kill_at = Some(self.kill_at.map_or(soon, |at| at.min(soon)));
        }
    }

    /// A rank here has ended because of another one: the hub, which told it, is telling this process why.
    fn ask_why(&mut self, events: &Receiver<Event>) {
        let until = Instant::now() + LAST_WORD;
        let bystander = self.processes.iter().any(|p| p.status.map(code_of) == Some(BYSTANDER));
        while bystander && self.linked && self.outcome.cause.is_none() {
            match events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(event) => self.take(event),
                Err(_) => return,
            }
        }
    }

    /// The hub is elsewhere, and ends the run here, whether or not the ranks can hear it.
    fn told(&mut self, heard: Heard) {
        match heard {
            Heard::Open => self.linked = true,
            Heard::Stranger => self.strange = true,
            Heard::Failed(cause) => {
                self.over = true;
                // Who is stopped hears nothing, and would be waited for.
                let here = self.processes.iter().filter(|p| p.status.is_none()).map(|p| p.child.id());
                here.filter(|pid| is_stopped(*pid)).for_each(|pid| signal_group(pid, libc::SIGKILL));
                self.fail_as(cause, false);
            }
            Heard::Gone => {
                self.linked = false;
                // A program that knows of no hub goes on without it.
                let knows = |p: &Process| p.status.is_none() && p.beacon.moves() > 0;
                if self.processes.iter().any(knows) && self.outcome.cause.is_none() {
                    self.over = true;
                    self.kill_at.get_or_insert(Instant::now() + self.attempt.options.grace);
                }
            }
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Signal(signal) => self.got_signal(signal),
            // Nothing of an earlier attempt counts.
            Event::Ended(attempt, _) | Event::Hub(attempt, _) | Event::Heard(attempt, _)
                if attempt != self.attempt.number => {}
            Event::Heard(_, heard) => self.told(heard),
            Event::Ended(_, index) => {
                // It has ended: this does not wait.
                self.processes[index].status = self.processes[index].child.wait().ok();
                self.settle(index);
            }
            Event::Hub(_, event) => self.heard(event),
        }
    }

    fn heard(&mut self, event: hub::Event) {
        let local = |rank: usize| self.processes.iter().position(|p| p.rank == Some(rank));
        match event {
            hub::Event::Joined(rank) => {
                self.members[rank].joined = true;
                if let Some(index) = local(rank) {
                    self.kills.add(self.processes[index].child.id());
                }
            }
            hub::Event::Closed(rank, goodbye) => {
                self.members[rank].closed = Some(goodbye);
                match (local(rank), goodbye) {
                    (Some(index), _) => self.settle(index),
                    (None, Some(code)) => self.first_code = self.first_code.max(code),
                    (None, None) if self.lost.is_none() => self.lost = Some((Instant::now() + LAST_WORD, rank)),
                    (None, None) => {}
                }
            }
            hub::Event::Failed(cause) => self.fail(cause),
            hub::Event::Silent(rank) => self.silent(rank),
            hub::Event::Saved(_) => self.outcome.saved = true,
            hub::Event::Stranger(from) => (self.attempt.say)(&hub::a_stranger(&from)),
            hub::Event::Missing(ranks) => {
                let list: Vec<String> = ranks.iter().take(8).map(usize::to_string).collect();
                let more = if ranks.len() > 8 { ", …" } else { "" };
                (self.attempt.say)(&format!("waiting for rank {}{more}", list.join(", ")));
            }
        }
    }

    /// A process has ended and, where it had one, its connection too: now all that it said is known.
    fn settle(&mut self, index: usize) {
        let p = &mut self.processes[index];
        let Some(status) = p.status else { return };
        let member = p.rank.map_or(Member::default(), |r| self.members[r]);
        if p.settled || (member.joined && member.closed.is_none()) {
            return;
        }
        p.settled = true;
        let goodbye = member.closed.flatten();
        let code = goodbye.unwrap_or_else(|| code_of(status));
        let ended_here = self.over && status.signal().is_some();
        if self.first_code == 0 && code != BYSTANDER && !ended_here {
            self.first_code = code;
        }
        let Some(rank) = p.rank else {
            // It started the ranks; they have said what there was to say.
            self.kill_at = Some(Instant::now() + LAST_WORD);
            return;
        };
        if code == BYSTANDER && self.attempt.hub.is_none() {
            self.over = true;
            self.kill_at.get_or_insert(Instant::now() + self.attempt.options.grace);
        }
        // Who is watched from elsewhere says goodbye there.
        let fine = match goodbye {
            Some(_) => [0, REQUEUE].contains(&code),
            None => !member.joined && (code == 0 || (code == REQUEUE && self.attempt.hub.is_none())),
        };
        // What was asked to end may end in any way.
        let asked = self.outcome.asked && (status.signal().is_some() || code == REQUEUE) && !member.joined;
        if !fine && !asked && !ended_here && code != BYSTANDER {
            let text = self.ended(index, rank, status, code);
            self.fail(Cause { text, ..self.cause(rank, code.max(1)) });
        }
    }

    fn ended(&mut self, index: usize, rank: usize, status: ExitStatus, code: u8) -> String {
        match status.signal() {
            Some(libc::SIGKILL) if let Some(why) = self.kills.more() => format!(
                "killed by SIGKILL: {why}; lower --per-device-train-batch-size or --max-seq-len, or use --recompute layer \
                 (`ringtune check` says what fits)"
            ),
            Some(signal) => format!("killed by {}", signal_name(signal)),
            None if code == REQUEUE => "stopped by a signal before the first step; there was nothing to save".into(),
            None if code == 0 => "ended with exit code 0 before the others were done".into(),
            None if self.members[rank].joined || self.processes[index].beacon.moves() > 0 => {
                format!("ended with exit code {code} and did not say why")
            }
            None => format!("ended with exit code {code}"),
        }
    }

    fn cause(&self, rank: usize, code: u8) -> Cause {
        let local = self.processes.iter().find(|p| p.rank == Some(rank));
        let host = match (local, self.attempt.hub) {
            (None, Some(hub)) => hub.host(rank).unwrap_or_default(),
            _ => self.host.clone(),
        };
        Cause { rank, host, position: None, text: String::new(), code }
    }

    /// The first cause counts. Ranks that know the hub learn it there and end; the others are asked by a signal.
    fn fail(&mut self, cause: Cause) {
        self.fail_as(cause, true);
    }

    /// `ours`: it was found out here, and who knows the others is told.
    fn fail_as(&mut self, mut cause: Cause, ours: bool) {
        if self.outcome.cause.is_some() {
            return;
        }
        // The page is newer than what the rank said last.
        match self.processes.iter().find(|p| p.rank == Some(cause.rank)) {
            Some(p) if p.beacon.moves() > 0 => cause.position = Some(p.beacon.position()),
            None if cause.position.is_none() => cause.position = self.attempt.hub.and_then(|h| h.position(cause.rank)),
            _ => {}
        }
        if let Some(hub) = self.attempt.hub {
            hub.fail(&cause);
        }
        if let Some(report) = self.attempt.report.as_ref().filter(|_| ours) {
            report.tell(&cause, self.linked || self.strange);
        }
        for p in self.processes.iter().filter(|p| p.status.is_none()) {
            // Of ranks whose hub is elsewhere, those that never said where they are may not know of it.
            let unaware = self.attempt.report.is_none() || p.beacon.moves() == 0;
            if p.rank.is_some_and(|r| !self.members[r].joined && unaware) {
                signal_group(p.child.id(), libc::SIGTERM);
            }
        }
        self.outcome.cause = Some(cause);
        self.kill_at = Some(Instant::now() + self.attempt.options.grace);
    }

    /// No heartbeat: it is stopped, or its machine is. Of a run that has failed already it is one more that hears nothing of it.
    fn silent(&mut self, rank: usize) {
        let pid = self.processes.iter().find(|p| p.rank == Some(rank) && p.status.is_none()).map(|p| p.child.id());
        let stopped = if pid.is_some_and(is_stopped) { " (stopped by a signal)" } else { "" };
        let text = format!("no sign of life for {} s{stopped}", hub::SILENCE.as_secs());
        self.fail(Cause { text, ..self.cause(rank, HANG) });
        if let Some(pid) = pid {
            signal_group(pid, libc::SIGKILL);
            return;
        }
        // It is not waited for: its parent there ends it, or its machine is lost.
        self.members[rank].closed.get_or_insert(None);
        if let Some(index) = self.processes.iter().position(|p| p.rank == Some(rank)) {
            self.settle(index);
        }
    }

    fn got_signal(&mut self, signal: i32) {
        match signal {
            libc::SIGTSTP => {
                self.signal(libc::SIGSTOP);
                // SAFETY: stops this process until somebody continues it.
                unsafe { libc::raise(libc::SIGSTOP) };
                self.signal(libc::SIGCONT);
                self.wake();
            }
            libc::SIGCONT => {
                self.signal(libc::SIGCONT);
                self.wake();
            }
            // Save and go on.
            libc::SIGUSR2 => self.ask(signal),
            libc::SIGUSR1 => {
                self.outcome.asked = true;
                self.ask(signal);
            }
            _ if self.outcome.asked => self.kill_at = Some(Instant::now()),
            _ => {
                self.outcome.asked = true;
                self.ask(libc::SIGTERM);
                (self.attempt.say)(&format!(
                    "{}: the ranks were asked to end; once more kills them",
                    signal_name(signal)
                ));
                self.kill_at = Some(Instant::now() + self.attempt.options.grace);
            }
        }
    }

    fn wake(&self) {
        self.attempt.hub.iter().for_each(|hub| hub.wake());
    }

    /// Ranks elsewhere are asked over the control channel: mpirun turns SIGTERM into SIGKILL a second later, too early to save.
    fn ask(&self, signal: i32) {
        let local = self.processes.iter().all(|p| p.rank.is_some()) && self.processes.len() == self.attempt.size;
        let asked = !local && self.attempt.hub.is_some_and(|hub| hub.stop(signal));
        if !asked {
            self.signal(signal);
        }
    }

    fn signal(&self, signal: i32) {
        self.processes.iter().filter(|p| p.status.is_none()).for_each(|p| signal_group(p.child.id(), signal));
    }

    /// Nothing is left: groups first, then what left its group.
    fn end_all(&mut self) {
        for p in &mut self.processes {
            if p.status.is_none() {
                signal_group(p.child.id(), libc::SIGKILL);
                p.status = p.child.wait().ok();
            }
        }
        end_orphans();
    }

    /// The lines of the guilty rank may have scrolled away, or stand between those of others.
    fn repeat_last_lines(&self) {
        let Some(cause) = &self.outcome.cause else { return };
        let guilty = self.processes.iter().find(|p| p.rank == Some(cause.rank));
        let lines = guilty.and_then(|p| p.lines.as_ref()).map(Lines::last).unwrap_or_default();
        if self.processes.len() > 1 && !lines.is_empty() {
            (self.attempt.say)(&format!("last lines of rank {}:\n{}", cause.rank, lines.join("\n")));
        }
    }

    fn finish(self) -> Outcome {
        let ended = |status: ExitStatus| code_of(status) == BYSTANDER || (self.over && status.signal().is_some());
        let bystander = self.processes.iter().any(|p| p.status.is_some_and(ended));
        let code = match (&self.outcome.cause, self.first_code) {
            (Some(cause), _) => cause.code,
            (None, 0) if bystander => BYSTANDER,
            (None, code) => code,
        };
        Outcome { code, ..self.outcome }
    }
}

/// The exit code of a process: 128 + n when signal n ended it.
fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|s| 128 + s));
    code.and_then(|c| u8::try_from(c).ok()).unwrap_or(1)
}
