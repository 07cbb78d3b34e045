//! Whether gradients travel over MPI: mpirun or srun started the ranks, and the program was built with an MPI (feature `mpi`).
//!
//! Small values, heartbeats and causes never do: MPI has no answer to a rank that is gone, and needs none here.

#[cfg(feature = "mpi")]
mod transport;

use launcher::environment::Identity;

use super::World;
use super::transport::Transport;
use crate::ensure;
use crate::error::{Error, Result};
use crate::words::words;

/// What carries gradients, as `RINGTUNE_TRANSPORT` says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// NCCL between GPUs, else MPI where every rank has it, else sockets.
    #[default]
    Auto,
    /// Sockets.
    Sockets,
    /// NCCL, or an error.
    Nccl,
    /// MPI, or an error.
    Mpi,
}
words!(Choice { Auto = "auto", Sockets = "socket", Nccl = "nccl", Mpi = "mpi" });

impl Choice {
    /// What the environment asks for.
    ///
    /// # Errors
    /// A usage error for a word that is none of them.
    pub fn of(get: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        match get("RINGTUNE_TRANSPORT").as_deref() {
            None | Some("" | "auto") => Ok(Choice::Auto),
            Some("sockets") => Ok(Choice::Sockets),
            Some("mpi") => Ok(Choice::Mpi),
            Some(other) => {
                Err(Error::usage(format!("RINGTUNE_TRANSPORT: expected auto, sockets or mpi, found {other:?}")))
            }
        }
    }
}

/// Whether this rank can use MPI: it was built in, and what started the rank offers it.
///
/// # Errors
/// A usage error where MPI is asked for and cannot be had: the message says why.
pub fn is_ready(identity: &Identity, choice: Choice, get: &dyn Fn(&str) -> Option<String>) -> Result<bool> {
    let choice = if choice == Choice::Auto { Choice::of(get)? } else { choice };
    let (offered, built) = (is_offered(identity, get), library().is_some());
    let asked = |so: bool, why: &str| {
        if choice == Choice::Mpi && !so {
            Err(Error::usage(format!("--transport mpi, RINGTUNE_TRANSPORT=mpi: {why}")))
        } else {
            Ok(so)
        }
    };
    let built =
        asked(built, "this program was built without MPI; `make build` adds it where mpicc and libclang are found")?;
    let why = "nothing that speaks to MPI started this rank: start the program with mpirun, or with srun --mpi=pmix";
    Ok(asked(offered, why)? && built && matches!(choice, Choice::Auto | Choice::Mpi))
}

/// Whether a launcher of MPI started this process as this rank of the run. Under srun that is so with a plug-in for MPI alone; inside
/// ringrun the variables of an mpirun around it name another rank.
fn is_offered(identity: &Identity, get: &dyn Fn(&str) -> Option<String>) -> bool {
    let is = |name: &str, n: usize| get(name).and_then(|text| text.parse::<usize>().ok()) == Some(n);
    let pairs = [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    ];
    pairs.into_iter().any(|(rank, size)| is(rank, identity.rank) && is(size, identity.size))
}

/// The MPI that was built in, as it names itself; none without the feature `mpi`.
pub fn library() -> Option<String> {
    #[cfg(feature = "mpi")]
    return Some(transport::library());
    #[cfg(not(feature = "mpi"))]
    None
}

/// The transport of this rank, which is opened in the thread of the collectives.
///
/// # Errors
/// Without the feature `mpi`.
pub fn transport(world: &World) -> Result<Box<dyn Transport>> {
    #[cfg(feature = "mpi")]
    return Ok(Box::new(transport::Mpi::new(world)));
    #[cfg(not(feature = "mpi"))]
    Err(Error::new(format!("rank {} was built without MPI", world.rank)))
}

/// Compares what MPI sees with what the launcher said. Started past their own launcher, MPI programs find themselves alone, in silence.
///
/// # Errors
/// If they differ: what to do then.
pub fn check_world(world: &World, (rank, size): (usize, usize), library: &str) -> Result<()> {
    ensure!(
        size == world.size,
        "MPI sees {size} rank{} where {} were started: the program was built with {library}, and what started it does not speak to \
         that; use its own mpirun, or srun --mpi=pmix (srun --mpi=list says what there is), or RINGTUNE_TRANSPORT=sockets",
        if size == 1 { "" } else { "s" },
        world.size
    );
    ensure!(rank == world.rank, "MPI counts this rank as {rank}, its launcher as {}", world.rank);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use launcher::environment::identify;

    fn ready(text: &str) -> Result<bool> {
        let vars: Vec<(&str, &str)> = text.split_whitespace().filter_map(|pair| pair.split_once('=')).collect();
        let get = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        is_ready(&identify(&get).unwrap().unwrap(), Choice::Auto, &get)
    }

    const OPEN_MPI: &str = "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4";
    const SLURM: &str = "SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=4 SLURM_JOB_ID=1 SLURM_STEP_ID=0";
    const RINGRUN: &str = "RINGTUNE_CONTROL=a:1 RANK=2 WORLD_SIZE=4";

    #[test]
    fn mpi_is_used_where_it_is_offered() {
        let built = library().is_some();
        for (text, offered) in [
            (OPEN_MPI.to_string(), true),
            (format!("{RINGRUN} {OPEN_MPI}"), true),
            ("PMI_RANK=0 PMI_SIZE=2".into(), true),
            (format!("{SLURM} PMIX_RANK=1"), true),
            (SLURM.into(), false),
            (RINGRUN.into(), false),
            // ringrun on one machine, itself one of mpirun's four ranks.
            ("RINGTUNE_CONTROL=a:1 RANK=1 WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4".into(), false),
        ] {
            assert_eq!(ready(&text).unwrap(), offered && built, "{text}");
            assert!(!ready(&format!("{text} RINGTUNE_TRANSPORT=sockets")).unwrap(), "{text}");
            let forced = ready(&format!("{text} RINGTUNE_TRANSPORT=mpi"));
            assert_eq!(forced.is_ok(), offered && built, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_had_is_said() {
        let e = ready(&format!("{SLURM} RINGTUNE_TRANSPORT=mpi")).unwrap_err();
        let word = if library().is_some() { "srun --mpi=pmix" } else { "built without MPI" };
        assert!(e.exit_code() == 2 && e.to_string().contains(word), "{e}");
        let e = ready(&format!("{OPEN_MPI} RINGTUNE_TRANSPORT=tcp")).unwrap_err();
        assert!(e.to_string().contains("expected auto, sockets or mpi, found \"tcp\""), "{e}");
        let world = World { rank: 1, size: 4, local_rank: 1, local_size: 4 };
        let e = check_world(&world, (0, 1), "Open MPI v4.1.4").unwrap_err().to_string();
        assert!(e.contains("MPI sees 1 rank where 4 were started") && e.contains("srun --mpi=pmix"), "{e}");
        assert!(check_world(&world, (2, 4), "x").is_err() && check_world(&world, (1, 4), "x").is_ok());
    }
}
