//! Sums of equal shapes, biases and their gradient: `kernels/elementwise.cu`, `kernels/column_sums.cu` and their launches.

use super::compile::{Defines, Source, source};
use super::device::{Cuda, Room};
use super::kernels::Param::{In, Out, U32, U64};
use super::kernels::{Configuration, Kernel, THREADS, TYPES, c_type, vector};
use super::launch::Launch;
use crate::backend::elementwise::{check_bias, check_bias_grad, check_same};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// The source of sums.
pub const SOURCE: Source = source!("kernels/elementwise.cu");
/// The source of sums of columns.
pub const SOURCE_COLUMNS: Source = source!("kernels/column_sums.cu");

/// Rows of one partial sum (`STRIP` of the source).
const STRIP: usize = 512;

/// `dst += src`, or a bias of rows of `cols` elements.
pub fn kernel(entry: &'static str, dst: DType, src: DType, cols: usize) -> Kernel {
    let params: &[_] = if entry == "add" { &[Out, In, U64] } else { &[Out, In, U32] };
    Kernel {
        source: SOURCE,
        entry,
        defines: Defines::new(&[("DST_T", c_type(dst)), ("SRC_T", c_type(src)), vector(cols)]),
        params,
        threads: THREADS,
    }
}

/// Sums of columns, or the sum of these, which is compiled for f32 alone.
pub fn column_kernel(entry: &'static str, src: DType) -> Kernel {
    let defines = Defines::new(&[("SRC_T", c_type(src))]);
    Kernel { source: SOURCE_COLUMNS, entry, defines, params: &[Out, In, U32, U32], threads: THREADS }
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    let mut all = vec![(column_kernel("column_sums_add", DType::F32), 0)];
    for src in TYPES {
        all.push((column_kernel("column_sums", src), 0));
        for dst in TYPES {
            all.push((kernel("add", dst, src, 8), 0));
            all.extend([8, 1].map(|cols| (kernel("add_bias", dst, src, cols), 0)));
        }
    }
    all
}

pub(super) fn add(dev: &Cuda, dst: &mut Tensor<Cuda>, src: &Tensor<Cuda>) -> Result<()> {
    check_same("add", dst, src);
    let (kernel, n) = (kernel("add", dst.dtype(), src.dtype(), 8), src.len());
    Launch::new(dev, &kernel, n.div_ceil(THREADS * 8), 0).write(dst).read(src).u64(n).run()
}

pub(super) fn add_bias(dev: &Cuda, dst: &mut Tensor<Cuda>, b: &Tensor<Cuda>) -> Result<()> {
    check_bias("add_bias", b, dst);
    let (rows, cols) = dst.shape();
    let kernel = kernel("add_bias", dst.dtype(), b.dtype(), cols);
    let each = if cols.is_multiple_of(8) { 8 } else { 1 };
    Launch::new(dev, &kernel, rows * cols.div_ceil(THREADS * each), 0).write(dst).read(b).u32(cols).run()
}

pub(super) fn bias_backward(dev: &Cuda, db: &mut Tensor<Cuda>, dy: &Tensor<Cuda>) -> Result<()> {
    check_bias_grad("bias_backward", db, dy);
    let (rows, cols) = dy.shape();
    let kernel = column_kernel("column_sums", dy.dtype());
    let strips = rows.div_ceil(STRIP);
    let mut partial = dev.room(Room::Sums, strips, cols, DType::F32)?;
    let launch = Launch::new(dev, &kernel, strips * cols.div_ceil(THREADS), 0).write(partial.tensor()).read(dy);
    launch.u32(rows).u32(cols).run()?;
    add_sums(dev, db, partial.tensor())
}

/// `dst += the sum over rows of partial`, row by row: `dst` (1, C), `partial` (rows, C), both f32.
pub(super) fn add_sums(dev: &Cuda, dst: &mut Tensor<Cuda>, partial: &Tensor<Cuda>) -> Result<()> {
    let ((rows, cols), kernel) = (partial.shape(), column_kernel("column_sums_add", DType::F32));
    Launch::new(dev, &kernel, cols.div_ceil(THREADS), 0).write(dst).read(partial).u32(rows).u32(cols).run()
}
