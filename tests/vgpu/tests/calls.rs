//! Calls of device functions, tables of branches, `printf` and `assert`.

use std::sync::{Arc, Mutex};

use vgpu::{Config, Error, FaultKind, Memory, Module, Output};

const HEAD: &str = ".version 8.0\n.target sm_80\n.address_size 64\n";

/// Loads the functions and `body` as a kernel over 32 threads; `%o` is stored for each.
fn run(functions: &str, body: &str) -> Result<Vec<u32>, Error> {
    let text = format!(
        "{HEAD}{functions}\n.visible .entry k(.param .u64 out) {{
        .reg .b64 %p<9>; .reg .b32 %r<20>, %t, %o; .reg .f32 %f<9>; .reg .pred %q<4>;
        mov.u32 %t, %tid.x; mov.u32 %o, 0;
        {body}
        DONE: ld.param.u64 %p0, [out]; mul.wide.u32 %p1, %t, 4; add.u64 %p2, %p0, %p1; st.global.u32 [%p2], %o; ret; }}"
    );
    let mut m = Memory::new();
    let module = Module::load(&text, &mut m)?;
    let out = m.alloc(128)?;
    module.launch("k", &Config::default(), &[&out.to_le_bytes()], &m)?;
    let mut bytes = vec![0; 128];
    m.read(out, &mut bytes)?;
    Ok(bytes.chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect())
}

fn refused(functions: &str, body: &str, message: &str) {
    match run(functions, body) {
        Err(Error::Unsupported { message: m, text, line, .. }) => {
            assert!(m.contains(message), "{m}: expected {message}");
            assert!(!text.is_empty() && line > 3, "{text} at {line}");
        }
        other => panic!("expected a refusal with {message}, found {other:?}"),
    }
}

const TWICE: &str = ".func (.param .b32 back) twice(.param .b32 x) {
    .reg .b32 %r<3>; .reg .pred %p; ld.param.u32 %r0, [x]; setp.gt.u32 %p, %r0, 20; @%p bra BIG;
    add.u32 %r1, %r0, %r0; st.param.b32 [back], %r1; ret; BIG: st.param.b32 [back+0], 7; ret; }";

#[test]
fn parameters_go_through_memory_and_lanes_return_apart() {
    let body =
        "{ .param .b32 a; .param .b32 b; st.param.b32 [a], %t; call.uni (b), twice, (a); ld.param.b32 %r1, [b]; }
        { .param .b32 a; .param .b32 b; st.param.b32 [a+0], %r1; call (b), twice, (a); ld.param.b32 %o, [b]; }";
    for (t, o) in run(TWICE, body).unwrap().into_iter().enumerate() {
        let twice = |x: usize| if x > 20 { 7 } else { 2 * x };
        assert_eq!(o as usize, twice(twice(t)), "thread {t}");
    }
}

#[test]
fn guarded_calls_and_register_parameters() {
    let functions = ".func (.reg .b32 back) plus(.reg .b32 x, .reg .b32 y) { add.u32 back, x, y; ret; }";
    let body =
        "setp.lt.u32 %q0, %t, 10; mov.u32 %r1, 100; @%q0 call (%o), plus, (%t, %r1); @!%q0 call (%o), plus, (%t, 1);";
    for (t, o) in run(functions, body).unwrap().into_iter().enumerate() {
        assert_eq!(o as usize, if t < 10 { t + 100 } else { t + 1 });
    }
}

