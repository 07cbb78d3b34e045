//! Operands of the opcodes that move data: loads, stores, atomics, moves, address conversions, cache control.

use super::alu::{Op, integer};
use super::code::alu;
use super::decode::{Decoded, Decoder, file_of};
use super::mem::{Access, Atomic, AtomicOp, LOCAL, PARAM, SHARED, Space};
use super::opcode::{PACK, UNPACK, hints, need, space, unknown};
use super::{Act, Class, Inst, LANES, Lane, NONE, Regs};
use crate::ptx::{self, Operand, Ty};

/// `isspacep`: whether the address is in window `y` (1 to 3), or for 0 in none of them.
#[inline(always)]
fn in_window(r: &mut Regs, i: &Inst, m: u32) {
    let a = u64::get(r, i.a);
    let inside = |a: u64| match (a >> 44, i.y) {
        (w, 0) => !(1..=3).contains(&w),
        (w, y) => w == u64::from(y),
    };
    let bits = (0..LANES).fold(0, |b, l| b | u32::from(inside(a[l])) << l);
    super::alu::write_pred(r, i.d, bits, m);
}

impl Decoder<'_> {
    /// Takes the operand of a `.L2::cache_hint`, which changes nothing here.
    pub(super) fn cache_policy<'o>(&mut self, op: &mut Op<'_>, o: &'o [Operand]) -> Decoded<&'o [Operand]> {
        if !op.take("L2::cache_hint") {
            return Ok(o);
        }
        let Some((policy, rest)) = o.split_last() else {
            return Err("no operand for the cache hint".into());
        };
        self.src(policy, Ty::B64)?;
        Ok(rest)
    }

    /// Whether the variable of an address is in the space that the instruction names.
    fn same_space(&self, op: &Op<'_>, address: &Operand) -> Decoded<()> {
        let constant = op.mods.contains(&"const");
        if let Operand::Address(base, _) = address
            && let Operand::Symbol(name, _) = &**base
        {
            let declared = self.symbol(name)?.0 == ptx::Space::Const;
            if declared != constant && (constant || op.mods.contains(&"global")) {
                return Err(format!("{name} is not in the space of the access"));
            }
        }
        Ok(())
    }

    pub(super) fn memory(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        let store = op.base == "st";
        let o = self.cache_policy(op, o)?;
        need(o, 2)?;
        let ty = op.ty().ok_or("no type")?;
        let n = match () {
            () if op.take("v2") => 2,
            () if op.take("v4") => 4,
            () if op.take("v8") => 8,
            () => 1,
        };
        op.take("mmio");
        let (address, value) = if store { (&o[0], &o[1]) } else { (&o[1], &o[0]) };
        self.same_space(op, address)?;
        let at = space(op);
        hints(op);
        let list = match value {
            Operand::Vector(list) => list.as_slice(),
            one => std::slice::from_ref(one),
        };
        // One register may stand in braces, as Triton writes it.
        if list.len() != n || n > 1 && !matches!(value, Operand::Vector(_)) {
            return Err(format!("{} registers for a vector of {n}", list.len()));
        }
        let mut regs = Vec::with_capacity(n);
        for part in list {
            regs.push(match part {
                Operand::Sink if !store => (file_of(ty), NONE),
                Operand::Reg(_) => self.wider(part, ty)?,
                _ if !store => return Err("the destination is not a register".into()),
                _ => self.any(part, ty)?,
            });
        }
        if !store && regs.iter().all(|(_, row)| *row == NONE) {
            return Err("a load without a destination".into());
        }
        let named = |o: &Operand| match o {
            Operand::Reg(r) => Some(self.reg_ty(*r).size()),
            _ => None,
        };
        let mut sizes = list.iter().filter_map(named);
        if let Some(first) = sizes.next()
            && sizes.any(|s| s != first)
        {
            return Err("the registers of a vector have different sizes".into());
        }
        let access = Box::new(Access { at: self.address(address, at)?, ty, regs });
        Ok(Self::blank(if store { Act::Store(access) } else { Act::Load(access) }, Class::Memory))
    }

    pub(super) fn atomic(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        let ret = op.base == "atom";
        let o = self.cache_policy(op, o)?;
        let ty = op.ty().ok_or("no type")?;
        let at = space(op);
        op.take("noftz");
        hints(op);
        use AtomicOp::*;
        let names = [
            ("add", Add),
            ("min", Min),
            ("max", Max),
            ("and", And),
            ("or", Or),
            ("xor", Xor),
            ("exch", Exch),
            ("cas", Cas),
            ("inc", Inc),
            ("dec", Dec),
        ];
        let Some((_, kind)) = names.into_iter().find(|(n, _)| op.take(n)) else {
            return unknown(op);
        };
        let first = usize::from(ret);
        need(o, first + 2 + usize::from(kind == Cas))?;
        let d = if ret && o[0] != Operand::Sink { Some((file_of(ty), self.dst(&o[0], ty)?)) } else { None };
        let b = (file_of(ty), self.src(&o[first + 1], ty)?);
        let c = if kind == Cas { Some((file_of(ty), self.src(&o[first + 2], ty)?)) } else { None };
        let at = self.address(&o[first], at)?;
        Ok(Self::blank(Act::Atomic(Box::new(Atomic { at, ty, op: kind, d, b, c })), Class::Atomic))
    }

    pub(super) fn mov(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 2)?;
        let ty = op.mods.last().and_then(|m| Ty::from_name(m)).ok_or("no type")?;
        let unpacking = matches!(o[0], Operand::Vector(_));
        if let Operand::Vector(v) = &o[usize::from(!unpacking)] {
            op.ty();
            let k = match (ty, v.len()) {
                (Ty::B64, 2) => 0,
                (Ty::B32, 2) => 1,
                (Ty::B64, 4) => 2,
                _ => return Err("a vector of this shape is not known in mov".into()),
            };
            let part = if k == 0 { Ty::B32 } else { Ty::B16 };
            let mut rows = [NONE; 4];
            for (row, x) in rows.iter_mut().zip(v) {
                *row = match x {
                    Operand::Sink if unpacking => NONE,
                    _ if unpacking => self.dst(x, part)?,
                    _ => self.src(x, part)?,
                };
            }
            let mut i = Self::blank(self.alu(if unpacking { UNPACK } else { PACK }), Class::Integer);
            i.k = k;
            if unpacking {
                (i.d, i.b, i.c, i.x) = (rows[0], rows[1], rows[2], u32::from(rows[3]));
                i.a = self.src(&o[1], ty)?;
            } else {
                (i.a, i.b, i.c, i.x) = (rows[0], rows[1], rows[2], u32::from(rows[3]));
                i.d = self.dst(&o[0], ty)?;
            }
            return Ok(i);
        }
        if let Operand::Special(name) = &o[1]
            && (name.starts_with("%clock") || name.starts_with("%globaltimer"))
        {
            op.ty();
            let mut i = Self::blank(Act::Clock, Class::Integer);
            (i.d, i.k) = (self.dst(&o[0], ty)?, u8::from(ty.size() == 8));
            return Ok(i);
        }
        if let Operand::Special(name) = &o[1] {
            return self.move_special(op, &o[0], name, ty);
        }
        self.arithmetic(op, o)
    }

    /// `mov` from a special register, which may be wider or narrower than the type says.
    fn move_special(&mut self, op: &mut Op<'_>, d: &Operand, name: &str, ty: Ty) -> Decoded<Inst> {
        op.ty();
        if ty == Ty::Pred && name == "%is_explicit_cluster" {
            return self.explicit_cluster(d);
        }
        if matches!(ty, Ty::F32 | Ty::F64 | Ty::Pred) {
            return Err("special registers hold integers".into());
        }
        let Some(a) = integer(&mut Op::new(if ty.size() == 8 { "mov.b64" } else { "mov.b32" })) else {
            return unknown(op);
        };
        let mut i = Self::blank(self.alu(a.f), Class::Integer);
        i.d = self.dst(d, ty)?;
        i.a = match (name, ty.size()) {
            ("%gridid" | "%current_graph_exec", 8) => self.src(&Operand::Int(0), Ty::U64)?,
            (_, 8) => return Err(format!("{name} has 32 bits")),
            (_, 2) => {
                // Only the low half is kept: registers of 16 bits are zero above.
                let Some(a) = integer(&mut Op::new("and.b32")) else {
                    return unknown(op);
                };
                i.act = self.alu(a.f);
                i.b = self.src(&Operand::Int(0xffff), Ty::B32)?;
                self.any(&Operand::Special(name.into()), Ty::U32)?.1
            }
            _ => self.any(&Operand::Special(name.into()), Ty::U32)?.1,
        };
        Ok(i)
    }

    /// `cvta{.to}.space.u64 d, a;`: moves between a space and its window in generic addresses.
    pub(super) fn cvta(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 2)?;
        if op.ty() != Some(Ty::U64) {
            return unknown(op);
        }
        let to = op.take("to");
        let base = match space(op) {
            Space::Global => 0,
            Space::Shared | Space::Cluster => SHARED,
            Space::Local => LOCAL,
            Space::Param => PARAM,
            _ => return unknown(op),
        };
        let mut add = Op::new("add.u64");
        let Some(a) = integer(&mut add) else { return unknown(op) };
        let mut i = Self::blank(self.alu(a.f), Class::Integer);
        (i.d, i.a) = (self.dst(&o[0], Ty::U64)?, self.src(&o[1], Ty::U64)?);
        i.b = self.src(&Operand::Int(if to { base.wrapping_neg() } else { base }), Ty::U64)?;
        Ok(i)
    }

    pub(super) fn isspacep(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 2)?;
        if op.take("const") {
            return Err("constant and global addresses are one window here".into());
        }
        let window = match space(op) {
            Space::Global => 0,
            Space::Shared | Space::Cluster => SHARED,
            Space::Local => LOCAL,
            Space::Param => PARAM,
            _ => return unknown(op),
        };
        let mut i = Self::blank(self.alu(alu!(|r, i, m| in_window(r, i, m))), Class::Integer);
        (i.d, i.a) = (self.dst(&o[0], Ty::Pred)?, self.src(&o[1], Ty::U64)?);
        i.y = (window >> 44) as u32;
        Ok(i)
    }

    /// `prefetch`, `prefetchu`, `applypriority`, `discard`: nothing to do for memory without caches, but operands are checked.
    pub(super) fn cache_control(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        let sized = matches!(op.base, "applypriority" | "discard");
        need(o, 1 + usize::from(sized))?;
        if sized && o[1] != Operand::Int(128) {
            return Err("the size is 128".into());
        }
        let at = space(op);
        self.address(&o[0], at)?;
        op.mods.clear();
        Ok(Self::blank(Act::Nop, Class::Memory))
    }

    /// `createpolicy`: a number that cache hints take; its bits mean nothing here.
    pub(super) fn policy(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        let fits = match (op.take("fractional"), op.take("range"), op.take("cvt")) {
            (true, _, _) => match o {
                [_] => true,
                [_, fraction] => self.src(fraction, Ty::F32).is_ok(),
                _ => false,
            },
            (_, true, _) => {
                let at = space(op);
                match o {
                    [_, a, size, total] => {
                        self.address(a, at)?;
                        self.src(size, Ty::U32)?;
                        self.src(total, Ty::U32)?;
                        true
                    }
                    _ => false,
                }
            }
            _ => matches!(o, [_, a] if self.src(a, Ty::B64).is_ok()),
        };
        if !fits {
            return Err("the operands do not fit".into());
        }
        op.mods.clear();
        let Some(a) = integer(&mut Op::new("mov.b64")) else {
            return unknown(op);
        };
        let mut i = Self::blank(self.alu(a.f), Class::Integer);
        (i.d, i.a) = (self.dst(&o[0], Ty::B64)?, self.src(&Operand::Int(1 << 60), Ty::B64)?);
        Ok(i)
    }
}
