//! What a warp does beside running while one of its registers holds a value that nobody wrote (see `marks`).
//!
//! Such a value is used, which is a fault, when it is an address, a guard, the mask of a warp instruction, an operand of a store to
//! global memory, of an atomic, of a matrix product, of a barrier or of an instruction of the sm_90a set. Arithmetic, selections,
//! shuffles and votes hand it on; a store to shared or local memory makes the bytes there count as never written.

use super::decode::Program;
use super::hopper::Op;
use super::launch::Cta;
use super::marks::{Origin, Place};
use super::mem::{Access, Address, LaneFault, Space, lanes};
use super::rare::Rare;
use super::warp::{At, Warp};
use super::wmma::Wmma;
use super::{Act, File, Inst, LANES, NONE, Regs};
use crate::error::FaultKind;

/// "PTX line n: `text` (CUDA line m)" of a position in the program.
pub(super) fn place_in(p: &Program, pc: usize) -> String {
    let Some(s) = p.source.get(pc) else {
        return "an unknown line".to_string();
    };
    let cuda = s.source_line.map_or(String::new(), |l| format!(" (CUDA line {l})"));
    format!("PTX line {}: `{}`{cuda}", s.line, s.text)
}

impl Cta<'_> {
    /// The fault of using a value that nobody wrote.
    fn used(&self, lane: usize, what: &str, o: Origin) -> LaneFault {
        let why = if o.copies {
            " while asynchronous copies were in flight (their data arrives when their group is waited for)"
        } else {
            ""
        };
        let m = format!(
            "{what} was never written: thread {} of block {:?} loaded it from {} bytes at {:#x} of {:?} memory{why}, {}",
            o.thread,
            self.resident[self.at].index,
            o.bytes,
            o.address,
            o.space,
            place_in(self.program, o.pc)
        );
        (lane, FaultKind::Uninitialised, m)
    }

    /// A store while registers of the warp are marked: those values may go to the memory of the block only, and make it count as
    /// never written.
    #[inline(never)]
    pub(super) fn store_marked(
        &mut self,
        r: &Regs,
        warp: usize,
        i: &Inst,
        op: &Access,
        mask: u32,
    ) -> Result<(), LaneFault> {
        let at = op.at.lanes(r);
        let n = op.ty.size();
        let bytes = (n * op.regs.len()) as u64;
        let all = op.regs.iter().fold(0, |m, p| m | r.marks.lanes(*p)) & mask;
        for lane in lanes(all) {
            let (space, _, _) = self.lane_region(warp, lane, op.at.space, at[lane], bytes)?;
            if space == Space::Global
                && let Some((_, o)) = r.marks.first(&op.regs, 1 << lane)
            {
                return Err(self.used(lane, "the value of a store to global memory", o));
            }
        }
        self.store(r, warp, i, op, mask)?;
        for lane in lanes(all) {
            for (e, p) in op.regs.iter().enumerate() {
                if let Some(o) = r.marks.origin(*p, lane) {
                    let a = at[lane].wrapping_add((e * n) as u64);
                    self.leave(warp, lane, op.at.space, (a, n as u64), o)?;
                }
            }
        }
        Ok(())
    }

    /// The bytes that a lane just stored hold a value that nobody wrote.
    pub(super) fn leave(
        &mut self,
        warp: usize,
        lane: usize,
        space: Space,
        (a, n): (u64, u64),
        o: Origin,
    ) -> Result<(), LaneFault> {
        let (_, region, offset) = self.lane_region(warp, lane, space, a, n)?;
        region.unmark(offset, n);
        let id = region.id();
        self.carried.extend((0..n).map(|b| ((id, offset + b), o)));
        Ok(())
    }
}

impl Warp {
    /// A warp instruction: its results are marked as its sources are, shuffles lane by lane.
    ///
    /// # Safety
    /// This processor supports the program's build.
    #[inline(always)]
    pub(super) unsafe fn exchange(
        &mut self,
        p: &Program,
        pc: usize,
        f: super::code::WarpHandler,
        i: &Inst,
        mask: u32,
    ) -> Result<(), String> {
        if self.regs.marks.any() {
            self.carry(p, pc, i, mask);
        }
        // SAFETY: the caller's promise.
        unsafe { f(&mut self.regs, i, mask) }
    }

