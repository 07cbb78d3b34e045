//! One warp: its frames of divergent lanes and the run loop.

use std::collections::VecDeque;

use super::decode::Program;
use super::launch::Cta;
use super::mem::{LaneFault, Space, lanes};
use super::{Act, LANES, Lane, NONE, Regs};
use crate::error::FaultKind;

/// What `bar.red` computes over the threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Number of true predicates.
    Count,
    /// Whether all are true.
    And,
    /// Whether any is true.
    Or,
}

/// Why a warp stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It waits at a barrier.
    Barrier,
    /// All its lanes have returned.
    Done,
    /// Its time slice is over.
    Slice,
}

/// A warp at a barrier.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    /// Barrier number.
    pub id: u32,
    /// Threads it waits for; `None` for all.
    pub threads: Option<u32>,
    /// Reduction, destination row and own true predicates.
    pub reduce: Option<(Reduce, u16, u32)>,
}

/// Lanes that run together until `until`.
#[derive(Clone, Copy, Debug)]
struct Frame {
    pc: u32,
    until: u32,
    mask: u32,
}

/// State of a warp.
#[derive(Default)]
pub struct Warp {
    /// Registers.
    pub regs: Regs,
    frames: Vec<Frame>,
    /// Lanes that have not returned.
    pub live: u32,
    /// Set while it waits.
    pub waiting: Option<Waiting>,
    copies: Vec<(u64, u32)>,
    groups: VecDeque<Vec<(u64, u32)>>,
}

/// A fault with the instruction it happened at.
pub type At = (usize, LaneFault);

impl Warp {
    /// Starts at the first instruction with the given lanes.
    pub fn start(&mut self, live: u32) {
        self.frames.clear();
        self.frames.push(Frame {
            pc: 0,
            until: u32::MAX,
            mask: live,
        });
        self.live = live;
        self.waiting = None;
        self.copies.clear();
        self.groups.clear();
    }

    fn wait(&mut self, cta: &mut Cta<'_>, index: usize, keep: usize) -> Result<(), LaneFault> {
        while self.groups.len() > keep {
            for (a, v) in self.groups.pop_front().unwrap_or_default() {
                cta.store::<4>(index, 0, Space::Shared, a, u64::from(v))?;
            }
        }
        Ok(())
    }

