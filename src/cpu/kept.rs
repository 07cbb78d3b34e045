//! Weights that products read again and again before they change, kept as the panels that products read: nothing is packed then.
//!
//! A weight (out, in) has two forms, because a panel holds steps of k side by side and the two directions sum over different axes:
//! `x·wᵀ` over `in`, `dy·w` over `out`. Where nobody reads rows of the weight, they are given back to the system; whoever asks for them
//! nevertheless gets them from the panels, to the bit. A weight that is trained keeps its rows: what writes to them leaves the panels' memory empty, and the
//! first product of a direction after that fills it again.

use std::any::Any;
use std::sync::{Mutex, OnceLock, PoisonError};

use super::Cpu;
use super::buffer::{CpuBuf, Stead, view};
use super::elem::View;
use super::kernels::Micro;
use super::level::Level;
use super::pack::{Operand, Unit};
use super::slabs::{k_steps, pack_slab};
use crate::backend::Keep;
use crate::backend::footprint::Packed;
use crate::error::Result;
use crate::heap;
use crate::tensor::{DType, Tensor};

/// The panels of a B operand: slabs of k one after the other, in each the panels of all columns of C.
pub struct Kept {
    unit: Unit,
    width: usize,
    n: usize,
    k: usize,
    data: CpuBuf,
}

impl Kept {
    /// Packs `n` columns of C and `k` steps into `data`, which has as many bytes as that takes.
    fn new(dev: &Cpu, micro: &Micro, src: Operand<'_>, (n, k): (usize, usize), data: CpuBuf) -> Self {
        let (unit, width) = (micro.b, micro.nr);
        let mut kept = Self { unit, width, n, k, data };
        let mut rest = kept.data.elems_mut::<u32>(bytes(unit, width, n, k) / size_of::<u32>());
        for k0 in (0..k).step_by(k_steps(unit)) {
            let steps = k_steps(unit).min(k - k0);
            let (slab, tail) = rest.split_at_mut(n.next_multiple_of(width) * unit.count(steps));
            pack_slab(dev, slab, (unit, width), src, (0, n), (k0, steps));
            rest = tail;
        }
        kept
    }

    /// The panels from column `j` on, which begins one, in the slab that begins at step `k0`.
    pub fn panels(&self, j: usize, k0: usize) -> &[u32] {
        let per_panel = |steps| self.width * self.unit.count(steps);
        let panels = self.n.div_ceil(self.width);
        let full = k_steps(self.unit);
        let start = k0 / full * panels * per_panel(full);
        let own = per_panel(full.min(self.k - k0));
        &self.data.elems::<u32>(start + panels * own)[start + j / self.width * own..]
    }

    /// The elements of the weight whose forward form this is, as they stood in memory.
    fn unpack(&self) -> Result<CpuBuf> {
        let mut buf = CpuBuf::any(self.n * self.k * size_of::<u16>())?;
        let rows = buf.elems_mut::<u16>(self.n * self.k);
        for k0 in (0..self.k).step_by(k_steps(self.unit)) {
            let steps = k_steps(self.unit).min(self.k - k0);
            for j in 0..self.n {
                let (panel, r) = (self.panels(j / self.width * self.width, k0), j % self.width);
                let row = &mut rows[j * self.k + k0..][..steps];
                let half = |l: usize| (panel[self.unit.place(l / 2, self.width, r)] >> (16 * (l % 2))) as u16;
                row.iter_mut().enumerate().for_each(|(l, x)| *x = half(l));
            }
        }
        Ok(buf)
    }
}

/// Bytes of the panels of `n` columns of C and `k` steps.
fn bytes(unit: Unit, width: usize, n: usize, k: usize) -> usize {
    n.next_multiple_of(width) * unit.count(k) * size_of::<u32>()
}

/// One of the two forms of a weight.
struct Form {
    micro: Micro,
    /// Columns of C and steps of k.
    size: (usize, usize),
    panels: OnceLock<Kept>,
    /// Memory of panels that are still to be filled.
    spare: Mutex<Option<CpuBuf>>,
}

impl Form {
    fn empty(micro: &Micro, size: (usize, usize)) -> Result<Self> {
        let memory = CpuBuf::any(bytes(micro.b, micro.nr, size.0, size.1))?;
        Ok(Self { micro: *micro, size, panels: OnceLock::new(), spare: Mutex::new(Some(memory)) })
    }

    /// Whether these are the panels that a product with so many columns and steps reads.
    fn serves(&self, micro: &Micro, n: usize, k: usize) -> bool {
        let own = (self.micro.b, self.micro.nr, self.size.1);
        own == (micro.b, micro.nr, k) && n <= self.size.0
    }

