//! Executes an instruction of the set for a warp.

use super::state::{Blocked, Origin};
use super::{Op, rank_of};
use crate::error::FaultKind;
use crate::exec::decode::Program;
use crate::exec::launch::Cta;
use crate::exec::mem::{LaneFault, SHARED, Space, lanes};
use crate::exec::warp::{Step, Warp};

/// What an instruction works with beside its operands.
pub(super) struct Here<'p> {
    /// The program.
    pub p: &'p Program,
    /// Warp of the CTA.
    pub warp: usize,
    /// Position in the program.
    pub pc: usize,
    /// Lanes that execute it.
    pub active: u32,
    /// Whether the warp has tried it before and waited since.
    pub again: bool,
}

impl Here<'_> {
    pub fn origin(&self, lane: usize) -> Origin {
        Origin { pc: self.pc, warp: self.warp, lane }
    }

    /// First active lane.
    pub fn first(&self) -> usize {
        self.active.trailing_zeros() as usize & 31
    }

    /// A fault of the whole warp.
    pub fn fault(&self, kind: FaultKind, message: impl Into<String>) -> LaneFault {
        (self.first(), kind, message.into())
    }
}

/// "PTX line n" of a position in the program.
pub(super) fn line(p: &Program, pc: usize) -> String {
    p.source.get(pc).map_or_else(|| "an unknown line".to_string(), |s| format!("PTX line {}", s.line))
}

/// Runs one instruction.
pub(in crate::exec) fn run(
    op: &Op,
    warp: &mut Warp,
    p: &Program,
    cta: &mut Cta<'_>,
    index: usize,
    pc: usize,
    active: u32,
) -> Result<Step, LaneFault> {
    let h = Here { p, warp: index, pc, active, again: warp.hopper.blocked.take().is_some() };
    // Others run once before anything asynchronous is known to be complete, so that what is released too early is seen.
    let late = match op {
        Op::Wait(_) => cta.own().hopper.products.iter().any(|q| q.warp == index),
        Op::WaitCopies { .. } => cta.own().hopper.holds.iter().any(|x| x.origin.warp == index),
        _ => false,
    };
    warp.hopper.let_others = late && !warp.hopper.let_others;
    if warp.hopper.let_others {
        return Ok(Step::Again);
    }
    match op {
        Op::Product(x) => cta.product(&h, warp, x)?,
        Op::Fence | Op::Commit | Op::Wait(_) => {
            if active != u32::MAX {
                return Err(h.fault(FaultKind::Warpgroup, format!("only lanes {active:#010x} of the warp are here")));
            }
            match op {
                Op::Fence => warp.hopper.registers.fence(),
                Op::Commit => warp.hopper.registers.commit(),
                Op::Wait(keep) => {
                    let first = warp.hopper.registers.wait(*keep);
                    cta.own().hopper.products.retain(|q| q.warp != index || q.group >= first);
                }
                _ => {}
            }
        }
        Op::Barrier(x) => return cta.barrier_op(&h, warp, x),
        Op::Copy(x) => cta.bulk_copy(&h, warp, x)?,
        Op::CommitCopies => lanes(active).for_each(|l| cta.commit_copies(&h, l)),
        Op::WaitCopies { keep, read } => {
            for l in lanes(active) {
                cta.wait_copies(&h, l, *keep, *read)?;
            }
        }
        Op::ProxyFence => cta.own().hopper.proxy_fence(index),
        Op::Registers { grow, count } => return cta.set_registers(&h, warp, *grow, *count),
        Op::ClusterArrive { aligned } => cta.cluster_arrive(&h, warp, *aligned)?,
        Op::ClusterWait { aligned } => return cta.cluster_wait(&h, warp, *aligned),
        Op::StoreAsync { to, bar, value, element, reduction } => {
            cta.store_async(&h, warp, to, bar, value, *element, *reduction)?
        }
    }
    Ok(Step::Next)
}

impl Cta<'_> {
    /// Place on this host thread of the CTA of a rank of the running warp's cluster.
    pub(super) fn slot_of(&self, rank: u32) -> Option<usize> {
        let own = &self.resident[self.at];
        let slot = (self.at - own.cluster_rank) + rank as usize;
        ((rank as usize) < self.shape.cluster_size()).then_some(slot)
    }

    /// CTA and offset of a shared address, checked for bounds and alignment.
    pub(in crate::exec) fn shared_place(
        &self,
        space: Space,
        address: u64,
        bytes: u64,
        align: u64,
        lane: usize,
    ) -> Result<(usize, u64), LaneFault> {
        let own = self.resident[self.at].cluster_rank as u32;
        let (rank, offset) = match space {
            Space::Generic if address >> 44 != SHARED >> 44 => {
                let m = format!("generic address {address:#x} is not in shared memory");
                return Err((lane, FaultKind::OutOfBounds, m));
            }
            Space::Generic | Space::Cluster => {
                let a = address & ((1 << 44) - 1);
                (rank_of(a, own), a & 0xff_ffff)
            }
            _ => (own, address),
        };
        let Some(slot) = self.slot_of(rank) else {
            let m = format!("address {address:#x} is in block {rank} of a cluster of {}", self.shape.cluster_size());
            return Err((lane, FaultKind::OutOfBounds, m));
        };
        let to = &self.resident[slot];
        if slot != self.at && to.live == 0 {
            let m = format!("shared memory of block {:?}, which has returned", to.index);
            return Err((lane, FaultKind::UseAfterFree, m));
        }
        if offset > to.shared.len || to.shared.len - offset < bytes {
            let m = format!("{bytes} bytes at offset {offset} of {} bytes of shared memory", to.shared.len);
            return Err((lane, FaultKind::OutOfBounds, m));
        }
        if !offset.is_multiple_of(align) {
            let m = format!("shared offset {offset:#x} is not a multiple of {align}");
            return Err((lane, FaultKind::Misaligned, m));
        }
        Ok((slot, offset))
    }

    /// Why a warp waits, for reports.
    pub(in crate::exec) fn describe_wait(&self, slot: usize, warp: usize, b: Blocked) -> String {
        let s = &self.resident[slot].hopper;
        match b {
            Blocked::Barrier(at) => match s.barriers.get(&at) {
                Some(l) => format!("waits at the mbarrier at shared offset {at:#x} ({})", l.barrier),
                None => format!("waits at shared offset {at:#x}, which holds no mbarrier"),
            },
            Blocked::Registers(n) => s.describe_registers(warp, n),
            Blocked::Cluster => "waits at the barrier of the cluster".to_string(),
        }
    }
}
