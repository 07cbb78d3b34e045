//! A first tour: devices, memory, copies, a launch, streams and events.

use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use crate::child::inside;

/// `out[i] = x[i] + y[i]` for `i < n`, written by hand.
pub const ADD: &str = r#"
.version 8.0
.target sm_80
.address_size 64
.visible .entry add(.param .u64 out, .param .u64 x, .param .u64 y, .param .u32 n)
{
    .reg .pred %p<2>;
    .reg .b32 %r<6>;
    .reg .f32 %f<4>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [out];
    ld.param.u64 %rd2, [x];
    ld.param.u64 %rd3, [y];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra DONE;
    mul.wide.u32 %rd4, %r5, 4;
    add.s64 %rd5, %rd2, %rd4;
    add.s64 %rd6, %rd3, %rd4;
    add.s64 %rd7, %rd1, %rd4;
    ld.global.f32 %f1, [%rd5];
    ld.global.f32 %f2, [%rd6];
    add.f32 %f3, %f1, %f2;
    st.global.f32 [%rd7], %f3;
DONE:
    ret;
}
"#;

#[test]
fn vector_add_through_cudarc() {
    for streams in ["lazy", "eager"] {
        inside(&[("VGPU_STREAMS", streams)], || {
            let ctx = CudaContext::new(0).unwrap();
            assert!(ctx.name().unwrap().starts_with("vgpu 0 (sm_80"));
            assert_eq!(ctx.compute_capability().unwrap(), (8, 0));
            let stream = ctx.new_stream().unwrap();
            let n = 1000;
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let y: Vec<f32> = (0..n).map(|i| 2.0 * i as f32).collect();
            let (dx, dy) = (stream.clone_htod(&x).unwrap(), stream.clone_htod(&y).unwrap());
            let mut out = stream.alloc_zeros::<f32>(n as usize).unwrap();
            let module = ctx.load_module(Ptx::from_src(ADD)).unwrap();
            let f = module.load_function("add").unwrap();
            let mut launch = stream.launch_builder(&f);
            launch.arg(&mut out).arg(&dx).arg(&dy).arg(&n);
            // SAFETY: the kernel takes these four arguments and stays within n elements.
            unsafe { launch.launch(LaunchConfig::for_num_elems(n as u32)) }.unwrap();
            let got = stream.clone_dtoh(&out).unwrap();
            assert!(got.iter().enumerate().all(|(i, v)| *v == 3.0 * i as f32));
            stream.synchronize().unwrap();
        });
    }
}
