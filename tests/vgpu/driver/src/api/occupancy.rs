//! Occupancy.

use std::ffi::c_int;
use std::sync::atomic::Ordering::Relaxed;

use super::launch::{Extras, extras};
use crate::abi::LaunchConfig;
use crate::chip::SHARED_RESERVED;
use crate::code::{Code, Result};
use crate::driver::driver;
use crate::ffi::{Handle, In, Out, api};
use crate::occupancy::{Needs, best_block, blocks_per_sm};

/// `CUoccupancyB2DSize`: dynamic shared bytes for a number of threads.
pub type SharedOf = Option<unsafe extern "C" fn(c_int) -> usize>;

fn needs(function: Handle) -> Result<Needs> {
    let st = driver().state();
    st.healthy()?;
    Ok(st.functions.get(function)?.needs())
}

fn active(out: Out<c_int>, function: Handle, threads: c_int, shared: usize, flags: u32) -> Result {
    out.check()?;
    let threads = u32::try_from(threads).ok().filter(|n| *n > 0).ok_or(Code::INVALID_VALUE)?;
    if flags > 1 {
        return Err(Code::INVALID_VALUE);
    }
    out.set(blocks_per_sm(driver().config.chip, &needs(function)?, threads, shared) as c_int)
}

fn potential(
    grid: Out<c_int>,
    block: Out<c_int>,
    function: Handle,
    f: SharedOf,
    shared: usize,
    limit: c_int,
) -> Result {
    grid.check()?;
    block.check()?;
    let (chip, needs) = (driver().config.chip, needs(function)?);
    let limit = u32::try_from(limit).map_err(|_| Code::INVALID_VALUE)?;
    let (threads, blocks) = best_block(chip, &needs, limit, |threads| match f {
        // SAFETY: the C caller promises a function from threads to bytes.
        Some(f) => unsafe { f(threads as c_int) },
        None => shared,
    });
    grid.set(blocks as c_int * chip.sms)?;
    block.set(threads as c_int)
}

/// Largest portable cluster, and the largest of all on chips that have clusters.
const PORTABLE: u32 = 8;
const NON_PORTABLE: u32 = 16;

fn largest_cluster(function: Handle) -> Result<u32> {
    if driver().config.chip.cluster == 0 {
        return Err(Code::NOT_SUPPORTED);
    }
    let st = driver().state();
    let allowed = st.functions.get(function)?.non_portable_cluster.load(Relaxed) != 0;
    Ok(if allowed { NON_PORTABLE } else { PORTABLE })
}

fn config_of(config: In<LaunchConfig>) -> Result<(LaunchConfig, Extras)> {
    let c = config.get()?;
    let e = extras(&c)?;
    Ok((c, e))
}

fn threads(c: &LaunchConfig) -> u32 {
    c.block.iter().fold(1, |a, b| a.saturating_mul(*b))
}

api! {
    /// Blocks of a function that are resident on one multiprocessor.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(out: Out<c_int>, function: Handle, threads: c_int, shared: usize) {
        active(out, function, threads, shared, 0)
    }

    /// As above; the flag about caching of global memory changes nothing on these chips.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        out: Out<c_int>, function: Handle, threads: c_int, shared: usize, flags: u32,
    ) {
        active(out, function, threads, shared, flags)
    }

    /// A block size with the most resident threads, and the blocks that fill the device.
    fn cuOccupancyMaxPotentialBlockSize(
        grid: Out<c_int>, block: Out<c_int>, function: Handle, f: SharedOf, shared: usize, limit: c_int,
    ) {
        potential(grid, block, function, f, shared, limit)
    }

    /// As above, with a flag that changes nothing on these chips.
    fn cuOccupancyMaxPotentialBlockSizeWithFlags(
        grid: Out<c_int>, block: Out<c_int>, function: Handle, f: SharedOf, shared: usize, limit: c_int, flags: u32,
    ) {
        if flags > 1 {
            return Err(Code::INVALID_VALUE);
        }
        potential(grid, block, function, f, shared, limit)
    }

    /// Dynamic shared memory that leaves room for so many blocks on a multiprocessor.
    fn cuOccupancyAvailableDynamicSMemPerBlock(out: Out<usize>, function: Handle, blocks: c_int, threads: c_int) {
        out.check()?;
        let (chip, needs) = (driver().config.chip, needs(function)?);
        if blocks <= 0 || threads <= 0 {
            return Err(Code::INVALID_VALUE);
        }
        // Without a limit set on the function: the question is what could be set.
        let free = Needs { dynamic_limit: chip.shared_optin as usize - needs.static_shared.min(chip.shared_optin as usize), ..needs };
        let share = (chip.shared_per_sm as usize / blocks as usize) & !127;
        let most = share.saturating_sub(needs.static_shared + SHARED_RESERVED as usize).min(free.dynamic_limit);
        if blocks_per_sm(chip, &free, threads as u32, most) < blocks as u32 {
            return Err(Code::INVALID_VALUE);
        }
        out.set(most)
    }

    /// Clusters that are resident on the device, as if multiprocessors were one group.
    fn cuOccupancyMaxActiveClusters(out: Out<c_int>, function: Handle, config: In<LaunchConfig>) {
        out.check()?;
        let needs = needs(function)?;
        let most = largest_cluster(function)?;
        let (c, e) = config_of(config)?;
        let size: u32 = e.cluster.unwrap_or([1; 3]).iter().product();
        if size == 0 || size > most {
            return Err(Code::INVALID_CLUSTER_SIZE);
        }
        let chip = driver().config.chip;
        let blocks = blocks_per_sm(chip, &needs, threads(&c), c.shared as usize);
        out.set((blocks * chip.sms as u32 / size) as c_int)
    }

    /// The largest cluster that a launch may have.
    fn cuOccupancyMaxPotentialClusterSize(out: Out<c_int>, function: Handle, config: In<LaunchConfig>) {
        out.check()?;
        let needs = needs(function)?;
        let most = largest_cluster(function)?;
        let (c, _) = config_of(config)?;
        if blocks_per_sm(driver().config.chip, &needs, threads(&c), c.shared as usize) == 0 {
            return Err(Code::INVALID_VALUE);
        }
        out.set(most as c_int)
    }
}
