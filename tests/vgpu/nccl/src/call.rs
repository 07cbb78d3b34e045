//! One call of the interface: what it asks for, its checks, and its eight words in shared memory.

use std::fmt;

use crate::error::{Failure, Result};

/// `ncclDataType_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    I8,
    U8,
    I32,
    U32,
    I64,
    U64,
    F16,
    F32,
    F64,
    Bf16,
    /// Moved, never summed.
    Fp8E4,
    /// Moved, never summed.
    Fp8E5,
}

const DTYPES: [(Dtype, usize, &str); 12] = [
    (Dtype::I8, 1, "i8"),
    (Dtype::U8, 1, "u8"),
    (Dtype::I32, 4, "i32"),
    (Dtype::U32, 4, "u32"),
    (Dtype::I64, 8, "i64"),
    (Dtype::U64, 8, "u64"),
    (Dtype::F16, 2, "f16"),
    (Dtype::F32, 4, "f32"),
    (Dtype::F64, 8, "f64"),
    (Dtype::Bf16, 2, "bf16"),
    (Dtype::Fp8E4, 1, "fp8e4m3"),
    (Dtype::Fp8E5, 1, "fp8e5m2"),
];

impl Dtype {
    pub fn new(code: i32) -> Result<Dtype> {
        let found = usize::try_from(code).ok().and_then(|i| DTYPES.get(i));
        found.map(|d| d.0).ok_or_else(|| Failure::argument(format!("data type {code} is not one of 0 to 11")))
    }

    pub fn size(self) -> usize {
        DTYPES[self as usize].1
    }
}

/// How elements of the ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    Sum,
    Prod,
    Max,
    Min,
    Avg,
    /// Each rank multiplies by its own factor (bits of the data type) before the sum.
    PreMulSum,
}

const OPS: [(ReduceOp, &str); 6] = [
    (ReduceOp::Sum, "sum"),
    (ReduceOp::Prod, "prod"),
    (ReduceOp::Max, "max"),
    (ReduceOp::Min, "min"),
    (ReduceOp::Avg, "avg"),
    (ReduceOp::PreMulSum, "premulsum"),
];

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
    Reduce,
    Send,
    Recv,
}

const KINDS: [(Kind, &str); 7] = [
    (Kind::AllReduce, "ncclAllReduce"),
    (Kind::ReduceScatter, "ncclReduceScatter"),
    (Kind::AllGather, "ncclAllGather"),
    (Kind::Broadcast, "ncclBroadcast"),
    (Kind::Reduce, "ncclReduce"),
    (Kind::Send, "ncclSend"),
    (Kind::Recv, "ncclRecv"),
];

impl Kind {
    pub fn name(self) -> &'static str {
        KINDS[self as usize].1
    }

    pub fn reduces(self) -> bool {
        matches!(self, Kind::AllReduce | Kind::ReduceScatter | Kind::Reduce)
    }

    /// Whether one rank is named: root, or the other end.
    pub fn has_peer(self) -> bool {
        matches!(self, Kind::Broadcast | Kind::Reduce | Kind::Send | Kind::Recv)
    }
}

/// Where the factor of [`ReduceOp::PreMulSum`] lies.
#[derive(Clone, Copy, Debug)]
pub enum Factor {
    /// There is none.
    None,
    /// Bits taken at the call.
    Host(u64),
    /// Address on the device, read when the operation runs.
    Device(u64),
}

/// A checked call. Counts are elements, addresses are the device's.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub kind: Kind,
    pub count: usize,
    pub dtype: Dtype,
    pub op: ReduceOp,
    /// Root of a broadcast or reduce, other end of a send or receive.
    pub peer: usize,
    pub send: u64,
    pub recv: u64,
    pub factor: Factor,
}

/// Words of a call in shared memory.
pub type Words = [u64; 6];

impl Call {
    /// What the other ranks compare and need: not the addresses.
    pub fn words(&self, factor: u64) -> Words {
        let peer = if self.kind.has_peer() { self.peer as u64 } else { 0 };
        let op = if self.kind.reduces() { self.op as u64 } else { 0 };
        [self.kind as u64, self.count as u64, self.dtype as u64, op, peer, factor]
    }

