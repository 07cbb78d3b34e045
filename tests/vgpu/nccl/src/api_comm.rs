//! The exported functions for communicators: identity, init, split, questions, errors, the end.

use std::ffi::{c_char, c_int};
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

use crate::api::answer;
use crate::comm::Comm;
use crate::driver::table;
use crate::error::{Code, Failure, Result, describe, last, report};
use crate::group::{self, Start};
use crate::join::{Job, NO_COLOR, Split};
use crate::shared::{MAX_RANKS, fresh_name, is_name};
use crate::sweep::sweep;

/// The version this library answers: 2.30.0, whose prototypes it follows.
const VERSION: c_int = 23000;
/// Values of `ncclConfig_t` that its initialiser sets.
const CONFIG_MAGIC: u32 = 0xcafe_beef;
const UNDEFINED: c_int = c_int::MIN;

/// `ncclUniqueId`: here the name of the shared memory.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId {
    /// Text, filled up with zeros.
    pub internal: [u8; 128],
}

/// The fields of `ncclConfig_t` that every version since 2.14 starts with.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ConfigHead {
    /// Bytes of the caller's whole structure.
    pub size: usize,
    /// `CONFIG_MAGIC`.
    pub magic: u32,
    /// Version of the caller's header.
    pub version: u32,
    /// 1 (or undefined) waits in init, 0 returns `ncclInProgress`.
    pub blocking: c_int,
}

fn place<T>(p: *mut T, what: &str) -> Result<*mut T> {
    if p.is_null() {
        return Err(Failure::argument(format!("{what} is null")));
    }
    Ok(p)
}

/// The version as one number.
///
/// # Safety
/// `version` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    answer(|| {
        // SAFETY: the caller says that the place is writable; null was refused.
        unsafe { place(version, "ncclGetVersion: version")?.write(VERSION) };
        Ok(Code::Success)
    })
}

/// A fresh identity for a communicator. Takes away what killed programs left in /dev/shm.
///
/// # Safety
/// `id` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    answer(|| {
        let id = place(id, "ncclGetUniqueId: uniqueId")?;
        sweep();
        // SAFETY: the caller says that the place is writable; null was refused.
        unsafe { id.write(fresh_id()) };
        Ok(Code::Success)
    })
}

fn fresh_id() -> UniqueId {
    let mut internal = [0; 128];
    let name = fresh_name();
    internal[..name.len()].copy_from_slice(name.as_bytes());
    UniqueId { internal }
}

fn name_of(id: &UniqueId) -> Result<String> {
    let end = id.internal.iter().position(|b| *b == 0).unwrap_or(128);
    let name = String::from_utf8_lossy(&id.internal[..end]);
    if !is_name(&name) {
        return Err(Failure::argument(
            "the unique id was not made by this library's ncclGetUniqueId, or was not passed on whole",
        ));
    }
    Ok(name.into_owned())
}

fn init(out: *mut usize, n: c_int, id: &UniqueId, rank: c_int, device: Option<c_int>, blocking: bool) -> Result<Code> {
    let out = place(out, "ncclCommInitRank: comm")?;
    // SAFETY: the caller says that the place is writable; null was refused.
    unsafe { out.write(0) };
    if n < 1 || n as usize > MAX_RANKS || rank < 0 || rank >= n {
        return Err(Failure::argument(format!(
            "ncclCommInitRank: rank {rank} of {n}: ranks run from 0 to below their number, at most {MAX_RANKS}"
        )));
    }
    let name = name_of(id)?;
    let comm = Comm::new(table()?, rank as usize, n as usize, device)?;
    // SAFETY: as above.
    unsafe { out.write(comm.handle) };
    let start = Start::Init(comm.clone(), Job::new(&comm, name), blocking);
    match group::begin(start) {
        Ok(goes_on) => Ok(if goes_on { Code::InProgress } else { Code::Success }),
        Err(f) => {
            // SAFETY: as above.
            unsafe { out.write(0) };
            comm.forget();
            Err(f)
        }
    }
}

/// Joins a communicator as one rank, with the current device; waits for all ranks, in a group at its end.
///
/// # Safety
/// `comm` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRank(comm: *mut usize, n: c_int, id: UniqueId, rank: c_int) -> c_int {
    answer(|| init(comm, n, &id, rank, None, true))
}

/// Whether a configuration asks to wait.
fn blocking(config: *const ConfigHead) -> Result<bool> {
    if config.is_null() {
        return Ok(true);
    }
    // SAFETY: the caller gives null or a configuration; all versions start with these fields.
    let head = unsafe { config.read() };
    if head.magic != CONFIG_MAGIC || head.size < size_of::<ConfigHead>() {
        return Err(Failure::argument(format!(
            "the configuration does not start as NCCL_CONFIG_INITIALIZER has it (size {}, magic {:#x})",
            head.size, head.magic
        )));
    }
    match head.blocking {
        0 => Ok(false),
        1 | UNDEFINED => Ok(true),
        other => Err(Failure::argument(format!("blocking is {other}, not 0 or 1"))),
    }
}

/// As [`ncclCommInitRank`]; of the configuration only `blocking` has an effect here.
///
/// # Safety
/// `comm` is writable, `config` null or an initialised configuration.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    comm: *mut usize,
    n: c_int,
    id: UniqueId,
    rank: c_int,
    config: *const ConfigHead,
) -> c_int {
    answer(|| init(comm, n, &id, rank, None, blocking(config)?))
}

