//! The chips that a device can pose as, and what `cuDeviceGetAttribute` says about them.
//!
//! Limits are those of the table "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide 12.9;
//! counts, clocks and caches are those of one board of each family, from its data sheet.

/// Figures of one chip.
#[derive(Debug)]
pub struct Chip {
    /// Compute capability.
    pub cc: (i32, i32),
    /// The board whose figures these are.
    pub board: &'static str,
    /// Multiprocessors.
    pub sms: i32,
    /// Shared memory of a multiprocessor in bytes.
    pub shared_per_sm: i32,
    /// Shared memory a block may opt in to, in bytes.
    pub shared_optin: i32,
    /// Threads resident on a multiprocessor.
    pub threads_per_sm: i32,
    /// Blocks resident on a multiprocessor.
    pub blocks_per_sm: i32,
    /// Core clock in kHz.
    pub clock_khz: i32,
    /// Memory clock in kHz.
    pub memory_khz: i32,
    /// Memory bus in bits.
    pub bus_bits: i32,
    /// L2 cache in bytes.
    pub l2_bytes: i32,
    /// Copy engines.
    pub copy_engines: i32,
    /// Blocks of a cluster without opting in to more; 0 where there are no clusters.
    pub cluster: i32,
    /// Ratio of single to double precision throughput.
    pub single_to_double: i32,
}

/// Shared memory of a block without opting in, in bytes.
pub const SHARED_DEFAULT: i32 = 48 << 10;
/// Shared memory that the driver keeps of each block, in bytes.
pub const SHARED_RESERVED: i32 = 1 << 10;
/// Registers of a multiprocessor, and the most that a block may have.
pub const REGISTERS: i32 = 64 << 10;
/// The most registers of a thread.
pub const REGISTERS_PER_THREAD: i32 = 255;
/// Constant memory in bytes.
pub const CONSTANT: i32 = 64 << 10;
/// Threads of a block.
pub const BLOCK_THREADS: u32 = 1024;

/// Every chip; the first is the default.
pub static CHIPS: [Chip; 5] = [
    Chip {
        cc: (8, 0),
        board: "A100-SXM4-80GB",
        sms: 108,
        shared_per_sm: 164 << 10,
        shared_optin: 163 << 10,
        threads_per_sm: 2048,
        blocks_per_sm: 32,
        clock_khz: 1_410_000,
        memory_khz: 1_593_000,
        bus_bits: 5120,
        l2_bytes: 40 << 20,
        copy_engines: 3,
        cluster: 0,
        single_to_double: 2,
    },
    Chip {
        cc: (8, 9),
        board: "RTX 4090",
        sms: 128,
        shared_per_sm: 100 << 10,
        shared_optin: 99 << 10,
        threads_per_sm: 1536,
        blocks_per_sm: 24,
        clock_khz: 2_520_000,
        memory_khz: 10_501_000,
        bus_bits: 384,
        l2_bytes: 72 << 20,
        copy_engines: 2,
        cluster: 0,
        single_to_double: 64,
    },
    Chip {
        cc: (9, 0),
        board: "H100 SXM5",
        sms: 132,
        shared_per_sm: 228 << 10,
        shared_optin: 227 << 10,
        threads_per_sm: 2048,
        blocks_per_sm: 32,
        clock_khz: 1_980_000,
        memory_khz: 2_619_000,
        bus_bits: 5120,
        l2_bytes: 50 << 20,
        copy_engines: 3,
        cluster: 8,
        single_to_double: 2,
    },
    Chip {
        cc: (10, 0),
        board: "B200",
        sms: 148,
        shared_per_sm: 228 << 10,
        shared_optin: 227 << 10,
        threads_per_sm: 2048,
        blocks_per_sm: 32,
        clock_khz: 1_965_000,
        memory_khz: 3_996_000,
        bus_bits: 8192,
        l2_bytes: 126 << 20,
        copy_engines: 4,
        cluster: 8,
        single_to_double: 2,
    },
    Chip {
        cc: (12, 0),
        board: "RTX 5090",
        sms: 170,
        shared_per_sm: 100 << 10,
        shared_optin: 99 << 10,
        threads_per_sm: 1536,
        blocks_per_sm: 24,
        clock_khz: 2_407_000,
        memory_khz: 14_001_000,
        bus_bits: 512,
        l2_bytes: 96 << 20,
        copy_engines: 2,
        cluster: 8,
        single_to_double: 64,
    },
];

impl Chip {
    /// By compute capability as `VGPU_CC` gives it.
    pub fn by_name(name: &str) -> Option<&'static Chip> {
        CHIPS.iter().find(|c| format!("{}.{}", c.cc.0, c.cc.1) == name.trim())
    }

    /// `major * 10 + minor`, as in `sm_80`.
    pub fn sm(&self) -> i32 {
        self.cc.0 * 10 + self.cc.1
    }

    /// A `CUdevice_attribute`; `None` for a number that cuda.h 12.9 does not define.
    pub fn attribute(&self, number: i32, ordinal: i32) -> Option<i32> {
        let hopper = i32::from(self.cc.0 >= 9);
        Some(match number {
            // Threads of a block, block dimensions, grid dimensions.
            1..=3 => BLOCK_THREADS as i32,
            4 => 64,
            5 => i32::MAX,
            6 | 7 => 65535,
            8 => SHARED_DEFAULT,
            9 => CONSTANT,
            10 => 32,
            11 => i32::MAX,
            12 | 82 => REGISTERS,
            13 => self.clock_khz,
            14 | 30 => 512,
            // Copies overlap with kernels.
            15 => 1,
            16 => self.sms,
            // No run time limit of a display, not integrated.
            17 | 18 => 0,
            // Kernels do not reach host memory.
            19 => 0,
            31 | 41 => 1,
            20 | 32 | 34 | 50 => 0,
            33 => ordinal + 1,
            35 => 0,
            36 => self.memory_khz,
            37 => self.bus_bits,
            38 => self.l2_bytes,
            39 => self.threads_per_sm,
            40 => self.copy_engines,
            // Textures and surfaces are not offered: every width is zero.
            21..=29 | 42..=49 | 51..=74 | 77 => 0,
            75 => self.cc.0,
            76 => self.cc.1,
            // Stream priorities; caches of global and local memory.
            78..=80 => 1,
            81 => self.shared_per_sm,
            // No managed memory.
            83 => 0,
            84 | 86 => 0,
            85 => ordinal,
            87 => self.single_to_double,
            88 | 89 | 91..=94 | 96 | 98 | 100 | 101 => 0,
            90 => 1,
            95 => 1,
            97 => self.shared_optin,
            99 => 1,
            102..=105 | 107 | 110 | 112 | 114 => 0,
            106 => self.blocks_per_sm,
            108 | 109 => 0,
            111 => SHARED_RESERVED,
            113 => 0,
            115 => 1,
            116..=119 => 0,
            120 | 127 => hopper,
            121..=126 | 128 => 0,
            129 => 1,
            130 | 132 | 133 | 135..=143 => 0,
            131 | 134 => -1,
            _ => return None,
        })
    }
}
