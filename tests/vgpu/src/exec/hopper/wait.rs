//! Operations on barrier objects, and waiting for them.

use super::act::{Here, line};
use super::bulk::Reduction;
use super::bytes::Bytes;
use super::mbarrier::{self, Barrier};
use super::state::{Blocked, Cargo, Live, Load, Origin};
use super::visible::Meeting;
use super::{BarrierOp, Turn};
use crate::error::FaultKind;
use crate::exec::launch::Cta;
use crate::exec::mem::{Address, LaneFault, lanes};
use crate::exec::warp::{Step, Warp};
use crate::exec::{File, LANES, Lane, NONE, put_raw, raw};

/// A fault of a lane that names the barrier.
pub(super) fn misuse(lane: usize, at: u64, m: impl std::fmt::Display) -> LaneFault {
    (lane, FaultKind::Mbarrier, format!("mbarrier at shared offset {at:#x}: {m}"))
}

impl Cta<'_> {
    /// The barrier at an address that was checked.
    pub(super) fn live(&mut self, slot: usize, at: u64, lane: usize) -> Result<&mut Barrier, LaneFault> {
        match self.resident[slot].hopper.barriers.get_mut(&at) {
            Some(l) => Ok(&mut l.barrier),
            None => Err(misuse(lane, at, "there is none: mbarrier.init has to come first")),
        }
    }

    pub(super) fn barrier_op(&mut self, h: &Here<'_>, warp: &mut Warp, x: &BarrierOp) -> Result<Step, LaneFault> {
        let at = x.at.lanes(&warp.regs);
        let row = |warp: &Warp, r: Option<u16>, or: u32| r.map_or([or; LANES], |row| u32::get(&warp.regs, row));
        if let Turn::Wait { .. } = x.turn {
            return self.wait(h, warp, x, &at);
        }
        let (mut tokens, mut keep) = ([0; LANES], NONE);
        for lane in lanes(h.active) {
            let (slot, offset) = self.shared_place(x.at.space, at[lane], mbarrier::BYTES, mbarrier::BYTES, lane)?;
            let wrong = |m: String| misuse(lane, offset, m);
            if !matches!(x.turn, Turn::Init { .. }) {
                self.reach(h, slot, offset, lane)?;
            }
            match x.turn {
                Turn::Init { count } => self.init(h, lane, slot, offset, row(warp, Some(count), 0)[lane])?,
                Turn::Invalidate => {
                    self.live(slot, offset, lane)?;
                    let to = &mut self.resident[slot];
                    if to.hopper.loads.iter().any(|l| l.bar == offset) {
                        return Err(wrong("invalidated while a bulk copy will still count its bytes there".into()));
                    }
                    to.hopper.barriers.remove(&offset);
                    self.unmade(slot, offset);
                }
                Turn::ExpectTx { bytes } => {
                    let n = row(warp, Some(bytes), 0)[lane];
                    self.live(slot, offset, lane)?.expect_tx(n).map_err(wrong)?;
                }
                Turn::CompleteTx { bytes } => {
                    let n = row(warp, Some(bytes), 0)[lane];
                    self.live(slot, offset, lane)?.complete_tx(n).map_err(wrong)?;
                }
                Turn::Arrive { token, how, count, bytes } => {
                    let (n, tx) = (row(warp, count, 1)[lane], row(warp, bytes, 0)[lane]);
                    let b = self.live(slot, offset, lane)?;
                    b.expect_tx(tx).map_err(wrong)?;
                    tokens[lane] = b.arrive(n, how).map_err(wrong)?.0;
                    keep = token;
                    let own = self.at;
                    self.hopper.release(own, h.warp, Meeting::Object(slot, offset));
                }
                Turn::CopiesArrive { extra } => {
                    let own = self.at;
                    self.hopper.release(own, h.warp, Meeting::Object(slot, offset));
                    self.copies_arrive(warp, lane, slot, offset, extra)?;
                }
                Turn::Wait { .. } => {}
            }
            self.hopper.events += 1;
        }
        if keep != NONE {
            put_raw(&mut warp.regs, File::Q, keep, tokens, h.active);
        }
        Ok(Step::Next)
    }

    fn init(&mut self, h: &Here<'_>, lane: usize, slot: usize, offset: u64, count: u32) -> Result<(), LaneFault> {
        let barrier = Barrier::new(count).map_err(|m| misuse(lane, offset, m))?;
        let to = &mut self.resident[slot];
        if let Some(old) = to.hopper.barriers.get(&offset) {
            let m =
                format!("initialised again, after {}; mbarrier.inval has to come between", line(h.p, old.origin.pc));
            return Err(misuse(lane, offset, m));
        }
        if let Some((_, m, pc)) = to.hopper.conflict(offset, offset + mbarrier::BYTES, true) {
            return Err(misuse(lane, offset, format!("initialised on {m} ({})", line(h.p, pc))));
        }
        // Ordinary reads of the object find bytes that nobody has written.
        to.shared.unmark(offset, mbarrier::BYTES);
        let live = Live { barrier, origin: h.origin(lane) };
        to.hopper.barriers.insert(offset, live);
        self.made(slot, offset, h.origin(lane));
        Ok(())
    }

    /// `cp.async.mbarrier.arrive`. Copies of the warp arrive at once here, and with them the arrival.
    fn copies_arrive(
        &mut self,
        warp: &mut Warp,
        lane: usize,
        slot: usize,
        offset: u64,
        extra: bool,
    ) -> Result<(), LaneFault> {
        warp.copies.commit();
        warp.copies.deliver(self, 0)?;
        let b = self.live(slot, offset, lane)?;
        if !extra {
            return b.arrive(1, Default::default()).map(|_| ()).map_err(|m| misuse(lane, offset, m));
        }
        // Pending grows by one and shrinks again: unless that is the arrival that ends the phase, nothing changes.
        Ok(())
    }

    fn wait(&mut self, h: &Here<'_>, warp: &mut Warp, x: &BarrierOp, at: &[u64; LANES]) -> Result<Step, LaneFault> {
        let Turn::Wait { done, state, parity } = x.turn else {
            return Ok(Step::Next);
        };
        let (mut over, mut first) = (0u32, None);
        let states = if parity { u32::get(&warp.regs, state).map(u64::from) } else { u64::get(&warp.regs, state) };
        for lane in lanes(h.active) {
            let (slot, offset) = self.shared_place(x.at.space, at[lane], mbarrier::BYTES, mbarrier::BYTES, lane)?;
            self.reach(h, slot, offset, lane)?;
            if parity && states[lane] > 1 {
                return Err(misuse(lane, offset, format!("phase parity {} is neither 0 nor 1", states[lane])));
            }
            let ends = |b: &Barrier| {
                if parity { Ok(b.over_parity(states[lane] == 1)) } else { b.over(states[lane]) }
            };
            let mut yes = ends(self.live(slot, offset, lane)?).map_err(|m| misuse(lane, offset, m))?;
            // Copies arrive while somebody waits and others have run: one at each try in seeded order, else all at once.
            while !yes && h.again && self.deliver_to(slot, Some(offset), lane, h)? {
                yes = ends(self.live(slot, offset, lane)?).map_err(|m| misuse(lane, offset, m))?;
                if self.shape.seed.is_some() {
                    break;
                }
            }
            if yes {
                over |= 1 << lane;
                let own = self.at;
                self.hopper.acquire(own, 1 << h.warp, Meeting::Object(slot, offset));
            } else {
                first.get_or_insert(offset);
            }
        }
        if let Some(offset) = first
            && (self.hopper.timeout.is_none() || warp.hopper.gave_up == self.hopper.timeout)
        {
            warp.hopper.blocked = Some(Blocked::Barrier(offset));
            return Ok(Step::Again);
        }
        if first.is_some() {
            warp.hopper.gave_up = self.hopper.timeout;
        }
        crate::exec::alu::write_pred(&mut warp.regs, done, over, h.active);
        Ok(Step::Next)
    }

    /// Delivers one copy of a CTA that counts at a barrier (any barrier without `bar`); whether there was one.
    pub(super) fn deliver_to(
        &mut self,
        slot: usize,
        bar: Option<u64>,
        lane: usize,
        h: &Here<'_>,
    ) -> Result<bool, LaneFault> {
        let wanted = |l: &Load| bar.is_none_or(|b| l.bar == b);
        let loads = &self.resident[slot].hopper.loads;
        let n = loads.iter().filter(|l| wanted(l)).count();
        if n == 0 {
            return Ok(false);
        }
        let pick = match self.shape.seed {
            Some(seed) => crate::exec::launch::Random(seed ^ self.hopper.events).below(n),
            None => 0,
        };
        let Some(i) = loads.iter().enumerate().filter(|(_, l)| wanted(l)).nth(pick).map(|(i, _)| i) else {
            return Ok(false);
        };
        let load = self.resident[slot].hopper.loads.remove(i);
        let (origin, at, bytes) = (load.origin, load.bar, load.bytes);
        self.deliver(slot, load)
            .map_err(|(kind, m)| (lane, kind, format!("bulk copy of {}: {m}", line(h.p, origin.pc))))?;
        self.live(slot, at, lane)?
            .complete_tx(bytes)
            .map_err(|m| misuse(lane, at, format!("{m} (bulk copy of {})", line(h.p, origin.pc))))?;
        self.hopper.events += 1;
        Ok(true)
    }

    /// `st.async` and `red.async`: the bytes arrive when somebody waits for the barrier.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn store_async(
        &mut self,
        h: &Here<'_>,
        warp: &Warp,
        to: &Address,
        bar: &Address,
        value: &[(File, u16)],
        element: usize,
        reduction: Option<Reduction>,
    ) -> Result<(), LaneFault> {
        let (to_at, bar_at) = (to.lanes(&warp.regs), bar.lanes(&warp.regs));
        let bytes = (element * value.len()) as u64;
        for lane in lanes(h.active) {
            let (slot, offset) = self.shared_place(to.space, to_at[lane], bytes, bytes, lane)?;
            let (bar_slot, at) = self.shared_place(bar.space, bar_at[lane], mbarrier::BYTES, mbarrier::BYTES, lane)?;
            if bar_slot != slot {
                return Err(misuse(lane, at, "it is in another block than the destination"));
            }
            self.reach(h, slot, at, lane)?;
            self.live(slot, at, lane)?;
            let data = value.iter().flat_map(|(file, row)| {
                let x = raw(&warp.regs, *file, *row)[lane];
                x.to_le_bytes().into_iter().take(element)
            });
            let load = Load {
                to: offset,
                span: bytes,
                bar: at,
                bytes: bytes as u32,
                cargo: Cargo::Taken(Bytes::new(data.collect())),
                reduction,
                origin: h.origin(lane),
                hold: None,
            };
            self.send(h, slot, load, reduction.is_some())?;
        }
        Ok(())
    }

    /// Checks a copy's destination and puts it on its way. Bytes that it replaces count as never written until it arrives.
    pub(super) fn send(&mut self, h: &Here<'_>, slot: usize, load: Load, keeps: bool) -> Result<(), LaneFault> {
        let Origin { lane, .. } = load.origin;
        let to = &mut self.resident[slot];
        let (start, end) = (load.to, load.to + load.span);
        if let Some((kind, m, pc)) = to.hopper.conflict(start, end, true) {
            // Reductions into the same bytes may overtake each other.
            let both = keeps && kind == FaultKind::InFlight && to.hopper.loads.iter().any(|l| l.reduction.is_some());
            if !both {
                return Err((lane, kind, format!("copies onto {m} ({})", line(h.p, pc))));
            }
        }
        if !keeps {
            to.shared.unmark(start, load.span);
        }
        to.hopper.copied(start, end);
        to.hopper.loads.push(load);
        self.hopper.events += 1;
        Ok(())
    }
}
