//! Whether the kernel killed a rank because memory had run out: the counters of its control group, before and after.

use std::fmt;
use std::path::{Path, PathBuf};

/// How many processes the kernel has killed in the control groups of the ranks, as far as that is known.
#[derive(Debug)]
pub struct Kills {
    /// Folders of control groups.
    groups: Vec<(PathBuf, u64)>,
    /// Of the whole machine, where there is no control group to ask.
    machine: u64,
}

/// Memory had run out, and the kernel killed a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory {
    /// What the control group may use, in bytes; none: as much as there is.
    pub limit: Option<u64>,
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the kernel was out of memory")?;
        match self.limit {
            Some(bytes) if bytes >= 10 << 30 => write!(f, " (its control group may use {} GiB)", bytes >> 30),
            Some(bytes) => write!(f, " (its control group may use {} MiB)", bytes >> 20),
            None => Ok(()),
        }
    }
}

impl Kills {
    /// Counts from now on, in the control group of this process.
    pub fn from_now() -> Self {
        let mut kills = Self { groups: Vec::new(), machine: of_machine().unwrap_or(0) };
        kills.add(std::process::id());
        kills
    }

    /// Counts in the control group of this process too: a rank may have been started in one of its own.
    pub fn add(&mut self, pid: u32) {
        if let Some(group) = group_of(pid)
            && !self.groups.iter().any(|(known, _)| *known == group)
            && let Some(killed) = of_group(&group)
        {
            self.groups.push((group, killed));
        }
    }

    /// Whether there was one since this was asked last.
    pub fn more(&mut self) -> Option<OutOfMemory> {
        if self.groups.is_empty() {
            let now = of_machine()?;
            return (std::mem::replace(&mut self.machine, now) < now).then_some(OutOfMemory { limit: None });
        }
        let mut found = None;
        for (group, known) in &mut self.groups {
            let now = of_group(group).unwrap_or(*known);
            if std::mem::replace(known, now) < now {
                found = found.or(Some(OutOfMemory { limit: limit(group) }));
            }
        }
        found
    }
}

/// `oom_kill N` on a line of its own.
fn counted(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

fn of_machine() -> Option<u64> {
    counted(&std::fs::read_to_string("/proc/vmstat").ok()?)
}

/// Of a group; version 2 counts in `memory.events`, version 1 in `memory.oom_control`.
fn of_group(group: &Path) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
    counted(&read("memory.events").or_else(|| read("memory.oom_control"))?)
}

/// The least that a group or one above it may use.
fn limit(group: &Path) -> Option<u64> {
    let of = |dir: &Path| -> Option<u64> {
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
        let text = read("memory.max").or_else(|| read("memory.limit_in_bytes"))?;
        // Without a limit version 2 says `max`, version 1 a number that no machine has.
        text.trim().parse().ok().filter(|bytes| *bytes < 1 << 60)
    };
    group.ancestors().filter_map(of).min()
}

fn group_of(pid: u32) -> Option<PathBuf> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    folder(&groups, &std::fs::read_to_string("/proc/self/mountinfo").ok()?)
}

/// The folder of the control group that bounds the memory of a process, from its `cgroup` and our `mountinfo`.
fn folder(groups: &str, mounts: &str) -> Option<PathBuf> {
    // Where both versions are there, the first one has the memory.
    [("cgroup", "memory"), ("cgroup2", "")].into_iter().find_map(|(kind, controller)| {
        let has = |list: &str| list.split(',').any(|word| word == controller);
        // `NUMBER:CONTROLLERS:PATH`; version 2 names no controller.
        let path = groups.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            has(controllers).then_some(path)
        })?;
        // `… … … ROOT PLACE … - KIND SOURCE OPTIONS`
        mounts.lines().find_map(|line| {
            let (place, what) = line.split_once(" - ")?;
            let (mut place, mut what) = (place.split(' ').skip(3), what.split(' '));
            let (root, at) = (place.next()?, place.next()?);
            let fits = what.next()? == kind && (controller.is_empty() || has(what.nth(1)?));
            // In a container the group may be mounted as the root, under a name that is known outside alone.
            fits.then(|| Path::new(at).join(Path::new(path).strip_prefix(root).unwrap_or(Path::new(""))))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "31 23 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "40 32 0:35 / /sys/fs/cgroup/cpu rw shared:16 - cgroup cgroup rw,cpu\n\
                      43 32 0:38 / /sys/fs/cgroup/memory rw shared:19 - cgroup cgroup rw,memory\n\
                      47 32 0:42 / /sys/fs/cgroup/unified rw shared:23 - cgroup2 cgroup2 rw\n";
    const DOCKER: &str = "612 611 0:38 /docker/7f /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";

    #[test]
    fn the_folder_of_a_group_is_found_in_both_versions_and_in_containers() {
        for (groups, mounts, expected) in [
            ("0::/user.slice/a.scope\n", V2, Some("/sys/fs/cgroup/user.slice/a.scope")),
            ("0::/\n", V2, Some("/sys/fs/cgroup")),
            ("9:name=systemd:/\n4:memory:/job/step\n3:cpuset:/\n0::/x\n", V1, Some("/sys/fs/cgroup/memory/job/step")),
            ("4:cpu,memory:/docker/7f/in\n", DOCKER, Some("/sys/fs/cgroup/memory/in")),
            ("4:memory:/elsewhere\n", DOCKER, Some("/sys/fs/cgroup/memory")),
            ("4:memory:/a:b\n", V1, Some("/sys/fs/cgroup/memory/a:b")),
            ("1:cpu:/\n", V1, None),
            ("0::/\n", "", None),
            ("", V2, None),
        ] {
            assert_eq!(folder(groups, mounts).as_deref(), expected.map(Path::new), "{groups:?}");
        }
    }

    #[test]
    fn counters_and_limits_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert_eq!((of_group(dir.path()), limit(dir.path())), (None, None));
        write("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n");
        write("memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!((of_group(dir.path()), limit(dir.path())), (Some(3), None));
        write("memory.events", "low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n");
        write("memory.max", "max\n");
        assert_eq!((of_group(dir.path()), limit(dir.path())), (Some(1), None));
        let below = dir.path().join("below");
        std::fs::create_dir(&below).unwrap();
        write("below/memory.max", "2147483648\n");
        write("memory.max", "1073741824\n");
        assert_eq!(limit(&below), Some(1 << 30));
        let said = |limit| OutOfMemory { limit }.to_string();
        assert_eq!(said(None), "the kernel was out of memory");
        assert_eq!(said(limit(&below)), "the kernel was out of memory (its control group may use 1024 MiB)");
        assert_eq!(said(Some(80 << 30)), "the kernel was out of memory (its control group may use 80 GiB)");
    }

    #[test]
    fn a_kill_is_said_once() {
        let dir = tempfile::tempdir().unwrap();
        let count = |n: u64| std::fs::write(dir.path().join("memory.events"), format!("oom_kill {n}\n")).unwrap();
        count(2);
        let mut kills = Kills { groups: vec![(dir.path().into(), 2)], machine: 0 };
        assert_eq!(kills.more(), None);
        count(3);
        assert_eq!(kills.more(), Some(OutOfMemory { limit: None }));
        assert_eq!(kills.more(), None);
    }
}
