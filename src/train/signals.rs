//! Signals that ask for an end: SIGTERM and SIGINT, SIGHUP of a terminal that closes, SIGUSR1 of a scheduler that warns, SIGXCPU of a limit
//! on processor time that is reached (`ulimit -t`: it comes every second, until the limit that kills, 15 s later or a quarter of it). The first one asks the loop to
//! finish its step and save, and says so; the second one ends the process at once. Before the first step there is nothing to save, so
//! the first one ends it too: tokenising or loading may take longer than a scheduler waits.
//!
//! SIGUSR2 asks for the state to be saved after the step, and the run goes on.
//!
//! One request may come twice: Slurm and systemd signal every process of a job, and ringrun hands on what it gets. So what follows
//! within three seconds is no second request, unless it is SIGINT, which a terminal sends to the program in front alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::error::{Context, Error, Result};
use crate::files::remove_pending;
use crate::say;

/// Milliseconds within which a signal counts as the one before it.
const ECHO: u64 = 3000;

/// Seconds of processor time to finish a step and to save.
const SAVING: u64 = 15;

/// A request to stop, set by a signal or by [`StopFlag::request`].
#[derive(Clone, Debug, Default)]
pub struct StopFlag {
    requested: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
    /// Whether steps have begun.
    begun: Arc<AtomicBool>,
    /// The step under way.
    step: Arc<AtomicU64>,
    /// State is to be saved, and the run goes on.
    save: Arc<AtomicBool>,
}

const ASK_FOR_AN_END: [(i32, &str); 5] = [
    (libc::SIGTERM, "SIGTERM"),
    (libc::SIGINT, "SIGINT"),
    (libc::SIGHUP, "SIGHUP"),
    (libc::SIGUSR1, "SIGUSR1"),
    (libc::SIGXCPU, "SIGXCPU"),
];

fn name_of(signal: i32) -> &'static str {
    ASK_FOR_AN_END.into_iter().find(|(s, _)| *s == signal).map_or("a request to stop", |(_, name)| name)
}

/// Whether whoever started the program wants it to outlive the terminal, as nohup does. (SIGINT is ignored by every program that a
/// script starts in the background, and there a signal that somebody sends is meant.)
fn hangup_is_ignored() -> bool {
    let mut now = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: asked, not changed; all zeros is a valid `sigaction`, and the pointer is to a local.
    let action = unsafe {
        libc::sigaction(libc::SIGHUP, std::ptr::null(), now.as_mut_ptr());
        now.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}

/// Where the limit on processor time kills at once (`ulimit -t` sets both), the one that asks first is put before it.
fn leave_time_to_save() {
    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a local.
    if unsafe { libc::getrlimit(libc::RLIMIT_CPU, &mut now) } == 0
        && now.rlim_cur == now.rlim_max
        && now.rlim_max != libc::RLIM_INFINITY
    {
        now.rlim_cur -= (now.rlim_max / 4).min(SAVING);
        // SAFETY: as above. Where it is refused, the limit is as it was.
        unsafe { libc::setrlimit(libc::RLIMIT_CPU, &now) };
    }
}

/// For commands that have nothing to save: SIGTERM and SIGINT end the process as they would, once what it was writing under
/// temporary names is removed.
///
/// # Errors
/// If the handlers cannot be installed.
pub fn leave_nothing_behind() -> Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals =
        signal_hook::iterator::Signals::new([SIGTERM, SIGINT]).context(|| "cannot listen for signals".into())?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if signal == SIGINT && HELD.load(Ordering::SeqCst) {
                PRESSED.store(true, Ordering::SeqCst);
                continue;
            }
            remove_pending();
            // It cannot fail for these two, and nothing is left to be done if it does.
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    });
    Ok(())
}

/// Whether SIGINT is for what is being made, not for the program.
static HELD: AtomicBool = AtomicBool::new(false);
/// Whether it came meanwhile.
static PRESSED: AtomicBool = AtomicBool::new(false);

/// Ctrl-C of somebody who wants an answer to stop and the program to go on; for commands that called [`leave_nothing_behind`].
#[derive(Clone, Copy, Debug)]
pub struct Interrupts;

/// While it lives, Ctrl-C is kept for [`Held::pressed`].
#[derive(Debug)]
pub struct Held(());

impl Interrupts {
    /// Keeps Ctrl-C from ending the program.
    pub fn hold(&self) -> Held {
        PRESSED.store(false, Ordering::SeqCst);
        HELD.store(true, Ordering::SeqCst);
        Held(())
    }
}

