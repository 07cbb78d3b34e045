//! One warp: its frames of lanes that run together, and the run loop.

use super::barrier::Arrival;
use super::code::Build;
use super::copy::Copies;
use super::decode::Program;
use super::launch::Cta;
use super::mem::LaneFault;
use super::races::FENCE;
use super::{Act, Inst, LANES, Lane, NONE, Regs};
use crate::error::FaultKind;

/// Why a warp stopped running.
#[derive(Clone, Copy, Debug)]
pub enum Stop {
    /// It arrives at a barrier and waits there.
    Barrier(Arrival),
    /// It arrives at a barrier and goes on.
    Arrive(Arrival),
    /// All its lanes have returned.
    Done,
    /// Its time slice is over.
    Slice,
    /// It looks at memory in a loop, or cannot go on yet: others should run first.
    Poll,
}

/// What the instruction that was asked to run has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It is complete.
    Next,
    /// It cannot complete yet: the warp lets others run and then tries the same instruction again.
    Again,
}

/// Lanes that run together until `until`. Frames lie on a stack with those that split off a frame above it: a frame runs
/// only when nothing above it has its lanes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub(super) pc: u32,
    pub(super) until: u32,
    pub(super) mask: u32,
    /// Lanes that have to come to a warp instruction before this frame goes on; 0 when it can run.
    pub(super) wait: u32,
}

/// State of a warp.
#[derive(Default)]
pub struct Warp {
    /// Registers.
    pub regs: Regs,
    pub(super) frames: Vec<Frame>,
    /// Lanes that have not returned.
    pub live: u32,
    /// The barrier at which it waits.
    pub waiting: Option<Arrival>,
    /// Whether all lanes have returned.
    pub done: bool,
    /// Instructions since it last stopped at a poll.
    pub since_poll: u64,
    pub(super) copies: Copies,
    /// What the sm_90a set keeps.
    pub(super) hopper: super::hopper::state::WarpState,
}

/// A fault with the instruction it happened at.
pub type At = (usize, LaneFault);

impl Warp {
    /// Starts at the first instruction with the given lanes.
    pub fn start(&mut self, live: u32) {
        self.frames.clear();
        self.frames.push(Frame { pc: 0, until: u32::MAX, mask: live, wait: 0 });
        self.live = live;
        self.waiting = None;
        self.done = false;
        self.since_poll = u64::MAX;
        self.copies.clear();
        self.regs.marks.reset();
    }

