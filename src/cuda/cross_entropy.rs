//! The head and its loss: products in chunks of supervised rows, with `kernels/cross_entropy.cu` between them.

use super::compile::{Defines, Source, source};
use super::device::{Cuda, Room};
use super::kernels::Param::{F32, In, Out, U32};
use super::kernels::{Configuration, Kernel, THREADS};
use super::launch::Launch;
use super::operands::{Operand, Product};
use super::rows;
use crate::backend::{HeadGrads, HeadLoss, MatMul, Write};
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

/// The source of its kernel.
pub const SOURCE: Source = source!("kernels/cross_entropy.cu");

/// Loss and gradient of rows of logits.
pub fn kernel() -> Kernel {
    Kernel {
        source: SOURCE,
        entry: "cross_entropy",
        defines: Defines::new(&[]),
        params: &[Out, Out, Out, Out, In, In, U32, F32, U32],
        threads: THREADS,
    }
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    vec![(kernel(), 0)]
}

/// Rows of a chunk: a function of the classes alone, since it decides how the gradient of the head is summed. At most half a GiB of
/// logits, and no more rows than keep the products' weights busy.
pub fn chunk_rows(classes: usize) -> usize {
    ((1 << 27) / classes / 64 * 64).clamp(64, 2048)
}

pub(super) fn linear_cross_entropy(
    dev: &Cuda,
    loss: &mut Tensor<Cuda>,
    mut correct: Option<&mut Tensor<Cuda>>,
    grads: HeadGrads<'_, Cuda>,
    of: HeadLoss<'_, Cuda>,
) -> Result<()> {
    of.check("cross entropy", loss, correct.as_deref(), &grads);
    let HeadLoss { x, w, batch, n_classes: classes, scale } = of;
    let HeadGrads { mut dx, mut dw, first_row } = grads;
    dev.fill_zero(loss)?;
    if let Some(correct) = &mut correct {
        dev.fill_zero(correct)?;
    }
    if let Some(dx) = &mut dx {
        dev.fill_zero(dx)?;
    }
    let (c, supervised, chunk) = (x.cols(), batch.rows.rows(), chunk_rows(classes));
    // Rows of dw beyond the classes belong to padding of the vocabulary and have no gradient.
    let first = first_row.min(classes);
    let tail = dw.as_ref().map_or(0, |dw| (first_row + dw.rows()).min(classes).max(first) - first);
    let gradient = dx.is_some() || dw.is_some();
    // Products with a bf16 operand round the gradient anyway: rounded once here, it is half as much to move.
    let apart = gradient && (x.dtype() == DType::Bf16 || w.dtype() == DType::Bf16);
    let kernel = kernel();
    for start in (0..supervised).step_by(chunk) {
        let m = chunk.min(supervised - start);
        let mut picked = dev.room(Room::Rows, m, c, x.dtype())?;
        let mut logits = dev.room(Room::Logits, m, classes, DType::F32)?;
        let mut apart = if apart { Some(dev.room(Room::Gradient, m, classes, DType::Bf16)?) } else { None };
        let (picked, logits) = (picked.tensor(), logits.tensor());
        rows::gather_from(dev, picked, x, &batch.rows, start)?;
        let (xs, ws) = (Operand { t: picked, at: 0, stride: c }, Operand { t: w, at: 0, stride: c });
        dev.product(None, logits, Product::new(xs, ws, (m, classes, c), MatMul::NT, Write::Set))?;

        let launch = Launch::new(dev, &kernel, m, 0).write(loss).write_if(correct.as_deref_mut());
        let launch = launch.write_if(apart.as_mut().map(|d| d.tensor())).write(logits);
        let launch = launch.read_from(&batch.rows, start).read(&batch.targets);
        launch.u32(classes).f32(scale).flag(gradient).run()?;
        let d: &Tensor<Cuda> = match &mut apart {
            Some(d) => d.tensor(),
            None => logits,
        };
        if let Some(dx) = &mut dx {
            let mut part = dev.room(Room::RowGradient, m, c, dx.dtype())?;
            let ds = Operand { t: d, at: 0, stride: classes };
            dev.product(None, part.tensor(), Product::new(ds, ws, (m, c, classes), MatMul::NN, Write::Set))?;
            rows::scatter_from(dev, dx, part.tensor(), &batch.rows, start)?;
        }
        if let (Some(dw), true) = (&mut dw, tail > 0) {
            let ds = Operand { t: d, at: first, stride: classes };
            dev.product(None, dw, Product::new(ds, xs, (tail, c, m), MatMul::TN, Write::Add))?;
        }
    }
    Ok(())
}
