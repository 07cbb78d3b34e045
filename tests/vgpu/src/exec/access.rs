//! Loads and stores of a warp, with every check: a fast path for a whole warp at once and a careful one lane by lane.
//!
//! The fast path does what needs no message; as soon as anything is unusual (a fault, lanes in different allocations or
//! state spaces, race detection) the careful path does the whole access again from the start and names the lane.

use super::access_fast::{load_fast, store_fast};
use super::launch::Cta;
use super::marks::Origin;
use super::mem::{Access, LOCAL, LaneFault, PARAM, SHARED, Space, lanes};
use super::races::Kind;
use super::region::{Region, ones};
use super::site::place;
use super::{Inst, LANES, NONE, Regs, put_raw, raw};
use crate::error::FaultKind;

/// The window that an address belongs to, as a number.
#[inline(always)]
fn window(a: u64) -> u64 {
    let w = a >> 44;
    if w > 3 { 0 } else { w }
}

fn misaligned(lane: usize, a: u64, bytes: u64) -> LaneFault {
    let m = format!("address {a:#x} is not a multiple of {bytes}");
    (lane, FaultKind::Misaligned, m)
}

impl Cta<'_> {
    /// Space and address of an access; generic addresses lose their window. `None` when lanes are in different spaces.
    #[inline(always)]
    fn locate(&self, warp: usize, space: Space, at: &mut [u64; LANES], bytes: u64, mask: u32) -> Option<Space> {
        let mut space = space;
        if space == Space::Generic {
            let first = at[mask.trailing_zeros() as usize & 31];
            let w = window(first);
            if lanes(mask).any(|l| window(at[l]) != w) {
                return None;
            }
            space = [Space::Global, Space::Shared, Space::Local, Space::Param][w as usize];
            if w > 0 {
                at.iter_mut().for_each(|a| *a = a.wrapping_sub(w << 44));
            }
        }
        if space == Space::Cluster {
            return None;
        }
        if space == Space::Local {
            // Each thread has its own bytes; an address over the end must not reach the next thread's.
            let size = self.local_size as u64;
            for l in 0..LANES {
                if mask >> l & 1 == 1 && (at[l] > size || size - at[l] < bytes) {
                    return None;
                }
                at[l] = at[l].wrapping_add((warp * LANES + l) as u64 * size);
            }
        }
        Some(space)
    }

    /// The region in which an access lies altogether, if there is one.
    #[inline(always)]
    pub(super) fn span(&mut self, space: Space, site: usize, first: u64) -> Option<&Region> {
        let s = &mut self.sites[site];
        let low = first.wrapping_add(s.low_end);
        let region = match space {
            Space::Global => {
                let (start, len, index) = s.block;
                let offset = low.wrapping_sub(start);
                if offset < len && len - offset >= s.extent {
                    return Some(self.memory.block(index));
                }
                let index = self.memory.find(low, s.extent)?;
                let b = self.memory.block(index);
                s.block = (b.start, b.len, index);
                return Some(b);
            }
            Space::Shared => &self.resident[self.at].shared,
            Space::Local => &self.resident[self.at].local,
            _ => self.params,
        };
        let offset = low.wrapping_sub(region.start);
        (offset <= region.len && region.len - offset >= s.extent).then_some(region)
    }

    /// Counts sectors or bank passes of an access of `bytes` a lane.
    #[inline(always)]
    pub(super) fn count(&mut self, space: Space, site: usize, bytes: u64, mask: u32, write: bool) {
        let (s, c) = (&self.sites[site], &mut self.counters);
        match space {
            Space::Global => {
                c.global_requests += 1;
                c.global_sectors += s.sectors;
                let moved = bytes * u64::from(mask.count_ones());
                if write {
                    c.global_written += moved;
                } else {
                    c.global_read += moved;
                }
            }
            Space::Shared => {
                c.shared_wavefronts += s.passes;
                c.bank_conflicts += s.passes - s.least_passes;
            }
            _ => {}
        }
    }

    /// Executes a load for the lanes of `mask`.
    #[inline(always)]
    pub fn run_load(&mut self, r: &mut Regs, warp: usize, i: &Inst, op: &Access, mask: u32) -> Result<(), LaneFault> {
        let mut at = op.at.lanes(r);
        let bytes = (op.ty.size() * op.regs.len()) as u64;
        if self.program.asynchronous {
            self.watched(i, warp, (op.at.space, &at, mask), Kind::Read);
        }
        if let Some(space) = self.locate(warp, op.at.space, &mut at, bytes, mask) {
            let site = place(i.site, warp);
            let first = self.sites[site].see(space, &at, mask, bytes);
            self.count(space, site, bytes, mask, false);
            let shape = self.sites[site].shape;
            if self.races.is_none()
                && self.sites[site].misaligned.is_none()
                && let Some(region) = self.span(space, site, first)
                && load_fast(r, op, region, shape, &at, mask)
            {
                return Ok(());
            }
        }
        self.load_lanes(r, warp, i.order, op, mask)
    }

    /// Executes a store for the lanes of `mask`.
    #[inline(always)]
    pub fn run_store(&mut self, r: &Regs, warp: usize, i: &Inst, op: &Access, mask: u32) -> Result<(), LaneFault> {
        if r.marks.any() {
            return self.store_marked(r, warp, i, op, mask);
        }
        self.store(r, warp, i, op, mask)
    }

    /// [`Cta::run_store`] of values that somebody wrote.
    #[inline(always)]
    pub(super) fn store(&mut self, r: &Regs, warp: usize, i: &Inst, op: &Access, mask: u32) -> Result<(), LaneFault> {
        self.changes += 1;
        let mut at = op.at.lanes(r);
        let bytes = (op.ty.size() * op.regs.len()) as u64;
        if self.program.asynchronous {
            self.watch(warp, op.at.space, &at, bytes, mask)?;
            self.watched(i, warp, (op.at.space, &at, mask), Kind::Write);
        }
        if let Some(space) = self.locate(warp, op.at.space, &mut at, bytes, mask) {
            let site = place(i.site, warp);
            let first = self.sites[site].see(space, &at, mask, bytes);
            self.count(space, site, bytes, mask, true);
            let shape = self.sites[site].shape;
            if self.races.is_none()
                && self.sites[site].misaligned.is_none()
                && let Some(region) = self.span(space, site, first)
                && !region.read_only
                && store_fast(r, op, region, shape, &at, mask)
            {
                return Ok(());
            }
        }
        self.store_lanes(r, warp, i.order, op, mask)
    }

    /// Region and offset of one lane's access of `bytes`, checked for bounds and alignment.
    pub(super) fn lane_region(
        &self,
        warp: usize,
        lane: usize,
        space: Space,
        a: u64,
        bytes: u64,
    ) -> Result<(Space, &Region, u64), LaneFault> {
        if !a.is_multiple_of(bytes) {
            return Err(misaligned(lane, a, bytes));
        }
        // Shared memory of another block, and generic addresses that may be there.
        if space == Space::Cluster || space == Space::Generic && window(a) == 1 {
            let (slot, offset) = self.shared_place(space, a, bytes, bytes, lane)?;
            return Ok((Space::Shared, &self.resident[slot].shared, offset));
        }
        let (space, a) = match (space, window(a)) {
            (Space::Generic, 1) => (Space::Shared, a - SHARED),
            (Space::Generic, 2) => (Space::Local, a - LOCAL),
            (Space::Generic, 3) => (Space::Param, a - PARAM),
            (Space::Generic, _) => (Space::Global, a),
            (s, _) => (s, a),
        };
        let (region, size, base) = match space {
            Space::Global => {
                return match self.memory.find(a, bytes) {
                    Some(i) => {
                        let b = self.memory.block(i);
                        Ok((space, b, a - b.start))
                    }
                    None => {
                        let (kind, m) = self.memory.describe(a, bytes);
                        Err((lane, kind, m))
                    }
                };
            }
            Space::Shared => {
                let b = &self.resident[self.at].shared;
                (b, b.len, 0)
            }
            Space::Local => {
                let size = self.local_size as u64;
                (&self.resident[self.at].local, size, (warp * LANES + lane) as u64 * size)
            }
            _ => (self.params, self.params.len, 0),
        };
        if a > size || bytes > size - a {
            let m = format!("{bytes} bytes at offset {a} of {size} bytes of {space:?} memory");
            return Err((lane, FaultKind::OutOfBounds, m));
        }
        Ok((space, region, base + a))
    }

    /// What [`Cta::record`] wants to know of a place: the CTA whose shared memory it is in, and the offset or address.
    pub(super) fn place_of(&self, space: Space, region: &Region, offset: u64) -> (usize, u64) {
        if self.races.is_none() {
            return (self.at, offset);
        }
        match space {
            Space::Shared => {
                let mine = |r: &super::launch::Resident| std::ptr::eq(&r.shared, region);
                (self.resident.iter().position(mine).unwrap_or(self.at), offset)
            }
            _ => (self.at, region.start + offset),
        }
    }

    /// A load of bytes that nobody has written: where its value comes from, or the fault when the bytes are ones that no ordinary
    /// instruction may read now.
    pub(super) fn brought(
        &self,
        (warp, lane): (usize, usize),
        (space, region): (Space, &Region),
        (a, offset): (u64, u64),
        bytes: u64,
    ) -> Result<Origin, LaneFault> {
        if space == Space::Shared
            && let Some((kind, m)) = self.explain(a & 0xff_ffff, bytes)
        {
            return Err((lane, kind, m));
        }
        let copies = space == Space::Shared && self.resident[self.at].copies_in_flight > 0;
        let here = Origin { pc: self.pc, thread: warp * LANES + lane, space, address: a, bytes, copies };
        let missing = (offset..offset + bytes).find(|b| !region.is_written(*b, 1)).unwrap_or(offset);
        let before = if copies { None } else { self.carried.get(&(region.id(), missing)) };
        Ok(before.copied().unwrap_or(here))
    }

    /// The fault of an instruction that reads and uses bytes which nobody has written.
    pub(super) fn unwritten(&self, lane: usize, space: Space, a: u64, bytes: u64) -> LaneFault {
        if space == Space::Shared
            && let Some((kind, m)) = self.explain(a & 0xff_ffff, bytes)
        {
            return (lane, kind, m);
        }
        let why = if space == Space::Shared && self.resident[self.at].copies_in_flight > 0 {
            " (asynchronous copies are in flight: their data arrives when their group is waited for)"
        } else {
            ""
        };
        let m = format!("{bytes} bytes at {a:#x} of {space:?} memory were never written{why}");
        (lane, FaultKind::Uninitialised, m)
    }

    #[inline(never)]
    fn load_lanes(&mut self, r: &mut Regs, warp: usize, order: u8, op: &Access, mask: u32) -> Result<(), LaneFault> {
        let at = op.at.lanes(r);
        let n = op.ty.size();
        let bytes = (n * op.regs.len()) as u64;
        let mut values = vec![[0u64; LANES]; op.regs.len()];
        let mut marked = Vec::new();
        for lane in lanes(mask) {
            let (space, region, offset) = self.lane_region(warp, lane, op.at.space, at[lane], bytes)?;
            for (e, row) in values.iter_mut().enumerate() {
                let from = offset + (e * n) as u64;
                let mut x = load_sized(region, from, n);
                if !region.all_written(from, n as u64) {
                    let a = at[lane] + (e * n) as u64;
                    let origin = self.brought((warp, lane), (space, region), (a, from), n as u64)?;
                    marked.push((e, lane, origin));
                    // What is left there from before must not make a difference.
                    x = ones(8 * n as u32);
                }
                row[lane] = if op.ty.signed() { super::convert::extend(x, op.ty) as u64 } else { x };
            }
            let place = self.place_of(space, region, offset);
            if !region.read_only {
                self.record((warp, lane), space, place.0, (place.1, bytes), Kind::Read, order)?;
            }
        }
        for ((file, row), v) in op.regs.iter().zip(values) {
            if *row != NONE {
                put_raw(r, *file, *row, v, mask);
            }
        }
        for (e, lane, origin) in marked {
            if op.regs[e].1 != NONE {
                r.marks.set(op.regs[e], lane, origin);
            }
        }
        Ok(())
    }

    #[inline(never)]
    fn store_lanes(&mut self, r: &Regs, warp: usize, order: u8, op: &Access, mask: u32) -> Result<(), LaneFault> {
        let at = op.at.lanes(r);
        let n = op.ty.size();
        let bytes = (n * op.regs.len()) as u64;
        let values: Vec<[u64; LANES]> = op.regs.iter().map(|(file, row)| raw(r, *file, *row)).collect();
        for lane in lanes(mask) {
            let (space, region, offset) = self.lane_region(warp, lane, op.at.space, at[lane], bytes)?;
            if region.read_only {
                let what = if space == Space::Param { "parameters" } else { "constant memory" };
                let m = format!("{bytes} bytes at {:#x} of {what}", at[lane]);
                return Err((lane, FaultKind::ReadOnly, m));
            }
            for (e, row) in values.iter().enumerate() {
                store_sized(region, offset + (e * n) as u64, n, row[lane]);
            }
            let place = self.place_of(space, region, offset);
            self.record((warp, lane), space, place.0, (place.1, bytes), Kind::Write, order)?;
        }
        Ok(())
    }
}

/// Loads 1, 2, 4 or 8 bytes.
pub(super) fn load_sized(region: &Region, offset: u64, n: usize) -> u64 {
    match n {
        1 => region.load::<1>(offset),
        2 => region.load::<2>(offset),
        4 => region.load::<4>(offset),
        _ => region.load::<8>(offset),
    }
}

/// Stores 1, 2, 4 or 8 bytes.
pub(super) fn store_sized(region: &Region, offset: u64, n: usize, value: u64) {
    match n {
        1 => region.store::<1>(offset, value),
        2 => region.store::<2>(offset, value),
        4 => region.store::<4>(offset, value),
        _ => region.store::<8>(offset, value),
    }
}
