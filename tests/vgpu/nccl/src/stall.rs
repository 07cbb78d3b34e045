//! Waiting for another rank: whether it can still come, how long, and how the processor is left to others meanwhile.

use std::sync::atomic::Ordering::*;
use std::time::{Duration, Instant};

use crate::call::describe;
use crate::comm::Comm;
use crate::error::{Code, Failure, Result, cuda};
use crate::member::{NOBODY, state};
use crate::shared::Shared;

/// How long a wait may last before the other rank's queue is asked to run.
const PATIENCE: Duration = Duration::from_millis(5);
/// Time between looks at the process table.
const LIVENESS: Duration = Duration::from_millis(100);
/// A circle of waiting ranks must stand still that long to be called one.
const CIRCLE: Duration = Duration::from_millis(500);
/// Looks in vain before the thread sleeps.
const SPINS: u32 = 32;

/// A rank of a circle, its progress, and how often it had looked in vain.
type Link = (usize, u64, u64);

/// What a waiting operation remembers.
#[derive(Default)]
pub(crate) struct Stall {
    since: Option<Instant>,
    spins: u32,
    next_call: Option<Instant>,
    next_liveness: Option<Instant>,
    circle: Option<(Instant, Vec<Link>)>,
}

impl Comm {
    /// Something was done: waiting starts anew.
    pub(crate) fn advanced(&self, stall: &mut Stall) {
        let me = self.shared().member(self.rank);
        me.progress.fetch_add(1, Relaxed);
        if stall.since.is_some() {
            me.waits_for.store(NOBODY, Release);
            *stall = Stall::default();
        }
    }

    /// Nothing could be done because of rank `other`.
    ///
    /// # Errors
    /// If the other rank cannot come, or the time is over. The caller looks once more before it believes so: the other
    /// rank may have published what was missing just before it left.
    pub(crate) fn stalled(&self, stall: &mut Stall, other: usize, what: &dyn Fn() -> String) -> Result<()> {
        let shared = self.shared();
        let (me, peer) = (shared.member(self.rank), shared.member(other));
        let now = Instant::now();
        let since = *stall.since.get_or_insert(now);
        me.waits_for.store(other as u32, Release);
        me.looks.fetch_add(1, Release);

        let gone = match peer.state.load(Acquire) {
            state::LEFT => Some("has destroyed its communicator".to_owned()),
            state::ABORTED => Some("has aborted its communicator".to_owned()),
            state::FAILED => Some(format!("failed ({})", peer.message())),
            _ => None,
        };
        let waited = now - since;
        let look = stall.next_liveness.get_or_insert(since + LIVENESS);
        let mut dead = None;
        if now >= *look {
            *look = now + LIVENESS;
            if !peer.alive() {
                dead = Some(format!("is dead: its process {} ended", peer.pid.load(Relaxed)));
            } else if let Some(text) = self.circle(stall, now) {
                return Err(Failure::usage(format!("{}: {text}", what())));
            }
        }
        if let Some(why) = gone.or(dead) {
            return Err(Failure::new(Code::RemoteError, format!("{}: rank {other} {why}", what())));
        }
        let call = stall.next_call.get_or_insert(since + PATIENCE);
        if now >= *call {
            *call = now + 10 * PATIENCE;
            shared.want(other);
        }
        if waited > self.timeout {
            // Not before: another thread may make the next call, after a long time of other work.
            if !peer.thread_alive() {
                let (tid, seconds) = (peer.tid.load(Relaxed), waited.as_secs_f64());
                let text = format!(
                    "{}: rank {other} is dead: its thread {tid} ended, and no other came in {seconds:.1} s",
                    what()
                );
                return Err(Failure::new(Code::RemoteError, text).with_cuda(cuda::TIMEOUT));
            }
            let does = describe_current(shared, other);
            let text = format!(
                "{}: rank {other} has not come in {:.1} s (VGPU_NCCL_TIMEOUT); it {does}",
                what(),
                waited.as_secs_f64()
            );
            return Err(Failure::new(Code::SystemError, text).with_cuda(cuda::TIMEOUT));
        }
        Ok(())
    }

    /// Leaves the processor to others between two looks: first by yielding, then asleep until something is published.
    pub(crate) fn pause(&self, stall: &mut Stall, bell: u32) {
        stall.spins = stall.spins.saturating_add(1);
        if stall.spins < SPINS {
            std::thread::yield_now();
        } else {
            // Short, because the same thread may have other streams to run.
            self.shared().sleep(bell, Duration::from_micros(200));
        }
    }

    /// Follows who waits for whom. A circle in which all looked in vain again, and nobody moved, never ends.
    fn circle(&self, stall: &mut Stall, now: Instant) -> Option<String> {
        let shared = self.shared();
        let (mut chain, mut at) = (Vec::new(), self.rank);
        while !chain.iter().any(|(r, _, _)| *r == at) {
            let m = shared.member(at);
            let next = m.waits_for.load(Acquire);
            if next as usize >= self.n {
                stall.circle = None;
                return None;
            }
            chain.push((at, m.progress.load(Acquire), m.looks.load(Acquire)));
            at = next as usize;
        }
        if at != self.rank || chain.len() < 2 {
            return None;
        }
        let same =
            |old: &[Link]| old.len() == chain.len() && old.iter().zip(&chain).all(|(o, c)| (o.0, o.1) == (c.0, c.1));
        match &stall.circle {
            Some((since, old)) if same(old) => {
                let looked = old.iter().zip(&chain).all(|(o, c)| c.2 > o.2 + 2);
                (now - *since > CIRCLE && looked).then(|| {
                    let each = chain.iter().map(|(r, _, _)| format!("rank {r} {}", describe_current(shared, *r)));
                    format!(
                        "the ranks wait for each other: {}; the order of calls must be the same, or the calls in one group",
                        each.collect::<Vec<_>>().join(", ")
                    )
                })
            }
            _ => {
                stall.circle = Some((now, chain));
                None
            }
        }
    }
}

/// What a rank runs now, as the end of a sentence.
fn describe_current(shared: &Shared, r: usize) -> String {
    let m = shared.member(r);
    let waits = match m.waits_for.load(Acquire) {
        NOBODY => String::new(),
        other => format!(", waiting for rank {other}"),
    };
    match m.current() {
        Some(words) => format!("runs {}{waits}", describe(&words)),
        None => format!("runs nothing of this communicator, {} collectives done", m.posted.load(Relaxed)),
    }
}
