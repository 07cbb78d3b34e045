//! Ranks for tests: as threads of one process, or as processes; device memory; calls without ceremony.

use std::ffi::{CStr, c_void};
use std::process::{Child, Command};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use cudarc::nccl::sys::{self, ncclComm_t, ncclDataType_t as D, ncclRedOp_t as Op, ncclResult_t as R, ncclUniqueId};

/// All types that are summed.
pub const DTYPES: [D; 10] = [
    D::ncclInt8,
    D::ncclUint8,
    D::ncclInt32,
    D::ncclUint32,
    D::ncclInt64,
    D::ncclUint64,
    D::ncclFloat16,
    D::ncclFloat32,
    D::ncclFloat64,
    D::ncclBfloat16,
];
/// All reductions of NCCL.
pub const OPS: [Op; 5] = [Op::ncclSum, Op::ncclProd, Op::ncclMax, Op::ncclMin, Op::ncclAvg];

/// Bytes of an element.
pub fn size(d: D) -> usize {
    match d {
        D::ncclInt8 | D::ncclUint8 => 1,
        D::ncclFloat16 | D::ncclBfloat16 => 2,
        D::ncclInt32 | D::ncclUint32 | D::ncclFloat32 => 4,
        _ => 8,
    }
}

/// One rank with its device, stream and communicator.
pub struct Rank {
    pub rank: usize,
    pub n: usize,
    pub stream: Arc<CudaStream>,
    pub comm: ncclComm_t,
}

// SAFETY: a communicator is a handle that any thread may use.
unsafe impl Send for Rank {}

/// A fresh identity.
pub fn fresh_id() -> ncclUniqueId {
    let mut id = ncclUniqueId { internal: [0; 128] };
    // SAFETY: the place is a local.
    assert_eq!(unsafe { sys::ncclGetUniqueId(&mut id) }, R::ncclSuccess);
    id
}

/// The text of the last error.
pub fn last_error() -> String {
    // SAFETY: the library gives a C string that lives until the next question of this thread.
    let text = unsafe { CStr::from_ptr(sys::ncclGetLastError(std::ptr::null_mut())) };
    text.to_str().unwrap().to_owned()
}

impl Rank {
    /// Joins with device `rank`.
    pub fn join(rank: usize, n: usize, id: ncclUniqueId) -> Rank {
        let ctx = CudaContext::new(rank).unwrap();
        // SAFETY: nothing here uses a slice on two streams without an event.
        unsafe { ctx.disable_event_tracking() };
        let stream = ctx.new_stream().unwrap();
        let mut comm = std::ptr::null_mut();
        // SAFETY: the place is a local.
        let code = unsafe { sys::ncclCommInitRank(&mut comm, n as i32, id, rank as i32) };
        assert_eq!(code, R::ncclSuccess, "{}", last_error());
        Rank { rank, n, stream, comm }
    }

    /// Bytes on the device.
    pub fn upload(&self, bytes: &[u8]) -> CudaSlice<u8> {
        // A slice of nothing has no address; the library must not look at it then.
        let padded = if bytes.is_empty() { &[0][..] } else { bytes };
        self.stream.clone_htod(padded).unwrap()
    }

    /// Bytes from the device, when the stream has come there.
    pub fn download(&self, slice: &CudaSlice<u8>) -> Vec<u8> {
        let out = self.stream.clone_dtoh(slice).unwrap();
        self.stream.synchronize().unwrap();
        out
    }

    pub fn address(&self, slice: &CudaSlice<u8>) -> u64 {
        slice.device_ptr(&self.stream).0
    }

    pub fn address_mut(&self, slice: &mut CudaSlice<u8>) -> u64 {
        slice.device_ptr_mut(&self.stream).0
    }

    fn raw_stream(&self) -> sys::cudaStream_t {
        self.stream.cu_stream().cast()
    }

    pub fn all_reduce(&self, send: u64, recv: u64, count: usize, d: D, op: Op) -> R {
        let (s, r) = (send as *const c_void, recv as *mut c_void);
        // SAFETY: the library checks addresses by the driver's tables.
        unsafe { sys::ncclAllReduce(s, r, count, d, op, self.comm, self.raw_stream()) }
    }

    pub fn reduce_scatter(&self, send: u64, recv: u64, count: usize, d: D, op: Op) -> R {
        let (s, r) = (send as *const c_void, recv as *mut c_void);
        // SAFETY: as above.
        unsafe { sys::ncclReduceScatter(s, r, count, d, op, self.comm, self.raw_stream()) }
    }

    pub fn all_gather(&self, send: u64, recv: u64, count: usize, d: D) -> R {
        let (s, r) = (send as *const c_void, recv as *mut c_void);
        // SAFETY: as above.
        unsafe { sys::ncclAllGather(s, r, count, d, self.comm, self.raw_stream()) }
    }

