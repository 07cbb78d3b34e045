//! Captures and graphs: what is recorded, when it runs, and what must not be done meanwhile.

use std::ptr::null_mut;

use crate::child::{inside, under_seeds};
use crate::raw::*;

const GLOBAL: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
const RELAXED: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;

fn status(s: CUstream) -> u32 {
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    ok!(cuStreamIsCapturing(s, &mut status));
    status as u32
}

fn end(s: CUstream) -> CUgraph {
    let mut g = null_mut();
    ok!(cuStreamEndCapture(s, &mut g));
    g
}

fn executable(g: CUgraph) -> CUgraphExec {
    let mut e = null_mut();
    ok!(cuGraphInstantiateWithFlags(&mut e, g, 0));
    e
}

#[test]
fn a_captured_step_runs_at_its_launches_alone() {
    under_seeds(|| {
        start(0);
        let m = load(KERNELS);
        let (s, p, q) = (stream(), alloc(128), alloc(128));
        let (host, n) = (pinned(32), &mut 3_u64);
        put(p, &[0; 32]);
        put(q, &[9; 32]);
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        assert_eq!(status(s), 1);
        launch(kernel(m, "set"), 1, 32, 0, s, &[q, *n]);
        // The arguments were copied: a change now is not seen by the graph.
        *n = 100;
        launch(kernel(m, "add_to"), 1, 32, 0, s, &[p, q]);
        ok!(cuMemcpyDtoHAsync_v2(host.as_mut_ptr().cast(), p, 128, s));
        let g = end(s);
        assert_eq!(status(s), 0);
        let mut nodes = 0;
        ok!(cuGraphGetNodes(g, null_mut(), &mut nodes));
        assert_eq!(nodes, 3);
        assert_eq!((get(p, 32, s), get(q, 32, s)), (vec![0; 32], vec![9; 32]));
        let e = executable(g);
        ok!(cuGraphDestroy(g));
        ok!(cuGraphUpload(e, s));
        for _ in 0..4 {
            ok!(cuGraphLaunch(e, s));
        }
        ok!(cuStreamSynchronize(s));
        assert_eq!(host, [12; 32]);
        // Launches that are queued run after the executable is gone.
        ok!(cuGraphLaunch(e, s));
        ok!(cuGraphExecDestroy(e));
        assert_eq!(get(p, 32, s), [15; 32]);
        fails!(CUDA_ERROR_INVALID_VALUE, cuGraphLaunch(e, s));
    });
}

#[test]
fn a_graph_reads_host_memory_when_it_is_launched() {
    inside(&[], || {
        start(0);
        let (s, p) = (stream(), alloc(16));
        let mut from = [1_u32; 4];
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        ok!(cuMemcpyHtoDAsync_v2(p, from.as_ptr().cast(), 16, s));
        let e = executable(end(s));
        from.fill(2);
        ok!(cuGraphLaunch(e, s));
        assert_eq!(get(p, 4, s), [2; 4]);
        from.fill(3);
        ok!(cuGraphLaunch(e, s));
        assert_eq!(get(p, 4, s), [3; 4]);
    });
}

#[test]
fn events_fork_and_join_a_capture() {
    under_seeds(|| {
        start(0);
        let m = load(KERNELS);
        let (a, b, fork, join) = (stream(), stream(), event(), event());
        let (p, q) = (alloc(128), alloc(128));
        put(p, &[1; 32]);
        put(q, &[1; 32]);
        ok!(cuStreamBeginCapture_v2(a, GLOBAL));
        ok!(cuEventRecord(fork, a));
        ok!(cuStreamWaitEvent(b, fork, 0));
        assert_eq!(status(b), 1);
        launch(kernel(m, "set"), 1, 32, 0, b, &[q, 5]);
        ok!(cuEventRecord(join, b));
        ok!(cuStreamWaitEvent(a, join, 0));
        launch(kernel(m, "add_to"), 1, 32, 0, a, &[p, q]);
        let e = executable(end(a));
        assert_eq!(status(b), 0);
        ok!(cuGraphLaunch(e, a));
        ok!(cuGraphLaunch(e, a));
        assert_eq!(get(p, 32, a), [11; 32]);
    });
}

