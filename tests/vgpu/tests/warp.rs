//! Instructions of a whole warp, lane by lane: shuffles, votes, reductions, `mma.sync`, `ldmatrix`, barriers, bank conflicts.

use vgpu::{Config, Counters, Memory, Module};

/// Runs `body` on `threads` threads with `%t` the thread, `%x` = input word of the thread, and `out` words `%o0..%o3` kept;
/// `%s` is the start of `sm`, 4096 bytes of shared memory.
fn run(body: &str, input: &[u32], threads: u32) -> (Vec<[u32; 4]>, Counters) {
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.entry k(.param .u64 in, .param .u64 out) {{
        .reg .b64 %p<8>; .reg .b32 %t, %x, %s, %o<4>, %r<20>; .reg .f32 %f<9>; .reg .pred %q<4>;
        .shared .align 16 .b8 sm[4096];
        ld.param.u64 %p0, [in]; ld.param.u64 %p1, [out]; mov.u32 %t, %tid.x; mov.u32 %s, sm;
        mul.wide.u32 %p2, %t, 4; add.u64 %p3, %p0, %p2; ld.global.u32 %x, [%p3];
        mov.u32 %o0, 0; mov.u32 %o1, 0; mov.u32 %o2, 0; mov.u32 %o3, 0;
        {body}
        mul.wide.u32 %p2, %t, 16; add.u64 %p3, %p1, %p2; st.global.v4.u32 [%p3], {{%o0, %o1, %o2, %o3}}; ret; }}"
    );
    let mut m = Memory::new();
    let module = Module::load(&text, &mut m).unwrap_or_else(|e| panic!("{body}: {e}"));
    let (a, b) = (m.alloc(input.len() * 4).unwrap(), m.alloc(threads as usize * 16).unwrap());
    m.write(a, &input.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    let shape = Config { block: [threads, 1, 1], ..Config::default() };
    let counters = module.launch("k", &shape, &[&a.to_le_bytes(), &b.to_le_bytes()], &m).unwrap();
    let mut out = vec![0; threads as usize * 16];
    m.read(b, &mut out).unwrap();
    let word = |c: &[u8]| u32::from_le_bytes(c.try_into().unwrap());
    (out.chunks(16).map(|c| std::array::from_fn(|i| word(&c[4 * i..4 * i + 4]))).collect(), counters)
}

fn ramp() -> Vec<u32> {
    (0..32).map(|i| 100 + i * i).collect()
}

#[test]
fn shuffles() {
    let x = ramp();
    let body = "shfl.sync.up.b32 %o0|%q1, %x, 3, 0, -1; selp.u32 %o1, 1, 0, %q1;
        shfl.sync.down.b32 %o2, %x, 5, 0x1f, -1; shfl.sync.bfly.b32 %o3, %x, 6, 0x1f, -1;";
    for (l, o) in run(body, &x, 32).0.into_iter().enumerate() {
        assert_eq!(o[0], x[if l >= 3 { l - 3 } else { l }]);
        assert_eq!(o[1], u32::from(l >= 3));
        assert_eq!((o[2], o[3]), (x[if l + 5 < 32 { l + 5 } else { l }], x[l ^ 6]));
    }
    // Segments of eight lanes: c = 0x181f.
    let body = "shfl.sync.idx.b32 %o0, %x, 2, 0x181f, -1; shfl.sync.down.b32 %o1, %x, 3, 0x181f, -1;";
    for (l, o) in run(body, &x, 32).0.into_iter().enumerate() {
        assert_eq!((o[0], o[1]), (x[l / 8 * 8 + 2], x[if l % 8 + 3 < 8 { l + 3 } else { l }]));
    }
}

#[test]
fn votes_matches_and_reductions() {
    let x: Vec<u32> = (0..32).map(|i| i * 7 % 5).collect();
    let body = "setp.gt.u32 %q0, %x, 2; vote.sync.ballot.b32 %o0, %q0, -1; match.any.sync.b32 %o1, %x, -1;
        redux.sync.add.u32 %o2, %x, -1; setp.lt.u32 %q1, %t, 16; @%q1 redux.sync.max.s32 %o3, %x, 0xffff;";
    let (out, _) = run(body, &x, 32);
    let mask = |f: &dyn Fn(usize) -> bool| (0..32).filter(|i| f(*i)).fold(0u32, |m, i| m | 1 << i);
    for (l, o) in out.into_iter().enumerate() {
        assert_eq!(o[0], mask(&|i| x[i] > 2));
        assert_eq!(o[1], mask(&|i| x[i] == x[l]));
        assert_eq!((o[2], o[3]), (x.iter().sum(), if l < 16 { *x[..16].iter().max().unwrap() } else { 0 }));
    }
}

#[test]
fn barrier_reduction_over_two_warps() {
    let x: Vec<u32> = (0..64).collect();
    let body =
        "setp.gt.u32 %q0, %x, 40; bar.red.popc.u32 %o0, 0, %q0; bar.red.or.pred %q1, 1, %q0; selp.u32 %o1, 1, 0, %q1;
        bar.red.and.pred %q2, 0, !%q0; selp.u32 %o2, 1, 0, %q2;";
    for o in run(body, &x, 64).0 {
        assert_eq!(o[..3], [23, 1, 0]);
    }
}

