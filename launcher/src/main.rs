//! The `ringrun` program: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    let options = launcher::options::parse(std::env::args_os());
    ExitCode::from(launcher::run::run(&options))
}
