//! Causal attention inside documents: element types, and decoding of one token. The passes have files of their own.

use super::attention_blocks::{Inputs, Results};
use super::buffer::{elems, elems_mut};
use super::elem::Elem;
use super::elementwise::same_type;
use super::level::multiversion;
use super::threads::chunked;
use super::vector::{dot, exp};
use super::{Cpu, attention_backward, attention_forward};
use crate::backend::{Attention, AttentionGrads, Decode, Heads};
use crate::tensor::Tensor;

multiversion! {
    /// One query against keys `first ..= last` of one head; rows of k and v lie `stride` apart. Gives lse.
    fn attend[E: Elem](out: &mut [E], q: &[E], k: &[E], v: &[E], stride: usize, first: usize, last: usize, scale: f32) -> f32 {
        let d = q.len();
        let mut scores = vec![0.0f32; last + 1 - first];
        let mut max = f32::NEG_INFINITY;
        for (s, j) in scores.iter_mut().zip(first..) {
            *s = dot::<I, E, E>(q, &k[j * stride..j * stride + d]) * scale;
            max = if *s > max || s.is_nan() { *s } else { max };
        }
        let mut acc = vec![0.0f32; d];
        let mut sum = 0.0;
        for (s, j) in scores.iter().zip(first..) {
            let p = exp::<I>(s - max);
            sum += p;
            for (acc, v) in acc.iter_mut().zip(&v[j * stride..j * stride + d]) {
                *acc = I::fma(p, v.get(), *acc);
            }
        }
        for (o, acc) in out.iter_mut().zip(&acc) {
            *o = E::put(acc / sum);
        }
        max + sum.ln()
    }
}

pub fn forward(dev: &Cpu, out: &mut Tensor<Cpu>, lse: &mut Tensor<Cpu>, x: Attention<'_, Cpu>) {
    x.check("attention", &[("out", out)], lse);
    same_type!("attention", out, x.q, x.k, x.v; E => {
        attention_forward::forward(dev, elems_mut::<E>(out), elems_mut(lse), Inputs::new(x));
    });
}

pub fn backward(
    dev: &Cpu,
    dx: AttentionGrads<'_, Cpu>,
    dout: &Tensor<Cpu>,
    out: &Tensor<Cpu>,
    lse: &Tensor<Cpu>,
    x: Attention<'_, Cpu>,
) {
    dx.check("attention_backward", dout, out, lse, x);
    same_type!("attention_backward", dx.dq, dx.dk, dx.dv, dout, out, x.q, x.k, x.v; E => {
        let grads = [dx.dq, dx.dk, dx.dv].map(elems_mut::<E>);
        let results = Results { dout: elems(dout), out: elems(out), lse: elems(lse) };
        attention_backward::backward(dev, grads, results, Inputs::new(x));
    });
}

