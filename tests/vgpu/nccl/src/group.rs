//! Groups of calls: what `ncclGroupStart` holds back and `ncclGroupEnd` does.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

use crate::call::Call;
use crate::comm::{Comm, lock};
use crate::driver::Stream;
use crate::error::{Code, Failure, Result};
use crate::join::{Job, Split, SplitStep};
use crate::member::state;
use crate::operation::enqueue;

/// An init or split that waits for the end of the group.
pub(crate) enum Start {
    /// A communicator that joins; with `false` the caller does not wait for it.
    Init(Arc<Comm>, Job, bool),
    /// A split, and where its communicator goes.
    Split(Split, *mut usize),
}

/// The calls of a group on one communicator.
type OfComm = (Arc<Comm>, Vec<(Stream, Call)>);

#[derive(Default)]
struct Group {
    depth: usize,
    calls: Vec<(Arc<Comm>, Stream, Call)>,
    starts: Vec<Start>,
    /// First error inside the group: its end gives it again and does nothing.
    failure: Option<Failure>,
}

thread_local! {
    static GROUP: RefCell<Group> = RefCell::default();
    /// Communicators this thread has used outside of a group, with the rank.
    static ALONE: RefCell<HashMap<String, usize>> = RefCell::default();
}

/// Opens a group, or a group in a group.
pub(crate) fn start() {
    GROUP.with(|g| g.borrow_mut().depth += 1);
}

/// Remembers an error for the end of the group.
pub(crate) fn note(failure: &Failure) {
    GROUP.with(|g| {
        let mut g = g.borrow_mut();
        if g.depth > 0 && g.failure.is_none() {
            g.failure = Some(failure.clone());
        }
    });
}

fn inside() -> bool {
    GROUP.with(|g| g.borrow().depth > 0)
}

/// A checked call: kept for the end of the group, or enqueued.
pub(crate) fn submit(comm: Arc<Comm>, stream: Stream, call: Call) -> Result<()> {
    if inside() {
        GROUP.with(|g| g.borrow_mut().calls.push((comm, stream, call)));
        return Ok(());
    }
    one_rank_per_thread(&comm)?;
    enqueue(&comm, &[(stream, call)])
}

/// One thread may drive several ranks only inside of groups: outside, the first call may wait for the second.
fn one_rank_per_thread(comm: &Comm) -> Result<()> {
    let shared = comm.shared();
    ALONE.with(|a| {
        let mut alone = a.borrow_mut();
        match alone.get(shared.name()) {
            Some(other) if *other != comm.rank && shared.member(*other).state.load(Acquire) == state::JOINED => {
                Err(Failure::usage(format!(
                    "ranks {other} and {} are driven by one thread without ncclGroupStart and ncclGroupEnd; on GPUs that \
                     may hang",
                    comm.rank
                )))
            }
            _ => {
                alone.insert(shared.name().to_owned(), comm.rank);
                Ok(())
            }
        }
    })
}

/// An init or split: kept for the end of the group, or done. The result says whether it goes on in the background.
pub(crate) fn begin(start: Start) -> Result<bool> {
    if inside() {
        GROUP.with(|g| g.borrow_mut().starts.push(start));
        return Ok(false);
    }
    finish(vec![start])
}

/// Closes a group; the outermost end does what was kept. The result says whether inits go on in the background.
///
/// # Errors
/// Without a start; the first error inside; what the calls meet.
pub(crate) fn end() -> Result<bool> {
    let group = GROUP.with(|g| {
        let mut g = g.borrow_mut();
        match g.depth {
            0 => Err(Failure::usage("ncclGroupEnd without ncclGroupStart")),
            1 => Ok(Some(std::mem::take(&mut *g))),
            _ => {
                g.depth -= 1;
                Ok(None)
            }
        }
    })?;
    let Some(group) = group else {
        return Ok(false);
    };
    if let Some(f) = group.failure {
        for start in group.starts {
            give_up(&start);
        }
        return Err(f);
    }
    if !group.starts.is_empty() && !group.calls.is_empty() {
        return Err(Failure::usage("a group holds inits and communication; they cannot be merged"));
    }
    let goes_on = finish(group.starts)?;
    let mut of_comm: Vec<OfComm> = Vec::new();
    for (comm, stream, call) in group.calls {
        match of_comm.iter_mut().find(|c| c.0.handle == comm.handle) {
            Some(c) => c.1.push((stream, call)),
            None => of_comm.push((comm, vec![(stream, call)])),
        }
    }
    for (comm, calls) in &of_comm {
        enqueue(comm, calls)?;
    }
    Ok(goes_on)
}

fn give_up(start: &Start) {
    if let Start::Init(comm, ..) = start {
        comm.forget();
    }
}

/// Polls all until each is done. After an error the others are given up too: their ranks are of the same program.
fn finish(mut starts: Vec<Start>) -> Result<bool> {
    let mut goes_on = false;
    while !starts.is_empty() {
        let mut i = 0;
        while i < starts.len() {
            let done = match &mut starts[i] {
                Start::Init(_, _, false) => Ok(true),
                Start::Init(_, job, true) => job.poll(),
                Start::Split(split, out) => split.poll().map(|step| match step {
                    SplitStep::NotYet => false,
                    SplitStep::Done(child) => {
                        // SAFETY: the caller of ncclCommSplit gave a valid place and keeps it until the group ends.
                        unsafe { out.write(child.map_or(0, |c| c.handle)) };
                        true
                    }
                }),
            };
            match done {
                Ok(false) => i += 1,
                Ok(true) => {
                    if let Start::Init(comm, job, false) = starts.remove(i) {
                        *lock(&comm.job) = Some(job);
                        goes_on = true;
                    }
                }
                Err(f) => {
                    starts.iter().for_each(give_up);
                    return Err(f);
                }
            }
        }
    }
    Ok(goes_on)
}

/// Goes on with a non-blocking init: its state as `ncclCommGetAsyncError` gives it.
pub(crate) fn state_of(comm: &Arc<Comm>) -> Code {
    if let Some(f) = comm.failure.get() {
        return f.code;
    }
    let mut job = lock(&comm.job);
    let Some(running) = job.as_mut() else {
        return Code::Success;
    };
    match running.poll() {
        Ok(false) => Code::InProgress,
        Ok(true) => {
            *job = None;
            Code::Success
        }
        Err(f) => {
            *job = None;
            drop(job);
            comm.fail(f).code
        }
    }
}
