//! Executes PTX on the CPU, warp by warp, checks every memory access and counts what a launch does.
//!
//! A [`Module`] is loaded from text into a [`Memory`]; [`Module::launch`] runs one of its kernels:
//!
//! ```
//! let mut memory = vgpu::Memory::new();
//! let text = ".version 8.0\n.target sm_80\n.address_size 64\n
//!   .visible .entry one(.param .u64 p) { .reg .b64 %rd<2>; ld.param.u64 %rd1, [p]; st.global.u32 [%rd1], 1; ret; }";
//! let module = vgpu::Module::load(text, &mut memory).unwrap();
//! let buffer = memory.alloc(4).unwrap();
//! let config = vgpu::Config { grid: [1, 1, 1], block: [1, 1, 1], ..Default::default() };
//! module.launch("one", &config, &[&buffer.to_le_bytes()], &memory).unwrap();
//! let mut out = [0; 4];
//! memory.read(buffer, &mut out).unwrap();
//! assert_eq!(u32::from_le_bytes(out), 1);
//! ```

pub mod error;
pub mod exec;
pub mod memory;
pub mod output;
pub mod ptx;
pub mod tensor_map;
mod trace;

use std::collections::BTreeMap;

pub use error::{Error, Fault, FaultKind, Result};
pub use exec::code::Build;
pub use exec::counters::Counters;
pub use exec::rounding::Products;
pub use memory::Memory;
pub use output::Output;

use exec::decode::{Program, Symbols, decode};
use ptx::{Init, Space};

/// Shape and limits of a launch.
#[derive(Clone, Debug)]
pub struct Config {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub dynamic_shared: usize,
    /// Host threads that run blocks.
    pub threads: usize,
    /// Warp instructions after which the watchdog stops the launch.
    pub budget: u64,
    /// Blocks of a cluster in x, y, z.
    pub cluster: [u32; 3],
    /// Whether all blocks run at the same time, as grids that wait for each other need.
    pub cooperative: bool,
    /// Most blocks that are resident at the same time, as on a device that holds no more; a launch whose blocks wait for one that
    /// therefore cannot start is a deadlock. `None`: more blocks join as long as all that run only wait.
    pub resident: Option<usize>,
    /// How `mma`, `wmma` and `wgmma` with f32 results round; `None` asks `VGPU_MMA`.
    pub products: Option<Products>,
    /// Seed of the order in which blocks and warps run; without one they run first to last.
    pub seed: Option<u64>,
    /// Checks beside those that are always on.
    pub checks: Checks,
    /// Where kernels print.
    pub output: Output,
}

/// Checks that slow a launch down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checks {
    /// Races between the warps of a block in shared memory, and between blocks in global memory.
    pub races: bool,
}

impl Checks {
    /// From `VGPU_CHECK`, names with commas between: `races`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name that is not known.
    pub fn from_env() -> Result<Checks> {
        let names = std::env::var("VGPU_CHECK").unwrap_or_default();
        let mut checks = Checks::default();
        for name in names.split(',').map(str::trim).filter(|n| !n.is_empty()) {
            match name {
                "races" => checks.races = true,
                _ => {
                    return Err(Error::Invalid(format!("VGPU_CHECK={names}: there is no check {name}; known: races")));
                }
            }
        }
        Ok(checks)
    }
}

/// An environment variable that holds a number.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.trim().parse().ok()
}

/// `VGPU_THREADS` and `VGPU_SEED` choose host threads and order where a launch says nothing.
impl Default for Config {
    fn default() -> Config {
        Config {
            grid: [1; 3],
            block: [32, 1, 1],
            dynamic_shared: 0,
            threads: number("VGPU_THREADS").map_or(1, |n| n as usize),
            budget: 1 << 34,
            cluster: [1; 3],
            cooperative: false,
            resident: None,
            products: None,
            seed: number("VGPU_SEED"),
            checks: Checks::default(),
            output: Output::default(),
        }
    }
}

/// A loaded module: its kernels are decoded, its variables allocated and initialised.
pub struct Module {
    programs: BTreeMap<String, Program>,
    globals: BTreeMap<String, (u64, usize)>,
}

