//! `ringtune kernels`: every CUDA kernel compiled for one architecture, for machines without NVRTC or that start often.

use clap::{Arg, ArgMatches, Command};
use std::path::PathBuf;

use crate::error::Result;

/// The command's arguments.
pub fn command() -> Command {
    Command::new("kernels")
        .about("Compile every CUDA kernel for one architecture into a folder, for machines that have no NVRTC")
        .after_help(
            "Needs NVRTC and no GPU. There, RINGTUNE_KERNELS=DIR takes the kernels of the same build from the folder.",
        )
        .arg(
            Arg::new("arch")
                .long("arch")
                .value_name("ARCH")
                .required(true)
                .help("sm_80, sm_86, sm_89, sm_90a, … for machine code; compute_NN for PTX"),
        )
        .arg(
            Arg::new("output")
                .long("output")
                .value_name("DIR")
                .required(true)
                .value_parser(clap::value_parser!(PathBuf))
                .help("Folder for them"),
        )
}

/// Compiles them.
///
/// # Errors
/// If the architecture is none that this NVRTC compiles for, there is no NVRTC, or a file cannot be written.
pub fn run(m: &ArgMatches) -> Result<()> {
    let arch: &String = m.get_one("arch").expect("clap requires it");
    let output: &PathBuf = m.get_one("output").expect("clap requires it");
    compile(arch, output)
}

#[cfg(not(feature = "cuda"))]
fn compile(_arch: &str, _output: &std::path::Path) -> Result<()> {
    crate::bail!("kernels: this program was built without CUDA; build with the feature `cuda`, which is on by default")
}

#[cfg(feature = "cuda")]
fn compile(arch: &str, output: &std::path::Path) -> Result<()> {
    use std::collections::BTreeMap;

    use crate::cuda::compile::{Prebuilt, Target, label};
    use crate::cuda::nvrtc::Nvrtc;
    use crate::error::Error;
    use crate::text::plural;
    use crate::{cuda, say};

    let target: Target = arch.parse()?;
    let nvrtc = Nvrtc::get()?;
    if !nvrtc.archs().contains(&target.capability()) {
        let known: Vec<String> = nvrtc.archs().iter().filter(|&&cc| cc >= 80).map(|cc| format!("sm_{cc}")).collect();
        return Err(Error::usage(format!(
            "--arch {arch}: NVRTC {}.{} ({}) compiles for {}",
            nvrtc.version().0,
            nvrtc.version().1,
            nvrtc.path().display(),
            known.join(", ")
        )));
    }
    let all: BTreeMap<String, _> = cuda::configurations(target.capability())
        .into_iter()
        .map(|(kernel, _)| (label(&kernel.source, &kernel.defines), (kernel.source, kernel.defines)))
        .collect();
    let all: Vec<_> = all.into_values().collect();
    let n = Prebuilt::make(output, nvrtc, target, &all)?;
    say::result(&format!(
        "{}: {} for {target}, compiled by NVRTC {}.{}; RINGTUNE_KERNELS={0} takes them",
        output.display(),
        plural(n, "module"),
        nvrtc.version().0,
        nvrtc.version().1
    ));
    Ok(())
}
