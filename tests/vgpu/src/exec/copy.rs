//! `cp.async` in 16-byte pieces that arrive when their group is waited for, and `ldmatrix`.

use std::collections::VecDeque;

use super::launch::{Cta, Resident};
use super::mem::{CopyAsync, LaneFault, Space, lanes};
use super::races::Kind;
use super::region::ones;
use super::site::place;
use super::tensor::Matrix;
use super::{File, Inst, LANES, Regs};
use crate::error::FaultKind;

/// One instruction's copies: up to 16 bytes of each lane on their way to shared memory.
struct Batch {
    mask: u32,
    bytes: u32,
    /// The instruction, for race detection.
    pc: usize,
    to: [u64; LANES],
    data: [[u64; 2]; LANES],
    /// One bit per byte that the source has written; a copy of unwritten bytes stays unwritten.
    written: [u64; LANES],
}

/// The asynchronous copies of a warp, oldest first.
#[derive(Default)]
pub(super) struct Copies {
    batches: VecDeque<Box<Batch>>,
    spare: VecDeque<Box<Batch>>,
    /// Batches of each committed group.
    groups: VecDeque<usize>,
    /// Batches that no group holds yet.
    open: usize,
    /// The warp.
    warp: usize,
}

impl Copies {
    pub fn clear(&mut self) {
        self.spare.extend(self.batches.drain(..));
        self.groups.clear();
        self.open = 0;
    }

    pub fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// Delivers the oldest groups until `keep` are left.
    #[inline(always)]
    pub fn deliver(&mut self, cta: &mut Cta<'_>, keep: usize) -> Result<(), LaneFault> {
        while self.groups.len() > keep {
            let n = self.groups.pop_front().unwrap_or(0);
            for _ in 0..n {
                let Some(batch) = self.batches.pop_front() else { break };
                batch.deliver(cta.own(), self.warp);
                if cta.races.is_some() {
                    batch.record(cta, self.warp)?;
                }
                self.spare.push_back(batch);
            }
            cta.own().copies_in_flight -= n;
        }
        Ok(())
    }
}

/// Bits of one word of the bitmap that change together.
struct Gather {
    word: usize,
    bits: u64,
}

impl Gather {
    fn new() -> Gather {
        Gather { word: 0, bits: 0 }
    }

    /// Adds bits of the bytes from `offset` on; gives the word and bits so far when these are of another word.
    #[inline(always)]
    fn add(&mut self, offset: u64, bits: u64) -> Option<(usize, u64)> {
        let word = (offset / 64) as usize;
        let bits = bits << (offset & 63);
        if word == self.word {
            self.bits |= bits;
            return None;
        }
        Some((std::mem::replace(&mut self.word, word), std::mem::replace(&mut self.bits, bits)))
    }
}

impl Batch {
    /// Tells race detection that the data is written now, by the copy.
    fn record(&self, cta: &mut Cta<'_>, warp: usize) -> Result<(), LaneFault> {
        let (slot, pc) = (cta.at, std::mem::replace(&mut cta.pc, self.pc));
        for l in lanes(self.mask) {
            let range = (self.to[l], u64::from(self.bytes));
            cta.record((warp, l), Space::Shared, slot, range, Kind::Write, 0)?;
        }
        cta.pc = pc;
        Ok(())
    }

    #[inline(always)]
    fn deliver(&self, to: &mut Resident, warp: usize) {
        let shared = &to.shared;
        let mut marks = Gather::new();
        for l in lanes(self.mask) {
            match self.bytes {
                16 => shared.write(self.to[l], &self.data[l]),
                8 => shared.put::<8>(self.to[l], self.data[l][0]),
                _ => shared.put::<4>(self.to[l], self.data[l][0]),
            }
            if let Some((word, bits)) = marks.add(self.to[l], self.written[l]) {
                shared.set_bits(word, bits);
            }
        }
        shared.set_bits(marks.word, marks.bits);
        if to.hopper.keeps_stamps() {
            for l in lanes(self.mask) {
                to.hopper.stored(self.to[l], self.to[l] + u64::from(self.bytes), warp);
            }
        }
    }
}

