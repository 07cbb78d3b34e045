//! Clusters: ranks, the barrier, shared memory of other blocks, barriers and copies that reach them.

#[path = "support/hopper.rs"]
mod hopper;

use hopper::{ONE, Run, text};
use vgpu::{Config, Error, FaultKind, Memory, Module};

const FOUR: Run = Run { blocks: 8, cluster: 4, ..ONE };

/// Stores `%r0` at word `%ctaid.x` of the output, from thread 0.
const OUT: &str =
    "mov.u32 %r9, %ctaid.x; mul.wide.u32 %p9, %r9, 4; add.u64 %p9, %out, %p9; @%q0 st.global.u32 [%p9], %r0;";

#[test]
fn special_registers_tell_rank_and_size() {
    let body = "mov.u32 %r0, %clusterid.x; mov.u32 %r1, %nclusterid.x; mov.u32 %r2, %cluster_ctaid.x;
        mov.u32 %r3, %cluster_nctaid.x; mov.u32 %r4, %cluster_ctarank; mov.u32 %r5, %cluster_nctarank;
        mov.pred %q2, %is_explicit_cluster; selp.u32 %r6, 1, 0, %q2; mov.u32 %r7, %cluster_nctaid.y;
        mov.u32 %r9, %ctaid.x; mul.wide.u32 %p9, %r9, 32; add.u64 %p9, %out, %p9; @!%q0 bra END;
        st.global.v4.u32 [%p9], {%r0, %r1, %r2, %r3}; st.global.v4.u32 [%p9+16], {%r4, %r5, %r6, %r7}; END:";
    for (block, c) in FOUR.words(body, &[], 64).unwrap().chunks(8).enumerate() {
        let rank = block as u32 % 4;
        assert_eq!(c, [block as u32 / 4, 2, rank, 4, rank, 4, 1, 1]);
    }
    let alone = Run { blocks: 1, cluster: 1, ..ONE };
    assert_eq!(alone.words(body, &[], 8).unwrap(), [0, 1, 0, 1, 0, 1, 0, 1]);
    // In three dimensions, x runs fastest; the kernel may fix the shape itself.
    let body =
        "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mad.lo.u32 %r1, %r2, 4, %r1; mad.lo.u32 %r1, %r3, 8, %r1;
        mul.wide.u32 %p9, %r1, 4; add.u64 %p9, %out, %p9; @%q0 st.global.u32 [%p9], %rank;";
    let fixed = text(body).replace(".maxntid 512", ".maxntid 512 .reqnctapercluster 2, 2, 2");
    let mut m = Memory::new();
    let module = Module::load(&fixed, &mut m).unwrap();
    let out = m.alloc(64).unwrap();
    let shape = Config { grid: [4, 2, 2], ..Config::default() };
    let (map, o) = ([0; 128], out.to_le_bytes());
    module.launch("k", &shape, &[&map, &o, &o], &m).unwrap();
    let mut bytes = [0; 64];
    m.read(out, &mut bytes).unwrap();
    for (i, c) in bytes.as_chunks::<4>().0.iter().enumerate() {
        let (x, y, z) = (i % 4, i / 4 % 2, i / 8);
        assert_eq!(u32::from_le_bytes(*c) as usize, x % 2 + y * 2 + z * 4);
    }
    let other = Config { cluster: [4, 1, 1], ..shape };
    assert!(matches!(module.launch("k", &other, &[&map, &o, &o], &m), Err(Error::Invalid(_))));
    let uneven = Config { grid: [3, 2, 2], cluster: [1; 3], ..other };
    assert!(matches!(module.launch("k", &uneven, &[&map, &o, &o], &m), Err(Error::Invalid(_))));
}

