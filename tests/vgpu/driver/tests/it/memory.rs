//! Memory: its end, rows, devices, pools, pointers, contexts.

use std::ffi::c_void;
use std::ptr::null_mut;

use crate::child::inside;
use crate::raw::*;

#[test]
fn memory_is_as_large_as_it_says() {
    inside(&[("VGPU_MEMORY", "1M")], || {
        start(0);
        let (mut free, mut total, mut p) = (0, 0, 0);
        ok!(cuMemGetInfo_v2(&mut free, &mut total));
        assert_eq!((free, total), (1 << 20, 1 << 20));
        fails!(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc_v2(&mut p, (1 << 20) + 1));
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemAlloc_v2(&mut p, 0));
        let all = alloc(1 << 20);
        fails!(CUDA_ERROR_OUT_OF_MEMORY, cuMemAllocAsync(&mut p, 1, null_mut()));
        // Running out is no fault: everything else goes on, and the other device has its own.
        ok!(cuCtxSynchronize());
        start(1);
        alloc(1 << 20);
        start(0);
        // Freed in stream order is free for the next call.
        ok!(cuMemFreeAsync(all, null_mut()));
        ok!(cuMemAllocAsync(&mut p, 1 << 20, null_mut()));
        ok!(cuMemGetInfo_v2(&mut free, &mut total));
        assert_eq!(free, 0);
    });
}

#[test]
fn rows_are_copied_and_set() {
    inside(&[], || {
        start(0);
        let (mut p, mut pitch) = (0, 0);
        ok!(cuMemAllocPitch_v2(&mut p, &mut pitch, 12, 5, 4));
        assert_eq!(pitch, 512);
        let from: Vec<u32> = (0..20).collect();
        let mut c = CUDA_MEMCPY2D {
            srcXInBytes: 4,
            srcY: 1,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: from.as_ptr().cast(),
            srcDevice: 0,
            srcArray: null_mut(),
            srcPitch: 16,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: null_mut(),
            dstDevice: p,
            dstArray: null_mut(),
            dstPitch: pitch,
            WidthInBytes: 12,
            Height: 4,
        };
        ok!(cuMemcpy2D_v2(&c));
        let got: Vec<Vec<u32>> = (0..4).map(|i| get(p + i * 512, 3, null_mut())).collect();
        assert_eq!(got, [[5, 6, 7], [9, 10, 11], [13, 14, 15], [17, 18, 19]]);
        ok!(cuMemsetD2D32_v2(p, pitch, 8, 2, 3));
        let got: Vec<Vec<u32>> = (0..4).map(|i| get(p + i * 512, 3, null_mut())).collect();
        assert_eq!(got, [[8, 8, 7], [8, 8, 11], [8, 8, 15], [17, 18, 19]]);
        ok!(cuMemsetD2D8_v2(p + 512, pitch, 1, 12, 1));
        assert_eq!(get(p + 512, 3, null_mut()), [0x0101_0101; 3]);
        c.dstPitch = 8;
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemcpy2D_v2(&c));
        c.dstPitch = pitch;
        c.dstMemoryType = CUmemorytype::CU_MEMORYTYPE_ARRAY;
        fails!(CUDA_ERROR_NOT_SUPPORTED, cuMemcpy2D_v2(&c));
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemcpy2D_v2(std::ptr::null()));
        ok!(cuMemsetD16_v2(p, 0x1234, 2));
        assert_eq!(get(p, 1, null_mut()), [0x1234_1234]);
    });
}

#[test]
fn devices_have_memories_of_their_own() {
    inside(&[("VGPU_SEED", "1")], || {
        let b = start(1);
        let (m1, q) = (load(KERNELS), alloc(128));
        let a = start(0);
        let (m0, p) = (load(KERNELS), alloc(128));
        let (s, f) = (stream(), kernel(m0, "set"));
        launch(f, 1, 32, 0, s, &[p, 12]);
        ok!(cuMemcpyPeerAsync(q, b, p, a, 128, s));
        assert_eq!(get(q, 32, s), [12; 32]);
        let mut can = 1;
        ok!(cuDeviceCanAccessPeer(&mut can, 0, 1));
        assert_eq!(can, 0);
        fails!(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, cuCtxEnablePeerAccess(b, 0));
        // A function of the other context, and a stream of it.
        assert_eq!(launch(kernel(m0, "set"), 1, 1, 0, s, &[p, 1]), CUresult::CUDA_SUCCESS);
        ok!(cuCtxSetCurrent(b));
        assert_eq!(launch(f, 1, 1, 0, null_mut(), &[p, 1]), CUresult::CUDA_ERROR_INVALID_HANDLE);
        assert_eq!(launch(kernel(m1, "set"), 1, 1, 0, s, &[q, 1]), CUresult::CUDA_ERROR_INVALID_HANDLE);
        fails!(CUDA_ERROR_INVALID_HANDLE, cuEventRecord(event(), s));
        // A kernel does not reach the memory of the other device.
        assert_eq!(launch(kernel(m1, "set"), 1, 32, 0, null_mut(), &[p, 1]), CUresult::CUDA_SUCCESS);
        fails!(CUDA_ERROR_ILLEGAL_ADDRESS, cuCtxSynchronize());
    });
}

