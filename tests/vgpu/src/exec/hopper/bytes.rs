//! Bytes on their way between memories, with what was never written at their source.

use super::bulk::Reduction;
use crate::error::FaultKind;
use crate::exec::region::Region;

/// Some bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    data: Vec<u8>,
    /// One for each byte that was never written; empty when all were.
    holes: Vec<bool>,
}

impl Bytes {
    /// Written bytes.
    pub fn new(data: Vec<u8>) -> Bytes {
        Bytes { data, holes: Vec::new() }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Adds what a region holds at an offset; the range was checked.
    pub fn read(&mut self, region: &Region, offset: u64, len: u64) {
        let first = self.data.len();
        if offset.is_multiple_of(8) && len.is_multiple_of(8) {
            // Rows of boxes are at most 2 KiB; longer copies come in several turns.
            let mut at = 0;
            let mut words = [0; 64];
            while at < len {
                let n = (len - at).min(512);
                let part = &mut words[..n as usize / 8];
                region.read(offset + at, part);
                part.iter().for_each(|w| self.data.extend_from_slice(&w.to_le_bytes()));
                at += n;
            }
        } else {
            self.data.extend((0..len).map(|i| region.load::<1>(offset + i) as u8));
        }
        if !region.all_written(offset, len) {
            self.holes.resize(first, false);
            self.holes.extend((0..len).map(|i| !region.is_written(offset + i, 1)));
        } else if !self.holes.is_empty() {
            self.holes.resize(self.data.len(), false);
        }
    }

    /// Overwrites bytes from `at` on.
    pub fn put(&mut self, at: usize, other: &Bytes) {
        self.data[at..at + other.len()].copy_from_slice(&other.data);
        if !(self.holes.is_empty() && other.holes.is_empty()) {
            self.holes.resize(self.data.len(), false);
            for i in 0..other.len() {
                self.holes[at + i] = other.holes.get(i).copied().unwrap_or(false);
            }
        }
    }

    /// The bytes of a range.
    pub fn slice(&self, from: usize, to: usize) -> Bytes {
        let holes = if self.holes.is_empty() { Vec::new() } else { self.holes[from..to].to_vec() };
        Bytes { data: self.data[from..to].to_vec(), holes }
    }

    /// Writes the bytes `from..to` to an offset of a region; bytes never written at the source stay so.
    pub fn write(&self, from: usize, to: usize, region: &Region, offset: u64) {
        let data = &self.data[from..to];
        if offset.is_multiple_of(8) && data.len().is_multiple_of(8) {
            for (i, c) in data.as_chunks::<8>().0.iter().enumerate() {
                region.put::<8>(offset + 8 * i as u64, u64::from_le_bytes(*c));
            }
        } else {
            for (i, b) in data.iter().enumerate() {
                region.put::<1>(offset + i as u64, u64::from(*b));
            }
        }
        region.mark_all(offset, data.len() as u64);
        for i in (from..to).filter(|i| self.holes.get(*i).copied().unwrap_or(false)) {
            region.unmark(offset + (i - from) as u64, 1);
        }
    }

    /// Combines elements with what a region holds.
    ///
    /// # Errors
    /// On either side bytes were never written.
    pub fn combine(&self, region: &Region, offset: u64, r: Reduction) -> Result<(), (FaultKind, String)> {
        let n = r.ty.size();
        for (i, element) in self.data.chunks(n).enumerate() {
            let at = offset + (i * n) as u64;
            if !region.is_written(at, n as u32) || self.holes.iter().skip(i * n).take(n).any(|h| *h) {
                let m = format!("a reduction with bytes that were never written, at offset {at:#x}");
                return Err((FaultKind::Uninitialised, m));
            }
            let new = element.iter().rev().fold(0, |x, b| x << 8 | u64::from(*b));
            match n {
                2 => {
                    region.update16(at, |old| r.combine(u64::from(old), new) as u16);
                }
                4 => {
                    region.update32(at, |old| r.combine(u64::from(old), new) as u32);
                }
                _ => {
                    region.update64(at, |old| r.combine(old, new));
                }
            }
        }
        Ok(())
    }

    /// Subnormal floats become zeros of their sign.
    pub fn flush_denormals(&mut self) {
        for c in self.data.as_chunks_mut::<4>().0 {
            let x = f32::from_le_bytes(*c);
            if x.is_subnormal() {
                *c = 0f32.copysign(x).to_le_bytes();
            }
        }
    }
}
