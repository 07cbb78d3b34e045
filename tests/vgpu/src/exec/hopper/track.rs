//! Registers of products: what may not be touched before `wgmma.wait_group`, and what needs a `wgmma.fence` first.

use std::collections::HashMap;

use super::{Op, Source};
use crate::exec::decode::{operands_of, registers};
use crate::exec::{Act, Inst, NONE};
use crate::ptx::{Function, Operand};

/// What a warp knows of one register that products use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Register {
    /// Fenced, or used by completed products only.
    #[default]
    Clean,
    /// Read or written by another instruction (at this position of the program) since the last fence.
    Touched(u32),
    /// Accumulator of a product in this group.
    Sum(u32),
    /// Part of A of a product in this group.
    Input(u32),
}

/// An instruction with the tracked registers it reads and writes.
pub struct Touching {
    /// Registers read.
    pub reads: Vec<u32>,
    /// Registers written.
    pub writes: Vec<u32>,
    /// The instruction itself.
    pub inner: Inst,
}

/// The tracked registers of a warp.
#[derive(Default)]
pub struct Registers {
    states: Vec<Register>,
    fenced: bool,
    /// Groups committed so far; also the number of the one being filled.
    committed: u32,
    /// Groups known to be complete.
    complete: u32,
    /// Products issued into the group being filled.
    open: bool,
}

impl Registers {
    /// All clean, none fenced.
    pub fn reset(&mut self, n: usize) {
        self.states.clear();
        self.states.resize(n, Register::Clean);
        (self.fenced, self.committed, self.complete, self.open) = (false, 0, 0, false);
    }

    /// Number of the group being filled.
    pub fn group(&self) -> u32 {
        self.committed
    }

    /// Whether products were issued that no group holds.
    pub fn uncommitted(&self) -> bool {
        self.open
    }

    /// Groups below this number are complete.
    pub fn complete(&self) -> u32 {
        self.complete
    }

    /// `wgmma.fence`.
    pub fn fence(&mut self) {
        self.fenced = true;
        for s in &mut self.states {
            if matches!(s, Register::Touched(_)) {
                *s = Register::Clean;
            }
        }
    }

    /// `wgmma.commit_group`.
    pub fn commit(&mut self) {
        self.committed += 1;
        self.open = false;
    }

    /// `wgmma.wait_group`: all but the last `keep` groups are complete. Returns the first group that may not be.
    pub fn wait(&mut self, keep: u32) -> u32 {
        self.complete = self.complete.max(self.committed.saturating_sub(keep));
        for s in &mut self.states {
            if let Register::Sum(g) | Register::Input(g) = *s
                && g < self.complete
            {
                *s = Register::Clean;
            }
        }
        self.complete
    }

    fn why(group: u32, committed: u32) -> &'static str {
        if group < committed {
            "before wgmma.wait_group has waited for it"
        } else {
            "before wgmma.commit_group and wgmma.wait_group"
        }
    }

    /// Another instruction reads or writes registers.
    ///
    /// # Errors
    /// One of them is in flight.
    pub fn touch(&mut self, t: &Touching, pc: usize) -> Result<(), String> {
        for n in &t.reads {
            // Reading A's registers while a product reads them is harmless.
            if let Register::Sum(g) = self.states[*n as usize] {
                return Err(format!("an accumulator of a product in flight is read {}", Self::why(g, self.committed)));
            }
        }
        for n in &t.writes {
            if let Register::Sum(g) | Register::Input(g) = self.states[*n as usize] {
                return Err(format!("a register of a product in flight is written {}", Self::why(g, self.committed)));
            }
        }
        for n in t.reads.iter().chain(&t.writes) {
            let s = &mut self.states[*n as usize];
            if !matches!(s, Register::Input(_)) {
                *s = Register::Touched(pc as u32);
            }
        }
        Ok(())
    }

    /// A product uses registers.
    ///
    /// # Errors
    /// They were touched since the last fence (with the position of that instruction), or no fence was executed at all.
    pub fn product(&mut self, d: &[u32], a: &[u32]) -> Result<(), (Option<u32>, &'static str)> {
        if !self.fenced {
            return Err((None, "the first product of a warp needs a wgmma.fence before it"));
        }
        for n in d.iter().chain(a) {
            if let Register::Touched(pc) = self.states[*n as usize] {
                return Err((
                    Some(pc),
                    "a register of the product was used by another instruction without a wgmma.fence since",
                ));
            }
        }
        for n in a {
            if let Register::Sum(_) = self.states[*n as usize] {
                return Err((None, "A is an accumulator of a product in flight"));
            }
        }
        for n in d {
            if let Register::Input(_) = self.states[*n as usize] {
                return Err((None, "an accumulator is part of A of a product in flight"));
            }
        }
        a.iter().for_each(|n| self.states[*n as usize] = Register::Input(self.committed));
        d.iter().for_each(|n| self.states[*n as usize] = Register::Sum(self.committed));
        self.open = true;
        Ok(())
    }
}

/// Numbers the registers of products and puts every other instruction that touches one into a [`Touching`]. Returns how
/// many registers there are.
pub(in crate::exec) fn wrap(code: &mut [Inst], f: &Function) -> usize {
    let mut numbers: HashMap<u32, u32> = HashMap::new();
    let mut number = |o: Option<&Operand>| -> Vec<u32> {
        let mut list = Vec::new();
        o.iter().for_each(|o| registers(o, &mut list));
        list.into_iter()
            .map(|r| {
                let next = numbers.len() as u32;
                *numbers.entry(r).or_insert(next)
            })
            .collect()
    };
    for (inst, i) in code.iter_mut().zip(&f.body) {
        if let Act::Hopper(op) = &mut inst.act
            && let Op::Product(p) = &mut **op
        {
            p.tracked_d = number(i.operands.first());
            if let Source::Registers(_) = p.from {
                p.tracked_a = number(i.operands.get(1));
            }
        }
    }
    if numbers.is_empty() {
        return 0;
    }
    for (inst, i) in code.iter_mut().zip(&f.body) {
        if matches!(inst.act, Act::Hopper(_)) && i.opcode.starts_with("wgmma.") {
            continue;
        }
        // What the guard keeps is not read.
        let (defs, uses) = operands_of(i);
        let known = |list: &[u32]| list.iter().filter_map(|r| numbers.get(r).copied()).collect::<Vec<_>>();
        let (reads, writes) = (known(&uses), known(&defs));
        if reads.is_empty() && writes.is_empty() {
            continue;
        }
        let act = std::mem::replace(&mut inst.act, Act::Nop);
        let inner = Inst { act, guard: NONE, ..*inst };
        inst.act = Act::Touching(Box::new(Touching { reads, writes, inner }));
    }
    numbers.len()
}
