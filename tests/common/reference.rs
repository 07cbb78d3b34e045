//! The `Reference` backend: every operation in f64 with plain loops, read off the formulas. What the others are tested against.

#[path = "reference/adamw.rs"]
mod adamw;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;

use ringtune::backend::elementwise::{check_bias, check_bias_grad, check_same};
use ringtune::backend::embedding::{check_backward, check_rows};
use ringtune::backend::{
    AdamWSlot, AdamWStep, Attention, AttentionGrads, Backend, Decode, Dropout, Figures, Footprint, HeadGrads, HeadLoss,
    Heads, HostStats, Mask, MatMul, Norm, Rope, Rotate, Swiglu, Write,
};
use ringtune::batch::{Batch, IGNORE};
use ringtune::error::Result;
use ringtune::tensor::{DType, Device, Tensor};

/// f64 values, or integers.
pub enum Buf {
    F(Vec<f64>),
    I(Vec<i32>),
}

/// The backend; it has no state.
pub struct Reference;

thread_local! {
    /// Keys of the dropout masks that this thread drew.
    pub static MASKS: RefCell<BTreeSet<u64>> = const { RefCell::new(BTreeSet::new()) };
}

type T = Tensor<Reference>;

/// Values of a tensor.
pub fn f(t: &T) -> &[f64] {
    match &t.buf {
        Buf::F(v) => &v[..t.len()],
        Buf::I(_) => panic!("expected values, found integers"),
    }
}

/// Values of a tensor, to write to.
pub fn f_mut(t: &mut T) -> &mut [f64] {
    let n = t.len();
    match &mut t.buf {
        Buf::F(v) => &mut v[..n],
        Buf::I(_) => panic!("expected values, found integers"),
    }
}

fn ints(t: &T) -> &[i32] {
    match &t.buf {
        Buf::I(v) => &v[..t.len()],
        Buf::F(_) => panic!("expected integers, found values"),
    }
}

