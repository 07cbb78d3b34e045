//! A GPU as a device: its context, one stream, memory, loaded kernels.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DriverError, result};
use cudarc::nvrtc::Ptx;
use half::bf16;

use super::compile::{Compiler, Target, label};
use super::device_library;
use super::error::{DriverResult, driver};
use super::kernels::{self, Kernel, THREADS};
use super::launch::Launch;
use super::nvrtc::Nvrtc;
use crate::dirs;
use crate::error::{Context, Result};
use crate::tensor::{DType, Device, Tensor};

/// Device memory behind a tensor, freed in stream order.
pub struct CudaBuf {
    bytes: CudaSlice<u8>,
}

impl CudaBuf {
    /// What every buffer's address is a multiple of; `cuMemAllocAsync` gives 256.
    pub const ALIGNMENT: u64 = 16;
}

/// What a device is.
#[derive(Clone, Debug)]
pub struct Properties {
    /// Its number.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability, major · 10 + minor.
    pub cc: u32,
    /// Memory in bytes.
    pub memory: usize,
    /// Streaming multiprocessors.
    pub sm_count: usize,
    /// Largest shared memory of a block that asks for it, in bytes.
    pub shared_limit: usize,
    /// Whether it is the emulator of `tests/vgpu`, which takes PTX alone.
    pub emulated: bool,
}

/// Sources with defines whose modules are loaded; the text of both is the key.
type Modules = HashMap<String, Arc<CudaModule>>;

