//! Warps that wait for each other: divergent warp instructions, named barriers, polling, grids that wait, reports.

use vgpu::{Config, Error, Fault, FaultKind, Memory, Module};

/// Runs `body` with `%t` the thread of the block, `%g` the thread of the grid, `%out` the result word of the thread's own
/// place `[%p1]`, and `%flag` the address of 64 words of zero; returns the words.
fn run(body: &str, config: &Config) -> Result<Vec<u32>, Fault> {
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.entry k(.param .u64 out, .param .u64 flag) {{
        .reg .b64 %p<8>, %flag; .reg .b32 %t, %g, %c, %n, %o, %r<20>; .reg .pred %q<8>;
        .shared .align 16 .b8 sm[4096];
        ld.param.u64 %p0, [out]; ld.param.u64 %flag, [flag]; mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x;
        mov.u32 %n, %ntid.x; mad.lo.u32 %g, %c, %n, %t; mad.wide.u32 %p1, %g, 4, %p0; mov.u32 %o, 0;
        {body}
        st.global.u32 [%p1], %o; ret; }}"
    );
    let mut m = Memory::new();
    let module = Module::load(&text, &mut m).unwrap_or_else(|e| panic!("{body}: {e}"));
    let n = (config.grid[0] * config.block[0]) as usize;
    let (out, flag) = (m.alloc(n * 4).unwrap(), m.alloc(256).unwrap());
    m.write(flag, &[0; 256]).unwrap();
    match module.launch("k", config, &[&out.to_le_bytes(), &flag.to_le_bytes()], &m) {
        Ok(_) => {}
        Err(Error::Fault(f)) => return Err(*f),
        Err(e) => panic!("{body}: {e}"),
    }
    let mut bytes = vec![0; n * 4];
    m.read(out, &mut bytes).unwrap();
    Ok(bytes.chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect())
}

fn shape(grid: u32, block: u32) -> Config {
    Config { grid: [grid, 1, 1], block: [block, 1, 1], budget: 20_000_000, threads: 1, ..Config::default() }
}

#[test]
fn a_full_mask_shuffle_from_both_sides_of_a_branch_waits_for_all_lanes() {
    let body = "and.b32 %r0, %t, 1; setp.eq.u32 %q0, %r0, 1; @%q0 bra ODD;
        add.u32 %r1, %t, 100; shfl.sync.bfly.b32 %r2, %r1, 1, 0x1f, -1; add.u32 %o, %r2, 1000; bra END;
        ODD: add.u32 %r3, %t, 200; add.u32 %r5, %r3, 0; shfl.sync.bfly.b32 %r4, %r5, 1, 0x1f, -1; add.u32 %o, %r4, 2000;
        END:";
    for (t, o) in run(body, &shape(1, 32)).unwrap().into_iter().enumerate() {
        let t = t as u32;
        let other = t ^ 1;
        let given = other + if other & 1 == 1 { 200 } else { 100 };
        assert_eq!(o, given + if t & 1 == 1 { 2000 } else { 1000 }, "lane {t}");
    }
}

#[test]
fn votes_matches_and_reductions_meet_across_three_paths() {
    // Paths t % 4 == 0, 1 and the rest; negated and plain predicates, ballots and sums over all lanes.
    let body = "and.b32 %r0, %t, 3; setp.eq.u32 %q0, %r0, 0; setp.eq.u32 %q1, %r0, 1; setp.lt.u32 %q2, %t, 10;
        @%q0 bra A; @%q1 bra B;
        vote.sync.ballot.b32 %r1, %q2, -1; redux.sync.add.u32 %r2, %t, -1; match.any.sync.b32 %r3, %r0, -1; bra END;
        A: not.pred %q3, %q2; vote.sync.ballot.b32 %r1, !%q3, -1; mov.u32 %r9, %t; redux.sync.add.u32 %r2, %r9, -1;
           match.any.sync.b32 %r3, %r0, -1; bra END;
        B: vote.sync.ballot.b32 %r1, %q2, -1; add.u32 %r8, %t, 1000; redux.sync.add.u32 %r2, %r8, -1;
           match.any.sync.b32 %r3, %r0, -1;
        END: bar.warp.sync -1; shl.b32 %r4, %r2, 8; xor.b32 %o, %r1, %r4; xor.b32 %o, %o, %r3;";
    let ballot = (1u32 << 10) - 1;
    let sum: u32 = (0..32).sum::<u32>() + 8 * 1000;
    for (t, o) in run(body, &shape(1, 32)).unwrap().into_iter().enumerate() {
        let same = (0..32).filter(|l| l % 4 == t % 4).fold(0u32, |m, l| m | 1 << l);
        assert_eq!(o, ballot ^ (sum << 8) ^ same, "lane {t}");
    }
}

