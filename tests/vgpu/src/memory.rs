//! Device memory: an allocation table with red zones, and one shadow byte per byte that says whether it was written.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::error::{Error, FaultKind, Result};

/// First address handed out; shared, local and parameter windows of generic addresses lie below.
pub const BASE: u64 = 0x7000_0000_0000;
/// Bytes kept free on both sides of an allocation.
pub const RED_ZONE: u64 = 512;
/// Pattern of memory nobody wrote: a NaN in every float type.
pub const FILL: u8 = 0xff;

/// Eight-byte aligned bytes that several threads may touch.
pub(crate) struct Block {
    pub start: u64,
    pub len: u64,
    pub read_only: bool,
    data: Box<[AtomicU64]>,
    shadow: Box<[AtomicU64]>,
}

fn words(n: usize, fill: u8) -> Box<[AtomicU64]> {
    (0..n.div_ceil(8))
        .map(|_| AtomicU64::new(u64::from_ne_bytes([fill; 8])))
        .collect()
}

impl Block {
    fn new(start: u64, len: u64) -> Block {
        let n = len as usize;
        Block {
            start,
            len,
            read_only: false,
            data: words(n, FILL),
            shadow: words(n, 0),
        }
    }

    /// Loads `N` bytes (1, 2, 4, 8) at an offset that was checked and aligned; also whether all were written.
    #[inline(always)]
    pub fn load<const N: usize>(&self, offset: u64) -> (u64, bool) {
        (
            load::<N>(&self.data, offset as usize),
            load::<N>(&self.shadow, offset as usize) == ones::<N>(),
        )
    }

    /// Stores `N` bytes at an offset that was checked and aligned.
    #[inline(always)]
    pub fn store<const N: usize>(&self, offset: u64, value: u64) {
        store::<N>(&self.data, offset as usize, value);
        store::<N>(&self.shadow, offset as usize, ones::<N>());
    }

    /// Replaces four bytes by `f` of them, atomically, and returns the old value; `None` from `f` leaves them.
    pub fn update32(&self, offset: u64, f: impl Fn(u32) -> u32) -> u32 {
        cell32(&self.data, offset as usize)
            .fetch_update(Relaxed, Relaxed, |x| Some(f(x)))
            .unwrap_or_else(|x| x)
    }

    /// Eight-byte form of [`Block::update32`].
    pub fn update64(&self, offset: u64, f: impl Fn(u64) -> u64) -> u64 {
        self.data[offset as usize / 8]
            .fetch_update(Relaxed, Relaxed, |x| Some(f(x)))
            .unwrap_or_else(|x| x)
    }
}

/// `N` shadow bytes that all say "written".
#[inline(always)]
pub(crate) const fn ones<const N: usize>() -> u64 {
    if N == 8 {
        0x0101_0101_0101_0101
    } else {
        0x0101_0101_0101_0101 & ((1 << (8 * N)) - 1)
    }
}

#[inline(always)]
fn cell32(data: &[AtomicU64], offset: usize) -> &AtomicU32 {
    assert!(offset.is_multiple_of(4) && offset / 8 < data.len());
    // SAFETY: the assertion puts the four aligned bytes inside one element of the slice; atomics have no validity limits.
    unsafe { &*data.as_ptr().cast::<AtomicU32>().add(offset / 4) }
}

#[inline(always)]
fn load<const N: usize>(data: &[AtomicU64], offset: usize) -> u64 {
    assert!(offset.is_multiple_of(N) && offset / 8 < data.len());
    // SAFETY: the assertion puts the N aligned bytes inside one element; sizes are powers of two up to eight.
    unsafe {
        let p = data.as_ptr().cast::<u8>().add(offset);
        match N {
            1 => u64::from((*p.cast::<AtomicU8>()).load(Relaxed)),
            2 => u64::from((*p.cast::<AtomicU16>()).load(Relaxed)),
            4 => u64::from((*p.cast::<AtomicU32>()).load(Relaxed)),
            _ => (*p.cast::<AtomicU64>()).load(Relaxed),
        }
    }
}

#[inline(always)]
fn store<const N: usize>(data: &[AtomicU64], offset: usize, value: u64) {
    assert!(offset.is_multiple_of(N) && offset / 8 < data.len());
    // SAFETY: as in `load`.
    unsafe {
        let p = data.as_ptr().cast::<u8>().add(offset);
        match N {
            1 => (*p.cast::<AtomicU8>()).store(value as u8, Relaxed),
            2 => (*p.cast::<AtomicU16>()).store(value as u16, Relaxed),
            4 => (*p.cast::<AtomicU32>()).store(value as u32, Relaxed),
            _ => (*p.cast::<AtomicU64>()).store(value, Relaxed),
        }
    }
}

/// The memory of one device.
#[derive(Default)]
pub struct Memory {
    blocks: Vec<Block>,
    freed: BTreeMap<u64, u64>,
    next: u64,
    used: u64,
}

