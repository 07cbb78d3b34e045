//! What is asynchronous in a CTA and what its warps share of it.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::bulk::Reduction;
use super::bytes::Bytes;
use super::descriptor::Operand;
use super::mbarrier::{self, Barrier};
use super::track;
use crate::error::FaultKind;
use crate::tensor_map::TensorMap;

/// Who did something: position in the program, warp, lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Position in the program.
    pub pc: usize,
    /// Warp of the CTA.
    pub warp: usize,
    /// Lane.
    pub lane: usize,
}

/// An initialised barrier object.
#[derive(Clone, Copy, Debug)]
pub struct Live {
    /// The counts.
    pub barrier: Barrier,
    /// Who initialised it.
    pub origin: Origin,
}

/// What a copy into shared memory brings.
#[derive(Clone, Debug)]
pub enum Cargo {
    /// A box of a tensor.
    Tensor(Box<TensorMap>, [i64; 5]),
    /// Bytes of global memory.
    Global(u64),
    /// Bytes taken when the copy was issued.
    Taken(Bytes),
}

/// A copy into shared memory that was not delivered.
#[derive(Clone, Debug)]
pub struct Load {
    /// First byte.
    pub to: u64,
    /// Bytes of shared memory it covers, holes included.
    pub span: u64,
    /// Barrier object in the same CTA.
    pub bar: u64,
    /// Bytes that are counted there.
    pub bytes: u32,
    /// What it brings.
    pub cargo: Cargo,
    /// How it combines with what is there.
    pub reduction: Option<Reduction>,
    /// Who issued it.
    pub origin: Origin,
    /// Hold on the source (CTA on this host thread, hold number), for copies between blocks.
    pub hold: Option<(usize, u64)>,
}

/// A range of shared memory that a copy may still read.
#[derive(Clone, Copy, Debug)]
pub struct Hold {
    /// Number, to find it again.
    pub id: u64,
    /// First byte and end.
    pub range: (u64, u64),
    /// Who issued the copy.
    pub origin: Origin,
    /// Bulk group of that thread; `None` while uncommitted or when a barrier tells the end.
    pub group: Option<u32>,
    /// Whether bulk groups tell the end.
    pub grouped: bool,
}

/// Bytes on their way to global memory.
#[derive(Clone, Debug)]
pub struct Write {
    /// Rows: address and bytes.
    pub rows: Vec<(u64, Bytes)>,
    /// How they combine with what is there.
    pub reduction: Option<Reduction>,
    /// Who issued the copy.
    pub origin: Origin,
    /// Bulk group of that thread.
    pub group: Option<u32>,
}

/// A product that may still read shared memory.
#[derive(Clone, Debug)]
pub struct InFlight {
    /// The warp; each reads its own rows of A and all of B.
    pub warp: usize,
    /// Its product group.
    pub group: u32,
    /// What it reads.
    pub operand: Operand,
    /// Lowest byte and end of that.
    pub range: (u64, u64),
    /// Position in the program.
    pub pc: usize,
}

/// What the four warps of a warpgroup must agree on: the products in order.
#[derive(Clone, Debug, Default)]
pub struct Warpgroup {
    /// Position, descriptors of A and B, whether D is added; the oldest that not all warps have issued first.
    pub log: VecDeque<(usize, u64, u64, bool)>,
    /// Products before the log.
    pub base: usize,
    /// Products issued by each warp.
    pub issued: [usize; 4],
    /// `setmaxnreg` executed by each warp, as (position, count) of the last one and how many.
    pub registers: [(usize, usize); 4],
}

/// Asynchronous state of one CTA.
#[derive(Default)]
pub struct State {
    /// Barrier objects by offset.
    pub barriers: BTreeMap<u64, Live>,
    /// Copies into shared memory.
    pub loads: Vec<Load>,
    /// Ranges that copies may still read.
    pub holds: Vec<Hold>,
    /// Bytes on their way to global memory.
    pub writes: Vec<Write>,
    /// Products in flight.
    pub products: Vec<InFlight>,
    /// Warpgroups.
    pub groups: Vec<Warpgroup>,
    /// Bulk groups committed by each thread (warp, lane).
    pub committed: HashMap<(usize, usize), u32>,
    /// Clock of the last ordinary store to each 16-byte piece and its warp; zero where there was none, or a copy since.
    stamps: Vec<u32>,
    /// Range in which ordinary stores were.
    stamped: (u64, u64),
    /// Counts fences, from 1.
    clock: u32,
    /// Clock after the last `fence.proxy.async` of each warp.
    fences: Vec<u32>,
    /// Registers per thread of each warp; empty when `setmaxnreg` has no effect.
    pub registers: Vec<u32>,
    /// Sum of the registers per thread of all warps at launch.
    pub pool: u32,
    /// Warps that have arrived at the cluster barrier in its present phase.
    pub cluster_arrived: Vec<bool>,
    /// Warps that have returned.
    pub gone: Vec<bool>,
    next_hold: u64,
}

/// What a host thread keeps for all of its CTAs.
#[derive(Default)]
pub struct Shared {
    /// Grows with everything that may let a waiting warp go on.
    pub events: u64,
    /// `events` when last nobody could go on, and how often in a row without a change.
    pub stalled: (u64, u32),
    /// Number of the round in which waits give up, each warp's once; none otherwise.
    pub timeout: Option<u64>,
    /// Rounds.
    pub round: u64,
    /// Completed phases of the cluster barrier, by the place of the CTA of rank 0.
    pub cluster_phase: HashMap<usize, u64>,
    /// Barrier objects whose `init` not all warps come after.
    pub fresh: Vec<super::visible::Fresh>,
}

