//! `--device`: what a command computes on, and the one place that chooses a backend.

use crate::backend::{Backend, Footprint};
use crate::comm::World;
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

/// As [`run`], as one of several ranks: those of a machine take its GPUs in their order, unless a number is given.
///
/// # Errors
/// As [`run`]; or if the machine has fewer GPUs than ranks.
pub fn run_as(world: &World, name: &str, threads: Option<usize>, mut job: impl OnDevice) -> Result<()> {
    match wanted(name)? {
        _ if world.local_size == 1 => run(name, threads, job),
        Wanted::Cuda(_) if name == "cuda" => cuda::run(ordinal(world, cuda::count()?)?, job),
        Wanted::Auto => match cuda::proven(|count| ordinal(world, count)) {
            Ok(dev) => job.run(&dev),
            Err(why) => {
                job.without_gpu(why);
                job.run(&Cpu::new(threads)?)
            }
        },
        _ => run(name, threads, job),
    }
}

/// The GPU of a rank among so many that are visible: its own by its number on the machine, or the only one, where each rank is shown its own.
fn ordinal(world: &World, visible: usize) -> Result<usize> {
    let World { local_rank, local_size, .. } = *world;
    if visible == 1 {
        return Ok(0);
    }
    if visible < local_size {
        return Err(Error::usage(format!(
            "{local_size} ranks on this machine, and {visible} GPUs are visible: start no more ranks than GPUs, or pass --device cpu"
        )));
    }
    Ok(local_rank)
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
        _ => {
            let hint = match name {
                "gpu" | "nvidia" => "; write cuda".to_string(),
                "mps" | "metal" | "rocm" | "hip" | "xpu" | "npu" | "tpu" => {
                    "; GPUs are those of NVIDIA alone, cpu is what works everywhere".to_string()
                }
                number if number.parse::<u8>().is_ok() => format!("; write cuda:{number}"),
                _ => String::new(),
            };
            Err(Error::usage(format!("--device: expected auto, cpu or cuda[:N], found \"{name}\"{hint}")))
        }
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

    pub fn count() -> Result<usize> {
        unreachable!("no name stands for it")
    }

    pub fn proven(_which: impl FnOnce(usize) -> Result<usize>) -> Result<Cpu, String> {
        first()
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
        proven(|_| Ok(0))
    }

    /// How many the driver sees.
    pub fn count() -> Result<usize> {
        Cuda::count()
    }

    /// The GPU that `which` takes of so many, proven by a kernel; or why there is none.
    pub fn proven(which: impl FnOnce(usize) -> Result<usize>) -> Result<Cuda, String> {
        let open = || -> Result<Cuda> {
            device_library::require()?;
            let count = Cuda::count()?;
            if count == 0 {
                return Err(Error::new("cuda: the driver sees no GPU"));
            }
            let ordinal = which(count)?;
            let properties = cuda::properties(ordinal)?;
            if properties.emulated {
                return Err(Error::new(format!("cuda:{ordinal} is emulated ({})", properties.name)));
            }
            let dev = Cuda::new(ordinal)?;
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
    fn ranks_take_the_gpus_of_their_machine_in_order() {
        let world = |local_rank| World { rank: 5, size: 8, local_rank, local_size: 4 };
        assert_eq!((0..4).map(|r| ordinal(&world(r), 8).unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
        // Each is shown its own.
        assert_eq!(ordinal(&world(3), 1).unwrap(), 0);
        let e = ordinal(&world(1), 3).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("4 ranks on this machine, and 3 GPUs are visible"), "{e}");
    }

    #[test]
    fn names_of_devices() {
        assert_eq!((wanted("auto").unwrap(), wanted("cpu").unwrap()), (Wanted::Auto, Wanted::Cpu));
        for (name, ordinal) in [("cuda", 0), ("cuda:3", 3)] {
            match cfg!(feature = "cuda") {
                true => assert_eq!(wanted(name).unwrap(), Wanted::Cuda(ordinal)),
                false => assert!(check(name).unwrap_err().to_string().contains("built without")),
            }
        }
        for (name, hint) in [("gpu", "; write cuda"), ("1", "; write cuda:1"), ("mps", "; GPUs are those of NVIDIA")] {
            assert!(check(name).unwrap_err().to_string().contains(&format!("found \"{name}\"{hint}")), "{name}");
        }
        for name in ["cuda:", "cuda3", "cuda:-1", "cuda:x", ""] {
            let e = check(name).unwrap_err();
            assert_eq!(e.to_string(), format!("--device: expected auto, cpu or cuda[:N], found \"{name}\""));
            assert_eq!(e.exit_code(), 2);
        }
    }
}
