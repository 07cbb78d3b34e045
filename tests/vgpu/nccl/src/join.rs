//! How ranks find each other: init and split as jobs that are polled, so that one thread can join several ranks.

use std::sync::atomic::Ordering::*;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::comm::{Comm, lock};
use crate::error::{Code, Failure, Result, cuda, say_line};
use crate::member::state;
use crate::shared::{Opened, Shared, wait};

/// `NCCL_SPLIT_NOCOLOR`: the rank takes no part in the new communicators.
pub(crate) const NO_COLOR: i32 = -1;

enum Plan {
    /// Opens the memory of this name.
    Open(String),
    /// Waits for all ranks to join.
    Join(Arc<Shared>),
}

/// An init that goes on.
pub(crate) struct Job {
    comm: Weak<Comm>,
    plan: Plan,
    since: Instant,
}

impl Job {
    pub fn new(comm: &Arc<Comm>, name: String) -> Job {
        Job { comm: Arc::downgrade(comm), plan: Plan::Open(name), since: Instant::now() }
    }

    /// Goes on; true when all ranks have joined.
    ///
    /// # Errors
    /// If ranks disagree, one died, or the time is over.
    pub fn poll(&mut self) -> Result<bool> {
        let Some(comm) = self.comm.upgrade() else {
            return Err(Failure::argument("the communicator was destroyed before its init was done"));
        };
        let fail = |f: Failure| Failure {
            text: format!("ncclCommInitRank: rank {} of {}: {}", comm.rank, comm.n, f.text),
            ..f
        };
        let result = self.step(&comm).map_err(fail);
        if let (Err(f), Plan::Join(shared)) = (&result, &self.plan) {
            shared.member(comm.rank).fail(&f.text);
            shared.unlink();
            shared.ring();
        }
        result
    }

    fn step(&mut self, comm: &Arc<Comm>) -> Result<bool> {
        if let Plan::Open(name) = &self.plan {
            match Shared::open(name, comm.n)? {
                Opened::Ready(shared) => {
                    shared.join(comm.rank, comm.device, comm.uuid)?;
                    self.plan = Plan::Join(Arc::new(shared));
                }
                Opened::NotYet => {
                    std::thread::sleep(Duration::from_micros(200));
                    return self.in_time(comm, 0).map(|()| false);
                }
            }
        }
        let Plan::Join(shared) = &self.plan else {
            return Ok(false);
        };
        let bell = shared.bell();
        let Some(missing) = shared.missing() else {
            distinct_devices(shared)?;
            let _ = comm.shared.set(shared.clone());
            listen(comm);
            return Ok(true);
        };
        for r in (0..comm.n).filter(|r| *r != comm.rank) {
            let m = shared.member(r);
            let why = match m.state.load(Acquire) {
                state::EMPTY => continue,
                state::FAILED => m.message(),
                state::ABORTED | state::LEFT => "has gone".to_owned(),
                _ if !m.alive() => format!("is dead: its process {} ended", m.pid.load(Relaxed)),
                _ => continue,
            };
            return Err(Failure::new(Code::RemoteError, format!("rank {r} {why}")));
        }
        self.in_time(comm, missing)?;
        shared.sleep(bell, Duration::from_millis(1));
        Ok(false)
    }

    fn in_time(&self, comm: &Comm, missing: usize) -> Result<()> {
        if self.since.elapsed() < comm.timeout {
            return Ok(());
        }
        let seconds = self.since.elapsed().as_secs_f64();
        let text = format!("rank {missing} has not joined in {seconds:.1} s (VGPU_NCCL_TIMEOUT)");
        Err(Failure::new(Code::SystemError, text).with_cuda(cuda::TIMEOUT))
    }
}

/// A device may serve one rank of a communicator, unless VGPU_NCCL_SHARE_DEVICES=1 says otherwise.
fn distinct_devices(shared: &Shared) -> Result<()> {
    if std::env::var("VGPU_NCCL_SHARE_DEVICES").is_ok_and(|v| v == "1") {
        return Ok(());
    }
    let uuid = |r: usize| shared.member(r).uuid.each_ref().map(|w| w.load(Relaxed));
    for a in 0..shared.ranks() {
        for b in 0..a {
            if uuid(a) == uuid(b) && uuid(a) != [0, 0] {
                return Err(Failure::usage(format!(
                    "ranks {b} and {a} are both on device {}; give each rank a device of its own (VGPU_DEVICES), or set \
                     VGPU_NCCL_SHARE_DEVICES=1",
                    shared.member(a).device.load(Relaxed)
                )));
            }
        }
    }
    Ok(())
}