#[test]
fn lanes_with_masks_of_their_own_group_shuffle_within_it() {
    // What labelled groups do: the mask comes from `match`, each group reads its first lane.
    let body = "and.b32 %r0, %t, 3; match.any.sync.b32 %r1, %r0, -1; brev.b32 %r2, %r1; clz.b32 %r3, %r2;
        add.u32 %r4, %t, 50; shfl.sync.idx.b32 %o, %r4, %r3, 0x1f, %r1;";
    for (t, o) in run(body, &shape(1, 32)).unwrap().into_iter().enumerate() {
        assert_eq!(o, t as u32 % 4 + 50);
    }
}

#[test]
fn a_mask_that_names_lanes_elsewhere_is_an_error() {
    let body =
        "setp.lt.u32 %q0, %t, 16; @!%q0 bra END; shfl.sync.bfly.b32 %o, %t, 1, 0x1f, -1; END: add.u32 %o, %o, 1;";
    let f = run(body, &shape(1, 32)).unwrap_err();
    assert_eq!(f.kind, FaultKind::BadMask, "{}", f.message);
    assert!(f.text.starts_with("shfl.sync"), "{}", f.text);
    // Two paths that wait for each other at different operations.
    let body = "setp.lt.u32 %q0, %t, 16; @%q0 bra A; shfl.sync.bfly.b32 %o, %t, 1, 0x1f, -1; bra END;
        A: vote.sync.ballot.b32 %o, %q0, -1; END:";
    let f = run(body, &shape(1, 32)).unwrap_err();
    assert_eq!(f.kind, FaultKind::BadMask);
    assert!(f.message.contains("wait at line"), "{}", f.message);
    // Lanes that have returned are not waited for.
    let body = "setp.ge.u32 %q0, %t, 16; @%q0 ret; redux.sync.add.u32 %o, %t, -1;";
    assert_eq!(run(body, &shape(1, 32)).unwrap()[3], (0..16).sum::<u32>());
}

#[test]
fn a_lock_inside_one_warp_is_taken_by_each_lane_in_turn() {
    let body = "mov.u32 %r9, 0;
        TRY: atom.global.cas.b32 %r0, [%flag], 0, 1; setp.ne.u32 %q0, %r0, 0; @%q0 bra TRY;
        ld.global.u32 %r1, [%flag+4]; add.u32 %r1, %r1, 1; st.global.u32 [%flag+4], %r1; mov.u32 %o, %r1;
        membar.gl; atom.global.exch.b32 %r2, [%flag], 0;";
    // Each hand-over takes thousands of rounds without progress first.
    let config = Config { budget: 1 << 34, ..shape(2, 64) };
    let mut got = run(body, &config).unwrap();
    got.sort_unstable();
    assert_eq!(got, (1..=128).collect::<Vec<_>>());
}

#[test]
fn producer_and_consumer_warps_meet_at_named_barriers() {
    // Warp 0 produces eight values for warp 1: barrier 1 says full, barrier 2 empty; `bar.arrive` does not wait.
    let body = "mov.u32 %r0, sm; shl.b32 %r1, %t, 2; and.b32 %r2, %t, 31; shl.b32 %r3, %r2, 2; add.u32 %r3, %r3, %r0;
        mov.u32 %r4, 0; setp.ge.u32 %q0, %t, 32; @%q0 bra CONSUME;
        PRODUCE: bar.sync 2, 64; mad.lo.u32 %r5, %r4, 100, %t; st.shared.u32 [%r3], %r5; bar.arrive 1, 64;
            add.u32 %r4, %r4, 1; setp.lt.u32 %q1, %r4, 8; @%q1 bra PRODUCE; bra END;
        CONSUME: bar.arrive 2, 64; bar.sync 1, 64; ld.shared.u32 %r6, [%r3]; add.u32 %o, %o, %r6;
            add.u32 %r4, %r4, 1; setp.lt.u32 %q2, %r4, 8; @%q2 bra CONSUME;
        END:";
    for seed in [None, Some(1), Some(2), Some(3)] {
        let got = run(body, &Config { seed, ..shape(1, 64) }).unwrap();
        for t in 32..64u32 {
            assert_eq!(got[t as usize], (0..8).map(|i| i * 100 + t - 32).sum::<u32>(), "seed {seed:?}");
        }
    }
}

