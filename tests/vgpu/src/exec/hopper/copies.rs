//! Bulk copies as they are issued, delivered and waited for.

use super::act::{Here, line};
use super::bulk::{BulkCopy, Tensor, Way};
use super::bytes::Bytes;
use super::mbarrier;
use super::state::{Cargo, Hold, Load, Write};
use super::tile;
use crate::error::FaultKind;
use crate::exec::launch::Cta;
use crate::exec::mem::{Address, LaneFault, PARAM, SHARED, lanes};
use crate::exec::region::Region;
use crate::exec::warp::Warp;
use crate::exec::{Lane, Regs};
use crate::tensor_map::{ALIGN, BYTES, DataType, Swizzle, TensorMap};

/// Why a copy is wrong.
type Wrong = (FaultKind, String);

fn read(region: &Region, offset: u64, len: u64) -> Bytes {
    let mut bytes = Bytes::default();
    bytes.read(region, offset, len);
    bytes
}

/// Where the 16-byte pieces of a box go: (offset in the row's bytes, shared address).
fn pieces(m: &TensorMap, to: u64, row: &tile::Row, len: u64) -> impl Iterator<Item = (usize, u64)> {
    let (swizzle, start) = (m.swizzle, to + row.offset);
    (0..len / 16).map(move |c| ((c * 16) as usize, swizzle.place(start + c * 16, 0)))
}

/// Moves a row that lies in the tensor altogether, is written and starts at a multiple of eight; else returns false.
fn deliver_row(
    from: &Region,
    offset: u64,
    to: &Region,
    start: u64,
    swizzle: Swizzle,
    len: usize,
    pitch: usize,
) -> bool {
    if !offset.is_multiple_of(8) || !from.all_written(offset, len as u64) {
        return false;
    }
    // At most 256 elements of eight bytes.
    let mut words = [0; 256];
    let row = &mut words[..len / 8];
    from.read(offset, row);
    for (c, piece) in row.as_chunks::<2>().0.iter().enumerate() {
        let at = swizzle.place(start + 16 * c as u64, 0);
        to.write(at, piece);
        if len != pitch {
            to.mark(at, 16);
        }
    }
    if len == pitch {
        // Pieces change places within the row's own bytes.
        to.mark_all(start, len as u64);
    }
    true
}

