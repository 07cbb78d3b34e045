//! Communicators: init in all its forms, split, finalize, user reductions, names of the interface.

use cudarc::nccl::sys::{
    self, ncclDataType_t as D, ncclRedOp_t as Op, ncclResult_t as R, ncclScalarResidence_t as Residence,
};

use crate::child::inside;
use crate::ranks::{Rank, fresh_id, group, last_error, ok, processes, threads};

#[test]
fn version_texts_and_questions() {
    inside(&[], || {
        let mut version = 0;
        // SAFETY: the place is a local.
        ok(unsafe { sys::ncclGetVersion(&mut version) });
        assert_eq!(version, 23000);
        for code in [R::ncclSuccess, R::ncclRemoteError, R::ncclInvalidUsage] {
            // SAFETY: the library gives a constant C string.
            let text = unsafe { std::ffi::CStr::from_ptr(sys::ncclGetErrorString(code)) };
            assert!(!text.is_empty());
        }
        threads(2, |r| {
            let (mut n, mut rank, mut device) = (0, 0, 0);
            // SAFETY: a handle and locals.
            unsafe {
                ok(sys::ncclCommCount(r.comm, &mut n));
                ok(sys::ncclCommUserRank(r.comm, &mut rank));
                ok(sys::ncclCommCuDevice(r.comm, &mut device));
            }
            assert_eq!((n, rank, device), (2, r.rank as i32, r.rank as i32));
        });
    });
}

#[test]
fn the_safe_layer_of_cudarc_works() {
    use cudarc::driver::CudaContext;
    use cudarc::nccl::{Comm, Id, ReduceOp};
    inside(&[], || {
        let id = Id::new().unwrap();
        std::thread::scope(|scope| {
            for rank in 0..2 {
                scope.spawn(move || {
                    let stream = CudaContext::new(rank).unwrap().new_stream().unwrap();
                    let comm = Comm::from_rank(stream.clone(), rank, 2, id).unwrap();
                    let send = stream.clone_htod(&vec![rank as f32 + 1.0; 1000]).unwrap();
                    let mut recv = stream.alloc_zeros::<f32>(1000).unwrap();
                    comm.all_reduce(&send, &mut recv, &ReduceOp::Sum).unwrap();
                    assert_eq!(stream.clone_dtoh(&recv).unwrap(), vec![3.0; 1000]);
                    // Dropping aborts: normal here, because nothing is pending.
                });
            }
        });
    });
}

#[test]
fn devices_of_one_thread_through_the_safe_layer() {
    use cudarc::driver::CudaContext;
    use cudarc::nccl::{Comm, ReduceOp, group_end, group_start};
    inside(&[], || {
        // The null stream of each device: the communicator knows which one is meant.
        let streams = (0..2).map(|i| CudaContext::new(i).unwrap().default_stream());
        let comms = Comm::from_devices(streams.collect()).unwrap();
        let mut recv = Vec::new();
        group_start().unwrap();
        for c in &comms {
            let send = c.stream().clone_htod(&[c.rank() as i32 + 5]).unwrap();
            let mut to = c.stream().alloc_zeros::<i32>(1).unwrap();
            c.all_reduce(&send, &mut to, &ReduceOp::Prod).unwrap();
            recv.push((send, to));
        }
        group_end().unwrap();
        for (c, (_, to)) in comms.iter().zip(&recv) {
            assert_eq!(c.stream().clone_dtoh(to).unwrap(), vec![30]);
        }
    });
}

/// Sums the ranks of `comm` and gives the sum.
fn sum_of(r: &Rank, comm: sys::ncclComm_t, value: i32) -> i32 {
    let inner = Rank { rank: r.rank, n: r.n, stream: r.stream.clone(), comm };
    let mut x = r.upload(&value.to_le_bytes());
    let at = r.address_mut(&mut x);
    ok(inner.all_reduce(at, at, 1, D::ncclInt32, Op::ncclSum));
    i32::from_le_bytes(r.download(&x).try_into().unwrap())
}

