//! What the machine has: processor, memory, system, and how much room a file system has.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

/// Bytes of a page of memory: 4 KiB on x86, as much, 16 or 64 KiB on aarch64.
pub fn page() -> usize {
    static PAGE: OnceLock<usize> = OnceLock::new();
    // SAFETY: no arguments that could be wrong.
    *PAGE.get_or_init(|| usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096))
}

/// A field of `/proc/cpuinfo` or `/proc/meminfo`.
fn proc_field(file: &str, field: &str) -> Option<String> {
    let text = std::fs::read_to_string(Path::new("/proc").join(file)).ok()?;
    let line = text.lines().find(|l| l.split(':').next().is_some_and(|k| k.trim() == field))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// Bytes of a field of `/proc/meminfo`.
fn memory_field(field: &str) -> Option<u64> {
    let kib = proc_field("meminfo", field)?;
    Some(kib.trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}

/// The processor's name, where the system says it.
pub fn processor() -> Option<String> {
    let field = |name| proc_field("cpuinfo", name);
    field("model name").or_else(|| arm_core(&field("CPU implementer")?, &field("CPU part")?))
}

/// The name of a core of Arm's architecture by the two numbers of its MIDR_EL1 that Linux shows in place of a name; the numbers where it is
/// none of those below. Sources: the technical reference manuals of Arm's cores, and `lscpu` of util-linux for the others.
fn arm_core(implementer: &str, part: &str) -> Option<String> {
    let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let numbers = (number(implementer)?, number(part)?);
    let name = match numbers {
        (0x41, 0xd03) => "Arm Cortex-A53",
        (0x41, 0xd07) => "Arm Cortex-A57",
        (0x41, 0xd08) => "Arm Cortex-A72",
        (0x41, 0xd0b) => "Arm Cortex-A76",
        (0x41, 0xd0c) => "Arm Neoverse N1",
        (0x41, 0xd40) => "Arm Neoverse V1",
        (0x41, 0xd49) => "Arm Neoverse N2",
        (0x41, 0xd4f) => "Arm Neoverse V2",
        (0x41, 0xd83) => "Arm Neoverse V3AE",
        (0x41, 0xd84) => "Arm Neoverse V3",
        (0x41, 0xd8e) => "Arm Neoverse N3",
        (0x46, 0x001) => "Fujitsu A64FX",
        (0xc0, 0xac3) => "Ampere-1",
        (0xc0, 0xac4) => "Ampere-1a",
        _ => return Some(format!("core {part} of implementer {implementer}")),
    };
    Some(name.into())
}

/// Threads that may run at once; 0 where the system does not say.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(0, usize::from)
}

/// Bytes of memory that the machine has.
pub fn total_memory() -> Option<u64> {
    memory_field("MemTotal")
}

/// Bytes of memory that the kernel calls available.
pub fn unused_memory() -> Option<u64> {
    memory_field("MemAvailable")
}

/// Bytes of address space that a limit (`ulimit -v`) leaves to this process, where there is one.
fn address_space() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct is a local that the call fills.
    let asked = unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) };
    if asked != 0 || limit.rlim_cur == libc::RLIM_INFINITY {
        return None;
    }
    let pages: u64 = std::fs::read_to_string("/proc/self/statm").ok()?.split(' ').next()?.parse().ok()?;
    Some(limit.rlim_cur.saturating_sub(pages * page() as u64))
}

/// Bytes that may still be allocated: what the kernel calls available, or what the control group or a limit of the process leaves if
/// that is less.
pub fn available_memory() -> Option<u64> {
    let machine = unused_memory()?;
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    // `memory.max` reads "max" where there is no limit, which is no number.
    let group = match (number("/sys/fs/cgroup/memory.max"), number("/sys/fs/cgroup/memory.current")) {
        (Some(limit), Some(used)) => limit.saturating_sub(used),
        _ => u64::MAX,
    };
    Some(machine.min(group).min(address_space().unwrap_or(u64::MAX)))
}

/// Bytes of the largest cache that the first core has, where the system says it.
pub fn last_cache() -> Option<u64> {
    let caches = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    let size = |dir: std::fs::DirEntry| {
        let text = std::fs::read_to_string(dir.path().join("size")).ok()?;
        let kib = text.trim().strip_suffix('K')?;
        Some(kib.parse::<u64>().ok()? * 1024)
    };
    caches.flatten().filter_map(size).max()
}