#[test]
fn blocks_read_write_and_add_in_each_other() {
    // Each block stores its rank, reads that of the next, adds to the one after, and stores to the one before.
    let body =
        "mov.u32 %r0, 0; @%q0 st.shared.u32 [%s], %rank; @%q0 st.shared.u32 [%s+4], %r0; CLUSTER
        add.u32 %r1, %rank, 1; and.b32 %r1, %r1, 3; mapa.shared::cluster.u32 %r2, %s, %r1; ld.shared::cluster.u32 %r3, [%r2];
        getctarank.shared::cluster.u32 %r4, %r2; getctarank.shared::cluster.u32 %r5, %s;
        cvta.shared.u64 %p1, 0; cvt.u64.u32 %p2, %s; add.u64 %p1, %p1, %p2; mapa.u64 %p3, %p1, %r1; ld.u32 %r6, [%p3];
        getctarank.u64 %r7, %p3; add.u32 %r8, %rank, 2; and.b32 %r8, %r8, 3; mapa.shared::cluster.u32 %r8, %s, %r8;
        atom.shared::cluster.add.u32 %r10, [%r8+4], 10; add.u32 %r11, %rank, 3; and.b32 %r11, %r11, 3;
        mapa.shared::cluster.u32 %r11, %s, %r11; @%q0 st.shared::cluster.u32 [%r11+8], %rank; CLUSTER
        ld.shared.u32 %r12, [%s+4]; ld.shared.u32 %r13, [%s+8]; mov.u32 %r9, %ctaid.x; mul.wide.u32 %p9, %r9, 32;
        add.u64 %p9, %out, %p9; @!%q0 bra END; st.global.v4.u32 [%p9], {%r3, %r4, %r5, %r6};
        st.global.v2.u32 [%p9+16], {%r7, %r12}; st.global.u32 [%p9+24], %r13; END:";
    for seed in [None, Some(1), Some(2)] {
        let out = Run { seed, ..FOUR }.words(body, &[], 64).unwrap();
        for (block, c) in out.chunks(8).enumerate() {
            let (rank, next) = (block as u32 % 4, (block as u32 + 1) % 4);
            // 32 lanes of one other block add 10 each.
            assert_eq!(c[..7], [next, next, rank, next, next, 320, next]);
        }
    }
}

#[test]
fn arrivals_and_stores_reach_barriers_of_other_blocks() {
    // All blocks arrive at the barrier of rank 0 and send it their rank with st.async; it adds the words up.
    let body = format!(
        "@%q0 mbarrier.init.shared.b64 [%b], 4; mov.u32 %r1, 64; @%q0 fence.mbarrier_init.release.cluster; CLUSTER
        mov.u32 %r2, 0; mapa.shared::cluster.u32 %r3, %b, %r2; mapa.shared::cluster.u32 %r4, %s, %r2; mov.u32 %r0, 0;
        @!%q0 bra SENT; mad.lo.u32 %r5, %rank, 16, %r4;
        mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%r3], 16;
        st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%r5], {{%rank, %rank, %rank, %rank}}, [%r3];
        SENT: setp.ne.u32 %q2, %rank, 0; @%q2 bra DONE; WAIT
        ld.shared.u32 %r6, [%s+4]; ld.shared.u32 %r7, [%s+20]; ld.shared.u32 %r8, [%s+36]; ld.shared.u32 %r10, [%s+60];
        add.u32 %r0, %r6, %r7; add.u32 %r0, %r0, %r8; add.u32 %r0, %r0, %r10; DONE: CLUSTER {OUT}"
    );
    for seed in [None, Some(5)] {
        assert_eq!(Run { seed, ..FOUR }.words(&body, &[], 8).unwrap(), [6, 0, 0, 0, 6, 0, 0, 0]);
    }
    // red.async adds to what is there.
    let body = format!(
        "@%q0 mbarrier.init.shared.b64 [%b], 4; mov.u32 %r1, 100; @%q0 st.shared.u32 [%s], %r1; CLUSTER
        mov.u32 %r2, 0; mapa.shared::cluster.u32 %r3, %b, %r2; mapa.shared::cluster.u32 %r4, %s, %r2; mov.u32 %r0, 0;
        @!%q0 bra SENT; mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%r3], 4;
        red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r4], %rank, [%r3];
        SENT: setp.ne.u32 %q2, %rank, 0; @%q2 bra DONE; WAIT ld.shared.u32 %r0, [%s]; DONE: CLUSTER {OUT}"
    );
    assert_eq!(FOUR.words(&body, &[], 8).unwrap(), [106, 0, 0, 0, 106, 0, 0, 0]);
}

