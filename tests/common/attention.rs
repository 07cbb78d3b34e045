//! What every device's attention is held to.

use ringtune::backend::{Attention, AttentionGrads, Backend, Decode, Heads, Mask, Rope};
use ringtune::tensor::DType;

use super::batches::documents;
use super::close::{assert_close, assert_same, normal, rounded, stored, tensor, tensor_i32, values};
use super::odd::{ODD, reaches_what_it_should};

/// Documents, heads, mask and element type of a test.
pub struct Case {
    /// First token of the document of each token.
    pub starts: Vec<i32>,
    heads: Heads,
    mask: Mask,
    dtype: DType,
    /// Whether q and k count as rotated, so that their gradients are rotated back.
    rotated: bool,
}

/// Lengths of documents; query heads, key heads, width; window.
pub type Shape<'a> = (&'a [usize], (usize, usize, usize), Option<usize>);

/// What a pass leaves.
pub const NAMES: [&str; 5] = ["out", "lse", "dq", "dk", "dv"];

impl Case {
    pub fn new((lengths, heads, window): Shape<'_>, dtype: DType, rotated: bool) -> Self {
        let mut starts = vec![];
        for &len in lengths {
            starts.extend(vec![starts.len() as i32; len]);
        }
        let (n_query, n_kv, head_dim) = heads;
        Self { starts, heads: Heads { n_query, n_kv, head_dim }, mask: Mask { window }, dtype, rotated }
    }

    fn widths(&self) -> (usize, usize) {
        (self.heads.n_query * self.heads.head_dim, self.heads.n_kv * self.heads.head_dim)
    }

    /// q, k, v and the gradient of the output.
    pub fn inputs(&self, seed: u64) -> [Vec<f32>; 4] {
        let (n, (wide, narrow)) = (self.starts.len(), self.widths());
        [normal(seed, n * wide), normal(seed + 1, n * narrow), normal(seed + 2, n * narrow), normal(seed + 3, n * wide)]
    }

    /// Angles of the positions 0, 1, ... of a document: cosines, then sines.
    fn table(&self) -> Vec<f32> {
        let half = self.heads.head_dim / 2;
        let angle = |p: usize, j: usize| (p * (j + 1)) as f32 * 0.37;
        let row = |p| (0..half).map(move |j| angle(p, j).cos()).chain((0..half).map(move |j| angle(p, j).sin()));
        (0..self.starts.len()).flat_map(row).collect()
    }

    fn positions(&self) -> Vec<i32> {
        (0..).zip(&self.starts).map(|(i, start)| i - start).collect()
    }

    /// Runs both passes; see [`NAMES`].
    pub fn run<B: Backend>(&self, dev: &B, inputs: &[Vec<f32>; 4]) -> [Vec<f32>; 5] {
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
        let table = tensor(dev, n, self.heads.head_dim, DType::F32, &self.table());
        let positions = tensor_i32(dev, &self.positions());
        let rope = self.rotated.then_some(Rope { table: &table, positions: &positions });
        dev.attention_backward(dx, &dout, &out, &lse, x, rope).unwrap();
        [&out, &lse, &dq, &dk, &dv].map(|t| values(dev, t))
    }

    /// The same by the textbook, every intermediate passed through `round` and every step of a sum through `step`.
    pub fn reference(
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
                let scores: Vec<f64> = (first..=i).map(|j| round(dot(&q[row.clone()], &k[at(j)]) * scale)).collect();
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
        if self.rotated {
            let (table, positions) = (self.table(), self.positions());
            for (x, width) in [(&mut dq, wide), (&mut dk, narrow)] {
                for at in (0..n * width).filter(|at| at % d < d / 2) {
                    let angle = positions[at / width] as usize * d + at % d;
                    let (cos, sin) = (f64::from(table[angle]), f64::from(table[angle + d / 2]));
                    let (lo, hi) = (x[at], x[at + d / 2]);
                    x[at] = round(round(lo * cos) + round(hi * sin));
                    x[at + d / 2] = round(round(hi * cos) - round(lo * sin));
                }
            }
        }
        [out, lse, dq, dk, dv]
    }
}

/// One token; documents of 1, 7 and 33; windows; groups of heads.
pub const SHAPES: [Shape<'static>; 5] = [
    (&[1], (1, 1, 8), None),
    (&[1, 7, 33, 1], (4, 2, 16), None),
    (&[60, 3, 121], (3, 1, 40), Some(5)),
    (&[300], (2, 1, 8), None),
    (&[290, 5], (2, 2, 24), Some(100)),
];

