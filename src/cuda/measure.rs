//! What a GPU says to those who measure it: its data sheet, the driver's counts of memory, times between events, the emulator's counters.

use std::sync::OnceLock;
use std::sync::atomic::Ordering::Relaxed;

use cudarc::driver::result;
use cudarc::driver::sys::{CUevent_flags, CUmemPool_attribute, CUmemoryPool};

use super::device::Cuda;
use super::device_library;
use super::error::DriverResult;
use crate::error::Result;
use crate::measure::{Counted, MemoryUse, Nature, Tally, sheets};

pub(super) fn nature(dev: &Cuda) -> Nature {
    let p = dev.properties();
    let sheet = sheets::of(&p.name);
    Nature {
        emulated: p.emulated,
        cache: p.cache as u64,
        driver: device_library::version().map(|(major, minor)| format!("CUDA {major}.{minor}")),
        sheet_flops: sheet.map(|s| s.flops),
        // Newer drivers need not say clocks.
        sheet_bandwidth: (p.bandwidth > 0.0).then_some(p.bandwidth).or(sheet.map(|s| s.memory_rate)),
    }
}

pub(super) fn tally(dev: &Cuda) -> Tally {
    Tally {
        launches: dev.counts.launches.load(Relaxed),
        waits: dev.counts.waits.load(Relaxed),
        counted: dev.properties().emulated.then(counted).flatten(),
    }
}

/// Counters of an emulated device, summed over the launches that ran; a real driver has none.
fn counted() -> Option<Counted> {
    type Counters = unsafe extern "C" fn(*mut u64, usize) -> usize;
    static FUNCTION: OnceLock<Option<Counters>> = OnceLock::new();
    let function = FUNCTION.get_or_init(|| {
        let symbol = device_library::get()?.symbol(c"vgpuCounters")?;
        // SAFETY: the emulator alone has a function of this name, with this signature (tests/vgpu/driver/src/totals.rs).
        Some(unsafe { std::mem::transmute::<std::ptr::NonNull<std::ffi::c_void>, Counters>(symbol) })
    });
    let mut values = [0u64; 5];
    // SAFETY: `values` has room for as many.
    let n = unsafe { (*function)?(values.as_mut_ptr(), values.len()) };
    let [instructions, tensor_flops, requested, shared_passes, bank_conflicts] = values;
    (n >= values.len()).then_some(Counted { instructions, tensor_flops, requested, shared_passes, bank_conflicts })
}

/// The pool that every buffer comes from.
fn pool(dev: &Cuda) -> Option<CUmemoryPool> {
    let device = result::device::get(dev.properties().ordinal as i32).ok()?;
    // SAFETY: `device` comes from the driver.
    unsafe { result::device::get_mem_pool(device) }.ok()
}

pub(super) fn memory_use(dev: &Cuda) -> Option<MemoryUse> {
    let pool = pool(dev)?;
    let figure = |attribute| {
        let mut bytes = 0u64;
        // SAFETY: the pool is the driver's, and both attributes are 64-bit figures.
        unsafe { result::mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast()) }.ok()?;
        Some(bytes)
    };
    Some(MemoryUse {
        now: figure(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
        peak: figure(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
    })
}

pub(super) fn forget_peak(dev: &Cuda) -> bool {
    let mut none = 0u64;
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    // SAFETY: as above; the driver takes 0 alone, which sets the mark to what is in use.
    pool(dev).is_some_and(|p| unsafe { result::mem_pool::set_attribute(p, attribute, (&raw mut none).cast()) }.is_ok())
}

/// Seconds between an event before `work` and one after it.
pub(super) fn timed(dev: &Cuda, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    dev.wait()?;
    let event = || {
        let recorded = dev.stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        recorded.doing(|| "recording an event".into())
    };
    let start = event()?;
    work()?;
    let end = event()?;
    dev.wait()?;
    let ms = start.elapsed_ms(&end).doing(|| "asking for the time between two events".into())?;
    Ok(f64::from(ms) * 1e-3)
}
