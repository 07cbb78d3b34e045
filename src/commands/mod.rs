//! What each subcommand does.

use std::io::Write;

/// Prints `warning: …` to stderr, whether or not anybody reads it.
pub fn warn(message: &str) {
    let _ = writeln!(std::io::stderr(), "warning: {message}");
}
