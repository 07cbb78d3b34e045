//! The interpreter: decoded instructions, warp-wide registers, and the run loop.

mod access;
mod access_fast;
pub mod alu;
pub mod alu_float;
mod atomic;
pub mod barrier;
mod bits;
pub mod cfg;
mod checked;
pub mod code;
mod compare;
mod converge;
pub mod convert;
mod convert_any;
mod copy;
pub mod counters;
pub mod decode;
mod finish;
pub mod float;
pub mod forms;
pub mod hopper;
pub mod launch;
pub mod marks;
pub mod mem;
#[cfg(target_arch = "x86_64")]
mod mma_v3;
mod opcode;
mod opcode_memory;
mod opcode_warp;
mod opcode_wmma;
pub mod printf;
pub mod races;
pub mod rare;
pub mod region;
pub mod rounding;
pub mod schedule;
pub mod site;
pub mod tensor;
pub mod uses;
pub mod warp;
pub mod warp_ops;
pub mod wmma;

/// Threads of a warp.
pub const LANES: usize = 32;
/// "No row" in an instruction.
pub const NONE: u16 = u16::MAX;

/// Registers of one warp: rows of 32 lanes. Constants and special registers are rows too.
#[derive(Default)]
pub struct Regs {
    /// Values of up to 32 bits; narrower ones are kept zero-extended.
    pub w: Vec<[u32; LANES]>,
    /// 64-bit values.
    pub q: Vec<[u64; LANES]>,
    /// Predicates, one bit per lane.
    pub p: Vec<u32>,
    /// Which of them hold a value that nobody wrote.
    pub marks: marks::Marks,
}

/// An arithmetic instruction over the lanes in the mask.
pub type Alu = code::Code<code::Handler>;
/// An instruction that exchanges data between lanes.
pub type WarpAlu = code::Code<code::WarpHandler>;

/// Which file a row is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum File {
    /// Up to 32 bits.
    W,
    /// 64 bits.
    Q,
    /// Predicates.
    P,
}

/// Kind of instruction, for the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Integer, logic, moves and comparisons.
    Integer,
    /// Floating-point arithmetic.
    Float,
    /// Conversions.
    Convert,
    /// Loads, stores and asynchronous copies.
    Memory,
    /// Atomics and reductions.
    Atomic,
    /// Branches and returns.
    Control,
    /// Barriers and fences.
    Barrier,
    /// Shuffles, votes and matches.
    Warp,
    /// Matrix instructions.
    Tensor,
}

/// What an instruction does.
pub enum Act {
    /// Lane-wise arithmetic.
    Alu(code::Handler),
    /// Branch to `x`, lanes meet again at `y`.
    Branch,
    /// Return or exit.
    Exit,
    /// Stops the kernel with a fault.
    Trap,
    /// Nothing to do here (fences, prefetches).
    Nop,
    /// `bar.warp.sync`: mask in row `a`.
    WarpSync,
    /// CTA barrier: id in row `a`, thread count in row `b`.
    Barrier(Option<barrier::Reduce>),
    /// Arrival at a CTA barrier without waiting: id in row `a`, thread count in row `b`.
    Arrive,
    /// Load.
    Load(Box<mem::Access>),
    /// Store.
    Store(Box<mem::Access>),
    /// Atomic or reduction.
    Atomic(Box<mem::Atomic>),
    /// `cp.async` of `y` bytes; source size in row `c` when given.
    CopyAsync(Box<mem::CopyAsync>),
    /// `cp.async.commit_group`.
    Commit,
    /// `cp.async.wait_group y`.
    Wait,
    /// Warp-level data exchange.
    Warp(code::WarpHandler),
    /// Matrix multiply.
    Mma(Box<tensor::Mma>),
    /// `ldmatrix`.
    LoadMatrix(Box<tensor::Matrix>),
    /// `wmma` loads, stores and products.
    Wmma(Box<wmma::Wmma>),
    /// Reads the instruction counter.
    Clock,
    /// `printf`, `stmatrix` and others that need no hurry.
    Rare(Box<rare::Rare>),
    /// An instruction of the sm_90a set.
    Hopper(Box<hopper::Op>),
    /// An instruction that touches registers of warpgroup products.
    Touching(Box<hopper::track::Touching>),
}

/// A decoded instruction; `d`, `a`, `b`, `c` are rows.
pub struct Inst {
    /// What to do.
    pub act: Act,
    /// Destination row.
    pub d: u16,
    /// First source row.
    pub a: u16,
    /// Second source row.
    pub b: u16,
    /// Third source row.
    pub c: u16,
    /// Guard row or [`NONE`].
    pub guard: u16,
    /// Whether the guard is negated.
    pub guard_not: bool,
    /// For the counters.
    pub class: Class,
    /// Small variant number: files of operands, combination of setp, ...
    pub k: u8,
    /// Branch target, second destination and the like.
    pub x: u32,
    /// Reconvergence point and the like.
    pub y: u32,
    /// Number of the memory access in its program; see [`site::Site`].
    pub site: u32,
    /// A backward branch whose loop looks at memory that others write: the warp lets others run before the next round.
    pub polls: bool,
    /// How it orders memory: bits of [`races`].
    pub order: u8,
}

