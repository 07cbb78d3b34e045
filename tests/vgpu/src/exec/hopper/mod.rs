//! The sm_90a set: warpgroup products, barriers in shared memory, bulk and tensor copies, clusters.
//!
//! Whatever is asynchronous on the device is a record in `State` here: copies that were not delivered, ranges of shared
//! memory that copies and products may still read, products that nobody has waited for. The records are what the checks
//! look at; delivering them is what waiting does.

mod act;
pub mod bulk;
pub mod bytes;
mod cluster;
mod copies;
mod decode;
mod decode_copies;
pub mod descriptor;
pub mod fp8;
mod host;
pub mod mbarrier;
pub mod product;
mod registers;
pub mod state;
pub mod tile;
pub mod track;
pub mod visible;
mod wait;
mod warpgroup;
mod watch;

use super::code::{Code, Handler, WarpHandler, alu, warp_alu};
use super::launch::Shape;
use super::mem::{Address, SHARED};
use super::{File, LANES, Lane};
use bulk::{BulkCopy, Reduction};
use descriptor::Major;
use mbarrier::Arrival;
use product::{Element, Sum};

pub(super) use act::run;

/// A special register about clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterRegister {
    /// `%clusterid`.
    Id,
    /// `%nclusterid`.
    Clusters,
    /// `%cluster_ctaid`.
    Cta,
    /// `%cluster_nctaid`.
    Ctas,
    /// `%cluster_ctarank`.
    Rank,
    /// `%cluster_nctarank`.
    Size,
    /// `%is_explicit_cluster`, as a number.
    Explicit,
}

impl ClusterRegister {
    /// By name.
    pub fn of(name: &str) -> Option<ClusterRegister> {
        Some(match name {
            "%clusterid" => ClusterRegister::Id,
            "%nclusterid" => ClusterRegister::Clusters,
            "%cluster_ctaid" => ClusterRegister::Cta,
            "%cluster_nctaid" => ClusterRegister::Ctas,
            "%cluster_ctarank" => ClusterRegister::Rank,
            "%cluster_nctarank" => ClusterRegister::Size,
            "%is_explicit_cluster" => ClusterRegister::Explicit,
            _ => return None,
        })
    }
}

impl Shape {
    /// Value of a special register in a block, by dimension.
    pub fn cluster_register(&self, what: ClusterRegister, d: usize, block: [u32; 3]) -> u32 {
        let c = self.cluster;
        let inside: [u32; 3] = std::array::from_fn(|d| block[d] % c[d]);
        match what {
            ClusterRegister::Id => block[d] / c[d],
            ClusterRegister::Clusters => self.grid[d] / c[d],
            ClusterRegister::Cta => inside[d],
            ClusterRegister::Ctas => c[d],
            ClusterRegister::Rank => inside[0] + c[0] * (inside[1] + c[1] * inside[2]),
            ClusterRegister::Size => c.iter().product(),
            ClusterRegister::Explicit => u32::from(self.cluster_size() > 1),
        }
    }
}

/// An instruction of the set.
pub enum Op {
    /// `wgmma.mma_async`.
    Product(Product),
    /// `wgmma.fence`.
    Fence,
    /// `wgmma.commit_group`.
    Commit,
    /// `wgmma.wait_group`: groups that may stay in flight.
    Wait(u32),
    /// An operation on a barrier object.
    Barrier(BarrierOp),
    /// A bulk copy.
    Copy(BulkCopy),
    /// `cp.async.bulk.commit_group`.
    CommitCopies,
    /// `cp.async.bulk.wait_group`.
    WaitCopies {
        /// Groups that may stay in flight.
        keep: u32,
        /// Whether it is enough that sources were read.
        read: bool,
    },
    /// `fence.proxy.async`.
    ProxyFence,
    /// `setmaxnreg`.
    Registers {
        /// `.inc` rather than `.dec`.
        grow: bool,
        /// Registers per thread.
        count: u32,
    },
    /// `barrier.cluster.arrive`.
    ClusterArrive {
        /// Whether whole warps must come.
        aligned: bool,
    },
    /// `barrier.cluster.wait`.
    ClusterWait {
        /// Whether whole warps must come.
        aligned: bool,
    },
    /// `st.async` and `red.async`.
    StoreAsync {
        /// Destination.
        to: Address,
        /// The barrier that counts the bytes.
        bar: Address,
        /// Registers of the elements.
        value: Vec<(File, u16)>,
        /// Bytes of an element.
        element: usize,
        /// Combines instead of replacing.
        reduction: Option<Reduction>,
    },
}

