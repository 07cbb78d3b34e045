//! The product with three stages of cp.async, ldmatrix and mma.sync.

use crate::device::{Device, SEEDS, close, noise_halves, shape, value};

/// Shared memory of the three stages.
const SHARED: usize = 3 * (64 * 32 + 32 * 72) * 2;

fn check(m: usize, n: usize, k: usize, seed: Option<u64>) {
    let mut d = Device::new(include_str!("../cuda/gemm.ptx"));
    let (a, b) = (noise_halves(m * k, 1), noise_halves(k * n, 2));
    let (da, db, dc) = (d.halves(&a), d.halves(&b), d.alloc(m * n * 4));
    let grid = [n.div_ceil(64), m.div_ceil(64), 1];
    let sizes = [m as i32, n as i32, k as i32];
    let counters = d.launch("gemm", shape(grid, 128, SHARED, seed), &[&da, &db, &dc, &sizes[0], &sizes[1], &sizes[2]]);
    let mut want = vec![0.0; m * n];
    let mut size = vec![0.0; m * n];
    for i in 0..m {
        for l in 0..k {
            for j in 0..n {
                let x = value(a[i * k + l]) * value(b[l * n + j]);
                want[i * n + j] += x;
                size[i * n + j] += x.abs();
            }
        }
    }
    // k sums in f32, each of which rounds by half a unit in the last place of a partial sum.
    let per_sum = k as f64 * 2f64.powi(-24);
    close(&format!("gemm {m} {n} {k}"), &d.read(dc, m * n), &want, |i| per_sum * size[i] + 1e-30);
    let tiles = (grid[0] * grid[1] * k.div_ceil(32)) as u64;
    assert_eq!(counters.tensor_flops, tiles * 2 * 64 * 64 * 32, "gemm {m} {n} {k}");
    // Turned and padded rows: neither cp.async nor ldmatrix meets a bank twice.
    assert_eq!(counters.bank_conflicts, 0, "gemm {m} {n} {k}");
}

#[test]
fn gemm_of_many_shapes() {
    for (m, n, k) in
        [(1, 8, 8), (7, 16, 24), (33, 40, 72), (64, 64, 32), (65, 72, 104), (100, 136, 200), (128, 128, 256)]
    {
        check(m, n, k, None);
    }
    for seed in SEEDS {
        check(70, 80, 136, seed);
    }
}
