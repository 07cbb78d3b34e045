//! Atomics and reductions, lane by lane in order.

use super::launch::Cta;
use super::mem::{Atomic, LaneFault, Space, apply, lanes};
use super::races::{Kind, STRONG};
use super::site::place;
use super::{Inst, LANES, Regs, put_raw, raw};
use crate::error::FaultKind;

impl Cta<'_> {
    /// Executes an atomic for the lanes of `mask`.
    pub fn run_atomic(&mut self, r: &mut Regs, warp: usize, i: &Inst, op: &Atomic, mask: u32) -> Result<(), LaneFault> {
        let at = op.at.lanes(r);
        let b = raw(r, op.b.0, op.b.1);
        let c = op.c.map_or([0; LANES], |(f, row)| raw(r, f, row));
        let bytes = op.ty.size() as u64;
        let (mut old, mut global, mut changed) = ([0; LANES], 0, false);
        if self.program.asynchronous {
            self.watch(warp, op.at.space, &at, bytes, mask)?;
            self.watched(i, warp, (op.at.space, &at, mask), Kind::Atomic);
        }
        for lane in lanes(mask) {
            let (space, region, offset) = self.lane_region(warp, lane, op.at.space, at[lane], bytes)?;
            if region.read_only {
                let m = format!("atomic at {:#x} of constant memory or parameters", at[lane]);
                return Err((lane, FaultKind::ReadOnly, m));
            }
            if !region.is_written(offset, bytes as u32) {
                return Err(self.unwritten(lane, space, at[lane], bytes));
            }
            global += u64::from(space == Space::Global);
            old[lane] = match bytes {
                8 => region.update64(offset, |x| apply(op.op, op.ty, x, b[lane], c[lane])),
                2 => u64::from(region.update16(offset, |x| apply(op.op, op.ty, u64::from(x), b[lane], c[lane]) as u16)),
                _ => u64::from(region.update32(offset, |x| apply(op.op, op.ty, u64::from(x), b[lane], c[lane]) as u32)),
            };
            let new = apply(op.op, op.ty, old[lane], b[lane], c[lane]);
            changed |= new != old[lane];
            let spot = self.place_of(space, region, offset);
            self.record((warp, lane), space, spot.0, (spot.1, bytes), Kind::Atomic, i.order | STRONG)?;
        }
        self.changes += u64::from(changed);
        if global > 0 {
            let site = &mut self.sites[place(i.site, warp)];
            site.see(Space::Global, &at, mask, bytes);
            self.counters.global_requests += 1;
            self.counters.global_sectors += site.sectors;
            self.counters.global_read += global * bytes;
            self.counters.global_written += global * bytes;
        }
        if let Some((file, row)) = op.d {
            put_raw(r, file, row, old, mask);
        }
        Ok(())
    }
}
