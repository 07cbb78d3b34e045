//! Counters summed over all launches of the process, for a program that measures itself: `vgpuCounters`, which no real driver has.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use vgpu::Counters;

/// In the order of [`vgpuCounters`].
static TOTALS: [AtomicU64; 5] = [const { AtomicU64::new(0) }; 5];

/// Bytes of a sector.
const SECTOR: u64 = 32;

/// Adds a launch.
pub fn add(c: &Counters) {
    let values =
        [c.instructions.iter().sum(), c.tensor_flops, c.global_sectors * SECTOR, c.shared_wavefronts, c.bank_conflicts];
    for (total, value) in TOTALS.iter().zip(values) {
        total.fetch_add(value, Relaxed);
    }
}

/// Writes up to `n` sums over the launches that ran so far and gives how many there are: warp instructions, operations of matrix
/// instructions, bytes of the sectors that requests to global memory touched, passes over shared memory, bank conflicts.
///
/// # Safety
/// `out` is valid for writing `n` values.
#[unsafe(no_mangle)]
#[allow(non_snake_case, reason = "named as the functions of the driver are")]
pub unsafe extern "C" fn vgpuCounters(out: *mut u64, n: usize) -> usize {
    for (i, total) in TOTALS.iter().enumerate().take(n) {
        // SAFETY: the caller promises `n` places.
        unsafe { out.add(i).write_unaligned(total.load(Relaxed)) };
    }
    TOTALS.len()
}
