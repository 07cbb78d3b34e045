//! Matrix products that round as tensor cores do (`Config::products`), against a model of whole numbers.

use vgpu::{Build, Config, Memory, Module, Products};

#[path = "support/tensor_core.rs"]
mod tensor_core;
use tensor_core::{BF16, F16, Format, sample, sum};

/// Products of each mode: how many at a time, and extra bits.
const UNITS: [(Products, usize, i32); 2] = [(Products::Ampere, 8, 1), (Products::Hopper, 16, 2)];

fn noise(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |n| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % n
    }
}

/// Runs one warp on words in memory and returns `out` words.
fn run(products: Products, build: Build, body: &str, inputs: [&[u32]; 3], out: usize) -> Vec<u32> {
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.entry k(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d) {{
        .reg .b64 %a, %b, %c, %d, %l<3>; .reg .b32 %t, %x<8>, %y<8>; .reg .f32 %s<8>;
        ld.param.u64 %a, [a]; ld.param.u64 %b, [b]; ld.param.u64 %c, [c]; ld.param.u64 %d, [d]; mov.u32 %t, %tid.x;
        {body} ret; }}"
    );
    let mut m = Memory::new();
    let module = Module::load_for(build, &text, &mut m).unwrap_or_else(|e| panic!("{body}: {e}"));
    let mut args: Vec<u64> = Vec::new();
    for v in inputs {
        let at = m.alloc(v.len() * 4).unwrap();
        m.write(at, &v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>()).unwrap();
        args.push(at);
    }
    let d = m.alloc(out * 4).unwrap();
    let bytes: Vec<[u8; 8]> = args.iter().chain([&d]).map(|a| a.to_le_bytes()).collect();
    let slices: Vec<&[u8]> = bytes.iter().map(|b| &b[..]).collect();
    module.launch("k", &Config { products: Some(products), ..Config::default() }, &slices, &m).unwrap();
    let mut bytes = vec![0; out * 4];
    m.read(d, &mut bytes).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|c| u32::from_le_bytes(*c)).collect()
}

fn builds() -> impl Iterator<Item = Build> {
    [Build::Portable, Build::V3].into_iter().filter(|b| b.supported())
}

/// `mma.sync` m16n8k16 on A (16, 16), B (16, 8) and C (16, 8), by rows.
fn mma(products: Products, build: Build, name: &str, a: &[u32], b: &[u32], c: &[u32]) -> Vec<u32> {
    let mut fragments = [vec![0; 128], vec![0; 64], vec![0; 128]];
    for lane in 0..32 {
        let (g, t) = (lane / 4, 2 * (lane % 4));
        for i in 0..4 {
            let (row, k) = (g + 8 * (i % 2), t + 8 * (i / 2));
            fragments[0][4 * lane + i] = a[16 * row + k] | a[16 * row + k + 1] << 16;
            fragments[2][4 * lane + i] = c[8 * (g + 8 * (i / 2)) + t + i % 2];
        }
        for i in 0..2 {
            let k = t + 8 * i;
            fragments[1][2 * lane + i] = b[8 * k + g] | b[8 * (k + 1) + g] << 16;
        }
    }
    let body = format!(
        "mad.wide.u32 %l0, %t, 16, %a; ld.global.v4.u32 {{%x0, %x1, %x2, %x3}}, [%l0];
        mad.wide.u32 %l1, %t, 8, %b; ld.global.v2.u32 {{%y0, %y1}}, [%l1];
        mad.wide.u32 %l2, %t, 16, %c; ld.global.v4.f32 {{%s0, %s1, %s2, %s3}}, [%l2];
        mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{%s0, %s1, %s2, %s3}}, {{%x0, %x1, %x2, %x3}}, {{%y0, %y1}},
        {{%s0, %s1, %s2, %s3}};
        mad.wide.u32 %l2, %t, 16, %d; st.global.v4.f32 [%l2], {{%s0, %s1, %s2, %s3}};"
    );
    let out = run(products, build, &body, [&fragments[0], &fragments[1], &fragments[2]], 128);
    let mut d = vec![0; 128];
    for lane in 0..32 {
        for i in 0..4 {
            d[8 * (lane / 4 + 8 * (i / 2)) + 2 * (lane % 4) + i % 2] = out[4 * lane + i];
        }
    }
    d
}

fn column(b: &[u32], n: usize, c: usize) -> Vec<u32> {
    (0..16).map(|k| b[n * k + c]).collect()
}

/// Factors, and sums about as large as the products.
fn matrices(f: Format, seed: u64, n: usize) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let mut below = noise(seed);
    let a: Vec<u32> = (0..256).map(|_| sample(f, &mut below)).collect();
    let b: Vec<u32> = (0..16 * n).map(|_| sample(f, &mut below)).collect();
    let c = (0..16 * n)
        .map(|_| match below(12) {
            0 => 0,
            1 => below(1 << 23) as u32 | (below(2) as u32) << 31,
            _ => (below(2) as u32) << 31 | (118 + below(20) as u32) << 23 | below(1 << 23) as u32,
        })
        .collect();
    (a, b, c)
}

