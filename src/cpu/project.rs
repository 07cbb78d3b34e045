//! Projections of a group in one go: x is packed once, and what is added to a product (residual, bias) reaches it in registers. Of up to
//! [`FEW_ROWS`] rows, rotation and SwiGLU are made in the same parallel job too; of more they are passes of their own, which go over all threads.
//!
//! Every value that the composed operations store is rounded here as well, so that the bits are the same.

use std::ops::Range;

use super::Cpu;
use super::buffer::{elems, elems_mut, view};
use super::elem::Elem;
use super::elementwise::{rope_row, swiglu_slice};
use super::kept::Weight;
use super::kernels::Micro;
use super::matmul::{FEW_ROWS, Left, Member, Shared, Then, dest, products};
use super::pack::Operand;
use super::threads::SharedMut;
use crate::backend::{self, Backend, ProjectScratch, Projected, Projection, Rope, Rotate, Write};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Products of one `x` with weights (out, in): where they go, as tasks share it, and what is added.
struct Term<'a> {
    to: Shared,
    w: &'a Tensor<Cpu>,
    alpha: f32,
    write: Write,
    onto: Option<&'a Tensor<Cpu>>,
    bias: Option<&'a Tensor<Cpu>>,
    then: Option<Then<'a>>,
}

/// All terms of one x.
fn multiply(dev: &Cpu, x: &Tensor<Cpu>, terms: &[Term<'_>]) {
    let (m, k) = x.shape();
    let a = Operand { data: view(x), major_stride: k, k_stride: 1 };
    // Members of a group have one kind of panels.
    let bf16 = |t: &Term<'_>| x.dtype() == DType::Bf16 || t.w.dtype() == DType::Bf16;
    let mut scratch = dev.scratch.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for group in terms.chunk_by(|a, b| bf16(a) == bf16(b)) {
        let bf16 = bf16(&group[0]);
        let micro = Micro::new(dev.level, bf16);
        let members = group.iter().map(|t| Member {
            c: t.to,
            b: Weight::of(dev, t.w, &micro, true, t.w.rows(), k),
            n: t.w.rows(),
            alpha: t.alpha,
            write: t.write,
            onto: t.onto.map(view),
            bias: t.bias.map(view),
            then: t.then,
        });
        products(dev, &mut scratch, Left { a, m, k, bf16 }, &members.collect::<Vec<_>>());
    }
}

/// A group: the products of x, then the low-rank updates; what is done with the parts of each result comes with its last product.
#[allow(clippy::too_many_arguments)]
fn group(
    dev: &Cpu,
    to: &mut [Projected<'_, Cpu>],
    ys: &[Shared],
    x: &Tensor<Cpu>,
    by: &[Projection<'_, Cpu>],
    residual: Option<&Tensor<Cpu>>,
    then: &[Option<Then<'_>>],
    s: &mut ProjectScratch<Cpu>,
) -> Result<()> {
    let terms = by.iter().zip(ys).zip(then).map(|((by, &to), then)| Term {
        to,
        w: by.w,
        alpha: 1.0,
        write: if residual.is_some() { Write::Add } else { Write::Set },
        onto: residual,
        bias: by.bias,
        then: if by.lora.is_some() { None } else { *then },
    });
    multiply(dev, x, &terms.collect::<Vec<_>>());
    for (i, (to, by)) in to.iter_mut().zip(by).enumerate() {
        if let (Some(lora), Some(t)) = (by.lora, to.t.as_deref_mut()) {
            dev.low_rank_t(t, x, lora, s)?;
            let (alpha, write) = (lora.scale, Write::Add);
            multiply(dev, t, &[Term { to: ys[i], w: lora.b, alpha, write, onto: None, bias: None, then: then[i] }]);
        }
    }
    Ok(())
}

/// Panics unless the shapes agree. The results as tasks share them.
fn check(to: &mut [Projected<'_, Cpu>], x: &Tensor<Cpu>, by: &[Projection<'_, Cpu>]) -> Vec<Shared> {
    assert_eq!(to.len(), by.len(), "project: results");
    let shared = to.iter_mut().zip(by).map(|(Projected { y, t }, by)| {
        by.check("project", y, x.shape(), t.as_deref());
        Shared::new(dest(y))
    });
    shared.collect()
}

/// See [`Backend::project`].
pub fn project(
    dev: &Cpu,
    to: &mut [Projected<'_, Cpu>],
    x: &Tensor<Cpu>,
    by: &[Projection<'_, Cpu>],
    residual: Option<&Tensor<Cpu>>,
    s: &mut ProjectScratch<Cpu>,
) -> Result<()> {
    assert!(residual.is_none() || by.len() == 1, "project: a residual of {} projections", by.len());
    // A residual of another type would be rounded to that of the result first.
    if to.iter().any(|to| residual.is_some_and(|r| r.shape() != to.y.shape() || r.dtype() != to.y.dtype())) {
        return backend::project::project(dev, to, x, by, residual, s);
    }
    let ys = check(to, x, by);
    group(dev, to, &ys, x, by, residual, &vec![None; by.len()], s)
}

/// See [`Backend::project_qkv`].
pub fn project_qkv(
    dev: &Cpu,
    to: &mut [Projected<'_, Cpu>; 3],
    x: &Tensor<Cpu>,
    by: &[Projection<'_, Cpu>; 3],
    rope: Option<Rope<'_, Cpu>>,
    s: &mut ProjectScratch<Cpu>,
) -> Result<()> {
    let Some(rope) = rope else { return project(dev, to, x, by, None, s) };
    if x.rows() > FEW_ROWS {
        project(dev, to, x, by, None, s)?;
        let [q, k, _] = to;
        return [q, k].into_iter().try_for_each(|to| dev.rope(to.y, rope, Rotate::Forward));
    }
    let [q, k, _] = &*to;
    let dim = [q, k].map(|to| rope.check("rope", to.y))[0];
    let (table, positions): (&[f32], _) = (elems(rope.table), elems::<i32>(rope.positions));
    let ys = check(to, x, by);
    let widths: Vec<usize> = by.iter().map(|by| by.w.rows()).collect();
    let turns = [0, 1].map(|i| {
        let (y, width) = (ys[i], widths[i]);
        move |row: usize, columns: Range<usize>| {
            let at = usize::try_from(positions[row]).expect("positions are not negative") * dim;
            let (cos, sin) = table[at..at + dim].split_at(dim / 2);
            let (first, len) = (row * width + columns.start, columns.len());
            // SAFETY: the part lies inside y and belongs to the task that calls this, which has finished it.
            unsafe {
                match y {
                    Shared::F32(y) => rope_row(dev.level, y.slice(first, len), cos, sin, 1.0),
                    Shared::Bf16(y) => rope_row(dev.level, y.slice(first, len), cos, sin, 1.0),
                }
            }
        }
    });
    let then = |i: usize| Some(Then { columns: dim, of: &turns[i] });
    group(dev, to, &ys, x, by, None, &[then(0), then(1), None], s)
}

/// See [`Backend::project_gate_up`].
pub fn project_gate_up(
    dev: &Cpu,
    act: &mut Tensor<Cpu>,
    to: &mut [Projected<'_, Cpu>; 2],
    x: &Tensor<Cpu>,
    by: &[Projection<'_, Cpu>; 2],
    s: &mut ProjectScratch<Cpu>,
) -> Result<()> {
    let [gate, up] = &*to;
    let same = |t: &Tensor<Cpu>| t.shape() == act.shape() && t.dtype() == act.dtype();
    // The part of `up` that is finished last is the one whose `gate` is there.
    let lacks_gate = by[0].lora.is_some() && by[1].lora.is_none();
    if x.rows() > FEW_ROWS || !same(gate.y) || !same(up.y) || lacks_gate {
        return backend::project::project_gate_up(dev, act, to, x, by, s);
    }
    let ys = check(to, x, by);
    let width = act.cols();
    match (&ys[..], act.dtype()) {
        (&[Shared::F32(gate), Shared::F32(up)], DType::F32) => {
            let meet = meeting::<f32>(dev, width, SharedMut::new(elems_mut(act)), gate, up);
            group(dev, to, &ys, x, by, None, &[None, Some(Then { columns: 1, of: &meet })], s)
        }
        (&[Shared::Bf16(gate), Shared::Bf16(up)], DType::Bf16) => {
            let meet = meeting::<half::bf16>(dev, width, SharedMut::new(elems_mut(act)), gate, up);
            group(dev, to, &ys, x, by, None, &[None, Some(Then { columns: 1, of: &meet })], s)
        }
        _ => unreachable!("the types are the same"),
    }
}

/// SwiGLU of a part of a row.
fn meeting<E: Elem>(
    dev: &Cpu,
    width: usize,
    act: SharedMut<E>,
    gate: SharedMut<E>,
    up: SharedMut<E>,
) -> impl Fn(usize, Range<usize>) + Sync {
    move |row, columns| {
        let (first, len) = (row * width + columns.start, columns.len());
        // SAFETY: the part lies inside all three and belongs to the task that calls this, which has finished it in `up`; in `gate`
        // it was finished before, by this task or an earlier product.
        unsafe {
            swiglu_slice(dev.level, act.slice(first, len), gate.slice(first, len), up.slice(first, len));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Dropout, LowRank, Swiglu};
    use crate::cpu::testing::{cpus, normal, tensor, thread_counts_of_levels, values};
    use crate::tensor::Device;

    /// What a group has besides its weights.
    #[derive(Clone, Copy, Debug)]
    struct Case {
        rows: usize,
        wide: usize,
        out: usize,
        types: [DType; 2],
        bias: bool,
        /// Which have an update of rank 5.
        lora: [bool; 3],
    }

    /// Bits of the results of a residual, of q, k and v and of gate and up, fused or from the composed operations.
    fn run(dev: &Cpu, c: Case, fused: bool) -> Vec<(&'static str, Vec<u32>)> {
        let Case { rows, wide, out, types: [dtype, of_weights], .. } = c;
        let made =
            |seed: u64, rows: usize, cols: usize, dtype| tensor(dev, rows, cols, dtype, &normal(seed, rows * cols));
        let x = made(1, rows, wide, dtype);
        let weights = |seed: u64, outs: [usize; 3]| -> Vec<[Tensor<Cpu>; 4]> {
            let of = |(i, out): (usize, usize)| {
                let seed = seed + 4 * i as u64;
                [(out, wide), (1, out), (5, wide), (out, 5)]
                    .map(|(rows, cols)| made(seed + cols as u64, rows, cols, of_weights))
            };
            outs.into_iter().enumerate().map(of).collect()
        };
        fn projection<'a>(c: Case, i: usize, w: &'a [Tensor<Cpu>; 4]) -> Projection<'a, Cpu> {
            let dropout = (i == 1).then_some(Dropout { key: 3, p: 0.25 });
            let lora = c.lora[i].then_some(LowRank { a: &w[2], b: &w[3], scale: 0.75, dropout });
            Projection { w: &w[0], bias: c.bias.then_some(&w[1]), lora }
        }
        let blank = |cols| made(9, rows, cols, dtype);
        let mut s = ProjectScratch { u: [1, 1, 1].map(blank), x: blank(wide), dx: blank(1) };
        let mut t = [(); 3].map(|()| blank(5));
        let mut all = Vec::new();
        let bits = |t: &Tensor<Cpu>| values(dev, t).into_iter().map(f32::to_bits).collect::<Vec<_>>();

        let (w, residual, mut y) = (weights(20, [out; 3]), made(30, rows, out, dtype), blank(out));
        let to = &mut [Projected { y: &mut y, t: Some(&mut t[0]) }];
        let by = [projection(c, 0, &w[0])];
        match fused {
            true => dev.project(to, &x, &by, Some(&residual), &mut s).unwrap(),
            false => backend::project::project(dev, to, &x, &by, Some(&residual), &mut s).unwrap(),
        }
        all.push(("residual", bits(&y)));

        let dim = 6;
        let (w, mut ys) = (weights(40, [2 * out * dim, out * dim, out]), [2 * out * dim, out * dim, out].map(blank));
        let positions: Vec<i32> = (0..rows as i32).map(|i| i * 7 % 50).collect();
        let mut at = dev.alloc(rows, 1, DType::I32).unwrap();
        dev.upload_i32(&mut at, &positions).unwrap();
        let table = made(50, 50, dim, DType::F32);
        let rope = Rope { table: &table, positions: &at };
        let by = [0, 1, 2].map(|i| projection(c, i, &w[i]));
        {
            let ([q, k, v], [tq, tk, tv]) = (&mut ys, &mut t);
            let to = &mut [(q, tq), (k, tk), (v, tv)].map(|(y, t)| Projected { y, t: Some(t) });
            match fused {
                true => dev.project_qkv(to, &x, &by, Some(rope), &mut s).unwrap(),
                false => {
                    backend::project::project(dev, to, &x, &by, None, &mut s).unwrap();
                    to[..2].iter_mut().for_each(|to| dev.rope(to.y, rope, Rotate::Forward).unwrap());
                }
            }
        }
        all.extend(["q", "k", "v"].into_iter().zip(ys.each_ref().map(bits)));

        let (w, mut gate, mut up, mut act) = (weights(60, [out; 3]), blank(out), blank(out), blank(out));
        let by = [0, 1].map(|i| projection(c, i, &w[i]));
        let [t0, t1, _] = &mut t;
        let to = &mut [(&mut gate, t0), (&mut up, t1)].map(|(y, t)| Projected { y, t: Some(t) });
        match fused {
            true => dev.project_gate_up(&mut act, to, &x, &by, &mut s).unwrap(),
            false => {
                backend::project::project(dev, to, &x, &by, None, &mut s).unwrap();
                dev.swiglu_forward(&mut act, Swiglu { gate: to[0].y, up: to[1].y }).unwrap();
            }
        }
        all.extend(["gate", "up", "act"].into_iter().zip([&gate, &up, &act].map(bits)));
        all
    }

    /// Few rows and many, ragged tiles, odd k, several slabs of k: each way that a product goes.
    const SHAPES: [(usize, usize, usize); 7] =
        [(1, 64, 33), (3, 37, 5), (4, 2101, 3), (17, 30, 34), (70, 2101, 2), (66, 18, 41), (130, 20, 6)];

    #[test]
    fn fused_results_have_the_bits_of_the_composed_operations() {
        use DType::{Bf16, F32};
        let updates = [[false; 3], [true; 3], [false, true, true], [true, false, false], [false; 3]];
        for dev in cpus() {
            for (i, (rows, wide, out)) in SHAPES.into_iter().enumerate() {
                for (j, types) in [[Bf16, Bf16], [F32, F32], [F32, Bf16], [Bf16, F32]].into_iter().enumerate() {
                    let (bias, lora) = ((i + j) % 3 > 0, updates[(i + 3 * j) % 5]);
                    let c = Case { rows, wide, out, types, bias, lora };
                    let (fused, composed) = (run(&dev, c, true), run(&dev, c, false));
                    for ((what, fused), (_, composed)) in fused.iter().zip(&composed) {
                        let at = fused.iter().zip(composed).position(|(a, b)| a != b);
                        assert!(at.is_none(), "{} {c:?} {what}: element {at:?}", dev.level().name());
                    }
                }
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        for devs in thread_counts_of_levels() {
            for (rows, wide, out) in [(1, 64, 33), (70, 130, 21)] {
                let types = [DType::Bf16; 2];
                let c = Case { rows, wide, out, types, bias: true, lora: [true, false, true] };
                let first = run(&devs[0], c, true);
                for dev in &devs[1..] {
                    assert!(run(dev, c, true) == first, "{} {c:?}, {} threads", dev.level().name(), dev.threads());
                }
            }
        }
    }
}
