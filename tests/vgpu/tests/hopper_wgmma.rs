//! Warpgroup products: every width, layout and type against sums over f64, with layouts written from the ISA text.

use vgpu::{Config, Counters, Error, Fault, FaultKind, Memory, Module};

const SPACE: usize = 98304;

/// An operand in shared memory: element (mn, k) lies at `place`.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// Bytes of the swizzle: 0, 32, 64, 128.
    span: usize,
    /// Whether K is contiguous.
    k_major: bool,
    /// Leading and stride byte offsets.
    leading: usize,
    stride: usize,
    start: usize,
    /// Bytes of an element.
    size: usize,
}

impl Layout {
    /// The tables of the ISA text: core matrices of 8 rows of 16 bytes without swizzle; otherwise patterns of 8 rows as wide
    /// as the swizzle, in which 16-byte piece c of row r lies at c xor (r, r / 2 or r / 4).
    fn place(&self, mn: usize, k: usize) -> usize {
        let per = 16 / self.size;
        let (line, along) = if self.k_major { (mn, k) } else { (k, mn) };
        let (piece, inside) = (along / per, along % per * self.size);
        if self.span == 0 {
            // Without swizzle the leading offset goes along K; the stride along M or N.
            let (group, next) = if self.k_major {
                (self.stride, self.leading)
            } else {
                (self.leading, self.stride)
            };
            return self.start + line / 8 * group + line % 8 * 16 + piece * next + inside;
        }
        let wide = self.span / 16;
        let (row, column) = (line % 8, piece % wide);
        let column = match self.span {
            128 => column ^ row,
            64 => column ^ (row / 2),
            _ => column ^ (row / 4),
        };
        self.start + line / 8 * self.stride + piece / wide * self.leading + row * self.span + column * 16 + inside
    }

    fn descriptor(&self) -> u64 {
        let mode = match self.span {
            0 => 0,
            128 => 1,
            64 => 2,
            _ => 3u64,
        };
        let f = |x: usize| (x >> 4) as u64;
        f(self.start) | f(self.leading) << 16 | f(self.stride) << 32 | mode << 62
    }
}

/// Numbers from a linear congruential generator.
struct Noise(u64);

impl Noise {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    F16,
    Bf16,
    Tf32,
    E4m3,
    E5m2,
    S8,
    U8,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::F16 => "f16",
            Kind::Bf16 => "bf16",
            Kind::Tf32 => "tf32",
            Kind::E4m3 => "e4m3",
            Kind::E5m2 => "e5m2",
            Kind::S8 => "s8",
            Kind::U8 => "u8",
        }
    }

    fn size(self) -> usize {
        match self {
            Kind::F16 | Kind::Bf16 => 2,
            Kind::Tf32 => 4,
            _ => 1,
        }
    }

    /// Bits and value of a small number: quarters between -2 and 2, or whole numbers.
    fn sample(self, r: &mut Noise) -> (u32, f64) {
        let q = r.below(17) as i32 - 8;
        let v = f64::from(q) / 4.0;
        // A binary float of `m` mantissa bits and a bias, for normal values and zero.
        let float = |m: u32, bias: i32, width: u32| {
            if q == 0 {
                return 0;
            }
            let e = v.abs().log2().floor() as i32;
            let mantissa = ((v.abs() / 2f64.powi(e) - 1.0) * f64::from(1 << m)) as u32;
            u32::from(q < 0) << (width - 1) | ((e + bias) as u32) << m | mantissa
        };
        match self {
            Kind::F16 => (float(10, 15, 16), v),
            Kind::Bf16 => ((v as f32).to_bits() >> 16, v),
            // The lower 13 bits do not count.
            Kind::Tf32 => ((v as f32).to_bits() | r.below(1 << 13) as u32, v),
            Kind::E4m3 => (float(3, 7, 8), v),
            Kind::E5m2 => (float(2, 15, 8), if q % 2 == 0 || q.abs() < 5 { v } else { float5(v) }),
            Kind::S8 => {
                let x = r.below(256) as u8;
                (u32::from(x), f64::from(x as i8))
            }
            Kind::U8 => {
                let x = r.below(256) as u8;
                (u32::from(x), f64::from(x))
            }
        }
    }
}

/// A quarter cut to the two mantissa bits of e5m2.
fn float5(v: f64) -> f64 {
    let e = 2f64.powi(v.abs().log2().floor() as i32);
    ((v / e * 4.0).trunc()) / 4.0 * e
}

struct Case {
    n: usize,
    a: Kind,
    b: Kind,
    /// `f32`, `f16`, `s32`.
    d: &'static str,
    la: Option<Layout>,
    lb: Layout,
    scales: (i32, i32),
    add: bool,
}

