//! Exchange between lanes: every mode of shuffles, votes, matches and reductions, with all and with some lanes; barriers.

use vgpu::{Config, Error, FaultKind, Memory, Module};

use super::harness::builds;

fn text(body: &str) -> String {
    format!(
        ".version 8.8\n.target sm_80\n.address_size 64\n.entry k(.param .u64 out) {{
        .reg .b64 %out, %l<4>; .reg .b32 %t, %x, %y, %o, %q, %w<9>; .reg .pred %p<6>;
        ld.param.u64 %out, [out]; mov.u32 %t, %tid.x; mad.wide.u32 %out, %t, 8, %out; mov.u32 %o, 0; mov.u32 %q, 0;
        mul.lo.u32 %x, %t, 0x9e3779b1; rem.u32 %y, %t, 5;
        {body}
        st.global.v2.u32 [%out], {{%o, %q}}; ret; }}"
    )
}

/// `%o` and `%q` of each thread.
fn run(body: &str, threads: u32) -> Vec<[u32; 2]> {
    let mut out: Vec<[u32; 2]> = Vec::new();
    for build in builds() {
        let mut m = Memory::new();
        let module = Module::load_for(build, &text(body), &mut m).unwrap_or_else(|e| panic!("{e}"));
        let a = m.alloc(8 * threads as usize).unwrap();
        m.fill(a, 0, 8 * threads as usize).unwrap();
        let shape = Config { block: [threads, 1, 1], ..Config::default() };
        module.launch("k", &shape, &[&a.to_le_bytes()], &m).unwrap_or_else(|e| panic!("{body}: {e}"));
        let mut bytes = vec![0; 8 * threads as usize];
        m.read(a, &mut bytes).unwrap();
        let word = |c: &[u8]| u32::from_le_bytes(c.try_into().unwrap());
        let got: Vec<[u32; 2]> = bytes.chunks(8).map(|c| [word(&c[..4]), word(&c[4..])]).collect();
        assert!(out.is_empty() || out == got, "{body}: the builds differ");
        out = got;
    }
    out
}

fn x(lane: u32) -> u32 {
    lane.wrapping_mul(0x9e37_79b1)
}

/// The pseudocode of `shfl.sync`: the lane read, and whether it was in range.
fn source(mode: &str, lane: u32, b: u32, c: u32) -> (u32, bool) {
    let (bval, cval, mask) = (b & 31, c & 31, c >> 8 & 31);
    let max = lane & mask | cval & !mask;
    let min = lane & mask;
    let (j, p) = match mode {
        "up" => (i64::from(lane) - i64::from(bval), i64::from(lane) - i64::from(bval) >= i64::from(max)),
        "down" => (i64::from(lane + bval), lane + bval <= max),
        "bfly" => (i64::from(lane ^ bval), lane ^ bval <= max),
        _ => {
            let j = min | bval & !mask;
            (i64::from(j), j <= max)
        }
    };
    if p { (j as u32, true) } else { (lane, false) }
}

#[test]
fn every_mode_of_shfl() {
    for mode in ["up", "down", "bfly", "idx"] {
        let segments = if mode == "up" { [0, 0x1000, 0x1800] } else { [0x1f, 0x100f, 0x181f] };
        for c in segments.into_iter().chain([0x0303, 0x1c1f]) {
            for b in [0, 1, 3, 8, 16, 31, 33] {
                let body = format!("shfl.sync.{mode}.b32 %o|%p0, %x, {b}, {c}, -1; selp.u32 %q, 1, 0, %p0;");
                for (lane, got) in run(&body, 32).into_iter().enumerate() {
                    let (j, p) = source(mode, lane as u32, b, c);
                    assert_eq!(got, [x(j), u32::from(p)], "{mode} {b} {c:#x}, lane {lane}");
                }
            }
        }
    }
}

fn mask(f: impl Fn(u32) -> bool) -> u32 {
    (0..32).filter(|l| f(*l)).fold(0, |m, l| m | 1 << l)
}

