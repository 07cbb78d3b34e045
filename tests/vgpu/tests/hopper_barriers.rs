//! Barrier objects in shared memory, `elect.sync`, `setmaxnreg` and reports of deadlock.

#[path = "support/hopper.rs"]
mod hopper;

use hopper::{ONE, Run, text};
use vgpu::{Error, FaultKind, Memory, Module};

#[test]
fn arrivals_phases_and_states() {
    // Two arrivals end a phase; the state of an arrival says whether its phase is over.
    let body = "@%q0 mbarrier.init.shared.b64 [%b], 2; bar.sync 0; @!%q0 bra END;
        mbarrier.arrive.shared.b64 %p1, [%b]; mbarrier.test_wait.shared.b64 %q1, [%b], %p1; selp.u32 %r0, 1, 0, %q1;
        mbarrier.pending_count.b64 %r1, %p1;
        mbarrier.arrive.release.cta.shared::cta.b64 %p2, [%b]; mbarrier.test_wait.acquire.cta.shared::cta.b64 %q1, [%b], %p1;
        selp.u32 %r2, 1, 0, %q1; mbarrier.pending_count.b64 %r3, %p2;
        mbarrier.try_wait.parity.shared::cta.b64 %q1, [%b], 0; selp.u32 %r4, 1, 0, %q1;
        mbarrier.arrive.noComplete.shared.b64 %p3, [%b], 1; mbarrier.test_wait.shared.b64 %q1, [%b], %p3; selp.u32 %r5, 1, 0, %q1;
        mbarrier.arrive_drop.shared.b64 _, [%b]; mbarrier.test_wait.shared.b64 %q1, [%b], %p3; selp.u32 %r6, 1, 0, %q1;
        mbarrier.arrive.shared.b64 %p4, [%b]; mbarrier.pending_count.b64 %r7, %p4;
        mbarrier.test_wait.parity.shared.b64 %q1, [%b], 0; selp.u32 %r8, 1, 0, %q1;
        mbarrier.inval.shared.b64 [%b];
        st.global.v4.u32 [%out], {%r0, %r1, %r2, %r3}; st.global.v4.u32 [%out+16], {%r4, %r5, %r6, %r7};
        st.global.u32 [%out+32], %r8; END:";
    let out = ONE.words(body, &[], 9).unwrap();
    // Phase 0 open with 2 pending; over; 1 pending before the second; parity 0 is over; phase 1 open; over after the drop,
    // which leaves one arrival to a phase; that one ends phase 2, whose parity is 0.
    assert_eq!(out, [0, 2, 1, 1, 1, 0, 1, 1, 1]);
}

#[test]
fn every_lane_arrives_and_warps_wait_for_each_other() {
    // Sixteen warps: each adds to a word, all arrive, all see the sum.
    let body = "@%q0 mbarrier.init.shared.b64 [%b], 512; mov.u32 %r0, 0; @%q0 st.shared.u32 [%s], %r0; bar.sync 0;
        atom.shared.add.u32 %r1, [%s], %t; mbarrier.arrive.shared.b64 _, [%b]; WAIT
        ld.shared.u32 %r2, [%s]; mul.wide.u32 %p1, %t, 4; add.u64 %p1, %out, %p1; st.global.u32 [%p1], %r2;";
    for seed in [None, Some(1), Some(2)] {
        let run = Run { block: 512, seed, ..ONE };
        assert_eq!(run.words(body, &[], 512).unwrap(), [511 * 512 / 2; 512]);
    }
}

#[test]
fn a_wait_that_may_give_up_lets_the_program_go_on() {
    // The warp looks whether the phase is over before it does what ends it.
    for wait in ["try_wait", "test_wait"] {
        let body = format!(
            "@%q0 mbarrier.init.shared.b64 [%b], 32; bar.sync 0;
            mbarrier.{wait}.parity.shared.b64 %q1, [%b], 0; selp.u32 %r0, 1, 0, %q1; @%q0 st.global.u32 [%out], %r0;
            mbarrier.arrive.shared.b64 _, [%b]; WAIT @%q0 st.global.u32 [%out+4], 1;"
        );
        assert_eq!(ONE.words(&body, &[], 2).unwrap(), [0, 1]);
    }
}

