//! Collectives: a row of chunks. Each rank puts its part of a chunk into its slot and counts `produced` up; each rank
//! then works the parts of all ranks into its result and counts `consumed` up. A rank is at most four chunks ahead.
//!
//! ```text
//! post the call; compare with the calls of all ranks
//! for each chunk k: put    when every rank's consumed > k - SLOTS
//!                   take   when every rank's produced > k
//! ```

use std::slice;
use std::sync::atomic::Ordering::*;

use crate::call::{Call, Kind, Words, describe};
use crate::comm::Comm;
use crate::error::{Failure, Result};
use crate::reduce::reduce;
use crate::shared::{SLOT, SLOTS};

/// Outcome of one step.
pub(crate) enum Step {
    /// The call is done.
    Done,
    /// Something was done, more is left.
    Moved,
    /// Nothing can be done before this rank comes.
    Wait(usize),
}

/// Where a running collective stands.
pub(crate) struct Collective {
    /// Number of the call in the communicator.
    number: u64,
    /// Chunks before this call.
    base: u64,
    chunks: u64,
    put: u64,
    taken: u64,
    posted: bool,
    checked: bool,
    /// Words of all ranks' calls: their factors.
    factors: Vec<u64>,
    scratch: Vec<u8>,
}

/// Bytes of a chunk that one element of the result can take, by kind: a slot is shared by all ranks' parts in a
/// reduce-scatter.
fn chunk_bytes(call: &Call, n: usize) -> usize {
    match call.kind {
        Kind::ReduceScatter => (SLOT / n) & !7,
        _ => SLOT,
    }
}

