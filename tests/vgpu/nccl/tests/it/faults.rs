//! What goes wrong: mismatched calls, dead ranks, timeouts, aborts, wrong buffers. Errors name the ranks and the calls.

use std::time::{Duration, Instant};

use cudarc::nccl::sys::{self, ncclDataType_t as D, ncclRedOp_t as Op, ncclResult_t as R};

use crate::child::inside;
use crate::ranks::{Rank, fresh_id, group, last_error, ok, processes, threads};

const F: D = D::ncclFloat32;

/// A buffer of 64 floats that both ranks use.
fn buffer(r: &Rank) -> (cudarc::driver::CudaSlice<u8>, u64) {
    let mut x = r.upload(&[0; 256]);
    let at = r.address_mut(&mut x);
    (x, at)
}

/// Both ranks make a call; the stream of each must fail with a text that holds `parts`.
fn mismatch(call: impl Fn(&Rank, u64) -> R + Sync, parts: &[&str]) {
    inside(&[("VGPU_NCCL_TIMEOUT", "20")], || {
        threads(2, |r| {
            let (_x, at) = buffer(r);
            ok(call(r, at));
            assert!(r.stream.synchronize().is_err());
            assert_eq!(r.async_error(), R::ncclInvalidUsage);
            for part in parts {
                assert!(last_error().contains(part), "{part} in {}", last_error());
            }
            // The communicator stays in error.
            assert_eq!(call(r, at), R::ncclInvalidUsage);
        });
    });
}

#[test]
fn different_counts() {
    let count = |r: &Rank| 10 + r.rank;
    mismatch(
        |r, at| r.all_reduce(at, at, count(r), F, Op::ncclSum),
        &["rank 0 calls ncclAllReduce(count 10, f32, sum)", "rank 1 calls ncclAllReduce(count 11, f32, sum)"],
    );
}

#[test]
fn different_types_reductions_roots_and_calls() {
    let type_of = |r: &Rank| [D::ncclFloat32, D::ncclInt32][r.rank];
    mismatch(|r, at| r.all_reduce(at, at, 4, type_of(r), Op::ncclSum), &["f32, sum", "i32, sum"]);
    let op_of = |r: &Rank| [Op::ncclMax, Op::ncclMin][r.rank];
    mismatch(|r, at| r.all_reduce(at, at, 4, F, op_of(r)), &["f32, max", "f32, min"]);
    mismatch(|r, at| r.bcast(at, 4, F, r.rank as i32), &["root 0", "root 1"]);
    mismatch(
        |r, at| {
            if r.rank == 0 { r.bcast(at, 4, F, 0) } else { r.all_reduce(at, at, 4, F, Op::ncclSum) }
        },
        &["rank 0 calls ncclBroadcast(count 4, f32, root 0)", "rank 1 calls ncclAllReduce(count 4, f32, sum)"],
    );
}

#[test]
fn different_order_and_a_count_of_zero() {
    mismatch(
        |r, at| {
            let one = |go: bool| {
                if go { r.all_reduce(at, at, 4, F, Op::ncclSum) } else { r.bcast(at, 4, F, 0) }
            };
            // In a group, so that the second is enqueued before the first can have failed.
            let mut codes = [R::ncclSuccess; 2];
            let end = group(|| codes = [one(r.rank == 0), one(r.rank != 0)]);
            codes.into_iter().find(|&code| code != R::ncclSuccess).unwrap_or(end)
        },
        &["collective 1 of the communicator", "same order"],
    );
    mismatch(|r, at| r.all_reduce(at, at, r.rank, F, Op::ncclSum), &["count 0", "count 1"]);
}

#[test]
fn messages_of_different_sizes() {
    inside(&[("VGPU_NCCL_TIMEOUT", "20")], || {
        threads(2, |r| {
            let (_x, at) = buffer(r);
            ok(if r.rank == 0 { r.send(at, 9, F, 1) } else { r.recv(at, 8, F, 0) });
            assert!(r.stream.synchronize().is_err());
            let code = [R::ncclRemoteError, R::ncclInvalidUsage][r.rank];
            assert_eq!(r.async_error(), code);
            assert!(last_error().contains("ncclRecv(count 8, f32, from rank 0)"), "{}", last_error());
            assert!(last_error().contains("ncclSend(count 9, f32, to rank 1)"), "{}", last_error());
        });
    });
}

