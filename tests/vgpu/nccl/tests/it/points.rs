//! Sends, receives and groups.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream};
use cudarc::nccl::sys::{self, ncclDataType_t as D, ncclRedOp_t as Op, ncclResult_t as R};

use crate::child::inside;
use crate::ranks::{DTYPES, Rank, fresh_id, group, last_error, ok, processes, processor_seconds, size, threads};
use crate::reference::{input, reduced, same};

/// Every rank sends to its right neighbour, of every type, from nothing to several mailbox chunks.
fn ring(r: &Rank) {
    let (right, left) = ((r.rank + 1) % r.n, (r.rank + r.n - 1) % r.n);
    for d in DTYPES {
        for count in [0, 1, 33, 300_001] {
            let send = r.upload(&input(d, r.rank, count, 6));
            let mut recv = r.upload(&vec![0; count * size(d)]);
            let (from, to) = (r.address(&send), r.address_mut(&mut recv));
            ok(group(|| {
                ok(r.send(from, count, d, right));
                ok(r.recv(to, count, d, left));
            }));
            let mut got = r.download(&recv);
            got.truncate(count * size(d));
            same(d, &got, &input(d, left, count, 6), &format!("ring {d:?} {count} on {}", r.rank));
        }
    }
}

#[test]
fn a_ring_of_sends_on_threads_and_processes() {
    inside(&[("VGPU_DEVICES", "3")], || {
        threads(1, ring);
        threads(2, ring);
        threads(3, ring);
    });
    inside(&[], || assert!(processes(2, ring).iter().all(|e| e.success())));
}

#[test]
fn all_to_all_with_two_messages_each_way() {
    inside(&[("VGPU_DEVICES", "4")], || {
        threads(4, |r| {
            let d = D::ncclInt32;
            // Message m of the pair (from, to).
            let content = |from: usize, to: usize, m: usize| input(d, from * 4 + to, 10 + m, 7 + m as u64);
            let pairs = || (0..4).flat_map(|peer| [(peer, 0), (peer, 1)]);
            let sends: Vec<_> = pairs().map(|(p, m)| r.upload(&content(r.rank, p, m))).collect();
            let mut recvs: Vec<_> = pairs().map(|(_, m)| r.upload(&vec![0; 4 * (10 + m)])).collect();
            ok(group(|| {
                for (i, (peer, m)) in pairs().enumerate() {
                    ok(r.send(r.address(&sends[i]), 10 + m, d, peer));
                    ok(r.recv(r.address_mut(&mut recvs[i]), 10 + m, d, peer));
                }
            }));
            for ((peer, m), recv) in pairs().zip(&recvs) {
                same(d, &r.download(recv), &content(peer, r.rank, m), &format!("message {m} from {peer}"));
            }
        });
    });
}

#[test]
fn unequal_pairs_take_the_collective_first_and_the_messages_after() {
    inside(&[], || {
        let ends = processes(2, |r| {
            let d = D::ncclFloat32;
            let mut x = r.upload(&input(d, r.rank, 50, 8));
            let mut y = r.upload(&[0; 200]);
            let (x_at, y_at) = (r.address_mut(&mut x), r.address_mut(&mut y));
            ok(group(|| {
                // The order inside of a group differs between the ranks; that is allowed.
                if r.rank == 0 {
                    ok(r.send(x_at, 50, d, 1));
                    ok(r.all_reduce(x_at, y_at, 50, d, Op::ncclSum));
                } else {
                    ok(r.all_reduce(x_at, y_at, 50, d, Op::ncclSum));
                    ok(r.recv(x_at, 50, d, 0));
                }
            }));
            let sum = reduced(d, Op::ncclSum, &[input(d, 0, 50, 8), input(d, 1, 50, 8)]);
            same(d, &r.download(&y), &sum, "sum");
            same(d, &r.download(&x), &input(d, 0, 50, 8), "message");
        });
        assert!(ends.iter().all(|e| e.success()));
    });
}

/// Communicators of both devices made by one thread.
fn both() -> Vec<Rank> {
    let contexts = [0, 1].map(|i| CudaContext::new(i).unwrap());
    let streams: Vec<Arc<CudaStream>> = contexts.iter().map(|c| c.new_stream().unwrap()).collect();
    let mut comms = [std::ptr::null_mut(); 2];
    // SAFETY: room for two handles; null stands for devices 0 and 1.
    ok(unsafe { sys::ncclCommInitAll(comms.as_mut_ptr(), 2, std::ptr::null()) });
    let rank = |(rank, stream): (usize, Arc<CudaStream>)| Rank { rank, n: 2, stream, comm: comms[rank] };
    streams.into_iter().enumerate().map(rank).collect()
}

