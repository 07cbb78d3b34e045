//! What a launch did, in numbers, and the line of JSON that `VGPU_TRACE` asks for.

use super::Class;

/// Names of the classes of instructions in the order of [`Class`], as the trace gives them.
pub const CLASS_NAMES: [&str; 9] =
    ["integer", "float", "convert", "memory", "atomic", "control", "barrier", "warp", "tensor"];

/// What a launch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Warp instructions by [`super::Class`].
    pub instructions: [u64; 9],
    /// Lane instructions.
    pub lanes: u64,
    /// Floating-point operations of matrix instructions.
    pub tensor_flops: u64,
    /// Warp requests to global memory.
    pub global_requests: u64,
    /// 32-byte sectors of these requests.
    pub global_sectors: u64,
    /// Bytes that lanes read from global memory (asynchronous copies and atomics included).
    pub global_read: u64,
    /// Bytes that lanes wrote to global memory (atomics included).
    pub global_written: u64,
    /// Passes over shared memory.
    pub shared_wavefronts: u64,
    /// Passes more than a conflict-free access needs.
    pub bank_conflicts: u64,
    /// Barriers, per warp.
    pub barriers: u64,
    /// Branches at which the lanes of a warp went both ways.
    pub divergent_branches: u64,
}

impl Counters {
    pub(super) fn add(&mut self, o: &Counters) {
        for (a, b) in self.instructions.iter_mut().zip(o.instructions) {
            *a += b;
        }
        self.lanes += o.lanes;
        self.tensor_flops += o.tensor_flops;
        self.global_requests += o.global_requests;
        self.global_sectors += o.global_sectors;
        self.global_read += o.global_read;
        self.global_written += o.global_written;
        self.shared_wavefronts += o.shared_wavefronts;
        self.bank_conflicts += o.bank_conflicts;
        self.barriers += o.barriers;
        self.divergent_branches += o.divergent_branches;
    }

    /// Warp instructions of a class.
    pub fn class(&self, class: Class) -> u64 {
        self.instructions[class as usize]
    }

    /// Sectors of an average request; 4 for a coalesced request of 32 words.
    pub fn sectors_per_request(&self) -> f64 {
        self.global_sectors as f64 / (self.global_requests as f64).max(1.0)
    }

    /// One JSON object, without a line end: `head` (its fields, already JSON) and then the counters under stable names.
    pub(crate) fn json(&self, head: &str) -> String {
        let classes: Vec<String> =
            CLASS_NAMES.iter().zip(self.instructions).map(|(name, n)| format!("\"{name}\":{n}")).collect();
        format!(
            "{{{head},\"warp_instructions\":{},\"instructions\":{{{}}},\"lane_instructions\":{},\"tensor_flops\":{},\
             \"global_requests\":{},\"global_sectors\":{},\"sectors_per_request\":{:.3},\"global_bytes_read\":{},\
             \"global_bytes_written\":{},\"shared_wavefronts\":{},\"bank_conflicts\":{},\"barriers\":{},\
             \"divergent_branches\":{}}}",
            self.instructions.iter().sum::<u64>(),
            classes.join(","),
            self.lanes,
            self.tensor_flops,
            self.global_requests,
            self.global_sectors,
            self.sectors_per_request(),
            self.global_read,
            self.global_written,
            self.shared_wavefronts,
            self.bank_conflicts,
            self.barriers,
            self.divergent_branches,
        )
    }
}
