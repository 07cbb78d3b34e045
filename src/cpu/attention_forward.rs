//! Attention forward: online softmax over blocks of keys (Dao 2023, arXiv:2307.08691, algorithm 1).
//!
//! ```text
//! pack K (as B of Q Kᵀ) and V (as B of P V) once for each document and key head
//! for each document, query head, block of queries:          a task
//!     for each block of keys it sees:
//!         S = scale · Q Kᵀ;  m' = max(m, rowmax S);  P = exp(S - m');  l = l · exp(m - m') + rowsum P
//!         O = O · exp(m - m') + P V
//!     out = O / l;  lse = m + ln l
//! ```

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::Cpu;
use super::attention_blocks::{Document, HeadRows, Inputs, Pass, add_not_finite, documents, floats, with_memory};
use super::elem::{Elem, View};
use super::kernels::Store;
use super::level::multiversion;
use super::pack::Operand;
use super::threads::SharedMut;
use super::vector::{LANES, exp, sum_lanes};
use crate::backend::Heads;

multiversion! {
    /// Turns scores into `exp(score - max')` and gives `(max', sum)`.
    fn exponentials(scores: &mut [f32], max: f32) -> (f32, f32) {
        let larger = |m: f32, x: f32| if x > m || x.is_nan() { x } else { m };
        let mut lanes = [max; LANES];
        let chunks = scores.chunks_exact(LANES);
        let rest = chunks.remainder();
        for x in chunks {
            for l in 0..LANES {
                lanes[l] = larger(lanes[l], x[l]);
            }
        }
        let max = lanes.iter().chain(rest).fold(max, |m, &x| larger(m, x));
        let mut sums = [0.0f32; LANES];
        let mut chunks = scores.chunks_exact_mut(LANES);
        for x in &mut chunks {
            for l in 0..LANES {
                x[l] = exp::<I>(x[l] - max);
                sums[l] += x[l];
            }
        }
        for (x, sum) in chunks.into_remainder().iter_mut().zip(&mut sums) {
            *x = exp::<I>(*x - max);
            *sum += *x;
        }
        (max, sum_lanes(sums))
    }
}

multiversion! {
    fn scale_row(x: &mut [f32], by: f32) {
        for x in x {
            *x *= by;
        }
    }
}

multiversion! {
    fn divide_row[E: Elem](out: &mut [E], x: &[f32], by: f32) {
        for (o, x) in out.iter_mut().zip(x) {
            *o = E::put(x / by);
        }
    }
}

/// A document with the places of its packed keys and values, for every key head.
struct Packed {
    doc: Document,
    /// Where its keys begin among the packed keys of a head, and its values likewise.
    k_at: usize,
    v_at: usize,
}

pub fn forward<E: Elem>(dev: &Cpu, out: &mut [E], lse: &mut [f32], x: Inputs<'_, E>, first: usize) {
    let Inputs { q, k, v, doc_start, heads, mask } = x;
    let pass = Pass::new::<E>(dev.level, heads, mask);
    let Heads { n_query, n_kv, head_dim: d } = heads;
    let (mut k_units, mut v_units) = (0, 0);
    let docs: Vec<Packed> = documents(doc_start)
        .into_iter()
        .map(|doc| {
            let packed = Packed { doc, k_at: k_units, v_at: v_units };
            k_units += pass.b_units(doc.len, d);
            v_units +=
                (0..doc.len).step_by(pass.keys).map(|j| pass.b_units(d, pass.keys.min(doc.len - j))).sum::<usize>();
            packed
        })
        .collect();
    let mut scratch = dev.scratch.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let packed = scratch.attention.elems::<u32>(n_kv * (k_units + v_units));
    let (packed_k, packed_v) = packed.split_at_mut(n_kv * k_units);
    let odd_values = AtomicBool::new(false);
    {
        let (packed_k, packed_v) = (SharedMut::new(packed_k), SharedMut::new(packed_v));
        dev.pool.run(docs.len() * n_kv, &|task| {
            let (p, head) = (&docs[task / n_kv], task % n_kv);
            let len = p.doc.len;
            if p.doc.start + len <= first {
                return;
            }
            // SAFETY: the keys of one document and head belong to one task.
            let dst = unsafe { packed_k.slice(head * k_units + p.k_at, pass.b_units(len, d)) };
            pass.pack_b(dst, HeadRows::new(k, n_kv * d, p.doc.start, head, d).rows(), 0, len, 0, d);
            let values = HeadRows::new(v, n_kv * d, p.doc.start, head, d);
            let mut at = head * v_units + p.v_at;
            for j in (0..len).step_by(pass.keys) {
                let keys = pass.keys.min(len - j);
                let size = pass.b_units(d, keys);
                // SAFETY: as above, for the values.
                let dst = unsafe { packed_v.slice(at, size) };
                if pass.pack_columns(dst, values, j, keys) {
                    odd_values.store(true, Relaxed);
                }
                at += size;
            }
        });
    }
    let (packed_k, packed_v) = (&*packed_k, &*packed_v);
    let odd_values = odd_values.into_inner();
    // Late blocks see the most keys: they go first, so that the threads end together.
    let blocks: Vec<(usize, usize)> = (0..docs.len())
        .flat_map(|i| (0..docs[i].doc.len).step_by(pass.queries).rev().map(move |row| (i, row)))
        .filter(|&(i, row)| docs[i].doc.start + docs[i].doc.len.min(row + pass.queries) > first)
        .collect();
    let (out, lse) = (SharedMut::new(out), SharedMut::new(lse));
    dev.pool.run(blocks.len() * n_query, &|task| {
        let ((i, row), head) = (blocks[task / n_query], task % n_query);
        let kv = head / (n_query / n_kv);
        let p = &docs[i];
        let odd = odd_values.then(|| HeadRows::new(v, n_kv * d, p.doc.start, kv, d));
        let k = &packed_k[kv * k_units + p.k_at..(kv + 1) * k_units];
        let v = &packed_v[kv * v_units + p.v_at..(kv + 1) * v_units];
        query_block(&pass, out, lse, q, k, v, odd, p.doc, head, row);
    });
}