#[test]
fn branches_of_a_graph_have_no_order() {
    let program = || {
        start(0);
        let m = load(KERNELS);
        let (a, b, fork, join) = (stream(), stream(), event(), event());
        let (p, q) = (alloc(128), alloc(128));
        put(p, &[1; 32]);
        put(q, &[1; 32]);
        ok!(cuStreamBeginCapture_v2(a, GLOBAL));
        ok!(cuEventRecord(fork, a));
        ok!(cuStreamWaitEvent(b, fork, 0));
        launch(kernel(m, "set"), 1, 32, 0, b, &[q, 5]);
        launch(kernel(m, "add_to"), 1, 32, 0, a, &[p, q]);
        ok!(cuEventRecord(join, b));
        ok!(cuStreamWaitEvent(a, join, 0));
        ok!(cuGraphLaunch(executable(end(a)), a));
        println!("result={}", get(p, 32, a)[0]);
    };
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..12 {
        let Some(ran) = inside(&[("VGPU_SEED", &seed.to_string())], program) else {
            return;
        };
        let at = ran.out.find("result=").expect("the program printed its result") + 7;
        seen.insert(ran.out[at..].chars().take_while(char::is_ascii_digit).collect::<String>());
    }
    assert_eq!(seen, ["2", "6"].map(String::from).into());
}

#[test]
fn what_must_not_be_done_during_a_capture() {
    inside(&[], || {
        start(0);
        let (s, t, e, p) = (stream(), stream(), event(), alloc(16));
        let invalid = |s: CUstream| {
            assert_eq!(status(s), 2);
            let mut g = 1 as CUgraph;
            fails!(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(s, &mut g));
            assert!(g.is_null());
            assert_eq!(status(s), 0);
        };
        fails!(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuStreamBeginCapture_v2(null_mut(), GLOBAL));
        let mut g = null_mut();
        fails!(CUDA_ERROR_ILLEGAL_STATE, cuStreamEndCapture(s, &mut g));

        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        fails!(CUDA_ERROR_ILLEGAL_STATE, cuStreamBeginCapture_v2(s, GLOBAL));
        fails!(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuStreamSynchronize(s));
        fails!(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuMemsetD32Async(p, 1, 4, s));
        invalid(s);

        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        fails!(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuStreamQuery(s));
        invalid(s);

        ok!(cuStreamBeginCapture_v2(s, RELAXED));
        fails!(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuCtxSynchronize());
        invalid(s);

        // An event of the capture tells nothing to the outside.
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        ok!(cuEventRecord(e, s));
        fails!(CUDA_ERROR_CAPTURED_EVENT, cuEventQuery(e));
        invalid(s);
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        ok!(cuEventRecord(e, s));
        fails!(CUDA_ERROR_CAPTURED_EVENT, cuEventSynchronize(e));
        invalid(s);

        // An event from outside cannot be waited for.
        ok!(cuEventRecord(e, t));
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        fails!(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, cuStreamWaitEvent(s, e, 0));
        invalid(s);

        // Allocating is unsafe unless the capture is relaxed.
        let mut q = 0;
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        fails!(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuMemAlloc_v2(&mut q, 4));
        invalid(s);
        ok!(cuStreamBeginCapture_v2(s, RELAXED));
        ok!(cuMemAlloc_v2(&mut q, 4));
        end(s);
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        let mut mode = RELAXED;
        ok!(cuThreadExchangeStreamCaptureMode(&mut mode));
        assert_eq!(mode, GLOBAL);
        ok!(cuMemAlloc_v2(&mut q, 4));
        ok!(cuThreadExchangeStreamCaptureMode(&mut mode));
        end(s);

        // Work of a second stream that the first does not wait for.
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        ok!(cuEventRecord(e, s));
        ok!(cuStreamWaitEvent(t, e, 0));
        ok!(cuMemsetD32Async(p, 1, 4, t));
        fails!(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, cuStreamEndCapture(s, &mut g));
        assert_eq!((status(s), status(t)), (0, 0));

        // A capture ends on the stream it began on, and in its thread.
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        ok!(cuEventRecord(e, s));
        ok!(cuStreamWaitEvent(t, e, 0));
        fails!(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, cuStreamEndCapture(t, &mut g));
        invalid(s);
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        let (there, mut context) = (s as usize, null_mut());
        ok!(cuCtxGetCurrent(&mut context));
        let context = context as usize;
        let other = std::thread::spawn(move || {
            ok!(cuCtxSetCurrent(context as CUcontext));
            fails!(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, cuStreamEndCapture(there as CUstream, &mut null_mut()));
        });
        other.join().unwrap();
        end(s);

        // Two captures do not merge.
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        ok!(cuStreamBeginCapture_v2(t, GLOBAL));
        ok!(cuEventRecord(e, s));
        fails!(CUDA_ERROR_STREAM_CAPTURE_MERGE, cuStreamWaitEvent(t, e, 0));
        invalid(s);
        invalid(t);
    });
}

