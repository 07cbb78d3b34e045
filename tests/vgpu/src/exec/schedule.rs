//! Which warp runs next: the CTAs resident on a host thread, their barriers, the watchdog, and reports of deadlock.
//!
//! Warps run in turn until they wait, return, look at memory in a loop, or their slice is over. Usually one CTA is
//! resident at a time; when every warp of it only polls, the next CTA joins it, so that kernels whose CTAs wait for
//! later ones come to an end. The CTAs of a cluster, and all CTAs of a cooperative launch, are resident together.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::barrier::{Barriers, Reduce};
use super::counters::Counters;
use super::decode::{Program, RowInit};
use super::hopper::visible::Meeting;
use super::launch::{Cta, Queue, Random, Resident, Shape};
use super::mem::LaneFault;
use super::races::Races;
use super::region::Region;
use super::site::{Site, WARPS};
use super::tensor::Widened;
use super::warp::{At, Stop, Warp};
use super::{LANES, Lane};
use crate::error::{Fault, FaultKind};
use crate::memory::Memory;
use crate::output::Output;

/// Instructions one warp runs before the next one gets its turn.
const SLICE: u64 = 100_000;
/// Rounds in which every warp only polled and no memory changed before another CTA joins. Lanes that wait for others of
/// their warp go on alone only after hundreds of times as many.
const PATIENCE: u32 = 64;
/// What a poll counts for the watchdog beside its instructions: its time goes to the scheduler.
const POLL_COST: u64 = 64;
/// Instructions after which a warp that has polled is no longer taken for one that only polls.
const POLLING: u64 = 10_000;
/// Times [`PATIENCE`] after which a launch whose next block finds no room is called a deadlock; lanes that wait for others of their warp
/// go on alone before that.
const FULL: u32 = 16;

/// Registers, regions and memories of addresses that a kernel's launches hand on to each other.
pub struct Pooled {
    resident: Vec<Resident>,
    warps: Vec<Vec<Warp>>,
    sites: Vec<Site>,
}

/// A host thread in a launch.
pub struct Host<'a> {
    p: &'a Program,
    shape: &'a Shape,
    /// What warps reach.
    pub cta: Cta<'a>,
    pub(super) warps: Vec<Vec<Warp>>,
    spare: Vec<(Resident, Vec<Warp>)>,
    /// The warps in the order of the present round.
    turns: Vec<(usize, usize)>,
    random: Option<Random>,
    /// The deadlock that it is if nothing moves any more, while the next CTA finds no room.
    full: Option<Fault>,
}

type Stopped = Result<(), (usize, Fault)>;

