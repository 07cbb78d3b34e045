//! Random programs over several streams: ordered by events they give what one stream gives, under every seed.

use crate::child::under_seeds;
use crate::raw::*;

const BUFFERS: usize = 6;
const STREAMS: usize = 4;
const STEPS: usize = 120;

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// Who touched a buffer last: an event behind the write, and events behind the reads since.
#[derive(Default)]
struct Uses {
    write: Option<CUevent>,
    reads: Vec<CUevent>,
}

#[test]
fn random_programs_ordered_by_events_are_right_under_every_seed() {
    under_seeds(|| {
        start(0);
        let m = load(KERNELS);
        let (set, add, copy) = (kernel(m, "set"), kernel(m, "add_to"), kernel(m, "copy"));
        for program in 0..6 {
            let mut random = Random(program);
            let streams: Vec<CUstream> = (0..STREAMS)
                .map(|i| {
                    // One blocking stream among the others.
                    let mut s = std::ptr::null_mut();
                    ok!(cuStreamCreate(&mut s, u32::from(i > 0)));
                    s
                })
                .collect();
            let buffers: Vec<CUdeviceptr> = (0..BUFFERS).map(|_| alloc(128)).collect();
            let mut expected = [[0_u32; 32]; BUFFERS];
            let mut uses: Vec<Uses> = (0..BUFFERS).map(|_| Uses::default()).collect();
            for (i, b) in buffers.iter().enumerate() {
                put(*b, &[i as u32; 32]);
                expected[i] = [i as u32; 32];
            }
            for step in 0..STEPS {
                let (s, to, from) = (streams[random.below(STREAMS)], random.below(BUFFERS), random.below(BUFFERS));
                // Everything that touched the destination, and whoever wrote the source, comes first.
                for e in uses[to].write.iter().chain(&uses[to].reads).chain(&uses[from].write) {
                    ok!(cuStreamWaitEvent(s, *e, 0));
                }
                let before = expected[from];
                match random.below(6) {
                    0 => {
                        launch(set, 1, 32, 0, s, &[buffers[to], step as u64]);
                        expected[to] = [step as u32; 32];
                    }
                    1 => {
                        ok!(cuMemsetD32Async(buffers[to], step as u32, 32, s));
                        expected[to] = [step as u32; 32];
                    }
                    2 => {
                        ok!(cuMemcpyHtoDAsync_v2(buffers[to], [step as u32; 32].as_ptr().cast(), 128, s));
                        expected[to] = [step as u32; 32];
                    }
                    3 => {
                        launch(copy, 1, 32, 0, s, &[buffers[to], buffers[from]]);
                        expected[to] = before;
                    }
                    _ => {
                        launch(add, 1, 32, 0, s, &[buffers[to], buffers[from]]);
                        for (x, y) in expected[to].iter_mut().zip(before) {
                            *x = x.wrapping_add(y);
                        }
                    }
                }
                let e = event();
                ok!(cuEventRecord(e, s));
                uses[from].reads.push(e);
                uses[to] = Uses { write: Some(e), reads: Vec::new() };
                // Now and then the host looks, and at times it only asks.
                match random.below(20) {
                    0 => assert_eq!(get(buffers[to], 32, s), expected[to], "program {program}, step {step}"),
                    // SAFETY: the stream lives.
                    1 => drop(unsafe { cuStreamQuery(s) }),
                    _ => {}
                }
            }
            ok!(cuCtxSynchronize());
            for (i, b) in buffers.iter().enumerate() {
                assert_eq!(get(*b, 32, streams[0]), expected[i], "program {program}, buffer {i}");
                ok!(cuMemFree_v2(*b));
            }
        }
    });
}
