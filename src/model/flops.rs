//! Floating-point operations of the model's arithmetic, for throughput columns.

use crate::batch::MicroBatch;
use crate::model::config::ModelConfig;

/// What has to be computed for a token, without recomputation and padding: a multiply-add counts as two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FlopCount {
    /// Weights of all products but the head.
    linear_weights: f64,
    /// Weights of the low-rank updates.
    lora_weights: f64,
    /// Weights of the head.
    head_weights: f64,
    /// Score and value products of one query-key pair over all layers, forward.
    per_pair: f64,
    /// Whether the gradients of the weights are computed (not with LoRA).
    full: bool,
}

impl FlopCount {
    /// Counts the products of a model; `lora_weights` is the number of low-rank weights, `None` in full training.
    pub fn new(c: &ModelConfig, lora_weights: Option<u64>) -> Self {
        let (hidden, q, kv) = (c.hidden_size as f64, c.q_dim() as f64, c.kv_dim() as f64);
        let layer = hidden * (2.0 * q + 2.0 * kv) + 3.0 * hidden * c.intermediate_size as f64;
        Self {
            linear_weights: layer * c.n_layers as f64,
            lora_weights: lora_weights.unwrap_or(0) as f64,
            head_weights: hidden * c.n_classes as f64,
            per_pair: 4.0 * q * c.n_layers as f64,
            full: lora_weights.is_none(),
        }
    }

    /// Forward and backward of one micro-batch: attention over the pairs its documents have, the head over supervised rows.
    pub fn step(&self, b: &MicroBatch) -> f64 {
        let pairs: f64 =
            b.doc_start.iter().enumerate().map(|(i, &start)| (i as i64 - i64::from(start) + 1) as f64).sum();
        self.total(b.tokens.len() as f64, b.n_valid as f64, pairs)
    }

    /// Forward and backward of one document: as [`FlopCount::step`], without its tokens.
    pub fn document(&self, len: u32, n_targets: u32) -> f64 {
        let n = f64::from(len);
        self.total(n, f64::from(n_targets), n * (n + 1.0) / 2.0)
    }

    fn total(&self, tokens: f64, targets: f64, pairs: f64) -> f64 {
        // Forward, gradient of the input, and where weights are trained the gradient of the weight: 2 each.
        let per_weight = if self.full { 6.0 } else { 4.0 };
        tokens * (per_weight * self.linear_weights + 6.0 * self.lora_weights)
            + targets * per_weight * self.head_weights
            + 3.0 * self.per_pair * pairs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Heads;
    use crate::model::config::{Architecture, AttentionBias, RopeScaling};

    /// The tiny model of the speed figures: 80 MFLOP a token in full training, 57.5 with LoRA of rank 16 on seven linears.
    #[test]
    fn tiny_model() {
        let c = ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: 32_000,
            n_classes: 32_000,
            hidden_size: 256,
            intermediate_size: 688,
            n_layers: 6,
            heads: Heads { n_query: 8, n_kv: 4, head_dim: 32 },
            max_position: 512,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::Default,
            tied: true,
            attention_bias: AttentionBias::None,
            mlp_bias: false,
            qk_norm: false,
            sliding_window: None,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            pad_token_id: None,
        };
        let n = 512;
        let batch =
            MicroBatch { tokens: vec![5; n], targets: vec![5; n], doc_start: vec![0; n], n_valid: n, samples: vec![0] };
        let per_layer = 16 * (256 + 256) * 2 + 16 * (256 + 128) * 2 + 16 * (256 + 688) * 3;
        let full = FlopCount::new(&c, None).step(&batch) / n as f64;
        let lora = FlopCount::new(&c, Some(6 * per_layer)).step(&batch) / n as f64;
        // Causal attention alone: 12 · L · q_dim · (n + 1) / 2.
        let attention = 12.0 * 6.0 * 256.0 * 513.0 / 2.0;
        assert_eq!(full, 6.0 * (6.0 * 724_992.0 + 8_192_000.0) + attention);
        assert!((full / 80e6 - 1.0).abs() < 0.02, "{full}");
        assert!((lora / 57.5e6 - 1.0).abs() < 0.02, "{lora}");
        let count = FlopCount::new(&c, None);
        assert_eq!(count.document(n as u32, n as u32), count.step(&batch));
    }
}
