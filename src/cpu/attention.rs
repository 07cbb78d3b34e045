//! Causal attention inside documents, forward, backward and one-token decoding.

use super::Cpu;
use super::buffer::{elems, elems_mut, i32s};
use super::elementwise::same_type;
use super::level::multiversion;
use super::threads::{SharedMut, chunked};
use super::vector::{Elem, dot, exp};
use crate::backend::{Heads, Mask};
use crate::tensor::{DType, Tensor};
use half::bf16;

/// First key that token `i` of a document from `start` sees.
fn first_key(i: usize, start: usize, mask: Mask) -> usize {
    mask.window.map_or(start, |w| start.max((i + 1).saturating_sub(w)))
}

fn check(what: &str, n: usize, heads: Heads, q: &Tensor<Cpu>, k: &Tensor<Cpu>, v: &Tensor<Cpu>) {
    let Heads {
        n_query,
        n_kv,
        head_dim,
    } = heads;
    assert!(
        n_kv > 0 && n_query % n_kv == 0,
        "{what}: {n_query} query heads share {n_kv} key heads"
    );
    assert_eq!(q.shape(), (n, n_query * head_dim), "{what}: shape of q");
    assert_eq!(k.cols(), n_kv * head_dim, "{what}: width of k");
    assert_eq!(v.shape(), k.shape(), "{what}: shapes of k and v");
}

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

#[allow(clippy::too_many_arguments)]
pub fn forward(
    dev: &Cpu,
    out: &mut Tensor<Cpu>,
    lse: &mut Tensor<Cpu>,
    q: &Tensor<Cpu>,
    k: &Tensor<Cpu>,
    v: &Tensor<Cpu>,
    doc_start: &Tensor<Cpu>,
    heads: Heads,
    mask: Mask,
) {
    let n = q.rows();
    check("attention", n, heads, q, k, v);
    assert_eq!(out.shape(), q.shape(), "attention: shapes of out and q");
    assert_eq!(k.rows(), n, "attention: rows of k");
    assert_eq!(lse.shape(), (n, heads.n_query), "attention: shape of lse");
    assert_eq!(doc_start.shape(), (n, 1), "attention: shape of doc_start");
    same_type!("attention", out, q, k, v; forward_typed(dev, out, lse, q, k, v, i32s(doc_start), heads, mask));
}

#[allow(clippy::too_many_arguments)]
fn forward_typed<E: Elem>(
    dev: &Cpu,
    out: &mut Tensor<Cpu>,
    lse: &mut Tensor<Cpu>,
    q: &Tensor<Cpu>,
    k: &Tensor<Cpu>,
    v: &Tensor<Cpu>,
    doc_start: &[i32],
    heads: Heads,
    mask: Mask,
) {
    let Heads {
        n_query,
        n_kv,
        head_dim: d,
    } = heads;
    let (group, stride) = (n_query / n_kv, n_kv * d);
    let scale = 1.0 / (d as f32).sqrt();
    let (q, k, v) = (elems::<E>(q), elems::<E>(k), elems::<E>(v));
    let parts = (
        chunked(elems_mut::<E>(out), n_query * d),
        chunked(elems_mut::<f32>(lse), n_query),
    );
    dev.pool.split(parts, |i, (out, lse)| {
        let first = first_key(i, doc_start[i] as usize, mask);
        for h in 0..n_query {
            let at = h / group * d;
            let q = &q[(i * n_query + h) * d..][..d];
            lse[h] = attend(
                dev.level,
                &mut out[h * d..][..d],
                q,
                &k[at..],
                &v[at..],
                stride,
                first,
                i,
                scale,
            );
        }
    });
}

