//! `cp.async` in 16-byte pieces that arrive when their group is waited for, and `ldmatrix`.

use std::collections::VecDeque;

use super::launch::{Cta, Resident};
use super::mem::{CopyAsync, LaneFault, Space, lanes};
use super::region::{Region, ones};
use super::tensor::Matrix;
use super::{Inst, LANES, Regs};
use crate::error::FaultKind;

/// One lane's copy: up to 16 bytes on their way to shared memory.
struct Piece {
    to: u64,
    bytes: u32,
    /// One bit per byte that the source has written; a copy of unwritten bytes stays unwritten.
    written: u64,
    data: [u64; 2],
}

/// The asynchronous copies of a warp, oldest first.
#[derive(Default)]
pub(super) struct Copies {
    pieces: VecDeque<Piece>,
    /// Pieces of each committed group.
    groups: VecDeque<usize>,
    /// Pieces that no group holds yet.
    open: usize,
    /// The warp.
    warp: usize,
}

impl Copies {
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.groups.clear();
        self.open = 0;
    }

    pub fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// Delivers the oldest groups until `keep` are left.
    pub fn deliver(&mut self, to: &mut Resident, keep: usize) {
        while self.groups.len() > keep {
            let n = self.groups.pop_front().unwrap_or(0);
            for piece in self.pieces.drain(..n) {
                piece.deliver(&to.shared);
                to.hopper.stored(piece.to, piece.to + u64::from(piece.bytes), self.warp);
            }
            to.copies_in_flight -= n;
        }
    }
}

impl Piece {
    fn deliver(&self, shared: &Region) {
        match self.bytes {
            16 => shared.write(self.to, &self.data),
            8 => shared.put::<8>(self.to, self.data[0]),
            _ => shared.put::<4>(self.to, self.data[0]),
        }
        if self.written == ones(self.bytes) {
            shared.mark(self.to, self.bytes);
        } else {
            for b in (0..self.bytes).filter(|b| self.written >> b & 1 == 1) {
                shared.mark(self.to + u64::from(b), 1);
            }
        }
    }
}

impl Cta<'_> {
    /// Reads the sources of `cp.async` now. Until the data arrives, the bytes it goes to count as never written.
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
        let size = op.limits(r);
        let site = i.site as usize;
        self.sites[site].see(&from, mask, op.bytes);
        self.count(Space::Global, site, op.bytes, mask, false);
        self.sites[site + 1].see(&to, mask, op.bytes);
        self.count(Space::Shared, site + 1, op.bytes, mask, true);
        copies.warp = warp;
        if self.program.asynchronous {
            self.watch(warp, Space::Shared, &to, op.bytes, mask)?;
        }
        for lane in lanes(mask) {
            if !to[lane].is_multiple_of(op.bytes) || !from[lane].is_multiple_of(op.bytes) {
                let m = format!("copy of {} bytes from {:#x} to {:#x}", op.bytes, from[lane], to[lane]);
                return Err((lane, FaultKind::Misaligned, m));
            }
            self.lane_region(warp, lane, Space::Shared, to[lane], op.bytes)?;
            let valid = size.map_or(op.bytes, |s| u64::from(s[lane]).min(op.bytes));
            let (mut data, mut written) = ([0; 2], ones(op.bytes as u32));
            if valid > 0 {
                let (start, len, index) = self.sites[site].block;
                let offset = from[lane].wrapping_sub(start);
                let (source, offset) = if offset < len && len - offset >= valid {
                    (self.memory.block(index), offset)
                } else {
                    let Some(index) = self.memory.find(from[lane], valid) else {
                        let (kind, m) = self.memory.describe(from[lane], valid);
                        return Err((lane, kind, m));
                    };
                    let b = self.memory.block(index);
                    self.sites[site].block = (b.start, b.len, index);
                    (b, from[lane] - b.start)
                };
                if valid == op.bytes {
                    match op.bytes {
                        16 => source.read(offset, &mut data),
                        8 => data[0] = source.load::<8>(offset),
                        _ => data[0] = source.load::<4>(offset),
                    }
                    if !source.is_written(offset, op.bytes as u32) {
                        written = (0..op.bytes).fold(0, |w, b| w | u64::from(source.is_written(offset + b, 1)) << b);
                    }
                } else {
                    // A source size below the copy's: the rest is zero.
                    for b in 0..valid {
                        data[(b / 8) as usize] |= source.load::<1>(offset + b) << (8 * (b % 8));
                        if !source.is_written(offset + b, 1) {
                            written &= !(1 << b);
                        }
                    }
                }
            }
            let own = self.own();
            own.shared.unmark(to[lane], op.bytes);
            own.copies_in_flight += 1;
            copies.open += 1;
            copies.pieces.push_back(Piece {
                to: to[lane],
                bytes: op.bytes as u32,
                written,
                data,
            });
        }
        Ok(())
    }

    /// `ldmatrix` for a whole warp.
    #[inline(always)]
    pub(super) fn load_matrix(&mut self, r: &mut Regs, warp: usize, i: &Inst, op: &Matrix) -> Result<(), LaneFault> {
        let at = op.at.lanes(r);
        let n = op.d.len();
        let mask = ones(8 * n as u32) as u32;
        let site = i.site as usize;
        self.sites[site].see(&at, mask, 16);
        self.count(Space::Shared, site, 16, mask, false);
        let mut rows = [[0u64; 2]; LANES];
        for (lane, row) in rows.iter_mut().enumerate().take(8 * n) {
            let own = &self.resident[self.at].shared;
            let plain = op.at.space == Space::Shared
                && at[lane].is_multiple_of(16)
                && at[lane] < own.len
                && own.len - at[lane] >= 16
                && own.is_written(at[lane], 16);
            if plain {
                own.read(at[lane], row);
                continue;
            }
            let (space, region, offset) = self.lane_region(warp, lane, op.at.space, at[lane], 16)?;
            if !region.is_written(offset, 16) {
                return Err(self.unwritten(lane, space, at[lane], 16));
            }
            region.read(offset, row);
        }
        for (d, tile) in op.d.iter().zip(rows.chunks_exact(8)) {
            let tile: &[[u64; 2]; 8] = tile.try_into().expect("eight rows");
            // The lanes hold the rows of the matrix one after the other, two elements each.
            let words = if op.trans { transpose(tile) } else { *tile };
            let out = &mut r.w[*d as usize];
            for (k, x) in words.as_flattened().iter().enumerate() {
                out[2 * k] = *x as u32;
                out[2 * k + 1] = (*x >> 32) as u32;
            }
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
