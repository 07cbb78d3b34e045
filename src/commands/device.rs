//! `--device`: what a command computes on, and the one place that chooses a backend.

use crate::backend::Backend;
use crate::cpu::Cpu;
use crate::error::{Error, Result};

/// What a command does once it has a device.
pub trait OnDevice {
    /// Does it.
    ///
    /// # Errors
    /// Whatever stops the command.
    fn run<B: Backend>(self, dev: &B) -> Result<()>;
}

/// Runs `job` on the device of this name; the CPU with that many threads, or one for each core.
///
/// # Errors
/// Those of [`check`] and of the job; or if the device does not start.
pub fn run(name: &str, threads: Option<usize>, job: impl OnDevice) -> Result<()> {
    check(name)?;
    job.run(&Cpu::new(threads)?)
}

/// Whether a command can compute on the device of this name: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` is the CPU until CUDA has
/// every operation.
///
/// # Errors
/// A usage error for another name, and for CUDA.
pub fn check(name: &str) -> Result<()> {
    let ordinal =
        name.strip_prefix("cuda").map(|n| n.strip_prefix(':').map_or(n.is_empty(), |n| n.parse::<u16>().is_ok()));
    match (name, ordinal) {
        ("auto" | "cpu", _) => Ok(()),
        (_, Some(true)) => Err(Error::usage(format!(
            "--device {name}: CUDA has memory, products and norms so far; attention, rope, SwiGLU, embedding, cross-entropy, \
             low-rank updates and AdamW are missing; leave --device out or give cpu"
        ))),
        _ => Err(Error::usage(format!("--device: expected auto, cpu or cuda[:N], found \"{name}\""))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        assert!(check("auto").is_ok() && check("cpu").is_ok());
        for (name, expected) in [
            ("cuda", "--device cuda: CUDA has"),
            ("cuda:3", "--device cuda:3: CUDA has"),
            ("cuda:", "--device: expected auto, cpu or cuda[:N], found \"cuda:\""),
            ("cuda3", "--device: expected"),
            ("gpu", "--device: expected"),
        ] {
            let e = check(name).unwrap_err();
            assert!(e.to_string().starts_with(expected), "{e}");
            assert_eq!(e.exit_code(), 2);
        }
    }
}
