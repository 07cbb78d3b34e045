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

/// Elements of a row of values whose sums stay in registers while all keys go by.
const PART: usize = 64;

multiversion! {
    /// One query against keys `first ..= last` of one head; rows of k and v lie `stride` apart.
    fn attend[E: Elem](out: &mut [E], q: &[E], k: &[E], v: &[E], stride: usize, first: usize, last: usize, scale: f32) {
        let d = q.len();
        let mut scores = vec![0.0f32; last + 1 - first];
        let mut max = f32::NEG_INFINITY;
        for (s, j) in scores.iter_mut().zip(first..) {
            *s = dot::<I, E, E>(q, &k[j * stride..j * stride + d]) * scale;
            max = if *s > max || s.is_nan() { *s } else { max };
        }
        for s in &mut scores {
            *s = exp::<I>(*s - max);
        }
        let sum: f32 = scores.iter().fold(0.0, |sum, p| sum + p);
        for (part, out) in out.chunks_mut(PART).enumerate() {
            let (at, wide) = (part * PART, out.len());
            let mut acc = [0.0f32; PART];
            for (&p, j) in scores.iter().zip(first..) {
                let v = &v[j * stride + at..][..wide];
                match <&[E; PART]>::try_from(v) {
                    Ok(v) => acc.iter_mut().zip(v).for_each(|(acc, v)| *acc = I::fma(p, v.get(), *acc)),
                    Err(_) => acc.iter_mut().zip(v).for_each(|(acc, v)| *acc = I::fma(p, v.get(), *acc)),
                }
            }
            for (o, acc) in out.iter_mut().zip(&acc) {
                *o = E::put(acc / sum);
            }
        }
    }
}

/// Rows before `first` are computed only where they stand in a block with others.
pub fn forward(dev: &Cpu, out: &mut Tensor<Cpu>, lse: &mut Tensor<Cpu>, x: Attention<'_, Cpu>, first: usize) {
    x.check("attention", &[("out", out)], lse);
    same_type!("attention", out, x.q, x.k, x.v; E => {
        attention_forward::forward(dev, elems_mut::<E>(out), elems_mut(lse), Inputs::new(x), first);
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
    use crate::cpu::testing::attention::{self, Case, SHAPES};
    use crate::cpu::testing::{cpus, thread_counts_of_levels};
    use crate::tensor::DType;

    #[test]
    fn forward_and_backward_follow_the_formula() {
        for dev in cpus() {
            for (i, shape) in SHAPES.into_iter().enumerate() {
                attention::follows_the_formula(&dev, dev.level().name(), shape, i % 2 == 1, [1.0; 2]);
                attention::follows_the_formula(&dev, dev.level().name(), shape, i % 2 == 0, [1.0; 2]);
            }
        }
    }

    #[test]
    fn a_document_is_the_same_bits_alone_packed_and_on_any_number_of_threads() {
        for (devs, dtype) in thread_counts_of_levels().iter().flat_map(|d| [(d, DType::F32), (d, DType::Bf16)]) {
            let packed = Case::new((&[37, 250, 1, 64], (4, 2, 16), None), dtype, false);
            let inputs = packed.inputs(5);
            let whole = packed.run(&devs[0], &inputs);
            for dev in &devs[1..] {
                assert_eq!(packed.run(dev, &inputs), whole, "{}, {} threads", dev.level().name(), dev.threads());
            }
        }
        for dev in cpus() {
            attention::a_document_is_the_same_bits_alone_and_packed(&dev, dev.level().name(), &[37, 250, 1, 64], None);
        }
    }

    /// Tokens at the borders of documents and blocks, and in the middle; keys and queries that windows hide.
    #[test]
    fn what_is_not_finite_reaches_who_sees_it_alone() {
        let shapes: [(attention::Shape<'_>, &[usize]); 3] = [
            ((&[20, 41], (4, 2, 16), None), &[30, 19, 20]),
            ((&[7, 300], (2, 1, 24), Some(70)), &[240]),
            ((&[130, 3], (1, 1, 8), Some(9)), &[63, 129]),
        ];
        for (dev, (shape, tokens)) in cpus().iter().flat_map(|dev| shapes.map(|case| (dev, case))) {
            for dtype in [DType::F32, DType::Bf16] {
                let name = dev.level().name();
                attention::what_is_not_finite_reaches_who_sees_it_alone(dev, name, dtype, shape, tokens);
            }
        }
    }

    #[test]
    fn decoding_follows_the_formula() {
        for dev in cpus() {
            for (dtype, shape) in
                [(DType::F32, (&[1, 130, 20][..], (6, 2, 16), None)), (DType::Bf16, (&[7, 129], (3, 1, 64), Some(40)))]
            {
                attention::decoding_follows_the_formula(&dev, dev.level().name(), dtype, shape);
                let long = (&shape.0[1..2], shape.1, shape.2);
                attention::infinite_values_are_what_sums_make_of_them(&dev, dev.level().name(), dtype, long);
            }
        }
    }

    #[test]
    fn decoding_a_token_is_the_last_row_of_forward() {
        for dev in cpus() {
            for window in [None, Some(7)] {
                let (name, lens) = (dev.level().name(), [1, 20, 33]);
                attention::decoding_a_token_is_the_last_row_of_forward(
                    &dev,
                    name,
                    DType::F32,
                    lens,
                    (4, 2, 16),
                    window,
                );
            }
        }
    }
}
