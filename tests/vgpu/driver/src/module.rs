//! Modules and functions: PTX text as `cuModuleLoadData` takes it, and what may be set on a kernel.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use crate::chip::{REGISTERS, REGISTERS_PER_THREAD};
use crate::ffi::Handle;
use crate::occupancy::Needs;

/// A loaded module.
pub struct Module {
    /// The decoded kernels and the addresses of variables.
    pub image: vgpu::Module,
    /// Handles of the functions that were asked for.
    pub functions: Mutex<BTreeMap<String, Handle>>,
    /// Context it was loaded into.
    pub context: Handle,
    /// Device of the context.
    pub device: usize,
    /// PTX version and target as the text has them, times ten.
    pub versions: (i32, i32),
    /// `CU_JIT_MAX_REGISTERS` of the load.
    pub max_registers: Option<u32>,
    /// Loaded by `cuLibraryLoadData`: not to be unloaded as a module.
    pub library: bool,
}

/// A kernel of a module.
pub struct Function {
    /// The module.
    pub module: Arc<Module>,
    /// The name.
    pub name: String,
    /// Dynamic shared memory that launches may ask for, in bytes.
    pub max_dynamic_shared: AtomicI32,
    /// `CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT`, -1 for the default.
    pub carveout: AtomicI32,
    /// Whether cluster sizes that not every device supports are allowed.
    pub non_portable_cluster: AtomicI32,
    /// `CUclusterSchedulingPolicy`, kept and without effect.
    pub cluster_policy: AtomicI32,
    /// Cluster that `cuFuncSetAttribute` set; zeroes for none.
    pub set_cluster: Mutex<[u32; 3]>,
}

impl Function {
    /// A kernel with nothing set.
    pub fn new(module: Arc<Module>, name: String) -> Function {
        Function {
            module,
            name,
            max_dynamic_shared: AtomicI32::new(crate::chip::SHARED_DEFAULT),
            carveout: AtomicI32::new(-1),
            non_portable_cluster: AtomicI32::new(0),
            cluster_policy: AtomicI32::new(0),
            set_cluster: Mutex::new([0; 3]),
        }
    }

    /// Static shared memory in bytes.
    pub fn static_shared(&self) -> usize {
        self.module.image.kernel(&self.name).map_or(0, |k| k.static_shared())
    }

    /// Offset and size of each parameter.
    pub fn params(&self) -> Vec<(usize, usize)> {
        self.module.image.kernel(&self.name).map_or(Vec::new(), |k| k.params().to_vec())
    }

    /// Threads of a block that `.reqntid` demands.
    pub fn required_threads(&self) -> Option<[u32; 3]> {
        let v = self.module.image.kernel(&self.name).ok()?.limits().required_threads?;
        Some(v.map(|n| n.max(1)))
    }

    /// Cluster that the kernel's directive demands.
    pub fn directive_cluster(&self) -> Option<[u32; 3]> {
        let v = self.module.image.kernel(&self.name).ok()?.limits().cluster?;
        Some(v.map(|n| n.max(1)))
    }

    /// Cluster that the directive or an attribute demands.
    pub fn required_cluster(&self) -> Option<[u32; 3]> {
        let set = *self.set_cluster.lock().unwrap_or_else(|e| e.into_inner());
        self.directive_cluster().or(Some(set).filter(|s| *s != [0; 3]))
    }

    /// Bytes of parameters, which lie in constant memory.
    pub fn constant_bytes(&self) -> usize {
        self.params().last().map_or(0, |(at, n)| at + n)
    }

    /// Threads of a block that the kernel's directives allow.
    pub fn max_threads(&self) -> u32 {
        let limit = self.module.image.kernel(&self.name).ok().and_then(|k| k.max_threads());
        limit.unwrap_or(crate::chip::BLOCK_THREADS).min(crate::chip::BLOCK_THREADS)
    }

    /// Registers of a thread: what the decoded kernel keeps at once (64-bit ones count twice; no constants, no predicates) in
    /// steps of 8, as `ptxas` is held to by `.maxnreg`, `.maxntid` with `.minnctapersm`, and the option of the load.
    ///
    /// An estimate: `ptxas` also moves, recomputes and spills values.
    pub fn registers(&self) -> u32 {
        let Ok(k) = self.module.image.kernel(&self.name) else {
            return 0;
        };
        let limits = k.limits();
        let estimate = k.registers().max(8).next_multiple_of(8) as u32;
        let mut most = REGISTERS_PER_THREAD as u32;
        if let Some(n) = limits.max_regs.or(self.module.max_registers) {
            most = most.min(n);
        }
        if let Some(threads) = limits.threads() {
            let ctas = limits.min_ctas.unwrap_or(1).max(1);
            let warps = threads.div_ceil(32).max(1).next_multiple_of(4) * ctas;
            most = most.min((REGISTERS as u32 / 32 / warps) & !7);
        }
        estimate.min(most.max(16))
    }

    /// What occupancy is computed from.
    pub fn needs(&self) -> Needs {
        Needs {
            registers: self.registers(),
            static_shared: self.static_shared(),
            dynamic_limit: self.dynamic_limit(),
            carveout: self.carveout.load(Relaxed),
            max_threads: self.max_threads(),
        }
    }

    /// Dynamic shared memory that launches may ask for, in bytes.
    pub fn dynamic_limit(&self) -> usize {
        let set = self.max_dynamic_shared.load(Relaxed).max(0) as usize;
        // Without opting in, static and dynamic memory share the 48 KiB.
        if set <= crate::chip::SHARED_DEFAULT as usize {
            set.min((crate::chip::SHARED_DEFAULT as usize).saturating_sub(self.static_shared()))
        } else {
            set
        }
    }
}

/// What the head of a PTX text says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// `.version`, times ten.
    pub version: i32,
    /// `.target`, as in `sm_80`.
    pub target: i32,
    /// Letter behind the target: `a` for one chip, `f` for a family.
    pub suffix: Option<char>,
}

impl Head {
    /// Reads `.version` and `.target`.
    pub fn of(text: &str) -> Option<Head> {
        let after = |name: &str| {
            let line = text.lines().map(str::trim).find(|l| l.starts_with(name))?;
            Some(line[name.len()..].trim())
        };
        let (major, minor) = after(".version")?.split_once('.')?;
        let minor: String = minor.chars().take_while(char::is_ascii_digit).collect();
        let target = after(".target")?.split(',').next()?.trim().strip_prefix("sm_")?;
        let digits: String = target.chars().take_while(char::is_ascii_digit).collect();
        Some(Head {
            version: major.trim().parse::<i32>().ok()? * 10 + minor.parse::<i32>().ok()?,
            target: digits.parse().ok()?,
            suffix: target[digits.len()..].chars().next().filter(char::is_ascii_alphabetic),
        })
    }

    /// Whether a device of this compute capability runs it.
    pub fn runs_on(&self, (major, minor): (i32, i32)) -> bool {
        let sm = major * 10 + minor;
        match self.suffix {
            Some('a') => self.target == sm,
            Some('f') => self.target / 10 == major && self.target <= sm,
            _ => self.target <= sm,
        }
    }
}
