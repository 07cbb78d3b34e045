//! A process that ringrun started: a rank, or the mpirun that starts the ranks.

use std::fs::File;
use std::io;
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{Receiver, Sender};

use crate::beacon::Beacon;
use crate::options::Options;
use crate::output::{Lines, Stream, Style};
use crate::spawn::{RankCommand, Streams, spawn};
use crate::supervise::Event;

/// What is to be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Which rank it is; none: it starts the ranks.
    pub rank: Option<usize>,
    /// The command.
    pub command: RankCommand,
    /// Its lines are those of ringrun, whatever the options say.
    pub plain: bool,
}

/// It runs, or did.
pub struct Process {
    /// Which rank it is.
    pub rank: Option<usize>,
    /// The process.
    pub child: Child,
    /// Where a rank says where it is.
    pub beacon: Beacon,
    /// What it printed, where that is not ringrun's own terminal.
    pub lines: Option<Lines>,
    /// How it ended.
    pub status: Option<ExitStatus>,
    /// Its end was judged.
    pub settled: bool,
}

impl Process {
    /// Starts it. `ends` gets what hangs up when its lines have been read.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn start(options: &Options, what: &Start, log: Option<File>, ends: &mut Vec<Receiver<()>>) -> io::Result<Self> {
        let rank = what.rank.unwrap_or(0);
        let style =
            Style { tag: (rank > 0 || options.tag_output) && what.rank.is_some(), timestamp: options.timestamp };
        let piped = !what.plain && (style.tag || log.is_some() || options.timestamp);
        let (beacon, file) = Beacon::create()?;
        let mut child = spawn(&what.command, if piped { Streams::Piped } else { Streams::Inherited }, &file)?;
        let mut lines = None;
        if piped {
            let own = Lines::new(rank, style, log);
            ends.extend(child.stdout.take().map(|out| own.follow(out, Stream::Out)).transpose()?);
            ends.extend(child.stderr.take().map(|err| own.follow(err, Stream::Err)).transpose()?);
            lines = Some(own);
        }
        Ok(Self { rank: what.rank, child, beacon, lines, status: None, settled: false })
    }

    /// Waits in a thread of its own until it has ended, and leaves it to be reaped: its number stays its own until then.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn watch(&self, attempt: u32, index: usize, to: &Sender<Event>) -> io::Result<()> {
        let (pid, to) = (self.child.id(), to.clone());
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
            let _ = to.send(Event::Ended(attempt, index));
        };
        std::thread::Builder::new().name("wait".into()).spawn(wait).map(drop)
    }
}
