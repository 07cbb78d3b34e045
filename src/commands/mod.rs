//! What each subcommand does.

pub mod check;
pub mod curve;
pub mod data;
pub mod doctor;
pub mod eval;
pub mod generate;
pub mod inspect;
pub mod jobs;
pub mod merge;
mod model_folder;
pub mod pack;
pub mod parity;
pub mod prepare;
pub mod preview;
pub mod report;
pub mod startup;
pub mod style;
pub mod templates;
pub mod tokenizer;
pub mod train;

use std::io::{self, BufWriter, ErrorKind, StdoutLock, Write};

/// Prints `warning: …` to stderr, whether or not anybody reads it.
pub fn warn(message: &str) {
    let _ = writeln!(io::stderr(), "warning: {message}");
}

/// Prints a line of progress to stderr, whether or not anybody reads it.
pub fn note(message: &str) {
    let _ = writeln!(io::stderr(), "{message}");
}

/// Buffered stdout. A reader that has gone (`ringtune … | head`) ends the program quietly, as with other tools.
pub struct Out(BufWriter<StdoutLock<'static>>);

impl Out {
    /// Locks stdout; call `flush` at the end.
    pub fn new() -> Self {
        Self(BufWriter::with_capacity(1 << 16, io::stdout().lock()))
    }
}

impl Default for Out {
    fn default() -> Self {
        Self::new()
    }
}

fn quiet<T>(result: io::Result<T>) -> io::Result<T> {
    match result {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        other => other,
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        quiet(self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        quiet(self.0.flush())
    }
}
