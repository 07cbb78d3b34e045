//! Products of matrices: which kernel and tile, and its launch. The kernels are `kernels/matmul.cu` and `kernels/matmul_f32.cu`.

use super::context::Cuda;
use super::kernels;
use super::launch::Launch;
use super::tiles::{Tile, k_major};
use crate::backend::{MatMul, Write};
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

impl Cuda {
    /// [`crate::backend::Products::matmul`] with a given tile instead of the one that [`Tile::choose`] takes, for tests and benches.
    /// The tile has no effect where both operands are f32.
    ///
    /// # Errors
    /// If the device refuses the launch.
    ///
    /// # Panics
    /// If the operands need [`Tile::Small`] and another is given.
    #[allow(clippy::too_many_arguments)]
    pub fn matmul_with(
        &self,
        tile: Option<Tile>,
        c: &mut Tensor<Self>,
        a: &Tensor<Self>,
        b: &Tensor<Self>,
        op: MatMul,
        alpha: f32,
        write: Write,
    ) -> Result<()> {
        let ((ar, ac), (br, bc)) = (a.shape(), b.shape());
        let (m, k, n, kb) = match op {
            MatMul::NT => (ar, ac, br, bc),
            MatMul::NN => (ar, ac, bc, br),
            MatMul::TN => (ac, ar, bc, br),
        };
        assert!(
            k == kb && c.shape() == (m, n),
            "matmul {op:?}: C {:?}, A {:?}, B {:?}",
            c.shape(),
            a.shape(),
            b.shape()
        );
        if m == 0 || n == 0 {
            return Ok(());
        }
        if k == 0 {
            return match write {
                Write::Set => self.fill_zero(c),
                Write::Add => Ok(()),
            };
        }
        let (c_is_bf16, add) = (c.dtype() == DType::Bf16, write == Write::Add);
        let (a_k_major, b_k_major) = k_major(op);
        if a.dtype() == DType::F32 && b.dtype() == DType::F32 {
            let strides = |k_major: bool, cols: usize| if k_major { (cols, 1) } else { (1, cols) };
            let ((a_major, a_k), (b_major, b_k)) = (strides(a_k_major, ac), strides(b_k_major, bc));
            let kernel = kernels::matmul_f32();
            let launch = Launch::new(self, &kernel, m.div_ceil(64) * n.div_ceil(64), 0).write(c).read(a).read(b);
            let launch = launch.u32(m).u32(n).u32(k).u64(a_major).u64(a_k).u64(b_major).u64(b_k);
            return launch.f32(alpha).flag(c_is_bf16).flag(add).run();
        }
        // Rows that start at multiples of 16 bytes; buffers always do.
        let aligned = ac.is_multiple_of(8) && bc.is_multiple_of(8);
        let plain = aligned && a.dtype() == DType::Bf16 && b.dtype() == DType::Bf16;
        let device = self.properties();
        let tile = tile.unwrap_or_else(|| Tile::choose(m, n, plain, device.cc, device.sm_count, device.shared_limit));
        assert!(plain || tile == Tile::Small, "matmul: {tile:?} takes aligned bf16 alone");
        let (block_m, block_n) = tile.block();
        // Offsets inside a tile are 32 bits wide in the kernel.
        assert!(ac.max(bc) < (1 << 32) / 256, "matmul: rows of {} elements are too long", ac.max(bc));
        let kernel = kernels::matmul(tile, op, a.dtype(), b.dtype(), aligned);
        let blocks = m.div_ceil(block_m) * n.div_ceil(block_n);
        let launch = Launch::new(self, &kernel, blocks, tile.shared()).write(c).read(a).read(b);
        let launch = launch.u32(m).u32(n).u32(k).u32(ac).u32(bc);
        launch.f32(alpha).flag(c_is_bf16).flag(add).run()
    }
}
