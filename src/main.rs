//! The `ringtune` program: runs the command line and turns its outcome into an exit code.

use std::process::ExitCode;

use ringtune::error::Kind;
use ringtune::heap::{self, Heap};

#[global_allocator]
static HEAP: Heap = Heap;

fn main() -> ExitCode {
    heap::explain_refusals();
    // Beyond the limit on the size of files a write is an error in words, not the end by a signal.
    // SAFETY: no handler is installed.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    match ringtune::cli::run(std::env::args_os()).and_then(|()| ringtune::say::all_written()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // What concerns all ranks one of them says.
            let common = matches!(e.kind(), Kind::Interrupted | Kind::Bystander);
            if ringtune::say::is_main() || !common {
                ringtune::say::error(&e.to_string());
            }
            ExitCode::from(e.exit_code())
        }
    }
}