impl<'a> Host<'a> {
    /// An idle host thread.
    pub fn new(
        p: &'a Program,
        memory: &'a Memory,
        params: &'a Region,
        shape: &'a Shape,
        output: &'a Output,
    ) -> Host<'a> {
        let pooled = p.pool.lock().unwrap_or_else(|e| e.into_inner()).pop();
        let (spare, mut sites) = match pooled {
            Some(x) => (x.resident.into_iter().zip(x.warps).collect(), x.sites),
            None => (Vec::new(), Vec::new()),
        };
        sites.resize_with(p.sites * WARPS, Site::default);
        // Allocations may have come and gone since the last launch.
        sites.iter_mut().for_each(|s| s.block = (0, 0, 0));
        let cta = Cta {
            memory,
            params,
            shape,
            output,
            resident: Vec::new(),
            at: 0,
            local_size: p.local_size,
            sites,
            counters: Counters::default(),
            runs: vec![[0; 2]; p.code.len() + 1],
            carried: Default::default(),
            guarded: 0,
            issued: 0,
            changes: 0,
            pc: 0,
            widened: Box::new((Widened([[[0.0; LANES]; 2]; 4]), [usize::MAX; 3])),
            races: shape.races.then(Races::default),
            program: p,
            hopper: Default::default(),
        };
        let mut host = Host {
            p,
            shape,
            cta,
            warps: Vec::new(),
            spare,
            turns: Vec::new(),
            random: shape.seed.map(Random),
            full: None,
        };
        for (_, warps) in &mut host.spare {
            // Another launch may have had another shape.
            warps.clear();
        }
        host
    }

    /// Gives registers and regions back for the kernel's next launch.
    pub fn retire(mut self) {
        self.clear();
        let (resident, warps) = self.spare.into_iter().unzip();
        let pooled = Pooled { resident, warps, sites: self.cta.sites };
        self.p.pool.lock().unwrap_or_else(|e| e.into_inner()).push(pooled);
    }

    fn clear(&mut self) {
        self.cta.carried.clear();
        self.cta.hopper.fresh.clear();
        self.spare.extend(self.cta.resident.drain(..).zip(self.warps.drain(..)));
    }

    /// Runs CTAs until there are none left. A fault comes with the place of its CTA in the order of the launch.
    pub fn run(&mut self, queue: &Queue, spent: &AtomicU64, index: usize, threads: usize) -> Stopped {
        if self.shape.cooperative {
            // Every host thread holds its share of the CTAs from the start.
            let mine = queue.total().div_ceil(threads);
            let mut first = None;
            for _ in 0..mine {
                let Some((place, n)) = queue.take() else { break };
                first.get_or_insert(place);
                self.admit(n);
            }
            return match first {
                Some(place) => self.rounds(None, spent).map_err(|f| (place, f)),
                None => Ok(()),
            };
        }
        let _ = index;
        while let Some((place, n)) = queue.take() {
            self.clear();
            self.admit(n);
            self.rounds(Some(queue), spent).map_err(|f| (place, f))?;
        }
        Ok(())
    }

    /// Makes the CTAs of a cluster resident.
    fn admit(&mut self, cluster: usize) {
        for (rank, index) in self.shape.cluster_blocks(cluster).into_iter().enumerate() {
            let (p, shared) = (self.p, (self.p.dynamic_offset + self.shape.dynamic_shared) as u64);
            let threads = self.shape.block_threads();
            let n_warps = threads.div_ceil(LANES);
            let local = (n_warps * LANES * p.local_size) as u64;
            let (mut resident, mut warps) = self.spare.pop().unwrap_or_else(|| {
                let r = Resident {
                    index,
                    cluster_rank: rank,
                    shared: Region::new(0, 0),
                    local: Region::new(0, 0),
                    barriers: Barriers::default(),
                    live: 0,
                    copies_in_flight: 0,
                    hopper: Default::default(),
                };
                (r, Vec::new())
            });
            resident.index = index;
            resident.cluster_rank = rank;
            resident.shared.reset(shared);
            resident.local.reset(local);
            (resident.shared.alone, resident.local.alone) = (true, true);
            resident.barriers = Barriers::default();
            resident.live = n_warps;
            resident.copies_in_flight = 0;
            if p.asynchronous {
                resident.hopper.reset(n_warps, shared);
            }
            let fresh = warps.is_empty();
            warps.resize_with(n_warps, Warp::default);
            for (w, warp) in warps.iter_mut().enumerate() {
                if fresh {
                    warp.regs.w.resize(p.rows[0], [0; LANES]);
                    warp.regs.q.resize(p.rows[1], [0; LANES]);
                    warp.regs.p.resize(p.rows[2], 0);
                }
                self.rows(warp, w, index, fresh);
                let here = (threads - w * LANES).min(LANES);
                warp.hopper.reset(p.tracked);
                warp.start(if here == LANES { u32::MAX } else { (1 << here) - 1 });
            }
            if let Some(races) = &mut self.cta.races {
                races.start(self.cta.resident.len());
            }
            self.cta.resident.push(resident);
            self.warps.push(warps);
        }
    }

    /// Sets constants and special registers; only those that change from block to block unless `all`.
    fn rows(&self, warp: &mut Warp, index: usize, block: [u32; 3], all: bool) {
        let [bx, by, _] = self.shape.block;
        let r = &mut warp.regs;
        for (row, init) in &self.p.init {
            if !all && !matches!(init, RowInit::Block(_) | RowInit::Cluster(..)) {
                continue;
            }
            let thread = |l: usize| (index * LANES + l) as u32;
            let each = |f: &dyn Fn(usize) -> u32| -> [u32; LANES] { std::array::from_fn(f) };
            let v = match init {
                RowInit::Word(x) => [*x; LANES],
                RowInit::Long(x) => {
                    r.q[*row as usize] = [*x; LANES];
                    continue;
                }
                RowInit::Pred(x) => {
                    r.p[*row as usize] = if *x { !0 } else { 0 };
                    continue;
                }
                RowInit::Tid(0) => each(&|l| thread(l) % bx),
                RowInit::Tid(1) => each(&|l| thread(l) / bx % by),
                RowInit::Tid(_) => each(&|l| thread(l) / (bx * by)),
                RowInit::Block(d) => [block[*d]; LANES],
                RowInit::BlockDim(d) => [self.shape.block[*d]; LANES],
                RowInit::GridDim(d) => [self.shape.grid[*d]; LANES],
                RowInit::Cluster(what, d) => [self.shape.cluster_register(*what, *d, block); LANES],
                RowInit::LaneId => each(&|l| l as u32),
                RowInit::WarpId => [index as u32; LANES],
                RowInit::Warps => [self.shape.block_threads().div_ceil(LANES) as u32; LANES],
                RowInit::LaneMask(0) => each(&|l| 1 << l),
                RowInit::LaneMask(1) => each(&|l| ((2u64 << l) - 1) as u32),
                RowInit::LaneMask(2) => each(&|l| (1 << l) - 1),
                RowInit::LaneMask(3) => each(&|l| !((1 << l) - 1)),
                RowInit::LaneMask(_) => each(&|l| !(((2u64 << l) - 1) as u32)),
                RowInit::DynamicShared => [self.shape.dynamic_shared as u32; LANES],
            };
            r.w[*row as usize] = v;
        }
    }

    /// Lets the warps of the resident CTAs run in turn until all have returned.
    fn rounds(&mut self, queue: Option<&Queue>, spent: &AtomicU64) -> Result<(), Fault> {
        let mut polls = 0;
        loop {
            let (mut ran, mut moved) = (false, false);
            let (events, changes) = (self.cta.hopper.events, self.cta.changes);
            self.take_turns();
            for turn in 0..self.turns.len() {
                let (slot, w) = self.turns[turn];
                let warp = &mut self.warps[slot][w];
                if warp.done || warp.waiting.is_some() {
                    continue;
                }
                ran = true;
                self.cta.at = slot;
                let slice = match &mut self.random {
                    // Half of the turns are so short that warps meet in the middle of anything.
                    Some(r) => {
                        let short = r.below(2) == 0;
                        if short { 1 + r.below(16) as u64 } else { 1 << r.below(12) }
                    }
                    None => SLICE,
                };
                let before = self.cta.issued;
                let stop = warp.run(self.p, &mut self.cta, w, slice).map_err(|e| self.failed(slot, w, e))?;
                let polled = matches!(stop, Stop::Poll);
                // In a drawn order turns may end between two looks at memory: that is polling still.
                let count = self.cta.issued - before;
                let warp = &mut self.warps[slot][w];
                warp.since_poll = match stop {
                    Stop::Poll => 0,
                    Stop::Slice => warp.since_poll.saturating_add(count),
                    _ => u64::MAX,
                };
                moved |= warp.since_poll > POLLING;
                self.stopped(slot, w, stop)?;
                let cost = count + if polled { POLL_COST } else { 0 };
                if spent.fetch_add(cost, Relaxed) > self.shape.budget {
                    let m = format!("more than {} warp instructions{}", self.shape.budget, self.report());
                    return Err(self.stuck(slot, w, FaultKind::Watchdog, m));
                }
            }
            if !ran {
                let Some((slot, w)) = self.first_waiting() else {
                    return Ok(());
                };
                let m = format!("no warp can go on{}", self.report());
                return Err(self.stuck(slot, w, FaultKind::Deadlock, m));
            }
            // A loop that looks at memory makes progress while it changes some: counts in shared memory, for one.
            moved |= self.cta.hopper.events != events || self.cta.changes != changes;
            self.idle(moved)?;
            polls = if moved { 0 } else { polls + 1 };
            if moved {
                self.full = None;
            }
            if polls > 0 && polls % PATIENCE == 0 {
                // Someone else has to act: another host thread, or a CTA that is not resident yet.
                let room = self.room();
                if let Some(queue) = queue.filter(|q| !room && q.left() > 0) {
                    self.wait_for_room(queue, polls / PATIENCE)?;
                }
                match queue.filter(|_| room).and_then(Queue::take) {
                    Some((_, n)) => self.admit(n),
                    None => std::thread::yield_now(),
                }
                let last_resort = PATIENCE * if self.shape.threads > 1 { 10_000 } else { 200 };
                if polls % last_resort == 0 {
                    self.warps.iter_mut().flatten().for_each(Warp::run_ahead);
                }
            }
        }
    }

    /// CTAs that have not returned.
    fn running(&self) -> usize {
        self.cta.resident.iter().filter(|r| r.live > 0).count()
    }

    /// Whether the device holds another cluster beside what is resident.
    fn room(&self) -> bool {
        self.shape.resident.is_none_or(|n| self.running() + self.shape.cluster_size() <= n)
    }

    /// All that is resident only polls, and the next CTA finds no room: after a while that is a deadlock. Before that, lanes that wait for
    /// others of their warp go on alone; where they must not, it is the deadlock too.
    fn wait_for_room(&mut self, queue: &Queue, rounds: u32) -> Result<(), Fault> {
        if rounds >= FULL {
            return self.full.take().map_or(Ok(()), Err);
        }
        let Some((slot, w)) = self.first_waiting() else {
            return Ok(());
        };
        if rounds == FULL / 2 {
            let m = format!(
                "no block can go on: {} are resident, as many as the device holds, {} have not started, and all warps wait for memory \
                 that nobody changes{}",
                self.running(),
                queue.left() * self.shape.cluster_size(),
                self.report_as("polls")
            );
            let warp = &self.warps[slot][w];
            self.full = Some(self.fault(slot, w, (warp.pc(), (warp.first_lane(), FaultKind::Deadlock, m))));
            self.warps.iter_mut().flatten().for_each(Warp::run_ahead);
        }
        Ok(())
    }

    /// The fault of a warp that ran.
    fn failed(&mut self, slot: usize, w: usize, e: At) -> Fault {
        match self.full.take() {
            Some(full) if e.1.1 == FaultKind::DivergentBarrier => full,
            _ => self.fault(slot, w, e),
        }
    }

    /// Puts the warps of the next round in order.
    fn take_turns(&mut self) {
        let total = self.warps.iter().map(Vec::len).sum::<usize>();
        if self.turns.len() != total || self.random.is_some() {
            let all = self.warps.iter().enumerate();
            self.turns.clear();
            self.turns.extend(all.flat_map(|(s, warps)| (0..warps.len()).map(move |w| (s, w))));
        }
        if let Some(r) = &mut self.random {
            for i in (1..self.turns.len()).rev() {
                self.turns.swap(i, r.below(i + 1));
            }
        }
    }

    /// Does what a warp stopped for.
    fn stopped(&mut self, slot: usize, w: usize, stop: Stop) -> Result<(), Fault> {
        let arrival = match stop {
            Stop::Done => {
                self.cta.resident[slot].live -= 1;
                self.returned(slot, w)?;
                // A barrier of all threads may have waited for this warp alone.
                for id in 0..16 {
                    self.release(slot, id);
                }
                return Ok(());
            }
            Stop::Barrier(a) => {
                self.warps[slot][w].waiting = Some(a);
                a
            }
            Stop::Arrive(a) => a,
            Stop::Slice | Stop::Poll => return Ok(()),
        };
        let waits = matches!(stop, Stop::Barrier(_));
        let here = self.cta.resident[slot].barriers.arrive(w, &arrival, waits);
        here.map_err(|m| self.stuck(slot, w, FaultKind::Barrier, m))?;
        if let Some(races) = &mut self.cta.races {
            races.arrive(slot, arrival.id, w);
        }
        self.cta.hopper.release(slot, w, Meeting::Barrier(slot, arrival.id));
        self.release(slot, arrival.id);
        Ok(())
    }

    /// Lets warps through a barrier if it is complete.
    fn release(&mut self, slot: usize, id: u32) {
        let resident = &mut self.cta.resident[slot];
        let Some(done) = resident.barriers.complete(id, resident.live) else {
            return;
        };
        if let Some(races) = &mut self.cta.races {
            races.depart(slot, id, done.warps);
        }
        if !self.cta.hopper.fresh.is_empty() {
            self.cta.hopper.depart(slot, done.warps, id);
            self.cta.settle();
        }
        for (w, warp) in self.warps[slot].iter_mut().enumerate() {
            if done.warps >> w & 1 == 0 {
                continue;
            }
            let Some((kind, d, _, _)) = warp.waiting.take().and_then(|a| a.reduce) else {
                continue;
            };
            let bits = |b: bool| if b { !0 } else { 0 };
            match kind {
                Reduce::Count => u32::put(&mut warp.regs, d, [done.yes; LANES], warp.live),
                Reduce::And => super::alu::write_pred(&mut warp.regs, d, bits(done.yes == done.of), warp.live),
                Reduce::Or => super::alu::write_pred(&mut warp.regs, d, bits(done.yes > 0), warp.live),
            }
        }
    }

    fn first_waiting(&self) -> Option<(usize, usize)> {
        let find = |warps: &Vec<Warp>| warps.iter().position(|w| !w.done);
        self.warps.iter().enumerate().find_map(|(s, warps)| Some((s, find(warps)?)))
    }

    /// Where every warp stands that has not returned, one line each, up to 64.
    pub(super) fn report(&self) -> String {
        self.report_as("runs")
    }

    /// [`Host::report`] with a word for what warps do that wait at no barrier.
    fn report_as(&self, running: &str) -> String {
        let mut out = String::new();
        let mut left = 64;
        for (slot, warps) in self.warps.iter().enumerate() {
            let resident = &self.cta.resident[slot];
            for (w, warp) in warps.iter().enumerate().filter(|(_, w)| !w.done) {
                left -= 1;
                if left == 0 {
                    return out + "\n  ...";
                }
                let pc = warp.pc() - usize::from(warp.waiting.is_some() && warp.pc() > 0);
                let what = match warp.waiting {
                    Some(a) => format!("waits at {}", resident.barriers.describe(a.id, resident.live)),
                    None => match warp.hopper.blocked {
                        Some(b) => self.cta.describe_wait(slot, w, b),
                        None => running.to_string(),
                    },
                };
                let at = self.p.source.get(pc).or(self.p.source.last());
                let line = at.map_or(String::new(), |s| format!("PTX line {}: `{}`", s.line, s.text));
                let cuda = at.and_then(|s| s.source_line).map_or(String::new(), |l| format!(" (CUDA line {l})"));
                out += &format!("\n  block {:?} warp {w} {what}, {line}{cuda}", resident.index);
            }
        }
        out
    }

    fn stuck(&self, slot: usize, w: usize, kind: FaultKind, message: String) -> Fault {
        let warp = &self.warps[slot][w];
        let back = usize::from(kind != FaultKind::Watchdog || warp.waiting.is_some());
        let e: LaneFault = (warp.first_lane(), kind, message);
        self.fault(slot, w, (warp.pc().saturating_sub(back), e))
    }

    pub(super) fn fault(&self, slot: usize, warp: usize, (pc, (lane, kind, message)): At) -> Fault {
        let at = self.p.source.get(pc).or(self.p.source.last());
        Fault {
            kind,
            message,
            kernel: self.p.name.clone(),
            line: at.map_or(0, |s| s.line),
            source_line: at.and_then(|s| s.source_line),
            text: at.map_or(String::new(), |s| s.text.clone()),
            block: self.cta.resident[slot].index,
            thread: (warp * LANES + lane) as u32,
        }
    }
}
