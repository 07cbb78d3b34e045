//! What every device's projections are held to: the formulas in f64, and twice the error of composing them from products that round
//! after each term.

use ringtune::backend::{Backend, Dropout, LowRank, ProjectScratch, Projected, Projection, ProjectionGrads, Rope};
use ringtune::tensor::{DType, Tensor};

use super::close::{assert_close_but, assert_same, normal, rounded, tensor, tensor_i32, values};
use super::sums::Sums;

/// Which operation a group goes through.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Group {
    /// One projection, onto a residual or not.
    One { residual: bool },
    /// Three, the first two rotated by heads of so many elements, or none.
    Qkv { dim: Option<usize> },
    /// Two that meet in SwiGLU.
    GateUp,
}

/// Low-rank updates of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Updates {
    /// Their rank.
    pub rank: usize,
    /// Probability of dropping.
    pub dropout: f32,
    /// Which of the group have one.
    pub which: [bool; 3],
    /// By how much the factor of each is larger than that of the one before.
    pub apart: f32,
}

/// A group, its shapes and what belongs to it.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub group: Group,
    pub tokens: usize,
    pub width: usize,
    /// Widths of the results; as many count as the group has.
    pub outs: [usize; 3],
    pub bias: bool,
    pub updates: Option<Updates>,
    pub dtype: DType,
}

/// Which input of a case: its seed, to which the number of the projection is added where each has one.
pub mod inputs {
    pub const X: u64 = 1;
    pub const W: u64 = 10;
    pub const BIAS: u64 = 20;
    pub const A: u64 = 30;
    pub const B: u64 = 40;
    pub const RESIDUAL: u64 = 50;
    pub const DY: u64 = 60;
}

/// A named result and the type it is stored in.
type Named = (String, DType, Vec<f32>);

impl Case {
    fn n(&self) -> usize {
        match self.group {
            Group::One { .. } => 1,
            Group::Qkv { .. } => 3,
            Group::GateUp => 2,
        }
    }

    /// Everything that forward and backward give on a device, from the same inputs on each.
    pub fn run<D: Backend>(&self, dev: &D) -> Vec<Named> {
        self.run_with(dev, |_, _, x| x)
    }

    /// The key of the mask of update `i`.
    pub fn mask_key(i: usize) -> u64 {
        5 + i as u64
    }

