//! Every way to be wrong gives the code of the documentation, and none brings the process down.

use std::ffi::CStr;
use std::ptr::null_mut;

use crate::child::inside;
use crate::raw::*;

#[test]
fn nothing_works_before_init_or_without_a_context() {
    inside(&[], || {
        let (mut n, mut p, mut s) = (0, 0, null_mut());
        fails!(CUDA_ERROR_NOT_INITIALIZED, cuDeviceGetCount(&mut n));
        fails!(CUDA_ERROR_NOT_INITIALIZED, cuMemAlloc_v2(&mut p, 4));
        fails!(CUDA_ERROR_INVALID_VALUE, cuInit(1));
        ok!(cuInit(0));
        fails!(CUDA_ERROR_INVALID_CONTEXT, cuMemAlloc_v2(&mut p, 4));
        fails!(CUDA_ERROR_INVALID_CONTEXT, cuStreamCreate(&mut s, 0));
        fails!(CUDA_ERROR_INVALID_CONTEXT, cuCtxSynchronize());
        fails!(CUDA_ERROR_INVALID_DEVICE, cuDeviceGet(&mut n, 2));
        fails!(CUDA_ERROR_INVALID_DEVICE, cuDeviceGet(&mut n, -1));
        fails!(CUDA_ERROR_INVALID_CONTEXT, cuCtxSetCurrent(8 as CUcontext));
    });
}

#[test]
fn no_device_is_an_error_of_init() {
    inside(&[("VGPU_DEVICES", "0")], || fails!(CUDA_ERROR_NO_DEVICE, cuInit(0)));
}

#[test]
fn null_and_wrong_handles_are_refused() {
    inside(&[], || {
        let c = start(0);
        let bad = 0x1234_usize as *mut std::ffi::c_void;
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemAlloc_v2(null_mut(), 4));
        fails!(CUDA_ERROR_INVALID_VALUE, cuStreamCreate(null_mut(), 0));
        fails!(CUDA_ERROR_INVALID_VALUE, cuDeviceGetCount(null_mut()));
        fails!(CUDA_ERROR_INVALID_HANDLE, cuStreamSynchronize(bad.cast()));
        fails!(CUDA_ERROR_INVALID_HANDLE, cuStreamDestroy_v2(bad.cast()));
        fails!(CUDA_ERROR_INVALID_HANDLE, cuStreamDestroy_v2(null_mut()));
        fails!(CUDA_ERROR_INVALID_HANDLE, cuEventSynchronize(bad.cast()));
        fails!(CUDA_ERROR_INVALID_HANDLE, cuEventRecord(null_mut(), null_mut()));
        fails!(CUDA_ERROR_INVALID_HANDLE, cuModuleUnload(bad.cast()));
        fails!(
            CUDA_ERROR_INVALID_HANDLE,
            cuFuncSetAttribute(bad.cast(), CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 0)
        );
        assert_eq!(launch(bad.cast(), 1, 1, 0, null_mut(), &[]), CUresult::CUDA_ERROR_INVALID_HANDLE);
        fails!(CUDA_ERROR_INVALID_VALUE, cuGraphLaunch(bad.cast(), null_mut()));
        fails!(CUDA_ERROR_INVALID_VALUE, cuGraphDestroy(null_mut()));
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemFree_v2(77));
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemFreeHost(bad));
        ok!(cuMemFree_v2(0));
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemcpyHtoD_v2(0, bad, 4));
        let p = alloc(16);
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemcpyHtoD_v2(p, std::ptr::null(), 4));
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemsetD8_v2(p, 0, 17));
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemsetD32_v2(p + 2, 0, 1));
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemcpyDtoD_v2(p, p + 8, 9));
        // A destroyed handle is as wrong as one that never was.
        let s = stream();
        ok!(cuStreamDestroy_v2(s));
        fails!(CUDA_ERROR_INVALID_HANDLE, cuStreamSynchronize(s));
        ok!(cuMemFree_v2(p));
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemFree_v2(p));
        let mut value = 0;
        fails!(CUDA_ERROR_INVALID_CONTEXT, cuMemcpyPeerAsync(p, bad.cast(), p, c, 4, null_mut()));
        // SAFETY: a number outside of the enumeration's range is passed as the C interface allows.
        let attribute: unsafe extern "C" fn(*mut i32, i32, i32) -> CUresult =
            unsafe { std::mem::transmute(cuDeviceGetAttribute as *const ()) };
        fails!(CUDA_ERROR_INVALID_VALUE, attribute(&mut value, 4000, 0));
    });
}

