//! What a device says about itself and its work to those who measure it: `ringtune bench`.

pub mod sheets;

/// What a device is, as far as a measurement depends on it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Nature {
    /// Whether it is emulated: no time of its means anything, but its counters do.
    pub emulated: bool,
    /// Bytes of its last cache before the memory; 0 where it is not known.
    pub cache: u64,
    /// Version of its driver, where it has one.
    pub driver: Option<String>,
    /// Floating-point operations per second for bf16 operands and f32 sums, from the maker's data sheet; of an emulated device
    /// that of the device it poses as. `None`: not known.
    pub sheet_flops: Option<f64>,
    /// Bytes per second of its memory, from its clock and width.
    pub sheet_bandwidth: Option<f64>,
}

/// What a device was asked to do since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Kernels launched.
    pub launches: u64,
    /// Times that the host waited for the device.
    pub waits: u64,
    /// What the launches did, where an emulator counts it.
    pub counted: Option<Counted>,
}

impl Tally {
    /// What came to it since `before`.
    #[must_use]
    pub fn since(self, before: Tally) -> Tally {
        let counted = self.counted.zip(before.counted).map(|(now, then)| now.since(then));
        Tally { launches: self.launches - before.launches, waits: self.waits - before.waits, counted }
    }
}

/// Counters of an emulator, summed over launches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Instructions of warps.
    pub instructions: u64,
    /// Floating-point operations of matrix instructions.
    pub tensor_flops: u64,
    /// Bytes of the 32-byte sectors that requests to global memory touched; caches are not modelled.
    pub requested: u64,
    /// Passes over shared memory.
    pub shared_passes: u64,
    /// Of them, more than an access without conflicts needs.
    pub bank_conflicts: u64,
}

impl Counted {
    fn since(self, before: Counted) -> Counted {
        Counted {
            instructions: self.instructions - before.instructions,
            tensor_flops: self.tensor_flops - before.tensor_flops,
            requested: self.requested - before.requested,
            shared_passes: self.shared_passes - before.shared_passes,
            bank_conflicts: self.bank_conflicts - before.bank_conflicts,
        }
    }
}

/// Memory that is in use, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// Now.
    pub now: u64,
    /// At most, since the peak was last forgotten.
    pub peak: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_of_tallies_is_what_came_in_between() {
        let at = |n: u64| Tally {
            launches: n,
            waits: 2 * n,
            counted: Some(Counted {
                instructions: 3 * n,
                tensor_flops: 4 * n,
                requested: 5 * n,
                shared_passes: 6 * n,
                bank_conflicts: 7 * n,
            }),
        };
        assert_eq!(at(7).since(at(5)), at(2));
        assert_eq!(Tally { counted: None, ..at(7) }.since(at(5)), Tally { counted: None, ..at(2) });
    }
}
