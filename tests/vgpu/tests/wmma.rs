//! The `wmma` instructions: every shape, type, layout and state space against whole-number references in both builds, what they
//! refuse, and programs that NVRTC 12.9.86 made of <mma.h> (`cuda/wmma.cu`).

use vgpu::error::FaultKind;
use vgpu::exec::code::Build;
use vgpu::{Config, Error, Memory, Module};

#[path = "programs/device.rs"]
mod device;
use device::{Device, SEEDS, close, noise, noise_halves, shape, value};

/// Bytes of each of A, B and C in the input; D has as many.
const SLOT: usize = 8192;

fn builds() -> Vec<Build> {
    let all = [Build::Portable, Build::V3];
    all.into_iter().filter(|b| b.supported()).collect()
}

/// Bits of a half that holds a whole number of at most 2048.
fn half(x: i64) -> u16 {
    if x == 0 {
        return 0;
    }
    let (sign, mag) = (u16::from(x < 0) << 15, x.unsigned_abs() as u16);
    let e = mag.ilog2() as u16;
    sign | (e + 15) << 10 | (mag << (10 - e) & 0x3ff)
}

fn of_half(bits: u16) -> f64 {
    let (e, f) = (i32::from(bits >> 10 & 31), f64::from(bits & 0x3ff));
    let v = match e {
        0 => f * 2f64.powi(-24),
        31 => f64::NAN,
        _ => (1024.0 + f) * 2f64.powi(e - 25),
    };
    if bits >> 15 == 1 { -v } else { v }
}

fn bytes_of(ty: &str, x: i64) -> Vec<u8> {
    match ty {
        "s8" | "u8" => vec![x as u8],
        "f16" => half(x).to_le_bytes().to_vec(),
        "bf16" => (((x as f32).to_bits() >> 16) as u16).to_le_bytes().to_vec(),
        "s32" => (x as i32).to_le_bytes().to_vec(),
        // The lowest bits of tf32 do not count.
        "tf32" => ((x as f32).to_bits() | 0x1555).to_le_bytes().to_vec(),
        _ => (x as f32).to_le_bytes().to_vec(),
    }
}

fn number(ty: &str, b: &[u8]) -> i64 {
    match ty {
        "f16" => of_half(u16::from_le_bytes(b.try_into().unwrap())) as i64,
        "s32" => i64::from(i32::from_le_bytes(b.try_into().unwrap())),
        _ => f32::from_le_bytes(b.try_into().unwrap()) as i64,
    }
}

fn size(ty: &str) -> usize {
    bytes_of(ty, 0).len()
}

#[derive(Clone, Copy)]
struct Case {
    mnk: (usize, usize, usize),
    /// Types of D, A and B, C.
    types: [&'static str; 3],
    /// Whether A, B, C, D lie by rows.
    by_row: [bool; 4],
    space: &'static str,
    padded: bool,
    saturate: bool,
}

impl Case {
    fn dims(&self, side: usize) -> (usize, usize) {
        let (m, n, k) = self.mnk;
        [(m, k), (k, n), (m, n), (m, n)][side]
    }

    fn ty(&self, side: usize) -> &'static str {
        [self.types[1], self.types[1], self.types[2], self.types[0]][side]
    }

    /// Elements from line to line.
    fn stride(&self, side: usize) -> usize {
        let (rows, cols) = self.dims(side);
        let line = if self.by_row[side] { cols } else { rows };
        line + if self.padded { 16 / size(self.ty(side)) } else { 0 }
    }

    fn place(&self, side: usize, row: usize, col: usize) -> usize {
        let s = self.stride(side);
        size(self.ty(side)) * if self.by_row[side] { row * s + col } else { col * s + row }
    }

    fn value(&self, side: usize, row: usize, col: usize) -> i64 {
        let i = (row * self.dims(side).1 + col + 100 * side) as i64;
        let x = (i * 7 + i * i * 3 + i / 5) % 251;
        match self.ty(side) {
            "u8" => x,
            "s8" => x - 125,
            "s32" if i % 5 == 0 => i64::from(i32::MAX) - x,
            "s32" if i % 5 == 1 => i64::from(i32::MIN) + x,
            "s32" => x,
            _ => x % 9 - 4,
        }
    }