    /// Sizes of send and receive buffer in bytes on `rank` of `n`; zero where the buffer has no part.
    pub fn buffers(&self, rank: usize, n: usize) -> (usize, usize) {
        let one = self.count * self.dtype.size();
        match self.kind {
            Kind::AllReduce => (one, one),
            Kind::ReduceScatter => (one * n, one),
            Kind::AllGather => (one, one * n),
            Kind::Broadcast => (if rank == self.peer { one } else { 0 }, one),
            Kind::Reduce => (one, if rank == self.peer { one } else { 0 }),
            Kind::Send => (one, 0),
            Kind::Recv => (0, one),
        }
    }

    /// Checks sizes, null pointers and the rules for buffers that overlap.
    ///
    /// # Errors
    /// [`crate::error::Code::InvalidArgument`] with the numbers.
    pub fn check(&self, rank: usize, n: usize) -> Result<()> {
        let fail = |text: String| Err(Failure::argument(format!("rank {rank}: {self}: {text}")));
        if self.kind.has_peer() && self.peer >= n {
            let what = if self.kind == Kind::Broadcast || self.kind == Kind::Reduce { "root" } else { "peer" };
            return fail(format!("{what} is not one of the {n} ranks"));
        }
        if self.kind.reduces() && matches!(self.dtype, Dtype::Fp8E4 | Dtype::Fp8E5) {
            return fail("8-bit floats are moved here, never summed".to_owned());
        }
        if self.count.checked_mul(self.dtype.size() * n).is_none_or(|b| b > 1 << 46) {
            return fail("the count is larger than any memory".to_owned());
        }
        let (send, recv) = self.buffers(rank, n);
        let align = self.dtype.size() as u64;
        for (name, address, bytes) in [("sendbuff", self.send, send), ("recvbuff", self.recv, recv)] {
            if bytes > 0 && address == 0 {
                return fail(format!("{name} is null"));
            }
            if bytes > 0 && !address.is_multiple_of(align) {
                return fail(format!("{name} {address:#x} is not aligned to {align} bytes"));
            }
        }
        let one = (self.count * self.dtype.size()) as u64;
        // Where NCCL allows one memory for both: the rank's own part of the larger buffer, else the same address.
        let in_place = match self.kind {
            Kind::ReduceScatter => self.recv == self.send + rank as u64 * one,
            Kind::AllGather => self.send == self.recv + rank as u64 * one,
            _ => self.send == self.recv,
        };
        let apart = self.send + send as u64 <= self.recv || self.recv + recv as u64 <= self.send;
        if send > 0 && recv > 0 && !apart && !in_place {
            return fail(format!(
                "sendbuff {:#x} ({send} bytes) and recvbuff {:#x} ({recv} bytes) overlap, and not as in-place operation allows",
                self.send, self.recv
            ));
        }
        Ok(())
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&describe(&self.words(0)))
    }
}

/// A call as text, from its words; words come from other processes and are not trusted.
pub fn describe(words: &Words) -> String {
    let at = |i: usize| words[i] as usize;
    let Some((kind, name)) = KINDS.get(at(0)) else {
        return "an unknown call".to_owned();
    };
    let dtype = DTYPES.get(at(2)).map_or("?", |d| d.2);
    let mut text = format!("{name}(count {}, {dtype}", words[1]);
    if kind.reduces() {
        text += ", ";
        text += OPS.get(at(3)).map_or("?", |o| o.1);
    }
    if kind.has_peer() {
        let what = match kind {
            Kind::Send => "to rank",
            Kind::Recv => "from rank",
            _ => "root",
        };
        text += &format!(", {what} {}", words[4]);
    }
    text + ")"
}

/// The five operations by their codes; more are the user's own.
pub fn plain_op(code: i32) -> Option<ReduceOp> {
    usize::try_from(code).ok().filter(|c| *c < 5).map(|c| OPS[c].0)
}
