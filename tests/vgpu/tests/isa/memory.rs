//! Loads, stores and atomics in every form, address spaces, cache control, asynchronous copies.

use vgpu::exec::forms::forms;
use vgpu::{Config, Memory, Module};

use super::forms::expand;
use super::harness::builds;

const SIZE: usize = 64;

fn pattern(i: usize) -> u8 {
    (137 + 31 * i + i * i) as u8
}

/// Runs a kernel of one thread whose memories all hold the pattern; `out` is 16 long words.
fn run(sm: u32, body: &str) -> Vec<u64> {
    let bytes: Vec<String> = (0..SIZE).map(|i| pattern(i).to_string()).collect();
    let list = bytes.join(", ");
    let text = format!(
        ".version 8.8\n.target sm_{sm}\n.address_size 64\n.global .align 32 .b8 gl[{SIZE}] = {{{list}}};
        .const .align 32 .b8 cc[{SIZE}] = {{{list}}}; .shared .align 32 .b8 sh[{SIZE}];
        .entry k(.param .u64 out, .param .align 32 .b8 kp[{SIZE}]) {{ .local .align 32 .b8 lo[{SIZE}];
        .reg .b64 %out, %g, %l<20>; .reg .b32 %w<20>, %i; .reg .b16 %h<20>; .reg .pred %p<4>;
        ld.param.u64 %out, [out]; mov.u64 %g, gl; mov.u32 %i, 0; mov.u64 %l10, lo;
        FILL: cvt.u64.u32 %l11, %i; add.u64 %l12, %g, %l11; ld.b8 %h0, [%l12]; add.u64 %l13, %l10, %l11; st.local.b8 [%l13], %h0;
        mov.u32 %w10, sh; add.u32 %w10, %w10, %i; st.shared.b8 [%w10], %h0; add.u32 %i, %i, 1; setp.lt.u32 %p0, %i, {SIZE};
        @%p0 bra FILL;
        {body} ret; }}"
    );
    let mut out = Vec::new();
    for build in builds() {
        let mut m = Memory::new();
        let module = Module::load_for(build, &text, &mut m).unwrap_or_else(|e| panic!("{e}"));
        let address = m.alloc(128).unwrap();
        m.fill(address, 0, 128).unwrap();
        let params: Vec<u8> = (0..SIZE).map(pattern).collect();
        let shape = Config { block: [1, 1, 1], ..Config::default() };
        module.launch("k", &shape, &[&address.to_le_bytes(), &params], &m).unwrap_or_else(|e| panic!("{body}: {e}"));
        let mut bytes = vec![0; 128];
        m.read(address, &mut bytes).unwrap();
        let words: Vec<u64> = bytes.chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect();
        assert!(out.is_empty() || out == words, "{body}: the builds differ");
        out = words;
    }
    out
}

fn address(mods: &[&str]) -> &'static str {
    let has = |m: &str| mods.contains(&m);
    match () {
        () if has("shared") || has("shared::cta") => "sh",
        () if has("const") => "cc",
        () if has("local") => "lo",
        () if has("param") || has("param::entry") => "kp",
        () if has("global") => "gl",
        () => "%g",
    }
}

/// A sample of each form of an opcode, always the same.
fn sample(base: &str, most: usize) -> Vec<(Vec<&'static str>, u32)> {
    let mut out = Vec::new();
    for (_, groups, sm) in forms().filter(|f| f.0 == base) {
        let all: Vec<_> = expand(&groups).into_iter().filter(|m| !m.contains(&"shared::cluster")).collect();
        let step = (all.len() / most).max(1) | 1;
        out.extend(all.into_iter().step_by(step).map(|m| {
            let cluster = if m.contains(&"cluster") { 90 } else { 80 };
            (m, sm.max(cluster))
        }));
    }
    out
}

fn vector(mods: &[&str]) -> usize {
    let n = |m: &&str| m.strip_prefix('v').and_then(|n| n.parse().ok());
    mods.iter().find_map(n).unwrap_or(1)
}

fn size(ty: &str) -> usize {
    ty[1..].parse::<usize>().unwrap() / 8
}