/// Both passes of one shape in both types. Queries are multiplied by a factor, by another in bf16.
pub fn follows_the_formula<B: Backend>(dev: &B, name: &str, shape: Shape<'_>, rotated: bool, factors: [f32; 2]) {
    for (dtype, factor) in [DType::F32, DType::Bf16].into_iter().zip(factors) {
        follows_the_formula_in(dtype, dev, name, shape, rotated, factor);
    }
}

/// Both passes of one shape in one type, queries multiplied by a factor.
pub fn follows_the_formula_in<B: Backend>(
    dtype: DType,
    dev: &B,
    name: &str,
    shape: Shape<'_>,
    rotated: bool,
    factor: f32,
) {
    let case = Case::new(shape, dtype, rotated);
    let mut inputs = case.inputs(11);
    inputs[0].iter_mut().for_each(|x| *x *= factor);
    let ours = case.run(dev, &inputs);
    let inputs = inputs.map(|x| stored(dtype, &x));
    let exact = case.reference(&inputs, |x| x, |x| x);
    let plain = case.reference(&inputs, |x| rounded(dtype, x), |x| rounded(DType::F32, x));
    for i in 0..5 {
        let stored_as = if i == 1 { DType::F32 } else { dtype };
        let what = format!("{name} {dtype:?} {shape:?} {}", NAMES[i]);
        assert_close(&what, &ours[i], &exact[i], &plain[i], stored_as);
    }
}

/// A document is the same bits alone and between others, also where these are full of NaN.
pub fn a_document_is_the_same_bits_alone_and_packed<B: Backend>(
    dev: &B,
    name: &str,
    lengths: &[usize; 4],
    window: Option<usize>,
) {
    for dtype in [DType::F32, DType::Bf16] {
        a_document_is_the_same_bits_alone_and_packed_in(dtype, dev, name, lengths, (4, 2, 16), window);
    }
}

/// The same of one type and these heads.
pub fn a_document_is_the_same_bits_alone_and_packed_in<B: Backend>(
    dtype: DType,
    dev: &B,
    name: &str,
    lengths: &[usize; 4],
    heads: (usize, usize, usize),
    window: Option<usize>,
) {
    let packed = Case::new((lengths, heads, window), dtype, true);
    let mut inputs = packed.inputs(5);
    let whole = packed.run(dev, &inputs);
    let (from, to, n) = (lengths[0], lengths[0] + lengths[1], packed.starts.len());
    let alone = Case::new((&lengths[1..2], heads, window), dtype, true);
    let cut = |x: &[f32]| x[from * (x.len() / n)..to * (x.len() / n)].to_vec();
    let single = alone.run(dev, &inputs.each_ref().map(|x| cut(x)));
    for i in 0..5 {
        assert_same(&format!("{name} {dtype:?} {}", NAMES[i]), &single[i], &cut(&whole[i]));
    }
    for x in &mut inputs {
        let end = from * (x.len() / n);
        x[..end].fill(f32::NAN);
    }
    let disturbed = packed.run(dev, &inputs);
    for i in 0..5 {
        assert_same(&format!("{name} {dtype:?} {} beside NaN", NAMES[i]), &cut(&disturbed[i]), &cut(&whole[i]));
        assert!(disturbed[i][0].is_nan(), "{name} {} hides NaN", NAMES[i]);
    }
}

/// An element of a token that is NaN or infinite, in q, k, v or the gradient of the output, reaches what the formula says; all else keeps its
/// bits. An infinite one in v makes outputs infinite.
pub fn what_is_not_finite_reaches_who_sees_it_alone<B: Backend>(
    dev: &B,
    name: &str,
    dtype: DType,
    shape: Shape<'_>,
    tokens: &[usize],
) {
    let case = Case::new(shape, dtype, true);
    let inputs = case.inputs(31);
    let named = |x: [Vec<f32>; 5]| NAMES.into_iter().map(String::from).zip(x).collect::<Vec<_>>();
    let exact = |inputs: &[Vec<f32>; 4]| {
        let exact = case.reference(&inputs.each_ref().map(|x| stored(dtype, x)), |x| x, |x| x);
        named(exact.map(|x| x.iter().map(|&x| x as f32).collect()))
    };
    let clean = [named(case.run(dev, &inputs)), exact(&inputs)];
    for (which, input) in ["q", "k", "v", "dout"].into_iter().enumerate() {
        for (&token, odd) in tokens.iter().flat_map(|token| ODD.map(|odd| (token, odd))) {
            let mut inputs = inputs.clone();
            let width = inputs[which].len() / case.starts.len();
            inputs[which][token * width + 3] = odd;
            let what = format!("{name} {dtype:?} {shape:?} {odd} in {input} of {token}");
            let ours = case.run(dev, &inputs);
            if input == "v" {
                let Heads { n_query, n_kv, head_dim } = case.heads;
                let of = |head: usize| ours[0][(token * n_query + head) * head_dim + 3];
                assert!((0..n_query / n_kv).all(|h| of(h) == odd || odd.is_nan()), "{what}");
            }
            reaches_what_it_should(&what, &clean, &[named(ours), exact(&inputs)]);
        }
    }
}