#[test]
fn transaction_bytes_hold_a_phase_open() {
    let body = "INIT @!%q0 bra END; EXPECT 48;
        mbarrier.test_wait.parity.shared.b64 %q1, [%b], 0; selp.u32 %r0, 1, 0, %q1;
        mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%b], 32;
        mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%b], 16; mbarrier.complete_tx.shared::cta.b64 [%b], 16;
        mbarrier.test_wait.parity.shared.b64 %q1, [%b], 0; selp.u32 %r1, 1, 0, %q1;
        mbarrier.complete_tx.shared::cta.b64 [%b], 16;
        mbarrier.test_wait.parity.shared.b64 %q1, [%b], 0; selp.u32 %r2, 1, 0, %q1;
        st.global.v2.u32 [%out], {%r0, %r1}; st.global.u32 [%out+8], %r2; END:";
    assert_eq!(ONE.words(body, &[], 3).unwrap(), [0, 0, 1]);
}

#[test]
fn misuse_is_named() {
    use FaultKind::{Mbarrier, Misaligned, OutOfBounds};
    let one = |body: &str, part: &str| {
        ONE.finds(&format!("@!%q0 bra END; {body} END:"), Mbarrier, part);
    };
    let init = "mbarrier.init.shared.b64 [%b], 2;";
    one("mbarrier.arrive.shared.b64 _, [%b];", "mbarrier.init has to come first");
    one("mbarrier.test_wait.parity.shared.b64 %q1, [%b], 0;", "mbarrier.init has to come first");
    one("mbarrier.inval.shared.b64 [%b];", "mbarrier.init has to come first");
    one("mbarrier.init.shared.b64 [%b], 0;", "count 0");
    one("mbarrier.init.shared.b64 [%b], 1048576;", "count 1048576");
    one(&format!("{init} {init}"), "mbarrier.inval has to come between");
    one(&format!("{init} mbarrier.inval.shared.b64 [%b]; mbarrier.arrive.shared.b64 _, [%b];"), "mbarrier.init");
    one(&format!("{init} mbarrier.arrive.shared.b64 _, [%b], 3;"), "only 2 pending");
    one(&format!("{init} mbarrier.arrive.noComplete.shared.b64 _, [%b], 2;"), "noComplete");
    one(&format!("{init} mbarrier.expect_tx.shared.b64 [%b], 1048576;"), "beyond 1048575");
    one(&format!("{init} mbarrier.test_wait.parity.shared.b64 %q1, [%b], 2;"), "parity 2");
    one(
        &format!(
            "{init} mbarrier.arrive.shared.b64 %p1, [%b], 2; mbarrier.arrive.shared.b64 _, [%b], 2;
            mbarrier.test_wait.shared.b64 %q1, [%b], %p1;"
        ),
        "neither the current",
    );
    // Ordinary accesses to the object.
    one(&format!("{init} st.shared.u32 [%b+4], 0;"), "a store to bytes of the mbarrier");
    one(&format!("{init} atom.shared.add.u32 %r0, [%b], 1;"), "bytes of the mbarrier");
    one(&format!("{init} ld.shared.u64 %p1, [%b];"), "an ordinary read of the mbarrier");
    // Beside it everything is allowed, and after inval on it.
    let free = format!(
        "@!%q0 bra END; {init} st.shared.u32 [%b+8], 0; mbarrier.inval.shared.b64 [%b]; st.shared.u64 [%b], %p0; END:"
    );
    assert!(ONE.words(&free, &[], 1).is_ok());
    ONE.finds("@%q0 mbarrier.init.shared.b64 [%b+4], 1;", Misaligned, "multiple of 8");
    ONE.finds("add.u32 %b, %b, 0x10000; @%q0 mbarrier.init.shared.b64 [%b], 1;", OutOfBounds, "shared memory");
    ONE.finds("@%q0 mbarrier.init.b64 [%in], 1;", OutOfBounds, "not in shared memory");
}

