//! Kernels of the CPU backend on the shapes of real models: each result is verified on samples, then timed.
//!
//! `cargo bench --bench kernels [-- [--threads N] FILTER]`. Medians; with one thread in CPU time of the process, which other
//! programs on the machine disturb less, else in wall time; GFLOP/s beside the share of the peak that a loop of multiply-adds in
//! registers reaches on the same threads, GB/s from the bytes an operation has to move at least once.

use ringtune::backend::{
    AdamWSlot, AdamWStep, Attention, AttentionGrads, Backend, HeadGrads, HeadLoss, Heads, Mask, MatMul, Norm, Swiglu,
    Write,
};
use ringtune::batch::{Batch, BatchIndex, MicroBatch};
use ringtune::cpu::Cpu;
use ringtune::error::Result;
use ringtune::rng::Stream;
use ringtune::tensor::{DType, Device, Tensor};
use std::time::{Duration, Instant};

fn main() -> Result<()> {
    let mut filter = String::new();
    let mut threads = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--threads" => threads = args.next().and_then(|n| n.parse().ok()),
            // Cargo passes this to every bench.
            "--bench" => {}
            _ => filter = arg,
        }
    }
    let dev = Cpu::new(threads)?;
    let bench = Bench { peak: peak_gflops(dev.threads()), filter, dev };
    println!(
        "{}; peak in registers: {:.0} GFLOP/s f32, {:.0} GFLOP/s bf16",
        bench.dev.describe(),
        bench.peak.0,
        bench.peak.1
    );
    println!("{:<34} {:>10} {:>8} {:>6} {:>7}", "kernel", "us", "GFLOP/s", "% peak", "GB/s");
    matmuls(&bench)?;
    attention(&bench)?;
    heads(&bench)?;
    streams(&bench)
}

/// A point in time: of the process's CPU clock with one thread, of the wall with several.
struct Clock(Instant, Option<f64>);

impl Clock {
    fn start(threads: usize) -> Self {
        Self(Instant::now(), (threads == 1).then(cpu_seconds).flatten())
    }

    fn seconds(&self) -> f64 {
        match self.1.zip(cpu_seconds()) {
            Some((start, now)) => now - start,
            None => self.0.elapsed().as_secs_f64(),
        }
    }
}

/// CPU time of this process, where the system tells.
fn cpu_seconds() -> Option<f64> {
    #[cfg(unix)]
    {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `t` is a timespec that the call fills in.
        let status = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) };
        (status == 0).then_some(t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9)
    }
    #[cfg(not(unix))]
    None
}

struct Bench {
    dev: Cpu,
    /// f32 and bf16, GFLOP/s of all threads.
    peak: (f64, f64),
    filter: String,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    /// Median time of `f`, printed with what it computed and moved.
    fn time(&self, name: &str, dtype: DType, flop: f64, bytes: f64, mut f: impl FnMut() -> Result<()>) -> Result<()> {
        let begin = Instant::now();
        let mut times = vec![];
        while times.len() < 5 || (begin.elapsed() < Duration::from_millis(300) && times.len() < 1000) {
            let clock = Clock::start(self.dev.threads());
            f()?;
            times.push(clock.seconds());
        }
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        let peak = if dtype == DType::Bf16 { self.peak.1 } else { self.peak.0 };
        let gflops = flop / seconds / 1e9;
        let gbs = bytes / seconds / 1e9;
        println!("{name:<34} {:>10.1} {gflops:>8.0} {:>6.0} {gbs:>7.1}", seconds * 1e6, 100.0 * gflops / peak);
        Ok(())
    }

    fn normal(&self, seed: u64, rows: usize, cols: usize, dtype: DType) -> Result<(Tensor<Cpu>, Vec<f32>)> {
        let s = Stream::new(&[seed]);
        let x: Vec<f32> = (0..(rows * cols) as u64).map(|i| s.f64_at(i) as f32 - 0.5).collect();
        let mut t = self.dev.alloc(rows, cols, dtype)?;
        self.dev.upload(&mut t, &x)?;
        let stored = self.values(&t)?;
        Ok((t, stored))
    }