#[test]
fn loads_in_every_form() {
    for (base, most) in [("ld", 40), ("ldu", 40)] {
        for (mods, sm) in sample(base, most) {
            let (n, ty) = (vector(&mods), *mods.last().unwrap());
            let bytes = size(ty);
            // Narrow values go into 32-bit registers, where they are extended.
            let file = if bytes == 8 { "l" } else { "w" };
            let regs: Vec<String> = (0..n).map(|e| format!("%{file}{e}")).collect();
            let list = if n > 1 { format!("{{{}}}", regs.join(", ")) } else { regs[0].clone() };
            let hint = if mods.contains(&"L2::cache_hint") { ", %l19" } else { "" };
            let policy = "createpolicy.fractional.L2::evict_last.b64 %l19, 0f3F800000;";
            let offset = if n * bytes > 16 { 0 } else { 32 };
            let mut body = format!("{policy} {base}.{} {list}, [{}+{offset}]{hint};", mods.join("."), address(&mods));
            for (e, r) in regs.iter().enumerate() {
                let (at, bits) = (8 * e, if file == "l" { 64 } else { 32 });
                body += &format!("st.global.b{bits} [%out+{at}], {r};");
            }
            for (e, got) in run(sm, &body).into_iter().take(n).enumerate() {
                let start = offset + e * bytes;
                let mut want = (0..bytes).fold(0u64, |x, b| x | u64::from(pattern(start + b)) << (8 * b));
                if ty.starts_with('s') && bytes < 4 && want >> (8 * bytes - 1) == 1 {
                    want |= 0xffff_ffff << (8 * bytes) & 0xffff_ffff;
                }
                assert_eq!(got, want, "{base}.{} element {e}", mods.join("."));
            }
        }
    }
}

#[test]
fn stores_in_every_form() {
    for (mods, sm) in sample("st", 40) {
        // Parameters of calls are tested with the calls.
        if mods.contains(&"param") || mods.contains(&"param::func") {
            continue;
        }
        let (n, ty) = (vector(&mods), *mods.last().unwrap());
        let bytes = size(ty);
        let file = ["h", "h", "w", "l"][bytes.trailing_zeros() as usize];
        let bits = (8 * bytes).max(16);
        let value = |e: usize| 0x1122_3344_5566_7788u64.wrapping_mul(2 * e as u64 + 3);
        let mut body = String::from("mov.b64 %l19, 0; ");
        for e in 0..n {
            let x = value(e) & (u64::MAX >> (64 - bits));
            body += &format!("mov.b{bits} %{file}{e}, {x}; ");
        }
        let regs: Vec<String> = (0..n).map(|e| format!("%{file}{e}")).collect();
        let list = if n > 1 { format!("{{{}}}", regs.join(", ")) } else { regs[0].clone() };
        let hint = if mods.contains(&"L2::cache_hint") { ", %l19" } else { "" };
        let place = address(&mods);
        body += &format!("st.{} [{place}], {list}{hint};", mods.join("."));
        let space = match place {
            "sh" => ".shared",
            "lo" => ".local",
            _ => ".global",
        };
        for e in 0..4 {
            let at = 8 * e;
            body += &format!("ld{space}.b64 %l18, [{place}+{at}]; st.global.b64 [%out+{at}], %l18;");
        }
        let got = run(sm, &body);
        let mut want: Vec<u8> = (0..32).map(pattern).collect();
        for e in 0..n {
            want[e * bytes..(e + 1) * bytes].copy_from_slice(&value(e).to_le_bytes()[..bytes]);
        }
        for (e, w) in want.chunks(8).enumerate() {
            assert_eq!(got[e], u64::from_le_bytes(w.try_into().unwrap()), "st.{}", mods.join("."));
        }
    }
}

