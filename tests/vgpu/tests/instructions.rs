//! Single instructions against references written from the PTX ISA text, over edge values.

use vgpu::{Config, Memory, Module};

/// Runs `body` once per case: `%a %b %c` hold the three inputs (64-bit registers; use `cvt` or `mov` in the body to narrow),
/// `%d` is stored as the result.
fn run(body: &str, cases: &[[u64; 3]]) -> Vec<u64> {
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.entry k(.param .u64 in, .param .u64 out, .param .u32 n) {{
        .reg .b64 %a, %b, %c, %d, %p<6>; .reg .b32 %r<9>, %t, %n, %x, %y, %z, %o; .reg .b16 %h<4>; .reg .pred %q<4>;
        ld.param.u64 %p0, [in]; ld.param.u64 %p1, [out]; ld.param.u32 %n, [n];
        mov.u32 %r0, %ctaid.x; mov.u32 %r1, %tid.x; shl.b32 %r2, %r0, 5; add.u32 %t, %r2, %r1;
        setp.ge.u32 %q0, %t, %n; @%q0 ret;
        mul.wide.u32 %p2, %t, 24; add.u64 %p3, %p0, %p2;
        ld.global.u64 %a, [%p3]; ld.global.u64 %b, [%p3+8]; ld.global.u64 %c, [%p3+16];
        cvt.u32.u64 %x, %a; cvt.u32.u64 %y, %b; cvt.u32.u64 %z, %c; mov.u64 %d, 0; mov.u32 %o, 0;
        {body}
        mul.wide.u32 %p2, %t, 8; add.u64 %p3, %p1, %p2; st.global.u64 [%p3], %d; ret; }}"
    );
    let mut m = Memory::new();
    let module = Module::load(&text, &mut m).unwrap_or_else(|e| panic!("{body}: {e}"));
    let bytes: Vec<u8> = cases.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
    let (a, b) = (m.alloc(bytes.len()).unwrap(), m.alloc(cases.len() * 8).unwrap());
    m.write(a, &bytes).unwrap();
    let n = cases.len() as u32;
    let shape = Config { grid: [n.div_ceil(32), 1, 1], ..Config::default() };
    module.launch("k", &shape, &[&a.to_le_bytes(), &b.to_le_bytes(), &n.to_le_bytes()], &m).unwrap();
    let mut out = vec![0; cases.len() * 8];
    m.read(b, &mut out).unwrap();
    out.chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect()
}

/// All triples of the values (the third one moves with the first two, to keep the number down).
fn triples(v: &[u64]) -> Vec<[u64; 3]> {
    let n = v.len();
    (0..n * n).map(|i| [v[i / n], v[i % n], v[(i / n + 3 * (i % n) + i / 7) % n]]).collect()
}

const INTS: [u64; 18] = [
    0,
    1,
    2,
    7,
    31,
    32,
    33,
    0x7f,
    0x80,
    0xff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_fff9,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
];

fn check(op: &str, body: &str, want: impl Fn(u64, u64, u64) -> u64) {
    check_on(op, body, &triples(&INTS), want);
}

fn check_on(op: &str, body: &str, cases: &[[u64; 3]], want: impl Fn(u64, u64, u64) -> u64) {
    for (case, got) in cases.iter().zip(run(body, cases)) {
        let w = want(case[0], case[1], case[2]);
        assert_eq!(got, w, "{op} of {case:x?}: {got:#x}, expected {w:#x}");
    }
}

/// `op %o, %x, %y[, %z]` on 32 bits.
fn word(op: &str, operands: &str, want: impl Fn(u32, u32, u32) -> u32) {
    check(op, &format!("{op} %o, {operands}; cvt.u64.u32 %d, %o;"), |a, b, c| {
        u64::from(want(a as u32, b as u32, c as u32))
    });
}

/// `op %d, %a, %b[, %c]` on 64 bits.
fn long(op: &str, operands: &str, want: impl Fn(u64, u64, u64) -> u64) {
    check(op, &format!("{op} %d, {operands};"), want);
}