fn split(r: &Rank) {
    for round in 0..3 {
        let (color, key) = (r.rank as i32 % 2, -(r.rank as i32));
        let mut comm = std::ptr::null_mut();
        // SAFETY: a handle, a local, and no configuration.
        ok(unsafe { sys::ncclCommSplit(r.comm, color, key, &mut comm, std::ptr::null_mut()) });
        let (mut n, mut rank) = (0, 0);
        // SAFETY: a handle and locals.
        unsafe {
            ok(sys::ncclCommCount(comm, &mut n));
            ok(sys::ncclCommUserRank(comm, &mut rank));
        }
        // Keys turn the order around.
        assert_eq!((n, rank), (2, 1 - r.rank as i32 / 2), "round {round}");
        let want = if color == 0 { 10 + 30 } else { 20 + 40 };
        assert_eq!(sum_of(r, comm, (r.rank as i32 + 1) * 10), want);
        // SAFETY: a handle.
        ok(unsafe { sys::ncclCommDestroy(comm) });
    }
    let mut none = 1usize as sys::ncclComm_t;
    let color = if r.rank == 3 { -1 } else { 0 };
    // SAFETY: as above.
    ok(unsafe { sys::ncclCommSplit(r.comm, color, 0, &mut none, std::ptr::null_mut()) });
    assert_eq!(none.is_null(), r.rank == 3);
    if r.rank < 3 {
        assert_eq!(sum_of(r, none, 1), 3);
    }
    // The parent goes on.
    assert_eq!(sum_of(r, r.comm, 1), 4);
}

#[test]
fn split_by_colour_and_key() {
    inside(&[("VGPU_DEVICES", "4")], || {
        threads(4, split);
        assert!(processes(4, split).iter().all(|e| e.success()));
    });
}

/// The configuration that the header's initialiser makes.
fn config(blocking: i32) -> sys::ncclConfig_t {
    // SAFETY: integers and pointers may all be zero.
    let mut c: sys::ncclConfig_t = unsafe { std::mem::zeroed() };
    c.size = size_of::<sys::ncclConfig_t>();
    c.magic = 0xcafe_beef;
    c.version = 23000;
    c.blocking = blocking;
    c
}

#[test]
fn init_that_does_not_block() {
    inside(&[], || {
        let id = fresh_id();
        std::thread::scope(|scope| {
            for rank in 0..2 {
                scope.spawn(move || {
                    let ctx = cudarc::driver::CudaContext::new(rank).unwrap();
                    let stream = ctx.new_stream().unwrap();
                    let mut comm = std::ptr::null_mut();
                    let mut c = config(0);
                    // SAFETY: places are locals.
                    let code = unsafe { sys::ncclCommInitRankConfig(&mut comm, 2, id, rank as i32, &mut c) };
                    assert_eq!(code, R::ncclInProgress);
                    let r = Rank { rank, n: 2, stream, comm };
                    if rank == 0 {
                        assert_eq!(r.all_reduce(0, 0, 0, D::ncclInt8, Op::ncclSum), R::ncclInvalidArgument);
                    }
                    while r.async_error() == R::ncclInProgress {
                        std::thread::yield_now();
                    }
                    assert_eq!(r.async_error(), R::ncclSuccess);
                    assert_eq!(sum_of(&r, comm, 4), 8);
                    ok(r.destroy());
                });
            }
        });
        let mut comm = std::ptr::null_mut();
        let mut wrong = config(1);
        wrong.magic = 7;
        // SAFETY: places are locals.
        let code = unsafe { sys::ncclCommInitRankConfig(&mut comm, 1, fresh_id(), 0, &mut wrong) };
        assert_eq!(code, R::ncclInvalidArgument);
        let mut undefined = config(i32::MIN);
        // SAFETY: places are locals.
        ok(unsafe { sys::ncclCommInitRankConfig(&mut comm, 1, fresh_id(), 0, &mut undefined) });
    });
}

