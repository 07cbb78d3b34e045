//! CUDA programs of the Hopper set that NVRTC 12.9.86 compiled for compute_90a (tests/cuda/hopper.cu): results against
//! f64, and planted mistakes found.

use vgpu::tensor_map::{Tiled, encode};
use vgpu::{Config, Counters, Error, Fault, FaultKind, Memory, Module};

const TEXT: &str = include_str!("cuda/hopper.ptx");

// `bug` of the programs.
const NONE: u32 = 0;
const NO_EXPECT: u32 = 1;
const WRONG_PARITY: u32 = 2;
const NO_PROXY_FENCE: u32 = 3;
const NO_WGMMA_FENCE: u32 = 4;
const TOO_MANY_REGISTERS: u32 = 5;
const EARLY_RELEASE: u32 = 6;
const NO_WAIT: u32 = 7;

/// Numbers in [-1, 1) as bf16 bits, from a linear congruential generator.
fn noise(n: usize, mut seed: u64) -> Vec<u16> {
    (0..n)
        .map(|_| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (((seed >> 40) as f32 / 8_388_608.0 - 1.0).to_bits() >> 16) as u16
        })
        .collect()
}

fn value(x: u16) -> f64 {
    f64::from(f32::from_bits(u32::from(x) << 16))
}