    fn text(&self) -> String {
        let (m, n, k) = self.mnk;
        let name = format!("m{m}n{n}k{k}");
        let layout = |side: usize| if self.by_row[side] { "row" } else { "col" };
        let count = |side: usize| match (self.ty(side), side) {
            ("f16", 0 | 1) => 8,
            ("f16", _) => 4,
            (ty, _) => self.dims(side).0 * self.dims(side).1 * size(ty) / 128,
        };
        let list = |side: usize| -> String {
            let r: Vec<String> = (0..count(side)).map(|i| format!("%{}{i}", ["a", "b", "c", "d"][side])).collect();
            format!("{{{}}}", r.join(", "))
        };
        let address = |side: usize| {
            let at = SLOT * side;
            match (self.space, side) {
                (".shared", 3) => "[sh]".into(),
                (".shared", _) => format!("[sh+{at}]"),
                (_, 3) => "[%out]".into(),
                _ => format!("[%in+{at}]"),
            }
        };
        // The stride as a number or in a register.
        let mut set = String::new();
        let mut stride = |side: usize| match (self.padded, side % 2) {
            (false, _) => String::new(),
            (true, 0) => format!(", {}", self.stride(side)),
            _ => {
                set += &format!("mov.u32 %s{side}, {};\n", self.stride(side));
                format!(", %s{side}")
            }
        };
        let mut moves = String::new();
        for (side, letter) in ["a", "b", "c"].into_iter().enumerate() {
            moves += &format!(
                "wmma.load.{letter}.sync.aligned.{}.{name}{}.{} {}, {}{};\n",
                layout(side),
                self.space,
                self.ty(side),
                list(side),
                address(side),
                stride(side)
            );
        }
        let store = format!(
            "wmma.store.d.sync.aligned.{}.{name}{}.{} {}, {}{};\n",
            layout(3),
            self.space,
            self.ty(3),
            address(3),
            list(3),
            stride(3)
        );
        let [d, ab, c] = self.types;
        let types = if ab == "f16" { format!("{d}.{c}") } else { format!("{d}.{ab}.{ab}.{c}") };
        let saturate = if self.saturate { ".satfinite" } else { "" };
        let copy = |from: &str, to: &str, bytes: usize, label: &str| {
            format!(
                "mov.u32 %n, %t;\n{label}: {from} st.{to} ; add.u32 %n, %n, 128; setp.lt.u32 %g, %n, {bytes};\n@%g bra {label};\nbar.warp.sync -1;\n"
            )
        };
        let (mut before, mut after) = (String::new(), String::new());
        if self.space == ".shared" {
            let at = "cvt.u64.u32 %q, %n; add.u64 %p, %q,";
            before = copy(
                &format!("{at} %in; ld.global.b32 %x, [%p]; mov.u32 %y, sh; add.u32 %y, %y, %n;"),
                "shared.b32 [%y], %x",
                3 * SLOT,
                "L1",
            );
            after = copy(
                &format!("{at} %out; mov.u32 %y, sh; add.u32 %y, %y, %n; ld.shared.b32 %x, [%y];"),
                "global.b32 [%p], %x",
                SLOT,
                "L2",
            );
        }
        format!(
            ".version 8.0\n.target sm_80\n.address_size 64\n.entry k(.param .u64 in, .param .u64 out) {{ .shared .align 32 .b8 sh[{}];
            .reg .b32 %a<8>, %b<8>, %c<8>, %d<8>, %s<4>, %t, %n, %x, %y; .reg .b64 %in, %out, %p, %q; .reg .pred %g;
            ld.param.u64 %in, [in]; ld.param.u64 %out, [out]; mov.u32 %t, %tid.x; shl.b32 %t, %t, 2;
            {before} {set} {moves} wmma.mma.sync.aligned.{}.{}.{name}.{types}{saturate} {}, {}, {}, {};\n {store} {after} ret; }}",
            3 * SLOT,
            layout(0),
            layout(1),
            list(3),
            list(0),
            list(1),
            list(2)
        )
    }

    fn check(&self) {
        let (m, n, k) = self.mnk;
        // Outside of shared memory only the elements are written: what an instruction reads beyond them is a fault.
        let fill = (self.space == ".shared").then_some(0);
        let text = self.text();
        for build in builds() {
            let mut memory = Memory::new();
            let module = Module::load_for(build, &text, &mut memory).unwrap_or_else(|e| panic!("{e}\n{text}"));
            let (input, out) = (memory.alloc(3 * SLOT).unwrap(), memory.alloc(SLOT).unwrap());
            if let Some(x) = fill {
                memory.fill(input, x, 3 * SLOT).unwrap();
            }
            memory.fill(out, 0xee, SLOT).unwrap();
            for side in 0..3 {
                let (rows, cols) = self.dims(side);
                for (row, col) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                    let at = input + (SLOT * side + self.place(side, row, col)) as u64;
                    let bytes = bytes_of(self.ty(side), self.value(side, row, col));
                    memory.write(at, &bytes).unwrap();
                }
            }
            let args: [&[u8]; 2] = [&input.to_le_bytes(), &out.to_le_bytes()];
            let counters =
                module.launch("k", &Config::default(), &args, &memory).unwrap_or_else(|e| panic!("{e}\n{text}"));
            assert_eq!(counters.tensor_flops, 2 * (m * n * k) as u64);
            let mut got = vec![0; SLOT];
            memory.read(out, &mut got).unwrap();
            let d = size(self.ty(3));
            let mut rest = vec![true; SLOT];
            for (row, col) in (0..m).flat_map(|r| (0..n).map(move |c| (r, c))) {
                let sum =
                    (0..k).fold(self.value(2, row, col), |s, i| s + self.value(0, row, i) * self.value(1, i, col));
                let want = match (self.ty(3), self.saturate) {
                    ("s32", true) => sum.clamp(i64::from(i32::MIN), i64::from(i32::MAX)),
                    ("s32", false) => i64::from(sum as i32),
                    _ => sum,
                };
                let at = self.place(3, row, col);
                rest[at..at + d].fill(false);
                let x = number(self.ty(3), &got[at..at + d]);
                assert_eq!(x, want, "({row}, {col}) in {build:?} of\n{text}");
            }
            if fill.is_none() {
                let touched = rest.iter().zip(&got).any(|(free, x)| *free && *x != 0xee);
                assert!(!touched, "bytes between the lines are written:\n{text}");
            }
        }
    }
}

