//! Warpgroup products: every width, layout and type against sums over f64, with layouts written from the ISA text.

#[path = "support/wgmma_checks.rs"]
mod checks;
#[path = "support/wgmma.rs"]
mod wgmma;

#[path = "support/tensor_core.rs"]
mod tensor_core;
use wgmma::{B_START, Layout, SPACE, k_major, kernel, launch, launch_as};

/// Numbers from a linear congruential generator.
struct Noise(u64);

impl Noise {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
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

fn half(bits: u32) -> f64 {
    let (e, m) = ((bits >> 10 & 31) as i32, f64::from(bits & 1023));
    let v = if e == 0 { m * 2f64.powi(-24) } else { (1.0 + m / 1024.0) * 2f64.powi(e - 15) };
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
            (0..per).fold(0, |v, e| v | a[row][i / 2 * k / 2 + t % 4 * per + e].0 << (8 * c.a.size() * e))
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
    let from = if c.la.is_some() { "%da".to_string() } else { format!("{{{}}}", list("a", 4)) };
    let mut tail = if int { String::new() } else { format!(", {}, {}", c.scales.0, c.scales.1) };
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
    let ran = launch(&kernel(count, &body), &image, &regs, &sums, da, c.lb.descriptor(), c.add);
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
            assert!((got - want).abs() <= allowed, "n {n} {ta} {:?} {:?} ({row}, {col}): {got}, {want}", c.la, c.lb);
        }
    }
}

/// Layouts of an operand of `rows` rows: every swizzle, K- and MN-major where the type allows both.
fn layouts(size: usize, rows: usize, start: usize) -> Vec<Layout> {
    let mut list: Vec<Layout> = [0, 32, 64, 128].iter().map(|s| k_major(*s, size, start)).collect();
    if size == 2 {
        for span in [0, 32, 64, 128] {
            // Patterns of 8 k by span bytes: along K `stride` apart, along M or N `leading` apart; without swizzle the other way.
            let across = rows.div_ceil(span.max(16) / 2);
            let (leading, stride) = if span == 0 { (128 * across, 128) } else { (8 * span, 8 * span * across) };
            list.push(Layout { span, k_major: false, leading, stride, start, size });
        }
    }
    list
}

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
                check(&Case { n, a: kind, b: kind, d: "f32", la: Some(la), lb, scales: (1, -1), add: true });
            }
        }
    }
}

#[test]
fn a_from_registers() {
    for kind in [Kind::F16, Kind::Bf16] {
        for lb in layouts(2, 96, B_START) {
            check(&Case { n: 96, a: kind, b: kind, d: "f32", la: None, lb, scales: (-1, -1), add: true });
        }
    }
    for (a, d) in [(Kind::Tf32, "f32"), (Kind::S8, "s32"), (Kind::E4m3, "f32")] {
        let lb = k_major(128, a.size(), B_START);
        check(&Case { n: 96, a, b: a, d, la: None, lb, scales: (1, 1), add: true });
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
            check(&Case { n: 32, a, b, d, la: Some(la), lb, scales, add: span != 32 });
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
                assert_eq!(f64::from(f32::from_bits(ran.out[t * 4 + i])), want, "step {step} ({row}, {col})");
            }
        }
    }
}

#[test]
fn rounded_products_have_the_bits_of_the_model() {
    use tensor_core::{BF16, F16, sample, sum};
    let layout = k_major(0, 2, B_START);
    for (products, size, extra) in [(vgpu::Products::Ampere, 8, 1), (vgpu::Products::Hopper, 16, 2)] {
        for (name, f) in [("bf16", BF16), ("f16", F16)] {
            let mut r = Noise(5);
            let mut draw = |n: usize| -> Vec<u32> { (0..n).map(|_| sample(f, |n| r.below(n))).collect() };
            let (a, b) = (draw(64 * 16), draw(8 * 16));
            let mut image = vec![0; SPACE];
            for (i, bits) in b.iter().enumerate() {
                let at = layout.place(i / 16, i % 16);
                image[at..at + 2].copy_from_slice(&bits.to_le_bytes()[..2]);
            }
            let of = |t: usize, i: usize| t / 32 * 16 + t % 32 / 4 + 8 * i;
            let regs: Vec<u32> = (0..512)
                .map(|n| {
                    let (t, i) = (n / 4, n % 4);
                    let at = 16 * of(t, i % 2) + i / 2 * 8 + t % 4 * 2;
                    a[at] | a[at + 1] << 16
                })
                .collect();
            let sums: Vec<u32> = (0..512).map(|i| ((i as f32 - 250.0) / 7.0).to_bits()).collect();
            let body = format!(
                "wgmma.fence.sync.aligned;
                wgmma.mma_async.sync.aligned.m64n8k16.f32.{name}.{name} {{%d0, %d1, %d2, %d3}}, {{%a0, %a1, %a2, %a3}}, %db, 1, 1, 1, 0;
                wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
            );
            let ran = launch_as(products, &kernel(4, &body), &image, [&regs, &sums], [0, layout.descriptor()], true);
            for (n, got) in ran.unwrap().out.iter().enumerate() {
                let (t, i) = (n / 4, n % 4);
                let (row, column) = (of(t, i / 2), t % 4 * 2 + i % 2);
                let want = sum(size, extra, f, sums[n], &a[16 * row..][..16], &b[16 * column..][..16]);
                assert_eq!(*got, want, "{products:?} {name} ({row}, {column})");
            }
        }
    }
}