/// A type that fills the lanes of a row.
pub trait Lane: Copy {
    /// What the row holds: words or long words.
    type Cell: Copy + Default;
    /// The value of a cell.
    fn of(cell: Self::Cell) -> Self;
    /// The cell of a value.
    fn cell(self) -> Self::Cell;
    /// A row of the file that holds the type.
    fn row(r: &Regs, row: u16) -> &[Self::Cell; LANES];
    /// A row to write.
    fn row_mut(r: &mut Regs, row: u16) -> &mut [Self::Cell; LANES];

    /// All lanes of a row.
    #[inline(always)]
    fn get(r: &Regs, row: u16) -> [Self; LANES] {
        let row = Self::row(r, row);
        let mut out = [Self::of(row[0]); LANES];
        for l in 0..LANES {
            out[l] = Self::of(row[l]);
        }
        out
    }

    /// Writes the lanes of the mask.
    #[inline(always)]
    fn put(r: &mut Regs, row: u16, v: [Self; LANES], mask: u32) {
        let mut out = [Self::Cell::default(); LANES];
        for l in 0..LANES {
            out[l] = v[l].cell();
        }
        merge(Self::row_mut(r, row), &out, mask);
    }
}

/// Overwrites the lanes of the mask.
#[inline(always)]
fn merge<C: Copy>(row: &mut [C; LANES], new: &[C; LANES], mask: u32) {
    if mask == u32::MAX {
        *row = *new;
    } else {
        for l in 0..LANES {
            row[l] = if mask >> l & 1 == 1 { new[l] } else { row[l] };
        }
    }
}

macro_rules! lane {
    ($t:ty, $cell:ty, $file:ident, |$x:ident| $from:expr, |$y:ident| $to:expr) => {
        impl Lane for $t {
            type Cell = $cell;
            #[inline(always)]
            fn of($x: $cell) -> $t {
                $from
            }
            #[inline(always)]
            fn cell(self) -> $cell {
                let $y = self;
                $to
            }
            #[inline(always)]
            fn row(r: &Regs, row: u16) -> &[$cell; LANES] {
                &r.$file[row as usize]
            }
            #[inline(always)]
            fn row_mut(r: &mut Regs, row: u16) -> &mut [$cell; LANES] {
                &mut r.$file[row as usize]
            }
        }
    };
}

lane!(u32, u32, w, |x| x, |y| y);
lane!(i32, u32, w, |x| x as i32, |y| y as u32);
lane!(u16, u32, w, |x| x as u16, |y| u32::from(y));
lane!(i16, u32, w, |x| x as i16, |y| u32::from(y as u16));
lane!(f32, u32, w, |x| f32::from_bits(x), |y| y.to_bits());
lane!(u64, u64, q, |x| x, |y| y);
lane!(i64, u64, q, |x| x as i64, |y| y as u64);
lane!(f64, u64, q, |x| f64::from_bits(x), |y| y.to_bits());

// The results of all lanes are kept aside and then written: the compiler sees that they cannot overlap the sources, so
// that the loops become vector code without a copy. Lanes outside the mask compute too; their results are dropped.

/// `d = f(a)`.
#[inline(always)]
pub fn map1<A: Lane, D: Lane>(r: &mut Regs, i: &Inst, mask: u32, f: impl Fn(A) -> D) {
    let mut out = [D::Cell::default(); LANES];
    let a = A::row(r, i.a);
    for l in 0..LANES {
        out[l] = f(A::of(a[l])).cell();
    }
    merge(D::row_mut(r, i.d), &out, mask);
}

/// `d = f(a, b)`.
#[inline(always)]
pub fn map2<A: Lane, B: Lane, D: Lane>(r: &mut Regs, i: &Inst, mask: u32, f: impl Fn(A, B) -> D) {
    let mut out = [D::Cell::default(); LANES];
    let (a, b) = (A::row(r, i.a), B::row(r, i.b));
    for l in 0..LANES {
        out[l] = f(A::of(a[l]), B::of(b[l])).cell();
    }
    merge(D::row_mut(r, i.d), &out, mask);
}

/// `d = f(a, b, c)`.
#[inline(always)]
pub fn map3<A: Lane, B: Lane, C: Lane, D: Lane>(r: &mut Regs, i: &Inst, mask: u32, f: impl Fn(A, B, C) -> D) {
    let mut out = [D::Cell::default(); LANES];
    let (a, b, c) = (A::row(r, i.a), B::row(r, i.b), C::row(r, i.c));
    for l in 0..LANES {
        out[l] = f(A::of(a[l]), B::of(b[l]), C::of(c[l])).cell();
    }
    merge(D::row_mut(r, i.d), &out, mask);
}

/// A row of either file as raw 64-bit values.
#[inline(always)]
pub fn raw(r: &Regs, file: File, row: u16) -> [u64; LANES] {
    if file == File::Q {
        return r.q[row as usize];
    }
    let (mut out, row) = ([0; LANES], &r.w[row as usize]);
    for l in 0..LANES {
        out[l] = u64::from(row[l]);
    }
    out
}

/// Writes raw values to a row of either file.
#[inline(always)]
pub fn put_raw(r: &mut Regs, file: File, row: u16, v: [u64; LANES], mask: u32) {
    if file == File::Q {
        return merge(&mut r.q[row as usize], &v, mask);
    }
    let mut out = [0; LANES];
    for l in 0..LANES {
        out[l] = v[l] as u32;
    }
    merge(&mut r.w[row as usize], &out, mask);
}
