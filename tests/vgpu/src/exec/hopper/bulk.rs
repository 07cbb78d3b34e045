//! Bulk copies: operands, what a copy moves, and reductions.
//!
//! A copy into shared memory reads its source when it is delivered: when somebody waits for its barrier, or when no warp
//! can go on otherwise. Until then its destination counts as never written, so that reading too early is found.
//! A copy out of shared memory takes its bytes at once and holds the range until `wait_group`; the checks make sure that
//! this cannot be told from reading them later. Global memory is written when the group is waited for, or at the end.

use crate::exec::float::{BF16, F16, Mode};
use crate::exec::mem::{Address, AtomicOp, apply};
use crate::ptx::Ty;
use crate::tensor_map::DataType;

/// `cp.async.bulk` in all its forms.
pub struct BulkCopy {
    /// Direction and completion.
    pub way: Way,
    /// The shared side; the source for [`Way::Across`].
    pub shared: Option<Address>,
    /// The global side of a linear copy.
    pub global: Option<Address>,
    /// The global side of a tensor copy.
    pub tensor: Option<Tensor>,
    /// Row with the bytes of a linear copy.
    pub size: Option<u16>,
    /// Combines instead of replacing.
    pub reduction: Option<Reduction>,
}

/// Direction and how its end is told.
#[derive(Clone, Copy, Debug)]
pub enum Way {
    /// Global to shared memory; bytes are counted at a barrier.
    Load {
        /// The barrier, in the block of the destination.
        bar: Address,
        /// Row with the blocks of the cluster that get a copy.
        multicast: Option<u16>,
    },
    /// Shared to global memory, by groups.
    Store,
    /// Shared memory to that of a block of the cluster.
    Across {
        /// Destination.
        to: Address,
        /// The barrier, in the block of the destination.
        bar: Address,
    },
    /// Into the L2 cache: nothing to do here.
    Prefetch,
}

/// A tensor map and coordinates.
pub struct Tensor {
    /// Where the map is.
    pub map: Address,
    /// Rows of the coordinates, innermost first.
    pub at: Vec<u16>,
}

/// How values are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reduction {
    /// Operation.
    pub what: AtomicOp,
    /// Element type.
    pub ty: Ty,
}

impl Reduction {
    /// Whether the operation exists for a type.
    pub fn fits(what: AtomicOp, ty: Ty) -> bool {
        use AtomicOp::*;
        match what {
            And | Or | Xor => matches!(ty, Ty::B32 | Ty::B64),
            Inc | Dec => ty == Ty::U32,
            Add => matches!(ty, Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64 | Ty::F16 | Ty::Bf16 | Ty::F32 | Ty::F64),
            Min | Max => matches!(ty, Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64 | Ty::F16 | Ty::Bf16),
            _ => false,
        }
    }

    /// The reduction with a tensor's element type.
    ///
    /// # Errors
    /// The operation does not exist for it.
    pub fn of_tensor(self, t: DataType) -> Result<Reduction, String> {
        use AtomicOp::{And, Or, Xor};
        let bits = matches!(self.what, And | Or | Xor);
        let ty = match t {
            DataType::U32 | DataType::I32 if bits => Ty::B32,
            DataType::U64 | DataType::I64 if bits => Ty::B64,
            DataType::U32 => Ty::U32,
            DataType::I32 => Ty::S32,
            DataType::U64 => Ty::U64,
            DataType::I64 => Ty::S64,
            DataType::F16 => Ty::F16,
            DataType::Bf16 => Ty::Bf16,
            DataType::F32 | DataType::F32Ftz => Ty::F32,
            DataType::F64 => Ty::F64,
            DataType::U8 | DataType::U16 => Ty::U8,
        };
        if !Reduction::fits(self.what, ty) {
            return Err(format!("no reduction {:?} of a tensor of {t:?}", self.what));
        }
        Ok(Reduction { ty, ..self })
    }

    /// The combined value of an element.
    pub fn combine(self, old: u64, new: u64) -> u64 {
        let half = match self.ty {
            Ty::F16 => F16,
            Ty::Bf16 => BF16,
            _ => return apply(self.what, self.ty, old, new, 0),
        };
        let (a, b) = (half.unpack(old as u16), half.unpack(new as u16));
        let v = match self.what {
            // A sum of two 16-bit floats is exact in double precision.
            AtomicOp::Add => return u64::from(half.pack(f64::from(a) + f64::from(b), Mode::Rn)),
            AtomicOp::Min => a.min(b),
            _ => a.max(b),
        };
        u64::from(half.pack(f64::from(v), Mode::Rn))
    }
}
