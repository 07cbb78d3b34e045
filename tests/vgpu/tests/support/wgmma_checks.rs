//! Mistakes around warpgroup products: registers and operands in flight, missing fences and waits, warps that disagree.

use super::wgmma::{B_START, Ran, SPACE, k_major, kernel, launch};
use vgpu::{Error, Fault, FaultKind, Memory, Module};

/// Runs `body` with a product of eight columns at hand: `MMA` stands for it, `GROUP` for commit and wait.
fn small(body: &str) -> Result<Ran, Fault> {
    let mma = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, 1, 1, 1, 0, 0;";
    let rs = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, %db, 1, 1, 1, 0;";
    let body = body
        .replace("MMA", mma)
        .replace("RS", rs)
        .replace("FENCE", "wgmma.fence.sync.aligned;")
        .replace("COMMIT", "wgmma.commit_group.sync.aligned;")
        .replace("WAIT", "wgmma.wait_group.sync.aligned 0;");
    let (da, db) = (k_major(128, 2, 0).descriptor(), k_major(128, 2, B_START).descriptor());
    match launch(&kernel(4, &body), &[0; SPACE], &[0; 512], &[0; 512], da, db, true) {
        Ok(r) => Ok(r),
        Err(Error::Fault(f)) => Err(*f),
        Err(e) => panic!("{body}: {e}"),
    }
}

#[track_caller]
fn finds(body: &str, kind: FaultKind, text: &str) {
    match small(body) {
        Err(f) if f.kind == kind && f.message.contains(text) => {}
        Err(f) => panic!("{body}: {f:?}"),
        Ok(_) => panic!("{body}: nothing found"),
    }
}

#[test]
fn correct_sequences_raise_no_alarm() {
    for body in [
        "FENCE MMA COMMIT WAIT",
        // Two products in a row on the same accumulators need no fence between.
        "FENCE MMA MMA COMMIT MMA COMMIT WAIT",
        "FENCE MMA COMMIT WAIT add.f32 %d0, %d0, %d1; FENCE MMA COMMIT WAIT",
        "FENCE RS COMMIT WAIT mov.u32 %a0, 0; FENCE RS COMMIT WAIT",
        // Reading A's registers while they are read is harmless.
        "FENCE RS COMMIT mov.u32 %r0, %a0; WAIT",
        // After one group of two, the first one's operands are free.
        "FENCE MMA COMMIT wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%a0, %a1, %a2, %a3}, %db, %db, 1, 1, 1, 0, 0;
         COMMIT wgmma.wait_group.sync.aligned 1; mov.u32 %r0, %d0; st.shared.u32 [%s], %r0; WAIT",
    ] {
        if let Err(f) = small(body) {
            panic!("{body}: {f:?}");
        }
    }
}

#[test]
fn registers_in_flight_are_found() {
    use FaultKind::{InFlight, Warpgroup};
    finds("FENCE MMA COMMIT mov.u32 %r0, %d0; WAIT", InFlight, "before wgmma.wait_group");
    finds("FENCE MMA mov.u32 %r0, %d0; COMMIT WAIT", InFlight, "before wgmma.commit_group");
    finds("FENCE MMA COMMIT mov.u32 %d3, 0; WAIT", InFlight, "is written");
    finds("FENCE RS COMMIT mov.u32 %a1, 0; WAIT", InFlight, "is written");
    finds("FENCE MMA COMMIT wgmma.wait_group.sync.aligned 1; mov.u32 %r0, %d0;", InFlight, "is read");
    // The first group is waited for, the second is not.
    finds("FENCE MMA COMMIT MMA COMMIT wgmma.wait_group.sync.aligned 1; mov.u32 %r0, %d0;", InFlight, "is read");
    finds("MMA COMMIT WAIT", Warpgroup, "first product");
    finds("FENCE mov.u32 %d0, 0; MMA COMMIT WAIT", Warpgroup, "without a wgmma.fence since");
    finds("FENCE mov.u32 %a0, 0; RS COMMIT WAIT", Warpgroup, "without a wgmma.fence since");
    finds("FENCE MMA COMMIT WAIT mov.u32 %r0, %d0; MMA COMMIT WAIT", Warpgroup, "without a wgmma.fence since");
}

#[test]
fn factors_and_sums_that_nobody_wrote_are_found() {
    let fresh = |register: &str, product: &str| {
        format!("{{ .local .align 4 .b8 own[4]; ld.local.u32 {register}, [own]; FENCE {product} COMMIT WAIT }}")
    };
    let part = "a factor or sum of a product was never written";
    finds(&fresh("%d2", "MMA"), FaultKind::Uninitialised, part);
    finds(&fresh("%a3", "RS"), FaultKind::Uninitialised, part);
    // Without scale-d the sums are only written.
    let alone = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, 0, 1, 1, 0, 0;";
    if let Err(f) = small(&fresh("%d2", alone)) {
        panic!("{f:?}");
    }
}

