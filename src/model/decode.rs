//! One new token per sequence against a cache of keys and values.

use super::llama::evaluate;
use super::pass::Pass;
use super::{Acts, ActsOptions, Model, attention, mlp, rope};
use crate::backend::footprint::{ROW_STEP, row_counts};
use crate::backend::{Attention, Backend, Decode, MatMul, Write};
use crate::batch::{Batch, BatchIndex, BatchView, IGNORE, MicroBatch};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Keys and values of up to `sequences` sequences of up to `capacity` tokens, and the memory to extend them.
pub struct Decoder<B: Backend> {
    capacity: usize,
    keys: Vec<Tensor<B>>,   // one a layer, (S*capacity, K*D)
    values: Vec<Tensor<B>>, // one a layer, (S*capacity, K*D)
    lens: Vec<usize>,
    /// For prompts: every layer's keys and values are kept.
    prefill: Acts<B>,
    /// For one token a sequence.
    step: Acts<B>,
    rows: Tensor<B>,   // (capacity, 1) i32, of a prompt
    last: Tensor<B>,   // (S, C)
    logits: Tensor<B>, // (S, V) f32
    /// For [`Decoder::extend`], from its first call on.
    whole: Option<Whole<B>>,
}

/// What attention over all rows of a sequence takes where only some of them are computed: rows of others are never read.
struct Whole<B: Backend> {
    batch: Batch<B>,
    index: BatchIndex,
    q: Tensor<B>,   // (capacity, H*D)
    out: Tensor<B>, // (capacity, H*D)
    lse: Tensor<B>, // (capacity, H) f32
}

impl<B: Backend> Whole<B> {
    fn new(dev: &B, model: &Model<B>, capacity: usize) -> Result<Self> {
        let c = &model.config;
        let act = || dev.alloc(capacity, c.q_dim(), model.dtype);
        let lse = dev.alloc(capacity, c.heads.n_query, DType::F32)?;
        Ok(Self { batch: dev.new_batch(capacity)?, index: BatchIndex::default(), q: act()?, out: act()?, lse })
    }

    /// One document of `n` tokens.
    fn load(&mut self, dev: &B, n: usize) -> Result<()> {
        [&mut self.q, &mut self.out, &mut self.lse].into_iter().for_each(|t| t.set_rows(n));
        dev.load_batch(&mut self.batch, self.index.view(&MicroBatch::of_size(n)))
    }
}