/// What a warp waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocked {
    /// A phase of the barrier at an offset.
    Barrier(u64),
    /// Registers of the pool.
    Registers(u32),
    /// The cluster.
    Cluster,
}

/// What a warp keeps.
#[derive(Default)]
pub struct WarpState {
    /// Registers of products.
    pub registers: track::Registers,
    /// What it waits for.
    pub blocked: Option<Blocked>,
    /// Whether it stands at a wait that could complete, but lets others run first.
    pub let_others: bool,
    /// Round in which it last gave up waiting.
    pub gave_up: Option<u64>,
    /// Phase of the cluster barrier it has arrived in and not waited for.
    pub cluster: Option<u64>,
}

impl WarpState {
    /// As a warp starts.
    pub fn reset(&mut self, tracked: usize) {
        self.registers.reset(tracked);
        (self.blocked, self.cluster, self.gave_up) = (None, None, None);
        self.let_others = false;
    }
}

const WARP_BITS: u32 = 6;

impl State {
    /// As a CTA of `warps` warps and `shared` bytes starts.
    pub fn reset(&mut self, warps: usize, shared: u64) {
        let (mut stamps, clock) = (std::mem::take(&mut self.stamps), 1);
        stamps.clear();
        stamps.resize(shared.div_ceil(16) as usize, 0);
        *self = State {
            stamps,
            clock,
            fences: vec![0; warps],
            groups: vec![Warpgroup::default(); warps.div_ceil(4)],
            cluster_arrived: vec![false; warps],
            gone: vec![false; warps],
            ..State::default()
        };
    }

    /// Whether stores are followed at all.
    pub fn keeps_stamps(&self) -> bool {
        !self.stamps.is_empty()
    }

    /// An ordinary store of `warp` to a range.
    pub fn stored(&mut self, start: u64, end: u64, warp: usize) {
        // Kernels without asynchronous instructions keep no stamps; addresses out of range fail elsewhere.
        if end.div_ceil(16) as usize > self.stamps.len() {
            return;
        }
        let stamp = self.clock << WARP_BITS | warp as u32;
        self.stamps[(start / 16) as usize..end.div_ceil(16) as usize].fill(stamp);
        let (low, high) = self.stamped;
        self.stamped = if low == high { (start, end) } else { (low.min(start), high.max(end)) };
    }

    /// A copy has written a range.
    pub fn copied(&mut self, start: u64, end: u64) {
        if !self.unstamped(start, end) {
            self.stamps[(start / 16) as usize..end.div_ceil(16) as usize].fill(0);
        }
    }

    /// `fence.proxy.async` by a warp.
    pub fn proxy_fence(&mut self, warp: usize) {
        self.clock += 1;
        self.fences[warp] = self.clock;
    }

    /// Whether no ordinary store was in a range.
    pub fn unstamped(&self, start: u64, end: u64) -> bool {
        let (low, high) = self.stamped;
        end <= low || high <= start
    }

    /// The warp whose ordinary store to the piece at `address` was not fenced by it or by the reader.
    #[inline]
    pub fn unfenced(&self, address: u64, reader: usize) -> Option<usize> {
        let stamp = self.stamps[(address / 16) as usize];
        if stamp == 0 {
            return None;
        }
        let (clock, writer) = (stamp >> WARP_BITS, (stamp & ((1 << WARP_BITS) - 1)) as usize);
        let fenced = self.fences[writer] > clock || self.fences.get(reader).is_some_and(|f| *f > clock);
        (!fenced).then_some(writer)
    }

    /// A new hold number.
    pub fn hold(&mut self) -> u64 {
        self.next_hold += 1;
        self.next_hold
    }

    /// What forbids writing a range now: a product or a copy that may read or write it, or a barrier object. The position
    /// in the program is of what is in the way.
    pub fn conflict(&self, start: u64, end: u64, barriers_too: bool) -> Option<(FaultKind, String, usize)> {
        if barriers_too
            && let Some((at, b)) = self.barriers.range(start.saturating_sub(mbarrier::BYTES - 1)..end).next()
        {
            let m = format!("bytes of the mbarrier at shared offset {at:#x}");
            return Some((FaultKind::Mbarrier, m, b.origin.pc));
        }
        let hits = |r: (u64, u64)| start < r.1 && r.0 < end;
        if let Some(p) = self.products.iter().find(|p| hits(p.range) && p.operand.overlaps(start, end)) {
            let m = "an operand of a wgmma that wgmma.wait_group has not waited for".to_string();
            return Some((FaultKind::InFlight, m, p.pc));
        }
        if let Some(h) = self.holds.iter().find(|h| hits(h.range)) {
            let m = if h.grouped {
                "the source of a bulk copy that cp.async.bulk.wait_group has not waited for"
            } else {
                "the source of a bulk copy whose barrier is not complete"
            };
            return Some((FaultKind::InFlight, m.to_string(), h.origin.pc));
        }
        let l = self.loads.iter().find(|l| hits((l.to, l.to + l.span)))?;
        let m = "the destination of a bulk copy whose barrier is not complete".to_string();
        Some((FaultKind::InFlight, m, l.origin.pc))
    }

    /// Why bytes count as never written, if it is for something asynchronous.
    pub fn explain(&self, start: u64, end: u64) -> Option<(FaultKind, String, usize)> {
        if let Some((at, b)) = self.barriers.range(start.saturating_sub(mbarrier::BYTES - 1)..end).next() {
            let m = format!("an ordinary read of the mbarrier at shared offset {at:#x}");
            return Some((FaultKind::Mbarrier, m, b.origin.pc));
        }
        let l = self.loads.iter().find(|l| start < l.to + l.span && l.to < end)?;
        let m = "a read of the destination of a bulk copy whose barrier is not complete".to_string();
        Some((FaultKind::InFlight, m, l.origin.pc))
    }
}