#[test]
fn shared_operands_in_flight_are_found() {
    use FaultKind::{InFlight, ProxyFence};
    finds("FENCE MMA COMMIT st.shared.u32 [%s], %t; WAIT", InFlight, "wgmma.wait_group has not waited");
    finds("FENCE MMA COMMIT st.shared.u32 [%s+32768], %t; WAIT", InFlight, "wgmma.wait_group has not waited");
    finds("FENCE MMA COMMIT atom.shared.add.u32 %r0, [%s], 1; WAIT", InFlight, "wgmma.wait_group has not waited");
    // The bytes beside the operand are free.
    assert!(small("FENCE MMA COMMIT st.shared.u32 [%s+64], %t; st.shared.u32 [%s+33792], %t; WAIT").is_ok());
    finds("st.shared.u32 [%s], %t; bar.sync 0; FENCE MMA COMMIT WAIT", ProxyFence, "without a fence.proxy.async");
    assert!(small("st.shared.u32 [%s], 0; fence.proxy.async.shared::cta; bar.sync 0; FENCE MMA COMMIT WAIT").is_ok());
    // The fence of the thread that issues the product, after the barrier, orders them as well.
    assert!(small("st.shared.u32 [%s], 0; bar.sync 0; fence.proxy.async; FENCE MMA COMMIT WAIT").is_ok());
}

#[test]
fn warpgroups_must_agree() {
    use FaultKind::Warpgroup;
    let warp0 = "setp.lt.u32 %q, %t, 32;";
    finds(&format!("{warp0} FENCE @%q bra SKIP; MMA SKIP: COMMIT WAIT"), Warpgroup, "warp 0");
    finds(&format!("{warp0} @%q add.u64 %db, %db, 64; FENCE MMA COMMIT WAIT"), Warpgroup, "different descriptors");
    finds("setp.lt.u32 %q, %t, 5; @%q add.u64 %db, %db, 64; FENCE MMA COMMIT WAIT", Warpgroup, "lane 5");
    finds("setp.lt.u32 %q, %t, 5; FENCE @%q bra SKIP; MMA SKIP: COMMIT WAIT", Warpgroup, "execute the product");
    finds("FENCE MMA ret;", Warpgroup, "wgmma.wait_group");
}

#[test]
fn descriptors_are_checked() {
    use FaultKind::{Descriptor, OutOfBounds};
    finds("or.b64 %db, %db, 0x4000; FENCE MMA COMMIT WAIT", Descriptor, "unused");
    finds("mov.u64 %p10, 0x3fff; or.b64 %db, %db, %p10; FENCE MMA COMMIT WAIT", OutOfBounds, "98304 bytes");
}

#[test]
fn invalid_products_are_refused_when_loaded() {
    let refused = |line: &str| {
        let text = kernel(128, line);
        match Module::load(&text, &mut Memory::new()) {
            Err(Error::Unsupported { message, .. }) => message,
            other => panic!("{line}: {:?}", other.err()),
        }
    };
    let d = |n: usize| (0..n).map(|i| format!("%d{i}")).collect::<Vec<_>>().join(", ");
    let mma = |shape: &str, n: usize, tail: &str| {
        format!("wgmma.mma_async.sync.aligned.{shape} {{{}}}, %da, %db, {tail};", d(n))
    };
    for line in [
        mma("m64n12k16.f32.bf16.bf16", 6, "1, 1, 1, 0, 0"),
        mma("m64n16k8.f32.bf16.bf16", 8, "1, 1, 1, 0, 0"),
        mma("m64n16k16.f32.bf16.f16", 8, "1, 1, 1, 0, 0"),
        mma("m64n16k16.f16.bf16.bf16", 4, "1, 1, 1, 0, 0"),
        mma("m64n16k16.f32.bf16.bf16", 4, "1, 1, 1, 0, 0"),
        mma("m64n16k16.f32.bf16.bf16", 8, "1, 1, 1, 0"),
        mma("m64n16k16.f32.bf16.bf16", 8, "1, 2, 1, 0, 0"),
        mma("m64n16k16.f32.bf16.bf16", 8, "1, 1, 1, 0, 2"),
        mma("m64n16k8.f32.tf32.tf32", 8, "1, 1, 1, 0, 0"),
        mma("m64n40k32.s32.s8.s8", 20, "1"),
        mma("m64n16k32.f32.e4m3.s8", 8, "1, 1, 1"),
        "wgmma.mma_async.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, 1, 1, 1, 0, 0;".into(),
        "wgmma.fence.aligned;".into(),
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16;".into(),
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3};".into(),
        "wgmma.mma_async.sync.aligned.m64nk.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, 1, 1, 1, 0, 0;".into(),
        "wgmma.wait_group.sync.aligned %r0;".into(),
        "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, %r0, 0, 1, 1, 1, 0, 0;"
            .into(),
    ] {
        assert!(!refused(&line).is_empty());
    }
}