impl Collective {
    pub fn new(comm: &Comm, call: &Call) -> Collective {
        let me = comm.shared().member(comm.rank);
        let bytes = call.count * call.dtype.size();
        Collective {
            number: me.posted.load(Relaxed),
            base: me.produced.load(Relaxed),
            chunks: bytes.div_ceil(chunk_bytes(call, comm.n)) as u64,
            put: 0,
            taken: 0,
            posted: false,
            checked: false,
            factors: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// Does one piece of work.
    ///
    /// # Errors
    /// If the calls of the ranks differ, or memory is not what the call says.
    pub fn step(&mut self, comm: &Comm, call: &Call) -> Result<Step> {
        let shared = comm.shared();
        let me = shared.member(comm.rank);
        if !self.posted {
            let words = call.words(comm.factor_bits(call.factor, call.dtype)?);
            me.set_current(Some(&words));
            me.post(self.number, &words);
            shared.ring();
            self.posted = true;
            self.check_memory(comm, call)?;
            return Ok(Step::Moved);
        }
        if !self.checked {
            if let Some(r) = self.compare(comm, call)? {
                return Ok(Step::Wait(r));
            }
            self.checked = true;
        }
        if self.taken == self.chunks {
            return Ok(Step::Done);
        }
        let mut missing = None;
        if self.put < self.chunks {
            // Chunk `put` goes into the slot of chunk `put - SLOTS`: all must have read that one.
            let free = (self.base + self.put + 1).saturating_sub(SLOTS as u64);
            match (0..comm.n).find(|r| shared.member(*r).consumed.load(Acquire) < free) {
                None => {
                    self.put(comm, call)?;
                    self.put += 1;
                    me.produced.store(self.base + self.put, Release);
                    shared.ring();
                    return Ok(Step::Moved);
                }
                other => missing = other,
            }
        }
        let full = self.base + self.taken + 1;
        match (0..comm.n).find(|r| shared.member(*r).produced.load(Acquire) < full) {
            None => {
                self.take(comm, call)?;
                self.taken += 1;
                me.consumed.store(self.base + self.taken, Release);
                shared.ring();
                Ok(Step::Moved)
            }
            other => Ok(Step::Wait(other.or(missing).unwrap_or(comm.rank))),
        }
    }

    /// Ranges must be allocated before anything is written, so that an error leaves no half result.
    fn check_memory(&self, comm: &Comm, call: &Call) -> Result<()> {
        let (send, recv) = call.buffers(comm.rank, comm.n);
        let in_place = call.send == call.recv;
        if send > 0 {
            comm.check(call.send, send, false, &format!("{call}: sendbuff"))?;
        }
        if recv > 0 && !in_place {
            comm.check(call.recv, recv, false, &format!("{call}: recvbuff"))?;
        }
        Ok(())
    }

    /// Compares the posted calls; a rank that has not posted is given back.
    fn compare(&mut self, comm: &Comm, call: &Call) -> Result<Option<usize>> {
        let shared = comm.shared();
        let mine = call.words(0);
        let mut factors = vec![0; comm.n];
        let mut missing = None;
        for (r, factor) in factors.iter_mut().enumerate() {
            let Some(mut words) = shared.member(r).posted_call(self.number) else {
                missing = missing.or(Some(r));
                continue;
            };
            *factor = std::mem::take(&mut words[5]);
            if words != mine {
                return Err(self.mismatch(comm, &mine, r, &words));
            }
        }
        self.factors = factors;
        Ok(missing)
    }

    fn mismatch(&self, comm: &Comm, mine: &Words, r: usize, theirs: &Words) -> Failure {
        let mut both = [(comm.rank, mine), (r, theirs)];
        both.sort_by_key(|x| x.0);
        let [a, b] = both.map(|(r, w)| format!("rank {r} calls {}", describe(w)));
        Failure::usage(format!(
            "collective {} of the communicator: {a}, {b}; all ranks have to make the same calls in the same order",
            self.number + 1
        ))
    }

    /// Bytes of chunk `k` of each rank's part, and where they start.
    fn piece(&self, comm: &Comm, call: &Call, k: u64) -> (usize, usize) {
        let total = call.count * call.dtype.size();
        let step = chunk_bytes(call, comm.n);
        let at = k as usize * step;
        (at, step.min(total - at))
    }

    fn put(&mut self, comm: &Comm, call: &Call) -> Result<()> {
        let shared = comm.shared();
        let (at, len) = self.piece(comm, call, self.put);
        let slot = shared.slot(comm.rank, self.base + self.put);
        // SAFETY: the slot is SLOT bytes of this rank; all ranks have consumed its last chunk (checked by the caller),
        // so that nobody reads it until `produced` counts up.
        let slot = unsafe { slice::from_raw_parts_mut(slot, SLOT) };
        let what = || format!("{call}: sendbuff");
        match call.kind {
            Kind::Broadcast if comm.rank != call.peer => Ok(()),
            Kind::ReduceScatter => {
                let (total, step) = (call.count * call.dtype.size(), chunk_bytes(call, comm.n));
                for r in 0..comm.n {
                    let from = call.send + (r * total + at) as u64;
                    comm.read(from, &mut slot[r * step..r * step + len], &what())?;
                }
                Ok(())
            }
            _ => comm.read(call.send + at as u64, &mut slot[..len], &what()),
        }
    }

    fn take(&mut self, comm: &Comm, call: &Call) -> Result<()> {
        let shared = comm.shared();
        let (at, len) = self.piece(comm, call, self.taken);
        let chunk = self.base + self.taken;
        let part = |r: usize, from: usize| {
            // SAFETY: slots are SLOT bytes and `from + len` lies inside; rank `r` has produced this chunk (checked by
            // the caller) and will not write the slot again before this rank's `consumed` counts up.
            unsafe { slice::from_raw_parts(shared.slot(r, chunk).add(from), len) }
        };
        let what = || format!("{call}: recvbuff");
        let total = call.count * call.dtype.size();
        match call.kind {
            Kind::AllGather => {
                for r in 0..comm.n {
                    let to = call.recv + (r * total + at) as u64;
                    // In place, the rank's own part is there already.
                    if r != comm.rank || to != call.send + at as u64 {
                        comm.write(to, part(r, 0), &what())?;
                    }
                }
                Ok(())
            }
            Kind::Broadcast => {
                if comm.rank == call.peer && call.send == call.recv {
                    return Ok(());
                }
                comm.write(call.recv + at as u64, part(call.peer, 0), &what())
            }
            Kind::Reduce if comm.rank != call.peer => Ok(()),
            _ => {
                let from = if call.kind == Kind::ReduceScatter { comm.rank * chunk_bytes(call, comm.n) } else { 0 };
                let parts: Vec<&[u8]> = (0..comm.n).map(|r| part(r, from)).collect();
                self.scratch.resize(len, 0);
                reduce(call.dtype, call.op, &mut self.scratch, &parts, &self.factors);
                comm.write(call.recv + at as u64, &self.scratch, &what())
            }
        }
    }
}
