//! Every collective, type and reduction against the reference, bit by bit on every rank.

use cudarc::nccl::sys::{ncclDataType_t as D, ncclRedOp_t as Op};

use crate::child::inside;
use crate::ranks::{DTYPES, OPS, Rank, ok, processes, processor_seconds, size, threads};
use crate::reference::{input, reduced, same};

/// Inputs of all ranks, `count` elements each.
fn inputs(d: D, n: usize, count: usize, seed: u64) -> Vec<Vec<u8>> {
    (0..n).map(|r| input(d, r, count, seed)).collect()
}

fn all_reduce(r: &Rank, d: D, op: Op, count: usize, in_place: bool) {
    let parts = inputs(d, r.n, count, 1);
    let mut send = r.upload(&parts[r.rank]);
    let mut recv = r.upload(&vec![0; count * size(d)]);
    let from = r.address_mut(&mut send);
    let to = if in_place { from } else { r.address_mut(&mut recv) };
    ok(r.all_reduce(from, to, count, d, op));
    let mut got = r.download(if in_place { &send } else { &recv });
    got.truncate(count * size(d));
    same(d, &got, &reduced(d, op, &parts), &format!("all-reduce {d:?} {op:?} {count} on {}", r.rank));
}

fn reduce_scatter(r: &Rank, d: D, op: Op, count: usize, in_place: bool) {
    let (parts, own) = (inputs(d, r.n, count * r.n, 2), count * size(d));
    let mut send = r.upload(&parts[r.rank]);
    let mut recv = r.upload(&vec![0; own]);
    let from = r.address_mut(&mut send);
    let at = r.rank * own;
    let to = if in_place { from + at as u64 } else { r.address_mut(&mut recv) };
    ok(r.reduce_scatter(from, to, count, d, op));
    let all = r.download(if in_place { &send } else { &recv });
    let got = if in_place { &all[at..at + own] } else { &all[..own] };
    let want = reduced(d, op, &parts);
    same(d, got, &want[at..at + own], &format!("reduce-scatter {d:?} {op:?} {count} on {}", r.rank));
}

fn reduce(r: &Rank, d: D, op: Op, count: usize, root: usize, in_place: bool) {
    let parts = inputs(d, r.n, count, 3);
    let before = vec![7; count * size(d)];
    let (mut send, mut recv) = (r.upload(&parts[r.rank]), r.upload(&before));
    let from = r.address_mut(&mut send);
    let to = if in_place { from } else { r.address_mut(&mut recv) };
    ok(r.reduce(from, to, count, d, op, root as i32));
    let mut got = r.download(if in_place { &send } else { &recv });
    got.truncate(count * size(d));
    let untouched = if in_place { &parts[r.rank] } else { &before };
    let want = if r.rank == root { &reduced(d, op, &parts) } else { untouched };
    same(d, &got, want, &format!("reduce {d:?} {op:?} {count} on {}", r.rank));
}

fn all_gather(r: &Rank, d: D, count: usize, in_place: bool) {
    let parts = inputs(d, r.n, count, 4);
    let own = count * size(d);
    let mut buffer = vec![0; own * r.n];
    let send = r.upload(&parts[r.rank]);
    if in_place {
        buffer[r.rank * own..][..own].copy_from_slice(&parts[r.rank]);
    }
    let mut recv = r.upload(&buffer);
    let to = r.address_mut(&mut recv);
    let from = if in_place { to + (r.rank * own) as u64 } else { r.address(&send) };
    ok(r.all_gather(from, to, count, d));
    let mut got = r.download(&recv);
    got.truncate(own * r.n);
    same(d, &got, &parts.concat(), &format!("all-gather {d:?} {count} on {}", r.rank));
}

fn broadcast(r: &Rank, d: D, count: usize, root: usize, in_place: bool) {
    let value = input(d, root, count, 5);
    let mut buffer = r.upload(&if r.rank == root { value.clone() } else { vec![3; value.len()] });
    let mut other = r.upload(&vec![9; value.len()]);
    let from = r.address_mut(&mut buffer);
    if in_place {
        ok(r.bcast(from, count, d, root as i32));
    } else {
        let send = if r.rank == root { from } else { 0 };
        ok(r.broadcast(send, r.address_mut(&mut other), count, d, root as i32));
    }
    let mut got = r.download(if in_place { &buffer } else { &other });
    got.truncate(value.len());
    same(d, &got, &value, &format!("broadcast {d:?} {count} on {}", r.rank));
}

/// Counts around nothing, one, odd ones, and more than one chunk of a slot.
fn everything(r: &Rank, counts: &[usize]) {
    for d in DTYPES {
        for (i, count) in counts.iter().enumerate() {
            let (count, in_place, root) = (*count, i % 2 == 1, i % r.n);
            for op in OPS {
                all_reduce(r, d, op, count, in_place);
                reduce_scatter(r, d, op, count, in_place);
                reduce(r, d, op, count, root, in_place);
            }
            all_gather(r, d, count, in_place);
            broadcast(r, d, count, root, in_place);
        }
    }
}

