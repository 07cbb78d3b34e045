//! Who a process is among the ranks of a run, from the environment of whichever launcher started it.
//!
//! | launcher | rank, size | local | where the ranks meet |
//! | --- | --- | --- | --- |
//! | ringrun | `RANK`, `WORLD_SIZE` | `LOCAL_RANK`, `LOCAL_WORLD_SIZE` | `RINGTUNE_CONTROL` |
//! | torchrun, accelerate, DeepSpeed, Kubernetes | the same | the same, or unknown | `MASTER_ADDR`, `MASTER_PORT` |
//! | Open MPI, PRRTE | `OMPI_COMM_WORLD_*` | `OMPI_COMM_WORLD_LOCAL_*` | `MASTER_*`, else a port of the job's name on one machine |
//! | MPICH, Intel MPI | `PMI_RANK`, `PMI_SIZE` | `MPI_LOCALRANKID` | the same, named by Hydra's process on the machine |
//! | srun, with PMI or without | `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS` | `SLURM_LOCALID` | the first machine of the step |
//!
//! The innermost launcher counts: ringrun inside srun sets what stands first here. An mpirun in a job of Slurm meets at the first machine of
//! the job. `SLURM_NTASKS` is not asked: every program of a batch script sees it, and would wait for ranks that never come.

/// Who started this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// ringrun.
    Ringrun,
    /// torchrun, and what sets the same variables.
    Torch,
    /// Open MPI's mpirun, or PRRTE.
    OpenMpi,
    /// MPICH's or Intel's mpirun.
    Pmi,
    /// Slurm's srun.
    Slurm,
}

impl Launcher {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Launcher::Ringrun => "ringrun",
            Launcher::Torch => "RANK and WORLD_SIZE",
            Launcher::OpenMpi => "Open MPI's mpirun",
            Launcher::Pmi => "mpirun",
            Launcher::Slurm => "srun",
        }
    }
}

/// Where the ranks of a run find each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// ringrun's hub at `ADDRESS:PORT`, with its secret.
    Control {
        /// Address and port.
        address: String,
        /// The secret.
        secret: String,
    },
    /// Rank 0 opens the hub here, or on one of the next ports.
    Master {
        /// Address or name.
        host: String,
        /// First port to try.
        port: u16,
        /// What the ranks know: the job's name, or `RINGTUNE_SECRET`.
        secret: String,
    },
    /// Nothing says where.
    Unknown,
}

/// Who this process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Who started it.
    pub launcher: Launcher,
    /// Its number.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// Number among the ranks of its machine, where the launcher says it.
    pub local_rank: Option<usize>,
    /// Ranks of its machine, where the launcher says it.
    pub local_size: Option<usize>,
    /// Where the ranks meet.
    pub meeting: Meeting,
}

/// What stands for the job of an mpirun that names none, on its machine alone.
const HYDRA: &str = "process of Hydra";

/// A variable of this process, or what is asked for like one.
pub fn own(name: &str) -> Option<String> {
    if name == HYDRA { hydra() } else { std::env::var(name).ok() }
}

/// The Hydra that started this process or one above it, by its number and the time it began.
fn hydra() -> Option<String> {
    let mut pid = std::process::id().to_string();
    for _ in 0..64 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // `PID (NAME) STATE PARENT …`, with the time it began 22nd.
        let (name, rest) = text.split_once('(')?.1.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        if name.starts_with("hydra_") {
            return Some(format!("hydra-{pid}-{}", fields.get(19)?));
        }
        pid = fields.get(1)?.to_string();
    }
    None
}