/// A kernel of one warpgroup: fills shared memory from `image`, loads registers of A and of the sums, runs `body`, stores.
fn kernel(sums: usize, body: &str) -> String {
    let list = |p: &str, n: usize| (0..n).map(|i| format!("%{p}{i}")).collect::<Vec<_>>().join(", ");
    let each = |f: &dyn Fn(usize) -> String, n: usize| (0..n).map(f).collect::<String>();
    format!(
        ".version 8.0\n.target sm_90a\n.address_size 64
        .entry k(.param .u64 image, .param .u64 regs, .param .u64 sums, .param .u64 out, .param .u64 da, .param .u64 db, .param .u32 add) {{
        .reg .b64 %p<12>; .reg .b32 %t, %s, %r<8>, %a<4>, %d<{sums}>; .reg .b64 %da, %db; .reg .pred %q, %add;
        .shared .align 1024 .b8 sm[{SPACE}];
        mov.u32 %t, %tid.x; mov.u32 %s, sm; ld.param.u64 %p0, [image]; ld.param.u64 %p1, [regs]; ld.param.u64 %p2, [sums];
        ld.param.u64 %p3, [out]; ld.param.u64 %da, [da]; ld.param.u64 %db, [db];
        ld.param.u32 %r6, [add]; setp.ne.u32 %add, %r6, 0;
        shl.b32 %r0, %t, 4;
        COPY: cvt.u64.u32 %p4, %r0; add.u64 %p5, %p0, %p4; ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%p5];
        add.u32 %r5, %s, %r0; st.shared.v4.u32 [%r5], {{%r1, %r2, %r3, %r4}};
        add.u32 %r0, %r0, 2048; setp.lt.u32 %q, %r0, {SPACE}; @%q bra COPY;
        mul.wide.u32 %p6, %t, 16; add.u64 %p6, %p1, %p6; ld.global.v4.u32 {{{}}}, [%p6];
        mul.wide.u32 %p7, %t, {}; add.u64 %p8, %p2, %p7; {}
        fence.proxy.async; bar.sync 0;
        {body}
        add.u64 %p9, %p3, %p7; {} ret; }}",
        list("a", 4),
        sums * 4,
        each(&|i| format!("ld.global.u32 %d{i}, [%p8+{}];\n", 4 * i), sums),
        each(&|i| format!("st.global.u32 [%p9+{}], %d{i};\n", 4 * i), sums),
    )
}

struct Ran {
    out: Vec<u32>,
    counters: Counters,
}

fn launch(text: &str, image: &[u8], regs: &[u32], sums: &[u32], da: u64, db: u64, add: bool) -> Result<Ran, Error> {
    let mut m = Memory::new();
    let module = Module::load(text, &mut m).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let words = |v: &[u32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let mut put = |v: &[u8]| {
        let a = m.alloc(v.len()).unwrap();
        m.write(a, v).unwrap();
        a
    };
    let (image, regs, sums_at) = (put(image), put(&words(regs)), put(&words(sums)));
    let out = put(&words(sums));
    let shape = Config {
        block: [128, 1, 1],
        ..Config::default()
    };
    let args = [image, regs, sums_at, out, da, db].map(u64::to_le_bytes);
    let mut args: Vec<&[u8]> = args.iter().map(|a| &a[..]).collect();
    let add = u32::from(add).to_le_bytes();
    args.push(&add);
    let counters = module.launch("k", &shape, &args, &m)?;
    let mut bytes = vec![0; sums.len() * 4];
    m.read(out, &mut bytes).unwrap();
    Ok(Ran {
        out: bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|c| u32::from_le_bytes(*c))
            .collect(),
        counters,
    })
}

fn half(bits: u32) -> f64 {
    let (e, m) = ((bits >> 10 & 31) as i32, f64::from(bits & 1023));
    let v = if e == 0 {
        m * 2f64.powi(-24)
    } else {
        (1.0 + m / 1024.0) * 2f64.powi(e - 15)
    };
    if bits & 0x8000 == 0 { v } else { -v }
}

