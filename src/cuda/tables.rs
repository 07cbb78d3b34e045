//! Tables of addresses in device memory, for kernels that go through many tensors in one launch.

use std::sync::MutexGuard;

use super::device::{Cuda, Kept, Table};
use super::locked;
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

/// A table while an operation is being queued.
pub(super) struct TableGuard<'a>(MutexGuard<'a, Option<Kept>>);

impl TableGuard<'_> {
    /// Its words, as pairs of i32.
    pub fn tensor(&self) -> &Tensor<Cuda> {
        &self.0.as_ref().expect("made when the guard was").tensor
    }
}

impl Cuda {
    /// The table of these words in device memory.
    pub(super) fn table(&self, which: Table, words: Vec<u64>) -> Result<TableGuard<'_>> {
        let mut kept = locked(&self.tables[which as usize]);
        if kept.as_ref().is_none_or(|k| k.words != words) {
            let mut tensor = self.alloc(1, 2 * words.len(), DType::I32)?;
            self.upload_i32(&mut tensor, bytemuck::cast_slice(&words))?;
            *kept = Some(Kept { words, tensor });
        }
        Ok(TableGuard(kept))
    }
}