/// Joins all ranks of a communicator from one thread; rank `i` is device `devices[i]`, or `i` if null.
///
/// # Safety
/// `comms` has room for `n` handles, `devices` is null or holds `n` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitAll(comms: *mut usize, n: c_int, devices: *const c_int) -> c_int {
    answer(|| {
        let comms = place(comms, "ncclCommInitAll: comms")?;
        let id = fresh_id();
        group::start();
        let mut first = Ok(Code::Success);
        for i in 0..n.max(0) {
            // SAFETY: the caller says that both arrays have `n` elements.
            let (out, device) = unsafe {
                let device = if devices.is_null() { i } else { *devices.add(i as usize) };
                (comms.add(i as usize), device)
            };
            first = first.and(init(out, n, &id, i, Some(device), true).inspect_err(group::note));
        }
        let end = group::end();
        first?;
        if n < 1 {
            return Err(Failure::argument(format!("ncclCommInitAll: {n} devices")));
        }
        end.map(|_| Code::Success)
    })
}

/// Splits: ranks of one `color` make a new communicator, in the order of `key`, then rank.
///
/// # Safety
/// `out` is writable until the call, or its group, ends; `config` is null or an initialised configuration.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommSplit(
    comm: usize,
    color: c_int,
    key: c_int,
    out: *mut usize,
    config: *const ConfigHead,
) -> c_int {
    answer(|| {
        let out = place(out, "ncclCommSplit: newcomm")?;
        // SAFETY: the caller says that the place is writable; null was refused.
        unsafe { out.write(0) };
        let parent = Comm::of(comm)?;
        parent.ready()?;
        parent.touch();
        blocking(config)?;
        if color < NO_COLOR {
            return Err(Failure::argument(format!(
                "ncclCommSplit: color {color} is neither NCCL_SPLIT_NOCOLOR (-1) nor positive"
            )));
        }
        group::begin(Start::Split(Split::new(&parent, color, key), out))?;
        Ok(Code::Success)
    })
}

/// Runs what is pending; afterwards the communicator can only be destroyed.
///
/// # Safety
/// None beyond a valid handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommFinalize(comm: usize) -> c_int {
    answer(|| {
        let comm = Comm::of(comm)?;
        comm.ready()?;
        comm.flush();
        comm.finalized.store(true, Release);
        outcome(&comm)
    })
}

fn outcome(comm: &Comm) -> Result<Code> {
    comm.failure.get().map_or(Ok(Code::Success), |f| Err(f.clone()))
}

/// Runs what is pending and leaves the communicator.
///
/// # Safety
/// None beyond a valid handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommDestroy(comm: usize) -> c_int {
    answer(|| {
        let comm = Comm::of(comm)?;
        if comm.failure.get().is_none() && comm.shared.get().is_some() {
            comm.flush();
        }
        comm.leave(false);
        Ok(Code::Success)
    })
}

/// Leaves the communicator at once; what is pending is lost, and ranks that wait for this one get an error.
///
/// # Safety
/// None beyond a valid handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommAbort(comm: usize) -> c_int {
    answer(|| {
        Comm::of(comm)?.leave(true);
        Ok(Code::Success)
    })
}

/// How the communicator stands: success, an init in progress, or its first error.
///
/// # Safety
/// `state` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(comm: usize, state: *mut c_int) -> c_int {
    answer(|| {
        let state = place(state, "ncclCommGetAsyncError: asyncError")?;
        let comm = Comm::of(comm)?;
        // SAFETY: the caller says that the place is writable; null was refused.
        unsafe { state.write(group::state_of(&comm) as c_int) };
        Ok(Code::Success)
    })
}

fn question(comm: usize, out: *mut c_int, what: &str, value: impl FnOnce(&Arc<Comm>) -> c_int) -> c_int {
    answer(|| {
        let out = place(out, what)?;
        let comm = Comm::of(comm)?;
        // SAFETY: the caller says that the place is writable; null was refused.
        unsafe { out.write(value(&comm)) };
        Ok(Code::Success)
    })
}

/// Number of ranks.
///
/// # Safety
/// `count` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommCount(comm: usize, count: *mut c_int) -> c_int {
    question(comm, count, "ncclCommCount: count", |c| c.n as c_int)
}

/// Device of this rank.
///
/// # Safety
/// `device` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommCuDevice(comm: usize, device: *mut c_int) -> c_int {
    question(comm, device, "ncclCommCuDevice: device", |c| c.device)
}

/// This rank.
///
/// # Safety
/// `rank` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommUserRank(comm: usize, rank: *mut c_int) -> c_int {
    question(comm, rank, "ncclCommUserRank: rank", |c| c.rank as c_int)
}

/// The text of a code.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(code: c_int) -> *const c_char {
    describe(code).as_ptr()
}

/// The text of the last error of the process; valid until the same thread asks again. The argument has no effect.
///
/// # Safety
/// None.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetLastError(_comm: usize) -> *const c_char {
    std::panic::catch_unwind(last).unwrap_or_else(|_| {
        report(&Failure::new(Code::InternalError, "a panic inside of vgpu's libnccl"));
        c"".as_ptr()
    })
}