#[test]
fn deadlocks_name_barrier_phase_counts_and_bytes() {
    let body = "@%q0 mbarrier.init.shared.b64 [%b], 3; bar.sync 0; @%q0 EXPECT 64; WAIT";
    let f = ONE.finds(body, FaultKind::Deadlock, "no warp can go on");
    for part in ["mbarrier at shared offset 0x10000", "phase 0 (parity 0)", "1 of 3 arrived", "64 bytes outstanding"] {
        assert!(f.message.contains(part), "{part}: {}", f.message);
    }
    assert!(f.text.contains("mbarrier.try_wait"), "{f:?}");
    // A loop around test_wait is seen as well, and so is one warp at a named barrier while the other waits.
    ONE.finds(
        "@%q0 mbarrier.init.shared.b64 [%b], 1; bar.sync 0; AGAIN: mbarrier.test_wait.parity.shared.b64 %q1, [%b], 0;
         nanosleep.u32 20; @!%q1 bra AGAIN;",
        FaultKind::Deadlock,
        "0 of 1 arrived",
    );
    let two = Run { block: 64, ..ONE };
    let body = "@%q0 mbarrier.init.shared.b64 [%b], 1; bar.sync 0; setp.lt.u32 %q2, %t, 32; @%q2 bra OTHER; WAIT ret;
        OTHER: bar.sync 3, 64;";
    let f = two.finds(body, FaultKind::Deadlock, "mbarrier at shared offset");
    assert!(f.message.contains("barrier 3 (32 of 64 threads arrived)"), "{}", f.message);
}

#[test]
fn copies_of_the_older_kind_arrive_at_a_barrier() {
    // Each of 32 threads copies 16 bytes and lets the copies arrive; the barrier counts 32 with .noinc.
    let body = "@%q0 mbarrier.init.shared.b64 [%b], 32; bar.sync 0; mul.wide.u32 %p1, %t, 16; add.u64 %p1, %in, %p1;
        mul.lo.u32 %r0, %t, 16; add.u32 %r0, %r0, %s; cp.async.cg.shared.global [%r0], [%p1], 16;
        cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%b]; WAIT
        xor.b32 %r1, %r0, 16; ld.shared.u32 %r2, [%r1]; mul.wide.u32 %p2, %t, 4; add.u64 %p2, %out, %p2; st.global.u32 [%p2], %r2;";
    let input: Vec<u32> = (0..128).collect();
    let want: Vec<u32> = (0..32).map(|t| (t ^ 1) * 4).collect();
    assert_eq!(ONE.words(body, &input, 32).unwrap(), want);
}

#[test]
fn elect_names_one_leader() {
    let body = "elect.sync %r0|%q1, -1; selp.u32 %r1, 1, 0, %q1; setp.ge.u32 %q2, %t, 8; mov.u32 %r2, 99;
        @%q2 elect.sync %r2|%q3, 0xffffff00; mul.wide.u32 %p1, %t, 12; add.u64 %p1, %out, %p1;
        st.global.u32 [%p1], %r0; st.global.u32 [%p1+4], %r1; st.global.u32 [%p1+8], %r2;";
    let out = ONE.words(body, &[], 96).unwrap();
    for (t, c) in out.chunks(3).enumerate() {
        assert_eq!(c, [0, u32::from(t == 0), if t < 8 { 99 } else { 8 }]);
    }
    ONE.finds("setp.ge.u32 %q2, %t, 8; @%q2 elect.sync _|%q3, -1;", FaultKind::BadMask, "");
}

