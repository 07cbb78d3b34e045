//! Products of matrices: the kernels of `kernels/matmul.cu` and `kernels/matmul_f32.cu`, which of them runs, and its launch.

use super::compile::{Defines, Source, Value, source};
use super::device::Cuda;
use super::kernels::Param::{F32, In, Out, U32, U64};
use super::kernels::{Configuration, Kernel, c_type};
use super::launch::Launch;
use super::matmul_sm90::{self, Columns};
use super::operands::Product;
use super::tiles::{MOST_ACROSS, Tile, k_major};
use crate::backend::{MatMul, Write};
use crate::error::{Error, Result};
use crate::tensor::{DType, Device, Tensor};

/// The source of products on tensor cores.
pub const SOURCE: Source = source!("kernels/matmul.cu");
/// The source of products of two f32 operands.
pub const SOURCE_F32: Source = source!("kernels/matmul_f32.cu");

/// Product on tensor cores.
pub fn kernel(tile: Tile, op: MatMul, a: DType, b: DType, aligned: bool) -> Kernel {
    let flag = |on: bool| Value::Number(usize::from(on));
    let ((block_m, block_n), (warps_m, warps_n)) = (tile.block(), tile.warps());
    let (a_k_major, b_k_major) = k_major(op);
    Kernel {
        source: SOURCE,
        entry: "matmul",
        defines: Defines::new(&[
            ("A_T", c_type(a)),
            ("B_T", c_type(b)),
            ("A_K_MAJOR", flag(a_k_major)),
            ("B_K_MAJOR", flag(b_k_major)),
            ("BLOCK_M", Value::Number(block_m)),
            ("BLOCK_N", Value::Number(block_n)),
            ("WARPS_M", Value::Number(warps_m)),
            ("WARPS_N", Value::Number(warps_n)),
            ("STAGES", Value::Number(Tile::STAGES)),
            ("ALIGNED", flag(aligned)),
        ]),
        params: &[Out, In, In, U32, U32, U32, U32, U32, F32, U32, U32],
        threads: tile.threads(),
    }
}

/// Product of two f32 operands.
pub fn kernel_f32() -> Kernel {
    Kernel {
        source: SOURCE_F32,
        entry: "matmul_f32",
        defines: Defines::new(&[]),
        params: &[Out, In, In, U32, U32, U32, U64, U64, U64, U64, F32, U32, U32],
        threads: 256,
    }
}

/// Every configuration that an architecture (major · 10 + minor) may be asked to run.
pub fn all(cc: u32) -> Vec<Configuration> {
    let mut all = vec![(kernel_f32(), 0)];
    for op in [MatMul::NT, MatMul::NN, MatMul::TN] {
        for &tile in Tile::of_arch(cc) {
            all.push((kernel(tile, op, DType::Bf16, DType::Bf16, true), tile.shared()));
        }
        let small = Tile::Small;
        all.push((kernel(small, op, DType::Bf16, DType::Bf16, false), small.shared()));
        for aligned in [true, false] {
            for (a, b) in [(DType::F32, DType::Bf16), (DType::Bf16, DType::F32)] {
                all.push((kernel(small, op, a, b, aligned), small.shared()));
            }
        }
    }
    all
}

pub(super) fn matmul(
    dev: &Cuda,
    c: &mut Tensor<Cuda>,
    a: &Tensor<Cuda>,
    b: &Tensor<Cuda>,
    op: MatMul,
    alpha: f32,
    write: Write,
) -> Result<()> {
    dev.matmul_with(None, c, [a, b], op, alpha, write)
}

impl Cuda {
    /// [`crate::backend::Backend::matmul`] with a given tile instead of the one that [`Tile::choose`] takes, for tests and benches.
    /// The tile has no effect where both operands are f32.
    ///
    /// # Errors
    /// If the device refuses the launch.
    ///
    /// # Panics
    /// If the operands need [`Tile::Small`] and another is given.
    pub fn matmul_with(
        &self,
        tile: Option<Tile>,
        c: &mut Tensor<Self>,
        operands: [&Tensor<Self>; 2],
        op: MatMul,
        alpha: f32,
        write: Write,
    ) -> Result<()> {
        let of = Product::whole(c, operands, op, alpha, write);
        if of.shape.2 == 0 && write == Write::Set {
            return self.fill_zero(c);
        }
        self.product(tile, c, of)
    }

    /// A product of parts of tensors, of at least one step of k where `c` is set.
    pub(super) fn product(&self, tile: Option<Tile>, c: &mut Tensor<Self>, of: Product<'_>) -> Result<()> {
        let Product { a, b, shape: (m, n, k), op, alpha, write } = of;
        if m == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        assert!(m * n <= c.capacity(), "matmul: {m} x {n} elements in a tensor of {:?}", c.shape());
        let (a_type, b_type) = (a.t.dtype(), b.t.dtype());
        let (c_is_bf16, add) = (c.dtype() == DType::Bf16, write == Write::Add);
        let (a_k_major, b_k_major) = k_major(op);
        if a_type == DType::F32 && b_type == DType::F32 {
            let strides = |k_major: bool, stride: usize| if k_major { (stride, 1) } else { (1, stride) };
            let ((a_major, a_k), (b_major, b_k)) = (strides(a_k_major, a.stride), strides(b_k_major, b.stride));
            let kernel = kernel_f32();
            let launch = Launch::new(self, &kernel, m.div_ceil(64) * n.div_ceil(64), 0).write(c);
            let launch = launch.read_from(a.t, a.at).read_from(b.t, b.at);
            let launch = launch.u32(m).u32(n).u32(k).u64(a_major).u64(a_k).u64(b_major).u64(b_k);
            return launch.f32(alpha).flag(c_is_bf16).flag(add).run();
        }
        let aligned = a.aligned() && b.aligned();
        let plain = aligned && a_type == DType::Bf16 && b_type == DType::Bf16;
        let device = self.properties();
        if tile.is_none() && plain && device.cc == matmul_sm90::CC {
            let cluster = self.cluster((op == MatMul::TN).then(|| m.div_ceil(matmul_sm90::BLOCK_M)));
            return matmul_sm90::product(self, Columns::choose(m, n, cluster, device.sm_count), cluster, c, of);
        }
        let tile = tile.unwrap_or_else(|| Tile::choose(m, n, plain, device.cc, device.sm_count, device.shared_limit));
        assert!(plain || tile == Tile::Small, "matmul: {tile:?} takes aligned bf16 alone");
        let (block_m, block_n) = tile.block();
        // Offsets inside a tile are 32 bits wide in the kernel.
        let longest = a.stride.max(b.stride);
        if longest > MOST_ACROSS {
            return Err(Error::new(format!(
                "cuda: a product of rows of {longest} elements, at most {MOST_ACROSS} are supported"
            )));
        }
        let kernel = kernel(tile, op, a_type, b_type, aligned);
        let blocks = m.div_ceil(block_m) * n.div_ceil(block_n);
        let launch = Launch::new(self, &kernel, blocks, tile.shared()).write(c);
        let launch = launch.read_from(a.t, a.at).read_from(b.t, b.at);
        let launch = launch.u32(m).u32(n).u32(k).u32(a.stride).u32(b.stride);
        launch.f32(alpha).flag(c_is_bf16).flag(add).run()
    }
}
