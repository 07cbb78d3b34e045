//! How the program speaks: results and figures on stdout, notes, warnings and errors on stderr. Nothing else prints.
//!
//! Notes, warnings and errors quote data: what would steer a terminal is written out (see [`visible`]).
//!
//! Of the ranks of a run the main one speaks alone. A reader that has gone away, as in `ringtune sft … | head`, must not end a
//! training: lines are written whether or not anybody reads them. [`Out`] is for commands that do nothing but print.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, BufWriter, ErrorKind, IsTerminal, StdoutLock, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use crate::error::{Result, in_words};

/// Text of data, of a file or of a model as a terminal may show it: what would move its cursor, hide or reorder text (control
/// characters but line ends and tabs, marks of direction, byte order marks) is written out, as `\u001b`.
pub fn visible(text: &str) -> Cow<'_, str> {
    let hides = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    if !text.contains(hides) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        // Joiners of emoji and of scripts that need them only shape what is there.
        match c {
            '\u{200c}' | '\u{200d}' => out.push(c),
            c if hides(c) => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    Cow::Owned(out)
}

/// How text looks that is more than text, for errors, tables and clap's help alike.
pub mod look {
    use anstyle::{AnsiColor, Style};

    /// `error:`, and a problem that `check` finds.
    pub const ERROR: Style = AnsiColor::Red.on_default().bold();
    /// `warning:`.
    pub const WARNING: Style = AnsiColor::Yellow.on_default().bold();
    /// A heading.
    pub const HEADING: Style = Style::new().bold();
    /// What carries loss, and a good verdict.
    pub const TRAINED: Style = AnsiColor::Green.on_default().bold();
    /// Context, defaults.
    pub const DIM: Style = Style::new().dimmed();
}

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|v| !v.is_empty())
}

/// Whether a stream gets colour: never with `NO_COLOR` (no-color.org), always with `FORCE_COLOR` or `CLICOLOR_FORCE` other than 0, else
/// where it is a terminal that is not dumb.
fn has_colour(is_terminal: bool) -> bool {
    let is = |name: &str, value: &str| std::env::var_os(name).is_some_and(|v| v == value);
    let forced = |name: &str| is_set(name) && !is(name, "0");
    if is_set("NO_COLOR") {
        return false;
    }
    forced("FORCE_COLOR") || forced("CLICOLOR_FORCE") || (is_terminal && !is("TERM", "dumb") && !is("CLICOLOR", "0"))
}

/// Whether results get colour.
pub fn stdout_has_colour() -> bool {
    has_colour(stdout_is_terminal())
}

/// Whether notes and errors get colour.
pub fn stderr_has_colour() -> bool {
    has_colour(stderr_is_terminal())
}

/// Characters that fit a line of results: `COLUMNS` where it is set, else what the terminal has; `None` where standard output is a file or a
/// pipe, whose readers want all of a line.
pub fn width() -> Option<usize> {
    let asked = std::env::var("COLUMNS").ok().and_then(|text| text.trim().parse().ok()).filter(|&n| n > 0);
    let found = || {
        stdout_is_terminal()
            .then(|| {
                terminal_size::terminal_size_of(io::stdout()).map_or(80, |(terminal_size::Width(n), _)| usize::from(n))
            })
            .filter(|&n| n > 0)
    };
    asked.or_else(found).map(|n: usize| n.max(20))
}

/// `label: text`, the label in its look where colours are wanted.
fn labelled(look: anstyle::Style, label: &str, text: &str) {
    let look = if stderr_has_colour() { look } else { anstyle::Style::new() };
    line(&format!("{look}{label}:{look:#} {}", visible(text)));
}

static RANK: AtomicUsize = AtomicUsize::new(0);
static QUIET: AtomicBool = AtomicBool::new(false);

/// Which rank this process is; all but 0 are silent.
pub fn set_rank(rank: usize) {
    RANK.store(rank, Relaxed);
}

/// Whether `--quiet` was given: it hides [`detail`], [`remark`] and [`invite`].
pub fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Relaxed);
}

/// Whether this is the rank that speaks for all.
pub fn is_main() -> bool {
    RANK.load(Relaxed) == 0
}

fn is_wordy() -> bool {
    is_main() && !QUIET.load(Relaxed)
}

/// Whether somebody reads results as they come.
pub fn stdout_is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Whether somebody watches the progress.
pub fn stderr_is_terminal() -> bool {
    io::stderr().is_terminal()
}

/// A line on stderr, in one write: a process that is killed, or another one that writes there, never leaves half of it before the next.
fn line(text: &str) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// Whether a line of [`result`] or [`detail`] could not be written.
static LOST: AtomicBool = AtomicBool::new(false);

fn out(text: &str) {
    if writeln!(io::stdout(), "{text}").is_err() {
        LOST.store(true, Relaxed);
    }
}

/// Whether everything that was to stand on stdout was written there. Asked at the end, when the files are safe.
///
/// # Errors
/// If a line was lost, because its reader went away or the disk behind it is full.
pub fn all_written() -> Result<()> {
    crate::ensure!(
        !LOST.load(Relaxed) && io::stdout().flush().is_ok(),
        "standard output could not be written to its end: its reader has gone, or the disk behind it is full; the files are complete"
    );
    Ok(())
}

/// A line of results, on stdout.
pub fn result(text: &str) {
    if is_main() {
        out(text);
    }
}

/// A line of what a run is made of, on stdout; not with `--quiet`.
pub fn detail(text: &str) {
    if is_wordy() {
        out(text);
    }
}

/// A line of progress, on stderr.
pub fn note(text: &str) {
    if is_main() {
        line(&visible(text));
    }
}

/// A line of progress, on stderr; not with `--quiet`.
pub fn remark(text: &str) {
    if is_wordy() {
        line(&visible(text));
    }
}

/// `warning: …`, on stderr.
pub fn warning(text: &str) {
    if is_main() {
        labelled(look::WARNING, "warning", text);
    }
}

/// `error: …`, on stderr, whatever the rank: it is why the process ends.
pub fn error(text: &str) {
    labelled(look::ERROR, "error", text);
}

/// Invites the user's next line, on stderr; not with `--quiet`.
pub fn invite(text: &str) {
    if is_wordy() {
        let mut err = io::stderr();
        let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
    }
}

/// Buffered stdout. A reader that has gone (`ringtune … | head`) ends the program quietly, as with other tools.
pub struct Out(BufWriter<StdoutLock<'static>>);

impl Out {
    /// Locks stdout; call `flush` at the end.
    pub fn new() -> Self {
        Self(BufWriter::with_capacity(1 << 16, io::stdout().lock()))
    }
}

impl Out {
    /// Ends a line, and has it seen.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn end_line(&mut self) -> io::Result<()> {
        writeln!(self).and_then(|()| self.flush())
    }
}

impl Default for Out {
    fn default() -> Self {
        Self::new()
    }
}

fn end_if_unread<T>(result: io::Result<T>) -> io::Result<T> {
    match result {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        // Who writes a line again after an interruption asks for the kind.
        Err(e) if e.kind() != ErrorKind::Interrupted => {
            let full = if e.kind() == ErrorKind::StorageFull { "; free some space there" } else { "" };
            Err(io::Error::new(e.kind(), format!("standard output: {}{full}", in_words(&e))))
        }
        other => other,
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        end_if_unread(self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        end_if_unread(self.0.flush())
    }
}