    fn batch(&self, targets: &[i32], doc_start: &[i32]) -> Result<Batch<Cpu>> {
        let (tokens, targets, doc_start) = (vec![0; targets.len()], targets.to_vec(), doc_start.to_vec());
        let host = MicroBatch { tokens, targets, doc_start, ..Default::default() };
        let mut batch = self.dev.new_batch(host.tokens.len())?;
        self.dev.load_batch(&mut batch, BatchIndex::default().view(&host))?;
        Ok(batch)
    }

    fn values(&self, t: &Tensor<Cpu>) -> Result<Vec<f32>> {
        let mut x = vec![0.0; t.len()];
        self.dev.download(&mut x, t)?;
        Ok(x)
    }
}

/// Stops the bench when a sampled value is further from the expected one than the storage type explains.
fn verify(name: &str, dtype: DType, found: f32, expected: f64, size: f64) {
    let unit = if dtype == DType::Bf16 { 1.0 / 128.0 } else { 1.0 / 65536.0 };
    let error = (f64::from(found) - expected).abs();
    assert!(error <= unit * size, "{name}: found {found}, expected {expected}, allowed error {}", unit * size);
}

fn matmuls(b: &Bench) -> Result<()> {
    use MatMul::{NN, NT, TN};
    // (name, m, n, k): tiny has 2048 tokens in a micro-batch, small 512.
    let shapes = [
        ("2048 cubed", 2048, 2048, 2048, NT),
        ("tiny q forward", 2048, 256, 256, NT),
        ("tiny up forward", 2048, 688, 256, NT),
        ("tiny up dX", 2048, 256, 688, NN),
        ("tiny up dW", 688, 256, 2048, TN),
        ("small q,o forward", 512, 576, 576, NT),
        ("small up forward", 512, 1536, 576, NT),
        ("small up dX", 512, 576, 1536, NN),
        ("small up dW", 1536, 576, 512, TN),
        ("small head forward", 512, 49152, 576, NT),
        ("tiny lora t = x A'", 2048, 16, 256, NT),
        ("tiny lora y += t B'", 2048, 688, 16, NT),
        ("tiny lora dB = dy' t", 688, 16, 2048, TN),
        ("tiny lora dA = u' x", 16, 256, 2048, TN),
        ("small lora t = x A'", 512, 16, 576, NT),
        ("decode small up", 1, 1536, 576, NT),
    ];
    for dtype in [DType::F32, DType::Bf16] {
        for (name, m, n, k, op) in shapes {
            let name = format!("{name} {dtype:?}");
            if !b.wants(&name) {
                continue;
            }
            let ((ar, ac), (br, bc)) = match op {
                NT => ((m, k), (n, k)),
                NN => ((m, k), (k, n)),
                TN => ((k, m), (k, n)),
            };
            let (a, av) = b.normal(1, ar, ac, dtype)?;
            let (w, wv) = b.normal(2, br, bc, dtype)?;
            let out = if op == TN { DType::F32 } else { dtype };
            let mut c = b.dev.alloc(m, n, out)?;
            b.dev.matmul(&mut c, &a, &w, op, 1.0, Write::Set)?;
            let cv = b.values(&c)?;
            for s in 0..64 {
                let (i, j) = (s * 7919 % m, s * 104_729 % n);
                let sum: f64 = (0..k)
                    .map(|l| {
                        let x = if op == TN { av[l * m + i] } else { av[i * k + l] };
                        let y = if op == NT { wv[j * k + l] } else { wv[l * n + j] };
                        f64::from(x) * f64::from(y)
                    })
                    .sum();
                verify(&name, out, cv[i * n + j], sum, (k as f64).sqrt());
            }
            let bytes = (m * k + k * n) * dtype.bytes() + m * n * out.bytes();
            b.time(&name, dtype, 2.0 * (m * n * k) as f64, bytes as f64, || {
                b.dev.matmul(&mut c, &a, &w, op, 1.0, Write::Set)
            })?;
        }
    }
    Ok(())
}