/// Starts the thread that makes this rank's streams run when another rank waits for them: on a GPU they run by
/// themselves, here only when somebody waits for them.
fn listen(comm: &Arc<Comm>) {
    let (weak, shared, rank) = (Arc::downgrade(comm), comm.shared().clone(), comm.rank);
    let thread = std::thread::Builder::new().name(format!("vgpu-nccl-{rank}"));
    let spawned = thread.spawn(move || {
        let member = shared.member(rank);
        let mut seen = member.wanted.load(Acquire);
        while member.state.load(Acquire) == state::JOINED {
            wait(&member.wanted, seen, Duration::from_millis(500));
            let now = member.wanted.load(Acquire);
            let Some(comm) = weak.upgrade() else {
                return;
            };
            if now != seen {
                seen = now;
                push(&comm);
            }
        }
    });
    if let Err(e) = spawned {
        say_line(&format!(
            "vgpu nccl: rank {rank}: no thread to answer other ranks ({e}); streams run when synchronised alone"
        ));
    }
}

/// Makes the streams run that hold operations of `comm`.
fn push(comm: &Comm) {
    let first = lock(&comm.pending).first().map(|p| p.1);
    let streams = match first {
        Some(stream) => vec![stream],
        None => lock(&comm.graph_streams).clone(),
    };
    let _within = comm.driver.within(comm.context);
    for stream in streams {
        // A stream that records a graph must not be synchronised.
        if comm.driver.is_capturing(stream).is_ok_and(|c| !c) {
            // SAFETY: the driver validates the handle. Errors stay with the stream, where the program sees them.
            unsafe { (comm.driver.synchronize)(stream.0) };
        }
    }
}

/// A split that goes on.
pub(crate) struct Split {
    parent: Arc<Comm>,
    number: u64,
    color: i32,
    key: i32,
    posted: bool,
    child: Option<(Arc<Comm>, Job)>,
    since: Instant,
}

/// What a polled split gives.
pub(crate) enum SplitStep {
    /// Not all ranks came.
    NotYet,
    /// The new communicator; none for [`NO_COLOR`].
    Done(Option<Arc<Comm>>),
}

impl Split {
    pub fn new(parent: &Arc<Comm>, color: i32, key: i32) -> Split {
        Split {
            parent: parent.clone(),
            number: u64::from(parent.splits.fetch_add(1, AcqRel)),
            color,
            key,
            posted: false,
            child: None,
            since: Instant::now(),
        }
    }

    /// Goes on.
    ///
    /// # Errors
    /// As [`Job::poll`].
    pub fn poll(&mut self) -> Result<SplitStep> {
        let (parent, shared) = (&self.parent, self.parent.shared());
        if !self.posted {
            shared.member(parent.rank).post_split(self.number, self.color, self.key);
            shared.ring();
            self.posted = true;
        }
        if let Some((child, job)) = &mut self.child {
            let done = job.poll().inspect_err(|_| child.forget())?;
            return Ok(if done { SplitStep::Done(Some(child.clone())) } else { SplitStep::NotYet });
        }
        let bell = shared.bell();
        let posted: Vec<_> = (0..parent.n).map(|r| shared.member(r).posted_split(self.number)).collect();
        if let Some(missing) = posted.iter().position(Option::is_none) {
            let m = shared.member(missing);
            let why = match m.state.load(Acquire) {
                state::JOINED if m.alive() => None,
                state::FAILED => Some(m.message()),
                _ => Some("has gone".to_owned()),
            };
            // Posted just before it left, perhaps.
            if let (Some(why), None) = (why, m.posted_split(self.number)) {
                let text = format!("ncclCommSplit: rank {missing} {why}");
                return Err(Failure::new(Code::RemoteError, text));
            }
            if self.since.elapsed() > parent.timeout {
                let text = format!(
                    "ncclCommSplit: rank {missing} has not come in {:.1} s (VGPU_NCCL_TIMEOUT)",
                    self.since.elapsed().as_secs_f64()
                );
                return Err(Failure::new(Code::SystemError, text).with_cuda(cuda::TIMEOUT));
            }
            shared.sleep(bell, Duration::from_millis(1));
            return Ok(SplitStep::NotYet);
        }
        if self.color == NO_COLOR {
            return Ok(SplitStep::Done(None));
        }
        let mut members: Vec<(i32, usize)> = Vec::new();
        for (r, (color, key)) in posted.into_iter().flatten().enumerate() {
            if color == self.color {
                members.push((key, r));
            }
        }
        members.sort_unstable();
        let rank = members.iter().position(|m| m.1 == parent.rank);
        let rank = rank.ok_or_else(|| Failure::new(Code::InternalError, "a split lost its own rank"))?;
        let child = Comm::new(parent.driver, rank, members.len(), Some(parent.device))?;
        let job = Job::new(&child, format!("{}-s{}-{}", shared.name(), self.number, self.color));
        self.child = Some((child, job));
        Ok(SplitStep::NotYet)
    }
}