#[test]
fn what_was_never_written_stays_so_in_copies() {
    let ran = inside(&[], || {
        let b = start(1);
        let q = alloc(128);
        let a = start(0);
        let p = alloc(128);
        ok!(cuMemcpyPeerAsync(q, b, p, a, 128, null_mut()));
        ok!(cuCtxSynchronize());
        ok!(cuCtxSetCurrent(b));
        let r = alloc(128);
        assert_eq!(launch(kernel(load(KERNELS), "copy"), 1, 32, 0, null_mut(), &[r, q]), CUresult::CUDA_SUCCESS);
        fails!(CUDA_ERROR_LAUNCH_FAILED, cuCtxSynchronize());
    });
    assert!(ran.is_none_or(|r| r.err.contains("Uninitialised")));
}

#[test]
fn pools_limit_and_count() {
    inside(&[], || {
        start(0);
        let (mut own, mut current, mut pool, mut p) = (null_mut(), null_mut(), null_mut(), 0);
        ok!(cuDeviceGetDefaultMemPool(&mut own, 0));
        ok!(cuDeviceGetMemPool(&mut current, 0));
        assert_eq!(own, current);
        // It is the one that allocations come from where no other was set.
        let mut used = 0_u64;
        ok!(cuMemAllocAsync(&mut p, 300, null_mut()));
        ok!(cuMemPoolGetAttribute(own, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT, (&raw mut used).cast()));
        assert_eq!(used, 300);
        ok!(cuMemFreeAsync(p, null_mut()));
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemPoolDestroy(own));
        // SAFETY: plain data that is filled below.
        let mut props: CUmemPoolProps = unsafe { std::mem::zeroed() };
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemPoolCreate(&mut pool, &props));
        props.allocType = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        props.location.type_ = CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        props.maxSize = 1000;
        ok!(cuMemPoolCreate(&mut pool, &props));
        ok!(cuMemAllocFromPoolAsync(&mut p, 600, pool, null_mut()));
        let mut more = 0;
        fails!(CUDA_ERROR_OUT_OF_MEMORY, cuMemAllocFromPoolAsync(&mut more, 600, pool, null_mut()));
        let read = |a| {
            let mut v = 0_u64;
            ok!(cuMemPoolGetAttribute(pool, a, (&raw mut v).cast()));
            v
        };
        assert_eq!(read(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT), 600);
        ok!(cuMemFreeAsync(p, null_mut()));
        assert_eq!(read(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT), 0);
        assert_eq!(read(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH), 600);
        let mut keep = u64::MAX;
        ok!(cuMemPoolSetAttribute(
            pool,
            CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            (&raw mut keep).cast()
        ));
        assert_eq!(read(CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD), u64::MAX);
        ok!(cuDeviceSetMemPool(0, pool));
        fails!(CUDA_ERROR_OUT_OF_MEMORY, cuMemAllocAsync(&mut p, 2000, null_mut()));
        ok!(cuDeviceSetMemPool(0, own));
        ok!(cuMemAllocAsync(&mut p, 2000, null_mut()));
        ok!(cuMemPoolTrimTo(pool, 0));
        ok!(cuMemPoolDestroy(pool));
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemPoolDestroy(pool));
    });
}

