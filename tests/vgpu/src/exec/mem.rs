//! Loads, stores, atomics and asynchronous copies, with every check.

use super::launch::Cta;
use super::{File, LANES, Regs, put_raw, raw};
use crate::error::FaultKind;
use crate::ptx::Ty;

/// Window of shared memory in generic addresses.
pub const SHARED: u64 = 0x1000_0000_0000;
/// Window of local memory.
pub const LOCAL: u64 = 0x2000_0000_0000;
/// Window of kernel parameters.
pub const PARAM: u64 = 0x3000_0000_0000;

/// State space of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Global and constant memory.
    Global,
    /// Shared memory of the CTA.
    Shared,
    /// Memory of one thread.
    Local,
    /// Kernel parameters.
    Param,
    /// Whichever window the address is in.
    Generic,
}

/// An address operand.
#[derive(Clone, Copy, Debug)]
pub struct Address {
    /// File of the base.
    pub file: File,
    /// Row of the base.
    pub row: u16,
    /// Constant offset.
    pub offset: i64,
    /// Space.
    pub space: Space,
}

impl Address {
    /// Addresses of all lanes.
    pub fn lanes(&self, r: &Regs) -> [u64; LANES] {
        raw(r, self.file, self.row).map(|x| x.wrapping_add(self.offset as u64))
    }
}

/// A load or store.
pub struct Access {
    /// Where.
    pub at: Address,
    /// Element type.
    pub ty: Ty,
    /// Registers, one per element; `None` row for `_`.
    pub regs: Vec<(File, u16)>,
}

/// Operation of an atomic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum AtomicOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

/// An atomic or, without destination, a reduction.
pub struct Atomic {
    /// Where.
    pub at: Address,
    /// Type.
    pub ty: Ty,
    /// Operation.
    pub op: AtomicOp,
    /// Destination.
    pub d: Option<(File, u16)>,
    /// First value.
    pub b: (File, u16),
    /// Second value of `cas`.
    pub c: Option<(File, u16)>,
}

/// `cp.async`.
pub struct CopyAsync {
    /// Shared destination.
    pub to: Address,
    /// Global source.
    pub from: Address,
    /// Bytes: 4, 8 or 16.
    pub bytes: u64,
    /// Row with the source size, the rest is zero.
    pub source: Option<u16>,
}

/// Lane and reason of a fault.
pub type LaneFault = (usize, FaultKind, String);

/// New value of an atomic.
pub fn apply(op: AtomicOp, ty: Ty, old: u64, b: u64, c: u64) -> u64 {
    use AtomicOp::*;
    let f = |x: u64| f32::from_bits(x as u32);
    match (op, ty) {
        (Exch, _) => b,
        (Cas, _) => {
            if old == b {
                c
            } else {
                old
            }
        }
        (Add, Ty::F32) => u64::from(super::float::canon(f(old) + f(b)).to_bits()),
        (Add, Ty::F64) => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        (Add, Ty::F16x2) => super::float::F16.add_pair(old, b),
        (Add, Ty::Bf16x2) => super::float::BF16.add_pair(old, b),
        (Add, _) => old.wrapping_add(b),
        (Min, Ty::S32) => (old as i32).min(b as i32) as u32 as u64,
        (Max, Ty::S32) => (old as i32).max(b as i32) as u32 as u64,
        (Min, Ty::S64) => (old as i64).min(b as i64) as u64,
        (Max, Ty::S64) => (old as i64).max(b as i64) as u64,
        (Min, _) => old.min(b),
        (Max, _) => old.max(b),
        (And, _) => old & b,
        (Or, _) => old | b,
        (Xor, _) => old ^ b,
        (Inc, _) => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        (Dec, _) => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
    }
}

impl super::float::Format {
    fn add_pair(self, a: u64, b: u64) -> u64 {
        let one = self.pack(1.0, super::float::Mode::Rn);
        let low = self.fma(a as u16, one, b as u16);
        u64::from(low) | u64::from(self.fma((a >> 16) as u16, one, (b >> 16) as u16)) << 16
    }
}

