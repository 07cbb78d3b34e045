//! The `ringtune` program: runs the command line and turns its outcome into an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    match ringtune::cli::run(std::env::args_os()).and_then(|()| ringtune::say::all_written()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            ringtune::say::error(&e.to_string());
            ExitCode::from(e.exit_code())
        }
    }
}
