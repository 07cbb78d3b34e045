//! Device memory: an allocation table with red zones over regions that know which of their bytes were written.

use std::collections::BTreeMap;

use crate::error::{Error, FaultKind, Result};
use crate::exec::region::Region;

/// First address handed out; shared, local and parameter windows of generic addresses lie below.
pub const BASE: u64 = 0x7000_0000_0000;
/// Bytes kept free on both sides of an allocation.
pub const RED_ZONE: u64 = 512;
/// Pattern of memory nobody wrote: a NaN in every float type.
pub const FILL: u8 = 0xff;

/// The memory of one device.
#[derive(Default)]
pub struct Memory {
    blocks: Vec<Region>,
    freed: BTreeMap<u64, u64>,
    reserved: BTreeMap<u64, u64>,
    next: u64,
    used: u64,
}

impl Memory {
    /// Empty memory.
    pub fn new() -> Memory {
        Memory { next: BASE, ..Memory::default() }
    }

    /// Empty memory whose first allocation lies at `base` or above, so that several memories share no address.
    pub fn starting_at(base: u64) -> Memory {
        Memory { next: base.max(BASE).next_multiple_of(256), ..Memory::default() }
    }

    /// Bytes allocated now.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Allocates `bytes` (256-byte aligned address); contents are undefined until written.
    pub fn alloc(&mut self, bytes: usize) -> Result<u64> {
        let start = self.reserve(bytes)?;
        self.commit(start)?;
        Ok(start)
    }

    /// Gives out the address of an allocation that [`Memory::commit`] makes later; until then every access is an error.
    pub fn reserve(&mut self, bytes: usize) -> Result<u64> {
        if bytes == 0 || bytes as u64 > 1 << 40 {
            return Err(Error::Invalid(format!("allocation of {bytes} bytes")));
        }
        let start = self.next.max(BASE);
        // Addresses are never used again, so that a stale pointer can always be named.
        self.next = (start + bytes as u64 + 2 * RED_ZONE).next_multiple_of(256);
        self.reserved.insert(start, bytes as u64);
        Ok(start)
    }

    /// Makes a reserved allocation, or one that was freed again at its old address; contents are undefined until written.
    pub fn commit(&mut self, address: u64) -> Result<()> {
        let known = self.reserved.remove(&address).or_else(|| self.freed.remove(&address));
        let (Some(len), Err(i)) = (known, self.blocks.binary_search_by_key(&address, |b| b.start)) else {
            let m = format!("{address:#x} is no address that was reserved or freed");
            return Err(Error::Invalid(m));
        };
        self.used += len;
        self.blocks.insert(i, Region::new(address, len));
        Ok(())
    }

    /// Frees an allocation by its first address.
    pub fn free(&mut self, address: u64) -> Result<()> {
        match self.blocks.binary_search_by_key(&address, |b| b.start) {
            Ok(i) => {
                let b = self.blocks.remove(i);
                self.used -= b.len;
                self.freed.insert(b.start, b.len);
                Ok(())
            }
            Err(_) => Err(Error::Invalid(self.describe(address, 1).1)),
        }
    }

    /// First address and size of the live allocation that holds `address`.
    pub fn range_of(&self, address: u64) -> Option<(u64, usize)> {
        self.find(address, 1).map(|i| (self.blocks[i].start, self.blocks[i].len as usize))
    }

    pub(crate) fn find(&self, address: u64, len: u64) -> Option<usize> {
        let i = self.blocks.partition_point(|b| b.start <= address).checked_sub(1)?;
        let b = &self.blocks[i];
        (address - b.start < b.len && b.len - (address - b.start) >= len).then_some(i)
    }

    pub(crate) fn block(&self, i: usize) -> &Region {
        &self.blocks[i]
    }

    pub(crate) fn set_read_only(&mut self, address: u64) {
        if let Some(i) = self.find(address, 1) {
            self.blocks[i].read_only = true;
        }
    }