#[test]
fn shared_atomics_and_predicated_paths() {
    let body = "setp.eq.u32 %q0, %t, 0; mov.u32 %r0, 5; @%q0 st.shared.u32 [%s], %r0; bar.sync 0;
        and.b32 %r1, %t, 1; setp.eq.u32 %q1, %r1, 1; @%q1 bra ODD; atom.shared.add.u32 %o0, [%s], 2; bra END;
        ODD: red.shared.add.u32 [%s], 10; END: bar.sync 0; ld.shared.u32 %o1, [%s];
        atom.shared.cas.b32 %o2, [%s], 9999, 1;";
    let (out, _) = run(body, &ramp(), 32);
    for (l, o) in out.iter().enumerate() {
        assert_eq!((o[1], o[2]), (5 + 16 * 12, 5 + 16 * 12));
        // Lanes of one path go in order, whichever path is first.
        let base = out[0][0];
        assert_eq!(o[0], if l % 2 == 0 { base + l as u32 } else { 0 });
        assert!(base == 5 || base == 165);
    }
}

#[test]
fn bank_conflicts_are_counted() {
    let conflicts = |stride: u32| {
        let body = format!("mad.lo.u32 %r0, %t, {stride}, %s; st.shared.u32 [%r0], %x;");
        run(&body, &ramp(), 32).1.bank_conflicts
    };
    assert_eq!((conflicts(4), conflicts(8), conflicts(128), conflicts(0)), (0, 1, 31, 0));
}

/// Row and column.
type Position = (usize, usize);

/// Each lane's part of A and of D, from the figures of the ISA text for m16n8k16.
fn fragment_positions(lane: usize) -> ([[Position; 2]; 4], [Position; 4]) {
    let (g, t) = (lane / 4, lane % 4);
    let a = [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)].map(|(r, c)| [(r, c), (r, c + 1)]);
    (a, [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)])
}

#[test]
fn mma_takes_each_element_from_its_lane() {
    // A is zero but for one element of value 2 at a time (as `%x` says), B[k][n] = 8 k + n, so D names the element's row and k.
    for i in 0..256 {
        let (row, k) = (i / 16, i % 16);
        let mut body = String::from("mov.u32 %r19, 0;");
        for r in 0..4 {
            // The lane's packed A register is given in %x only where it holds the element.
            let lanes: Vec<usize> = (0..32).filter(|l| fragment_positions(*l).0[r].contains(&(row, k))).collect();
            body += &format!("mov.u32 %r{r}, 0;");
            for l in lanes {
                let high = fragment_positions(l).0[r][1] == (row, k);
                let bits = if high { 0x4000_0000u32 } else { 0x4000 };
                body += &format!("setp.eq.u32 %q0, %t, {l}; @%q0 mov.u32 %r{r}, {bits};");
            }
        }
        // B through conversions of 8 k + n in each lane: k = 2 t (+1, +8, +9), n = g.
        body += "and.b32 %r10, %t, 3; shr.u32 %r11, %t, 2; mad.lo.u32 %r12, %r10, 16, %r11;
            cvt.rn.f32.u32 %f0, %r12; add.f32 %f1, %f0, 0f41000000; add.f32 %f2, %f0, 0f42800000; add.f32 %f3, %f0, 0f42900000;
            cvt.rn.bf16x2.f32 %r4, %f1, %f0; cvt.rn.bf16x2.f32 %r5, %f3, %f2; mov.f32 %f4, 0f3F800000;
            mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%o0, %o1, %o2, %o3}, {%r0, %r1, %r2, %r3}, {%r4, %r5},
            {%f4, %f4, %f4, %f4};";
        for (l, o) in run(&body, &ramp(), 32).0.into_iter().enumerate() {
            for (x, (r, n)) in o.into_iter().zip(fragment_positions(l).1) {
                let want = if r == row { 2.0 * (8 * k + n) as f32 + 1.0 } else { 1.0 };
                assert_eq!(f32::from_bits(x), want, "a[{row}][{k}], lane {l}, d[{r}][{n}]");
            }
        }
    }
}

#[test]
fn ldmatrix_moves_rows_and_columns() {
    // Halfword i of shared memory holds i; lane l gives row l (16 bytes each).
    let fill = "shl.b32 %r0, %t, 3; shl.b32 %r1, %t, 4; add.u32 %r2, %s, %r1; add.u32 %r3, %r0, 1; mov.u32 %r9, 0;
        LOOP: mov.u32 %r4, %r3; shl.b32 %r4, %r4, 16; or.b32 %r4, %r4, %r0; st.shared.u32 [%r2], %r4; add.u32 %r0, %r0, 2;
        add.u32 %r3, %r3, 2; add.u32 %r2, %r2, 4; add.u32 %r9, %r9, 1; setp.lt.u32 %q0, %r9, 4; @%q0 bra LOOP;
        bar.sync 0; add.u32 %r2, %s, %r1;";
    for trans in ["", ".trans"] {
        let body = format!("{fill} ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%o0, %o1, %o2, %o3}}, [%r2];");
        for (l, o) in run(&body, &ramp(), 32).0.into_iter().enumerate() {
            for (i, x) in o.into_iter().enumerate() {
                let (g, t) = (l / 4, 2 * (l % 4));
                let at = |r: usize, c: usize| (i * 64 + r * 8 + c) as u32;
                let (low, high) = if trans.is_empty() { (at(g, t), at(g, t + 1)) } else { (at(t, g), at(t + 1, g)) };
                assert_eq!((x & 0xffff, x >> 16), (low, high), "matrix {i}, lane {l}{trans}");
            }
        }
    }
}
