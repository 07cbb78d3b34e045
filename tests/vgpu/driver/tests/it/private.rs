//! The symbols for vgpu's other libraries: operations from outside in stream order, and checked access to memory.

use std::ffi::{c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use crate::child::{inside, under_seeds};
use crate::raw::*;
use crate::symbols::symbol;

type Run = unsafe extern "C" fn(*mut c_void, c_int) -> c_int;
type Drop = unsafe extern "C" fn(*mut c_void);
type Enqueue = unsafe extern "C" fn(CUstream, Option<Run>, Option<Drop>, *mut c_void, *const c_char) -> u32;

fn enqueue(s: CUstream, run: Run, data: usize) -> u32 {
    // SAFETY: the private symbol has this prototype, and the functions below take a number for their data.
    unsafe {
        let f: Enqueue = std::mem::transmute(symbol("vgpuEnqueue"));
        f(s, Some(run), Some(dropped), std::ptr::without_provenance_mut(data), c"test operation".as_ptr())
    }
}

static DROPPED: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" fn dropped(_: *mut c_void) {
    DROPPED.fetch_add(1, SeqCst);
}

static LOG: Mutex<Vec<usize>> = Mutex::new(Vec::new());

unsafe extern "C" fn note(data: *mut c_void, _: c_int) -> c_int {
    LOG.lock().unwrap().push(data.addr());
    0
}

static ARRIVED: AtomicU32 = AtomicU32::new(0);

/// Done once four have arrived, as a collective of four ranks is: bit `data` marks who did.
unsafe extern "C" fn meet(data: *mut c_void, _: c_int) -> c_int {
    let all = ARRIVED.fetch_or(1 << data.addr(), SeqCst) | 1 << data.addr();
    c_int::from(all != 0b1111)
}

unsafe extern "C" fn fail(_: *mut c_void, _: c_int) -> c_int {
    719
}

#[test]
fn operations_from_outside_keep_the_order_of_their_stream() {
    under_seeds(|| {
        start(0);
        let (a, b, e) = (stream(), stream(), event());
        assert_eq!(enqueue(a, note, 1), 0);
        assert_eq!(enqueue(a, note, 2), 0);
        ok!(cuEventRecord(e, a));
        ok!(cuStreamWaitEvent(b, e, 0));
        assert_eq!(enqueue(b, note, 3), 0);
        assert!(LOG.lock().unwrap().is_empty());
        ok!(cuStreamSynchronize(b));
        assert_eq!((LOG.lock().unwrap().as_slice(), DROPPED.load(SeqCst)), (&[1, 2, 3][..], 3));
        assert_eq!(enqueue(0x77 as CUstream, note, 1), 400);
    });
}

#[test]
fn one_thread_drives_four_ranks_on_two_devices() {
    under_seeds(|| {
        let contexts = [start(0), start(1)];
        let mut streams = Vec::new();
        for rank in 0..4 {
            ok!(cuCtxSetCurrent(contexts[rank % 2]));
            let s = stream();
            // Work before the meeting, which nobody waits for but the meeting.
            assert_eq!(enqueue(s, note, rank), 0);
            assert_eq!(enqueue(s, meet, rank), 0);
            streams.push(s);
        }
        // Waiting for one rank brings all of them there.
        ok!(cuCtxSetCurrent(contexts[0]));
        ok!(cuStreamSynchronize(streams[0]));
        assert_eq!(LOG.lock().unwrap().len(), 4);
    });
}

#[test]
fn four_threads_meet() {
    under_seeds(|| {
        let context = start(0) as usize;
        let ranks: Vec<_> = (0..4)
            .map(|rank| {
                std::thread::spawn(move || {
                    ok!(cuCtxSetCurrent(context as CUcontext));
                    let s = stream();
                    std::thread::sleep(std::time::Duration::from_millis(rank as u64));
                    assert_eq!(enqueue(s, meet, rank), 0);
                    ok!(cuStreamSynchronize(s));
                })
            })
            .collect();
        ranks.into_iter().for_each(|r| r.join().unwrap());
    });
}

#[test]
fn a_question_does_not_hang_on_what_is_not_ready() {
    inside(&[("VGPU_STREAMS", "eager")], || {
        start(0);
        let s = stream();
        assert_eq!(enqueue(s, meet, 0), 0);
        for _ in 0..20 {
            fails!(CUDA_ERROR_NOT_READY, cuStreamQuery(s));
        }
        ARRIVED.store(0b1110, SeqCst);
        ok!(cuStreamSynchronize(s));
    });
}