/// Reads who this process is; `None` where nothing started it as a rank.
///
/// # Errors
/// If a variable that is there makes no sense: the message names it.
pub fn identify(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Identity>, String> {
    let number = |name: &str| -> Result<Option<usize>, String> {
        let Some(text) = get(name).filter(|t| !t.is_empty()) else { return Ok(None) };
        text.trim().parse().map(Some).map_err(|_| format!("{name}: expected a whole number, found {text:?}"))
    };
    let ringrun = get("RINGTUNE_CONTROL").is_some();
    // What srun offers to MPI programs is its own count.
    let of_srun =
        [("PMI_RANK", "SLURM_PROCID"), ("PMI_SIZE", "SLURM_STEP_NUM_TASKS")].iter().all(|(a, b)| get(a) == get(b));
    // Each with: rank, size, local rank, local size.
    let torch = if ringrun { Launcher::Ringrun } else { Launcher::Torch };
    let known = [
        (torch, ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]),
        (
            Launcher::OpenMpi,
            [
                "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_SIZE",
            ],
        ),
        (Launcher::Pmi, ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]),
        (Launcher::Slurm, ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"]),
    ];
    for (launcher, [rank, size, local_rank, local_size]) in known {
        if get(rank).is_none() || get(size).is_none() || (launcher == Launcher::Pmi && of_srun) {
            continue;
        }
        let (Some(r), Some(n)) = (number(rank)?, number(size)?) else { continue };
        if r >= n {
            return Err(format!("{rank}: expected a number below {size} = {n}, found {r}"));
        }
        // Slurm writes `4(x2)`: the ranks count themselves once they have met.
        let local_size = if launcher == Launcher::Slurm { None } else { number(local_size)? };
        let local_rank = number(local_rank)?;
        let meeting = meeting(launcher, get, local_size == Some(n))?;
        if n == 1 && !ringrun {
            return Ok(None);
        }
        return Ok(Some(Identity { launcher, rank: r, size: n, local_rank, local_size, meeting }));
    }
    match ringrun {
        true => Err("RINGTUNE_CONTROL is set, RANK and WORLD_SIZE are not: start the program with ringrun".into()),
        false => Ok(None),
    }
}

