//! What a launch may ask for on each chip, and what functions and devices say about themselves.

use std::process::Command;
use std::ptr::null_mut;

use crate::child::inside;
use crate::header::{below, cuda_folders, skip};
use crate::raw::*;

const DYNAMIC: CUfunction_attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;

/// Compute capability, then: opt-in shared memory, shared memory, threads and blocks of a multiprocessor, multiprocessors, clusters.
const CHIPS: [(&str, [i32; 6]); 5] = [
    ("8.0", [166_912, 167_936, 2048, 32, 108, 0]),
    ("8.9", [101_376, 102_400, 1536, 24, 128, 0]),
    ("9.0", [232_448, 233_472, 2048, 32, 132, 1]),
    ("10.0", [232_448, 233_472, 2048, 32, 148, 1]),
    ("12.0", [101_376, 102_400, 1536, 24, 170, 1]),
];

fn attribute(a: CUdevice_attribute) -> i32 {
    let mut v = -1;
    ok!(cuDeviceGetAttribute(&mut v, a, 0));
    v
}

fn of(f: CUfunction, a: CUfunction_attribute) -> i32 {
    let mut v = -1;
    ok!(cuFuncGetAttribute(&mut v, a, f));
    v
}

#[test]
fn devices_describe_the_chip_they_pose_as() {
    for (cc, [optin, shared, threads, blocks, sms, clusters]) in CHIPS {
        let done = inside(&[("VGPU_CC", cc), ("VGPU_DEVICES", "3"), ("VGPU_MEMORY", "300M")], || {
            use CUdevice_attribute_enum as A;
            let cc = std::env::var("VGPU_CC").unwrap();
            let (_, figures) = CHIPS.into_iter().find(|(c, _)| *c == cc).unwrap();
            ok!(cuInit(0));
            let mut n = 0;
            ok!(cuDeviceGetCount(&mut n));
            assert_eq!(n, 3);
            let got = [
                attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
                attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR),
                attribute(A::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR),
                attribute(A::CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR),
                attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
                attribute(A::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH),
            ];
            assert_eq!(got, figures);
            let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
            let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
            assert_eq!(format!("{major}.{minor}"), cc);
            assert_eq!(attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK), 49152);
            assert_eq!(attribute(A::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED), 1);
            assert_eq!(attribute(A::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK), 65536);
            // Every number that the header defines has a value.
            for a in 1..=143 {
                // SAFETY: the numbers of the enumeration go from 1 to 143 without a gap.
                attribute(unsafe { std::mem::transmute::<i32, CUdevice_attribute>(a) });
            }
            let mut bytes = 0;
            ok!(cuDeviceTotalMem_v2(&mut bytes, 2));
            assert_eq!(bytes, 300 << 20);
            let mut name = [0_u8; 64];
            ok!(cuDeviceGetName(name.as_mut_ptr().cast(), 64, 1));
            let name = std::ffi::CStr::from_bytes_until_nul(&name).unwrap().to_str().unwrap();
            assert!(name.starts_with(&format!("vgpu 1 (sm_{major}{minor}")), "{name}");
            // A short buffer gets what fits, and its zero.
            let mut short = [1_u8; 6];
            ok!(cuDeviceGetName(short.as_mut_ptr().cast(), 5, 1));
            assert_eq!(&short, b"vgpu\0\x01");
            let mut ids = [CUuuid { bytes: [0; 16] }; 2];
            ok!(cuDeviceGetUuid_v2(&mut ids[0], 0));
            ok!(cuDeviceGetUuid_v2(&mut ids[1], 1));
            assert_ne!(ids[0].bytes, ids[1].bytes);
        });
        let _ = (optin, shared, threads, blocks, sms, clusters);
        if done.is_none() {
            return;
        }
    }
}

