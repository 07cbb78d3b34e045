//! The exported functions for communication: collectives, send and receive, groups, reductions of the user, memory.

use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::call::{Call, Dtype, Factor, Kind, ReduceOp, plain_op};
use crate::comm::{Comm, UserOp, lock};
use crate::driver::{Stream, table};
use crate::error::{Code, Failure, Result, report};
use crate::group;

/// Codes of the user's reductions start here, above the five of NCCL.
const USER_OPS: c_int = 5;

/// Runs `f`, turns its error into a code and keeps the text; a panic becomes an internal error.
pub(crate) fn answer(f: impl FnOnce() -> Result<Code>) -> c_int {
    let result = catch_unwind(AssertUnwindSafe(f))
        .unwrap_or_else(|_| Err(Failure::new(Code::InternalError, "a panic inside of vgpu's libnccl")));
    match result {
        Ok(code) => code as c_int,
        Err(failure) => {
            group::note(&failure);
            report(&failure)
        }
    }
}

struct Request {
    kind: Kind,
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    dtype: c_int,
    op: c_int,
    peer: c_int,
    comm: usize,
    stream: *mut c_void,
}

fn call(r: Request) -> c_int {
    answer(|| {
        let comm = Comm::of(r.comm)?;
        comm.ready()?;
        comm.touch();
        let dtype = Dtype::new(r.dtype)?;
        let (op, factor) =
            if r.kind.reduces() { operation(&comm, r.op, dtype)? } else { (ReduceOp::Sum, Factor::None) };
        let peer = usize::try_from(r.peer)
            .map_err(|_| Failure::argument(format!("{}: root or peer {} is negative", r.kind.name(), r.peer)))?;
        let call =
            Call { kind: r.kind, count: r.count, dtype, op, peer, send: r.send as u64, recv: r.recv as u64, factor };
        call.check(comm.rank, comm.n)?;
        group::submit(comm, Stream(r.stream), call)?;
        Ok(Code::Success)
    })
}

fn operation(comm: &Comm, code: c_int, dtype: Dtype) -> Result<(ReduceOp, Factor)> {
    if let Some(op) = plain_op(code) {
        return Ok((op, Factor::None));
    }
    let place = usize::try_from(code - USER_OPS).ok();
    let user = place.and_then(|i| lock(&comm.user_ops).get(i).copied().flatten());
    match user {
        Some(u) if u.dtype == dtype => Ok((ReduceOp::PreMulSum, u.factor)),
        Some(u) => {
            Err(Failure::argument(format!("the reduction was created for {:?}, the call is for {dtype:?}", u.dtype)))
        }
        None => Err(Failure::argument(format!(
            "reduction {code} is none of NCCL's five, and none created on this communicator"
        ))),
    }
}

/// All-reduce. See NCCL's documentation; buffers are device memory, sums run in rank order.
///
/// # Safety
/// None beyond valid handles: every pointer is checked against the driver's tables.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllReduce(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    dtype: c_int,
    op: c_int,
    comm: usize,
    stream: *mut c_void,
) -> c_int {
    let kind = Kind::AllReduce;
    call(Request { kind, send, recv, count, dtype, op, peer: 0, comm, stream })
}

/// Reduce-scatter; `count` is what one rank receives.
///
/// # Safety
/// As [`ncclAllReduce`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclReduceScatter(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    dtype: c_int,
    op: c_int,
    comm: usize,
    stream: *mut c_void,
) -> c_int {
    let kind = Kind::ReduceScatter;
    call(Request { kind, send, recv, count, dtype, op, peer: 0, comm, stream })
}

/// All-gather; `count` is what one rank sends.
///
/// # Safety
/// As [`ncclAllReduce`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllGather(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    dtype: c_int,
    comm: usize,
    stream: *mut c_void,
) -> c_int {
    let kind = Kind::AllGather;
    call(Request { kind, send, recv, count, dtype, op: 0, peer: 0, comm, stream })
}

/// Broadcast from `root`; `send` counts there alone.
///
/// # Safety
/// As [`ncclAllReduce`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclBroadcast(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    dtype: c_int,
    root: c_int,
    comm: usize,
    stream: *mut c_void,
) -> c_int {
    let kind = Kind::Broadcast;
    call(Request { kind, send, recv, count, dtype, op: 0, peer: root, comm, stream })
}

/// Broadcast in place.
///
/// # Safety
/// As [`ncclAllReduce`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclBcast(
    buffer: *mut c_void,
    count: usize,
    dtype: c_int,
    root: c_int,
    comm: usize,
    stream: *mut c_void,
) -> c_int {
    // SAFETY: the same call with one buffer for both.
    unsafe { ncclBroadcast(buffer, buffer, count, dtype, root, comm, stream) }
}

/// Reduce to `root`; `recv` counts there alone.
///
/// # Safety
/// As [`ncclAllReduce`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclReduce(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    dtype: c_int,
    op: c_int,
    root: c_int,
    comm: usize,
    stream: *mut c_void,
) -> c_int {
    let kind = Kind::Reduce;
    call(Request { kind, send, recv, count, dtype, op, peer: root, comm, stream })
}

