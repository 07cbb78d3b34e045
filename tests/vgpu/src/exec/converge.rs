//! Warp instructions that lanes reach on different paths: from sm_70 on they wait for each other, wherever they are.
//!
//! A frame whose instruction names lanes that are elsewhere waits, and another frame of the warp runs. When all named
//! lanes have come to the same instruction (same opcode, same member mask; it may stand at several places of the
//! program), it is executed for all of them at once and every frame goes its way.

use super::decode::Program;
use super::launch::Cta;
use super::mem::{LaneFault, lanes};
use super::warp::{At, Frame, Warp};
use super::{Act, Class, File, Inst, LANES, Lane, NONE, put_raw, raw};
use crate::error::FaultKind;

impl Warp {
    /// Whether the active lanes give one member mask and all lanes it names that have not returned are active.
    #[inline(always)]
    pub(super) fn all_here(&self, row: u16, active: u32, lane: usize) -> bool {
        let masks = u32::row(&self.regs, row);
        let (first, mut other) = (masks[lane], 0);
        for l in 0..LANES {
            other |= u32::from(masks[l] != first) << l;
        }
        other & active == 0 && first & self.live & !active == 0
    }

    /// The active lanes by their member mask. Several groups have to be complete each; one may still wait for others.
    #[inline(never)]
    pub(super) fn groups(&self, row: u16, active: u32) -> Result<Vec<u32>, LaneFault> {
        let masks = u32::row(&self.regs, row);
        let (mut rest, mut out) = (active, Vec::new());
        while rest != 0 {
            let first = rest.trailing_zeros() as usize;
            let group = lanes(rest).filter(|l| masks[*l] == masks[first]).fold(0, |m, l| m | 1 << l);
            if group & !masks[first] != 0 {
                let m = format!("member mask {:#010x} of lanes {group:#010x} does not name them all", masks[first]);
                return Err((first, FaultKind::BadMask, m));
            }
            rest &= !group;
            out.push(group);
        }
        if out.len() > 1 {
            for group in &out {
                let first = group.trailing_zeros() as usize;
                let missing = masks[first] & self.live & !group;
                if missing != 0 {
                    let m = format!(
                        "member mask {:#010x} names lanes {missing:#010x}, which give another mask or are not here",
                        masks[first]
                    );
                    return Err((first, FaultKind::BadMask, m));
                }
            }
        }
        Ok(out)
    }

    /// Makes the running frame wait at `pc` for the lanes that its member mask names.
    pub(super) fn wait_here(&mut self, pc: usize, row: u16, lane: usize) {
        let members = u32::row(&self.regs, row)[lane];
        self.set_pc(pc);
        if let Some(top) = self.frames.last_mut() {
            top.wait = members;
        }
    }

    /// Frames without others above them, from the top down: their places and live lanes.
    fn leaves(&self) -> Vec<(usize, u32)> {
        let mut above = 0;
        let mut out = Vec::new();
        for (k, f) in self.frames.iter().enumerate().rev() {
            let mine = f.mask & self.live;
            if mine != 0 && mine & above == 0 {
                out.push((k, mine));
            }
            above |= mine;
        }
        out
    }

    fn bring_up(&mut self, k: usize) {
        let f = self.frames.remove(k);
        self.frames.push(f);
    }

    /// Lets another path of the warp run next, if there is one: threads of a warp that wait for each other all progress.
    #[inline(never)]
    pub(super) fn rotate(&mut self) {
        if self.frames.len() < 2 {
            return;
        }
        let ready = self.leaves().into_iter().rev().find(|(k, _)| self.frames[*k].wait == 0);
        if let Some((k, _)) = ready {
            self.bring_up(k);
        }
    }

    /// Lets lanes that wait for the rest of their warp at the end of a branch or loop go on alone: threads of a warp may
    /// wait for a lock that another thread of it holds. Only for warps that have made no progress for long, as these
    /// lanes meet the others no sooner than at the next outer place.
    pub(super) fn run_ahead(&mut self) {
        let mut above = 0;
        for k in (0..self.frames.len()).rev() {
            let f = self.frames[k];
            let mine = f.mask & self.live;
            let arrived = mine & !above;
            if above & mine != 0 && arrived != 0 {
                self.frames[k].mask &= !arrived;
                self.frames.push(Frame { mask: arrived, ..f });
                return;
            }
            above |= mine;
        }
    }