/// Queries `row ..` of one head of a document against its packed keys and values, of which `odd` are not all finite.
#[allow(clippy::too_many_arguments)]
fn query_block<E: Elem>(
    pass: &Pass,
    out: SharedMut<E>,
    lse: SharedMut<f32>,
    q: &[E],
    k: &[u32],
    v: &[u32],
    odd: Option<HeadRows<'_, E>>,
    doc: Document,
    head: usize,
    row: usize,
) {
    let Heads { n_query, head_dim: d, .. } = pass.heads;
    let rows = pass.queries.min(doc.len - row);
    let sizes = [
        pass.a_units(pass.queries, d),
        pass.queries * pass.keys,
        pass.a_units(pass.queries, pass.keys),
        pass.queries * d,
        pass.queries,
        pass.queries,
    ];
    with_memory(sizes, |[packed_q, scores, packed_p, sum, max, total]| {
        let (scores, sum, max, total) = (floats(scores), floats(sum), floats(max), floats(total));
        pass.pack_a(packed_q, HeadRows::new(q, n_query * d, doc.start, head, d).rows(), row, rows, 0, d);
        sum.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        for keys in pass.key_blocks(row..row + rows) {
            let n = keys.len();
            let k = &k[keys.start / pass.micro.nr * pass.b_units(1, d)..];
            pass.multiply(scores, pass.keys, rows, n, packed_q, k, d, pass.scale, Store::Set);
            for i in 0..rows {
                let seen = pass.keys_in(row + i, &keys);
                let scores = &mut scores[i * pass.keys..i * pass.keys + n];
                scores[..seen.start].fill(0.0);
                scores[seen.end..].fill(0.0);
                if seen.is_empty() {
                    continue;
                }
                let (larger, added) = exponentials(pass.level, &mut scores[seen], max[i]);
                // The first block has nothing to scale: -inf - larger gives a factor of 0.
                let shrink = (max[i] - larger).exp();
                if shrink != 1.0 {
                    scale_row(pass.level, &mut sum[i * d..(i + 1) * d], shrink);
                }
                total[i] = total[i] * shrink + added;
                max[i] = larger;
            }
            let p = Operand { data: View::F32(scores), major_stride: pass.keys, k_stride: 1 };
            pass.pack_a(packed_p, p, 0, rows, 0, n);
            // Every block before this one is full.
            let v = &v[keys.start / pass.keys * pass.b_units(d, pass.keys)..];
            // This one may be cut by the last query; its panels then are longer than what is read of them.
            multiply_values(pass, sum, rows, packed_p, v, n, pass.keys.min(doc.len - keys.start));
            let Some(values) = odd else { continue };
            for i in 0..rows {
                for j in pass.keys_in(row + i, &keys) {
                    let (sum, p) = (&mut sum[i * d..(i + 1) * d], scores[i * pass.keys + j]);
                    add_not_finite(pass.level, sum, values.row(keys.start + j), p);
                }
            }
        }
        for i in 0..rows {
            let token = doc.start + row + i;
            // SAFETY: this head of this token belongs to this task.
            let (out, lse) =
                unsafe { (out.slice((token * n_query + head) * d, d), lse.slice(token * n_query + head, 1)) };
            divide_row(pass.level, out, &sum[i * d..(i + 1) * d], total[i]);
            lse[0] = max[i] + total[i].ln();
        }
    });
}

/// `sum += P V` for the first `n` of the `packed` keys that the panels of V hold.
fn multiply_values(pass: &Pass, sum: &mut [f32], rows: usize, p: &[u32], v: &[u32], n: usize, packed: usize) {
    let (d, nr) = (pass.heads.head_dim, pass.micro.nr);
    let panel = pass.b_units(1, packed);
    for (j, v) in (0..d).step_by(nr).zip(v.chunks(panel)) {
        pass.multiply(&mut sum[j..], d, rows, nr.min(d - j), p, v, n, 1.0, Store::Add);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Mask;
    use crate::cpu::testing::{cpus, normal};

    #[test]
    fn rows_from_one_on_are_those_of_the_whole_and_earlier_blocks_are_left_alone() {
        let heads = Heads { n_query: 4, n_kv: 2, head_dim: 8 };
        let starts: Vec<i32> = [0; 70].into_iter().chain([70; 200]).collect();
        let n = starts.len();
        let [q, k, v] = [(1, 32), (2, 16), (3, 16)].map(|(seed, cols)| normal(seed, n * cols));
        for dev in cpus() {
            for window in [None, Some(40)] {
                let x = Inputs { q: &q, k: &k, v: &v, doc_start: &starts, heads, mask: Mask { window } };
                let run = |first| {
                    let (mut out, mut lse) = (vec![7.0f32; n * 32], vec![7.0f32; n * 4]);
                    forward(&dev, &mut out, &mut lse, x, first);
                    (out, lse)
                };
                let (whole, name) = (run(0), dev.level().name());
                for first in [0, 69, 70, 200, 269] {
                    let part = run(first);
                    assert!(part.0[first * 32..] == whole.0[first * 32..], "{name} from {first}");
                    assert!(part.1[first * 4..] == whole.1[first * 4..], "{name} from {first}: lse");
                    // A block has at most 64 queries.
                    let earlier = first.saturating_sub(63) * 32;
                    assert!(part.0[..earlier].iter().all(|&x| x == 7.0), "{name} from {first}: earlier rows");
                }
            }
        }
    }
}