#[test]
fn sends_that_wait_for_each_other_are_told_at_once() {
    inside(&[("VGPU_NCCL_TIMEOUT", "60")], || {
        let start = Instant::now();
        let ends = processes(2, |r| {
            let (_x, at) = buffer(r);
            let (_y, to) = buffer(r);
            let other = 1 - r.rank;
            ok(r.send(at, 4, F, other));
            ok(r.recv(to, 4, F, other));
            assert!(r.stream.synchronize().is_err());
            assert!([R::ncclInvalidUsage, R::ncclRemoteError].contains(&r.async_error()));
            assert!(last_error().contains("the ranks wait for each other"), "{}", last_error());
        });
        assert!(ends.iter().all(|e| e.success()));
        assert!(start.elapsed() < Duration::from_secs(10));
    });
}

#[test]
fn a_killed_process_is_named() {
    inside(&[("VGPU_NCCL_TIMEOUT", "60"), ("VGPU_DEVICES", "3")], || {
        let start = Instant::now();
        let ends = processes(3, |r| {
            let (_x, at) = buffer(r);
            ok(r.all_reduce(at, at, 64, F, Op::ncclSum));
            r.stream.synchronize().unwrap();
            if r.rank == 1 {
                // SAFETY: the process ends itself, as the kernel does when memory is short.
                unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            }
            ok(r.all_reduce(at, at, 64, F, Op::ncclSum));
            assert!(r.stream.synchronize().is_err());
            assert_eq!(r.async_error(), R::ncclRemoteError);
            assert!(last_error().contains("rank 1 is dead: its process"), "{}", last_error());
        });
        if !ends.is_empty() {
            assert!(!ends[0].success() && ends[1].success(), "{ends:?}");
            assert!(start.elapsed() < Duration::from_secs(10));
        }
    });
}

#[test]
fn a_thread_that_ended_is_named() {
    inside(&[("VGPU_NCCL_TIMEOUT", "0.7")], || {
        let id = fresh_id();
        let spawn = |rank| std::thread::spawn(move || Rank::join(rank, 2, id));
        let other = spawn(1);
        let r = Rank::join(0, 2, id);
        let _lost = other.join().unwrap();
        let (_x, at) = buffer(&r);
        ok(r.all_reduce(at, at, 64, F, Op::ncclSum));
        assert!(r.stream.synchronize().is_err());
        assert_eq!(r.async_error(), R::ncclRemoteError);
        assert!(last_error().contains("rank 1 is dead: its thread"), "{}", last_error());
    });
}

#[test]
fn a_rank_that_stays_away_runs_into_the_timeout() {
    inside(&[("VGPU_NCCL_TIMEOUT", "0.5")], || {
        threads(2, |r| {
            let (_x, at) = buffer(r);
            if r.rank == 1 {
                std::thread::sleep(Duration::from_millis(1500));
                assert_eq!(r.async_error(), R::ncclSuccess);
                return;
            }
            ok(r.all_reduce(at, at, 64, F, Op::ncclSum));
            let e = r.stream.synchronize().unwrap_err();
            assert_eq!(e.0 as u32, 702, "launch timeout");
            assert_eq!(r.async_error(), R::ncclSystemError);
            let text = "ncclAllReduce(count 64, f32, sum): rank 1 has not come in 0.5 s";
            assert!(last_error().contains(text), "{}", last_error());
        });
    });
}

/// Waits until a thread of this process sleeps; `task` is its `/proc/thread-self`.
fn wait_until_asleep(task: &std::path::Path) {
    let stat = std::path::Path::new("/proc").join(task).join("stat");
    let deadline = Instant::now() + Duration::from_secs(60);
    let state = || std::fs::read_to_string(&stat).unwrap().rsplit_once(") ").unwrap().1.chars().next();
    while state() != Some('S') {
        assert!(Instant::now() < deadline, "the thread never waits");
        std::thread::yield_now();
    }
}

