//! Root-mean-square norm: the kernels of `kernels/rmsnorm.cu` and their launches.

use super::compile::{Defines, Source, Value, source};
use super::device::{Cuda, Room};
use super::elementwise;
use super::kernels::Param::{F32, In, Out, U32};
use super::kernels::{Configuration, Kernel, THREADS, TYPES, c_type, vector};
use super::launch::Launch;
use crate::backend::{Norm, Write};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// The source of its kernels.
pub const SOURCE: Source = source!("kernels/rmsnorm.cu");

/// Rounds of groups that a block of [`backward_kernel`] goes through (`ROUNDS` of the source).
pub const ROUNDS: usize = 16;

/// Norm of groups of `width`.
pub fn forward_kernel(out: DType, x: DType, w: DType, width: usize) -> Kernel {
    Kernel {
        source: SOURCE,
        entry: "rmsnorm_forward",
        defines: Defines::new(&[
            ("DIRECTION_FORWARD", Value::Flag),
            ("OUT_T", c_type(out)),
            ("X_T", c_type(x)),
            ("W_T", c_type(w)),
            vector(width),
        ]),
        params: &[Out, Out, In, In, F32, U32, U32, U32],
        threads: THREADS,
    }
}

/// Its gradient.
pub fn backward_kernel(dx: DType, dout: DType, x: DType, w: DType, width: usize) -> Kernel {
    Kernel {
        source: SOURCE,
        entry: "rmsnorm_backward",
        defines: Defines::new(&[
            ("DIRECTION_BACKWARD", Value::Flag),
            ("DX_T", c_type(dx)),
            ("DOUT_T", c_type(dout)),
            ("X_T", c_type(x)),
            ("W_T", c_type(w)),
            vector(width),
        ]),
        params: &[Out, Out, In, In, In, In, U32, U32, U32, U32, U32],
        threads: THREADS,
    }
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    let mut all = Vec::new();
    for x in TYPES {
        for w in TYPES {
            for out in TYPES {
                for width in [8, 1] {
                    all.push((forward_kernel(out, x, w, width), 0));
                    for dx in TYPES {
                        // One row of f32 sums of the widest model in use: 16,384.
                        all.push((backward_kernel(dx, out, x, w, width), 16_384 * 4));
                    }
                }
            }
        }
    }
    all
}

/// Threads that share a group of `width` elements. It depends on the width alone, so that the bits of a row do not depend on the
/// others.
fn team(width: usize) -> usize {
    match width {
        0..=128 => 8,
        129..=1024 => 32,
        _ => THREADS,
    }
}

/// The number of groups of a norm and their width.
fn groups(x: &Norm<'_, Cuda>) -> (usize, usize) {
    (x.x.len() / x.w.cols(), x.w.cols())
}

pub(super) fn forward(dev: &Cuda, out: &mut Tensor<Cuda>, rstd: &mut Tensor<Cuda>, norm: Norm<'_, Cuda>) -> Result<()> {
    norm.check("rmsnorm", &[("out", out)], rstd, None);
    let (Norm { x, w, eps }, (n_groups, width)) = (norm, groups(&norm));
    let kernel = forward_kernel(out.dtype(), x.dtype(), w.dtype(), width);
    let blocks = n_groups.div_ceil(THREADS / team(width));
    let launch = Launch::new(dev, &kernel, blocks, 0).write(out).write(rstd).read(x).read(w);
    launch.f32(eps).u32(n_groups).u32(width).u32(team(width)).run()
}

pub(super) fn backward(
    dev: &Cuda,
    dx: &mut Tensor<Cuda>,
    dw: Option<&mut Tensor<Cuda>>,
    dout: &Tensor<Cuda>,
    rstd: &Tensor<Cuda>,
    norm: Norm<'_, Cuda>,
    write: Write,
) -> Result<()> {
    norm.check("rmsnorm_backward", &[("dx", dx), ("dout", dout)], rstd, dw.as_deref());
    let (Norm { x, w, .. }, (n_groups, width)) = (norm, groups(&norm));
    if x.is_empty() {
        return Ok(());
    }
    let teams = THREADS / team(width);
    let blocks = n_groups.div_ceil(teams * ROUNDS);
    let kernel = backward_kernel(dx.dtype(), dout.dtype(), x.dtype(), w.dtype(), width);
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
    let mut scratch = dev.room(Room::Sums, blocks, width, DType::F32)?;
    let launch = Launch::new(dev, &kernel, blocks, shared).write(dx).write(scratch.tensor());
    let launch = launch.read(dout).read(x).read(w).read(rstd);
    launch.u32(n_groups).u32(width).u32(team(width)).flag(add).flag(true).run()?;
    elementwise::add_sums(dev, dw, scratch.tensor())
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
