//! What systems do in ways of their own. Linux is where ringrun is at home; elsewhere it builds, and what the system has no call for is
//! refused or left out, as each function says.

use std::io;
use std::os::fd::OwnedFd;

/// The machine's name.
pub fn host_name() -> String {
    let mut bytes = [0u8; 256];
    // SAFETY: the pointer and the length are those of a local; the last byte is kept, so that the name ends.
    let found = unsafe { libc::gethostname(bytes.as_mut_ptr().cast(), bytes.len() - 1) } == 0;
    let name = bytes.split(|&b| b == 0).next().filter(|_| found).map(String::from_utf8_lossy).unwrap_or_default();
    if name.trim().is_empty() { "this machine".into() } else { name.trim().into() }
}

/// A file in memory that no folder names, closed in programs that are started unless they are told otherwise.
///
/// # Errors
/// If the system gives none.
pub fn memory_file(name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let fd = linux_or_posix::open_memory(name);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub use linux_or_posix::{adopt_orphans, die_with, is_memory_file, own_cores, tie};

#[cfg(target_os = "linux")]
mod linux_or_posix {
    use std::ffi::CStr;
    use std::io;
    use std::os::fd::RawFd;

    pub fn open_memory(name: &CStr) -> RawFd {
        // SAFETY: the name is a terminated string.
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) }
    }

    /// Whether a descriptor is a file that [`super::memory_file`] made under this name.
    pub fn is_memory_file(fd: RawFd, name: &CStr) -> bool {
        let expected = format!("/memfd:{}", name.to_string_lossy());
        std::fs::read_link(format!("/proc/self/fd/{fd}")).is_ok_and(|to| to.to_string_lossy().starts_with(&expected))
    }

    /// The cores that this process may run on.
    pub fn own_cores() -> Vec<usize> {
        // SAFETY: all zeros is an empty set, and the call writes no more than the size it is given.
        let set = unsafe {
            let mut set = std::mem::zeroed::<libc::cpu_set_t>();
            libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set);
            set
        };
        // SAFETY: the index is below the set's size.
        (0..libc::CPU_SETSIZE as usize).filter(|&core| unsafe { libc::CPU_ISSET(core, &set) }).collect()
    }

    /// Ties the calling process to cores.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn tie(cores: &[usize]) -> io::Result<()> {
        if cores.is_empty() {
            return Ok(());
        }
        // SAFETY: all zeros is an empty set; indices beyond its size are left out; the call reads the size it is given.
        let result = unsafe {
            let mut set = std::mem::zeroed::<libc::cpu_set_t>();
            cores.iter().filter(|&&c| c < libc::CPU_SETSIZE as usize).for_each(|&c| libc::CPU_SET(c, &mut set));
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// From now on the calling process is killed when its parent dies.
    ///
    /// # Errors
    /// If the parent is not (any more) the expected one.
    pub fn die_with(parent: libc::pid_t) -> io::Result<()> {
        // SAFETY: two calls without pointers.
        let now = unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::getppid()
        };
        // It died in between: the signal will not come.
        if now == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
    }

    /// Makes this process the parent of what its ranks leave behind.
    pub fn adopt_orphans() {
        // SAFETY: a call without pointers; where the kernel refuses, process groups are all there is.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    }
}

#[cfg(not(target_os = "linux"))]
mod linux_or_posix {
    use std::ffi::{CStr, CString};
    use std::io;
    use std::os::fd::RawFd;

    pub fn open_memory(name: &CStr) -> RawFd {
        let own = format!("/{}.{}", name.to_string_lossy(), std::process::id());
        let Ok(own) = CString::new(own) else { return -1 };
        // SAFETY: the name is a terminated string; shm_open closes it in started programs, and the name is given back at once.
        unsafe {
            let fd = libc::shm_open(own.as_ptr(), libc::O_RDWR | libc::O_CREAT | libc::O_EXCL, 0o600 as libc::c_uint);
            libc::shm_unlink(own.as_ptr());
            fd
        }
    }

    /// Whether a descriptor can be one that [`super::memory_file`] made: it has a size.
    pub fn is_memory_file(fd: RawFd, _name: &CStr) -> bool {
        let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
        // SAFETY: the pointer is to a local of the struct's size, read only after the call said that it was filled.
        unsafe { libc::fstat(fd, stat.as_mut_ptr()) == 0 && stat.assume_init().st_size > 0 }
    }

    /// As many cores as the system says that there are; it names none.
    pub fn own_cores() -> Vec<usize> {
        (0..std::thread::available_parallelism().map_or(1, usize::from)).collect()
    }

    /// There is no such call: ranks that are to be tied are refused.
    ///
    /// # Errors
    /// If there are cores to tie to.
    pub fn tie(cores: &[usize]) -> io::Result<()> {
        if cores.is_empty() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOTSUP)) }
    }

    /// There is no such signal: a rank whose launcher is killed ends when its connection to the hub does.
    ///
    /// # Errors
    /// If the parent is not (any more) the expected one.
    pub fn die_with(parent: libc::pid_t) -> io::Result<()> {
        // SAFETY: a call without pointers.
        let now = unsafe { libc::getppid() };
        if now == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
    }

    /// There is no such call: process groups are all there is.
    pub fn adopt_orphans() {}
}
