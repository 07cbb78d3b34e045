//! Modules: what is loaded, what is refused and why, variables, logs, libraries.

use std::ffi::{CString, c_void};
use std::ptr::null_mut;

use crate::child::inside;
use crate::raw::*;

/// Loads with a buffer for the log of errors; gives the code and the log.
fn refused(image: &[u8]) -> (CUresult, String) {
    let (mut m, mut log) = (null_mut(), [0_u8; 512]);
    let mut names = [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(log.len())];
    // SAFETY: the image ends in a zero, the options are two with their values, the log has the size that is given.
    let code = unsafe { cuModuleLoadDataEx(&mut m, image.as_ptr().cast(), 2, names.as_mut_ptr(), values.as_mut_ptr()) };
    let used = values[1].addr();
    let n = log.iter().position(|b| *b == 0).unwrap();
    if n > 0 {
        assert_eq!(used, n, "the size becomes what was used");
    }
    (code, String::from_utf8_lossy(&log[..n]).into_owned())
}

fn head(version: &str, target: &str) -> Vec<u8> {
    format!(".version {version}\n.target {target}\n.address_size 64\n.visible .entry k() {{ ret; }}\n\0").into_bytes()
}

#[test]
fn images_that_do_not_run_here_are_refused_with_the_reason() {
    let ran = inside(&[], || {
        start(0);
        let case = |image: &[u8], code: CUresult, word: &str| {
            let (got, log) = refused(image);
            assert_eq!(got, code, "{log}");
            assert!(log.contains(word), "{log}");
        };
        case(&head("8.0", "sm_90"), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU, "sm_90, the device is sm_80");
        case(&head("8.0", "sm_90a"), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU, "sm_90a");
        case(&head("9.0", "sm_80"), CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "PTX version 9.0 is newer than 8.8");
        case(b"nonsense\0", CUresult::CUDA_ERROR_INVALID_IMAGE, "no PTX");
        case(
            b".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() { frobnicate; ret; }\n\0",
            CUresult::CUDA_ERROR_INVALID_PTX,
            "frobnicate",
        );
        case(b"\x7fELF\x02\x01\x01\x33\0", CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU, "");
        case(&[0x50, 0xed, 0x55, 0xba, 1, 0, 16, 0, 0], CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU, "");
        assert_eq!(refused(&head("8.8", "sm_70")).0, CUresult::CUDA_SUCCESS);
        let mut m = null_mut();
        fails!(CUDA_ERROR_INVALID_VALUE, cuModuleLoadData(&mut m, std::ptr::null()));
        fails!(CUDA_ERROR_FILE_NOT_FOUND, cuModuleLoad(&mut m, c"/nonexistent/file.ptx".as_ptr()));
    });
    assert!(ran.is_none_or(|r| r.err.contains("only PTX text runs here")));
}

#[test]
fn targets_for_one_chip_or_a_family_run_there_alone() {
    for cc in ["9.0", "10.0", "12.0"] {
        let ran = inside(&[("VGPU_CC", cc), ("VGPU_DRIVER", "13.0")], || {
            let cc = std::env::var("VGPU_CC").unwrap();
            start(0);
            for (target, on) in [
                ("sm_90a", vec!["9.0"]),
                ("sm_90", vec!["9.0", "10.0", "12.0"]),
                ("sm_100a", vec!["10.0"]),
                ("sm_100f", vec!["10.0"]),
                ("sm_120f", vec!["12.0"]),
            ] {
                let runs = refused(&head("9.0", target)).0 == CUresult::CUDA_SUCCESS;
                assert_eq!(runs, on.contains(&cc.as_str()), "{target} on {cc}");
            }
        });
        if ran.is_none() {
            return;
        }
    }
}