fn put(dst: &mut f64, x: f64, write: Write) {
    *dst = match write {
        Write::Set => x,
        Write::Add => *dst + x,
    };
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Positions of the keys that query `i` sees.
fn visible(i: usize, start: usize, mask: Mask) -> std::ops::RangeInclusive<usize> {
    let window = mask.window.map_or(0, |w| (i + 1).saturating_sub(w));
    start.max(window)..=i
}

/// Softmax weights of query row `q` over `keys`, and the log of their sum.
fn softmax_row(q: &[f64], keys: &[&[f64]]) -> (Vec<f64>, f64) {
    let scale = 1.0 / (q.len() as f64).sqrt();
    let scores: Vec<f64> = keys.iter().map(|k| scale * q.iter().zip(*k).map(|(a, b)| a * b).sum::<f64>()).collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
    let lse = top + sum.ln();
    (scores.iter().map(|s| (s - lse).exp()).collect(), lse)
}

/// Head `h` of row `i` of a matrix of heads of width `d`.
fn head(x: &[f64], cols: usize, i: usize, h: usize, d: usize) -> &[f64] {
    &x[i * cols + h * d..][..d]
}

impl Device for Reference {
    type Buf = Buf;
    type Plan = ();

    fn describe(&self) -> String {
        "f64 reference".to_string()
    }

    fn alloc(&self, rows: usize, cols: usize, dtype: DType) -> Result<T> {
        let buf = match dtype {
            DType::I32 => Buf::I(vec![0; rows * cols]),
            _ => Buf::F(vec![0.0; rows * cols]),
        };
        Ok(Tensor::from_buf(buf, rows, cols, dtype))
    }

    fn upload(&self, dst: &mut T, src: &[f32]) -> Result<()> {
        f_mut(dst).iter_mut().zip(src).for_each(|(d, &s)| *d = f64::from(s));
        Ok(())
    }

    fn upload_i32(&self, dst: &mut T, src: &[i32]) -> Result<()> {
        let n = dst.len();
        assert_eq!(n, src.len());
        match &mut dst.buf {
            Buf::I(v) => v[..n].copy_from_slice(src),
            Buf::F(_) => panic!("expected integers, found values"),
        }
        Ok(())
    }

    fn download(&self, dst: &mut [f32], src: &T) -> Result<()> {
        dst.iter_mut().zip(f(src)).for_each(|(d, &s)| *d = s as f32);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn fill_zero(&self, dst: &mut T) -> Result<()> {
        f_mut(dst).fill(0.0);
        Ok(())
    }

    fn copy(&self, dst: &mut T, src: &T) -> Result<()> {
        f_mut(dst).copy_from_slice(f(src));
        Ok(())
    }
}

impl Backend for Reference {
    type Stats = HostStats;

    fn footprint(_classes: usize) -> Footprint {
        Footprint {
            logits_rows: 1,
            logits_gradient: false,
            batch_words: 6,
            block: 1,
            fused_multiple: None,
            packed: None,
        }
    }

    fn matmul(&self, c: &mut T, a: &T, b: &T, op: MatMul, alpha: f32, write: Write) -> Result<()> {
        let (m, n, k) = op.check(c, a, b);
        let (ac, bc) = (a.cols(), b.cols());
        let (a, b) = (f(a), f(b));
        for i in 0..m {
            for j in 0..n {
                let term = |l: usize| match op {
                    MatMul::NT => a[i * ac + l] * b[j * bc + l],
                    MatMul::NN => a[i * ac + l] * b[l * bc + j],
                    MatMul::TN => a[l * ac + i] * b[l * bc + j],
                };
                put(&mut f_mut(c)[i * n + j], f64::from(alpha) * (0..k).map(term).sum::<f64>(), write);
            }
        }
        Ok(())
    }

    fn rmsnorm_forward(&self, out: &mut T, rstd: &mut T, norm: Norm<'_, Self>) -> Result<()> {
        let d = norm.check("rmsnorm", &[("out", out)], rstd, None);
        let Norm { x, w, eps } = norm;
        for (g, x) in f(x).chunks(d).enumerate() {
            let mean = x.iter().map(|v| v * v).sum::<f64>() / d as f64;
            let r = 1.0 / (mean + f64::from(eps)).sqrt();
            f_mut(rstd)[g] = r;
            for (j, xj) in x.iter().enumerate() {
                f_mut(out)[g * d + j] = xj * r * f(w)[j];
            }
        }
        Ok(())
    }

    fn rmsnorm_backward(
        &self,
        dx: &mut T,
        mut dw: Option<&mut T>,
        dout: &T,
        rstd: &T,
        norm: Norm<'_, Self>,
        write: Write,
    ) -> Result<()> {
        let d = norm.check("rmsnorm_backward", &[("dx", dx), ("dout", dout)], rstd, dw.as_deref());
        let Norm { x, w, .. } = norm;
        for (g, (x, dy)) in f(x).chunks(d).zip(f(dout).chunks(d)).enumerate() {
            let r = f(rstd)[g];
            let dot: f64 = (0..d).map(|j| dy[j] * f(w)[j] * x[j]).sum();
            for j in 0..d {
                let v = r * dy[j] * f(w)[j] - x[j] * r * r * r * dot / d as f64;
                put(&mut f_mut(dx)[g * d + j], v, write);
                if let Some(dw) = dw.as_deref_mut() {
                    f_mut(dw)[j] += dy[j] * x[j] * r;
                }
            }
        }
        Ok(())
    }

    fn add(&self, dst: &mut T, src: &T) -> Result<()> {
        check_same("add", dst, src);
        f_mut(dst).iter_mut().zip(f(src)).for_each(|(d, s)| *d += s);
        Ok(())
    }

    fn add_bias(&self, dst: &mut T, b: &T) -> Result<()> {
        check_bias("add_bias", b, dst);
        let cols = dst.cols();
        for row in f_mut(dst).chunks_mut(cols) {
            row.iter_mut().zip(f(b)).for_each(|(d, s)| *d += s);
        }
        Ok(())
    }

    fn bias_backward(&self, db: &mut T, dy: &T) -> Result<()> {
        check_bias_grad("bias_backward", db, dy);
        for row in f(dy).chunks(dy.cols()) {
            f_mut(db).iter_mut().zip(row).for_each(|(d, s)| *d += s);
        }
        Ok(())
    }

    fn gather_rows(&self, dst: &mut T, src: &T, rows: &T) -> Result<()> {
        check_rows("gather_rows", dst, src, rows);
        let cols = src.cols();
        for (d, &r) in f_mut(dst).chunks_mut(cols).zip(ints(rows)) {
            d.copy_from_slice(&f(src)[r as usize * cols..][..cols]);
        }
        Ok(())
    }

    fn scatter_rows(&self, dst: &mut T, src: &T, rows: &T) -> Result<()> {
        check_rows("scatter_rows", src, dst, rows);
        let cols = src.cols();
        for (s, &r) in f(src).chunks(cols).zip(ints(rows)) {
            f_mut(dst)[r as usize * cols..][..cols].copy_from_slice(s);
        }
        Ok(())
    }

    fn embedding_backward(&self, dw: &mut T, dout: &T, batch: &Batch<Self>, first_row: usize) -> Result<()> {
        check_backward("embedding_backward", dw, dout, batch);
        let (rows, cols) = dw.shape();
        for (d, &t) in f(dout).chunks(cols).zip(ints(&batch.tokens)) {
            let Some(r) = (t as usize).checked_sub(first_row).filter(|&r| r < rows) else {
                continue;
            };
            f_mut(dw)[r * cols..][..cols].iter_mut().zip(d).for_each(|(w, x)| *w += x);
        }
        Ok(())
    }

    fn rope(&self, x: &mut T, by: Rope<'_, Self>, direction: Rotate) -> Result<()> {
        let (cols, d) = (x.cols(), by.check("rope", x));
        let Rope { table, positions } = by;
        let sign = if direction == Rotate::Forward { 1.0 } else { -1.0 };
        for (row, &p) in f_mut(x).chunks_mut(cols).zip(ints(positions)) {
            let angles = &f(table)[p as usize * d..][..d];
            for h in row.chunks_mut(d) {
                for j in 0..d / 2 {
                    let (cos, sin) = (angles[j], sign * angles[d / 2 + j]);
                    (h[j], h[j + d / 2]) = (h[j] * cos - h[j + d / 2] * sin, h[j + d / 2] * cos + h[j] * sin);
                }
            }
        }
        Ok(())
    }

    fn attention_forward(&self, out: &mut T, lse: &mut T, x: Attention<'_, Self>) -> Result<()> {
        x.check("attention", &[("out", out)], lse);
        let Attention { q, k, v, batch, heads, mask } = x;
        let Heads { n_query, n_kv, head_dim: d } = heads;
        let (qc, kc) = (q.cols(), k.cols());
        for i in 0..q.rows() {
            for h in 0..n_query {
                let g = h / (n_query / n_kv);
                let seen = visible(i, ints(&batch.doc_start)[i] as usize, mask);
                let keys: Vec<&[f64]> = seen.clone().map(|j| head(f(k), kc, j, g, d)).collect();
                let (p, l) = softmax_row(head(f(q), qc, i, h, d), &keys);
                f_mut(lse)[i * n_query + h] = l;
                for e in 0..d {
                    let sum = seen.clone().zip(&p).map(|(j, w)| w * head(f(v), kc, j, g, d)[e]).sum();
                    f_mut(out)[i * qc + h * d + e] = sum;
                }
            }
        }
        Ok(())
    }

    fn attention_backward(
        &self,
        dx: AttentionGrads<'_, Self>,
        dout: &T,
        out: &T,
        lse: &T,
        x: Attention<'_, Self>,
        rope: Option<Rope<'_, Self>>,
    ) -> Result<()> {
        dx.check("attention_backward", dout, out, lse, x);
        let (AttentionGrads { dq, dk, dv }, Attention { q, k, v, batch, heads, mask }) = (dx, x);
        let Heads { n_query, n_kv, head_dim: d } = heads;
        let (qc, kc) = (q.cols(), k.cols());
        let scale = 1.0 / (d as f64).sqrt();
        for t in [&mut *dq, &mut *dk, &mut *dv] {
            f_mut(t).fill(0.0);
        }
        for i in 0..q.rows() {
            for h in 0..n_query {
                let g = h / (n_query / n_kv);
                let seen: Vec<usize> = visible(i, ints(&batch.doc_start)[i] as usize, mask).collect();
                let keys: Vec<&[f64]> = seen.iter().map(|&j| head(f(k), kc, j, g, d)).collect();
                let (p, _) = softmax_row(head(f(q), qc, i, h, d), &keys);
                let dy = head(f(dout), qc, i, h, d);
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
                let dp: Vec<f64> = seen.iter().map(|&j| dot(dy, head(f(v), kc, j, g, d))).collect();
                let mean = dot(&dp, &p);
                for (n, &j) in seen.iter().enumerate() {
                    let ds = scale * p[n] * (dp[n] - mean);
                    for (e, dye) in dy.iter().enumerate().take(d) {
                        f_mut(dq)[i * qc + h * d + e] += ds * head(f(k), kc, j, g, d)[e];
                        f_mut(dk)[j * kc + g * d + e] += ds * head(f(q), qc, i, h, d)[e];
                        f_mut(dv)[j * kc + g * d + e] += p[n] * dye;
                    }
                }
            }
        }
        rope.map_or(Ok(()), |rope| [dq, dk].into_iter().try_for_each(|dx| self.rope(dx, rope, Rotate::Inverse)))
    }

    fn attention_decode(&self, out: &mut T, x: Decode<'_, Self>) -> Result<()> {
        let capacity = x.check("attention_decode", out);
        let Decode { q, k_cache, v_cache, lens, heads, mask } = x;
        let Heads { n_query, n_kv, head_dim: d } = heads;
        let (qc, kc) = (q.cols(), k_cache.cols());
        for s in 0..q.rows() {
            for h in 0..n_query {
                let g = h / (n_query / n_kv);
                let last = ints(lens)[s] as usize - 1;
                let seen: Vec<usize> = visible(last, 0, mask).map(|j| s * capacity + j).collect();
                let keys: Vec<&[f64]> = seen.iter().map(|&j| head(f(k_cache), kc, j, g, d)).collect();
                let (p, _) = softmax_row(head(f(q), qc, s, h, d), &keys);
                for e in 0..d {
                    let sum = seen.iter().zip(&p).map(|(&j, w)| w * head(f(v_cache), kc, j, g, d)[e]).sum();
                    f_mut(out)[s * qc + h * d + e] = sum;
                }
            }
        }
        Ok(())
    }

    fn swiglu_forward(&self, out: &mut T, x: Swiglu<'_, Self>) -> Result<()> {
        x.check("swiglu", &[("out", out)]);
        let Swiglu { gate, up } = x;
        let pairs = f(gate).iter().zip(f(up));
        f_mut(out).iter_mut().zip(pairs).for_each(|(o, (g, u))| *o = g * sigmoid(*g) * u);
        Ok(())
    }

    fn swiglu_backward(&self, gate: &mut T, up: &mut T, dact: &mut T) -> Result<()> {
        Swiglu { gate, up }.check("swiglu_backward", &[("dact", dact)]);
        for i in 0..gate.len() {
            let (g, u, d) = (f(gate)[i], f(up)[i], f(dact)[i]);
            let s = sigmoid(g);
            f_mut(gate)[i] = d * u * s * (1.0 + g * (1.0 - s));
            f_mut(up)[i] = d * g * s;
            f_mut(dact)[i] = g * s * u;
        }
        Ok(())
    }

    fn linear_cross_entropy(
        &self,
        loss: &mut T,
        mut correct: Option<&mut T>,
        grads: HeadGrads<'_, Self>,
        of: HeadLoss<'_, Self>,
    ) -> Result<()> {
        of.check("cross entropy", loss, correct.as_deref(), &grads);
        let HeadLoss { x, w, batch, n_classes, scale } = of;
        let HeadGrads { mut dx, mut dw, first_row } = grads;
        let cols = x.cols();
        for i in 0..x.rows() {
            let target = ints(&batch.targets)[i];
            let row = &f(x)[i * cols..][..cols];
            f_mut(loss)[i] = 0.0;
            if let Some(c) = correct.as_deref_mut() {
                f_mut(c)[i] = 0.0;
            }
            if let Some(dx) = dx.as_deref_mut() {
                f_mut(dx)[i * cols..][..cols].fill(0.0);
            }
            if target == IGNORE {
                continue;
            }
            let class = |c: usize| &f(w)[c * cols..][..cols];
            let dot = |c: usize| class(c).iter().zip(row).map(|(a, b)| a * b).sum::<f64>();
            let logits: Vec<f64> = (0..n_classes).map(dot).collect();
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = top + logits.iter().map(|l| (l - top).exp()).sum::<f64>().ln();
            f_mut(loss)[i] = lse - logits[target as usize];
            if let Some(c) = correct.as_deref_mut() {
                let best = logits.iter().position(|&l| l == top);
                f_mut(c)[i] = f64::from(u8::from(best == Some(target as usize)));
            }
            for (c, l) in logits.iter().enumerate() {
                let d = f64::from(scale) * ((l - lse).exp() - f64::from(u8::from(c == target as usize)));
                if let Some(dx) = dx.as_deref_mut() {
                    f_mut(dx)[i * cols..][..cols].iter_mut().zip(class(c)).for_each(|(o, v)| *o += d * v);
                }
                if let Some(dw) = dw.as_deref_mut() {
                    let r = c.checked_sub(first_row).filter(|&r| r < dw.rows());
                    if let Some(r) = r {
                        f_mut(dw)[r * cols..][..cols].iter_mut().zip(row).for_each(|(o, v)| *o += d * v);
                    }
                }
            }
        }
        Ok(())
    }

    fn dropout(&self, dst: &mut T, src: &T, dropout: Dropout) -> Result<()> {
        dropout.check("dropout", dst, src);
        MASKS.with_borrow_mut(|masks| masks.insert(dropout.key));
        let keep = f64::from(dropout.scale());
        for (e, (d, s)) in f_mut(dst).iter_mut().zip(f(src)).enumerate() {
            *d = if dropout.drops(e as u64) { 0.0 } else { keep * s };
        }
        Ok(())
    }

    fn new_stats(&self) -> Result<HostStats> {
        Ok(HostStats::default())
    }

    fn begin_step(&self, s: &mut HostStats) -> Result<()> {
        *s = HostStats::default();
        Ok(())
    }

    fn add_loss(&self, s: &mut HostStats, loss: &T, correct: Option<&T>) -> Result<()> {
        s.add_loss(self, loss, correct)
    }

    fn grad_norm2(&self, s: &mut HostStats, grads: &[&T]) -> Result<()> {
        s.figures.grad_norm2 += grads.iter().flat_map(|t| f(t)).map(|x| x * x).sum::<f64>();
        Ok(())
    }

    fn squares(&self, parts: &[(&T, Range<usize>)]) -> Result<Vec<f64>> {
        let blocks = parts.iter().flat_map(|(t, range)| f(t)[range.clone()].chunks(16 * 1024));
        Ok(blocks.map(|block| block.iter().map(|x| x * x).sum()).collect())
    }

    fn add_squares(&self, s: &mut HostStats, blocks: &[usize], sums: &[f64]) -> Result<()> {
        s.add_squares(blocks, sums);
        Ok(())
    }

    fn set_clip(&self, s: &mut HostStats, max_norm: Option<f64>) -> Result<()> {
        s.set_clip(max_norm);
        Ok(())
    }

    fn adamw_all(&self, s: &HostStats, slots: &mut [AdamWSlot<'_, Self>], step: AdamWStep) -> Result<()> {
        if s.figures.finite() {
            slots.iter_mut().for_each(|slot| adamw::adamw(slot, step, s.clip));
        }
        Ok(())
    }

    fn figures(&self, s: &HostStats) -> Result<Figures> {
        Ok(s.figures.clone())
    }
}