impl Module {
    /// Parses and decodes `text` and allocates its global and constant variables.
    ///
    /// # Errors
    /// [`Error::Parse`] and [`Error::Unsupported`] with the line and the text.
    pub fn load(text: &str, memory: &mut Memory) -> Result<Module> {
        Module::load_for(Build::detect(), text, memory)
    }

    /// [`Module::load`] with a chosen build of the handlers; both give the same results.
    ///
    /// # Errors
    /// As [`Module::load`], and [`Error::Invalid`] when this processor does not support `build`.
    pub fn load_for(build: Build, text: &str, memory: &mut Memory) -> Result<Module> {
        if !build.supported() {
            return Err(Error::Invalid(format!("this processor does not support the build {build:?}")));
        }
        let module = ptx::parse(text)?;
        let (mut symbols, mut globals) = (Symbols::new(), BTreeMap::new());
        let placed = |s: Space| matches!(s, Space::Global | Space::Const);
        for v in module.vars.iter().filter(|v| placed(v.space) && v.size > 0) {
            let address = memory.alloc(v.size)?;
            symbols.insert(v.name.clone(), (v.space, address));
            globals.insert(v.name.clone(), (address, v.size));
        }
        for v in module.vars.iter().filter(|v| placed(v.space) && v.size > 0) {
            let mut bytes = vec![0; v.size];
            let n = v.ty.size();
            for (i, init) in v.init.iter().enumerate() {
                let address = |name: &String, offset: i64| match symbols.get(name) {
                    Some((_, a)) => Ok(a.wrapping_add(offset as u64)),
                    None => Err(Error::Invalid(format!("{} refers to the unknown symbol {name}", v.name))),
                };
                let bits = match init {
                    Init::Bits(x) => *x,
                    Init::Symbol(name, offset) => address(name, *offset)?,
                    Init::Masked(name, offset, mask) => {
                        (address(name, *offset)? & mask) >> mask.trailing_zeros().min(63)
                    }
                };
                bytes[i * n..(i + 1) * n].copy_from_slice(&bits.to_le_bytes()[..n.min(8)]);
            }
            // Variables without an initialiser start as zero, as the PTX text says.
            let address = globals[&v.name].0;
            memory.write(address, &bytes)?;
            if v.space == Space::Const {
                memory.set_read_only(address);
            }
        }
        let mut programs = BTreeMap::new();
        let calls = ptx::Calls::new(&module);
        for f in module.functions.iter().filter(|f| f.entry && f.defined) {
            programs.insert(f.name.clone(), decode(&calls.inline(f)?, &module.vars, &symbols, build)?);
        }
        Ok(Module { programs, globals })
    }

    /// Names of the kernels.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.programs.keys().map(String::as_str)
    }

    /// Address and size of a global or constant variable.
    pub fn global(&self, name: &str) -> Option<(u64, usize)> {
        self.globals.get(name).copied()
    }

    /// Address and size of every global or constant variable.
    pub fn variables(&self) -> impl Iterator<Item = (u64, usize)> {
        self.globals.values().copied()
    }

    /// A kernel by name.
    pub fn kernel(&self, name: &str) -> Result<Kernel<'_>> {
        let found = self.programs.get(name).map(|program| Kernel { program });
        found.ok_or_else(|| Error::Invalid(format!("no kernel {name} in the module")))
    }

    /// Looks a kernel up and launches it; see [`Kernel::launch`].
    pub fn launch(&self, name: &str, config: &Config, args: &[&[u8]], memory: &Memory) -> Result<Counters> {
        self.kernel(name)?.launch(config, args, memory)
    }
}

/// A kernel of a module.
#[derive(Clone, Copy)]
pub struct Kernel<'a> {
    program: &'a Program,
}