fn meeting(launcher: Launcher, get: &dyn Fn(&str) -> Option<String>, one_host: bool) -> Result<Meeting, String> {
    let secret = get("RINGTUNE_SECRET");
    if let Some(address) = get("RINGTUNE_CONTROL") {
        return Ok(Meeting::Control { address, secret: secret.unwrap_or_default() });
    }
    let names = ["TORCHELASTIC_RUN_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "PALS_APID"];
    let slurm = || Some(format!("slurm-{}.{}", get("SLURM_JOB_ID")?, get("SLURM_STEP_ID")?));
    let job = match launcher {
        Launcher::Slurm => slurm(),
        _ => names.iter().find_map(|name| get(name)).or_else(slurm),
    };
    let job = job.or_else(|| get(HYDRA).filter(|_| launcher == Launcher::Pmi && one_host));
    let secret = secret.or_else(|| job.clone()).unwrap_or_default();
    if let Some(host) = get("MASTER_ADDR") {
        let text = get("MASTER_PORT").unwrap_or_else(|| "29500".into());
        let port = text.parse().map_err(|_| format!("MASTER_PORT: expected a port, found {text:?}"))?;
        return Ok(Meeting::Master { host, port, secret });
    }
    let machines = match launcher {
        Launcher::Slurm => get("SLURM_STEP_NODELIST"),
        Launcher::OpenMpi | Launcher::Pmi if !one_host => get("SLURM_JOB_NODELIST"),
        _ => None,
    };
    if let (Some(host), Some(job)) = (machines.and_then(|list| first_host(&list)), &job) {
        return Ok(Meeting::Master { host, port: port_of(job), secret });
    }
    Ok(match job {
        Some(job) if one_host => Meeting::Master { host: "127.0.0.1".into(), port: port_of(&job), secret },
        _ => Meeting::Unknown,
    })
}

/// Steps of one job, and jobs that share a machine, meet at ports of their own.
fn port_of(job: &str) -> u16 {
    let hash = job.bytes().fold(2_166_136_261u32, |h, b| (h ^ u32::from(b)).wrapping_mul(16_777_619));
    20_000 + (hash % 10_000) as u16
}

/// How many ranks a job of Slurm asked for; none within one of several tasks of a step, where they are not to be started again.
pub fn tasks_of_job(get: &dyn Fn(&str) -> Option<String>) -> Option<usize> {
    let number = |name: &str| get(name)?.parse::<usize>().ok();
    let alone = number("SLURM_STEP_NUM_TASKS").is_none_or(|n| n == 1);
    number("SLURM_NTASKS").filter(|&n| n > 0 && alone)
}

/// The first machine of Slurm's list: `node[03-06,9],gpu1` begins with `node03`.
pub fn first_host(list: &str) -> Option<String> {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (name, rest) = list.split_at(end);
    let number = match rest.strip_prefix('[') {
        Some(numbers) => &numbers[..numbers.find(['-', ',', ']'])?],
        None => "",
    };
    let host = format!("{name}{number}");
    (!host.is_empty()).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Option<Identity>, String> {
        let vars: Vec<(&str, &str)> = text.split_whitespace().filter_map(|pair| pair.split_once('=')).collect();
        let get = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        identify(&get)
    }

    fn who(text: &str) -> (Launcher, usize, usize, Option<usize>, Meeting) {
        let i = of(text).unwrap().unwrap();
        (i.launcher, i.rank, i.size, i.local_rank, i.meeting)
    }

    fn master(host: &str, port: u16, secret: &str) -> Meeting {
        Meeting::Master { host: host.into(), port, secret: secret.into() }
    }

    /// What eight launchers set, each shortened to what matters and what could mislead.
    #[test]
    fn eight_launchers() {
        let slurm = "SLURM_JOB_ID=77 SLURM_NTASKS=8 SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=8 \
                     SLURM_STEP_NODELIST=node[03-06] SLURM_STEP_TASKS_PER_NODE=2(x4)";
        let ringrun = "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=4711 \
                       RINGTUNE_CONTROL=127.0.0.1:99 RINGTUNE_SECRET=s";
        let control = Meeting::Control { address: "127.0.0.1:99".into(), secret: "s".into() };
        assert_eq!(who(ringrun), (Launcher::Ringrun, 1, 2, Some(1), control.clone()));
        assert_eq!(who(&format!("{slurm} {ringrun}")), (Launcher::Ringrun, 1, 2, Some(1), control), "inside srun");
        let torchrun = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 MASTER_ADDR=a MASTER_PORT=29500 \
                        TORCHELASTIC_RUN_ID=x";
        assert_eq!(who(torchrun), (Launcher::Torch, 3, 4, Some(1), master("a", 29_500, "x")));
        // A Kubernetes PyTorchJob: one rank a pod, nothing local.
        let pod = "RANK=1 WORLD_SIZE=3 MASTER_ADDR=job-master-0 MASTER_PORT=23456 PYTHONUNBUFFERED=1";
        assert_eq!(who(pod), (Launcher::Torch, 1, 3, None, master("job-master-0", 23_456, "")));
        let open_mpi_4 = "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=2 OMPI_COMM_WORLD_LOCAL_SIZE=4 \
                          PMIX_RANK=2 PMIX_NAMESPACE=1234 OMPI_MCA_ess_base_jobid=1234";
        assert_eq!(who(open_mpi_4), (Launcher::OpenMpi, 2, 4, Some(2), master("127.0.0.1", port_of("1234"), "1234")));
        let open_mpi_5 = "OMPI_COMM_WORLD_RANK=7 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=3 OMPI_COMM_WORLD_LOCAL_SIZE=4 \
                          PMIX_RANK=7 PMIX_NAMESPACE=prterun-a-9@1 SLURM_JOB_ID=3 SLURM_PROCID=0 SLURM_NTASKS=8";
        assert_eq!(who(open_mpi_5), (Launcher::OpenMpi, 7, 8, Some(3), Meeting::Unknown));
        assert_eq!(who(&format!("{open_mpi_5} MASTER_ADDR=a")).4, master("a", 29_500, "prterun-a-9@1"));
        let mpich = "PMI_RANK=0 PMI_SIZE=2 PMI_FD=8 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2 PMI_JOBID=kvs_5";
        assert_eq!(who(mpich), (Launcher::Pmi, 0, 2, Some(0), master("127.0.0.1", port_of("kvs_5"), "kvs_5")));
        let mpich_4 = "PMI_RANK=1 PMI_SIZE=2 PMI_FD=8 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2";
        let get = |name: &str| match name {
            HYDRA => Some("hydra-7-8".into()),
            _ => mpich_4.split(' ').find_map(|pair| Some(pair.strip_prefix(name)?.strip_prefix('=')?.to_string())),
        };
        assert_eq!(identify(&get).unwrap().unwrap().meeting, master("127.0.0.1", port_of("hydra-7-8"), "hydra-7-8"));
        let intel =
            "PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=1 I_MPI_HYDRA_UUID=1 MASTER_ADDR=h MASTER_PORT=1";
        assert_eq!(who(intel), (Launcher::Pmi, 1, 2, Some(0), master("h", 1, "")));
        let (launcher, rank, size, local, Meeting::Master { host, port, secret }) = who(slurm) else {
            panic!("srun meets at its first machine")
        };
        assert_eq!((launcher, rank, size, local), (Launcher::Slurm, 5, 8, Some(1)));
        assert_eq!((host.as_str(), secret.as_str()), ("node03", "slurm-77.0"));
        assert_eq!(port, port_of("slurm-77.0"));
        // srun's plug-in for MPI counts as srun does; an mpirun that was started with srun does not.
        assert_eq!(who(&format!("{slurm} PMI_RANK=5 PMI_SIZE=8 PMI_JOBID=77.0")), who(slurm));
        let in_a_job = "SLURM_JOB_ID=77 SLURM_JOB_NODELIST=node[03-06] SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=4 SLURM_STEP_ID=2 \
                        SLURM_STEP_NODELIST=node04";
        let hydra = format!("{in_a_job} PMI_RANK=5 PMI_SIZE=8 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2");
        assert_eq!(who(&hydra), (Launcher::Pmi, 5, 8, Some(1), master("node03", port_of("slurm-77.2"), "slurm-77.2")));
        let open_mpi = format!("{open_mpi_5} {in_a_job}");
        let at = master("node03", port_of("prterun-a-9@1"), "prterun-a-9@1");
        assert_eq!(who(&open_mpi), (Launcher::OpenMpi, 7, 8, Some(3), at));
    }

    #[test]
    fn a_program_that_nobody_started_as_a_rank_is_alone() {
        for text in [
            "",
            "SLURM_NTASKS=8 SLURM_PROCID=0",
            "SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_JOB_ID=1 SLURM_LOCALID=0",
            "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1",
            "RANK=3",
            "WORLD_SIZE=4",
            "RANK=0 WORLD_SIZE=1",
            "PMIX_RANK=3",
            "RANK= WORLD_SIZE=",
        ] {
            assert_eq!(of(text), Ok(None), "{text}");
        }
        assert_eq!(who("RANK=0 WORLD_SIZE=1 RINGTUNE_CONTROL=a:1").2, 1, "ringrun watches a single rank too");
    }

    #[test]
    fn nonsense_is_named() {
        for (text, expected) in [
            ("RANK=x WORLD_SIZE=2", "RANK: expected a whole number, found \"x\""),
            ("RANK=2 WORLD_SIZE=2", "RANK: expected a number below WORLD_SIZE = 2, found 2"),
            ("RANK=0 WORLD_SIZE=-1", "WORLD_SIZE: expected a whole number, found \"-1\""),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=99999", "MASTER_PORT: expected a port, found \"99999\""),
            (
                "RINGTUNE_CONTROL=a:1",
                "RINGTUNE_CONTROL is set, RANK and WORLD_SIZE are not: start the program with ringrun",
            ),
        ] {
            assert_eq!(of(text), Err(expected.into()), "{text}");
        }
    }

    #[test]
    fn a_job_says_how_many_ranks_it_asked_for() {
        for (text, tasks) in [
            ("SLURM_NTASKS=4 SLURM_PROCID=0", Some(4)),
            ("SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=1", Some(4)),
            ("SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=4", None),
            ("SLURM_NTASKS=0", None),
            ("", None),
        ] {
            let vars: Vec<(&str, &str)> = text.split_whitespace().filter_map(|pair| pair.split_once('=')).collect();
            let get = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
            assert_eq!(tasks_of_job(&get), tasks, "{text}");
        }
    }

    #[test]
    fn the_first_machine_of_a_list() {
        for (list, first) in
            [("node[03-06,9],gpu1", "node03"), ("a,b", "a"), ("host", "host"), ("n[7]", "n7"), ("x[1,3]", "x1")]
        {
            assert_eq!(first_host(list).as_deref(), Some(first));
        }
        assert_eq!((first_host(""), first_host("a[")), (None, None));
    }
}