impl Cta<'_> {
    /// Reads the sources of `cp.async` now. Until the data arrives, the bytes it goes to count as never written.
    #[inline(always)]
    pub(super) fn copy_async(
        &mut self,
        r: &Regs,
        copies: &mut Copies,
        warp: usize,
        i: &Inst,
        op: &CopyAsync,
        mask: u32,
    ) -> Result<(), LaneFault> {
        let (to, from) = (op.to.lanes(r), op.from.lanes(r));
        let limits = op.limits(r);
        let site = place(i.site, warp);
        let second = place(i.site + 1, warp);
        let first_from = self.sites[site].see(Space::Global, &from, mask, op.bytes);
        self.count(Space::Global, site, op.bytes, mask, false);
        let first_to = self.sites[second].see(Space::Shared, &to, mask, op.bytes);
        self.count(Space::Shared, second, op.bytes, mask, true);
        copies.warp = warp;
        if self.program.asynchronous {
            self.watch(warp, Space::Shared, &to, op.bytes, mask)?;
        }
        let mut batch = copies.spare.pop_back().unwrap_or_else(|| {
            Box::new(Batch { mask, bytes: 0, pc: 0, to, data: [[0; 2]; LANES], written: [0; LANES] })
        });
        (batch.mask, batch.bytes, batch.to) = (mask, op.bytes as u32, to);
        batch.pc = self.pc;
        let aligned = self.sites[site].misaligned.is_none() && self.sites[second].misaligned.is_none();
        let whole = limits.is_none_or(|sizes| {
            let mut short = 0;
            for l in 0..LANES {
                short |= u32::from(u64::from(sizes[l]) < op.bytes) << l;
            }
            short & mask == 0
        });
        let fast = self.races.is_none()
            && aligned
            && whole
            && op.bytes == 16
            && self.span(Space::Shared, second, first_to).is_some()
            && {
                let source = self.span(Space::Global, site, first_from);
                source.is_some_and(|source| {
                    let mut written = u16::MAX;
                    for l in lanes(mask) {
                        let offset = from[l].wrapping_sub(source.start);
                        // SAFETY: the site found all lanes aligned to 16 bytes, and `span` all of them inside the region.
                        unsafe {
                            batch.data[l] = source.pair_unchecked(offset);
                            written &= source.written16_unchecked(offset);
                        }
                        batch.written[l] = 0xffff;
                    }
                    written == u16::MAX
                })
            };
        if !fast {
            for lane in lanes(mask) {
                let size = limits.map_or(op.bytes, |sizes| u64::from(sizes[lane]));
                let piece = self.copy_lane(warp, lane, op.bytes, size.min(op.bytes), to[lane], from[lane])?;
                (batch.data[lane], batch.written[lane]) = piece;
                let read = size.min(op.bytes);
                if read > 0 {
                    let spot = (from[lane], read);
                    self.record((warp, lane), Space::Global, self.at, spot, Kind::Read, 0)?;
                }
            }
        }
        let own = self.own();
        let mut marks = Gather::new();
        for l in lanes(mask) {
            if let Some((word, bits)) = marks.add(to[l], ones(op.bytes as u32)) {
                own.shared.clear_bits(word, bits);
            }
        }
        own.shared.clear_bits(marks.word, marks.bits);
        own.copies_in_flight += 1;
        copies.open += 1;
        copies.batches.push_back(batch);
        Ok(())
    }

    /// Reads one lane's source with all checks: the data, and which of the bytes are written.
    #[inline(never)]
    fn copy_lane(
        &self,
        warp: usize,
        lane: usize,
        bytes: u64,
        valid: u64,
        to: u64,
        from: u64,
    ) -> Result<([u64; 2], u64), LaneFault> {
        if !to.is_multiple_of(bytes) || !from.is_multiple_of(bytes) {
            let m = format!("copy of {bytes} bytes from {from:#x} to {to:#x}");
            return Err((lane, FaultKind::Misaligned, m));
        }
        self.lane_region(warp, lane, Space::Shared, to, bytes)?;
        let (mut data, mut written) = ([0; 2], ones(bytes as u32));
        if valid == 0 {
            return Ok((data, written));
        }
        let Some(index) = self.memory.find(from, valid) else {
            let (kind, m) = self.memory.describe(from, valid);
            return Err((lane, kind, m));
        };
        let source = self.memory.block(index);
        let offset = from - source.start;
        // A source size below the copy's: the rest is zero.
        for b in 0..valid {
            data[(b / 8) as usize] |= source.load::<1>(offset + b) << (8 * (b % 8));
            if !source.is_written(offset + b, 1) {
                written &= !(1 << b);
            }
        }
        Ok((data, written))
    }

    /// `ldmatrix` for a whole warp.
    #[inline(always)]
    pub(super) fn load_matrix(&mut self, r: &mut Regs, warp: usize, i: &Inst, op: &Matrix) -> Result<(), LaneFault> {
        let at = op.at.lanes(r);
        let n = op.d.len();
        let mask = ones(8 * n as u32) as u32;
        let site = place(i.site, warp);
        let first = self.sites[site].see(Space::Shared, &at, mask, 16);
        self.count(Space::Shared, site, 16, mask, false);
        let mut rows = [[0u64; 2]; LANES];
        let mut marked = Vec::new();
        let plain = self.races.is_none() && op.at.space == Space::Shared && self.sites[site].misaligned.is_none();
        let fast = plain
            && self.span(Space::Shared, site, first).is_some_and(|own| {
                let mut written = own.alone as u16 * u16::MAX;
                for lane in 0..8 * n {
                    // SAFETY: the site found all lanes aligned to 16 bytes, `span` all of them inside the region; shared
                    // memory belongs to the host thread that runs its block.
                    unsafe {
                        own.copy16_alone(at[lane], &mut rows[lane]);
                        written &= own.written16_unchecked(at[lane]);
                    }
                }
                written == u16::MAX
            });
        if !fast {
            for (lane, row) in rows.iter_mut().enumerate().take(8 * n) {
                let (space, region, offset) = self.lane_region(warp, lane, op.at.space, at[lane], 16)?;
                region.read(offset, row);
                for e in (0..8).filter(|e| !region.is_written(offset + 2 * e, 2)) {
                    let to = if op.trans { 4 * e as usize + lane % 8 / 2 } else { 4 * (lane % 8) + e as usize / 2 };
                    let place = (at[lane] + 2 * e, offset + 2 * e);
                    let origin = self.brought((warp, to), (space, region), place, 2)?;
                    marked.push((op.d[lane / 8], to, origin));
                    row[e as usize / 4] |= 0xffff << (16 * (e % 4));
                }
                let spot = self.place_of(space, region, offset);
                self.record((warp, lane), space, spot.0, (spot.1, 16), Kind::Read, 0)?;
            }
        }
        for (d, tile) in op.d.iter().zip(rows.chunks_exact(8)) {
            let tile: &[[u64; 2]; 8] = tile.try_into().expect("eight rows");
            // The lanes hold the rows of the matrix one after the other, two elements each.
            let words = if op.trans { transpose(tile) } else { *tile };
            let out = &mut r.w[*d as usize];
            // SAFETY: eight rows of two long words are the 32 words of a register, in the byte order asserted in `access`.
            *out = unsafe { std::mem::transmute::<[[u64; 2]; 8], [u32; LANES]>(words) };
        }
        for (row, to, origin) in marked {
            r.marks.set((File::W, row), to, origin);
        }
        Ok(())
    }
}

