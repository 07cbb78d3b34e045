//! Bulk and tensor copies: every rank, swizzle and fill against boxes worked out element by element; reductions; mistakes.

#[path = "support/hopper.rs"]
mod hopper;

use hopper::{ONE, text};
use vgpu::tensor_map::{TensorMap, Tiled, encode};
use vgpu::{Error, FaultKind, Memory, Module};

/// A tensor in memory: element (c0, c1, ...) is at `base + sum c[d] * stride[d]`.
struct Case {
    data_type: u32,
    size: usize,
    dims: Vec<u64>,
    strides: Vec<u64>,
    box_dims: Vec<u32>,
    steps: Vec<u32>,
    swizzle: u32,
    nan: bool,
    at: Vec<i64>,
}

impl Case {
    fn tiled(&self, address: u64) -> Tiled<'_> {
        Tiled {
            data_type: self.data_type,
            rank: self.dims.len() as u32,
            address,
            dims: &self.dims,
            strides: &self.strides,
            box_dims: &self.box_dims,
            element_strides: &self.steps,
            interleave: 0,
            swizzle: self.swizzle,
            l2_promotion: 0,
            oob_fill: u32::from(self.nan),
        }
    }

    fn bytes(&self) -> usize {
        let last = self.dims.len() - 1;
        let outer = if last == 0 { 1 } else { self.dims[last] * self.strides[last - 1] };
        (self.dims[0] as usize * self.size).max(outer as usize)
    }

    /// For each byte of the box in shared memory: its place there, and the byte of the tensor or of what fills it.
    fn places(&self) -> Vec<(usize, Result<usize, u8>)> {
        let rank = self.dims.len();
        let counts: Vec<usize> = (0..rank)
            .map(|d| if d == 0 { self.box_dims[0] as usize } else { self.box_dims[d].div_ceil(self.steps[d]) as usize })
            .collect();
        let span = [0, 32, 64, 128][self.swizzle as usize];
        let inner = counts[0] * self.size;
        let pitch = if span == 0 { inner } else { span };
        let mut list = Vec::new();
        for n in 0..counts.iter().product::<usize>() {
            let (mut rest, mut row, mut step) = (n, 0, 1);
            let (mut offset, mut inside) = (0i64, true);
            let mut first = 0;
            for d in 0..rank {
                let i = rest % counts[d];
                rest /= counts[d];
                if d == 0 {
                    first = i;
                } else {
                    row += i * step;
                    step *= counts[d];
                }
                let c = self.at[d] + i as i64 * if d == 0 { 1 } else { i64::from(self.steps[d]) };
                inside &= c >= 0 && c < self.dims[d] as i64;
                offset += c * if d == 0 { self.size as i64 } else { self.strides[d - 1] as i64 };
            }
            for b in 0..self.size {
                let byte = first * self.size + b;
                // 16-byte pieces of a row change places by the number of the 128-byte line they are in.
                let line = row * pitch / 128;
                let piece = (row * pitch % 128 + byte) / 16;
                let piece = match self.swizzle {
                    0 => piece,
                    1 => piece ^ (line & 1),
                    2 => piece ^ (line & 3),
                    _ => piece ^ (line & 7),
                };
                let place = if span == 0 { row * pitch + byte } else { line * 128 + piece * 16 + byte % 16 };
                let nan = match self.size {
                    2 => [0xff, 0x7f][b],
                    4 => [0xff, 0xff, 0xff, 0x7f][b],
                    _ => [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f][b],
                };
                let fill = if self.nan { nan } else { 0 };
                list.push((place, if inside { Ok(offset as usize + b) } else { Err(fill) }));
            }
        }
        list
    }

    fn coordinates(&self) -> String {
        let list: Vec<String> = self.at.iter().map(|c| c.to_string()).collect();
        format!("{{{}}}", list.join(", "))
    }
}

