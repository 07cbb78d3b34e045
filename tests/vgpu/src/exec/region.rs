//! Bytes of a memory space with one bit per byte that says whether it was written.
//!
//! Everything is relaxed atomics, so that kernels which race across host threads stay defined for the emulator; on
//! x86-64 these are plain moves. Only the first write to a byte costs a locked instruction, for its bit.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

/// Bytes at addresses from `start` on.
pub struct Region {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Whether kernels may only read it.
    pub read_only: bool,
    /// Whether only one host thread ever touches it, so that its bits need no locked instructions.
    pub alone: bool,
    data: Box<[AtomicU64]>,
    written: Box<[AtomicU64]>,
}

/// `n` (at most 64) ones.
#[inline(always)]
pub const fn ones(n: u32) -> u64 {
    if n >= 64 { !0 } else { (1 << n) - 1 }
}

fn words(n: u64) -> Box<[AtomicU64]> {
    let zeroed = Box::new_zeroed_slice(n as usize);
    // SAFETY: all bits zero are a valid `AtomicU64`.
    unsafe { zeroed.assume_init() }
}

impl Region {
    /// `len` bytes that nobody has written.
    pub fn new(start: u64, len: u64) -> Region {
        Region {
            start,
            len,
            read_only: false,
            alone: false,
            data: words(len.div_ceil(8)),
            written: words(len.div_ceil(64)),
        }
    }

    /// Tells it from every other living region.
    pub fn id(&self) -> usize {
        self.data.as_ptr().addr()
    }

    /// Forgets that anything was written, and gives the region another length.
    pub fn reset(&mut self, len: u64) {
        if len.div_ceil(64) > self.written.len() as u64 {
            (self.data, self.written) = (words(len.div_ceil(8)), words(len.div_ceil(64)));
        }
        self.len = len;
        self.written.iter_mut().for_each(|w| *w.get_mut() = 0);
    }

    /// Loads `N` bytes (1, 2, 4, 8) at an offset that is a multiple of `N` and in range.
    #[inline(always)]
    pub fn load<const N: usize>(&self, offset: u64) -> u64 {
        let offset = offset as usize;
        assert!(offset.is_multiple_of(N) && offset / 8 < self.data.len());
        // SAFETY: the assertion puts the N aligned bytes inside one element; sizes are powers of two up to eight.
        unsafe {
            let p = self.data.as_ptr().cast::<u8>().add(offset);
            match N {
                1 => u64::from((*p.cast::<AtomicU8>()).load(Relaxed)),
                2 => u64::from((*p.cast::<AtomicU16>()).load(Relaxed)),
                4 => u64::from((*p.cast::<AtomicU32>()).load(Relaxed)),
                _ => (*p.cast::<AtomicU64>()).load(Relaxed),
            }
        }
    }

    /// [`Region::load`] without looking at the offset again.
    ///
    /// # Safety
    /// `offset` is a multiple of `N` (1, 2, 4, 8) and `offset + N` at most the length.
    #[inline(always)]
    pub unsafe fn load_unchecked<const N: usize>(&self, offset: u64) -> u64 {
        // SAFETY: the caller keeps the bytes inside the data, which has room for `len` bytes in whole long words.
        unsafe {
            let p = self.data.as_ptr().cast::<u8>().add(offset as usize);
            match N {
                1 => u64::from((*p.cast::<AtomicU8>()).load(Relaxed)),
                2 => u64::from((*p.cast::<AtomicU16>()).load(Relaxed)),
                4 => u64::from((*p.cast::<AtomicU32>()).load(Relaxed)),
                _ => (*p.cast::<AtomicU64>()).load(Relaxed),
            }
        }
    }

