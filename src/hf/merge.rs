//! Merging an adapter into its base: `W + s·B·A` in f32 and one rounding, when the file is written.

use rayon::prelude::*;

use super::peft::Adapter;
use super::{HostTensor, InFile, Pieces, SaveDType, TensorSource};
use crate::error::Result;
use crate::model::config::ModelConfig;
use crate::model::weights::{Kind, Part, Place};

/// `w += scale · B A`, sums over the rank in order, in f32: `w` (out, in), `a` (r, in), `b` (out, r).
///
/// # Panics
/// If the shapes disagree.
pub fn add_update(w: &mut HostTensor, a: &HostTensor, b: &HostTensor, scale: f32) {
    assert_eq!((w.rows, w.cols, b.cols), (b.rows, a.cols, a.rows), "merge: shapes of W, A and B");
    let (cols, r) = (w.cols, a.rows);
    w.data.par_chunks_mut(cols).zip(b.data.par_chunks(r)).for_each(|(row, b)| {
        let mut delta = vec![0.0f32; cols];
        for (k, &bk) in b.iter().enumerate() {
            delta.iter_mut().zip(a.row(k)).for_each(|(d, &x)| *d += bk * x);
        }
        row.iter_mut().zip(&delta).for_each(|(w, &d)| *w += scale * d);
    });
}

/// A base model with the vocabulary an adapter brings, low-rank updates not applied: what base + adapter runs on.
pub struct Adapted<'a> {
    base: &'a dyn TensorSource,
    adapter: &'a Adapter,
    config: ModelConfig,
}

impl<'a> Adapted<'a> {
    /// Checks that the adapter fits the base.
    ///
    /// # Errors
    /// As [`Adapter::fit`].
    pub fn new(base: &'a dyn TensorSource, adapter: &'a Adapter) -> Result<Self> {
        let config = adapter.fit(base.config())?;
        Ok(Self { base, adapter, config })
    }
}

impl TensorSource for Adapted<'_> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn load(&self, at: Place) -> Result<HostTensor> {
        if at.kind() == Kind::Vocabulary
            && let Some(full) = self.adapter.full(at)?
        {
            return Ok(full);
        }
        // The head of a tied base that the adapter unties is the base's embedding.
        let tied = at == Place::Head && self.base.config().tied;
        self.base.load(if tied { Place::Embed } else { at })
    }

    fn pieces(&self, at: Place) -> Result<Option<Box<dyn Pieces + '_>>> {
        if at.kind() == Kind::Vocabulary { Ok(None) } else { self.base.pieces(at) }
    }

    fn in_file(&self, at: Place) -> Result<Option<InFile>> {
        if at.kind() == Kind::Vocabulary { Ok(None) } else { self.base.in_file(at) }
    }
}

/// The merged model.
pub struct Merged<'a> {
    adapted: Adapted<'a>,
    /// The type that its weights are rounded to.
    rounded: Option<SaveDType>,
}

impl<'a> Merged<'a> {
    /// Checks that the adapter fits the base.
    ///
    /// # Errors
    /// As [`Adapter::fit`].
    pub fn new(base: &'a dyn TensorSource, adapter: &'a Adapter) -> Result<Self> {
        Ok(Self { adapted: Adapted::new(base, adapter)?, rounded: None })
    }

    /// With weights as a file of this type has them.
    #[must_use]
    pub fn rounded(self, dtype: SaveDType) -> Self {
        Self { rounded: Some(dtype), ..self }
    }
}

impl TensorSource for Merged<'_> {
    fn config(&self) -> &ModelConfig {
        &self.adapted.config
    }

    fn load(&self, at: Place) -> Result<HostTensor> {
        let mut w = self.adapted.load(at)?;
        if let Place::Layer(i, Part::Matrix(product)) = at
            && let Some((a, b)) = self.adapted.adapter.lora(i, product)?
        {
            add_update(&mut w, &a, &b, self.adapted.adapter.config.lora.scale() as f32);
            w.check_finite(&format!("merged {at}"))?;
        }
        if let Some(dtype) = self.rounded {
            w.data.iter_mut().for_each(|x| *x = dtype.round(*x));
        }
        Ok(w)
    }
}