/// Cases of every rank, swizzle and element size, with boxes that stick out on both sides.
fn cases() -> Vec<Case> {
    let mut list = Vec::new();
    // Data type, size, swizzle, bytes of the inner box.
    let kinds = [
        (0, 1, 0, 48),
        (9, 2, 3, 128),
        (6, 2, 2, 64),
        (7, 4, 1, 32),
        (8, 8, 3, 128),
        (2, 4, 0, 112),
        (9, 2, 3, 64),
        (1, 2, 2, 32),
    ];
    for (n, (data_type, size, swizzle, inner)) in kinds.into_iter().enumerate() {
        for rank in 1..=5 {
            let e = inner / size;
            let dims: Vec<u64> = [e as u64 + 40, 7, 5, 4, 3][..rank].to_vec();
            let mut strides: Vec<u64> = Vec::new();
            for d in 1..rank {
                let below = if d == 1 { dims[0] * size as u64 } else { strides[d - 2] * dims[d - 1] };
                // Rows are padded.
                strides.push(below.next_multiple_of(16) + 16);
            }
            let box_dims: Vec<u32> = [e as u32, 6, 3, 2, 2][..rank].to_vec();
            for (i, at) in [[3i64, 0, 1, 0, 0], [-5, -2, -1, 1, -1], [e as i64, 4, 3, 3, 2], [0, 9, 0, 0, 0]]
                .into_iter()
                .enumerate()
            {
                list.push(Case {
                    data_type,
                    size,
                    dims: dims.clone(),
                    strides: strides.clone(),
                    box_dims: box_dims.clone(),
                    steps: [1, 1 + (i as u32 + n as u32) % 2, 1, 2, 1][..rank].to_vec(),
                    swizzle,
                    nan: i % 2 == 1 && matches!(data_type, 6..=9),
                    at: at[..rank].to_vec(),
                });
            }
        }
    }
    list
}

fn noise(n: usize) -> Vec<u8> {
    (0..n as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8).collect()
}

/// Memory with a tensor, its map, a list of places to visit, and an output.
fn prepare(c: &Case, body: &str, list: &[u32], words: usize) -> (Memory, Module, [u8; 128], [u64; 3]) {
    let mut m = Memory::new();
    let module = Module::load(&text(body), &mut m).unwrap_or_else(|e| panic!("{body}: {e}"));
    let tensor = m.alloc(c.bytes()).unwrap();
    m.write(tensor, &noise(c.bytes())).unwrap();
    let map = encode(&c.tiled(tensor)).unwrap();
    let places = m.alloc(list.len().max(1) * 4).unwrap();
    m.write(places, &list.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    let out = m.alloc(words * 4).unwrap();
    m.fill(out, 0, words * 4).unwrap();
    (m, module, map, [tensor, places, out])
}

#[test]
fn boxes_arrive_where_the_tables_say() {
    for c in cases() {
        let places = c.places();
        let rank = c.dims.len();
        let bytes = TensorMap::new(&c.tiled(0x1000)).unwrap().box_bytes();
        assert_eq!(bytes, places.len());
        // Thread t copies the bytes at places t, t + 32, ... to the output.
        let n = places.len();
        let body = format!(
            "INIT @!%q0 bra READY; EXPECT {bytes};
            cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%s], [%map, {}], [%b];
            READY: WAIT
            mov.u32 %r0, %t; LOOP: setp.ge.u32 %q2, %r0, {n}; @%q2 bra END; mul.wide.u32 %p1, %r0, 4; add.u64 %p2, %in, %p1;
            ld.global.u32 %r1, [%p2]; add.u32 %r1, %r1, %s; ld.shared.u8 %r2, [%r1]; add.u64 %p3, %out, %p1;
            st.global.u32 [%p3], %r2; add.u32 %r0, %r0, 32; bra LOOP; END:",
            c.coordinates()
        );
        let list: Vec<u32> = places.iter().map(|(p, _)| *p as u32).collect();
        let (m, module, map, [tensor, from, out]) = prepare(&c, &body, &list, n);
        ONE.launch(&module, &m, &map, from, out)
            .unwrap_or_else(|e| panic!("rank {rank} {:?} at {:?}: {e}", c.box_dims, c.at));
        let mut data = vec![0; c.bytes()];
        m.read(tensor, &mut data).unwrap();
        let mut got = vec![0; n * 4];
        m.read(out, &mut got).unwrap();
        for (i, (place, from)) in places.iter().enumerate() {
            let want = from.map_or_else(|fill| fill, |at| data[at]);
            assert_eq!(got[4 * i], want, "rank {rank}, swizzle {}, at {:?}, byte {i} at {place}", c.swizzle, c.at);
        }
    }
}

