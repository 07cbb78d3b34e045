//! The kernels of `kernels.cu` with inputs and f64 references: what the bench times and a test checks.

use vgpu::{Build, Config, Counters, Memory, Module};

/// Looks at the results in memory.
type Check = Box<dyn Fn(&Memory) -> Result<(), String>>;

/// A kernel ready to launch, and how to check what it made.
pub struct Case {
    /// Name and size.
    pub name: String,
    kernel: &'static str,
    /// Shape.
    pub config: Config,
    module: Module,
    memory: Memory,
    args: Vec<Vec<u8>>,
    inputs: Vec<(u64, Vec<u8>)>,
    check: Check,
}

impl Case {
    /// Puts the inputs back and launches.
    pub fn run(&self) -> Counters {
        self.prepare();
        self.launch()
    }

    /// Puts the inputs back.
    pub fn prepare(&self) {
        for (at, bytes) in &self.inputs {
            self.memory.write(*at, bytes).unwrap();
        }
    }

    /// Launches on what is there.
    pub fn launch(&self) -> Counters {
        let args: Vec<&[u8]> = self.args.iter().map(Vec::as_slice).collect();
        self.module
            .launch(self.kernel, &self.config, &args, &self.memory)
            .unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    /// Compares the results of the last run with the reference.
    pub fn check(&self) -> Result<(), String> {
        (self.check)(&self.memory).map_err(|e| format!("{}: {e}", self.name))
    }
}

struct Setup {
    memory: Memory,
    module: Module,
    args: Vec<Vec<u8>>,
    inputs: Vec<(u64, Vec<u8>)>,
    seed: u64,
}

impl Setup {
    fn new(build: Build) -> Setup {
        let mut memory = Memory::new();
        let module = Module::load_for(build, include_str!("../kernels.ptx"), &mut memory).unwrap();
        Setup { memory, module, args: Vec::new(), inputs: Vec::new(), seed: 1 }
    }

    /// Numbers in [-1, 1).
    fn noise(&mut self, n: usize) -> Vec<f32> {
        let mut one = || {
            self.seed = self.seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.seed >> 40) as f32 / 8_388_608.0 - 1.0
        };
        (0..n).map(|_| one()).collect()
    }

    /// The same, exact in bf16.
    fn coarse(&mut self, n: usize) -> Vec<f32> {
        let cut = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
        self.noise(n).into_iter().map(cut).collect()
    }

    fn input(&mut self, bytes: Vec<u8>) -> u64 {
        let at = self.memory.alloc(bytes.len()).unwrap();
        self.args.push(at.to_le_bytes().to_vec());
        self.inputs.push((at, bytes));
        at
    }