fn check(c: &Case) {
    let k = 32 / c.a.size();
    let mut r = Noise(c.n as u64 * 77 + k as u64);
    let a: Vec<Vec<_>> = (0..64).map(|_| (0..k).map(|_| c.a.sample(&mut r)).collect()).collect();
    let b: Vec<Vec<_>> = (0..c.n).map(|_| (0..k).map(|_| c.b.sample(&mut r)).collect()).collect();
    // What lies between the operands is noise.
    let mut image: Vec<u8> = (0..SPACE).map(|_| r.below(256) as u8).collect();
    let mut put = |l: &Layout, v: &[Vec<(u32, f64)>]| {
        for (mn, row) in v.iter().enumerate() {
            for (k, (bits, _)) in row.iter().enumerate() {
                let at = l.place(mn, k);
                image[at..at + l.size].copy_from_slice(&bits.to_le_bytes()[..l.size]);
            }
        }
    };
    put(&c.lb, &b);
    if let Some(l) = &c.la {
        put(l, &a);
    }
    // A's fragment: four registers, of rows g and g + 8, first and second half of K.
    let per = 4 / c.a.size();
    let regs: Vec<u32> = (0..128)
        .flat_map(|t| (0..4).map(move |i| (t, i)))
        .map(|(t, i)| {
            let row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8;
            (0..per).fold(0, |v, e| {
                v | a[row][i / 2 * k / 2 + t % 4 * per + e].0 << (8 * c.a.size() * e)
            })
        })
        .collect();
    let packed = c.d == "f16";
    let count = if packed { c.n / 4 } else { c.n / 2 };
    let sums: Vec<u32> = (0..128 * count)
        .map(|i| match c.d {
            "f32" => (i as f32 % 13.0).to_bits(),
            // 1.0 and 2.0.
            "f16" => 0x3c00_4000,
            _ => i as u32,
        })
        .collect();
    let list = |p: &str, n: usize| (0..n).map(|i| format!("%{p}{i}")).collect::<Vec<_>>().join(", ");
    let (int, wide) = (c.d == "s32", c.a.size() == 2);
    let from = if c.la.is_some() {
        "%da".to_string()
    } else {
        format!("{{{}}}", list("a", 4))
    };
    let mut tail = if int {
        String::new()
    } else {
        format!(", {}, {}", c.scales.0, c.scales.1)
    };
    if wide {
        if let Some(l) = &c.la {
            tail += if l.k_major { ", 0" } else { ", 1" };
        }
        tail += if c.lb.k_major { ", 0" } else { ", 1" };
    }
    let (n, d, ta, tb) = (c.n, c.d, c.a.name(), c.b.name());
    let body = format!(
        "wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d}.{ta}.{tb} {{{}}}, {from}, %db, %add{tail};
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
        list("d", count)
    );
    let da = c.la.map_or(0, |l| l.descriptor());
    let ran = launch(
        &kernel(count, &body),
        &image,
        &regs,
        &sums,
        da,
        c.lb.descriptor(),
        c.add,
    );
    let ran = ran.unwrap_or_else(|e| panic!("n {n} {ta} {:?} {:?}: {e}", c.la, c.lb));
    assert_eq!(ran.counters.tensor_flops, (2 * 64 * n * k) as u64);
    let sign = f64::from(if int { 1 } else { c.scales.0 * c.scales.1 });
    for t in 0..128 {
        for i in 0..c.n / 2 {
            // The accumulator's place: two columns of row g, then of row g + 8, for each eight columns.
            let (row, col) = (t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + t % 4 * 2 + i % 2);
            let dot: f64 = sign * a[row].iter().zip(&b[col]).map(|(x, y)| x.1 * y.1).sum::<f64>();
            let at = t * count + if packed { i / 2 } else { i };
            let value = |x: u32| match c.d {
                "f32" => f64::from(f32::from_bits(x)),
                "f16" => half(x >> (i % 2 * 16) & 0xffff),
                _ => f64::from(x as i32),
            };
            let want = dot + if c.add { value(sums[at]) } else { 0.0 };
            let got = value(ran.out[at]);
            let allowed = if packed { want.abs() / 1000.0 } else { want.abs() * 1e-6 };
            assert!(
                (got - want).abs() <= allowed,
                "n {n} {ta} {:?} {:?} ({row}, {col}): {got}, {want}",
                c.la,
                c.lb
            );
        }
    }
}

fn k_major(span: usize, size: usize, start: usize) -> Layout {
    Layout {
        span,
        k_major: true,
        leading: if span == 0 { 128 } else { 16 },
        stride: if span == 0 { 288 } else { 8 * span },
        start,
        size,
    }
}

/// Layouts of an operand of `rows` rows: every swizzle, K- and MN-major where the type allows both.
fn layouts(size: usize, rows: usize, start: usize) -> Vec<Layout> {
    let mut list: Vec<Layout> = [0, 32, 64, 128].iter().map(|s| k_major(*s, size, start)).collect();
    if size == 2 {
        for span in [0, 32, 64, 128] {
            // Patterns of 8 k by span bytes: along K `stride` apart, along M or N `leading` apart; without swizzle the other way.
            let across = rows.div_ceil(span.max(16) / 2);
            let (leading, stride) = if span == 0 {
                (128 * across, 128)
            } else {
                (8 * span, 8 * span * across)
            };
            list.push(Layout {
                span,
                k_major: false,
                leading,
                stride,
                start,
                size,
            });
        }
    }
    list
}