#[test]
fn every_exported_function_survives_zeroes() {
    inside(&[], || {
        start(0);
        // Twelve zeroes fill the arguments of every function there is: null pointers, null handles, no bytes.
        type Any = unsafe extern "C" fn(u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64) -> i32;
        let skipped =
            ["cuDevicePrimaryCtxReset_v2", "cuDevicePrimaryCtxRelease_v2", "cuCtxPopCurrent_v2", "cuCtxSetCurrent"];
        let mut n = 0;
        for name in crate::symbols::exported().into_keys().filter(|n| !skipped.contains(&n.as_str())) {
            // SAFETY: null pointers are what the documentation calls an invalid value, and arguments that are not read do no harm.
            let f: Any = unsafe { std::mem::transmute(crate::symbols::symbol(&name)) };
            // SAFETY: as above.
            let code = unsafe { f(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0) };
            assert_ne!(code, 999, "{name}");
            n += 1;
        }
        assert!(n > 150);
        ok!(cuCtxSynchronize());
    });
}

#[test]
fn faults_stay_with_the_context_and_explain_themselves() {
    type Act = fn(CUmodule);
    let cases: [(&str, CUresult, &str, Act); 5] = [
        ("out of bounds", CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, "set", |m| {
            launch(kernel(m, "set"), 1, 32, 0, null_mut(), &[alloc(124), 1]);
        }),
        ("use after free", CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, "freed memory", |m| {
            let p = alloc(128);
            ok!(cuMemFree_v2(p));
            launch(kernel(m, "set"), 1, 32, 0, null_mut(), &[p, 1]);
        }),
        ("misaligned", CUresult::CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned", |m| {
            launch(kernel(m, "misaligned"), 1, 1, 0, null_mut(), &[alloc(128)]);
        }),
        ("trap", CUresult::CUDA_ERROR_LAUNCH_FAILED, "trapping", |m| {
            launch(kernel(m, "trapping"), 1, 1, 0, null_mut(), &[]);
        }),
        ("endless", CUresult::CUDA_ERROR_LAUNCH_TIMEOUT, "endless", |m| {
            launch(kernel(m, "endless"), 1, 1, 0, null_mut(), &[alloc(4)]);
        }),
    ];
    for (i, (name, code, word, act)) in cases.into_iter().enumerate() {
        let report = format!("{}/report-{}-{i}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
        let case = i.to_string();
        if std::env::var_os("VGPU_TEST_CASE").is_some_and(|c| c != *case) {
            continue;
        }
        let ran = inside(&[("VGPU_TEST_CASE", &case), ("VGPU_BUDGET", "100000"), ("VGPU_REPORT", &report)], || {
            start(0);
            let m = load(KERNELS);
            act(m);
            let mut p = 0;
            // SAFETY: a place for the address, and the null stream.
            let codes = unsafe { [cuCtxSynchronize(), cuMemAlloc_v2(&mut p, 4), cuStreamSynchronize(null_mut())] };
            assert_eq!(codes, [code; 3], "{name}: the error stays");
            let mut text = std::ptr::null();
            ok!(cuGetErrorString(code, &mut text));
            // SAFETY: the library gave a terminated text.
            let text = unsafe { CStr::from_ptr(text) }.to_str().unwrap();
            assert!(text.contains(word), "{name}: {text}");
            // The other device is another context.
            start(1);
            ok!(cuMemAlloc_v2(&mut p, 4));
            ok!(cuCtxSynchronize());
        });
        let Some(ran) = ran else { return };
        assert_eq!(ran.err.matches("vgpu: CUDA_ERROR").count(), 1, "{name}: said once\n{}", ran.err);
        let line = std::fs::read_to_string(&report).unwrap();
        std::fs::remove_file(&report).unwrap();
        assert!(line.contains(&format!("\"code\":{}", code as u32)) && line.contains("\"thread\":"), "{line}");
        assert_eq!(line.lines().count(), 1);
    }
}

#[test]
fn names_and_texts_of_errors() {
    inside(&[], || {
        let mut p = std::ptr::null();
        ok!(cuGetErrorName(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, &mut p));
        // SAFETY: the library gave a terminated text.
        assert_eq!(unsafe { CStr::from_ptr(p) }, c"CUDA_ERROR_ILLEGAL_ADDRESS");
        ok!(cuGetErrorString(CUresult::CUDA_ERROR_OUT_OF_MEMORY, &mut p));
        // SAFETY: as above.
        assert_eq!(unsafe { CStr::from_ptr(p) }, c"out of memory");
        // SAFETY: a number outside of the enumeration's range is passed as the C interface allows.
        let name: unsafe extern "C" fn(u32, *mut *const std::ffi::c_char) -> CUresult =
            unsafe { std::mem::transmute(cuGetErrorName as *const ()) };
        fails!(CUDA_ERROR_INVALID_VALUE, name(12345, &mut p));
        assert!(p.is_null());
    });
}

#[test]
fn export_tables_are_not_found() {
    inside(&[], || {
        let (mut table, id) = (std::ptr::null(), CUuuid { bytes: [0; 16] });
        fails!(CUDA_ERROR_NOT_FOUND, cuGetExportTable(&mut table, &id));
    });
}
