//! Memory that nobody wrote: loading it is no mistake, using the value is. Pipelines are in `programs/pipelines.rs`.

use vgpu::{Config, Error, Fault, FaultKind, Memory, Module};

/// Runs `body` in one warp. `%w` holds a word that nobody wrote, loaded from `%in`, in lane 5 alone (each lane its own word); `%n` holds
/// one that was written, 7. `%out` has 32 words of room and `%o` is the lane's place in it; `%sm` and `%own` are shared and local.
fn run(body: &str) -> Result<Vec<u32>, Error> {
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64
        .entry k(.param .u64 in, .param .u64 out) {{
        .reg .b64 %in, %out, %o, %l<6>; .reg .b32 %t, %w, %n, %sm, %own, %r<16>; .reg .b16 %h<4>; .reg .pred %q<4>; .reg .f32 %f<4>;
        .shared .align 16 .b8 sh[1024]; .local .align 16 .b8 mine[64];
        ld.param.u64 %in, [in]; ld.param.u64 %out, [out]; mov.u32 %t, %tid.x; mul.wide.u32 %l0, %t, 4; add.u64 %o, %out, %l0;
        add.u64 %l1, %in, %l0; mov.u32 %sm, sh; mov.u32 %own, mine; mov.u32 %n, 7; ld.global.u32 %w, [%l1];
        {body}
        ret; }}"
    );
    let mut m = Memory::new();
    let module = Module::load(&text, &mut m).unwrap_or_else(|e| panic!("{body}: {e}"));
    let (from, to) = (m.alloc(128).unwrap(), m.alloc(128).unwrap());
    for lane in (0..32u64).filter(|l| *l != 5) {
        m.write(from + 4 * lane, &(lane as u32).to_le_bytes()).unwrap();
    }
    m.fill(to, 0, 128).unwrap();
    module.launch("k", &Config::default(), &[&from.to_le_bytes(), &to.to_le_bytes()], &m)?;
    let mut bytes = vec![0; 128];
    m.read(to, &mut bytes).unwrap();
    Ok(bytes.as_chunks::<4>().0.iter().map(|c| u32::from_le_bytes(*c)).collect())
}

/// The fault of a body: the use named by `part`, in a lane, by an instruction that starts with `text`.
#[track_caller]
fn finds(body: &str, part: &str, lane: u32, text: &str) -> Fault {
    match run(body) {
        Err(Error::Fault(f)) => {
            let found = (f.kind, f.thread, f.message.starts_with(part), f.text.starts_with(text));
            assert_eq!(found, (FaultKind::Uninitialised, lane, true, true), "{body}: {f:?}");
            *f
        }
        other => panic!("{body}: {other:?}"),
    }
}

#[test]
fn values_that_are_dropped_are_no_mistake() {
    let all: Vec<u32> = vec![7; 32];
    assert_eq!(run("st.global.u32 [%o], %n;").unwrap(), all);
    // Computed with, compared, kept in shared and local memory and overwritten there; never used.
    let body = "add.u32 %r0, %w, 1; mul.wide.u32 %l2, %r0, %r0; setp.gt.u32 %q0, %w, 3; selp.u32 %r1, 1, 2, %q0;
        shl.b32 %r2, %t, 2; add.u32 %r2, %r2, %sm; st.shared.u32 [%r2], %r1; st.local.u32 [%own], %w;
        ld.local.u32 %r3, [%own]; bar.sync 0; ld.shared.u32 %r4, [%r2]; st.local.u32 [%own], %n; ld.local.u32 %r5, [%own];
        st.global.u32 [%o], %r5;";
    assert_eq!(run(body).unwrap(), all);
    // A write of another value clears the register, in the lanes that execute it.
    assert_eq!(run("mov.u32 %w, %n; st.global.u32 [%o], %w;").unwrap(), all);
    assert_eq!(run("setp.eq.u32 %q0, %t, 5; @%q0 mov.u32 %w, %n; @%q0 st.global.u32 [%o], %w;").unwrap()[5], 7);
    // Lanes that hold written values may use them.
    assert_eq!(run("setp.ne.u32 %q0, %t, 5; @%q0 st.global.u32 [%o], %w;").unwrap()[6], 6);
    // The register serves another value once this one is dead: in a loop, it must not be taken for the old one.
    let body = "mov.u32 %r0, 0; L: ld.global.u32 %r1, [%l1]; add.u32 %r0, %r0, 1; setp.lt.u32 %q0, %r0, 4; @%q0 bra L;
        add.u32 %r2, %r0, 3; st.global.u32 [%o], %r2;";
    assert_eq!(run(body).unwrap(), all);
    // Selected away; and a vector of which one element is there.
    assert_eq!(run("setp.eq.u32 %q0, %t, 99; selp.u32 %r0, %w, %n, %q0;").unwrap(), vec![0; 32]);
}

