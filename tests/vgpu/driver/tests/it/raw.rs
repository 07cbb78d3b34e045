//! Short names for cudarc's raw functions, and the set-up that most tests begin with.

use std::ffi::{CString, c_void};

pub use cudarc::driver::sys::*;

/// The error code of a call.
pub type Code = CUresult;

/// Asserts success and names the call otherwise.
macro_rules! ok {
    ($call:expr) => {
        $crate::raw::fails!(CUDA_SUCCESS, $call)
    };
}

/// Asserts a code and names the call otherwise.
macro_rules! fails {
    ($code:ident, $call:expr) => {{
        // SAFETY: pointers of the call are places of the test, null, or numbers that the library must refuse without following them.
        let got = unsafe { $call };
        assert_eq!(got, cudarc::driver::sys::CUresult::$code, "{}", stringify!($call));
    }};
}

pub(crate) use {fails, ok};

/// Initialises and makes the primary context of a device current.
pub fn start(device: i32) -> CUcontext {
    let mut context = std::ptr::null_mut();
    ok!(cuInit(0));
    ok!(cuDevicePrimaryCtxRetain(&mut context, device));
    ok!(cuCtxSetCurrent(context));
    context
}

/// A stream that does not wait for the null stream.
pub fn stream() -> CUstream {
    let mut s = std::ptr::null_mut();
    ok!(cuStreamCreate(&mut s, 1));
    s
}

/// An event.
pub fn event() -> CUevent {
    let mut e = std::ptr::null_mut();
    ok!(cuEventCreate(&mut e, 0));
    e
}

/// Device memory.
pub fn alloc(bytes: usize) -> CUdeviceptr {
    let mut p = 0;
    ok!(cuMemAlloc_v2(&mut p, bytes));
    p
}

/// A module of PTX text.
pub fn load(text: &str) -> CUmodule {
    let (mut m, text) = (std::ptr::null_mut(), CString::new(text).unwrap());
    ok!(cuModuleLoadData(&mut m, text.as_ptr().cast()));
    m
}

/// A kernel.
pub fn kernel(module: CUmodule, name: &str) -> CUfunction {
    let (mut f, name) = (std::ptr::null_mut(), CString::new(name).unwrap());
    ok!(cuModuleGetFunction(&mut f, module, name.as_ptr()));
    f
}

/// Launches a kernel of one dimension; each argument is eight bytes of which the kernel takes what it needs.
pub fn launch(f: CUfunction, blocks: u32, threads: u32, shared: u32, s: CUstream, args: &[u64]) -> Code {
    let mut pointers: Vec<*mut c_void> = args.iter().map(|a| std::ptr::from_ref(a).cast_mut().cast()).collect();
    // SAFETY: every pointer holds eight bytes, the size of the largest parameter of the test kernels.
    unsafe { cuLaunchKernel(f, blocks, 1, 1, threads, 1, 1, shared, s, pointers.as_mut_ptr(), std::ptr::null_mut()) }
}

/// Copies words to the device and waits.
pub fn put(to: CUdeviceptr, words: &[u32]) {
    ok!(cuMemcpyHtoD_v2(to, words.as_ptr().cast(), 4 * words.len()));
    ok!(cuStreamSynchronize(std::ptr::null_mut()));
}

/// Copies words from the device on a stream; waits because the destination is pageable.
pub fn get(from: CUdeviceptr, n: usize, s: CUstream) -> Vec<u32> {
    let mut words = vec![0; n];
    ok!(cuMemcpyDtoHAsync_v2(words.as_mut_ptr().cast(), from, 4 * n, s));
    words
}

/// Pinned host memory as words.
pub fn pinned(n: usize) -> &'static mut [u32] {
    let mut p = std::ptr::null_mut();
    ok!(cuMemHostAlloc(&mut p, 4 * n, 0));
    // SAFETY: the driver just allocated these bytes, and tests never free them while the slice lives.
    unsafe { std::slice::from_raw_parts_mut(p.cast(), n) }
}

/// Kernels for tests: `set` stores a word, `add_to` adds one buffer to another, `copy` copies, `faults` do something wrong.
pub const KERNELS: &str = r#"
.version 8.0
.target sm_80
.address_size 64
.visible .global .align 4 .u32 counter = 5;
.visible .entry set(.param .u64 p, .param .u32 value)
{
    .reg .b32 %r<8>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [p];
    ld.param.u32 %r1, [value];
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, %ctaid.x;
    mov.u32 %r4, %ntid.x;
    mad.lo.s32 %r5, %r3, %r4, %r2;
    mul.wide.u32 %rd2, %r5, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r1;
    ret;
}
.visible .entry add_to(.param .u64 p, .param .u64 q)
{
    .reg .b32 %r<8>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [p];
    ld.param.u64 %rd2, [q];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.u32 %r3, [%rd4];
    ld.global.u32 %r4, [%rd5];
    add.u32 %r5, %r3, %r4;
    st.global.u32 [%rd4], %r5;
    ret;
}
.visible .entry copy(.param .u64 p, .param .u64 q)
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [p];
    ld.param.u64 %rd2, [q];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.u32 %r3, [%rd5];
    st.global.u32 [%rd4], %r3;
    ret;
}
.visible .entry misaligned(.param .u64 p)
{
    .reg .b32 %r<2>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [p];
    add.s64 %rd2, %rd1, 2;
    ld.global.u32 %r1, [%rd2];
    ret;
}
.visible .entry trapping()
{
    trap;
    ret;
}
.visible .entry endless(.param .u64 p)
{
    .reg .b32 %r<2>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [p];
L:
    st.global.u32 [%rd1], 1;
    bra L;
}
.extern .shared .align 16 .b8 dynamic[];
.visible .entry shares(.param .u64 p)
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<3>;
    .shared .align 4 .b8 fixed[1024];
    ld.param.u64 %rd1, [p];
    mov.u32 %r1, dynamic;
    st.shared.u32 [%r1], 7;
    mov.u32 %r2, fixed;
    st.shared.u32 [%r2], 8;
    ld.shared.u32 %r3, [%r1];
    st.global.u32 [%rd1], %r3;
    ret;
}
.visible .entry bounded(.param .u64 p)
.maxntid 64, 1, 1
{
    ret;
}
.visible .entry exact(.param .u64 p)
.reqntid 32, 2, 1
{
    ret;
}
"#;
