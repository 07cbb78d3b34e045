//! Compiled kernels as the driver holds them: each is compiled and loaded at its first use.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::{CUfunction_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError};
use cudarc::nvrtc::Ptx;

use super::compile::{Compiler, Defines, Target, label};
use super::error::DriverResult;
use super::kernels::Kernel;
use super::locked;
use crate::error::Result;

/// Shared memory that a kernel gets without asking.
const SHARED_FREE: usize = 48 * 1024;

/// What names a loaded entry: source, entry, defines. No text is put together and nothing allocated where a kernel is launched.
type Key = (&'static str, &'static str, Defines);

/// Loaded entries, and the dynamic shared memory each may use so far.
type Functions = HashMap<Key, (CudaFunction, usize)>;

/// What is loaded on a device, and how more comes to be.
pub struct Modules {
    context: Arc<CudaContext>,
    compiler: Compiler,
    /// Largest shared memory of a block, in bytes.
    shared_limit: usize,
    /// Sources with defines whose modules are loaded; the text of both is the key.
    modules: Mutex<HashMap<String, Arc<CudaModule>>>,
    functions: Mutex<Functions>,
}

impl Modules {
    /// Nothing loaded yet.
    pub fn new(context: Arc<CudaContext>, compiler: Compiler, shared_limit: usize) -> Self {
        Self { context, compiler, shared_limit, modules: Mutex::default(), functions: Mutex::default() }
    }

    /// What kernels are compiled for.
    pub fn target(&self) -> Target {
        self.compiler.target()
    }

    /// A kernel ready to be launched with `shared` bytes of dynamic shared memory; compiled and loaded at its first use.
    pub fn function(&self, kernel: &Kernel, shared: usize) -> Result<CudaFunction> {
        let mut functions = locked(&self.functions);
        let key: Key = (kernel.source.name, kernel.entry, kernel.defines);
        let name = || label(&kernel.source, &kernel.defines);
        let (function, allowed) = match functions.entry(key) {
            Entry::Occupied(loaded) => loaded.into_mut(),
            Entry::Vacant(place) => {
                let module = self.module(kernel, &name())?;
                let loaded = module.load_function(kernel.entry);
                let function = loaded.doing(|| format!("{}: finding {}", name(), kernel.entry))?;
                place.insert((function, SHARED_FREE))
            }
        };
        if shared > *allowed {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, shared as i32).doing(|| {
                format!(
                    "{}: asking for {shared} bytes of shared memory of the {} a block may have",
                    name(),
                    self.shared_limit
                )
            })?;
            *allowed = shared;
        }
        Ok(function.clone())
    }

    fn module(&self, kernel: &Kernel, key: &str) -> Result<Arc<CudaModule>> {
        let mut modules = locked(&self.modules);
        if let Some(module) = modules.get(key) {
            return Ok(module.clone());
        }
        let image = self.compiler.image(&kernel.source, &kernel.defines)?;
        let mut loaded = self.context.load_module(Ptx::from_binary(image));
        // Machine code that this driver does not take: let it compile the PTX itself.
        if let (Err(DriverError(code)), Target::Cubin(_)) = (&loaded, self.target())
            && matches!(
                code,
                CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
                    | CUresult::CUDA_ERROR_INVALID_IMAGE
                    | CUresult::CUDA_ERROR_INVALID_SOURCE
            )
        {
            let image = self.compiler.with_target(self.target().ptx()).image(&kernel.source, &kernel.defines)?;
            loaded = self.context.load_module(Ptx::from_binary(image));
        }
        let module = loaded.doing(|| format!("{key}: loading the compiled kernel"))?;
        modules.insert(key.into(), module.clone());
        Ok(module)
    }
}
