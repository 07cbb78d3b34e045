//! Attention backward: scores recomputed block by block from lse (Dao 2023, arXiv:2307.08691, algorithm 2).
//!
//! ```text
//! for each document, query head:                            a task
//!     for each block of keys, each block of queries that sees it:
//!         P = exp(scale · Q Kᵀ - lse);  dV += Pᵀ dO
//!         dS = scale · P ∘ (dO Vᵀ - D);  dK += dSᵀ Q;  dQ += dS K        D = rowsum dO ∘ O
//! dK, dV of a key head = the sum over its query heads, in order
//! ```

use super::Cpu;
use super::attention_blocks::{
    Document, HeadRows, Inputs, Pass, Results, add_not_finite, documents, floats, with_memory,
};
use super::elem::{Elem, View};
use super::elementwise::task_rows;
use super::kernels::Store;
use super::level::multiversion;
use super::pack::Operand;
use super::threads::{SharedMut, chunked};
use super::vector::{dot, exp};
use crate::backend::Heads;

multiversion! {
    /// Scores become probabilities, and `dp` becomes the gradient of the scores.
    fn gradient_row(p: &mut [f32], dp: &mut [f32], lse: f32, delta: f32, scale: f32) {
        for (p, dp) in p.iter_mut().zip(dp) {
            *p = exp::<I>(*p - lse);
            *dp = *p * (*dp - delta) * scale;
        }
    }
}

multiversion! {
    fn row_dot[E: Elem](x: &[E], y: &[E]) -> f32 {
        dot::<I, E, E>(x, y)
    }
}

multiversion! {
    fn round_row[E: Elem](out: &mut [E], x: &[f32]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o = E::put(*x);
        }
    }
}

multiversion! {
    fn add_row(out: &mut [f32], x: &[f32]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o += x;
        }
    }
}

/// `grads` are dq, dk, dv.
pub fn backward<E: Elem>(dev: &Cpu, grads: [&mut [E]; 3], results: Results<'_, E>, x: Inputs<'_, E>) {
    let [dq, dk, dv] = grads;
    let pass = Pass::new::<E>(dev.level, x.heads, x.mask);
    let Heads { n_query, n_kv, head_dim: d } = x.heads;
    let (n, group) = (x.doc_start.len(), n_query / n_kv);
    let mut docs = documents(x.doc_start);
    // Long documents first, so that the threads end together.
    docs.sort_by_key(|doc| std::cmp::Reverse(doc.len));
    let mut scratch = dev.scratch.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // (query head, token, dim) of dK, then of dV.
    let per_head = scratch.attention.elems::<f32>(2 * n_query * n * d);
    let (head_dk, head_dv) = per_head.split_at_mut(n_query * n * d);
    {
        let (head_dk, head_dv, dq) = (SharedMut::new(head_dk), SharedMut::new(head_dv), SharedMut::new(dq));
        dev.pool.run(docs.len() * n_query, &|task| {
            let (doc, head) = (docs[task / n_query], task % n_query);
            let range = (head * n + doc.start) * d;
            // SAFETY: this document of this query head belongs to this task.
            let (dk, dv) = unsafe { (head_dk.slice(range, doc.len * d), head_dv.slice(range, doc.len * d)) };
            dk.fill(0.0);
            dv.fill(0.0);
            head_backward(&pass, dq, [dk, dv], &results, &x, doc, head);
        });
    }
    let (head_dk, head_dv) = (&*head_dk, &*head_dv);
    let width = n_kv * d;
    let rows = task_rows(width * group);
    dev.pool.split((chunked(dk, rows * width), chunked(dv, rows * width)), |task, (dk, dv)| {
        let mut sum = vec![0.0f32; d];
        for (out, grads) in [(dk, head_dk), (dv, head_dv)] {
            for (i, out) in out.chunks_exact_mut(d).enumerate() {
                let (token, kv) = (task * rows + i / n_kv, i % n_kv);
                sum.fill(0.0);
                for head in kv * group..(kv + 1) * group {
                    add_row(dev.level, &mut sum, &grads[(head * n + token) * d..][..d]);
                }
                round_row(dev.level, out, &sum);
            }
        }
    });
}

