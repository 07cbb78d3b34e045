//! Operands of the opcodes that a whole warp or CTA executes together.

use super::alu::Op;
use super::barrier::Reduce;
use super::decode::{Decoded, Decoder, agrees, registers};
use super::mem::{CopyAsync, Space};
use super::opcode::{hints, need, space, unknown};
use super::tensor::{Element, Matrix, Mma};
use super::{Act, Class, File, Inst, NONE, WarpAlu, warp_ops};
use crate::ptx::{Operand, Ty};

impl Decoder<'_> {
    pub(super) fn barrier(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        op.take("cta");
        op.take("aligned");
        if op.take("warp") {
            need(o, 1)?;
            if !op.take("sync") {
                return unknown(op);
            }
            let mut i = Self::blank(Act::WarpSync, Class::Warp);
            i.a = self.src(&o[0], Ty::B32)?;
            return Ok(i);
        }
        let mut i = Self::blank(Act::Barrier(None), Class::Barrier);
        let first = if op.take("sync") {
            0
        } else if op.take("arrive") {
            if o.len() != 2 {
                return Err("bar.arrive needs a barrier and a number of threads".into());
            }
            i.act = Act::Arrive;
            0
        } else if op.take("red") {
            let kind = match () {
                () if op.take("popc") => Reduce::Count,
                () if op.take("and") => Reduce::And,
                () if op.take("or") => Reduce::Or,
                () => return unknown(op),
            };
            let ty = op.ty().ok_or("no type")?;
            if o.len() < 3 {
                return Err("bar.red needs a destination, a barrier and a predicate".into());
            }
            i.act = Act::Barrier(Some(kind));
            i.d = self.dst(&o[0], ty)?;
            let (row, not) = self.predicate(&o[o.len() - 1])?;
            (i.c, i.k) = (row, u8::from(not) << 2);
            1
        } else {
            return unknown(op);
        };
        let Some(id) = o.get(first) else {
            return Err("no barrier number".into());
        };
        if matches!(id, Operand::Int(n) if *n > 15) {
            return Err("barriers are numbered 0 to 15".into());
        }
        i.a = self.src(id, Ty::U32)?;
        match o.len() - first - first {
            1 => {}
            2 => {
                if matches!(o[first + 1], Operand::Int(n) if n % 32 != 0) {
                    return Err("the number of threads at a barrier is a multiple of 32".into());
                }
                i.b = self.src(&o[first + 1], Ty::U32)?;
            }
            _ => return Err("too many operands".into()),
        }
        Ok(i)
    }

    pub(super) fn copy(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        if !op.take("async") {
            return unknown(op);
        }
        if op.take("commit_group") {
            return Ok(Self::blank(Act::Commit, Class::Memory));
        }
        if op.take("wait_all") {
            let mut i = Self::blank(Act::Wait, Class::Memory);
            i.k = 1;
            return Ok(i);
        }
        if op.take("wait_group") {
            let Some(Operand::Int(n)) = o.first() else {
                return Err("wait_group needs a number".into());
            };
            let mut i = Self::blank(Act::Wait, Class::Memory);
            i.y = *n as u32;
            return Ok(i);
        }
        let shared = op.take("shared") || op.take("shared::cta");
        if !shared || !op.take("global") {
            return unknown(op);
        }
        let cg = op.mods.contains(&"cg");
        let o = self.cache_policy(op, o)?;
        hints(op);
        let Some(Operand::Int(bytes @ (4 | 8 | 16))) = o.get(2) else {
            return Err("copies move 4, 8 or 16 bytes".into());
        };
        if cg && *bytes != 16 {
            return Err("cp.async.cg moves 16 bytes".into());
        }
        let mut ignore = None;
        let source = match o.get(3) {
            // A predicate says whether the source is ignored and zeros are written.
            Some(p @ (Operand::Reg(_) | Operand::NotReg(_))) if self.is_predicate(p) => {
                ignore = Some(self.predicate(p)?);
                None
            }
            s => s.map(|s| self.src(s, Ty::U32)).transpose()?,
        };
        if o.len() > 4 {
            return Err("too many operands".into());
        }
        let (to, from) = (self.address(&o[0], Space::Shared)?, self.address(&o[1], Space::Global)?);
        Ok(Self::blank(Act::CopyAsync(Box::new(CopyAsync { to, from, bytes: *bytes, source, ignore })), Class::Memory))
    }

    pub(super) fn exchange(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        let ty = op.ty().ok_or("no type")?;
        let sync = op.take("sync");
        let build = self.build;
        let blank = |f: WarpAlu| Self::blank(Act::Warp(f.pick(build)), Class::Warp);
        let one_of = |op: &mut Op<'_>, names: &[&str]| names.iter().position(|n| op.take(n));
        match op.base {
            "activemask" => {
                let mut i = Self::blank(self.alu(warp_ops::ACTIVE_MASK), Class::Warp);
                i.d = self.dst(o.first().ok_or("no destination")?, Ty::B32)?;
                Ok(i)
            }
            _ if !sync => unknown(op),
            "shfl" => {
                need(o, 5)?;
                let Some(k) = one_of(op, &["up", "down", "bfly", "idx"]) else {
                    return unknown(op);
                };
                let mut i = blank(warp_ops::SHUFFLE);
                let (d, p) = self.dst_pair(&o[0], Ty::B32, Ty::Pred)?;
                (i.d, i.x, i.k) = (d, u32::from(p), k as u8);
                (i.a, i.b) = (self.src(&o[1], Ty::B32)?, self.src(&o[2], Ty::U32)?);
                (i.c, i.y) = (self.src(&o[3], Ty::U32)?, u32::from(self.src(&o[4], Ty::U32)?));
                Ok(i)
            }
            "vote" => {
                need(o, 3)?;
                let Some(k) = one_of(op, &["all", "any", "uni", "ballot"]) else {
                    return unknown(op);
                };
                let mut i = blank(warp_ops::VOTE);
                i.d = self.dst(&o[0], if k == 3 { Ty::B32 } else { Ty::Pred })?;
                let (row, not) = self.predicate(&o[1])?;
                (i.a, i.k, i.y) = (row, k as u8 | u8::from(not) << 2, u32::from(self.src(&o[2], Ty::U32)?));
                Ok(i)
            }
            "match" => {
                need(o, 3)?;
                let Some(k) = one_of(op, &["any", "all"]) else {
                    return unknown(op);
                };
                let mut i = blank(if ty.size() == 8 { warp_ops::MATCH64 } else { warp_ops::MATCH32 });
                let (d, p) = self.dst_pair(&o[0], Ty::B32, Ty::Pred)?;
                (i.d, i.x, i.k) = (d, u32::from(p), k as u8);
                (i.a, i.y) = (self.src(&o[1], ty)?, u32::from(self.src(&o[2], Ty::U32)?));
                Ok(i)
            }
            _ => {
                need(o, 3)?;
                let signed = ty == Ty::S32;
                let kinds = ["add", "min", "max", "and", "or", "xor"];
                let k = match (one_of(op, &kinds), signed) {
                    (Some(0), _) => 0,
                    (Some(n @ (1 | 2)), s) => n + 2 * usize::from(s),
                    (Some(n), _) => n + 2,
                    (None, _) => return unknown(op),
                };
                let mut i = blank(warp_ops::REDUX);
                (i.d, i.k) = (self.dst(&o[0], Ty::U32)?, k as u8);
                (i.a, i.y) = (self.src(&o[1], Ty::U32)?, u32::from(self.src(&o[2], Ty::U32)?));
                Ok(i)
            }
        }
    }

    pub(super) fn words(&mut self, op: &Operand, n: usize) -> Decoded<Vec<u16>> {
        let list = self.list(op, Ty::B32)?;
        if list.len() != n || list.iter().any(|(f, row)| *f != File::W || *row == NONE) {
            return Err(format!("expected {n} 32-bit registers"));
        }
        Ok(list.into_iter().map(|(_, row)| row).collect())
    }

    /// `n` 32-bit registers whose type agrees with `ty`: unlike other operands, fragments are checked against their elements.
    pub(super) fn fragment(&mut self, op: &Operand, n: usize, ty: Ty) -> Decoded<Vec<u16>> {
        let mut named = Vec::new();
        registers(op, &mut named);
        if let Some(other) = named.iter().map(|r| self.reg_ty(*r)).find(|t| !agrees(*t, ty)) {
            return Err(format!("a register of type .{} in a fragment of .{}", other.name(), ty.name()));
        }
        self.words(op, n)
    }

    pub(super) fn mma(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 4)?;
        let types: Vec<Ty> = (0..4).map_while(|_| op.ty()).collect();
        let [c, b, a, d] = types[..] else { return unknown(op) };
        if matches!(a, Ty::U8 | Ty::S8 | Ty::F64) {
            return self.mma_rare(op, o, a, b);
        }
        if !["sync", "aligned", "row", "col"].iter().all(|m| op.take(m)) || a != b || c != d {
            return unknown(op);
        }
        let k = match () {
            () if op.take("m16n8k16") => 16,
            () if op.take("m16n8k8") => 8,
            () if op.take("m16n8k4") => 4,
            () => return unknown(op),
        };
        let element = match (a, k, c) {
            (Ty::F16, 8 | 16, Ty::F32 | Ty::F16) => Element::F16,
            (Ty::Bf16, 8 | 16, Ty::F32) => Element::Bf16,
            (Ty::Tf32, 4 | 8, Ty::F32) => Element::Tf32,
            _ => return unknown(op),
        };
        let half = c == Ty::F16;
        let packed = match element {
            Element::F16 => Ty::F16x2,
            Element::Bf16 => Ty::Bf16x2,
            Element::Tf32 => Ty::Tf32,
        };
        let sums = if half { Ty::F16x2 } else { Ty::F32 };
        let na = if element == Element::Tf32 { k / 2 } else { k / 4 };
        let nc = if half { 2 } else { 4 };
        let m = Mma {
            element,
            k,
            half,
            d: self.fragment(&o[0], nc, sums)?,
            a: self.fragment(&o[1], na, packed)?,
            b: self.fragment(&o[2], na / 2, packed)?,
            c: self.fragment(&o[3], nc, sums)?,
        };
        Ok(Self::blank(Act::Mma(Box::new(m)), Class::Tensor))
    }

    pub(super) fn ldmatrix(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 2)?;
        let n = match () {
            () if op.take("x1") => 1,
            () if op.take("x2") => 2,
            () if op.take("x4") => 4,
            () => return unknown(op),
        };
        if !["sync", "aligned", "m8n8", "b16"].iter().all(|m| op.take(m)) {
            return unknown(op);
        }
        let trans = op.take("trans");
        let at = space(op);
        let at = self.address(&o[1], at)?;
        Ok(Self::blank(Act::LoadMatrix(Box::new(Matrix { d: self.words(&o[0], n)?, trans, at })), Class::Tensor))
    }
}