    /// [`Region::put`] without looking at the offset again.
    ///
    /// # Safety
    /// As for [`Region::load_unchecked`].
    #[inline(always)]
    pub unsafe fn put_unchecked<const N: usize>(&self, offset: u64, value: u64) {
        // SAFETY: as in `load_unchecked`.
        unsafe {
            let p = self.data.as_ptr().cast::<u8>().add(offset as usize);
            match N {
                1 => (*p.cast::<AtomicU8>()).store(value as u8, Relaxed),
                2 => (*p.cast::<AtomicU16>()).store(value as u16, Relaxed),
                4 => (*p.cast::<AtomicU32>()).store(value as u32, Relaxed),
                _ => (*p.cast::<AtomicU64>()).store(value, Relaxed),
            }
        }
    }

    /// Which of the `n` bytes (within an aligned 64) are not written, as bits from 0 on.
    ///
    /// # Safety
    /// `offset` is inside the region.
    #[inline(always)]
    pub unsafe fn missing_unchecked(&self, offset: u64, n: u32) -> u64 {
        // SAFETY: the bitmap has a bit for each byte of the region.
        let w = unsafe { self.written.get_unchecked((offset / 64) as usize) }.load(Relaxed);
        !w >> (offset & 63) & ones(n)
    }

    /// Two long words at once, as [`Region::load_unchecked`].
    ///
    /// # Safety
    /// `offset` is a multiple of eight and `offset + 16` at most the length.
    #[inline(always)]
    pub unsafe fn pair_unchecked(&self, offset: u64) -> [u64; 2] {
        // SAFETY: the caller's promise is that of both loads.
        unsafe { [self.load_unchecked::<8>(offset), self.load_unchecked::<8>(offset + 8)] }
    }

    /// The bits of 16 bytes: all ones when each of them is written.
    ///
    /// # Safety
    /// `offset` is a multiple of 16 and inside the region.
    #[inline(always)]
    pub unsafe fn written16_unchecked(&self, offset: u64) -> u16 {
        // SAFETY: the bitmap has a bit for each byte; sixteen of them make one aligned half word of it.
        unsafe {
            let p = self.written.as_ptr().cast::<AtomicU16>().add((offset / 16) as usize);
            (*p).load(Relaxed)
        }
    }

    /// Copies 16 bytes out in one move.
    ///
    /// # Safety
    /// `offset + 16` is at most the length, and the region is only touched by this host thread.
    #[inline(always)]
    pub unsafe fn copy16_alone(&self, offset: u64, to: &mut [u64; 2]) {
        // SAFETY: the caller keeps the bytes inside the data and other threads away from it.
        unsafe {
            let from = self.data.as_ptr().cast::<u8>().add(offset as usize);
            from.copy_to_nonoverlapping(to.as_mut_ptr().cast(), 16);
        }
    }

    /// Stores `N` bytes at an offset that is a multiple of `N` and in range, without saying that they are written.
    #[inline(always)]
    pub fn put<const N: usize>(&self, offset: u64, value: u64) {
        let offset = offset as usize;
        assert!(offset.is_multiple_of(N) && offset / 8 < self.data.len());
        // SAFETY: as in `load`.
        unsafe {
            let p = self.data.as_ptr().cast::<u8>().add(offset);
            match N {
                1 => (*p.cast::<AtomicU8>()).store(value as u8, Relaxed),
                2 => (*p.cast::<AtomicU16>()).store(value as u16, Relaxed),
                4 => (*p.cast::<AtomicU32>()).store(value as u32, Relaxed),
                _ => (*p.cast::<AtomicU64>()).store(value, Relaxed),
            }
        }
    }

    /// Stores `N` bytes and says that they are written.
    #[inline(always)]
    pub fn store<const N: usize>(&self, offset: u64, value: u64) {
        self.put::<N>(offset, value);
        self.mark(offset, N as u32);
    }

    /// Whether `n` bytes, aligned so that they lie within 64, are all written.
    #[inline(always)]
    pub fn is_written(&self, offset: u64, n: u32) -> bool {
        let w = self.written[(offset / 64) as usize].load(Relaxed);
        !w >> (offset & 63) & ones(n) == 0
    }

    /// Says that `n` bytes, aligned so that they lie within 64, are written.
    #[inline(always)]
    pub fn mark(&self, offset: u64, n: u32) {
        self.set_bits((offset / 64) as usize, ones(n) << (offset & 63));
    }

