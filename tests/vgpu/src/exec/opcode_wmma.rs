//! Operands of the `wmma` instructions.

use super::alu::Op;
use super::decode::{Decoded, Decoder};
use super::opcode::{need, space, unknown};
use super::wmma::{Element, Move, Product, Wmma};
use super::{Act, Class, Inst};
use crate::ptx::{Operand, Ty};

/// Takes the next `.row` or `.col`; whether it was `.row`.
fn by_row(op: &mut Op<'_>) -> Decoded<bool> {
    let at = op.mods.iter().position(|m| matches!(*m, "row" | "col"));
    at.map(|i| op.mods.remove(i) == "row").ok_or_else(|| "no layout".into())
}

fn shape(op: &mut Op<'_>) -> Decoded<(usize, usize, usize)> {
    let known =
        [("m16n16k16", (16, 16, 16)), ("m32n8k16", (32, 8, 16)), ("m8n32k16", (8, 32, 16)), ("m16n16k8", (16, 16, 8))];
    let found = known.into_iter().find(|(name, _)| op.take(name));
    found.map(|(_, s)| s).ok_or_else(|| "no shape".into())
}

fn element(ty: Ty) -> Option<Element> {
    Some(match ty {
        Ty::F16 => Element::F16,
        Ty::Bf16 => Element::Bf16,
        Ty::Tf32 => Element::Tf32,
        Ty::S8 => Element::S8,
        Ty::U8 => Element::U8,
        _ => return None,
    })
}

/// Registers of a fragment of A or B of so many elements, and what they hold. Source: PTX ISA, "Matrix fragments for WMMA".
fn factors(element: Element, elements: usize) -> (usize, Ty) {
    let tight = elements / 32 * element.size() / 4;
    match element {
        Element::F16 => (8, Ty::F16x2),
        Element::Bf16 => (tight, Ty::Bf16x2),
        Element::Tf32 => (tight, Ty::Tf32),
        Element::S8 | Element::U8 => (tight, Ty::U32),
    }
}

/// Registers of a fragment of C or D, and what they hold.
fn sums(ty: Ty) -> (usize, Ty) {
    match ty {
        Ty::F16 => (4, Ty::F16x2),
        ty => (8, ty),
    }
}

impl Decoder<'_> {
    /// A fragment: registers alone, also where it is read.
    fn wmma_registers(&mut self, o: &Operand, (n, ty): (usize, Ty)) -> Decoded<Vec<u16>> {
        match o {
            Operand::Vector(list) if list.iter().all(|o| matches!(o, Operand::Reg(_))) => self.fragment(o, n, ty),
            _ => Err(format!("expected {n} registers in braces")),
        }
    }

    /// `wmma.load`, `wmma.store` and `wmma.mma`, whose modifiers the table of forms has checked.
    pub(super) fn wmma(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        if !op.take("sync") || !op.take("aligned") {
            return unknown(op);
        }
        let found = match () {
            () if op.take("mma") => Wmma::Product(self.wmma_product(op, o)?),
            () if op.take("load") => Wmma::Move(self.wmma_move(op, o, false)?),
            () if op.take("store") => Wmma::Move(self.wmma_move(op, o, true)?),
            () => return unknown(op),
        };
        Ok(Self::blank(Act::Wmma(Box::new(found)), Class::Tensor))
    }

    fn wmma_move(&mut self, op: &mut Op<'_>, o: &[Operand], store: bool) -> Decoded<Move> {
        let (address, fragment, stride) = match o {
            [a, f] if store => (a, f, None),
            [a, f, s] if store => (a, f, Some(s)),
            [f, a] => (a, f, None),
            [f, a, s] => (a, f, Some(s)),
            _ => return Err(format!("expected 2 or 3 operands, found {}", o.len())),
        };
        let ty = op.ty().ok_or("no type")?;
        let (m, n, k) = shape(op)?;
        let by_row = by_row(op)?;
        let side = match () {
            () if op.take("a") => Some((m, k)),
            () if op.take("b") => Some((k, n)),
            () if op.take("c") || op.take("d") => None,
            () => return unknown(op),
        };
        let (shape, size, registers) = match side {
            Some(shape) => {
                let Some(e) = element(ty) else { return unknown(op) };
                (shape, e.size(), factors(e, shape.0 * shape.1))
            }
            None => ((m, n), ty.size(), sums(ty)),
        };
        let at = space(op);
        Ok(Move {
            store,
            at: self.address(address, at)?,
            stride: stride.map(|s| self.src(s, Ty::U32)).transpose()?,
            shape,
            size,
            by_row,
            sums: side.is_none(),
            regs: self.wmma_registers(fragment, registers)?,
            scratch: self.matrix_rows(),
        })
    }

    fn wmma_product(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Product> {
        need(o, 4)?;
        let types: Vec<Ty> = (0..4).map_while(|_| op.ty()).collect();
        let (c, factor, d) = match types[..] {
            [c, d] => (c, Ty::F16, d),
            [c, b, a, d] if a == b => (c, a, d),
            _ => return unknown(op),
        };
        let Some(element) = element(factor) else {
            return unknown(op);
        };
        let saturate = op.take("satfinite");
        let (m, n, k) = shape(op)?;
        let by_row = (by_row(op)?, by_row(op)?);
        let regs = [
            self.wmma_registers(&o[0], sums(d))?,
            self.wmma_registers(&o[1], factors(element, m * k))?,
            self.wmma_registers(&o[2], factors(element, k * n))?,
            self.wmma_registers(&o[3], sums(c))?,
        ];
        Ok(Product { shape: (m, n, k), element, by_row, halves: (d == Ty::F16, c == Ty::F16), saturate, regs })
    }
}