fn attention(b: &Bench) -> Result<()> {
    let cases = [
        ("tiny attention 4x512", 4, 512, Heads { n_query: 8, n_kv: 4, head_dim: 32 }),
        ("small attention 1x512", 1, 512, Heads { n_query: 9, n_kv: 3, head_dim: 64 }),
        ("small attention 8x64", 8, 64, Heads { n_query: 9, n_kv: 3, head_dim: 64 }),
        ("small attention 1x2048", 1, 2048, Heads { n_query: 9, n_kv: 3, head_dim: 64 }),
    ];
    for dtype in [DType::F32, DType::Bf16] {
        for (name, docs, len, heads) in cases {
            let name = format!("{name} {dtype:?}");
            if !b.wants(&name) {
                continue;
            }
            let n = docs * len;
            let Heads { n_query: h, n_kv, head_dim: d } = heads;
            let (q, qv) = b.normal(1, n, h * d, dtype)?;
            let (k, kv) = b.normal(2, n, n_kv * d, dtype)?;
            let (v, vv) = b.normal(3, n, n_kv * d, dtype)?;
            let (dout, _) = b.normal(4, n, h * d, dtype)?;
            let starts: Vec<i32> = (0..n).map(|i| (i / len * len) as i32).collect();
            let batch = b.batch(&vec![0; n], &starts)?;
            let mut out = b.dev.alloc(n, h * d, dtype)?;
            let mut lse = b.dev.alloc(n, h, DType::F32)?;
            let mask = Mask { window: None };
            let x = Attention { q: &q, k: &k, v: &v, batch: &batch, heads, mask };
            b.dev.attention_forward(&mut out, &mut lse, x)?;
            let ov = b.values(&out)?;
            for s in 0..16 {
                let (i, head) = (s * 7919 % n, s % h);
                let at = |j: usize| j * n_kv * d + head / (h / n_kv) * d;
                let score = |j: usize| -> f64 {
                    let dot: f64 =
                        (0..d).map(|l| f64::from(qv[(i * h + head) * d + l]) * f64::from(kv[at(j) + l])).sum();
                    (dot / (d as f64).sqrt()).exp()
                };
                let keys = starts[i] as usize..i + 1;
                let sum: f64 = keys.clone().map(score).sum();
                let expected = keys.map(|j| score(j) / sum * f64::from(vv[at(j)])).sum();
                verify(&name, dtype, ov[(i * h + head) * d], expected, 1.0);
            }
            // Half of the scores are masked: two products forward, five backward.
            let flop = 2.0 * (docs * h * len * len * d) as f64;
            let bytes = (n * (2 * h + 2 * n_kv) * d * dtype.bytes()) as f64;
            b.time(&format!("{name} forward"), dtype, flop, bytes, || b.dev.attention_forward(&mut out, &mut lse, x))?;
            let mut dq = b.dev.alloc(n, h * d, dtype)?;
            let (mut dk, mut dv) = (b.dev.alloc(n, n_kv * d, dtype)?, b.dev.alloc(n, n_kv * d, dtype)?);
            b.time(&format!("{name} backward"), dtype, 2.5 * flop, 2.0 * bytes, || {
                let dx = AttentionGrads { dq: &mut dq, dk: &mut dk, dv: &mut dv };
                b.dev.attention_backward(dx, &dout, &out, &lse, x, None)
            })?;
        }
    }
    Ok(())
}