#[test]
fn structures_pass_by_value_and_address() {
    // The callee takes the address of its parameter and walks over it.
    let functions = ".func (.param .b32 back) sum(.param .align 8 .b8 s[16]) {
        .reg .b64 %p<4>; .reg .b32 %r<4>; .local .align 4 .b8 seen[4];
        mov.b64 %p0, s; cvta.local.u64 %p1, %p0; ld.u32 %r0, [%p1]; ld.u32 %r1, [%p1+12]; add.u32 %r2, %r0, %r1;
        st.local.u32 [seen], %r2; ld.local.u32 %r3, [seen]; st.param.b32 [back], %r3; ret; }";
    let body = "{ .param .align 8 .b8 s[16]; .param .b32 b; st.param.b32 [s], %t; st.param.b64 [s+8], 0x500000000;
        call.uni (b), sum, (s); ld.param.b32 %o, [b]; }";
    for (t, o) in run(functions, body).unwrap().into_iter().enumerate() {
        assert_eq!(o as usize, t + 5);
    }
}

#[test]
fn functions_call_functions_and_share_one_shared_variable() {
    let functions = format!(
        "{TWICE}
        .func (.param .b32 back) four(.param .b32 x) {{ .reg .b32 %r<3>; .shared .u32 count; ld.param.u32 %r0, [x];
        red.shared.add.u32 [count], 1;
        {{ .param .b32 a; .param .b32 b; st.param.b32 [a], %r0; call.uni (b), twice, (a); ld.param.b32 %r1, [b]; }}
        {{ .param .b32 a; .param .b32 b; st.param.b32 [a], %r1; call.uni (b), twice, (a); ld.param.b32 %r2, [b]; }}
        st.param.b32 [back], %r2; ret; }}"
    );
    let body = "{ .param .b32 a; .param .b32 b; st.param.b32 [a], 3; call.uni (b), four, (a); ld.param.b32 %o, [b]; }";
    match run(&functions, body) {
        // The count is never initialised, which the checks must see through the call.
        Err(Error::Fault(f)) => assert_eq!(f.kind, FaultKind::Uninitialised),
        other => panic!("expected a fault, found {other:?}"),
    }
    let functions = functions.replace("red.shared.add.u32 [count], 1;", "");
    assert_eq!(run(&functions, body).unwrap(), vec![12; 32]);
}

#[test]
fn what_calls_cannot_do_is_said() {
    let loops = ".func again() { call again; ret; }";
    refused(loops, "call again;", "recursion");
    let pair = ".func a();\n.func b() { call a; ret; }\n.func a() { call b; ret; }";
    refused(pair, "call a;", "recursion");
    refused("", "call nobody;", "unknown function nobody");
    refused(".extern .func away();", "call away;", "no body");
    refused(TWICE, "call.uni (%r0), twice, (%r1, %r2);", "takes 1 arguments");
    refused(TWICE, "mov.u64 %p0, 0; P: .callprototype ()_ (); call %p0, P;", "through a register");
    let big = TWICE.replace(".param .b32 x", ".param .b64 x").replace("u32 %r0, [x]", "b32 %r0, [x]");
    refused(&big, "{ .param .b32 a; .param .b32 b; call (b), twice, (a); }", "does not fit");
    // Each level calls the next twice: 2^60 copies if nothing stopped it.
    let mut doubling = String::from(".func f0() { ret; }\n");
    for i in 1..60 {
        let below = i - 1;
        doubling += &format!(".func f{i}() {{ call f{below}; call f{below}; ret; }}\n");
    }
    refused(&doubling, "call f59;", "too large");
}

#[test]
fn branch_tables_go_where_they_say() {
    let body = "T: .branchtargets L0, L1, L2; and.b32 %r0, %t, 3; setp.lt.u32 %q0, %r0, 3; @%q0 brx.idx %r0, T;
        mov.u32 %o, 99; bra DONE; L0: mov.u32 %o, 10; bra DONE; L1: mov.u32 %o, 11; bra DONE; L2: mov.u32 %o, 12; bra DONE;";
    for (t, o) in run("", body).unwrap().into_iter().enumerate() {
        assert_eq!(o, [10, 11, 12, 99][t % 4]);
    }
    match run("", "T: .branchtargets DONE; mov.u32 %r0, 1; brx.idx %r0, T;") {
        Err(Error::Fault(f)) => assert_eq!(f.kind, FaultKind::Trap),
        other => panic!("expected a fault, found {other:?}"),
    }
    refused("", "brx.idx %t, NOWHERE;", "a table of labels");
}