#[test]
fn the_null_stream_is_unusable_while_a_blocking_stream_captures() {
    inside(&[], || {
        start(0);
        let mut s = null_mut();
        ok!(cuStreamCreate(&mut s, 0));
        let p = alloc(16);
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        let mut state = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        fails!(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, cuStreamIsCapturing(null_mut(), &mut state));
        assert_eq!(status(s), 1);
        fails!(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, cuMemsetD32_v2(p, 1, 4));
        assert_eq!(status(s), 2);
        fails!(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(s, &mut null_mut()));
        ok!(cuMemsetD32_v2(p, 1, 4));
    });
}

#[test]
fn an_executable_takes_over_arguments_but_no_other_shape() {
    inside(&[], || {
        start(0);
        let (s, p) = (stream(), alloc(16));
        let graph = |value: u32, twice: bool| {
            ok!(cuStreamBeginCapture_v2(s, GLOBAL));
            ok!(cuMemsetD32Async(p, value, 4, s));
            if twice {
                ok!(cuMemsetD32Async(p, value, 4, s));
            }
            end(s)
        };
        let e = executable(graph(1, false));
        // SAFETY: plain data that the call fills.
        let mut info: CUgraphExecUpdateResultInfo = unsafe { std::mem::zeroed() };
        ok!(cuGraphExecUpdate_v2(e, graph(2, false), &mut info));
        ok!(cuGraphLaunch(e, s));
        assert_eq!(get(p, 4, s), [2; 4]);
        fails!(CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE, cuGraphExecUpdate_v2(e, graph(3, true), &mut info));
        assert_eq!(info.result, CUgraphExecUpdateResult::CU_GRAPH_EXEC_UPDATE_ERROR_TOPOLOGY_CHANGED);
        ok!(cuGraphLaunch(e, s));
        assert_eq!(get(p, 4, s), [2; 4]);
    });
}

#[test]
fn a_graph_launched_into_a_capture_becomes_part_of_it() {
    under_seeds(|| {
        start(0);
        let m = load(KERNELS);
        let (s, p, q) = (stream(), alloc(128), alloc(128));
        put(p, &[0; 32]);
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        launch(kernel(m, "add_to"), 1, 32, 0, s, &[p, q]);
        let inner = executable(end(s));
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        launch(kernel(m, "set"), 1, 32, 0, s, &[q, 7]);
        ok!(cuGraphLaunch(inner, s));
        launch(kernel(m, "set"), 1, 32, 0, s, &[q, 1]);
        ok!(cuGraphLaunch(inner, s));
        let e = executable(end(s));
        ok!(cuGraphLaunch(e, s));
        assert_eq!(get(p, 32, s), [8; 32]);
    });
}

#[test]
fn allocations_of_a_graph_live_from_their_node_to_their_free() {
    under_seeds(|| {
        start(0);
        let m = load(KERNELS);
        let (s, p) = (stream(), alloc(128));
        let capture = |free: bool| {
            let mut scratch = 0;
            ok!(cuStreamBeginCapture_v2(s, GLOBAL));
            ok!(cuMemAllocAsync(&mut scratch, 128, s));
            launch(kernel(m, "set"), 1, 32, 0, s, &[scratch, 4]);
            launch(kernel(m, "copy"), 1, 32, 0, s, &[p, scratch]);
            if free {
                ok!(cuMemFreeAsync(scratch, s));
            }
            (end(s), scratch)
        };
        let (g, scratch) = capture(true);
        let e = executable(g);
        ok!(cuGraphLaunch(e, s));
        ok!(cuGraphLaunch(e, s));
        assert_eq!(get(p, 32, s), [4; 32]);
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemFreeAsync(scratch, s));

        // Left by the graph: it has to be freed before the next launch, or the executable does that itself.
        let (g, scratch) = capture(false);
        let e = executable(g);
        ok!(cuGraphLaunch(e, s));
        fails!(CUDA_ERROR_INVALID_VALUE, cuGraphLaunch(e, s));
        assert_eq!(get(scratch, 32, s), [4; 32]);
        ok!(cuMemFreeAsync(scratch, s));
        ok!(cuGraphLaunch(e, s));
        ok!(cuMemFree_v2(scratch));
        let mut again = null_mut();
        ok!(cuGraphInstantiateWithFlags(&mut again, g, 1));
        ok!(cuGraphLaunch(again, s));
        ok!(cuGraphLaunch(again, s));
        ok!(cuStreamSynchronize(s));

        // Other memory is not freed by a graph.
        let mut outside = 0;
        ok!(cuMemAllocAsync(&mut outside, 128, s));
        ok!(cuStreamBeginCapture_v2(s, GLOBAL));
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemFreeAsync(outside, s));
        end(s);
    });
}