#[test]
fn boxes_are_stored_where_they_belong_and_nowhere_else() {
    for c in cases().into_iter().filter(|c| !c.nan) {
        let places = c.places();
        let rank = c.dims.len();
        // Shared byte p holds p * 7; the whole box is written by ordinary stores, then fenced.
        let end = places.iter().map(|(p, _)| p + 1).max().unwrap_or(0).next_multiple_of(128);
        let body = format!(
            "mov.u32 %r0, %t; LOOP: setp.ge.u32 %q2, %r0, {end}; @%q2 bra DONE; mul.lo.u32 %r1, %r0, 7; add.u32 %r2, %r0, %s;
            st.shared.u8 [%r2], %r1; add.u32 %r0, %r0, 32; bra LOOP; DONE: fence.proxy.async.shared::cta; bar.sync 0;
            @!%q0 bra END; cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group [%map, {}], [%s];
            cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:",
            c.coordinates()
        );
        let (m, module, map, [tensor, from, out]) = prepare(&c, &body, &[], 1);
        ONE.launch(&module, &m, &map, from, out)
            .unwrap_or_else(|e| panic!("rank {rank} {:?} at {:?}: {e}", c.box_dims, c.at));
        let mut want = noise(c.bytes());
        for (place, to) in &places {
            if let Ok(at) = to {
                want[*at] = (place * 7) as u8;
            }
        }
        let mut got = vec![0; c.bytes()];
        m.read(tensor, &mut got).unwrap();
        assert!(got == want, "rank {rank}, swizzle {}, at {:?}", c.swizzle, c.at);
    }
}

#[test]
fn linear_copies_go_both_ways_and_add() {
    let input: Vec<u32> = (0..64).map(|i| i * 3 + 1).collect();
    // In, then out again; with a reduction the output, all ones before, holds more.
    let load = "INIT @!%q0 bra READY; EXPECT 256;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%s], [%in], 256, [%b], %p0;
        READY: WAIT fence.proxy.async; bar.sync 0; @!%q0 bra END;";
    let finish = "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; cp.async.bulk.wait_group 0; END:";
    let copy = |line: &str| ONE.words(&format!("{load} {line} {finish}"), &input, 64).unwrap();
    assert_eq!(copy("cp.async.bulk.global.shared::cta.bulk_group [%out], [%s], 256;"), input);
    // Not waited for in full: what was read arrives at the latest when the block has returned.
    let lazy = format!(
        "{load} cp.async.bulk.global.shared::cta.bulk_group [%out], [%s], 256; cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0; END:"
    );
    assert_eq!(ONE.words(&lazy, &input, 64).unwrap(), input);
    let ones = "mov.u32 %r1, 5; st.global.v4.u32 [%out], {%r1, %r1, %r1, %r1};";
    let reduce = |op: &str, f: &dyn Fn(u32) -> u32| {
        let got = copy(&format!("{ones} cp.reduce.async.bulk.global.shared::cta.bulk_group.{op} [%out], [%s], 16;"));
        let want: Vec<u32> = input[..4].iter().map(|x| f(*x)).collect();
        assert_eq!(got[..4], want, "{op}");
    };
    reduce("add.u32", &|x| x + 5);
    reduce("min.s32", &|x| x.min(5));
    reduce("max.u32", &|x| x.max(5));
    reduce("and.b32", &|x| x & 5);
    reduce("or.b32", &|x| x | 5);
    reduce("xor.b32", &|x| x ^ 5);
    reduce("inc.u32", &|x| if 5 >= x { 0 } else { 6 });
    reduce("dec.u32", &|x| if 5 > x { x } else { 4 });
    reduce("add.u64", &|x| x + 5);
    // Within the block, and with a reduction there.
    let across = format!(
        "{load} mbarrier.init.shared.b64 [%b+8], 1; mbarrier.arrive.expect_tx.shared.b64 _, [%b+8], 64; add.u32 %r2, %s, 1024;
        add.u32 %r3, %b, 8; cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r2], [%s], 64, [%r3];
        W2: mbarrier.try_wait.parity.shared.b64 %q1, [%b+8], 0; @!%q1 bra W2; mbarrier.arrive.expect_tx.shared.b64 _, [%b+8], 64;
        cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.u32 [%r2], [%s], 64, [%r3];
        W3: mbarrier.try_wait.parity.shared.b64 %q1, [%b+8], 1; @!%q1 bra W3;
        cp.async.bulk.global.shared::cta.bulk_group [%out], [%r2], 64; {finish}"
    );
    let want: Vec<u32> = input[..16].iter().map(|x| x * 2).collect();
    assert_eq!(ONE.words(&across, &input, 16).unwrap(), want);
    ONE.words("cp.async.bulk.prefetch.L2.global [%in], 256;", &input, 1).unwrap();
}

