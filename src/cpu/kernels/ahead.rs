//! Memory that is asked for before it is read.

/// Asks for a line of the cache: into the first level, or into the second. On processors of other kinds nothing is asked.
#[inline(always)]
pub fn ask<const CACHE: usize>(at: *const impl Sized) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address does nothing but move data between caches.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        match CACHE {
            1 => _mm_prefetch::<_MM_HINT_T0>(at.cast()),
            _ => _mm_prefetch::<_MM_HINT_T1>(at.cast()),
        }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        use std::arch::asm;
        match CACHE {
            1 => asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nomem, nostack, preserves_flags)),
            _ => asm!("prfm pldl2keep, [{at}]", at = in(reg) at, options(nomem, nostack, preserves_flags)),
        }
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}