#[test]
fn integer_arithmetic() {
    let two = "%x, %y";
    word("add.u32", two, |a, b, _| a.wrapping_add(b));
    word("sub.s32", two, |a, b, _| a.wrapping_sub(b));
    word("add.sat.s32", two, |a, b, _| (a as i32).saturating_add(b as i32) as u32);
    word("mul.lo.s32", two, |a, b, _| a.wrapping_mul(b));
    word("mul.hi.u32", two, |a, b, _| ((a as u128 * b as u128) >> 32) as u32);
    word("mul.hi.s32", two, |a, b, _| ((a as i32 as i128 * b as i32 as i128) >> 32) as u32);
    word("mad.lo.u32", "%x, %y, %z", |a, b, c| (a as u128 * b as u128 + c as u128) as u32);
    word("mad.hi.u32", "%x, %y, %z", |a, b, c| (((a as u128 * b as u128) >> 32) + c as u128) as u32);
    word("div.u32", two, |a, b, _| a.checked_div(b).unwrap_or(!0));
    word("div.s32", two, |a, b, _| if b == 0 { !0 } else { (a as i32 as i64 / b as i32 as i64) as u32 });
    word("rem.u32", two, |a, b, _| a.checked_rem(b).unwrap_or(a));
    word("rem.s32", two, |a, b, _| if b == 0 { a } else { (a as i32 as i64 % b as i32 as i64) as u32 });
    word("min.s32", two, |a, b, _| if (a as i32) < b as i32 { a } else { b });
    word("max.u32", two, |a, b, _| if a > b { a } else { b });
    word("neg.s32", "%x", |a, _, _| (!a).wrapping_add(1));
    word("abs.s32", "%x", |a, _, _| if a >> 31 == 1 { (!a).wrapping_add(1) } else { a });
    long("add.s64", "%a, %b", u64_add);
    long("mul.lo.s64", "%a, %b", |a, b, _| (a as u128 * b as u128) as u64);
    long("mul.hi.u64", "%a, %b", |a, b, _| ((a as u128 * b as u128) >> 64) as u64);
    long("div.u64", "%a, %b", |a, b, _| a.checked_div(b).unwrap_or(!0));
    long("mul.wide.s32", "%x, %y", |a, b, _| (a as u32 as i32 as i128 * b as u32 as i32 as i128) as u64);
    long("mul.wide.u32", "%x, %y", |a, b, _| (a as u32 as u128 * b as u32 as u128) as u64);
    long("mad.wide.s32", "%x, %y, %c", |a, b, c| {
        (a as u32 as i32 as i128 * b as u32 as i32 as i128 + c as i128) as u64
    });
}

fn u64_add(a: u64, b: u64, _: u64) -> u64 {
    (u128::from(a) + u128::from(b)) as u64
}

#[test]
fn logic_shifts_and_bit_fields() {
    let two = "%x, %y";
    word("and.b32", two, |a, b, _| a & b);
    word("or.b32", two, |a, b, _| a | b);
    word("xor.b32", two, |a, b, _| a ^ b);
    word("not.b32", "%x", |a, _, _| !a);
    word("shl.b32", two, |a, b, _| if b > 31 { 0 } else { a << b });
    word("shr.u32", two, |a, b, _| if b > 31 { 0 } else { a >> b });
    word("shr.s32", two, |a, b, _| (a as i32 as i64 >> b.min(40)) as u32);
    long("shl.b64", "%a, %y", |a, b, _| if b as u32 > 63 { 0 } else { a << (b as u32) });
    long("shr.s64", "%a, %y", |a, b, _| (a as i64 as i128 >> (b as u32).min(90)) as u64);
    word("shf.l.wrap.b32", "%x, %y, %z", |a, b, c| (((b as u64) << 32 | a as u64) << (c % 32) >> 32) as u32);
    word("shf.r.clamp.b32", "%x, %y, %z", |a, b, c| (((b as u64) << 32 | a as u64) >> c.min(32)) as u32);
    word("popc.b32", "%x", |a, _, _| (0..32).map(|i| a >> i & 1).sum());
    word("clz.b32", "%x", |a, _, _| (0..32).take_while(|i| a >> (31 - i) & 1 == 0).count() as u32);
    word("brev.b32", "%x", |a, _, _| (0..32).fold(0, |o, i| o | (a >> i & 1) << (31 - i)));
    word("bfind.u32", "%x", |a, _, _| (0..32).rev().find(|i| a >> i & 1 == 1).unwrap_or(!0));
    word("bfind.s32", "%x", |a, _, _| (0..32).rev().find(|i| a >> i & 1 != a >> 31).unwrap_or(!0));
    word("bfe.u32", "%x, %y, %z", |a, b, c| {
        let (p, n) = (b & 255, c & 255);
        (0..32).fold(0, |o, i| o | u32::from(i < n && p + i < 32 && a >> (p + i) & 1 == 1) << i)
    });
    word("bfi.b32", "%x, %y, %z, 5", |a, b, c| {
        let p = c & 255;
        (0..32).fold(0, |o, i| o | (if i >= p && i < p + 5 { a >> (i - p) } else { b >> i } & 1) << i)
    });
    word("lop3.b32", "%x, %y, %z, 0xe8", |a, b, c| a & b | a & c | b & c);
    word("prmt.b32", "%x, %y, 0x5410", |a, b, _| a & 0xffff | b << 16);
    word("dp4a.u32.u32", "%x, %y, %z", |a, b, c| {
        (0..4).fold(c, |s, i| s.wrapping_add((a >> (8 * i) & 255) * (b >> (8 * i) & 255)))
    });
}