#[test]
fn mma_has_the_bits_of_the_model() {
    for (products, size, extra) in UNITS {
        for (name, f) in [("bf16", BF16), ("f16", F16)] {
            for seed in 0..40 {
                let (a, b, c) = matrices(f, seed, 8);
                for build in builds() {
                    let d = mma(products, build, name, &a, &b, &c);
                    for (i, got) in d.iter().enumerate() {
                        let (row, col) = (i / 8, i % 8);
                        let want = sum(size, extra, f, c[i], &a[16 * row..][..16], &column(&b, 8, col));
                        assert_eq!(
                            *got, want,
                            "{products:?} {name} seed {seed} {build:?} ({row}, {col}): {got:#x} {want:#x}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn wmma_has_the_bits_of_the_model() {
    let list = |p: &str, n: usize| (0..n).map(|i| format!("%{p}{i}")).collect::<Vec<_>>().join(", ");
    for (products, size, extra) in UNITS {
        for (name, f) in [("bf16", BF16), ("f16", F16)] {
            let (a, b, c) = matrices(f, 7, 16);
            let pack = |v: &[u32]| v.chunks(2).map(|p| p[0] | p[1] << 16).collect::<Vec<_>>();
            let (x, y, s) =
                (list("x", if f == BF16 { 4 } else { 8 }), list("y", if f == BF16 { 4 } else { 8 }), list("s", 8));
            let types = if f == BF16 { "f32.bf16.bf16.f32" } else { "f32.f32" };
            let body = format!(
                "wmma.load.a.sync.aligned.row.m16n16k16.{name} {{{x}}}, [%a]; wmma.load.b.sync.aligned.row.m16n16k16.{name} {{{y}}}, [%b];
                wmma.load.c.sync.aligned.row.m16n16k16.f32 {{{s}}}, [%c];
                wmma.mma.sync.aligned.row.row.m16n16k16.{types} {{{s}}}, {{{x}}}, {{{y}}}, {{{s}}};
                wmma.store.d.sync.aligned.row.m16n16k16.f32 [%d], {{{s}}};"
            );
            for build in builds() {
                let d = run(products, build, &body, [&pack(&a), &pack(&b), &c], 256);
                for (i, got) in d.iter().enumerate() {
                    let want = sum(size, extra, f, c[i], &a[16 * (i / 16)..][..16], &column(&b, 16, i % 16));
                    assert_eq!(*got, want, "{products:?} {name} {build:?} element {i}");
                }
            }
        }
    }
}

/// The sum of `c` and up to sixteen products of bf16, in each mode.
fn one(c: f32, products: &[(f32, f32)]) -> [f32; 3] {
    [Products::Exact, Products::Ampere, Products::Hopper].map(|mode| {
        let bits = |x: f32| x.to_bits() >> 16;
        let (mut a, mut b) = (vec![0; 256], vec![0; 128]);
        for (k, (x, y)) in products.iter().enumerate() {
            (a[k], b[8 * k]) = (bits(*x), bits(*y));
        }
        let mut sums = vec![0; 128];
        sums[0] = c.to_bits();
        f32::from_bits(mma(mode, Build::detect(), "bf16", &a, &b, &sums)[0])
    })
}

#[test]
fn what_distinguishes_the_modes() {
    let p = |e: i32| 2f32.powi(e);
    // Cut off where f32 rounds up.
    assert_eq!(one(1.0, &[(1.5, p(-23))]), [1.0 + 2.0 * p(-23), 1.0 + p(-23), 1.0 + p(-23)]);
    // Eight small products together: kept below the last bit of f32 with two extra bits, not with one.
    let small: Vec<_> = (0..8).map(|_| (p(-12), p(-13))).collect();
    assert_eq!(one(1.0, &small), [1.0, 1.0, 1.0 + p(-22)]);
    // Cut off towards zero on both sides.
    assert_eq!(one(-1.0, &[(p(-12), p(-13))]), [-1.0, -1.0, -(1.0 - p(-24))]);
    // Sixteen at a time, or eight and then eight: beside a large product of the second eight, halves are lost one by one, not their sum.
    let mut two: Vec<_> = (0..8).map(|_| (1.0, p(-1))).collect();
    two.push((p(12), p(13)));
    assert_eq!(one(0.0, &two), [p(25) + 4.0, p(25) + 4.0, p(25)]);
    // A product of subnormals, an infinite sum, NaN.
    assert_eq!(one(p(-149), &[(p(-130), p(-10))]), [p(-149) + p(-140); 3]);
    assert_eq!(one(f32::MAX, &[(p(64), p(63))])[2], f32::INFINITY);
    assert!(one(f32::INFINITY, &[(-f32::INFINITY, 1.0)]).iter().all(|x| x.is_nan()));
}