#[test]
fn a_failing_operation_is_the_error_of_its_context() {
    let ran = inside(&[], || {
        start(0);
        let s = stream();
        assert_eq!(enqueue(s, fail, 0), 0);
        assert_eq!(enqueue(s, note, 1), 0);
        fails!(CUDA_ERROR_LAUNCH_FAILED, cuStreamSynchronize(s));
        assert!(LOG.lock().unwrap().is_empty());
        assert_eq!(DROPPED.load(SeqCst), 2);
    });
    assert!(ran.is_none_or(|r| r.err.contains("test operation")));
}

#[test]
fn operations_from_outside_are_captured() {
    inside(&[], || {
        start(0);
        let s = stream();
        ok!(cuStreamBeginCapture_v2(s, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL));
        assert_eq!(enqueue(s, note, 5), 0);
        let (mut g, mut e) = (null_mut(), null_mut());
        ok!(cuStreamEndCapture(s, &mut g));
        ok!(cuGraphInstantiateWithFlags(&mut e, g, 0));
        ok!(cuGraphLaunch(e, s));
        ok!(cuGraphLaunch(e, s));
        ok!(cuStreamSynchronize(s));
        assert_eq!((LOG.lock().unwrap().as_slice(), DROPPED.load(SeqCst)), (&[5, 5][..], 0));
        ok!(cuGraphDestroy(g));
        ok!(cuGraphExecDestroy(e));
        assert_eq!(DROPPED.load(SeqCst), 1);
    });
}

#[test]
fn memory_is_read_written_and_checked() {
    inside(&[], || {
        start(1);
        type Access = unsafe extern "C" fn(u64, *mut c_void, usize) -> u32;
        type Check = unsafe extern "C" fn(u64, usize, c_int) -> u32;
        type Device = unsafe extern "C" fn(CUstream, *mut c_int) -> u32;
        // SAFETY: the private symbols have these prototypes.
        let (read, write, check, device) = unsafe {
            (
                std::mem::transmute::<*mut c_void, Access>(symbol("vgpuMemoryRead")),
                std::mem::transmute::<*mut c_void, Access>(symbol("vgpuMemoryWrite")),
                std::mem::transmute::<*mut c_void, Check>(symbol("vgpuMemoryCheck")),
                std::mem::transmute::<*mut c_void, Device>(symbol("vgpuStreamDevice")),
            )
        };
        let (p, s) = (alloc(64), stream());
        let (mut words, mut n) = ([1_u32, 2, 3, 4], -1);
        // SAFETY: the words hold the bytes that are named; wrong addresses are refused.
        unsafe {
            assert_eq!((check(p, 64, 0), check(p, 64, 1), check(p + 1, 64, 0)), (0, 1, 700));
            assert_eq!(write(p, words.as_mut_ptr().cast(), 16), 0);
            assert_eq!((check(p, 16, 1), check(p, 17, 1)), (0, 1));
            words = [0; 4];
            assert_eq!(read(p, words.as_mut_ptr().cast(), 16), 0);
            assert_eq!(words, [1, 2, 3, 4]);
            assert_eq!((read(p + 60, words.as_mut_ptr().cast(), 16), write(64, words.as_mut_ptr().cast(), 4)), (1, 1));
            assert_eq!((check(64, 4, 0), read(p, null_mut(), 4)), (700, 1));
            assert_eq!((device(s, &mut n), n), (0, 1));
            assert_eq!(device(0x99 as CUstream, &mut n), 400);
        }
    });
}

#[test]
fn what_was_not_given_back_is_named_at_the_end() {
    let report = format!("{}/leaks-{}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
    let ran = inside(&[("VGPU_LEAKS", "1"), ("VGPU_REPORT", &report)], || {
        start(0);
        load(KERNELS);
        alloc(1000);
        let freed = alloc(500);
        ok!(cuMemFree_v2(freed));
        event();
        let s = stream();
        ok!(cuStreamDestroy_v2(s));
        // This context ends before the process does.
        start(1);
        alloc(77);
        ok!(cuDevicePrimaryCtxRelease_v2(1));
    });
    let Some(ran) = ran else { return };
    assert!(ran.err.contains("left on device 0: 1 allocations, 1 events, 1 modules (1000 bytes"), "{}", ran.err);
    assert!(ran.err.contains("left on device 1: 1 allocations (77 bytes"), "{}", ran.err);
    let lines = std::fs::read_to_string(&report).unwrap();
    std::fs::remove_file(&report).unwrap();
    assert!(lines.contains("\"leaks\":true,\"device\":0,\"bytes\":1000") && lines.lines().count() == 2, "{lines}");
}