    /// The top frame waits: executes an instruction whose lanes are complete, or brings a frame to the top that can run.
    #[inline(never)]
    pub(super) fn meet(&mut self, p: &Program, cta: &mut Cta<'_>) -> Result<(), At> {
        let leaves = self.leaves();
        let waiting: Vec<(usize, u32)> = leaves.iter().copied().filter(|(k, _)| self.frames[*k].wait != 0).collect();
        let opcode = |pc: u32| {
            let text = p.source.get(pc as usize).map_or("", |s| s.text.as_str());
            let mut words = text.split_whitespace().skip_while(|w| w.starts_with('@'));
            words.next().unwrap_or("").to_string()
        };
        for (k, _) in &waiting {
            let (members, name) = (self.frames[*k].wait, opcode(self.frames[*k].pc));
            let here: Vec<(usize, u32)> = waiting
                .iter()
                .filter(|(j, _)| self.frames[*j].wait == members && opcode(self.frames[*j].pc) == name)
                .map(|(j, mine)| (*j, self.guarded(&p.code[self.frames[*j].pc as usize], *mine)))
                .collect();
            let together = here.iter().fold(0, |m, (_, active)| m | active);
            if members & self.live & !together == 0 {
                self.together(p, &name, &here)
                    .map_err(|m| (self.frames[*k].pc as usize, (self.first_lane(), FaultKind::BadMask, m)))?;
                for (j, mine) in here {
                    let f = &mut self.frames[j];
                    let pc = f.pc as usize;
                    (f.pc, f.wait) = (f.pc + 1, 0);
                    let off = self.frames[j].mask & self.live & !mine;
                    cta.guarded += u64::from(off.count_ones());
                    cta.count_run(pc, pc + 1, mine | off);
                }
                break;
            }
        }
        match self.leaves().into_iter().find(|(k, _)| self.frames[*k].wait == 0) {
            Some((k, _)) => {
                self.bring_up(k);
                Ok(())
            }
            None => {
                let top = self.frames[self.frames.len() - 1];
                let (members, here) = (top.wait, top.mask & self.live);
                let others: Vec<String> = waiting
                    .iter()
                    .filter(|(k, _)| *k + 1 != self.frames.len())
                    .map(|(k, mine)| {
                        let f = self.frames[*k];
                        let line = p.source.get(f.pc as usize).map_or(0, |s| s.line);
                        format!("; lanes {mine:#010x} wait at line {line} for {:#010x}", f.wait)
                    })
                    .collect();
                let m = format!(
                    "member mask {members:#010x} names lanes that do not come here (here: {here:#010x}){}",
                    others.concat()
                );
                Err((top.pc as usize, (here.trailing_zeros() as usize & 31, FaultKind::BadMask, m)))
            }
        }
    }

    /// Executes one warp instruction for lanes that stand at different places of the program.
    fn together(&mut self, p: &Program, name: &str, here: &[(usize, u32)]) -> Result<(), String> {
        let at = |w: &Warp, k: usize| &p.code[w.frames[k].pc as usize];
        let leader = at(self, here[0].0);
        let Act::Warp(f) = leader.act else { return Ok(()) };
        let everyone = here.iter().fold(0, |m, (_, active)| m | active);
        let pc = self.frames[here[0].0].pc;
        if here.iter().all(|(k, _)| self.frames[*k].pc == pc) {
            // SAFETY: as in `Warp::run`: the program's build is supported here.
            return unsafe { self.exchange(p, pc as usize, f, leader, everyone) };
        }
        if self.regs.marks.any() {
            let places: Vec<(usize, u32)> = here.iter().map(|(k, m)| (self.frames[*k].pc as usize, *m)).collect();
            self.carry_to_all(p, &places);
        }
        // Operands are gathered into scratch rows, each lane's from the rows its own instruction names.
        let base = name.split('.').next().unwrap_or("");
        let a_file = match base {
            "vote" => File::P,
            "match" if name.ends_with("64") => File::Q,
            _ => File::W,
        };
        let d_file = if base == "vote" && !name.contains(".ballot") { File::P } else { File::W };
        let [w, q, s] = p.rows.map(|n| n as u16);
        self.regs.w.resize(p.rows[0] + 5, [0; LANES]);
        self.regs.q.resize(p.rows[1] + 1, [0; LANES]);
        self.regs.p.resize(p.rows[2] + 3, 0);
        let mut i = Inst {
            act: Act::Nop,
            d: if d_file == File::P { s + 1 } else { w + 3 },
            a: match a_file {
                File::W => w,
                File::Q => q,
                File::P => s,
            },
            b: w + 1,
            c: w + 2,
            guard: NONE,
            guard_not: false,
            class: Class::Warp,
            k: leader.k,
            x: u32::from(s + 2),
            y: u32::from(w + 4),
            site: 0,
            polls: false,
            order: 0,
        };
        for (k, active) in here {
            let from = at(self, *k);
            if a_file == File::P {
                // Each vote may negate its own source; the scratch row holds what comes out.
                let v = super::alu::pred(&self.regs, from.a, from.k & 4 != 0);
                super::alu::write_pred(&mut self.regs, i.a, v, *active);
            } else {
                let v = raw(&self.regs, a_file, from.a);
                put_raw(&mut self.regs, a_file, i.a, v, *active);
            }
            for (row, scratch) in [(from.b, i.b), (from.c, i.c), (from.y as u16, i.y as u16)] {
                if row != NONE {
                    let v = raw(&self.regs, File::W, row);
                    put_raw(&mut self.regs, File::W, scratch, v, *active);
                }
            }
        }
        if a_file == File::P {
            i.k &= 3;
        }
        // SAFETY: as above.
        unsafe { f(&mut self.regs, &i, everyone) }?;
        for (k, active) in here {
            let to = at(self, *k);
            let (d, x) = (to.d, to.x as u16);
            if d_file == File::P {
                let v = self.regs.p[i.d as usize];
                super::alu::write_pred(&mut self.regs, d, v, *active);
            } else if d != NONE {
                let v = raw(&self.regs, File::W, i.d);
                put_raw(&mut self.regs, File::W, d, v, *active);
            }
            let v = self.regs.p[i.x as usize];
            super::alu::write_pred(&mut self.regs, x, v, *active);
        }
        Ok(())
    }
}