/// One query head of one document: sets its `dq`, adds to its `dk` and `dv` (len, d).
fn head_backward<E: Elem>(
    pass: &Pass,
    dq: SharedMut<E>,
    [dk, dv]: [&mut [f32]; 2],
    r: &Results<'_, E>,
    x: &Inputs<'_, E>,
    doc: Document,
    head: usize,
) {
    let Heads { n_query, n_kv, head_dim: d } = pass.heads;
    let (len, wide, narrow) = (doc.len, n_query * d, n_kv * d);
    let kv = head / (n_query / n_kv);
    let blocks = len.div_ceil(pass.queries);
    let queries = HeadRows::new(x.q, wide, doc.start, head, d);
    let dout = HeadRows::new(r.dout, wide, doc.start, head, d);
    let (key_rows, values) =
        (HeadRows::new(x.k, narrow, doc.start, kv, d), HeadRows::new(x.v, narrow, doc.start, kv, d));
    // Queries and their gradients as A (rows) and as B (rows along k), by blocks of queries.
    let (qa, qb) = (pass.a_units(pass.queries, d), pass.b_units(d, pass.queries));
    let square = pass.queries * pass.keys;
    let sizes = [
        blocks * qa,
        blocks * qb,
        blocks * qa,
        blocks * qb,
        len * d,
        len,
        pass.b_units(pass.keys, d),
        pass.b_units(pass.keys, d),
        pass.b_units(d, pass.keys),
        square,
        square,
        pass.a_units(pass.keys, pass.queries).max(pass.a_units(pass.queries, pass.keys)),
    ];
    with_memory(sizes, |[q_rows, q_cols, do_rows, do_cols, sum, delta, k_rows, v_rows, k_cols, p, dp, packed]| {
        let (sum, delta, p, dp) = (floats(sum), floats(delta), floats(p), floats(dp));
        sum.fill(0.0);
        let (mut odd_queries, mut odd_dout) = (false, false);
        for (b, row) in (0..len).step_by(pass.queries).enumerate() {
            let rows = pass.queries.min(len - row);
            pass.pack_a(&mut q_rows[b * qa..], queries.rows(), row, rows, 0, d);
            odd_queries |= pass.pack_columns(&mut q_cols[b * qb..], queries, row, rows);
            pass.pack_a(&mut do_rows[b * qa..], dout.rows(), row, rows, 0, d);
            odd_dout |= pass.pack_columns(&mut do_cols[b * qb..], dout, row, rows);
        }
        for (i, delta) in delta.iter_mut().enumerate() {
            let at = (doc.start + i) * wide + head * d;
            *delta = row_dot(pass.level, &r.dout[at..at + d], &r.out[at..at + d]);
        }
        for first in (0..len).step_by(pass.keys) {
            let count = pass.keys.min(len - first);
            pass.pack_b(k_rows, key_rows.rows(), first, count, 0, d);
            pass.pack_b(v_rows, values.rows(), first, count, 0, d);
            let odd_keys = pass.pack_columns(k_cols, key_rows, first, count);
            let k_panel = pass.b_units(1, count);
            for row in (first..len).step_by(pass.queries) {
                let rows = pass.queries.min(len - row);
                let keys = first..(first + count).min(row + rows);
                if pass.keys_of(row).start >= keys.end {
                    // The window has moved past this block for good.
                    break;
                }
                let (b, n) = (row / pass.queries, keys.len());
                pass.multiply(p, pass.keys, rows, n, &q_rows[b * qa..], k_rows, d, pass.scale, Store::Set);
                pass.multiply(dp, pass.keys, rows, n, &do_rows[b * qa..], v_rows, d, 1.0, Store::Set);
                for i in 0..rows {
                    let seen = pass.keys_in(row + i, &keys);
                    let (p, dp) = (&mut p[i * pass.keys..i * pass.keys + n], &mut dp[i * pass.keys..i * pass.keys + n]);
                    for x in [&mut *p, &mut *dp] {
                        x[..seen.start].fill(0.0);
                        x[seen.end..].fill(0.0);
                    }
                    let lse = r.lse[(doc.start + row + i) * n_query + head];
                    gradient_row(pass.level, &mut p[seen.clone()], &mut dp[seen], lse, delta[row + i], pass.scale);
                }
                let dk = &mut dk[first * d..];
                let dv = &mut dv[first * d..];
                let transposed = |x| Operand { data: View::F32(x), major_stride: 1, k_stride: pass.keys };
                pass.pack_a(packed, transposed(p), 0, n, 0, rows);
                pass.multiply(dv, d, n, d, packed, &do_cols[b * qb..], rows, 1.0, Store::Add);
                pass.pack_a(packed, transposed(dp), 0, n, 0, rows);
                pass.multiply(dk, d, n, d, packed, &q_cols[b * qb..], rows, 1.0, Store::Add);
                pass.pack_a(
                    packed,
                    Operand { data: View::F32(dp), major_stride: pass.keys, k_stride: 1 },
                    0,
                    rows,
                    0,
                    n,
                );
                // Keys cut by the last query leave the panels longer than what is read of them.
                for (j, k) in (0..d).step_by(pass.micro.nr).zip(k_cols.chunks(k_panel)) {
                    let cols = pass.micro.nr.min(d - j);
                    pass.multiply(&mut sum[row * d + j..], d, rows, cols, packed, k, n, 1.0, Store::Add);
                }
                if !(odd_queries | odd_dout | odd_keys) {
                    continue;
                }
                for i in row..row + rows {
                    for j in pass.keys_in(i, &keys) {
                        let (of_key, at) = (j * d..(j + 1) * d, (i - row) * pass.keys + j);
                        add_not_finite(pass.level, &mut dv[of_key.clone()], dout.row(i), p[at]);
                        add_not_finite(pass.level, &mut dk[of_key], queries.row(i), dp[at]);
                        add_not_finite(pass.level, &mut sum[i * d..(i + 1) * d], key_rows.row(first + j), dp[at]);
                    }
                }
            }
        }
        for (i, sum) in sum.chunks_exact(d).enumerate() {
            // SAFETY: this head of this token belongs to this task.
            let dq = unsafe { dq.slice((doc.start + i) * wide + head * d, d) };
            round_row(pass.level, dq, sum);
        }
    });
}
