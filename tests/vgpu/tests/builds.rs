//! The portable and the x86-64-v3 build of the handlers give the same bits, full warps and partial ones.

use vgpu::{Build, Config, Memory, Module};

const FLOATS: [u32; 16] = [
    0,
    0x8000_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0x7f80_0001,
    0x0000_0001,
    0x807f_ffff,
    0x7f7f_ffff,
    0x3f80_0001,
    0x4b00_0001,
    0xc2f7_0000,
    0x3eaa_aaab,
    0x0080_0000,
];

/// One instruction a line; `%x %y %z` are words, `%a %b %c` long words, `%f*` and `%g*` the same bits as floats, `%h*` halves.
const BODIES: [&str; 62] = [
    "add.u32 %o, %x, %y;",
    "sub.s64 %d, %a, %b;",
    "mul.lo.s32 %o, %x, %y;",
    "mul.hi.u32 %o, %x, %y;",
    "mul.wide.s32 %d, %x, %y;",
    "mad.lo.u32 %o, %x, %y, %z;",
    "mad.wide.s32 %d, %x, %y, %c;",
    "mul.hi.s64 %d, %a, %b;",
    "div.s32 %o, %x, %y;",
    "rem.u64 %d, %a, %b;",
    "min.s32 %o, %x, %y;",
    "max.u64 %d, %a, %b;",
    "and.b32 %o, %x, %y;",
    "xor.b64 %d, %a, %b;",
    "shl.b32 %o, %x, %y;",
    "shr.s64 %d, %a, %y;",
    "shf.l.wrap.b32 %o, %x, %y, %z;",
    "prmt.b32 %o, %x, %y, %z;",
    "popc.b32 %o, %x;",
    "clz.b64 %o, %a;",
    "brev.b32 %o, %x;",
    "bfind.s32 %o, %x;",
    "bfe.s32 %o, %x, %y, %z;",
    "bfi.b32 %o, %x, %y, %z, %x;",
    "lop3.b32 %o, %x, %y, %z, 0x96;",
    "dp4a.s32.u32 %o, %x, %y, %z;",
    "add.f32 %e, %f0, %f1;",
    "add.rm.f32 %e, %f0, %f1;",
    "mul.ftz.f32 %e, %f0, %f1;",
    "mul.rz.f32 %e, %f0, %f1;",
    "fma.rn.f32 %e, %f0, %f1, %f2;",
    "fma.rm.f32 %e, %f0, %f1, %f2;",
    "fma.rn.ftz.sat.f32 %e, %f0, %f1, %f2;",
    "div.rn.f32 %e, %f0, %f1;",
    "div.rp.f32 %e, %f0, %f1;",
    "rcp.rn.f32 %e, %f0;",
    "sqrt.rz.f32 %e, %f0;",
    "rsqrt.approx.f32 %e, %f0;",
    "ex2.approx.ftz.f32 %e, %f0;",
    "lg2.approx.f32 %e, %f0;",
    "min.f32 %e, %f0, %f1;",
    "max.NaN.f32 %e, %f0, %f1;",
    "fma.rn.f64 %u, %g0, %g1, %g2;",
    "add.rp.f64 %u, %g0, %g1;",
    "div.rn.f64 %u, %g0, %g1;",
    "fma.rn.bf16x2 %o, %x, %y, %z;",
    "add.f16x2 %o, %x, %y;",
    "cvt.rn.bf16x2.f32 %o, %f0, %f1;",
    "cvt.rzi.s32.f32 %o, %f0;",
    "cvt.rni.u64.f64 %d, %g0;",
    "cvt.rn.f32.u64 %e, %a;",
    "cvt.rm.f32.s32 %e, %x;",
    "cvt.rmi.f32.f32 %e, %f0;",
    "cvt.sat.f32.f32 %e, %f0;",
    "cvt.s64.s32 %d, %x;",
    "cvt.sat.s8.s32 %o, %x;",
    "setp.lt.s32 %p1|%p2, %x, %y; selp.u32 %o, 1, 2, %p1;",
    "setp.geu.f32 %p1, %f0, %f1; selp.u32 %o, %x, %y, %p1;",
    "setp.ne.and.u64 %p1, %a, %b, %p3; selp.b64 %d, %a, %b, %p1;",
    "shfl.sync.bfly.b32 %o, %x, 5, 0x1f, -1;",
    "vote.sync.ballot.b32 %o, %p3, -1; redux.sync.add.u32 %r0, %x, -1; xor.b32 %o, %o, %r0;",
    "match.any.sync.b32 %o, %z, -1;",
];

