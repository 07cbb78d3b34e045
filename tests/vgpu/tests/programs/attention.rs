//! Flash attention, forward and backward: sequences of different lengths, causal, shared key heads.

use crate::device::{Device, SEEDS, close, noise_halves, shape, value};

const D: usize = 64;
const TILE: usize = 64 * 72 * 2;

/// Results in f64, and for each the sum of the absolute terms, which bounds the rounding of p and ds to bf16.
#[derive(Default)]
struct Reference {
    out: Vec<f64>,
    out_size: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dq_size: Vec<f64>,
    dk: Vec<f64>,
    dk_size: Vec<f64>,
    dv: Vec<f64>,
    dv_size: Vec<f64>,
}

struct Case<'a> {
    starts: &'a [i32],
    heads: usize,
    kv_heads: usize,
    scale: f64,
    q: Vec<u16>,
    k: Vec<u16>,
    v: Vec<u16>,
    dout: Vec<u16>,
}

impl Case<'_> {
    fn reference(&self) -> Reference {
        let (h, kv, tokens) = (self.heads, self.kv_heads, *self.starts.last().unwrap() as usize);
        let mut r = Reference { lse: vec![0.0; tokens * h], ..Reference::default() };
        for x in [&mut r.out, &mut r.out_size, &mut r.dq, &mut r.dq_size] {
            x.resize(tokens * h * D, 0.0);
        }
        for x in [&mut r.dk, &mut r.dk_size, &mut r.dv, &mut r.dv_size] {
            x.resize(tokens * kv * D, 0.0);
        }
        let dot =
            |a: &[u16], i: usize, b: &[u16], j: usize| (0..D).map(|e| value(a[i + e]) * value(b[j + e])).sum::<f64>();
        for s in self.starts.windows(2) {
            for head in 0..h {
                let group = head / (h / kv);
                for i in s[0] as usize..s[1] as usize {
                    let at = (i * h + head) * D;
                    let keys = s[0] as usize..i + 1;
                    let key_at = |j: usize| (j * kv + group) * D;
                    let x: Vec<f64> = keys.clone().map(|j| dot(&self.q, at, &self.k, key_at(j)) * self.scale).collect();
                    let top = x.iter().copied().fold(f64::MIN, f64::max);
                    let sum: f64 = x.iter().map(|x| (x - top).exp()).sum();
                    r.lse[i * h + head] = top + sum.ln();
                    let p: Vec<f64> = x.iter().map(|x| (x - top).exp() / sum).collect();
                    let dp: Vec<f64> = keys.clone().map(|j| dot(&self.dout, at, &self.v, key_at(j))).collect();
                    let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
                    for (n, j) in keys.enumerate() {
                        let (ds, to) = (p[n] * (dp[n] - delta) * self.scale, key_at(j));
                        // delta comes from rounded outputs, so its error counts as a term of ds too.
                        let ds_size = p[n] * (dp[n].abs() + delta.abs() + 1.0) * self.scale;
                        for e in 0..D {
                            let (q, k) = (value(self.q[at + e]), value(self.k[to + e]));
                            let (v, g) = (value(self.v[to + e]), value(self.dout[at + e]));
                            r.out[at + e] += p[n] * v;
                            r.out_size[at + e] += p[n] * v.abs();
                            r.dq[at + e] += ds * k;
                            r.dq_size[at + e] += ds_size * k.abs();
                            r.dk[to + e] += ds * q;
                            r.dk_size[to + e] += ds_size * q.abs();
                            r.dv[to + e] += p[n] * g;
                            r.dv_size[to + e] += p[n] * g.abs();
                        }
                    }
                }
            }
        }
        r
    }

    fn check(&self, seed: Option<u64>) {
        let (h, kv, tokens) = (self.heads, self.kv_heads, *self.starts.last().unwrap() as usize);
        let what = format!("attention {:?} {h}/{kv} {seed:?}", self.starts);
        let mut d = Device::new(include_str!("../cuda/attention.ptx"));
        let [q, k, v, dout] = [&self.q, &self.k, &self.v, &self.dout].map(|x| d.halves(x));
        let starts = d.ints(self.starts);
        let [out, dq] = [0; 2].map(|_| d.alloc(tokens * h * D * 4));
        let [dk, dv] = [0; 2].map(|_| d.alloc(tokens * kv * D * 4));
        let [lse, delta] = [0; 2].map(|_| d.alloc(tokens * h * 4));
        let longest = self.starts.windows(2).map(|s| s[1] - s[0]).max().unwrap() as usize;
        let (blocks, sequences) = (longest.div_ceil(64), self.starts.len() - 1);
        let (heads, kv_heads, scale) = (h as i32, kv as i32, self.scale as f32);
        let rows = (tokens * h) as i32;
        d.launch(
            "attention_forward",
            shape([blocks, h, sequences], 128, 3 * TILE, seed),
            &[&q, &k, &v, &out, &lse, &starts, &heads, &kv_heads, &scale],
        );
        d.launch(
            "attention_delta",
            shape([(tokens * h).div_ceil(4), 1, 1], 128, 0, seed),
            &[&out, &dout, &delta, &rows],
        );
        d.launch(
            "attention_backward_query",
            shape([blocks, h, sequences], 128, 4 * TILE, seed),
            &[&q, &k, &v, &dout, &lse, &delta, &dq, &starts, &heads, &kv_heads, &scale],
        );
        d.launch(
            "attention_backward_key",
            shape([blocks, kv, sequences], 128, 6 * TILE, seed),
            &[&q, &k, &v, &dout, &lse, &delta, &dk, &dv, &starts, &heads, &kv_heads, &scale],
        );
        let r = self.reference();
        // p and ds are rounded to bf16 (at most 2^-8 of the term); twice that leaves room for f32 sums.
        let unit = 2f64.powi(-7);
        let check = |name: &str, at: u64, want: &[f64], size: &[f64]| {
            close(&format!("{what}: {name}"), &d.read(at, want.len()), want, |i| unit * size[i] + 1e-6);
        };
        close(&format!("{what}: lse"), &d.read(lse, tokens * h), &r.lse, |_| 1e-5);
        check("out", out, &r.out, &r.out_size);
        check("dq", dq, &r.dq, &r.dq_size);
        check("dk", dk, &r.dk, &r.dk_size);
        check("dv", dv, &r.dv, &r.dv_size);
    }
}

fn case(starts: &[i32], heads: usize, kv_heads: usize) -> Case<'_> {
    let tokens = *starts.last().unwrap() as usize;
    Case {
        starts,
        heads,
        kv_heads,
        scale: 0.125,
        q: noise_halves(tokens * heads * D, 3),
        k: noise_halves(tokens * kv_heads * D, 4),
        v: noise_halves(tokens * kv_heads * D, 5),
        dout: noise_halves(tokens * heads * D, 6),
    }
}

#[test]
fn one_token_and_one_sequence() {
    case(&[0, 1], 1, 1).check(None);
    case(&[0, 64], 2, 1).check(None);
    case(&[0, 65], 2, 2).check(None);
}

#[test]
fn sequences_of_many_lengths_with_shared_key_heads() {
    for seed in SEEDS {
        case(&[0, 7, 7, 40, 173], 4, 2).check(seed);
    }
    case(&[0, 130, 133], 6, 2).check(None);
}
