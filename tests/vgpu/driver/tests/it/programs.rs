//! Whole programs that know nothing of vgpu: a C program with the real header, and kernels that NVRTC compiles on the spot.

use std::process::Command;

use crate::child::{inside, library_folder};
use crate::header::{below, cuda_folders, skip, skip_without_header};
use crate::limits::build_c;
use crate::raw::*;
use crate::symbols::exported;

#[test]
fn a_c_program_with_the_real_header() {
    // The child tells which functions there are; the parent writes, builds and runs the program.
    let ran = inside(&[], || {
        println!();
        for name in exported().into_keys().filter(|n| n.starts_with("cu") && !n.starts_with("cuProfiler")) {
            println!("function {name}");
        }
    });
    let Some(ran) = ran else { return };
    let Some(header) = skip_without_header() else { return };
    let names: Vec<&str> = ran.out.lines().filter_map(|l| l.strip_prefix("function ")).collect();
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("c-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    // Each function becomes a pointer of the type that the header gives it; the linker finds them in the library. Where the
    // header only knows a plain name that it renames, the renamed form is declared by the plain one.
    let text = std::fs::read_to_string(&header).unwrap();
    let text = &text[..text.rfind("#if defined(__CUDA_API_VERSION_INTERNAL)\n").unwrap_or(text.len())];
    let declared = |n: &&&str| text.contains(&format!("CUDAAPI {n}(")) && !text.contains(&format!("#define {n} "));
    let mut functions = String::from("static int functions(void) {\n    int n = 0;\n");
    let plain: Vec<String> = names.iter().map(|n| n.split("_v").next().unwrap().to_owned()).collect();
    for name in names.iter().filter(declared).map(|n| (*n).to_owned()).chain(plain) {
        if text.contains(&format!("CUDAAPI {name}(")) {
            functions += &format!("    {{ __typeof__({name}) *volatile p = {name}; n += p != 0; }}\n");
        }
    }
    functions += "    return n;\n}\n";
    std::fs::write(folder.join("functions.h"), functions).unwrap();
    let module = folder.join("add.ptx");
    std::fs::write(&module, crate::basics::ADD).unwrap();
    let mut compiler = Command::new("cc");
    compiler
        .args(["-std=gnu11", "-Wall", "-Werror", "-Wno-deprecated-declarations", "-I"])
        .arg(header.parent().unwrap())
        .arg("-I")
        .arg(&folder);
    let library = library_folder();
    let program = build_c(&mut compiler, include_str!("program.c"), "program", &[library.join("libcuda.so")]);
    let out = Command::new(&program).arg(&module).env("LD_LIBRARY_PATH", library).output().unwrap();
    let (text, err) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && text.contains("vector addition is right"), "{:?}\n{text}\n{err}", out.status);
    // The library is known by the name of a real driver.
    let needed = Command::new("readelf").args(["-d"]).arg(&program).output();
    if let Ok(needed) = needed {
        assert!(String::from_utf8_lossy(&needed.stdout).contains("[libcuda.so.1]"));
    }
    std::fs::remove_file(program).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
}

/// Source of a kernel with a barrier, shared memory, an atomic and a print.
const SUM: &str = r#"
extern "C" __global__ void sum(float *out, const float *x, int n) {
    __shared__ float part[256];
    float s = 0.0f;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += x[i];
    part[threadIdx.x] = s;
    __syncthreads();
    for (int k = 128; k > 0; k /= 2) {
        if (threadIdx.x < k) part[threadIdx.x] += part[threadIdx.x + k];
        __syncthreads();
    }
    if (threadIdx.x == 0) atomicAdd(out, part[0]);
    if (threadIdx.x == 0 && blockIdx.x == 0) printf("n is %d\n", n);
}
"#;

#[test]
fn nvrtc_compiles_while_this_library_is_the_driver() {
    let nvrtc = cuda_folders().iter().find_map(|f| below(f, "libnvrtc.so.12", 6));
    let Some(nvrtc) = nvrtc else {
        return skip("no libnvrtc.so.12 (CUDA_HOME, or the cache that scripts/bootstrap.sh fills)");
    };
    let path = format!("{}:{}", library_folder().display(), nvrtc.parent().unwrap().display());
    for (seed, streams) in [("0", "lazy"), ("1", "lazy"), ("2", "lazy"), ("0", "eager")] {
        // NVRTC itself asks the driver for its tables while it compiles; their absence must not bring it down.
        let ran = inside(&[("VGPU_SEED", seed), ("VGPU_STREAMS", streams), ("LD_LIBRARY_PATH", &path)], || {
            use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
            let options = cudarc::nvrtc::CompileOptions { arch: Some("compute_80"), ..Default::default() };
            let ptx = cudarc::nvrtc::compile_ptx_with_opts(SUM, options).unwrap();
            let ctx = CudaContext::new(0).unwrap();
            let f = ctx.load_module(ptx).unwrap().load_function("sum").unwrap();
            let stream = ctx.new_stream().unwrap();
            let n = 10_000_i32;
            let x = stream.clone_htod(&vec![1.0_f32; n as usize]).unwrap();
            let mut out = stream.alloc_zeros::<f32>(1).unwrap();
            let config = LaunchConfig { grid_dim: (7, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
            // SAFETY: the kernel takes these three arguments and stays within n elements.
            unsafe { stream.launch_builder(&f).arg(&mut out).arg(&x).arg(&n).launch(config) }.unwrap();
            assert_eq!(stream.clone_dtoh(&out).unwrap(), [n as f32]);
        });
        let Some(ran) = ran else { return };
        assert!(ran.out.contains("n is 10000\n"), "{}", ran.out);
    }
}

#[test]
fn a_graph_through_cudarc() {
    inside(&[("VGPU_SEED", "4")], || {
        use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
        let ctx = CudaContext::new(0).unwrap();
        // SAFETY: one stream orders everything below.
        unsafe { ctx.disable_event_tracking() };
        let stream = ctx.new_stream().unwrap();
        let f =
            ctx.load_module(cudarc::nvrtc::Ptx::from_src(crate::basics::ADD)).unwrap().load_function("add").unwrap();
        let n = 64_i32;
        let ones = stream.clone_htod(&vec![1.0_f32; n as usize]).unwrap();
        let mut sum = stream.alloc_zeros::<f32>(n as usize).unwrap();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
        for _ in 0..3 {
            add_to(&stream, &f, &mut sum, &ones, n);
        }
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags).unwrap().expect("something was captured");
        assert_eq!(stream.clone_dtoh(&sum).unwrap(), vec![0.0; n as usize]);
        graph.launch().unwrap();
        graph.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&sum).unwrap(), vec![6.0; n as usize]);

        fn add_to(
            stream: &std::sync::Arc<cudarc::driver::CudaStream>,
            f: &cudarc::driver::CudaFunction,
            sum: &mut cudarc::driver::CudaSlice<f32>,
            ones: &cudarc::driver::CudaSlice<f32>,
            n: i32,
        ) {
            use cudarc::driver::DevicePtr;
            let (address, _guard) = sum.device_ptr(stream);
            let mut launch = stream.launch_builder(f);
            launch.arg(&address).arg(&address).arg(ones).arg(&n);
            // SAFETY: the kernel takes these four arguments and stays within n elements.
            unsafe { launch.launch(LaunchConfig::for_num_elems(n as u32)) }.unwrap();
        }
    });
}
