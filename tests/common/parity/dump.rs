//! Writes our tensors under the names of the recorded ones.

use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use ringtune::error::{Error, Result};
use ringtune::files::write_bytes;

/// Tensors to be written to one safetensors file.
#[derive(Default)]
pub struct Dump {
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Dump {
    /// Adds f32 values.
    pub fn f32(&mut self, name: impl Into<String>, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensors.push((name.into(), Dtype::F32, shape.to_vec(), bytes));
    }

    /// Adds i64 values.
    pub fn i64(&mut self, name: impl Into<String>, shape: &[usize], values: &[i64]) {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensors.push((name.into(), Dtype::I64, shape.to_vec(), bytes));
    }

    /// Writes the file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let fail = |e: safetensors::SafeTensorError| Error::new(format!("{}: {e}", path.display()));
        let mut views = Vec::new();
        for (name, dtype, shape, bytes) in &self.tensors {
            views.push((name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).map_err(fail)?));
        }
        write_bytes(path, &safetensors::serialize(views, None).map_err(fail)?)
    }
}
