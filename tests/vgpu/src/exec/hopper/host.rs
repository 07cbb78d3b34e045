//! The scheduler's part: what happens when nobody can go on, and when warps and blocks return.

use super::act::line;
use super::state::Blocked;
use crate::error::{Fault, FaultKind};
use crate::exec::schedule::Host;

/// Rounds without any change, in each of which every wait gave up once, before it is called a deadlock.
const PATIENCE: u32 = 16;

impl Host<'_> {
    /// After a round. When every warp waits for something asynchronous and nothing changes any more, waits give up for a
    /// round (`try_wait` may return false at any time, and some programs do other work then); when that does not help
    /// either, it is a deadlock.
    pub(in crate::exec) fn idle(&mut self, moved: bool) -> Result<(), Fault> {
        self.cta.hopper.timeout = None;
        self.cta.hopper.round += 1;
        if moved {
            return Ok(());
        }
        let mut stuck = None;
        for (slot, warps) in self.warps.iter().enumerate() {
            for (w, warp) in warps.iter().enumerate().filter(|(_, w)| !w.done) {
                if let Some(b) = warp.hopper.blocked {
                    // Registers that can never be had explain every other wait.
                    let cause = matches!(b, Blocked::Registers(_));
                    if cause || stuck.is_none() {
                        stuck = Some((slot, w));
                    }
                } else if warp.waiting.is_none() {
                    // It looks at memory in a loop: the watchdog's case.
                    return Ok(());
                }
            }
        }
        let Some((slot, w)) = stuck else { return Ok(()) };
        let shared = &mut self.cta.hopper;
        let rounds = if shared.stalled.0 == shared.events { shared.stalled.1 + 1 } else { 0 };
        shared.stalled = (shared.events, rounds);
        shared.timeout = Some(shared.round);
        if rounds < PATIENCE {
            return Ok(());
        }
        let warp = &self.warps[slot][w];
        let m = format!("no warp can go on{}", self.report());
        Err(self.fault(slot, w, (warp.pc(), (warp.first_lane(), FaultKind::Deadlock, m))))
    }

    /// A warp has returned, perhaps the last one of its block.
    pub(in crate::exec) fn returned(&mut self, slot: usize, w: usize) -> Result<(), Fault> {
        let p = self.cta.program;
        if !p.asynchronous {
            return Ok(());
        }
        self.cta.hopper.events += 1;
        let resident = &mut self.cta.resident[slot];
        let state = &mut resident.hopper;
        state.gone[w] = true;
        state.cluster_arrived[w] = true;
        let (live, rank) = (resident.live, resident.cluster_rank);
        let fail = |pc: usize, warp: usize, lane: usize, kind: FaultKind, m: String| (pc, warp, (lane, kind, m));
        let mut wrong = None;
        if let Some(q) = state.products.iter().find(|q| q.warp == w) {
            let m = "the warp returns before wgmma.wait_group has waited for this product".to_string();
            wrong = Some(fail(q.pc, w, 0, FaultKind::Warpgroup, m));
        }
        if live == 0 && wrong.is_none() {
            let uneven = state.groups.iter().enumerate().find_map(|(g, group)| {
                let most = group.issued.iter().max().copied().unwrap_or(0);
                let least = group.issued.iter().position(|n| *n < most)?;
                Some((4 * g + least, group.issued[least], most, group.log.front().map_or(0, |l| l.0)))
            });
            if let Some((warp, n, most, pc)) = uneven {
                let m = format!(
                    "warp {warp} has issued {n} products, another warp of its warpgroup {most}: all four have to execute each"
                );
                wrong = Some(fail(pc, warp, 0, FaultKind::Warpgroup, m));
            } else if let Some(l) = state.loads.first() {
                let m = "the block returns while this copy into its shared memory is in flight".to_string();
                wrong = Some(fail(l.origin.pc, l.origin.warp, l.origin.lane, FaultKind::InFlight, m));
            } else if let Some(h) = state.holds.first() {
                let m = "the block returns before cp.async.bulk.wait_group has waited until its shared memory was read";
                wrong = Some(fail(h.origin.pc, h.origin.warp, h.origin.lane, FaultKind::InFlight, m.to_string()));
            }
        }
        if let Some((pc, warp, e)) = wrong {
            return Err(self.fault(slot, warp, (pc, e)));
        }
        if live == 0 {
            let writes = std::mem::take(&mut state.writes);
            let origin = writes.first().map(|x| x.origin).unwrap_or_default();
            if let Err((kind, m)) = self.cta.flush(writes) {
                let m = format!("{m} (bulk copy of {})", line(p, origin.pc));
                return Err(self.fault(slot, origin.warp, (origin.pc, (origin.lane, kind, m))));
            }
        }
        self.cta.cluster_turn(slot - rank);
        Ok(())
    }
}
