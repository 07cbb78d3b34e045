//! `--device`: what a command computes on, and the one place that chooses a backend.

use crate::backend::{Backend, Footprint};
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::tensor::Device;

/// What a command does once it has a device.
pub trait OnDevice {
    /// Called before [`OnDevice::run`] where `auto` takes no GPU: why.
    fn without_gpu(&mut self, _why: String) {}

    /// Does it.
    ///
    /// # Errors
    /// Whatever stops the command.
    fn run<B: Backend + 'static>(self, dev: &B) -> Result<()>;
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Auto,
    Cpu,
    Cuda(usize),
}

/// Runs `job` on the device of this name; the CPU with that many threads, or one for each core. `auto` is the first GPU if one
/// answers that is not emulated and a kernel gives the right results on it, else the CPU.
///
/// # Errors
/// Those of [`check`] and of the job; or if the device does not start.
pub fn run(name: &str, threads: Option<usize>, mut job: impl OnDevice) -> Result<()> {
    match wanted(name)? {
        Wanted::Cpu => {}
        Wanted::Cuda(ordinal) => return cuda::run(ordinal, job),
        Wanted::Auto => match cuda::first() {
            Ok(dev) => return job.run(&dev),
            Err(why) => job.without_gpu(why),
        },
    }
    job.run(&Cpu::new(threads)?)
}

/// Whether this is the name of a device that the program was built for: `auto`, `cpu`, `cuda` or `cuda:N`. Whether the machine has
/// it is another question.
///
/// # Errors
/// A usage error for another name.
pub fn check(name: &str) -> Result<()> {
    wanted(name).map(|_| ())
}

/// What bounds a run's memory on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes free now, where it is a GPU that answers; the machine's own memory counts otherwise.
    pub free: Option<u64>,
    /// What it keeps.
    pub footprint: Footprint,
}

/// The limits of the device on which [`run`] would compute under this name, with so many classes. A GPU asked for by name need not
/// be there: what is wrong with it is said where it is used.
pub fn limits(name: &str, classes: usize) -> Limits {
    let cpu = Limits { free: None, footprint: footprint(false, classes) };
    let gpu = |free| Limits { free, footprint: footprint(true, classes) };
    match wanted(name) {
        Ok(Wanted::Cuda(ordinal)) => {
            let mut free = None;
            let asked = cuda::run(ordinal, Ask(&mut free));
            gpu(asked.ok().and(free))
        }
        Ok(Wanted::Auto) => cuda::first().map_or(cpu, |dev| gpu(dev.free_memory())),
        _ => cpu,
    }
}

/// Asks a device for its free memory.
struct Ask<'a>(&'a mut Option<u64>);

impl OnDevice for Ask<'_> {
    fn run<B: Backend>(self, dev: &B) -> Result<()> {
        *self.0 = dev.free_memory();
        Ok(())
    }
}

fn wanted(name: &str) -> Result<Wanted> {
    let ordinal = name.strip_prefix("cuda").and_then(|n| match n.strip_prefix(':') {
        Some(number) => number.parse::<u16>().ok(),
        None => n.is_empty().then_some(0),
    });
    match (name, ordinal) {
        ("auto", _) => Ok(Wanted::Auto),
        ("cpu", _) => Ok(Wanted::Cpu),
        (_, Some(_)) if !cfg!(feature = "cuda") => {
            Err(Error::usage(format!("--device {name}: this program was built without the feature `cuda`")))
        }
        (_, Some(ordinal)) => Ok(Wanted::Cuda(ordinal.into())),
        _ => Err(Error::usage(format!("--device: expected auto, cpu or cuda[:N], found \"{name}\""))),
    }
}

/// What a GPU or the CPU keeps for a model with so many classes.
pub fn footprint(on_gpu: bool, classes: usize) -> Footprint {
    if on_gpu { cuda::footprint(classes) } else { Cpu::footprint(classes) }
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    use super::{Backend, Cpu, Footprint, OnDevice, Result};

    pub fn footprint(classes: usize) -> Footprint {
        Cpu::footprint(classes)
    }

    pub fn run(_ordinal: usize, _job: impl OnDevice) -> Result<()> {
        unreachable!("no name stands for it")
    }

    pub fn first() -> Result<Cpu, String> {
        Err("this program was built without CUDA".into())
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::{Backend, Footprint, OnDevice, Result};
    use crate::cuda::{self, Cuda, device_library};
    use crate::error::Error;

    pub fn footprint(classes: usize) -> Footprint {
        Cuda::footprint(classes)
    }

    pub fn run(ordinal: usize, job: impl OnDevice) -> Result<()> {
        job.run(&Cuda::new(ordinal)?)
    }

    /// The first GPU, proven by a kernel; or why there is none.
    pub fn first() -> Result<Cuda, String> {
        let open = || -> Result<Cuda> {
            device_library::require()?;
            if Cuda::count()? == 0 {
                return Err(Error::new("cuda: the driver sees no GPU"));
            }
            let properties = cuda::properties(0)?;
            if properties.emulated {
                return Err(Error::new(format!("cuda:0 is emulated ({})", properties.name)));
            }
            let dev = Cuda::new(0)?;
            dev.prove()?;
            Ok(dev)
        };
        // What to do about it is `ringtune doctor`'s to say.
        open().map_err(|e| {
            let text = e.to_string();
            let cause = text.split(';').next().unwrap_or_default();
            cause.strip_prefix("cuda: ").unwrap_or(cause).to_string()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        assert_eq!((wanted("auto").unwrap(), wanted("cpu").unwrap()), (Wanted::Auto, Wanted::Cpu));
        for (name, ordinal) in [("cuda", 0), ("cuda:3", 3)] {
            match cfg!(feature = "cuda") {
                true => assert_eq!(wanted(name).unwrap(), Wanted::Cuda(ordinal)),
                false => assert!(check(name).unwrap_err().to_string().contains("built without")),
            }
        }
        for name in ["cuda:", "cuda3", "cuda:-1", "cuda:x", "gpu", ""] {
            let e = check(name).unwrap_err();
            assert_eq!(e.to_string(), format!("--device: expected auto, cpu or cuda[:N], found \"{name}\""));
            assert_eq!(e.exit_code(), 2);
        }
    }
}
