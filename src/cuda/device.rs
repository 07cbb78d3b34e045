//! A GPU as a device: its context, its streams, what it is.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::{CUdevice_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};

use super::behind::Behind;
use super::compile::{Compiler, Prebuilt, Target};
use super::device_library;
use super::error::{DriverResult, driver};
use super::modules::Modules;
use super::nvrtc::Nvrtc;
use super::pinned::Pinned;
use super::rehearsal::Rehearsal;
use super::tiles::Tile;
use crate::dirs;
use crate::error::Result;
use crate::tensor::Tensor;

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
    /// Last cache before the memory, in bytes.
    pub cache: usize,
    /// Bytes per second of the memory, from its clock and width; 0 where the driver does not say.
    pub bandwidth: f64,
    /// Whether it is the emulator of `tests/vgpu`, which takes PTX alone.
    pub emulated: bool,
}

/// Scratch of an operation, kept between operations; the stream orders its uses.
#[derive(Clone, Copy, Debug)]
pub(super) enum Room {
    /// Partial sums.
    Sums,
    /// Supervised rows of a chunk.
    Rows,
    /// Logits of a chunk.
    Logits,
    /// Gradient of the logits.
    Gradient,
    /// Gradient of the supervised rows.
    RowGradient,
    /// Partial sums of low-rank updates.
    UpdateSums,
    /// Counters of blocks that wait for the last of them: zero between launches.
    Counters,
}

impl Room {
    /// How many there are.
    pub const COUNT: usize = 7;
}

/// Which table: each is kept from step to step, and copied anew only where it changed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Table {
    /// Chunks of gradients, for their norm.
    Squares,
    /// Slots and chunks of the optimiser.
    AdamW,
    /// Blocks of a gradient that lies on several ranks, in order.
    Order,
}

impl Table {
    /// How many there are.
    pub const COUNT: usize = 3;
}

/// A table's words on the host and on the device.
pub(super) struct Kept {
    pub words: Vec<u64>,
    pub tensor: Tensor<Cuda>,
}

/// What a device was asked to do, counted.
#[derive(Default)]
pub(super) struct Counts {
    pub launches: AtomicU64,
    pub waits: AtomicU64,
}

impl Counts {
    /// One more.
    pub fn add(count: &AtomicU64) {
        count.fetch_add(1, Relaxed);
    }
}

/// A GPU, the stream that computes, and the one that copies ahead.
pub struct Cuda {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// What brings micro-batches to the device while others are computed.
    copies: Arc<CudaStream>,
    properties: Properties,
    modules: Modules,
    /// What a run is known to need before it starts.
    pub(super) rehearsal: Rehearsal,
    /// Launches and waits so far.
    pub(super) counts: Counts,
    /// What is launched and not waited for.
    pub(super) behind: Behind,
    /// Where downloads land.
    pub(super) landing: Mutex<Option<Pinned>>,
    /// Scratch by [`Room`].
    pub(super) rooms: [Mutex<Option<Tensor<Cuda>>>; Room::COUNT],
    /// The only tile of projections, for tests and benches; else each gets the one of the least cost.
    pub(super) tile: Option<Tile>,
    /// Whether blocks may work in clusters, where the device has them.
    pub(super) clusters: bool,
    /// What is kept by [`Table`].
    pub(super) tables: [Mutex<Option<Kept>>; Table::COUNT],
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
        let compiler = match Prebuilt::named()? {
            Some(prebuilt) => {
                prebuilt.expect_device(properties.cc, properties.emulated)?;
                Compiler::prebuilt(prebuilt, Nvrtc::get().ok(), cache)
            }
            None => {
                let nvrtc = Nvrtc::get()?;
                // The emulator takes PTX alone. It knows the instructions of compute_80 best; those of Hopper are in compute_90a.
                let target = match properties.emulated {
                    true if properties.cc == 90 => Target::OwnPtx(90),
                    true => Target::Ptx(80),
                    false => Target::for_device(properties.cc, nvrtc)?,
                };
                Compiler::new(nvrtc, target, cache)
            }
        };
        // SAFETY: one stream orders every use, copy and free of a buffer. The other one writes the blocks of `upload` alone, which has the
        // events between them.
        unsafe { context.disable_event_tracking() };
        let stream = || context.new_stream().doing(|| "creating a stream".into());
        let (stream, copies) = (stream()?, stream()?);
        let modules = Modules::new(context.clone(), compiler, properties.shared_limit);
        let (rehearsal, counts, behind, landing, rooms, tables) = Default::default();
        Ok(Self {
            context,
            stream,
            copies,
            properties,
            modules,
            rehearsal,
            counts,
            behind,
            landing,
            rooms,
            tile: None,
            clusters: true,
            tables,
        })
    }

    /// The same device with one tile of the portable kernels for all projections, where it holds whole heads, instead of the one of the
    /// least cost or of an architecture's own kernels: for tests and benches.
    pub fn with_tile(self, tile: Tile) -> Self {
        Self { tile: Some(tile), ..self }
    }

    /// The same device with each block by itself, for tests and benches: clusters change no bits.
    pub fn without_clusters(self) -> Self {
        Self { clusters: false, ..self }
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// What kernels are compiled for.
    pub fn target(&self) -> Target {
        self.modules.target()
    }

    /// What tells it from every other GPU, as `nvidia-smi -L` prints it.
    ///
    /// # Errors
    /// If the driver does not say.
    pub fn uuid(&self) -> Result<String> {
        let uuid = self.context.uuid().doing(|| "asking for the device's UUID".into())?;
        let hex: Vec<String> = uuid.bytes.iter().map(|b| format!("{:02x}", *b as u8)).collect();
        let part = |from: usize, to: usize| hex[from..to].concat();
        Ok(format!("GPU-{}-{}-{}-{}-{}", part(0, 4), part(4, 6), part(6, 8), part(8, 10), part(10, 16)))
    }

    /// Free and total memory in bytes.
    ///
    /// # Errors
    /// If an earlier operation failed.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.context.mem_get_info().doing(|| "asking for free memory".into())
    }

    /// The kernels that are loaded.
    pub(super) fn modules(&self) -> &Modules {
        &self.modules
    }

    /// Its context.
    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Makes it the context of this thread, which calls of the driver go by.
    pub(super) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().doing(|| "taking the device for a thread".into())
    }

    /// The stream of `upload`.
    pub(super) fn copies(&self) -> &Arc<CudaStream> {
        &self.copies
    }

    /// The stream that everything else is queued on.
    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
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
        cache: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        // Kilohertz and bits, two transfers a clock.
        bandwidth: f64::from(attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?)
            * 1e3
            * 2.0
            * f64::from(attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?)
            / 8.0,
        emulated: name.starts_with("vgpu "),
        name,
    })
}