/// Every layout of A, B, C and D, over the state spaces with and without a stride.
fn all(shapes: &[(usize, usize, usize)], types: [&'static str; 3], saturate: bool) {
    for mnk in shapes {
        for bits in 0..16usize {
            let space = ["", ".global", ".shared"][bits % 3];
            Case {
                mnk: *mnk,
                types,
                by_row: [0, 1, 2, 3].map(|i| bits >> i & 1 == 1),
                space,
                padded: bits % 2 == 0,
                saturate,
            }
            .check();
            // The same without or with its stride, in the next space.
            Case {
                mnk: *mnk,
                types,
                by_row: [0, 1, 2, 3].map(|i| bits >> i & 1 == 1),
                space: ["", ".global", ".shared"][(bits + 1) % 3],
                padded: bits % 2 == 1,
                saturate,
            }
            .check();
        }
    }
}

const SHAPES: [(usize, usize, usize); 3] = [(16, 16, 16), (32, 8, 16), (8, 32, 16)];

#[test]
fn halves_with_half_and_single_sums() {
    for (d, c) in [("f16", "f16"), ("f16", "f32"), ("f32", "f16"), ("f32", "f32")] {
        all(&SHAPES, [d, "f16", c], false);
    }
}

#[test]
fn bfloat16_and_tf32() {
    all(&SHAPES, ["f32", "bf16", "f32"], false);
    all(&[(16, 16, 8)], ["f32", "tf32", "f32"], false);
}

#[test]
fn bytes_wrap_or_saturate() {
    for ty in ["s8", "u8"] {
        all(&SHAPES, ["s32", ty, "s32"], false);
        all(&SHAPES, ["s32", ty, "s32"], true);
    }
}

/// A kernel of one warp (or of what `block` says) with `body`; `%p` is a parameter that points to 1 KiB, 512 bytes of it written.
fn run(body: &str, block: u32, races: bool) -> Result<(), Error> {
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.const .align 32 .b8 fixed[1024] = {{1}};
        .entry k(.param .u64 p) {{ .shared .align 32 .b8 sh[2048]; .local .align 32 .b8 own[1024];
        .reg .b32 %w<9>, %f<9>, %t; .reg .f32 %x<9>; .reg .u32 %u<9>; .reg .b64 %p, %q, %r; .reg .pred %g;
        ld.param.u64 %p, [p]; mov.u32 %t, %tid.x; mov.u32 %w0, 0; mov.u32 %w1, 0; mov.u32 %w2, 0; mov.u32 %w3, 0; {body} ret; }}"
    );
    let mut m = Memory::new();
    let module = Module::load(&text, &mut m)?;
    let p = m.alloc(1024).unwrap();
    m.fill(p, 0, 512).unwrap();
    let c = Config { block: [block, 1, 1], checks: vgpu::Checks { races }, ..Config::default() };
    module.launch("k", &c, &[&p.to_le_bytes()], &m).map(|_| ())
}