fn upload(m: &mut Memory, v: &[u16]) -> u64 {
    let address = m.alloc(v.len() * 2).unwrap();
    m.write(address, &v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    address
}

/// A map of a row-major bf16 matrix with boxes of `box_rows` rows by 64 columns, 128-byte swizzle.
fn map(address: u64, rows: usize, columns: usize, box_rows: u32) -> [u8; 128] {
    encode(&Tiled {
        data_type: 9,
        rank: 2,
        address,
        dims: &[columns as u64, rows as u64],
        strides: &[columns as u64 * 2],
        box_dims: &[64, box_rows],
        element_strides: &[1, 1],
        interleave: 0,
        swizzle: 3,
        l2_promotion: 2,
        oob_fill: 0,
    })
    .unwrap()
}

/// Row times row, in f64.
fn reference(a: &[u16], b: &[u16], k: usize, i: usize, j: usize) -> f64 {
    (0..k).map(|l| value(a[i * k + l]) * value(b[j * k + l])).sum()
}

struct Gemm {
    rows: usize,
    columns: usize,
    k: usize,
    blocks: u32,
    seed: Option<u64>,
    bug: u32,
}

impl Gemm {
    fn run(&self) -> Result<Counters, Error> {
        let &Gemm { rows, columns, k, .. } = self;
        let mut m = Memory::new();
        let module = Module::load(TEXT, &mut m).unwrap();
        let (a, b) = (noise(rows * k, 1), noise(columns * k, 2));
        let (da, db) = (upload(&mut m, &a), upload(&mut m, &b));
        let out = upload(&mut m, &vec![0; rows * columns]);
        let maps = [map(da, rows, k, 128), map(db, columns, k, 128), map(out, rows, columns, 64)];
        let shape = Config {
            grid: [self.blocks, 1, 1],
            block: [384, 1, 1],
            dynamic_shared: 3 * 32768 + 2 * 16384,
            threads: 2,
            seed: self.seed,
            budget: 20_000_000,
            ..Config::default()
        };
        let sizes = [rows.div_ceil(128), columns.div_ceil(128), k.div_ceil(64), self.bug as usize]
            .map(|x| (x as u32).to_le_bytes());
        let args: Vec<&[u8]> = maps.iter().map(|x| &x[..]).chain(sizes.iter().map(|x| &x[..])).collect();
        let counters = module.launch("gemm", &shape, &args, &m)?;
        let mut bytes = vec![0; rows * columns * 2];
        m.read(out, &mut bytes).unwrap();
        for i in 0..rows {
            for j in 0..columns {
                let at = (i * columns + j) * 2;
                let got = value(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
                let want = reference(&a, &b, k, i, j);
                // One rounding to bf16 and f32 sums.
                let allowed = want.abs() / 256.0 + 1e-4;
                assert!((got - want).abs() <= allowed, "({i}, {j}): {got}, {want}; seed {:?}", self.seed);
            }
        }
        Ok(counters)
    }

    fn fault(&self) -> Fault {
        match self.run() {
            Err(Error::Fault(f)) => *f,
            other => panic!("{:?}", other.map(|_| "nothing was found")),
        }
    }
}

const SMALL: Gemm = Gemm { rows: 256, columns: 128, k: 320, blocks: 1, seed: None, bug: NONE };

#[test]
fn specialised_gemm_matches_f64() {
    let c = SMALL.run().unwrap();
    assert_eq!(c.tensor_flops, 2 * 256 * 128 * 320);
    // Ragged in every dimension: tensor copies fill with zeros and cut what they store.
    let ragged = Gemm { rows: 200, columns: 264, k: 136, blocks: 4, ..SMALL };
    ragged.run().unwrap();
}

#[test]
fn specialised_gemm_holds_in_every_order() {
    for seed in 0..6 {
        Gemm { seed: Some(seed), k: 256, ..SMALL }.run().unwrap();
    }
}

#[test]
fn planted_mistakes_in_the_gemm_are_found() {
    for seed in [None, Some(1), Some(2)] {
        let bug = |bug: u32| Gemm { bug, seed, ..SMALL }.fault();
        // Bytes that nobody announced: the phase ends at once and the data is read before it is there, in some orders
        // before the copies are even issued.
        let f = bug(NO_EXPECT);
        assert!(matches!(f.kind, FaultKind::InFlight | FaultKind::Uninitialised | FaultKind::Mbarrier), "{f:?}");
        // The wait is for the phase before: it does not wait at all.
        let f = bug(WRONG_PARITY);
        assert!(matches!(f.kind, FaultKind::InFlight | FaultKind::Uninitialised | FaultKind::Mbarrier), "{f:?}");
        let f = bug(NO_WAIT);
        assert!(matches!(f.kind, FaultKind::InFlight | FaultKind::Uninitialised), "{f:?}");
        let f = bug(NO_PROXY_FENCE);
        assert_eq!(f.kind, FaultKind::ProxyFence, "{f:?}");
        assert!(f.text.contains("cp.async.bulk.tensor.2d.global"), "{f:?}");
        let f = bug(NO_WGMMA_FENCE);
        assert_eq!(f.kind, FaultKind::Warpgroup, "{f:?}");
        let f = bug(EARLY_RELEASE);
        assert_eq!(f.kind, FaultKind::InFlight, "{f:?}");
        assert!(f.message.contains("wgmma.wait_group has not waited"), "{f:?}");
    }
}

#[test]
fn too_many_registers_are_a_deadlock_that_shows_the_sum() {
    let f = Gemm { bug: TOO_MANY_REGISTERS, ..SMALL }.fault();
    assert_eq!(f.kind, FaultKind::Deadlock, "{f:?}");
    // 168 each at launch; 40 + 240 + 240 do not fit.
    assert!(f.text.starts_with("setmaxnreg.inc"), "{f:?}");
    for part in ["240 registers", "40 + 240 + 168", "66560 registers of the 64512"] {
        assert!(f.message.contains(part), "{part}: {}", f.message);
    }
}

#[test]
fn a_from_registers_matches_f64() {
    let k = 96;
    let run = |bug: u32| {
        let mut m = Memory::new();
        let module = Module::load(TEXT, &mut m).unwrap();
        // Small whole numbers as f16: exact in every order.
        let half = |n: usize, seed: u64| -> (Vec<u16>, Vec<f64>) {
            noise(n, seed)
                .into_iter()
                .map(|x| {
                    let q = (x % 7) as i32 - 3;
                    let bits = [0xc200, 0xc000, 0xbc00, 0, 0x3c00, 0x4000, 0x4200][(q + 3) as usize];
                    (bits, f64::from(q))
                })
                .unzip()
        };
        let ((a, va), (b, vb)) = (half(64 * k, 3), half(k * 64, 4));
        let (da, db) = (upload(&mut m, &a), upload(&mut m, &b));
        let out = m.alloc(64 * 64 * 4).unwrap();
        let shape = Config { block: [128, 1, 1], ..Config::default() };
        let (pointers, numbers) = ([da, db, out].map(u64::to_le_bytes), [k as u32, bug].map(u32::to_le_bytes));
        let args: Vec<&[u8]> = pointers.iter().map(|x| &x[..]).chain(numbers.iter().map(|x| &x[..])).collect();
        module.launch("registers_a", &shape, &args, &m)?;
        let mut bytes = vec![0; 64 * 64 * 4];
        m.read(out, &mut bytes).unwrap();
        for (i, c) in bytes.as_chunks::<4>().0.iter().enumerate() {
            let (row, col) = (i / 64, i % 64);
            let want: f64 = (0..k).map(|l| va[row * k + l] * vb[l * 64 + col]).sum();
            assert_eq!(f64::from(f32::from_le_bytes(*c)), want, "({row}, {col})");
        }
        Ok(())
    };
    run(NONE).unwrap();
    let fault = |bug: u32| match run(bug) {
        Err(Error::Fault(f)) => f.kind,
        other => panic!("{other:?}"),
    };
    assert_eq!(fault(NO_PROXY_FENCE), FaultKind::ProxyFence);
    assert_eq!(fault(EARLY_RELEASE), FaultKind::InFlight);
}

#[test]
fn a_group_in_flight_overlaps_the_next() {
    let k = 576;
    let run = |seed: Option<u64>, bug: u32| {
        let mut m = Memory::new();
        let module = Module::load(TEXT, &mut m).unwrap();
        let (a, b) = (noise(128 * k, 9), noise(128 * k, 10));
        let (da, db) = (upload(&mut m, &a), upload(&mut m, &b));
        let out = m.alloc(128 * 128 * 4).unwrap();
        let maps = [map(da, 128, k, 128), map(db, 128, k, 128)];
        let shape =
            Config { block: [288, 1, 1], dynamic_shared: 3 * 32768, seed, budget: 20_000_000, ..Config::default() };
        let (out_bytes, steps, bug) = (out.to_le_bytes(), (k as u32 / 64).to_le_bytes(), bug.to_le_bytes());
        module.launch("pipelined", &shape, &[&maps[0], &maps[1], &out_bytes, &steps, &bug], &m)?;
        let mut bytes = vec![0; 128 * 128 * 4];
        m.read(out, &mut bytes).unwrap();
        for (i, c) in bytes.as_chunks::<4>().0.iter().enumerate() {
            let want = reference(&a, &b, k, i / 128, i % 128);
            let got = f64::from(f32::from_le_bytes(*c));
            assert!((got - want).abs() < 1e-4, "({}, {}): {got}, {want}", i / 128, i % 128);
        }
        Ok(())
    };
    for seed in [None, Some(1), Some(2)] {
        run(seed, NONE).unwrap();
        let fault = |bug: u32| match run(seed, bug) {
            Err(Error::Fault(f)) => *f,
            other => panic!("{bug}: {other:?}"),
        };
        // The buffer is given back while its products may still read it.
        let f = fault(EARLY_RELEASE);
        assert!(f.kind == FaultKind::InFlight && f.message.contains("has not waited"), "{f:?}");
        // The results are read while the last group is in flight.
        let f = fault(NO_WAIT);
        assert!(f.kind == FaultKind::InFlight && f.message.contains("is read before"), "{f:?}");
    }
}

#[test]
fn attention_with_probabilities_in_registers_matches_f64() {
    let (n, scale) = (192, 0.125f32);
    for seed in [None, Some(1)] {
        let mut m = Memory::new();
        let module = Module::load(TEXT, &mut m).unwrap();
        let [q, k, v] = [11, 12, 13].map(|s| noise(n * 64, s));
        let maps = [&q, &k, &v].map(|x| {
            let at = upload(&mut m, x);
            map(at, n, 64, 64)
        });
        let out = m.alloc(n * 64 * 4).unwrap();
        let shape = Config {
            grid: [n as u32 / 64, 1, 1],
            block: [128, 1, 1],
            dynamic_shared: 3 * 64 * 128,
            seed,
            ..Config::default()
        };
        let (out_bytes, scale_bytes) = (out.to_le_bytes(), scale.to_le_bytes());
        let args: [&[u8]; 5] = [&maps[0], &maps[1], &maps[2], &out_bytes, &scale_bytes];
        module.launch("attention", &shape, &args, &m).unwrap();
        let mut bytes = vec![0; n * 64 * 4];
        m.read(out, &mut bytes).unwrap();
        let got: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
        for i in 0..n {
            let weights: Vec<f64> = (0..=i).map(|j| (reference(&q, &k, 64, i, j) * f64::from(scale)).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for c in 0..64 {
                let want = (0..=i).map(|j| weights[j] * value(v[j * 64 + c])).sum::<f64>() / sum;
                // Probabilities are rounded to bf16 before the second product: 2^-9 of values below 1.
                assert!((f64::from(got[i * 64 + c]) - want).abs() < 2e-3, "({i}, {c}): {}, {want}", got[i * 64 + c]);
            }
        }
    }
}

#[test]
fn cluster_gemm_with_multicast_matches_f64() {
    let (rows, columns, k) = (256, 256, 320);
    for seed in [None, Some(3), Some(4)] {
        let mut m = Memory::new();
        let module = Module::load(TEXT, &mut m).unwrap();
        let (a, b) = (noise(rows * k, 5), noise(columns * k, 6));
        let (da, db) = (upload(&mut m, &a), upload(&mut m, &b));
        let out = m.alloc(rows * columns * 4).unwrap();
        let maps = [map(da, rows, k, 64), map(db, columns, k, 64)];
        let shape = Config {
            grid: [rows as u32 / 64, columns as u32 / 128, 1],
            block: [160, 1, 1],
            dynamic_shared: 2 * (64 + 128) * 128,
            threads: 2,
            seed,
            budget: 50_000_000,
            ..Config::default()
        };
        let (out_bytes, n, steps) = (out.to_le_bytes(), (columns as u32).to_le_bytes(), (k as u32 / 64).to_le_bytes());
        let args: [&[u8]; 5] = [&maps[0], &maps[1], &out_bytes, &n, &steps];
        module.launch("cluster_gemm", &shape, &args, &m).unwrap();
        let mut bytes = vec![0; rows * columns * 4];
        m.read(out, &mut bytes).unwrap();
        for (i, c) in bytes.as_chunks::<4>().0.iter().enumerate() {
            let want = reference(&a, &b, k, i / columns, i % columns);
            let got = f64::from(f32::from_le_bytes(*c));
            assert!((got - want).abs() < 1e-4, "({}, {}): {got}, {want}", i / columns, i % columns);
        }
    }
}

/// The products that Triton compiled (tests/cuda/hopper_triton.py): `tensors` through maps, else through pointers.
fn triton(rows: usize, columns: usize, k: usize, tensors: bool, seed: Option<u64>) {
    let mut m = Memory::new();
    let module = Module::load(include_str!("cuda/hopper_triton.ptx"), &mut m).unwrap();
    let (a, b) = (noise(rows * k, 7), noise(columns * k, 8));
    let (da, db) = (upload(&mut m, &a), upload(&mut m, &b));
    let out = upload(&mut m, &vec![0; rows * columns]);
    let shape = Config {
        grid: [rows.div_ceil(128) as u32, columns.div_ceil(128) as u32, 1],
        block: [if tensors { 256 } else { 128 }, 1, 1],
        dynamic_shared: 98328,
        threads: 2,
        seed,
        ..Config::default()
    };
    let (word, long) = (|x: usize| (x as u32).to_le_bytes().to_vec(), |x: u64| x.to_le_bytes().to_vec());
    // Both kernels end with two scratch pointers.
    let args: Vec<Vec<u8>> = if tensors {
        // A descriptor is a map, its shape and its strides.
        let descriptor = |map: [u8; 128], r: usize, c: usize| [map.to_vec(), word(r), word(c), long(c as u64), long(1)];
        [
            descriptor(map(da, rows, k, 128), rows, k),
            descriptor(map(db, columns, k, 128), columns, k),
            descriptor(map(out, rows, columns, 128), rows, columns),
        ]
        .into_iter()
        .flatten()
        .chain([word(k), long(0), long(0)])
        .collect()
    } else {
        vec![long(da), long(db), long(out), word(rows), word(columns), word(k), long(0), long(0)]
    };
    let args: Vec<&[u8]> = args.iter().map(Vec::as_slice).collect();
    module.launch(if tensors { "tensors" } else { "pointers" }, &shape, &args, &m).unwrap();
    let mut bytes = vec![0; rows * columns * 2];
    m.read(out, &mut bytes).unwrap();
    for i in 0..rows {
        for j in 0..columns {
            let at = (i * columns + j) * 2;
            let got = value(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
            let b_at = |l: usize| if tensors { b[j * k + l] } else { b[l * columns + j] };
            let want: f64 = (0..k).map(|l| value(a[i * k + l]) * value(b_at(l))).sum();
            assert!((got - want).abs() <= want.abs() / 256.0 + 1e-4, "({i}, {j}): {got}, {want}; seed {seed:?}");
        }
    }
}

#[test]
fn triton_products_match_f64() {
    for seed in [None, Some(1)] {
        triton(128, 256, 192, true, seed);
        triton(256, 128, 192, false, seed);
    }
    triton(208, 144, 128, true, None);
    triton(208, 144, 128, false, None);
}
