//! One memory instruction's view of its addresses: what was worked out about the pattern of the lanes is kept.
//!
//! In a loop the addresses of the lanes relative to the first one seldom change. A [`Site`] keeps the last pattern with
//! what follows from it alone (alignment, extent, sectors, bank passes, whether it is one dense row), so that an access
//! costs a comparison of the pattern and one check of the bounds.

use super::LANES;
use super::mem::lanes;

/// How the lanes' addresses lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// All 32 lanes, each right after the one before.
    Row,
    /// Every lane at the same address.
    Same,
    /// Anything else.
    Any,
}

/// The last pattern of one memory instruction.
pub struct Site {
    mask: u32,
    low: u64,
    /// Address of each lane relative to the first active one; zero for lanes outside the mask.
    relative: [u64; LANES],
    /// All ones for lanes of the mask.
    chosen: [u64; LANES],
    /// Lowest address relative to the first active lane's.
    pub low_end: u64,
    /// Bytes from the lowest address to the end of the highest.
    pub extent: u64,
    /// How the addresses lie.
    pub shape: Shape,
    /// First lane whose address is not a multiple of the access size.
    pub misaligned: Option<usize>,
    /// 32-byte sectors that the lanes touch.
    pub sectors: u64,
    /// Passes over the banks of shared memory.
    pub passes: u64,
    /// Passes that an access without bank conflicts needs.
    pub least_passes: u64,
    /// Start, length and index of the allocation that was found last.
    pub block: (u64, u64, usize),
}

impl Default for Site {
    fn default() -> Site {
        Site {
            mask: 0,
            low: 0,
            relative: [0; LANES],
            chosen: [0; LANES],
            low_end: 0,
            extent: 0,
            shape: Shape::Any,
            misaligned: None,
            sectors: 0,
            passes: 0,
            least_passes: 0,
            block: (0, 0, 0),
        }
    }
}

impl Site {
    /// Brings the site up to date with the addresses of the lanes of `mask` (not empty), of `bytes` each, and returns the
    /// address of the first active lane.
    #[inline(always)]
    pub fn see(&mut self, at: &[u64; LANES], mask: u32, bytes: u64) -> u64 {
        let first = at[mask.trailing_zeros() as usize & 31];
        let mut other = u64::from(mask ^ self.mask) | (first & 127 ^ self.low);
        if mask == u32::MAX {
            for l in 0..LANES {
                other |= at[l].wrapping_sub(first) ^ self.relative[l];
            }
        } else {
            for l in 0..LANES {
                other |= (at[l].wrapping_sub(first) ^ self.relative[l]) & self.chosen[l];
            }
        }
        if other != 0 {
            self.learn(at, mask, bytes);
        }
        first
    }

    #[inline(never)]
    fn learn(&mut self, at: &[u64; LANES], mask: u32, bytes: u64) {
        let first = at[mask.trailing_zeros() as usize & 31];
        (self.mask, self.low) = (mask, first & 127);
        let (mut low, mut high) = (i64::MAX, i64::MIN);
        let (mut row, mut same) = (mask == u32::MAX, true);
        for l in 0..LANES {
            let on = mask >> l & 1 == 1;
            let relative = if on { at[l].wrapping_sub(first) } else { 0 };
            self.relative[l] = relative;
            self.chosen[l] = if on { u64::MAX } else { 0 };
            (low, high) = (low.min(relative as i64), high.max(relative as i64));
            row &= relative == l as u64 * bytes;
            same &= relative == 0;
        }
        self.low_end = low as u64;
        self.extent = (high.wrapping_sub(low) as u64).saturating_add(bytes);
        self.shape = match (row, same) {
            (true, _) => Shape::Row,
            (_, true) => Shape::Same,
            _ => Shape::Any,
        };
        self.misaligned = lanes(mask).find(|l| !at[*l].is_multiple_of(bytes));
        self.sectors = sectors(at, bytes, mask);
        (self.passes, self.least_passes) = passes(at, bytes, mask);
    }
}

/// Different 32-byte sectors that the lanes touch.
fn sectors(at: &[u64; LANES], bytes: u64, mask: u32) -> u64 {
    let last = |l: usize| at[l].saturating_add(bytes - 1) >> 5;
    let (mut n, mut previous, mut sorted) = (0u64, u64::MAX, true);
    for l in lanes(mask) {
        let (first, end) = (at[l] >> 5, last(l));
        sorted &= previous == u64::MAX || first >= previous;
        n += (end - first) + u64::from(previous != first);
        previous = end;
    }
    if sorted {
        return n;
    }
    let mut all: Vec<u64> = lanes(mask).flat_map(|l| at[l] >> 5..=last(l)).collect();
    all.sort_unstable();
    all.dedup();
    all.len() as u64
}

/// Passes over the 32 banks, and the passes without conflicts: wide accesses are served in groups of lanes that together
/// move 128 bytes, and a group takes as many passes as different words are wanted from one bank.
fn passes(at: &[u64; LANES], bytes: u64, mask: u32) -> (u64, u64) {
    let group = 128 / bytes.clamp(4, 128) as usize;
    let (mut all, mut least) = (0, 0);
    for first in (0..LANES).step_by(group) {
        let part = mask & ((((1u64 << group) - 1) << first) as u32);
        if part != 0 {
            all += bank_passes(at, bytes, part);
            least += 1;
        }
    }
    (all, least)
}

/// Largest number of different words that lanes want from one bank.
fn bank_passes(at: &[u64; LANES], bytes: u64, mask: u32) -> u64 {
    let touched = |l: usize| at[l] >> 2..at[l].saturating_add(bytes).div_ceil(4);
    let (mut seen, mut clash) = ([u64::MAX; 32], false);
    for w in lanes(mask).flat_map(touched) {
        let s = &mut seen[w as usize & 31];
        clash |= *s != u64::MAX && *s != w;
        *s = w;
    }
    if !clash {
        return 1;
    }
    let mut words: Vec<u64> = lanes(mask).flat_map(touched).collect();
    words.sort_unstable();
    words.dedup();
    let mut count = [0; 32];
    for w in words {
        count[w as usize & 31] += 1;
    }
    count.into_iter().max().unwrap_or(1)
}
