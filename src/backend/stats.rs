//! What a step leaves behind: its summed loss, right answers, the norm of the gradient, the factor that clips it, and whether all of
//! that is finite. On a device it stays there until [`Backend::figures`] asks, the one wait of a step.

use super::{Backend, expect_shape};
use crate::error::Result;
use crate::tensor::Tensor;

/// What a step left behind, on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Summed negative log-likelihood of each micro-batch, in the order they were added: ranks fold them in that of the step.
    pub nll: Vec<f64>,
    /// Targets that were the arg max, where it was asked for.
    pub correct: f64,
    /// Squared norm of the gradient before clipping.
    pub grad_norm2: f64,
}

impl Figures {
    /// Whether loss and gradient are; an update is made only then.
    pub fn finite(&self) -> bool {
        self.nll.iter().all(|nll| nll.is_finite()) && self.grad_norm2.is_finite()
    }
}

/// [`Backend::Stats`] of a backend whose memory is the host's.
#[derive(Clone, Debug, PartialEq)]
pub struct HostStats {
    /// Sums so far.
    pub figures: Figures,
    /// Factor on the gradient.
    pub clip: f64,
}

impl Default for HostStats {
    fn default() -> Self {
        Self { figures: Figures::default(), clip: 1.0 }
    }
}

impl HostStats {
    /// Adds the summed values of `loss` (N, 1) and `correct` (N, 1), each summed in f64 from the first to the last.
    ///
    /// # Errors
    /// If the device refuses the copy.
    pub fn add_loss<B: Backend>(&mut self, dev: &B, loss: &Tensor<B>, correct: Option<&Tensor<B>>) -> Result<()> {
        let sum = |name, t: &Tensor<B>| -> Result<f64> {
            expect_shape("add_loss", name, t, (loss.rows(), 1));
            let mut values = vec![0.0; t.len()];
            dev.download(&mut values, t)?;
            Ok(values.iter().map(|&v| f64::from(v)).sum())
        };
        self.figures.nll.push(sum("loss", loss)?);
        if let Some(correct) = correct {
            self.figures.correct += sum("correct", correct)?;
        }
        Ok(())
    }

    /// Adds the sums of squares of tensors of so many blocks each: a tensor's from its first block to its last, then the tensors in order.
    pub fn add_squares(&mut self, blocks: &[usize], sums: &[f64]) {
        let (mut rest, mut total) = (sums, 0.0);
        for &n in blocks {
            let (own, more) = rest.split_at(n);
            total += own.iter().sum::<f64>();
            rest = more;
        }
        self.figures.grad_norm2 += total;
    }

    /// The factor `min(1, max / (norm + 1e-6))`, as torch clips; 1 without a limit.
    pub fn set_clip(&mut self, max_norm: Option<f64>) {
        self.clip = max_norm.map_or(1.0, |max| (max / (self.figures.grad_norm2.sqrt() + 1e-6)).min(1.0));
    }
}