#[test]
fn variables_and_functions_by_name() {
    inside(&[], || {
        start(0);
        let m = load(KERNELS);
        let (mut at, mut n) = (0, 0);
        ok!(cuModuleGetGlobal_v2(&mut at, &mut n, m, c"counter".as_ptr()));
        assert_eq!((n, get(at, 1, null_mut())), (4, vec![5]));
        put(at, &[6]);
        assert_eq!(get(at, 1, null_mut()), [6]);
        fails!(CUDA_ERROR_NOT_FOUND, cuModuleGetGlobal_v2(&mut at, &mut n, m, c"nothing".as_ptr()));
        ok!(cuModuleGetGlobal_v2(null_mut(), &mut n, m, c"counter".as_ptr()));
        let mut f = null_mut();
        fails!(CUDA_ERROR_NOT_FOUND, cuModuleGetFunction(&mut f, m, c"nothing".as_ptr()));
        // The same function has one handle, and it ends with its module, as do the variables.
        assert_eq!(kernel(m, "set"), kernel(m, "set"));
        let (mut count, mut again) = (0, null_mut());
        ok!(cuModuleGetFunctionCount(&mut count, m));
        assert_eq!(count, 9);
        ok!(cuFuncGetModule(&mut again, kernel(m, "set")));
        assert_eq!(again, m);
        let f = kernel(m, "set");
        let (mut offset, mut size) = (0, 0);
        ok!(cuFuncGetParamInfo(f, 1, &mut offset, &mut size));
        assert_eq!((offset, size), (8, 4));
        fails!(CUDA_ERROR_INVALID_VALUE, cuFuncGetParamInfo(f, 2, &mut offset, &mut size));
        ok!(cuModuleUnload(m));
        assert_eq!(launch(f, 1, 1, 0, null_mut(), &[0, 0]), CUresult::CUDA_ERROR_INVALID_HANDLE);
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemsetD32_v2(at, 0, 1));
        fails!(CUDA_ERROR_INVALID_HANDLE, cuModuleUnload(m));
    });
}

#[test]
fn arguments_come_as_pointers_or_in_one_buffer() {
    inside(&[], || {
        start(0);
        let (f, p) = (kernel(load(KERNELS), "set"), alloc(128));
        let mut buffer = [0_u8; 12];
        buffer[..8].copy_from_slice(&p.to_le_bytes());
        buffer[8..].copy_from_slice(&77_u32.to_le_bytes());
        let size = std::cell::Cell::new(buffer.len());
        let mut extra: [*mut c_void; 5] = [
            std::ptr::without_provenance_mut(1),
            buffer.as_mut_ptr().cast(),
            std::ptr::without_provenance_mut(2),
            size.as_ptr().cast(),
            null_mut(),
        ];
        ok!(cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, null_mut(), null_mut(), extra.as_mut_ptr()));
        assert_eq!(get(p, 32, null_mut()), [77; 32]);
        size.set(8);
        fails!(
            CUDA_ERROR_INVALID_VALUE,
            cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, null_mut(), null_mut(), extra.as_mut_ptr())
        );
        fails!(CUDA_ERROR_INVALID_VALUE, cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, null_mut(), null_mut(), null_mut()));
        let mut both = [null_mut(); 2];
        fails!(
            CUDA_ERROR_INVALID_VALUE,
            cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, null_mut(), both.as_mut_ptr(), extra.as_mut_ptr())
        );
    });
}

#[test]
fn a_library_gives_kernels() {
    inside(&[], || {
        start(0);
        let (text, p) = (CString::new(KERNELS).unwrap(), alloc(128));
        let (mut library, mut k, mut f) = (null_mut(), null_mut(), null_mut());
        ok!(cuLibraryLoadData(
            &mut library,
            text.as_ptr().cast(),
            null_mut(),
            null_mut(),
            0,
            null_mut(),
            null_mut(),
            0
        ));
        ok!(cuLibraryGetKernel(&mut k, library, c"set".as_ptr()));
        ok!(cuKernelGetFunction(&mut f, k));
        assert_eq!(launch(f, 1, 32, 0, null_mut(), &[p, 2]), CUresult::CUDA_SUCCESS);
        // A kernel is launched without asking for its function, too.
        assert_eq!(launch(k.cast(), 1, 32, 0, null_mut(), &[p, 3]), CUresult::CUDA_SUCCESS);
        assert_eq!(get(p, 32, null_mut()), [3; 32]);
        fails!(CUDA_ERROR_INVALID_HANDLE, cuModuleUnload(library.cast()));
        ok!(cuLibraryUnload(library));
        fails!(CUDA_ERROR_INVALID_HANDLE, cuLibraryUnload(library));
    });
}