    /// The panels, filled from the weight where they are not.
    fn filled<'s>(&self, dev: &Cpu, src: impl FnOnce() -> Operand<'s>) -> &Kept {
        self.panels.get_or_init(|| {
            let memory = self.spare.lock().unwrap_or_else(PoisonError::into_inner).take();
            Kept::new(dev, &self.micro, src(), self.size, memory.expect("panels or the memory for them"))
        })
    }

    /// What stands in the panels is no longer the weight.
    fn empty_again(&mut self) {
        if let Some(panels) = self.panels.take() {
            *self.spare.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(panels.data);
        }
    }

    fn bytes(&self) -> usize {
        bytes(self.micro.b, self.micro.nr, self.size.0, self.size.1)
    }
}

/// The forms of a weight that are kept.
pub struct Forms {
    /// For `x·wᵀ`.
    forward: Form,
    /// For `dy·w`.
    backward: Form,
    /// Whether the forms outlive what is written to the weight.
    trained: bool,
    /// The rows, where they were given back and asked for again.
    again: OnceLock<CpuBuf>,
}

impl Forms {
    /// The form for products over the columns of the weight, or over its rows.
    fn of(&self, over_columns: bool) -> &Form {
        if over_columns { &self.forward } else { &self.backward }
    }

    /// The form of a tensor that is kept.
    fn kept_of(w: &Tensor<Cpu>) -> Option<&Self> {
        (w.buf.stead()? as &dyn Any).downcast_ref()
    }

    fn unpacked(&self) -> CpuBuf {
        let panels = self.forward.panels.get().expect("rows go once the panels are filled");
        panels.unpack().unwrap_or_else(|_| heap::end(self.forward.bytes()))
    }
}

impl Stead for Forms {
    fn rows(&self) -> &CpuBuf {
        self.again.get_or_init(|| self.unpacked())
    }

    fn into_rows(mut self: Box<Self>) -> CpuBuf {
        self.again.take().unwrap_or_else(|| self.unpacked())
    }

    fn outlives_writing(&mut self) -> bool {
        if self.trained {
            self.forward.empty_again();
            self.backward.empty_again();
        }
        self.trained
    }
}

/// What products read of their B: panels where they are kept, else its rows.
#[derive(Clone, Copy)]
pub struct Weight<'a> {
    pub rows: Operand<'a>,
    pub kept: Option<&'a Kept>,
}

impl<'a> From<Operand<'a>> for Weight<'a> {
    fn from(rows: Operand<'a>) -> Self {
        Self { rows, kept: None }
    }
}

impl<'a> Weight<'a> {
    /// Of a tensor with `n` columns of C over `k` steps: along its columns, or along its rows.
    pub fn of(dev: &Cpu, w: &'a Tensor<Cpu>, micro: &Micro, over_columns: bool, n: usize, k: usize) -> Self {
        let (major_stride, k_stride) = if over_columns { (w.cols(), 1) } else { (1, w.cols()) };
        let rows = |data| Operand { data, major_stride, k_stride };
        let form = Forms::kept_of(w).map(|forms| forms.of(over_columns)).filter(|form| form.serves(micro, n, k));
        match form.map(|form| form.filled(dev, || rows(view(w)))) {
            Some(kept) => Self { rows: rows(View::Bf16(&[])), kept: Some(kept) },
            None => Self { rows: rows(view(w)), kept: None },
        }
    }
}

/// See [`crate::backend::Backend::keep_packed`]. On the units of f32 panels of bf16 would take twice the memory, and two forms in f32 more than
/// half of what other trainers take.
pub fn keep(dev: &Cpu, w: &mut Tensor<Cpu>, how: Keep) -> Result<usize> {
    let micro = Micro::new(dev.level, true);
    if w.dtype() != DType::Bf16 || !micro.b.is_pair() || w.is_empty() || w.buf.stead().is_some() {
        return Ok(0);
    }
    let (out, wide) = w.shape();
    let (forward, backward) = (Form::empty(&micro, (out, wide))?, Form::empty(&micro, (wide, out))?);
    if how != Keep::Trained {
        let rows = |major_stride, k_stride| Operand { data: view(w), major_stride, k_stride };
        forward.filled(dev, || rows(wide, 1));
        backward.filled(dev, || rows(1, wide));
        if let Some(part) = w.buf.file() {
            // Nobody looks at it again.
            part.file().check_unchanged()?;
        }
    }
    let own = w.capacity() * w.dtype().bytes();
    let taken = forward.bytes() + backward.bytes();
    let forms = Forms { forward, backward, trained: how == Keep::Trained, again: OnceLock::new() };
    w.buf.keep(Box::new(forms), how != Keep::Frozen);
    Ok(if how == Keep::Frozen { taken - own } else { taken })
}

/// The panels of bf16 weights that are kept for both directions at this level, where they are.
pub fn packed(level: Level) -> Option<Packed> {
    let micro = Micro::new(level, true);
    micro.b.is_pair().then(|| Packed { columns: micro.nr, steps: 2 * micro.units(1) })
}

#[cfg(test)]
mod tests {
    use super::{Forms, Keep};
    use crate::backend::{Backend, MatMul, Write};
    use crate::cpu::Cpu;
    use crate::cpu::testing::{cpus, normal, tensor, values};
    use crate::tensor::{DType, Device, Tensor};