    /// Runs up to `slice` instructions.
    pub fn run(&mut self, p: &Program, cta: &mut Cta<'_>, index: usize, slice: u64) -> Result<Stop, At> {
        let mut left = slice;
        loop {
            let Some(top) = self.frames.last_mut() else {
                return Ok(Stop::Done);
            };
            let mask = top.mask & self.live;
            if mask == 0 || top.pc == top.until {
                self.frames.pop();
                continue;
            }
            if left == 0 {
                return Ok(Stop::Slice);
            }
            left -= 1;
            let pc = top.pc;
            let Some(i) = p.code.get(pc as usize) else {
                self.live &= !mask;
                continue;
            };
            let mut active = mask;
            if i.guard != NONE {
                let g = self.regs.p[i.guard as usize];
                active &= if i.guard_not { !g } else { g };
            }
            cta.counters.instructions[i.class as usize] += 1;
            cta.counters.lanes += u64::from(active.count_ones());
            if active == 0 {
                top.pc += 1;
                continue;
            }
            let fault = |e: LaneFault| (pc as usize, e);
            let lane = active.trailing_zeros() as usize;
            match &i.act {
                // SAFETY: a module is only loaded for a build that this processor supports (`Module::load_for`).
                Act::Alu(f) => unsafe { f(&mut self.regs, i, active) },
                Act::Branch => {
                    if active == mask {
                        top.pc = i.x;
                        continue;
                    }
                    let (rest, until) = (mask & !active, top.until);
                    top.pc = i.y;
                    // A frame that would end at once is replaced: the lanes meet in the one below.
                    if i.y == until {
                        self.frames.pop();
                    }
                    if pc + 1 != i.y {
                        self.frames.push(Frame {
                            pc: pc + 1,
                            until: i.y,
                            mask: rest,
                        });
                    }
                    if i.x != i.y {
                        self.frames.push(Frame {
                            pc: i.x,
                            until: i.y,
                            mask: active,
                        });
                    }
                    continue;
                }
                Act::Exit => self.live &= !active,
                Act::Trap => return Err(fault((lane, FaultKind::Trap, "the kernel trapped".into()))),
                Act::Nop => {}
                Act::WarpSync => {
                    let m = u32::get(&self.regs, i.a)[lane];
                    if m & self.live & !active != 0 {
                        let text = format!("mask {m:#010x}, but only {active:#010x} are here");
                        return Err(fault((lane, FaultKind::BadMask, text)));
                    }
                }
                Act::Barrier(reduce) => {
                    if active != self.live {
                        let text = format!("lanes {active:#010x} of the live {:#010x} reach the barrier", self.live);
                        return Err(fault((lane, FaultKind::DivergentBarrier, text)));
                    }
                    let id = u32::get(&self.regs, i.a)[lane];
                    let threads = (i.b != NONE).then(|| u32::get(&self.regs, i.b)[lane]);
                    let reduce = reduce.map(|k| (k, i.d, super::alu::pred(&self.regs, i.c, i.k & 4 != 0) & active));
                    self.waiting = Some(Waiting { id, threads, reduce });
                    top.pc += 1;
                    cta.counters.barriers += 1;
                    return Ok(Stop::Barrier);
                }
                Act::Load(op) => cta.run_load(&mut self.regs, index, op, active).map_err(fault)?,
                Act::Store(op) => cta.run_store(&self.regs, index, op, active).map_err(fault)?,
                Act::Atomic(op) => cta.run_atomic(&mut self.regs, index, op, active).map_err(fault)?,
                Act::CopyAsync(op) => {
                    let list = cta.copy_async(&self.regs, index, op, active).map_err(fault)?;
                    self.copies.extend(list);
                }
                Act::Commit => self.groups.push_back(std::mem::take(&mut self.copies)),
                Act::Wait => {
                    // `wait_all` also completes what no group holds yet.
                    if i.k == 1 {
                        self.groups.push_back(std::mem::take(&mut self.copies));
                    }
                    self.wait(cta, index, i.y as usize).map_err(fault)?;
                }
                Act::Warp(f) => {
                    // SAFETY: as for `Act::Alu`.
                    unsafe { f(&mut self.regs, i, active) }.map_err(|m| fault((lane, FaultKind::BadMask, m)))?;
                }
                Act::Mma(_) | Act::LoadMatrix(_) if active != u32::MAX => {
                    let text = format!("a matrix instruction with lanes {active:#010x} only");
                    return Err(fault((lane, FaultKind::BadMask, text)));
                }
                Act::Mma(op) => {
                    op.run(&mut self.regs, p.build);
                    cta.counters.tensor_flops += 2 * 16 * 8 * op.k as u64;
                }
                Act::LoadMatrix(op) => cta.load_matrix(&mut self.regs, index, op).map_err(fault)?,
                Act::Clock => {
                    let now = cta.counters.instructions.iter().sum::<u64>();
                    if i.k == 1 {
                        u64::put(&mut self.regs, i.d, [now; LANES], active);
                    } else {
                        u32::put(&mut self.regs, i.d, [now as u32; LANES], active);
                    }
                }
            }
            if let Some(top) = self.frames.last_mut() {
                top.pc += 1;
            }
        }
    }

    /// First live thread, for messages.
    pub fn first_lane(&self) -> usize {
        lanes(self.live).next().unwrap_or(0)
    }

    /// Where the warp is, for messages.
    pub fn pc(&self) -> usize {
        self.frames.last().map_or(0, |f| f.pc as usize)
    }
}