const LOAD: &str = "wmma.load.a.sync.aligned.row.m16n16k16.bf16 {%w0, %w1, %w2, %w3},";
const STORE: &str = "wmma.store.d.sync.aligned.row.m16n16k16";
const HALVES: &str = "{%w0, %w1, %w2, %w3}";

#[track_caller]
fn faults(body: &str, kind: FaultKind, part: &str) {
    match run(body, 32, false) {
        Err(Error::Fault(f)) if f.kind == kind && f.message.contains(part) && f.text.contains("wmma") => {}
        other => panic!("{body}: {other:?}, expected {kind:?} with {part:?}"),
    }
}

#[test]
fn mistakes_are_named() {
    use FaultKind::*;
    run(&format!("{LOAD} [%p];"), 32, false).unwrap();
    faults(&format!("{LOAD} [%p+8];"), Misaligned, "16 bytes of a fragment");
    faults(&format!("{LOAD} [%p], 20;"), Misaligned, "stride of 20 elements");
    // What nobody wrote may be loaded, but not multiplied or stored to global memory.
    let zero = "mov.f32 %x0, 0f00000000;";
    let unwritten = format!("{zero} {LOAD} [%p+32];");
    run(&unwritten, 32, false).unwrap();
    let sums = "{%x0, %x0, %x0, %x0, %x0, %x0, %x0, %x0}";
    let product = format!(
        "wmma.mma.sync.aligned.row.row.m16n16k16.f32.bf16.bf16.f32 {{%x1, %x2, %x3, %x4, %x5, %x6, %x7, %x8}}, {HALVES}, {HALVES}, {sums};"
    );
    faults(&format!("{unwritten} {product}"), Uninitialised, "a factor or sum of a product was never written");
    faults(
        &format!("{unwritten} {STORE}.global.f16 [%p], {HALVES};"),
        Uninitialised,
        "the value of a store to global memory",
    );
    faults(&format!("{LOAD} [%p], 1024;"), OutOfBounds, "");
    faults(&format!("{LOAD} [%p], -16;"), OutOfBounds, "");
    faults(&format!("mad.wide.u32 %q, %t, 16, %p; {LOAD} [%q];"), BadMask, "have to be the same");
    faults(&format!("shl.b32 %f0, %t, 4; {LOAD} [%p], %f0;"), BadMask, "have to be the same");
    faults(
        &format!("setp.lt.u32 %g, %t, 16; @%g {LOAD} [%p];"),
        BadMask,
        "a matrix instruction with lanes 0x0000ffff only",
    );
    faults(
        &format!("mov.u64 %q, own; cvta.local.u64 %q, %q; {LOAD} [%q];"),
        OutOfBounds,
        "neither in global nor in shared memory",
    );
    faults(&format!("{STORE}.global.f16 [%p], {HALVES}, 8;"), OutOfBounds, "they overlap");
    faults(&format!("{STORE}.f16 [%p+544], {HALVES};"), OutOfBounds, "");
    faults(
        &format!("mov.u64 %q, fixed; cvta.const.u64 %q, %q; {STORE}.f16 [%q], {HALVES};"),
        ReadOnly,
        "constant memory",
    );
    // By columns each element is an access of its own, with the same checks.
    let columns = format!("wmma.load.c.sync.aligned.col.m16n16k16.f16 {HALVES}, [%p+32];");
    run(&columns, 32, false).unwrap();
    faults(&format!("{columns} {STORE}.global.f16 [%p], {HALVES};"), Uninitialised, "2 bytes");
    // Through shared memory and back, by rows and by columns.
    for order in ["row", "col"] {
        let there = format!("wmma.store.d.sync.aligned.{order}.m16n16k16.shared.f16 [sh], {HALVES};");
        let back = format!("wmma.load.c.sync.aligned.{order}.m16n16k16.shared.f16 {HALVES}, [sh];");
        run(&format!("{columns} {there} {back}"), 32, false).unwrap();
        let used = format!("{columns} {there} {back} {STORE}.global.f16 [%p], {HALVES};");
        faults(&used, Uninitialised, "of Global memory");
    }
    faults(&format!("wmma.store.d.sync.aligned.col.m16n16k16.f16 [%p+544], {HALVES};"), OutOfBounds, "");
}