/// PTX of a kernel that prints one line per thread of the first two.
fn printing(format: &str, stores: &str) -> String {
    let bytes: Vec<String> = format.bytes().chain([0]).map(|b| b.to_string()).collect();
    format!(
        "{HEAD}.extern .func (.param .b32 r) vprintf(.param .b64 f, .param .b64 a);
        .global .align 1 .b8 text[{}] = {{{}}}; .global .align 1 .b8 word[4] = {{97, 98, 99, 0}};
        .entry k(.param .u64 out) {{ .local .align 8 .b8 buffer[64]; .reg .b64 %p<9>; .reg .b32 %t, %r<3>; .reg .pred %q;
        mov.u32 %t, %tid.x; setp.gt.u32 %q, %t, 1; @%q ret;
        mov.b64 %p0, buffer; cvta.local.u64 %p1, %p0; mov.u64 %p2, text; cvta.global.u64 %p3, %p2;
        mov.u64 %p5, word; cvta.global.u64 %p4, %p5;
        {stores}
        {{ .param .b64 f; .param .b64 a; .param .b32 r; st.param.b64 [f], %p3; st.param.b64 [a], %p1;
        call.uni (r), vprintf, (f, a); ld.param.b32 %r0, [r]; }} ld.param.u64 %p6, [out]; st.global.u32 [%p6], %r0; ret; }}",
        bytes.len(),
        bytes.join(", ")
    )
}

#[test]
fn printf_formats_and_counts_its_arguments() {
    let stores =
        "st.local.u32 [buffer], %t; st.local.f64 [buffer+8], 0d3FF8000000000000; st.local.u64 [buffer+16], %p4;
        st.local.u64 [buffer+24], 0xffffffffffffffff; st.local.u32 [buffer+32], 65;";
    let text = printing("thread %d: %6.2f|%s|%lld|%c|%%\n", stores);
    let mut m = Memory::new();
    let module = Module::load(&text, &mut m).unwrap();
    let seen = Arc::new(Mutex::new(String::new()));
    let sink = Arc::clone(&seen);
    let config = Config { output: Output::new(move |s| sink.lock().unwrap().push_str(s)), ..Config::default() };
    let out = m.alloc(4).unwrap();
    module.launch("k", &config, &[&out.to_le_bytes()], &m).unwrap();
    assert_eq!(*seen.lock().unwrap(), "thread 0:   1.50|abc|-1|A|%\nthread 1:   1.50|abc|-1|A|%\n");
    let mut count = [0; 4];
    m.read(out, &mut count).unwrap();
    assert_eq!(u32::from_le_bytes(count), 5);
}

#[test]
fn printf_of_what_was_never_stored_is_found() {
    let text = printing("%d\n", "");
    let mut m = Memory::new();
    let module = Module::load(&text, &mut m).unwrap();
    let out = m.alloc(4).unwrap();
    match module.launch("k", &Config::default(), &[&out.to_le_bytes()], &m) {
        Err(Error::Fault(f)) => assert_eq!(f.kind, FaultKind::Uninitialised),
        other => panic!("expected a fault, found {other:?}"),
    }
}

