//! AdamW and the embedding, forward and backward.

use crate::device::{Device, SEEDS, close, noise, noise_halves, shape, value};

fn adamw(n: usize, seed: Option<u64>) {
    let what = format!("adamw {n} {seed:?}");
    let mut d = Device::new(include_str!("../cuda/update.ptx"));
    let (lr, b1, b2, eps, decay) = (1e-2f32, 0.9f32, 0.99f32, 1e-8f32, 0.1f32);
    let p = noise(n, 1);
    let (dp, copy) = (d.floats(&p), d.alloc(n * 2));
    let (m, v) = (d.floats(&vec![0.0; n]), d.floats(&vec![0.0; n]));
    let clip = d.floats(&[0.5]);
    let mut want: Vec<[f64; 3]> = p.iter().map(|p| [f64::from(*p), 0.0, 0.0]).collect();
    let f = f64::from;
    for step in 1..=3 {
        let grad = noise(n, 10 + step as u64);
        let dg = d.floats(&grad);
        let (c1, c2) = (1.0 - b1.powi(step), 1.0 - b2.powi(step));
        let args = (n as i32, [lr, b1, b2, c1, c2, eps, decay]);
        d.launch(
            "adamw",
            shape([n.div_ceil(256).min(4), 1, 1], 128, 0, seed),
            &[
                &dp, &copy, &m, &v, &dg, &clip, &args.0, &args.1[0], &args.1[1], &args.1[2], &args.1[3], &args.1[4],
                &args.1[5], &args.1[6],
            ],
        );
        for (w, g) in want.iter_mut().zip(&grad) {
            let g = f(*g) * 0.5;
            w[1] = f(b1) * w[1] + (1.0 - f(b1)) * g;
            w[2] = f(b2) * w[2] + (1.0 - f(b2)) * g * g;
            w[0] -= f(lr) * (w[1] / f(c1) / ((w[2] / f(c2)).sqrt() + f(eps)) + f(decay) * w[0]);
        }
    }
    let column = |i: usize| want.iter().map(|w| w[i]).collect::<Vec<_>>();
    // 1 - b in f32 is off by 2^-24 / (1 - b), a few units in all.
    close(&format!("{what}: m"), &d.read(m, n), &column(1), |_| 1e-6);
    close(&format!("{what}: v"), &d.read(v, n), &column(2), |_| 1e-6);
    close(&format!("{what}: p"), &d.read(dp, n), &column(0), |_| 2e-6);
    let new = d.read(dp, n);
    for (i, h) in d.read_halves(copy, n).into_iter().enumerate() {
        let bits = new[i].to_bits();
        assert_eq!(u32::from(h), bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16, "{what}: copy {i}");
    }
}

#[test]
fn adamw_of_many_sizes() {
    for n in [1, 33, 1000, 3001] {
        adamw(n, None);
    }
    for seed in SEEDS {
        adamw(700, seed);
    }
}

fn embedding(tokens: usize, vocab: usize, c: usize, seed: Option<u64>) {
    let what = format!("embedding {tokens} {vocab} {c} {seed:?}");
    let mut d = Device::new(include_str!("../cuda/update.ptx"));
    let ids: Vec<i32> = (0..tokens).map(|t| (t * t * 7 % vocab) as i32).collect();
    let (table, dout) = (noise_halves(vocab * c, 1), noise_halves(tokens * c, 2));
    let (di, dt, dd) = (d.ints(&ids), d.halves(&table), d.halves(&dout));
    let out = d.alloc(tokens * c * 2);
    let (n_c, n_tokens) = (c as i32, tokens as i32);
    d.launch("embedding_forward", shape([tokens, 1, 1], 32, 0, seed), &[&dt, &di, &out, &n_c]);
    let want: Vec<u16> = ids.iter().flat_map(|i| &table[*i as usize * c..][..c]).copied().collect();
    assert_eq!(d.read_halves(out, tokens * c), want, "{what}");

    let [any, ordered] = [0; 2].map(|_| d.floats(&vec![0.0; vocab * c]));
    d.launch("embedding_backward", shape([tokens, 1, 1], 64, 0, seed), &[&any, &di, &dd, &n_c]);
    d.launch("embedding_backward_ordered", shape([vocab, 1, 1], 64, 0, seed), &[&ordered, &di, &dd, &n_tokens, &n_c]);
    let (mut want, mut in_order) = (vec![0.0; vocab * c], vec![0f32; vocab * c]);
    for (t, id) in ids.iter().enumerate() {
        for i in 0..c {
            want[*id as usize * c + i] += value(dout[t * c + i]);
            in_order[*id as usize * c + i] += value(dout[t * c + i]) as f32;
        }
    }
    close(&format!("{what}: backward"), &d.read(any, vocab * c), &want, |_| tokens as f64 * 1e-6);
    // One order, one result, to the bit.
    assert_eq!(d.read(ordered, vocab * c), in_order, "{what}: ordered backward");
}

#[test]
fn embedding_of_many_shapes() {
    for (tokens, vocab, c) in [(1, 1, 8), (7, 5, 33), (100, 13, 64), (33, 50, 40)] {
        embedding(tokens, vocab, c, None);
    }
    for seed in SEEDS {
        embedding(50, 9, 24, seed);
    }
}