fn outputs(build: Build, body: &str, data: &[u8], threads: u32) -> Vec<u8> {
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.entry k(.param .u64 in, .param .u64 out) {{
        .reg .b64 %a, %b, %c, %d, %q<6>; .reg .b32 %x, %y, %z, %o, %t, %r<4>; .reg .f32 %f<3>, %e;
        .reg .f64 %g<3>, %u; .reg .pred %p<5>;
        ld.param.u64 %q0, [in]; ld.param.u64 %q1, [out]; mov.u32 %t, %tid.x;
        mad.wide.u32 %q2, %t, 24, %q0; ld.global.u64 %a, [%q2]; ld.global.u64 %b, [%q2+8]; ld.global.u64 %c, [%q2+16];
        cvt.u32.u64 %x, %a; cvt.u32.u64 %y, %b; cvt.u32.u64 %z, %c;
        mov.b32 %f0, %x; mov.b32 %f1, %y; mov.b32 %f2, %z; mov.b64 %g0, %a; mov.b64 %g1, %b; mov.b64 %g2, %c;
        mov.u64 %d, 0; mov.u32 %o, 0; mov.b32 %e, %o; mov.b64 %u, %d; and.b32 %r1, %x, 1; setp.ne.u32 %p3, %r1, 0;
        {body}
        mad.wide.u32 %q3, %t, 24, %q1; cvt.u64.u32 %q4, %o; st.global.u64 [%q3], %q4; st.global.u64 [%q3+8], %d;
        mov.b64 %q5, %u; mov.b32 %r2, %e; cvt.u64.u32 %q4, %r2; xor.b64 %q5, %q5, %q4; st.global.u64 [%q3+16], %q5; ret; }}"
    );
    let mut m = Memory::new();
    let module = Module::load_for(build, &text, &mut m).unwrap_or_else(|e| panic!("{body}: {e}"));
    let input = m.alloc(data.len()).unwrap();
    m.write(input, data).unwrap();
    let out = m.alloc(threads as usize * 24).unwrap();
    let shape = Config { block: [threads, 1, 1], ..Config::default() };
    module
        .launch("k", &shape, &[&input.to_le_bytes(), &out.to_le_bytes()], &m)
        .unwrap_or_else(|e| panic!("{body}: {e}"));
    let mut bytes = vec![0; threads as usize * 24];
    m.read(out, &mut bytes).unwrap();
    bytes
}

#[test]
fn both_builds_give_the_same_bits() {
    if !Build::V3.supported() {
        println!("skipped: this processor has no x86-64-v3, there is only one build to run");
        return;
    }
    // Pairs and triples of edge values as words in both halves, then random ones.
    let mut seed = 7u64;
    let mut random = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        seed >> 16
    };
    let mut data = Vec::new();
    for i in 0..256 * 3 {
        let (n, k) = (i / 3, i % 3);
        let edge = [FLOATS[n % 16], FLOATS[n / 16], FLOATS[(n / 3 + 5 * n) % 16]][k];
        let high = FLOATS[(n + 7 * k) % 16];
        data.extend((u64::from(high) << 32 | u64::from(edge)).to_le_bytes());
    }
    for _ in 0..64 * 3 {
        data.extend((random() << 40 ^ random()).to_le_bytes());
    }
    for body in BODIES {
        // Whole warps; a last warp of which 21 threads exist would name missing lanes in the warp operations.
        let warp = body.contains(".sync");
        let n = if warp { 320 } else { 309 };
        let run = |build| outputs(build, body, &data, n);
        assert!(run(Build::Portable) == run(Build::V3), "{body}: the builds differ");
    }
}

#[test]
fn the_environment_chooses_the_portable_build() {
    // The variable is read by every load, so a child process shows what it does.
    if std::env::var_os("VGPU_BUILD_CHILD").is_some() {
        println!("build {:?}", Build::detect());
        return;
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_environment_chooses_the_portable_build", "--nocapture"])
        .envs([("VGPU_BUILD_CHILD", "1"), ("VGPU_PORTABLE", "1")])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout).into_owned();
    assert!(text.contains("build Portable"), "{text}");
}