#[test]
fn one_thread_drives_two_devices_in_a_group() {
    for mode in ["lazy", "eager"] {
        inside(&[("VGPU_STREAMS", mode)], || {
            let (ranks, d) = (both(), D::ncclFloat32);
            let parts = [input(d, 0, 300_000, 9), input(d, 1, 300_000, 9)];
            let mut slices: Vec<_> = ranks.iter().map(|r| r.upload(&parts[r.rank])).collect();
            ok(group(|| {
                for (r, s) in ranks.iter().zip(&mut slices) {
                    let at = r.address_mut(s);
                    ok(r.all_reduce(at, at, 300_000, d, Op::ncclSum));
                }
            }));
            let want = reduced(d, Op::ncclSum, &parts);
            for (r, s) in ranks.iter().zip(&slices) {
                same(d, &r.download(s), &want, "sum");
            }
            ranks.iter().for_each(|r| ok(r.destroy()));
        });
    }
}

#[test]
fn destroy_runs_what_is_pending_on_both_devices() {
    inside(&[], || {
        let (ranks, d) = (both(), D::ncclFloat32);
        let mut slices: Vec<_> = ranks.iter().map(|r| r.upload(&3f32.to_le_bytes())).collect();
        ok(group(|| {
            for (r, s) in ranks.iter().zip(&mut slices) {
                let at = r.address_mut(s);
                ok(r.all_reduce(at, at, 1, d, Op::ncclSum));
            }
        }));
        // The first one's flush needs the other device's stream.
        ranks.iter().for_each(|r| ok(r.destroy()));
        for (r, s) in ranks.iter().zip(&slices) {
            assert_eq!(r.download(s), 6f32.to_le_bytes());
        }
    });
}

#[test]
fn waiting_leaves_the_processor_to_others() {
    inside(&[], || {
        let ends = processes(2, |r| {
            let mut x = r.upload(&[0; 4]);
            let at = r.address_mut(&mut x);
            r.stream.synchronize().unwrap();
            if r.rank == 1 {
                std::thread::sleep(std::time::Duration::from_millis(1500));
            }
            let before = processor_seconds();
            ok(r.all_reduce(at, at, 1, D::ncclFloat32, Op::ncclSum));
            r.stream.synchronize().unwrap();
            // Rank 0 waited for about 1.5 s.
            let used = processor_seconds() - before;
            assert!(used < 0.4, "{used} s of processor");
        });
        assert!(ends.iter().all(|e| e.success()));
    });
}

#[test]
fn one_thread_with_two_devices_needs_a_group() {
    inside(&[], || {
        let ranks = both();
        let mut slices: Vec<_> = ranks.iter().map(|r| r.upload(&[0; 4])).collect();
        let at: Vec<u64> = ranks.iter().zip(&mut slices).map(|(r, s)| r.address_mut(s)).collect();
        ok(ranks[0].all_reduce(at[0], at[0], 1, D::ncclFloat32, Op::ncclSum));
        assert_eq!(ranks[1].all_reduce(at[1], at[1], 1, D::ncclFloat32, Op::ncclSum), R::ncclInvalidUsage);
        assert!(last_error().contains("ranks 0 and 1 are driven by one thread"), "{}", last_error());
        ranks.iter().for_each(|r| ok(r.abort()));
    });
}

#[test]
fn one_thread_joins_two_ranks_in_a_group_and_not_without() {
    inside(&[("VGPU_NCCL_TIMEOUT", "0.3")], || {
        let id = fresh_id();
        let contexts = [0, 1].map(|i| CudaContext::new(i).unwrap());
        let mut comms = [std::ptr::null_mut(); 2];
        ok(group(|| {
            for (i, comm) in comms.iter_mut().enumerate() {
                contexts[i].bind_to_thread().unwrap();
                // SAFETY: the place is a local.
                ok(unsafe { sys::ncclCommInitRank(comm, 2, id, i as i32) });
            }
        }));
        let mut device = -1;
        // SAFETY: a handle and a local.
        ok(unsafe { sys::ncclCommCuDevice(comms[1], &mut device) });
        assert_eq!(device, 1);
        let mut alone = std::ptr::null_mut();
        // SAFETY: the place is a local.
        let code = unsafe { sys::ncclCommInitRank(&mut alone, 2, fresh_id(), 0) };
        assert_eq!(code, R::ncclSystemError);
        assert!(alone.is_null());
        assert!(last_error().contains("rank 1 has not joined in 0."), "{}", last_error());
    });
}

