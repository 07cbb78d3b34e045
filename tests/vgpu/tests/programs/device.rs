//! A device for tests: memory, a module, launches whose arguments are Rust values.

use vgpu::{Checks, Config, Counters, Memory, Module};

/// Memory and one module.
pub struct Device {
    pub memory: Memory,
    module: Module,
}

/// A value that a kernel takes.
pub trait Arg {
    fn bytes(&self) -> Vec<u8>;
}

macro_rules! arg {
    ($($t:ty),*) => {$(
        impl Arg for $t {
            fn bytes(&self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
        }
    )*};
}
arg!(u64, i32, f32);

/// Orders of blocks and warps that every program has to bear: first to last, and two drawn ones.
pub const SEEDS: [Option<u64>; 3] = [None, Some(1), Some(2)];

impl Device {
    pub fn new(ptx: &str) -> Device {
        let mut memory = Memory::new();
        let module = Module::load(ptx, &mut memory).unwrap();
        Device { memory, module }
    }

    /// Memory that nobody has written.
    pub fn alloc(&mut self, bytes: usize) -> u64 {
        self.memory.alloc(bytes).unwrap()
    }

    fn upload(&mut self, bytes: Vec<u8>) -> u64 {
        let at = self.alloc(bytes.len());
        self.memory.write(at, &bytes).unwrap();
        at
    }

    pub fn floats(&mut self, v: &[f32]) -> u64 {
        self.upload(v.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    pub fn halves(&mut self, v: &[u16]) -> u64 {
        self.upload(v.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    pub fn ints(&mut self, v: &[i32]) -> u64 {
        self.upload(v.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    pub fn read(&self, at: u64, n: usize) -> Vec<f32> {
        let mut bytes = vec![0; n * 4];
        self.memory.read(at, &mut bytes).unwrap();
        bytes.chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
    }

    pub fn read_halves(&self, at: u64, n: usize) -> Vec<u16> {
        let mut bytes = vec![0; n * 2];
        self.memory.read(at, &mut bytes).unwrap();
        bytes.chunks(2).map(|c| u16::from_le_bytes(c.try_into().unwrap())).collect()
    }

    /// Runs a kernel; any fault fails the test.
    pub fn launch(&self, name: &str, shape: Config, args: &[&dyn Arg]) -> Counters {
        let bytes: Vec<Vec<u8>> = args.iter().map(|a| a.bytes()).collect();
        let slices: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
        let ran = self.module.launch(name, &shape, &slices, &self.memory);
        ran.unwrap_or_else(|e| panic!("{name} {:?}: {e}", shape.grid))
    }
}

/// A launch on two host threads with every check on.
pub fn shape(grid: [usize; 3], block: usize, dynamic_shared: usize, seed: Option<u64>) -> Config {
    Config {
        grid: grid.map(|x| x as u32),
        block: [block as u32, 1, 1],
        dynamic_shared,
        threads: 2,
        seed,
        checks: Checks { races: true },
        ..Config::default()
    }
}

/// Numbers in [-1, 1) from a linear congruential generator.
pub fn noise(n: usize, mut seed: u64) -> Vec<f32> {
    (0..n)
        .map(|_| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

/// The same as bf16, cut.
pub fn noise_halves(n: usize, seed: u64) -> Vec<u16> {
    noise(n, seed).into_iter().map(|x| (x.to_bits() >> 16) as u16).collect()
}

/// The value of a bf16.
pub fn value(x: u16) -> f64 {
    f64::from(f32::from_bits(u32::from(x) << 16))
}

/// Each result within its own bound; the first that is not is named.
#[track_caller]
pub fn close(what: &str, got: &[f32], want: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let (error, allowed) = ((f64::from(*g) - w).abs(), bound(i));
        assert!(error <= allowed, "{what}: element {i}: {g}, expected {w}: error {error:e}, allowed {allowed:e}");
    }
}