#[test]
fn votes_matches_and_reductions() {
    // Odd lanes take part, then all of them.
    for members in [0xaaaa_aaaau32, u32::MAX] {
        let inside = |l: u32| members >> l & 1 == 1;
        let guard = "and.b32 %w0, %t, 1; setp.eq.u32 %p5, %w0, 1;";
        let g = if members == u32::MAX { "" } else { "@%p5 " };
        let each = |body: &str, want: &dyn Fn(u32) -> [u32; 2]| {
            for (lane, got) in run(&format!("{guard} {body}"), 32).into_iter().enumerate() {
                let w = if inside(lane as u32) { want(lane as u32) } else { [0, 0] };
                assert_eq!(got, w, "{body}, lane {lane}");
            }
        };
        for (limit, name) in [(0, "none"), (3, "some"), (5, "all")] {
            let some = mask(|l| inside(l) && l % 5 < limit);
            for (mode, p) in [("all", some == members), ("any", some != 0), ("uni", some == 0 || some == members)] {
                let body = format!(
                    "setp.lt.u32 %p0, %y, {limit}; mov.pred %p1, 0; {g}vote.sync.{mode}.pred %p1, %p0, {members}; selp.u32 %o, 1, 0, %p1;"
                );
                each(&body, &|_| [u32::from(p), 0]);
            }
            let body = format!("setp.ge.u32 %p0, %y, {limit}; {g}vote.sync.ballot.b32 %o, !%p0, {members};");
            each(&body, &|_| [some, 0]);
            assert!(!name.is_empty());
        }
        each(&format!("{g}match.any.sync.b32 %o, %y, {members};"), &|l| [mask(|j| inside(j) && j % 5 == l % 5), 0]);
        each(&format!("cvt.u64.u32 %l0, %y; {g}match.any.sync.b64 %o, %l0, {members};"), &|l| {
            [mask(|j| inside(j) && j % 5 == l % 5), 0]
        });
        for ty in [32, 64] {
            let wide =
                if ty == 64 { "mov.b64 %l0, 7; mov.b64 %l1, {%t, %t};" } else { "mov.u32 %w1, 7; mov.u32 %w2, %t;" };
            let (same, different) = if ty == 64 { ("%l0", "%l1") } else { ("%w1", "%w2") };
            let body = |r: &str| {
                format!(
                    "{wide} mov.pred %p0, 0; {g}match.all.sync.b{ty} %o|%p0, {r}, {members}; selp.u32 %q, 1, 0, %p0;"
                )
            };
            each(&body(same), &|_| [members, 1]);
            each(&body(different), &|_| [0, 0]);
        }
        let values = || (0..32).filter(|l| inside(*l)).map(x);
        let results = [
            ("add.u32", values().fold(0, u32::wrapping_add)),
            ("add.s32", values().fold(0, u32::wrapping_add)),
            ("min.u32", values().min().unwrap()),
            ("max.u32", values().max().unwrap()),
            ("min.s32", values().map(|v| v as i32).min().unwrap() as u32),
            ("max.s32", values().map(|v| v as i32).max().unwrap() as u32),
            ("and.b32", values().fold(!0, |a, b| a & b)),
            ("or.b32", values().fold(0, |a, b| a | b)),
            ("xor.b32", values().fold(0, |a, b| a ^ b)),
        ];
        for (op, want) in results {
            each(&format!("{g}redux.sync.{op} %o, %x, {members};"), &|_| [want, 0]);
        }
        each(&format!("{g}activemask.b32 %o;"), &|_| [members, 0]);
    }
}

#[test]
fn barriers_with_numbers_and_counts() {
    // Warp 0 waits for what warp 1 stores; warp 1 only arrives.
    for (wait, arrive) in [
        ("bar.sync", "bar.arrive"),
        ("barrier.sync.aligned", "barrier.cta.arrive.aligned"),
        ("barrier.sync", "barrier.arrive"),
    ] {
        let body = format!(
            ".shared .u32 s[64]; mov.u32 %w0, s; setp.lt.u32 %p0, %t, 32; @%p0 bra FIRST;
            shl.b32 %w1, %t, 2; add.u32 %w1, %w1, %w0; st.shared.u32 [%w1], %x; {arrive} 3, 64; bra END;
            FIRST: {wait} 3, 64; shl.b32 %w1, %t, 2; add.u32 %w1, %w1, %w0; ld.shared.u32 %o, [%w1+128]; END:"
        );
        for (t, got) in run(&body, 64).into_iter().enumerate() {
            assert_eq!(got[0], if t < 32 { x(t as u32 + 32) } else { 0 });
        }
    }
    for (op, want) in [("popc.u32 %o", 26), ("popc.aligned.u32 %o", 26)] {
        let name = if op.contains("aligned") { "barrier" } else { "bar" };
        let body = format!("setp.lt.u32 %p0, %y, 2; {name}.red.{op}, 1, 64, %p0;");
        assert!(run(&body, 64).iter().all(|g| g[0] == want), "{op}");
    }
    let body = "setp.lt.u32 %p0, %y, 5; barrier.cta.red.and.pred %p1, 0, %p0; setp.gt.u32 %p0, %y, 4; bar.cta.red.or.pred %p2, 0, %p0;
        selp.u32 %o, 1, 0, %p1; selp.u32 %q, 1, 0, %p2; bar.warp.sync 0xffffffff;";
    assert!(run(body, 64).iter().all(|g| *g == [1, 0]));
}

#[test]
fn lanes_that_leave_and_kernels_that_trap() {
    let body = "setp.lt.u32 %p0, %t, 7; mov.u32 %o, 5; st.global.u32 [%out], %o; @%p0 exit; activemask.b32 %o;";
    for (t, got) in run(body, 32).into_iter().enumerate() {
        assert_eq!(got[0], if t < 7 { 5 } else { !0x7f });
    }
    let mut m = Memory::new();
    let module = Module::load(&text("setp.eq.u32 %p0, %t, 9; @%p0 trap;"), &mut m).unwrap();
    let a = m.alloc(256).unwrap();
    match module.launch("k", &Config::default(), &[&a.to_le_bytes()], &m) {
        Err(Error::Fault(f)) => assert_eq!((f.kind, f.thread), (FaultKind::Trap, 9)),
        other => panic!("expected a fault, found {other:?}"),
    }
}
