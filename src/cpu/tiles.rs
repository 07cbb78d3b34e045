//! Permission to use AMX tiles: Linux keeps their state from a process until it asks.

use std::sync::OnceLock;

/// Whether the system grants this process the state of tiles; `None` where the processor has no tiles, or none for bf16. Asked once:
/// threads that start later inherit it.
pub fn granted() -> Option<bool> {
    static GRANTED: OnceLock<Option<bool>> = OnceLock::new();
    *GRANTED.get_or_init(|| {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        // Leaf 7, EDX: bit 22 amx-bf16, bit 24 amx-tile.
        let has = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx >> 22 & 0b101 == 0b101;
        has.then(ask)
    })
}

/// Asks Linux for the 8 KiB of tile data; systems before 5.16 and those that keep it back say no.
#[cfg(target_os = "linux")]
fn ask() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call changes what state the kernel keeps for this process, nothing else.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn ask() -> bool {
    false
}
