//! The order of streams: what is ordered holds under every seed, what is not ordered breaks under some.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use crate::child::{inside, under_seeds};
use crate::raw::*;

const SEEDS: [&str; 12] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11"];

/// A program that writes `1` on one stream, adds it on another and reads the sum; with or without the event between them.
fn two_streams(ordered: bool) -> u32 {
    start(0);
    let m = load(KERNELS);
    let (set, add) = (kernel(m, "set"), kernel(m, "add_to"));
    let (a, b, e) = (stream(), stream(), event());
    let (p, q) = (alloc(128), alloc(128));
    put(p, &[10; 32]);
    put(q, &[100; 32]);
    launch(set, 1, 32, 0, a, &[q, 1]);
    if ordered {
        ok!(cuEventRecord(e, a));
        ok!(cuStreamWaitEvent(b, e, 0));
    }
    launch(add, 1, 32, 0, b, &[p, q]);
    let sums = get(p, 32, b);
    assert!(sums.iter().all(|s| *s == sums[0]));
    sums[0]
}

/// The same memory is read on one stream and overwritten on another: the read must come first.
fn read_then_overwrite(ordered: bool) -> u32 {
    start(0);
    let m = load(KERNELS);
    let (set, copy) = (kernel(m, "set"), kernel(m, "copy"));
    let (a, b, e) = (stream(), stream(), event());
    let (p, q) = (alloc(128), alloc(128));
    put(q, &[5; 32]);
    launch(copy, 1, 32, 0, a, &[p, q]);
    if ordered {
        ok!(cuEventRecord(e, a));
        ok!(cuStreamWaitEvent(b, e, 0));
    }
    launch(set, 1, 32, 0, b, &[q, 6]);
    ok!(cuStreamSynchronize(a));
    ok!(cuStreamSynchronize(b));
    get(p, 32, a)[0]
}

/// Runs a program under every seed and gives how often it printed something else than `right`.
fn wrong(program: fn(bool) -> u32, ordered: bool, right: u32) -> Option<usize> {
    let mut n = 0;
    for seed in SEEDS {
        let ran = inside(&[("VGPU_SEED", seed)], || println!("result={}", program(ordered)))?;
        let at = ran.out.find("result=").expect("the program printed its result") + 7;
        let value: String = ran.out[at..].chars().take_while(char::is_ascii_digit).collect();
        n += usize::from(value.parse() != Ok(right));
    }
    Some(n)
}

#[test]
fn an_event_orders_two_streams_under_every_seed() {
    assert_eq!(wrong(two_streams, true, 11).unwrap_or(0), 0);
}

#[test]
fn a_missing_event_gives_stale_data_under_some_seeds() {
    assert!(wrong(two_streams, false, 11).unwrap_or(SEEDS.len()) >= SEEDS.len() / 3);
}

#[test]
fn a_read_before_an_overwrite_holds_under_every_seed() {
    assert_eq!(wrong(read_then_overwrite, true, 5).unwrap_or(0), 0);
}

#[test]
fn a_read_that_an_overwrite_does_not_wait_for_breaks_under_some_seeds() {
    assert!(wrong(read_then_overwrite, false, 5).unwrap_or(SEEDS.len()) > 0);
}

#[test]
fn nothing_runs_before_it_is_forced_and_never_written_memory_is_no_number() {
    inside(&[], || {
        start(0);
        let (s, p) = (stream(), alloc(16));
        let host = pinned(4);
        host.fill(3);
        ok!(cuMemsetD32Async(p, 7, 4, s));
        ok!(cuMemcpyDtoHAsync_v2(host.as_mut_ptr().cast(), p, 16, s));
        // A copy into pinned memory does not wait; reading too early shows what was there before.
        assert_eq!(host, [3; 4]);
        ok!(cuStreamSynchronize(s));
        assert_eq!(host, [7; 4]);
        let fresh = alloc(16);
        assert!(get(fresh, 4, s).iter().all(|w| f32::from_bits(*w).is_nan()));
    });
}