#[test]
fn floats_are_added_by_tensor_reductions() {
    // bf16: 1.5 in shared memory, noise turned into 2.0 in the tensor; f32 the same.
    for (data_type, size, one, two, sum) in [
        (9, 2, 0x3fc0u32, 0x4000u32, 0x4060u32),
        (6, 2, 0x3e00, 0x4000, 0x4300),
        (7, 4, 0x3fc0_0000, 0x4000_0000, 0x4060_0000),
    ] {
        let c = Case {
            data_type,
            size,
            dims: vec![20, 6],
            strides: vec![20 * size as u64 + if size == 2 { 8 } else { 0 }],
            box_dims: vec![16, 4],
            steps: vec![1, 1],
            swizzle: 0,
            nan: false,
            at: vec![10, 4],
        };
        let word = if size == 2 { one | one << 16 } else { one };
        let body = format!(
            "mov.u32 %r0, %t; mov.u32 %r1, {word}; L: setp.ge.u32 %q2, %r0, 64; @%q2 bra D; mad.lo.u32 %r2, %r0, 4, %s;
            st.shared.u32 [%r2], %r1; add.u32 %r0, %r0, 32; bra L; D: fence.proxy.async; bar.sync 0; @!%q0 bra END;
            cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%map, {{10, 4}}], [%s];
            cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:"
        );
        let (m, module, map, [tensor, from, out]) = prepare(&c, &body, &[], 1);
        let fill: Vec<u8> = two.to_le_bytes()[..size].iter().copied().cycle().take(c.bytes()).collect();
        m.write(tensor, &fill).unwrap();
        ONE.launch(&module, &m, &map, from, out).unwrap();
        let mut got = vec![0; c.bytes()];
        m.read(tensor, &mut got).unwrap();
        for row in 0..6 {
            for col in 0..20 {
                let at = row * c.strides[0] as usize + col * size;
                let x = got[at..at + size].iter().rev().fold(0u32, |x, b| x << 8 | u32::from(*b));
                assert_eq!(x, if row >= 4 && col >= 10 { sum } else { two }, "({row}, {col}) of type {data_type}");
            }
        }
    }
}

