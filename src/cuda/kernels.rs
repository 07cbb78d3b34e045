//! The table of kernels: every entry of `kernels/*.cu` that is launched, with its defines and parameters. Nothing else names them.

use super::compile::{self, Define, Source};
use super::tiles::{Tile, k_major};
use crate::backend::MatMul;
use crate::tensor::DType;

/// A parameter of an entry, in order. `launch::Launch` holds each launch to this list, and a test holds the list to the
/// PTX that the source becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Param {
    /// A tensor that is read.
    In,
    /// A tensor that is written, or read and written.
    Out,
    /// An unsigned 32-bit integer.
    U32,
    /// An unsigned 64-bit integer.
    U64,
    /// An f32.
    F32,
}

use Param::{F32, In, Out, U32, U64};

/// An entry of a source with its defines.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Source file.
    pub source: Source,
    /// Name of the `extern "C"` function.
    pub entry: &'static str,
    /// Defines it is compiled with.
    pub defines: Vec<Define>,
    /// Its parameters.
    pub params: &'static [Param],
    /// Threads of a block.
    pub threads: usize,
}

/// The C++ type of elements.
fn c_type(dtype: DType) -> String {
    match dtype {
        DType::F32 => "float",
        DType::Bf16 => "bf16",
        DType::I32 => panic!("a tensor of integers where numbers are expected"),
    }
    .into()
}

/// Threads of a block of the norms and of [`cast`].
pub const THREADS: usize = 256;

/// Rounds of groups that a block of [`rmsnorm_backward`] goes through (`ROUNDS` of the source).
pub const NORM_ROUNDS: usize = 16;

/// `dst = src` of another type.
pub fn cast(dst: DType, src: DType) -> Kernel {
    Kernel {
        source: compile::CAST,
        entry: "cast",
        defines: vec![("DST_T", c_type(dst)), ("SRC_T", c_type(src))],
        params: &[Out, In, U64],
        threads: THREADS,
    }
}

/// Elements a thread takes at once from groups of `width`: 8 where that divides it.
fn vector(width: usize) -> Define {
    ("VEC", if width.is_multiple_of(8) { "8" } else { "1" }.into())
}

/// Norm of groups of `width`.
pub fn rmsnorm_forward(out: DType, x: DType, w: DType, width: usize) -> Kernel {
    Kernel {
        source: compile::RMSNORM,
        entry: "rmsnorm_forward",
        defines: vec![
            ("DIRECTION_FORWARD", String::new()),
            ("OUT_T", c_type(out)),
            ("X_T", c_type(x)),
            ("W_T", c_type(w)),
            vector(width),
        ],
        params: &[Out, Out, In, In, F32, U32, U32, U32],
        threads: THREADS,
    }
}

/// Its gradient.
pub fn rmsnorm_backward(dx: DType, dout: DType, x: DType, w: DType, width: usize) -> Kernel {
    Kernel {
        source: compile::RMSNORM,
        entry: "rmsnorm_backward",
        defines: vec![
            ("DIRECTION_BACKWARD", String::new()),
            ("DX_T", c_type(dx)),
            ("DOUT_T", c_type(dout)),
            ("X_T", c_type(x)),
            ("W_T", c_type(w)),
            vector(width),
        ],
        params: &[Out, Out, In, In, In, In, U32, U32, U32, U32, U32],
        threads: THREADS,
    }
}

/// The sum of its partial sums for `dw`; in the same module.
pub fn rmsnorm_dw(backward: &Kernel) -> Kernel {
    Kernel { entry: "rmsnorm_dw", params: &[Out, In, U32, U32], ..backward.clone() }
}

/// Product on tensor cores.
pub fn matmul(tile: Tile, op: MatMul, a: DType, b: DType, aligned: bool) -> Kernel {
    let flag = |on: bool| if on { "1" } else { "0" }.to_string();
    let ((block_m, block_n), (warps_m, warps_n)) = (tile.block(), tile.warps());
    let (a_k_major, b_k_major) = k_major(op);
    Kernel {
        source: compile::MATMUL,
        entry: "matmul",
        defines: vec![
            ("A_T", c_type(a)),
            ("B_T", c_type(b)),
            ("A_K_MAJOR", flag(a_k_major)),
            ("B_K_MAJOR", flag(b_k_major)),
            ("BLOCK_M", block_m.to_string()),
            ("BLOCK_N", block_n.to_string()),
            ("WARPS_M", warps_m.to_string()),
            ("WARPS_N", warps_n.to_string()),
            ("STAGES", Tile::STAGES.to_string()),
            ("ALIGNED", flag(aligned)),
        ],
        params: &[Out, In, In, U32, U32, U32, U32, U32, F32, U32, U32],
        threads: tile.threads(),
    }
}

/// Product of two f32 operands.
pub fn matmul_f32() -> Kernel {
    Kernel {
        source: compile::MATMUL_F32,
        entry: "matmul_f32",
        defines: Vec::new(),
        params: &[Out, In, In, U32, U32, U32, U64, U64, U64, U64, F32, U32, U32],
        threads: 256,
    }
}

/// A kernel with the dynamic shared memory of its largest launch.
pub type Configuration = (Kernel, usize);

/// Every configuration that an architecture (major · 10 + minor) may be asked to run.
pub fn all(cc: u32) -> Vec<Configuration> {
    const TYPES: [DType; 2] = [DType::F32, DType::Bf16];
    const OPS: [MatMul; 3] = [MatMul::NT, MatMul::NN, MatMul::TN];
    let mut kernels = vec![(cast(DType::F32, DType::Bf16), 0), (cast(DType::Bf16, DType::F32), 0), (matmul_f32(), 0)];
    for op in OPS {
        for &tile in Tile::of_arch(cc) {
            kernels.push((matmul(tile, op, DType::Bf16, DType::Bf16, true), tile.shared()));
        }
        let small = Tile::Small;
        kernels.push((matmul(small, op, DType::Bf16, DType::Bf16, false), small.shared()));
        for aligned in [true, false] {
            for (a, b) in [(DType::F32, DType::Bf16), (DType::Bf16, DType::F32)] {
                kernels.push((matmul(small, op, a, b, aligned), small.shared()));
            }
        }
    }
    for x in TYPES {
        for w in TYPES {
            for out in TYPES {
                for width in [8, 1] {
                    kernels.push((rmsnorm_forward(out, x, w, width), 0));
                    for dx in TYPES {
                        let backward = rmsnorm_backward(dx, out, x, w, width);
                        kernels.push((rmsnorm_dw(&backward), 0));
                        // One row of f32 sums of the widest model in use: 16,384.
                        kernels.push((backward, 16_384 * 4));
                    }
                }
            }
        }
    }
    kernels
}
