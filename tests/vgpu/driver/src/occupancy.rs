//! How many blocks fit on a multiprocessor: the rules of the occupancy calculator for compute capability 8 to 12.
//!
//! Registers are given to warps in units of 256 over four equal parts of the multiprocessor; shared memory in units of 128 bytes, with
//! 1 KiB of each block for the driver. Barriers are not counted: no kernel of ours uses enough of them to matter.

use crate::chip::{BLOCK_THREADS, Chip, REGISTERS, REGISTERS_PER_THREAD, SHARED_DEFAULT, SHARED_RESERVED};

/// Registers of a warp come in this many.
const REGISTER_UNIT: u32 = 256;
/// Parts of a multiprocessor that have registers of their own.
const PARTS: u32 = 4;
/// Shared memory comes in this many bytes.
const SHARED_UNIT: usize = 128;

/// What a kernel asks for.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Registers of a thread.
    pub registers: u32,
    /// Static shared memory in bytes.
    pub static_shared: usize,
    /// Dynamic shared memory that launches may ask for, in bytes.
    pub dynamic_limit: usize,
    /// Percent of the shared memory that is preferred; negative for the default.
    pub carveout: i32,
    /// Threads of a block that its directives allow.
    pub max_threads: u32,
}

/// Sizes that the shared memory of a multiprocessor can be set to, in KiB.
fn shared_steps(chip: &Chip) -> &'static [usize] {
    match chip.shared_per_sm >> 10 {
        164 => &[0, 8, 16, 32, 64, 100, 132, 164],
        228 => &[0, 8, 16, 32, 64, 100, 132, 164, 196, 228],
        _ => &[0, 8, 16, 32, 64, 100],
    }
}

fn shared_step(chip: &Chip, bytes: usize) -> usize {
    let fits = shared_steps(chip).iter().map(|k| k << 10).find(|n| *n >= bytes);
    fits.unwrap_or(chip.shared_per_sm as usize)
}

/// Registers that a launch of `threads` claims of its multiprocessor, by the check that is made before a launch.
pub fn registers_claimed(registers: u32, threads: u32) -> u32 {
    (registers * 32).next_multiple_of(REGISTER_UNIT) * threads.div_ceil(32).next_multiple_of(PARTS)
}

/// Blocks of `threads` threads with `dynamic` bytes of dynamic shared memory that are resident on one multiprocessor.
pub fn blocks_per_sm(chip: &Chip, needs: &Needs, threads: u32, dynamic: usize) -> u32 {
    if threads == 0 || threads > needs.max_threads.min(BLOCK_THREADS) {
        return 0;
    }
    let warps = threads.div_ceil(32);
    let by_warps = chip.threads_per_sm as u32 / 32 / warps;
    let by_registers = if needs.registers > REGISTERS_PER_THREAD as u32
        || registers_claimed(needs.registers, threads) > REGISTERS as u32
    {
        0
    } else {
        let warp = (needs.registers * 32).next_multiple_of(REGISTER_UNIT);
        let per_part = (REGISTERS as u32 / PARTS).checked_div(warp);
        per_part.map_or(u32::MAX, |n| n * PARTS / warps)
    };
    let reserved = SHARED_RESERVED as usize;
    let shared = (needs.static_shared + reserved + dynamic).next_multiple_of(SHARED_UNIT);
    let opted_in = needs.static_shared + needs.dynamic_limit > SHARED_DEFAULT as usize;
    let limit = reserved + if opted_in { chip.shared_optin } else { SHARED_DEFAULT } as usize;
    let by_shared = if dynamic > needs.dynamic_limit || shared > limit {
        0
    } else {
        let all = chip.shared_per_sm as usize;
        let preferred = if needs.carveout < 0 { all } else { shared_step(chip, all * needs.carveout as usize / 100) };
        let sm = if preferred >= shared { preferred } else { shared_step(chip, shared) };
        (sm / shared) as u32
    };
    (chip.blocks_per_sm as u32).min(by_warps).min(by_registers).min(by_shared)
}

/// Threads of a block that keep the most threads resident, and blocks on one multiprocessor then. `dynamic` gives the dynamic shared
/// memory for a number of threads; `limit` of zero is none.
pub fn best_block(chip: &Chip, needs: &Needs, limit: u32, mut dynamic: impl FnMut(u32) -> usize) -> (u32, u32) {
    let most = needs.max_threads.min(BLOCK_THREADS);
    let limit = if limit == 0 { most } else { limit.min(most) };
    let (mut best, mut aligned) = ((0, 0), limit.next_multiple_of(32));
    while aligned > 0 {
        let threads = aligned.min(limit);
        let blocks = blocks_per_sm(chip, needs, threads, dynamic(threads));
        if threads * blocks > best.0 * best.1 {
            best = (threads, blocks);
        }
        if best.0 * best.1 == chip.threads_per_sm as u32 {
            break;
        }
        aligned -= 32;
    }
    best
}