    /// Sets bits of one word of the bitmap.
    #[inline(always)]
    pub fn set_bits(&self, word: usize, bits: u64) {
        let cell = &self.written[word];
        let old = cell.load(Relaxed);
        if self.alone {
            cell.store(old | bits, Relaxed);
        } else if old & bits != bits {
            cell.fetch_or(bits, Relaxed);
        }
    }

    /// Clears bits of one word of the bitmap.
    #[inline(always)]
    pub fn clear_bits(&self, word: usize, bits: u64) {
        let cell = &self.written[word];
        if self.alone {
            cell.store(cell.load(Relaxed) & !bits, Relaxed);
        } else {
            cell.fetch_and(!bits, Relaxed);
        }
    }

    /// Calls `f` with the place of each word of the bitmap that a range touches, and the bits of the range in it.
    #[inline(always)]
    fn bits(offset: u64, len: u64, mut f: impl FnMut(usize, u64)) {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let n = (64 - (at & 63)).min(end - at);
            f((at / 64) as usize, ones(n as u32) << (at & 63));
            at += n;
        }
    }

    /// Whether all bytes of a range are written.
    #[inline(always)]
    pub fn all_written(&self, offset: u64, len: u64) -> bool {
        let mut missing = 0;
        Self::bits(offset, len, |w, bits| missing |= !self.written[w].load(Relaxed) & bits);
        missing == 0
    }

    /// Says that all bytes of a range are written.
    #[inline(always)]
    pub fn mark_all(&self, offset: u64, len: u64) {
        Self::bits(offset, len, |w, bits| self.set_bits(w, bits));
    }

    /// Says that no byte of a range is written.
    pub fn unmark(&self, offset: u64, len: u64) {
        Self::bits(offset, len, |w, bits| self.clear_bits(w, bits));
    }

    /// Reads consecutive long words at an offset that is a multiple of eight.
    #[inline(always)]
    pub fn read(&self, offset: u64, out: &mut [u64]) {
        let first = (offset / 8) as usize;
        let n = out.len();
        for (x, cell) in out.iter_mut().zip(&self.data[first..first + n]) {
            *x = cell.load(Relaxed);
        }
    }

    /// Writes consecutive long words at an offset that is a multiple of eight, without saying that they are written.
    #[inline(always)]
    pub fn write(&self, offset: u64, values: &[u64]) {
        let first = (offset / 8) as usize;
        for (x, cell) in values.iter().zip(&self.data[first..first + values.len()]) {
            cell.store(*x, Relaxed);
        }
    }

    /// Replaces four bytes by `f` of them, atomically, and returns the old value.
    pub fn update32(&self, offset: u64, f: impl Fn(u32) -> u32) -> u32 {
        let offset = offset as usize;
        assert!(offset.is_multiple_of(4) && offset / 8 < self.data.len());
        // SAFETY: the assertion puts the four aligned bytes inside one element; atomics have no validity limits.
        let cell = unsafe { &*self.data.as_ptr().cast::<AtomicU32>().add(offset / 4) };
        cell.fetch_update(Relaxed, Relaxed, |x| Some(f(x))).unwrap_or_else(|x| x)
    }

    /// Eight-byte form of [`Region::update32`].
    pub fn update64(&self, offset: u64, f: impl Fn(u64) -> u64) -> u64 {
        self.data[offset as usize / 8].fetch_update(Relaxed, Relaxed, |x| Some(f(x))).unwrap_or_else(|x| x)
    }

    /// Two-byte form of [`Region::update32`].
    pub fn update16(&self, offset: u64, f: impl Fn(u16) -> u16) -> u16 {
        let offset = offset as usize;
        assert!(offset.is_multiple_of(2) && offset / 8 < self.data.len());
        // SAFETY: the assertion puts the two aligned bytes inside one element; atomics have no validity limits.
        let cell = unsafe { &*self.data.as_ptr().cast::<AtomicU16>().add(offset / 2) };
        cell.fetch_update(Relaxed, Relaxed, |x| Some(f(x))).unwrap_or_else(|x| x)
    }
}