#[test]
fn eager_streams_run_at_once() {
    inside(&[("VGPU_STREAMS", "eager")], || {
        start(0);
        let (s, p) = (stream(), alloc(16));
        let host = pinned(4);
        ok!(cuMemsetD32Async(p, 7, 4, s));
        ok!(cuMemcpyDtoHAsync_v2(host.as_mut_ptr().cast(), p, 16, s));
        assert_eq!(host, [7; 4]);
        fails!(CUDA_SUCCESS, cuStreamQuery(s));
    });
}

#[test]
fn pageable_sources_are_taken_at_the_call_and_pinned_ones_when_the_copy_runs() {
    inside(&[], || {
        start(0);
        let (s, p, q) = (stream(), alloc(16), alloc(16));
        let (mut pageable, fixed) = ([1_u32; 4], pinned(4));
        fixed.fill(1);
        ok!(cuMemcpyHtoDAsync_v2(p, pageable.as_ptr().cast(), 16, s));
        ok!(cuMemcpyHtoDAsync_v2(q, fixed.as_ptr().cast(), 16, s));
        pageable.fill(2);
        fixed.fill(2);
        assert_eq!((get(p, 4, s), get(q, 4, s)), (vec![1; 4], vec![2; 4]));
        // Registered memory is pinned too, until it is unregistered.
        let mut own = vec![1_u32; 4];
        ok!(cuMemHostRegister_v2(own.as_mut_ptr().cast(), 16, 0));
        fails!(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, cuMemHostRegister_v2(own.as_mut_ptr().cast(), 8, 0));
        ok!(cuMemcpyHtoDAsync_v2(p, own.as_ptr().cast(), 16, s));
        own.fill(9);
        assert_eq!(get(p, 4, s), [9; 4]);
        ok!(cuMemHostUnregister(own.as_mut_ptr().cast()));
        fails!(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, cuMemHostUnregister(own.as_mut_ptr().cast()));
        ok!(cuMemcpyHtoDAsync_v2(p, own.as_ptr().cast(), 16, s));
        own.fill(1);
        assert_eq!(get(p, 4, s), [9; 4]);
    });
}

#[test]
fn the_null_stream_waits_for_blocking_streams_and_they_for_it() {
    under_seeds(|| {
        start(0);
        let mut blocking = null_mut();
        ok!(cuStreamCreate(&mut blocking, 0));
        let (p, q, r) = (alloc(4), alloc(4), alloc(4));
        ok!(cuMemsetD32Async(p, 1, 1, blocking));
        ok!(cuMemcpyDtoDAsync_v2(q, p, 4, null_mut()));
        ok!(cuMemcpyDtoDAsync_v2(r, q, 4, blocking));
        assert_eq!(get(r, 1, blocking), [1]);
        // The stream of the thread is a blocking one as well.
        let own = 2 as CUstream;
        ok!(cuMemsetD32Async(p, 2, 1, own));
        ok!(cuMemcpyDtoDAsync_v2(q, p, 4, null_mut()));
        assert_eq!(get(q, 1, null_mut()), [2]);
        // A destroyed stream ends what was queued on it, and the null stream waits for that.
        ok!(cuMemsetD32Async(p, 3, 1, blocking));
        ok!(cuStreamDestroy_v2(blocking));
        assert_eq!(get(p, 1, null_mut()), [3]);
    });
}

#[test]
fn a_non_blocking_stream_does_not_wait_for_the_null_stream() {
    inside(&[], || {
        start(0);
        let (s, p) = (stream(), alloc(4));
        put(p, &[1]);
        ok!(cuMemsetD32Async(p, 2, 1, null_mut()));
        // Under the first seed nothing runs that nobody waits for: the old value is still there.
        assert_eq!(get(p, 1, s), [1]);
        ok!(cuStreamSynchronize(null_mut()));
        assert_eq!(get(p, 1, s), [2]);
    });
}

