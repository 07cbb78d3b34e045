//! Small programs: vector add, one-warp product, angles, divergence and atomics.

use vgpu::{Config, Memory, Module};

use crate::device::noise;

fn module(memory: &mut Memory) -> Module {
    Module::load(include_str!("../cuda/programs.ptx"), memory).unwrap()
}

fn upload<T: Copy, const N: usize>(m: &mut Memory, v: &[T], bytes: fn(T) -> [u8; N]) -> u64 {
    let address = m.alloc(v.len() * N).unwrap();
    m.write(address, &v.iter().flat_map(|x| bytes(*x)).collect::<Vec<_>>()).unwrap();
    address
}

fn floats(m: &mut Memory, v: &[f32]) -> u64 {
    upload(m, v, f32::to_le_bytes)
}

fn words(m: &Memory, address: u64, n: usize) -> Vec<u32> {
    let mut out = vec![0; n * 4];
    m.read(address, &mut out).unwrap();
    out.chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect()
}

fn results(m: &Memory, address: u64, n: usize) -> Vec<f32> {
    words(m, address, n).into_iter().map(f32::from_bits).collect()
}

fn config(grid: u32, block: u32) -> Config {
    Config { grid: [grid, 1, 1], block: [block, 1, 1], ..Config::default() }
}

fn p(x: &u64) -> [u8; 8] {
    x.to_le_bytes()
}

#[test]
fn vadd_adds_and_counts_coalesced_sectors() {
    let mut m = Memory::new();
    let module = module(&mut m);
    let (a, b) = (noise(1000, 1), noise(1000, 2));
    let (da, db) = (floats(&mut m, &a), floats(&mut m, &b));
    let dc = m.alloc(4000).unwrap();
    let c = Config { threads: 2, ..config(8, 128) };
    let counters = module.launch("vadd", &c, &[&p(&da), &p(&db), &p(&dc), &1000u32.to_le_bytes()], &m).unwrap();
    for (i, x) in results(&m, dc, 1000).into_iter().enumerate() {
        assert_eq!(x, a[i] + b[i]);
    }
    // 1000 floats are 125 sectors, three arrays.
    assert_eq!((counters.global_sectors, counters.global_requests), (375, 96));
}

#[test]
fn rmsnorm_matches_f64() {
    let mut m = Memory::new();
    let module = module(&mut m);
    let (rows, cols) = (5, 300);
    let (x, w) = (noise(rows * cols, 3), noise(cols, 4));
    let (dx, dw) = (floats(&mut m, &x), floats(&mut m, &w));
    let dy = m.alloc(rows * cols * 4).unwrap();
    let args: [&[u8]; 5] = [&p(&dx), &p(&dw), &p(&dy), &(cols as u32).to_le_bytes(), &1e-5f32.to_le_bytes()];
    module.launch("rmsnorm", &config(rows as u32, 128), &args, &m).unwrap();
    let y = results(&m, dy, rows * cols);
    for r in 0..rows {
        let row = &x[r * cols..(r + 1) * cols];
        let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / cols as f64;
        for c in 0..cols {
            let want = f64::from(row[c]) / (mean + 1e-5).sqrt() * f64::from(w[c]);
            assert!((f64::from(y[r * cols + c]) - want).abs() < 2e-6, "row {r} column {c}");
        }
    }
}

#[test]
fn gemm_with_mma_matches_f64() {
    let mut m = Memory::new();
    let module = module(&mut m);
    let (rows, n, k) = (48, 24, 64);
    let cut = |v: Vec<f32>| -> Vec<u16> { v.into_iter().map(|x| (x.to_bits() >> 16) as u16).collect() };
    let (a, b) = (cut(noise(rows * k, 5)), cut(noise(k * n, 6)));
    let (da, db) = (upload(&mut m, &a, u16::to_le_bytes), upload(&mut m, &b, u16::to_le_bytes));
    let dc = m.alloc(rows * n * 4).unwrap();
    let args: [&[u8]; 5] = [&p(&da), &p(&db), &p(&dc), &(n as u32).to_le_bytes(), &(k as u32).to_le_bytes()];
    let shape = Config { grid: [n as u32 / 8, rows as u32 / 16, 1], threads: 2, ..config(1, 32) };
    let counters = module.launch("gemm", &shape, &args, &m).unwrap();
    let value = |x: u16| f64::from(f32::from_bits(u32::from(x) << 16));
    let c = results(&m, dc, rows * n);
    for i in 0..rows {
        for j in 0..n {
            let want: f64 = (0..k).map(|l| value(a[i * k + l]) * value(b[l * n + j])).sum();
            assert!((f64::from(c[i * n + j]) - want).abs() < 1e-5, "({i}, {j})");
        }
    }
    assert_eq!(counters.tensor_flops, 2 * (rows * n * k) as u64);
}

#[test]
fn sine_and_cosine_hold_for_large_angles() {
    let mut m = Memory::new();
    let module = module(&mut m);
    let x: Vec<f32> = (0..300).map(|i| if i % 2 == 0 { i as f32 * 0.37 } else { i as f32 * 12345.7 }).collect();
    let dx = floats(&mut m, &x);
    let out: Vec<u64> = (0..3).map(|_| m.alloc(1200).unwrap()).collect();
    let args: [&[u8]; 5] = [&p(&dx), &p(&out[0]), &p(&out[1]), &p(&out[2]), &300u32.to_le_bytes()];
    module.launch("angles", &config(3, 128), &args, &m).unwrap();
    let (s, c, e) = (results(&m, out[0], 300), results(&m, out[1], 300), results(&m, out[2], 300));
    for i in 0..300 {
        let v = f64::from(x[i]);
        assert!((f64::from(s[i]) - v.sin()).abs() < 3e-7, "sin {v}: {}", s[i]);
        assert!((f64::from(c[i]) - v.cos()).abs() < 3e-7, "cos {v}: {}", c[i]);
        let want = (-v.abs() * 0.001).exp() / 3.0;
        assert!((f64::from(e[i]) - want).abs() <= 1e-5 * want + 1e-38, "exp {v}: {} {want}", e[i]);
    }
}

#[test]
fn divergence_atomics_and_integers_match() {
    let mut m = Memory::new();
    let module = module(&mut m);
    let n = 500usize;
    let counts = upload(&mut m, &[0u32; 9], u32::to_le_bytes);
    let out = m.alloc(n * 4).unwrap();
    let args: [&[u8]; 3] = [&p(&counts), &p(&out), &(n as u32).to_le_bytes()];
    module.launch("mixed", &Config { threads: 2, ..config(4, 128) }, &args, &m).unwrap();
    let mut want = [0u32; 9];
    let table = [3, 1, 4, 1];
    let got = words(&m, out, n);
    for i in 0..n as i32 {
        let v: i32 = (0..i % 7).map(|j| (i * 31 + j) / (j + 3) % 11 + table[(j & 3) as usize]).sum();
        if v & 1 == 1 {
            want[(v & 7) as usize] += v as u32;
        } else {
            want[8] = want[8].max(v as u32);
        }
        let bits = i.count_ones() ^ (((i + 1).leading_zeros()) << 4);
        assert_eq!(got[i as usize], v as u32 ^ bits, "thread {i}");
    }
    assert_eq!(words(&m, counts, 9), want);
}
