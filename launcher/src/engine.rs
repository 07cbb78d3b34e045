//! Engines of other tools: the command that starts the ranks through mpirun or srun. Each rank is `ringrun --wrap -- PROGRAM`, the parent
//! of one rank, which tells the hub in the first ringrun what became of it.

use std::ffi::OsString;
use std::process::Command;

use crate::devices::Bind;
use crate::local::Meeting;
use crate::options::{GRACE, Options};
use crate::spawn::RankCommand;

/// Whose mpirun it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mpi {
    /// Open MPI 4, or before.
    Open4,
    /// Open MPI 5, which stands on PRRTE.
    Open5,
    /// MPICH or Intel MPI: Hydra.
    Hydra,
}

impl Mpi {
    /// What `mpirun --version` prints.
    pub fn of(version: &str) -> Option<Self> {
        let lower = version.to_lowercase();
        if lower.contains("open mpi") || lower.contains("openrte") || lower.contains("prrte") {
            let number = lower.split(|c: char| !c.is_ascii_digit() && c != '.').find(|w| w.contains('.'));
            let major = number.and_then(|n| n.split('.').next()).and_then(|n| n.parse::<u32>().ok());
            return Some(if major.is_some_and(|m| m < 5) { Mpi::Open4 } else { Mpi::Open5 });
        }
        (lower.contains("hydra") || lower.contains("mpich") || lower.contains("intel(r) mpi")).then_some(Mpi::Hydra)
    }

    /// The mpirun on `PATH`.
    ///
    /// # Errors
    /// If there is none, or it is one that is not known.
    pub fn found() -> Result<Self, String> {
        let output = Command::new("mpirun").arg("--version").output();
        let output =
            output.map_err(|e| format!("mpirun --version: {e}; install Open MPI or MPICH, or use --engine node"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let first = text.lines().next().unwrap_or_default();
        Mpi::of(&text)
            .ok_or_else(|| format!("mpirun --version says {first:?}: neither Open MPI nor MPICH nor Intel MPI"))
    }
}

/// What every rank is told, whoever starts it.
fn variables(options: &Options, meeting: &Meeting) -> Vec<(String, String)> {
    let own = [
        ("RINGTUNE_CONTROL", meeting.control.clone()),
        ("RINGTUNE_SECRET", meeting.secret.clone()),
        ("RINGTUNE_RESTART", meeting.attempt.to_string()),
    ];
    let own = own.into_iter().map(|(name, value)| (name.to_string(), value));
    options.env.iter().cloned().chain(own).collect()
}

/// `ringrun --wrap -- PROGRAM ARGS`, where the ranks find this very program.
fn wrapped(options: &Options, ringrun: &str) -> Vec<OsString> {
    let mut own = vec![OsString::from(ringrun), "--wrap".into()];
    if options.grace != GRACE {
        own.extend(["--grace".into(), options.grace.as_secs_f64().to_string().into()]);
    }
    own.push("--".into());
    own.into_iter().chain(options.program.iter().cloned()).collect()
}

fn command(program: &str, words: Vec<OsString>, env: Vec<(String, String)>, options: &Options) -> RankCommand {
    RankCommand { program: program.into(), args: words, env, dir: options.dir.clone(), cores: Vec::new() }
}

/// The command of mpirun.
pub fn mpirun(mpi: Mpi, options: &Options, meeting: &Meeting, ringrun: &str) -> RankCommand {
    let list = options.hosts.iter().map(|h| format!("{}:{}", h.name, h.slots)).collect::<Vec<_>>().join(",");
    let mut words: Vec<String> = Vec::new();
    let mut env = variables(options, meeting);
    match mpi {
        Mpi::Open4 | Mpi::Open5 => {
            if !list.is_empty() {
                words.extend(["--host".into(), list]);
            }
            let slots = if options.oversubscribe { "slot:OVERSUBSCRIBE" } else { "slot" };
            words.extend(["-np".into(), options.ranks.to_string(), "--map-by".into(), slots.into()]);
            // Its own default ties each of two ranks to one core.
            words.extend(["--bind-to".into(), options.bind.word().into()]);
            words.extend(env.iter().flat_map(|(name, _)| ["-x".to_string(), name.clone()]));
            if options.root {
                env.extend(
                    ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"].map(|n| (n.to_string(), "1".into())),
                );
            }
        }
        Mpi::Hydra => {
            if !list.is_empty() {
                words.extend(["-hosts".into(), list]);
            }
            words.extend(["-n".into(), options.ranks.to_string()]);
            words.extend(["-bind-to".into(), options.bind.word().into()]);
            let names: Vec<&str> = env.iter().map(|(name, _)| name.as_str()).collect();
            words.extend(["-genvlist".into(), names.join(",")]);
        }
    }
    let words = words.into_iter().map(OsString::from).chain(wrapped(options, ringrun)).collect();
    command("mpirun", words, env, options)
}

/// Since 22.05 srun gives a rank one core, whatever the batch script asked for, unless it is told again.
fn cores_of_a_task(options: &Options) -> Option<(String, String)> {
    const TOLD: &str = "SRUN_CPUS_PER_TASK";
    let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
    let cores = number("SLURM_CPUS_PER_TASK").filter(|_| std::env::var_os(TOLD).is_none())?;
    // More ranks than the job has tasks do not have as many each.
    (options.ranks <= number("SLURM_NTASKS")?).then(|| (TOLD.to_string(), cores.to_string()))
}

/// The command of srun.
pub fn srun(options: &Options, meeting: &Meeting, ringrun: &str) -> RankCommand {
    // The first rank that fails ends the step; ranks are no MPI programs.
    let mut words: Vec<String> = [
        "--ntasks".into(),
        options.ranks.to_string(),
        "--kill-on-bad-exit=1".into(),
        "--mpi=none".into(),
        "--export=ALL".into(),
    ]
    .into();
    if !options.hosts.is_empty() {
        let names: Vec<&str> = options.hosts.iter().map(|h| h.name.as_str()).collect();
        words.extend(["--nodelist".into(), names.join(",")]);
    }
    let bind = match options.bind {
        Bind::None => "none",
        Bind::Core => "cores",
        Bind::Numa => "ldoms",
    };
    words.push(format!("--cpu-bind={bind}"));
    if options.oversubscribe {
        words.push("--overcommit".into());
    }
    let words = words.into_iter().map(OsString::from).chain(wrapped(options, ringrun)).collect();
    command("srun", words, variables(options, meeting).into_iter().chain(cores_of_a_task(options)).collect(), options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_apart() {
        for (text, mpi) in [
            ("mpirun (Open MPI) 4.1.4\n\nReport bugs to …", Some(Mpi::Open4)),
            ("mpirun (Open MPI) 5.0.3", Some(Mpi::Open5)),
            ("mpirun (PRRTE) 3.0.6", Some(Mpi::Open4)),
            ("HYDRA build details:\n    Version: 4.2.0", Some(Mpi::Hydra)),
            ("Intel(R) MPI Library for Linux* OS, Version 2021.11", Some(Mpi::Hydra)),
            ("something else", None),
        ] {
            assert_eq!(Mpi::of(text), mpi, "{text}");
        }
    }
}
