//! `wgmma.mma_async` of one warp: agreement of the warpgroup, checks of the operands, the product, the record of it.

use super::act::{Here, line};
use super::descriptor::{Descriptor, Operand};
use super::product::{self, Form, TileA};
use super::state::InFlight;
use super::{Product, Source};
use crate::error::FaultKind;
use crate::exec::launch::{Cta, Resident};
use crate::exec::mem::LaneFault;
use crate::exec::warp::Warp;
use crate::exec::{LANES, Regs};

/// The value that all lanes must agree on.
fn uniform(r: &Regs, row: u16) -> Result<u64, LaneFault> {
    let v = &r.q[row as usize];
    match v.iter().position(|x| *x != v[0]) {
        None => Ok(v[0]),
        Some(l) => {
            let m = format!("lane {l} gives descriptor {:#x}, lane 0 {:#x}", v[l], v[0]);
            Err((l, FaultKind::Warpgroup, m))
        }
    }
}

/// Reads one 16-byte piece of an operand.
#[inline(always)]
fn fetch(shared: &crate::exec::region::Region, at: u64) -> u128 {
    let mut out = [0; 2];
    shared.read(at, &mut out);
    u128::from(out[0]) | u128::from(out[1]) << 64
}

impl Cta<'_> {
    pub(super) fn product(&mut self, h: &Here<'_>, warp: &mut Warp, x: &Product) -> Result<(), LaneFault> {
        let group_fault = |m: String| h.fault(FaultKind::Warpgroup, m);
        if h.active != u32::MAX {
            return Err(group_fault(format!("only lanes {:#010x} of the warp execute the product", h.active)));
        }
        if (h.warp / 4 * 4 + 4) * LANES > self.shape.block_threads() {
            let m =
                format!("a warpgroup of fewer than four warps: the block has {} threads", self.shape.block_threads());
            return Err(group_fault(m));
        }
        let b_bits = uniform(&warp.regs, x.descriptor)?;
        let a_bits = match x.from {
            Source::Shared(row) => uniform(&warp.regs, row)?,
            Source::Registers(_) => 0,
        };
        let scale = warp.regs.p[x.scale_d.0 as usize] ^ if x.scale_d.1 { !0 } else { 0 };
        if scale != 0 && scale != u32::MAX {
            return Err(group_fault(format!("lanes disagree on scale-d: {scale:#010x}")));
        }
        let add = scale != 0;
        self.agree(h, (h.pc, a_bits, b_bits, add))?;
        warp.hopper.registers.product(&x.tracked_d, &x.tracked_a).map_err(|(at, m)| {
            let by = at.map_or(String::new(), |pc| format!(" ({})", line(h.p, pc as usize)));
            h.fault(FaultKind::Warpgroup, format!("{m}{by}"))
        })?;

        let wrong = |m: String| h.fault(FaultKind::Descriptor, m);
        let b = Operand { at: Descriptor::decode(b_bits).map_err(wrong)?, major: x.major_b, first: 0, rows: x.n };
        let mut tile: TileA = [[0.0; 32]; 16];
        let group = warp.hopper.registers.group();
        match x.from {
            Source::Registers(rows) => product::tile_of_registers(&warp.regs, &rows, x.a, &mut tile),
            Source::Shared(_) => {
                let a = Operand {
                    at: Descriptor::decode(a_bits).map_err(wrong)?,
                    major: x.major_a,
                    first: h.warp % 4 * 16,
                    rows: 16,
                };
                let range = self.readable(h, &a, "A")?;
                let shared = &self.resident[self.at].shared;
                for group in 0..2 {
                    let pieces = a.block(group).map(|at| fetch(shared, at));
                    product::tile_of_pieces(&mut tile, a.major, group, x.a, &pieces, h.p.build);
                }
                self.in_flight(h, group, a, range);
            }
        }
        let range = self.readable(h, &b, "B")?;
        let form = Form {
            a: x.a,
            b: x.b,
            sum: x.sum,
            add,
            negate: x.negate,
            unit: Form::unit_of(self.shape.products, x.a, x.sum),
        };
        let shared = &self.resident[self.at].shared;
        let pieces = |j: usize, out: &mut [u128; 16]| {
            *out = b.block(j).map(|at| fetch(shared, at));
        };
        product::multiply(&mut warp.regs, &x.d, &mut tile, &form, b.major, h.p.build, pieces);
        self.counters.tensor_flops += (2 * 16 * x.n * x.a.k()) as u64;
        self.in_flight(h, group, b, range);
        self.hopper.events += 1;
        Ok(())
    }

    fn in_flight(&mut self, h: &Here<'_>, group: u32, operand: Operand, range: (u64, u64)) {
        self.own().hopper.products.push(InFlight { warp: h.warp, group, operand, range, pc: h.pc });
    }

    /// Compares this product with what the other warps of the warpgroup have issued as their product of the same number.
    fn agree(&mut self, h: &Here<'_>, mine: (usize, u64, u64, bool)) -> Result<(), LaneFault> {
        let group = &mut self.own().hopper.groups[h.warp / 4];
        let n = group.issued[h.warp % 4];
        match group.log.get(n - group.base) {
            None => group.log.push_back(mine),
            Some(theirs) if *theirs == mine => {}
            Some((pc, a, b, add)) => {
                let m = if *pc != mine.0 {
                    format!(
                        "the warps of a warpgroup issue different products: this one and that of {}",
                        line(h.p, *pc)
                    )
                } else {
                    format!(
                        "the warps of a warpgroup give different descriptors or scale-d: {:#x}, {:#x}, {} and {a:#x}, {b:#x}, {add}",
                        mine.1, mine.2, mine.3
                    )
                };
                return Err(h.fault(FaultKind::Warpgroup, m));
            }
        }
        group.issued[h.warp % 4] += 1;
        let all = group.issued.iter().min().copied().unwrap_or(0);
        while group.base < all {
            group.log.pop_front();
            group.base += 1;
        }
        Ok(())
    }

    /// Checks that an operand lies in shared memory, is written, and that ordinary stores to it were fenced. Returns its
    /// lowest address and end.
    fn readable(&self, h: &Here<'_>, o: &Operand, name: &str) -> Result<(u64, u64), LaneFault> {
        let Resident { shared, hopper, .. } = &self.resident[self.at];
        // Usually everything around the operand is written, and nothing by ordinary stores.
        if let Some((low, high)) = o.bounds()
            && high <= shared.len
            && hopper.unstamped(low, high)
            && shared.all_written(low, high - low)
        {
            return Ok((low, high));
        }
        let (low, high) = o.range();
        if high > shared.len {
            let m = format!("operand {name} reaches offset {high} of {} bytes of shared memory", shared.len);
            return Err(h.fault(FaultKind::OutOfBounds, m));
        }
        for at in o.pieces() {
            if !shared.is_written(at, 16) {
                let (kind, m) = self.explain(at, 16).unwrap_or_else(|| {
                    let m = format!("16 bytes at {at:#x} of shared memory were never written");
                    (FaultKind::Uninitialised, m)
                });
                return Err(h.fault(kind, format!("operand {name}: {m}")));
            }
            if let Some(w) = hopper.unfenced(at, h.warp) {
                let m = format!(
                    "operand {name}: shared offset {at:#x} was stored to by warp {w} without a fence.proxy.async since"
                );
                return Err(h.fault(FaultKind::ProxyFence, m));
            }
        }
        Ok((low, high))
    }
}