#[test]
fn dynamic_shared_memory_above_48_kib_has_to_be_asked_for() {
    inside(&[], || {
        start(0);
        let (f, p) = (kernel(load(KERNELS), "shares"), alloc(4));
        let refused = CUresult::CUDA_ERROR_INVALID_VALUE;
        assert_eq!(of(f, CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES), 1024);
        // Static and dynamic memory share the 48 KiB.
        assert_eq!(launch(f, 1, 1, 49152 - 1024, null_mut(), &[p]), CUresult::CUDA_SUCCESS);
        assert_eq!(launch(f, 1, 1, 49152 - 1023, null_mut(), &[p]), refused);
        fails!(CUDA_ERROR_INVALID_VALUE, cuFuncSetAttribute(f, DYNAMIC, 166_912 - 1023));
        fails!(CUDA_ERROR_INVALID_VALUE, cuFuncSetAttribute(f, DYNAMIC, -1));
        ok!(cuFuncSetAttribute(f, DYNAMIC, 100_000));
        assert_eq!(of(f, DYNAMIC), 100_000);
        assert_eq!(launch(f, 1, 1, 100_000, null_mut(), &[p]), CUresult::CUDA_SUCCESS);
        assert_eq!(launch(f, 1, 1, 100_001, null_mut(), &[p]), refused);
        ok!(cuFuncSetAttribute(f, DYNAMIC, 166_912 - 1024));
        assert_eq!(launch(f, 1, 1, 166_912 - 1024, null_mut(), &[p]), CUresult::CUDA_SUCCESS);
        assert_eq!(get(p, 1, null_mut()), [7]);
        // A read-only attribute is not set.
        fails!(CUDA_ERROR_INVALID_VALUE, cuFuncSetAttribute(f, CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS, 8));
    });
}

#[test]
fn grids_and_blocks_have_limits() {
    inside(&[], || {
        start(0);
        let m = load(KERNELS);
        let (f, p) = (kernel(m, "bounded"), alloc(4));
        let go = |f: CUfunction, g: [u32; 3], b: [u32; 3]| {
            let mut args = [std::ptr::from_ref(&p).cast_mut().cast()];
            // SAFETY: the kernels take one pointer, which they do not follow.
            unsafe {
                cuLaunchKernel(f, g[0], g[1], g[2], b[0], b[1], b[2], 0, null_mut(), args.as_mut_ptr(), null_mut())
            }
        };
        let refused = CUresult::CUDA_ERROR_INVALID_VALUE;
        assert_eq!(go(f, [1; 3], [64, 1, 1]), CUresult::CUDA_SUCCESS);
        assert_eq!(go(f, [1; 3], [65, 1, 1]), refused);
        assert_eq!(of(f, CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK), 64);
        for (g, b) in [([0, 1, 1], [1; 3]), ([1; 3], [0, 1, 1]), ([1, 65536, 1], [1; 3]), ([1 << 31, 1, 1], [1; 3])] {
            assert_eq!(go(f, g, b), refused, "{g:?} {b:?}");
        }
        let f = kernel(m, "exact");
        assert_eq!(go(f, [1; 3], [32, 2, 1]), CUresult::CUDA_SUCCESS);
        assert_eq!(go(f, [1; 3], [64, 1, 1]), refused);
        let f = kernel(m, "trapping");
        for b in [[1025, 1, 1], [1, 1, 65], [512, 3, 1], [u32::MAX, u32::MAX, 1]] {
            assert_eq!(go(f, [1; 3], b), refused, "{b:?}");
        }
        ok!(cuCtxSynchronize());
    });
}

/// A kernel that keeps `n` words at once, with directives before its body.
fn hungry(n: usize, directives: &str) -> String {
    let mut body = String::new();
    for i in 0..n {
        body += &format!("ld.global.u32 %r{i}, [%rd1+{}];\n", 4 * i);
    }
    for i in 0..n {
        body += &format!("st.global.u32 [%rd1+{}], %r{i};\n", 4 * (n - 1 - i));
    }
    format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry hungry(.param .u64 p)\n{directives}\n{{\n.reg .b32 %r<{n}>;\n\
         .reg .b64 %rd<2>;\nld.param.u64 %rd1, [p];\n{body}ret;\n}}\n"
    )
}