#[test]
fn warpgroups_share_the_registers_of_the_launch() {
    // .maxntid 512: 128 registers per thread at launch, 512 for four warpgroups.
    let four = Run { block: 512, ..ONE };
    let group = "shr.u32 %r0, %t, 7; setp.eq.u32 %q1, %r0, 0;";
    let body = |first: u32, others: u32| {
        format!(
            "{group} @%q1 bra FIRST; setmaxnreg.inc.sync.aligned.u32 {others}; bra END;
            FIRST: setmaxnreg.dec.sync.aligned.u32 {first}; END: bar.sync 0; @%q0 st.global.u32 [%out], 1;"
        )
    };
    assert_eq!(four.words(&body(32, 160), &[], 1).unwrap(), [1]);
    let f = four.finds(&body(40, 160), FaultKind::Deadlock, "waits in setmaxnreg for 160 registers");
    assert!(f.message.contains("66560 registers of the 65536"), "{}", f.message);
    use FaultKind::Warpgroup;
    four.finds("setmaxnreg.dec.sync.aligned.u32 136;", Warpgroup, "to 136 registers from 128");
    four.finds("setmaxnreg.inc.sync.aligned.u32 120;", Warpgroup, "to 120 registers from 128");
    ONE.finds("setmaxnreg.dec.sync.aligned.u32 40;", Warpgroup, "fewer than four warps");
    let body = "setp.lt.u32 %q1, %t, 32; @%q1 bra A; setmaxnreg.dec.sync.aligned.u32 40; ret; A: setmaxnreg.dec.sync.aligned.u32 48;";
    Run { block: 128, ..ONE }.finds(body, Warpgroup, "different setmaxnreg");
}

#[test]
fn invalid_forms_are_refused_when_loaded() {
    for line in [
        "mbarrier.init.shared::cluster.b64 [%b], 1;",
        "mbarrier.init.shared.b32 [%b], 1;",
        "mbarrier.arrive.shared::cluster.b64 %p1, [%b];",
        "mbarrier.test_wait.shared::cluster.b64 %q1, [%b], %p1;",
        "mbarrier.test_wait.shared.b64 %q1, [%b], %p1, %r0;",
        "mbarrier.arrive.shared.b64 [%b];",
        "mbarrier.wait.shared.b64 %q1, [%b], %p1;",
        "setmaxnreg.inc.sync.aligned.u32 20;",
        "setmaxnreg.inc.sync.aligned.u32 100;",
        "setmaxnreg.sync.aligned.u32 104;",
        "elect %r0|%q1, -1;",
        "griddepcontrol;",
        "mbarrier.b64;",
        "mbarrier.init.shared.b64;",
        "mbarrier.try_wait.shared.b64 %q1;",
        "cp.async.bulk;",
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group;",
        "cp.async.mbarrier.arrive.b64;",
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%s];",
        "mapa.u64 %p0;",
        "elect.sync;",
        "fence.proxy;",
        "fence.mbarrier_init.cluster;",
        "fence.proxy.async.local;",
    ] {
        let loaded = Module::load(&text(line), &mut Memory::new());
        assert!(matches!(loaded, Err(Error::Unsupported { .. })), "{line}: {:?}", loaded.err());
    }
    for line in [
        "griddepcontrol.wait; griddepcontrol.launch_dependents;",
        "fence.proxy.async; fence.proxy.async.global; fence.proxy.async.shared::cluster; fence.proxy.alias;",
        "fence.proxy.tensormap::generic.release.gpu; fence.proxy.tensormap::generic.acquire.gpu [%map], 128;",
        "prefetch.tensormap [%map];",
    ] {
        ONE.words(line, &[], 1).unwrap();
    }
}

/// Four warps; thread 0 makes the object, `between` is what all execute then, `user` what the other warps do.
fn used_after(between: &str, user: &str, seed: Option<u64>) -> Result<Vec<u32>, Error> {
    // The others wait until the object is there, without anything that orders them after it.
    let body = format!(
        "setp.lt.u32 %q2, %t, 32; @!%q2 bra OTHER;
        @%q0 mbarrier.init.shared::cta.b64 [%b], 97; {between} @%q0 mbarrier.arrive.shared::cta.b64 _, [%b]; bra.uni END;
        OTHER: mov.u32 %r9, 0; SPIN: add.u32 %r9, %r9, 1; nanosleep.u32 20; setp.lt.u32 %q3, %r9, 40; @%q3 bra SPIN;
        {between} {user} END:"
    );
    Run { block: 128, seed, ..ONE }.words(&body, &[7; 64], 8)
}