const B_START: usize = 32768;

#[test]
fn every_width_in_bf16() {
    for n in (8..=256).step_by(8) {
        check(&Case {
            n,
            a: Kind::Bf16,
            b: Kind::Bf16,
            d: "f32",
            la: Some(k_major(128, 2, 0)),
            lb: k_major([128, 64, 32, 0][n / 8 % 4], 2, B_START),
            scales: (1, 1),
            add: n % 16 == 0,
        });
    }
}

#[test]
fn every_pair_of_layouts() {
    for (kind, n) in [(Kind::F16, 72), (Kind::Bf16, 128)] {
        for la in layouts(2, 64, 0) {
            for lb in layouts(2, n, B_START) {
                check(&Case {
                    n,
                    a: kind,
                    b: kind,
                    d: "f32",
                    la: Some(la),
                    lb,
                    scales: (1, -1),
                    add: true,
                });
            }
        }
    }
}

#[test]
fn a_from_registers() {
    for kind in [Kind::F16, Kind::Bf16] {
        for lb in layouts(2, 96, B_START) {
            check(&Case {
                n: 96,
                a: kind,
                b: kind,
                d: "f32",
                la: None,
                lb,
                scales: (-1, -1),
                add: true,
            });
        }
    }
    for (a, d) in [(Kind::Tf32, "f32"), (Kind::S8, "s32"), (Kind::E4m3, "f32")] {
        let lb = k_major(128, a.size(), B_START);
        check(&Case {
            n: 96,
            a,
            b: a,
            d,
            la: None,
            lb,
            scales: (1, 1),
            add: true,
        });
    }
}

#[test]
fn other_types_and_sums() {
    use Kind::*;
    let list = [
        (F16, F16, "f16"),
        (Tf32, Tf32, "f32"),
        (S8, S8, "s32"),
        (S8, U8, "s32"),
        (U8, S8, "s32"),
        (U8, U8, "s32"),
        (E4m3, E4m3, "f32"),
        (E4m3, E5m2, "f32"),
        (E5m2, E4m3, "f16"),
        (E5m2, E5m2, "f32"),
    ];
    for (a, b, d) in list {
        for span in [0, 32, 64, 128] {
            let (la, lb) = (k_major(span, a.size(), 0), k_major(span, b.size(), B_START));
            let scales = if d == "s32" { (1, 1) } else { (-1, 1) };
            check(&Case {
                n: 32,
                a,
                b,
                d,
                la: Some(la),
                lb,
                scales,
                add: span != 32,
            });
        }
    }
}

#[test]
fn a_start_inside_the_pattern_moves_along_k() {
    // The second, third and fourth 32 bytes of 128-byte rows, as a loop over K takes them.
    for step in 1..4 {
        let inside = |start: usize| {
            let whole = k_major(128, 2, start);
            (whole, whole.descriptor() + 2 * step as u64)
        };
        let ((la, da), (lb, db)) = (inside(0), inside(B_START));
        let mut r = Noise(step as u64);
        let mut image = vec![0u8; SPACE];
        let mut fill = |l: &Layout, rows: usize| -> Vec<Vec<f64>> {
            let mut line = |mn: usize| {
                (0..16)
                    .map(|k| {
                        let (bits, v) = Kind::Bf16.sample(&mut r);
                        let at = l.place(mn, 16 * step + k);
                        image[at..at + 2].copy_from_slice(&bits.to_le_bytes()[..2]);
                        v
                    })
                    .collect()
            };
            (0..rows).map(&mut line).collect()
        };
        let (a, b) = (fill(&la, 64), fill(&lb, 8));
        let body = "wgmma.fence.sync.aligned;
            wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, 0, 1, 1, 0, 0;
            wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;";
        let ran = launch(&kernel(4, body), &image, &[0; 512], &[0; 512], da, db, false).unwrap();
        for t in 0..128 {
            for i in 0..4 {
                let (row, col) = (t / 32 * 16 + t % 32 / 4 + i / 2 * 8, t % 4 * 2 + i % 2);
                let want: f64 = a[row].iter().zip(&b[col]).map(|(x, y)| x * y).sum();
                assert_eq!(
                    f64::from(f32::from_bits(ran.out[t * 4 + i])),
                    want,
                    "step {step} ({row}, {col})"
                );
            }
        }
    }
}

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
    finds(
        "FENCE MMA COMMIT mov.u32 %r0, %d0; WAIT",
        InFlight,
        "before wgmma.wait_group",
    );
    finds(
        "FENCE MMA mov.u32 %r0, %d0; COMMIT WAIT",
        InFlight,
        "before wgmma.commit_group",
    );
    finds("FENCE MMA COMMIT mov.u32 %d3, 0; WAIT", InFlight, "is written");
    finds("FENCE RS COMMIT mov.u32 %a1, 0; WAIT", InFlight, "is written");
    finds(
        "FENCE MMA COMMIT wgmma.wait_group.sync.aligned 1; mov.u32 %r0, %d0;",
        InFlight,
        "is read",
    );
    // The first group is waited for, the second is not.
    finds(
        "FENCE MMA COMMIT MMA COMMIT wgmma.wait_group.sync.aligned 1; mov.u32 %r0, %d0;",
        InFlight,
        "is read",
    );
    finds("MMA COMMIT WAIT", Warpgroup, "first product");
    finds(
        "FENCE mov.u32 %d0, 0; MMA COMMIT WAIT",
        Warpgroup,
        "without a wgmma.fence since",
    );
    finds(
        "FENCE mov.u32 %a0, 0; RS COMMIT WAIT",
        Warpgroup,
        "without a wgmma.fence since",
    );
    finds(
        "FENCE MMA COMMIT WAIT mov.u32 %r0, %d0; MMA COMMIT WAIT",
        Warpgroup,
        "without a wgmma.fence since",
    );
}

