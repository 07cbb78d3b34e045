//! What a stream can be asked to do, and how it is done on the memories of the devices.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vgpu::{Error, FaultKind};

use crate::code::Code;
use crate::driver::Driver;
use crate::ffi::{Handle, HostAddress, IN_HOST_FUNCTION, host_bytes};
use crate::module::Function;

/// One end of a copy.
#[derive(Clone)]
pub enum Place {
    /// A device address.
    Device(u64),
    /// Host memory that is read or written when the copy runs.
    Host(HostAddress),
    /// Host bytes taken when the copy was queued.
    Staged(Arc<Vec<u8>>),
}

/// A copy of `height` rows of `width` bytes; the pitches are the distances of rows in bytes.
#[derive(Clone)]
pub struct Copy {
    /// Destination; never `Staged`.
    pub to: Place,
    /// Source.
    pub from: Place,
    /// Bytes of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Distance of rows at the destination.
    pub to_pitch: usize,
    /// Distance of rows at the source.
    pub from_pitch: usize,
}

/// Sets `height` rows of `width` elements of `size` bytes to `value`.
#[derive(Clone)]
pub struct Fill {
    /// First address.
    pub to: u64,
    /// The element, in its low bytes.
    pub value: u32,
    /// Bytes of an element: 1, 2 or 4.
    pub size: usize,
    /// Elements of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Distance of rows in bytes.
    pub pitch: usize,
}

/// A launch with the bytes of its arguments as they were when it was queued.
pub struct Launch {
    /// The kernel.
    pub function: Arc<Function>,
    /// Shape and limits.
    pub config: vgpu::Config,
    /// Bytes of each parameter.
    pub args: Vec<Vec<u8>>,
    /// The device.
    pub device: usize,
}

/// An operation of another library in stream order; see `private.rs`.
pub struct External {
    /// Runs it: 0 done, 1 not ready, else an error code.
    pub run: unsafe extern "C" fn(*mut c_void, i32) -> i32,
    /// Called once when it will not run again.
    pub drop: Option<unsafe extern "C" fn(*mut c_void)>,
    /// Handed to both.
    pub data: usize,
    /// For messages.
    pub name: String,
}

impl Drop for External {
    fn drop(&mut self) {
        if let Some(f) = self.drop {
            // SAFETY: the library that queued the operation promises that `drop` may be called once with `data`.
            unsafe { f(self.data as *mut c_void) };
        }
    }
}

/// `CUstreamCallback`.
pub type StreamCallback = Option<unsafe extern "C" fn(Handle, Code, *mut c_void)>;

/// An operation. Cloning is cheap; a graph runs its operations many times.
#[derive(Clone)]
pub enum Op {
    /// Only a place in the order.
    Marker,
    /// Leaves the time at which the stream came here.
    Record(Arc<Mutex<Option<Instant>>>),
    /// A kernel.
    Launch(Arc<Launch>),
    /// A copy.
    Copy(Copy),
    /// A fill.
    Fill(Fill),
    /// A host function with its argument.
    Host(unsafe extern "C" fn(*mut c_void), usize),
    /// A host function that is told the stream and its status.
    Callback(unsafe extern "C" fn(Handle, Code, *mut c_void), Handle, usize),
    /// The start of an allocation in stream order.
    Commit(u64),
    /// The end of an allocation.
    Free(u64),
    /// Another library's.
    External(Arc<External>),
}

/// How an attempt to run an operation ended.
pub enum Ran {
    /// It is done.
    Done,
    /// Something outside has to happen first.
    NotReady,
    /// It failed; the text is for the user.
    Failed(Code, String, Option<Box<vgpu::Fault>>),
}

/// The code that a real device would give for a fault, or the nearest one.
fn code_of(kind: FaultKind) -> Code {
    match kind {
        FaultKind::OutOfBounds | FaultKind::UseAfterFree | FaultKind::ReadOnly => Code::ILLEGAL_ADDRESS,
        FaultKind::Misaligned => Code::MISALIGNED_ADDRESS,
        FaultKind::Assert => Code::ASSERT,
        FaultKind::Deadlock | FaultKind::Watchdog => Code::LAUNCH_TIMEOUT,
        _ => Code::LAUNCH_FAILED,
    }
}

fn failed(e: Error, what: &str) -> Ran {
    match e {
        Error::Fault(f) => Ran::Failed(code_of(f.kind), Error::Fault(f.clone()).to_string(), Some(f)),
        Error::Unsupported { .. } => Ran::Failed(Code::ILLEGAL_INSTRUCTION, format!("{what}: {e}"), None),
        e => Ran::Failed(Code::ILLEGAL_ADDRESS, format!("{what}: {e}"), None),
    }
}

impl Op {
    /// Short name for messages.
    pub fn name(&self) -> &str {
        match self {
            Op::Marker => "marker",
            Op::Record(_) => "event record",
            Op::Launch(l) => &l.function.name,
            Op::Copy(_) => "copy",
            Op::Fill(_) => "memset",
            Op::Host(..) | Op::Callback(..) => "host function",
            Op::Commit(_) => "allocation",
            Op::Free(_) => "free",
            Op::External(x) => &x.name,
        }
    }

