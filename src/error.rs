//! The one error type: a chain of messages from the outermost context to the cause, and the exit code it asks for.
//!
//! Messages follow one form: lower case, no final stop, what and where first, then expected, found and what to do.

use std::fmt;

/// `Result` with ringtune's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Who has to act on an error. Decides the exit code of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data, files, device or peers: exit code 1.
    Run,
    /// An operation of a device failed: exit code 1. Who knows where the run stood can say it.
    Device,
    /// A device's memory is full: exit code 1, as for any other reason to end a run. Who knows what was to fit can say what would.
    Memory,
    /// Flags and configuration: exit code 2.
    Usage,
    /// A signal asked the run to stop and its state was saved: exit code [`Error::EXIT_REQUEUE`].
    Interrupted,
    /// Another rank failed, and says why: exit code [`Error::EXIT_BYSTANDER`].
    Bystander,
}

/// An error a user can act on, with its context from the outside in.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    /// Outermost context first, cause last; never empty.
    chain: Vec<String>,
}

impl Error {
    /// Exit code after SIGTERM or SIGINT once the state is saved (`EX_TEMPFAIL` of sysexits.h: run it again).
    pub const EXIT_REQUEUE: u8 = 75;

    /// Exit code of a rank that ends because of another one.
    pub const EXIT_BYSTANDER: u8 = 76;

    /// An error in data, a file, the device or a peer (exit code 1).
    pub fn new(message: impl Into<String>) -> Self {
        Self { kind: Kind::Run, chain: vec![message.into()] }
    }

    /// A device's memory is full (exit code 1).
    pub fn memory(message: impl Into<String>) -> Self {
        Self { kind: Kind::Memory, chain: vec![message.into()] }
    }

    /// An operation of a device failed (exit code 1).
    pub fn device(message: impl Into<String>) -> Self {
        Self { kind: Kind::Device, chain: vec![message.into()] }
    }

    /// An error in flags or configuration (exit code 2).
    pub fn usage(message: impl Into<String>) -> Self {
        Self { kind: Kind::Usage, chain: vec![message.into()] }
    }

    /// The run was asked to stop and saved its state (exit code [`Error::EXIT_REQUEUE`]).
    pub fn interrupted(message: impl Into<String>) -> Self {
        Self { kind: Kind::Interrupted, chain: vec![message.into()] }
    }

    /// Another rank failed; there is nothing to say about it here.
    pub fn bystander() -> Self {
        Self { kind: Kind::Bystander, chain: vec!["another rank failed".into()] }
    }

    /// Adds an outer context, printed before what is there: `context: cause`.
    #[must_use]
    pub fn context(mut self, message: impl Into<String>) -> Self {
        self.chain.insert(0, message.into());
        self
    }

    /// Says where a run stood when an operation of its device failed; other errors name their own place.
    #[must_use]
    pub fn stood(self, at: &impl fmt::Display) -> Self {
        if self.kind == Kind::Device { self.context(at.to_string()) } else { self }
    }

    /// Adds what to do, behind all that is said: `cause; advice`.
    #[must_use]
    pub fn hint(mut self, advice: &str) -> Self {
        if let Some(cause) = self.chain.last_mut() {
            *cause += &format!("; {advice}");
        }
        self
    }

    /// Who has to act.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The process exit code: 1 run, 2 usage, 75 interrupted and saved, 76 another rank failed.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Run | Kind::Device | Kind::Memory => 1,
            Kind::Usage => 2,
            Kind::Interrupted => Self::EXIT_REQUEUE,
            Kind::Bystander => Self::EXIT_BYSTANDER,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.chain.join(": "))
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        Self::new(in_words(&e))
    }
}

/// An input/output error without the number that the system has for it.
pub fn in_words(e: &std::io::Error) -> String {
    let text = e.to_string();
    let words = match text.rsplit_once(" (os error ") {
        Some((words, number)) if number.trim_end_matches(')').parse::<i32>().is_ok() => words.to_string(),
        _ => text,
    };
    match e.raw_os_error() {
        Some(libc::EMFILE) => words + " in this process; raise the limit (ulimit -n)",
        _ => words,
    }
}

/// Adds context to the error of a `Result`, as [`Error::context`].
pub trait Context<T> {
    /// Wraps the error with a message that is only built on failure.
    ///
    /// # Errors
    /// The error of `self`, with the context in front.
    fn context(self, message: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, message: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| e.into().context(message()))
    }
}

/// Returns early with [`Error::new`] of a formatted message.
#[macro_export]
macro_rules! bail {
    ($($arg:tt)*) => { return Err($crate::error::Error::new(format!($($arg)*))) };
}

/// Returns early with [`Error::new`] of a formatted message unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($cond:expr, $($arg:tt)*) => { if $cond {} else { $crate::bail!($($arg)*); } };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_prints_from_the_outside_in() {
        let io = std::io::Error::new(std::io::ErrorKind::NotFound, "no such file");
        let e: Error = Err::<(), _>(io).context(|| "data/a.jsonl".to_string()).unwrap_err().context("sft");
        assert_eq!(e.to_string(), "sft: data/a.jsonl: no such file");
        assert_eq!(e.exit_code(), 1);
        assert_eq!(Error::from(std::io::Error::from_raw_os_error(2)).to_string(), "No such file or directory");
        assert_eq!(Error::usage("x").context("y").exit_code(), 2);
        assert_eq!(Error::interrupted("x").exit_code(), 75);
    }
}