multiversion! {
    /// Gradients of one query of one head: `dq` set, rows of `dk`, `dv` (f32, `stride` apart) added to.
    fn attend_backward[E: Elem](
        dq: &mut [f32], dk: &mut [f32], dv: &mut [f32], dout: &[E], out: &[E], q: &[E], k: &[E], v: &[E],
        lse: f32, stride: usize, first: usize, last: usize, scale: f32,
    ) {
        let d = q.len();
        let delta = dot::<I, E, E>(dout, out);
        for j in first..=last {
            let row = j * stride..j * stride + d;
            let p = exp::<I>(dot::<I, E, E>(q, &k[row.clone()]) * scale - lse);
            let ds = p * (dot::<I, E, E>(dout, &v[row.clone()]) - delta) * scale;
            for (dq, k) in dq.iter_mut().zip(&k[row.clone()]) {
                *dq = I::fma(ds, k.get(), *dq);
            }
            for (dk, q) in dk[row.clone()].iter_mut().zip(q) {
                *dk = I::fma(ds, q.get(), *dk);
            }
            for (dv, dout) in dv[row].iter_mut().zip(dout) {
                *dv = I::fma(p, dout.get(), *dv);
            }
        }
    }
}

#[allow(clippy::too_many_arguments)]
pub fn backward(
    dev: &Cpu,
    dq: &mut Tensor<Cpu>,
    dk: &mut Tensor<Cpu>,
    dv: &mut Tensor<Cpu>,
    dout: &Tensor<Cpu>,
    out: &Tensor<Cpu>,
    lse: &Tensor<Cpu>,
    q: &Tensor<Cpu>,
    k: &Tensor<Cpu>,
    v: &Tensor<Cpu>,
    doc_start: &Tensor<Cpu>,
    heads: Heads,
    mask: Mask,
) {
    let n = q.rows();
    check("attention_backward", n, heads, q, k, v);
    for (name, t) in [("dq", &*dq), ("dout", dout), ("out", out)] {
        assert_eq!(t.shape(), q.shape(), "attention_backward: shape of {name}");
    }
    for (name, t) in [("dk", &*dk), ("dv", &*dv)] {
        assert_eq!(t.shape(), k.shape(), "attention_backward: shape of {name}");
    }
    assert_eq!(k.rows(), n, "attention_backward: rows of k");
    assert_eq!(lse.shape(), (n, heads.n_query), "attention_backward: shape of lse");
    assert_eq!(doc_start.shape(), (n, 1), "attention_backward: shape of doc_start");
    same_type!("attention_backward", dq, dk, dv, dout, out, q, k, v;
        backward_typed(dev, dq, dk, dv, dout, out, lse, q, k, v, i32s(doc_start), heads, mask));
}

