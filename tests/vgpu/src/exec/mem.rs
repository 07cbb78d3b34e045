//! Operands of memory instructions: spaces, addresses, and what an atomic computes.

use super::{File, LANES, Regs};
use crate::error::FaultKind;
use crate::ptx::Ty;

/// Window of shared memory in generic addresses.
pub const SHARED: u64 = 0x1000_0000_0000;
/// Window of local memory.
pub const LOCAL: u64 = 0x2000_0000_0000;
/// Window of kernel parameters.
pub const PARAM: u64 = 0x3000_0000_0000;

/// State space of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Global and constant memory.
    Global,
    /// Shared memory of the CTA.
    Shared,
    /// Shared memory of any CTA of the cluster.
    Cluster,
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
    #[inline(always)]
    pub fn lanes(&self, r: &Regs) -> [u64; LANES] {
        let mut at = [0; LANES];
        let offset = self.offset as u64;
        if self.file == File::Q {
            let row = &r.q[self.row as usize];
            for l in 0..LANES {
                at[l] = row[l].wrapping_add(offset);
            }
        } else {
            let row = &r.w[self.row as usize];
            for l in 0..LANES {
                at[l] = u64::from(row[l]).wrapping_add(offset);
            }
        }
        at
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
    /// Predicate row, and whether it is negated, that says to write zeros whatever the source holds.
    pub ignore: Option<(u16, bool)>,
}

impl CopyAsync {
    /// Bytes that each lane takes from its source, if the instruction limits them.
    pub fn limits(&self, r: &Regs) -> Option<[u32; LANES]> {
        match self.ignore {
            Some((row, not)) => {
                let skip = super::alu::pred(r, row, not);
                Some(std::array::from_fn(|l| if skip >> l & 1 == 1 { 0 } else { self.bytes as u32 }))
            }
            None => self.source.map(|row| r.w[row as usize]),
        }
    }
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
        (Add, Ty::F16 | Ty::F16x2) => super::float::F16.add_pair(old, b),
        (Add, Ty::Bf16 | Ty::Bf16x2) => super::float::BF16.add_pair(old, b),
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
