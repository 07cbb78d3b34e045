//! Collectives in graphs, and beside other streams: what a missing event does.

use cudarc::driver::sys::CUgraphInstantiate_flags as Flags;
use cudarc::driver::sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THREAD;
use cudarc::nccl::sys::{self, ncclDataType_t as D, ncclRedOp_t as Op, ncclResult_t as R};

use crate::child::inside;
use crate::ranks::{Rank, group, last_error, ok, processes, threads};

const F: D = D::ncclFloat32;

/// Records two calls, replays them, and makes calls outside of the graph in between.
fn replay(r: &Rank) {
    let mut x = r.upload(&1f32.to_le_bytes());
    let at = r.address_mut(&mut x);
    r.stream.synchronize().unwrap();
    r.stream.begin_capture(THREAD).unwrap();
    ok(r.all_reduce(at, at, 1, F, Op::ncclSum));
    ok(r.all_reduce(at, at, 1, F, Op::ncclMax));
    let graph = r.stream.end_capture(Flags(0)).unwrap().unwrap();
    // Nothing ran while it was recorded.
    assert_eq!(r.download(&x), 1f32.to_le_bytes());
    for _ in 0..3 {
        graph.launch().unwrap();
    }
    ok(r.all_reduce(at, at, 1, F, Op::ncclSum));
    graph.launch().unwrap();
    assert_eq!(r.download(&x), 32f32.to_le_bytes());
}

#[test]
fn collectives_are_recorded_and_replayed() {
    for seed in ["0", "7"] {
        inside(&[("VGPU_SEED", seed)], || threads(2, replay));
    }
    inside(&[], || assert!(processes(2, replay).iter().all(|e| e.success())));
}

#[test]
fn a_replay_that_one_rank_only_queues_still_runs() {
    inside(&[("VGPU_NCCL_TIMEOUT", "20")], || {
        let gate = std::sync::Barrier::new(2);
        threads(2, |r| {
            let mut x = r.upload(&1f32.to_le_bytes());
            let at = r.address_mut(&mut x);
            r.stream.synchronize().unwrap();
            r.stream.begin_capture(THREAD).unwrap();
            ok(r.all_reduce(at, at, 1, F, Op::ncclSum));
            let graph = r.stream.end_capture(Flags(0)).unwrap().unwrap();
            graph.launch().unwrap();
            if r.rank == 0 {
                r.stream.synchronize().unwrap();
            }
            gate.wait();
            assert_eq!(r.download(&x), 2f32.to_le_bytes());
        });
    });
}

#[test]
fn a_mismatch_inside_of_a_graph_is_found_at_its_launch() {
    inside(&[("VGPU_NCCL_TIMEOUT", "20")], || {
        threads(2, |r| {
            let mut x = r.upload(&[0; 64]);
            let at = r.address_mut(&mut x);
            r.stream.synchronize().unwrap();
            r.stream.begin_capture(THREAD).unwrap();
            ok(r.all_reduce(at, at, 4 + r.rank, F, Op::ncclSum));
            let graph = r.stream.end_capture(Flags(0)).unwrap().unwrap();
            assert_eq!(r.async_error(), R::ncclSuccess);
            graph.launch().unwrap();
            assert!(r.stream.synchronize().is_err());
            assert_eq!(r.async_error(), R::ncclInvalidUsage);
            assert!(last_error().contains("count 5"), "{}", last_error());
        });
    });
}

#[test]
fn a_graph_outlives_its_communicator_and_says_so() {
    inside(&[], || {
        // The last error belongs to the process, and `threads` destroys once more at the end: both ranks read it before.
        let read = std::sync::Barrier::new(2);
        threads(2, |r| {
            let mut x = r.upload(&[0; 64]);
            let at = r.address_mut(&mut x);
            r.stream.synchronize().unwrap();
            r.stream.begin_capture(THREAD).unwrap();
            ok(r.all_reduce(at, at, 4, F, Op::ncclSum));
            let graph = r.stream.end_capture(Flags(0)).unwrap().unwrap();
            ok(r.destroy());
            graph.launch().unwrap();
            let (waited, text) = (r.stream.synchronize(), last_error());
            read.wait();
            assert!(waited.is_err());
            assert!(text.contains("communicator that was destroyed"), "{text}");
        });
    });
}

