//! `cargo bench --bench kernels [-- FLAGS]`: `ringtune bench kernels` with the same flags.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Cargo passes `--bench` to every bench.
    let flags = std::env::args_os().skip(1).filter(|arg| arg != "--bench");
    let words = ["ringtune", "bench", "kernels"].map(OsString::from);
    match ringtune::cli::run(words.into_iter().chain(flags)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            ringtune::say::error(&e.to_string());
            ExitCode::from(e.exit_code())
        }
    }
}
