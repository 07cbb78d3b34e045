//! One memory instruction's view of its addresses: what was worked out about the pattern of the lanes is kept.
//!
//! In a loop the addresses of the lanes relative to the first one seldom change. A [`Site`] keeps the last pattern with
//! what follows from it alone (alignment, extent, sectors, bank passes, whether it is one dense row), so that an access
//! costs a comparison of the pattern and one check of the bounds.

use super::LANES;
use super::mem::{Space, lanes};

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

/// Warps that keep patterns of their own: tiles are often swizzled by the row, so that neighbouring warps differ.
pub const WARPS: usize = 4;

/// The last pattern of one memory instruction in every fourth warp.
pub struct Site {
    mask: u32,
    low: u64,
    /// Address of each lane relative to the first active one; zero for lanes outside the mask.
    relative: [i32; LANES],
    /// Zero, or ones when the lanes are too far apart to be kept.
    far: u64,
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
            far: 0,
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

/// The place of the site of access `number` in a warp.
#[inline(always)]
pub fn place(number: u32, warp: usize) -> usize {
    number as usize * WARPS + warp % WARPS
}

impl Site {
    /// Brings the site up to date with the addresses of the lanes of `mask` (not empty), of `bytes` each, in `space`, and
    /// returns the address of the first active lane.
    #[inline(always)]
    pub fn see(&mut self, space: Space, at: &[u64; LANES], mask: u32, bytes: u64) -> u64 {
        let first = at[mask.trailing_zeros() as usize & 31];
        // What follows from the pattern depends on the first address too: sectors have 32 bytes, banks four (a pattern
        // that moves by whole banks keeps its conflicts), and accesses are aligned to their size.
        let keep = if space == Space::Global { 31 } else { (bytes - 1) | 3 };
        let mut other = u64::from(mask ^ self.mask) | ((first ^ self.low) & keep) | self.far;
        if mask == u32::MAX {
            for l in 0..LANES {
                other |= at[l].wrapping_sub(first) ^ i64::from(self.relative[l]) as u64;
            }
        } else {
            for l in 0..LANES {
                let chosen = 0u64.wrapping_sub(u64::from(mask >> l & 1));
                other |= (at[l].wrapping_sub(first) ^ i64::from(self.relative[l]) as u64) & chosen;
            }
        }
        if other != 0 {
            self.learn(space, at, mask, bytes);
        }
        first
    }

    #[inline(never)]
    fn learn(&mut self, space: Space, at: &[u64; LANES], mask: u32, bytes: u64) {
        let first = at[mask.trailing_zeros() as usize & 31];
        (self.mask, self.low) = (mask, first);
        let (mut low, mut high, mut out_of_row, mut apart, mut odd) = (0, 0, u64::from(!mask), 0, 0u32);
        for l in 0..LANES {
            let chosen = 0u64.wrapping_sub(u64::from(mask >> l & 1));
            let relative = at[l].wrapping_sub(first) & chosen;
            self.relative[l] = relative as i32;
            (low, high) = (low.min(relative as i64), high.max(relative as i64));
            out_of_row |= relative ^ (l as u64 * bytes);
            apart |= relative;
            odd |= u32::from(at[l] & (bytes - 1) & chosen != 0) << l;
        }
        let far = i32::try_from(low).is_err() || i32::try_from(high).is_err();
        self.far = u64::from(far);
        self.low_end = low as u64;
        self.extent = (high.wrapping_sub(low) as u64).saturating_add(bytes);
        self.shape = match (out_of_row, apart) {
            (0, _) => Shape::Row,
            (_, 0) => Shape::Same,
            _ => Shape::Any,
        };
        self.misaligned = (odd != 0).then_some(odd.trailing_zeros() as usize);
        match space {
            Space::Global => self.sectors = sectors(at, bytes, mask),
            Space::Shared => (self.passes, self.least_passes) = passes(at, bytes, mask),
            _ => {}
        }
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
    // No lane touches more than two: accesses have at most 32 bytes, or are misaligned and will be refused.
    let (mut all, mut len) = ([u64::MAX; 2 * LANES], 0);
    for l in lanes(mask) {
        (all[len], all[len + 1]) = (at[l] >> 5, last(l));
        len += 2;
    }
    let all = &mut all[..len];
    all.sort_unstable();
    1 + all.windows(2).filter(|w| w[0] != w[1]).count() as u64
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

/// Largest number of different words that lanes want from one bank; together they want at most 64 words.
fn bank_passes(at: &[u64; LANES], bytes: u64, mask: u32) -> u64 {
    // Per bank a chain of the different words seen so far: its length, its last word, and each word's predecessor.
    let (mut length, mut head) = ([0u64; 32], [0u8; 32]);
    let (mut words, mut before, mut n) = ([0u64; 64], [0u8; 64], 0usize);
    let mut most = 1;
    for l in lanes(mask) {
        for w in at[l] >> 2..=at[l].saturating_add(bytes - 1) >> 2 {
            let bank = w as usize & 31;
            let (mut i, mut left) = (head[bank] as usize, length[bank]);
            while left > 0 && words[i & 63] != w {
                (i, left) = (before[i & 63] as usize, left - 1);
            }
            if left == 0 && n < 64 {
                (words[n], before[n], head[bank]) = (w, head[bank], n as u8);
                length[bank] += 1;
                most = most.max(length[bank]);
                n += 1;
            }
        }
    }
    most
}