#[test]
fn copies_are_multicast() {
    // Rank 1 loads 64 bytes into ranks 0, 1 and 3, each of which expects them at its own barrier.
    let body = format!(
        "@%q0 mbarrier.init.shared.b64 [%b], 1; mov.u32 %r0, 55; @%q0 st.shared.u32 [%s], %r0; mov.u16 %h0, 11;
        fence.mbarrier_init.release.cluster; CLUSTER setp.eq.u32 %q2, %rank, 2; @%q2 bra OTHER; @!%q0 bra HERE; EXPECT 64;
        setp.ne.u32 %q3, %rank, 1; @%q3 bra HERE;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%s], [%in], 64, [%b], %h0;
        HERE: WAIT OTHER: ld.shared.u32 %r0, [%s]; CLUSTER {OUT}"
    );
    for seed in [None, Some(1)] {
        let run = Run { seed, ..FOUR };
        assert_eq!(run.words(&body, &[9; 16], 8).unwrap(), [9, 9, 55, 9, 9, 9, 55, 9]);
    }
    let body = "INIT CLUSTER mov.u16 %h0, 0x10; @%q0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [%s], [%in], 64, [%b], %h0;";
    FOUR.finds(body, FaultKind::OutOfBounds, "cluster of 4");
}

#[test]
fn mistakes_between_blocks_are_found() {
    use FaultKind::{Barrier, Deadlock, DivergentBarrier, OutOfBounds, UseAfterFree};
    let two = Run { blocks: 2, cluster: 2, ..ONE };
    // Rank 1 returns while rank 0 still reads it.
    let body = "@%q0 st.shared.u32 [%s], %rank; CLUSTER setp.eq.u32 %q2, %rank, 1; @%q2 bra END; mov.u32 %r0, 0;
        SPIN: nanosleep.u32 100; add.u32 %r0, %r0, 1; setp.lt.u32 %q3, %r0, 50; @%q3 bra SPIN; mov.u32 %r1, 1;
        mapa.shared::cluster.u32 %r2, %s, %r1; ld.shared::cluster.u32 %r3, [%r2]; END:";
    two.finds(body, UseAfterFree, "which has returned");
    two.finds(
        "mov.u32 %r1, 2; mapa.shared::cluster.u32 %r2, %s, %r1; ld.shared::cluster.u32 %r3, [%r2];",
        OutOfBounds,
        "block 2",
    );
    two.finds("mov.u32 %r1, 1; mapa.shared::cluster.u32 %r2, %s, %r1; ld.shared.u32 %r3, [%r2];", OutOfBounds, "");
    // One block never arrives, but spins until its barrier is complete.
    let body = "INIT setp.eq.u32 %q2, %rank, 1; @%q2 bra OTHER; CLUSTER OTHER: WAIT";
    let f = two.finds(body, Deadlock, "waits at the barrier of the cluster");
    assert!(f.message.contains("block [1, 0, 0] warp 0 waits at the mbarrier"), "{}", f.message);
    two.finds("barrier.cluster.wait;", Barrier, "without barrier.cluster.arrive");
    two.finds("barrier.cluster.arrive; barrier.cluster.arrive;", Barrier, "a second");
    two.finds("@%q0 barrier.cluster.arrive.aligned;", DivergentBarrier, "cluster barrier in lanes");
    // A block that has arrived may return; the others' wait is complete.
    let body = format!(
        "barrier.cluster.arrive.relaxed; setp.eq.u32 %q2, %rank, 1; @%q2 bra END; barrier.cluster.wait; mov.u32 %r0, 1; {OUT} END:"
    );
    assert_eq!(two.words(&body, &[], 2).unwrap(), [1, 0]);
    // Unwritten bytes of another block.
    let body =
        "CLUSTER mov.u32 %r1, 1; mapa.shared::cluster.u32 %r2, %s, %r1; ld.shared::cluster.u32 %r3, [%r2]; CLUSTER
        st.global.u32 [%out], %r3;";
    two.finds(body, FaultKind::Uninitialised, "never written");
}