/// A loaded entry and the dynamic shared memory it may use so far.
type Functions = HashMap<(String, &'static str), (CudaFunction, usize)>;

/// Shared memory that a kernel gets without asking.
const SHARED_FREE: usize = 48 * 1024;

/// Values converted at once on their way to or from the device: bounds the memory of a copy.
const COPY_ELEMENTS: usize = 1 << 22;

/// A GPU and one stream of it.
pub struct Cuda {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    properties: Properties,
    compiler: Compiler,
    modules: Mutex<Modules>,
    functions: Mutex<Functions>,
    /// Partial sums of one operation, kept between operations; the stream orders their uses.
    scratch: Mutex<Option<Tensor<Cuda>>>,
}

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cuda {
    /// How many devices the driver sees; 0 where it sees none.
    ///
    /// # Errors
    /// If there is no driver or it is too old or broken.
    pub fn count() -> Result<usize> {
        device_library::require()?;
        match CudaContext::device_count() {
            Ok(n) => Ok(usize::try_from(n).unwrap_or(0)),
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
            Err(e) => Err(driver("starting the driver", e)),
        }
    }

    /// Device `ordinal`, with compiled kernels kept in the user's cache.
    ///
    /// # Errors
    /// If there is no driver, no such device, no NVRTC, or nothing that NVRTC compiles runs on the device.
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::with_cache(ordinal, Some(&dirs::cache()))
    }

    /// As [`Cuda::new`], with compiled kernels kept in `cache/kernels`, or nowhere.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    pub fn with_cache(ordinal: usize, cache: Option<&Path>) -> Result<Self> {
        let (context, properties) = open(ordinal)?;
        let nvrtc = Nvrtc::get()?;
        // The emulator knows the instructions of compute_80 best, whatever it poses as.
        let target = match properties.emulated {
            true => Target::Ptx(80),
            false => Target::for_device(properties.cc, nvrtc)?,
        };
        // SAFETY: there is one stream, which orders every use, copy and free of a buffer; no event is needed between streams.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().doing(|| "creating a stream".into())?;
        Ok(Self {
            context,
            stream,
            properties,
            compiler: Compiler::new(nvrtc, target, cache),
            modules: Mutex::default(),
            functions: Mutex::default(),
            scratch: Mutex::new(None),
        })
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// What kernels are compiled for.
    pub fn target(&self) -> Target {
        self.compiler.target()
    }

    /// Free and total memory in bytes.
    ///
    /// # Errors
    /// If an earlier operation failed.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.context.mem_get_info().doing(|| "asking for free memory".into())
    }

    /// The stream that everything is queued on.
    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The address of a buffer.
    pub(super) fn address(&self, buf: &CudaBuf) -> u64 {
        buf.bytes.device_ptr(&self.stream).0
    }

    /// A scratch tensor of at least `len` f32, its values whatever they were.
    pub(super) fn scratch(&self, len: usize) -> Result<ScratchGuard<'_>> {
        let mut guard = locked(&self.scratch);
        if guard.as_ref().is_none_or(|t| t.capacity() < len) {
            *guard = None;
            *guard = Some(self.alloc(1, len, DType::F32)?);
        }
        Ok(ScratchGuard(guard))
    }

    /// A kernel ready to be launched with `shared` bytes of dynamic shared memory; compiled and loaded at its first use.
    pub(super) fn function(&self, kernel: &Kernel, shared: usize) -> Result<CudaFunction> {
        let key = label(&kernel.source, &kernel.defines);
        let mut functions = locked(&self.functions);
        let entry = (key, kernel.entry);
        if !functions.contains_key(&entry) {
            let module = self.module(kernel, &entry.0)?;
            let function =
                module.load_function(kernel.entry).doing(|| format!("{}: finding {}", entry.0, kernel.entry))?;
            functions.insert(entry.clone(), (function, SHARED_FREE));
        }
        let (function, allowed) = functions.get_mut(&entry).expect("just put in");
        if shared > *allowed {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, shared as i32).doing(|| {
                format!(
                    "{}: asking for {shared} bytes of shared memory of the {} a block may have",
                    entry.0, self.properties.shared_limit
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

/// The context of a device and what the device is.
fn open(ordinal: usize) -> Result<(Arc<CudaContext>, Properties)> {
    device_library::require()?;
    let context = CudaContext::new(ordinal).doing(|| format!("opening device {ordinal}"))?;
    let properties = properties(ordinal)?;
    Ok((context, properties))
}

/// What a device is, without opening it.
///
/// # Errors
/// If there is no driver or no such device.
pub fn properties(ordinal: usize) -> Result<Properties> {
    device_library::require()?;
    let what = || format!("asking what device {ordinal} is");
    result::init().doing(what)?;
    let device = result::device::get(ordinal as i32).doing(what)?;
    // SAFETY: `device` comes from the driver.
    let attribute = |a| unsafe { result::device::get_attribute(device, a) }.doing(what);
    let name = result::device::get_name(device).doing(what)?;
    Ok(Properties {
        ordinal,
        cc: (attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
            + attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?) as u32,
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device) }.doing(what)?,
        sm_count: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        shared_limit: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        emulated: name.starts_with("vgpu "),
        name,
    })
}

/// The scratch tensor while an operation is being queued.
pub(super) struct ScratchGuard<'a>(MutexGuard<'a, Option<Tensor<Cuda>>>);

impl ScratchGuard<'_> {
    /// The tensor itself.
    pub fn tensor(&mut self) -> &mut Tensor<Cuda> {
        self.0.as_mut().expect("allocated when the guard was made")
    }
}

impl Device for Cuda {
    type Buf = CudaBuf;

    fn describe(&self) -> String {
        let p = &self.properties;
        format!("cuda:{}, {}, sm_{}, {:.1} GiB", p.ordinal, p.name, p.cc, p.memory as f64 / f64::from(1 << 30))
    }