/// Bytes of memory that this process holds, and held at most since the peak was last forgotten.
pub fn resident_memory() -> Option<(u64, u64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    };
    Some((field("VmRSS:")?, field("VmHWM:")?))
}

/// Forgets the peak of [`resident_memory`], where the system allows it (Linux 4.0, proc(5): `clear_refs`).
pub fn forget_peak_memory() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// The machine's name in the network.
pub fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "this machine".into() } else { name.trim().into() }
}

/// What the system says of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// It is there, and began so many ticks after the machine did.
    Began(u64),
    /// There is none of this number, or it has ended and nobody has asked how.
    Ended,
    /// This user, or this system, is not told.
    Unseen,
}

/// Looks for a process by its number (proc(5), `/proc/PID/stat`).
pub fn process(pid: u32) -> Process {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        let Some(pid) = libc::pid_t::try_from(pid).ok().filter(|pid| *pid > 0) else { return Process::Ended };
        // SAFETY: signal 0 is sent to nobody; the call only says whether it could be.
        let there = unsafe { libc::kill(pid, 0) } == 0;
        // A /proc that hides the processes of others still lets the call tell them from none.
        let none = std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH);
        return if !there && none { Process::Ended } else { Process::Unseen };
    };
    // The name, in brackets, may hold anything; behind it come the state, field 3, and the rest up to the time, field 22.
    let mut fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
    match (fields.next(), fields.nth(18).and_then(|ticks| ticks.parse().ok())) {
        (Some("Z" | "X" | "x"), _) => Process::Ended,
        (_, Some(ticks)) => Process::Began(ticks),
        _ => Process::Unseen,
    }
}

/// Names the processes among which a number and a time since the machine began mean one: this boot of this machine, and within it this
/// container. `None` where the system does not say.
pub fn process_space() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let space = std::fs::read_link("/proc/self/ns/pid").ok()?;
    Some(format!("{} {}", boot.trim(), space.display()))
}

/// Operating system and release of its kernel, where it says it.
pub fn system() -> Option<String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    Some(format!("{} {}", std::env::consts::OS, release.trim()))
}

/// Bytes that an ordinary user may still write where `path` lies; `None` where the system does not say.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let name = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `name` is a terminated string that lives during the call, and `stat` is writable memory of the size of the
    // struct that statvfs(3) fills; it is read only after the call said that it did.
    let stat = unsafe {
        if libc::statvfs(name.as_ptr(), stat.as_mut_ptr()) != 0 {
            return None;
        }
        stat.assume_init()
    };
    // Their types differ from system to system.
    #[allow(
        clippy::useless_conversion,
        clippy::unnecessary_fallible_conversions,
        reason = "they are u64 on Linux alone"
    )]
    let (blocks, size) = (u64::from(stat.f_bavail), u64::from(stat.f_frsize));
    blocks.checked_mul(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_of_arm_have_names_or_numbers() {
        let of = |implementer, part| arm_core(implementer, part);
        assert_eq!(of("0x41", "0xd0c").as_deref(), Some("Arm Neoverse N1"));
        assert_eq!(of("0x41", "0x123").as_deref(), Some("core 0x123 of implementer 0x41"));
        assert_eq!((of("0x41", "?"), of("", "")), (None, None));
    }

    #[test]
    fn a_folder_has_room_and_nothing_has_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free_bytes(dir.path()).is_some_and(|n| n > 0));
        assert_eq!(free_bytes(&dir.path().join("none")), None);
    }

    #[test]
    fn the_peak_of_memory_is_remembered_and_forgotten() {
        let (now, _) = resident_memory().unwrap();
        let big = vec![1u8; 64 << 20];
        let held = std::hint::black_box(&big).len() as u64;
        let (_, peak) = resident_memory().unwrap();
        assert!(peak >= now + held / 2, "{now}, then {peak}");
        drop(big);
        // Other tests of this process hold memory too; a system that keeps the peak says so.
        assert!(!forget_peak_memory() || resident_memory().is_some_and(|(now, peak)| peak >= now));
    }

    #[test]
    fn a_machine_has_memory_and_a_system() {
        let (total, free) = (total_memory().unwrap(), available_memory().unwrap());
        assert!(free > 1 << 20 && total >= free, "{free} of {total} bytes");
        assert!(threads() > 0 && system().is_some_and(|s| s.contains(' ')));
    }
}