pub fn decode(dev: &Cpu, out: &mut Tensor<Cpu>, x: Decode<'_, Cpu>) {
    let capacity = x.check("attention_decode", out);
    let Heads { n_query, n_kv, head_dim: d } = x.heads;
    let (group, stride) = (n_query / n_kv, n_kv * d);
    let (scale, lens) = (1.0 / (d as f32).sqrt(), elems::<i32>(x.lens));
    same_type!("attention_decode", out, x.q, x.k_cache, x.v_cache; E => {
        let [q, k, v] = [x.q, x.k_cache, x.v_cache].map(elems::<E>);
        dev.pool.split(chunked(elems_mut::<E>(out), d), |task, out| {
            let (s, h) = (task / n_query, task % n_query);
            let len = usize::try_from(lens[s]).expect("lengths are not negative");
            let fits = (1..=capacity).contains(&len);
            assert!(fits, "attention_decode: length {len} of sequence {s} outside 1..={capacity}");
            let at = s * capacity * stride + h / group * d;
            let first = x.mask.window.map_or(0, |w| len.saturating_sub(w));
            attend(dev.level, out, &q[task * d..][..d], &k[at..], &v[at..], stride, first, len - 1, scale);
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Mask};
    use crate::cpu::testing::{
        assert_close, cpus, documents, normal, rounded, stored, tensor, tensor_i32, thread_counts, values,
    };
    use crate::tensor::{DType, Device};

    /// q, k, v and the gradient of the output, for N tokens.
    struct Case {
        starts: Vec<i32>,
        heads: Heads,
        mask: Mask,
        dtype: DType,
    }

    impl Case {
        fn new(lengths: &[usize], heads: (usize, usize, usize), window: Option<usize>, dtype: DType) -> Self {
            let mut starts = vec![];
            for &len in lengths {
                starts.extend(vec![starts.len() as i32; len]);
            }
            let (n_query, n_kv, head_dim) = heads;
            Self { starts, heads: Heads { n_query, n_kv, head_dim }, mask: Mask { window }, dtype }
        }

        fn widths(&self) -> (usize, usize) {
            (self.heads.n_query * self.heads.head_dim, self.heads.n_kv * self.heads.head_dim)
        }

        fn inputs(&self, seed: u64) -> [Vec<f32>; 4] {
            let (n, (wide, narrow)) = (self.starts.len(), self.widths());
            [
                normal(seed, n * wide),
                normal(seed + 1, n * narrow),
                normal(seed + 2, n * narrow),
                normal(seed + 3, n * wide),
            ]
        }

        /// out, lse, dq, dk, dv.
        fn run(&self, dev: &Cpu, inputs: &[Vec<f32>; 4]) -> [Vec<f32>; 5] {
            let (n, (wide, narrow)) = (self.starts.len(), self.widths());
            let make = |x: &[f32], cols| tensor(dev, n, cols, self.dtype, x);
            let [q, k, v, dout] = inputs;
            let (q, k, v, dout) = (make(q, wide), make(k, narrow), make(v, narrow), make(dout, wide));
            let alloc = |cols| dev.alloc(n, cols, self.dtype).unwrap();
            let (mut out, mut dq, mut dk, mut dv) = (alloc(wide), alloc(wide), alloc(narrow), alloc(narrow));
            let mut lse = dev.alloc(n, self.heads.n_query, DType::F32).unwrap();
            let t = documents(dev, &self.starts);
            let x = Attention { q: &q, k: &k, v: &v, batch: &t, heads: self.heads, mask: self.mask };
            dev.attention_forward(&mut out, &mut lse, x).unwrap();
            let dx = AttentionGrads { dq: &mut dq, dk: &mut dk, dv: &mut dv };
            dev.attention_backward(dx, &dout, &out, &lse, x, None).unwrap();
            [&out, &lse, &dq, &dk, &dv].map(|t| values(dev, t))
        }

        /// The same by the textbook, every intermediate passed through `round` and every step of a sum through `step`.
        fn reference(
            &self,
            inputs: &[Vec<f64>; 4],
            round: impl Fn(f64) -> f64,
            step: impl Fn(f64) -> f64,
        ) -> [Vec<f64>; 5] {
            let Heads { n_query: h, n_kv, head_dim: d } = self.heads;
            let (n, (wide, narrow)) = (self.starts.len(), self.widths());
            let [q, k, v, dout] = inputs;
            let (mut out, mut lse) = (vec![0.0; n * wide], vec![0.0; n * h]);
            let (mut dq, mut dk, mut dv) = (vec![0.0; n * wide], vec![0.0; n * narrow], vec![0.0; n * narrow]);
            let scale = 1.0 / (d as f64).sqrt();
            let dot = |x: &[f64], y: &[f64]| round(x.iter().zip(y).fold(0.0, |s, (x, y)| step(s + x * y)));
            for i in 0..n {
                let first = self.mask.window.map_or(0, |w| (i + 1).saturating_sub(w)).max(self.starts[i] as usize);
                for head in 0..h {
                    let row = (i * h + head) * d..(i * h + head + 1) * d;
                    let at = |j: usize| (j * n_kv + head / (h / n_kv)) * d..(j * n_kv + head / (h / n_kv) + 1) * d;
                    let scores: Vec<f64> =
                        (first..=i).map(|j| round(dot(&q[row.clone()], &k[at(j)]) * scale)).collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().fold(0.0, |sum, s| step(sum + round((s - max).exp())));
                    lse[i * h + head] = step(max + step(sum.ln()));
                    let p: Vec<f64> = scores.iter().map(|s| round((s - max).exp() / sum)).collect();
                    for (p, j) in p.iter().zip(first..) {
                        at(j).zip(row.clone()).for_each(|(a, o)| out[o] = step(out[o] + p * v[a]));
                    }
                    out[row.clone()].iter_mut().for_each(|o| *o = round(*o));
                    let delta = dot(&dout[row.clone()], &out[row.clone()]);
                    for (p, j) in p.iter().zip(first..) {
                        let ds = round(p * (dot(&dout[row.clone()], &v[at(j)]) - delta) * scale);
                        for (a, o) in at(j).zip(row.clone()) {
                            dq[o] = step(dq[o] + ds * k[a]);
                            dk[a] = step(dk[a] + ds * q[o]);
                            dv[a] = step(dv[a] + p * dout[o]);
                        }
                    }
                }
            }
            for x in [&mut dq, &mut dk, &mut dv] {
                x.iter_mut().for_each(|x| *x = round(*x));
            }
            [out, lse, dq, dk, dv]
        }
    }

    const NAMES: [&str; 5] = ["out", "lse", "dq", "dk", "dv"];

    #[test]
    fn forward_and_backward_follow_the_formula() {
        let cases = [
            (vec![1], (1, 1, 8), None),
            (vec![1, 7, 33, 1], (4, 2, 16), None),
            (vec![60, 3, 121], (3, 1, 40), Some(5)),
            (vec![300], (2, 1, 8), None),
            (vec![290, 5], (2, 2, 24), Some(100)),
        ];
        for dev in cpus() {
            for dtype in [DType::F32, DType::Bf16] {
                for (lengths, heads, window) in &cases {
                    let case = Case::new(lengths, *heads, *window, dtype);
                    let inputs = case.inputs(11);
                    let ours = case.run(&dev, &inputs);
                    let inputs = inputs.map(|x| stored(dtype, &x));
                    let exact = case.reference(&inputs, |x| x, |x| x);
                    let plain = case.reference(&inputs, |x| rounded(dtype, x), |x| rounded(DType::F32, x));
                    for i in 0..5 {
                        let stored_as = if i == 1 { DType::F32 } else { dtype };
                        let what = format!("{:?} {dtype:?} {lengths:?} {heads:?} {window:?} {}", dev.level(), NAMES[i]);
                        assert_close(&what, &ours[i], &exact[i], &plain[i], stored_as);
                    }
                }
            }
        }
    }

    #[test]
    fn a_document_is_the_same_bits_alone_packed_and_on_any_number_of_threads() {
        for dtype in [DType::F32, DType::Bf16] {
            let packed = Case::new(&[37, 250, 1, 64], (4, 2, 16), None, dtype);
            let mut inputs = packed.inputs(5);
            let devs = thread_counts();
            let whole = packed.run(&devs[0], &inputs);
            for dev in &devs[1..] {
                assert_eq!(packed.run(dev, &inputs), whole, "{} threads", dev.threads());
            }
            let (from, to) = (37, 287);
            let alone = Case::new(&[250], (4, 2, 16), None, dtype);
            let n = packed.starts.len();
            let cut = |x: &Vec<f32>| x[from * x.len() / n..to * x.len() / n].to_vec();
            let single = alone.run(&devs[1], &[cut(&inputs[0]), cut(&inputs[1]), cut(&inputs[2]), cut(&inputs[3])]);
            for i in 0..5 {
                assert_eq!(single[i], cut(&whole[i]), "{dtype:?} {}", NAMES[i]);
            }
            // Another document full of NaN changes no bit of this one.
            for x in &mut inputs {
                let end = 37 * (x.len() / n);
                x[..end].fill(f32::NAN);
            }
            let disturbed = packed.run(&devs[1], &inputs);
            for i in 0..5 {
                assert_eq!(cut(&disturbed[i]), cut(&whole[i]), "{dtype:?} {}", NAMES[i]);
                assert!(disturbed[i][0].is_nan(), "{} hides NaN", NAMES[i]);
            }
        }
    }

    #[test]
    fn decoding_a_token_is_the_last_row_of_forward() {
        for dev in cpus() {
            for window in [None, Some(7)] {
                let (lens, capacity) = ([1usize, 20, 33], 40);
                let case = Case::new(&lens, (4, 2, 16), window, DType::F32);
                let (wide, narrow) = case.widths();
                let [q, k, v, dout] = case.inputs(21);
                let whole = case.run(&dev, &[q.clone(), k.clone(), v.clone(), dout]);
                let (mut qs, mut expected) = (vec![], vec![]);
                let mut caches = [vec![f32::NAN; 3 * capacity * narrow], vec![f32::NAN; 3 * capacity * narrow]];
                let mut end = 0;
                for (s, len) in lens.iter().enumerate() {
                    for (cache, x) in caches.iter_mut().zip([&k, &v]) {
                        cache[s * capacity * narrow..][..len * narrow]
                            .copy_from_slice(&x[end * narrow..(end + len) * narrow]);
                    }
                    end += len;
                    qs.extend_from_slice(&q[(end - 1) * wide..end * wide]);
                    expected.extend_from_slice(&whole[0][(end - 1) * wide..end * wide]);
                }
                let [kc, vc] = caches.map(|c| tensor(&dev, 3 * capacity, narrow, DType::F32, &c));
                let (qt, mut out) = (tensor(&dev, 3, wide, DType::F32, &qs), dev.alloc(3, wide, DType::F32).unwrap());
                let lens = tensor_i32(&dev, &lens.map(|l| l as i32));
                let (heads, mask) = (case.heads, case.mask);
                let x = Decode { q: &qt, k_cache: &kc, v_cache: &vc, lens: &lens, heads, mask };
                dev.attention_decode(&mut out, x).unwrap();
                for (x, y) in values(&dev, &out).iter().zip(&expected) {
                    assert!((x - y).abs() <= 1e-5 * y.abs().max(1.0), "{x} {y}");
                }
            }
        }
    }
}
