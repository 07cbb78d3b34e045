//! rmsnorm and cross-entropy, forward and backward.

use crate::device::{Device, SEEDS, close, noise, noise_halves, shape, value};

fn rmsnorm(rows: usize, c: usize, seed: Option<u64>) {
    let what = format!("rmsnorm {rows} {c} {seed:?}");
    let mut d = Device::new(include_str!("../cuda/rows.ptx"));
    let (x, w, dy) = (noise_halves(rows * c, 1), noise(c, 2), noise_halves(rows * c, 3));
    let (dx, dw, ddy) = (d.halves(&x), d.floats(&w), d.halves(&dy));
    let (y, rstd, gx) = (d.alloc(rows * c * 2), d.alloc(rows * 4), d.alloc(rows * c * 4));
    let blocks = rows.min(3);
    let (parts, gw) = (d.alloc(blocks * c * 4), d.alloc(c * 4));
    let (n_rows, n_c, n_blocks, eps) = (rows as i32, c as i32, blocks as i32, 1e-5f32);
    d.launch("rmsnorm_forward", shape([rows, 1, 1], 64, 0, seed), &[&dx, &dw, &y, &rstd, &n_c, &eps]);
    d.launch(
        "rmsnorm_backward",
        shape([blocks, 1, 1], 64, c * 4, seed),
        &[&dx, &dw, &ddy, &rstd, &gx, &parts, &n_rows, &n_c],
    );
    d.launch("rmsnorm_backward_weight", shape([c.div_ceil(64), 1, 1], 64, 0, seed), &[&parts, &gw, &n_blocks, &n_c]);
    let (mut want_y, mut want_r, mut want_gx, mut want_gw) = (vec![], vec![], vec![], vec![0.0; c]);
    for r in 0..rows {
        let row = |v: &[u16], i: usize| value(v[r * c + i]);
        let scale = 1.0 / ((0..c).map(|i| row(&x, i).powi(2)).sum::<f64>() / c as f64 + 1e-5).sqrt();
        let mean = (0..c).map(|i| row(&dy, i) * f64::from(w[i]) * row(&x, i)).sum::<f64>() / c as f64 * scale * scale;
        want_r.push(scale);
        for i in 0..c {
            want_y.push(row(&x, i) * scale * f64::from(w[i]));
            want_gx.push(scale * (row(&dy, i) * f64::from(w[i]) - row(&x, i) * mean));
            want_gw[i] += row(&dy, i) * row(&x, i) * scale;
        }
    }
    let got: Vec<f32> = d.read_halves(y, rows * c).into_iter().map(|h| value(h) as f32).collect();
    // y is rounded to bf16: half a unit is at most 2^-8 of it.
    close(&format!("{what}: y"), &got, &want_y, |i| want_y[i].abs() * 2f64.powi(-8) * 1.01 + 1e-7);
    close(&format!("{what}: rstd"), &d.read(rstd, rows), &want_r, |i| want_r[i] * 2e-6);
    close(&format!("{what}: dx"), &d.read(gx, rows * c), &want_gx, |_| 2e-5);
    close(&format!("{what}: dw"), &d.read(gw, c), &want_gw, |_| 2e-5 * rows as f64);
}

#[test]
fn rmsnorm_of_many_shapes() {
    for (rows, c) in [(1, 2), (7, 66), (33, 200), (5, 1024)] {
        rmsnorm(rows, c, None);
    }
    for seed in SEEDS {
        rmsnorm(6, 130, seed);
    }
}

fn cross_entropy(rows: usize, v: usize, seed: Option<u64>) {
    let what = format!("cross-entropy {rows} {v} {seed:?}");
    let mut d = Device::new(include_str!("../cuda/rows.ptx"));
    let x: Vec<f32> = noise(rows * v, 7).into_iter().map(|x| 8.0 * x).collect();
    let targets: Vec<i32> = (0..rows).map(|r| if r % 5 == 3 { -100 } else { (r * 37 % v) as i32 }).collect();
    let (dx, dt, loss) = (d.floats(&x), d.ints(&targets), d.alloc(rows * 4));
    let (n_v, scale) = (v as i32, 0.25f32);
    d.launch("cross_entropy", shape([rows, 1, 1], 96, 0, seed), &[&dx, &dt, &loss, &n_v, &scale]);
    let (mut want_loss, mut want_x) = (vec![], vec![]);
    for r in 0..rows {
        let row: Vec<f64> = x[r * v..(r + 1) * v].iter().map(|x| f64::from(*x)).collect();
        let lse = row.iter().map(|x| x.exp()).sum::<f64>().ln();
        want_loss.push(if targets[r] < 0 { 0.0 } else { lse - row[targets[r] as usize] });
        for (i, x) in row.iter().enumerate() {
            let hit = if i as i32 == targets[r] { 1.0 } else { 0.0 };
            want_x.push(if targets[r] < 0 { 0.0 } else { ((x - lse).exp() - hit) * 0.25 });
        }
    }
    close(&format!("{what}: loss"), &d.read(loss, rows), &want_loss, |_| 2e-5);
    close(&format!("{what}: gradient"), &d.read(dx, rows * v), &want_x, |_| 1e-6);
}

#[test]
fn cross_entropy_of_many_shapes() {
    for (rows, v) in [(1, 1), (7, 33), (12, 1003), (4, 5000)] {
        cross_entropy(rows, v, None);
    }
    for seed in SEEDS {
        cross_entropy(9, 257, seed);
    }
}
