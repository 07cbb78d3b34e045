//! What the steps train, and the memory that they are estimated to take.

use super::case::Setup;
use super::options::Options;
use crate::commands::device;
use crate::error::Result;
use crate::settings::TrainSettings;
use crate::train::memory::{Demand, estimate};
use crate::train::setup::lora_spec;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Every weight.
    Full,
    /// Low-rank updates of rank 16 on the seven products, with dropout 0.05.
    Lora,
}

impl What {
    /// Both.
    pub const ALL: [What; 2] = [What::Full, What::Lora];

    /// Its name, which has the words of `--only`.
    pub fn name(self) -> &'static str {
        match self {
            What::Full => "full",
            What::Lora => "LoRA r 16, dropout 0.05",
        }
    }

    /// Settings of a training of it.
    pub fn settings(self, o: &Options) -> TrainSettings {
        let s = TrainSettings {
            dtype: o.dtype,
            recompute: o.recompute,
            micro_batch_size: 1,
            eval_batch_size: 1,
            grad_accum: o.grad_accum,
            ..Default::default()
        };
        TrainSettings { lora: s.lora.clone().filter(|_| self == What::Lora), ..s }
    }
}

/// Bytes on the device that a case is estimated to take, as `check` says it.
///
/// # Errors
/// None for the cases there are.
pub fn estimated(what: What, o: &Options, setup: &Setup, own_memory: bool) -> Result<u64> {
    let settings = what.settings(o);
    let lora = lora_spec(&settings)?;
    let footprint = device::footprint(own_memory, setup.config.n_classes);
    let demand = Demand {
        config: &setup.config,
        settings: &settings,
        lora: lora.as_ref(),
        new_rows: None,
        max_seq_len: setup.tokens,
        saves: false,
        device: footprint,
    };
    Ok(estimate(&demand).iter().map(|c| c.bytes).sum())
}