fn heads(b: &Bench) -> Result<()> {
    for dtype in [DType::F32, DType::Bf16] {
        for (name, n, v, c) in [("tiny head and loss", 2048, 32000, 256), ("small head and loss", 512, 49152, 576)] {
            let name = format!("{name} {dtype:?}");
            if !b.wants(&name) {
                continue;
            }
            let (x, xv) = b.normal(1, n, c, dtype)?;
            let (w, wv) = b.normal(2, v, c, dtype)?;
            let ids: Vec<i32> = (0..n).map(|i| (i * 104_729 % v) as i32).collect();
            let batch = b.batch(&ids, &vec![0; n])?;
            let mut loss = b.dev.alloc(n, 1, DType::F32)?;
            let (mut dx, mut dw) = (b.dev.alloc(n, c, dtype)?, b.dev.alloc(v, c, DType::F32)?);
            let of = HeadLoss { x: &x, w: &w, batch: &batch, n_classes: v, scale: 1.0 / n as f32 };
            let mut run = |loss: &mut Tensor<Cpu>| {
                let grads = HeadGrads { dx: Some(&mut dx), dw: Some(&mut dw), first_row: 0 };
                b.dev.linear_cross_entropy(loss, None, grads, of)
            };
            run(&mut loss)?;
            let lv = b.values(&loss)?;
            for i in [0, n / 3, n - 1] {
                let logit =
                    |j: usize| -> f64 { (0..c).map(|l| f64::from(xv[i * c + l]) * f64::from(wv[j * c + l])).sum() };
                let sum: f64 = (0..v).map(|j| logit(j).exp()).sum();
                verify(&name, dtype, lv[i], sum.ln() - logit(ids[i] as usize), 1.0);
            }
            let bytes = (v * c * (dtype.bytes() + 8)) as f64;
            b.time(&name, dtype, 6.0 * (n * v * c) as f64, bytes, || run(&mut loss))?;
        }
    }
    Ok(())
}

/// Operations that move memory and compute little.
fn streams(b: &Bench) -> Result<()> {
    for dtype in [DType::F32, DType::Bf16] {
        let (n, c, f) = (2048, 256, 688);
        let size = dtype.bytes() as f64;
        let (x, xv) = b.normal(1, n, c, dtype)?;
        let (w, wv) = b.normal(2, 1, c, dtype)?;
        let mut out = b.dev.alloc(n, c, dtype)?;
        let mut rstd = b.dev.alloc(n, 1, DType::F32)?;
        let norm = Norm { x: &x, w: &w, eps: 1e-5 };
        b.dev.rmsnorm_forward(&mut out, &mut rstd, norm)?;
        let ov = b.values(&out)?;
        for row in [0, n - 1] {
            let x = &xv[row * c..(row + 1) * c];
            let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / c as f64;
            verify("rmsnorm", dtype, ov[row * c], f64::from(x[0]) / (mean + 1e-5).sqrt() * f64::from(wv[0]), 1.0);
        }
        let one = (n * c) as f64;
        if b.wants("rmsnorm") {
            b.time(&format!("tiny rmsnorm forward {dtype:?}"), dtype, 4.0 * one, 2.0 * one * size, || {
                b.dev.rmsnorm_forward(&mut out, &mut rstd, norm)
            })?;
            let mut dx = b.dev.alloc(n, c, dtype)?;
            let mut dw = b.dev.alloc(1, c, DType::F32)?;
            b.time(&format!("tiny rmsnorm backward {dtype:?}"), dtype, 9.0 * one, 4.0 * one * size, || {
                b.dev.rmsnorm_backward(&mut dx, Some(&mut dw), &out, &rstd, norm, Write::Add)
            })?;
        }
        if b.wants("swiglu") {
            let (gate, gv) = b.normal(3, n, f, dtype)?;
            let (up, uv) = b.normal(4, n, f, dtype)?;
            let mut act = b.dev.alloc(n, f, dtype)?;
            let x = Swiglu { gate: &gate, up: &up };
            let wide = (n * f) as f64;
            b.time(&format!("tiny swiglu forward {dtype:?}"), dtype, 15.0 * wide, 3.0 * wide * size, || {
                b.dev.swiglu_forward(&mut act, x)
            })?;
            let av = b.values(&act)?;
            let g = f64::from(gv[9]);
            verify("swiglu", dtype, av[9], g / (1.0 + (-g).exp()) * f64::from(uv[9]), 1.0);
            // In place: from the second round on the values are others, the work is the same.
            let (mut gate, mut up) = (gate, up);
            b.time(&format!("tiny swiglu backward {dtype:?}"), dtype, 20.0 * wide, 5.0 * wide * size, || {
                b.dev.swiglu_backward(&mut gate, &mut up, &mut act)
            })?;
        }
        if b.wants("adamw") {
            let (rows, cols) = (12_500, 1000);
            let (g, gv) = b.normal(5, rows, cols, DType::F32)?;
            let (mut p, _) = b.normal(6, rows, cols, dtype)?;
            let (mut master, mv) = b.normal(6, rows, cols, DType::F32)?;
            let (mut m, mut v) = (b.dev.alloc(rows, cols, DType::F32)?, b.dev.alloc(rows, cols, DType::F32)?);
            let step = AdamWStep {
                lr: 1e-3,
                beta1: 0.9,
                beta2: 0.999,
                one_minus_beta1: 0.1,
                one_minus_beta2: 0.001,
                eps: 1e-8,
                weight_decay: 0.1,
                bias_correction1: 0.1,
                bias_correction2: 0.001,
            };
            let master_of = |dtype| dtype == DType::Bf16;
            let mut stats = b.dev.new_stats()?;
            let mut update = || {
                let master = master_of(dtype).then_some(&mut master);
                let (p, m, v) = (&mut p, &mut m, &mut v);
                let slot = AdamWSlot { p, master, m, v, g: &g, first_row: 0, decays: true, lr_scale: 1.0 };
                b.dev.adamw_all(&stats, &mut [slot], step)
            };
            update()?;
            let elements = (rows * cols) as f64;
            b.time(&format!("adamw 12.5M {dtype:?}"), dtype, 15.0 * elements, elements * (24.0 + size), &mut update)?;
            assert!(gv[3] != 0.0 && mv[3].is_finite());
            b.time("norm2 12.5M", DType::F32, 2.0 * elements, 4.0 * elements, || b.dev.grad_norm2(&mut stats, &[&g]))?;
        }
    }
    Ok(())
}