#[test]
fn copies_used_too_early_or_overwritten_are_found() {
    use FaultKind::{InFlight, Mbarrier, ProxyFence};
    let load = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%in], 64, [%b];";
    let first = |rest: &str| format!("INIT @!%q0 bra END; EXPECT 64; {load} {rest} END: WAIT");
    ONE.finds(&first("ld.shared.u32 %r0, [%s];"), InFlight, "a read of the destination of a bulk copy");
    ONE.finds(&first("st.shared.u32 [%s], %t;"), InFlight, "the destination of a bulk copy");
    ONE.finds(&first(load), InFlight, "copies onto the destination of a bulk copy");
    assert!(ONE.words(&first("st.shared.u32 [%s+64], %t;"), &[1; 16], 1).is_ok());
    // Another warp that does not wait.
    let two = hopper::Run { block: 64, ..ONE };
    two.finds(
        &format!(
            "INIT @!%q0 bra OTHER; EXPECT 64; {load} OTHER: setp.ge.u32 %q2, %t, 32; @%q2 ld.shared.u32 %r0, [%s]; WAIT"
        ),
        InFlight,
        "a read of the destination",
    );
    ONE.finds(&format!("INIT @!%q0 bra END; EXPECT 64; {load} END: ret;"), InFlight, "the block returns");
    // Bytes that nobody expects, with nobody to arrive.
    ONE.finds(
        &format!("INIT @!%q0 bra END; EXPECT 32; {load} END: WAIT"),
        FaultKind::Deadlock,
        "-32 bytes outstanding",
    );
    ONE.finds(&format!("@!%q0 bra END; {load} END: ret;"), Mbarrier, "mbarrier.init has to come first");
    ONE.finds(&first("mbarrier.inval.shared.b64 [%b];"), Mbarrier, "will still count its bytes");
    // Copies out.
    let store = "cp.async.bulk.global.shared::cta.bulk_group [%out], [%s], 64; cp.async.bulk.commit_group;";
    let fill = "mul.lo.u32 %r0, %t, 4; add.u32 %r0, %r0, %s; st.shared.u32 [%r0], %t;";
    let out = |fence: &str, rest: &str| format!("{fill} {fence} bar.sync 0; @!%q0 bra END; {store} {rest} END:");
    let fence = "fence.proxy.async.shared::cta;";
    ONE.finds(&out("", "cp.async.bulk.wait_group 0;"), ProxyFence, "without a fence.proxy.async");
    ONE.finds(
        &out("fence.proxy.async.global;", "cp.async.bulk.wait_group 0;"),
        ProxyFence,
        "without a fence.proxy.async",
    );
    ONE.finds(
        &out(fence, "st.shared.u32 [%s], %t; cp.async.bulk.wait_group 0;"),
        InFlight,
        "the source of a bulk copy",
    );
    ONE.finds(
        &out(fence, &format!("{store} cp.async.bulk.wait_group.read 1; st.shared.u32 [%s], %t;")),
        InFlight,
        "the source",
    );
    ONE.finds(&out(fence, ""), InFlight, "the block returns before cp.async.bulk.wait_group");
    assert!(ONE.words(&out(fence, "cp.async.bulk.wait_group.read 0; st.shared.u32 [%s], %t;"), &[], 64).is_ok());
    // Matrices are stored by the same proxy as words.
    let matrix = "mul.lo.u32 %r1, %t, 16; add.u32 %r1, %r1, %s; stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r0, %r0, %r0, %r0};";
    ONE.finds(&out("", "cp.async.bulk.wait_group 0;").replace(fill, matrix), ProxyFence, "without a fence.proxy.async");
    ONE.words(&out(fence, "cp.async.bulk.wait_group 0;").replace(fill, &format!("mov.u32 %r0, 1; {matrix}")), &[], 64)
        .unwrap();
    // Data that is not there cannot be sent on.
    ONE.finds(
        &format!("INIT @!%q0 bra END; EXPECT 64; {load} {store} cp.async.bulk.wait_group 0; END: WAIT"),
        InFlight,
        "the source of a bulk copy: a read of the destination",
    );
}

