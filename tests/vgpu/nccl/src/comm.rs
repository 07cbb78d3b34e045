//! A communicator of one rank, and the table of handles.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use crate::call::{Dtype, Factor};
use crate::driver::{Context, Stream, Table};
use crate::error::{Code, Failure, Result, report, say_line};
use crate::join::Job;
use crate::member::{state, thread_id};
use crate::shared::Shared;

/// A lock whose holder panicked is taken all the same: the values guarded here are valid after every statement.
pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// A user's reduction: premultiply by a factor, then sum.
#[derive(Clone, Copy)]
pub(crate) struct UserOp {
    pub dtype: Dtype,
    pub factor: Factor,
}

/// One rank's end of a communicator.
pub struct Comm {
    /// Value of `ncclComm_t`.
    pub(crate) handle: usize,
    pub(crate) rank: usize,
    pub(crate) n: usize,
    pub(crate) device: i32,
    pub(crate) uuid: [u8; 16],
    pub(crate) context: Context,
    /// The context was retained for this communicator and not yet released.
    primary: AtomicBool,
    pub(crate) driver: &'static Table,
    pub(crate) timeout: Duration,
    /// Set once all ranks have joined.
    pub(crate) shared: OnceLock<Arc<Shared>>,
    /// A non-blocking init that goes on.
    pub(crate) job: Mutex<Option<Job>>,
    /// First error; from then on every call gives it.
    pub(crate) failure: OnceLock<Failure>,
    pub(crate) aborted: AtomicBool,
    pub(crate) finalized: AtomicBool,
    /// Destroyed: what graphs still hold must not run.
    pub(crate) destroyed: AtomicBool,
    /// Number of the operation that runs, 0 for none.
    pub(crate) active: AtomicU64,
    /// Operations in the order of their calls, outside of graphs, with the stream of each, until done.
    pub(crate) pending: Mutex<Vec<(u64, Stream)>>,
    /// Streams whose graphs hold operations of this communicator.
    pub(crate) graph_streams: Mutex<Vec<Stream>>,
    pub(crate) splits: AtomicU32,
    pub(crate) user_ops: Mutex<Vec<Option<UserOp>>>,
}

static HANDLES: OnceLock<Mutex<HashMap<usize, Arc<Comm>>>> = OnceLock::new();
static NEXT: AtomicU64 = AtomicU64::new(1);

fn handles() -> MutexGuard<'static, HashMap<usize, Arc<Comm>>> {
    lock(HANDLES.get_or_init(Mutex::default))
}

/// A number for an operation or a handle; never twice in a process.
pub(crate) fn fresh_number() -> u64 {
    NEXT.fetch_add(1, Relaxed)
}

/// `VGPU_NCCL_TIMEOUT` in seconds, 60 without it.
fn timeout() -> Result<Duration> {
    let Ok(text) = std::env::var("VGPU_NCCL_TIMEOUT") else {
        return Ok(Duration::from_secs(60));
    };
    let seconds = text.parse().ok().filter(|s: &f64| *s > 0.0 && *s < 1e6);
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| Failure::argument(format!("VGPU_NCCL_TIMEOUT={text} is not a number of seconds above zero")))
}

impl Comm {
    /// A communicator that has not joined yet, in the table of handles.
    pub(crate) fn new(driver: &'static Table, rank: usize, n: usize, device: Option<i32>) -> Result<Arc<Comm>> {
        // Without a context the runtime's rule holds: device 0.
        let (device, context, primary) = match (device, driver.current()) {
            (None, Some((d, context))) => (d, context, false),
            (d, _) => {
                let d = d.unwrap_or(0);
                (d, driver.primary(d)?, true)
            }
        };
        // Values no address has: a stale or foreign pointer is told apart from a handle.
        let handle = (0x7c01 << 32 | fresh_number() as usize) << 4;
        let comm = Arc::new(Comm {
            handle,
            rank,
            n,
            device,
            uuid: driver.uuid_of(device),
            context,
            primary: AtomicBool::new(primary),
            driver,
            timeout: timeout()?,
            shared: OnceLock::new(),
            job: Mutex::new(None),
            failure: OnceLock::new(),
            aborted: AtomicBool::new(false),
            finalized: AtomicBool::new(false),
            destroyed: AtomicBool::new(false),
            active: AtomicU64::new(0),
            pending: Mutex::new(Vec::new()),
            graph_streams: Mutex::new(Vec::new()),
            splits: AtomicU32::new(0),
            user_ops: Mutex::new(Vec::new()),
        });
        handles().insert(handle, comm.clone());
        Ok(comm)
    }

    /// The communicator of a handle.
    ///
    /// # Errors
    /// For null, and what is no handle or no longer one.
    pub(crate) fn of(handle: usize) -> Result<Arc<Comm>> {
        handles().get(&handle).cloned().ok_or_else(|| {
            Failure::argument(if handle == 0 {
                "the communicator is null".to_owned()
            } else {
                format!("{handle:#x} is no communicator, or was destroyed")
            })
        })
    }

    /// Takes the handle away.
    pub(crate) fn forget(&self) {
        handles().remove(&self.handle);
    }

    /// The communicator, if calls may be made on it now.
    ///
    /// # Errors
    /// Its first error; while a non-blocking init goes on; after finalize.
    pub(crate) fn ready(&self) -> Result<&Arc<Shared>> {
        if let Some(f) = self.failure.get() {
            return Err(Failure { text: format!("the communicator failed before: {}", f.text), ..f.clone() });
        }
        if self.finalized.load(Acquire) {
            return Err(Failure::argument(format!(
                "rank {}: the communicator is finalized; no call may follow",
                self.rank
            )));
        }
        self.shared.get().ok_or_else(|| {
            Failure::argument(format!(
                "rank {}: the communicator is used before its init is done; ask ncclCommGetAsyncError until it gives ncclSuccess",
                self.rank
            ))
        })
    }