#[test]
fn every_collective_type_and_reduction_on_threads() {
    inside(&[("VGPU_DEVICES", "4")], || {
        for n in 1..=4 {
            threads(n, |r| everything(r, &[0, 1, 7, 33, 1000]));
        }
    });
}

#[test]
fn every_collective_type_and_reduction_on_two_processes() {
    inside(&[], || {
        let ends = processes(2, |r| everything(r, &[5, 1023]));
        assert!(ends.iter().all(|e| e.success()));
    });
}

#[test]
fn every_collective_type_and_reduction_on_four_processes() {
    inside(&[("VGPU_DEVICES", "4")], || {
        let ends = processes(4, |r| everything(r, &[3]));
        assert!(ends.iter().all(|e| e.success()));
    });
}

#[test]
fn buffers_of_many_chunks() {
    inside(&[("VGPU_DEVICES", "3"), ("VGPU_SEED", "5")], || {
        threads(3, |r| {
            let count = (9 << 20) / 4 + 3;
            all_reduce(r, D::ncclFloat32, Op::ncclSum, count, true);
            all_reduce(r, D::ncclBfloat16, Op::ncclAvg, count, false);
            reduce_scatter(r, D::ncclFloat32, Op::ncclSum, 700_001, false);
            reduce_scatter(r, D::ncclInt8, Op::ncclSum, 1_500_001, true);
            reduce(r, D::ncclFloat64, Op::ncclMax, 400_001, 2, false);
            all_gather(r, D::ncclFloat32, 700_001, true);
            broadcast(r, D::ncclFloat32, count, 1, false);
        });
    });
}

#[test]
fn both_modes_of_streams_and_several_seeds() {
    for (mode, seed) in [("eager", "0"), ("lazy", "1"), ("lazy", "2"), ("lazy", "3")] {
        inside(&[("VGPU_STREAMS", mode), ("VGPU_SEED", seed)], || {
            threads(2, |r| {
                all_reduce(r, D::ncclFloat32, Op::ncclSum, 100, true);
                all_gather(r, D::ncclFloat16, 77, false);
                broadcast(r, D::ncclInt64, 10, 1, true);
            });
        });
    }
}

/// One step of training: the mean of gradients, many times, without a wait in between.
#[test]
fn calls_queue_up_and_keep_their_order() {
    inside(&[], || {
        let ends = processes(2, |r| {
            let mut x = r.upload(&(r.rank as f32 + 1.0).to_le_bytes());
            let at = r.address_mut(&mut x);
            for _ in 0..200 {
                ok(r.all_reduce(at, at, 1, D::ncclFloat32, Op::ncclSum));
                ok(r.all_reduce(at, at, 1, D::ncclFloat32, Op::ncclAvg));
                ok(r.all_reduce(at, at, 1, D::ncclFloat32, Op::ncclAvg));
                ok(r.all_reduce(at, at, 1, D::ncclFloat32, Op::ncclMax));
            }
            // 1 and 2 become 3; then the sum of two equal numbers doubles, 199 times.
            let got = f32::from_le_bytes(r.download(&x).try_into().unwrap());
            assert!(got.is_infinite() || got == 3.0 * 2f32.powi(199), "{got}");
        });
        assert!(ends.iter().all(|e| e.success()));
    });
}

/// Prints the time of the collectives that training makes; `--nocapture` of the parent shows it.
#[test]
fn time_of_all_reduce() {
    let ran = inside(&[], || {
        let ends = processes(2, |r| {
            let bytes = 64 << 20;
            let mut x = r.upload(&vec![0; bytes]);
            let at = r.address_mut(&mut x);
            // Time of the processor too: it holds on a busy machine.
            let mut best = [f64::INFINITY; 2];
            let before = processor_seconds();
            for _ in 0..5 {
                for (count, best) in [bytes / 4, 1].into_iter().zip(&mut best) {
                    r.stream.synchronize().unwrap();
                    let start = std::time::Instant::now();
                    ok(r.all_reduce(at, at, count, D::ncclFloat32, Op::ncclSum));
                    r.stream.synchronize().unwrap();
                    *best = best.min(start.elapsed().as_secs_f64());
                }
            }
            let processor = (processor_seconds() - before) / 5.0;
            println!(
                "rank {}: 64 MiB {:.1} ms ({:.1} ms of processor), 4 bytes {:.0} us",
                r.rank,
                best[0] * 1e3,
                processor * 1e3,
                best[1] * 1e6
            );
            assert_eq!(r.download(&x), vec![0; bytes]);
        });
        assert!(ends.iter().all(|e| e.success()));
    });
    if let Some(ran) = ran {
        print!("{}", ran.out.lines().filter(|l| l.contains("MiB")).map(|l| format!("{l}\n")).collect::<String>());
    }
}
