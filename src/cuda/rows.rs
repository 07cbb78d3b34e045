//! Rows by index and the gradient of the embedding: `kernels/rows.cu`, `kernels/embedding.cu` and their launches.

use super::compile::{Defines, Source, Value, source};
use super::device::Cuda;
use super::kernels::Param::{In, Out, U32};
use super::kernels::{Configuration, Kernel, THREADS, TYPES, c_type};
use super::launch::Launch;
use crate::backend::embedding::{check_backward, check_rows};
use crate::batch::Batch;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// The source of rows by index.
pub const SOURCE: Source = source!("kernels/rows.cu");
/// The source of the embedding's gradient.
pub const SOURCE_EMBEDDING: Source = source!("kernels/embedding.cu");

/// The pieces that rows are copied in: C++ type and bytes.
const UNITS: [(&str, usize); 3] = [("uint4", 16), ("u32", 4), ("u16", 2)];

/// `gather` or `scatter` of rows of so many bytes; and units to a row.
pub fn kernel(entry: &'static str, bytes: usize) -> (Kernel, usize) {
    let (name, size) = *UNITS.iter().find(|(_, size)| bytes.is_multiple_of(*size)).expect("elements have even sizes");
    let defines = Defines::new(&[("UNIT_T", Value::Word(name))]);
    (Kernel { source: SOURCE, entry, defines, params: &[Out, In, In, U32, U32], threads: THREADS }, bytes / size)
}

/// The embedding's gradient.
pub fn backward_kernel(dout: DType) -> Kernel {
    Kernel {
        source: SOURCE_EMBEDDING,
        entry: "embedding_backward",
        defines: Defines::new(&[("DOUT_T", c_type(dout))]),
        params: &[Out, In, In, In, U32, U32, U32, U32],
        threads: THREADS,
    }
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    let copies = ["gather", "scatter"].into_iter().flat_map(|entry| UNITS.map(|(_, size)| (kernel(entry, size).0, 0)));
    copies.chain(TYPES.map(|dout| (backward_kernel(dout), 0))).collect()
}

pub(super) fn gather(dev: &Cuda, dst: &mut Tensor<Cuda>, src: &Tensor<Cuda>, rows: &Tensor<Cuda>) -> Result<()> {
    check_rows("gather_rows", dst, src, rows);
    gather_from(dev, dst, src, rows, 0)
}

/// The rows that the indices from `first` on name, as many as `dst` has.
pub(super) fn gather_from(
    dev: &Cuda,
    dst: &mut Tensor<Cuda>,
    src: &Tensor<Cuda>,
    rows: &Tensor<Cuda>,
    first: usize,
) -> Result<()> {
    let (kernel, units) = kernel("gather", src.cols() * src.dtype().bytes());
    let launch = Launch::new(dev, &kernel, dst.rows() * units.div_ceil(THREADS), 0);
    launch.write(dst).read(src).read_from(rows, first).u32(units).u32(src.rows()).run()
}

pub(super) fn scatter(dev: &Cuda, dst: &mut Tensor<Cuda>, src: &Tensor<Cuda>, rows: &Tensor<Cuda>) -> Result<()> {
    check_rows("scatter_rows", src, dst, rows);
    scatter_from(dev, dst, src, rows, 0)
}

/// The rows of `src` to where the indices from `first` on say.
pub(super) fn scatter_from(
    dev: &Cuda,
    dst: &mut Tensor<Cuda>,
    src: &Tensor<Cuda>,
    rows: &Tensor<Cuda>,
    first: usize,
) -> Result<()> {
    let (kernel, units) = kernel("scatter", src.cols() * src.dtype().bytes());
    let limit = dst.rows();
    let launch = Launch::new(dev, &kernel, src.rows() * units.div_ceil(THREADS), 0);
    launch.write(dst).read(src).read_from(rows, first).u32(units).u32(limit).run()
}

pub(super) fn backward(
    dev: &Cuda,
    dw: &mut Tensor<Cuda>,
    dout: &Tensor<Cuda>,
    batch: &Batch<Cuda>,
    first_row: usize,
) -> Result<()> {
    check_backward("embedding_backward", dw, dout, batch);
    let ((n, cols), rows, kernel) = (dout.shape(), dw.rows(), backward_kernel(dout.dtype()));
    let launch = Launch::new(dev, &kernel, n * cols.div_ceil(THREADS), 0).write(dw).read(dout);
    launch.read(&batch.tokens).read(&batch.by_token).u32(n).u32(cols).u32(first_row).u32(rows).run()
}