#[test]
fn shared_operands_in_flight_are_found() {
    use FaultKind::{InFlight, ProxyFence};
    finds(
        "FENCE MMA COMMIT st.shared.u32 [%s], %t; WAIT",
        InFlight,
        "wgmma.wait_group has not waited",
    );
    finds(
        "FENCE MMA COMMIT st.shared.u32 [%s+32768], %t; WAIT",
        InFlight,
        "wgmma.wait_group has not waited",
    );
    finds(
        "FENCE MMA COMMIT atom.shared.add.u32 %r0, [%s], 1; WAIT",
        InFlight,
        "wgmma.wait_group has not waited",
    );
    // The bytes beside the operand are free.
    assert!(small("FENCE MMA COMMIT st.shared.u32 [%s+64], %t; st.shared.u32 [%s+33792], %t; WAIT").is_ok());
    finds(
        "st.shared.u32 [%s], %t; bar.sync 0; FENCE MMA COMMIT WAIT",
        ProxyFence,
        "without a fence.proxy.async",
    );
    assert!(small("st.shared.u32 [%s], 0; fence.proxy.async.shared::cta; bar.sync 0; FENCE MMA COMMIT WAIT").is_ok());
    // The fence of the thread that issues the product, after the barrier, orders them as well.
    assert!(small("st.shared.u32 [%s], 0; bar.sync 0; fence.proxy.async; FENCE MMA COMMIT WAIT").is_ok());
}

#[test]
fn warpgroups_must_agree() {
    use FaultKind::Warpgroup;
    let warp0 = "setp.lt.u32 %q, %t, 32;";
    finds(
        &format!("{warp0} FENCE @%q bra SKIP; MMA SKIP: COMMIT WAIT"),
        Warpgroup,
        "warp 0",
    );
    finds(
        &format!("{warp0} @%q add.u64 %db, %db, 64; FENCE MMA COMMIT WAIT"),
        Warpgroup,
        "different descriptors",
    );
    finds(
        "setp.lt.u32 %q, %t, 5; @%q add.u64 %db, %db, 64; FENCE MMA COMMIT WAIT",
        Warpgroup,
        "lane 5",
    );
    finds(
        "setp.lt.u32 %q, %t, 5; FENCE @%q bra SKIP; MMA SKIP: COMMIT WAIT",
        Warpgroup,
        "execute the product",
    );
    finds("FENCE MMA ret;", Warpgroup, "wgmma.wait_group");
}

#[test]
fn descriptors_are_checked() {
    use FaultKind::{Descriptor, OutOfBounds};
    finds("or.b64 %db, %db, 0x4000; FENCE MMA COMMIT WAIT", Descriptor, "unused");
    finds(
        "mov.u64 %p10, 0x3fff; or.b64 %db, %db, %p10; FENCE MMA COMMIT WAIT",
        OutOfBounds,
        "98304 bytes",
    );
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
        "wgmma.wait_group.sync.aligned %r0;".into(),
        "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, %r0, 0, 1, 1, 1, 0, 0;"
            .into(),
    ] {
        assert!(!refused(&line).is_empty());
    }
}