impl<B: Backend> Decoder<B> {
    /// Allocates everything for `sequences` sequences at once, each of up to `capacity` tokens, prompt and new tokens together.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn new(dev: &B, model: &Model<B>, sequences: usize, capacity: usize) -> Result<Self> {
        let c = &model.config;
        let cache = || -> Result<Vec<Tensor<B>>> {
            (0..c.n_layers).map(|_| dev.alloc(sequences * capacity, c.kv_dim(), model.dtype)).collect()
        };
        let mut step = Acts::new(dev, model, sequences, ActsOptions::FORWARD)?;
        // Positions of a step reach the end of the cache, whatever the number of sequences.
        let mut table = dev.alloc(capacity, c.heads.head_dim, DType::F32)?;
        dev.upload(&mut table, &rope::table(c, capacity))?;
        step.table = table;
        Ok(Self {
            capacity,
            keys: cache()?,
            values: cache()?,
            lens: vec![0; sequences],
            prefill: Acts::for_prefill(dev, model, capacity)?,
            step,
            rows: dev.alloc(capacity, 1, DType::I32)?,
            last: dev.alloc(sequences, c.hidden_size, model.dtype)?,
            logits: dev.alloc(sequences, c.vocab_size, DType::F32)?,
            whole: None,
        })
    }

    /// Has the device compile and allocate what prompts of these lengths and the tokens after them will take: [`Backend::prepare`].
    /// Before the first prompt.
    ///
    /// # Errors
    /// If the device has not enough memory, or a kernel does not compile.
    pub fn prepare(&mut self, dev: &B, model: &Model<B>, prompts: impl Iterator<Item = usize>) -> Result<()> {
        let mut lengths: Vec<usize> = prompts.map(|n| n.next_multiple_of(ROW_STEP).min(self.capacity)).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.dedup();
        dev.prepare(&mut || {
            for &n in &lengths {
                self.prefill(dev, model, 0, &vec![0; n])?;
            }
            row_counts(self.lens.len()).try_for_each(|n| {
                self.lens.fill(1);
                let which: Vec<(usize, u32)> = (0..n).map(|s| (s, 0)).collect();
                self.step(dev, model, &which).map(|_| ())
            })
        })?;
        self.lens.fill(0);
        Ok(())
    }

    /// Tokens of sequence `s` in the cache.
    pub fn len(&self, s: usize) -> usize {
        self.lens[s]
    }

    /// Whether no sequence has a token.
    pub fn is_empty(&self) -> bool {
        self.lens.iter().all(|&n| n == 0)
    }

    /// Longest sequence.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Starts sequence `s` anew with a prompt; gives the logits of the token that follows it, (V).
    ///
    /// # Errors
    /// If the device refuses a launch.
    ///
    /// # Panics
    /// If the prompt is empty or longer than the capacity.
    pub fn prefill(&mut self, dev: &B, model: &Model<B>, s: usize, prompt: &[u32]) -> Result<Vec<f32>> {
        let n = prompt.len();
        assert!(n > 0 && n <= self.capacity, "a prompt of {n} tokens; capacity {}", self.capacity);
        let batch = MicroBatch {
            tokens: prompt.iter().map(|&t| t as i32).collect(),
            targets: vec![IGNORE; n],
            doc_start: vec![0; n],
            n_valid: 0,
            samples: Vec::new(),
        };
        self.prefill.load(dev, &batch)?;
        evaluate(dev, model, &mut self.prefill)?;
        let first = (s * self.capacity) as i32;
        let rows: Vec<i32> = (first..first + n as i32).collect();
        self.rows.set_rows(n);
        dev.upload_i32(&mut self.rows, &rows)?;
        for (i, (keys, values)) in self.keys.iter_mut().zip(&mut self.values).enumerate() {
            let (k, v) = self.prefill.keys_values(i);
            dev.scatter_rows(keys, k, &self.rows)?;
            dev.scatter_rows(values, v, &self.rows)?;
        }
        self.lens[s] = n;
        self.rows.set_rows(1);
        dev.upload_i32(&mut self.rows, &[n as i32 - 1])?;
        self.last.set_rows(1);
        dev.gather_rows(&mut self.last, &self.prefill.hidden, &self.rows)?;
        self.head(dev, model, 1)
    }

    /// Has the only sequence hold its first `keep` tokens and then `rest`; gives the logits of what follows, (V). Only the rows of `rest` are
    /// computed, against all keys and values, which are in the cache.
    ///
    /// # Errors
    /// If the device has not enough memory or refuses a launch.
    ///
    /// # Panics
    /// If there are several sequences, fewer than `keep` tokens are held, `rest` is empty, or both are more than the capacity.
    pub fn extend(&mut self, dev: &B, model: &Model<B>, keep: usize, rest: &[u32]) -> Result<Vec<f32>> {
        let (n, all) = (rest.len(), keep + rest.len());
        assert!(self.lens.len() == 1 && keep <= self.lens[0], "{keep} of the tokens of one sequence");
        assert!(n > 0 && all <= self.capacity, "{all} tokens; capacity {}", self.capacity);
        let tokens: Vec<i32> = rest.iter().map(|&t| t as i32).collect();
        let positions: Vec<i32> = (keep as i32..all as i32).collect();
        let (targets, doc_start) = (vec![IGNORE; n], vec![0; n]);
        let (tokens, rows, targets, doc_start) = (&tokens[..], &positions[..], &targets[..], &doc_start[..]);
        let view = BatchView { tokens, targets, positions: rows, doc_start, rows: &[], by_token: &[] };
        self.prefill.load_view(dev, view)?;
        self.rows.set_rows(n);
        dev.upload_i32(&mut self.rows, rows)?;
        if self.whole.is_none() {
            self.whole = Some(Whole::new(dev, model, self.capacity)?);
        }
        let whole = self.whole.as_mut().expect("it was made");
        whole.load(dev, all)?;
        let Acts { table, batch, x, mid, attn, mlp, scratch: s, hidden, rstd, .. } = &mut self.prefill;
        let pass = Pass::new(dev, model, batch, table, None);
        dev.embedding_forward(&mut x[0], &model.params.embed, &batch.tokens)?;
        let (streams, mid, a, m) = (x.len(), &mut mid[0], &mut attn[0], &mut mlp[0]);
        for (i, layer) in model.params.layers.iter().enumerate() {
            let pass = pass.at(i);
            attention::qkv(pass, layer, &x[i % streams], a, s)?;
            let (keys, values) = (&mut self.keys[i], &mut self.values[i]);
            dev.scatter_rows(keys, &a.k, &self.rows)?;
            dev.scatter_rows(values, &a.v, &self.rows)?;
            dev.scatter_rows(&mut whole.q, &a.q, &self.rows)?;
            // The cache of the only sequence begins at row 0.
            [&mut *keys, &mut *values].into_iter().for_each(|t| t.set_rows(all));
            let of = Attention {
                q: &whole.q,
                k: keys,
                v: values,
                batch: &whole.batch,
                heads: pass.c.heads,
                mask: pass.c.mask(),
            };
            let attended = dev.attention_forward_from(&mut whole.out, &mut whole.lse, of, keep);
            [keys, values].into_iter().for_each(|t| t.set_rows(self.capacity));
            attended?;
            dev.gather_rows(&mut a.out, &whole.out, &self.rows)?;
            attention::output(pass, layer, mid, &x[i % streams], &a.out, &mut m.t_o, s)?;
            mlp::gate_up(pass, layer, mid, m, s)?;
            mlp::down(pass, layer, &mut x[(i + 1) % streams], mid, m, s)?;
        }
        let last = &x[model.params.layers.len() % streams];
        dev.rmsnorm_forward(hidden, rstd, pass.norm(last, &model.params.final_norm))?;
        self.lens[0] = all;
        self.rows.set_rows(1);
        dev.upload_i32(&mut self.rows, &[n as i32 - 1])?;
        self.last.set_rows(1);
        dev.gather_rows(&mut self.last, &self.prefill.hidden, &self.rows)?;
        self.head(dev, model, 1)
    }

    /// Appends one token to each of the sequences of `which`; gives the logits of what follows, (which.len(), V) row-major.
    ///
    /// # Errors
    /// If the device refuses a launch.
    ///
    /// # Panics
    /// If a sequence is full or has no prompt.
    pub fn step(&mut self, dev: &B, model: &Model<B>, which: &[(usize, u32)]) -> Result<Vec<f32>> {
        let n = which.len();
        assert!(n > 0 && n <= self.lens.len(), "a step of {n} of {} sequences", self.lens.len());
        for &(s, _) in which {
            let len = self.lens[s];
            assert!(len > 0 && len < self.capacity, "sequence {s} has {len} tokens; capacity {}", self.capacity);
        }
        // The device finds the cache of the j-th row of a step at j * capacity, so a step has a row for every sequence; rows are
        // independent, and those of sequences that are not extended are thrown away.
        let tokens = self.spread(which, |&(_, t)| t as i32, 0);
        let positions = self.spread(which, |&(s, _)| self.lens[s] as i32, 0);
        let doc_start: Vec<i32> = (0..tokens.len() as i32).collect();
        // A sequence that is not extended writes to its own last free row, or over its last token's row when it is full: its
        // result is thrown away, and the row is written again before it is read.
        let spare = |s: usize| (s * self.capacity + self.lens[s].min(self.capacity - 1)) as i32;
        let to: Vec<i32> = (0..self.lens.len()).map(spare).collect();
        let lens: Vec<i32> = self.lens.iter().map(|&l| (l + 1).min(self.capacity) as i32).collect();
        let take: Vec<i32> = which.iter().map(|&(s, _)| s as i32).collect();
        // A step has no targets and nothing to sort: those vectors of a micro-batch bring what it needs instead, all in one copy.
        let view = BatchView {
            tokens: &tokens,
            targets: &lens,
            positions: &positions,
            doc_start: &doc_start,
            rows: &take,
            by_token: &to,
        };
        self.step.load_view(dev, view)?;
        self.run_step(dev, model)?;
        for &(s, _) in which {
            self.lens[s] += 1;
        }
        self.last.set_rows(n);
        dev.gather_rows(&mut self.last, &self.step.hidden, &self.step.batch.rows)?;
        self.head(dev, model, n)
    }

    /// One value per sequence: `f` for those of `which`, `rest` for the others.
    fn spread<T>(&self, which: &[(usize, u32)], f: impl Fn(&(usize, u32)) -> T, rest: T) -> Vec<T>
    where
        T: Clone,
    {
        let mut all = vec![rest; self.lens.len()];
        for w in which {
            all[w.0] = f(w);
        }
        all
    }

    /// The layers of what was loaded: `targets` are the lengths with the new tokens, `by_token` the rows of the cache that these take.
    fn run_step(&mut self, dev: &B, model: &Model<B>) -> Result<()> {
        let Acts { table, batch, x, mid, attn, mlp, scratch: s, hidden, rstd, .. } = &mut self.step;
        let pass = Pass::new(dev, model, batch, table, None);
        dev.embedding_forward(&mut x[0], &model.params.embed, &batch.tokens)?;
        let (mid, a, m) = (&mut mid[0], &mut attn[0], &mut mlp[0]);
        for (i, layer) in model.params.layers.iter().enumerate() {
            let pass = pass.at(i);
            attention::qkv(pass, layer, &x[i % 2], a, s)?;
            dev.scatter_rows(&mut self.keys[i], &a.k, &batch.by_token)?;
            dev.scatter_rows(&mut self.values[i], &a.v, &batch.by_token)?;
            let (k_cache, v_cache, lens) = (&self.keys[i], &self.values[i], &batch.targets);
            let of = Decode { q: &a.q, k_cache, v_cache, lens, heads: pass.c.heads, mask: pass.c.mask() };
            dev.attention_decode(&mut a.out, of)?;
            attention::output(pass, layer, mid, &x[i % 2], &a.out, &mut m.t_o, s)?;
            mlp::gate_up(pass, layer, mid, m, s)?;
            mlp::down(pass, layer, &mut x[(i + 1) % 2], mid, m, s)?;
        }
        let last = &x[model.params.layers.len() % 2];
        dev.rmsnorm_forward(hidden, rstd, pass.norm(last, &model.params.final_norm))
    }

    /// Logits of the `n` rows of `last`.
    fn head(&mut self, dev: &B, model: &Model<B>, n: usize) -> Result<Vec<f32>> {
        self.logits.set_rows(n);
        dev.matmul(&mut self.logits, &self.last, model.head(), MatMul::NT, 1.0, Write::Set)?;
        let mut host = vec![0.0; self.logits.len()];
        dev.download(&mut host, &self.logits)?;
        Ok(host)
    }
}