#[test]
fn a_group_of_messages_in_a_graph() {
    inside(&[], || {
        threads(2, |r| {
            let mut x = r.upload(&(r.rank as f32).to_le_bytes());
            let mut y = r.upload(&[0; 4]);
            let (from, to) = (r.address_mut(&mut x), r.address_mut(&mut y));
            r.stream.synchronize().unwrap();
            r.stream.begin_capture(THREAD).unwrap();
            ok(group(|| {
                ok(r.send(from, 1, F, 1 - r.rank));
                ok(r.recv(to, 1, F, 1 - r.rank));
            }));
            let graph = r.stream.end_capture(Flags(0)).unwrap().unwrap();
            graph.launch().unwrap();
            graph.launch().unwrap();
            assert_eq!(r.download(&y), (1.0 - r.rank as f32).to_le_bytes());
        });
    });
}

/// Gradients are written on one stream and summed on another; `wait` says whether an event stands between. Gives the sums of all seeds.
fn sums(wait: bool) -> Vec<String> {
    let seeds: Vec<String> = (0..8).map(|s| s.to_string()).collect();
    let one = |seed: &String| {
        let ran = inside(&[("VGPU_SEED", seed)], || {
            threads(2, |r| {
                let mut x = r.upload(&0f32.to_le_bytes());
                r.stream.synchronize().unwrap();
                let compute = r.stream.context().new_stream().unwrap();
                compute.memcpy_htod(&1f32.to_le_bytes(), &mut x).unwrap();
                if wait {
                    r.stream.wait(&compute.record_event(None).unwrap()).unwrap();
                }
                let at = r.address_mut(&mut x);
                ok(r.all_reduce(at, at, 1, F, Op::ncclSum));
                let sum = f32::from_le_bytes(r.download(&x).try_into().unwrap());
                compute.synchronize().unwrap();
                println!("\nsum {sum}");
            });
        })?;
        Some(ran.out.lines().filter(|l| l.starts_with("sum ")).collect::<Vec<_>>().join(", "))
    };
    seeds.iter().filter_map(one).collect()
}

#[test]
fn a_missing_event_between_gradients_and_their_sum_is_seen() {
    let (right, wrong) = (sums(true), sums(false));
    assert!(right.iter().all(|s| s == "sum 2, sum 2"), "{right:?}");
    // In the child, which runs one case alone, there is nothing to compare.
    let cases = wrong.len();
    assert!(cases == 0 || wrong.iter().any(|s| s != "sum 2, sum 2"), "{wrong:?}");
}

#[test]
fn every_name_of_the_interface_is_exported() {
    // What cudarc 0.19.10 names in its result layer, and what else the README promises.
    const NAMES: &str = "ncclCommFinalize ncclCommDestroy ncclCommAbort ncclGetVersion ncclGetUniqueId ncclCommInitRankConfig \
        ncclCommInitRank ncclCommInitAll ncclCommSplit ncclCommCount ncclCommCuDevice ncclCommUserRank ncclRedOpCreatePreMulSum \
        ncclRedOpDestroy ncclReduce ncclBroadcast ncclAllReduce ncclReduceScatter ncclAllGather ncclSend ncclRecv ncclGroupEnd \
        ncclGroupStart ncclBcast ncclCommGetAsyncError ncclGetErrorString ncclGetLastError ncclMemAlloc ncclMemFree";
    inside(&[], || {
        let open = |name: &std::ffi::CStr| {
            // SAFETY: a C string.
            unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) }
        };
        let (library, other) = (open(c"libnccl.so"), open(c"libnccl.so.2"));
        assert!(!library.is_null());
        assert_eq!(library, other, "both names lead to one library");
        for name in NAMES.split_ascii_whitespace() {
            let c = std::ffi::CString::new(name).unwrap();
            // SAFETY: an open library and a C string.
            assert!(unsafe { !libc::dlsym(library, c.as_ptr()).is_null() }, "{name}");
        }
        // SAFETY: null is what is asked about.
        let code = unsafe { sys::ncclCommDestroy(std::ptr::null_mut()) };
        assert_eq!(code, R::ncclInvalidArgument);
    });
}