impl Kernel<'_> {
    /// Offset and size in bytes of each parameter.
    pub fn params(&self) -> &[(usize, usize)] {
        &self.program.params
    }

    /// Static shared memory in bytes.
    pub fn static_shared(&self) -> usize {
        self.program.static_shared
    }

    /// Local memory of a thread in bytes.
    pub fn local(&self) -> usize {
        self.program.local_size
    }

    /// Threads that `.maxntid` or `.reqntid` allow.
    pub fn max_threads(&self) -> Option<u32> {
        self.program.max_threads
    }

    /// What the directives of the kernel promise and demand.
    pub fn limits(&self) -> &ptx::Limits {
        &self.program.limits
    }

    /// 32-bit registers that a thread holds at once after registers that do not live together share one; 64-bit ones count twice.
    /// Constants and special registers, which machine code names in its instructions, do not count.
    pub fn registers(&self) -> usize {
        let p = self.program;
        let long = |i: &exec::decode::RowInit| matches!(i, exec::decode::RowInit::Long(_));
        let word = |i: &exec::decode::RowInit| !long(i) && !matches!(i, exec::decode::RowInit::Pred(_));
        let given = |f: &dyn Fn(&exec::decode::RowInit) -> bool| p.init.iter().filter(|(_, i)| f(i)).count();
        p.rows[0].saturating_sub(given(&word)) + 2 * p.rows[1].saturating_sub(given(&long))
    }

    /// Runs the kernel to its end. `args` holds the bytes of each parameter.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a shape or arguments that do not fit, [`Error::Fault`] for what the kernel did wrong.
    pub fn launch(&self, config: &Config, args: &[&[u8]], memory: &Memory) -> Result<Counters> {
        let p = self.program;
        let product = |v: [u32; 3]| v.iter().map(|x| u64::from(*x)).product::<u64>();
        let (blocks, threads) = (product(config.grid), product(config.block));
        let limit = u64::from(p.max_threads.unwrap_or(1024).min(1024));
        if threads == 0 || threads > limit || blocks == 0 || blocks > u64::from(u32::MAX) {
            let m = format!("grid {:?} of blocks {:?}: at most {limit} threads", config.grid, config.block);
            return Err(Error::Invalid(m));
        }
        if args.len() != p.params.len() {
            let m = format!("kernel {} has {} parameters, {} given", p.name, p.params.len(), args.len());
            return Err(Error::Invalid(m));
        }
        let mut bytes = vec![0; p.params.last().map_or(0, |(at, n)| at + n)];
        for (i, ((at, n), arg)) in p.params.iter().zip(args).enumerate() {
            if arg.len() != *n {
                let m = format!("parameter {i} of kernel {} has {n} bytes, {} given", p.name, arg.len());
                return Err(Error::Invalid(m));
            }
            bytes[*at..at + n].copy_from_slice(arg);
        }
        // A kernel compiled for clusters has their shape; a launch may repeat it.
        let cluster = match p.limits.cluster {
            Some(c) if config.cluster != [1; 3] && config.cluster != c => {
                let m = format!("kernel {} is for clusters of {c:?}, the launch asks for {:?}", p.name, config.cluster);
                return Err(Error::Invalid(m));
            }
            Some(c) => c,
            None => config.cluster,
        };
        if cluster.contains(&0) || (0..3).any(|d| !config.grid[d].is_multiple_of(cluster[d])) {
            let m = format!("grid {:?} is not whole clusters of {cluster:?}", config.grid);
            return Err(Error::Invalid(m));
        }
        let mut params = exec::region::Region::new(0, bytes.len() as u64);
        for (i, b) in bytes.iter().enumerate() {
            params.store::<1>(i as u64, u64::from(*b));
        }
        params.read_only = true;
        let shape = exec::launch::Shape {
            grid: config.grid,
            block: config.block,
            cluster,
            dynamic_shared: config.dynamic_shared,
            threads: config.threads,
            budget: config.budget,
            cooperative: config.cooperative,
            resident: config.resident,
            products: config.products.map_or_else(Products::from_env, Ok)?,
            races: config.checks.races || Checks::from_env()?.races,
            seed: config.seed,
        };
        let counters = exec::launch::launch(p, memory, &params, &shape, &config.output)?;
        trace::append(&p.name, &shape, p.static_shared, &counters)?;
        Ok(counters)
    }
}