#[test]
fn questions_end_and_events_tell_time() {
    under_seeds(|| {
        start(0);
        let m = load(KERNELS);
        let (s, a, b, p) = (stream(), event(), event(), alloc(128));
        ok!(cuEventQuery(a));
        let mut ms = -1.0;
        fails!(CUDA_ERROR_INVALID_HANDLE, cuEventElapsedTime(&mut ms, a, b));
        ok!(cuEventRecord(a, s));
        for _ in 0..20 {
            launch(kernel(m, "set"), 1, 32, 0, s, &[p, 1]);
        }
        ok!(cuEventRecord(b, s));
        fails!(CUDA_ERROR_NOT_READY, cuEventElapsedTime_v2(&mut ms, a, b));
        let mut asked = 0;
        // SAFETY: the event lives.
        while unsafe { cuEventQuery(b) } == CUresult::CUDA_ERROR_NOT_READY {
            asked += 1;
            assert!(asked < 10_000);
        }
        assert!(asked > 0);
        ok!(cuEventElapsedTime_v2(&mut ms, a, b));
        assert!((0.0..10_000.0).contains(&ms));
        ok!(cuStreamQuery(s));
        let mut silent = null_mut();
        ok!(cuEventCreate(&mut silent, 2));
        ok!(cuEventRecord(silent, s));
        ok!(cuEventSynchronize(silent));
        fails!(CUDA_ERROR_INVALID_HANDLE, cuEventElapsedTime(&mut ms, a, silent));
        ok!(cuStreamSynchronize(s));
    });
}

static CALLED: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" fn host(data: *mut c_void) {
    let mut n = 0;
    // A host function must not call the driver.
    fails!(CUDA_ERROR_NOT_PERMITTED, cuDeviceGetCount(&mut n));
    CALLED.store(CALLED.load(SeqCst) * 10 + data.addr() as u32, SeqCst);
}

#[test]
fn host_functions_run_in_stream_order() {
    inside(&[("VGPU_SEED", "2")], || {
        start(0);
        let (a, b, e) = (stream(), stream(), event());
        ok!(cuLaunchHostFunc(a, Some(host), std::ptr::without_provenance_mut(1)));
        ok!(cuLaunchHostFunc(a, Some(host), std::ptr::without_provenance_mut(2)));
        ok!(cuEventRecord(e, a));
        ok!(cuStreamWaitEvent(b, e, 0));
        ok!(cuLaunchHostFunc(b, Some(host), std::ptr::without_provenance_mut(3)));
        assert_eq!(CALLED.load(SeqCst), 0);
        ok!(cuStreamSynchronize(b));
        assert_eq!(CALLED.load(SeqCst), 123);
        fails!(CUDA_ERROR_INVALID_VALUE, cuLaunchHostFunc(a, None, null_mut()));
    });
}

/// Memory of one stream is used on another and then freed on the first; gives the code of the end.
fn use_and_free(ordered: bool) -> u32 {
    start(0);
    let m = load(KERNELS);
    let (a, b, e) = (stream(), stream(), event());
    let mut p = 0;
    ok!(cuMemAllocAsync(&mut p, 128, a));
    ok!(cuMemsetD32Async(p, 1, 32, a));
    ok!(cuEventRecord(e, a));
    ok!(cuStreamWaitEvent(b, e, 0));
    let q = alloc(128);
    launch(kernel(m, "copy"), 1, 32, 0, b, &[q, p]);
    if ordered {
        ok!(cuEventRecord(e, b));
        ok!(cuStreamWaitEvent(a, e, 0));
    }
    ok!(cuMemFreeAsync(p, a));
    // Named after the free, even before it has run, it is wrong at once.
    fails!(CUDA_ERROR_INVALID_VALUE, cuMemsetD32Async(p, 2, 32, a));
    fails!(CUDA_ERROR_INVALID_VALUE, cuMemFreeAsync(p, a));
    // SAFETY: the streams live.
    let (first, second) = unsafe { (cuStreamSynchronize(a), cuStreamSynchronize(b)) };
    assert!(first == CUresult::CUDA_SUCCESS || first == second);
    second as u32
}

