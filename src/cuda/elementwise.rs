//! Sums of equal shapes, biases and their gradient: `kernels/elementwise.cu`, `kernels/column_sums.cu` and their launches.

use super::compile::{Defines, Source, source};
use super::device::{Cuda, Room};
use super::group::GROUP;
use super::kernels::Param::{In, Out, U32, U64};
use super::kernels::{Configuration, Kernel, Param, THREADS, TYPES, c_type, vector};
use super::launch::Launch;
use super::swiglu::same_type;
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

/// Sums of the columns of a group.
pub fn column_kernel(src: DType) -> Kernel {
    const PARAMS: &[Param] = &[Out, Out, Out, Out, Out, In, In, In, U32, U32, U32, U32];
    of_columns("column_sums", src, PARAMS)
}

/// The sum of partial sums.
pub fn column_add_kernel() -> Kernel {
    of_columns("column_sums_add", DType::F32, &[Out, In, U32, U32])
}

fn of_columns(entry: &'static str, src: DType, params: &'static [Param]) -> Kernel {
    let defines = Defines::new(&[("SRC_T", c_type(src))]);
    Kernel { source: SOURCE_COLUMNS, entry, defines, params, threads: THREADS }
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    let mut all = vec![(column_add_kernel(), 0)];
    for src in TYPES {
        all.push((column_kernel(src), 0));
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
    bias_sums(dev, [Some(db), None, None], [Some(dy), None, None])
}

/// `db_i += the sum over rows of dy_i` for as many as there are of a group, without gaps, all `dy` of one type and as many rows.
pub(super) fn bias_sums(
    dev: &Cuda,
    db: [Option<&mut Tensor<Cuda>>; GROUP],
    dys: [Option<&Tensor<Cuda>>; GROUP],
) -> Result<()> {
    let Some(first) = dys[0] else { return Ok(()) };
    let (rows, cols) = (first.rows(), dys.map(|dy| dy.map_or(0, Tensor::cols)));
    let kernel = column_kernel(same_type("bias_backward", &dys.into_iter().flatten().collect::<Vec<_>>()));
    let (strips, blocks) = (rows.div_ceil(STRIP), cols.iter().map(|n| n.div_ceil(THREADS)).sum::<usize>());
    let mut partial = dev.room(Room::Sums, strips, cols.iter().sum(), DType::F32)?;
    let mut counters = dev.room(Room::Counters, blocks, 1, DType::I32)?;
    let launch = Launch::new(dev, &kernel, strips * blocks, 0);
    let launch = db.into_iter().fold(launch, Launch::write_if).write(partial.tensor()).write(counters.tensor());
    let launch = dys.into_iter().fold(launch, Launch::read_if).u32(rows);
    cols.into_iter().fold(launch, Launch::u32).run()
}

/// `dst += the sum over rows of partial`, row by row: `dst` (1, C), `partial` (rows, C), both f32.
pub(super) fn add_sums(dev: &Cuda, dst: &mut Tensor<Cuda>, partial: &Tensor<Cuda>) -> Result<()> {
    let ((rows, cols), kernel) = (partial.shape(), column_add_kernel());
    Launch::new(dev, &kernel, cols.div_ceil(THREADS), 0).write(dst).read(partial).u32(rows).u32(cols).run()
}