#[test]
fn conversions_of_printf_match_c() {
    use vgpu::exec::printf::{Argument, format};
    let one =
        |text: &str, x: u64| format(text.as_bytes(), |_| Ok::<_, ()>((x, b"word".to_vec()))).unwrap().unwrap().text;
    let f = |x: f64| x.to_bits();
    // What the C library prints for the same calls.
    let cases: [(&str, u64, &str); 34] = [
        ("%5d|", 42, "   42|"),
        ("%-5d|", 42, "42   |"),
        ("%05d", (-42i32) as u32 as u64, "-0042"),
        ("%+d", 42, "+42"),
        ("% d", 42, " 42"),
        ("%.4d", 42, "0042"),
        ("%8.4d", 42, "    0042"),
        ("%.0d|", 0, "|"),
        ("%u", u64::from(u32::MAX), "4294967295"),
        ("%d", u64::from(u32::MAX), "-1"),
        ("%hhd", 0x1ff, "-1"),
        ("%hu", 0x1_2345, "9029"),
        ("%llu", u64::MAX, "18446744073709551615"),
        ("%ld", u64::MAX, "-1"),
        ("%x", 0xbeef, "beef"),
        ("%#X", 0xbeef, "0XBEEF"),
        ("%#010x", 0xbeef, "0x0000beef"),
        ("%o", 8, "10"),
        ("%f", f(1.0 / 3.0), "0.333333"),
        ("%10.3f|", f(-2.5), "    -2.500|"),
        ("%-10.1f|", f(2.25), "2.2       |"),
        ("%e", f(12345.678), "1.234568e+04"),
        ("%.2E", f(0.000123), "1.23E-04"),
        ("%g", f(0.0001), "0.0001"),
        ("%g", f(0.00001), "1e-05"),
        ("%g", f(1e10), "1e+10"),
        ("%g", f(100000.0), "100000"),
        ("%g", f(0.1 + 0.2), "0.3"),
        ("%#g", f(1.5), "1.50000"),
        ("%a", f(3.0), "0x1.8p+1"),
        ("%f", f(f64::NAN), "nan"),
        ("%F", f(f64::NEG_INFINITY), "-INF"),
        ("%6s|", 0, "  word|"),
        ("%.2s|", 0, "wo|"),
    ];
    for (text, x, want) in cases {
        assert_eq!(one(text, x), want, "{text}");
    }
    assert!(format(b"%q", |_| Ok::<_, ()>((0, Vec::new()))).unwrap().is_err());
    assert!(format(b"%", |_| Ok::<_, ()>((0, Vec::new()))).unwrap().is_err());
    assert!(format(b"%99999d", |_| Ok::<_, ()>((0, Vec::new()))).unwrap().is_err());
    let mut kinds = Vec::new();
    let printed = format(b"%*d %.*f", |k| {
        kinds.push(k);
        Ok::<_, ()>((if k == Argument::Word { 3 } else { f(1.0) }, Vec::new()))
    });
    assert_eq!(printed.unwrap().unwrap().text, "  3 1.000");
    assert_eq!(kinds, [Argument::Word, Argument::Word, Argument::Word, Argument::Long]);
}

#[test]
fn failed_assertions_name_themselves() {
    let text = |n: &str| n.bytes().chain([0]).map(|b| b.to_string()).collect::<Vec<_>>().join(", ");
    let functions = format!(
        ".extern .func __assertfail(.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d, .param .b64 e);
        .global .b8 message[] = {{{}}}; .global .b8 file[] = {{{}}}; .global .b8 function[] = {{{}}};",
        text("x < 3"),
        text("a.cu"),
        text("k")
    );
    let body = "setp.lt.u32 %q0, %t, 3; @%q0 bra DONE; mov.u64 %p0, message; mov.u64 %p1, file; mov.u64 %p2, function;
        { .param .b64 a; .param .b64 b; .param .b32 c; .param .b64 d; .param .b64 e; st.param.b64 [a], %p0; st.param.b64 [b], %p1;
        st.param.b32 [c], 17; st.param.b64 [d], %p2; st.param.b64 [e], 1; call.uni __assertfail, (a, b, c, d, e); }";
    match run(&functions, body) {
        Err(Error::Fault(f)) => {
            assert_eq!((f.kind, f.thread), (FaultKind::Assert, 3));
            assert_eq!(f.message, "a.cu:17: k: assertion `x < 3` failed");
        }
        other => panic!("expected a fault, found {other:?}"),
    }
}