/// `wgmma.mma_async`: rows of registers and the form of the product.
pub struct Product {
    /// Type of A.
    pub a: Element,
    /// Type of B.
    pub b: Element,
    /// Accumulators.
    pub sum: Sum,
    /// Columns.
    pub n: usize,
    /// Rows of the accumulators.
    pub d: Vec<u16>,
    /// Where A is.
    pub from: Source,
    /// Row of B's descriptor.
    pub descriptor: u16,
    /// Predicate row of `scale-d` and whether it is negated.
    pub scale_d: (u16, bool),
    /// Whether the product changes sign.
    pub negate: bool,
    /// Contiguous dimension of A in shared memory.
    pub major_a: Major,
    /// Contiguous dimension of B.
    pub major_b: Major,
    /// Numbers of the accumulators among the tracked registers.
    pub tracked_d: Vec<u32>,
    /// Numbers of A's registers.
    pub tracked_a: Vec<u32>,
}

/// Where A is.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// Row of a descriptor.
    Shared(u16),
    /// Four rows of registers.
    Registers([u16; 4]),
}

/// An operation on a barrier object.
pub struct BarrierOp {
    /// Where the object is.
    pub at: Address,
    /// What is done.
    pub turn: Turn,
}

/// What is done with a barrier object; fields are rows.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Turn {
    Init {
        count: u16,
    },
    Invalidate,
    ExpectTx {
        bytes: u16,
    },
    CompleteTx {
        bytes: u16,
    },
    Arrive {
        token: u16,
        how: Arrival,
        count: Option<u16>,
        bytes: Option<u16>,
    },
    /// `cp.async.mbarrier.arrive`: arrives once the thread's copies are complete.
    CopiesArrive {
        extra: bool,
    },
    Wait {
        done: u16,
        state: u16,
        parity: bool,
    },
}

/// Bits of a `shared::cluster` address below the rank.
const RANK: u32 = 24;

/// The address of an offset in the block of a rank; rank 0 is written as one, so that plain offsets mean the own block.
#[inline(always)]
fn in_block(offset: u64, rank: u32) -> u64 {
    offset & ((1 << RANK) - 1) | u64::from(rank + 1) << RANK
}

#[inline(always)]
fn rank_of(address: u64, own: u32) -> u32 {
    match (address >> RANK) as u32 & 0xff {
        0 => own,
        r => r - 1,
    }
}

const MAPA_WORD: Code<Handler> = alu!(|r, i, m| {
    let (a, b) = (u32::get(r, i.a), u32::get(r, i.b));
    u32::put(r, i.d, std::array::from_fn(|l| in_block(u64::from(a[l]), b[l] & 0xff) as u32), m);
});
const MAPA_LONG: Code<Handler> = alu!(|r, i, m| {
    let (a, b) = (u64::get(r, i.a), u32::get(r, i.b));
    u64::put(r, i.d, std::array::from_fn(|l| in_block(a[l], b[l] & 0xff)), m);
});
const MAPA_GENERIC: Code<Handler> = alu!(|r, i, m| {
    let (a, b) = (u64::get(r, i.a), u32::get(r, i.b));
    let mapped = |l: usize| in_block(a[l].wrapping_sub(SHARED), b[l] & 0xff) + SHARED;
    u64::put(r, i.d, std::array::from_fn(mapped), m);
});
const RANK_WORD: Code<Handler> = alu!(|r, i, m| {
    let (a, own) = (u32::get(r, i.a), u32::get(r, i.b));
    u32::put(r, i.d, std::array::from_fn(|l| rank_of(u64::from(a[l]), own[l])), m);
});
const RANK_LONG: Code<Handler> = alu!(|r, i, m| {
    let (a, own) = (u64::get(r, i.a), u32::get(r, i.b));
    u32::put(r, i.d, std::array::from_fn(|l| rank_of(a[l] & 0xfff_ffff_ffff, own[l])), m);
});
const IS_CLUSTER: Code<Handler> = alu!(|r, i, m| {
    let a = u32::get(r, i.a);
    let bits = (0..LANES).fold(0, |b, l| b | u32::from(a[l] != 0) << l);
    super::alu::write_pred(r, i.d, bits, m);
});
const PENDING_COUNT: Code<Handler> = alu!(|r, i, m| {
    let a = u64::get(r, i.a);
    u32::put(r, i.d, a.map(mbarrier::pending_count), m);
});

/// `elect.sync`: the lowest lane of the mask is the leader.
const ELECT: Code<WarpHandler> = warp_alu!(|r, i, m| {
    let masks = u32::get(r, i.y as u16);
    let first = masks[m.trailing_zeros() as usize & 31];
    for (lane, mask) in masks.iter().enumerate() {
        if m >> lane & 1 == 1 && (*mask != first || mask >> lane & 1 == 0) {
            return Err(format!("lane {lane} gives member mask {mask:#010x}, the first lane {first:#010x}"));
        }
    }
    if first & !m != 0 {
        return Err(format!("member mask {first:#010x} names lanes that do not execute it (active {m:#010x})"));
    }
    let leader = first.trailing_zeros();
    if i.d != super::NONE {
        u32::put(r, i.d, [leader; LANES], m);
    }
    if i.x as u16 != super::NONE {
        super::alu::write_pred(r, i.x as u16, 1 << leader, m);
    }
    Ok(())
});