/// Send to rank `peer`.
///
/// # Safety
/// As [`ncclAllReduce`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclSend(
    send: *const c_void,
    count: usize,
    dtype: c_int,
    peer: c_int,
    comm: usize,
    stream: *mut c_void,
) -> c_int {
    let (kind, recv) = (Kind::Send, std::ptr::null_mut());
    call(Request { kind, send, recv, count, dtype, op: 0, peer, comm, stream })
}

/// Receive from rank `peer`.
///
/// # Safety
/// As [`ncclAllReduce`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclRecv(
    recv: *mut c_void,
    count: usize,
    dtype: c_int,
    peer: c_int,
    comm: usize,
    stream: *mut c_void,
) -> c_int {
    let (kind, send) = (Kind::Recv, std::ptr::null());
    call(Request { kind, send, recv, count, dtype, op: 0, peer, comm, stream })
}

/// Opens a group.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> c_int {
    group::start();
    Code::Success as c_int
}

/// Closes a group; the outermost end enqueues what was called inside.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupEnd() -> c_int {
    answer(|| group::end().map(|on| if on { Code::InProgress } else { Code::Success }))
}

/// Creates a sum of values that this rank first multiplies by `*scalar`.
///
/// # Safety
/// `op` is writable; `scalar` is a host pointer to one element if `residence` is 1, a device address if 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclRedOpCreatePreMulSum(
    op: *mut c_int,
    scalar: *const c_void,
    dtype: c_int,
    residence: c_int,
    comm: usize,
) -> c_int {
    answer(|| {
        let comm: Arc<Comm> = Comm::of(comm)?;
        let dtype = Dtype::new(dtype)?;
        if op.is_null() || scalar.is_null() {
            return Err(Failure::argument("ncclRedOpCreatePreMulSum: op or scalar is null"));
        }
        if matches!(dtype, Dtype::Fp8E4 | Dtype::Fp8E5) {
            return Err(Failure::argument("ncclRedOpCreatePreMulSum: 8-bit floats are moved here, never summed"));
        }
        let factor = match residence {
            0 => Factor::Device(scalar as u64),
            1 => {
                let mut bits = [0; 8];
                // SAFETY: the caller says that `scalar` leads to one element of `dtype` on the host.
                unsafe { std::ptr::copy_nonoverlapping(scalar.cast(), bits.as_mut_ptr(), dtype.size()) };
                Factor::Host(u64::from_le_bytes(bits))
            }
            r => {
                return Err(Failure::argument(format!("ncclRedOpCreatePreMulSum: residence {r} is not 0 or 1")));
            }
        };
        let mut ops = lock(&comm.user_ops);
        let place = ops.iter().position(Option::is_none).unwrap_or(ops.len());
        if place == ops.len() {
            ops.push(None);
        }
        ops[place] = Some(UserOp { dtype, factor });
        // SAFETY: the caller says that `op` is writable; null was refused.
        unsafe { op.write(USER_OPS + place as c_int) };
        Ok(Code::Success)
    })
}

/// Forgets a reduction; calls that use it go on.
///
/// # Safety
/// None beyond a valid handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclRedOpDestroy(op: c_int, comm: usize) -> c_int {
    answer(|| {
        let comm = Comm::of(comm)?;
        let mut ops = lock(&comm.user_ops);
        let place = usize::try_from(op - USER_OPS.min(op)).ok().filter(|_| op >= USER_OPS);
        let slot = place.and_then(|i| ops.get_mut(i));
        match slot.and_then(Option::take) {
            Some(_) => Ok(Code::Success),
            None => Err(Failure::argument(format!("ncclRedOpDestroy: {op} was not created on this communicator"))),
        }
    })
}

/// Device memory for registered buffers; here plain device memory.
///
/// # Safety
/// `ptr` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclMemAlloc(ptr: *mut *mut c_void, size: usize) -> c_int {
    answer(|| {
        if ptr.is_null() {
            return Err(Failure::argument("ncclMemAlloc: ptr is null"));
        }
        let mut address = 0;
        // SAFETY: the place is a local.
        match unsafe { (table()?.alloc)(&mut address, size) } {
            0 => {
                // SAFETY: the caller says that `ptr` is writable; null was refused.
                unsafe { ptr.write(address as *mut c_void) };
                Ok(Code::Success)
            }
            e => Err(Failure::new(Code::UnhandledCudaError, format!("ncclMemAlloc: {size} bytes: driver error {e}"))),
        }
    })
}

/// Frees memory of [`ncclMemAlloc`].
///
/// # Safety
/// None: the driver looks the address up.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclMemFree(ptr: *mut c_void) -> c_int {
    answer(|| {
        if ptr.is_null() {
            return Ok(Code::Success);
        }
        // SAFETY: the driver validates the address.
        match unsafe { (table()?.free)(ptr as u64) } {
            0 => Ok(Code::Success),
            e => Err(Failure::new(Code::UnhandledCudaError, format!("ncclMemFree: driver error {e}"))),
        }
    })
}