/// Transposes 8x8 halves, eight to a row.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose(t: &[[u64; 2]; 8]) -> [[u64; 2]; 8] {
    use std::arch::x86_64::*;
    // SAFETY: SSE2 is part of every x86-64 processor, and the types have the same size and no invalid values.
    unsafe {
        let r = t.map(|[low, high]| _mm_set_epi64x(high as i64, low as i64));
        let pair = |a: usize, b: usize| (_mm_unpacklo_epi16(r[a], r[b]), _mm_unpackhi_epi16(r[a], r[b]));
        let ((a0, a1), (b0, b1), (c0, c1), (d0, d1)) = (pair(0, 1), pair(2, 3), pair(4, 5), pair(6, 7));
        let (e0, e1) = (_mm_unpacklo_epi32(a0, b0), _mm_unpackhi_epi32(a0, b0));
        let (e2, e3) = (_mm_unpacklo_epi32(a1, b1), _mm_unpackhi_epi32(a1, b1));
        let (f0, f1) = (_mm_unpacklo_epi32(c0, d0), _mm_unpackhi_epi32(c0, d0));
        let (f2, f3) = (_mm_unpacklo_epi32(c1, d1), _mm_unpackhi_epi32(c1, d1));
        std::mem::transmute([
            _mm_unpacklo_epi64(e0, f0),
            _mm_unpackhi_epi64(e0, f0),
            _mm_unpacklo_epi64(e1, f1),
            _mm_unpackhi_epi64(e1, f1),
            _mm_unpacklo_epi64(e2, f2),
            _mm_unpackhi_epi64(e2, f2),
            _mm_unpacklo_epi64(e3, f3),
            _mm_unpackhi_epi64(e3, f3),
        ])
    }
}

/// Transposes 8x8 halves, eight to a row.
#[cfg(not(target_arch = "x86_64"))]
fn transpose(t: &[[u64; 2]; 8]) -> [[u64; 2]; 8] {
    let mut out = [[0; 2]; 8];
    for (r, row) in t.iter().enumerate() {
        for (c, to) in out.iter_mut().enumerate() {
            let x = row[c / 4] >> (16 * (c % 4)) & 0xffff;
            to[r / 4] |= x << (16 * (r % 4));
        }
    }
    out
}
