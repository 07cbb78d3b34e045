//! The barrier of a cluster.

use super::act::Here;
use super::state::Blocked;
use super::visible::Meeting;
use crate::error::FaultKind;
use crate::exec::launch::Cta;
use crate::exec::mem::LaneFault;
use crate::exec::warp::{Step, Warp};

impl Cta<'_> {
    fn first_of_cluster(&self) -> usize {
        self.at - self.resident[self.at].cluster_rank
    }

    /// `barrier.cluster.arrive`.
    pub(super) fn cluster_arrive(&mut self, h: &Here<'_>, warp: &mut Warp, aligned: bool) -> Result<(), LaneFault> {
        // Arrivals are counted by warps: the lanes of one have to come together.
        if h.active != warp.live {
            let what = if aligned { "an aligned" } else { "a" };
            let m = format!("{what} cluster barrier in lanes {:#010x} of the live {:#010x}", h.active, warp.live);
            return Err(h.fault(FaultKind::DivergentBarrier, m));
        }
        let first = self.first_of_cluster();
        let phase = self.hopper.cluster_phase.get(&first).copied().unwrap_or(0);
        if warp.hopper.cluster.is_some() {
            let m = "a second barrier.cluster.arrive without barrier.cluster.wait between";
            return Err(h.fault(FaultKind::Barrier, m));
        }
        warp.hopper.cluster = Some(phase);
        self.own().hopper.cluster_arrived[h.warp] = true;
        let own = self.at;
        self.hopper.release(own, h.warp, Meeting::Cluster(first));
        self.counters.barriers += 1;
        self.hopper.events += 1;
        self.cluster_turn(first);
        Ok(())
    }

    /// Ends the phase when every warp that has not returned has arrived.
    pub(in crate::exec) fn cluster_turn(&mut self, first: usize) {
        let n = self.shape.cluster_size();
        let missing = self.resident[first..first + n].iter().any(|r| r.hopper.cluster_arrived.iter().any(|a| !a));
        if !missing {
            *self.hopper.cluster_phase.entry(first).or_insert(0) += 1;
            self.hopper.events += 1;
            for r in &mut self.resident[first..first + n] {
                // Warps that have returned count as arrived in every later phase.
                let gone = &r.hopper.gone;
                r.hopper.cluster_arrived.iter_mut().zip(gone).for_each(|(a, g)| *a = *g);
            }
        }
    }

    /// `barrier.cluster.wait`.
    pub(super) fn cluster_wait(&mut self, h: &Here<'_>, warp: &mut Warp, aligned: bool) -> Result<Step, LaneFault> {
        if h.active != warp.live {
            let what = if aligned { "an aligned" } else { "a" };
            let m = format!("{what} cluster barrier in lanes {:#010x} of the live {:#010x}", h.active, warp.live);
            return Err(h.fault(FaultKind::DivergentBarrier, m));
        }
        let Some(mine) = warp.hopper.cluster else {
            return Err(h.fault(FaultKind::Barrier, "barrier.cluster.wait without barrier.cluster.arrive before it"));
        };
        let phase = self.hopper.cluster_phase.get(&self.first_of_cluster()).copied().unwrap_or(0);
        if phase == mine {
            warp.hopper.blocked = Some(Blocked::Cluster);
            return Ok(Step::Again);
        }
        warp.hopper.cluster = None;
        let (own, first) = (self.at, self.first_of_cluster());
        self.hopper.acquire(own, 1 << h.warp, Meeting::Cluster(first));
        self.settle();
        Ok(Step::Next)
    }
}