    #[inline(never)]
    fn carry(&mut self, p: &Program, pc: usize, i: &Inst, mask: u32) {
        let rows = &p.registers.at[pc];
        if !rows.shuffles {
            return self.carry_to_all(p, &[(pc, mask)]);
        }
        let source = super::warp_ops::sources(&self.regs, i).0;
        let marks = &mut self.regs.marks;
        let (mut index, mut value) = ([None; LANES], [None; LANES]);
        let (mut by_index, mut by_value) = (0, 0);
        for l in lanes(mask) {
            let chosen = [i.b, i.c].iter().find_map(|row| marks.origin((File::W, *row), l));
            let moved = chosen.or_else(|| marks.origin((File::W, i.a), source[l] as usize & 31));
            (index[l], value[l]) = (chosen, moved);
            by_index |= u32::from(chosen.is_some()) << l;
            by_value |= u32::from(moved.is_some()) << l;
        }
        for d in &rows.defs {
            // The predicate says only whether the source lane was in range.
            let (marked, from) = if d.0 == File::P { (by_index, &index) } else { (by_value, &value) };
            marks.put(*d, mask, marked, from);
        }
    }

    /// Results that every source of any lane goes into; `here` are the places of an instruction and their lanes.
    pub(super) fn carry_to_all(&mut self, p: &Program, here: &[(usize, u32)]) {
        let marks = &mut self.regs.marks;
        let found = here.iter().find_map(|(pc, mask)| marks.first(&p.registers.at[*pc].uses, *mask));
        let from = [found.map(|f| f.1); LANES];
        for (pc, mask) in here {
            let marked = if found.is_some() { *mask } else { 0 };
            p.registers.at[*pc].defs.iter().for_each(|d| marks.put(*d, *mask, marked, &from));
        }
    }

    /// Looks at the instruction at `pc` before it runs, while a register is marked: whether it uses such a value, and which
    /// registers are marked after it.
    #[inline(never)]
    pub(super) fn look(&mut self, p: &Program, cta: &Cta<'_>, pc: usize, mask: u32) -> Result<(), At> {
        if let Some(live) = p.registers.live(pc) {
            self.regs.marks.keep(mask, live);
        }
        let i = &p.code[pc];
        let marks = &self.regs.marks;
        let check = |places: &[Place], mask: u32, what: &str| match marks.first(places, mask) {
            Some((lane, o)) => Err((pc, cta.used(lane, what, o))),
            None => Ok(()),
        };
        if i.guard != NONE {
            let what = if matches!(i.act, Act::Branch) { "the condition of a branch" } else { "the guard" };
            check(&[(File::P, i.guard)], mask, what)?;
        }
        let active = self.guarded(i, mask);
        if active == 0 {
            return Ok(());
        }
        let i = match &i.act {
            Act::Touching(t) => &t.inner,
            _ => i,
        };
        let rows = &p.registers.at[pc];
        let address = |a: &Address| check(&[(a.file, a.row)], active, "the address");
        let operands = || check(&rows.uses, active, "an operand");
        match &i.act {
            Act::Alu(_) | Act::Clock => {
                self.regs.marks.spread(&rows.uses, &rows.defs, active);
                return Ok(());
            }
            Act::Nop | Act::Touching(_) => return Ok(()),
            // What it gives is marked as it runs, when all its lanes are there.
            Act::Warp(_) => return check(&[(File::W, i.y as u16)], active, "the member mask"),
            Act::Load(op) => address(&op.at)?,
            Act::LoadMatrix(op) => address(&op.at)?,
            // Its values are looked at as they are stored.
            Act::Store(op) => return address(&op.at),
            Act::Atomic(op) => {
                address(&op.at)?;
                operands()?;
            }
            Act::CopyAsync(op) => {
                address(&op.to)?;
                address(&op.from)?;
                operands()?;
            }
            Act::Wmma(op) => match &**op {
                Wmma::Move(m) => {
                    address(&m.at)?;
                    check(&[(File::W, m.stride.unwrap_or(NONE))], active, "the stride")?;
                    if m.store {
                        return Ok(());
                    }
                }
                Wmma::Product(_) => check(&rows.uses, active, "a factor or sum of a product")?,
            },
            Act::Mma(_) => check(&rows.uses, active, "a factor or sum of a product")?,
            Act::Rare(op) => match &**op {
                Rare::Transpose { .. } => return Ok(()),
                Rare::StoreMatrix { at, .. } => return address(at),
                _ => operands()?,
            },
            Act::Hopper(op) => match &**op {
                Op::Product(x) => {
                    // Without scale-d the accumulators are only written.
                    let (row, not) = x.scale_d;
                    let added = (self.regs.p[row as usize] != 0) != not;
                    let read = |p: &&Place| added || p.0 != File::W || !x.d.contains(&p.1);
                    let read: Vec<Place> = rows.uses.iter().filter(read).copied().collect();
                    check(&read, active, "a factor or sum of a product")?;
                }
                _ => operands()?,
            },
            _ => operands()?,
        }
        rows.defs.iter().for_each(|d| self.regs.marks.clear(*d, active));
        Ok(())
    }
}