#[test]
fn a_warp_that_spins_on_shared_memory_lets_the_others_run() {
    let body = "mov.u32 %r0, sm; setp.eq.u32 %q3, %t, 0; mov.u32 %r9, 0; @%q3 st.shared.u32 [%r0], %r9; bar.sync 0;
        setp.ge.u32 %q0, %t, 32; @%q0 bra SET;
        SPIN: ld.volatile.shared.u32 %r1, [%r0]; setp.eq.u32 %q1, %r1, 0; @%q1 bra SPIN; mov.u32 %o, %r1; bra END;
        SET: setp.eq.u32 %q2, %t, 32; mov.u32 %r2, 77; @%q2 st.volatile.shared.u32 [%r0], %r2;
        END:";
    assert_eq!(run(body, &shape(1, 64)).unwrap()[..32], [77; 32]);
}

#[test]
fn blocks_that_wait_for_later_blocks_end() {
    // Block b waits until block b + 1 has set its flag; the last one sets its own at once.
    let body = "mad.wide.u32 %p2, %c, 4, %flag; mov.u32 %r0, %nctaid.x; sub.u32 %r0, %r0, 1;
        setp.eq.u32 %q0, %c, %r0; @%q0 bra SET;
        SPIN: ld.acquire.gpu.global.u32 %o, [%p2+4]; setp.eq.u32 %q1, %o, 0; @%q1 bra SPIN;
        SET: add.u32 %r1, %o, 1; st.release.gpu.global.u32 [%p2], %r1;";
    for (threads, cooperative) in [(1, false), (1, true), (2, true), (2, false)] {
        let config = Config { threads, cooperative, ..shape(20, 32) };
        let got = run(body, &config).unwrap();
        assert_eq!(got[0], 19, "threads {threads}, cooperative {cooperative}");
    }
}

#[test]
fn a_deadlock_names_every_waiting_warp_barrier_and_line() {
    let body = "setp.ge.u32 %q0, %t, 32; @%q0 bra B; bar.sync 1, 64; bra END; B: bar.sync 2, 64; END:";
    let f = run(body, &shape(1, 64)).unwrap_err();
    assert_eq!(f.kind, FaultKind::Deadlock);
    for part in [
        "warp 0 waits at barrier 1 (32 of 64 threads arrived), PTX line 9: `bar.sync 1, 64;`",
        "warp 1 waits at barrier 2 (32 of 64 threads arrived), PTX line 9: `bar.sync 2, 64;`",
    ] {
        assert!(f.message.contains(part), "{}", f.message);
    }
    assert!(f.text.starts_with("bar.sync 1"), "{}", f.text);
}

#[test]
fn a_spin_that_never_ends_is_stopped_with_the_place_of_every_warp() {
    let body = "setp.ge.u32 %q0, %t, 32; @%q0 bra B;
        SPIN: ld.volatile.global.u32 %r1, [%flag]; setp.eq.u32 %q1, %r1, 0; @%q1 bra SPIN; B: bar.sync 0;";
    let config = Config { budget: 100_000, ..shape(1, 64) };
    let f = run(body, &config).unwrap_err();
    assert_eq!(f.kind, FaultKind::Watchdog);
    assert!(f.message.contains("warp 0 runs"), "{}", f.message);
    assert!(f.message.contains("warp 1 waits at barrier 0 (32 of 64"), "{}", f.message);
}

#[test]
fn barriers_that_contradict_each_other_are_errors() {
    let f = run("setp.ge.u32 %q0, %t, 32; @%q0 bra B; bar.sync 1, 64; bra END; B: bar.sync 1, 96; END:", &shape(1, 96));
    assert_eq!(f.unwrap_err().kind, FaultKind::Barrier);
    let f = run("mov.u32 %r0, 40; bar.sync 1, %r0;", &shape(1, 64)).unwrap_err();
    assert_eq!(f.kind, FaultKind::Barrier);
    assert!(f.message.contains("not a multiple of 32"), "{}", f.message);
}

#[test]
fn every_order_of_blocks_and_warps_gives_the_same_result() {
    let body = "mov.u32 %r0, sm; shl.b32 %r1, %t, 2; add.u32 %r1, %r1, %r0; st.shared.u32 [%r1], %g; bar.sync 0;
        xor.b32 %r2, %t, 96; shl.b32 %r2, %r2, 2; add.u32 %r2, %r2, %r0; ld.shared.u32 %o, [%r2];
        atom.global.add.u32 %r3, [%flag], 1;";
    let want = run(body, &shape(5, 128)).unwrap();
    for seed in 0..10 {
        let config = Config { seed: Some(seed), ..shape(5, 128) };
        assert_eq!(run(body, &config).unwrap(), want, "seed {seed}");
    }
}

