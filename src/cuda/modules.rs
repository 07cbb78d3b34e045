//! Compiled kernels as the driver holds them: those of a run are compiled and loaded together before it starts, any other at its first use.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use cudarc::driver::sys::{CUfunction_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError};
use cudarc::nvrtc::Ptx;
use rayon::prelude::*;

use super::compile::{Compiler, Defines, Source, Target, label};
use super::error::DriverResult;
use super::kernels::{Kernel, Key};
use super::locked;
use crate::error::Result;
use crate::say;
use crate::text::plural;

/// Shared memory that a kernel gets without asking.
const SHARED_FREE: usize = 48 * 1024;

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
        let key = kernel.key();
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

    /// Makes kernels ready to be launched with as much dynamic shared memory as stands with each. What is in no cache is compiled, on all
    /// cores, which is said.
    ///
    /// # Errors
    /// As [`Modules::function`].
    pub fn load_all(&self, kernels: &[(Kernel, usize)]) -> Result<()> {
        let mut sources: Vec<(String, Source, Defines)> = Vec::new();
        for (kernel, _) in kernels {
            let name = label(&kernel.source, &kernel.defines);
            if !locked(&self.modules).contains_key(&name) && sources.iter().all(|(known, ..)| *known != name) {
                sources.push((name, kernel.source, kernel.defines));
            }
        }
        let found: Result<Vec<Option<Vec<u8>>>> =
            sources.par_iter().map(|(_, source, defines)| self.compiler.cached(source, defines)).collect();
        let found = found?;
        let missing = found.iter().filter(|image| image.is_none()).count();
        let start = Instant::now();
        if missing > 0 {
            let kept = if self.compiler.keeps() { ", once: they are kept" } else { "" };
            say::remark(&format!("compiling {} for {}{kept}", plural(missing, "CUDA module"), self.target()));
        }
        let images: Result<Vec<Vec<u8>>> = sources
            .par_iter()
            .zip(found)
            .map(|((_, source, defines), image)| image.map_or_else(|| self.compiler.image(source, defines), Ok))
            .collect();
        let images = images?;
        if missing > 0 {
            say::remark(&format!(
                "{} compiled in {:.1} s",
                plural(missing, "CUDA module"),
                start.elapsed().as_secs_f64()
            ));
        }
        for ((name, source, defines), image) in sources.iter().zip(images) {
            let module = self.load(source, defines, name, image)?;
            locked(&self.modules).insert(name.clone(), module);
        }
        kernels.iter().try_for_each(|(kernel, shared)| self.function(kernel, *shared).map(|_| ()))
    }

    fn module(&self, kernel: &Kernel, key: &str) -> Result<Arc<CudaModule>> {
        let mut modules = locked(&self.modules);
        if let Some(module) = modules.get(key) {
            return Ok(module.clone());
        }
        let Kernel { source, defines, .. } = kernel;
        let module = self.load(source, defines, key, self.compiler.image(source, defines)?)?;
        modules.insert(key.into(), module.clone());
        Ok(module)
    }

    /// The module of an image. Where the driver does not take its machine code, that of PTX.
    fn load(&self, source: &Source, defines: &Defines, key: &str, image: Vec<u8>) -> Result<Arc<CudaModule>> {
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
            let image = self.compiler.with_target(self.target().ptx()).image(source, defines)?;
            loaded = self.context.load_module(Ptx::from_binary(image));
        }
        loaded.doing(|| format!("{key}: loading the compiled kernel"))
    }
}
