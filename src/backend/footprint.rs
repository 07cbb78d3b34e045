//! What a device keeps in memory for a run, where devices differ: for a count before anything is loaded.

use crate::tensor::DType;

/// Devices choose among their kernels by numbers of rows in steps of so many, or not at all: those of a step choose alike.
pub const ROW_STEP: usize = 64;

/// A number of rows of each step up to `most`, the largest first.
pub fn row_counts(most: usize) -> impl Iterator<Item = usize> {
    (1..=most.div_ceil(ROW_STEP)).rev().map(move |step| (step * ROW_STEP).min(most))
}

/// Plain numbers of a kind of device; none of it needs the device to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Rows of logits that exist at once.
    pub logits_rows: usize,
    /// Whether their gradient stands beside them where products round it, not in their place.
    pub logits_gradient: bool,
    /// Words of 32 bits that the vectors of a micro-batch take for each token.
    pub batch_words: usize,
    /// Elements at whose multiples each gradient and each moment begins.
    pub block: usize,
    /// Where projections in bf16 make masks of dropout in registers if all widths and ranks are multiples of this, and so need no scratch
    /// for what was dropped. `None`: they never do.
    pub fused_multiple: Option<usize>,
    /// How weights in bf16 are kept for products in both directions. `None`: as they are.
    pub packed: Option<Packed>,
}

/// How a weight is kept in the form that products read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// It never changes, and products alone read it: its rows may go.
    Frozen,
    /// It never changes; others read its rows too.
    FrozenAndRead,
    /// It changes between steps. Its rows stay, and the form is made again by the first product after each change.
    Trained,
}

/// Panels of bf16 in which products read a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Columns of the product in a panel; the last one is filled up.
    pub columns: usize,
    /// Steps of the sum at whose multiples panels end.
    pub steps: usize,
}

impl Packed {
    /// Bytes that a weight (out, in) takes for both directions.
    pub fn bytes(&self, (out, wide): (usize, usize)) -> u64 {
        let form = |n: usize, k: usize| 2 * (n.next_multiple_of(self.columns) * k.next_multiple_of(self.steps)) as u64;
        form(out, wide) + form(wide, out)
    }
}

impl Footprint {
    /// Whether projections of these widths and ranks write down what dropout left: [`super::ProjectScratch::x`] and
    /// [`super::ProjectScratch::dx`].
    pub fn writes_dropped(&self, dtype: DType, widths: &[usize]) -> bool {
        let fused = |multiple: usize| dtype == DType::Bf16 && widths.iter().all(|w| w.is_multiple_of(multiple));
        !self.fused_multiple.is_some_and(fused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_of_rows_has_one() {
        assert_eq!(row_counts(130).collect::<Vec<_>>(), [130, 128, 64]);
        assert_eq!(row_counts(64).collect::<Vec<_>>(), [64]);
        assert_eq!(row_counts(1).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn what_is_fused_needs_no_scratch() {
        let fuses = Footprint {
            logits_rows: 1,
            logits_gradient: false,
            batch_words: 6,
            block: 1,
            fused_multiple: Some(8),
            packed: None,
        };
        assert!(!fuses.writes_dropped(DType::Bf16, &[64, 16]));
        assert!(fuses.writes_dropped(DType::F32, &[64, 16]));
        assert!(fuses.writes_dropped(DType::Bf16, &[64, 4]));
        assert!(Footprint { fused_multiple: None, ..fuses }.writes_dropped(DType::Bf16, &[64, 16]));
    }
}