#[test]
fn wrong_places_and_maps_are_named() {
    use FaultKind::{Descriptor, Misaligned, OutOfBounds, Uninitialised};
    let load = |to: &str, from: &str, n: u32| {
        format!(
            "INIT @!%q0 bra END; EXPECT 64; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{to}], [{from}], {n}, [%b]; END: WAIT"
        )
    };
    ONE.finds(&load("%s+8", "%in", 64), Misaligned, "multiple of 16");
    ONE.finds(&load("%s", "%in+8", 64), Misaligned, "multiple of 16");
    ONE.finds(&load("%s", "%in", 40), Misaligned, "40 bytes, not a multiple of 16");
    ONE.finds(&load("%s+65520", "%in", 4096), OutOfBounds, "shared memory");
    ONE.finds(&load("%s", "%in+16384", 64), OutOfBounds, "allocation");
    // Bytes that nobody has written are found where they are used, not where they are copied.
    let early = "INIT @!%q0 bra END; EXPECT 64; add.u64 %p1, %in, 8192;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%p1], 64, [%b]; END: WAIT";
    let mut m = Memory::new();
    let module =
        Module::load(&text(&format!("{early} ld.shared.u32 %r0, [%s]; st.global.u32 [%out], %r0;")), &mut m).unwrap();
    let from = m.alloc(16384).unwrap();
    match ONE.launch(&module, &m, &[0; 128], from, from) {
        Err(Error::Fault(f)) if f.kind == Uninitialised && f.message.contains("ld.shared") => {}
        other => panic!("{other:?}"),
    }
    let tensor = |map: &str, coordinates: &str| {
        let rank = coordinates.split(',').count();
        format!(
            "INIT @!%q0 bra END; EXPECT 64;
            cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [{map}, {{{coordinates}}}], [%b]; END: WAIT"
        )
    };
    ONE.finds(&tensor("%map", "0, 0"), Descriptor, "no tensor map");
    ONE.finds(&tensor("%in", "0, 0"), Descriptor, "no tensor map");
    ONE.finds(&tensor("%map+32", "0, 0"), Misaligned, "tensor map");
    let c = Case {
        data_type: 9,
        size: 2,
        dims: vec![64, 8],
        strides: vec![128],
        box_dims: vec![64, 8],
        steps: vec![1, 1],
        swizzle: 3,
        nan: false,
        at: vec![0, 0],
    };
    let fault = |body: &str| {
        let (m, module, map, [_, from, out]) = prepare(&c, body, &[0; 4], 1);
        match ONE.launch(&module, &m, &map, from, out) {
            Err(Error::Fault(f)) => *f,
            other => panic!("{body}: {other:?}"),
        }
    };
    let f = fault(&tensor("%map", "0, 0, 0"));
    assert!(f.kind == Descriptor && f.message.contains("3 coordinates for a tensor map of rank 2"), "{f:?}");
    let f = fault(&tensor("%map", "0, 0").replace("[%s]", "[%s+64]"));
    assert!(f.kind == Misaligned && f.message.contains("multiple of 128"), "{f:?}");
    let f = fault(&tensor("%map", "0, 0"));
    assert!(f.kind == FaultKind::Deadlock && f.message.contains("-960 bytes outstanding"), "{f:?}");
}

#[test]
fn forms_that_are_not_executed_are_refused_when_loaded() {
    let tensor = "cp.async.bulk.tensor.2d.shared::cluster.global";
    for line in [
        format!("{tensor}.im2col.mbarrier::complete_tx::bytes [%s], [%map, {{0, 0}}], [%b], {{%h0}};"),
        format!("{tensor}.tile::gather4.mbarrier::complete_tx::bytes [%s], [%map, {{0, 0}}], [%b];"),
        format!("{tensor}.mbarrier::complete_tx::bytes [%s], [%map, {{0}}], [%b];"),
        format!("{tensor}.bulk_group [%s], [%map, {{0, 0}}], [%b];"),
        format!("{tensor}.mbarrier::complete_tx::bytes [%s], [%map, {{0, 0}}];"),
        "cp.async.bulk.tensor.6d.global.shared::cta.bulk_group [%map, {0, 0}], [%s];".into(),
        "cp.async.bulk.global.shared::cta [%out], [%s], 16;".into(),
        "cp.async.bulk.global.global.bulk_group [%out], [%in], 16;".into(),
        "cp.async.bulk.wait_group %r0;".into(),
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.min.f32 [%out], [%s], 16;".into(),
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.b32 [%out], [%s], 16;".into(),
    ] {
        let loaded = Module::load(&text(&line), &mut Memory::new());
        assert!(matches!(loaded, Err(Error::Unsupported { .. })), "{line}: {:?}", loaded.err());
    }
}