impl Cta<'_> {
    /// Space and offset or address of a possibly generic address.
    #[inline(always)]
    fn resolve(&self, space: Space, a: u64) -> (Space, u64) {
        if space != Space::Generic {
            return (space, a);
        }
        match a >> 44 {
            1 => (Space::Shared, a - SHARED),
            2 => (Space::Local, a - LOCAL),
            3 => (Space::Param, a - PARAM),
            _ => (Space::Global, a),
        }
    }

    /// Loads `N` bytes.
    #[inline(always)]
    pub fn load<const N: usize>(&mut self, warp: usize, lane: usize, space: Space, a: u64) -> Result<u64, LaneFault> {
        if !a.is_multiple_of(N as u64) {
            return Err((
                lane,
                FaultKind::Misaligned,
                format!("address {a:#x} is not a multiple of {N}"),
            ));
        }
        let (space, a) = self.resolve(space, a);
        let (value, written) = match space {
            Space::Global => {
                let b = self.block(a, N as u64, lane)?;
                b.load::<N>(a - b.start)
            }
            Space::Param => match self.params.get(a as usize..a as usize + N) {
                Some(b) => (little(b), true),
                None => return Err((lane, FaultKind::OutOfBounds, format!("parameter bytes at {a}"))),
            },
            _ => {
                let i = self.bytes(space, warp, lane, a, N)?;
                let (data, shadow) = self.arrays(space);
                (little(&data[i..i + N]), shadow[i..i + N].iter().all(|s| *s == 1))
            }
        };
        if !written {
            let m = format!("{N} bytes at {a:#x} of {space:?} memory were never written");
            return Err((lane, FaultKind::Uninitialised, m));
        }
        Ok(value)
    }

    /// Stores `N` bytes.
    #[inline(always)]
    pub fn store<const N: usize>(
        &mut self,
        warp: usize,
        lane: usize,
        space: Space,
        a: u64,
        v: u64,
    ) -> Result<(), LaneFault> {
        if !a.is_multiple_of(N as u64) {
            return Err((
                lane,
                FaultKind::Misaligned,
                format!("address {a:#x} is not a multiple of {N}"),
            ));
        }
        let (space, a) = self.resolve(space, a);
        match space {
            Space::Global => {
                let b = self.block(a, N as u64, lane)?;
                if b.read_only {
                    return Err((
                        lane,
                        FaultKind::ReadOnly,
                        format!("{N} bytes at {a:#x} of constant memory"),
                    ));
                }
                b.store::<N>(a - b.start, v);
            }
            Space::Param => return Err((lane, FaultKind::ReadOnly, format!("parameter bytes at {a}"))),
            _ => {
                let i = self.bytes(space, warp, lane, a, N)?;
                let (data, shadow) = self.arrays(space);
                data[i..i + N].copy_from_slice(&v.to_le_bytes()[..N]);
                shadow[i..i + N].fill(1);
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn block(&mut self, a: u64, n: u64, lane: usize) -> Result<&crate::memory::Block, LaneFault> {
        let (start, len, i) = self.last_block;
        if a.wrapping_sub(start) < len && len - (a - start) >= n {
            return Ok(self.memory.block(i));
        }
        match self.memory.find(a, n) {
            Some(i) => {
                let b = self.memory.block(i);
                self.last_block = (b.start, b.len, i);
                Ok(b)
            }
            None => {
                let (kind, m) = self.memory.describe(a, n);
                Err((lane, kind, m))
            }
        }
    }

    /// Index into the byte array of shared or local memory.
    #[inline(always)]
    fn bytes(&self, space: Space, warp: usize, lane: usize, a: u64, n: usize) -> Result<usize, LaneFault> {
        let (size, base) = match space {
            Space::Shared => (self.shared.len(), 0),
            _ => (self.local_size, (warp * LANES + lane) * self.local_size),
        };
        if a > size as u64 || n as u64 > size as u64 - a {
            let m = format!("{n} bytes at offset {a} of {size} bytes of {space:?} memory");
            return Err((lane, FaultKind::OutOfBounds, m));
        }
        Ok(base + a as usize)
    }

    fn arrays(&mut self, space: Space) -> (&mut [u8], &mut [u8]) {
        match space {
            Space::Shared => (&mut self.shared, &mut self.shared_written),
            _ => (&mut self.local, &mut self.local_written),
        }
    }

    /// Executes a load for the lanes of `mask`.
    pub fn run_load(&mut self, r: &mut Regs, warp: usize, op: &Access, mask: u32) -> Result<(), LaneFault> {
        let at = op.at.lanes(r);
        let n = op.ty.size();
        self.check_vector(op, &at, mask)?;
        self.count_access(op.at.space, &at, n * op.regs.len(), mask);
        for (e, (file, row)) in op.regs.iter().enumerate() {
            let mut v = [0; LANES];
            for lane in lanes(mask) {
                let a = at[lane].wrapping_add((e * n) as u64);
                let x = match n {
                    1 => self.load::<1>(warp, lane, op.at.space, a),
                    2 => self.load::<2>(warp, lane, op.at.space, a),
                    4 => self.load::<4>(warp, lane, op.at.space, a),
                    _ => self.load::<8>(warp, lane, op.at.space, a),
                }?;
                v[lane] = if op.ty.signed() {
                    super::convert::extend(x, op.ty) as u64
                } else {
                    x
                };
            }
            if *row != super::NONE {
                put_raw(r, *file, *row, v, mask);
            }
        }
        Ok(())
    }

    /// Executes a store for the lanes of `mask`.
    pub fn run_store(&mut self, r: &Regs, warp: usize, op: &Access, mask: u32) -> Result<(), LaneFault> {
        let at = op.at.lanes(r);
        let n = op.ty.size();
        self.check_vector(op, &at, mask)?;
        self.count_access(op.at.space, &at, n * op.regs.len(), mask);
        for (e, (file, row)) in op.regs.iter().enumerate() {
            let v = raw(r, *file, *row);
            for lane in lanes(mask) {
                let a = at[lane].wrapping_add((e * n) as u64);
                match n {
                    1 => self.store::<1>(warp, lane, op.at.space, a, v[lane]),
                    2 => self.store::<2>(warp, lane, op.at.space, a, v[lane]),
                    4 => self.store::<4>(warp, lane, op.at.space, a, v[lane]),
                    _ => self.store::<8>(warp, lane, op.at.space, a, v[lane]),
                }?;
            }
        }
        Ok(())
    }

    fn check_vector(&self, op: &Access, at: &[u64; LANES], mask: u32) -> Result<(), LaneFault> {
        let bytes = (op.ty.size() * op.regs.len()) as u64;
        match lanes(mask).find(|l| !at[*l].is_multiple_of(bytes)) {
            Some(l) => Err((
                l,
                FaultKind::Misaligned,
                format!("address {:#x} is not a multiple of {bytes}", at[l]),
            )),
            None => Ok(()),
        }
    }

    /// Executes an atomic, lane by lane in order.
    pub fn run_atomic(&mut self, r: &mut Regs, warp: usize, op: &Atomic, mask: u32) -> Result<(), LaneFault> {
        let at = op.at.lanes(r);
        let b = raw(r, op.b.0, op.b.1);
        let c = op.c.map_or([0; LANES], |(f, row)| raw(r, f, row));
        let mut old = [0; LANES];
        for lane in lanes(mask) {
            let eight = op.ty.size() == 8;
            // The load checks bounds, alignment and initialisation.
            let seen = if eight {
                self.load::<8>(warp, lane, op.at.space, at[lane])?
            } else {
                self.load::<4>(warp, lane, op.at.space, at[lane])?
            };
            let (space, a) = self.resolve(op.at.space, at[lane]);
            old[lane] = if space == Space::Global {
                let block = self.block(a, op.ty.size() as u64, lane)?;
                if block.read_only {
                    return Err((
                        lane,
                        FaultKind::ReadOnly,
                        format!("atomic at {a:#x} of constant memory"),
                    ));
                }
                let offset = a - block.start;
                if eight {
                    block.update64(offset, |x| apply(op.op, op.ty, x, b[lane], c[lane]))
                } else {
                    u64::from(block.update32(offset, |x| apply(op.op, op.ty, u64::from(x), b[lane], c[lane]) as u32))
                }
            } else {
                let new = apply(op.op, op.ty, seen, b[lane], c[lane]);
                if eight {
                    self.store::<8>(warp, lane, space, a, new)?
                } else {
                    self.store::<4>(warp, lane, space, a, new)?
                };
                seen
            };
        }
        if let Some((file, row)) = op.d {
            put_raw(r, file, row, old, mask);
        }
        Ok(())
    }

    /// Reads the sources of `cp.async` now; the data reaches shared memory when the group is waited for.
    pub fn copy_async(
        &mut self,
        r: &Regs,
        warp: usize,
        op: &CopyAsync,
        mask: u32,
    ) -> Result<Vec<(u64, u32)>, LaneFault> {
        let (to, from) = (op.to.lanes(r), op.from.lanes(r));
        let size = op.source.map(|row| r.w[row as usize]);
        let mut out = Vec::with_capacity(LANES * 4);
        self.count_access(Space::Global, &from, op.bytes as usize, mask);
        for lane in lanes(mask) {
            if !to[lane].is_multiple_of(op.bytes) || !from[lane].is_multiple_of(op.bytes) {
                let m = format!("copy of {} bytes from {:#x} to {:#x}", op.bytes, from[lane], to[lane]);
                return Err((lane, FaultKind::Misaligned, m));
            }
            self.bytes(Space::Shared, warp, lane, to[lane], op.bytes as usize)?;
            let valid = size.map_or(op.bytes, |s| u64::from(s[lane]).min(op.bytes));
            for word in (0..op.bytes).step_by(4) {
                // A source size that is not a multiple of four ends within a word.
                let mut v = 0;
                if word + 4 <= valid {
                    v = self.load::<4>(warp, lane, Space::Global, from[lane] + word)? as u32;
                } else {
                    for byte in word..valid.max(word) {
                        let x = self.load::<1>(warp, lane, Space::Global, from[lane] + byte)? as u32;
                        v |= x << (8 * (byte - word));
                    }
                }
                out.push((to[lane] + word, v));
            }
        }
        Ok(out)
    }

    /// `ldmatrix` for a whole warp.
    pub fn load_matrix(&mut self, r: &mut Regs, warp: usize, op: &super::tensor::Matrix) -> Result<(), LaneFault> {
        let at = op.at.lanes(r);
        for (i, row) in op.d.iter().enumerate() {
            let mut tile = [[0u32; 8]; 8];
            let mut words = [0; LANES];
            for line in 0..8 {
                let lane = i * 8 + line;
                if !at[lane].is_multiple_of(16) {
                    return Err((
                        lane,
                        FaultKind::Misaligned,
                        format!("address {:#x} is not a multiple of 16", at[lane]),
                    ));
                }
                for w in 0..4 {
                    let a = at[lane] + 4 * w as u64;
                    words[line * 4 + w] = a;
                    let x = self.load::<4>(warp, lane, op.at.space, a)? as u32;
                    tile[line][2 * w] = x & 0xffff;
                    tile[line][2 * w + 1] = x >> 16;
                }
            }
            self.count_access(Space::Shared, &words, 4, u32::MAX);
            r.w[*row as usize] = std::array::from_fn(|lane| {
                let (g, t) = (lane >> 2, 2 * (lane & 3));
                if op.trans {
                    tile[t][g] | tile[t + 1][g] << 16
                } else {
                    tile[g][t] | tile[g][t + 1] << 16
                }
            });
        }
        Ok(())
    }
}

fn little(b: &[u8]) -> u64 {
    b.iter().rev().fold(0, |x, b| x << 8 | u64::from(*b))
}

/// Set bits of a mask, in order.
pub fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        (rest != 0).then(|| {
            let l = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            l
        })
    })
}
