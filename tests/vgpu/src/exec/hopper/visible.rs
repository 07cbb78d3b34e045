//! Whether a warp that uses a barrier object comes after its `mbarrier.init`, whatever the order in which warps happen to run.
//!
//! Each object that not every warp of the cluster comes after is a [`Fresh`]. Warps that come after its `init` hand that on where they
//! release something and others acquire it: barriers of the block and of the cluster, arrivals and completed waits at other barrier
//! objects, and strong accesses of one address with a fence or `.release` on the writing side. In the usual kernel one `bar.sync` after
//! the inits is all there is, and nothing is left to follow. Threads of one warp are not told apart.

use super::act::{Here, line};
use super::state::{Origin, Shared};
use super::wait::misuse;
use crate::exec::launch::Cta;
use crate::exec::mem::{LaneFault, SHARED, Space, lanes};
use crate::exec::races::{Kind, RELEASE, STRONG};
use crate::exec::region::ones;
use crate::exec::{Inst, LANES};

/// Where warps meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// A barrier of a CTA, by its place and number.
    Barrier(usize, u32),
    /// The barrier of a cluster, by the place of its first CTA.
    Cluster(usize),
    /// A barrier object, by the place of its CTA and its offset.
    Object(usize, u64),
    /// An address that is watched.
    Address(u64),
}

/// A barrier object whose `init` not all warps come after.
#[derive(Clone, Debug)]
pub struct Fresh {
    slot: usize,
    offset: u64,
    origin: Origin,
    /// Warps that come after the `init`, by the place of their CTA.
    after: Vec<u32>,
    /// Whether one of them has executed a fence since.
    fenced: bool,
    /// Where they have released it.
    at: Vec<Meeting>,
}

impl Fresh {
    fn knows(&self, slot: usize, warp: usize) -> bool {
        self.after.get(slot).is_some_and(|m| m >> warp & 1 == 1)
    }

    fn learn(&mut self, slot: usize, warps: u32) {
        if self.after.len() <= slot {
            self.after.resize(slot + 1, 0);
        }
        self.after[slot] |= warps;
    }
}

impl Shared {
    /// A warp tells who comes to a meeting later what it comes after.
    pub fn release(&mut self, slot: usize, warp: usize, meeting: Meeting) {
        for f in self.fresh.iter_mut().filter(|f| f.knows(slot, warp) && !f.at.contains(&meeting)) {
            f.at.push(meeting);
        }
    }

    /// Warps of a CTA come after everybody who released something at a meeting.
    pub fn acquire(&mut self, slot: usize, warps: u32, meeting: Meeting) {
        for f in self.fresh.iter_mut().filter(|f| f.at.contains(&meeting)) {
            f.learn(slot, warps);
        }
    }

    /// A barrier of a CTA lets warps go.
    pub fn depart(&mut self, slot: usize, warps: u32, id: u32) {
        let meeting = Meeting::Barrier(slot, id);
        self.acquire(slot, warps, meeting);
        self.fresh.iter_mut().for_each(|f| f.at.retain(|m| *m != meeting));
    }
}

impl Cta<'_> {
    /// A barrier object is made.
    pub(super) fn made(&mut self, slot: usize, offset: u64, origin: Origin) {
        let mut f = Fresh { slot, offset, origin, after: Vec::new(), fenced: false, at: Vec::new() };
        f.learn(self.at, 1 << origin.warp);
        self.hopper.fresh.push(f);
    }

    /// A barrier object is no more.
    pub(super) fn unmade(&mut self, slot: usize, offset: u64) {
        self.hopper.fresh.retain(|f| (f.slot, f.offset) != (slot, offset));
    }

    /// Forgets objects that all warps of their cluster come after.
    pub(in crate::exec) fn settle(&mut self) {
        let (warps, ranks) = (self.shape.block_threads().div_ceil(LANES), self.shape.cluster_size());
        let all = ones(warps as u32) as u32;
        let resident = &self.resident;
        self.hopper.fresh.retain(|f| {
            let first = f.slot - resident[f.slot].cluster_rank;
            (first..first + ranks).any(|s| f.after.get(s).is_none_or(|m| m & all != all))
        });
    }

    /// Checks that the running warp comes after the `init` of the object it uses.
    pub(super) fn reach(&self, h: &Here<'_>, slot: usize, offset: u64, lane: usize) -> Result<(), LaneFault> {
        let object = |f: &&Fresh| (f.slot, f.offset) == (slot, offset);
        match self.hopper.fresh.iter().find(object) {
            Some(f) if !f.knows(self.at, h.warp) => {
                let m = format!(
                    "used by thread {}, but nothing orders that after its mbarrier.init by thread {} ({}): a barrier has to come between",
                    h.warp * LANES + lane,
                    f.origin.warp * LANES + f.origin.lane,
                    line(h.p, f.origin.pc)
                );
                Err(misuse(lane, offset, m))
            }
            _ => Ok(()),
        }
    }

    /// A fence of the running warp.
    pub(in crate::exec) fn fence_objects(&mut self, warp: usize) {
        let at = self.at;
        self.hopper.fresh.iter_mut().filter(|f| f.knows(at, warp)).for_each(|f| f.fenced = true);
    }

    /// A strong access: who reads what was written behind a fence comes after what stands before that.
    #[inline(never)]
    pub(in crate::exec) fn watched(
        &mut self,
        i: &Inst,
        warp: usize,
        (space, at, mask): (Space, &[u64; LANES], u32),
        kind: Kind,
    ) {
        if i.order & STRONG == 0 || self.hopper.fresh.is_empty() {
            return;
        }
        for l in lanes(mask) {
            let shared = match space {
                Space::Shared | Space::Cluster => true,
                Space::Generic => at[l] >> 44 == SHARED >> 44,
                _ => false,
            };
            let meeting = Meeting::Address(if shared { at[l] & 0xff_ffff | 1 << 63 } else { at[l] });
            let own = self.at;
            if kind != Kind::Write {
                self.hopper.acquire(own, 1 << warp, meeting);
            }
            if kind != Kind::Read {
                for f in self.hopper.fresh.iter_mut() {
                    if f.knows(own, warp) && (f.fenced || i.order & RELEASE != 0) && !f.at.contains(&meeting) {
                        f.at.push(meeting);
                    }
                }
            }
        }
    }
}
