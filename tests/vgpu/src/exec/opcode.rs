//! Each opcode's operands: from its text to one [`Inst`].

use super::alu::{Op, bit_field, compare_int, integer};
use super::alu_float::{compare_float, floating};
use super::code::alu;
use super::convert::convert;
use super::decode::{Decoded, Decoder, file_of};
use super::mem::{Access, Atomic, AtomicOp, LOCAL, PARAM, SHARED, Space};
use super::{Act, Alu, Class, File, Inst, LANES, NONE, Regs, put_raw, raw};
use crate::ptx::{Operand, Ty};

pub(super) fn space(op: &mut Op<'_>) -> Space {
    for (name, s) in [
        ("global", Space::Global),
        ("const", Space::Global),
        ("shared", Space::Shared),
        ("shared::cta", Space::Shared),
        ("shared::cluster", Space::Cluster),
        ("local", Space::Local),
        ("param", Space::Param),
        ("param::entry", Space::Param),
    ] {
        if op.take(name) {
            return s;
        }
    }
    Space::Generic
}

/// Drops cache hints, scopes and orders: memory here is always coherent and in program order.
pub(super) fn hints(op: &mut Op<'_>) {
    const KNOWN: [&str; 18] = [
        "weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "cta", "cluster", "gpu", "sys", "nc", "ca",
        "cg", "cs", "lu", "cv", "wb", "wt",
    ];
    op.mods
        .retain(|m| !KNOWN.contains(m) && !m.starts_with("L1::") && !m.starts_with("L2::"));
}

pub(super) fn need(operands: &[Operand], n: usize) -> Decoded<()> {
    if operands.len() == n {
        Ok(())
    } else {
        Err(format!("expected {n} operands, found {}", operands.len()))
    }
}

pub(super) fn unknown<T>(op: &Op<'_>) -> Decoded<T> {
    Err(format!("unknown opcode or modifiers of {}", op.base))
}

const PACK: Alu = alu!(|r, i, m| pack(r, i, m));
const UNPACK: Alu = alu!(|r, i, m| unpack(r, i, m));

#[inline(always)]
fn pack(r: &mut Regs, i: &Inst, m: u32) {
    // k: 2 words, 2 halves or 4 halves.
    let part = |row: u16| raw(r, File::W, row);
    let (a, b) = (part(i.a), part(i.b));
    let v: [u64; LANES] = match i.k {
        0 => std::array::from_fn(|l| a[l] | b[l] << 32),
        1 => std::array::from_fn(|l| a[l] & 0xffff | (b[l] & 0xffff) << 16),
        _ => {
            let (c, x) = (part(i.c), part(i.x as u16));
            let h = |v: u64, n: u32| (v & 0xffff) << (16 * n);
            std::array::from_fn(|l| h(a[l], 0) | h(b[l], 1) | h(c[l], 2) | h(x[l], 3))
        }
    };
    put_raw(r, if i.k == 1 { File::W } else { File::Q }, i.d, v, m);
}

#[inline(always)]
fn unpack(r: &mut Regs, i: &Inst, m: u32) {
    let v = raw(r, if i.k == 1 { File::W } else { File::Q }, i.a);
    let bits = if i.k == 0 { 32 } else { 16 };
    for (n, row) in [i.d, i.b, i.c, i.x as u16].into_iter().enumerate() {
        if row != NONE {
            put_raw(
                r,
                File::W,
                row,
                v.map(|x| x >> (bits * n as u32) & ((1 << bits) - 1)),
                m,
            );
        }
    }
}

#[inline(always)]
fn select<const LONG: bool>(r: &mut Regs, i: &Inst, m: u32) {
    let file = if LONG { File::Q } else { File::W };
    let (a, b, p) = (raw(r, file, i.a), raw(r, file, i.b), r.p[i.c as usize]);
    put_raw(
        r,
        file,
        i.d,
        std::array::from_fn(|l| if p >> l & 1 == 1 { a[l] } else { b[l] }),
        m,
    );
}