#[test]
fn a_block_that_needs_more_registers_than_there_are_is_refused() {
    inside(&[], || {
        start(0);
        let p = alloc(4096);
        put(p, &[0; 1024]);
        let registers = |f| of(f, CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS);
        let f = kernel(load(&hungry(100, "")), "hungry");
        assert!((100..=112).contains(&registers(f)), "{}", registers(f));
        assert_eq!(launch(f, 1, 512, 0, null_mut(), &[p]), CUresult::CUDA_SUCCESS);
        assert_eq!(launch(f, 1, 1024, 0, null_mut(), &[p]), CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
        // The directives make the compiler keep to a limit.
        let f = kernel(load(&hungry(100, ".maxntid 1024, 1, 1")), "hungry");
        assert_eq!(registers(f), 64);
        assert_eq!(launch(f, 1, 1024, 0, null_mut(), &[p]), CUresult::CUDA_SUCCESS);
        assert_eq!(registers(kernel(load(&hungry(100, ".maxnreg 40")), "hungry")), 40);
        assert_eq!(registers(kernel(load(&hungry(100, ".maxntid 256, 1, 1\n.minnctapersm 4")), "hungry")), 64);
        assert_eq!(registers(kernel(load(&hungry(300, "")), "hungry")), 255);
        // So does the option of a load.
        let text = std::ffi::CString::new(hungry(100, "")).unwrap();
        let (mut m, mut names) = (null_mut(), [CUjit_option::CU_JIT_MAX_REGISTERS]);
        let mut values = [std::ptr::without_provenance_mut(48)];
        ok!(cuModuleLoadDataEx(&mut m, text.as_ptr().cast(), 1, names.as_mut_ptr(), values.as_mut_ptr()));
        assert_eq!(registers(kernel(m, "hungry")), 48);
    });
}

fn launch_ex(f: CUfunction, grid: u32, block: u32, attributes: &mut [CUlaunchAttribute], args: &[u64]) -> CUresult {
    let mut pointers: Vec<*mut std::ffi::c_void> =
        args.iter().map(|a| std::ptr::from_ref(a).cast_mut().cast()).collect();
    let config = CUlaunchConfig {
        gridDimX: grid,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: 0,
        hStream: null_mut(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    };
    // SAFETY: the configuration and the arguments live, and each argument has eight bytes.
    unsafe { cuLaunchKernelEx(&config, f, pointers.as_mut_ptr(), null_mut()) }
}

fn launch_attribute(id: CUlaunchAttributeID, words: [u32; 3]) -> CUlaunchAttribute {
    // SAFETY: plain data; the union's first words are those of the attributes used here.
    unsafe {
        let mut a: CUlaunchAttribute = std::mem::zeroed();
        a.id = id;
        (&raw mut a.value).cast::<[u32; 3]>().write(words);
        a
    }
}

#[test]
fn attributes_of_a_launch() {
    const COOPERATIVE: CUlaunchAttributeID = CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    const CLUSTER: CUlaunchAttributeID = CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    for cc in ["8.0", "9.0"] {
        let done = inside(&[("VGPU_CC", cc)], || {
            let hopper = std::env::var("VGPU_CC").unwrap() == "9.0";
            start(0);
            let (f, p) = (kernel(load(KERNELS), "set"), alloc(128 * 8));
            let cooperative = |blocks, threads| {
                launch_ex(f, blocks, threads, &mut [launch_attribute(COOPERATIVE, [1, 0, 0])], &[p, 3])
            };
            assert_eq!(cooperative(8, 32), CUresult::CUDA_SUCCESS);
            // Two blocks of 1024 threads are resident on each multiprocessor.
            let resident = if hopper { 132 * 2 } else { 108 * 2 };
            assert_eq!(cooperative(resident + 1, 1024), CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
            let mut args = [std::ptr::from_ref(&p).cast_mut().cast(), std::ptr::from_ref(&3_u64).cast_mut().cast()];
            fails!(
                CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE,
                cuLaunchCooperativeKernel(f, resident + 1, 1, 1, 1024, 1, 1, 0, null_mut(), args.as_mut_ptr())
            );
            ok!(cuLaunchCooperativeKernel(f, 8, 1, 1, 32, 1, 1, 0, null_mut(), args.as_mut_ptr()));
            let cluster =
                |blocks, size| launch_ex(f, blocks, 32, &mut [launch_attribute(CLUSTER, [size, 1, 1])], &[p, 4]);
            assert_eq!(cluster(8, 1), CUresult::CUDA_SUCCESS);
            if hopper {
                assert_eq!(cluster(8, 2), CUresult::CUDA_SUCCESS);
                assert_eq!(cluster(7, 2), CUresult::CUDA_ERROR_INVALID_VALUE);
                assert_eq!(cluster(16, 16), CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE);
                assert_eq!(cluster(8, 0), CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE);
            } else {
                assert_eq!(cluster(8, 2), CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE);
            }
            assert_eq!(get(p, 256, null_mut()), [4; 256]);
        });
        if done.is_none() {
            return;
        }
    }
}

/// Compares with cuda_occupancy.h, the occupancy calculator that comes with the headers of CUDA, as a C program.
#[test]
fn occupancy_is_that_of_the_calculator() {
    let Some(folder) = cuda_folders().iter().find_map(|f| below(f, "cuda_occupancy.h", 6)) else {
        return skip("no cuda_occupancy.h (CUDA_HOME, or the cache that scripts/bootstrap.sh fills)");
    };
    for (cc, [optin, shared, threads, _, sms, _]) in CHIPS {
        let ran = inside(&[("VGPU_CC", cc)], || {
            start(0);
            // The test runner has begun a line.
            println!();
            for registers in [24, 40, 64, 96, 128, 168, 255] {
                let f = kernel(load(&hungry(300, &format!(".maxnreg {registers}"))), "hungry");
                assert_eq!(of(f, CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS), registers);
                for opted in [0, 60_000, 99_000] {
                    if opted > 0 {
                        ok!(cuFuncSetAttribute(f, DYNAMIC, opted));
                    }
                    for block in [1, 32, 33, 64, 96, 128, 160, 256, 384, 512, 768, 1024] {
                        for dynamic in [0, 1, 1000, 8192, 16384, 30_000, 49_152, 60_000, 99_000] {
                            let mut n = -1;
                            ok!(cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut n, f, block, dynamic));
                            println!("row {registers} {opted} {block} {dynamic} {n}");
                        }
                    }
                }
            }
        });
        let Some(ran) = ran else { return };
        let rows: Vec<&str> = ran.out.lines().filter_map(|l| l.strip_prefix("row ")).collect();
        assert_eq!(rows.len(), 7 * 3 * 12 * 9);
        let (major, minor) = cc.split_once('.').unwrap();
        let mut compiler = Command::new("cc");
        compiler.args(["-O1", "-w", "-I"]).arg(folder.parent().unwrap());
        let program = build_c(&mut compiler, include_str!("occupancy.c"), &format!("occupancy-{cc}"), &[]);
        let figures = [optin, shared, threads, sms].map(|n| n.to_string());
        let mut child = Command::new(&program)
            .args([major, minor])
            .args(figures)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let text = rows.join("\n") + "\n";
        let mut stdin = child.stdin.take().unwrap();
        let writer = std::thread::spawn(move || std::io::Write::write_all(&mut stdin, text.as_bytes()).unwrap());
        let out = child.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(out.status.success(), "{cc}: {}", String::from_utf8_lossy(&out.stdout));
    }
}

/// Compiles a C program with libraries; gives its path.
pub fn build_c(compiler: &mut Command, text: &str, name: &str, libraries: &[std::path::PathBuf]) -> std::path::PathBuf {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let stem = format!("{name}-{}", std::process::id());
    let (source, program) = (folder.join(format!("{stem}.c")), folder.join(stem));
    std::fs::write(&source, text).unwrap();
    let out = compiler.arg("-o").arg(&program).arg(&source).args(libraries).output().expect("a C compiler");
    std::fs::remove_file(source).unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    program
}

#[test]
fn the_best_block_size() {
    inside(&[], || {
        start(0);
        let f = kernel(load(&hungry(300, ".maxnreg 64")), "hungry");
        let (mut grid, mut block) = (0, 0);
        ok!(cuOccupancyMaxPotentialBlockSize(&mut grid, &mut block, f, None, 0, 0));
        // 64 registers allow 1024 threads on a multiprocessor, whatever the size of the block; the largest is taken.
        assert_eq!((grid, block), (108, 1024));
        ok!(cuOccupancyMaxPotentialBlockSize(&mut grid, &mut block, f, None, 0, 300));
        // Three blocks of 300 threads are fewer than four of 256.
        assert_eq!((grid, block), (4 * 108, 256));
        unsafe extern "C" fn shared(threads: i32) -> usize {
            100 * threads as usize
        }
        ok!(cuOccupancyMaxPotentialBlockSize(&mut grid, &mut block, f, Some(shared), 0, 0));
        assert!((32..=480).contains(&block), "{block}");
        let mut bytes = 0;
        ok!(cuOccupancyAvailableDynamicSMemPerBlock(&mut bytes, f, 2, 256));
        assert_eq!(bytes, (164 << 10) / 2 - 1024);
        let mut n = 0;
        fails!(CUDA_ERROR_INVALID_VALUE, cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut n, f, 0, 0));
        fails!(CUDA_ERROR_INVALID_VALUE, cuOccupancyAvailableDynamicSMemPerBlock(&mut bytes, f, 9, 256));
    });
}

/// Each block counts itself and waits for all others.
const MEET: &str = ".version 8.0\n.target sm_80\n.address_size 64
.visible .entry meet(.param .u64 p) {
    .reg .b64 %rd<3>; .reg .b32 %r<4>; .reg .pred %p<2>;
    ld.param.u64 %rd1, [p]; mov.u32 %r1, %nctaid.x; atom.global.add.u32 %r2, [%rd1], 1;
    L: ld.acquire.gpu.global.u32 %r3, [%rd1]; setp.lt.u32 %p1, %r3, %r1; @%p1 bra L; ret; }";

#[test]
fn strict_residency_holds_launches_to_what_the_device_holds() {
    let ran = inside(&[("VGPU_RESIDENT", "strict"), ("VGPU_DEVICES", "1")], || {
        start(0);
        let f = kernel(load(MEET), "meet");
        ok!(cuFuncSetAttribute(f, DYNAMIC, 160 << 10));
        let p = alloc(4);
        // With 160 KiB a multiprocessor of an A100 holds one block: 108 in all.
        for blocks in [108, 109] {
            put(p, &[0]);
            assert_eq!(launch(f, blocks, 1, 160 << 10, null_mut(), &[p]), CUresult::CUDA_SUCCESS);
            if blocks == 108 {
                ok!(cuCtxSynchronize());
            } else {
                fails!(CUDA_ERROR_LAUNCH_TIMEOUT, cuCtxSynchronize());
            }
        }
    });
    let Some(ran) = ran else { return };
    assert!(ran.err.contains("108 are resident, as many as the device holds, 1 have not started"), "{}", ran.err);
    assert!(ran.err.contains("warp 0 polls, PTX line"), "{}", ran.err);
}

#[test]
fn by_default_blocks_join_that_others_wait_for() {
    inside(&[("VGPU_DEVICES", "1")], || {
        start(0);
        let (f, p) = (kernel(load(MEET), "meet"), alloc(4));
        ok!(cuFuncSetAttribute(f, DYNAMIC, 160 << 10));
        put(p, &[0]);
        assert_eq!(launch(f, 109, 1, 160 << 10, null_mut(), &[p]), CUresult::CUDA_SUCCESS);
        ok!(cuCtxSynchronize());
    });
}