#[test]
fn abort_wakes_its_own_waiters_and_the_other_ranks() {
    inside(&[("VGPU_NCCL_TIMEOUT", "60"), ("VGPU_DEVICES", "3")], || {
        // Rank 2 aborts once rank 1 was woken by itself, not by rank 2.
        let woken = std::sync::Barrier::new(2);
        // The library has one last error: handles are given back, which is another here, once rank 0 has read it.
        let read = std::sync::Barrier::new(3);
        threads(3, |r| {
            let (_x, at) = buffer(r);
            if r.rank == 2 {
                woken.wait();
                ok(r.abort());
                read.wait();
                return;
            }
            ok(r.all_reduce(at, at, 64, F, Op::ncclSum));
            if r.rank == 1 {
                // Its own abort, from another thread, ends the wait without an error.
                let (comm, waiter) = (r.comm as usize, std::fs::read_link("/proc/thread-self").unwrap());
                let waiting = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
                let about_to = std::sync::Arc::clone(&waiting);
                let aborter = std::thread::spawn(move || {
                    while !about_to.load(std::sync::atomic::Ordering::SeqCst) {
                        std::thread::yield_now();
                    }
                    wait_until_asleep(&waiter);
                    // SAFETY: a handle.
                    unsafe { sys::ncclCommAbort(comm as sys::ncclComm_t) }
                });
                waiting.store(true, std::sync::atomic::Ordering::SeqCst);
                let waited = r.stream.synchronize();
                ok(aborter.join().unwrap());
                woken.wait();
                read.wait();
                waited.unwrap();
                return;
            }
            let (waited, error, text) = (r.stream.synchronize(), r.async_error(), last_error());
            read.wait();
            assert!(waited.is_err());
            assert_eq!(error, R::ncclRemoteError);
            assert!(text.contains("has aborted its communicator"), "{text}");
        });
    });
}

#[test]
fn results_that_were_complete_survive_the_abort_of_another_rank() {
    inside(&[], || {
        threads(2, |r| {
            let mut x = r.upload(&1f32.to_le_bytes());
            let at = r.address_mut(&mut x);
            ok(r.all_reduce(at, at, 1, F, Op::ncclSum));
            if r.rank == 0 {
                r.stream.synchronize().unwrap();
                ok(r.abort());
            } else {
                std::thread::sleep(Duration::from_millis(200));
                assert_eq!(r.download(&x), 2f32.to_le_bytes());
            }
        });
    });
}

/// `call` must be refused as a wrong argument, with a text that holds `part`.
#[track_caller]
fn refused(code: R, part: &str) {
    assert_eq!(code, R::ncclInvalidArgument, "{part}");
    assert!(last_error().contains(part), "{part} in {}", last_error());
}

#[test]
fn wrong_arguments_are_refused() {
    inside(&[], || {
        threads(1, |r| {
            let (_x, at) = buffer(r);
            refused(r.all_reduce(0, at, 4, F, Op::ncclSum), "sendbuff is null");
            refused(r.all_reduce(at, 0, 4, F, Op::ncclSum), "recvbuff is null");
            refused(r.all_reduce(at + 2, at + 2, 4, F, Op::ncclSum), "not aligned");
            refused(r.all_reduce(at, at + 4, 4, F, Op::ncclSum), "overlap");
            refused(r.all_gather(at + 4, at, 4, F), "overlap");
            refused(r.all_reduce(at, at, 4, F, Op::ncclNumOps), "reduction 5");
            refused(r.all_reduce(at, at, 4, D::ncclNumTypes, Op::ncclSum), "data type 12");
            refused(r.all_reduce(at, at, 4, D::ncclFloat8e4m3, Op::ncclSum), "never summed");
            refused(r.all_reduce(at, at, usize::MAX, F, Op::ncclSum), "larger than any memory");
            refused(r.bcast(at, 4, F, 1), "root is not one of the 1 ranks");
            refused(r.bcast(at, 4, F, -1), "negative");
            refused(r.send(at, 4, F, 1), "peer is not one of");
            let foreign = Rank { rank: 0, n: 1, stream: r.stream.clone(), comm: 0x1234usize as sys::ncclComm_t };
            refused(foreign.bcast(at, 4, F, 0), "is no communicator");
            refused(foreign.destroy(), "is no communicator");
            let null = Rank { comm: std::ptr::null_mut(), ..foreign };
            refused(null.bcast(at, 4, F, 0), "is null");
            // SAFETY: null is what is tested.
            unsafe {
                refused(sys::ncclGetVersion(std::ptr::null_mut()), "is null");
                refused(sys::ncclGetUniqueId(std::ptr::null_mut()), "is null");
                refused(sys::ncclCommCount(r.comm, std::ptr::null_mut()), "is null");
                refused(sys::ncclCommInitRank(std::ptr::null_mut(), 1, fresh_id(), 0), "is null");
            }
            let mut comm = std::ptr::null_mut();
            // SAFETY: the place is a local.
            unsafe {
                refused(sys::ncclCommInitRank(&mut comm, 2, fresh_id(), 2), "rank 2 of 2");
                let mut text = fresh_id();
                text.internal[0] = b'.' as i8;
                refused(sys::ncclCommInitRank(&mut comm, 1, text, 0), "not made by this library");
            }
            // Errors inside of a group come again at its end, and nothing of it runs.
            let code = group(|| {
                ok(r.all_reduce(at, at, 4, F, Op::ncclSum));
                refused(r.bcast(at, 4, F, 7), "root");
            });
            assert_eq!(code, R::ncclInvalidArgument);
            r.stream.synchronize().unwrap();
            assert_eq!(r.async_error(), R::ncclSuccess);
            ok(r.all_reduce(at, at, 4, F, Op::ncclSum));
        });
    });
}

