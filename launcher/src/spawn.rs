//! Starting a rank so that it cannot outlive ringrun: a process group of its own, and a death signal from its parent.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::system::tie;
pub use crate::system::{adopt_orphans, die_with, own_cores};

/// The command of a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankCommand {
    /// The program.
    pub program: PathBuf,
    /// Its words.
    pub args: Vec<OsString>,
    /// What it gets beside ringrun's own environment.
    pub env: Vec<(String, String)>,
    /// Its working folder.
    pub dir: Option<PathBuf>,
    /// The cores it is tied to; none: all.
    pub cores: Vec<usize>,
}

impl RankCommand {
    /// As a line of shell.
    pub fn shell(&self) -> String {
        let mut words: Vec<String> = self.env.iter().map(|(k, v)| format!("{k}={}", quoted(v))).collect();
        if let Some(dir) = &self.dir {
            words.insert(0, format!("cd {} &&", quoted(&dir.to_string_lossy())));
        }
        if !self.cores.is_empty() {
            words.push(format!("taskset -c {}", ranges(&self.cores)));
        }
        words.push(quoted(&self.program.to_string_lossy()));
        words.extend(self.args.iter().map(|a| quoted(&a.to_string_lossy())));
        words.join(" ")
    }
}

/// A word as a shell reads it again.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@+%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// `0-3,8`.
pub fn ranges(cores: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &core in cores {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == core => *last = core,
            _ => parts.push((core, core)),
        }
    }
    let text = |(a, b): &(usize, usize)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    parts.iter().map(text).collect::<Vec<_>>().join(",")
}

/// Reads what [`ranges`] wrote.
pub fn parse_ranges(text: &str) -> Option<Vec<usize>> {
    let mut cores = Vec::new();
    for part in text.split(',').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cores.extend(first.parse().ok()?..=last.parse::<usize>().ok()?);
    }
    Some(cores)
}

/// The shares of `n` ranks of these cores, equal and apart; nothing where there are too few.
pub fn shares(cores: &[usize], n: usize) -> Vec<Vec<usize>> {
    let each = cores.len() / n.max(1);
    (0..n).map(|r| cores[r * each..(r + 1) * each].to_vec()).collect()
}

/// The program of a name. `ringtune` is the one beside ringrun where there is one: two versions do not speak to each other.
pub fn resolve(program: &OsString) -> PathBuf {
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(|dir| dir.join(program));
    match beside {
        Some(path) if program == "ringtune" && path.is_file() => path,
        _ => PathBuf::from(program),
    }
}

/// How a rank's standard streams are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streams {
    /// To ringrun's own.
    Inherited,
    /// To pipes.
    Piped,
}

/// Starts a rank. It must be called in the thread that lives as long as ringrun: the death signal comes when that thread ends.
///
/// # Errors
/// If the program cannot be started.
pub fn spawn(command: &RankCommand, streams: Streams, beacon: &impl AsRawFd) -> io::Result<Child> {
    let mut c = Command::new(&command.program);
    c.args(&command.args).envs(command.env.iter().map(|(k, v)| (k, v)));
    if let Some(dir) = &command.dir {
        // Else the system names the program, which is there.
        std::fs::metadata(dir)
            .and_then(|found| if found.is_dir() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOTDIR)) })
            .map_err(|e| io::Error::new(e.kind(), format!("--wdir {}: {}", dir.display(), e)))?;
        c.current_dir(dir);
    }
    let out = || if streams == Streams::Piped { Stdio::piped() } else { Stdio::inherit() };
    // A process group in the background must not read from the terminal.
    c.stdin(Stdio::null()).stdout(out()).stderr(out()).process_group(0);
    let (parent, fd) = (std::process::id() as libc::pid_t, beacon.as_raw_fd());
    c.env("RINGTUNE_BEACON_FD", fd.to_string());
    let cores = command.cores.clone();
    let prepare = move || {
        tie(&cores)?;
        keep_open(fd)?;
        die_with(parent)
    };
    // SAFETY: between fork and exec only system calls are made; nothing is allocated and no lock is taken.
    unsafe { c.pre_exec(prepare) };
    c.spawn()
}

fn keep_open(fd: RawFd) -> io::Result<()> {
    // SAFETY: a call on a descriptor by number.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sends a signal to the process group of a rank that was not reaped yet.
pub fn signal_group(pid: u32, signal: i32) {
    // SAFETY: the group is that of our child, whose number is not given away before it is reaped.
    unsafe { libc::kill(-(pid as libc::pid_t), signal) };
}

/// Kills and reaps every process that was left to us, however often they start new ones.
pub fn end_orphans() {
    let me = std::process::id().to_string();
    for _ in 0..1000 {
        // SAFETY: reaps any child; no pointer is read.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
        let children = std::fs::read_to_string(format!("/proc/{me}/task/{me}/children")).unwrap_or_default();
        let mut pids: Vec<i32> = children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
        // Orphans are adopted by the first thread; where the kernel has no such list there is nothing to go by.
        if pids.is_empty() {
            return;
        }
        for pid in pids.drain(..) {
            // SAFETY: a child that was not reaped keeps its number.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Whether a signal stopped a process of the group of a rank: `T` in `/proc/PID/stat`, behind the name. A shell may stand above the program.
pub fn is_stopped(group: u32) -> bool {
    let stopped = |pid: &str| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        Some(fields.first() == Some(&"T") && fields.get(2)?.parse() == Ok(group))
    };
    let names = std::fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.into_string().ok()).any(|pid| stopped(&pid) == Some(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_shared_and_written_as_ranges() {
        assert_eq!(shares(&[0, 1, 2, 3, 8], 2), [vec![0, 1], vec![2, 3]]);
        assert_eq!(shares(&[0], 2), [const { Vec::<usize>::new() }; 2]);
        for cores in [vec![], vec![3], vec![0, 1, 2, 8, 10, 11]] {
            assert_eq!(parse_ranges(&ranges(&cores)), Some(cores));
        }
        assert_eq!(ranges(&[0, 1, 2, 8, 10, 11]), "0-2,8,10-11");
        assert_eq!(parse_ranges("x"), None);
        assert!(!own_cores().is_empty());
    }

    #[test]
    fn a_command_is_a_line_of_shell() {
        let command = RankCommand {
            program: "prog".into(),
            args: vec!["a b".into(), "it's".into(), "".into()],
            env: vec![("RANK".into(), "1".into())],
            dir: Some("/a b".into()),
            cores: vec![2, 3],
        };
        assert_eq!(command.shell(), r"cd '/a b' && RANK=1 taskset -c 2-3 prog 'a b' 'it'\''s' ''");
    }
}