#[allow(clippy::too_many_arguments)]
fn backward_typed<E: Elem>(
    dev: &Cpu,
    dq: &mut Tensor<Cpu>,
    dk: &mut Tensor<Cpu>,
    dv: &mut Tensor<Cpu>,
    dout: &Tensor<Cpu>,
    out: &Tensor<Cpu>,
    lse: &Tensor<Cpu>,
    q: &Tensor<Cpu>,
    k: &Tensor<Cpu>,
    v: &Tensor<Cpu>,
    doc_start: &[i32],
    heads: Heads,
    mask: Mask,
) {
    let n = q.rows();
    let Heads {
        n_query,
        n_kv,
        head_dim: d,
    } = heads;
    let (group, stride) = (n_query / n_kv, n_kv * d);
    let scale = 1.0 / (d as f32).sqrt();
    let (dout, out, q, k, v) = (
        elems::<E>(dout),
        elems::<E>(out),
        elems::<E>(q),
        elems::<E>(k),
        elems::<E>(v),
    );
    let lse: &[f32] = elems(lse);
    let (dq, dk, dv) = (
        SharedMut::new(elems_mut::<E>(dq)),
        SharedMut::new(elems_mut::<E>(dk)),
        SharedMut::new(elems_mut::<E>(dv)),
    );
    dev.pool.run(n_kv, &|kv| {
        let (mut sum_k, mut sum_v) = (vec![0.0f32; n * d], vec![0.0f32; n * d]);
        let column = |x: &[E]| -> Vec<E> { (0..n).flat_map(|j| &x[j * stride + kv * d..][..d]).copied().collect() };
        let (k, v) = (column(k), column(v));
        for i in 0..n {
            let first = first_key(i, doc_start[i] as usize, mask);
            for h in kv * group..(kv + 1) * group {
                let at = (i * n_query + h) * d;
                let row = at..at + d;
                let mut grad = vec![0.0f32; d];
                attend_backward(
                    dev.level,
                    &mut grad,
                    &mut sum_k,
                    &mut sum_v,
                    &dout[row.clone()],
                    &out[row.clone()],
                    &q[row],
                    &k,
                    &v,
                    lse[i * n_query + h],
                    d,
                    first,
                    i,
                    scale,
                );
                // SAFETY: head h of row i belongs to this task alone.
                let dq = unsafe { dq.slice(at, d) };
                dq.iter_mut().zip(&grad).for_each(|(dq, g)| *dq = E::put(*g));
            }
        }
        for j in 0..n {
            // SAFETY: head kv of row j belongs to this task alone.
            let (dk, dv) = unsafe { (dk.slice(j * stride + kv * d, d), dv.slice(j * stride + kv * d, d)) };
            dk.iter_mut().zip(&sum_k[j * d..]).for_each(|(o, x)| *o = E::put(*x));
            dv.iter_mut().zip(&sum_v[j * d..]).for_each(|(o, x)| *o = E::put(*x));
        }
    });
}

#[allow(clippy::too_many_arguments)]
pub fn decode(
    dev: &Cpu,
    out: &mut Tensor<Cpu>,
    q: &Tensor<Cpu>,
    k_cache: &Tensor<Cpu>,
    v_cache: &Tensor<Cpu>,
    lens: &Tensor<Cpu>,
    heads: Heads,
    mask: Mask,
) {
    let n = q.rows();
    check("attention_decode", n, heads, q, k_cache, v_cache);
    assert_eq!(out.shape(), q.shape(), "attention_decode: shapes of out and q");
    assert_eq!(lens.shape(), (n, 1), "attention_decode: shape of lens");
    if n == 0 {
        return;
    }
    assert_eq!(
        k_cache.rows() % n,
        0,
        "attention_decode: {} cache rows for {n} sequences",
        k_cache.rows()
    );
    same_type!("attention_decode", out, q, k_cache, v_cache;
        decode_typed(dev, out, q, k_cache, v_cache, i32s(lens), heads, mask));
}

#[allow(clippy::too_many_arguments)]
fn decode_typed<E: Elem>(
    dev: &Cpu,
    out: &mut Tensor<Cpu>,
    q: &Tensor<Cpu>,
    k: &Tensor<Cpu>,
    v: &Tensor<Cpu>,
    lens: &[i32],
    heads: Heads,
    mask: Mask,
) {
    let Heads {
        n_query,
        n_kv,
        head_dim: d,
    } = heads;
    let (group, stride, capacity) = (n_query / n_kv, n_kv * d, k.rows() / q.rows());
    let scale = 1.0 / (d as f32).sqrt();
    let (q, k, v) = (elems::<E>(q), elems::<E>(k), elems::<E>(v));
    dev.pool.split(chunked(elems_mut::<E>(out), d), |task, out| {
        let (s, h) = (task / n_query, task % n_query);
        let len = usize::try_from(lens[s]).expect("lengths are not negative");
        assert!(
            (1..=capacity).contains(&len),
            "attention_decode: length {len} of sequence {s} outside 1..={capacity}"
        );
        let at = s * capacity * stride + h / group * d;
        let first = first_key(len - 1, 0, mask);
        attend(
            dev.level,
            out,
            &q[task * d..][..d],
            &k[at..],
            &v[at..],
            stride,
            first,
            len - 1,
            scale,
        );
    });
}