/// A decoded token is the last row of forward.
pub fn decoding_a_token_is_the_last_row_of_forward<B: Backend>(
    dev: &B,
    name: &str,
    dtype: DType,
    lens: [usize; 3],
    heads: (usize, usize, usize),
    window: Option<usize>,
) {
    let capacity = lens.iter().max().unwrap() + 7;
    let case = Case::new((&lens, heads, window), dtype, false);
    let (wide, narrow) = case.widths();
    let [q, k, v, dout] = case.inputs(21);
    let whole = case.run(dev, &[q.clone(), k.clone(), v.clone(), dout]);
    let (mut qs, mut expected) = (vec![], vec![]);
    let mut caches = [vec![f32::NAN; 3 * capacity * narrow], vec![f32::NAN; 3 * capacity * narrow]];
    let mut end = 0;
    for (s, len) in lens.iter().enumerate() {
        for (cache, x) in caches.iter_mut().zip([&k, &v]) {
            cache[s * capacity * narrow..][..len * narrow].copy_from_slice(&x[end * narrow..(end + len) * narrow]);
        }
        end += len;
        qs.extend_from_slice(&q[(end - 1) * wide..end * wide]);
        expected.extend_from_slice(&whole[0][(end - 1) * wide..end * wide]);
    }
    let [kc, vc] = caches.map(|c| tensor(dev, 3 * capacity, narrow, dtype, &c));
    let (qt, mut out) = (tensor(dev, 3, wide, dtype, &qs), dev.alloc(3, wide, dtype).unwrap());
    let lens = tensor_i32(dev, &lens.map(|l| l as i32));
    let (heads, mask) = (case.heads, case.mask);
    let x = Decode { q: &qt, k_cache: &kc, v_cache: &vc, lens: &lens, heads, mask };
    dev.attention_decode(&mut out, x).unwrap();
    // Sums in another order; in bf16 they may fall to the other side of a rounding.
    let unit = if dtype == DType::F32 { 1e-5 } else { 0.0079 };
    for (x, y) in values(dev, &out).iter().zip(&expected) {
        assert!((x - y).abs() <= unit * y.abs().max(if dtype == DType::F32 { 1.0 } else { 1e-3 }), "{name} {x} {y}");
    }
}

/// Caches of some sequences, of which one decodes a token each. What is not seen is NaN.
pub struct Caches {
    heads: Heads,
    mask: Mask,
    dtype: DType,
    lens: Vec<usize>,
    q: Vec<Vec<f32>>,
    /// Keys and values of the tokens of each sequence.
    kv: Vec<[Vec<f32>; 2]>,
}

impl Caches {
    pub fn new((lens, (n_query, n_kv, head_dim), window): Shape<'_>, dtype: DType) -> Self {
        let heads = Heads { n_query, n_kv, head_dim };
        let (wide, narrow) = (n_query * head_dim, n_kv * head_dim);
        let unseen = |len: usize| window.map_or(0, |w| len.saturating_sub(w)) * narrow;
        let cache = |seed, len: usize| {
            let mut x = normal(seed, len * narrow);
            x[..unseen(len)].fill(f32::NAN);
            x
        };
        let numbered = || (0..).zip(lens);
        Self {
            heads,
            mask: Mask { window },
            dtype,
            lens: lens.to_vec(),
            q: numbered().map(|(s, _)| normal(100 + s, wide)).collect(),
            kv: numbered().map(|(s, &len)| [cache(200 + s, len), cache(300 + s, len)]).collect(),
        }
    }

    /// Output of some of the sequences side by side, one list for each, in caches of this capacity.
    pub fn run<B: Backend>(&self, dev: &B, which: &[usize], capacity: usize) -> Vec<Vec<f32>> {
        let Heads { n_query, n_kv, head_dim } = self.heads;
        let (n, wide, narrow) = (which.len(), n_query * head_dim, n_kv * head_dim);
        let cache = |i: usize| {
            let mut all = vec![f32::NAN; n * capacity * narrow];
            for (at, &s) in which.iter().enumerate() {
                all[at * capacity * narrow..][..self.lens[s] * narrow].copy_from_slice(&self.kv[s][i]);
            }
            tensor(dev, n * capacity, narrow, self.dtype, &all)
        };
        let q = tensor(dev, n, wide, self.dtype, &which.iter().flat_map(|&s| self.q[s].clone()).collect::<Vec<_>>());
        let lens = tensor_i32(dev, &which.iter().map(|&s| self.lens[s] as i32).collect::<Vec<_>>());
        let mut out = dev.alloc(n, wide, self.dtype).unwrap();
        let x =
            Decode { q: &q, k_cache: &cache(0), v_cache: &cache(1), lens: &lens, heads: self.heads, mask: self.mask };
        dev.attention_decode(&mut out, x).unwrap();
        values(dev, &out).chunks(wide).map(<[f32]>::to_vec).collect()
    }

