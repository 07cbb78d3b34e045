//! Faults on purpose, for tests: `RINGTUNE_FAULT="rank=2 step=5 at=backward:1 do=kill"`, acted on where a rank says where it is.
//!
//! `do=` is `kill`, `stop`, `panic`, `hang`, `exit:N`, `nan` (the loss of the step) or `enospc` (no file may grow any more) or `stray`
//! (an exchange that the other ranks do not make). A run
//! that was started again has no fault.

use launcher::beacon::{Phase, Position};

use super::is_restarted;
use crate::error::{Error, Result};

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Signal(i32),
    Panic,
    Hang,
    Exit(i32),
    Nan,
    DiskFull,
    Stray,
}

/// A fault of this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    step: u64,
    phase: Phase,
    layer: Option<u16>,
    deed: Deed,
}

impl Fault {
    /// The fault that the environment asks of this rank.
    ///
    /// # Errors
    /// A usage error if it cannot be read.
    pub fn of(rank: usize) -> Result<Option<Self>> {
        match std::env::var("RINGTUNE_FAULT") {
            Ok(text) if !is_restarted() && !text.trim().is_empty() => Self::parse(&text, rank),
            _ => Ok(None),
        }
    }

    fn parse(text: &str, rank: usize) -> Result<Option<Self>> {
        let wrong = |word: &str| Error::usage(format!("RINGTUNE_FAULT: {word:?} is not understood in {text:?}"));
        let (mut of, mut step, mut at, mut deed) = (0, 1, (Phase::Forward, None), None);
        for word in text.split_whitespace() {
            let (key, value) = word.split_once('=').ok_or_else(|| wrong(word))?;
            let number = |n: &str| n.parse::<u64>().map_err(|_| wrong(word));
            match key {
                "rank" => of = number(value)? as usize,
                "step" => step = number(value)?,
                "at" => {
                    let (phase, layer) = value.split_once(':').map_or((value, None), |(p, l)| (p, Some(l)));
                    let layer = layer.map(|l| number(l).map(|l| l as u16)).transpose()?;
                    at = (Phase::of(phase).ok_or_else(|| wrong(word))?, layer);
                }
                "do" => {
                    let (name, value) = value.split_once(':').unwrap_or((value, "1"));
                    deed = Some(match name {
                        "kill" => Deed::Signal(libc::SIGKILL),
                        "stop" => Deed::Signal(libc::SIGSTOP),
                        "panic" => Deed::Panic,
                        "hang" => Deed::Hang,
                        "exit" => Deed::Exit(number(value)? as i32),
                        "nan" => Deed::Nan,
                        "enospc" => Deed::DiskFull,
                        "stray" => Deed::Stray,
                        _ => return Err(wrong(word)),
                    });
                }
                _ => return Err(wrong(word)),
            }
        }
        let deed = deed.ok_or_else(|| wrong("do"))?;
        Ok((of == rank).then_some(Self { step, phase: at.0, layer: at.1, deed }))
    }

    /// Whether this is the place for it.
    pub fn is_at(&self, at: Position) -> bool {
        at.step == self.step && at.phase == self.phase && (self.layer.is_none() || at.layer == self.layer)
    }

    /// Whether the rank shall make an exchange of its own.
    pub fn strays(&self) -> bool {
        self.deed == Deed::Stray
    }

    /// Happens.
    pub fn act(&self) {
        match self.deed {
            Deed::Signal(signal) => {
                // SAFETY: a signal to this very process; no pointer is passed.
                unsafe { libc::kill(libc::getpid(), signal) };
            }
            Deed::Panic => panic!("a panic that RINGTUNE_FAULT asked for"),
            Deed::Hang => loop {
                std::thread::park();
            },
            Deed::Exit(code) => std::process::exit(code),
            Deed::DiskFull => no_file_grows(),
            Deed::Nan | Deed::Stray => {}
        }
    }

    /// NaN in the step that shall have one.
    pub fn gain(&self, step: u64) -> f32 {
        if self.deed == Deed::Nan && step == self.step { f32::NAN } else { 1.0 }
    }
}

/// From now on writing fails as on a full disk.
fn no_file_grows() {
    let none = libc::rlimit { rlim_cur: 1024, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the signal is ignored, so that writing fails instead; the pointer is to a local that is only read.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        libc::setrlimit(libc::RLIMIT_FSIZE, &none);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_and_nonsense_is_named() {
        let fault = Fault::parse("rank=2 step=5 at=backward:1 do=exit:3", 2).unwrap().unwrap();
        assert_eq!(fault, Fault { step: 5, phase: Phase::Backward, layer: Some(1), deed: Deed::Exit(3) });
        assert_eq!(Fault::parse("rank=2 do=kill", 1).unwrap(), None);
        assert!(Fault::parse("do=nan step=4", 0).unwrap().unwrap().gain(4).is_nan());
        assert_eq!(Fault::parse("do=nan step=4", 0).unwrap().unwrap().gain(5), 1.0);
        for (text, word) in [("do=burn", "do=burn"), ("at=nowhere do=kill", "at=nowhere"), ("rank=1", "do"), ("x", "x")]
        {
            let e = Fault::parse(text, 0).unwrap_err();
            assert!(e.exit_code() == 2 && e.to_string().contains(&format!("{word:?} is not understood")), "{e}");
        }
    }
}
