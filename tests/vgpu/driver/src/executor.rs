//! Queues operations with the edges that streams and events mean, and runs them when something forces them.

use std::collections::BTreeSet;
use std::sync::MutexGuard;
use std::time::Duration;

use crate::code::Result;
use crate::config::Streams;
use crate::driver::{Driver, State};
use crate::ffi::Handle;
use crate::op::{Op, Ran};
use crate::queue::OpId;
use crate::report::{append, quote, say};

impl State {
    /// What an operation on `stream` has to wait for by the order of streams.
    pub fn edges(&self, stream: Handle) -> Result<Vec<OpId>> {
        let s = self.streams.get(stream)?;
        let mut deps: Vec<OpId> = s.waits.iter().copied().chain(s.last).collect();
        let null = self.contexts.get(s.context)?.null_stream;
        if stream == null {
            let blocking = self.streams.iter().filter(|(_, o)| o.context == s.context && !o.non_blocking);
            deps.extend(blocking.flat_map(|(_, o)| o.waits.iter().copied().chain(o.last)));
        } else if !s.non_blocking {
            deps.extend(self.streams.get(null)?.last);
        }
        Ok(deps)
    }

    /// Queues an operation at the end of a stream (its true handle, as [`State::stream`] gives it). Gives its number, or
    /// `None` when the stream is capturing and it was recorded.
    pub fn submit(&mut self, stream: Handle, op: Op) -> Result<Option<OpId>> {
        if let Some(part) = self.streams.get(stream)?.captured.clone() {
            self.record(&part, stream, op)?;
            return Ok(None);
        }
        self.no_implicit(stream)?;
        let deps = self.edges(stream)?;
        let context = self.streams.get(stream)?.context;
        let id = self.queue.push(op, stream, context, deps);
        let s = self.streams.get_mut(stream)?;
        s.waits.clear();
        s.last = Some(id);
        Ok(Some(id))
    }

    /// Everything that a stream has to end before it is idle.
    pub fn tail(&self, stream: Handle) -> Result<Vec<OpId>> {
        let s = self.streams.get(stream)?;
        let mut tail: Vec<OpId> = s.waits.iter().copied().chain(s.last).collect();
        if stream == self.contexts.get(s.context)?.null_stream {
            tail.extend(self.edges(stream)?);
        }
        Ok(tail)
    }

    /// Everything that the streams of a context have to end.
    pub fn context_tail(&self, context: Handle) -> Vec<OpId> {
        let ours = self.queue.iter().filter(|(_, p)| p.context == context);
        ours.map(|(id, _)| id).collect()
    }
}

impl Driver {
    /// Runs one operation that is ready, without the lock. False when it gave itself back as not ready.
    fn run_one<'a>(&'a self, mut st: MutexGuard<'a, State>, id: OpId, forced: bool) -> (MutexGuard<'a, State>, bool) {
        let Some((op, context)) = st.queue.begin(id) else {
            return (st, true);
        };
        // A failed context runs nothing more; what was queued ends at once.
        let failed = st.contexts.get(context).map_or(true, |c| c.error.is_some());
        drop(st);
        let ran = match op {
            Op::Commit(_) | Op::Free(_) | Op::Record(_) => op.run(self, forced),
            _ if failed => Ran::Done,
            _ => op.run(self, forced),
        };
        // Dropping the last clone may call into the library that queued it: not under the lock.
        let name = op.name().to_owned();
        drop(op);
        let mut st = self.state();
        match ran {
            Ran::NotReady => {
                st.queue.put_back(id);
                return (st, false);
            }
            Ran::Done => {}
            Ran::Failed(code, text, fault) => {
                st.fail(context, code, &text);
                say(&format!("{code:?}: {text}"));
                let (kind, kernel, line, thread) = fault.as_ref().map_or((String::new(), name, 0, 0), |f| {
                    (format!("{:?}", f.kind), f.kernel.clone(), f.line, f.thread)
                });
                append(&format!(
                    "{{\"code\":{},\"kind\":{},\"kernel\":{},\"line\":{line},\"source_line\":{},\"block\":{:?},\"thread\":{thread},\"message\":{}}}",
                    code.0,
                    quote(&kind),
                    quote(&kernel),
                    fault.as_ref().and_then(|f| f.source_line).map_or("null".into(), |l| l.to_string()),
                    fault.as_ref().map_or([0; 3], |f| f.block),
                    quote(&text),
                ));
            }
        }
        let gone = st.queue.finish(id);
        drop(st);
        drop(gone);
        self.changed.notify_all();
        (self.state(), true)
    }

    /// Runs what `targets` need until they have ended. The order among what is ready is drawn from the seed, and now and then
    /// something that nobody waits for is run too.
    pub fn force<'a>(&'a self, mut st: MutexGuard<'a, State>, targets: &[OpId]) -> MutexGuard<'a, State> {
        let needed = st.queue.closure(targets);
        let mut asked: BTreeSet<OpId> = BTreeSet::new();
        while targets.iter().any(|t| !st.queue.done(*t)) {
            let ready = |st: &State, wanted: bool| -> Vec<OpId> {
                let of = |id: &&OpId| needed.contains(id) == wanted && !asked.contains(id);
                st.queue.ready().iter().filter(of).copied().collect()
            };
            let (mut choice, other) = (ready(&st, true), ready(&st, false));
            let mut forced = true;
            // Work nobody waits for goes first at times, and always when an awaited operation is not ready for its sake.
            if !other.is_empty() && (choice.is_empty() && !asked.is_empty() || st.queue.digress()) {
                (choice, forced) = (other, false);
            }
            if choice.is_empty() {
                // Either another thread runs what we need, or it waits for another process.
                asked.clear();
                st = match self.changed.wait_timeout(st, Duration::from_micros(200)) {
                    Ok((st, _)) => st,
                    Err(e) => e.into_inner().0,
                };
                continue;
            }
            let id = choice[st.queue.draw(choice.len())];
            let ended;
            (st, ended) = self.run_one(st, id, forced);
            if !ended {
                asked.insert(id);
            }
        }
        st
    }

    /// Whether all of `targets` have ended. Asking makes progress at times, so that a loop of questions ends.
    pub fn poll<'a>(&'a self, mut st: MutexGuard<'a, State>, targets: &[OpId]) -> (MutexGuard<'a, State>, bool) {
        let needed = st.queue.closure(targets);
        let ready: Vec<OpId> = st.queue.ready().iter().filter(|id| needed.contains(id)).copied().collect();
        if !ready.is_empty() && st.queue.draw(2) == 0 {
            let id = ready[st.queue.draw(ready.len())];
            st = self.run_one(st, id, true).0;
        }
        let done = targets.iter().all(|t| st.queue.done(*t));
        (st, done)
    }

    /// Runs everything that can run now, once.
    pub fn drain<'a>(&'a self, mut st: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let mut asked = BTreeSet::new();
        while let Some(id) = st.queue.ready().iter().find(|id| !asked.contains(*id)).copied() {
            let ended;
            (st, ended) = self.run_one(st, id, false);
            if !ended {
                asked.insert(id);
            }
        }
        st
    }

    /// What follows a call that queued something: nothing, or all of it when streams are eager.
    pub fn queued<'a>(&'a self, st: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        match self.config.streams {
            Streams::Lazy => st,
            Streams::Eager => self.drain(st),
        }
    }
}