#[test]
fn a_seeded_turn_may_end_between_any_two_instructions() {
    // Two warps without a branch take tickets: with some seed they take turns, without one they do not.
    let body = "atom.global.add.u32 %r0, [%flag], 1; atom.global.add.u32 %r1, [%flag], 1; sub.u32 %o, %r1, %r0;";
    let apart = |seed| {
        let config = Config { seed, ..shape(1, 64) };
        run(body, &config).unwrap().into_iter().any(|o| o > 63)
    };
    assert!(!apart(None));
    assert!((0..200).any(|seed| apart(Some(seed))));
}

#[test]
fn lanes_that_leave_a_counting_loop_early_still_meet_at_its_end() {
    // Every warp only counts with atomics for hundreds of rounds; lanes leave after different numbers of them, and a
    // barrier of the whole warp follows.
    let body = "mov.u32 %r0, 0; mul.lo.u32 %r1, %t, 30;
        LOOP: atom.global.add.u32 %r2, [%flag], 1; add.u32 %r0, %r0, 1; setp.lt.u32 %q0, %r0, %r1; @%q0 bra LOOP;
        bar.sync 0; ld.global.u32 %o, [%flag];";
    let want: u32 = (0..64).map(|t| (t * 30).max(1)).sum();
    assert_eq!(run(body, &shape(1, 64)).unwrap(), vec![want; 64]);
}

/// Every block counts itself and waits until all have: `flag` is the count.
const MEET: &str = "setp.ne.u32 %q0, %t, 0; @%q0 bra JOIN; atom.global.add.u32 %r0, [%flag], 1;
    mov.u32 %r1, %nctaid.x; SPIN: ld.acquire.gpu.global.u32 %r2, [%flag]; setp.lt.u32 %q1, %r2, %r1; @%q1 bra SPIN;
    JOIN: bar.sync 0; mov.u32 %o, 1;";

#[test]
fn blocks_that_wait_for_what_finds_no_room_are_a_deadlock() {
    for seed in [None, Some(1), Some(2)] {
        let held = |n| Config { resident: Some(n), seed, threads: 2, ..shape(5, 64) };
        assert_eq!(run(MEET, &held(5)).unwrap(), [1; 320]);
        let f = run(MEET, &held(4)).unwrap_err();
        assert_eq!(f.kind, FaultKind::Deadlock, "{f:?}");
        assert!(
            f.message
                .starts_with("no block can go on: 4 are resident, as many as the device holds, 1 have not started"),
            "{f:?}"
        );
        // Four blocks of two warps: one polls, one waits for it.
        let says = |what: &str| f.message.lines().filter(|l| l.contains(what)).count();
        assert_eq!((says("warp 0 polls, PTX line"), says("warp 1 waits at barrier")), (4, 4), "{}", f.message);
        // Without the limit all come to an end.
        assert_eq!(run(MEET, &Config { seed, ..shape(5, 64) }).unwrap(), [1; 320]);
    }
    // A lock within a warp, while nothing has room: the lane that holds it goes on alone in the end, and no block waits for another.
    let lock = "SPIN: atom.global.cas.b32 %r0, [%flag], 0, 1; setp.ne.u32 %q0, %r0, 0; @%q0 bra SPIN;
        atom.global.exch.b32 %r0, [%flag], 0; mov.u32 %o, 1;";
    assert_eq!(run(lock, &Config { resident: Some(1), ..shape(2, 4) }).unwrap(), [1; 8]);
    // A block that returns makes room: each waits for the one before it only.
    let chain = "setp.eq.u32 %q0, %c, 0; @%q0 bra GO; SPIN: ld.volatile.global.u32 %r2, [%flag]; setp.lt.u32 %q1, %r2, %c; @%q1 bra SPIN;
        GO: bar.sync 0; setp.eq.u32 %q0, %t, 0; @%q0 red.global.add.u32 [%flag], 1; mov.u32 %o, 1;";
    assert_eq!(run(chain, &Config { resident: Some(1), ..shape(6, 32) }).unwrap(), [1; 192]);
    // Each waits for the one after it: two at a time are not enough for a chain of three.
    let back = "add.u32 %r0, %c, 1; mov.u32 %r1, %nctaid.x; sub.u32 %r1, %r1, %r0;
        SPIN: ld.volatile.global.u32 %r2, [%flag]; setp.lt.u32 %q1, %r2, %r1; @%q1 bra SPIN;
        bar.sync 0; setp.eq.u32 %q0, %t, 0; @%q0 red.global.add.u32 [%flag], 1; mov.u32 %o, 1;";
    assert_eq!(run(back, &Config { resident: Some(3), ..shape(3, 32) }).unwrap(), [1; 96]);
    assert_eq!(run(back, &Config { resident: Some(2), ..shape(3, 32) }).unwrap_err().kind, FaultKind::Deadlock);
}
