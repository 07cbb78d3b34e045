//! Operations in stream order: what the driver polls.

use std::ffi::{CString, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};

use crate::call::{Call, Kind};
use crate::comm::{Comm, fresh_number, lock};
use crate::driver::{Release, Run, Stream};
use crate::engine::{Collective, Step};
use crate::error::{Code, Failure, Result, cuda, say_line};
use crate::point::Points;
use crate::stall::Stall;

const DONE: c_int = 0;
const NOT_READY: c_int = 1;
/// Steps of one poll: after about so many megabytes other streams of the thread have their turn.
const STEPS: usize = 8;

enum Stage {
    Idle,
    Collective(usize, Box<Collective>),
    Points(Points),
}

struct Running {
    stage: Stage,
    stall: Stall,
}

/// The calls of one group on one communicator; alone, a group of one. Collectives run in order, then all sends and
/// receives together. A graph runs it many times, one after the other.
pub(crate) struct Operation {
    number: u64,
    comm: Arc<Comm>,
    collectives: Vec<Call>,
    points: Vec<Call>,
    /// The first runs the operation; the others come to it and wait until it is done.
    streams: Vec<Stream>,
    captured: bool,
    running: Mutex<Running>,
    arrived: AtomicUsize,
    rounds: AtomicU64,
}

/// What a further stream of a group enqueues.
struct Arrival {
    operation: Arc<Operation>,
    round: Mutex<Option<u64>>,
}

/// With `VGPU_CALLS=1`, a line for each call, as the driver says its own.
fn say(call: &Call) {
    static ON: OnceLock<bool> = OnceLock::new();
    if *ON.get_or_init(|| std::env::var_os("VGPU_CALLS").is_some_and(|v| v != "0")) {
        say_line(&format!("vgpu: {call}"));
    }
}

/// Puts the calls of a group on one communicator into their streams.
///
/// # Errors
/// If a stream is no stream, or the driver refuses.
pub(crate) fn enqueue(comm: &Arc<Comm>, calls: &[(Stream, Call)]) -> Result<()> {
    calls.iter().for_each(|(_, call)| say(call));
    let point = |c: &Call| matches!(c.kind, Kind::Send | Kind::Recv);
    let mut streams: Vec<Stream> = Vec::new();
    for (stream, _) in calls {
        if !streams.contains(stream) {
            streams.push(*stream);
        }
    }
    // The null stream means that of the communicator's device, whatever is current.
    let _within = comm.driver.within(comm.context);
    let captured = comm.driver.is_capturing(streams[0])?;
    let operation = Arc::new(Operation {
        number: fresh_number(),
        comm: comm.clone(),
        collectives: calls.iter().map(|c| c.1).filter(|c| !point(c)).collect(),
        points: calls.iter().map(|c| c.1).filter(point).collect(),
        captured,
        running: Mutex::new(Running { stage: Stage::Idle, stall: Stall::default() }),
        arrived: AtomicUsize::new(0),
        rounds: AtomicU64::new(0),
        streams,
    });
    let name = match calls {
        [(_, one)] => one.kind.name(),
        _ => "ncclGroup",
    };
    let name = CString::new(name).expect("names hold no zero byte");
    let mut known = lock(&comm.graph_streams);
    for stream in operation.streams.iter().filter(|_| captured) {
        if !known.contains(stream) {
            known.push(*stream);
        }
    }
    drop(known);
    if !captured {
        lock(&comm.pending).push((operation.number, operation.streams[0]));
    }
    // No lock is held from here on: an eager driver runs the operation inside of the call.
    for (i, stream) in operation.streams.iter().enumerate() {
        let (run, release, data): (Run, Release, *mut c_void) = if i == 0 {
            let data = Box::into_raw(Box::new(operation.clone()));
            (run_operation, drop_operation, data.cast())
        } else {
            let arrival = Arrival { operation: operation.clone(), round: Mutex::new(None) };
            (run_arrival, drop_arrival, Box::into_raw(Box::new(arrival)).cast())
        };
        // SAFETY: `data` is what the two functions expect; the driver takes it over and releases it once with the
        // second. When it refuses it may keep it for ever: a leak, on a stream that is lost.
        let code = unsafe { (comm.driver.enqueue)(stream.0, run, release, data, name.as_ptr()) };
        if code != 0 {
            lock(&comm.pending).retain(|p| p.0 != operation.number);
            return Err(Failure::new(
                Code::UnhandledCudaError,
                format!("rank {}: {name:?} cannot be enqueued: driver error {code}", comm.rank),
            ));
        }
    }
    Ok(())
}

/// Runs `f`; a panic must not cross into the driver.
fn guarded(f: impl FnOnce() -> c_int) -> c_int {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or(cuda::UNKNOWN)
}

unsafe extern "C" fn run_operation(data: *mut c_void, forced: c_int) -> c_int {
    // SAFETY: the driver gives back the pointer of `enqueue`, which lives until `drop_operation`.
    let operation = unsafe { &*data.cast::<Arc<Operation>>() };
    guarded(|| operation.poll(forced != 0))
}

unsafe extern "C" fn drop_operation(data: *mut c_void) {
    // SAFETY: the driver releases the pointer of `enqueue` once and never uses it again.
    let operation = unsafe { Box::from_raw(data.cast::<Arc<Operation>>()) };
    guarded(|| {
        operation.dropped();
        DONE
    });
}

unsafe extern "C" fn run_arrival(data: *mut c_void, _forced: c_int) -> c_int {
    // SAFETY: as for `run_operation`.
    let arrival = unsafe { &*data.cast::<Arrival>() };
    guarded(|| arrival.poll())
}