/// New value of an atomic, from the text of `atom`.
fn atomic(op: &str, ty: &str, old: u64, b: u64, c: u64) -> u64 {
    let signed = |x: u64| {
        if ty == "s32" { i64::from(x as u32 as i32) } else { x as i64 }
    };
    let cut = |x: u64| {
        if ty.ends_with("64") {
            x
        } else if ty == "b16" {
            x & 0xffff
        } else {
            x & 0xffff_ffff
        }
    };
    match (op, ty) {
        ("add", "f32") => u64::from((f32::from_bits(old as u32) + f32::from_bits(b as u32)).to_bits()),
        ("add", "f64") => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        // The halves used are small whole numbers: doubling the exponent field's worth is checked by value.
        ("add", "f16" | "bf16" | "f16x2" | "bf16x2") => {
            let table = if ty.starts_with('b') { BF16 } else { HALF };
            let one = |x: u64, y: u64| {
                let n = |h: u64| table.iter().position(|t| *t == h).unwrap();
                table[n(x & 0xffff) + n(y & 0xffff)]
            };
            if ty.ends_with("x2") { one(old, b) | one(old >> 16, b >> 16) << 16 } else { one(old, b) }
        }
        ("add", _) => cut(old.wrapping_add(b)),
        ("min", t) if t.starts_with('s') => cut(signed(old).min(signed(b)) as u64),
        ("max", t) if t.starts_with('s') => cut(signed(old).max(signed(b)) as u64),
        ("min", _) => old.min(b),
        ("max", _) => old.max(b),
        ("inc", _) => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        ("dec", _) => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
        ("and", _) => old & b,
        ("or", _) => old | b,
        ("xor", _) => old ^ b,
        ("exch", _) => b,
        _ => {
            if old == b {
                c
            } else {
                old
            }
        }
    }
}

/// 0 to 8 in half and bfloat16.
const HALF: [u64; 9] = [0, 0x3c00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4600, 0x4700, 0x4800];
const BF16: [u64; 9] = [0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100];

fn values(ty: &str) -> Vec<(u64, u64)> {
    let pairs = |v: &[u64]| v.iter().flat_map(|a| v.iter().map(move |b| (*a, *b))).collect::<Vec<_>>();
    match ty {
        "f32" => pairs(&[0, 0x3f80_0000, 0xbf00_0000, 0x7f7f_ffff]),
        "f64" => pairs(&[0, 0x3ff0_0000_0000_0000, 0xbfe0_0000_0000_0000]),
        "f16" => pairs(&HALF[..5]),
        "bf16" => pairs(&BF16[..5]),
        "f16x2" => pairs(&[HALF[1] | HALF[2] << 16, HALF[3] | HALF[4] << 16]),
        "bf16x2" => pairs(&[BF16[1] | BF16[2] << 16, BF16[3] | BF16[4] << 16]),
        "b16" => pairs(&[0, 1, 0x8000, 0xffff]),
        t if t.ends_with("64") => pairs(&[0, 1, 7, 1 << 63, u64::MAX, 0x1_0000_0001]),
        _ => pairs(&[0, 1, 7, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff]),
    }
}

#[test]
fn atomics_in_every_form() {
    const OPS: [&str; 10] = ["add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"];
    for (base, most) in [("atom", 5), ("red", 4)] {
        for (mods, sm) in sample(base, most) {
            let ty = *mods.last().unwrap();
            let op = OPS.iter().find(|o| mods.contains(*o)).unwrap();
            let (file, bits) = match ty {
                "f16" | "bf16" | "b16" => ("h", 16),
                t if t.ends_with("64") => ("l", 64),
                _ => ("w", 32),
            };
            let place = address(&mods);
            let space = if place == "sh" { ".shared" } else { ".global" };
            let hint = if mods.contains(&"L2::cache_hint") { ", %l19" } else { "" };
            for (old, b) in values(ty) {
                let c = if bits == 16 { 0x1234 } else { 0x1234_5678 };
                let third = if *op == "cas" { format!(", %{file}3") } else { String::new() };
                let d = if base == "atom" { format!("%{file}1, ") } else { String::new() };
                let body = format!(
                    "mov.b64 %l19, 0; mov.b{bits} %{file}1, {old}; mov.b{bits} %{file}2, {b}; mov.b{bits} %{file}3, {c};
                    st{space}.b{bits} [{place}], %{file}1; {base}.{} {d}[{place}], %{file}2{third}{hint};
                    ld{space}.b{bits} %{file}4, [{place}]; st.global.b{bits} [%out], %{file}4; st.global.b{bits} [%out+8], %{file}1;",
                    mods.join(".")
                );
                let got = run(sm, &body);
                let want = atomic(op, ty, old, b, c);
                assert_eq!((got[0], got[1]), (want, old), "{base}.{} of {old:#x}, {b:#x}", mods.join("."));
            }
        }
    }
}