/// GFLOP/s of independent multiply-adds in registers on `threads` threads: f32, and bf16 pairs where they exist.
fn peak_gflops(threads: usize) -> (f64, f64) {
    let measure = |run: fn(usize) -> f32, flop: f64| {
        let rounds = 2_000_000;
        let best = (0..3).map(|_| {
            let clock = Clock::start(threads);
            std::thread::scope(|s| {
                for _ in 0..threads {
                    s.spawn(move || std::hint::black_box(run(rounds)));
                }
            });
            clock.seconds()
        });
        threads as f64 * flop * rounds as f64 / best.fold(f64::INFINITY, f64::min) / 1e9
    };
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has the features.
        let f32_peak = measure(|n| unsafe { registers::f32_loop(n) }, 24.0 * 32.0);
        if is_x86_feature_detected!("avx512bf16") {
            // SAFETY: the processor has the features.
            return (f32_peak, measure(|n| unsafe { registers::bf16_loop(n) }, 24.0 * 64.0));
        }
        return (f32_peak, f32_peak);
    }
    let plain = measure(
        |n| {
            let mut acc = [1.0f32; 64];
            for _ in 0..n {
                acc.iter_mut().for_each(|x| *x = *x * 0.999 + 1e-3);
            }
            acc.iter().sum()
        },
        128.0,
    );
    (plain, plain)
}

#[cfg(target_arch = "x86_64")]
mod registers {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_reduce_add_ps, _mm512_set1_epi32, _mm512_set1_ps,
    };
    use std::hint::black_box;

    #[target_feature(enable = "avx512f")]
    pub fn f32_loop(rounds: usize) -> f32 {
        let (x, y) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(1e-3)));
        let mut acc = [_mm512_set1_ps(1.0); 24];
        for _ in 0..rounds {
            for v in &mut acc {
                *v = _mm512_fmadd_ps(*v, x, y);
            }
        }
        acc.into_iter().map(|v| _mm512_reduce_add_ps(v)).sum()
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16_loop(rounds: usize) -> f32 {
        // SAFETY: only the type of a 64-byte vector changes.
        let x = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(black_box(0x3c00_3c00))) };
        let mut acc = [_mm512_set1_ps(1.0); 24];
        for _ in 0..rounds {
            for v in &mut acc {
                *v = _mm512_dpbf16_ps(*v, x, x);
            }
        }
        acc.into_iter().map(|v| _mm512_reduce_add_ps(v)).sum()
    }
}