/// The stream of the one rank must fail with a text that holds `part`.
fn fails(call: impl Fn(&Rank, u64) -> R, part: &str) {
    inside(&[], || {
        let r = Rank::join(0, 1, fresh_id());
        let (_x, at) = buffer(&r);
        ok(call(&r, at));
        assert!(r.stream.synchronize().is_err());
        assert_ne!(r.async_error(), R::ncclSuccess);
        assert!(last_error().contains(part), "{part} in {}", last_error());
    });
}

#[test]
fn memory_that_is_not_there_or_was_never_written() {
    fails(|r, at| r.all_reduce(at, at, 65, F, Op::ncclSum), "sendbuff: 260 bytes");
    fails(|r, at| r.all_gather(at, at + (1 << 20), 64, F), "recvbuff: 256 bytes");
    fails(
        |r, at| {
            // SAFETY: the memory is never read by this program.
            let fresh = std::mem::ManuallyDrop::new(unsafe { r.stream.alloc::<u8>(256) }.unwrap());
            r.all_reduce(r.address(&fresh), at, 64, F, Op::ncclSum)
        },
        "some were never written",
    );
    fails(
        |r, at| {
            let gone = r.upload(&[0; 256]);
            let from = r.address(&gone);
            drop(gone);
            r.all_reduce(from, at, 64, F, Op::ncclSum)
        },
        "sendbuff",
    );
}

#[test]
fn init_with_wrong_ranks_and_devices() {
    inside(&[("VGPU_NCCL_TIMEOUT", "1")], || {
        // Twice the same device.
        let id = fresh_id();
        std::thread::scope(|scope| {
            for rank in 0..2 {
                scope.spawn(move || {
                    let _ctx = cudarc::driver::CudaContext::new(0).unwrap();
                    let mut comm = std::ptr::null_mut();
                    // SAFETY: the place is a local.
                    let code = unsafe { sys::ncclCommInitRank(&mut comm, 2, id, rank) };
                    assert!([R::ncclInvalidUsage, R::ncclRemoteError].contains(&code));
                    assert!(last_error().contains("ranks 0 and 1 are both on device 0"), "{}", last_error());
                });
            }
        });
        // Ranks that differ in their number: one says so, the other waits in vain.
        let id = fresh_id();
        let codes: Vec<R> = std::thread::scope(|scope| {
            let join = |(rank, n)| {
                scope.spawn(move || {
                    let mut comm = std::ptr::null_mut();
                    // SAFETY: the place is a local.
                    unsafe { sys::ncclCommInitRank(&mut comm, n, id, rank) }
                })
            };
            let all: Vec<_> = [(0, 2), (1, 3)].map(join).into_iter().collect();
            all.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(codes.contains(&R::ncclInvalidArgument) && codes.contains(&R::ncclSystemError), "{codes:?}");
        // The same rank twice.
        let id = fresh_id();
        let codes: Vec<R> = std::thread::scope(|scope| {
            let join = |_| {
                scope.spawn(move || {
                    let mut comm = std::ptr::null_mut();
                    // SAFETY: the place is a local.
                    unsafe { sys::ncclCommInitRank(&mut comm, 2, id, 1) }
                })
            };
            let all: Vec<_> = (0..2).map(join).collect();
            all.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(codes.contains(&R::ncclInvalidUsage), "{codes:?}");
    });
}