#[test]
fn a_barrier_object_must_be_made_before_others_use_it_in_every_order() {
    let wait = "mbarrier.arrive.shared::cta.b64 _, [%b]; W: mbarrier.try_wait.parity.shared::cta.b64 %q1, [%b], 0; @!%q1 bra W;";
    let only_wait = wait.split_once(';').unwrap().1;
    let expect = "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%b], 16;";
    let copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%in], 16, [%b];";
    for seed in [None, Some(1), Some(2), Some(3), Some(4)] {
        // Whoever runs first: either the object is not there yet, or nothing orders its use after it.
        for between in [
            "",
            "fence.mbarrier_init.release.cluster;",
            "fence.proxy.async;",
            "fence.acq_rel.cta;",
            "bar.warp.sync -1;",
        ] {
            for user in [wait, only_wait, expect, copy] {
                match used_after(between, user, seed) {
                    Err(Error::Fault(f)) => {
                        let found =
                            ["nothing orders that after its mbarrier.init by thread 0 (PTX line 11)", "there is none"];
                        assert_eq!(f.kind, FaultKind::Mbarrier, "{between} {user} {seed:?}: {f:?}");
                        assert!(found.iter().any(|m| f.message.contains(m)), "{between} {user} {seed:?}: {f:?}");
                    }
                    other => panic!("{between} {user} {seed:?}: {other:?}"),
                }
            }
        }
        for between in ["bar.sync 0;", "fence.mbarrier_init.release.cluster; CLUSTER", "bar.sync 3, 128;"] {
            used_after(between, wait, seed).unwrap_or_else(|e| panic!("{between} {seed:?}: {e}"));
        }
    }
    // In the order first to last the object is there when it is used.
    match used_after("", wait, None) {
        Err(Error::Fault(f)) => assert!(f.message.contains("used by thread 32, but nothing orders"), "{f:?}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn orders_that_come_through_others_count() {
    // Warp 0 and 1 meet, then 1 and 2: 2 comes after what 0 did. Warp 3 met nobody.
    let body = |last: u32| {
        format!(
            "shr.u32 %r0, %t, 5; setp.eq.u32 %q2, %r0, 0; setp.eq.u32 %q3, %r0, 1; setp.eq.u32 %q4, %r0, {last};
            @%q0 mbarrier.init.shared::cta.b64 [%b], 1; @%q2 bar.sync 1, 64; @%q3 bar.sync 1, 64; @%q3 bar.sync 2, 64;
            setp.eq.u32 %q5, %r0, 2; @%q5 bar.sync 2, 64;
            mov.u32 %r9, 0; SPIN: add.u32 %r9, %r9, 1; nanosleep.u32 20; setp.lt.u32 %q1, %r9, 40; @%q1 bra SPIN;
            @!%q4 bra END; and.b32 %r1, %t, 31; setp.eq.u32 %q1, %r1, 0; @%q1 mbarrier.arrive.shared::cta.b64 _, [%b]; END:"
        )
    };
    for seed in [None, Some(1), Some(2)] {
        let run = Run { block: 128, seed, ..ONE };
        run.words(&body(2), &[7; 64], 8).unwrap_or_else(|e| panic!("{seed:?}: {e}"));
        run.finds(&body(3), FaultKind::Mbarrier, "nothing orders that after");
    }
    // A flag behind a fence; and the same without the fence.
    let flag = |fence: &str| {
        format!(
            "mov.u32 %r5, 0; @%q0 st.shared.u32 [%s], %r5; bar.sync 0; setp.lt.u32 %q2, %t, 32; @!%q2 bra OTHER;
            @%q0 mbarrier.init.shared::cta.b64 [%b], 2; {fence} @%q0 st.volatile.shared.u32 [%s], 1;
            @%q0 mbarrier.arrive.shared::cta.b64 _, [%b]; bra.uni END;
            OTHER: ld.volatile.shared.u32 %r6, [%s]; setp.eq.u32 %q3, %r6, 0; @%q3 bra OTHER; fence.acq_rel.cta;
            setp.eq.u32 %q4, %t, 32; @%q4 mbarrier.arrive.shared::cta.b64 _, [%b]; END:"
        )
    };
    for seed in [None, Some(1), Some(2)] {
        let run = Run { block: 64, seed, ..ONE };
        run.words(&flag("fence.acq_rel.cta;"), &[7; 64], 8).unwrap_or_else(|e| panic!("{seed:?}: {e}"));
        run.finds(&flag(""), FaultKind::Mbarrier, "nothing orders that after");
    }
}
