//! `setmaxnreg`: the pool of registers of a CTA.
//!
//! The pool is what the launch took: registers per thread times threads. Registers per thread are those of `.maxnreg`, or
//! what the compiler may use when `.maxntid` or `.reqntid` bounds the block: 65536 divided by its threads, in steps of 8,
//! at most 255. Without any bound the instruction has no effect, as the ISA text allows (and ptxas says).

use super::act::Here;
use super::state::{Blocked, State};
use crate::error::FaultKind;
use crate::exec::LANES;
use crate::exec::decode::Program;
use crate::exec::launch::Cta;
use crate::exec::mem::LaneFault;
use crate::exec::warp::{Step, Warp};

/// Registers of an SM.
pub const FILE: u32 = 65536;

/// Registers per thread with which a kernel is launched, when something bounds them.
pub fn at_launch(p: &Program) -> Option<u32> {
    match (p.limits.max_regs, p.max_threads) {
        (Some(n), _) => Some(n.next_multiple_of(8)),
        (None, Some(threads)) => {
            let threads = threads.next_multiple_of(LANES as u32).max(1);
            Some((FILE / threads / 8 * 8).min(256))
        }
        (None, None) => None,
    }
}

impl State {
    /// Registers per thread of all warps, added up, when the warpgroup of a warp has `count`.
    fn demand(&self, warp: usize, count: u32) -> u32 {
        let mine = |w: usize| w / 4 == warp / 4;
        let all = self.registers.iter().enumerate();
        all.map(|(w, n)| if mine(w) { count } else { *n }).sum()
    }

    /// What all warpgroups hold and how much there is, for messages; a warp asks for `count`.
    pub fn describe_registers(&self, warp: usize, count: u32) -> String {
        let groups: Vec<String> = self.registers.chunks(4).map(|g| g[0].to_string()).collect();
        format!(
            "waits in setmaxnreg for {count} registers: the warpgroups hold {} per thread, and with {count} here they would \
             hold {} registers of the {} that the block was launched with",
            groups.join(" + "),
            self.demand(warp, count) * LANES as u32,
            self.pool * LANES as u32
        )
    }
}

impl Cta<'_> {
    pub(super) fn set_registers(
        &mut self,
        h: &Here<'_>,
        warp: &mut Warp,
        grow: bool,
        count: u32,
    ) -> Result<Step, LaneFault> {
        if h.active != u32::MAX {
            let m = format!("setmaxnreg in lanes {:#010x} only", h.active);
            return Err(h.fault(FaultKind::Warpgroup, m));
        }
        let Some(launched) = at_launch(h.p) else {
            return Ok(Step::Next);
        };
        let events = self.hopper.events;
        let state = &mut self.own().hopper;
        let warps = state.cluster_arrived.len();
        if h.warp / 4 * 4 + 4 > warps {
            let m = "setmaxnreg in a warpgroup of fewer than four warps";
            return Err(h.fault(FaultKind::Warpgroup, m));
        }
        if state.registers.is_empty() {
            state.registers = vec![launched; warps];
            state.pool = launched * warps as u32;
        }
        // All warps of a warpgroup execute the same instructions of this kind in the same order.
        let group = &mut state.groups[h.warp / 4];
        let mine = group.registers[h.warp % 4].1;
        if let Some((pc, _)) = group.registers.iter().find(|(pc, n)| *n == mine + 1 && *pc != h.pc) {
            let m = format!(
                "the warps of a warpgroup execute different setmaxnreg: this one and that of {}",
                super::act::line(h.p, *pc)
            );
            return Err(h.fault(FaultKind::Warpgroup, m));
        }
        let held = state.registers[h.warp];
        if grow && count < held || !grow && count > held {
            let m = format!("setmaxnreg.{} to {count} registers from {held}", if grow { "inc" } else { "dec" });
            return Err(h.fault(FaultKind::Warpgroup, m));
        }
        // A warpgroup gets its registers together or not at all.
        if grow && state.demand(h.warp, count) > state.pool {
            warp.hopper.blocked = Some(Blocked::Registers(count));
            return Ok(Step::Again);
        }
        state.registers[h.warp] = count;
        state.groups[h.warp / 4].registers[h.warp % 4] = (h.pc, mine + 1);
        self.hopper.events = events + 1;
        Ok(Step::Next)
    }
}
