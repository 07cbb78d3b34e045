//! Root-mean-square norm: the launches of `kernels/rmsnorm.cu`.

use super::context::Cuda;
use super::kernels::{self, NORM_ROUNDS, THREADS};
use super::launch::Launch;
use crate::backend::Write;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Threads that share a group of `width` elements. It depends on the width alone, so that the bits of a row do not depend on the
/// others.
fn team(width: usize) -> usize {
    match width {
        0..=128 => 8,
        129..=1024 => 32,
        _ => THREADS,
    }
}

/// Checks the shapes and gives the number of groups and their width.
fn groups(what: &str, x: &Tensor<Cuda>, w: &Tensor<Cuda>, rstd: &Tensor<Cuda>) -> (usize, usize) {
    let ((rows, cols), width) = (x.shape(), w.cols());
    assert!(
        w.rows() == 1 && width > 0 && cols.is_multiple_of(width),
        "{what}: weight {:?} for rows of {cols}",
        w.shape()
    );
    assert_eq!(rstd.shape(), (rows, cols / width), "{what}: shape of rstd");
    assert_eq!(rstd.dtype(), DType::F32, "{what}: element type of rstd");
    (rows * (cols / width), width)
}

pub fn forward(
    dev: &Cuda,
    out: &mut Tensor<Cuda>,
    rstd: &mut Tensor<Cuda>,
    x: &Tensor<Cuda>,
    w: &Tensor<Cuda>,
    eps: f32,
) -> Result<()> {
    assert_eq!(out.shape(), x.shape(), "rmsnorm: shapes of out and x");
    let (n_groups, width) = groups("rmsnorm", x, w, rstd);
    let kernel = kernels::rmsnorm_forward(out.dtype(), x.dtype(), w.dtype(), width);
    let blocks = n_groups.div_ceil(THREADS / team(width));
    let launch = Launch::new(dev, &kernel, blocks, 0).write(out).write(rstd).read(x).read(w);
    launch.f32(eps).u32(n_groups).u32(width).u32(team(width)).run()
}

#[allow(clippy::too_many_arguments)]
pub fn backward(
    dev: &Cuda,
    dx: &mut Tensor<Cuda>,
    dw: Option<&mut Tensor<Cuda>>,
    dout: &Tensor<Cuda>,
    x: &Tensor<Cuda>,
    w: &Tensor<Cuda>,
    rstd: &Tensor<Cuda>,
    write: Write,
) -> Result<()> {
    assert_eq!(dx.shape(), x.shape(), "rmsnorm_backward: shapes of dx and x");
    assert_eq!(dout.shape(), x.shape(), "rmsnorm_backward: shapes of dout and x");
    let (n_groups, width) = groups("rmsnorm_backward", x, w, rstd);
    if let Some(dw) = &dw {
        assert_eq!(dw.shape(), w.shape(), "rmsnorm_backward: shape of dw");
        assert_eq!(dw.dtype(), DType::F32, "rmsnorm_backward: element type of dw");
    }
    if x.is_empty() {
        return Ok(());
    }
    let teams = THREADS / team(width);
    let blocks = n_groups.div_ceil(teams * NORM_ROUNDS);
    let kernel = kernels::rmsnorm_backward(dx.dtype(), dout.dtype(), x.dtype(), w.dtype(), width);
    let add = write == Write::Add;
    let Some(dw) = dw else {
        let launch = Launch::new(dev, &kernel, blocks, 0).write(dx).no_write();
        let launch = launch.read(dout).read(x).read(w).read(rstd);
        return launch.u32(n_groups).u32(width).u32(team(width)).flag(add).flag(false).run();
    };
    let shared = teams * width * size_of::<f32>();
    let limit = dev.properties().shared_limit;
    if shared > limit {
        return Err(Error::new(format!(
            "cuda: the gradient of a norm over {width} elements needs {shared} bytes of shared memory, a block has {limit} at most"
        )));
    }
    let mut scratch = dev.scratch(blocks * width)?;
    let launch = Launch::new(dev, &kernel, blocks, shared).write(dx).write(scratch.tensor());
    let launch = launch.read(dout).read(x).read(w).read(rstd);
    launch.u32(n_groups).u32(width).u32(team(width)).flag(add).flag(true).run()?;
    let sum = kernels::rmsnorm_dw(&kernel);
    let launch = Launch::new(dev, &sum, width.div_ceil(THREADS), 0).write(dw).read(scratch.tensor());
    launch.u32(blocks).u32(width).run()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn teams_fit_a_block_and_their_sums_fit_shared_memory() {
        for width in [1, 16, 64, 128, 129, 576, 1024, 1025, 4096, 16_384] {
            let teams = THREADS / team(width);
            assert!(teams * width * 4 <= 99 * 1024, "{width}");
        }
    }
}