unsafe extern "C" fn drop_arrival(data: *mut c_void) {
    // SAFETY: as for `drop_operation`.
    drop(unsafe { Box::from_raw(data.cast::<Arrival>()) });
}

impl Arrival {
    fn poll(&self) -> c_int {
        let op = &self.operation;
        let mut round = lock(&self.round);
        if round.is_none() {
            *round = Some(op.rounds.load(Acquire));
            op.arrived.fetch_add(1, AcqRel);
        }
        let over = op.comm.aborted.load(Acquire) || op.rounds.load(Acquire) > round.unwrap_or(0);
        if let Some(f) = op.comm.failure.get() {
            return f.cuda;
        }
        if over {
            *round = None;
            return DONE;
        }
        NOT_READY
    }
}

impl Operation {
    fn poll(&self, forced: bool) -> c_int {
        let mut running = match self.running.try_lock() {
            Ok(r) => r,
            Err(TryLockError::Poisoned(r)) => r.into_inner(),
            // Another thread polls it.
            Err(TryLockError::WouldBlock) => return NOT_READY,
        };
        if self.comm.aborted.load(Acquire) {
            self.finish(&mut running);
            return DONE;
        }
        if let Some(f) = self.comm.failure.get() {
            self.finish(&mut running);
            return f.cuda;
        }
        if self.comm.destroyed.load(Acquire) {
            let text = "an operation of a graph runs on a communicator that was destroyed".to_owned();
            return self.comm.fail(Failure::usage(text)).cuda;
        }
        match self.advance(&mut running, forced) {
            Ok(true) => {
                self.finish(&mut running);
                DONE
            }
            Ok(false) => NOT_READY,
            Err(f) => {
                let f = self.comm.fail(f);
                self.finish(&mut running);
                f.cuda
            }
        }
    }

    /// Takes a few steps; true when done.
    fn advance(&self, running: &mut Running, forced: bool) -> Result<bool> {
        let comm = &self.comm;
        let mut verdict = None;
        for _ in 0..STEPS {
            let bell = comm.shared().bell();
            if matches!(running.stage, Stage::Idle) {
                if !self.has_turn() {
                    return Ok(false);
                }
                running.stage = self.stage(0);
            }
            let step = match &mut running.stage {
                Stage::Idle => Step::Done,
                Stage::Collective(i, c) => c.step(comm, &self.collectives[*i])?,
                Stage::Points(p) => p.step(comm)?,
            };
            match step {
                Step::Moved => {
                    verdict = None;
                    comm.advanced(&mut running.stall);
                }
                Step::Done => {
                    comm.advanced(&mut running.stall);
                    running.stage = match running.stage {
                        Stage::Collective(i, _) => self.stage(i + 1),
                        _ => Stage::Idle,
                    };
                    if matches!(running.stage, Stage::Idle) {
                        return Ok(true);
                    }
                }
                Step::Wait(other) => {
                    if let Some(f) = verdict {
                        return Err(f);
                    }
                    let what = || self.waiting_call(&running.stage);
                    match comm.stalled(&mut running.stall, other, &what) {
                        Ok(()) => {
                            // Ranks of this process are run by the same executor, which waits by itself.
                            if forced && comm.shared().member(other).pid.load(Relaxed) != std::process::id() {
                                comm.pause(&mut running.stall, bell);
                            }
                            return Ok(false);
                        }
                        Err(f) => verdict = Some(f),
                    }
                }
            }
        }
        verdict.map_or(Ok(false), Err)
    }

    fn waiting_call(&self, stage: &Stage) -> String {
        match stage {
            Stage::Collective(i, _) => self.collectives[*i].to_string(),
            _ => {
                let words = self.comm.shared().member(self.comm.rank).current();
                words.map_or_else(|| "a group".to_owned(), |w| crate::call::describe(&w))
            }
        }
    }

    /// One communicator runs one operation at a time, in the order of the calls; operations of graphs when they come.
    fn has_turn(&self) -> bool {
        if self.arrived.load(Acquire) + 1 < self.streams.len() {
            return false;
        }
        if !self.captured && lock(&self.comm.pending).first().is_none_or(|p| p.0 != self.number) {
            return false;
        }
        let active = self.comm.active.compare_exchange(0, self.number, AcqRel, Acquire);
        active.is_ok()
    }

    /// Collective `i`, or the sends and receives after the last one.
    fn stage(&self, i: usize) -> Stage {
        match self.collectives.get(i) {
            Some(call) => Stage::Collective(i, Box::new(Collective::new(&self.comm, call))),
            None if self.points.is_empty() => Stage::Idle,
            None => Stage::Points(Points::new(&self.points)),
        }
    }

    /// Ready for the next round, or never asked again.
    fn finish(&self, running: &mut Running) {
        running.stage = Stage::Idle;
        running.stall = Stall::default();
        let was_active = self.comm.active.compare_exchange(self.number, 0, AcqRel, Acquire).is_ok();
        if was_active {
            let me = self.comm.shared().member(self.comm.rank);
            me.set_current(None);
            me.waits_for.store(crate::member::NOBODY, Release);
        }
        lock(&self.comm.pending).retain(|p| p.0 != self.number);
        self.arrived.fetch_sub(self.arrived.load(Acquire).min(self.streams.len() - 1), AcqRel);
        self.rounds.fetch_add(1, AcqRel);
    }

    /// The driver gave the operation up: done, or its stream or graph went away.
    fn dropped(&self) {
        lock(&self.comm.pending).retain(|p| p.0 != self.number);
        if self.comm.active.load(Acquire) == self.number {
            let text = "a running operation was taken from its stream".to_owned();
            self.comm.fail(Failure::new(Code::UnhandledCudaError, text));
            self.comm.active.store(0, Release);
        }
    }
}