impl Memory {
    /// Empty memory.
    pub fn new() -> Memory {
        Memory {
            next: BASE,
            ..Memory::default()
        }
    }

    /// Empty memory whose first allocation lies at `base` or above, so that several memories share no address.
    pub fn starting_at(base: u64) -> Memory {
        Memory {
            next: base.max(BASE).next_multiple_of(256),
            ..Memory::default()
        }
    }

    /// Bytes allocated now.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Allocates `bytes` (256-byte aligned address); contents are undefined until written.
    pub fn alloc(&mut self, bytes: usize) -> Result<u64> {
        if bytes == 0 || bytes as u64 > 1 << 40 {
            return Err(Error::Invalid(format!("allocation of {bytes} bytes")));
        }
        let start = self.next.max(BASE);
        // Addresses are never used again, so that a stale pointer can always be named.
        self.next = (start + bytes as u64 + 2 * RED_ZONE).next_multiple_of(256);
        self.used += bytes as u64;
        self.blocks.push(Block::new(start, bytes as u64));
        Ok(start)
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
        self.find(address, 1)
            .map(|i| (self.blocks[i].start, self.blocks[i].len as usize))
    }

    pub(crate) fn find(&self, address: u64, len: u64) -> Option<usize> {
        let i = self.blocks.partition_point(|b| b.start <= address).checked_sub(1)?;
        let b = &self.blocks[i];
        (address - b.start < b.len && b.len - (address - b.start) >= len).then_some(i)
    }

    pub(crate) fn block(&self, i: usize) -> &Block {
        &self.blocks[i]
    }

    pub(crate) fn set_read_only(&mut self, address: u64) {
        if let Some(i) = self.find(address, 1) {
            self.blocks[i].read_only = true;
        }
    }

    /// Why an access of `len` bytes at `address` is wrong.
    pub(crate) fn describe(&self, address: u64, len: u64) -> (FaultKind, String) {
        if let Some((s, n)) = self
            .freed
            .range(..=address)
            .next_back()
            .filter(|(s, n)| address - **s < **n)
        {
            let m = format!(
                "{len} bytes at {address:#x}, {} bytes into freed memory of {n} bytes",
                address - s
            );
            return (FaultKind::UseAfterFree, m);
        }
        let near = self
            .blocks
            .partition_point(|b| b.start <= address)
            .checked_sub(1)
            .map(|i| &self.blocks[i]);
        let m = match near {
            Some(b) if address - b.start < b.len + 2 * RED_ZONE => format!(
                "{len} bytes at {address:#x}, offset {} of an allocation of {} bytes",
                address - b.start,
                b.len
            ),
            _ => format!("{len} bytes at {address:#x}, which is in no allocation"),
        };
        (FaultKind::OutOfBounds, m)
    }

    fn host_range(&self, address: u64, len: usize) -> Result<(&Block, usize)> {
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
        let mut i = 0;
        while i < bytes.len() {
            if (at + i).is_multiple_of(8) && bytes.len() - i >= 8 {
                let word: [u8; 8] = bytes[i..i + 8].try_into().expect("eight bytes");
                b.store::<8>((at + i) as u64, u64::from_le_bytes(word));
                i += 8;
            } else {
                b.store::<1>((at + i) as u64, u64::from(bytes[i]));
                i += 1;
            }
        }
        Ok(())
    }

    /// Copies device bytes to the host. Bytes never written come as [`FILL`]; only kernels are held to initialisation.
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let (b, at) = self.host_range(address, out.len())?;
        let mut i = 0;
        while i < out.len() {
            if (at + i).is_multiple_of(8) && out.len() - i >= 8 {
                out[i..i + 8].copy_from_slice(&b.load::<8>((at + i) as u64).0.to_le_bytes());
                i += 8;
            } else {
                out[i] = b.load::<1>((at + i) as u64).0 as u8;
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
        let mut i = 0;
        while i < len {
            if (at + i).is_multiple_of(8) && len - i >= 8 && b.load::<8>((at + i) as u64).1 {
                i += 8;
            } else if b.load::<1>((at + i) as u64).1 {
                i += 1;
            } else {
                return Ok(Some(i));
            }
        }
        Ok(None)
    }

    /// Sets `len` bytes.
    pub fn fill(&self, address: u64, value: u8, len: usize) -> Result<()> {
        self.write(address, &vec![value; len])
    }

    /// Copies within the device; what was never written stays so at the destination.
    pub fn copy(&self, to: u64, from: u64, len: usize) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let (a, at) = self.host_range(from, len)?;
        let (b, bt) = self.host_range(to, len)?;
        let data: Vec<(u64, bool)> = (0..len).map(|i| a.load::<1>((at + i) as u64)).collect();
        for (i, (x, written)) in data.into_iter().enumerate() {
            store::<1>(&b.data, bt + i, x);
            store::<1>(&b.shadow, bt + i, u64::from(written));
        }
        Ok(())
    }
}