impl Held {
    /// Whether it was pressed since it is kept.
    pub fn pressed(&self) -> bool {
        PRESSED.load(Ordering::SeqCst)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.store(false, Ordering::SeqCst);
    }
}

/// Of a clock that never goes back; allowed in a signal handler.
fn milliseconds() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a local.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

impl StopFlag {
    /// Listens for the signals that ask for an end. After the first one a second one ends the process with 128 + its number, unless it
    /// is an echo of the first.
    ///
    /// # Errors
    /// If the handlers cannot be installed.
    pub fn on_signals() -> Result<Self> {
        leave_time_to_save();
        let flag = Self::default();
        let all: Vec<i32> = ASK_FOR_AN_END
            .into_iter()
            .map(|(signal, _)| signal)
            .filter(|&s| s != libc::SIGHUP || !hangup_is_ignored())
            .collect();
        let listened = all.iter().copied().chain([libc::SIGUSR2]);
        let mut signals =
            signal_hook::iterator::Signals::new(listened).context(|| "cannot listen for signals".into())?;
        let (begun, step) = (Arc::clone(&flag.begun), Arc::clone(&flag.step));
        std::thread::spawn(move || {
            let (mut said, mut out_of_time) = (false, false);
            for signal in &mut signals {
                let name = name_of(signal);
                if signal == libc::SIGXCPU && std::mem::replace(&mut out_of_time, true) {
                    continue;
                }
                if signal == libc::SIGUSR2 {
                    say::note("SIGUSR2: saving after this step, then going on");
                } else if signal == libc::SIGXCPU && begun.load(Ordering::SeqCst) {
                    let step = step.load(Ordering::SeqCst);
                    say::note(&format!(
                        "{name}: the limit on processor time is reached; finishing step {step}, then saving"
                    ));
                } else if begun.load(Ordering::SeqCst) {
                    // What is a second request ends the process: this is an echo of the first.
                    if std::mem::replace(&mut said, true) {
                        continue;
                    }
                    let again = if signal == libc::SIGINT { "press" } else { "send it" };
                    let step = step.load(Ordering::SeqCst);
                    say::note(&format!("{name}: finishing step {step}, then saving; {again} again to stop now"));
                } else {
                    say::error(&format!("stopped by {name} before the first step; there was nothing to save"));
                    remove_pending();
                    signal_hook::low_level::exit(i32::from(Error::EXIT_REQUEUE));
                }
            }
        });
        signal_hook::flag::register(libc::SIGUSR2, Arc::clone(&flag.save))
            .context(|| "cannot listen for SIGUSR2".into())?;
        let since = Arc::new(AtomicU64::new(0));
        for signal in all {
            let (flag, since) = (flag.clone(), Arc::clone(&since));
            let handle = move || {
                let now = milliseconds();
                if !flag.is_requested() {
                    since.store(now, Ordering::SeqCst);
                    flag.signal.store(signal as usize, Ordering::SeqCst);
                    flag.request();
                } else if signal == libc::SIGINT
                    // That of a limit comes again by itself.
                    || signal != libc::SIGXCPU && now.saturating_sub(since.load(Ordering::SeqCst)) > ECHO
                {
                    signal_hook::low_level::exit(128 + signal);
                }
            };
            // SAFETY: what a handler may do in any place: it reads a clock, stores numbers and ends the process by `_exit`.
            unsafe { signal_hook::low_level::register(signal, handle) }
                .context(|| format!("cannot listen for signal {signal}"))?;
        }
        Ok(flag)
    }

    /// From now on a signal lets the step end and the state be saved.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::SeqCst);
    }

    /// Says which step is under way, from 1.
    pub fn at_step(&self, step: u64) {
        self.step.store(step, Ordering::SeqCst);
    }

    /// Asks the loop to stop after its step.
    pub fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
    }

    /// Whether somebody asked.
    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    /// Whether somebody asked for the state to be saved since this was asked last.
    pub fn take_save(&self) -> bool {
        self.save.swap(false, Ordering::SeqCst)
    }

    /// Asks for the state to be saved after the step.
    pub fn request_save(&self) {
        self.save.store(true, Ordering::SeqCst);
    }

    /// Who asked, for messages.
    pub fn reason(&self) -> &'static str {
        name_of(self.signal.load(Ordering::SeqCst) as i32)
    }
}
