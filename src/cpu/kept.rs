//! Weights that products read again and again before they change, kept as the panels that products read: nothing is packed then.
//!
//! A weight (out, in) has two forms, because a panel holds steps of k side by side and the two directions sum over different axes:
//! `x·wᵀ` over `in`, `dy·w` over `out`. Where nobody reads rows of the weight, they are given back to the system; whoever asks for them
//! nevertheless gets them from the panels, to the bit.

use std::any::Any;
use std::sync::OnceLock;

use super::Cpu;
use super::buffer::{CpuBuf, Stead, view};
use super::elem::View;
use super::kernels::Micro;
use super::level::Level;
use super::pack::{Operand, Unit};
use super::slabs::{k_steps, pack_slab};
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
    /// Packs `n` columns of C and `k` steps.
    fn new(dev: &Cpu, micro: &Micro, src: Operand<'_>, n: usize, k: usize) -> Result<Self> {
        let (unit, width) = (micro.b, micro.nr);
        let units = bytes(unit, width, n, k) / size_of::<u32>();
        let mut kept = Self { unit, width, n, k, data: CpuBuf::any(units * size_of::<u32>())? };
        let mut rest = kept.data.elems_mut::<u32>(units);
        for k0 in (0..k).step_by(k_steps(unit)) {
            let steps = k_steps(unit).min(k - k0);
            let (slab, tail) = rest.split_at_mut(n.next_multiple_of(width) * unit.count(steps));
            pack_slab(dev, slab, (unit, width), src, (0, n), (k0, steps));
            rest = tail;
        }
        Ok(kept)
    }

    /// Whether these are the panels that a product with so many columns and steps reads.
    pub fn serves(&self, micro: &Micro, n: usize, k: usize) -> bool {
        (self.unit, self.width, self.k) == (micro.b, micro.nr, k) && n <= self.n
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

    /// Bytes of the panels.
    fn bytes(&self) -> usize {
        bytes(self.unit, self.width, self.n, self.k)
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

/// The forms of a weight that are kept.
pub struct Forms {
    /// For `x·wᵀ`.
    forward: Kept,
    /// For `dy·w`.
    backward: Kept,
    /// The rows, where they were given back and asked for again.
    again: OnceLock<CpuBuf>,
}

impl Forms {
    /// The form for products over the columns of the weight, or over its rows.
    pub fn of(&self, over_columns: bool) -> &Kept {
        if over_columns { &self.forward } else { &self.backward }
    }

    /// The form of a tensor that is kept.
    fn kept_of(w: &Tensor<Cpu>) -> Option<&Self> {
        (w.buf.stead()? as &dyn Any).downcast_ref()
    }

    fn unpacked(&self) -> CpuBuf {
        self.forward.unpack().unwrap_or_else(|_| heap::end(self.forward.bytes()))
    }
}

impl Stead for Forms {
    fn rows(&self) -> &CpuBuf {
        self.again.get_or_init(|| self.unpacked())
    }

    fn into_rows(mut self: Box<Self>) -> CpuBuf {
        self.again.take().unwrap_or_else(|| self.unpacked())
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
    pub fn of(w: &'a Tensor<Cpu>, micro: &Micro, over_columns: bool, n: usize, k: usize) -> Self {
        let kept = Forms::kept_of(w).map(|forms| forms.of(over_columns)).filter(|kept| kept.serves(micro, n, k));
        let data = kept.map_or_else(|| view(w), |_| View::Bf16(&[]));
        let (major_stride, k_stride) = if over_columns { (w.cols(), 1) } else { (1, w.cols()) };
        Self { rows: Operand { data, major_stride, k_stride }, kept }
    }
}

/// See [`crate::backend::Backend::keep_packed`]. On the units of f32 panels of bf16 would take twice the memory, and two forms in f32 more than
/// half of what other trainers take.
pub fn keep(dev: &Cpu, w: &mut Tensor<Cpu>, rows_are_read: bool) -> Result<usize> {
    let micro = Micro::new(dev.level, true);
    if w.dtype() != DType::Bf16 || !micro.b.is_pair() || w.is_empty() || w.buf.stead().is_some() {
        return Ok(0);
    }
    let (out, wide) = w.shape();
    let form = |over_columns, n, k| Kept::new(dev, &micro, Weight::of(w, &micro, over_columns, n, k).rows, n, k);
    let (forward, backward) = (form(true, out, wide)?, form(false, wide, out)?);
    if let Some(part) = w.buf.file() {
        // Nobody looks at it again.
        part.file().check_unchanged()?;
    }
    let own = w.capacity() * w.dtype().bytes();
    let taken = forward.bytes() + backward.bytes();
    w.buf.keep(Box::new(Forms { forward, backward, again: OnceLock::new() }), rows_are_read);
    Ok(if rows_are_read { taken } else { taken - own })
}

/// The panels of bf16 weights that are kept for both directions at this level, where they are.
pub fn packed(level: Level) -> Option<Packed> {
    let micro = Micro::new(level, true);
    micro.b.is_pair().then(|| Packed { columns: micro.nr, steps: 2 * micro.units(1) })
}

#[cfg(test)]
mod tests {
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
                for rows_are_read in [true, false] {
                    dev.keep_packed(&mut w, rows_are_read).unwrap();
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
                assert_eq!(dev.keep_packed(&mut w, true).unwrap(), expected, "{name}");
                dev.upload(&mut w, &normal(3, out * wide)).unwrap();
                assert_eq!(dev.keep_packed(&mut w, false).unwrap(), expected.saturating_sub(own), "{name}");
            }
        }
    }
}