#[inline(always)]
fn dot4<const SA: bool, const SB: bool>(r: &mut Regs, i: &Inst, m: u32) {
    super::map3(r, i, m, |a: u32, b: u32, c: u32| {
        let side = |x: u8, s: bool| if s { i32::from(x as i8) } else { i32::from(x) };
        a.to_le_bytes()
            .iter()
            .zip(b.to_le_bytes())
            .fold(c, |sum, (x, y)| sum.wrapping_add((side(*x, SA) * side(y, SB)) as u32))
    });
}

impl Decoder<'_> {
    pub(super) fn opcode(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        if let Some(i) = self.hopper(op, o) {
            return i;
        }
        match op.base {
            "ld" | "ldu" | "st" => self.memory(op, o),
            "atom" | "red" => self.atomic(op, o),
            "mov" => self.mov(op, o),
            "cvt" => self.cvt(op, o),
            "cvta" => self.cvta(op, o),
            "setp" => self.setp(op, o),
            "selp" => {
                need(o, 4)?;
                let ty = op.ty().ok_or("no type")?;
                let f: Alu = if ty.size() == 8 {
                    alu!(|r, i, m| select::<true>(r, i, m))
                } else {
                    alu!(|r, i, m| select::<false>(r, i, m))
                };
                let mut i = Self::blank(self.alu(f), Class::Integer);
                (i.d, i.a, i.b) = (self.dst(&o[0], ty)?, self.src(&o[1], ty)?, self.src(&o[2], ty)?);
                i.c = self.src(&o[3], Ty::Pred)?;
                Ok(i)
            }
            "bra" => {
                op.take("uni");
                need(o, 1)?;
                let Operand::Label(t) = o[0] else {
                    return Err("unknown label".into());
                };
                let mut i = Self::blank(Act::Branch, Class::Control);
                i.x = t as u32;
                Ok(i)
            }
            "ret" | "exit" => {
                op.take("uni");
                Ok(Self::blank(Act::Exit, Class::Control))
            }
            "trap" => Ok(Self::blank(Act::Trap, Class::Control)),
            "bar" | "barrier" => self.barrier(op, o),
            "membar" | "fence" => {
                op.mods
                    .retain(|m| !matches!(*m, "gl" | "sc" | "acq_rel" | "cta" | "gpu" | "sys" | "cluster"));
                Ok(Self::blank(Act::Nop, Class::Barrier))
            }
            "nanosleep" | "prefetch" | "prefetchu" | "brkpt" | "pmevent" => {
                op.mods.clear();
                Ok(Self::blank(Act::Nop, Class::Memory))
            }
            "cp" => self.copy(op, o),
            "shfl" | "vote" | "match" | "redux" | "activemask" => self.exchange(op, o),
            "mma" => self.mma(op, o),
            "ldmatrix" => self.ldmatrix(op, o),
            "dp4a" => {
                need(o, 4)?;
                let (b, a) = (op.ty().ok_or("no type")?, op.ty().ok_or("no type")?);
                let f: Alu = match (a, b) {
                    (Ty::U32, Ty::U32) => alu!(|r, i, m| dot4::<false, false>(r, i, m)),
                    (Ty::S32, Ty::S32) => alu!(|r, i, m| dot4::<true, true>(r, i, m)),
                    (Ty::S32, Ty::U32) => alu!(|r, i, m| dot4::<true, false>(r, i, m)),
                    (Ty::U32, Ty::S32) => alu!(|r, i, m| dot4::<false, true>(r, i, m)),
                    _ => return unknown(op),
                };
                let mut i = Self::blank(self.alu(f), Class::Integer);
                (i.d, i.a) = (self.dst(&o[0], Ty::B32)?, self.src(&o[1], Ty::B32)?);
                (i.b, i.c) = (self.src(&o[2], Ty::B32)?, self.src(&o[3], Ty::B32)?);
                Ok(i)
            }
            _ => self.arithmetic(op, o),
        }
    }

    fn arithmetic(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        let last = op.mods.last().and_then(|m| Ty::from_name(m)).ok_or("no type")?;
        let float = matches!(last, Ty::F32 | Ty::F64 | Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2);
        let found = match op.base {
            "bfe" | "bfi" => bit_field(op),
            _ if float => floating(op),
            _ => integer(op),
        };
        let Some(a) = found else { return unknown(op) };
        let lop3 = op.base == "lop3";
        need(o, a.src.len() + 1 + usize::from(lop3))?;
        let mut i = Self::blank(self.alu(a.f), a.class);
        i.d = self.dst(&o[0], a.d)?;
        let mut rows = [NONE; 4];
        for (n, ty) in a.src.iter().enumerate() {
            if *ty == Ty::Pred {
                let (row, not) = self.predicate(&o[n + 1])?;
                rows[n] = row;
                i.k |= u8::from(not) << n;
            } else {
                rows[n] = self.src(&o[n + 1], *ty)?;
            }
        }
        if lop3 {
            let Operand::Int(t) = o[4] else {
                return Err("the table of lop3 is not a number".into());
            };
            i.y = t as u32;
        }
        // Two-source functions over packed halves read all three rows.
        (i.a, i.b, i.c, i.x) = (rows[0], rows[1], rows[2], u32::from(rows[3]));
        if float {
            i.b = if i.b == NONE { i.a } else { i.b };
            i.c = if i.c == NONE { i.a } else { i.c };
        }
        Ok(i)
    }

    fn memory(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 2)?;
        let store = op.base == "st";
        let ty = op.ty().ok_or("no type")?;
        if matches!(ty, Ty::Pred | Ty::B128) {
            return unknown(op);
        }
        let n = if op.take("v2") {
            2
        } else if op.take("v4") {
            4
        } else {
            1
        };
        let at = space(op);
        hints(op);
        let (address, value) = if store { (&o[0], &o[1]) } else { (&o[1], &o[0]) };
        let regs = self.list(value, ty)?;
        if regs.len() != n {
            return Err(format!("{} registers for a vector of {n}", regs.len()));
        }
        for (file, row) in &regs {
            // Registers may be wider than the type, never narrower.
            if *file == File::P || ty.size() == 8 && *file == File::W || store && *row == NONE {
                return Err("a register does not fit the access".into());
            }
        }
        let access = Box::new(Access {
            at: self.address(address, at)?,
            ty,
            regs,
        });
        Ok(Self::blank(
            if store { Act::Store(access) } else { Act::Load(access) },
            Class::Memory,
        ))
    }

    fn atomic(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        let ret = op.base == "atom";
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
        let float = matches!(ty, Ty::F32 | Ty::F64 | Ty::F16x2 | Ty::Bf16x2);
        if ty.size() < 4 || ty == Ty::B128 || float && kind != Add || !ret && matches!(kind, Exch | Cas) {
            return unknown(op);
        }
        let first = usize::from(ret);
        need(o, first + 2 + usize::from(kind == Cas))?;
        let d = if ret && o[0] != Operand::Sink {
            Some((file_of(ty), self.dst(&o[0], ty)?))
        } else {
            None
        };
        let b = (file_of(ty), self.src(&o[first + 1], ty)?);
        let c = if kind == Cas {
            Some((file_of(ty), self.src(&o[first + 2], ty)?))
        } else {
            None
        };
        let at = self.address(&o[first], at)?;
        Ok(Self::blank(
            Act::Atomic(Box::new(Atomic {
                at,
                ty,
                op: kind,
                d,
                b,
                c,
            })),
            Class::Atomic,
        ))
    }

    fn mov(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 2)?;
        let ty = op.mods.last().and_then(|m| Ty::from_name(m)).ok_or("no type")?;
        let unpacking = matches!(o[0], Operand::Vector(_));
        if let Operand::Vector(v) = &o[usize::from(!unpacking)] {
            op.ty();
            let k = match (ty.size(), v.len()) {
                (8, 2) => 0,
                (4, 2) => 1,
                (8, 4) => 2,
                _ => return Err("a vector of this shape is not known in mov".into()),
            };
            let rows: Vec<u16> = self
                .list(
                    if unpacking { &o[0] } else { &o[1] },
                    if k == 0 { Ty::B32 } else { Ty::B16 },
                )?
                .into_iter()
                .map(|(f, row)| {
                    if f == File::W {
                        Ok(row)
                    } else {
                        Err("a part of the vector is too wide".to_string())
                    }
                })
                .collect::<Decoded<_>>()?;
            let mut i = Self::blank(self.alu(if unpacking { UNPACK } else { PACK }), Class::Integer);
            i.k = k;
            let at = |n: usize| rows.get(n).copied().unwrap_or(NONE);
            if unpacking {
                (i.d, i.b, i.c, i.x, i.a) = (at(0), at(1), at(2), u32::from(at(3)), self.src(&o[1], ty)?);
            } else {
                (i.a, i.b, i.c, i.x, i.d) = (at(0), at(1), at(2), u32::from(at(3)), self.dst(&o[0], ty)?);
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
        self.arithmetic(op, o)
    }

    fn cvt(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        let Some(c) = convert(op) else { return unknown(op) };
        need(o, if c.pair { 3 } else { 2 })?;
        let mut i = Self::blank(self.alu(c.f), Class::Convert);
        // Destination and source registers may be wider than the types.
        let Operand::Reg(_) = o[0] else {
            return Err("the destination is not a register".into());
        };
        let ((df, d), (sf, a)) = (self.any(&o[0], c.d)?, self.any(&o[1], c.s)?);
        let fits = |f: File, t: Ty| f == file_of(t) || f == File::Q && file_of(t) == File::W;
        if !fits(df, c.d) || !fits(sf, c.s) || c.pair && (df, sf) != (File::W, File::W) {
            return Err("a register does not fit the conversion".into());
        }
        (i.d, i.a, i.k) = (d, a, u8::from(df == File::Q) | u8::from(sf == File::Q) << 1);
        if c.pair {
            i.b = self.src(&o[2], c.s)?;
        }
        Ok(i)
    }

    fn cvta(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
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
            Space::Generic => return unknown(op),
        };
        let mut add = Op::new("add.u64");
        let Some(a) = integer(&mut add) else { return unknown(op) };
        let mut i = Self::blank(self.alu(a.f), Class::Integer);
        (i.d, i.a) = (self.dst(&o[0], Ty::U64)?, self.src(&o[1], Ty::U64)?);
        i.b = self.src(&Operand::Int(if to { base.wrapping_neg() } else { base }), Ty::U64)?;
        Ok(i)
    }

    fn setp(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        let ty = op.ty().ok_or("no type")?;
        let ftz = op.take("ftz");
        let (mut k, mut combined) = (0, false);
        for (n, name) in [(1, "and"), (2, "or"), (3, "xor")] {
            if op.mods.len() > 1 && op.take(name) {
                (k, combined) = (n, true);
            }
        }
        let Some(name) = op.mods.pop() else { return unknown(op) };
        let float = matches!(ty, Ty::F32 | Ty::F64 | Ty::F16 | Ty::Bf16);
        let f = if float {
            compare_float(name, ty, ftz)
        } else {
            compare_int(name, ty).filter(|_| !ftz)
        };
        let Some(f) = f else { return unknown(op) };
        need(o, 3 + usize::from(combined))?;
        let mut i = Self::blank(self.alu(f), if float { Class::Float } else { Class::Integer });
        let (d, q) = self.dst_pair(&o[0], Ty::Pred, Ty::Pred)?;
        (i.d, i.x, i.k) = (d, u32::from(q), k);
        (i.a, i.b) = (self.src(&o[1], ty)?, self.src(&o[2], ty)?);
        if combined {
            let (row, not) = self.predicate(&o[3])?;
            i.c = row;
            i.k |= u8::from(not) << 2;
        }
        Ok(i)
    }
}