#[test]
fn each_kind_of_use_is_named_with_the_load() {
    let f = finds("st.global.u32 [%o], %w;", "the value of a store to global memory", 5, "st.global");
    for part in
        ["thread 5 of block [0, 0, 0] loaded it", "4 bytes at 0x", "of Global memory", "ld.global.u32 %w, [%l1]"]
    {
        assert!(f.message.contains(part), "{}", f.message);
    }
    let sum = "add.u32 %r0, %w, %n; and.b32 %r0, %r0, 0;";
    let address = "cvt.u64.u32 %l2, %r0; add.u64 %l2, %l2, %out;";
    finds(&format!("{sum} {address} ld.global.u32 %r1, [%l2];"), "the address", 5, "ld.global");
    finds(&format!("{sum} {address} st.global.u32 [%l2], %n;"), "the address", 5, "st.global");
    finds(&format!("{sum} {address} red.global.add.u32 [%l2], %n;"), "the address", 5, "red.global");
    finds(&format!("{sum} {address} cp.async.ca.shared.global [sh], [%l2], 4;"), "the address", 5, "cp.async");
    finds(&format!("{sum} add.u32 %r0, %sm, %r0; ld.shared.u32 %r1, [%r0];"), "the address", 5, "ld.shared");
    finds("red.global.add.u32 [%o], %w;", "an operand", 5, "red.global");
    finds("atom.global.exch.b32 %r0, [%o], %w;", "an operand", 5, "atom.global");
    finds("setp.gt.u32 %q0, %w, 9; @%q0 st.global.u32 [%o], %n;", "the guard", 5, "@%q0 st.global");
    finds("setp.gt.u32 %q0, %w, 9; @!%q0 mov.u32 %r0, 1;", "the guard", 5, "@!%q0 mov");
    finds("setp.gt.u32 %q0, %w, 9; @%q0 bra END; add.u32 %n, %n, 1; END:", "the condition of a branch", 5, "@%q0 bra");
    finds("and.b32 %r0, %w, 1; bar.sync %r0;", "an operand", 5, "bar.sync");
    finds("or.b32 %r0, %w, -1; shfl.sync.idx.b32 %r1, %n, 0, 31, %r0;", "the member mask", 5, "shfl");
    let product = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f0, %f1, %f2, %f3}, {A, %n, %n, %n}, {B, %n}, {C, %f1, %f2, %f3};";
    let body = |a: &str, b: &str, c: &str| {
        let f = "mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;";
        f.to_string() + &product.replace('A', a).replace('B', b).replace('C', c)
    };
    run(&body("%n", "%n", "%f0")).unwrap();
    finds(&body("%w", "%n", "%f0"), "a factor or sum of a product", 5, "mma");
    finds(&body("%n", "%w", "%f0"), "a factor or sum of a product", 5, "mma");
    let f = format!(
        "mov.b32 %f0, %w; {}",
        body("%n", "%n", "%f0").replacen("mov.f32 %f0, 0f00000000;", "mov.f32 %f1, 0f00000000;", 1).replacen(
            "mov.f32 %f1, %f0;",
            "",
            1
        )
    );
    finds(&f, "a factor or sum of a product", 5, "mma");
}

