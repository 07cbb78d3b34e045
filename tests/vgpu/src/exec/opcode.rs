//! Each opcode's operands: from its text to one [`Inst`].

use super::alu::{Op, bit_field, integer};
use super::alu_float::floating;
use super::bits::more;
use super::code::alu;
use super::convert::convert;
use super::decode::{Decoded, Decoder};
use super::mem::Space;
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
    op.mods.retain(|m| !KNOWN.contains(m) && !m.starts_with("L1::") && !m.starts_with("L2::"));
}

pub(super) fn need(operands: &[Operand], n: usize) -> Decoded<()> {
    if operands.len() == n { Ok(()) } else { Err(format!("expected {n} operands, found {}", operands.len())) }
}

pub(super) fn unknown<T>(op: &Op<'_>) -> Decoded<T> {
    Err(format!("unknown opcode or modifiers of {}", op.base))
}

pub(super) const PACK: Alu = alu!(|r, i, m| pack(r, i, m));
pub(super) const UNPACK: Alu = alu!(|r, i, m| unpack(r, i, m));

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
            put_raw(r, File::W, row, v.map(|x| x >> (bits * n as u32) & ((1 << bits) - 1)), m);
        }
    }
}

#[inline(always)]
fn select<const LONG: bool>(r: &mut Regs, i: &Inst, m: u32) {
    let file = if LONG { File::Q } else { File::W };
    let (a, b) = (raw(r, file, i.a), raw(r, file, i.b));
    let p = super::alu::pred(r, i.c, i.k != 0);
    put_raw(r, file, i.d, std::array::from_fn(|l| if p >> l & 1 == 1 { a[l] } else { b[l] }), m);
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
        if let Some(name) = op.base.strip_prefix("call ") {
            return self.builtin(name, o);
        }
        match op.base {
            "ld" | "ldu" | "st" => self.memory(op, o),
            "atom" | "red" => self.atomic(op, o),
            "mov" => self.mov(op, o),
            "cvt" => self.cvt(op, o),
            "cvta" => self.cvta(op, o),
            "setp" => self.setp(op, o),
            "set" => self.set(op, o),
            "testp" => self.testp(op, o),
            "slct" => self.slct(op, o),
            "prmt" => self.prmt(op, o),
            "lop3" => self.lop3(op, o),
            "isspacep" => self.isspacep(op, o),
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
                let (row, not) = self.predicate(&o[3])?;
                (i.c, i.k) = (row, u8::from(not));
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
                need(o, 0)?;
                op.take("uni");
                Ok(Self::blank(Act::Exit, Class::Control))
            }
            "trap" if o.is_empty() => Ok(Self::blank(Act::Trap, Class::Control)),
            "bar" | "barrier" => self.barrier(op, o),
            "membar" | "fence" => {
                need(o, 0)?;
                op.mods.clear();
                Ok(Self::blank(Act::Nop, Class::Barrier))
            }
            "prefetch" | "prefetchu" | "applypriority" | "discard" => self.cache_control(op, o),
            "createpolicy" => self.policy(op, o),
            "nanosleep" => {
                need(o, 1)?;
                self.src(&o[0], Ty::U32)?;
                op.ty();
                Ok(Self::blank(Act::Nop, Class::Control))
            }
            "brkpt" => {
                need(o, 0)?;
                Ok(Self::blank(Act::Nop, Class::Control))
            }
            "pmevent" => {
                op.take("mask");
                match o {
                    [Operand::Int(_)] => Ok(Self::blank(Act::Nop, Class::Control)),
                    _ => Err("pmevent takes a number".into()),
                }
            }
            "cp" => self.copy(op, o),
            "shfl" | "vote" | "match" | "redux" | "activemask" => self.exchange(op, o),
            "mma" => self.mma(op, o),
            "ldmatrix" => self.ldmatrix(op, o),
            "stmatrix" => self.stmatrix(op, o),
            "movmatrix" => self.movmatrix(op, o),
            "wmma" => self.wmma(op, o),
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

    pub(super) fn arithmetic(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        if let Some(i) = self.chain(op, o) {
            return i;
        }
        let last = op.mods.last().and_then(|m| Ty::from_name(m)).ok_or("no type")?;
        let float = matches!(last, Ty::F32 | Ty::F64 | Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2 | Ty::F32x2);
        let found = match op.base {
            "bfe" | "bfi" => bit_field(op),
            _ if float => floating(op),
            _ => match more(op) {
                Some(a) => Some(a),
                None => integer(op),
            },
        };
        let Some(a) = found else { return unknown(op) };
        need(o, a.src.len() + 1)?;
        let mut i = Self::blank(self.alu(a.f), a.class);
        i.k = a.k;
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
        // Two-source functions over packed halves read all three rows.
        (i.a, i.b, i.c, i.x) = (rows[0], rows[1], rows[2], u32::from(rows[3]));
        if float {
            i.b = if i.b == NONE { i.a } else { i.b };
            i.c = if i.c == NONE { i.a } else { i.c };
        }
        Ok(i)
    }

    fn cvt(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        if op.take("pack") {
            return self.cvt_pack(op, o);
        }
        let Some(c) = convert(op) else { return unknown(op) };
        need(o, if c.pair { 3 } else { 2 })?;
        let mut i = Self::blank(self.alu(c.f), Class::Convert);
        // Destination and source registers may be wider than the types; packed formats are bits of their size.
        let plain = |t: Ty| match t {
            Ty::Tf32 => Ty::B32,
            Ty::E4m3x2 | Ty::E5m2x2 => Ty::B16,
            t => t,
        };
        let Operand::Reg(r) = o[0] else {
            return Err("the destination is not a register".into());
        };
        let half = self.reg_ty(r).size() == 2;
        let ((df, d), (sf, a)) = (self.wider(&o[0], plain(c.d))?, self.wider(&o[1], plain(c.s))?);
        (i.d, i.a, i.y) = (d, a, c.y);
        i.k = u8::from(df == File::Q) | u8::from(sf == File::Q) << 1 | u8::from(half) << 2;
        if c.pair {
            if (df, sf) != (File::W, File::W) {
                return Err("a register does not fit the conversion".into());
            }
            i.b = self.src(&o[2], c.s)?;
        }
        Ok(i)
    }
}