    /// Runs it; `forced` says that something waits for it. No lock of the driver is held.
    pub fn run(&self, driver: &Driver, forced: bool) -> Ran {
        match self {
            Op::Marker => Ran::Done,
            Op::Record(stamp) => {
                *stamp.lock().unwrap_or_else(|e| e.into_inner()) = Some(Instant::now());
                Ran::Done
            }
            Op::Launch(l) => launch(driver, l),
            Op::Copy(c) => match copy(driver, c) {
                Ok(()) => Ran::Done,
                Err(e) => failed(e, "copy"),
            },
            Op::Fill(f) => match fill(driver, f) {
                Ok(()) => Ran::Done,
                Err(e) => failed(e, "memset"),
            },
            Op::Host(f, data) => {
                IN_HOST_FUNCTION.set(true);
                // SAFETY: who queued the function promises that it may be called with `data` from any thread.
                unsafe { f(*data as *mut c_void) };
                IN_HOST_FUNCTION.set(false);
                Ran::Done
            }
            Op::Callback(f, stream, data) => {
                IN_HOST_FUNCTION.set(true);
                // SAFETY: as for host functions.
                unsafe { f(*stream, Code::SUCCESS, *data as *mut c_void) };
                IN_HOST_FUNCTION.set(false);
                Ran::Done
            }
            Op::Commit(address) => match driver.commit(*address) {
                Ok(()) => Ran::Done,
                Err(e) => failed(e, "allocation"),
            },
            Op::Free(address) => match driver.release(*address) {
                Ok(()) => Ran::Done,
                Err(e) => failed(e, "free"),
            },
            Op::External(x) => {
                // SAFETY: the library that queued it promises that `run` may be called with `data` from any thread.
                match unsafe { (x.run)(x.data as *mut c_void, i32::from(forced)) } {
                    0 => Ran::Done,
                    1 => Ran::NotReady,
                    code => {
                        let code = Code(code as u32);
                        Ran::Failed(code, format!("{}: {code:?}", x.name), None)
                    }
                }
            }
        }
    }
}

fn launch(driver: &Driver, l: &Launch) -> Ran {
    static RAN: AtomicU64 = AtomicU64::new(0);
    let number = RAN.fetch_add(1, Relaxed) + 1;
    if number >= driver.config.lost {
        return Ran::Failed(Code::ECC_UNCORRECTABLE, format!("launch {number}: the device is lost (VGPU_LOST)"), None);
    }
    let memory = driver.devices[l.device].memory();
    let args: Vec<&[u8]> = l.args.iter().map(Vec::as_slice).collect();
    match l.function.module.image.launch(&l.function.name, &l.config, &args, &memory) {
        Ok(counters) => {
            crate::totals::add(&counters);
            Ran::Done
        }
        Err(Error::Invalid(m)) => Ran::Failed(Code::LAUNCH_FAILED, format!("kernel {}: {m}", l.function.name), None),
        Err(e) => failed(e, &l.function.name),
    }
}

fn nowhere(address: u64, len: usize) -> Error {
    Error::Invalid(format!("{len} bytes at {address:#x}, which is no address of a device"))
}

fn copy(driver: &Driver, c: &Copy) -> vgpu::Result<()> {
    for row in 0..c.height {
        let (to_offset, from_offset) = (row * c.to_pitch, row * c.from_pitch);
        // Between devices, too, what was never written stays so.
        if let (Place::Device(to), Place::Device(from)) = (&c.to, &c.from) {
            let (to, from) = (to + to_offset as u64, from + from_offset as u64);
            let (a, b) = (driver.device_of(to), driver.device_of(from));
            let (a, b) = (a.ok_or_else(|| nowhere(to, c.width))?, b.ok_or_else(|| nowhere(from, c.width))?);
            if a.ordinal == b.ordinal {
                a.memory().copy(to, from, c.width)?;
            } else {
                // Always in this order, so that two copies that go both ways cannot hold one memory each and wait for the other.
                let (first, second) = if a.ordinal < b.ordinal { (a, b) } else { (b, a) };
                let (m, n) = (first.memory(), second.memory());
                let (m, n) = if first.ordinal == a.ordinal { (&m, &n) } else { (&n, &m) };
                m.copy_from(to, n, from, c.width)?;
            }
            continue;
        }
        let bytes = match &c.from {
            Place::Device(from) => {
                let from = from + from_offset as u64;
                let device = driver.device_of(from).ok_or_else(|| nowhere(from, c.width))?;
                let mut bytes = vec![0; c.width];
                device.memory().read(from, &mut bytes)?;
                bytes
            }
            // SAFETY: who queued the copy promises that the host memory is valid until it has run.
            Place::Host(from) => unsafe { host_bytes(from + from_offset, c.width) },
            Place::Staged(bytes) => bytes[from_offset..from_offset + c.width].to_vec(),
        };
        match &c.to {
            Place::Device(to) => {
                let to = to + to_offset as u64;
                let device = driver.device_of(to).ok_or_else(|| nowhere(to, c.width))?;
                device.memory().write(to, &bytes)?;
            }
            // SAFETY: who queued the copy promises that the host memory is valid until it has run.
            Place::Host(to) => unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), (to + to_offset) as *mut u8, c.width);
            },
            Place::Staged(_) => return Err(Error::Invalid("a copy into staged bytes".into())),
        }
    }
    Ok(())
}

fn fill(driver: &Driver, f: &Fill) -> vgpu::Result<()> {
    let element = &f.value.to_le_bytes()[..f.size];
    let row = element.repeat(f.width);
    for i in 0..f.height {
        let to = f.to + (i * f.pitch) as u64;
        let device = driver.device_of(to).ok_or_else(|| nowhere(to, row.len()))?;
        device.memory().write(to, &row)?;
    }
    Ok(())
}
