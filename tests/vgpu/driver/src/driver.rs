//! The state of the library: devices, contexts, streams and what else has a handle.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard};
use std::thread::ThreadId;
use std::time::Instant;

use vgpu::Memory;

use crate::code::{Code, Result};
use crate::config::Config;
use crate::ffi::Handle;
use crate::graph::{Capture, Captured, Executable, Graph, Node};
use crate::module::{Function, Module};
use crate::queue::{OpId, Queue};
use crate::table::Table;

/// Distance of the addresses of two devices, so that an address tells its device.
const DEVICE_STRIDE: u64 = 1 << 40;

/// One device.
pub struct Device {
    /// Its number.
    pub ordinal: usize,
    memory: RwLock<Memory>,
}

impl Device {
    /// The memory, to read and write; launches hold this for their time.
    pub fn memory(&self) -> RwLockReadGuard<'_, Memory> {
        self.memory.read().unwrap_or_else(|e| e.into_inner())
    }

    /// Changes the table of allocations; waits for running launches.
    pub fn change<T>(&self, f: impl FnOnce(&mut Memory) -> T) -> T {
        f(&mut self.memory.write().unwrap_or_else(|e| e.into_inner()))
    }
}

/// A context.
pub struct Context {
    /// Device it belongs to.
    pub device: usize,
    /// Set for a device's primary context.
    pub primary: bool,
    /// Retains of a primary context that were not released.
    pub retained: u32,
    /// The error that stays once a launch failed.
    pub error: Option<Code>,
    /// The stream that stands for the null stream.
    pub null_stream: Handle,
    /// Flags it was made with.
    pub flags: u32,
    /// `CUlimit` values that were set.
    pub limits: BTreeMap<u32, usize>,
    /// `CUfunc_cache`, kept and without effect.
    pub cache: u32,
}

/// A stream.
pub struct Stream {
    /// Its context.
    pub context: Handle,
    /// Does not wait for the null stream, nor the null stream for it.
    pub non_blocking: bool,
    /// Priority as given, brought into range.
    pub priority: i32,
    /// The operation queued last.
    pub last: Option<OpId>,
    /// Operations that the next one has to wait for.
    pub waits: Vec<OpId>,
    /// Its part in a capture.
    pub captured: Option<Captured>,
}

/// An event.
pub struct Event {
    /// Its context.
    pub context: Handle,
    /// Made with `CU_EVENT_DISABLE_TIMING`.
    pub no_timing: bool,
    /// The last record.
    pub recorded: Recorded,
}

/// What the last record of an event left.
#[derive(Clone)]
pub enum Recorded {
    /// There was none.
    Never,
    /// The recording operation and where it leaves the time.
    Queued(OpId, Arc<Mutex<Option<Instant>>>),
    /// A place in a capture.
    Captured(Captured),
}

/// An allocation that has not been freed.
pub struct Allocation {
    /// Bytes.
    pub len: usize,
    /// Context it was made in.
    pub context: Handle,
    /// Device it lies on.
    pub device: usize,
    /// Made in stream order, from this pool.
    pub pool: Option<Handle>,
    /// How it came to be.
    pub origin: Origin,
}

/// How an allocation came to be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// At once.
    Call,
    /// In stream order, by this operation.
    Stream(OpId),
    /// By a node of a graph; `live` from its launch to its free.
    Graph {
        /// Whether it is allocated in the order of calls.
        live: bool,
    },
}

/// Pinned host memory.
#[derive(Clone, Copy)]
pub struct Pinned {
    /// Bytes.
    pub len: usize,
    /// Allocated by the library rather than registered with it.
    pub own: bool,
    /// Context it was made in.
    pub context: Handle,
    /// Flags of the allocation.
    pub flags: u32,
}

/// A memory pool.
pub struct Pool {
    /// Its device.
    pub device: usize,
    /// The one a device has from the start.
    pub default: bool,
    /// Set as the device's current one.
    pub current: bool,
    /// Most bytes; 0 for all.
    pub max: u64,
    /// `CU_MEMPOOL_ATTR_RELEASE_THRESHOLD`, kept and without effect.
    pub threshold: u64,
    /// The three attributes about reuse, kept and without effect.
    pub reuse: [i32; 3],
    /// Most bytes in use at once.
    pub high: u64,
}