    fn alloc(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>> {
        let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.bytes())).ok_or_else(|| {
            crate::error::Error::new(format!("cuda: a tensor of {rows} x {cols} is larger than any memory"))
        })?;
        // A tensor without elements still has an address.
        let allocated = self.stream.alloc_zeros::<u8>(bytes.max(CudaBuf::ALIGNMENT as usize));
        let bytes = allocated.map_err(|e| {
            let (free, total) = self.context.mem_get_info().unwrap_or((0, self.properties.memory));
            let mib = |n: usize| n as f64 / f64::from(1 << 20);
            driver(
                &format!(
                    "allocating {:.1} MiB for {rows} x {cols} of {dtype:?} ({:.0} MiB free of {:.0} MiB)",
                    mib(bytes),
                    mib(free),
                    mib(total)
                ),
                e,
            )
        })?;
        Ok(Tensor::from_buf(CudaBuf { bytes }, rows, cols, dtype))
    }

    fn upload(&self, dst: &mut Tensor<Self>, src: &[f32]) -> Result<()> {
        assert_eq!(dst.len(), src.len(), "upload: number of elements");
        match dst.dtype() {
            DType::F32 => self.upload_bytes(dst, 0, bytemuck::cast_slice(src)),
            DType::Bf16 => {
                for (i, part) in src.chunks(COPY_ELEMENTS).enumerate() {
                    let rounded: Vec<bf16> = part.iter().map(|&x| bf16::from_f32(x)).collect();
                    self.upload_bytes(dst, i * COPY_ELEMENTS * 2, bytemuck::cast_slice(&rounded))?;
                }
                Ok(())
            }
            DType::I32 => panic!("upload: integers where numbers are expected"),
        }
    }

    fn upload_i32(&self, dst: &mut Tensor<Self>, src: &[i32]) -> Result<()> {
        assert_eq!(dst.dtype(), DType::I32, "upload_i32: element type");
        assert_eq!(dst.len(), src.len(), "upload_i32: number of elements");
        self.upload_bytes(dst, 0, bytemuck::cast_slice(src))
    }

    fn download(&self, dst: &mut [f32], src: &Tensor<Self>) -> Result<()> {
        assert_eq!(dst.len(), src.len(), "download: number of elements");
        match src.dtype() {
            DType::F32 => self.download_bytes(bytemuck::cast_slice_mut(dst), src, 0),
            DType::Bf16 => {
                let mut part = vec![bf16::ZERO; COPY_ELEMENTS.min(dst.len())];
                for (i, dst) in dst.chunks_mut(COPY_ELEMENTS).enumerate() {
                    let part = &mut part[..dst.len()];
                    self.download_bytes(bytemuck::cast_slice_mut(part), src, i * COPY_ELEMENTS * 2)?;
                    dst.iter_mut().zip(part.iter()).for_each(|(d, s)| *d = s.to_f32());
                }
                Ok(())
            }
            DType::I32 => panic!("download: integers where numbers are expected"),
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().doing(|| "waiting for the device".into())
    }

    fn fill_zero(&self, dst: &mut Tensor<Self>) -> Result<()> {
        let bytes = dst.len() * dst.dtype().bytes();
        if bytes == 0 {
            return Ok(());
        }
        let mut part = dst.buf.bytes.slice_mut(..bytes);
        self.stream.memset_zeros(&mut part).doing(|| "filling with zeros".into())
    }

    fn copy(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>) -> Result<()> {
        assert_eq!(dst.shape(), src.shape(), "copy: shapes");
        if src.is_empty() {
            return Ok(());
        }
        if dst.dtype() == src.dtype() {
            let bytes = src.len() * src.dtype().bytes();
            let (from, mut to) = (src.buf.bytes.slice(..bytes), dst.buf.bytes.slice_mut(..bytes));
            return self.stream.memcpy_dtod(&from, &mut to).doing(|| "copying on the device".into());
        }
        let kernel = kernels::cast(dst.dtype(), src.dtype());
        let n = src.len();
        let launch = Launch::new(self, &kernel, n.div_ceil(THREADS * 8), 0);
        launch.write(dst).read(src).u64(n).run().context(|| "copy".into())
    }
}

impl Cuda {
    /// Copies bytes into a tensor from byte `at` on. They may be reused when this returns: the driver has taken them from memory
    /// that is not page-locked.
    fn upload_bytes(&self, dst: &mut Tensor<Self>, at: usize, src: &[u8]) -> Result<()> {
        if src.is_empty() {
            return Ok(());
        }
        let mut part = dst.buf.bytes.slice_mut(at..at + src.len());
        self.stream.memcpy_htod(src, &mut part).doing(|| format!("copying {} bytes to the device", src.len()))
    }

    /// Copies bytes of a tensor from byte `at` on, and waits for them.
    fn download_bytes(&self, dst: &mut [u8], src: &Tensor<Self>, at: usize) -> Result<()> {
        if dst.is_empty() {
            return self.synchronize();
        }
        let part = src.buf.bytes.slice(at..at + dst.len());
        self.stream.memcpy_dtoh(&part, dst).doing(|| format!("copying {} bytes from the device", part.len()))?;
        self.synchronize()
    }
}