    /// Output of a sequence and the sum of the magnitudes that it is made of, in f64.
    fn exact(&self, s: usize) -> Vec<(f64, f64)> {
        let Heads { n_query, n_kv, head_dim: d } = self.heads;
        let [q, k, v] = [&self.q[s], &self.kv[s][0], &self.kv[s][1]].map(|x| stored(self.dtype, x));
        let first = self.mask.window.map_or(0, |w| self.lens[s].saturating_sub(w));
        let mut out = Vec::new();
        for h in 0..n_query {
            let at = |j: usize| (j * n_kv + h / (n_query / n_kv)) * d;
            let dot = |j: usize| (0..d).map(|e| q[h * d + e] * k[at(j) + e]).sum::<f64>() / (d as f64).sqrt();
            let scores: Vec<f64> = (first..self.lens[s]).map(dot).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let p: Vec<f64> = scores.iter().map(|x| (x - top).exp()).collect();
            let total: f64 = p.iter().sum();
            out.extend((0..d).map(|e| {
                let terms = (first..self.lens[s]).zip(&p).map(|(j, p)| p / total * v[at(j) + e]);
                terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()))
            }));
        }
        out
    }
}

/// A decoded token against f64, whatever stands beside it and however long the cache is; keys beyond a sequence's end or window are NaN.
pub fn decoding_follows_the_formula<B: Backend>(dev: &B, name: &str, dtype: DType, shape: Shape<'_>) {
    let caches = Caches::new(shape, dtype);
    let all: Vec<usize> = (0..caches.lens.len()).collect();
    let longest = *caches.lens.iter().max().unwrap();
    let found = caches.run(dev, &all, longest);
    for &s in &all {
        let what = format!("{name} {dtype:?} {shape:?} sequence {s}");
        for (i, (&x, (y, size))) in found[s].iter().zip(caches.exact(s)).enumerate() {
            // Half a unit in the last place of the result; f32 sums of exponentials.
            let allowed = if dtype == DType::Bf16 { y.abs() / 255.0 } else { 0.0 } + 4e-5 * size;
            assert!((f64::from(x) - y).abs() <= allowed, "{what}: element {i}: {x}, expected {y}");
        }
        assert_same(&format!("{what} alone"), &caches.run(dev, &[s], longest + 150)[0], &found[s]);
    }
}

/// Infinite values that are seen give infinity, both signs NaN, as IEEE's sums do; those that are not seen nothing.
pub fn infinite_values_are_what_sums_make_of_them<B: Backend>(dev: &B, name: &str, dtype: DType, shape: Shape<'_>) {
    let mut caches = Caches::new(shape, dtype);
    let (len, row) = (caches.lens[0], caches.heads.n_kv * caches.heads.head_dim);
    let clean = caches.run(dev, &[0], len).remove(0);
    let values = &mut caches.kv[0][1];
    // Columns of the first head: one sign, the other, both, and a value that the window hides or else NaN.
    values[(len - 1) * row] = f32::INFINITY;
    values[(len - 2) * row + 1] = f32::NEG_INFINITY;
    values[(len - 1) * row + 2] = f32::INFINITY;
    values[(len - 3) * row + 2] = f32::NEG_INFINITY;
    values[3] = f32::NAN;
    // All of them: the largest probability is 1, and what it leaves of one is 0.
    (0..len).for_each(|j| values[j * row + 4] = f32::INFINITY);
    let hidden = caches.mask.window.is_some_and(|w| w < len);
    let found = caches.run(dev, &[0], len).remove(0);
    let what = format!("{name} {dtype:?} {shape:?}");
    let heads = caches.heads.n_query / caches.heads.n_kv;
    for (i, (&x, &clean)) in found.iter().zip(&clean).enumerate() {
        let (head, column) = (i / caches.heads.head_dim, i % caches.heads.head_dim);
        match column {
            0 | 4 if head < heads => assert_eq!(x, f32::INFINITY, "{what}: {i}"),
            1 if head < heads => assert_eq!(x, f32::NEG_INFINITY, "{what}: {i}"),
            2 if head < heads => assert!(x.is_nan(), "{what}: {i}: {x}"),
            3 if head < heads && !hidden => assert!(x.is_nan(), "{what}: {i}: {x}"),
            _ => assert_eq!(x, clean, "{what}: {i}"),
        }
    }
}