    /// Why an access of `len` bytes at `address` is wrong.
    pub(crate) fn describe(&self, address: u64, len: u64) -> (FaultKind, String) {
        if let Some((s, n)) = self.freed.range(..=address).next_back().filter(|(s, n)| address - **s < **n) {
            let m = format!("{len} bytes at {address:#x}, {} bytes into freed memory of {n} bytes", address - s);
            return (FaultKind::UseAfterFree, m);
        }
        let early = self.reserved.range(..=address).next_back();
        if let Some((s, n)) = early.filter(|(s, n)| address - **s < **n) {
            let m = format!(
                "{len} bytes at {address:#x}, {} bytes into memory of {n} bytes whose allocation has not happened yet",
                address - s
            );
            return (FaultKind::OutOfBounds, m);
        }
        let near = self.blocks.partition_point(|b| b.start <= address).checked_sub(1).map(|i| &self.blocks[i]);
        let m = match near {
            Some(b) if address - b.start < b.len + 2 * RED_ZONE => {
                format!("{len} bytes at {address:#x}, offset {} of an allocation of {} bytes", address - b.start, b.len)
            }
            _ => format!("{len} bytes at {address:#x}, which is in no allocation"),
        };
        (FaultKind::OutOfBounds, m)
    }

    fn host_range(&self, address: u64, len: usize) -> Result<(&Region, usize)> {
        match self.find(address, len as u64) {
            Some(i) => Ok((&self.blocks[i], (address - self.blocks[i].start) as usize)),
            None => Err(Error::Invalid(self.describe(address, len as u64).1)),
        }
    }

    /// Copies host bytes to the device.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let (b, at) = self.host_range(address, bytes.len())?;
        let (head, body) = bytes.split_at((at.wrapping_neg() & 7).min(bytes.len()));
        for (i, x) in head.iter().enumerate() {
            b.put::<1>((at + i) as u64, u64::from(*x));
        }
        let (mut at_word, words) = (at + head.len(), body.chunks_exact(8));
        let tail = words.remainder();
        for w in words {
            b.put::<8>(at_word as u64, u64::from_le_bytes(w.try_into().expect("eight bytes")));
            at_word += 8;
        }
        for (i, x) in tail.iter().enumerate() {
            b.put::<1>((at_word + i) as u64, u64::from(*x));
        }
        b.mark_all(at as u64, bytes.len() as u64);
        Ok(())
    }

    /// Copies device bytes to the host. Bytes never written come as [`FILL`]; only kernels are held to initialisation.
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let (b, at) = self.host_range(address, out.len())?;
        let whole = b.all_written(at as u64, out.len() as u64);
        let mut i = 0;
        while i < out.len() {
            let from = (at + i) as u64;
            if from.is_multiple_of(8) && out.len() - i >= 8 && (whole || b.is_written(from, 8)) {
                out[i..i + 8].copy_from_slice(&b.load::<8>(from).to_le_bytes());
                i += 8;
            } else {
                out[i] = if b.is_written(from, 1) { b.load::<1>(from) as u8 } else { FILL };
                i += 1;
            }
        }
        Ok(())
    }

    /// Offset of the first byte of a range that nothing has written, `None` when all were.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the range lies in no living allocation.
    pub fn first_unwritten(&self, address: u64, len: usize) -> Result<Option<usize>> {
        if len == 0 {
            return Ok(None);
        }
        let (b, at) = self.host_range(address, len)?;
        if b.all_written(at as u64, len as u64) {
            return Ok(None);
        }
        Ok((0..len).find(|i| !b.is_written((at + i) as u64, 1)))
    }

    /// Sets `len` bytes.
    pub fn fill(&self, address: u64, value: u8, len: usize) -> Result<()> {
        self.write(address, &vec![value; len])
    }

    /// Copies within the device; what was never written stays so at the destination. The ranges may overlap.
    pub fn copy(&self, to: u64, from: u64, len: usize) -> Result<()> {
        self.copy_from(to, self, from, len)
    }

    /// As [`Memory::copy`], from the memory of another device.
    pub fn copy_from(&self, to: u64, other: &Memory, from: u64, len: usize) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let (a, at) = other.host_range(from, len)?;
        let (b, bt) = self.host_range(to, len)?;
        let whole = a.all_written(at as u64, len as u64);
        if whole {
            let mut bytes = vec![0; len];
            other.read(from, &mut bytes)?;
            return self.write(to, &bytes);
        }
        let data: Vec<(u64, bool)> =
            (at..at + len).map(|i| (a.load::<1>(i as u64), a.is_written(i as u64, 1))).collect();
        b.unmark(bt as u64, len as u64);
        for (i, (x, written)) in data.into_iter().enumerate() {
            b.put::<1>((bt + i) as u64, x);
            if written {
                b.mark((bt + i) as u64, 1);
            }
        }
        Ok(())
    }
}