#[test]
fn memory_freed_after_its_last_use_is_right_under_every_seed() {
    assert_eq!(wrong(use_and_free, true, 0).unwrap_or(0), 0);
}

#[test]
fn memory_freed_while_another_stream_uses_it_is_found_under_some_seeds() {
    let Some(n) = wrong(use_and_free, false, 0) else { return };
    assert!(n >= SEEDS.len() / 3);
    // The child runs the program at the line above and comes no further.
    let ran = inside(&[("VGPU_SEED", "0")], || ()).expect("this is the parent");
    assert!(ran.err.contains("CUDA_ERROR_ILLEGAL_ADDRESS") && ran.err.contains("freed memory"), "{}", ran.err);
}

/// Memory is allocated on one stream and used on another at once, with or without waiting for the allocation.
fn allocate_and_use(ordered: bool) -> u32 {
    start(0);
    let m = load(KERNELS);
    let (a, b, e) = (stream(), stream(), event());
    let mut p = 0;
    ok!(cuMemAllocAsync(&mut p, 128, a));
    if ordered {
        ok!(cuEventRecord(e, a));
        ok!(cuStreamWaitEvent(b, e, 0));
    }
    launch(kernel(m, "set"), 1, 32, 0, b, &[p, 1]);
    // SAFETY: the stream lives.
    unsafe { cuStreamSynchronize(b) as u32 }
}

#[test]
fn memory_used_after_its_allocation_is_right_under_every_seed() {
    assert_eq!(wrong(allocate_and_use, true, 0).unwrap_or(0), 0);
}

#[test]
fn memory_used_before_its_allocation_on_another_stream_is_found_under_some_seeds() {
    let Some(n) = wrong(allocate_and_use, false, 0) else {
        return;
    };
    assert!(n >= SEEDS.len() / 3);
    // The child runs the program at the line above and comes no further.
    let ran = inside(&[("VGPU_SEED", "0")], || ()).expect("this is the parent");
    assert!(ran.err.contains("has not happened yet"), "{}", ran.err);
}

#[test]
fn freeing_waits_for_plain_memory_and_not_for_ordered_memory() {
    inside(&[], || {
        start(0);
        let m = load(KERNELS);
        let (s, p) = (stream(), alloc(128));
        launch(kernel(m, "set"), 1, 32, 0, s, &[p, 1]);
        ok!(cuMemFree_v2(p));
        ok!(cuStreamSynchronize(s));
        let mut q = 0;
        ok!(cuMemAllocAsync(&mut q, 128, s));
        launch(kernel(m, "set"), 1, 32, 0, s, &[q, 1]);
        ok!(cuMemFree_v2(q));
        fails!(CUDA_ERROR_ILLEGAL_ADDRESS, cuStreamSynchronize(s));
    });
}

#[test]
fn threads_share_streams_and_each_has_its_own_current_context() {
    inside(&[("VGPU_SEED", "5")], || {
        let context = start(0) as usize;
        let m = load(KERNELS) as usize;
        let workers: Vec<_> = (0..4)
            .map(|i| {
                std::thread::spawn(move || {
                    let mut p = 0;
                    fails!(CUDA_ERROR_INVALID_CONTEXT, cuMemAlloc_v2(&mut p, 4));
                    ok!(cuCtxSetCurrent(context as CUcontext));
                    let (s, f) = (stream(), kernel(m as CUmodule, "set"));
                    for n in 0..50 {
                        let p = alloc(128);
                        launch(f, 1, 32, 0, s, &[p, i * 1000 + n]);
                        assert_eq!(get(p, 32, s), vec![(i * 1000 + n) as u32; 32]);
                        ok!(cuMemFree_v2(p));
                    }
                })
            })
            .collect();
        workers.into_iter().for_each(|w| w.join().unwrap());
    });
}