impl Pool {
    /// A pool with the settings of the documentation.
    pub fn new(device: usize, default: bool, max: u64) -> Pool {
        Pool { device, default, current: false, max, threshold: 0, reuse: [1; 3], high: 0 }
    }
}

/// Everything with a handle, and the operations that have not ended.
pub struct State {
    /// `cuInit` was called.
    pub initialised: bool,
    /// Contexts.
    pub contexts: Table<Context>,
    /// Streams.
    pub streams: Table<Stream>,
    /// The stream of each thread behind `CU_STREAM_PER_THREAD`.
    pub thread_streams: BTreeMap<Handle, Vec<(ThreadId, Handle)>>,
    /// Events.
    pub events: Table<Event>,
    /// Captures in progress.
    pub captures: Table<Capture>,
    /// Graphs.
    pub graphs: Table<Graph>,
    /// Graphs that can be launched.
    pub executables: Table<Executable>,
    /// Modules.
    pub modules: Table<Arc<Module>>,
    /// Functions.
    pub functions: Table<Arc<Function>>,
    /// Device allocations by address.
    pub allocations: BTreeMap<u64, Allocation>,
    /// Variables of modules by address: their bytes.
    pub variables: BTreeMap<u64, usize>,
    /// Pinned host memory by address.
    pub pinned: BTreeMap<usize, Pinned>,
    /// Memory pools.
    pub pools: Table<Pool>,
    /// Bytes allocated on each device.
    pub used: Vec<u64>,
    /// Operations.
    pub queue: Queue,
    /// Nodes of failed captures. Operations of other libraries may call back when they go, so they are dropped without the lock.
    pub trash: Vec<Node>,
    /// Texts handed out for ever.
    pub texts: BTreeMap<String, &'static std::ffi::CStr>,
    /// Texts of faults by code, for `cuGetErrorString`.
    pub fault_texts: BTreeMap<u32, &'static std::ffi::CStr>,
}

/// The whole library.
pub struct Driver {
    /// Settings.
    pub config: Config,
    /// Devices.
    pub devices: Vec<Device>,
    state: Mutex<State>,
    /// Signalled when an operation ends.
    pub changed: Condvar,
}

thread_local! {
    /// Contexts current to this thread; the last is the current one.
    pub static CURRENT: std::cell::RefCell<Vec<Handle>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// The one instance.
pub fn driver() -> &'static Driver {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    DRIVER.get_or_init(|| Driver::new(Config::from_env()))
}

impl Driver {
    fn new(config: Config) -> Driver {
        let device = |ordinal| Device {
            ordinal,
            memory: RwLock::new(Memory::starting_at(vgpu::memory::BASE + ordinal as u64 * DEVICE_STRIDE)),
        };
        Driver {
            devices: (0..config.devices).map(device).collect(),
            state: Mutex::new(State {
                initialised: false,
                contexts: Table::new(0x51),
                streams: Table::new(0x52),
                thread_streams: BTreeMap::new(),
                events: Table::new(0x53),
                captures: Table::new(0x56),
                graphs: Table::new(0x57),
                executables: Table::new(0x58),
                modules: Table::new(0x54),
                functions: Table::new(0x55),
                allocations: BTreeMap::new(),
                variables: BTreeMap::new(),
                pinned: BTreeMap::new(),
                pools: Table::new(0x59),
                used: vec![0; config.devices],
                queue: Queue::new(config.seed),
                trash: Vec::new(),
                texts: BTreeMap::new(),
                fault_texts: BTreeMap::new(),
            }),
            config,
            changed: Condvar::new(),
        }
    }

    /// The state, locked. Never held while an operation runs.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The device that an address belongs to, allocated or not.
    pub fn device_of(&self, address: u64) -> Option<&Device> {
        let at = address.checked_sub(vgpu::memory::BASE)?;
        self.devices.get(usize::try_from(at / DEVICE_STRIDE).ok()?)
    }

    /// Starts an allocation whose address was given out before.
    pub fn commit(&self, address: u64) -> vgpu::Result<()> {
        match self.device_of(address) {
            Some(d) => d.change(|m| m.commit(address)),
            None => Err(vgpu::Error::Invalid(format!("{address:#x} is no address of a device"))),
        }
    }