#[test]
fn two_streams_of_one_group_wait_for_each_other() {
    inside(&[("VGPU_SEED", "3")], || {
        threads(2, |r| {
            let d = D::ncclFloat32;
            let other = Rank { rank: r.rank, n: r.n, stream: r.stream.context().new_stream().unwrap(), comm: r.comm };
            let (mut x, mut y) = (r.upload(&input(d, r.rank, 64, 10)), other.upload(&input(d, r.rank, 64, 11)));
            let (x_at, y_at) = (r.address_mut(&mut x), other.address_mut(&mut y));
            for _ in 0..5 {
                ok(group(|| {
                    ok(r.all_reduce(x_at, x_at, 64, d, Op::ncclMax));
                    ok(other.all_reduce(y_at, y_at, 64, d, Op::ncclMax));
                }));
            }
            // Only the second stream is waited for; it ends after the whole group.
            let max = |seed| reduced(d, Op::ncclMax, &[input(d, 0, 64, seed), input(d, 1, 64, seed)]);
            same(d, &other.download(&y), &max(11), "second stream");
            same(d, &r.download(&x), &max(10), "first stream");
        });
    });
}

#[test]
fn calls_on_two_streams_run_in_the_order_of_the_calls() {
    for seed in ["1", "2", "3", "4"] {
        inside(&[("VGPU_SEED", seed)], || {
            threads(2, |r| {
                let d = D::ncclFloat32;
                let other =
                    Rank { rank: r.rank, n: r.n, stream: r.stream.context().new_stream().unwrap(), comm: r.comm };
                let (mut x, mut y) = (r.upload(&[0; 400]), other.upload(&[0; 800]));
                let (x_at, y_at) = (r.address_mut(&mut x), other.address_mut(&mut y));
                for _ in 0..10 {
                    ok(r.all_reduce(x_at, x_at, 100, d, Op::ncclSum));
                    ok(other.broadcast(y_at, y_at, 200, d, 1));
                }
                // Ranks wait in different orders.
                let both = [&r.stream, &other.stream];
                both[r.rank].synchronize().unwrap();
                both[1 - r.rank].synchronize().unwrap();
            });
        });
    }
}

#[test]
fn a_rank_that_does_other_things_still_answers() {
    inside(&[("VGPU_NCCL_TIMEOUT", "20")], || {
        // Rank 1 enqueues and then only waits for rank 0 on the host: on a GPU its part runs by itself.
        let gate = std::sync::Barrier::new(2);
        threads(2, |r| {
            let mut x = r.upload(&1f32.to_le_bytes());
            let at = r.address_mut(&mut x);
            ok(r.all_reduce(at, at, 1, D::ncclFloat32, Op::ncclSum));
            if r.rank == 0 {
                r.stream.synchronize().unwrap();
            }
            gate.wait();
            assert_eq!(r.download(&x), 2f32.to_le_bytes());
        });
    });
    inside(&[("VGPU_NCCL_TIMEOUT", "20")], || {
        // Between processes a file is the gate.
        let ends = processes(2, |r| {
            let mut x = r.upload(&1f32.to_le_bytes());
            let at = r.address_mut(&mut x);
            ok(r.all_reduce(at, at, 1, D::ncclFloat32, Op::ncclSum));
            let done = format!(
                "{}/answer-{}",
                env!("CARGO_TARGET_TMPDIR"),
                std::env::var("VGPU_TEST_GATE").unwrap_or_default()
            );
            if r.rank == 0 {
                r.stream.synchronize().unwrap();
                std::fs::write(done, "").unwrap();
            } else {
                while !std::path::Path::new(&done).exists() {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                std::fs::remove_file(done).unwrap();
            }
            assert_eq!(r.download(&x), 2f32.to_le_bytes());
        });
        assert!(ends.iter().all(|e| e.success()));
    });
}