#[test]
fn sums_with_factors_of_each_rank() {
    inside(&[], || {
        threads(2, |r| {
            let mut ops = [Op::ncclSum; 2];
            let factor = [0.5f32, 3.0][r.rank];
            let on_device = r.upload(&factor.to_le_bytes());
            let host = (&raw const factor).cast_mut().cast();
            let device = r.address(&on_device) as *mut std::ffi::c_void;
            // SAFETY: the first scalar is a float on the host, the second one on the device.
            unsafe {
                let (h, d) = (Residence::ncclScalarHostImmediate, Residence::ncclScalarDevice);
                let place = (&raw mut ops).cast::<Op>();
                ok(create(place, host, h, r));
                ok(create(place.add(1), device, d, r));
            }
            for op in raw(&ops) {
                let mut x = r.upload(&[8f32, 10.0][r.rank].to_le_bytes());
                let at = r.address_mut(&mut x);
                assert_eq!(all_reduce_raw(r, at, op), 0, "{}", last_error());
                assert_eq!(r.download(&x), 34f32.to_le_bytes());
                assert_eq!(destroy_raw(op, r), 0);
                assert_eq!(destroy_raw(op, r), R::ncclInvalidArgument as i32);
            }
            assert_eq!(destroy_raw(0, r), R::ncclInvalidArgument as i32);
        });
    });
}

type Raw = unsafe extern "C" fn(u64, u64, usize, i32, i32, sys::ncclComm_t, *mut std::ffi::c_void) -> i32;

/// A function of the library under its raw prototype: values of the user's reductions are no values of cudarc's enum.
fn symbol(name: &std::ffi::CStr) -> *mut std::ffi::c_void {
    // SAFETY: the library is loaded already; the name is a constant C string.
    unsafe {
        let library = libc::dlopen(c"libnccl.so.2".as_ptr(), libc::RTLD_NOW);
        assert!(!library.is_null());
        libc::dlsym(library, name.as_ptr())
    }
}

unsafe fn create(place: *mut Op, scalar: *mut std::ffi::c_void, residence: Residence, r: &Rank) -> R {
    type F = unsafe extern "C" fn(*mut i32, *mut std::ffi::c_void, D, Residence, sys::ncclComm_t) -> R;
    // SAFETY: the prototype of ncclRedOpCreatePreMulSum.
    let f = unsafe { std::mem::transmute::<*mut std::ffi::c_void, F>(symbol(c"ncclRedOpCreatePreMulSum")) };
    // SAFETY: by the caller; the enum has the size of the integer.
    unsafe { f(place.cast(), scalar, D::ncclFloat32, residence, r.comm) }
}

fn raw(ops: &[Op; 2]) -> [i32; 2] {
    // SAFETY: the enum has the size of an integer.
    unsafe { std::ptr::from_ref(ops).cast::<[i32; 2]>().read() }
}

fn all_reduce_raw(r: &Rank, at: u64, op: i32) -> i32 {
    // SAFETY: the prototype of ncclAllReduce.
    let f = unsafe { std::mem::transmute::<*mut std::ffi::c_void, Raw>(symbol(c"ncclAllReduce")) };
    // SAFETY: handles are checked by the library.
    unsafe { f(at, at, 1, D::ncclFloat32 as i32, op, r.comm, r.stream.cu_stream().cast()) }
}

fn destroy_raw(op: i32, r: &Rank) -> i32 {
    type F = unsafe extern "C" fn(i32, sys::ncclComm_t) -> i32;
    // SAFETY: the prototype of ncclRedOpDestroy.
    let f = unsafe { std::mem::transmute::<*mut std::ffi::c_void, F>(symbol(c"ncclRedOpDestroy")) };
    // SAFETY: handles are checked by the library.
    unsafe { f(op, r.comm) }
}

#[test]
fn finalize_runs_what_is_pending() {
    inside(&[], || {
        threads(2, |r| {
            let mut x = r.upload(&1f32.to_le_bytes());
            let at = r.address_mut(&mut x);
            ok(r.all_reduce(at, at, 1, D::ncclFloat32, Op::ncclSum));
            // SAFETY: a handle.
            ok(unsafe { sys::ncclCommFinalize(r.comm) });
            assert_eq!(r.all_reduce(at, at, 1, D::ncclFloat32, Op::ncclSum), R::ncclInvalidArgument);
            assert!(last_error().contains("finalized"));
            assert_eq!(r.download(&x), 2f32.to_le_bytes());
        });
    });
}

