//! Collectives between three emulated GPUs, in the threads of a child process: the ordered fold against the host, sums and gathers; of tensors that
//! lie in one piece of memory, and of such that lie anywhere.

use std::process::Command;
use std::sync::Barrier;

use ringtune::comm::bucket::{BLOCK, at_once, pieces, rooms, share};
use ringtune::cuda::Cuda;
use ringtune::cuda::collectives::{AtOnce, Collectives, Piece, Slots, What};
use ringtune::cuda::nccl::{Nccl, UniqueId};
use ringtune::tensor::{DType, Device, Tensor};

use crate::skip::{device, scratch};

const SIZE: usize = 3;

/// Elements of the tensors of a bucket: a share begins within the first one, and the last rank has less than the others.
const LENGTHS: [usize; 3] = [3 * BLOCK + 17, 5, BLOCK - 1];

/// A term of a micro-batch of a rank, of many magnitudes, so that another order of sums has other bits.
fn term(k: usize, rank: usize, tensor: usize) -> Vec<f32> {
    let hash = |i: usize| {
        (i as u64 * 0x9e37_79b9 + (k * 31 + rank * 7 + tensor) as u64).wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40
    };
    (0..LENGTHS[tensor])
        .map(|i| (hash(i) as f32 / 8_388_608.0 - 1.0) * f32::powi(4.0, (hash(i + 1) % 7) as i32))
        .collect()
}

/// What one rank would have.
fn folded(micro_batches: usize, tensor: usize) -> Vec<f32> {
    let mut sum = vec![0.0; LENGTHS[tensor]];
    for (k, rank) in (0..micro_batches).flat_map(|k| (0..SIZE).map(move |r| (k, r))) {
        sum.iter_mut().zip(term(k, rank, tensor)).for_each(|(sum, x)| *sum += x);
    }
    sum
}

fn slots(tensors: &[Tensor<Cuda>]) -> Slots {
    let own =
        |r| pieces(&LENGTHS, r, SIZE).into_iter().map(|(i, range)| Piece::of(&tensors[i], range.start, range.len()));
    Slots { pieces: (0..SIZE).map(|r| own(r).collect()).collect(), share: share(&LENGTHS, SIZE) * BLOCK * 4 }
}

fn values(dev: &Cuda, t: &Tensor<Cuda>) -> Vec<f32> {
    let mut all = vec![0.0; t.len()];
    dev.download(&mut all, t).unwrap();
    all
}

/// A rank of the child, with stages that hold slots whole or in parts, over tensors that lie together or apart.
fn rank(rank: usize, id: UniqueId, (stage, at_once): (&str, AtOnce), together: bool, barrier: &Barrier) {
    let dev = Cuda::with_cache(rank, Some(&scratch())).unwrap();
    let failed = |e| panic!("{e}");
    let collectives = Collectives::join(&dev, Nccl::get().unwrap(), id, (rank, SIZE), at_once, failed).unwrap();
    let shapes = LENGTHS.map(|n| (1, n));
    let mut grads = match together {
        true => dev.alloc_together(&shapes, &rooms(&LENGTHS, SIZE), DType::F32).unwrap(),
        false => shapes.map(|(rows, cols)| dev.alloc(rows, cols, DType::F32).unwrap()).into(),
    };
    let whole = |tensor: usize, found: &[f32], expected: &[f32], what: &str| {
        let own = pieces(&LENGTHS, rank, SIZE).into_iter().filter(|(i, _)| *i == tensor);
        let ranges: Vec<_> = if what == "owned" {
            own.map(|(_, range)| range).collect()
        } else {
            std::iter::once(0..found.len()).collect()
        };
        for range in ranges {
            let bits = |x: &[f32]| x[range.clone()].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(
                bits(found) == bits(expected),
                "rank {rank}, stage {stage}, together {together}, tensor {tensor}: {what}"
            );
        }
    };
    // Two micro-batches, then a step of one: it begins anew.
    for (micro_batches, wanted) in [(2, "whole"), (1, "owned")] {
        for k in 0..micro_batches {
            for (i, t) in grads.iter_mut().enumerate() {
                dev.upload(t, &term(k, rank, i)).unwrap();
            }
            collectives.add(&dev, 0, &slots(&grads)).unwrap();
            // The terms are read in the order of the stream: nobody has to wait with this.
            grads.iter_mut().for_each(|t| dev.fill_zero(t).unwrap());
        }
        collectives.collect(&dev, 0, &slots(&grads), wanted == "whole").unwrap();
        // The stream that collects runs first: behind the zeros all the same.
        collectives.listen(None).unwrap();
        collectives.wait().unwrap();
        for (i, t) in grads.iter().enumerate() {
            whole(i, &values(&dev, t), &folded(micro_batches, i), wanted);
        }
    }
    // Small whole numbers, whose sums are exact in any order.
    for (what, wanted) in [(What::Sum, "whole"), (What::SumOwned, "owned")] {
        for (i, t) in grads.iter_mut().enumerate() {
            dev.upload(t, &vec![(rank + i + 1) as f32; LENGTHS[i]]).unwrap();
        }
        collectives.start(what, 0, &slots(&grads)).unwrap();
        collectives.wait().unwrap();
        for (i, t) in grads.iter().enumerate() {
            whole(i, &values(&dev, t), &vec![(3 * i + 6) as f32; LENGTHS[i]], wanted);
        }
    }
    for (i, t) in grads.iter_mut().enumerate() {
        dev.upload(t, &vec![(10 * rank + i) as f32; LENGTHS[i]]).unwrap();
    }
    collectives.start(What::Gather, 0, &slots(&grads)).unwrap();
    collectives.wait_for(0).unwrap();
    for (i, t) in grads.iter().enumerate() {
        let mut expected = vec![f32::NAN; LENGTHS[i]];
        for owner in 0..SIZE {
            let own = pieces(&LENGTHS, owner, SIZE).into_iter().filter(|(tensor, _)| *tensor == i);
            own.for_each(|(_, range)| expected[range].fill((10 * owner + i) as f32));
        }
        whole(i, &values(&dev, t), &expected, "gathered");
    }
    barrier.wait();
    collectives.close().unwrap();
}

/// What the child does.
#[test]
fn three_ranks() {
    if std::env::var("RINGTUNE_TEST_ROLE").as_deref() != Ok("three ranks") {
        return;
    }
    let nccl = Nccl::get().unwrap();
    let (whole, parts): ((&str, AtOnce), (&str, AtOnce)) = (("whole", at_once), ("parts", |_, _| 5000));
    for (stage, together) in [(whole, true), (whole, false), (parts, true), (parts, false)] {
        let (id, barrier) = (nccl.unique_id().unwrap(), Barrier::new(SIZE));
        std::thread::scope(|scope| {
            for r in 0..SIZE {
                let barrier = &barrier;
                scope.spawn(move || rank(r, id, stage, together, barrier));
            }
        });
    }
}

#[test]
fn terms_are_added_in_order_wherever_they_lie_and_in_however_many_parts() {
    if !device().is_some_and(|dev| dev.properties().emulated) || Nccl::get().is_err() {
        return;
    }
    for seed in ["1", "2"] {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "fold::three_ranks", "--nocapture"]).env("RINGTUNE_TEST_ROLE", "three ranks");
        let output = child.env("VGPU_DEVICES", SIZE.to_string()).env("VGPU_SEED", seed).output().unwrap();
        let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }
}