#[test]
fn warps_that_store_one_tile_race() {
    let store = format!("{STORE}.shared.f16 [sh], {HALVES};");
    run(&store, 32, true).unwrap();
    match run(&store, 64, true) {
        Err(Error::Fault(f)) if f.kind == FaultKind::Race => {}
        other => panic!("{other:?}"),
    }
    // A barrier between the store of one warp and the load of the other.
    let both = |between: &str| {
        format!(
            "setp.ge.u32 %g, %t, 32; @%g bra L1; {STORE}.shared.f16 [sh], {HALVES}; L1: {between}
            @!%g bra L2; wmma.load.c.sync.aligned.row.m16n16k16.shared.f16 {HALVES}, [sh]; L2:"
        )
    };
    run(&both("bar.sync 0;"), 64, true).unwrap();
    match run(&both(""), 64, true) {
        Err(Error::Fault(f)) if f.kind == FaultKind::Race => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn forms_that_do_not_exist_are_refused() {
    let w = "{%w0, %w1, %w2, %w3}";
    for body in [
        format!("wmma.load.a.sync.aligned.row.m16n16k16.f16 {w}, [%p];"),
        format!("wmma.load.a.sync.aligned.row.m16n16k8.bf16 {w}, [%p];"),
        format!("wmma.load.c.sync.aligned.row.m16n16k16.bf16 {w}, [%p];"),
        format!("wmma.load.d.sync.aligned.row.m16n16k16.f16 {w}, [%p];"),
        format!("wmma.load.a.sync.aligned.row.m16n16k16.local.bf16 {w}, [%p];"),
        format!("wmma.load.a.sync.aligned.row.m16n16k16.bf16 {w}, [%p], %q;"),
        format!("wmma.load.a.sync.aligned.m16n16k16.bf16 {w}, [%p];"),
        "wmma.load.a.sync.aligned.row.m16n16k16.bf16 {%x0, %x1, %x2, %x3}, [%p];".into(),
        "wmma.load.a.sync.aligned.row.m16n16k16.bf16 {%u0, %u1, %u2, %u3}, [%p];".into(),
        "wmma.load.b.sync.aligned.row.m16n16k8.tf32 {%x0, %x1, %x2, %x3}, [%p];".into(),
        "wmma.load.a.sync.aligned.row.m16n16k16.u8 {%x0, %x1}, [%p];".into(),
        "wmma.load.c.sync.aligned.row.m16n16k16.f16 {%u0, %u1, %u2, %u3}, [%p];".into(),
        format!("wmma.load.a.sync.row.m16n16k16.bf16 {w}, [%p];"),
        "wmma.store.d.sync.aligned.row.m16n16k16.f16 [%p], {1, 2, 3, 4};".into(),
        format!("wmma.mma.sync.aligned.row.col.m16n16k16.s32.s8.u8.s32 {w}, {w}, {w}, {w};"),
        format!("wmma.mma.sync.aligned.row.m16n16k16.f16.f16 {w}, {w}, {w}, {w};"),
        format!("wmma.mma.sync.aligned.row.col.m16n16k16.f16.f16.satfinite {w}, {w}, {w}, {w};"),
        format!("wmma.mma.sync.aligned.row.col.m16n16k16.f16.f16 {w}, {w}, {w}, {w};"),
        format!("mma.sync.aligned.col.row.m16n8k16.f16.f16.f16.f16 {{%w0, %w1}}, {w}, {{%w0, %w1}}, {{%w0, %w1}};"),
    ] {
        match run(&body, 32, false) {
            Err(Error::Unsupported { .. }) => {}
            other => panic!("{body}: {other:?}"),
        }
    }
}

const PROGRAMS: &str = include_str!("cuda/wmma.ptx");

#[test]
fn product_with_scaled_fragments_matches_f64() {
    let (m, n, k, alpha) = (64, 96, 80, 0.75f32);
    let (a, b, c) = (noise_halves(m * k, 1), noise_halves(n * k, 2), noise(m * n, 3));
    let want: Vec<f64> = (0..m * n)
        .map(|i| {
            let (row, col) = (i / n, i % n);
            let sum: f64 = (0..k).map(|l| value(a[row * k + l]) * value(b[col * k + l])).sum();
            f64::from(alpha) * sum + f64::from(c[i])
        })
        .collect();
    for seed in SEEDS {
        let mut dev = Device::new(PROGRAMS);
        let (pa, pb, pc) = (dev.halves(&a), dev.halves(&b), dev.floats(&c));
        let pd = dev.alloc(m * n * 4);
        let ran = dev.launch(
            "wmma_product",
            shape([n / 32, m / 32, 1], 128, 0, seed),
            &[&pa, &pb, &pc, &pd, &(n as i32), &(k as i32), &alpha],
        );
        close("wmma_product", &dev.read(pd, m * n), &want, |_| 2e-5);
        assert_eq!(ran.tensor_flops, 2 * (m * n * k) as u64);
    }
}

#[test]
fn half_program_matches_f64() {
    let k = 48;
    let cut = |v: Vec<f32>| -> Vec<u16> { v.into_iter().map(|x| half((x * 64.0) as i64)).collect() };
    let (a, b) = (cut(noise(32 * k, 4)), cut(noise(8 * k, 5)));
    let mut dev = Device::new(PROGRAMS);
    let (pa, pb) = (dev.halves(&a), dev.halves(&b));
    let pd = dev.alloc(32 * 8 * 2);
    let one = || shape([1, 1, 1], 32, 0, None);
    dev.launch("wmma_half", one(), &[&pa, &pb, &pd, &(k as i32)]);
    for (i, x) in dev.read_halves(pd, 32 * 8).into_iter().enumerate() {
        let (row, col) = (i % 32, i / 32);
        let part = |l: usize| of_half(a[l * 32 + row]) * of_half(b[l * 8 + col]);
        let want: f64 = (0..k).map(part).sum();
        // Three roundings to 11 bits, of sums that are as large as the products so far.
        let bound = (0..3).map(|t| (0..16 * (t + 1)).map(part).sum::<f64>().abs() / 2048.0 + 1e-6).sum::<f64>();
        let got = of_half(x);
        assert!((got - want).abs() <= bound, "({row}, {col}): {got}, expected {want}");
    }
}

#[test]
fn byte_program_is_exact() {
    let k = 80;
    let bytes = |n: usize, seed| -> Vec<i8> { noise(n, seed).into_iter().map(|x| (x * 128.0) as i8).collect() };
    let (a, b) = (bytes(8 * k, 6), bytes(32 * k, 7));
    let words = |v: &[i8]| -> Vec<i32> {
        let one = |c: &[i8]| i32::from_le_bytes([c[0] as u8, c[1] as u8, c[2] as u8, c[3] as u8]);
        v.chunks(4).map(one).collect()
    };
    let mut dev = Device::new(PROGRAMS);
    let (pa, pb) = (dev.ints(&words(&a)), dev.ints(&words(&b)));
    let pd = dev.alloc(8 * 32 * 4);
    dev.launch("wmma_bytes", shape([1, 1, 1], 32, 0, None), &[&pa, &pb, &pd, &(k as i32)]);
    for (i, x) in dev.read(pd, 8 * 32).into_iter().enumerate() {
        let (row, col) = (i / 32, i % 32);
        let product = |l: usize| i32::from(a[row * k + l]) * i32::from(b[col * k + l]);
        let want: i32 = (0..k).map(product).sum();
        assert_eq!(x.to_bits() as i32, want, "({row}, {col})");
    }
}

#[test]
fn tf32_program_matches_f64() {
    let k = 40;
    let (a, b) = (noise(16 * k, 8), noise(16 * k, 9));
    // Nearest number of 11 bits, ties away from zero.
    let round = |x: f32| f64::from(f32::from_bits(x.to_bits().wrapping_add(0x1000) & !0x1fff));
    let want: Vec<f64> =
        (0..256).map(|i| (0..k).map(|l| round(a[i / 16 * k + l]) * round(b[l * 16 + i % 16])).sum()).collect();
    let mut dev = Device::new(PROGRAMS);
    let (pa, pb) = (dev.floats(&a), dev.floats(&b));
    let pd = dev.alloc(1024);
    dev.launch("wmma_tf32", shape([1, 1, 1], 32, 0, None), &[&pa, &pb, &pd, &(k as i32)]);
    close("wmma_tf32", &dev.read(pd, 256), &want, |_| 1e-5);
}
