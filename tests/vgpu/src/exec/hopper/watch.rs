//! Ordinary accesses to shared memory, as checked against what is asynchronous.

use super::act::line;
use super::rank_of;
use crate::error::FaultKind;
use crate::exec::LANES;
use crate::exec::launch::Cta;
use crate::exec::mem::{LaneFault, SHARED, Space, lanes};

impl Cta<'_> {
    /// An ordinary write of `bytes` by each lane: nothing asynchronous may use these bytes. Notes it for the proxy checks.
    #[inline(never)]
    pub(in crate::exec) fn watch(
        &mut self,
        warp: usize,
        space: Space,
        at: &[u64; LANES],
        bytes: u64,
        mask: u32,
    ) -> Result<(), LaneFault> {
        for lane in lanes(mask) {
            let a = match space {
                Space::Shared | Space::Cluster => at[lane],
                Space::Generic if at[lane] >> 44 == SHARED >> 44 => at[lane] - SHARED,
                _ => continue,
            };
            let own = self.resident[self.at].cluster_rank as u32;
            let rank = if space == Space::Shared { own } else { rank_of(a, own) };
            let (start, end) = (a & 0xff_ffff, (a & 0xff_ffff) + bytes);
            // Wrong addresses are found by the access itself.
            let Some(slot) = self.slot_of(rank).filter(|s| end <= self.resident[*s].shared.len) else {
                continue;
            };
            if let Some((kind, m, pc)) = self.resident[slot].hopper.conflict(start, end, true) {
                let m = format!("a store to {m} ({})", line(self.program, pc));
                return Err((lane, kind, m));
            }
            // Warps of other blocks have no fences here: their stores count as the reader's own to fence.
            let warp = if slot == self.at { warp } else { 0 };
            self.resident[slot].hopper.stored(start, end, warp);
        }
        Ok(())
    }

    /// Why bytes of this block's shared memory count as never written, when something asynchronous is the reason.
    pub(in crate::exec) fn explain(&self, start: u64, bytes: u64) -> Option<(FaultKind, String)> {
        if !self.program.asynchronous {
            return None;
        }
        let (kind, m, pc) = self.resident[self.at].hopper.explain(start, start + bytes)?;
        Some((kind, format!("{m} ({})", line(self.program, pc))))
    }
}
