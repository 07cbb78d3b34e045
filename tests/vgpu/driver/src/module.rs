//! Modules and functions: PTX text as `cuModuleLoadData` takes it, and what may be set on a kernel.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use crate::ffi::Handle;

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
        }
    }

    /// Static shared memory in bytes.
    pub fn static_shared(&self) -> usize {
        self.module.image.kernel(&self.name).map_or(0, |k| k.static_shared())
    }

    /// Offset and size of each parameter.
    pub fn params(&self) -> Vec<(usize, usize)> {
        self.module
            .image
            .kernel(&self.name)
            .map_or(Vec::new(), |k| k.params().to_vec())
    }

    /// Threads of a block that the kernel's directives allow.
    pub fn max_threads(&self) -> u32 {
        let limit = self.module.image.kernel(&self.name).ok().and_then(|k| k.max_threads());
        limit
            .unwrap_or(crate::chip::BLOCK_THREADS)
            .min(crate::chip::BLOCK_THREADS)
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

/// The number after a directive, such as `.version 8.8` or `.target sm_90a`, times ten.
pub fn directive(text: &str, name: &str) -> Option<i32> {
    let line = text.lines().map(str::trim).find(|l| l.starts_with(name))?;
    let word = line[name.len()..].trim().trim_start_matches("sm_");
    let digits: String = word.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    match digits.split_once('.') {
        Some((major, minor)) => Some(major.parse::<i32>().ok()? * 10 + minor.parse::<i32>().ok()?),
        None => digits.parse().ok(),
    }
}
