//! What is exported: every function that cudarc's layers name, with the prototypes of cuda.h.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};

use crate::child::inside;
use crate::header::{prototypes, skip_without_header};
use crate::raw::*;

/// What the safe and result layers of cudarc 0.19.10 name with `cuda-12090`, and what is added to it.
const WANTED: &str = "
    cuCtxCreate_v3 cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCacheConfig cuCtxGetCurrent cuCtxGetLimit cuCtxGetStreamPriorityRange
    cuCtxSetCacheConfig cuCtxSetCurrent cuCtxSetFlags cuCtxSetLimit cuCtxSynchronize cuDestroyExternalMemory cuDeviceGet
    cuDeviceGetAttribute cuDeviceGetCount cuDeviceGetDefaultMemPool cuDeviceGetMemPool cuDeviceGetName cuDeviceGetUuid
    cuDeviceGetUuid_v2 cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxRetain cuDeviceSetMemPool cuDeviceTotalMem_v2 cuEventCreate
    cuEventDestroy_v2 cuEventElapsedTime cuEventElapsedTime_v2 cuEventQuery cuEventRecord cuEventSynchronize
    cuExternalMemoryGetMappedBuffer cuFuncGetAttribute cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorName cuGetErrorString
    cuGraphDestroy cuGraphExecDestroy cuGraphInstantiateWithFlags cuGraphLaunch cuGraphUpload cuImportExternalMemory cuInit
    cuLaunchCooperativeKernel cuLaunchHostFunc cuLaunchKernel cuMemAdvise_v2 cuMemAllocAsync cuMemAllocFromPoolAsync
    cuMemAllocManaged cuMemAlloc_v2 cuMemFreeAsync cuMemFreeHost cuMemFree_v2 cuMemGetInfo_v2 cuMemHostAlloc cuMemPoolCreate
    cuMemPoolDestroy cuMemPoolGetAttribute cuMemPoolSetAttribute cuMemPoolTrimTo cuMemPrefetchAsync_v2 cuMemcpyDtoDAsync_v2
    cuMemcpyDtoD_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoH_v2 cuMemcpyHtoDAsync_v2 cuMemcpyHtoD_v2 cuMemcpyPeerAsync cuMemsetD8Async
    cuMemsetD8_v2 cuModuleGetFunction cuModuleGetGlobal_v2 cuModuleLoad cuModuleLoadData cuModuleUnload
    cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags cuOccupancyMaxActiveClusters cuOccupancyMaxPotentialBlockSize
    cuOccupancyMaxPotentialBlockSizeWithFlags cuOccupancyMaxPotentialClusterSize cuProfilerStart cuProfilerStop
    cuStreamAttachMemAsync cuStreamBeginCapture_v2 cuStreamCreate cuStreamCreateWithPriority cuStreamDestroy_v2 cuStreamEndCapture
    cuStreamIsCapturing cuStreamSynchronize cuStreamWaitEvent
    cuDeviceCanAccessPeer cuCtxEnablePeerAccess cuGetExportTable cuGetProcAddress_v2 cuTensorMapEncodeTiled cuLaunchKernelEx
    cuModuleLoadDataEx cuLibraryLoadData cuLibraryGetKernel cuKernelGetFunction cuPointerGetAttribute cuPointerGetAttributes
    cuMemcpy2DAsync_v2 cuMemsetD32Async cuMemsetD2D8_v2 cuStreamQuery cuThreadExchangeStreamCaptureMode cuGraphExecUpdate_v2
    cuMemHostRegister_v2 cuMemHostUnregister cuCtxPushCurrent_v2 cuCtxPopCurrent_v2 cuDriverGetVersion
    vgpuEnqueue vgpuMemoryRead vgpuMemoryWrite vgpuMemoryCheck vgpuStreamDevice";

pub fn symbol(name: &str) -> *mut c_void {
    let name = CString::new(name).unwrap();
    // SAFETY: cudarc has loaded the library by this name; looking a symbol up has no precondition.
    unsafe {
        let library = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
        assert!(!library.is_null());
        libc::dlsym(library, name.as_ptr())
    }
}

#[test]
fn every_function_that_cudarc_names_is_there() {
    inside(&[], || {
        let missing: Vec<&str> = WANTED.split_whitespace().filter(|n| symbol(n).is_null()).collect();
        assert!(missing.is_empty(), "{missing:?}");
    });
}

/// Name of each exported function with the sizes of its arguments, as the library tells.
pub fn exported() -> BTreeMap<String, Vec<usize>> {
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: the private symbol has this prototype.
    let list: unsafe extern "C" fn(*mut *const c_char) -> i32 = unsafe { std::mem::transmute(symbol("vgpuSymbols")) };
    // SAFETY: a place for one pointer.
    assert_eq!(unsafe { list(&mut text) }, 0);
    // SAFETY: the library keeps the text for ever.
    let text = unsafe { CStr::from_ptr(text) }.to_str().unwrap();
    let line = |l: &str| {
        let mut words = l.split(' ');
        let name = words.next().unwrap().to_owned();
        (name, words.map(|w| w.parse().unwrap()).collect())
    };
    text.lines().map(line).collect()
}

#[test]
fn prototypes_are_those_of_the_header() {
    inside(&[], || {
        let Some(header) = skip_without_header() else { return };
        let prototypes = prototypes(&header);
        let ours = exported();
        assert!(ours.len() > 150 && prototypes.len() > 400, "{} {}", ours.len(), prototypes.len());
        // Those of the profiler stand in another header.
        for (name, sizes) in ours.iter().filter(|(n, _)| n.starts_with("cu") && !n.starts_with("cuProfiler")) {
            let theirs = prototypes.get(name).unwrap_or_else(|| panic!("{name} is not in cuda.h"));
            assert_eq!(sizes, theirs, "{name}");
        }
    });
}

#[test]
fn functions_are_found_by_name_and_version() {
    inside(&[], || {
        ok!(cuInit(0));
        let find = |name: &str, version: i32| {
            let (mut p, mut status) =
                (std::ptr::null_mut(), CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SUCCESS);
            let name = CString::new(name).unwrap();
            ok!(cuGetProcAddress_v2(name.as_ptr(), &mut p, version, 0, &mut status));
            (p, status as u32)
        };
        assert_eq!(find("cuMemAlloc", 12000), (symbol("cuMemAlloc_v2"), 0));
        assert_eq!(find("cuInit", 12000), (symbol("cuInit"), 0));
        assert_eq!(find("cuEventElapsedTime", 12090), (symbol("cuEventElapsedTime_v2"), 0));
        assert_eq!(find("cuEventElapsedTime", 12000), (symbol("cuEventElapsedTime"), 0));
        assert_eq!(find("cuGraphInstantiate", 12090), (symbol("cuGraphInstantiateWithFlags"), 0));
        assert_eq!(find("cuMemAdvise", 12000), (symbol("cuMemAdvise"), 0));
        assert_eq!(find("cuCtxCreate_v4", 12000), (std::ptr::null_mut(), 2));
        assert_eq!(find("cuNothing", 12090), (std::ptr::null_mut(), 1));
        assert_eq!(find("vgpuEnqueue", 12090), (std::ptr::null_mut(), 1));
    });
}