#[test]
fn comparisons_and_selection() {
    for (name, f) in [("eq", i32::eq as fn(&i32, &i32) -> bool), ("lt", i32::lt), ("ge", i32::ge), ("ne", i32::ne)] {
        let body = format!("setp.{name}.s32 %q1, %x, %y; selp.u64 %d, 1, 0, %q1;");
        check(name, &body, |a, b, _| u64::from(f(&(a as i32), &(b as i32))));
    }
    let body = "setp.lt.u64 %q1, %a, %b; setp.gt.and.u32 %q2|%q3, %x, %y, !%q1; selp.u64 %p4, 2, 0, %q3; selp.u64 %d, 1, %p4, %q2;";
    check("setp with and", body, |a, b, _| match (a < b, a as u32 > b as u32) {
        (true, _) => 0,
        (false, true) => 1,
        (false, false) => 2,
    });
}

/// Floats at the edges, as f32 bits.
fn edges32() -> Vec<[u64; 3]> {
    let v: Vec<u64> = [
        0.0f32,
        -0.0,
        1.0,
        -1.0,
        1.5,
        1e-45,
        -1e-45,
        1.1754942e-38,
        f32::MIN_POSITIVE,
        f32::MAX,
        f32::MIN,
        16_777_217.0,
        0.333_333_34,
        3.0,
        1e-30,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        1.000_000_1,
        -0.999_999_94,
    ]
    .iter()
    .map(|x| u64::from(x.to_bits()))
    .collect();
    triples(&v)
}