#[test]
fn windows_of_generic_addresses() {
    let mut body = String::new();
    let spaces = [("global", "gl"), ("shared", "sh"), ("local", "lo"), ("param", "kp"), ("const", "cc")];
    for (n, (space, name)) in spaces.into_iter().enumerate() {
        body += &format!(
            "mov.u64 %l0, {name}; cvta.{space}.u64 %l1, %l0; cvta.to.{space}.u64 %l2, %l1; ld.u32 %w0, [%l1+8];
            setp.eq.u64 %p0, %l0, %l2; selp.u32 %w1, %w0, 0, %p0; st.global.u32 [%out+{}], %w1;",
            8 * n
        );
        if n < 4 {
            body += &format!(
                "isspacep.{space} %p1, %l1; isspacep.shared %p2, %l1; selp.u32 %w2, 1, 0, %p1;
                selp.u32 %w3, 2, 0, %p2; or.b32 %w2, %w2, %w3; st.global.u32 [%out+{}], %w2;",
                8 * n + 64
            );
        }
    }
    let got = run(80, &body);
    let word = (8..12).fold(0u64, |x, b| x | u64::from(pattern(b)) << (8 * (b - 8)));
    assert_eq!(got[..5], [word; 5]);
    assert_eq!(got[8..12], [1, 3, 1, 1]);
}

#[test]
fn cache_control_and_fences_change_nothing() {
    let body = "prefetch.global.L1 [gl]; prefetch.global.L2::evict_last [gl]; prefetch.L2 [%g]; prefetchu.L1 [%g];
        applypriority.global.L2::evict_normal [gl], 128; createpolicy.cvt.L2.b64 %l1, %l0; brkpt; pmevent 1; nanosleep.u32 20;
        createpolicy.range.global.L2::evict_last.L2::evict_first.b64 %l2, [gl], 64, 128; membar.gl; membar.cta; membar.sys;
        fence.sc.gpu; fence.acq_rel.sys; fence.cta; ld.global.u32 %w0, [gl]; st.global.u32 [%out], %w0;";
    let body = format!("mov.b64 %l0, 0; {body} discard.global.L2 [gl], 128;");
    let word = (0..4).fold(0u64, |x, b| x | u64::from(pattern(b)) << (8 * b));
    assert_eq!(run(80, &body)[0], word);
}

#[test]
fn asynchronous_copies_of_every_size() {
    let word = |at: usize, n: usize| (0..n).fold(0u64, |x, b| x | u64::from(pattern(at + b)) << (8 * b));
    for (n, op) in [(4, "ca"), (8, "ca"), (16, "ca"), (16, "cg")] {
        for hint in ["", ".L2::64B", ".L2::128B", ".L2::256B"] {
            // The source lies 16 bytes on, so that what arrives differs from what is there.
            for (rest, bytes) in [("", n), (", %w5", n / 2 + 1), (", %w6", 0), (", %p2", 0), (", !%p2", n)] {
                let body = format!(
                    "mov.u32 %w5, {}; mov.u32 %w6, 0; mov.pred %p2, 1; cp.async.{op}.shared.global{hint} [sh], [gl+16], {n}{rest};
                    cp.async.commit_group; cp.async.wait_group 0; ld.shared.b64 %l0, [sh]; ld.shared.b64 %l1, [sh+8];
                    st.global.b64 [%out], %l0; st.global.b64 [%out+8], %l1;",
                    n / 2 + 1
                );
                let got = run(80, &body);
                let want: Vec<u8> = (0..16)
                    .map(|i| match i {
                        i if i < bytes => pattern(16 + i),
                        i if i < n => 0,
                        i => pattern(i),
                    })
                    .collect();
                let long = |at: usize| u64::from_le_bytes(want[at..at + 8].try_into().unwrap());
                assert_eq!((got[0], got[1]), (long(0), long(8)), "{op} {n}{rest}");
            }
        }
    }
    let body = "cp.async.ca.shared.global [sh], [gl+16], 8; cp.async.wait_all; ld.shared.b64 %l0, [sh]; st.global.b64 [%out], %l0;";
    assert_eq!(run(80, body)[0], word(16, 8));
}
