//! Matrices as the driver describes them for copies of boxes into shared memory (TMA, from Hopper on).

use cudarc::driver::DeviceRepr;
use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};

use super::error::DriverResult;
use crate::error::{Error, Result};

/// A matrix of bf16 in memory and the box that a copy takes of it: 64 elements of each of some rows, swizzled by 128 bytes. What lies
/// beyond the matrix is copied as zeros.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(super) struct TensorMap(CUtensorMap);

// SAFETY: kernels take these 128 bytes by value.
unsafe impl DeviceRepr for TensorMap {}

/// Elements of a row of a box: as wide as the swizzle.
const BOX_COLUMNS: u32 = 64;

/// Most rows and columns of a matrix. Copies name boxes by signed coordinates of 32 bits, and kernels by the row behind these where nothing
/// is to be copied.
const MOST: usize = 1 << 30;

impl TensorMap {
    /// In the place of a matrix that is not there, which a kernel does not copy from.
    pub fn absent() -> Self {
        Self(CUtensorMap { opaque: [0; 16] })
    }

    /// The map of `rows` x `cols` elements from an address on, rows `stride` elements apart, in boxes of `box_rows` rows. Address and
    /// stride are multiples of 16 bytes.
    ///
    /// # Errors
    /// If the matrix is larger than copies can name, or the driver refuses it.
    pub fn new(address: u64, (rows, cols): (usize, usize), stride: usize, box_rows: usize) -> Result<Self> {
        if rows.max(cols) > MOST {
            return Err(Error::new(format!(
                "cuda: tensor copies of a matrix of {rows} x {cols} elements: at most {MOST} rows and columns are supported"
            )));
        }
        let Self(mut map) = Self::absent();
        let (dims, strides) = ([cols as u64, rows as u64], [stride as u64 * 2]);
        let (box_dims, steps) = ([BOX_COLUMNS, box_rows as u32], [1, 1]);
        // SAFETY: every pointer is to as many numbers as two dimensions have; the address is of device memory, which this call does not
        // touch. The driver is one of CUDA 12 or later (`device_library::require`), which has this function.
        let code = unsafe {
            cuTensorMapEncodeTiled(
                &raw mut map,
                CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                address as *mut _,
                dims.as_ptr(),
                strides.as_ptr(),
                box_dims.as_ptr(),
                steps.as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        code.result().doing(|| {
            format!(
                "describing {rows} x {cols} elements, {stride} apart, in boxes of {box_rows} rows, for tensor copies"
            )
        })?;
        Ok(Self(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_that_copies_cannot_name_is_refused() {
        for shape in [(MOST + 1, 64), (64, MOST + 1)] {
            let e = TensorMap::new(0, shape, 64, 64).expect_err("too large").to_string();
            assert!(e.contains("1073741825") && e.contains("at most 1073741824 rows and columns"), "{e}");
        }
    }
}