fn float(op: &str, operands: &str, want: impl Fn(f32, f32, f32) -> f32) {
    let f = |x: u64| f32::from_bits(x as u32);
    check_on(op, &format!("{op} %o, {operands}; cvt.u64.u32 %d, %o;"), &edges32(), |a, b, c| {
        let w = want(f(a), f(b), f(c));
        u64::from(if w.is_nan() { 0x7fff_ffff } else { w.to_bits() })
    });
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

#[test]
fn single_precision() {
    let two = "%x, %y";
    float("add.f32", two, |a, b, _| a + b);
    float("sub.rn.f32", two, |a, b, _| a - b);
    float("mul.f32", two, |a, b, _| a * b);
    float("div.rn.f32", two, |a, b, _| a / b);
    float("sqrt.rn.f32", "%x", |a, _, _| a.sqrt());
    float("rcp.rn.f32", "%x", |a, _, _| 1.0 / a);
    float("fma.rn.f32", "%x, %y, %z", f32::mul_add);
    float("add.ftz.f32", two, |a, b, _| flush(flush(a) + flush(b)));
    float("mul.ftz.f32", two, |a, b, _| flush(flush(a) * flush(b)));
    float("add.sat.f32", two, |a, b, _| if a + b > 0.0 { (a + b).min(1.0) } else { 0.0 });
    float("min.f32", two, |a, b, _| match () {
        () if a == b => {
            if a.is_sign_negative() {
                a
            } else {
                b
            }
        }
        () => a.min(b),
    });
    float("max.NaN.f32", two, |a, b, _| match () {
        () if a.is_nan() || b.is_nan() => f32::NAN,
        () if a == b => {
            if a.is_sign_negative() {
                b
            } else {
                a
            }
        }
        () => a.max(b),
    });
    float("cvt.rni.f32.f32", "%x", |a, _, _| a.round_ties_even());
    float("cvt.rmi.f32.f32", "%x", |a, _, _| a.floor());
    float("cvt.sat.f32.f32", "%x", |a, _, _| if a > 0.0 { a.min(1.0) } else { 0.0 });
}

/// Directed results bracket the exact value: checked by their neighbours in double precision where that is exact.
#[test]
fn directed_rounding() {
    let f = |x: u64| f32::from_bits(x as u32);
    let cases: Vec<[u64; 3]> = edges32().into_iter().filter(|c| c.iter().all(|x| f(*x).is_finite())).collect();
    for op in ["mul", "div"] {
        let get = |mode: &str| run(&format!("{op}.{mode}.f32 %o, %x, %y; cvt.u64.u32 %d, %o;"), &cases);
        let (down, up, zero, near) = (get("rm"), get("rp"), get("rz"), get("rn"));
        for (i, c) in cases.iter().enumerate() {
            let (a, b) = (f64::from(f(c[0])), f64::from(f(c[1])));
            if op == "div" && b == 0.0 {
                continue;
            }
            // The product is exact in double precision; of the quotient the sign of the remainder is.
            let below = |x: f32| {
                if op == "mul" { f64::from(x) <= a * b } else { (a - f64::from(x) * b) * b.signum() >= 0.0 }
            };
            let above = |x: f32| {
                if op == "mul" { f64::from(x) >= a * b } else { (a - f64::from(x) * b) * b.signum() <= 0.0 }
            };
            let (d, u, z, n) = (f(down[i]), f(up[i]), f(zero[i]), f(near[i]));
            assert!(below(d) && (above(d.next_up()) || d == u), "{op}.rm {a} {b}: {d}");
            assert!(above(u) && (below(u.next_down()) || d == u), "{op}.rp {a} {b}: {u}");
            assert!(z == if n.is_sign_negative() { u } else { d }, "{op}.rz {a} {b}: {z}");
            assert!(n == d || n == u, "{op}.rn {a} {b}: {n}");
        }
    }
    let body = |m: &str| format!("add.{m}.f32 %o, %x, %y; cvt.u64.u32 %d, %o;");
    let one = [[u64::from(1f32.to_bits()), u64::from(1e-30f32.to_bits()), 0]];
    let bits = |m: &str| f(run(&body(m), &one)[0]);
    assert_eq!((bits("rm"), bits("rp"), bits("rz")), (1.0, 1f32.next_up(), 1.0));
    let cancel = [[u64::from(1f32.to_bits()), u64::from((-1f32).to_bits()), 0]];
    assert_eq!(run(&body("rm"), &cancel)[0], 0x8000_0000);
}

#[test]
fn double_precision() {
    let v: Vec<u64> = [0.0f64, -0.0, 1.0, -3.0, 1e300, 5e-324, f64::MAX, f64::INFINITY, 1.0 / 3.0, f64::EPSILON]
        .map(f64::to_bits)
        .to_vec();
    let cases = triples(&v);
    let f = f64::from_bits;
    let same = |op: &str, operands: &str, want: &dyn Fn(f64, f64, f64) -> f64| {
        for (c, got) in cases.iter().zip(run(&format!("{op} %d, {operands};"), &cases)) {
            let w = want(f(c[0]), f(c[1]), f(c[2]));
            assert!(got == w.to_bits() || f(got).is_nan() && w.is_nan(), "{op} {c:x?}: {} {w}", f(got));
        }
    };
    same("add.f64", "%a, %b", &|a, b, _| a + b);
    same("mul.f64", "%a, %b", &|a, b, _| a * b);
    same("fma.rn.f64", "%a, %b, %c", &f64::mul_add);
    same("div.rn.f64", "%a, %b", &|a, b, _| a / b);
    same("sqrt.rn.f64", "%a", &|a, _, _| a.sqrt());
    let one = [[1f64.to_bits(), 1e-300f64.to_bits(), 0]];
    assert_eq!(f(run("add.rp.f64 %d, %a, %b;", &one)[0]), 1f64.next_up());
    assert_eq!(f(run("sub.rz.f64 %d, %a, %b;", &one)[0]), 1f64.next_down());
}

#[test]
fn conversions() {
    check("cvt.s64.s32", "cvt.s64.s32 %d, %x;", |a, _, _| a as u32 as i32 as i64 as u64);
    check("cvt.u32.u8", "cvt.u32.u8 %o, %x; cvt.u64.u32 %d, %o;", |a, _, _| a & 255);
    check("cvt.s32.s8", "cvt.s32.s8 %o, %x; cvt.u64.u32 %d, %o;", |a, _, _| u64::from(a as u8 as i8 as i32 as u32));
    check("cvt.sat.u8.s32", "cvt.sat.u8.s32 %o, %x; cvt.u64.u32 %d, %o;", |a, _, _| {
        (a as u32 as i32).clamp(0, 255) as u64
    });
    check("cvt.rn.f32.u64", "cvt.rn.f32.u64 %o, %a; cvt.u64.u32 %d, %o;", |a, _, _| u64::from((a as f32).to_bits()));
    let to = |x: u64| f32::from_bits(x as u32);
    check_on("cvt.rni.s32.f32", "cvt.rni.s32.f32 %o, %x; cvt.u64.u32 %d, %o;", &edges32(), |a, _, _| {
        u64::from(to(a).round_ties_even() as i32 as u32)
    });
    check_on("cvt.rn.bf16.f32", "cvt.rn.bf16.f32 %h0, %x; cvt.u64.u16 %d, %h0;", &edges32(), |a, _, _| {
        // The nearest of the two bf16 neighbours, ties to the even one.
        let (x, low) = (to(a), (a >> 16) as u32);
        if x.is_nan() {
            return 0x7fff;
        }
        let rest = a & 0xffff;
        u64::from(low + u32::from(rest > 0x8000 || rest == 0x8000 && low & 1 == 1))
    });
    let all: Vec<[u64; 3]> = (0..0x10000).step_by(7).map(|x| [x, 0, 0]).collect();
    check_on(
        "f16 there and back",
        "cvt.u16.u64 %h0, %a; cvt.f32.f16 %x, %h0; cvt.rn.f16.f32 %h1, %x; cvt.u64.u16 %d, %h1;",
        &all,
        |a, _, _| {
            if a & 0x7fff > 0x7c00 { 0x7fff } else { a }
        },
    );
    let half = [[65519f32, 65504.0], [65520.0, f32::INFINITY], [5.9604645e-8, 5.9604645e-8], [2.9e-8, 0.0]];
    for [x, y] in &half {
        let got =
            run("cvt.rn.f16.f32 %h0, %x; cvt.f32.f16 %o, %h0; cvt.u64.u32 %d, %o;", &[[u64::from(x.to_bits()), 0, 0]]);
        assert_eq!(to(got[0]), *y, "f16 of {x}");
    }
}

#[test]
fn sixteen_bit_arithmetic() {
    // 1 + 2^-8 in bf16 is a tie that goes to the even 1; 1 + 3 * 2^-8 goes up to 1 + 2^-6.
    let bf = |x: f32| u64::from(x.to_bits() >> 16);
    let body = "cvt.u16.u64 %h0, %a; cvt.u16.u64 %h1, %b; cvt.u16.u64 %h2, %c; fma.rn.bf16 %h3, %h0, %h1, %h2; cvt.u64.u16 %d, %h3;";
    let cases = [[bf(1.0), bf(0.00390625), bf(1.0)], [bf(3.0), bf(0.00390625), bf(1.0)], [bf(-2.0), bf(3.0), bf(6.0)]];
    assert_eq!(run(body, &cases), [bf(1.0), bf(1.015625), bf(0.0)]);
    // A product far below the half ulp of the sum still breaks the tie upwards.
    let f16 = "cvt.u16.u64 %h0, %a; cvt.u16.u64 %h1, %b; cvt.u16.u64 %h2, %c; fma.rn.f16 %h3, %h0, %h1, %h2; cvt.u64.u16 %d, %h3;";
    assert_eq!(run(f16, &[[0x3c00, 0x3c00, 0x4000], [0x0001, 0x0001, 0x3c00]]), [0x4200, 0x3c00]);
    let pair = "fma.rn.bf16x2 %o, %x, %y, %z; cvt.u64.u32 %d, %o;";
    let both = |a: f32, b: f32| bf(a) << 16 | bf(b);
    assert_eq!(run(pair, &[[both(2.0, 3.0), both(4.0, 5.0), both(1.0, -1.0)]]), [both(9.0, 14.0)]);
}

/// 128-bit sums, differences and products by carries, as compilers write them.
#[test]
fn carry_chains() {
    let wide = |lo: u64, hi: u64| u128::from(hi) << 64 | u128::from(lo);
    let cases = triples(&INTS);
    for (op, f) in [("add", u128::wrapping_add as fn(u128, u128) -> u128), ("sub", u128::wrapping_sub)] {
        let words = format!(
            "mov.b64 {{%r0, %r1}}, %a; mov.b64 {{%r2, %r3}}, %b; mov.b64 {{%r4, %r5}}, %c;
            {op}.cc.u32 %r6, %r0, %r2; {op}c.cc.u32 %r7, %r1, %r3; {op}c.u32 %r8, %r4, %r5; "
        );
        let longs = format!("{op}.cc.u64 %p4, %a, %b; {op}c.cc.s64 %p5, %b, %c; {op}c.s64 %d, 0, 0;");
        for (c, got) in cases.iter().zip(run(&(words.clone() + "mov.b64 %d, {%r6, %r7};"), &cases)) {
            assert_eq!(got, f(c[0].into(), c[1].into()) as u64, "{op} {c:x?}");
        }
        for (c, got) in cases.iter().zip(run(&(words + "cvt.u64.u32 %d, %r8;"), &cases)) {
            // The third step takes the carry out of the second.
            let (_, carry) = if op == "add" { c[0].overflowing_add(c[1]) } else { c[0].overflowing_sub(c[1]) };
            let (x, y) = (c[2] as u32, (c[2] >> 32) as u32);
            let want = f(u128::from(x), u128::from(y)).wrapping_add(if carry { f(0, 1) } else { 0 }) as u32;
            assert_eq!(got, u64::from(want), "{op} {c:x?}");
        }
        for (c, got) in cases.iter().zip(run(&longs, &cases)) {
            let sum = f(wide(c[0], c[1]), wide(c[1], c[2]));
            let out =
                if op == "add" { wide(c[1], 0) + wide(c[2], 0) + u128::from(c[0].overflowing_add(c[1]).1) } else { 0 };
            let carry = if op == "add" { out >> 64 != 0 } else { sum > wide(c[0], c[1]) };
            assert_eq!(got, if carry { f(0, 1) as u64 } else { 0 }, "{op} {c:x?}");
        }
    }
    // The product of two doublewords, low words first.
    let body = "mov.b64 {%r0, %r1}, %a; mov.b64 {%r2, %r3}, %b; mul.lo.u32 %r4, %r0, %r2; mul.hi.u32 %r5, %r0, %r2;
        mov.u32 %r6, 0; mov.u32 %r7, 0; mad.lo.cc.u32 %r5, %r0, %r3, %r5; madc.hi.u32 %r6, %r0, %r3, %r6;
        mad.lo.cc.u32 %r5, %r1, %r2, %r5; madc.hi.cc.u32 %r6, %r1, %r2, %r6; addc.u32 %r7, %r7, 0;
        mad.lo.cc.u32 %r6, %r1, %r3, %r6; madc.hi.u32 %r7, %r1, %r3, %r7; ";
    for (c, got) in cases.iter().zip(run(&format!("{body} mov.b64 %d, {{%r6, %r7}};"), &cases)) {
        assert_eq!(got, ((u128::from(c[0]) * u128::from(c[1])) >> 64) as u64, "{c:x?}");
    }
    for (c, got) in cases.iter().zip(run(&format!("{body} mov.b64 %d, {{%r4, %r5}};"), &cases)) {
        assert_eq!(got, c[0].wrapping_mul(c[1]), "{c:x?}");
    }
    let borrow = "sub.cc.u32 %o, %x, %y; subc.u32 %r0, %z, 0; addc.u32 %r1, 0, 0; mov.b64 %d, {%o, %r0};";
    for (c, got) in cases.iter().zip(run(borrow, &cases)) {
        let (low, b) = (c[0] as u32).overflowing_sub(c[1] as u32);
        let high = (c[2] as u32).wrapping_sub(u32::from(b));
        assert_eq!(got, u64::from(low) | u64::from(high) << 32, "{c:x?}");
    }
    let signed = "mad.hi.cc.s32 %o, %x, %y, %z; madc.lo.s32 %r0, 0, 0, 0; mov.b64 %d, {%o, %r0};";
    for (c, got) in cases.iter().zip(run(signed, &cases)) {
        let high = ((i64::from(c[0] as i32) * i64::from(c[1] as i32)) >> 32) as u32;
        let (sum, carry) = high.overflowing_add(c[2] as u32);
        assert_eq!(got, u64::from(sum) | u64::from(carry) << 32, "{c:x?}");
    }
}
