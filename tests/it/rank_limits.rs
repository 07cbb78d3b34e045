//! Ranks in surroundings that give little: a control group with too little memory for one of them, a machine with next to no shared memory.
//! Both need root and are said to be skipped where the system refuses.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::mpirun;
use crate::ringrun_program::{Training, processes, ringrun, run, succeed};
use crate::runs::{rows, same_file};
use crate::skip::skipped;

const ADAPTER: &str = "adapter_model.safetensors";

/// A control group of this test, with a limit to its memory; it is removed in the end.
struct Group(PathBuf);

impl Group {
    /// In whichever version this machine has; `None` where it gives none.
    fn with_limit(bytes: u64) -> Option<Self> {
        let name = format!("ringtune-test-{}", std::process::id());
        let (first, second) = (Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup"));
        let (at, file) = if first.is_dir() { (first, "memory.limit_in_bytes") } else { (second, "memory.max") };
        let group = Self(at.join(name));
        std::fs::create_dir(&group.0).ok()?;
        std::fs::write(group.0.join(file), bytes.to_string()).ok().map(|()| group)
    }

    /// A program's words behind those of a shell that joins the group first, if it is this rank, or of any rank.
    fn join(&self, rank: Option<usize>) -> [String; 4] {
        let test = rank.map_or(String::new(), |rank| format!("[ \"$RANK\" != {rank} ] ||"));
        let script = format!("{test} echo $$ >{}/cgroup.procs || exit 77; exec \"$@\"", self.0.display());
        ["sh".into(), "-c".into(), script, "sh".into()]
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0); // One that is left harms nobody.
    }
}

/// A rank has a control group of its own, as a container gives it: ringrun, which stands outside, says that memory had run out, and the limit.
#[test]
fn a_rank_that_the_kernel_killed_for_lack_of_memory_is_said_to_be_so() {
    // More than a program needs to meet the others, less than a step takes.
    let Some(group) = Group::with_limit(8 << 20) else {
        return skipped("no control group can be made", false);
    };
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training::new(dir.path(), 3);
    let mut c = Command::new(ringrun());
    c.args(["-n", "2", "--oversubscribe"]).args(group.join(Some(1))).arg(env!("CARGO_BIN_EXE_ringtune"));
    c.args(t.words("out", 2));
    let (code, stderr) = run(c);
    if code == Some(77) {
        return skipped("no control group can be joined", false);
    }
    let last = stderr.lines().last().unwrap_or_default();
    assert_eq!(code, Some(137), "{stderr}");
    let why = ": killed by SIGKILL: the kernel was out of memory (its control group may use 8 MiB); lower ";
    assert!(last.starts_with("ringrun: rank 1 on host ") && last.contains(why), "{stderr}");
    assert!(last.contains(": load: ") || last.contains(": step 1, "), "{stderr}");
    assert_eq!(processes(&dir.path().display().to_string()), []);
    drop(group);
    // All of a run in one group: what is killed is the rank that takes most. A rank that somebody else killed is not said to have run out.
    let Some(group) = Group::with_limit(64 << 20) else {
        return skipped("no control group can be made", false);
    };
    for (script, memory) in [("exec tail /dev/zero", true), ("kill -KILL $$", false)] {
        let words = group.join(None);
        let mut c = Command::new(&words[0]);
        c.args(&words[1..]).arg(ringrun()).args(["-n", "2", "--oversubscribe", "sh", "-c"]);
        c.arg(format!("[ \"$RANK\" = 0 ] && exec sleep 60; {script}"));
        c.stdin(Stdio::null());
        let (code, stderr) = run(c);
        let last = stderr.lines().last().unwrap_or_default();
        assert!(
            code == Some(137) && last.contains("rank 1 on host ") && last.contains("killed by SIGKILL"),
            "{stderr}"
        );
        assert_eq!(
            last.contains("the kernel was out of memory (its control group may use 64 MiB)"),
            memory,
            "{stderr}"
        );
    }
}

/// A container without `--shm-size` has 64 MiB, some have less: sockets need none of it, and Open MPI finds another way. (MPICH 4.0 over UCX
/// does not, and ends with an error of its own in `MPI_Init_thread`.)
#[test]
fn ranks_need_no_shared_memory() {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 60);
    let t = Training::new(dir.path(), 3);
    let little = |c: &Command| {
        let mut little = Command::new("unshare");
        little.args(["--mount", "sh", "-c", "mount -t tmpfs -o size=1m none /dev/shm || exit 77; exec \"$@\"", "sh"]);
        little.arg(c.get_program()).args(c.get_args()).stdin(Stdio::null());
        little.envs(c.get_envs().filter_map(|(name, value)| Some((name, value?))));
        little
    };
    let (code, stderr) = run(little(&Command::new("true")));
    if code != Some(0) {
        return skipped("/dev/shm cannot be made small for one process", false);
    }
    assert_eq!(stderr, "");
    succeed(t.alone("one"));
    succeed(little(&t.ranks("two", 2, &[])));
    same_file(&dir.path().join("one").join(ADAPTER), &dir.path().join("two").join(ADAPTER));
    if mpirun::is_there() && !mpirun::is_hydra() {
        succeed(little(&mpirun::mpirun(&t, "mpi", 2)));
        same_file(&dir.path().join("one").join(ADAPTER), &dir.path().join("mpi").join(ADAPTER));
    }
}