    /// Ends an allocation in the memory of its device.
    pub fn release(&self, address: u64) -> vgpu::Result<()> {
        match self.device_of(address) {
            Some(d) => d.change(|m| m.free(address)),
            None => Err(vgpu::Error::Invalid(format!("{address:#x} is no address of a device"))),
        }
    }
}

impl State {
    /// The context current to this thread, whatever its errors.
    pub fn current(&self) -> Result<Handle> {
        if !self.initialised {
            return Err(Code::NOT_INITIALIZED);
        }
        let current = CURRENT.with_borrow(|c| c.last().copied()).filter(|h| *h != Handle::NULL);
        let handle = current.ok_or(Code::INVALID_CONTEXT)?;
        match self.contexts.get(handle) {
            Ok(_) => Ok(handle),
            Err(_) => Err(Code::CONTEXT_IS_DESTROYED),
        }
    }

    /// The current context, or the error that stays with it.
    pub fn healthy(&self) -> Result<Handle> {
        let c = self.current()?;
        self.check(c)?;
        Ok(c)
    }

    /// The error that stays with a context.
    pub fn check(&self, context: Handle) -> Result {
        match self.contexts.get(context)?.error {
            Some(code) => Err(code),
            None => Ok(()),
        }
    }

    /// The device of a context.
    pub fn device(&self, context: Handle) -> Result<usize> {
        Ok(self.contexts.get(context)?.device)
    }

    /// Makes a stream in a context.
    pub fn new_stream(&mut self, context: Handle, non_blocking: bool, priority: i32) -> Handle {
        self.streams.insert(Stream { context, non_blocking, priority, last: None, waits: Vec::new(), captured: None })
    }

    /// Makes a context on a device.
    pub fn new_context(&mut self, device: usize, primary: bool, flags: u32) -> Handle {
        let handle = self.contexts.insert(Context {
            device,
            primary,
            retained: 0,
            error: None,
            null_stream: Handle::NULL,
            flags,
            limits: BTreeMap::new(),
            cache: 0,
        });
        let null_stream = self.new_stream(handle, false, 0);
        if let Ok(c) = self.contexts.get_mut(handle) {
            c.null_stream = null_stream;
        }
        handle
    }

    /// The stream behind a handle; 0 and 1 are the current context's null stream, 2 is the thread's own.
    pub fn stream(&mut self, handle: Handle) -> Result<Handle> {
        let context = self.current()?;
        match handle.0 {
            0 | 1 => Ok(self.contexts.get(context)?.null_stream),
            2 => {
                let me = std::thread::current().id();
                let known = self.thread_streams.entry(context).or_default();
                if let Some((_, h)) = known.iter().find(|(t, _)| *t == me) {
                    return Ok(*h);
                }
                let made = self.new_stream(context, false, 0);
                self.thread_streams.entry(context).or_default().push((me, made));
                Ok(made)
            }
            _ => {
                let s = self.streams.get(handle)?;
                // Streams that stand for the null streams have no handle of their own.
                match self.contexts.get(s.context)?.null_stream == handle {
                    true => Err(Code::INVALID_HANDLE),
                    false => Ok(handle),
                }
            }
        }
    }

    /// Notes the error that stays with a context and the text that explains it.
    pub fn fail(&mut self, context: Handle, code: Code, text: &str) {
        if let Ok(c) = self.contexts.get_mut(context) {
            c.error.get_or_insert(code);
        }
        if let Ok(s) = CString::new(format!("{}: {text}", code.text().map_or("error".into(), |t| t.to_string_lossy())))
        {
            // Callers may keep the text of an error for ever; there are few faults in a process.
            self.fault_texts.entry(code.0).or_insert_with(|| Box::leak(s.into_boxed_c_str()));
        }
    }

    /// A text that the caller may keep for ever. The same text is kept once.
    pub fn keep(&mut self, text: &str) -> Result<&'static std::ffi::CStr> {
        if let Some(t) = self.texts.get(text) {
            return Ok(t);
        }
        let kept: &'static std::ffi::CStr =
            Box::leak(CString::new(text).map_err(|_| Code::UNKNOWN)?.into_boxed_c_str());
        self.texts.insert(text.to_owned(), kept);
        Ok(kept)
    }
}