    /// The same with every element passed through `input`, which also gets which of [`inputs`] it is of, and its place there.
    pub fn run_with<D: Backend>(&self, dev: &D, input: impl Fn(u64, usize, f32) -> f32) -> Vec<Named> {
        let Case { group, tokens, width, outs, bias, updates, dtype } = *self;
        let n = self.n();
        // Inputs are values of their type, so that every device starts from the same.
        let made = |seed: u64, rows: usize, cols: usize, scale: f32, dtype: DType| {
            let x = normal(seed, rows * cols).into_iter().map(|x| rounded(dtype, f64::from(x * scale)) as f32);
            let x: Vec<f32> = x.enumerate().map(|(i, x)| input(seed, i, x)).collect();
            tensor(dev, rows, cols, dtype, &x)
        };
        let narrow = 1.0 / (width as f32).sqrt();
        let x = made(inputs::X, tokens, width, 1.0, dtype);
        let ws: Vec<_> = (0..n).map(|i| made(inputs::W + i as u64, outs[i], width, narrow, dtype)).collect();
        let biases: Vec<_> = (0..n).map(|i| made(inputs::BIAS + i as u64, 1, outs[i], 1.0, dtype)).collect();
        let rank = updates.map_or(0, |u| u.rank);
        let a: Vec<_> = (0..n).map(|i| made(inputs::A + i as u64, rank, width, narrow, dtype)).collect();
        let b: Vec<_> = (0..n).map(|i| made(inputs::B + i as u64, outs[i], rank, 0.5, dtype)).collect();
        let has = |i: usize| updates.is_some_and(|u| u.which[i]);
        let projection = |i: usize| Projection {
            w: &ws[i],
            bias: bias.then_some(&biases[i]),
            lora: updates.filter(|_| has(i)).map(|u| LowRank {
                a: &a[i],
                b: &b[i],
                scale: 0.75 + u.apart * i as f32,
                dropout: (u.dropout > 0.0).then_some(Dropout { key: Self::mask_key(i), p: u.dropout }),
            }),
        };
        let alloc = |rows, cols, dtype| dev.alloc(rows, cols, dtype).unwrap();
        let widest = width.max(outs.into_iter().max().unwrap_or(0));
        let mut s = ProjectScratch {
            u: std::array::from_fn(|_| alloc(tokens, rank, dtype)),
            x: alloc(tokens, widest, dtype),
            dx: alloc(tokens, widest, dtype),
        };
        let mut ys: Vec<_> = (0..n).map(|i| alloc(tokens, outs[i], dtype)).collect();
        let mut ts: Vec<_> = (0..n).map(|i| has(i).then(|| alloc(tokens, rank, dtype))).collect();
        let mut act = alloc(tokens, outs[0], dtype);
        let residual = made(inputs::RESIDUAL, tokens, outs[0], 1.0, dtype);
        let positions: Vec<i32> = (0..tokens as i32).map(|i| (i * 7) % 50).collect();
        let positions = tensor_i32(dev, &positions);

        let mut to = ys.iter_mut().zip(&mut ts).map(|(y, t)| Projected { y, t: t.as_mut() });
        let mut next = || to.next().unwrap();
        match group {
            Group::One { residual: with } => {
                dev.project(&mut [next()], &x, &[projection(0)], with.then_some(&residual), &mut s).unwrap();
            }
            Group::Qkv { dim } => {
                let d = dim.unwrap_or(2);
                let angle = |p: usize, j: usize| ((p * d + j) as f32) * 0.37;
                let row = |p: usize| {
                    (0..d).map(move |j| if j < d / 2 { angle(p, j).cos() } else { angle(p, j - d / 2).sin() })
                };
                let table = tensor(dev, 50, d, DType::F32, &(0..50).flat_map(row).collect::<Vec<_>>());
                let rope = dim.map(|_| Rope { table: &table, positions: &positions });
                let to = &mut [next(), next(), next()];
                dev.project_qkv(to, &x, &[projection(0), projection(1), projection(2)], rope, &mut s).unwrap();
            }
            Group::GateUp => {
                let to = &mut [next(), next()];
                dev.project_gate_up(&mut act, to, &x, &[projection(0), projection(1)], &mut s).unwrap();
            }
        }
        drop(to);

        let by: Vec<_> = (0..n).map(projection).collect();
        let dys: Vec<_> = (0..n).map(|i| made(inputs::DY + i as u64, tokens, outs[i], 1.0, dtype)).collect();
        let dys: Vec<&Tensor<D>> = dys.iter().collect();
        let mut dx = alloc(tokens, width, dtype);
        // Sums that began before.
        let mut grads: Vec<[Tensor<D>; 4]> = (0..n)
            .map(|i| {
                let shapes = [(outs[i], width), (1, outs[i]), (rank, width), (outs[i], rank)];
                let seed = 70 + 4 * i as u64;
                std::array::from_fn(|j| made(seed + j as u64, shapes[j].0, shapes[j].1, 1.0, DType::F32))
            })
            .collect();
        let mut of: Vec<_> = grads
            .iter_mut()
            .enumerate()
            .map(|(i, [w, db, a, b])| ProjectionGrads {
                w: updates.is_none().then_some(w),
                bias: (updates.is_none() && bias).then_some(db),
                a: has(i).then_some(a),
                b: has(i).then_some(b),
            })
            .collect();
        let ts: Vec<_> = ts.iter().map(Option::as_ref).collect();
        dev.project_dx(Some(&mut dx), &mut of, &dys, &ts, &by, &mut s).unwrap();
        dev.project_dw(&mut of, &dys, &x, &by, &mut s).unwrap();
        drop(of);

        let mut all: Vec<Named> = Vec::new();
        let mut push = |name: String, t: &Tensor<D>| all.push((name, t.dtype(), values(dev, t)));
        ys.iter().enumerate().for_each(|(i, y)| push(format!("y{i}"), y));
        if group == Group::GateUp {
            push("act".into(), &act);
        }
        push("dx".into(), &dx);
        for (i, g) in grads.iter().enumerate() {
            for (name, t) in ["dW", "dbias", "dA", "dB"].iter().zip(g) {
                push(format!("{name}{i}"), t);
            }
        }
        all
    }

    /// This device, the composed operations of another, and f64, by the rule that bounds an error by twice that of plain arithmetic; sums over
    /// tokens may lose what `sums` says besides.
    pub fn follows_the_formula<D: Backend, P: Backend, R: Backend>(
        &self,
        dev: &D,
        plain: &P,
        reference: &R,
        name: &str,
        sums: Sums,
    ) {
        // Of magnitudes alone the gradients of weights are the sums of the magnitudes of their products.
        let magnitudes = self.run_with(reference, |_, _, x| x.abs());
        let (ours, plain, reference) = (self.run(dev), self.run(plain), self.run(reference));
        let all = ours.iter().zip(&plain).zip(reference.iter().zip(&magnitudes));
        for ((ours, plain), ((what, dtype, reference), (.., magnitudes))) in all {
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            let on_tensor_cores =
                self.dtype == DType::Bf16 && ["dW", "dA", "dB"].iter().any(|gradient| what.starts_with(gradient));
            let share = if on_tensor_cores { sums.lose_at_most(self.tokens) } else { 0.0 };
            let lost = |i: usize| share * f64::from(magnitudes[i]);
            let what = format!("{name} {self:?} {what}");
            assert_close_but(&what, &ours.2, &wide(reference), &wide(&plain.2), *dtype, lost);
        }
    }

    /// Rows of the results are the same bits whatever rows stand beside them.
    pub fn rows_stand_alone<D: Backend>(&self, dev: &D, name: &str) {
        let whole = self.run(dev);
        for tokens in [1, self.tokens / 2] {
            for ((what, _, part), (_, _, whole)) in (Case { tokens, ..*self }).run(dev).iter().zip(&whole) {
                // Sums over the rows are of others.
                if !["dW", "dbias", "dA", "dB"].iter().any(|sum| what.starts_with(sum)) {
                    assert_same(&format!("{name} {self:?} {what} of {tokens} rows"), part, &whole[..part.len()]);
                }
            }
        }
    }
}