    /// The shared memory of a communicator that has joined.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        self.shared.get().expect("operations exist on joined communicators alone")
    }

    /// Keeps the first error, tells the other ranks, prints it.
    pub(crate) fn fail(&self, failure: Failure) -> Failure {
        let failure = Failure { text: format!("rank {} of {}: {}", self.rank, self.n, failure.text), ..failure };
        if self.failure.set(failure.clone()).is_ok() {
            report(&failure);
            if let Some(shared) = self.shared.get() {
                shared.member(self.rank).fail(&failure.text);
                shared.ring();
            }
        }
        failure
    }

    /// Remembers the thread that uses the communicator.
    pub(crate) fn touch(&self) {
        if let Some(shared) = self.shared.get() {
            shared.member(self.rank).tid.store(thread_id(), Relaxed);
        }
    }

    /// Waits until no operation is pending, by making the streams run.
    pub(crate) fn flush(&self) {
        let _within = self.driver.within(self.context);
        loop {
            let first = lock(&self.pending).first().copied();
            let Some((number, stream)) = first else {
                return;
            };
            // SAFETY: the driver validates the handle by its table.
            let code = unsafe { (self.driver.synchronize)(stream.0) };
            let still = lock(&self.pending).first().is_some_and(|p| p.0 == number);
            if still && code != 0 {
                // The stream failed or is gone: what is pending on it will never run.
                lock(&self.pending).retain(|p| p.1 != stream);
            }
        }
    }

    /// Ends the rank's part: by destroy after a flush, or by abort at once.
    pub(crate) fn leave(&self, abort: bool) {
        if abort {
            let left: Vec<u64> = lock(&self.pending).drain(..).map(|p| p.0).collect();
            self.aborted.store(true, Release);
            if !left.is_empty() && self.failure.get().is_none() {
                let (rank, n, left) = (self.rank, self.n, left.len());
                say_line(&format!(
                    "vgpu nccl: rank {rank} of {n}: ncclCommAbort with {left} operations that have not run: their results are lost"
                ));
            }
        }
        if let Some(shared) = self.shared.get() {
            let me = shared.member(self.rank);
            let to = if abort { state::ABORTED } else { state::LEFT };
            // A failed rank keeps its state: the message says more than that it left.
            let _ = me.state.compare_exchange(state::JOINED, to, AcqRel, Acquire);
            shared.ring();
            shared.want(self.rank);
        }
        self.destroyed.store(true, Release);
        self.forget();
        self.release_context();
    }

    /// Gives the primary context back; never from `drop` alone, which the driver may cause while it holds its own lock.
    fn release_context(&self) {
        if self.primary.swap(false, AcqRel) {
            // SAFETY: the driver validates the device, whose context `new` retained.
            unsafe { (self.driver.release)(self.device) };
        }
    }

    /// The factor's bits, read from the device if it lies there.
    pub(crate) fn factor_bits(&self, factor: Factor, dtype: Dtype) -> Result<u64> {
        match factor {
            Factor::None => Ok(0),
            Factor::Host(bits) => Ok(bits),
            Factor::Device(address) => {
                let mut bytes = [0; 8];
                let bytes = &mut bytes[..dtype.size()];
                self.read(address, bytes, "the factor of a premultiplied sum")?;
                let mut all = [0; 8];
                all[..bytes.len()].copy_from_slice(bytes);
                Ok(u64::from_le_bytes(all))
            }
        }
    }

    /// Copies device bytes that must have been written.
    pub(crate) fn read(&self, address: u64, to: &mut [u8], what: &str) -> Result<()> {
        self.check(address, to.len(), true, what)?;
        // SAFETY: `to` is `to.len()` writable bytes; the driver checks the device's side.
        let code = unsafe { (self.driver.read)(address, to.as_mut_ptr().cast(), to.len()) };
        self.driver_error(code, address, to.len(), what)
    }

    /// Copies bytes to the device.
    pub(crate) fn write(&self, address: u64, from: &[u8], what: &str) -> Result<()> {
        // SAFETY: `from` is `from.len()` readable bytes; the driver checks the device's side.
        let code = unsafe { (self.driver.write)(address, from.as_ptr().cast(), from.len()) };
        self.driver_error(code, address, from.len(), what)
    }

    /// Asks the driver whether a range is allocated, and written if `written`.
    pub(crate) fn check(&self, address: u64, bytes: usize, written: bool, what: &str) -> Result<()> {
        // SAFETY: the driver only looks its tables up.
        let code = unsafe { (self.driver.check)(address, bytes, i32::from(written)) };
        if code == 0 || !written {
            return self.driver_error(code, address, bytes, what);
        }
        // SAFETY: as above.
        let allocated = unsafe { (self.driver.check)(address, bytes, 0) };
        self.driver_error(allocated, address, bytes, what)?;
        let text = format!("{what}: of {bytes} bytes at {address:#x} some were never written");
        Err(Failure::usage(text))
    }

    fn driver_error(&self, code: i32, address: u64, bytes: usize, what: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let text = format!("{what}: {bytes} bytes at {address:#x} are not memory of a device (driver error {code})");
        let failure = Failure::new(Code::UnhandledCudaError, text);
        // To the driver, 0 and 1 mean "done" and "not ready".
        Err(if code > 1 { failure.with_cuda(code) } else { failure })
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        // Only a communicator whose init failed comes here with its context.
        self.release_context();
    }
}
