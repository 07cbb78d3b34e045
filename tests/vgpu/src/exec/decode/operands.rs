//! Rows of the operands of an instruction: registers, literals, symbols, addresses.

use super::super::{File, NONE, mem};
use super::{Decoded, Decoder, agrees, bits, compatible, file_of, integer};
use crate::ptx::{Operand, Space, Ty};

/// Whether a register may hold a type in `ld`, `st` and `cvt`, where it may also be wider: not so a float that is not the same.
/// Source: PTX ISA, "Operand size exceeding instruction-type size".
fn holds(register: Ty, ty: Ty) -> bool {
    let float = !bits(register) && !integer(register);
    register == ty
        || register.size() >= ty.size() && compatible(register, ty) && (!float || register.size() == ty.size())
}

impl Decoder<'_> {
    /// Row of a source operand in any file, with the file.
    pub(in crate::exec) fn any(&mut self, op: &Operand, ty: Ty) -> Decoded<(File, u16)> {
        let file = file_of(ty);
        Ok(match op {
            Operand::Reg(r) => {
                let t = self.reg_ty(*r);
                if t == Ty::B128 {
                    return Err("128-bit registers are not known".into());
                }
                (file_of(t), self.row_of[*r as usize] as u16)
            }
            Operand::Int(x) => {
                if !bits(ty) && !integer(ty) && ty != Ty::Pred {
                    return Err(format!("an integer literal where .{} is needed", ty.name()));
                }
                let bits = if ty.size() < 8 { x & ((1 << (8 * ty.size())) - 1) } else { *x };
                (file, self.constant(file, bits))
            }
            Operand::F32(x) if matches!(ty, Ty::F32 | Ty::B32 | Ty::Tf32) => {
                (File::W, self.constant(File::W, u64::from(*x)))
            }
            Operand::F64(x) if matches!(ty, Ty::F64 | Ty::B64) => (File::Q, self.constant(File::Q, *x)),
            Operand::F64(x) if ty == Ty::F32 => {
                (File::W, self.constant(File::W, u64::from((f64::from_bits(*x) as f32).to_bits())))
            }
            Operand::Special(_) if !self.values => {
                return Err("a special register is an operand of mov and cvt only".into());
            }
            Operand::Symbol(..) if !self.values => return Err("an address is a value in mov only".into()),
            Operand::Special(name) => (File::W, self.special(name)?),
            Operand::Symbol(name, offset) => {
                let v = self.symbol(name)?.1.wrapping_add(*offset as u64);
                (file, self.constant(file, v))
            }
            _ => return Err("an operand of this form is not known here".into()),
        })
    }

    /// Row of a source operand of a type; the register's type must agree with it.
    pub(in crate::exec) fn src(&mut self, op: &Operand, ty: Ty) -> Decoded<u16> {
        if let Operand::Reg(r) | Operand::NotReg(r) = op
            && !agrees(self.reg_ty(*r), ty)
        {
            let t = self.reg_ty(*r).name();
            return Err(format!("a register of type .{t} where .{} is needed", ty.name()));
        }
        let (file, row) = self.any(op, ty)?;
        if file != file_of(ty) {
            return Err(format!("an operand does not fit .{}", ty.name()));
        }
        Ok(row)
    }

    /// Row of a register that a load, store or conversion names: it may be wider than the type.
    pub(in crate::exec) fn wider(&mut self, op: &Operand, ty: Ty) -> Decoded<(File, u16)> {
        if let Operand::Reg(r) = op
            && !holds(self.reg_ty(*r), ty)
        {
            let t = self.reg_ty(*r).name();
            return Err(format!("a register of type .{t} cannot hold .{}", ty.name()));
        }
        self.any(op, ty)
    }

    /// Row of a destination; `_` gives [`NONE`] where `sink` allows it.
    pub(in crate::exec) fn dst(&mut self, op: &Operand, ty: Ty) -> Decoded<u16> {
        match op {
            Operand::Reg(_) => self.src(op, ty),
            _ => Err("the destination is not a register".into()),
        }
    }

    /// Row of a predicate source and whether it is negated.
    pub(in crate::exec) fn predicate(&mut self, op: &Operand) -> Decoded<(u16, bool)> {
        match op {
            Operand::NotReg(r) if self.reg_ty(*r) == Ty::Pred => Ok((self.row_of[*r as usize] as u16, true)),
            Operand::Int(x) => Ok((self.constant(File::P, u64::from(*x != 0)), false)),
            _ => Ok((self.src(op, Ty::Pred)?, false)),
        }
    }

    /// A destination, `_`, or both sides of `a|b`.
    pub(in crate::exec) fn dst_pair(&mut self, op: &Operand, a: Ty, b: Ty) -> Decoded<(u16, u16)> {
        let mut one = |o: &Operand, ty| if *o == Operand::Sink { Ok(NONE) } else { self.dst(o, ty) };
        match op {
            Operand::Pair(x, y) => Ok((one(x, a)?, one(y, b)?)),
            _ => Ok((one(op, a)?, NONE)),
        }
    }

    /// Rows of `{a, b, ...}` or of a single operand, each of one type and in the register's own file.
    pub(in crate::exec) fn list(&mut self, op: &Operand, ty: Ty) -> Decoded<Vec<(File, u16)>> {
        match op {
            Operand::Vector(v) => {
                v.iter().map(|o| if *o == Operand::Sink { Ok((file_of(ty), NONE)) } else { self.any(o, ty) }).collect()
            }
            _ => Ok(vec![self.any(op, ty)?]),
        }
    }

    /// An address operand in a space.
    pub(in crate::exec) fn address(&mut self, op: &Operand, space: mem::Space) -> Decoded<mem::Address> {
        let Operand::Address(base, offset) = op else {
            return Err("expected an address".into());
        };
        let wide_only = matches!(space, mem::Space::Global | mem::Space::Generic);
        let (file, row) = match &**base {
            Operand::Reg(r) => {
                let t = self.reg_ty(*r);
                if !bits(t) && !integer(t) || t.size() != 8 && (t.size() != 4 || wide_only) {
                    return Err(format!("a register of type .{} is no address in this space", t.name()));
                }
                self.any(base, Ty::U64)?
            }
            Operand::Int(_) if wide_only => return Err("a number is no address in this space".into()),
            Operand::Symbol(name, o) => {
                let (declared, v) = self.symbol(name)?;
                let fits = match space {
                    mem::Space::Generic | mem::Space::Global => matches!(declared, Space::Global | Space::Const),
                    mem::Space::Shared | mem::Space::Cluster => declared == Space::Shared,
                    mem::Space::Local => declared == Space::Local,
                    mem::Space::Param => declared == Space::Param,
                };
                if !fits {
                    return Err(format!("{name} is not in the space of the access"));
                }
                (File::Q, self.constant(File::Q, v.wrapping_add(*o as u64)))
            }
            other => self.any(other, Ty::U64)?,
        };
        Ok(mem::Address { file, row, offset: *offset, space })
    }
}
