//! Whether gradients travel over MPI: mpirun or srun started the ranks, and the program was built with an MPI (feature `mpi`).
//!
//! Small values, heartbeats and causes never do: MPI has no answer to a rank that is gone, and needs none here.

#[cfg(feature = "mpi")]
mod transport;

use launcher::environment::Identity;

use super::World;
use super::transport::Transport;
use crate::error::{Error, Result};
use crate::words::words;
use crate::{ensure, say};

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
            Some("sockets" | "socket") => Ok(Choice::Sockets),
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
    judge(identity, choice, library().as_deref(), get)
}

fn judge(identity: &Identity, choice: Choice, own: Option<&str>, get: &dyn Fn(&str) -> Option<String>) -> Result<bool> {
    let choice = if choice == Choice::Auto { Choice::of(get)? } else { choice };
    let offers = offers(identity, get);
    let refused = |why: &str| Err(Error::usage(format!("--transport mpi, RINGTUNE_TRANSPORT=mpi: {why}")));
    match (choice, own, &offers[..]) {
        (Choice::Sockets | Choice::Nccl, ..) => Ok(false),
        (Choice::Mpi, None, _) => {
            refused("this program was built without MPI; `make build` adds it where mpicc and libclang are found")
        }
        (Choice::Mpi, Some(_), []) => refused(
            "nothing that speaks to MPI started this rank: start the program with mpirun, or with srun --mpi=pmix",
        ),
        // Some libraries speak to more than their own launcher: `check_world` sees whether this one does.
        (Choice::Mpi, Some(_), _) => Ok(true),
        (Choice::Auto, None, _) | (Choice::Auto, _, []) => Ok(false),
        (Choice::Auto, Some(own), offers) => {
            let speaks = offers.iter().any(|offer| offer.is_for(own));
            if !speaks {
                say::note(&format!(
                    "{} started the ranks, and the MPI in this program is {own}, which does not speak to that: gradients travel over sockets",
                    identity.launcher.name()
                ));
            }
            Ok(speaks)
        }
    }
}

/// Which MPI programs a launcher speaks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offer {
    /// Open MPI's own mpirun.
    OpenMpi,
    /// Hydra, or srun with the old interface: MPICH and those made of it.
    Pmi,
    /// srun with PMIx, which both understand.
    Pmix,
}

impl Offer {
    /// Whether this library understands it.
    fn is_for(self, library: &str) -> bool {
        match self {
            Offer::OpenMpi => library.starts_with("Open MPI"),
            Offer::Pmi => !library.starts_with("Open MPI"),
            Offer::Pmix => true,
        }
    }
}

/// What launchers of MPI offer to this process as this rank of the run. Under srun there is something with a plug-in for MPI alone; inside
/// ringrun the variables of an mpirun around it name another rank.
fn offers(identity: &Identity, get: &dyn Fn(&str) -> Option<String>) -> Vec<Offer> {
    let is = |name: &str, n: usize| get(name).and_then(|text| text.parse::<usize>().ok()) == Some(n);
    let known = [
        (Offer::OpenMpi, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        (Offer::Pmi, "PMI_RANK", "PMI_SIZE"),
        (Offer::Pmix, "PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    ];
    let offered = known.into_iter().filter(|(_, rank, size)| is(rank, identity.rank) && is(size, identity.size));
    offered.map(|(offer, ..)| offer).collect()
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

    const LIBRARIES: [&str; 3] = ["Open MPI v4.1.4", "MPICH 4.0.2", "Intel(R) MPI Library 2021.11"];

    fn ready(text: &str, library: Option<&str>) -> Result<bool> {
        let vars: Vec<(&str, &str)> = text.split_whitespace().filter_map(|pair| pair.split_once('=')).collect();
        let get = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        judge(&identify(&get).unwrap().unwrap(), Choice::Auto, library, &get)
    }

    const OPEN_MPI: &str = "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4";
    const SLURM: &str = "SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=4 SLURM_JOB_ID=1 SLURM_STEP_ID=0";
    const RINGRUN: &str = "RINGTUNE_CONTROL=a:1 RANK=2 WORLD_SIZE=4";

    /// Whether it is offered, and which of the libraries above understand what offers it.
    #[test]
    fn mpi_is_used_where_it_is_offered_to_the_library_that_was_built_in() {
        let (all, none) = ([true; 3], [false; 3]);
        for (text, offered, understood) in [
            (OPEN_MPI.to_string(), true, [true, false, false]),
            (format!("{RINGRUN} {OPEN_MPI}"), true, [true, false, false]),
            ("PMI_RANK=0 PMI_SIZE=2".into(), true, [false, true, true]),
            (format!("{SLURM} PMI_RANK=1 PMI_SIZE=4"), true, [false, true, true]),
            (format!("{SLURM} PMIX_RANK=1"), true, all),
            (SLURM.into(), false, none),
            (RINGRUN.into(), false, none),
            // ringrun on one machine, itself one of mpirun's four ranks.
            (
                "RINGTUNE_CONTROL=a:1 RANK=1 WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4".into(),
                false,
                none,
            ),
        ] {
            let forced = format!("{text} RINGTUNE_TRANSPORT=mpi");
            for (library, understood) in LIBRARIES.into_iter().zip(understood) {
                assert_eq!(ready(&text, Some(library)).unwrap(), understood, "{text}, {library}");
                assert!(!ready(&format!("{text} RINGTUNE_TRANSPORT=sockets"), Some(library)).unwrap(), "{text}");
                assert_eq!(ready(&forced, Some(library)).is_ok(), offered, "{text}");
            }
            assert!(!ready(&text, None).unwrap() && ready(&forced, None).is_err(), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_had_is_said() {
        for (library, word) in [(Some(LIBRARIES[0]), "srun --mpi=pmix"), (None, "built without MPI")] {
            let e = ready(&format!("{SLURM} RINGTUNE_TRANSPORT=mpi"), library).unwrap_err();
            assert!(e.exit_code() == 2 && e.to_string().contains(word), "{e}");
        }
        let e = ready(&format!("{OPEN_MPI} RINGTUNE_TRANSPORT=tcp"), None).unwrap_err();
        assert!(e.to_string().contains("expected auto, sockets or mpi, found \"tcp\""), "{e}");
        let world = World { rank: 1, size: 4, local_rank: 1, local_size: 4 };
        let e = check_world(&world, (0, 1), "Open MPI v4.1.4").unwrap_err().to_string();
        assert!(e.contains("MPI sees 1 rank where 4 were started") && e.contains("srun --mpi=pmix"), "{e}");
        assert!(check_world(&world, (2, 4), "x").is_err() && check_world(&world, (1, 4), "x").is_ok());
    }
}