    pub fn broadcast(&self, send: u64, recv: u64, count: usize, d: D, root: i32) -> R {
        let (s, r) = (send as *const c_void, recv as *mut c_void);
        // SAFETY: as above.
        unsafe { sys::ncclBroadcast(s, r, count, d, root, self.comm, self.raw_stream()) }
    }

    pub fn bcast(&self, buffer: u64, count: usize, d: D, root: i32) -> R {
        // SAFETY: as above.
        unsafe { sys::ncclBcast(buffer as *mut c_void, count, d, root, self.comm, self.raw_stream()) }
    }

    pub fn reduce(&self, send: u64, recv: u64, count: usize, d: D, op: Op, root: i32) -> R {
        let (s, r) = (send as *const c_void, recv as *mut c_void);
        // SAFETY: as above.
        unsafe { sys::ncclReduce(s, r, count, d, op, root, self.comm, self.raw_stream()) }
    }

    pub fn send(&self, from: u64, count: usize, d: D, peer: usize) -> R {
        // SAFETY: as above.
        unsafe { sys::ncclSend(from as *const c_void, count, d, peer as i32, self.comm, self.raw_stream()) }
    }

    pub fn recv(&self, to: u64, count: usize, d: D, peer: usize) -> R {
        // SAFETY: as above.
        unsafe { sys::ncclRecv(to as *mut c_void, count, d, peer as i32, self.comm, self.raw_stream()) }
    }

    /// What `ncclCommGetAsyncError` says.
    pub fn async_error(&self) -> R {
        let mut state = R::ncclSuccess;
        // SAFETY: the place is a local.
        let code = unsafe { sys::ncclCommGetAsyncError(self.comm, &mut state) };
        assert_eq!(code, R::ncclSuccess);
        state
    }

    pub fn destroy(&self) -> R {
        // SAFETY: a handle.
        unsafe { sys::ncclCommDestroy(self.comm) }
    }

    pub fn abort(&self) -> R {
        // SAFETY: a handle.
        unsafe { sys::ncclCommAbort(self.comm) }
    }
}

/// Success or the text.
#[track_caller]
pub fn ok(code: R) {
    assert_eq!(code, R::ncclSuccess, "{}", last_error());
}

pub fn group(f: impl FnOnce()) -> R {
    // SAFETY: no arguments.
    unsafe { ok(sys::ncclGroupStart()) };
    f();
    // SAFETY: no arguments.
    unsafe { sys::ncclGroupEnd() }
}

/// Runs `body` for each rank in a thread of its own; for use inside of a child.
pub fn threads(n: usize, body: impl Fn(&Rank) + Sync) {
    let id = fresh_id();
    std::thread::scope(|scope| {
        let spawn = |r| {
            let body = &body;
            scope.spawn(move || {
                let rank = Rank::join(r, n, id);
                body(&rank);
                // A body may have aborted already.
                assert!([R::ncclSuccess, R::ncclInvalidArgument].contains(&rank.destroy()));
            })
        };
        let all: Vec<_> = (0..n).map(spawn).collect();
        all.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// Rank and identity of a process that [`processes`] started.
fn given() -> Option<(usize, ncclUniqueId)> {
    let rank = std::env::var("VGPU_TEST_RANK").ok()?.parse().unwrap();
    let mut id = ncclUniqueId { internal: [0; 128] };
    for (to, from) in id.internal.iter_mut().zip(std::env::var("VGPU_TEST_ID").unwrap().bytes()) {
        *to = from as i8;
    }
    Some((rank, id))
}

/// Runs `body` for each rank in a process of its own; for use inside of a child, which becomes rank 0. The others'
/// ends are given back.
pub fn processes(n: usize, body: impl FnOnce(&Rank)) -> Vec<std::process::ExitStatus> {
    if let Some((rank, id)) = given() {
        let rank = Rank::join(rank, n, id);
        body(&rank);
        return Vec::new();
    }
    let id = fresh_id();
    let text: String = id.internal.iter().take_while(|c| **c != 0).map(|c| *c as u8 as char).collect();
    let name = std::thread::current().name().unwrap().to_owned();
    let spawn = |r: usize| -> Child {
        let mut c = Command::new(std::env::current_exe().unwrap());
        c.args([&name, "--exact", "--nocapture", "--test-threads=1"]);
        c.env("VGPU_TEST_RANK", r.to_string()).env("VGPU_TEST_ID", &text);
        c.spawn().unwrap()
    };
    let mut others: Vec<Child> = (1..n).map(spawn).collect();
    let rank = Rank::join(0, n, id);
    body(&rank);
    others.iter_mut().map(|c| c.wait().unwrap()).collect()
}

/// Seconds that all threads of this process have run.
pub fn processor_seconds() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the place is a local.
    let code = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) };
    assert_eq!(code, 0);
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}