    fn floats(&mut self, v: &[f32]) -> u64 {
        self.input(v.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    fn halves(&mut self, v: &[f32]) -> u64 {
        self.input(v.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect())
    }

    fn ints(&mut self, v: &[i32]) -> u64 {
        self.input(v.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    fn output(&mut self, bytes: usize) -> u64 {
        let at = self.memory.alloc(bytes).unwrap();
        self.args.push(at.to_le_bytes().to_vec());
        at
    }

    fn int(&mut self, x: usize) {
        self.args.push((x as u32).to_le_bytes().to_vec());
    }

    fn float(&mut self, x: f32) {
        self.args.push(x.to_le_bytes().to_vec());
    }

    fn case(
        self,
        name: String,
        kernel: &'static str,
        grid: [usize; 2],
        block: usize,
        check: impl Fn(&Memory) -> Result<(), String> + 'static,
    ) -> Case {
        let config =
            Config { grid: [grid[0] as u32, grid[1] as u32, 1], block: [block as u32, 1, 1], ..Config::default() };
        Case {
            name,
            kernel,
            config,
            module: self.module,
            memory: self.memory,
            args: self.args,
            inputs: self.inputs,
            check: Box::new(check),
        }
    }
}

fn read(m: &Memory, at: u64, n: usize) -> Vec<f64> {
    let mut bytes = vec![0; n * 4];
    m.read(at, &mut bytes).unwrap();
    let word = |c: &[u8]| f64::from(f32::from_le_bytes(c.try_into().unwrap()));
    bytes.chunks(4).map(word).collect()
}

fn read_halves(m: &Memory, at: u64, n: usize) -> Vec<f64> {
    let mut bytes = vec![0; n * 2];
    m.read(at, &mut bytes).unwrap();
    let half = |c: &[u8]| f64::from(f32::from_bits(u32::from(u16::from_le_bytes(c.try_into().unwrap())) << 16));
    bytes.chunks(2).map(half).collect()
}

/// Every value within `absolute + relative * |wanted|`.
fn near(got: &[f64], want: &[f64], absolute: f64, relative: f64) -> Result<(), String> {
    assert_eq!(got.len(), want.len());
    match got.iter().zip(want).position(|(g, w)| g.is_nan() || (g - w).abs() > absolute + relative * w.abs()) {
        Some(i) => Err(format!("value {i} is {}, expected {}", got[i], want[i])),
        None => Ok(()),
    }
}

fn wide(v: &[f32]) -> Vec<f64> {
    v.iter().map(|x| f64::from(*x)).collect()
}

/// `C = A B^T`.
pub fn gemm(build: Build, m: usize, n: usize, k: usize) -> Case {
    let mut s = Setup::new(build);
    let (a, b) = (s.coarse(m * k), s.coarse(n * k));
    s.halves(&a);
    s.halves(&b);
    let c = s.output(m * n * 4);
    [m, n, k].into_iter().for_each(|x| s.int(x));
    let (a, b) = (wide(&a), wide(&b));
    let dot = move |i: usize| -> f64 { (0..k).map(|l| a[i / n * k + l] * b[i % n * k + l]).sum() };
    s.case(format!("gemm {m}x{n}x{k}"), "gemm", [n.div_ceil(128), m.div_ceil(128)], 256, move |memory| {
        // One f32 rounding per product of two bf16 and sum, in the order of the hardware's k.
        let want: Vec<f64> = (0..m * n).map(&dot).collect();
        near(&read(memory, c, m * n), &want, 2e-7 * k as f64, 1e-6)
    })
}

/// Causal attention over documents; `g` query heads share a key head.
pub fn flash(build: Build, t: usize, h: usize, g: usize) -> Case {
    let mut s = Setup::new(build);
    let kv = h / g;
    let (q, k, v) = (s.coarse(t * h * 64), s.coarse(t * kv * 64), s.coarse(t * kv * 64));
    // Documents end at a third and at two thirds, not at multiples of a tile.
    let starts: Vec<i32> = (0..t).map(|i| (i * 3 / t * t).div_ceil(3) as i32).collect();
    s.halves(&q);
    s.halves(&k);
    s.halves(&v);
    s.ints(&starts);
    let out = s.output(t * h * 64 * 4);
    [t, h, g].into_iter().for_each(|x| s.int(x));
    let scale = 0.125 * std::f32::consts::LOG2_E;
    s.float(scale);
    let (q, k, v) = (wide(&q), wide(&k), wide(&v));
    s.case(format!("flash {t} tokens, {h} heads"), "flash", [t.div_ceil(64), h], 128, move |memory| {
        let mut want = vec![0.0; t * h * 64];
        for i in 0..t {
            for head in 0..h {
                let row = &q[(i * h + head) * 64..][..64];
                let at = |x: usize| (x * kv + head / g) * 64;
                let keys = starts[i] as usize..i + 1;
                let p: Vec<f64> = keys
                    .clone()
                    .map(|x| row.iter().zip(&k[at(x)..]).map(|(a, b)| a * b).sum::<f64>() * f64::from(scale))
                    .map(f64::exp2)
                    .collect();
                let sum: f64 = p.iter().sum();
                for (p, x) in p.iter().zip(keys) {
                    for d in 0..64 {
                        want[(i * h + head) * 64 + d] += p / sum * v[at(x) + d];
                    }
                }
            }
        }
        // Probabilities are rounded to bf16 before the second product: half of 2^-8 of values below one.
        near(&read(memory, out, t * h * 64), &want, 4e-3, 0.0)
    })
}

/// Rows to root mean square one, in bf16.
pub fn rmsnorm(build: Build, rows: usize, c: usize, block: usize) -> Case {
    let mut s = Setup::new(build);
    let (x, w) = (s.coarse(rows * c), s.coarse(c));
    s.halves(&x);
    s.halves(&w);
    let y = s.output(rows * c * 2);
    s.int(c);
    s.float(1e-5);
    let (x, w) = (wide(&x), wide(&w));
    s.case(format!("rmsnorm {rows}x{c}"), "rmsnorm", [rows, 1], block, move |memory| {
        let mut want = Vec::new();
        for row in x.chunks(c) {
            let r = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / c as f64 + 1e-5).sqrt();
            want.extend(row.iter().zip(&w).map(|(v, w)| v * r * w));
        }
        near(&read_halves(memory, y, rows * c), &want, 1e-30, 1.01 / 256.0)
    })
}

/// Loss and gradient of logits.
pub fn cross_entropy(build: Build, rows: usize, v: usize) -> Case {
    let mut s = Setup::new(build);
    let logits: Vec<f32> = s.noise(rows * v).into_iter().map(|x| x * 4.0).collect();
    let target: Vec<i32> = (0..rows).map(|i| if i % 7 == 6 { -100 } else { (i * 37 % v) as i32 }).collect();
    let d = s.floats(&logits);
    s.ints(&target);
    let loss = s.output(rows * 4);
    s.int(v);
    s.float(0.5);
    let logits = wide(&logits);
    s.case(format!("cross-entropy {rows}x{v}"), "cross_entropy", [rows, 1], 256, move |memory| {
        let (mut want, mut losses) = (Vec::new(), Vec::new());
        for (row, t) in logits.chunks(v).zip(&target) {
            let sum: f64 = row.iter().map(|x| x.exp()).sum();
            let on = *t >= 0;
            losses.push(if on { sum.ln() - row[*t as usize] } else { 0.0 });
            let one = |i: usize, x: &f64| x.exp() / sum - if i as i32 == *t { 1.0 } else { 0.0 };
            want.extend(row.iter().enumerate().map(|(i, x)| if on { 0.5 * one(i, x) } else { 0.0 }));
        }
        near(&read(memory, loss, rows), &losses, 2e-6, 2e-6)?;
        near(&read(memory, d, rows * v), &want, 1e-8, 1e-5)
    })
}

/// One optimiser step.
pub fn adamw(build: Build, n: usize) -> Case {
    let mut s = Setup::new(build);
    let (p, g, m) = (s.noise(n), s.noise(n), s.noise(n));
    let v: Vec<f32> = s.noise(n).into_iter().map(|x| x * x).collect();
    let at = s.floats(&p);
    s.floats(&g);
    s.floats(&m);
    s.floats(&v);
    s.int(n);
    let [lr, b1, b2, eps, decay, c1, c2] = [1e-3f32, 0.9, 0.95, 1e-8, 0.1, 0.271, 0.142625];
    [lr, b1, b2, eps, decay, c1, c2].into_iter().for_each(|x| s.float(x));
    let [p, g, m, v] = [&p, &g, &m, &v].map(|x| wide(x));
    s.case(format!("adamw {n}"), "adamw", [n.div_ceil(1024), 1], 256, move |memory| {
        let [lr, b1, b2, eps, decay, c1, c2] = [lr, b1, b2, eps, decay, c1, c2].map(f64::from);
        let one = |i: usize| {
            let (a, b) = (b1 * m[i] + (1.0 - b1) * g[i], b2 * v[i] + (1.0 - b2) * g[i] * g[i]);
            p[i] - lr * (a / c1 / ((b / c2).sqrt() + eps) + decay * p[i])
        };
        near(&read(memory, at, n), &(0..n).map(one).collect::<Vec<_>>(), 2e-6, 2e-7)
    })
}

/// Rotation by position.
pub fn rope(build: Build, t: usize, h: usize, d: usize) -> Case {
    let mut s = Setup::new(build);
    let x = s.noise(t * h * d);
    // Some positions are so large that the sine takes its slow path.
    let position: Vec<i32> = (0..t).map(|i| if i % 2 == 0 { i as i32 } else { 3000 * i as i32 }).collect();
    let at = s.floats(&x);
    s.ints(&position);
    s.int(h);
    s.int(d);
    let log2_theta = 10000f32.log2();
    s.float(log2_theta);
    let x = wide(&x);
    s.case(format!("rope {t}x{h}x{d}"), "rope", [t, h], (d / 2).next_multiple_of(32), move |memory| {
        let half = d / 2;
        let mut want = x.clone();
        for (row, out) in want.chunks_mut(d).enumerate() {
            for i in 0..half {
                // The angle itself is the f32 product that the kernel makes.
                let e = -log2_theta * i as f32 / half as f32;
                let angle = f64::from((position[row / h] as f32) * e.exp2());
                let (sin, cos) = angle.sin_cos();
                let (a, b) = (out[i], out[i + half]);
                (out[i], out[i + half]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
        // exp2f rounds to within two units, and the angle moves by as many units of its own size.
        let largest = position.iter().map(|p| f64::from(*p)).fold(1.0, f64::max);
        near(&read(memory, at, t * h * d), &want, 1e-6 + 2.5e-7 * largest, 0.0)
    })
}

/// Rows of a table.
pub fn embedding(build: Build, t: usize, c: usize) -> Case {
    let mut s = Setup::new(build);
    let table = s.coarse(100 * c);
    let token: Vec<i32> = (0..t).map(|i| (i * 61 % 100) as i32).collect();
    s.halves(&table);
    s.ints(&token);
    let out = s.output(t * c * 2);
    s.int(c / 8);
    let table = wide(&table);
    s.case(format!("embedding {t}x{c}"), "embedding", [t, 1], 64, move |memory| {
        let want: Vec<f64> = token.iter().flat_map(|x| table[*x as usize * c..][..c].to_vec()).collect();
        near(&read_halves(memory, out, t * c), &want, 0.0, 0.0)
    })
}

/// Arithmetic and one shared load a turn.
pub fn fma_loop(build: Build, blocks: usize, turns: usize) -> Case {
    let mut s = Setup::new(build);
    let out = s.output(blocks * 256 * 4);
    s.int(turns);
    s.case(format!("fma loop {turns}"), "fma_loop", [blocks, 1], 256, move |memory| {
        let mut want = Vec::new();
        for t in 0..256 {
            let (mut a, mut b, mut c) = (t as f32, 0.5f32, 0.25f32);
            for i in 0..turns {
                a = a.mul_add(b, c);
                b += ((t + i) & 255) as f32 * 0.001;
                c = c.mul_add(0.5, a);
                b = b.mul_add(0.25, a * 0.5);
            }
            want.push(f64::from(a + b + c));
        }
        // Sums that leave the range of f32 stay there; the rest is the same arithmetic.
        let got = read(memory, out, 256);
        let bad = got.iter().zip(&want).position(|(g, w)| g.to_bits() != w.to_bits() && !(g.is_nan() && w.is_nan()));
        bad.map_or(Ok(()), |i| Err(format!("value {i} is {}, expected {}", got[i], want[i])))
    })
}

/// Matrix instructions alone.
pub fn mma_loop(build: Build, turns: usize) -> Case {
    let mut s = Setup::new(build);
    let out = s.output(128);
    s.int(turns);
    s.case(format!("mma alone, {} times", turns * 8), "mma_loop", [1, 1], 32, move |memory| {
        // Sixteen products of 1 and 2^-7 a turn in each of 32 sums.
        near(&read(memory, out, 32), &[turns as f64 * 32.0 * 16.0 / 128.0; 32], 0.0, 1e-6)
    })
}