#[test]
fn memory_of_the_library() {
    inside(&[], || {
        threads(1, |r| {
            let mut at = std::ptr::null_mut();
            // SAFETY: the place is a local.
            ok(unsafe { sys::ncclMemAlloc(&mut at, 400) });
            ok(r.broadcast(at as u64, at as u64, 0, D::ncclInt8, 0));
            // SAFETY: the address is the library's.
            unsafe {
                ok(sys::ncclMemFree(at));
                assert_eq!(sys::ncclMemFree(at), R::ncclUnhandledCudaError);
            }
        });
    });
}

/// Nothing stays in /dev/shm, whatever happens to the ranks.
#[test]
fn shared_memory_is_taken_away() {
    let left = |pid: u32| {
        let names = std::fs::read_dir("/dev/shm").unwrap().flatten().map(|e| e.file_name().into_string().unwrap());
        names.filter(|n| n.starts_with(&format!("vgpu-nccl-{pid}-"))).count()
    };
    let pid = |out: &str| out.lines().find_map(|l| l.strip_prefix("pid ")?.parse().ok()).unwrap();
    if let Some(ran) = inside(&[], || {
        println!("\npid {}", std::process::id());
        assert!(processes(2, |_| ()).iter().all(|e| e.success()));
    }) {
        assert_eq!(left(pid(&ran.out)), 0);
    }
    // Rank 0 of 2 dies before the other comes; the next identity of anybody sweeps, once the file is old enough.
    if let Some(ran) = inside(&[("VGPU_NCCL_TIMEOUT", "30")], || {
        if std::env::var_os("VGPU_TEST_DIE").is_some() {
            // Waits for a rank that never comes, until it is killed.
            Rank::join(0, 2, fresh_id());
            return;
        }
        let me = std::env::current_exe().unwrap();
        let name = std::thread::current().name().unwrap().to_owned();
        let mut doomed = std::process::Command::new(me)
            .args([&name, "--exact", "--nocapture"])
            .env("VGPU_TEST_DIE", "1")
            .spawn()
            .unwrap();
        let doomed_id = doomed.id();
        // Killed when it has joined: the first word of the first member's page says so.
        let joined = || {
            let name = format!("vgpu-nccl-{}-", doomed_id);
            let file = std::fs::read_dir("/dev/shm").unwrap().flatten();
            let file = file.map(|e| e.path()).find(|p| p.to_string_lossy().contains(&name));
            file.is_some_and(|p| std::fs::read(p).is_ok_and(|bytes| bytes.get(4096) == Some(&1)))
        };
        while !joined() {
            assert!(doomed.try_wait().unwrap().is_none(), "the doomed rank ended by itself");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        doomed.kill().unwrap();
        doomed.wait().unwrap();
        println!("\npid {}", doomed.id());
        assert_eq!(left(doomed.id()), 1);
        std::thread::sleep(std::time::Duration::from_millis(2500));
        fresh_id();
    }) {
        assert_eq!(left(pid(&ran.out)), 0);
    }
}

#[test]
fn groups_nest_and_must_be_closed() {
    inside(&[], || {
        threads(2, |r| {
            let mut x = r.upload(&2f32.to_le_bytes());
            let at = r.address_mut(&mut x);
            ok(group(|| {
                ok(group(|| ok(r.all_reduce(at, at, 1, D::ncclFloat32, Op::ncclSum))));
                ok(r.all_reduce(at, at, 1, D::ncclFloat32, Op::ncclSum));
            }));
            assert_eq!(r.download(&x), 8f32.to_le_bytes());
            // SAFETY: no arguments.
            assert_eq!(unsafe { sys::ncclGroupEnd() }, R::ncclInvalidUsage);
        });
    });
}