#[test]
fn pointers_say_what_they_are() {
    inside(&[], || {
        start(1);
        let (p, host) = (alloc(1000), pinned(10).as_mut_ptr() as u64);
        let int = |a, at| {
            let mut v = -7_i32;
            ok!(cuPointerGetAttribute((&raw mut v).cast(), a, at));
            v
        };
        use CUpointer_attribute as A;
        assert_eq!(int(A::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, p + 999), 2);
        assert_eq!(int(A::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, host), 1);
        assert_eq!(int(A::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, p), 1);
        let mut v = 0_u64;
        fails!(
            CUDA_ERROR_INVALID_VALUE,
            cuPointerGetAttribute((&raw mut v).cast(), A::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, p + 1000)
        );
        fails!(CUDA_ERROR_INVALID_VALUE, cuPointerGetAttribute(null_mut(), A::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, p));
        let (mut start_at, mut size, mut managed) = (0_u64, 0_usize, 1_u8);
        let mut names = [
            A::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
            A::CU_POINTER_ATTRIBUTE_RANGE_SIZE,
            A::CU_POINTER_ATTRIBUTE_IS_MANAGED,
        ];
        let mut places: [*mut c_void; 3] =
            [(&raw mut start_at).cast(), (&raw mut size).cast(), (&raw mut managed).cast()];
        ok!(cuPointerGetAttributes(3, names.as_mut_ptr(), places.as_mut_ptr(), p + 5));
        assert_eq!((start_at, size, managed), (p, 1000, 0));
        ok!(cuPointerGetAttributes(3, names.as_mut_ptr(), places.as_mut_ptr(), 5));
        assert_eq!((start_at, size), (0, 0));
        ok!(cuMemGetAddressRange_v2(&mut start_at, &mut size, p + 5));
        assert_eq!((start_at, size), (p, 1000));
        // The unified address space tells the ends of a copy.
        let mut words = [0_u32; 2];
        put(p, &[3, 4]);
        ok!(cuMemcpy(words.as_mut_ptr() as u64, p, 8));
        assert_eq!(words, [3, 4]);
    });
}

#[test]
fn contexts_come_and_go() {
    inside(&[], || {
        let primary = start(0);
        let (mut made, mut current, mut device) = (null_mut(), null_mut(), -1);
        ok!(cuCtxCreate_v4(&mut made, null_mut(), 0, 1));
        ok!(cuCtxGetCurrent(&mut current));
        assert_eq!(current, made);
        ok!(cuCtxGetDevice(&mut device));
        assert_eq!(device, 1);
        let (s, p) = (stream(), alloc(4));
        ok!(cuMemsetD32Async(p, 1, 1, s));
        ok!(cuCtxPushCurrent_v2(primary));
        ok!(cuCtxPopCurrent_v2(&mut current));
        assert_eq!(current, primary);
        ok!(cuCtxDestroy_v2(made));
        // What belonged to it is gone, and the one before is current again.
        ok!(cuCtxGetCurrent(&mut current));
        assert_eq!(current, primary);
        fails!(CUDA_ERROR_INVALID_HANDLE, cuStreamSynchronize(s));
        fails!(CUDA_ERROR_INVALID_VALUE, cuMemFree_v2(p));
        fails!(CUDA_ERROR_INVALID_CONTEXT, cuCtxDestroy_v2(made));
        fails!(CUDA_ERROR_INVALID_CONTEXT, cuCtxDestroy_v2(primary));
        let mut value = 0;
        ok!(cuCtxSetLimit(CUlimit::CU_LIMIT_PRINTF_FIFO_SIZE, 5000));
        ok!(cuCtxGetLimit(&mut value, CUlimit::CU_LIMIT_PRINTF_FIFO_SIZE));
        assert_eq!(value, 5000);
        // The fault of a context ends with it.
        let m = load(KERNELS);
        launch(kernel(m, "trapping"), 1, 1, 0, null_mut(), &[]);
        fails!(CUDA_ERROR_LAUNCH_FAILED, cuCtxSynchronize());
        ok!(cuDevicePrimaryCtxReset_v2(0));
        fails!(CUDA_ERROR_CONTEXT_IS_DESTROYED, cuCtxSynchronize());
        start(0);
        alloc(4);
        ok!(cuCtxSynchronize());
    });
}

#[test]
fn what_is_not_offered_says_so() {
    inside(&[], || {
        start(0);
        let mut p = 0;
        fails!(CUDA_ERROR_NOT_SUPPORTED, cuMemAllocManaged(&mut p, 4, 1));
        fails!(CUDA_ERROR_NOT_SUPPORTED, cuMemHostGetDevicePointer_v2(&mut p, pinned(1).as_mut_ptr().cast(), 0));
        let mut v = 1;
        ok!(cuDeviceGetAttribute(&mut v, CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY, 0));
        assert_eq!(v, 0);
        ok!(cuDeviceGetAttribute(&mut v, CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 0));
        assert_eq!(v, 0);
    });
}