impl Cta<'_> {
    /// The region of global memory that holds a range.
    fn global(&self, address: u64, len: u64, writes: bool) -> Result<&Region, Wrong> {
        let Some(i) = self.memory.find(address, len) else {
            return Err(self.memory.describe(address, len));
        };
        let region = self.memory.block(i);
        if writes && region.read_only {
            return Err((FaultKind::ReadOnly, format!("{len} bytes at {address:#x} of constant memory")));
        }
        Ok(region)
    }

    /// The tensor map of a lane.
    fn map(&self, regs: &Regs, t: &Tensor, lane: usize) -> Result<(TensorMap, [i64; 5]), LaneFault> {
        let address = t.map.lanes(regs)[lane];
        let wrong = |(kind, m): Wrong| (lane, kind, m);
        if !address.is_multiple_of(ALIGN) {
            let m = format!("tensor map at {address:#x}, not a multiple of {ALIGN}");
            return Err(wrong((FaultKind::Misaligned, m)));
        }
        let (region, offset) = match address >> 44 {
            w if w == PARAM >> 44 => {
                let offset = address - PARAM;
                if offset + BYTES as u64 > self.params.len {
                    let m = format!("a tensor map at byte {offset} of {} bytes of parameters", self.params.len);
                    return Err(wrong((FaultKind::OutOfBounds, m)));
                }
                (self.params, offset)
            }
            w if w == SHARED >> 44 => {
                let m = "a tensor map in shared memory; parameters, constant or global memory hold one".to_string();
                return Err(wrong((FaultKind::Descriptor, m)));
            }
            _ => {
                let r = self.global(address, BYTES as u64, false).map_err(wrong)?;
                (r, address - r.start)
            }
        };
        let mut words = [0; BYTES / 8];
        region.read(offset, &mut words);
        let bytes = std::array::from_fn(|i| words[i / 8].to_le_bytes()[i % 8]);
        let Some(map) = TensorMap::decode(&bytes) else {
            let m = format!("the 128 bytes at {address:#x} are no tensor map of cuTensorMapEncodeTiled");
            return Err(wrong((FaultKind::Descriptor, m)));
        };
        if map.rank != t.at.len() {
            let m = format!("{} coordinates for a tensor map of rank {}", t.at.len(), map.rank);
            return Err(wrong((FaultKind::Descriptor, m)));
        }
        let at = std::array::from_fn(|d| t.at.get(d).map_or(0, |row| i64::from(i32::get(regs, *row)[lane])));
        Ok((map, at))
    }

    /// Bytes of a linear copy.
    fn size(regs: &Regs, x: &BulkCopy, lane: usize) -> Result<u64, LaneFault> {
        let n = x.size.map_or(0, |row| u64::from(u32::get(regs, row)[lane]));
        if n == 0 || !n.is_multiple_of(16) {
            return Err((lane, FaultKind::Misaligned, format!("a bulk copy of {n} bytes, not a multiple of 16")));
        }
        Ok(n)
    }

    fn global_place(&self, regs: &Regs, a: &Address, len: u64, writes: bool, lane: usize) -> Result<u64, LaneFault> {
        let address = a.lanes(regs)[lane];
        if !address.is_multiple_of(16) {
            let m = format!("global address {address:#x} of a bulk copy is not a multiple of 16");
            return Err((lane, FaultKind::Misaligned, m));
        }
        self.global(address, len, writes).map_err(|(kind, m)| (lane, kind, m))?;
        Ok(address)
    }

    /// `cp.async.bulk` in all forms, lane by lane.
    pub(super) fn bulk_copy(&mut self, h: &Here<'_>, warp: &Warp, x: &BulkCopy) -> Result<(), LaneFault> {
        for lane in lanes(h.active) {
            match &x.way {
                Way::Load { bar, multicast } => self.issue_load(h, &warp.regs, x, bar, *multicast, lane)?,
                Way::Across { to, bar } => self.issue_across(h, &warp.regs, x, to, bar, lane)?,
                Way::Store => self.issue_store(h, &warp.regs, x, lane)?,
                Way::Prefetch => match (&x.tensor, &x.global) {
                    (Some(t), _) => {
                        self.map(&warp.regs, t, lane)?;
                    }
                    (_, Some(a)) => {
                        let n = Self::size(&warp.regs, x, lane)?;
                        self.global_place(&warp.regs, a, n, false, lane)?;
                    }
                    _ => {}
                },
            }
        }
        Ok(())
    }

    fn issue_load(
        &mut self,
        h: &Here<'_>,
        regs: &Regs,
        x: &BulkCopy,
        bar: &Address,
        multicast: Option<u16>,
        lane: usize,
    ) -> Result<(), LaneFault> {
        let Some(shared) = &x.shared else { return Ok(()) };
        let (cargo, span, bytes, align) = match (&x.tensor, &x.global) {
            (Some(t), _) => {
                let (map, at) = self.map(regs, t, lane)?;
                self.check_rows(&map, at, false, lane)?;
                let (span, bytes) = (tile::span(&map), map.box_bytes() as u64);
                (Cargo::Tensor(Box::new(map), at), span, bytes, 128)
            }
            (_, Some(a)) => {
                let n = Self::size(regs, x, lane)?;
                (Cargo::Global(self.global_place(regs, a, n, false, lane)?), n, n, 16)
            }
            _ => return Ok(()),
        };
        let (slot, to) = self.shared_place(shared.space, shared.lanes(regs)[lane], span, align, lane)?;
        let bar_address = bar.lanes(regs)[lane];
        let (bar_slot, at) = self.shared_place(bar.space, bar_address, mbarrier::BYTES, mbarrier::BYTES, lane)?;
        if bar_slot != slot {
            let m = "a bulk copy whose barrier is in another block than its destination".to_string();
            return Err((lane, FaultKind::Mbarrier, m));
        }
        let slots: Vec<usize> = match multicast {
            None => vec![slot],
            Some(row) => {
                let mask = u32::get(regs, row)[lane] & 0xffff;
                let ranks = (0..16).filter(|r| mask >> r & 1 == 1);
                let found: Option<Vec<usize>> = ranks.map(|r| self.slot_of(r)).collect();
                match found {
                    Some(list) if !list.is_empty() => list,
                    _ => {
                        let n = self.shape.cluster_size();
                        let m = format!("multicast to blocks {mask:#06x} of a cluster of {n}");
                        return Err((lane, FaultKind::OutOfBounds, m));
                    }
                }
            }
        };
        for slot in slots {
            if self.resident[slot].live == 0 {
                let m = format!("shared memory of block {:?}, which has returned", self.resident[slot].index);
                return Err((lane, FaultKind::UseAfterFree, m));
            }
            self.live(slot, at, lane)?;
            self.reach(h, slot, at, lane)?;
            let load = Load {
                to,
                span,
                bar: at,
                bytes: bytes as u32,
                cargo: cargo.clone(),
                reduction: None,
                origin: h.origin(lane),
                hold: None,
            };
            self.send(h, slot, load, false)?;
        }
        self.counters.global_read += bytes;
        self.counters.global_requests += 1;
        self.counters.global_sectors += bytes.div_ceil(32);
        Ok(())
    }

    /// Checks that all rows inside the tensor lie in allocated memory.
    fn check_rows(&self, map: &TensorMap, at: [i64; 5], writes: bool, lane: usize) -> Result<(), LaneFault> {
        for row in tile::rows(map, at).iter().filter(|r| r.inside > 0) {
            let len = (row.inside * map.data_type.size()) as u64;
            self.global(row.address, len, writes).map_err(|(kind, m)| (lane, kind, m))?;
        }
        Ok(())
    }

    fn issue_across(
        &mut self,
        h: &Here<'_>,
        regs: &Regs,
        x: &BulkCopy,
        to: &Address,
        bar: &Address,
        lane: usize,
    ) -> Result<(), LaneFault> {
        let Some(from) = &x.shared else { return Ok(()) };
        let n = Self::size(regs, x, lane)?;
        let (_, source) = self.shared_place(from.space, from.lanes(regs)[lane], n, 16, lane)?;
        let (slot, to) = self.shared_place(to.space, to.lanes(regs)[lane], n, 16, lane)?;
        let bar_address = bar.lanes(regs)[lane];
        let (bar_slot, at) = self.shared_place(bar.space, bar_address, mbarrier::BYTES, mbarrier::BYTES, lane)?;
        if bar_slot != slot {
            let m = "a bulk copy whose barrier is in another block than its destination".to_string();
            return Err((lane, FaultKind::Mbarrier, m));
        }
        self.live(slot, at, lane)?;
        self.reach(h, slot, at, lane)?;
        self.source(h, source, source + n, lane)?;
        let data = read(&self.resident[self.at].shared, source, n);
        let origin = h.origin(lane);
        let own = self.at;
        let s = &mut self.own().hopper;
        let id = s.hold();
        s.holds.push(Hold { id, range: (source, source + n), origin, group: None, grouped: false });
        let load = Load {
            to,
            span: n,
            bar: at,
            bytes: n as u32,
            cargo: Cargo::Taken(data),
            reduction: x.reduction,
            origin,
            hold: Some((own, id)),
        };
        self.send(h, slot, load, x.reduction.is_some())
    }

    /// Checks that ordinary stores to a copy's source were fenced and that no copy into it is under way.
    fn source(&self, h: &Here<'_>, start: u64, end: u64, lane: usize) -> Result<(), LaneFault> {
        let r = &self.resident[self.at];
        for at in (start..end).step_by(16) {
            if let Some(w) = r.hopper.unfenced(at, h.warp) {
                let m = format!(
                    "the source of a bulk copy: shared offset {at:#x} was stored to by warp {w} without a \
                     fence.proxy.async since"
                );
                return Err((lane, FaultKind::ProxyFence, m));
            }
        }
        match r.hopper.explain(start, end) {
            Some((kind, m, pc)) => Err((lane, kind, format!("the source of a bulk copy: {m} ({})", line(h.p, pc)))),
            None => Ok(()),
        }
    }

    fn issue_store(&mut self, h: &Here<'_>, regs: &Regs, x: &BulkCopy, lane: usize) -> Result<(), LaneFault> {
        let Some(shared) = &x.shared else { return Ok(()) };
        let (mut rows, mut reduction) = (Vec::new(), x.reduction);
        let range = match (&x.tensor, &x.global) {
            (Some(t), _) => {
                let (map, at) = self.map(regs, t, lane)?;
                if let Some(r) = x.reduction {
                    let typed = r.of_tensor(map.data_type);
                    reduction = Some(typed.map_err(|m| (lane, FaultKind::Descriptor, m))?);
                }
                self.check_rows(&map, at, true, lane)?;
                let span = tile::span(&map);
                let (_, from) = self.shared_place(shared.space, shared.lanes(regs)[lane], span, 128, lane)?;
                self.source(h, from, from + span, lane)?;
                let (size, region) = (map.data_type.size(), &self.resident[self.at].shared);
                let len = (map.counts()[0] * size) as u64;
                for row in tile::rows(&map, at).iter().filter(|r| r.inside > 0) {
                    let mut bytes = Bytes::default();
                    for (_, place) in pieces(&map, from, row, len) {
                        bytes.read(region, place, 16);
                    }
                    rows.push((row.address, bytes.slice(row.skipped * size, (row.skipped + row.inside) * size)));
                }
                (from, from + span)
            }
            (_, Some(a)) => {
                let n = Self::size(regs, x, lane)?;
                let address = self.global_place(regs, a, n, true, lane)?;
                let (_, from) = self.shared_place(shared.space, shared.lanes(regs)[lane], n, 16, lane)?;
                self.source(h, from, from + n, lane)?;
                rows.push((address, read(&self.resident[self.at].shared, from, n)));
                (from, from + n)
            }
            _ => return Ok(()),
        };
        let moved: usize = rows.iter().map(|(_, b)| b.len()).sum();
        self.counters.global_written += moved as u64;
        self.counters.global_requests += 1;
        self.counters.global_sectors += moved.div_ceil(32) as u64;
        let origin = h.origin(lane);
        let s = &mut self.own().hopper;
        let id = s.hold();
        s.holds.push(Hold { id, range, origin, group: None, grouped: true });
        s.writes.push(Write { rows, reduction, origin, group: None });
        self.hopper.events += 1;
        Ok(())
    }

    /// `cp.async.bulk.commit_group` of a thread.
    pub(super) fn commit_copies(&mut self, h: &Here<'_>, lane: usize) {
        let s = &mut self.own().hopper;
        let n = s.committed.entry((h.warp, lane)).or_insert(0);
        let group = *n;
        *n += 1;
        let mine = |o: &super::state::Origin| (o.warp, o.lane) == (h.warp, lane);
        for x in s.holds.iter_mut().filter(|x| x.grouped && mine(&x.origin)) {
            x.group.get_or_insert(group);
        }
        for x in s.writes.iter_mut().filter(|x| mine(&x.origin)) {
            x.group.get_or_insert(group);
        }
    }

    /// `cp.async.bulk.wait_group` of a thread.
    pub(super) fn wait_copies(&mut self, h: &Here<'_>, lane: usize, keep: u32, read: bool) -> Result<(), LaneFault> {
        let s = &mut self.own().hopper;
        let committed = s.committed.get(&(h.warp, lane)).copied().unwrap_or(0);
        let complete = committed.saturating_sub(keep);
        let over = |o: &super::state::Origin, g: Option<u32>| {
            (o.warp, o.lane) == (h.warp, lane) && g.is_some_and(|g| g < complete)
        };
        s.holds.retain(|x| !x.grouped || !over(&x.origin, x.group));
        if !read {
            let all = std::mem::take(&mut s.writes);
            let (now, later) = all.into_iter().partition(|x| over(&x.origin, x.group));
            s.writes = later;
            self.flush(now).map_err(|(kind, m)| (lane, kind, m))?;
        }
        Ok(())
    }

    /// Writes to global memory.
    pub(super) fn flush(&mut self, list: Vec<Write>) -> Result<(), Wrong> {
        for w in list {
            for (address, bytes) in &w.rows {
                let region = self.global(*address, bytes.len() as u64, true)?;
                match w.reduction {
                    Some(r) => bytes.combine(region, address - region.start, r)?,
                    None => bytes.write(0, bytes.len(), region, address - region.start),
                }
            }
        }
        Ok(())
    }

    /// Brings a copy to shared memory.
    pub(super) fn deliver(&mut self, slot: usize, load: Load) -> Result<(), Wrong> {
        if let Some((source, id)) = load.hold {
            self.resident[source].hopper.holds.retain(|x| x.id != id);
        }
        let to = &self.resident[slot].shared;
        match &load.cargo {
            Cargo::Taken(bytes) => match load.reduction {
                Some(r) => bytes.combine(to, load.to, r)?,
                None => bytes.write(0, bytes.len(), to, load.to),
            },
            Cargo::Global(address) => {
                let from = self.global(*address, load.span, false)?;
                let bytes = read(from, address - from.start, load.span);
                bytes.write(0, bytes.len(), to, load.to);
            }
            Cargo::Tensor(map, at) => self.deliver_box(to, load.to, map, *at)?,
        }
        Ok(())
    }

    fn deliver_box(&self, to: &Region, start: u64, map: &TensorMap, at: [i64; 5]) -> Result<(), Wrong> {
        let size = map.data_type.size();
        let (len, fill) = (map.counts()[0] * size, tile::fill(map));
        let outside = Bytes::new((0..len).map(|i| (fill >> (8 * (i % size))) as u8).collect());
        let pitch = tile::pitch(map) as usize;
        for row in tile::rows(map, at) {
            if row.inside * size == len && map.data_type != DataType::F32Ftz {
                let from = self.global(row.address, len as u64, false)?;
                if deliver_row(from, row.address - from.start, to, start + row.offset, map.swizzle, len, pitch) {
                    continue;
                }
            }
            let mut bytes = if row.inside * size == len { Bytes::default() } else { outside.clone() };
            if row.inside > 0 {
                let n = (row.inside * size) as u64;
                let from = self.global(row.address, n, false)?;
                if bytes.is_empty() {
                    bytes.read(from, row.address - from.start, n);
                } else {
                    bytes.put(row.skipped * size, &read(from, row.address - from.start, n));
                }
            }
            if map.data_type == DataType::F32Ftz {
                bytes.flush_denormals();
            }
            for (i, place) in pieces(map, start, &row, len as u64) {
                bytes.write(i, i + 16, to, place);
            }
        }
        Ok(())
    }
}