#[test]
fn marks_go_where_values_go() {
    let store = "st.global.u32 [%o], %r0;";
    for (body, lane) in [
        ("mov.u32 %r0, %w;", 5),
        ("cvt.rn.f32.u32 %f0, %w; mov.b32 %r0, %f0;", 5),
        ("mov.b64 %l2, {%n, %w}; mov.b64 {%r1, %r0}, %l2;", 5),
        ("setp.eq.u32 %q0, %w, 1; selp.u32 %r0, 1, 2, %q0;", 5),
        ("setp.eq.u32 %q0, %w, 1; setp.eq.or.u32 %q1, %n, 2, %q0; selp.u32 %r0, 1, 2, %q1;", 5),
        ("selp.u32 %r0, %w, %n, 1;", 5),
        ("mul.lo.u32 %r0, %w, 0;", 5),
        ("add.cc.u32 %r1, %w, %n; addc.u32 %r0, 0, 0;", 5),
        ("shfl.sync.up.b32 %r0, %w, 2, 0, -1;", 7),
        ("shfl.sync.bfly.b32 %r0|%q0, %w, 1, 31, -1;", 4),
        ("and.b32 %r1, %w, 31; shfl.sync.idx.b32 %r0, %n, %r1, 31, -1;", 5),
        ("setp.eq.u32 %q0, %w, 1; vote.sync.ballot.b32 %r0, %q0, -1;", 0),
        ("redux.sync.add.u32 %r0, %w, -1;", 0),
        ("movmatrix.sync.aligned.m8n8.trans.b16 %r0, %w;", 8),
        // Shared and local memory keep it; who reads it there is named by the first load.
        ("shl.b32 %r1, %t, 2; xor.b32 %r2, %r1, 8; add.u32 %r1, %r1, %sm; add.u32 %r2, %r2, %sm; st.shared.u32 [%r1], %w;
          bar.sync 0; ld.shared.u32 %r0, [%r2];", 7),
        ("st.local.u32 [%own+8], %w; ld.local.u32 %r0, [%own+8];", 5),
    ] {
        let f = finds(&format!("{body} {store}"), "the value of a store to global memory", lane, "st.global");
        assert!(f.message.contains("thread 5 of block [0, 0, 0] loaded it from 4 bytes"), "{body}: {}", f.message);
        assert!(f.message.contains("of Global memory"), "{body}: {}", f.message);
    }
    // Only the value moves with a shuffle, not whether its lane is in range.
    let body = "shfl.sync.up.b32 %r1|%q0, %w, 2, 0, -1; selp.u32 %r0, 1, 0, %q0; st.global.u32 [%o], %r0;";
    assert_eq!(run(body).unwrap(), [&[0; 2][..], &[1; 30]].concat());
}

#[test]
fn copies_and_matrices_carry_marks() {
    // The copy of what nobody wrote is no mistake, nor is loading it; lane 4 of the fragment holds bytes 16 to 19 of the first row.
    let copy = "shl.b32 %r1, %t, 2; add.u32 %r1, %r1, %sm; cp.async.ca.shared.global [%r1], [%l1], 4; cp.async.wait_all; bar.sync 0;";
    let body = format!("{copy} ld.shared.u32 %r0, [%r1]; add.u32 %r0, %r0, 1;");
    run(&body).unwrap();
    let f = finds(&format!("{body} st.global.u32 [%o], %r0;"), "the value of a store", 5, "st.global");
    assert!(f.message.contains("ld.shared.u32 %r0"), "{}", f.message);
    let matrix = |trans: &str| {
        format!(
            "{copy} and.b32 %r2, %t, 7; shl.b32 %r2, %r2, 4; add.u32 %r2, %r2, %sm;
            ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r0}}, [%r2];"
        )
    };
    run(&matrix("")).unwrap();
    // Word 5 is columns 2 and 3 of row 1: lane 5, or transposed (row 2, column 1), the upper half of lane 8.
    finds(&format!("{} st.global.u32 [%o], %r0;", matrix("")), "the value of a store", 5, "st.global");
    finds(&format!("{} st.global.u32 [%o], %r0;", matrix(".trans")), "the value of a store", 8, "st.global");
    // From a fragment back to memory.
    let body = "and.b32 %r2, %t, 7; shl.b32 %r2, %r2, 4; add.u32 %r2, %r2, %sm;
        wmma.load.c.sync.aligned.row.m16n16k16.f32 {%r3, %r4, %r5, %r6, %r7, %r8, %r9, %r10}, [%in];";
    // Too little memory for a matrix of 16 x 16.
    assert!(matches!(run(body), Err(Error::Fault(f)) if f.kind == FaultKind::OutOfBounds));
}

#[test]
fn a_read_before_its_copy_arrives_says_so() {
    let body =
        "shl.b32 %r1, %t, 2; add.u32 %r1, %r1, %sm; cp.async.ca.shared.global [%r1], [%o], 4; cp.async.commit_group;
        ld.shared.u32 %r0, [%r1];";
    run(&format!("{body} cp.async.wait_all;")).unwrap();
    let f = finds(&format!("{body} st.global.u32 [%o], %r0;"), "the value of a store", 0, "st.global");
    assert!(f.message.contains("while asynchronous copies were in flight"), "{}", f.message);
}