    /// Runs about `slice` instructions; this processor supports the program's build.
    pub fn run(&mut self, p: &Program, cta: &mut Cta<'_>, index: usize, slice: u64) -> Result<Stop, At> {
        match p.build {
            Build::Portable => self.run_body(p, cta, index, slice),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a module is only loaded for a build that this processor supports (`Module::load_for`).
            Build::V3 => unsafe { self.run_v3(p, cta, index, slice) },
            #[cfg(not(target_arch = "x86_64"))]
            Build::V3 => self.run_body(p, cta, index, slice),
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt,f16c,movbe")]
    fn run_v3(&mut self, p: &Program, cta: &mut Cta<'_>, index: usize, slice: u64) -> Result<Stop, At> {
        self.run_body(p, cta, index, slice)
    }

    /// Lanes of `mask` that the guard lets through.
    #[inline(always)]
    pub(super) fn guarded(&self, i: &Inst, mask: u32) -> u32 {
        if i.guard == NONE {
            return mask;
        }
        let g = self.regs.p[i.guard as usize];
        mask & if i.guard_not { !g } else { g }
    }

    #[inline(always)]
    fn run_body(&mut self, p: &Program, cta: &mut Cta<'_>, index: usize, slice: u64) -> Result<Stop, At> {
        let limit = cta.issued + slice;
        loop {
            let Some(top) = self.frames.last() else {
                self.done = true;
                return Ok(Stop::Done);
            };
            let mask = top.mask & self.live;
            if mask == 0 || top.pc == top.until {
                self.frames.pop();
                continue;
            }
            if top.wait != 0 {
                self.meet(p, cta)?;
                continue;
            }
            if cta.issued >= limit {
                self.rotate();
                return Ok(Stop::Slice);
            }
            let from = top.pc as usize;
            let Some(end) = p.ends.get(from).map(|e| *e as usize) else {
                self.live &= !mask;
                continue;
            };
            // A turn may end anywhere.
            let end = end.min(from + (limit - cta.issued) as usize);
            // While a register holds a value that nobody wrote, every instruction is looked at.
            let end = if self.regs.marks.any() {
                self.look(p, cta, from, mask)?;
                from + 1
            } else {
                end
            };
            // A stretch without labels and jumps: its lanes stay the same, so that it is counted as a whole.
            let mut pc = from;
            let stop = loop {
                if pc == end {
                    self.set_pc(pc);
                    break None;
                }
                let mut i = &p.code[pc];
                let active = self.guarded(i, mask);
                if active != mask {
                    cta.guarded += u64::from((mask & !active).count_ones());
                    if active == 0 {
                        pc += 1;
                        continue;
                    }
                }
                cta.pc = pc;
                let fault = |e: LaneFault| (pc, e);
                let lane = active.trailing_zeros() as usize & 31;
                if let Act::Touching(t) = &i.act {
                    let touched = self.hopper.registers.touch(t, pc);
                    touched.map_err(|m| fault((lane, FaultKind::InFlight, m)))?;
                    i = &t.inner;
                }
                match &i.act {
                    // SAFETY: a module is only loaded for a build that this processor supports (`Module::load_for`).
                    Act::Alu(f) => unsafe { f(&mut self.regs, i, active) },
                    Act::Load(op) => {
                        cta.run_load(&mut self.regs, index, i, op, active).map_err(fault)?;
                        if self.regs.marks.any() {
                            pc += 1;
                            self.set_pc(pc);
                            break None;
                        }
                    }
                    Act::Store(op) => cta.run_store(&self.regs, index, i, op, active).map_err(fault)?,
                    Act::Mma(_) | Act::LoadMatrix(_) | Act::Wmma(_) if active != u32::MAX => {
                        let text = format!("a matrix instruction with lanes {active:#010x} only");
                        return Err(fault((lane, FaultKind::BadMask, text)));
                    }
                    Act::Mma(op) => {
                        // An instruction with the A of the one before it finds it widened already.
                        let here = [cta.at, index, pc];
                        let (widened, last) = &mut *cta.widened;
                        let reuse = i.k != 0 && *last == [cta.at, index, pc - 1];
                        let kept = match op.unit(cta.shape.products) {
                            None => op.run(&mut self.regs, p.build, widened, reuse),
                            Some(unit) => op.run_rounded(&mut self.regs, p.build, unit),
                        };
                        *last = if kept { here } else { [usize::MAX; 3] };
                        cta.counters.tensor_flops += 2 * 16 * 8 * op.k as u64;
                    }
                    Act::LoadMatrix(op) => {
                        cta.load_matrix(&mut self.regs, index, i, op).map_err(fault)?;
                        if self.regs.marks.any() {
                            pc += 1;
                            self.set_pc(pc);
                            break None;
                        }
                    }
                    Act::Branch => {
                        let both = active != mask;
                        cta.counters.divergent_branches += u64::from(both);
                        self.branch(i, pc as u32, mask, active);
                        pc += 1;
                        break i.polls.then_some(Stop::Poll);
                    }
                    Act::Warp(f) => {
                        if !self.all_here(i.y as u16, active, lane) {
                            if self.groups(i.y as u16, active).map_err(fault)?.len() == 1 {
                                cta.guarded -= u64::from((mask & !active).count_ones());
                                self.wait_here(pc, i.y as u16, lane);
                                break None;
                            }
                            for group in self.groups(i.y as u16, active).map_err(fault)? {
                                // SAFETY: as for `Act::Alu`.
                                unsafe { self.exchange(p, pc, *f, i, group) }
                                    .map_err(|m| fault((lane, FaultKind::BadMask, m)))?;
                            }
                        } else {
                            // SAFETY: as for `Act::Alu`.
                            unsafe { self.exchange(p, pc, *f, i, active) }
                                .map_err(|m| fault((lane, FaultKind::BadMask, m)))?;
                        }
                    }
                    Act::WarpSync => {
                        if !self.all_here(i.a, active, lane) && self.groups(i.a, active).map_err(fault)?.len() == 1 {
                            cta.guarded -= u64::from((mask & !active).count_ones());
                            self.wait_here(pc, i.a, lane);
                            break None;
                        }
                    }
                    Act::Barrier(_) | Act::Arrive => {
                        let arrival = self.arrival(i, active, lane).map_err(fault)?;
                        pc += 1;
                        self.set_pc(pc);
                        cta.counters.barriers += 1;
                        break Some(match i.act {
                            Act::Arrive => Stop::Arrive(arrival),
                            _ => Stop::Barrier(arrival),
                        });
                    }
                    Act::Exit => {
                        self.live &= !active;
                        pc += 1;
                        self.set_pc(pc);
                        break None;
                    }
                    Act::Trap => return Err(fault((lane, FaultKind::Trap, "the kernel trapped".into()))),
                    Act::Nop | Act::Touching(_) => {
                        if i.order & FENCE != 0 {
                            cta.fence(index);
                        }
                    }
                    Act::Atomic(op) => cta.run_atomic(&mut self.regs, index, i, op, active).map_err(fault)?,
                    Act::CopyAsync(op) => {
                        cta.copy_async(&self.regs, &mut self.copies, index, i, op, active).map_err(fault)?
                    }
                    Act::Commit => self.copies.commit(),
                    Act::Wait => {
                        // `wait_all` also completes what no group holds yet.
                        if i.k == 1 {
                            self.copies.commit();
                        }
                        self.copies.deliver(cta, i.y as usize).map_err(fault)?;
                    }
                    Act::Hopper(op) => {
                        if cta.races.is_some() {
                            cta.meeting(index);
                        }
                        let step = super::hopper::run(op, self, p, cta, index, pc, active).map_err(fault)?;
                        if step == Step::Again {
                            cta.guarded -= u64::from((mask & !active).count_ones());
                            self.set_pc(pc);
                            break Some(Stop::Poll);
                        }
                    }
                    Act::Wmma(op) => {
                        op.run(&mut self.regs, cta, index, i).map_err(fault)?;
                        if self.regs.marks.any() {
                            pc += 1;
                            self.set_pc(pc);
                            break None;
                        }
                    }
                    Act::Rare(op) => op.run(&mut self.regs, cta, index, active).map_err(fault)?,
                    Act::Clock => {
                        let now = cta.issued + (pc - from) as u64;
                        if i.k == 1 {
                            u64::put(&mut self.regs, i.d, [now; LANES], active);
                        } else {
                            u32::put(&mut self.regs, i.d, [now as u32; LANES], active);
                        }
                    }
                }
                pc += 1;
            };
            cta.count_run(from, pc, mask);
            if let Some(s) = stop {
                if matches!(s, Stop::Poll) {
                    self.rotate();
                }
                return Ok(s);
            }
        }
    }

    #[inline(always)]
    pub(super) fn set_pc(&mut self, pc: usize) {
        if let Some(top) = self.frames.last_mut() {
            top.pc = pc as u32;
        }
    }

    /// Sends the lanes in `active` to the target and the others on; they meet again at the reconvergence point.
    #[inline(always)]
    fn branch(&mut self, i: &Inst, pc: u32, mask: u32, active: u32) {
        let Some(top) = self.frames.last_mut() else { return };
        if active == mask {
            top.pc = i.x;
            return;
        }
        let (rest, until) = (mask & !active, top.until);
        top.pc = i.y;
        // A frame that would end at once is replaced: the lanes meet in the one below.
        if i.y == until {
            self.frames.pop();
        }
        for (at, lanes) in [(pc + 1, rest), (i.x, active)] {
            if at != i.y {
                self.frames.push(Frame { pc: at, until: i.y, mask: lanes, wait: 0 });
            }
        }
    }

    fn arrival(&self, i: &Inst, active: u32, lane: usize) -> Result<Arrival, LaneFault> {
        if active != self.live {
            let text = format!("lanes {active:#010x} of the live {:#010x} reach the barrier", self.live);
            return Err((lane, FaultKind::DivergentBarrier, text));
        }
        let reduce = match i.act {
            Act::Barrier(Some(k)) => {
                let yes = super::alu::pred(&self.regs, i.c, i.k & 4 != 0) & active;
                Some((k, i.d, yes.count_ones(), active.count_ones()))
            }
            _ => None,
        };
        Ok(Arrival {
            id: u32::get(&self.regs, i.a)[lane],
            threads: (i.b != NONE).then(|| u32::get(&self.regs, i.b)[lane]),
            reduce,
        })
    }

    /// First live thread, for messages.
    pub fn first_lane(&self) -> usize {
        self.live.trailing_zeros() as usize & 31
    }

    /// Where the warp is, for messages.
    pub fn pc(&self) -> usize {
        self.frames.last().map_or(0, |f| f.pc as usize)
    }
}