    /// `x·wᵀ` for some rows and `dy·w`, to the bit.
    fn products(dev: &Cpu, w: &Tensor<Cpu>, rows: usize) -> Vec<u32> {
        let (out, wide) = w.shape();
        let of = |seed, cols| tensor(dev, rows, cols, w.dtype(), &normal(seed, rows * cols));
        let (x, dy) = (of(5, wide), of(6, out));
        let (mut y, mut dx) = (tensor(dev, rows, out, DType::F32, &vec![0.0; rows * out]), of(7, wide));
        dev.matmul(&mut y, &x, w, MatMul::NT, 1.0, Write::Set).unwrap();
        dev.matmul(&mut dx, &dy, w, MatMul::NN, 0.5, Write::Add).unwrap();
        values(dev, &y).into_iter().chain(values(dev, &dx)).map(f32::to_bits).collect()
    }

    /// Ragged panels, odd k, several slabs; few rows and more.
    #[test]
    fn products_have_the_same_bits_and_rows_come_back() {
        for dev in cpus() {
            for (out, wide) in [(33, 17), (34, 2101), (1, 1)] {
                let name = format!("{}, {out} x {wide}", dev.level().name());
                let data = normal(3, out * wide);
                let mut w = tensor(&dev, out, wide, DType::Bf16, &data);
                let (rows, before) = (values(&dev, &w), [1, 3, 70].map(|rows| products(&dev, &w, rows)));
                for how in [Keep::FrozenAndRead, Keep::Frozen] {
                    dev.keep_packed(&mut w, how).unwrap();
                    let after = [1, 3, 70].map(|rows| products(&dev, &w, rows));
                    assert!(after == before, "{name}: products");
                    assert!(values(&dev, &w) == rows, "{name}: rows");
                    // Written again, nothing that was kept is read.
                    dev.upload(&mut w, &vec![0.0; out * wide]).unwrap();
                    assert!(products(&dev, &w, 3)[..3 * out].iter().all(|&bits| bits == 0), "{name}: zeros");
                    dev.upload(&mut w, &data).unwrap();
                }
            }
        }
    }

    #[test]
    fn what_is_taken_is_what_was_promised() {
        for dev in cpus() {
            let promised = super::packed(dev.level());
            for (out, wide) in [(33, 17), (70, 2101), (64, 64)] {
                let mut w = tensor(&dev, out, wide, DType::Bf16, &normal(3, out * wide));
                let own = 2 * out * wide;
                let name = format!("{} {out} x {wide}", dev.level().name());
                let expected = promised.map_or(0, |p| p.bytes((out, wide)) as usize);
                assert_eq!(dev.keep_packed(&mut w, Keep::FrozenAndRead).unwrap(), expected, "{name}");
                dev.upload(&mut w, &normal(3, out * wide)).unwrap();
                assert_eq!(dev.keep_packed(&mut w, Keep::Frozen).unwrap(), expected.saturating_sub(own), "{name}");
                dev.upload(&mut w, &normal(3, out * wide)).unwrap();
                assert_eq!(dev.keep_packed(&mut w, Keep::Trained).unwrap(), expected, "{name}");
            }
        }
    }

    /// Panels of a trained weight follow whatever is written to it: all of it, a part, zeros. They are filled once in between.
    #[test]
    fn products_follow_a_weight_that_is_trained() {
        for dev in cpus() {
            for (out, wide) in [(33, 17), (34, 2101)] {
                let name = format!("{}, {out} x {wide}", dev.level().name());
                let fresh = |seed| tensor(&dev, out, wide, DType::Bf16, &normal(seed, out * wide));
                let mut w = fresh(3);
                let kept = dev.keep_packed(&mut w, Keep::Trained).unwrap() > 0;
                let agree = |w: &Tensor<Cpu>, expected: &Tensor<Cpu>, after: &str| {
                    for rows in [1, 3, 70, 70] {
                        assert!(
                            products(&dev, w, rows) == products(&dev, expected, rows),
                            "{name}: {after}, {rows} rows"
                        );
                    }
                    let forms = Forms::kept_of(w);
                    let filled =
                        |forms: &Forms| [&forms.forward, &forms.backward].iter().all(|f| f.panels.get().is_some());
                    assert!(forms.is_some() == kept && forms.is_none_or(filled), "{name}: {after}, panels");
                    assert!(values(&dev, w) == values(&dev, expected), "{name}: {after}, rows");
                };
                agree(&w, &fresh(3), "as it was");
                dev.upload(&mut w, &normal(4, out * wide)).unwrap();
                agree(&w, &fresh(4), "all written");
                let mut expected = fresh(4);
                for w in [&mut w, &mut expected] {
                    dev.upload_at(w, out * wide - 5, &[0.5; 5]).unwrap();
                }
                agree(&w, &expected, "a part written");
                for w in [&mut w, &mut expected] {
                    dev.fill_zero(w).unwrap();
                }
                agree(&w, &expected, "zeros");
            }
        }
    }
}
