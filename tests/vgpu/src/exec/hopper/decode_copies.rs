//! Operands of barrier objects and bulk copies.

use super::bulk::{BulkCopy, Reduction, Tensor, Way};
use super::decode::{number, one_of, order, shared};
use super::mbarrier::Arrival;
use super::{BarrierOp, Op, Turn};
use crate::exec::alu::Op as Opcode;
use crate::exec::decode::{Decoded, Decoder};
use crate::exec::mem::{Address, AtomicOp, Space};
use crate::exec::opcode::{need, unknown};
use crate::exec::{Act, Class, Inst, NONE};
use crate::ptx::{Operand, Ty};

impl Decoder<'_> {
    pub(super) fn mbarrier(&mut self, op: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Inst> {
        if op.take("pending_count") {
            need(o, 2)?;
            if op.ty() != Some(Ty::B64) {
                return unknown(op);
            }
            let mut i = Self::blank(Act::Alu(super::PENDING_COUNT.pick(self.build)), Class::Barrier);
            (i.d, i.a) = (self.dst(&o[0], Ty::B32)?, self.src(&o[1], Ty::B64)?);
            return Ok(i);
        }
        if op.ty() != Some(Ty::B64) {
            return unknown(op);
        }
        let base = op.mods.first().copied().unwrap_or("");
        if !op.mods.is_empty() {
            op.mods.remove(0);
        }
        let expect = base != "expect_tx" && op.take("expect_tx");
        let no_complete = op.take("noComplete");
        let parity = op.take("parity");
        let space = shared(op);
        order(op);
        let (turn, first) = match base {
            "init" => (Turn::Init { count: self.count(o, 1)? }, 0),
            "inval" => (Turn::Invalidate, 0),
            "expect_tx" => (Turn::ExpectTx { bytes: self.count(o, 1)? }, 0),
            "complete_tx" => (Turn::CompleteTx { bytes: self.count(o, 1)? }, 0),
            "arrive" | "arrive_drop" => {
                let token = match o.first() {
                    Some(Operand::Sink) => NONE,
                    Some(Operand::Reg(_)) if space != Space::Cluster => self.dst(&o[0], Ty::B64)?,
                    Some(Operand::Address(..)) => return Err("no destination of the state; `_` drops it".into()),
                    _ => return Err("the state of a barrier of another block cannot be kept; use `_`".into()),
                };
                let count = if expect || no_complete || o.len() > 2 {
                    need(o, 3)?;
                    Some(self.src(&o[2], Ty::U32)?)
                } else {
                    need(o, 2)?;
                    None
                };
                let how = Arrival { no_complete, drop: base == "arrive_drop" };
                let turn = if expect {
                    Turn::Arrive { token, how, count: None, bytes: count }
                } else {
                    Turn::Arrive { token, how, count, bytes: None }
                };
                (turn, 1)
            }
            "test_wait" | "try_wait" => {
                let hinted = base == "try_wait" && o.len() == 4;
                need(o, if hinted { 4 } else { 3 })?;
                let state = self.src(&o[2], if parity { Ty::U32 } else { Ty::B64 })?;
                let done = self.dst(&o[0], Ty::Pred)?;
                (Turn::Wait { done, state, parity }, 1)
            }
            _ => {
                op.mods.insert(0, base);
                return unknown(op);
            }
        };
        if first == 0 && !matches!(turn, Turn::Invalidate) {
            need(o, 2)?;
        }
        let remote = matches!(turn, Turn::ExpectTx { .. } | Turn::CompleteTx { .. } | Turn::Arrive { .. });
        if space == Space::Cluster && !remote {
            return Err("only arrivals and transaction counts reach a barrier of another block".into());
        }
        let at = self.address(o.get(first).ok_or("no address")?, space)?;
        Ok(Self::own(Op::Barrier(BarrierOp { at, turn }), Class::Barrier))
    }

    fn count(&mut self, o: &[Operand], n: usize) -> Decoded<u16> {
        self.src(o.get(n).ok_or("no count")?, Ty::U32)
    }

    pub(super) fn copy_arrive(&mut self, op: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 1)?;
        if !["async", "mbarrier", "arrive", "b64"].iter().all(|m| op.take(m)) {
            return unknown(op);
        }
        let extra = !op.take("noinc");
        let space = shared(op);
        let at = self.address(&o[0], space)?;
        let turn = Turn::CopiesArrive { extra };
        Ok(Self::own(Op::Barrier(BarrierOp { at, turn }), Class::Barrier))
    }

    pub(super) fn bulk(&mut self, op: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Inst> {
        let reduce = op.take("reduce");
        if !op.take("async") || !op.take("bulk") {
            return unknown(op);
        }
        if op.take("commit_group") {
            need(o, 0)?;
            return Ok(Self::own(Op::CommitCopies, Class::Memory));
        }
        if op.take("wait_group") {
            need(o, 1)?;
            let (keep, read) = (number(o.first())? as u32, op.take("read"));
            return Ok(Self::own(Op::WaitCopies { keep, read }, Class::Memory));
        }
        let hint = op.take("L2::cache_hint");
        let mut o = o.to_vec();
        if hint {
            let policy = o.pop().ok_or("no cache policy")?;
            self.src(&policy, Ty::B64)?;
        }
        let prefetch = op.take("prefetch");
        let tensor = op.take("tensor");
        let rank = if tensor {
            let Some(rank) = one_of(op, &[("1d", 1), ("2d", 2), ("3d", 3), ("4d", 4), ("5d", 5)]) else {
                return unknown(op);
            };
            if op.mods.iter().any(|m| m.starts_with("im2col") || m.starts_with("tile::")) {
                return Err(
                    "only the tile mode of tensor copies is executed here, not im2col, gather or scatter".into()
                );
            }
            op.take("tile");
            rank
        } else {
            0
        };
        let reduction = if reduce {
            // Tensor copies take the type from the map.
            let ty = if tensor { Ty::B32 } else { op.ty().ok_or("no type")? };
            Some(self.reduction(op, ty, tensor)?)
        } else {
            None
        };
        // Spaces come as destination, then source.
        let spaces: Vec<&str> =
            op.mods.iter().copied().filter(|m| m.starts_with("shared") || *m == "global" || *m == "L2").collect();
        op.mods.retain(|m| !spaces.contains(m));
        let bytes = op.take("mbarrier::complete_tx::bytes");
        let grouped = op.take("bulk_group");
        let multicast = op.take("multicast::cluster");
        let place = |d: &mut Self, at: usize| -> Decoded<(Option<Tensor>, Option<Address>)> {
            match o.get(at) {
                Some(Operand::Tensor(base, rest)) if tensor => {
                    let [Operand::Vector(list)] = &rest[..] else {
                        return Err("expected the coordinates of a tensor".into());
                    };
                    if list.len() != rank {
                        return Err(format!("{} coordinates of a tensor of rank {rank}", list.len()));
                    }
                    let map = d.address(base, Space::Generic)?;
                    let at = list.iter().map(|c| d.src(c, Ty::S32)).collect::<Decoded<_>>()?;
                    Ok((Some(Tensor { map, at }), None))
                }
                Some(a @ Operand::Address(..)) if !tensor => Ok((None, Some(d.address(a, Space::Global)?))),
                _ => Err("expected an address in global memory".into()),
            }
        };
        let given = o.len();
        let expect = |n: usize| {
            if given == n { Ok(()) } else { Err(format!("expected {n} operands, found {given}")) }
        };
        let sizes = usize::from(!tensor);
        let (way, shared_at, global, size_at) = match &spaces[..] {
            ["L2", "global"] if prefetch && !reduce && !bytes && !grouped && !multicast => {
                expect(1 + sizes)?;
                (Way::Prefetch, None, place(self, 0)?, 1)
            }
            [to @ ("shared::cluster" | "shared::cta"), "global"] if bytes && !grouped && !reduce && !prefetch => {
                expect(3 + sizes + usize::from(multicast))?;
                let to = if *to == "shared::cluster" { Space::Cluster } else { Space::Shared };
                let bar = self.address(&o[2 + sizes], to)?;
                let mask = if multicast { Some(self.src(&o[3 + sizes], Ty::U16)?) } else { None };
                if multicast && to != Space::Cluster {
                    return unknown(op);
                }
                let way = Way::Load { bar, multicast: mask };
                (way, Some(self.address(&o[0], to)?), place(self, 1)?, 2)
            }
            ["global", "shared::cta"] if grouped && !bytes && !prefetch && !multicast => {
                expect(2 + sizes)?;
                (Way::Store, Some(self.address(&o[1], Space::Shared)?), place(self, 0)?, 2)
            }
            ["shared::cluster", "shared::cta"] if bytes && !grouped && !prefetch && !tensor && !multicast => {
                expect(4)?;
                let (to, bar) = (self.address(&o[0], Space::Cluster)?, self.address(&o[3], Space::Cluster)?);
                (Way::Across { to, bar }, Some(self.address(&o[1], Space::Shared)?), (None, None), 2)
            }
            _ => {
                op.mods.extend(spaces);
                return unknown(op);
            }
        };
        let size = if tensor {
            None
        } else {
            let at = if matches!(way, Way::Prefetch) { 1 } else { size_at };
            Some(self.src(&o[at], Ty::U32)?)
        };
        let (tensor, global) = global;
        let copy = BulkCopy { way, shared: shared_at, global, tensor, size, reduction };
        Ok(Self::own(Op::Copy(copy), Class::Memory))
    }

    pub(super) fn store_async(&mut self, op: &mut Opcode<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 3)?;
        op.take("async");
        let reduce = op.base == "red";
        let ty = op.ty().ok_or("no type")?;
        let n = one_of(op, &[("v2", 2), ("v4", 4)]).unwrap_or(1);
        order(op);
        let weak = op.take("weak");
        if !op.take("shared::cluster") || !op.take("mbarrier::complete_tx::bytes") || ty.size() < 4 || weak && reduce {
            return unknown(op);
        }
        let reduction = if reduce { Some(self.reduction(op, ty, false)?) } else { None };
        let value = self.list(&o[1], ty)?;
        if value.len() != n || value.iter().any(|(f, row)| *row == NONE || *f != crate::exec::decode::file_of(ty)) {
            return Err("the value does not fit the type".into());
        }
        let (to, bar) = (self.address(&o[0], Space::Cluster)?, self.address(&o[2], Space::Cluster)?);
        let element = ty.size();
        Ok(Self::own(Op::StoreAsync { to, bar, value, element, reduction }, Class::Memory))
    }

    /// The operation of a reduction; `any` leaves the type to be checked when it runs.
    fn reduction(&mut self, op: &mut Opcode<'_>, ty: Ty, any: bool) -> Decoded<Reduction> {
        use AtomicOp::*;
        op.take("noftz");
        let names = [
            ("and", And),
            ("or", Or),
            ("xor", Xor),
            ("add", Add),
            ("inc", Inc),
            ("dec", Dec),
            ("min", Min),
            ("max", Max),
        ];
        let Some(what) = one_of(op, &names) else {
            return unknown(op);
        };
        if any || Reduction::fits(what, ty) {
            return Ok(Reduction { what, ty });
        }
        Err(format!("no reduction {what:?} of {ty:?}"))
    }
}
